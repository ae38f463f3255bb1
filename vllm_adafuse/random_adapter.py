"""An old name of `vllm_adafuse.format.random_adapter`."""

import sys

from vllm_adafuse.format import random_adapter

sys.modules[__name__] = random_adapter
