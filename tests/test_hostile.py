"""Hostile input: each kind is refused by one short message that names file and key, within two
seconds and 200 MB, and no code of a model or adapter ever runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_sources import Draw, linears_of, mixlora, write
from hostile_files import BACKBONES, FILES, LORAS, READ
from vllm_adafuse.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone

SECONDS, MIB, LONGEST = 2.0, 200, 3000


class Runner:
    """`tests/hostile_runner.py`, warm."""

    def __init__(self, adapter: Path):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("hostile_runner.py"), adapter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
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


@cases(FILES)
def test_adapter_files(runner, place, tmp_path, damage, words):
    path = damaged(place, "adapter", tmp_path, damage)
    base = place / "base"
    assert_refused(runner("check", path, "--base", base), words)
    assert_refused(runner("merge", path, "--base", base, "--experts", "0", tmp_path / "o"), words)


@pytest.mark.parametrize("source", ["lora", "mixlora"])
@cases(FILES)
def test_source_files(runner, place, tmp_path, damage, words, source):
    path = damaged(place, source, tmp_path, damage)
    out, base = tmp_path / "out", place / "base"
    assert_refused(runner("convert", path, out, "--base", base), words)
    assert not out.exists()


@cases(LORAS)
def test_loras(runner, place, tmp_path, damage, words):
    path = damaged(place, "lora", tmp_path, damage)
    out, base = tmp_path / "out", place / "base"
    assert_refused(runner("convert", path, out, "--base", base), words)
    arguments = (f"a={path}", f"b={place / 'lora'}", "--router", "uniform", "--base", base)
    assert_refused(runner("compose-experts", *arguments, "--output", out), words)


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
    done = runner("route", place / "adapter", "--base", base, "--text", "hello")
    assert_refused(done, words)
