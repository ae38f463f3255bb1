"""What a stranger may put where an adapter, a LoRA or a backbone is expected."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from broken_adapters import CONFIG, WEIGHTS, edit_config, edit_header, instead, put
from vllm_adafuse.format.tensor_file import machine_memory

MODEL, INDEX = "config.json", "model.safetensors.index.json"
Damage = Callable[[Path], object]


def edit_json(file: str, **changes) -> Damage:
    """Sets keys of a JSON file."""

    def damage(path: Path) -> None:
        raw = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps(raw | changes))

    return damage


def text(file: str, change: Callable[[str], str]) -> Damage:
    """Changes a file as text: what no JSON library would write."""
    return lambda path: (path / file).write_text(change((path / file).read_text())) and None


def first_key(file: str, key_and_value: str) -> Damage:
    return text(file, lambda t: t.replace("{", "{" + key_and_value + ",", 1))


def listen(file: Path) -> None:
    """A socket; its path would be too long to bind by."""
    here = os.getcwd()
    os.chdir(file.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(here)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def loop(file: Path) -> None:
    file.symlink_to(file.name)


def header(size: int, content: bytes) -> bytes:
    return struct.pack("<Q", size) + content


def raw_header(table: str, data: int = 0) -> Damage:
    """A safetensors file of this header and zeros, which take no disk."""

    def damage(path: Path) -> None:
        content = header(len(table.encode()), table.encode())
        (path / WEIGHTS).write_bytes(content)
        os.truncate(path / WEIGHTS, len(content) + data)

    return damage


def sparse(path: Path) -> None:
    """One tensor of more bytes than the machine has memory."""
    size = (machine_memory() * 2 // 512) * 512
    entry = {"dtype": "F32", "shape": [4, size // 512, 32], "data_offsets": [0, size]}
    name = "model.layers.0.self_attn.q_proj.lora_A"
    raw_header(json.dumps({name: entry}), size)(path)


def twice(path: Path) -> None:
    """A tensor's name twice: the second is another's bytes."""
    content = (path / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + size])
    name, entry = next((n, e) for n, e in table.items() if n != "__metadata__")
    more = f",{json.dumps(name)}:{json.dumps(entry)}}}"
    again = content[8 : 8 + size].rstrip()[:-1] + more.encode()
    (path / WEIGHTS).write_bytes(header(len(again), again) + content[8 + size :])


def first_tensor(**changes) -> Damage:
    def change(table: dict) -> None:
        next(e for n, e in table.items() if n != "__metadata__").update(changes)

    return edit_header(change)


def many_names(count: int) -> Damage:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return raw_header("{" + ",".join(f'"{i:x}":{entry}' for i in range(count)) + "}")


def long_names(path: Path) -> None:
    """A hundred tensors of which each name is as long as a page."""
    names = [f"\x1b[2J{'x' * 10_000}{i}" for i in range(100)]
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    raw_header(json.dumps(dict.fromkeys(names, entry)))(path)


def nested(levels: int, at: str = "x_a") -> str:
    return f'"{at}": ' + "[" * levels + "]" * levels


# Of any directory with adapter_config.json and adapter_model.safetensors: (damage, words).
FILES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    f"{file} {kind}": (instead(file, make), (file, words))
    for file in (CONFIG, WEIGHTS)
    for kind, make, words in (
        ("a device", device, "is a pipe, socket or device"),
        ("a pipe", os.mkfifo, "is a pipe, socket or device"),
        ("a socket", listen, "is a pipe, socket or device"),
        ("a directory", Path.mkdir, "is a directory"),
        ("a loop", loop, "symbolic links"),
    )
} | {
    "key twice": (first_key(CONFIG, '"r": 4'), (CONFIG, "`r`", "twice")),
    "key twice inside": (first_key(CONFIG, '"x_a": {"b": 1, "b": 2}'), (CONFIG, "`b`", "twice")),
    "NaN": (first_key(CONFIG, '"x_a": NaN'), (CONFIG, "`x_a` is NaN", "finite")),
    "Infinity inside": (first_key(CONFIG, '"x_a": [1, -Infinity]'), (CONFIG, "`x_a.1`")),
    "1e999": (first_key(CONFIG, '"x_a": 1e999'), (CONFIG, "`x_a` is Infinity")),
    "5000 digits": (first_key(CONFIG, '"x_a": ' + "9" * 5000), (CONFIG, "`x_a`", "5000 digits")),
    "5000 digits of r": (
        text(CONFIG, lambda t: re.sub(r'"r": (\[[^]]*\]|\d+)', f'"r": {"9" * 5000}', t)),
        (CONFIG, "`r` is"),
    ),
    "half a character": (first_key(CONFIG, r'"x_a": "\ud800"'), (CONFIG, "`x_a`", "half")),
    "nested": (first_key(CONFIG, nested(90)), (CONFIG, "`x_a", "64 levels")),
    "nested without end": (first_key(CONFIG, nested(100_000)), (CONFIG, "`x_a`", "64 levels")),
    "a megabyte of r": (edit_config(r="x" * 900_000), (CONFIG, "`r`", "...")),
    "config of megabytes": (lambda p: os.truncate(p / CONFIG, 1 << 40), (CONFIG, "bytes long")),
    "header beyond the file": (put(WEIGHTS, header(1000, b"{}")), (WEIGHTS, "should be 1000")),
    "header of gigabytes": (
        lambda p: [put(WEIGHTS, header(5 << 30, b"{}"))(p), os.truncate(p / WEIGHTS, 6 << 30)][0],
        (WEIGHTS, "5368709120", "at most"),
    ),
    "header nested": (raw_header('{"a":' * 30_000), (WEIGHTS, "nested too deep")),
    "header a list": (raw_header("[1]"), (WEIGHTS, "holds a list")),
    "header not UTF-8": (put(WEIGHTS, header(4, b'{"\xff"')), (WEIGHTS, "not JSON")),
    "name twice": (twice, (WEIGHTS, "twice")),
    "dtype of megabytes": (first_tensor(dtype="x" * (5 << 20)), (WEIGHTS, "`dtype`", "xxx...")),
    "dtype of nothing": (first_tensor(dtype=None), (WEIGHTS, "`dtype`", "null")),
    "shape of exabytes": (
        first_tensor(shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0]), (WEIGHTS, "`shape`")
    ),
    "shape of text": (first_tensor(shape=["4", 4]), (WEIGHTS, "`shape`", '["4", 4]')),
    "shape of 5000 digits": (
        raw_header('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,0]}}'),
        (WEIGHTS, "`shape`"),
    ),
    "offsets of NaN": (
        raw_header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}'),
        (WEIGHTS, "`data_offsets`"),
    ),
    "offsets that overlap": (
        raw_header(
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            '"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4
        ),
        (WEIGHTS, "tensor b", "begin at 0, expected 4"),
    ),
    "larger than memory": (sparse, (WEIGHTS, "memory")),
    "too many names": (many_names(50_000), (WEIGHTS, "more than 40000")),
    "many names": (many_names(30_000), (WEIGHTS, "29997 more")),
    "long names": (long_names, (WEIGHTS, "97 more")),
}  # fmt: skip
def half_pairs(path: Path) -> None:
    """Each of thousands of tensors has a problem of its own."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = [f"model.layers.{i}.mlp.up_proj.lora_A" for i in range(5000)]
    raw_header(json.dumps(dict.fromkeys(names, entry)))(path)


# Of an AdaFuse adapter alone.
ADAFUSE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "long names of experts": (
        edit_config(expert_names=[f"{i}{'x' * 10_000}" for i in range(4)]),
        (CONFIG, "`expert_names`", "200 characters"),
    ),
    "half pairs": (half_pairs, (WEIGHTS, "half a pair", "more problems")),
    "experts without end": (edit_config(num_experts=10**12), ("`num_experts`", "1 to 1024")),
    "k without end": (edit_config(top_k=10**400), (CONFIG, "`top_k`")),
    "r without end": (edit_config(r=[4, 2, 4, 1 << 40]), (CONFIG, "`r`")),
    "targets of a pattern": (edit_config(target_modules="(.*.*.*)*!"), ("`target_modules`",)),
    "targets without end": (
        edit_config(target_modules=[f"{i}" for i in range(50_000)]), ("`target_modules`", "more")
    ),
}  # fmt: skip
# Of a backbone's directory.
BACKBONES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    f"config {kind}": (instead(MODEL, make), (MODEL, words))
    for kind, make, words in (
        ("a device", device, "is a pipe, socket or device"),
        ("a pipe", os.mkfifo, "is a pipe, socket or device"),
        ("a directory", Path.mkdir, "is a directory"),
        ("a loop", loop, "symbolic links"),
    )
} | {
    f"{key} {value}": (edit_json(MODEL, **{key: value}), (MODEL, f"`{key}` is"))
    for key, value in {
        "num_hidden_layers": 1_000_000,
        "hidden_size": 1 << 40,
        "intermediate_size": -1,
        "vocab_size": 1 << 62,
        "num_attention_heads": 10**9,
        "num_key_value_heads": 0,
        "head_dim": 1e9,
        "num_labels": 10**9,
    }.items()
} | {
    "layers a text": (edit_json(MODEL, num_hidden_layers="x" * 10**6), (MODEL, "`num_hidden")),
    "config twice": (first_key(MODEL, '"hidden_size": 1'), (MODEL, "`hidden_size`", "twice")),
    "config NaN": (edit_json(MODEL, rms_norm_eps=float("nan")), (MODEL, "`rms_norm_eps` is NaN")),
    "config nested": (first_key(MODEL, nested(50_000)), (MODEL, "`x_a`")),
    "config of another type": (edit_json(MODEL, model_type="whisper"), (MODEL, "`model_type`")),
    "config of a list": (put(MODEL, b"[]"), (MODEL, "holds a list")),
    "rope of a stranger": (
        edit_json(MODEL, rope_parameters={"rope_type": "x" * 10**6}), (MODEL,)
    ),
}  # fmt: skip
# Of a backbone whose weights or tokenizer are read: `route` does both.
READ: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "index a pipe": (lambda p: os.mkfifo(p / INDEX), (INDEX, "is a pipe")),
    "index leads out": (
        put(INDEX, b'{"weight_map": {"model.embed_tokens.weight": "../../x"}}'),
        (INDEX, "`weight_map`", "../../x"),
    ),
    "index of numbers": (put(INDEX, b'{"weight_map": {"a": 1}}'), (INDEX, "`weight_map`")),
    "index of escapes": (
        put(INDEX, json.dumps({"weight_map": {"a": "\x1b[2J/" + "x" * 10**5}}).encode()),
        (INDEX, r"\u001b[2J/xxx"),
    ),
    "index twice": (put(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), (INDEX, "`a`", "twice")),
    "weights a pipe": (instead("model.safetensors", os.mkfifo), ("model.safetensors", "pipe")),
    "embedding twice": (
        lambda p: [(p / "model.safetensors").rename(p / WEIGHTS), twice(p),
                   (p / WEIGHTS).rename(p / "model.safetensors")][0] and None,
        ("model.safetensors", "twice"),
    ),
    "tokenizer a pipe": (instead("tokenizer.json", os.mkfifo), ("tokenizer.json", "pipe")),
    "tokenizer of nothing": (put("tokenizer.json", b"{}"), ("no usable tokenizer",)),
    "tokenizer of a terabyte": (
        lambda p: os.truncate(p / "tokenizer.json", 1 << 40), ("tokenizer.json", "at most")
    ),
    "tokenizer that never ends": (
        edit_json("tokenizer.json", pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
            "invert": False,
        }),
        ("the tokenizer cannot be used", "retry-limit"),
    ),
    "tokenizer of lists": (
        edit_json("tokenizer_config.json", model_max_length=[1]), ("no usable tokenizer",)
    ),
    "tokenizer without end token": (
        edit_json("tokenizer_config.json", eos_token={"a": 1}), ("no usable tokenizer",)
    ),
    "tokenizer nested": (
        first_key("tokenizer_config.json", nested(50_000)), ("no usable tokenizer",)
    ),
}  # fmt: skip
# Of a PEFT LoRA that is converted or composed, beside FILES.
ALTERNATIVES = "(.|.)" * 24 + "!"
LORAS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "rank_pattern": (edit_config(rank_pattern={"(.*.*.*.*)*!": 4}), (CONFIG, "`rank_pattern`")),
    "alpha_pattern": (edit_config(alpha_pattern={ALTERNATIVES: 4}), (CONFIG, "`alpha_pattern`")),
    "rank_pattern wrong": (edit_config(rank_pattern={"(": 4}), (CONFIG, "`rank_pattern`")),
    "rank_pattern a list": (edit_config(rank_pattern=["a"]), (CONFIG, "`rank_pattern`")),
    "r of exabytes": (edit_config(r=10**18), (CONFIG, "`r`")),
    "alpha of a text": (edit_config(lora_alpha="9" * 10**5), (CONFIG, "`lora_alpha`")),
}
# Of a MixLoRA source: values of types that no library writes.
MIXTURES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    f"{key} {value}": (edit_config(**{key: value}), (CONFIG, f"`{key}`"))
    for key, value in (
        ("num_experts", True),
        ("num_experts", 10**30),
        ("r", 10**30),
        ("r", [4]),
        ("top_k", {"a": 1}),
        ("lora_alpha", "8"),
        ("routing_strategy", {"a": 1}),
        ("act_fn", ["silu"]),
        ("expert_lora", {"lora_alpha": "8"}),
        ("expert_lora", {"lora_alpha": 8, "use_rslora": [1]}),
    )
}
