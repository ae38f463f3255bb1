"""A static checkpoint of a backbone with some experts merged in: any server loads it.

    W + Σ_e w_e s_e B_e A_e          e, w: the named experts and their weights; s: LoRA's scale

Only adapted weights change. Files keep their names, so an index stays right; the header of each
safetensors file is kept byte by byte and its tensors are written one after the other, so that
memory holds one tensor and its experts, whatever the size of a shard.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tqdm import tqdm
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import DTYPES, Adapter, load_adapter, refuse_layer_wise
from vllm_adafuse.format.backbone import (
    INDEX,
    Backbone,
    full_name,
    read_weight_map,
    require_safetensors,
)
from vllm_adafuse.format.compose import backbone_files
from vllm_adafuse.format.config import SECTION
from vllm_adafuse.format.reading import FileProblem, read_object
from vllm_adafuse.format.tensor_file import TensorFile
from vllm_adafuse.format.tree import check_out
from vllm_adafuse.text import show, some

WEIGHTS = "model.safetensors"
# Weights of other kinds, which would say something else than what is written.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot")
# Whole models in forms of their own, wherever they lie.
_EXPORTS = (".gguf", ".onnx")
_NO_MEANING = (
    "its experts are chosen anew in every layer, so that no two layers need mean the same by an "
    "expert's number; only a pre_gated adapter can be merged"
)


@dataclass(frozen=True)
class Choice:
    """Experts to merge, by number, and the weight of each."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(
        cls, adapter: Adapter, experts: Sequence[str], weights: Sequence[float] | None = None
    ) -> Choice:
        """Finds experts by name, else by number.

        Args:
            adapter: a checked adapter.
            experts: names of `expert_names`, or numbers from 0.
            weights: one for each; default equal ones that sum to 1.

        Raises:
            AdapterError: no such expert, one that is named twice, weights that do not fit.
        """
        names, found, problems = list(adapter.config.expert_names), [], []
        shown = ", ".join(map(show, names[:20])) + (", …" if len(names) > 20 else "")
        for expert in experts:
            if expert in names:
                found.append(names.index(expert))
            elif expert.isdecimal() and int(expert) < len(names):
                found.append(int(expert))
            else:
                problems.append(
                    f"it has no expert {show(expert)}, expected one of {shown} or a number from 0 "
                    f"to {len(names) - 1}"
                )
        if not experts:
            problems.append("no expert is named, expected at least one")
        if len(set(found)) < len(found):
            problems.append(f"experts {', '.join(experts)}: one is named twice; name each once")
        weights = [1 / max(1, len(experts))] * len(experts) if weights is None else list(weights)
        if len(weights) != len(experts):
            problems.append(
                f"{len(weights)} weights for {len(experts)} experts, expected one for each"
            )
        if not all(math.isfinite(w) for w in weights):
            problems.append(f"weights are {weights}, expected finite numbers")
        if problems:
            raise AdapterError(f"adapter {adapter.path}", problems)
        return cls(tuple(found), tuple(weights))


def merge(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    experts: Sequence[str],
    weights: Sequence[float] | None = None,
    progress: bool = False,
) -> Path:
    """Writes a checkpoint directory with experts merged into the backbone's weights.

    Sums are float32 and rounded once, to the dtype that the backbone's file has.

    Args:
        adapter: the adapter's directory, checked against the backbone.
        base: the backbone's directory, with safetensors files.
        out: the directory to write; absent or empty.
        experts: names or numbers of the experts.
        weights: one for each; default equal ones that sum to 1.
        progress: show a progress bar.

    Returns:
        `out`, absolute.

    Raises:
        AdapterError: the adapter, the backbone or the choice cannot be used, or `out` is taken.
        OSError: a file cannot be read or written; `out` is then removed.
    """
    base, out = Path(base).resolve(), Path(out).absolute()
    check_out(base, out)
    backbone = Backbone.from_path(str(base))
    config = read_object(base / "config.json", f"backbone {base}")
    refuse_quantised(str(base), config)
    files = weight_files(base)
    checked = load_adapter(adapter, backbone)
    refuse_layer_wise(checked, _NO_MEANING)
    choice = Choice.of(checked, experts, weights)
    projections = _check_weights(str(base), files, checked, backbone)
    others = {
        name: file
        for name, file in backbone_files(base, config).items()
        if not _is_replaced(name, files)
    }
    total = sum(f.stat().st_size for f in (*files, *others.values()))
    free = shutil.disk_usage(_existing(out)).free
    if free < total:
        raise AdapterError(
            f"output directory {out}", [f"its disk has {free} bytes free, expected {total}"]
        )
    if SECTION in config:  # a composed checkpoint: its router leaves
        config["architectures"] = [backbone.plain_name]
        del config[SECTION]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=not progress) as bar,
            checked.reader() as read,
        ):
            merger = _Merger(checked, choice, read, projections)
            for file in files:
                merger.write(file, out / file.name, bar)
            for name, file in others.items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, out / name)
                bar.update(file.stat().st_size)
        # Last: without it an interrupted merge is no checkpoint.
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (out / "config.json").write_text(text + "\n", "utf-8")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def refuse_quantised(base: str, config: dict[str, Any]) -> None:
    """Raises AdapterError for a backbone whose config.json names a quantisation."""
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise AdapterError(
            f"backbone {base}",
            [
                f"its weights are quantised ({show(method)}): experts cannot be merged into them; "
                "take the checkpoint that it was quantised from, and quantise the result"
            ],
        )


def weight_files(base: Path) -> list[Path]:
    """The safetensors files that transformers would load, in order of their names.

    Raises:
        AdapterError: there are none.
    """
    require_safetensors(str(base), "merge")
    indexed = os.path.lexists(base / INDEX)
    names = sorted(set(read_weight_map(base).values())) if indexed else [WEIGHTS]
    files = [base / name for name in names]
    if absent := [name for name in names if not (base / name).is_file()]:
        found = f"{some(absent)} is not in it"
        raise AdapterError(
            f"backbone {base}",
            [
                f"{found}, expected its weights as safetensors beside config.json; pickles are not "
                "read: save it again by transformers"
            ],
        )
    return files


class _Merger:
    """Writes files of the backbone with experts added."""

    def __init__(self, adapter: Adapter, choice: Choice, read, projections: dict[str, str]):
        self.read, self.projections = read, projections
        scales = adapter.config.scales
        self.experts = [(e, w * scales[e]) for e, w in zip(choice.experts, choice.weights)]

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """W + Σ w s B A in float32, in W's dtype."""
        projection = self.projections[name]
        a, b = (self.read(f"{projection}.lora_{side}") for side in "AB")
        total = weight.float()
        for expert, factor in self.experts:
            total = total.addmm(b[expert].float(), a[expert].float(), alpha=factor)
        return total.to(weight.dtype)

    def write(self, source: Path, target: Path, bar: tqdm) -> None:
        """One safetensors file: 8 bytes of length, a JSON header, then the tensors end to end."""
        with TensorFile(source) as tensors, target.open("wb") as writer:
            writer.write(tensors.header)
            bar.update(len(tensors.header))
            for name, entry in sorted(tensors.entries.items(), key=lambda item: item[1].start):
                if name in self.projections:
                    merged = self.merged(name, tensors.read(name))
                    writer.write(merged.flatten().view(torch.uint8).numpy())
                    bar.update(entry.end - entry.start)
                    continue
                for piece in tensors.pieces(entry.start, entry.end, torch.uint8):
                    writer.write(piece.numpy())
                    bar.update(len(piece))


def _check_weights(
    base: str, files: list[Path], adapter: Adapter, backbone: Backbone
) -> dict[str, str]:
    """Every adapted linear has one weight, of the shape the config says, in a float dtype.

    Returns:
        Its name in the files -> the linear.
    """
    wanted, found, problems = dict.fromkeys(adapter.projections), {}, []
    for file in files:
        try:
            with TensorFile(file) as tensors:
                for name, entry in tensors.entries.items():
                    linear = full_name(name).removesuffix(".weight")
                    if not name.endswith(".weight") or linear not in wanted:
                        continue
                    shape = backbone.linears[linear][::-1]
                    del wanted[linear]
                    found[name] = linear
                    if entry.shape != shape or entry.dtype not in DTYPES:
                        problems.append(
                            f"{file.name}: tensor {name} is {show(entry.dtype)[1:-1]} of shape "
                            f"{list(entry.shape)}, expected {' or '.join(DTYPES)} of {list(shape)}"
                        )
        except FileProblem as e:
            problems.append(str(e))
    if wanted and not problems:
        missing = some([f"{name}.weight" for name in sorted(wanted)])
        problems.append(f"tensor {missing} is in none of its files, but the adapter adapts it")
    if problems:
        raise AdapterError(f"backbone {base}", problems)
    return found


def _is_replaced(name: PurePosixPath, weights: list[Path]) -> bool:
    """Whether a file holds the backbone's weights, or says which does. Weights in folders are of
    other modules (2_Dense/model.safetensors), unless they are another form of the whole model."""
    if name.suffix in _EXPORTS or name.name.endswith(".onnx_data"):
        return True
    if len(name.parts) > 1:
        return False
    return name.name in {file.name for file in weights} or name.suffix in _OTHER_WEIGHTS or (
        name.name.endswith(tuple(f"{suffix}.index.json" for suffix in (".bin", ".h5")))
    )


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
