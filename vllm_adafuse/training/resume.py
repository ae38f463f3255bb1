"""Going on from a checkpoint: the newest one that is whole and of the same run."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.reading import FileProblem, read_json
from vllm_adafuse.text import show

RECORD = "adafuse_run.json"  # in every checkpoint: what run it is of
STATE, WEIGHTS = "trainer_state.json", "model.safetensors"
OTHER = {
    "data": "the texts are not those that it was trained on",
    "backbone": "the backbone is not the one that it was trained on",
}


def digest(*tensors: torch.Tensor) -> str:
    """A hash of tensors' shapes and of up to 4096 values of each, evenly spaced."""
    made = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 4096)].cpu().contiguous().view(torch.uint8)
        made.update(repr(tuple(tensor.shape)).encode() + some.numpy().tobytes())
    return made.hexdigest()


def make_recorder(record: dict[str, Any]) -> Any:
    """A TrainerCallback that puts a record of the run into every checkpoint."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                made = Path(args.output_dir, f"checkpoint-{state.global_step}", RECORD)
                made.write_text(json.dumps(record, indent=1), "utf-8")

    return Recorder()


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    Attributes:
        path: its directory.
        step: how many steps it has done.
        recorded: whether it is known to be of the same run.
        notes: a sentence on each newer one that is passed over, and on this one.
    """

    path: Path
    step: int
    recorded: bool
    notes: list[str]


def find_checkpoint(work: Path, record: dict[str, Any]) -> Found:
    """The newest checkpoint that is whole and of this run.

    Args:
        work: the directory of checkpoints.
        record: of this run, as `make_recorder` writes it.

    Raises:
        AdapterError: there is none; with what is wrong with each.
    """
    passed: list[str] = []
    for path, step in _checkpoints(work):
        torn, known = _torn(path), None
        if not torn:
            known, problems = _record(path)
            torn = problems or (_differences(known, record) if known else [])
        if not torn:
            notes = [*passed, f"going on from {path.name}"]
            if known is None:
                notes.append(f"{path.name} holds no {RECORD}: whether it is of the same texts, "
                             "backbone and options cannot be known")  # fmt: skip
            return Found(path, step, known is not None, notes)
        passed.append(f"{path.name} is passed over: {'; '.join(torn)}")
    if not passed:
        raise AdapterError(
            f"directory {work}", ["holds no checkpoint to resume from; leave out --resume"]
        )
    raise AdapterError(
        f"directory {work}",
        [*passed, "give the options and texts of that run, or leave out --resume and name another "
         "--output to start anew"],
    )  # fmt: skip


def _checkpoints(work: Path) -> Iterator[tuple[Path, int]]:
    """The newest first."""
    found = []
    for path in work.glob("checkpoint-*") if work.is_dir() else ():
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdecimal():
            found.append((path, int(number)))
    yield from sorted(found, key=lambda one: -one[1])


def _torn(path: Path) -> list[str]:
    """What is missing in a checkpoint, as after a kill while it was written."""
    try:
        state, problems = read_json(path / STATE, 1 << 28)
    except FileProblem as e:
        return [f"it was not written to its end ({str(e).removeprefix(f'{path}/')})"]
    if problems or not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return [f"{STATE} is damaged"]
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as e:
        return [f"{WEIGHTS} is missing or damaged ({e})"]
    for name in ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(path / name):
            return [f"{name} is missing or damaged"]
    random = sorted(path.glob("rng_state*.pth"))
    if not random or not all(zipfile.is_zipfile(file) for file in random):
        return ["rng_state is missing or damaged"]
    return []


def _record(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    if not (path / RECORD).exists():
        return None, []
    try:
        known, problems = read_json(path / RECORD)
    except FileProblem as e:
        return None, [str(e)]
    return (known, problems) if isinstance(known, dict) else (None, [f"{RECORD} is damaged"])


def _differences(known: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What differs, the texts only where no option explains it."""
    names = [name for name in {**record, **known}
             if json.dumps(record.get(name)) != json.dumps(known.get(name))]  # fmt: skip
    told = [f"`{name}` is {show(record.get(name))}, and was {show(known.get(name))}"
            for name in names if name not in OTHER]  # fmt: skip
    if {"length", "pack", "held_out"} & set(names):
        names = [name for name in names if name != "data"]
    return [OTHER[name] for name in names if name in OTHER] + told
