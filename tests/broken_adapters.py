"""Adapters that must be refused: how each is damaged, and what its message must say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import tiny_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GATE, Q = "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"
NOBODY = 65534
BACKBONES = {
    "llama": ("LlamaForCausalLM", {}),
    "wide": ("LlamaForCausalLM", {"hidden_size": 256}),
    "short": ("LlamaForCausalLM", {"num_hidden_layers": 2}),
    "opt": ("OPTForCausalLM", {"num_hidden_layers": 2}),
}


@dataclass(frozen=True)
class Broken:
    """One way to break an adapter.

    Attributes:
        damage: changes a good adapter directory; may return another path to use instead.
        words: what the message must contain, found and expected included.
        base: the backbone it is tried on, a key of BACKBONES.
        user: the user id that opens it.
    """

    damage: Callable[[Path], Path | None]
    words: tuple[str, ...]
    base: str = "llama"
    user: int = 0


def make_backbones(root: Path) -> dict[str, Path]:
    """Writes the config.json of every backbone of the table: bad input never reaches weights."""
    for name, (architecture, options) in BACKBONES.items():
        tiny_config(architecture, **options).save_pretrained(root / name)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)  # also for NOBODY
    return {name: root / name for name in BACKBONES}


def make_good(base: Path, path: Path) -> Path:
    """A good adapter of four experts; expert 1 has a rank of its own."""
    return make_random_adapter(
        base, path, num_experts=4, top_k=2, r=[4, 2, 4, 4], dtype=torch.float32
    )


def break_copy(case: Broken, good: Path, path: Path) -> Path:
    """Copies the good adapter to `path`, damages the copy, returns what to open."""
    shutil.copytree(good, path)
    return case.damage(path) or path


@contextmanager
def as_user(user: int):
    """Root may read everything, so files without permission need another user."""
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


def edit_config(**changes) -> Callable[[Path], None]:
    """Sets keys (`router__input` for `router.input`); None removes one."""

    def damage(path: Path) -> None:
        raw = json.loads((path / CONFIG).read_text())
        for key, value in changes.items():
            raw[key.replace("__", ".")] = value
        raw = {key: value for key, value in raw.items() if value is not None}
        (path / CONFIG).write_text(json.dumps(raw))

    return damage


def edit_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Rewrites the weights after `change(tensors)`, which works in place."""

    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, path / WEIGHTS)

    return damage


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Rewrites the header of the safetensors file, not its data."""

    def damage(path: Path) -> None:
        content = (path / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return damage


def put(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes(content) and None


def remove(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def cut(file: str, size: int) -> Callable[[Path], None]:
    """Truncates a file, or extends it with zeros that take no disk."""
    return lambda path: os.truncate(path / file, size)


def instead(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where a file should be."""

    def damage(path: Path) -> None:
        (path / file).unlink()
        make(path / file)

    return damage


def double_key(path: Path) -> None:
    text = (path / CONFIG).read_text()
    (path / CONFIG).write_text(text.replace("{", '{"top_k": 1, ', 1))


def pickled(path: Path) -> bytes:
    return pickle.dumps({"router.weight": [0.0] * 4})


def only_pickle(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(pickled(path))


def link_loop(path: Path) -> Path:
    loop = path.parent / f"{path.name}_loop"
    loop.symlink_to(loop)
    return loop


def no_permission(path: Path) -> None:
    path.chmod(0)


def set_value(name: str, value: float) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[name][2, 1, 0] = value

    return change


def swap(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[name] = make(tensors[name])

    return change


def add(name: str, *shape: int) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors[name] = torch.ones(*shape)

    return change


def pair(layer: int, module: str, size_in: int, size_out: int) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        name = f"model.layers.{layer}.{module}"
        tensors[f"{name}.lora_A"] = torch.zeros(4, 4, size_in)
        tensors[f"{name}.lora_B"] = torch.zeros(4, size_out, 4)

    return change


def past_rank(tensors: dict) -> None:
    tensors[f"{Q}.lora_A"][1, 3, 0] = 1.0  # expert 1 has rank 2


def fewer_modules(path: Path) -> None:
    edit_config(target_modules=["q_proj", "k_proj"])(path)


def other_offsets(header: dict) -> None:
    header["router.weight"]["data_offsets"][1] += 4


def huge_shape(header: dict) -> None:
    header["router.weight"] |= {"shape": [1 << 40, 128], "data_offsets": [0, 1 << 49]}


_CONFIG_CASES = {
    "no config": Broken(remove(CONFIG), (CONFIG, "missing")),
    "wrong JSON": Broken(put(CONFIG, b'{"r": 4,'), (CONFIG, "not valid JSON", "line 1")),
    "empty config": Broken(put(CONFIG, b""), (CONFIG, "not valid JSON")),
    "a JSON list": Broken(put(CONFIG, b"[1]"), (CONFIG, "a list", "expected a JSON object")),
    "key twice": Broken(double_key, (CONFIG, "`top_k`", "twice", "keep one")),
    "unknown key": Broken(edit_config(lora_dropuot=0.1), ("unknown key `lora_dropuot`", "top_k")),
    "r is a string": Broken(edit_config(r="16"), ('`r` is "16"', "expected a positive integer")),
    "r is 0": Broken(edit_config(r=0), ("`r` is 0", "expected a positive integer")),
    "top_k is true": Broken(edit_config(top_k=True), ("`top_k` is true", "expected an integer")),
    "num_experts 4.0": Broken(edit_config(num_experts=4.0), ("`num_experts` is 4.0", "integer")),
    "num_experts 1e9": Broken(edit_config(num_experts=10**9), ("`num_experts`", "1 to 1024")),
    "targets a string": Broken(
        edit_config(target_modules="q_proj"), ('`target_modules` is "q_proj"', "expected a list")
    ),
    "use_rslora a string": Broken(
        edit_config(use_rslora="false"), ('`use_rslora` is "false"', "expected true or false")
    ),
    "router a list": Broken(edit_config(router=[1]), ("`router` is [1]", "expected an object")),
    "router.input": Broken(
        edit_config(router__input="last_norm"), ('`router.input` is "last_norm"', "first_norm")
    ),
    "no top_k": Broken(edit_config(top_k=None), (CONFIG, "`top_k` is missing", "required")),
    "no base": Broken(edit_config(base_model_name_or_path=None), ("`base_model_name_or_path`",)),
    "plain LoRA": Broken(edit_config(peft_type="LORA"), ('`peft_type` is "LORA"', "ADAFUSE")),
    "k above E": Broken(edit_config(top_k=5), ("`top_k` is 5", "from 1 to num_experts (4)")),
    "short r list": Broken(edit_config(r=[4, 4]), ("`r` is [4, 4]", "expected 4 entries")),
    "alpha NaN": Broken(edit_config(lora_alpha=float("nan")), ("`lora_alpha` is NaN", "finite")),
    "alpha beyond": Broken(edit_config(lora_alpha=10**400), ("`lora_alpha` is 1000", "finite")),
    "temperature 0": Broken(
        edit_config(router__temperature=0), ("`router.temperature` is 0", "above 0")
    ),
    "newer format": Broken(
        edit_config(format_version=3), ("`format_version` is 3", "at most 2", "upgrade")
    ),
    "names twice": Broken(
        edit_config(expert_names=["a", "b", "a", "c"]), ('["a", "b", "a", "c"]', "once")
    ),
    "layer_wise": Broken(
        edit_config(routing="layer_wise"), ('`routing` is "layer_wise"', 'expected "pre_gated"')
    ),
    "targets twice": Broken(
        edit_config(target_modules=["q_proj", "q_proj"]), ("`target_modules`", "once")
    ),
    "huge config": Broken(cut(CONFIG, 17 << 20), (CONFIG, "17825792 bytes", "at most 1048576")),
    "deep JSON": Broken(put(CONFIG, b"[" * 500_000), (CONFIG, "not valid JSON")),
    "deep value": Broken(
        put(CONFIG, b'{"r": ' + b"[" * 900 + b"]" * 900 + b"}"), ("`r` is", "positive integer")
    ),
    "not UTF-8": Broken(put(CONFIG, b'{"r": "\xff\xfe"}'), (CONFIG, "utf-8", "not valid JSON")),
    "control characters": Broken(
        edit_config(**{"\x1b[2J\ud800": 1}), (r"unknown key `\u001b[2J\ud800`",)
    ),
}
_TENSOR_CASES = {
    "E of the tensors": Broken(
        edit_config(num_experts=3, r=4, lora_alpha=8, expert_names=["a", "b", "c"]),
        ("router.weight", "shape [4, 128]", "expected [3, 128]", "num_experts is 3"),
    ),
    "shape of A": Broken(
        edit_tensors(swap(f"{Q}.lora_A", lambda t: t[:, :, :64])),
        (f"{Q}.lora_A", "[4, 4, 64]", "expected [4, 4, 128]"),
    ),
    "shape of B": Broken(
        edit_tensors(swap(f"{Q}.lora_B", lambda t: t.transpose(1, 2))),
        (f"{Q}.lora_B", "[4, 4, 128]", "expected [4, 128, 4]"),
    ),
    "dimensions of A": Broken(
        edit_tensors(swap(f"{Q}.lora_A", lambda t: t[0])),
        (f"{Q}.lora_A", "[4, 128]", "expected [4, 4, 128]"),
    ),
    "shape of the router": Broken(
        edit_tensors(swap("router.weight", lambda t: t[:, :100])),
        ("router.weight", "[4, 100]", "expected [4, 128]"),
    ),
    "router bias": Broken(
        edit_tensors(add("router.bias", 3)), ("router.bias", "shape [3]", "expected [4]")
    ),
    "no router": Broken(
        edit_tensors(lambda t: t.pop("router.weight")), ("router.weight is missing", "[4, 128]")
    ),
    "half a pair": Broken(
        edit_tensors(lambda t: t.pop(f"{Q}.lora_B")), (f"{Q}.lora_A", "half a pair", f"{Q}.lora_B")
    ),
    "layer beyond": Broken(
        edit_tensors(pair(3, "self_attn.q_proj", 128, 128)),
        ("model.layers.3.self_attn.q_proj.lora_A", "expected layers 0 to 2"),
    ),
    "layer of 5000 digits": Broken(
        edit_tensors(add(f"model.layers.{'9' * 5000}.mlp.up_proj.lora_A", 1)),
        ("model.layers.999", "unknown name", "expected router.weight"),
    ),
    "wrong parent": Broken(
        edit_tensors(pair(0, "mlp.q_proj", 128, 128)), ("model.layers.0.mlp.q_proj", "no linear")
    ),
    "NaN": Broken(
        edit_tensors(set_value(f"{Q}.lora_A", float("nan"))),
        (f"{Q}.lora_A", "1 values", "[2, 1, 0]", "expected finite"),
    ),
    "Inf": Broken(
        edit_tensors(set_value(f"{GATE}.lora_B", float("inf"))),
        (f"{GATE}.lora_B", "1 values", "[2, 1, 0]", "expected finite"),
    ),
    "unknown target": Broken(
        edit_config(target_modules=["q_proj", "qkv_proj"]), ("`target_modules`", "qkv_proj", "up_")
    ),
    "unlisted module": Broken(fewer_modules, (f"{GATE}.lora_A", "gate_proj", "`target_modules`")),
    "unknown tensor": Broken(
        edit_tensors(add("base_model.model.q_proj.lora_A.weight", 4, 128)),
        ("base_model.model.q_proj.lora_A.weight", "unknown name", "expected router.weight"),
    ),
    "past the rank": Broken(
        edit_tensors(past_rank), (f"{Q}.lora_A", "past rank 2 of expert 1", "expected zeros")
    ),
    "int8": Broken(
        edit_tensors(swap(f"{Q}.lora_A", lambda t: t.to(torch.int8))),
        (f"{Q}.lora_A", "dtype I8", "F32, F16, BF16"),
    ),
    "other hidden size": Broken(
        lambda path: None, ("router.weight", "[4, 128]", "expected [4, 256]", "llama"), base="wide"
    ),
    "other depth": Broken(
        lambda path: None, ("model.layers.2.", "expected layers 0 to 1", "llama"), base="short"
    ),
    "unsupported family": Broken(
        lambda path: None,
        ("OPTForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
        + ("Qwen3ForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"),
        base="opt",
    ),
}
_DAMAGED = "not a sound safetensors file"
_FILE_CASES = {
    "no weights": Broken(remove(WEIGHTS), (WEIGHTS, "missing", "save the weights")),
    "a pickle": Broken(only_pickle, (WEIGHTS, "adapter_model.bin is a pickle, which is never")),
    "a renamed pickle": Broken(put(WEIGHTS, pickled(Path())), (WEIGHTS, _DAMAGED)),
    "truncated": Broken(cut(WEIGHTS, 50_000), (WEIGHTS, _DAMAGED, "truncated")),
    "trailing bytes": Broken(cut(WEIGHTS, 1 << 30), (WEIGHTS, _DAMAGED)),
    "empty weights": Broken(cut(WEIGHTS, 0), (WEIGHTS, _DAMAGED)),
    "no tensors": Broken(edit_tensors(dict.clear), (WEIGHTS, "router.weight is missing")),
    "only a router": Broken(
        edit_tensors(lambda t: [t.pop(n) for n in list(t) if n != "router.weight"]),
        (WEIGHTS, "no tensor but the router's", "expected at least one"),
    ),
    "offsets that lie": Broken(edit_header(other_offsets), (WEIGHTS, _DAMAGED)),
    "header of exabytes": Broken(
        put(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), (WEIGHTS, _DAMAGED)
    ),
    "tensor of terabytes": Broken(edit_header(huge_shape), (WEIGHTS, _DAMAGED)),
    "deep header": Broken(
        put(WEIGHTS, struct.pack("<Q", 400_000) + b'{"a":' * 80_000), (WEIGHTS, _DAMAGED)
    ),
    "a file": Broken(lambda path: path / CONFIG, (CONFIG, "is a file", "expected the directory")),
    "no such path": Broken(lambda path: path / "nowhere", ("nowhere", "no such directory")),
    "directory link loop": Broken(link_loop, ("_loop", "symbolic links", "expected a readable")),
    "file link loop": Broken(
        instead(WEIGHTS, lambda file: file.symlink_to(file)), (WEIGHTS, "symbolic links")
    ),
    "dangling link": Broken(
        instead(WEIGHTS, lambda file: file.symlink_to("/nowhere/else")), (WEIGHTS, "missing")
    ),
    "unreadable directory": Broken(
        no_permission, ("Permission denied", "expected a readable directory"), user=NOBODY
    ),
    "unreadable weights": Broken(
        lambda path: (path / WEIGHTS).chmod(0), (WEIGHTS, "Permission denied"), user=NOBODY
    ),
    "empty directory": Broken(
        lambda path: [file.unlink() for file in path.iterdir()] and None,
        (CONFIG, WEIGHTS, "missing"),
    ),
    "config a directory": Broken(instead(CONFIG, Path.mkdir), (CONFIG, "is a directory")),
    "weights a directory": Broken(instead(WEIGHTS, Path.mkdir), (WEIGHTS, "is a directory")),
    "config a pipe": Broken(instead(CONFIG, os.mkfifo), (CONFIG, "is a pipe", "regular file")),
    "weights a pipe": Broken(instead(WEIGHTS, os.mkfifo), (WEIGHTS, "is a pipe", "regular file")),
    "weights a device": Broken(
        instead(WEIGHTS, lambda file: file.symlink_to("/dev/zero")), (WEIGHTS, "device", "regular")
    ),
}
BROKEN = {**_CONFIG_CASES, **_TENSOR_CASES, **_FILE_CASES}
