"""The command line, in this process through `main`; and once as users start it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_fixtures import adapter, base, copied, edit_config, run  # noqa: F401 (fixtures)
from safetensors.torch import load_file, save_file
from vllm_adafuse.cli.main import main
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.tiny import make_tiny_backbone

COMMANDS = ("check", "inspect", "route", "compose", "merge", "random", "tune", "explain")


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
