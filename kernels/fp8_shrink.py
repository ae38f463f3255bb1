"""LoRA shrink of long steps on pages in fp8:

    s[t, p, e] = gates[t, e] scale[p, e] A[p, e] x[t]

cuBLAS cannot multiply such an A beside W, nor x in another dtype by it alone. A program takes some pages
of one linear for a tile of tokens, widens A in registers, and weighs the sums before they are rounded:
so what is left for the expand is a product with B. A tile that has no gate of the pages reads none of
them and leaves zeros. In steps that list blocks of 8 pages for every 128 tokens (`page_routes`)
those of other blocks stay undefined. SGMM's first half (AdaFuse, arXiv 2603.11873, section 3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import BLOCK_ER
from vllm_adafuse.kernels.device.gates import load_gates
from vllm_adafuse.kernels.device.shrink import load_scale
from vllm_adafuse.kernels.dispatch import MAX_ACTIVE_TOKENS, MAX_SHORT_EXPAND_TOKENS
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.page_routes import TILE_TOKENS
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.shrink import SHRINK_STAGES, fit_cols
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# Tokens of a program; elements of `in` in a step, as far as shared memory holds them. Not tuned.
BLOCK_T, BLOCK_IN = 64, 256


@triton.jit(do_not_specialize=["n_tokens"])
def _fp8_shrink_kernel(
    x_ptr, a_ptr, gates_ptr, lora_a_out_ptr, tile_blocks_ptr, n_tokens, x_stride, size_in,
    n_experts, n_linears,
    RANK: tl.constexpr, LISTED: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """LISTED: tokens for which `tile_blocks` lists blocks of PARTS times BLOCK_E experts; or 0."""
    if PDL:  # launched while the kernel before it ends
        tl.extra.cuda.gdc_wait()
    first_token, linear_idx = tl.program_id(0) * BLOCK_T, tl.program_id(1)
    rows = first_token + tl.arange(0, BLOCK_T)
    token_mask = rows < n_tokens
    x_at = x_ptr + rows.to(tl.int64)[None, :] * x_stride
    lora_a_out_at = (rows.to(tl.int64) * n_linears + linear_idx) * (n_experts * RANK)
    count, listed_ptr = tl.cdiv(n_experts, BLOCK_E), tile_blocks_ptr
    if LISTED:
        listed_ptr += first_token // LISTED * (1 + tl.cdiv(n_experts, PARTS * BLOCK_E))
        count = tl.load(listed_ptr) * PARTS
    for i in range(tl.program_id(2), count, tl.num_programs(2)):
        chunk = i
        if LISTED:
            chunk = tl.load(listed_ptr + 1 + i // PARTS) * PARTS + i % PARTS
        gates = load_gates(gates_ptr, rows, token_mask, n_experts, chunk, BLOCK_T, BLOCK_E, RANK)
        ranks = chunk * (BLOCK_E * RANK) + tl.arange(0, BLOCK_E * RANK)
        real = ranks < n_experts * RANK
        sums = tl.zeros([BLOCK_E * RANK, BLOCK_T], dtype=tl.float32)
        if tl.max((gates != 0).to(tl.int32)) != 0:
            a_at = a_ptr + (linear_idx * n_experts * RANK + ranks).to(tl.int64)[:, None] * size_in
            for start in tl.range(0, size_in, BLOCK_IN, num_stages=STAGES):
                k = start + tl.arange(0, BLOCK_IN)
                k_mask = k < size_in
                a = tl.load(a_at + k[None, :], mask=real[:, None] & k_mask[None, :], other=0.0)
                x_mask = token_mask[None, :] & k_mask[:, None]
                x = tl.load(x_at + k[:, None], mask=x_mask, other=0.0)
                sums = tl.dot(a.to(x.dtype), x, sums, input_precision="ieee")
            places = linear_idx * n_experts * RANK + ranks
            sums *= load_scale(a_ptr, n_linears * n_experts * RANK, places, real)[:, None]
        # Not a bare product: what other tokens see of a page must not matter.
        gates = tl.trans(gates)
        lora_a_out = tl.where(gates != 0, sums * gates, 0.0).to(lora_a_out_ptr.dtype.element_ty)
        at = lora_a_out_ptr + lora_a_out_at[None, :] + ranks[:, None]
        tl.store(at, lora_a_out, mask=token_mask[None, :] & real[:, None])


def fp8_shrink_triton(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    gates: torch.Tensor,
    tile_blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One launch.

    Args:
        x: [T, in]; rows contiguous.
        lora_a: [S, P, 16, in] contiguous, float8_e4m3fn, behind its scale, see `Projection`.
        gates: [N, P] float32, N >= T; rows past T are not read.
        tile_blocks: [ceil(N / 128), 1 + ceil(P / 8)] int32, see `page_routes`; None: there is none.

    Returns:
        [T, S P 16], dtype of x, weighted; undefined where `tile_blocks` lists no block.
    """
    (tokens, size_in), (linears, pages, rank, _) = x.shape, lora_a.shape
    lora_a_out = x.new_empty(tokens, linears * pages * rank)
    # Of few tokens no other thing keeps the GPU busy than programs of few pages.
    of_block = BLOCK_ER // rank
    few = 1 if tokens <= MAX_ACTIVE_TOKENS else 2
    block_e = few if tokens <= MAX_SHORT_EXPAND_TOKENS else of_block
    parts, block_t = of_block // block_e, min(BLOCK_T, max(16, power_of_2(tokens)))
    programs = cdiv(pages, block_e) if tile_blocks is None else parts
    launch(
        _fp8_shrink_kernel, (cdiv(tokens, block_t), linears, programs),
        x, lora_a, gates, lora_a_out, tile_blocks, tokens, x.stride(0), size_in, pages, linears,
        RANK=rank, LISTED=0 if tile_blocks is None else TILE_TOKENS, PARTS=parts,
        BLOCK_T=block_t, BLOCK_E=block_e,
        BLOCK_IN=fit_cols(BLOCK_IN, block_e * rank, block_t, x.element_size()),
        STAGES=SHRINK_STAGES, num_warps=8 if block_e == of_block else 4, **overlap(on_hopper(x)),
    )  # fmt: skip
    return lora_a_out
