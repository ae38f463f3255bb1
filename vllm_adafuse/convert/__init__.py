"""Adapters of other libraries in AdaFuse's format: `vllm-adafuse convert`.

One file per source format, `registry.py` lists them. Each tells by the names of tensors whether a
directory is its own, and reads it into a `Mixture`; `bank.py` writes that in our format. Pickles
are read here alone, in a process of their own (`unpickle.py`); serving never imports this package.
"""
