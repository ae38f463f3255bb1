"""An old name of `vllm_adafuse.offline.switch_runtime`."""

import sys

from vllm_adafuse.offline import switch_runtime

sys.modules[__name__] = switch_runtime
