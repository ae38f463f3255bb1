"""A source directory: its config and tensors, taken one by one until none is left unexplained."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.convert.names import of_decoder, unwrapped
from vllm_adafuse.convert.unpickle import unpickle
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import DTYPES
from vllm_adafuse.format.config import CONFIG_FILE, MAX_RANK, WEIGHTS_FILE
from vllm_adafuse.format.places import adapter_problem
from vllm_adafuse.format.reading import FileProblem, open_regular, read_object, where
from vllm_adafuse.format.tensor_file import TensorFile, machine_memory
from vllm_adafuse.format.values import all_finite
from vllm_adafuse.text import show, some

PICKLE_FILE = "adapter_model.bin"
MAX_NAME = 1000  # characters of a tensor's name


class Source:
    """The files of one adapter directory of another library.

    Attributes:
        path: the directory.
        config: its adapter_config.json.
        file: name of the file that its tensors are in, for messages.
        tensors: name -> tensor (CPU), all of them.
        problems: what was found wrong so far, in the order found.
        notes: what was left out, one sentence each.
        taken: names of tensors that have been understood.
        other_base: the way out where the backbone is another, for messages.
    """

    def __init__(self, path: Path, config: dict[str, Any], file: str, tensors: dict):
        self.path, self.config, self.file, self.tensors = path, config, file, tensors
        self.other_base = "name the right one with --base"
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.taken: set[str] = set()
        self._alike: dict[str, list[str]] = {}
        self._written: dict[str, str] = {}
        self._in_peft: dict[str, str] = {}
        self._rename(unwrapped, self._written)

    @classmethod
    def open(cls, path: Path) -> Source:
        """Reads adapter_config.json and the weights, safetensors if both kinds are there.

        Raises:
            AdapterError: a file is missing, damaged, or a pickle with more in it than tensors.
        """
        config = read_json(path / CONFIG_FILE)
        if os.path.lexists(path / WEIGHTS_FILE):
            file, tensors = WEIGHTS_FILE, _load(path, path / WEIGHTS_FILE)
        elif os.path.lexists(path / PICKLE_FILE):
            file, tensors = PICKLE_FILE, _load_pickle(path)
        else:
            raise refuse(
                path,
                f"{path}: holds neither {WEIGHTS_FILE} nor {PICKLE_FILE}; name the directory "
                "that the training run saved",
            )
        return cls(path, config, file, tensors)

    def use_decoder_names(self) -> None:
        """Names tensors as a decoder for causal language does, `model.layers.0.…`: LoRAs of the
        inner model and of multi-modal ones have other prefixes.

        Raises:
            AdapterError: two tensors have one name then.
        """
        self._rename(of_decoder, self._in_peft)

    def _rename(self, rule: Callable[[str], str], before: dict[str, str]) -> None:
        renamed: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            if (new := rule(name)) in renamed:
                raise refuse(
                    self.path,
                    f"{self.file}: tensors {before[new]} and {name} are one, {new}: it holds "
                    "several adapters; save each by itself (PEFT's save_pretrained with "
                    "selected_adapters)",
                )
            renamed[new], before[new] = tensor, name
        self.tensors = renamed

    def module_in_peft(self, name: str) -> str:
        """The module of a LoRA's tensor, named as PEFT's patterns name it."""
        return self._in_peft.get(name, name).rpartition(".lora_")[0]

    def match(self, pattern: str) -> Iterable[re.Match]:
        """Matches of a regular expression with whole tensor names, in natural order."""
        found = (re.fullmatch(pattern, name, re.ASCII) for name in sorted(self.tensors, key=_key))
        return [m for m in found if m]

    def has(self, pattern: str) -> bool:
        """Whether any tensor's whole name matches."""
        return any(re.fullmatch(pattern, name, re.ASCII) for name in self.tensors)

    def take(self, name: str, shape: tuple[int | str, ...], why: str) -> torch.Tensor:
        """A tensor that has been understood. A missing or wrong one is put down as a problem.

        Args:
            name: its name in the file.
            shape: expected; a word stands for any size.
            why: where that shape comes from.

        Returns:
            The tensor; where it is wrong, zeros of about that shape (that take no memory), to
            find further problems.
        """
        self.taken.add(name)
        tensor = self.tensors.get(name)
        expected = ", ".join(map(str, shape))
        if tensor is None:
            self.blame(name, f"is missing, expected [{expected}] ({why}); save the adapter again")
        elif tensor.dtype not in DTYPES.values():
            found = str(tensor.dtype).removeprefix("torch.")
            self.blame(name, f"dtype {found}, expected one of {', '.join(DTYPES)}; convert it")
        elif len(tensor.shape) != len(shape) or any(
            isinstance(want, int) and want != have for want, have in zip(shape, tensor.shape)
        ):
            self.blame(
                name, f"shape {list(tensor.shape)}, expected [{expected}] ({why}); it is damaged, "
                f"or made for another backbone: {self.other_base}",
            )
        elif not all_finite(tensor):
            self.blame(name, "holds NaN or Inf, expected finite numbers; train or save it again")
        else:
            return tensor
        sizes = [min(want, MAX_RANK) if isinstance(want, int) else 1 for want in shape]
        return torch.zeros(1).expand(sizes)

    def leave(self, pattern: str, text: str) -> None:
        """Takes tensors out that are understood and cannot be used, and puts that down.

        Args:
            pattern: a regular expression of whole names.
            text: why, and the way out.
        """
        for match in self.match(pattern):
            del self.tensors[match[0]]
            self.blame(match[0], text)

    def refuse_tensor(self, name: str, text: str) -> None:
        """`blame` of a tensor that is understood and cannot be used."""
        self.taken.add(name)
        self.blame(name, text)

    def blame(self, name: str, text: str) -> None:
        """Puts a problem of a tensor down; those that differ in the name only share a line."""
        if text not in self._alike:
            self.problems.append(text)
        self._alike.setdefault(text, []).append(name)

    def integer(self, key: str, most: int, default: int | None = None) -> int:
        """A positive integer of the config; without a default it is required."""
        return self._number(key, default, int, most, f"an integer from 1 to {most}")

    def number(self, key: str) -> float:
        """A positive number of the config."""
        return self._number(key, None, (int, float), float("inf"), "a positive number")

    def _number(self, key: str, default: Any, kind: Any, most: float, expected: str) -> Any:
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= most:
            return value
        found = "missing" if key not in self.config else show(value)
        problem = f"{CONFIG_FILE}: `{key}` is {found}, expected {expected}; correct it"
        if problem not in self.problems:
            self.problems.append(problem)
        return 1

    def finish(self) -> None:
        """Called when all has been taken.

        Raises:
            AdapterError: with every problem, among them tensors that nothing has explained.
        """
        for name in sorted(self.tensors.keys() - self.taken, key=_key):
            self.blame(
                name, "unknown name among this format's; what it does is not known, so leaving it "
                "out would give another model",
            )
        lines = [
            f"{self.file}: tensor {some([self._in_file(n) for n in self._alike[p]])}: {p}"
            if p in self._alike
            else p
            for p in self.problems
        ]
        if lines:
            raise AdapterError(f"source {self.path}", lines)


    def _in_file(self, name: str) -> str:
        """What a tensor is called in the file."""
        name = self._in_peft.get(name, name)
        return self._written.get(name, name)


def refuse(path: Path, *problems: str) -> AdapterError:
    """The error of a source that is not converted, to raise."""
    return AdapterError(f"source {path}", list(problems))


def read_json(file: Path) -> dict[str, Any]:
    """The object of a small JSON file.

    Raises:
        AdapterError: there is none.
    """
    if not os.path.lexists(file):
        raise refuse(
            file.parent,
            adapter_problem(file.parent)
            or f"{file}: missing, expected a file; name the directory that the training run saved",
        )
    return read_object(file, f"source {file.parent}")


def _key(name: str) -> list:
    """Sorts layer 10 after layer 9."""
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    return [(int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts)]


def _load(path: Path, file: Path) -> dict[str, torch.Tensor]:
    try:
        with TensorFile(file) as tensors:
            _refuse_absurd(path, tensors)
            return {name: tensors.read(name) for name in tensors.entries}
    except FileProblem as e:
        raise refuse(path, str(e)) from e


def _refuse_absurd(path: Path, tensors: TensorFile) -> None:
    """Refuses names and sizes that no adapter has, before a value is read."""
    problems = []
    if long := [name for name in tensors.entries if len(name) > MAX_NAME]:
        problems.append(
            f"tensor {some(long)}: names of {max(map(len, long))} characters, expected at most "
            f"{MAX_NAME}"
        )
    if empty := [name for name, entry in tensors.entries.items() if 0 in entry.shape]:
        problems.append(
            f"tensor {some(empty)}: shape {show(list(tensors.entries[empty[0]].shape))}, expected "
            "values in it"
        )
    if tensors.size > (memory := machine_memory()):
        problems.append(
            f"is {tensors.size} bytes long, more than the {memory} of this machine's memory"
        )
    if problems:
        raise refuse(path, *(f"{where(tensors.file)}: {problem}" for problem in problems))


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    file = path / PICKLE_FILE
    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
    except FileProblem as e:
        raise refuse(path, str(e)) from e
    if size > (memory := machine_memory()):
        raise refuse(
            path,
            f"{where(file)}: is {size} bytes long, more than the {memory} of this machine's memory",
        )
    with tempfile.TemporaryDirectory(prefix="adafuse-convert-") as scratch:
        out = Path(scratch, "tensors.safetensors")
        if problem := unpickle(file, out):
            raise refuse(
                path,
                f"{file}: {problem}; expected a torch file of tensors alone. Save "
                "the tensors again, best as safetensors",
            )
        return _load(path, out)
