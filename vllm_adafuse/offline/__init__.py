"""What a served model computes, computed without vLLM.

    reference.py       the adapted model in plain transformers: the measure of truth
    routing.py         the routes of token ids
    switch_runtime.py  LoRA-Switch: experts merged into the weights, token by token
"""
