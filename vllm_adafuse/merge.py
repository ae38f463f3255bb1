"""An old name of `vllm_adafuse.format.merge`."""

import sys

from vllm_adafuse.format import merge

sys.modules[__name__] = merge
