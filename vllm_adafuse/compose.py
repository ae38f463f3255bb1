"""An old name of `vllm_adafuse.format.compose`."""

import sys

from vllm_adafuse.format import compose

sys.modules[__name__] = compose
