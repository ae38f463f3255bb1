"""An old name of `vllm_adafuse.offline.reference`."""

import sys

from vllm_adafuse.offline import reference

sys.modules[__name__] = reference
