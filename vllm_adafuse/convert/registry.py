"""The formats, and the conversion of one directory."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adafuse.convert import arrow, hydralora, loramoe, mixlora, mola, peft_lora
from vllm_adafuse.convert.bank import to_format
from vllm_adafuse.convert.beside import take_modules
from vllm_adafuse.convert.mixture import Mixture
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.refused import refused_directory, refused_source
from vllm_adafuse.convert.source import Source, refuse
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import BASE_HASH, CONFIG_FILE, parse_config
from vllm_adafuse.format.origin import known_hash
from vllm_adafuse.format.places import (
    adapter_problem,
    output_problem,
    require_backbone,
    revision_notes,
    written_name,
)
from vllm_adafuse.text import show, some

# In the order in which they are asked: a plain LoRA's names are part of HydraLoRA's.
FORMATS = (mixlora, mola, loramoe, hydralora, peft_lora)
KINDS = ("MixLoRA", "MoLA", "Arrow", "HydraLoRA", "LoRAMoE", "PEFT LoRA")


@dataclass(frozen=True)
class Report:
    """What a conversion did; kept in the adapter's config as `x_converted_from`.

    Attributes:
        kind: the source's format.
        source: its directory's name.
        exact: what holds between source and result.
        notes: what was assumed or lost.
    """

    kind: str
    source: str
    exact: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For the config."""
        return {
            "format": self.kind,
            "source": self.source,
            "exact": self.exact,
            "notes": list(self.notes),
        }


def convert(
    source: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
    progress: bool = False,
) -> Report:
    """Converts an adapter of another library.

    Args:
        source: its directory.
        out: the directory to write; absent or empty.
        base: the backbone, a directory or a name in the Hugging Face cache; default: the one that
            the source names.
        options: what the source does not say.
        progress: show a progress bar.

    Returns:
        What was converted, and what was assumed or lost.

    Raises:
        AdapterError: it cannot be converted exactly, with every reason found; or `out` is taken.
        OSError: a file cannot be read or written; `out` is then removed.
    """
    from tqdm import tqdm

    path, out = Path(os.path.abspath(os.path.expanduser(source))), Path(out).absolute()
    _check_out(path, out)
    steps = ("read", "convert", "write", "check")
    with tqdm(total=len(steps), desc=steps[0], disable=not progress) as bar:

        def step(name: str) -> None:
            bar.update()
            bar.set_description(name)

        mixture, base_name, backbone = _read(path, base, options, lambda: step(steps[1]))
        raw, tensors = to_format(mixture, base_name, backbone.hidden_size)
        raw |= {BASE_HASH: base_hash} if (base_hash := known_hash(backbone.path)) else {}
        step(steps[2])
        report = Report(mixture.kind, path.name, mixture.exact, tuple(mixture.notes))
        raw["x_converted_from"] = report.to_json()
        _write(path, out, raw, tensors, backbone, lambda: step(steps[3]))
        bar.update()
    return report


def _check_out(path: Path, out: Path) -> None:
    if not path.is_dir():
        raise refuse(path, adapter_problem(path) or f"{path}: is no directory")
    if problem := output_problem(out):
        raise refuse(path, f"output directory {out}: {problem}")


def _read(path: Path, base, options: Options, opened) -> tuple[Mixture, str, Backbone]:
    if reason := refused_directory(path):
        raise refuse(path, reason)
    if arrow.recognises_directory(path):
        _check_options(path, arrow, options)
        base_name, backbone = _backbone(path, base, arrow.base_of(path))
        opened()
        return arrow.read_directory(path, backbone, options), base_name, backbone
    source = Source.open(path)
    source.use_decoder_names()
    opened()
    format_ = _recognise(source)
    _check_options(path, format_, options)
    named = source.config.get("base_model_name_or_path")
    base_name, backbone = _backbone(path, base, named, source.config.get("revision"))
    if base is None:
        source.notes += revision_notes(source.config, base_name, Path(backbone.path))
    mixture = format_.read(source, backbone, options)
    take_modules(source, backbone)
    mixture.notes += source.notes
    if not mixture.linears:
        source.problems.append(
            f"{source.file}: holds routers alone, expected lora_A / lora_B pairs beside them; "
            "save the experts with them"
        )
    source.finish()
    return mixture, base_name, backbone


def _recognise(source: Source):
    """The format's module, by the names of tensors."""
    if reason := refused_source(source):
        raise refuse(source.path, reason)
    if source.config.get("peft_type") == "ADAFUSE":
        raise refuse(
            source.path,
            f"{source.path / CONFIG_FILE}: `peft_type` is \"ADAFUSE\": it is in this format "
            "already; serve it as it is",
        )
    if source.config.get("arrow_config"):
        raise refuse(
            source.path,
            f"{source.path}: is the router of an Arrow mixture; name the directory above it, "
            "which holds its experts too",
        )
    for format_ in FORMATS:
        if format_.recognises(source):
            return format_
    names = sorted(source.tensors)
    raise refuse(
        source.path,
        f"{source.file}: holds {len(names)} tensors ({some(names)}), expected names of one of "
        f"{', '.join(KINDS)}. {CONFIG_FILE} says `peft_type` "
        f"{show(source.config.get('peft_type'))}; docs/convert.md lists what is read",
    )


def _check_options(path: Path, format_, options: Options) -> None:
    if wrong := sorted(options.given() - set(format_.OPTIONS)):
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise refuse(path, f"{listed}: says nothing about {format_.KIND} adapters; leave it out")


def _backbone(path: Path, base, named: Any, revision: Any = None) -> tuple[str, Backbone]:
    """The name to write, and the backbone."""
    name = str(base) if base is not None else named
    if not isinstance(name, str) or not name:
        raise refuse(
            path, f"{path / CONFIG_FILE}: `base_model_name_or_path` is {show(named)}, expected the "
            "backbone; name it with --base",
        )
    lora = path if base is None else None
    revision = revision if lora and isinstance(revision, str) else None
    found = require_backbone(name, lora, revision, option="--base")
    return written_name(name, found), Backbone.from_path(str(found))


def _write(path: Path, out: Path, raw: dict, tensors: dict, backbone: Backbone, written) -> None:
    """Writes and checks; nothing is left behind where that fails."""
    from vllm_adafuse.format.adapter import load_adapter
    from vllm_adafuse.format.random_adapter import write_adapter

    config, problems = parse_config(raw)
    if problems:
        raise refuse(path, *problems)
    extra = {key: value for key, value in raw.items() if key.startswith("x_")}
    try:
        write_adapter(out, config, tensors, extra)
        written()
        load_adapter(out, backbone)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
