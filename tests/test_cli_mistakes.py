"""What people type wrong, through every command: an exit code, a short message, and the way out."""

import errno
import os
import pydoc_data.topics
import re
import shlex

import pytest
from cli_fixtures import base, run  # noqa: F401 (fixtures)
from convert_sources import peft_lora
from vllm_adafuse.cli.main import build_parser, main
from vllm_adafuse.cli.parser import os_message
from vllm_adafuse.format.places import output_problem
from vllm_adafuse.format.random_adapter import make_random_adapter


@pytest.fixture(scope="module")
def here(base, tmp_path_factory):
    """A directory with a backbone, adapters, a LoRA, texts, and a directory that is taken."""
    root = tmp_path_factory.mktemp("here")
    (root / "base").symlink_to(base)
    make_random_adapter(base, root / "adapter", num_experts=2, r=2)
    make_random_adapter(base, root / "wise", num_experts=2, r=2, routing="layer_wise")
    peft_lora(base, root / "lora", target_modules=["q_proj"])
    (root / "d.jsonl").write_text("".join(f'{{"text": "hello you {i}"}}\n' for i in range(30)))
    (root / "t.txt").write_text(pydoc_data.topics.topics["assert"] * 3)
    (root / "taken").mkdir()
    (root / "taken" / "x").write_text("")
    return root


@pytest.fixture
def mistake(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    before = {p for p in here.rglob("*")}

    def make(line):
        try:
            code = main(shlex.split(line))
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert {p for p in here.rglob("*")} == before, "nothing is left behind"
        lines = [text for text in re.split(r"[\r\n]+", out + err) if text and "it/s]" not in text]
        return code, "\n".join(lines)

    return make


# Wrong usage: exit code 2, one line of usage, one of what is wrong.
USAGE = {
    "": "required: COMMAND",
    "chek adapter": "'chek', expected one of check, inspect, route",
    "compose-expert": "did you mean compose-experts?",
    "--vresion": "there is no option --vresion; did you mean --version?",
    "check": "required: ADAPTER_DIR",
    "check adapter --bse base": "there is no option --bse; did you mean --base?",
    "check adapter -base base": "there is no option -base; did you mean --base?",
    "check adapter --base": "--base has no value",
    "check adapter --base ''": "--base is empty; is a variable of the shell unset?",
    "check adapter --base=": "--base= is empty",
    "check ''": "'' is empty; is a variable of the shell unset?",
    "check adapter base": "base is one argument too many",
    "inspect adapter --jsn": "did you mean --json?",
    "route adapter": "one of the arguments --text --file --answer is required",
    "route adapter --txt hello": "there is no option --txt; did you mean --text?",
    "route adapter --file ''": "--file is empty",
    "route adapter --text a --file b": "not allowed with argument --text",
    "compose base": "required: ADAPTER_DIR, COMPOSED_DIR",
    "compose base adapter": "required: COMPOSED_DIR",
    "compose base adapter out --cpoy": "did you mean --copy?",
    "merge adapter out": "required: --experts",
    "merge adapter --expert 0 --wieghts 1 out": "did you mean --weights?",
    "merge adapter --experts 0 --weights x out": "--weights is 'x', expected numbers such as 8,16.5",
    "merge adapter --experts 0,1 --weights -0.5,1 out": "is written --weights=-1",
    "random base": "required: OUT",
    "random base out --num_experts 4": "did you mean --num-experts?",
    "random base out --num-experts x": "--num-experts is 'x', expected a whole number of at least 1",
    "random base out --num-experts 0": "--num-experts is '0', expected a whole number of at least 1",
    "random base out --seed x": "--seed is 'x', expected a whole number",
    "random base out --router-temperature x": "is 'x', expected a number",
    "random base out --r 4,x": "--r is '4,x', expected whole numbers such as 4,8,16",
    "random base out --layers 5-3": "--layers is '5-3', expected layers such as 0-3,5",
    "random base out --top-k a=b=c": "expected 2, self_attn=1,mlp=2 or 1,2,2",
    "random base out --dtype float64": "expected one of bfloat16, float16, float32",
    "random base out --routing layerwise": "did you mean layer_wise?",
    "train": "required: --base, --data, --output",
    "train --base base --data d.jsonl --output out --laers 0-1": "did you mean --layers?",
    "train --base base --data d.jsonl --output ''": "--output is empty",
    "train --base base --data d.jsonl --output out --layers x": "expected layers such as 0-3,5",
    "compose-experts": "required: --output",
    "compose-experts lora --output out": "is 'lora', expected a name and a path: NAME=PATH",
    "compose-experts a=lora --output out --router unifrom": "did you mean uniform?",
    "compose-experts a=lora --output out --samples t.txt": "--samples is 't.txt', expected a name",
    "convert lora": "required: OUT",
    "convert lora out --top-k 2,x": "expected 2, or one number for each layer: 2,2,4",
    "convert lora out --gks maybe": "expected one of subtract, done",
    "distill wise --output out": "required: --data",
    "distill wise --data d.jsonl --output out --steps 0": "expected a whole number of at least 1",
    "distill wise --data d.jsonl --output out --batch-size 0": "a whole number of at least 1",
    "distill wise --data d.jsonl --output out --length x": "a whole number of at least 1",
    "tune": "required: BASE",
    "tune base --tokens 1,x": "expected whole numbers such as 4,8,16",
    "explain base": "required: ADAPTER_DIR",
    "explain base adapter --token": "",
}
# Right usage of wrong things: exit code 1, one message.
THINGS = {
    "check adaptr --base base": "no such directory; did you mean",
    "check adapter/adapter_config.json": "is a file, expected the directory",
    "check base": "is a checkpoint of a whole model",
    "inspect adapter --base adapter": "the other way round",
    "inspect lora": "vllm-adafuse convert",
    "route adapter --file none.txt": "none.txt: does not exist; check the path",
    "route adapter --file taken": "taken: is a directory, expected a file",
    "route adapter --text a --html no/such.html": "no/such.html: does not exist; check the path",
    "route adapter --text a --html taken": "taken: is a directory, expected a file",
    "route wise --text a": "no table of the vocabulary exists",
    "compose adapter base out": "the other way round",
    "compose base none out": "no such directory",
    "compose base adapter taken": "it is not empty; name a new directory",
    "compose base adapter t.txt": "it is a file or a link; name a new directory",
    "compose base adapter t.txt/out": "t.txt is a file, expected a folder",
    "merge adapter --experts nine out": "it has no expert \"nine\", expected one of",
    "merge adapter --experts 0 taken": "it is not empty; name a new directory",
    "merge out --experts 0 adapter": "no such directory",
    "merge wise --experts 0 out": "only a pre_gated adapter can be merged",
    "random out adapter": "it holds adapter_config.json (is the order of the arguments right?)",
    "random base t.txt": "it is a file or a link; name a new directory",
    "random base out --target-modules q_prj": "target module q_prj is not in",
    "random base out --layers 7": "layer 7 is not in",
    "train --base base --data none.jsonl --output out": "none.jsonl: cannot be read",
    "train --base base --data taken --output out": "taken",
    "train --base base --data d.jsonl --output taken": "it is not empty; name a new directory",
    "train --base base --data d.jsonl --output t.txt": "it is a file or a link",
    "train --base bse --data d.jsonl --output out": "did you mean base?",
    "train --base base --data d.jsonl --output out --lr -1": "expected a number above 0",
    "train --base base --data d.jsonl --output out": "`length` is 1024, expected at most",
    "compose-experts --base base --output out": "no LoRA was given; name at least one as NAME=DIR",
    "compose-experts a=none --base base --output out": "no such directory",
    "compose-experts a=lora b=lora --base base --output out": "add --samples NAME=FILE for each",
    "compose-experts a=lora a=lora --base base --output out": "a name is given to two LoRAs",
    "compose-experts a=adapter --base base --output out": "a mixture in this format already",
    "compose-experts a=base --base base --output out": "is a checkpoint of a whole model",
    "compose-experts a=lora --base base --output taken": "it is not empty",
    "compose-experts a=lora --base base --output out --samples b=t.txt": "no such expert",
    "compose-experts a=lora --base base --output out --samples a=none.txt": "none.txt: cannot be read",
    "compose-experts a=lora --base base --output out --held-out 7": "expected a share from",
    "convert none out": "no such directory; name the directory",
    "convert base out": "is a checkpoint of a whole model",
    "convert adapter out": "it is in this format already; serve it as it is",
    "convert lora/adapter_config.json out": "is a file, expected the directory",
    "convert lora taken": "it is not empty; name a new directory",
    "convert lora out --top-k 2": "--top-k: says nothing about PEFT LoRA adapters",
    "convert lora out --base none": "none is not on this machine",
    "distill adapter --data d.jsonl --output out": "it is pre-gated already; serve it as it is",
    "distill wise --data none.jsonl --output out": "none.jsonl: cannot be read",
    "distill wise --data d.jsonl --output taken": "it is not empty; name a new directory",
    "distill wise --data d.jsonl --output out --held-out 0": "expected above 0 and below 1",
    "distill wise --data d.jsonl --output out --top-k 99 --quiet": "`top_k` is 99",
    "distill wise --data d.jsonl --output out --router-layer 99 --quiet": "expected 0 to 2",
    "tune adapter": "is an adapter",
    "tune base --r 999": "--r is 999, expected a number from 1 to 256",
    "explain adapter base --device 'NVIDIA H200'": "the other way round",
}


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage(line, mistake):
    code, text = mistake(line)
    lines = text.splitlines()
    assert code == 2 and len(lines) == 2, text
    assert lines[0].startswith("usage: vllm-adafuse") and len(lines[0]) < 120
    assert USAGE[line] in lines[1] and "--help says more" in lines[1] and len(lines[1]) < 320


@pytest.mark.parametrize("line", THINGS)
def test_wrong_things(line, mistake):
    code, text = mistake(line)
    assert code == 1 and THINGS[line] in text, text
    assert "Traceback" not in text and "Errno" not in text
    assert len(text.splitlines()) <= 4 and max(map(len, text.splitlines())) < 600, text


def test_a_path_that_is_right_but_for_its_rights(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be written (permission denied)" in output_problem(tmp_path / "a" / "b")
    monkeypatch.undo()
    assert output_problem(tmp_path / "a" / "b") is None
    for code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
        said = os_message(OSError(code, os.strerror(code), "some/file"))
        assert said.startswith("some/file: ") and "name another" in said
    assert os_message(OSError("odd")) == "odd"


def test_values_that_are_right_still_are(capsys):
    parser = build_parser()
    args = parser.parse_args(["merge", "a", "--experts", "0,1", "--weights=-0.5,1", "out"])
    assert args.weights == [-0.5, 1] and args.out == "out"
    args = parser.parse_args(["route", "a", "--text=-x", "--js"])  # an abbreviation
    assert args.text == "-x" and args.json
    assert parser.parse_args(["check", "--", "--odd"]).adapter == "--odd"
    assert parser.parse_args(["random", "b", "o", "--router-layer", "-1"]).router_layer == -1
