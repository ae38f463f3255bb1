"""The compute of AdaFuse: one op per file, registered as `torch.ops.vllm_adafuse.*`.

    gate           hidden states          -> routes   (live router; fills the passports once)
    gather_routes  token ids, passports   -> routes   (one gather per step)
    sgmm           x, y, banks, routes    -> y + deltas of the chosen experts
      shrink       its first kernel: x into the rank space of the experts
      expand       its second kernel: out of it, added to y

A route is a pair of [T, k] tensors, expert ids (int32) and weights (float32), written once per
step and read by every layer. Nothing here imports vLLM. Importing a module registers its op; this
file imports none of them, because transformers imports whatever `kernels` it finds on its path,
and in this repository's root that is this folder.
"""
