"""Hostile input: each kind is refused by one short message that names file and key, within two
seconds and 200 MB, and no code of a model or adapter ever runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from broken_adapters import Q, edit_config, edit_tensors, instead
from convert_sources import Draw, linears_of, mixlora, write
from hostile_files import ADAFUSE, BACKBONES, FILES, LORAS, MIXTURES, READ, device
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone

SECONDS, MIB, LONGEST = 2.0, 200, 5000


class Runner:
    """`tests/hostile_runner.py`, warm."""

    def __init__(self, adapter: Path):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hostile_runner.py"), adapter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            | {"RUST_BACKTRACE": "0"},
        )
        assert json.loads(self.process.stdout.readline()) == "ready"

    def __call__(self, *argv: object, answers: str = "") -> dict:
        line = json.dumps({"argv": [str(part) for part in argv], "answers": answers})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def make_lora(base: Path, path: Path) -> Path:
    """A plain LoRA as PEFT names its tensors."""
    draw, tensors, modules = Draw(), {}, ["q_proj", "v_proj"]
    for name, (size_in, size_out) in linears_of(base, modules).items():
        stem = f"base_model.model.model.{name}.lora_"
        a, b = draw.pair(size_in, size_out, 4)
        tensors |= {f"{stem}A.weight": a, f"{stem}B.weight": b}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules}
    return write(path, config | {"base_model_name_or_path": str(base)}, tensors)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, an adapter of it and a PEFT LoRA of it."""
    root = tmp_path_factory.mktemp("hostile")
    base = make_tiny_backbone(root / "base", "LlamaForCausalLM")
    make_random_adapter(base, root / "adapter", num_experts=4, r=[4, 2, 4, 4], dtype=torch.float32)
    make_lora(base, root / "lora")
    mixlora(base, root / "mixlora", pickle=False)
    return root


@pytest.fixture(scope="module")
def runner(place):
    runner = Runner(place / "adapter")
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


def damaged(place: Path, which: str, tmp_path: Path, damage) -> Path:
    path = Path(shutil.copytree(place / which, tmp_path / which))
    damage(path)
    return path


def assert_refused(done: dict, words: tuple[str, ...]) -> None:
    text = done["text"]
    assert done["code"] == 1, done
    assert "Traceback" not in text, text
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in:\n{text}"
    assert len(text) < LONGEST and all(line.isprintable() for line in text.splitlines()), text
    assert done["seconds"] < SECONDS and done["grown"] < MIB, done


def cases(table: dict):
    return pytest.mark.parametrize("damage, words", table.values(), ids=table)


@cases(FILES | ADAFUSE)
def test_adapter_files(runner, place, tmp_path, damage, words):
    path = damaged(place, "adapter", tmp_path, damage)
    base = place / "base"
    assert_refused(runner("check", path, "--base", base), words)
    assert_refused(runner("merge", path, "--base", base, "--experts", "0", tmp_path / "o"), words)


@pytest.mark.parametrize("name", ["x" * 900_000, "\x1b[2J/\0", "a/b" * 1000, "../" * 100_000])
def test_names_of_backbones(runner, place, tmp_path, name):
    """An unknown backbone is only a note to `check`, however it is called."""
    path = damaged(place, "adapter", tmp_path, edit_config(base_model_name_or_path=name))
    done = runner("check", path)
    assert done["code"] == 0 and len(done["text"]) < LONGEST, done
    assert all(line.isprintable() for line in done["text"].splitlines())
    out = tmp_path / "out"
    assert_refused(runner("merge", path, "--experts", "0", out), ("backbone",))
    lora = damaged(place, "lora", tmp_path, edit_config(base_model_name_or_path=name))
    assert_refused(runner("convert", lora, out), ("backbone",))


@pytest.mark.parametrize("source", ["lora", "mixlora"])
@cases(FILES)
def test_source_files(runner, place, tmp_path, damage, words, source):
    path = damaged(place, source, tmp_path, damage)
    out, base = tmp_path / "out", place / "base"
    assert_refused(runner("convert", path, out, "--base", base), words)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@cases(FILES)
def test_adapters_of_requests(place, tmp_path, damage, words, kind):
    """What a running server is asked to load, by `--enable-lora`."""
    from vllm_adafuse.errors import AdapterError
    from vllm_adafuse.format.backbone import Backbone
    from vllm_adafuse.serving.adapters import open_adapter

    path = damaged(place, kind, tmp_path, damage)
    taken = []
    while not taken or (taken[-1] >= SECONDS and len(taken) < 3):  # a busy machine is slower
        start = time.process_time()
        with pytest.raises(AdapterError) as caught:
            open_adapter(path, Backbone.from_path(str(place / "base")))
        taken.append(time.process_time() - start)
    assert min(taken) < SECONDS
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < LONGEST


@cases(LORAS)
def test_loras(runner, place, tmp_path, damage, words):
    path = damaged(place, "lora", tmp_path, damage)
    out, base = tmp_path / "out", place / "base"
    assert_refused(runner("convert", path, out, "--base", base), words)
    arguments = (f"a={path}", f"b={place / 'lora'}", "--router", "uniform", "--base", base)
    assert_refused(runner("compose-experts", *arguments, "--output", out), words)


@cases(MIXTURES)
def test_mixtures(runner, place, tmp_path, damage, words):
    path = damaged(place, "mixlora", tmp_path, damage)
    done = runner("convert", path, tmp_path / "out", "--base", place / "base")
    assert_refused(done, words)


def test_loras_that_name_strange_backbones(runner, place, tmp_path):
    """They are another's, which is refused; named by --base and let, it is only told."""
    path = damaged(place, "lora", tmp_path, edit_config(base_model_name_or_path={"a": ["b"] * 999}))
    arguments = (f"a={path}", f"b={place / 'lora'}", "--router", "uniform")
    out = tmp_path / "out"
    arguments = (*arguments, "--base", place / "base", "--output", out)
    assert_refused(runner("compose-experts", *arguments), ["--mixed-backbones"])
    done = runner("compose-experts", *arguments, "--mixed-backbones")
    assert done["code"] == 0 and len(done["text"]) < LONGEST, done


def test_an_empty_tensor_where_no_size_is_known(place, tmp_path):
    """Without a backbone `in` stands for any size, but for none."""

    def damage(path: Path) -> None:
        edit_tensors(lambda t: t.update({f"{Q}.lora_A": torch.zeros(4, 4, 0)}))(path)

    _, problems = check_adapter(damaged(place, "adapter", tmp_path, damage))
    assert len(problems) == 1 and "shape [4, 4, 0], expected [4, 4, in]" in problems[0], problems


def test_composing_with_a_pipe_in_the_backbone(runner, place, tmp_path):
    base = damaged(place, "base", tmp_path, lambda p: os.mkfifo(p / "notes.txt"))
    done = runner("compose", base, place / "adapter", tmp_path / "out", "--copy")
    assert_refused(done, ("notes.txt", "is a pipe"))


@cases(BACKBONES)
def test_backbones(runner, place, tmp_path, damage, words):
    base = damaged(place, "base", tmp_path, damage)
    adapter, lora, out = place / "adapter", place / "lora", tmp_path / "out"
    for argv in (
        ("check", adapter, "--base", base),
        ("compose", base, adapter, out),
        ("random", base, out),
        ("convert", lora, out, "--base", base),
    ):
        assert_refused(runner(*argv), words)
        assert not out.exists()


@cases(READ)
def test_backbones_that_are_read(runner, place, tmp_path, damage, words):
    base = damaged(place, "base", tmp_path, damage)
    done = runner("route", place / "adapter", "--base", base, "--text", f"hello {'a' * 40}!")
    assert_refused(done, words)


LOADED = {
    "weights a pipe": (instead("model.safetensors", os.mkfifo), ("model.safetensors", "pipe")),
    "a shard a device": (lambda p: device(p / "more.safetensors"), ("more.safetensors", "device")),
    "a file a pipe": (instead("generation_config.json", os.mkfifo), ("generation_config", "pipe")),
    "a name twice": (READ["embedding twice"][0], ("model.safetensors", "twice")),
    "an adapter beside it": (
        lambda p: (p / "adapter_config.json").write_text("{}") and None,
        ("adapter_config.json", "move it away"),
    ),
    "layers": BACKBONES["num_hidden_layers 1000000"],
}


@cases(LOADED)
def test_backbones_that_are_trained(runner, place, tmp_path, damage, words):
    base, data = damaged(place, "base", tmp_path, damage), tmp_path / "data.jsonl"
    lines = (json.dumps({"text": f"hello there, {i} words to train on"}) for i in range(20))
    data.write_text("\n".join(lines))
    options = ("--data", data, "--length", "16", "--steps", "1", "--output", tmp_path / "out")
    assert_refused(runner("train", "--base", base, *options), words)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "larger than memory", "zeros"])
def test_pickles(runner, place, tmp_path, kind):
    path = Path(shutil.copytree(place / "lora", tmp_path / "lora"))
    (path / "adapter_model.safetensors").unlink()
    file = path / "adapter_model.bin"
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.touch()
        os.truncate(file, 1 << 43 if kind == "larger than memory" else 1 << 20)
    word = {"zeros": "expected a torch file of tensors", "larger than memory": "memory"}.get(kind, "is a pipe")
    done = runner("convert", path, tmp_path / "out", "--base", place / "base")
    assert done["code"] == 1 and "adapter_model.bin" in done["text"] and word in done["text"], done


def test_a_large_rank_does_not_take_all_memory(monkeypatch):
    """Every expert takes the largest rank."""
    from vllm_adafuse.convert import bank
    from vllm_adafuse.convert.mixture import Linear, Part
    from vllm_adafuse.errors import AdapterError

    def part(rank: int) -> Part:
        zero = torch.zeros(1)
        return Part(zero.expand(rank, 4096), zero.expand(4096, rank), 1.0, False)

    linears = {f"model.layers.{i}.mlp.up_proj": Linear(experts=[part(1)] * 64) for i in range(9)}
    linears["model.layers.9.mlp.up_proj"] = Linear(experts=[part(60_000)])
    monkeypatch.setattr(bank, "machine_memory", lambda: 1 << 30)
    with pytest.raises(AdapterError, match="largest rank, 60000, .* more than the 1073741824"):
        bank.make_bank(linears)


def test_patterns_are_those_of_peft():
    from vllm_adafuse.convert.patterns import first_matches

    names = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "q_proj"]
    patterns = ["layers.0.*q_proj", "_proj", "up_proj|q_proj", r"model\.layers\.\d+\.mlp"]
    assert first_matches(patterns, names) == [0, 2, 2]
    assert first_matches([], names) == [None] * 3 and first_matches(patterns, []) == []
    with pytest.raises(ValueError, match="unterminated subpattern"):
        first_matches(["("], names)
    with pytest.raises(ValueError, match="more than 1 s"):
        first_matches(["(.*.*.*.*)*!"], names)


def test_pickles_of_requests(place, tmp_path):
    from vllm_adafuse.errors import AdapterError
    from vllm_adafuse.serving.adapters import open_adapter

    path = Path(shutil.copytree(place / "lora", tmp_path / "lora"))
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").touch()
    os.truncate(path / "adapter_model.bin", 1 << 43)
    with pytest.raises(AdapterError, match="adapter_model.bin: .*memory"):
        open_adapter(path)
