"""LoRA shrink of the chosen experts: s[t, p, e] = gates[t, e] A[p, e] x[t].

p counts the linears of a packed projection (q, k, v), which have shrinks of their own. This is the
first half of SGMM (AdaFuse, arXiv 2603.11873, section 3). The decode kernel cuts `in` into slices,
so that many programs read one expert's A; the last of them adds their sums in a fixed order. An
expert that no token chose is not read. Rows of s are zero where the token did not choose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import MAX_SHARED, MAX_SHRINK_SPLIT_K
from vllm_adafuse.kernels.device.shrink import shrink_program
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.registry import matmul_f32
from vllm_adafuse.kernels.whole import cdiv, power_of_2
from vllm_adafuse.kernels.workspace import Workspace

BLOCK_IN = 256
SHRINK_STAGES = 3
# Elements of `in` that one program of a launch of its own reads, and about how many programs there
# are at most: with one or two experts chosen nothing else keeps the GPU busy. (Within a projection
# the shrink has time: the caller says how it is cut.)
_SLICE = 512
_PROGRAMS = 1024
# Programs that are no burden to the product which they stand in front of.
_FEW_PROGRAMS = 24


@triton.jit(do_not_specialize=["n_tokens"])
def _shrink_kernel(
    x_ptr, a_ptr, gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
    semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, split_k,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # launched before the kernel in front of it has ended
        tl.extra.cuda.gdc_wait()
    shrink_program(
        tl.program_id(0), x_ptr, a_ptr, gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr,
        split_k_semaphore_ptr, semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank,
        n_linears, 0, split_k, False, BLOCK_T, BLOCK_R, BLOCK_IN, STAGES,
    )  # fmt: skip


@dataclass(frozen=True)
class ShrinkGrid:
    """How the programs of a bank's shrink are cut: slots, each of `split_k` programs."""

    block_r: int
    split_k: int
    slots: int

    @classmethod
    def of(cls, lora_a: torch.Tensor, split_k: int = 0) -> ShrinkGrid:
        """For an A, in so many slices of `in`; 0: a sane number."""
        linears, experts, rank, size_in = lora_a.shape
        block_r = min(32, max(16, power_of_2(rank)))
        slots = linears * experts * cdiv(rank, block_r)
        alone = max(1, min(MAX_SHRINK_SPLIT_K, size_in // _SLICE, _PROGRAMS // slots))
        return cls(block_r, split_k or alone, slots)

    def for_tokens(self, tokens: int, experts: int) -> ShrinkGrid:
        """With slots for an expert of each token, or two where one linear is all, as far as there
        are so many, which take turns if more are active: the tiles that follow share processors
        with slots, with empty ones too. (7bf8d2a: qkv at 8 tokens with 8 slots 19.2 to 20.3 us,
        with 16 27.3 to 29.7; b4c16c0: o of 4 mixtures with 8 20.3, with 16 17.0, of LoRAs 14.4.)"""
        of_expert = self.slots // experts
        own = power_of_2(tokens) * (2 if of_expert == 1 else 1)
        most = max(own, _FEW_PROGRAMS // (of_expert * self.split_k))
        return replace(self, slots=of_expert * min(experts, most))

    @property
    def programs(self) -> int:
        return self.slots * self.split_k


def fit_cols(wanted: int, block_r: int, block_t: int, itemsize: int) -> int:
    """Elements of `in` in a step of the shrink: as many as wanted, or as shared memory holds."""
    while SHRINK_STAGES * (block_r + block_t) * wanted * itemsize > MAX_SHARED:
        wanted //= 2
    return wanted


def shrink_triton(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    gates: torch.Tensor,
    active: torch.Tensor,
    workspace: Workspace,
) -> torch.Tensor:
    """Projects up to 64 tokens into the rank space of their experts, in one launch.

    Args:
        x: [T, in], the projection's input; rows contiguous.
        lora_a: [P, E, R, in] contiguous, dtype of x; or float8_e4m3fn, see `Projection`.
        gates: [N, E] float32, N >= T; rows past T are not read.
        active: [1] int64, a bit for each expert with a gate in the first T rows.
        workspace: of the device.

    Returns:
        lora_a_out: [T, P, E * R], dtype of x, in the workspace.
    """
    tokens = x.shape[0]
    linears, experts, rank, size_in = lora_a.shape
    grid = ShrinkGrid.of(lora_a)
    lora_a_out = workspace.view(x.dtype, tokens, linears, experts * rank)
    block_t = max(16, power_of_2(tokens))
    block_in = fit_cols(BLOCK_IN, grid.block_r, block_t, x.element_size())
    launch(
        _shrink_kernel, (grid.programs,),
        x, lora_a, gates, active, lora_a_out, workspace.partial_sums, workspace.split_k_semaphores,
        workspace.unused, tokens, x.stride(0), size_in, experts, rank, linears, grid.split_k,
        BLOCK_T=block_t, BLOCK_R=grid.block_r, BLOCK_IN=block_in, STAGES=SHRINK_STAGES, num_warps=4,
        num_stages=SHRINK_STAGES, **overlap(on_hopper(x)),
    )  # fmt: skip
    return lora_a_out


def shrink_torch(
    x: torch.Tensor, lora_a: torch.Tensor, gates: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference and the path of long batches: see `shrink_triton`; scale: [P, E, R], of an A in fp8."""
    tokens, size_in = x.shape
    linears, experts, rank, _ = lora_a.shape
    a = lora_a.view(-1, size_in).to(x.dtype)
    unweighted = matmul_f32(x, a.t()).view(tokens, linears, experts, rank)
    if scale is not None:
        unweighted *= scale
    lora_a_out = torch.empty(tokens, linears, experts, rank, dtype=x.dtype, device=x.device)
    torch.mul(unweighted, gates[:tokens, None, :, None], out=lora_a_out)
    return lora_a_out.view(tokens, linears, experts * rank)
