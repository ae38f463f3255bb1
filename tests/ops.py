"""Random problems for the kernels, a float64 truth, and the error that counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from vllm_adafuse.format.fp8 import round_pair, widened
from vllm_adafuse.kernels.operands import Projection, Step, stays_in_place
from vllm_adafuse.kernels.page_routes import list_blocks, new_tile_blocks
from vllm_adafuse.kernels.plans import Shape, on_pages
from vllm_adafuse.kernels.projection_norm import workspace_sizes
from vllm_adafuse.kernels.spread_routes import list_active, new_active
from vllm_adafuse.kernels.workspace import Workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Problem:
    """One projection: see `vllm_adafuse.kernels.projection.projection`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    gates: torch.Tensor
    active: torch.Tensor
    workspace: Workspace
    adapted: list[int]
    widths: list[int]

    def projection(
        self, epilogue="", cos_sin=None, in_place=False, norm=None, fused=True
    ) -> Projection:
        """As launchers take it; of what the problem holds now, with a semaphore of its own."""
        shape = Shape(
            self.x.shape[1], tuple(self.widths), tuple(self.adapted), *self.lora_b.shape[1:],
            self.x.element_size(), epilogue, cos_sin.shape[1] if epilogue == "rotary" else 0,
            self.bias is not None, fused,
        )  # fmt: skip
        fused_weight = fused_weight_of(self) if fused else None
        lora_a = fused_weight[len(self.weight) :].view_as(self.lora_a) if fused else self.lora_a
        semaphore = torch.zeros(4, dtype=torch.int32, device=self.x.device)
        return Projection(
            shape, lora_a, self.lora_b, fused_weight, self.bias, norm, semaphore,
            in_place and stays_in_place(shape),
        )  # fmt: skip

    def in_fp8(self, *options, **more) -> tuple[Problem, Projection]:
        """The problem as its experts are when they have been rounded, and `projection` of the rounded
        ones, on pages."""
        linears, experts, rank, size_in = self.lora_a.shape
        row, parts = 0, []
        for linear_idx in range(linears):
            rows = sum(w for w, part in zip(self.widths, self.adapted) if part == linear_idx)
            parts.append((self.lora_a[linear_idx], self.lora_b[row : row + rows].transpose(0, 1)))
            row += rows
        rounded, left = [round_pair(*part) for part in parts], [widened(*part) for part in parts]
        numbers = 4 * self.lora_a.shape[:-1].numel()
        memory = self.lora_a.new_empty(numbers + self.lora_a.numel(), dtype=torch.uint8)
        scale = memory[:numbers].view(torch.float32).view(linears, experts, rank)
        lora_a = memory[numbers:].view(torch.float8_e4m3fn).view(self.lora_a.shape)
        memory[numbers:].copy_(torch.stack([a.view(torch.uint8) for a, _, _ in rounded]).flatten())
        scale.copy_(torch.stack([s for _, _, s in rounded]))
        lora_b = torch.cat([b.transpose(0, 1).view(torch.uint8) for _, b, _ in rounded]).contiguous()
        truth = replace(
            self, lora_a=torch.stack([a for a, _ in left]),
            lora_b=torch.cat([b.transpose(0, 1) for _, b in left]).contiguous(),
        )  # fmt: skip
        of = self.projection(*options, **more)
        return truth, replace(
            of, shape=on_pages(replace(of.shape, fp8=True)), lora_a=lora_a, lora_scale=scale,
            lora_b=lora_b.view(torch.float8_e4m3fn),
            fused_weight=self.weight if of.shape.fused else None,
        )  # fmt: skip

    def step(self, cos_sin=None, tile_blocks=None) -> Step:
        return Step(self.gates, self.active, self.workspace, cos_sin, tile_blocks)

    @property
    def s_shape(self) -> tuple[int, int, int]:
        linears, experts, rank, _ = self.lora_a.shape
        return self.x.shape[0], linears, experts * rank


@dataclass(eq=False)
class OneBank:
    """A layer as the ops of serving find it by its name."""

    projection: Projection
    step: Step
    layer_name: str
    cache: object = None
    route: object = None

    @property
    def shape(self) -> Shape:
        return self.projection.shape

    @property
    def strided_out(self) -> bool:
        return self.projection.strided_out


def make_gates(tokens, experts, top_k, seed=0, one=None) -> torch.Tensor:
    """[T, E] float32: k weights a row; all tokens choose the expert `one` where it is given."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=g)
    if one is not None:
        order[:, one] = -1
    ids = order.argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=g) + 0.1
    return torch.zeros(tokens, experts).scatter_(1, ids, weights).to(DEVICE)


def bits(used: torch.Tensor) -> torch.Tensor:
    """[1] int64 with the bits of experts [E] that are used."""
    return (used.long() << torch.arange(len(used), device=used.device)).sum(0, keepdim=True)


def active_of(used: torch.Tensor) -> torch.Tensor:
    """[2 + E] int64, as `spread_routes` writes it for experts [E] that are used."""
    active = new_active(len(used), used.device)
    list_active(used, active)
    return active


def make_problem(
    tokens, size_in, widths, experts, top_k, rank, dtype=torch.float32, seed=0, one=None,
    adapted=None, bias=False,
) -> Problem:  # fmt: skip
    """Scaled normal data, rows of gates past T that hold NaN, and a workspace that does.

    Args:
        adapted: index in the banks of each slice of the output, default a bank of its own each.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE)

    adapted = list(range(len(widths))) if adapted is None else adapted
    rows_of_b = sum(width for width, part in zip(widths, adapted) if part >= 0)
    gates = make_gates(tokens, experts, top_k, seed, one)
    garbage = torch.full((3, experts), float("nan"), device=DEVICE)
    lora_a = normal(max(adapted) + 1, experts, rank, size_in, scale=size_in**-0.5)
    workspace = Workspace.make(*workspace_sizes(lora_a, sum(widths)), torch.device(DEVICE))
    workspace.lora_a_out.fill_(255)  # NaN in every dtype
    workspace.partial_sums.fill_(float("nan"))
    return Problem(
        x=normal(tokens, size_in),
        weight=normal(sum(widths), size_in, scale=size_in**-0.5),
        bias=normal(sum(widths)) if bias else None,
        lora_a=lora_a,
        lora_b=normal(rows_of_b, experts, rank, scale=rank**-0.5),
        gates=torch.cat([gates, garbage]),
        active=active_of((gates != 0).any(0)),
        workspace=workspace,
        adapted=adapted,
        widths=list(widths),
    )


def leave_pages_to_tiles(p: Problem, also: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """Takes from the problem's tokens the gates of some blocks of pages, others in every 128 of
    them; the lists that say so. also: (tile, block) to leave beside (0, 1), (1, 0) and (1, 2)."""
    tokens, pages = len(p.x), p.gates.shape[1]
    blocks = -(-pages // 8)
    for tile in range(-(-tokens // 128)):
        of_tile = p.gates[tile * 128 : min(tokens, tile * 128 + 128)]
        for block in range(blocks):
            if (tile, block) not in ((0, 1), (1, 0), (1, 2), *also):
                of_tile[:, block * 8 : block * 8 + 8] = 0
    tile_blocks = new_tile_blocks(tokens, pages, p.x.device)
    list_blocks(p.gates[:tokens], tile_blocks)
    for listed in tile_blocks:
        listed[1 + int(listed[0]) :] = 99  # not to be looked at
    return tile_blocks


def in_whole_numbers(p: Problem) -> Problem:
    """The problem with small whole numbers, and quarters for gates: its sums are exact in every
    order, so two ways to compute it give the same bits on every machine."""

    def whole(t: torch.Tensor) -> torch.Tensor:
        return (t / t.abs().mean()).round().clamp(-2, 2)

    return replace(
        p, x=whole(p.x), weight=whole(p.weight), lora_a=whole(p.lora_a), lora_b=whole(p.lora_b),
        bias=None if p.bias is None else whole(p.bias), gates=(4 * p.gates).ceil() / 4,
    )  # fmt: skip


def whole_turns(tokens: int, head_dim: int, dtype=torch.float32) -> torch.Tensor:
    """[T, D] "cosines" and "sines" of whole numbers, see `in_whole_numbers`."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(-2, 3, (tokens, head_dim), generator=g).to(DEVICE, dtype)


def shrink_truth(p: Problem) -> torch.Tensor:
    """s [T, P, E * R] in float64, token by token and only of the experts that it chose."""
    tokens, linears, _ = p.s_shape
    s = torch.zeros(tokens, linears, *p.lora_a.shape[1:3], dtype=torch.float64, device=p.x.device)
    for t in range(tokens):
        for e in p.gates[t].nonzero()[:, 0].tolist():
            s[t, :, e] = p.gates[t, e].double() * (p.lora_a[:, e].double() @ p.x[t].double())
    return s.flatten(2)


def delta_truth(p: Problem) -> torch.Tensor:
    """The deltas [T, out] in float64; zero where no part is."""
    s, tokens = shrink_truth(p), p.x.shape[0]
    delta = torch.zeros(tokens, sum(p.widths), dtype=torch.float64, device=p.x.device)
    row = column = 0
    for part, width in zip(p.adapted, p.widths):
        if part >= 0:
            b = p.lora_b[row : row + width].double().flatten(1)
            delta[:, column : column + width] = s[:, part] @ b.T
            row += width
        column += width
    return delta


def linear_truth(p: Problem, epilogue: str = "", dtype=torch.float64) -> torch.Tensor:
    """The whole projection in float64; or, as plain torch would in `dtype`, op by op."""
    y = p.x.to(dtype) @ p.weight.to(dtype).T
    if p.bias is not None:
        y = y + p.bias.to(dtype)
    y = y + (delta_truth(p) if dtype == torch.float64 else plain_delta(p))
    if not epilogue:
        return y
    gate, up = y.chunk(2, -1)
    act = F.silu(gate) if epilogue == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def plain_delta(p: Problem) -> torch.Tensor:
    """The deltas by the obvious code in the problem's own dtype."""
    delta = p.x.new_zeros(p.x.shape[0], sum(p.widths))
    for t in range(p.x.shape[0]):
        for e in p.gates[t].nonzero()[:, 0].tolist():
            row = column = 0
            for part, width in zip(p.adapted, p.widths):
                if part >= 0:
                    up = p.lora_b[row : row + width, e] @ (p.lora_a[part, e] @ p.x[t])
                    delta[t, column : column + width] += p.gates[t, e].to(up.dtype) * up
                    row += width
                column += width
    return delta


def fused_weight_of(p: Problem) -> torch.Tensor:
    """[W; A]."""
    return torch.cat([p.weight, p.lora_a.flatten(0, 2)])


def from_fused(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """W x and A x as `projection` has them: views of the one product that it makes."""
    both, out = (p.x.double() @ fused_weight_of(p).double().T).to(p.x.dtype), len(p.weight)
    return both[:, :out], both[:, out:]


def hide_from_others(p: Problem, s: torch.Tensor) -> None:
    """Makes infinite what tokens that did not choose an expert have of it in s [T, P E R]."""
    chosen = (p.gates[: len(s), None, :, None] != 0).expand(-1, *p.lora_a.shape[:3])
    s[~chosen.flatten(1)] = float("inf")


def twice_from_fused(
    p: Problem, run: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """What an expand leaves in place and in a tensor of its own, and whether the first is in y.

    run: (W x, A x, in_place) -> the result; both of the one product that `projection` makes.
    """
    y, s = from_fused(p)
    apart = run(y, s, False)
    found = run(y, s, True)
    in_y = found.data_ptr() == y.data_ptr() and found.stride() == y.stride()
    return found, apart, in_y


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error ‖out − truth‖ / ‖truth‖; NaN never passes a comparison."""
    return ((out.double() - truth).norm() / truth.norm()).item()


SHAPES = {
    # tokens, in, widths, experts, k, rank
    "one-token": (1, 200, [72], 4, 2, 8),
    "packed-qkv-gqa": (5, 160, [96, 32, 32], 4, 2, 4),
    "not-a-multiple": (3, 131, [77, 130], 3, 2, 5),
    "rank-one": (2, 64, [64], 2, 1, 1),
    "rank-256": (2, 70, [66], 2, 1, 256),
    "every-expert": (4, 64, [64], 5, 5, 3),
    "one-expert": (4, 96, [80], 1, 1, 16),
    "many-experts": (3, 64, [64], 64, 3, 2),
    "slices": (3, 8210, [70], 3, 1, 20),
    "thirty-tokens": (30, 64, [64, 70], 4, 2, 4),
}
