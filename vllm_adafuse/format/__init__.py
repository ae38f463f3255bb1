"""Files of adapters and backbones, and their checks. Knows nothing of vLLM or Triton.

    config.py, keys.py     adapter_config.json
    context_keys.py        its keys of routers that see a request's past
    layout.py              the tensors that a config asks for on a backbone
    adapter.py             an adapter directory: checked, read
    values.py, overflow.py what its tensors hold
    fp8.py                 experts in eight bits
    digest.py, origin.py   hashes: of an adapter's content, of the backbone it was made on
    backbone.py            a backbone: names, shapes, tensors
    architectures.py       the table of decoder families
    pretrained.py          what stands before transformers: configs, tokenizers
    vocabulary.py          tokens that a backbone has no row for
    places.py              where directories and files are
    reading.py             JSON files that strangers wrote
    tensor_file.py         safetensors files that strangers wrote
    files.py, tree.py      files written, files taken along
    random_adapter.py      writes adapters
    normals.py             its values
    compose.py, merge.py   make checkpoints of a backbone and adapters
"""
