"""The compute of AdaFuse: one op per file, registered as `torch.ops.vllm_adafuse.*`.

    gate           hidden states          -> routes   (live router; fills the passports once)
    gather_routes  token ids, passports   -> routes   (one gather per step)
    spread_routes  routes                 -> gates, present experts, counters (once per step)
    linear         x, [W; A], B, gates    -> the adapted projection, activated where it is gate_up
      stream_linear  its kernel for few tokens
    sgmm           y, x, A, B, gates      -> y + deltas, over a projection of any kind
      shrink         its first kernel: x into the rank space of the experts
      expand         its second kernel: out of it, added to y; ends `linear` for many tokens
    switch         a route, W, A, B       -> W + deltas of all linears (one stream; no torch op)
    scratch        memory that all launches share
    tiles          how the streaming kernel cuts a product, by shape and device

A route is a pair of [T, k] tensors, expert ids (int32) and weights (float32), written once per
step; gates [T, E] are its weights at their experts' places. Nothing here imports vLLM. Importing a
module registers its op; this file imports none of them, because transformers imports whatever
`kernels` it finds on its path, and in this repository's root that is this folder.
"""
