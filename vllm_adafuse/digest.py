"""An old name of `vllm_adafuse.format.digest`."""

import sys

from vllm_adafuse.format import digest

sys.modules[__name__] = digest
