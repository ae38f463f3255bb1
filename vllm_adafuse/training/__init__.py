"""Training of AdaFuse adapters on Hugging Face models.

`config` says what is trained, `layers` and `losses` how, `model` puts it on a backbone, `storage`
keeps it in the adapter format, `watch` shows it in Trainer's logs, `data` and `run` are the
`vllm-adafuse train` command, `distill` makes a pre-gated mixture of a layer-wise one.
"""

from vllm_adafuse.training.config import MixtureConfig
from vllm_adafuse.training.model import AdaFuseModel
from vllm_adafuse.training.watch import watch

__all__ = ["AdaFuseModel", "MixtureConfig", "watch"]
