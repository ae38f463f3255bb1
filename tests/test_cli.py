"""The command line, in this process through `main`; and once as users start it."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_adafuse.adapter import load_adapter
from vllm_adafuse.cli import common
from vllm_adafuse.cli.main import main
from vllm_adafuse.random_adapter import make_random_adapter
from vllm_adafuse.routing import OfflineRouter, vocabulary_routes
from vllm_adafuse.tiny import make_tiny_backbone

COMMANDS = ("check", "inspect", "route", "compose", "random")
EVIL = '</span><script>alert("x")</script>'


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_random_adapter(
        base,
        tmp_path_factory.mktemp("adapter"),
        num_experts=4,
        r=[2, 4, 8, 8],
        target_modules=["q_proj", "up_proj"],
        layers=[0, 2],
        expert_names=["prose", "code", EVIL, "\x1b[31mred"],
    )


@pytest.fixture
def copied(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "copied")


def edit_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def run(capsys, *argv):
    """Exit code, stdout, stderr."""
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *argv):
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    return json.loads(out)


# Help and usage


def test_installed_program_helps_without_torch():
    program = Path(sys.executable).parent / "vllm-adafuse"
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and shown.stderr == ""
    for command in COMMANDS:
        assert f"vllm-adafuse {command}" in shown.stdout
    code = (
        "import sys; from vllm_adafuse.cli.main import build_parser; build_parser(); "
        "print(sorted({'torch', 'transformers', 'vllm', 'rich'} & sys.modules.keys()))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"example:\n  vllm-adafuse {command} " in out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["serve"],
        ["check"],
        ["route", "adapter"],
        ["route", "adapter", "--text", "a", "--file", "b"],
        ["random", "base", "out", "--layers", "5-3"],
        ["random", "base", "out", "--r", "4,x"],
        ["random", "base", "out", "--dtype", "float64"],
        ["random", "base", "out", "--router-input", "hidden"],
    ],
)
def test_wrong_usage_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


# check


def test_check_ok(adapter, base, capsys):
    code, out, err = run(capsys, "check", adapter)
    assert code == 0
    assert out == f"ok: {adapter}: 4 experts, top-2, 4 projections, 9 tensors\n"
    assert err == f"backbone: {base}, named by the adapter\n"
    assert run(capsys, "check", adapter, "--base", base)[2] == f"backbone: {base}, from --base\n"


def test_check_lists_every_problem_on_its_line(copied, capsys):
    tensors = load_file(copied / "adapter_model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A"][1, 0, 0] = float("nan")
    tensors["model.layers.2.mlp.up_proj.lora_B"][0, :, 5] = 1
    save_file(tensors, copied / "adapter_model.safetensors")
    code, out, _ = run(capsys, "check", copied)
    assert code == 1
    nan, past_rank = sorted(out.splitlines())
    assert "layers.0.self_attn.q_proj.lora_A" in nan and "NaN" in nan
    assert "layers.2.mlp.up_proj.lora_B" in past_rank and "past rank 2" in past_rank


def test_check_of_config_faults(copied, capsys):
    tensors = load_file(copied / "adapter_model.safetensors")
    tensors["router.weight"][0, 0] = float("inf")
    save_file(tensors, copied / "adapter_model.safetensors")
    edit_config(copied, top_k=9, rank=3)
    code, out, _ = run(capsys, "check", copied)
    assert code == 1
    assert "unknown key `rank`" in out and "`top_k` is 9" in out
    assert "router.weight" in out and "Inf" in out  # values are read beside a bad config


def test_check_says_when_there_is_no_backbone(copied, capsys):
    edit_config(copied, base_model_name_or_path="no-such-owner/no-such-model")
    code, out, err = run(capsys, "check", copied)
    assert code == 0 and out.startswith("ok: ")
    assert "no-such-model is not on this machine: shapes were not checked against a backbone" in err


def test_check_against_another_backbone(adapter, tmp_path, capsys):
    other = make_tiny_backbone(tmp_path / "other", hidden_size=64, num_hidden_layers=2)
    code, out, _ = run(capsys, "check", adapter, "--base", other)
    assert code == 1
    assert "shape [4, 128], expected [4, 64]" in out
    assert "model.layers.2." in out and "layers 0 to 1" in out


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}',
        '{"model_type": "llama", "architectures": 5}',
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "a"}',
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "a"}',
    ],
)
def test_check_with_unusable_backbone(adapter, tmp_path, capsys, config):
    (tmp_path / "config.json").write_text(config)
    code, out, _ = run(capsys, "check", adapter, "--base", tmp_path)
    assert code == 1
    assert len(out.splitlines()) == 1 and out.startswith(f"backbone {tmp_path}: ")


def test_names_cannot_write_escape_codes(copied, capsys):
    edit_config(copied, **{"\x1b[2Jwipe": 1})
    _, out, _ = run(capsys, "check", copied)
    assert "\x1b" not in out and "[2Jwipe" in out


# errors


@pytest.mark.parametrize("command", ["check", "inspect", "route", "compose", "random"])
def test_missing_backbone_is_one_message(command, adapter, tmp_path, capsys):
    missing, out_dir = tmp_path / "none", tmp_path / "out"
    argv = {
        "check": [adapter, "--base", missing],
        "inspect": [adapter, "--base", missing],
        "route": [adapter, "--base", missing, "--text", "a"],
        "compose": [missing, adapter, out_dir],
        "random": [missing, out_dir],
    }[command]
    code, out, err = run(capsys, command, *argv)
    assert code == 1 and out == ""
    assert err.startswith(f"vllm-adafuse: backbone {missing} cannot be used:")
    assert not out_dir.exists()


@pytest.mark.parametrize("argv", [["inspect"], ["route", "--text", "a"]])
def test_missing_adapter_is_one_message(argv, tmp_path, capsys):
    code, out, err = run(capsys, *argv, tmp_path / "none")
    assert code == 1 and out == ""
    assert "no such directory" in err and "Traceback" not in err


def test_os_errors_are_one_message(adapter, tmp_path, capsys):
    code, out, err = run(capsys, "route", adapter, "--file", tmp_path / "none.txt")
    assert code == 1 and out == ""
    assert err.startswith("vllm-adafuse: ") and "none.txt" in err and len(err.splitlines()) == 1


# inspect


def test_inspect_json(adapter, base, capsys):
    report = run_json(capsys, "inspect", adapter)
    assert report["base"] == str(base)
    assert [e["rank"] for e in report["experts"]] == [2, 4, 8, 8]
    assert [e["alpha"] for e in report["experts"]] == [4, 8, 16, 16]
    assert [e["scale"] for e in report["experts"]] == [2, 2, 2, 2]
    ids, _ = vocabulary_routes(load_adapter(adapter), base)
    for e, expert in enumerate(report["experts"]):
        assert expert["share_first"] == pytest.approx((ids[:, 0] == e).float().mean().item())
        assert expert["share_any"] == pytest.approx((ids == e).any(1).float().mean().item())
    assert sum(e["share_first"] for e in report["experts"]) == pytest.approx(1)
    assert sum(e["share_any"] for e in report["experts"]) == pytest.approx(2)
    q_proj, up_proj = report["modules"]
    assert q_proj == {
        "module": "q_proj",
        "layers": [0, 2],
        "in": 128,
        "out": 128,
        "dtype": "bfloat16",
        "bytes": 2 * 2 * 4 * 8 * (128 + 128),
    }
    assert (up_proj["in"], up_proj["out"]) == (128, 192)
    router_bytes = 4 * 128 * 2
    assert report["bytes"] == q_proj["bytes"] + up_proj["bytes"] + router_bytes
    assert report["passport_bytes"] == 1003 * 2 * 8
    assert report["router"] == {
        "input": "first_norm",
        "weights": "topk_softmax",
        "temperature": 1.0,
        "bias": False,
    }


def test_inspect_tables(adapter, capsys):
    code, out, _ = run(capsys, "inspect", adapter)
    assert code == 0
    for part in ("prose", "code", "first choice", "any of 2", "q_proj", "0,2", "15.7 KiB"):
        assert part in out
    assert "\x1b[31m" not in out


@pytest.mark.parametrize("lacking", ["all", "weights"])
def test_inspect_without_embedding_says_why(copied, base, tmp_path, capsys, lacking):
    where = tmp_path / "elsewhere"
    edit_config(copied, base_model_name_or_path=str(where))
    if lacking == "weights":
        where.mkdir()
        shutil.copy(base / "config.json", where)
    report = run_json(capsys, "inspect", copied)
    assert {e["share_first"] for e in report["experts"]} == {None}
    assert report["passport_bytes"] == (None if lacking == "all" else 1003 * 2 * 8)
    reason = "not on this machine" if lacking == "all" else "is in none of its safetensors files"
    assert reason in report["no_shares_because"]
    out = run(capsys, "inspect", copied)[1]
    assert "first choice" not in out and "no shares of the vocabulary: " in out


def test_inspect_refuses_what_check_refuses(copied, capsys):
    edit_config(copied, top_k=9)
    code, out, err = run(capsys, "inspect", copied)
    assert code == 1 and out == "" and "`top_k` is 9" in err


# route

TEXT = f"def wörld(x): 😀\n\treturn x  # {EVIL}\n"


def test_route_json(adapter, base, capsys):
    report = run_json(capsys, "route", adapter, "--text", TEXT)
    assert report["text"] == TEXT
    tokens = report["tokens"]
    # The parts are the text; a token of a character's later bytes shows ⋯ alone.
    assert "".join(t["text"] for t in tokens if t["text"] != "⋯") == TEXT
    ids, gates = OfflineRouter(load_adapter(adapter), base).routes(
        torch.tensor([t["id"] for t in tokens])
    )
    for token, experts, weights in zip(tokens, ids.tolist(), gates.tolist(), strict=True):
        assert [e["expert"] for e in token["experts"]] == experts
        assert [e["weight"] for e in token["experts"]] == pytest.approx(weights)
    assert {e["name"] for t in tokens for e in t["experts"]} >= {"prose", "code"}


def test_route_terminal_shows_white_space_and_no_foreign_codes(adapter, capsys, monkeypatch):
    code, out, _ = run(capsys, "route", adapter, "--text", TEXT)
    assert code == 0
    assert "def·w" in out and "↵\n→ret" in out.replace("⋯", "") and "first expert:" in out
    assert "\x1b" not in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    coloured = run(capsys, "route", adapter, "--text", TEXT)[1]
    assert "\x1b[30;48;2;" in coloured and "\x1b[31mred" not in coloured


def test_route_of_file_and_of_nothing(adapter, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT, "utf-8")
    from_file = run_json(capsys, "route", adapter, "--file", tmp_path / "text")
    assert from_file == run_json(capsys, "route", adapter, "--text", TEXT)
    assert run_json(capsys, "route", adapter, "--text", "")["tokens"] == []
    (tmp_path / "latin").write_bytes("ö".encode("latin-1"))
    code, _, err = run(capsys, "route", adapter, "--file", tmp_path / "latin")
    assert code == 1 and "is not UTF-8" in err


def test_route_without_backbone(copied, capsys):
    edit_config(copied, base_model_name_or_path="no-such-owner/no-such-model")
    code, out, err = run(capsys, "route", copied, "--text", "a")
    assert code == 1 and out == "" and "name it with --base" in err


def test_route_without_tokenizer(adapter, base, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, tmp_path)
    code, out, err = run(capsys, "route", adapter, "--base", tmp_path, "--text", "a")
    assert code == 1 and out == "" and "no usable tokenizer" in err


class Page(HTMLParser):
    """Tags, attributes and the text of the `text` element."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.tips, self.links, self.shown = [], [], [], ""
        self.depth = 0
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs.items() if k in ("src", "href")]
        if "data-tip" in attrs:
            self.tips.append(attrs["data-tip"])
        if tag == "div":
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= tag == "div"

    def handle_data(self, data):
        self.shown += data if self.depth else ""


@pytest.mark.parametrize("experts", [4, 30])
def test_route_page(adapter, base, tmp_path, capsys, experts):
    if experts == 30:
        names = [f"{EVIL}{e}" for e in range(30)]
        adapter = make_random_adapter(
            base, tmp_path / "many", num_experts=30, r=1, layers=[0], expert_names=names
        )
    file = tmp_path / "page.html"
    code, _, err = run(capsys, "route", adapter, "--text", TEXT, "--html", file)
    assert code == 0 and f"wrote {file}" in err
    content = file.read_text("utf-8")
    page = Page(content)
    assert "script" not in page.tags and "<script" not in content and page.links == []
    assert "url(" not in content and "@import" not in content
    tokens = run_json(capsys, "route", adapter, "--text", TEXT)["tokens"]
    assert len(page.tips) == len(tokens)
    for tip, token in zip(page.tips, tokens):
        assert f"(id {token['id']})" in tip
        assert all(f"{e['weight']:.3f}" in tip for e in token["experts"])
    plain = page.shown.replace("↵", "").replace("→", "\t").replace("·", " ").replace("⋯", "")
    assert plain == TEXT
    # Every first expert has a colour of its own.
    first = {token["experts"][0]["expert"] for token in tokens}
    rules = {line for line in content.splitlines() if line.lstrip("</style>").startswith(".e")}
    colours = {line.split("{")[1] for line in rules if "--h: " in line}
    assert len(colours) == len(first)


def test_html_to_unwritable_place(adapter, tmp_path, capsys):
    code, out, err = run(
        capsys, "route", adapter, "--text", "a", "--html", tmp_path / "none" / "page.html"
    )
    assert code == 1 and out == "" and "page.html" in err


# compose and random


def test_compose(base, adapter, tmp_path, capsys):
    code, out, _ = run(capsys, "compose", base, adapter, tmp_path / "out")
    assert code == 0 and f"vllm serve {tmp_path / 'out'}" in out
    assert (tmp_path / "out" / "model.safetensors").samefile(base / "model.safetensors")
    assert run(capsys, "check", tmp_path / "out" / "adafuse")[0] == 0
    code, _, err = run(capsys, "compose", base, adapter, tmp_path / "out", "--copy")
    assert code == 1 and "not empty" in err
    assert run(capsys, "compose", base, adapter, tmp_path / "copy", "--copy")[0] == 0
    assert not (tmp_path / "copy" / "model.safetensors").samefile(base / "model.safetensors")


def test_random_with_every_option(base, tmp_path, capsys):
    out_dir = tmp_path / "out"
    options = (
        "--num-experts 4 --top-k 3 --r 4,8,16,16 --lora-alpha 1,2,3,4 --target-modules "
        "q_proj,down_proj --layers 0-1 --router-input embedding --router-weights softmax_topk "
        "--router-temperature 0.5 --use-rslora --router-bias --dtype float16 --seed 3"
    )
    code, out, _ = run(capsys, "random", base, out_dir, *options.split())
    assert code == 0 and f"vllm-adafuse inspect {out_dir}" in out
    adapter = load_adapter(out_dir)
    config = adapter.config
    assert (config.num_experts, config.top_k, config.ranks) == (4, 3, (4, 8, 16, 16))
    assert config.alphas == (1, 2, 3, 4) and config.use_rslora
    assert (config.router_input, config.router_weights) == ("embedding", "softmax_topk")
    assert config.temperature == 0.5
    assert sorted(adapter.projections) == [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert "router.bias" in adapter.tensors
    assert {info.dtype for info in adapter.tensors.values()} == {torch.float16}
    assert run(capsys, "check", out_dir)[0] == 0


def test_random_defaults_and_seed(base, tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, "random", base, tmp_path / name, "--r", 2, "--seed", seed)[0] == 0
    a, b, c = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["router.weight"], c["router.weight"])
    config = load_adapter(tmp_path / "a").config
    assert (config.num_experts, config.top_k, config.rank, config.alphas[0]) == (8, 2, 2, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--target-modules", "qkv_proj"], "target module qkv_proj is not in"),
        (["--layers", "1-3"], "layer 3 is not in"),
        (["--top-k", "9"], "`top_k` is 9"),
        (["--r", "4,8"], "8 entries, one per expert"),
        (["--router-temperature", "0"], "`router.temperature` is 0.0"),
    ],
)
def test_random_refuses(base, tmp_path, capsys, options, message):
    code, out, err = run(capsys, "random", base, tmp_path / "out", *options)
    assert code == 1 and out == "" and message in err
    assert not (tmp_path / "out").exists()


def test_random_never_overwrites(base, copied, capsys):
    before = (copied / "adapter_model.safetensors").read_bytes()
    code, _, err = run(capsys, "random", base, copied)
    assert code == 1 and "not empty" in err
    assert (copied / "adapter_model.safetensors").read_bytes() == before


# small parts


def test_ranges_and_bytes():
    assert common.ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8" and common.ranges([]) == ""
    sizes = [0, 1023, 1024, 1536, 5 << 20, 3 << 40, 5 << 50]
    assert [common.human_bytes(n) for n in sizes] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 TiB", "5120.0 TiB",
    ]  # fmt: skip


def test_colours_of_many_experts_differ():
    from vllm_adafuse.cli.colors import hue, level, terminal_style

    assert len({terminal_style(e) for e in range(128)}) == 128
    for ring in range(3):  # within one lightness, a dozen hues stay apart
        hues = sorted(hue(e) for e in range(12 * ring, 12 * ring + 12))
        assert len({level(e) for e in range(12 * ring, 12 * ring + 12)}) == 1
        assert min(b - a for a, b in zip(hues, hues[1:])) > 15
