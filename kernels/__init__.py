"""The compute of AdaFuse: one op per file. Those of projections are registered with torch in
`vllm_adafuse.serving.ops`, the others here, all as `torch.ops.vllm_adafuse.*`.

    gate           hidden states          -> routes   (live router; fills the passports once)
    gather_routes  token ids, passports   -> routes   (one gather per step)
    context_routes rows of the tables     -> routes that see a request's past (`router.context`)
    spread_routes  routes                 -> gates, active experts, semaphores (once per step)
    page_routes    ids, adapter of each   -> gates, active pages, semaphores, where requests choose
    projection     x, [W; A], B, gates    -> the adapted projection, with what follows it: gate_up's
                                             activation, the rotary embedding of queries and keys
      decode_gemm    its kernel for few tokens
      tma_gemm       its kernel for some dozens, for large projections
    projection_norm  x, [W; A], B, residual -> o_proj or down_proj with its deltas, added to the
                                             residual, and the RMSNorm of that
      add_norm       its end
    sgmm           y, x, A, B, gates      -> y + deltas, over a projection of any kind
      shrink         its first kernel: x into the rank space of the experts
      expand         its second kernel: out of it, added to y; ends both projections behind
                     cuBLAS, as does
      tma_expand     for thousands of tokens, after
      dense_expand   of the experts beyond 128 ranks
    page_projection  the same over pages, in the steps that have adapters
      page_shrink    of thousands of tokens, what each tile of them needs of many pages
      fp8_shrink     of pages in fp8
    live_route     hidden states at a layer -> routes   (`router.layer`, inside the model)
    layerwise/     the same where each layer decides anew
      linear         x, [W; A; routers], B  -> the adapted projection, routed by its own input
      low_product    x, [A; routers]        -> x in rank space, logits   (float32)
      sgmm           y, A x, logits, B      -> y + deltas, over a projection of any kind
      route          its decision: logits   -> gates, and A x weighted by them
      ffn_mix        W x, A x of gate_up    -> activations of a token's experts, and their mixture
      ffn_down       y, those in rank space -> y + deltas of the down projection
    switch         a route, W, A, B       -> W + deltas of all linears (one stream; no torch op)
    kv_slots       where keys and values go in a KV cache, for the kernels that end a projection
    operands       what launchers are handed: a projection, a step's buffers
    workspace      memory that all launches share
    dispatch       which kernel runs, and how it is cut: every limit, and `plan`
    plans          what choices are made of, and for: a shape, a device, a plan
    configs        how kernels are cut, and files of tuned configs
    device/        what device code shares: gates and B (gates), two columns that belong together
                   (epilogues), tiles side by side (slices), steps of tiles (tma_steps), programs
                   of a shrink (shrink) and how they share sums and wait (sync), launches that
                   begin early (pdl)
    launch         how kernels are launched, or only compiled

A route is a pair of [T, k] tensors, expert ids (int32) and weights (float32), written once per
step; gates [T, E] are its weights at their experts' places. Nothing here imports vLLM. Importing a
module registers its op; this file imports none of them, because transformers imports whatever
`kernels` it finds on its path, and in this repository's root that is this folder.
"""
