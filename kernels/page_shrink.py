"""LoRA shrink of long steps on pages:

    s[t, p, e] = A[p, e] x[t]          of the blocks of 8 pages that t's tile of tokens lists

A step of many requests has pages of each beside the others, and a token needs those of its own
adapter alone. What `page_routes` lists for every 128 tokens, most often one block, is all that is
multiplied: cost goes by the pages that the step has, not by those of the pool. The other columns of
s stay undefined; the expands read none of them (expand.py, tma_expand.py), and weigh by the gates.
SGMM's first half (AdaFuse, arXiv 2603.11873, section 3), its segments sorted once a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels.configs import BLOCK_ER, ExpandConfig
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.page_routes import BLOCK_PAGES, TILE_TOKENS
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.whole import cdiv

# Four others were 0 to 14 % slower at 4096 and 8192 tokens (H200, 3cc4061, shapes of Llama-3-8B): what
# bounds it is what it reads of x and A.
CONFIG = ExpandConfig(64, 64, 1, 4, 4)


@triton.jit(do_not_specialize=["n_tokens"])
def _page_shrink_kernel(
    x_desc, a_desc, lora_a_out_ptr, tile_blocks_ptr, n_tokens, size_in, n_linears,
    RANKS: tl.constexpr, TILE_TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_IN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # launched while the kernel before it ends
        tl.extra.cuda.gdc_wait()
    first_token = tl.program_id(0) * BLOCK_T
    linear_idx = tl.program_id(1)
    BLOCKS: tl.constexpr = (RANKS + BLOCK_R - 1) // BLOCK_R
    listed_ptr = tile_blocks_ptr + first_token // TILE_TOKENS * (1 + BLOCKS)
    rows = first_token + tl.arange(0, BLOCK_T)
    at = (rows.to(tl.int64) * n_linears + linear_idx) * RANKS
    for i in range(tl.load(listed_ptr)):
        first_rank = tl.load(listed_ptr + 1 + i) * BLOCK_R
        sums = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for k in tl.range(0, size_in, BLOCK_IN, num_stages=STAGES):
            x = x_desc.load([first_token, k])
            # The last block may reach into the next linear's rows, whose products are not kept.
            a = a_desc.load([linear_idx * RANKS + first_rank, k])
            sums = tl.dot(x, a.T, sums, input_precision="ieee")
        ranks = first_rank + tl.arange(0, BLOCK_R)
        mask = (rows < n_tokens)[:, None] & (ranks < RANKS)[None, :]
        sums = sums.to(lora_a_out_ptr.dtype.element_ty)
        tl.store(lora_a_out_ptr + at[:, None] + ranks[None, :], sums, mask=mask)


def page_shrink_triton(
    x: torch.Tensor, lora_a: torch.Tensor, tile_blocks: torch.Tensor
) -> torch.Tensor:
    """One launch; for what `dispatch.lists_shrink` holds.

    Args:
        x: [T, in]; rows contiguous, at multiples of 16 bytes.
        lora_a: [S, P, 16, in] contiguous, dtype of x.
        tile_blocks: [ceil(N / 128), 1 + ceil(P / 8)] int32, N >= T, see `page_routes`.

    Returns:
        [T, S P 16], undefined but for each tile's blocks, in the rows of its tokens.
    """
    (tokens, size_in), (linears, pages, rank, _) = x.shape, lora_a.shape
    lora_a_out = x.new_empty(tokens, linears * pages * rank)
    config = CONFIG
    of_x, of_a = [config.tokens, config.columns], [BLOCK_ER, config.columns]
    launch(
        _page_shrink_kernel, (cdiv(tokens, config.tokens), linears),
        TensorDescriptor.from_tensor(x, of_x),
        TensorDescriptor.from_tensor(lora_a.view(-1, size_in), of_a),
        lora_a_out, tile_blocks, tokens, size_in, linears,
        RANKS=pages * rank, TILE_TOKENS=TILE_TOKENS, BLOCK_T=config.tokens,
        BLOCK_R=BLOCK_PAGES * rank, BLOCK_IN=config.columns, STAGES=config.stages,
        num_warps=config.warps, **overlap(on_hopper(x)),
    )  # fmt: skip
    return lora_a_out
