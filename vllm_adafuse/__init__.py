"""Dynamic adapters, mixtures of LoRA experts routed per token, served by vLLM."""

__version__ = "0.2.0"
