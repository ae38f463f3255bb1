"""Every launch of steps of all lengths, on tensors of a GPU that is not there.

    python tests/launches.py build     writes tests/launches.json, and all launches to build/nets
    python tests/launches.py check     compares with both

A launch: the kernel, its grid, each argument by position (tensors by dtype, shape, strides and
where they begin, descriptors by their blocks, numbers as they are), its constants by position, its
options. So a renamed kernel or parameter is the same launch. `launches.json` has a line for each
case and kernel: a refactoring may change names in it, and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # before Triton is imported, as conftest.py has it
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import vllm_adafuse.kernels
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels import add_norm, configs, dense_expand, dispatch, expand, launch, operands
from vllm_adafuse.kernels.gather_routes import gather_routes
from vllm_adafuse.kernels.kv_slots import KVSlots
from vllm_adafuse.kernels.layerwise.ffn_down import ffn_down
from vllm_adafuse.kernels.layerwise.ffn_mix import ffn_mix
from vllm_adafuse.kernels.layerwise.linear import layer_linear
from vllm_adafuse.kernels.layerwise.operands import LayerGate, LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.sgmm import layer_sgmm
from vllm_adafuse.kernels.operands import Norm, Projection, Step, stays_in_place
from vllm_adafuse.kernels.page_projection import page_projection, page_projection_norm
from vllm_adafuse.kernels.page_routes import PageGates, new_tile_blocks, page_routes
from vllm_adafuse.kernels.plans import Device, Shape
from vllm_adafuse.kernels.projection import projection
from vllm_adafuse.kernels.projection_norm import projection_norm
from vllm_adafuse.kernels.registry import IMPLEMENTATIONS
from vllm_adafuse.kernels.sgmm import sgmm
from vllm_adafuse.kernels.spread_routes import spread_routes
from vllm_adafuse.kernels.whole import token_counts
from vllm_adafuse.kernels.workspace import Workspace

ROOT = Path(__file__).parents[1]
DIGESTS = ROOT / "tests" / "launches.json"
RECORDS = ROOT / "build" / "nets" / "launches.json"
MOST = 16384
CPU = torch.device("cpu")


class Recorder:
    """Stands for a kernel and notes what reaches it."""

    def __init__(self, kernel, found: list[Launch]):
        self.kernel, self.found, self.fn, self.grid = kernel, found, self, ()

    def __getitem__(self, grid):
        self.grid = tuple(grid)
        return self

    def __call__(self, *arguments, **options):
        names = self.kernel.arg_names
        constants = tuple(options.pop(name) for name in names[len(arguments) :])
        told = tuple(map(_told, arguments))
        self.found.append(
            Launch(self.kernel, self.grid, told, constants, tuple(sorted(options.items())))
        )


def _told(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.data_ptr()
    if isinstance(value, TensorDescriptor):
        return _told(value.base), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return value


@dataclass(frozen=True)
class Launch:
    """One launch, without its tensors."""

    kernel: object
    grid: tuple
    arguments: tuple
    constants: tuple
    options: tuple

    @property
    def compiled(self) -> tuple:
        """Equal where Triton would not compile anew."""
        plain = set(self.kernel.kwargs["do_not_specialize"] or ())
        kinds = [
            None if name in plain else self._kind(value)
            for name, value in zip(self.kernel.arg_names, self.arguments)
        ]
        return self.kernel.__name__, *kinds, *self.constants, *self.options

    @staticmethod
    def _kind(value):
        if isinstance(value, tuple) and isinstance(value[0], tuple):
            return value[0][0], value[3]
        if isinstance(value, tuple):
            return value[0], value[3] % 16 == 0
        return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)

    def __str__(self) -> str:
        return f"{self.grid} {self.arguments} {self.constants} {self.options}"


def kernel_modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(vllm_adafuse.kernels.__path__, "vllm_adafuse.kernels."):
        yield importlib.import_module(info.name)


@contextmanager
def recording(hopper: bool = True, device: str = "cpu") -> Iterator[list[Launch]]:
    """The list of launches, while nothing is launched.

    Args:
        hopper: the GPU is one.
        device: its name, by which it has tuned configs.
    """
    found: list[Launch] = []
    keep_no_kernel()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as no_cuts:
        patch.setenv("XDG_CACHE_HOME", no_cuts)
        patch.setattr(launch, "_bound", {})
        for module in kernel_modules():
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, Recorder(value, found))
            if hasattr(module, "_op"):  # else torch would run what is registered for fakes
                patch.setattr(module, "_op", IMPLEMENTATIONS[module._op])
        begins = lambda self: self.storage_offset() * self.element_size()  # noqa: E731
        patch.setattr(FakeTensor, "is_cuda", True)
        patch.setattr(FakeTensor, "data_ptr", begins)
        gpu = Device(device, 9 if hopper else 8)
        patch.setattr(Device, "of", staticmethod(lambda device: gpu))
        with FakeTensorMode():
            yield found
    keep_no_kernel()


def keep_no_kernel() -> None:
    """Plans hold kernels with their constants, and configs of the user's."""
    for module in (dense_expand, expand, add_norm):
        module._plan.cache_clear()
    for cached in (configs.configs_of, dispatch.find_config, dispatch.plan, dispatch.cublas_plan,
                   operands.plans_of):
        cached.cache_clear()


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


class Paged:
    """A source of pages, in either of vLLM's layouts, as `LayerCache` is for a served layer."""

    def claim(self, tokens, dtype):
        self.turn = not getattr(self, "turn", False)
        shape = (9, 64, 8, 256) if self.turn else (9, 8, 64, 256)
        pages = empty(*shape, dtype=dtype)
        pages = pages if self.turn else pages.transpose(1, 2)
        return KVSlots.of(*pages.split(128, -1), empty(tokens, dtype=torch.int64))


def on_pages(experts=16, rank=16):
    """The same where requests name their adapters: of steps with adapters, and of those without."""
    return one_decision(experts, rank, paged=True)


def one_decision(
    experts=8, rank=16, bias=False, dtype=torch.bfloat16, adapted=(0, 1, 2), paged=False
):
    """tokens, and whether they run alone, as warm-up has them: down on rows without gaps -> the
    launches of a step with one decision for all layers; adapted: of q, k, v."""
    top_k, i32, f32 = 2, torch.int32, torch.float32
    ids, weights = empty(MOST, top_k, dtype=i32), empty(MOST, top_k, dtype=f32)
    gates, active = empty(MOST, experts, dtype=f32), empty(2 + experts, dtype=torch.int64)
    tile_blocks = new_tile_blocks(MOST, experts, CPU)
    table, semaphores = empty(32000, top_k, dtype=i32), empty(9, 4, dtype=i32)
    table_weights = empty(32000, top_k, dtype=f32)
    workspace = Workspace.make(1 << 30, 1 << 30, 1 << 20, CPU)
    pages = Paged()

    def new(*shape):
        return empty(*shape, dtype=dtype)

    def make(size_in, widths, of, epilogue, fused=True) -> Projection:
        rows_of_b = sum(w for w, part in zip(widths, of) if part >= 0)
        has_bias = bias and fused and epilogue != "norm"
        shape = Shape(
            size_in, tuple(widths), tuple(of), experts, rank, dtype.itemsize, epilogue,
            128 if epilogue == "rotary" else 0, has_bias, fused,
            tile_blocks=paged and experts * rank > 128,
        )  # fmt: skip
        fused_weight = new(shape.fused_rows, size_in)
        return Projection(
            shape, fused_weight[sum(widths) :].view(-1, experts, rank, size_in),
            new(rows_of_b, experts, rank), fused_weight if fused else None,
            new(sum(widths)) if has_bias else None, Norm(new(4096), 1e-5), semaphores[0],
            stays_in_place(shape) and not paged,
        )  # fmt: skip

    def whole(*operands, kv_slots=None) -> None:
        if not paged:
            projection(*operands, kv_slots)
        for has_adapters in (True, False) if paged else ():
            page_projection(*operands, has_adapters, kv_slots)

    def run(tokens: int, alone: bool = False) -> None:
        if paged:
            named = empty(tokens, dtype=i32), empty(MOST, dtype=i32), empty(12, experts, dtype=i32)
            page_routes(*named, empty(8, 32000, dtype=i32), empty(8, 32000, dtype=torch.float32),
                        PageGates(gates, active, tile_blocks, semaphores))  # fmt: skip
        else:
            gather_routes(empty(tokens, dtype=i32), table, table_weights, ids, weights)
            spread_routes(ids, weights, gates, active, semaphores, tokens)
        step, turns = Step(gates, active, workspace), new(MOST, 128)
        step = replace(step, tile_blocks=tile_blocks if paged else None)
        for widths, act, of in (
            ([4096, 1024, 1024], "rotary", list(adapted)),
            ([11008] * 2, "silu", [0, 1]),
            ([4096], "", [0]),
        ):
            x, p = new(tokens, 4096), make(4096, widths, of, act)
            whole(x, p, replace(step, cos_sin=turns))
            if act == "rotary":
                kv_slots = pages.claim(tokens, dtype)
                whole(x, p, replace(step, cos_sin=turns), kv_slots=kv_slots)
            sgmm(new(tokens, sum(widths)), x, make(4096, widths, of, "", False), step)
        for size_in in (4096, 11008):
            x, residual = new(tokens, size_in), new(tokens, 4096)
            if size_in == 11008 and not (alone or paged):
                x = new(tokens, 2 * (size_in + experts * rank))[:, :size_in]
            operands = x, residual, make(size_in, [4096], [0], "norm"), step
            if not paged:
                projection_norm(*operands)
            for has_adapters in (True, False) if paged else ():
                page_projection_norm(*operands, has_adapters)

    return run


def layer_wise(experts=8, rank=16):
    """tokens -> the launches of projections that are routed in their layers."""
    f32 = torch.float32
    scales, active = empty(experts, dtype=f32), empty(1, dtype=torch.int64)
    widths, adapted, columns = (4096, 1024, 1024), (0, 1, 2), 3 * experts * rank
    own, block = (LayerGates(empty(MOST, n, experts, dtype=f32), active) for n in (3, 1))
    rule, of_block = LayerGate(2, (experts,) * 3), LayerGate(2, (experts,), plain=True)

    def run(tokens: int, alone: bool = False) -> None:
        x, b = empty(tokens, 4096), empty(sum(widths), experts, rank)
        fused = empty(sum(widths) + columns + 3 * experts + 8, 4096)
        qkv = LayerProjection(rule, widths, adapted, scales, b, None, 3 * experts, fused)
        layer_linear(x, qkv, own)
        lora_a_out, z = empty(tokens, columns, dtype=f32), empty(tokens, 3 * experts, dtype=f32)
        layer_sgmm(empty(tokens, sum(widths)), lora_a_out, z, qkv, own)
        one = LayerProjection(of_block, (4096,), (0,), scales, b[:4096])
        layer_sgmm(empty(tokens, 4096), lora_a_out[:, : columns // 3], z[:, :experts], one, block)
        gemm_out = empty(tokens, 2 * 11008 + 2 * experts * rank)
        up = empty(2 * 11008, experts, rank)
        fused = empty(2 * 11008 + 2 * experts * rank + 16, 4096)
        layer_linear(x, LayerProjection(
            LayerGate(2, (experts,)), (11008,) * 2, (0, 1), scales, up, None, experts, fused,
            epilogue="silu",
        ), block)  # fmt: skip
        ffn_mix(gemm_out, block.gates, up, [0, 1], 11008, 2, "silu")
        lora_a_out = empty(3 * tokens, experts * rank, dtype=f32)
        ffn_down(
            empty(tokens, 4096), lora_a_out, block.gates, scales, active, empty(4096, experts, rank), 0,
            False,
        )  # fmt: skip

    return run


# What makes a step's launches; of which GPU; and whether of all lengths.
CASES: dict[str, tuple[Callable, dict, dict]] = {
    "8/16": (one_decision, {}, {}),
    "8/16 on an H200": (one_decision, {}, {"device": "NVIDIA H200"}),
    "8/16 on an H100": (one_decision, {}, {"device": "NVIDIA H100 80GB HBM3"}),
    "8/64": (one_decision, {"rank": 64}, {}),
    "64/16": (one_decision, {"experts": 64}, {}),
    "64/32": (one_decision, {"experts": 64, "rank": 32}, {}),
    "32/8": (one_decision, {"experts": 32, "rank": 8}, {}),
    "20/40": (one_decision, {"experts": 20, "rank": 40}, {}),
    "8/16 and biases": (one_decision, {"bias": True}, {}),
    "8/16 of q and v": (one_decision, {"adapted": (0, -1, 1)}, {}),
    "8/16 in float32": (one_decision, {"dtype": torch.float32}, {}),
    "8/16 before Hopper": (one_decision, {}, {"hopper": False}),
    "64/16 before Hopper": (one_decision, {"experts": 64}, {"hopper": False}),
    "16 pages on an H200": (on_pages, {}, {"device": "NVIDIA H200"}),
    "80 pages": (on_pages, {"experts": 80}, {}),
    "layer-wise 8/16": (layer_wise, {}, {}),
    "layer-wise 8/64": (layer_wise, {"rank": 64}, {}),
    "layer-wise 8/16 before Hopper": (layer_wise, {}, {"hopper": False}),
}
FEW = 1, 4, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 1000, 2048, 4096, 8192, 8193, MOST


def launches_of(case: str) -> list[Launch]:
    make, options, gpu = CASES[case]
    counts = token_counts(MOST) if case.startswith(("8/16 on", "layer-wise 8/16")) else FEW
    with recording(**gpu) as found:
        run = make(**options)
        for tokens in counts:
            run(tokens)
    return found


def digests(found: list[Launch]) -> dict[str, str]:
    """Of each kernel, how many launches and a hash of them in their order."""
    lines: dict[str, list[str]] = {}
    for one in found:
        lines.setdefault(one.kernel.__name__, []).append(str(one))
    return {
        name: f"{len(of)} {hashlib.sha256(chr(10).join(of).encode()).hexdigest()[:12]}"
        for name, of in lines.items()
    }


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What differs but for names; before, after: of kernels, in the order of their first launch."""
    gone, new = list(before.values()), []
    for name, digest in after.items():
        if digest in gone:
            gone.remove(digest)
        else:
            new.append(f"now  {name} {digest}")
    return [f"then {name} {digest}" for name, digest in before.items() if digest in gone] + new


def main() -> None:
    if sys.argv[1:] not in (["build"], ["check"]):
        sys.exit(__doc__)
    found = {case: launches_of(case) for case in CASES}
    short = {case: digests(one) for case, one in found.items()}
    lines = {case: [(one.kernel.__name__, str(one)) for one in f] for case, f in found.items()}
    print(f"{sum(map(len, found.values()))} launches in {len(CASES)} cases")
    if sys.argv[1] == "build":
        DIGESTS.write_text(json.dumps(short, indent=1) + "\n")
        RECORDS.parent.mkdir(parents=True, exist_ok=True)
        RECORDS.write_text(json.dumps(lines))
        return
    known, bad = json.loads(DIGESTS.read_text()), False
    whole = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for case in CASES:
        differ = changed(known.get(case, {}), short[case])
        bad |= bool(differ)
        print("\n  ".join([f"{case}: {'differs' if differ else 'equal'}", *differ]))
        then, now = ([line for _, line in w.get(case, [])] for w in (whole, lines))
        if differ and then:
            for sign, mine, other in (("-", then, set(now)), ("+", now, set(then))):
                for line in [line for line in mine if line not in other][:2]:
                    print(f"    {sign} {line}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
