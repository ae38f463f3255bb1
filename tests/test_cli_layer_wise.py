"""The commands on adapters of format version 2: made, checked, shown, and refused in words."""

import json

import pytest
from cli_fixtures import base, run  # noqa: F401
from vllm_adafuse.format.adapter import load_adapter

MIXLORA = ["--routing", "layer_wise", "--router-scope", "block", "--mix", "ffn_output"]
MIXLORA += ["--top-k", "self_attn=1,mlp=2", "--always-r", "2", "--expert-modules"]
MIXLORA += ["gate_proj,up_proj,down_proj", "--always-modules", "q_proj,v_proj"]
MOLA = ["--routing", "layer_wise", "--layer-experts", "2,3,4", "--top-k", "1,2,2"]
MOLA += ["--router-logits", "abs", "--shared-A", "--router-bias"]
LATER = ["--router-layer", "1", "--router-input", "embedding"]


def made(base, path, options, capsys):
    command = ["random", str(base), str(path), "--num-experts", "4", "--r", "2", *options]
    assert run(capsys, *command)[0] == 0
    return path


def test_mixlora(base, tmp_path, capsys):
    path = made(base, tmp_path / "a", MIXLORA, capsys)
    config = load_adapter(path).config
    assert (config.mix, config.always_r, config.always_alpha) == ("ffn_output", 2, 4)
    assert config.top_k_blocks == (1, 2)
    status, out, _ = run(capsys, "check", str(path))
    assert status == 0 and out.startswith("ok")
    _, out, _ = run(capsys, "inspect", str(path))
    said = " ".join(out.split())
    assert "one per block, 3 in all" in said and "always on: rank 2, alpha 4" in said
    assert "mixed in the output of the MLP" in said and "no shares of the vocabulary" in said
    assert "q_proj" in said and "passports when served none" in said


def test_experts_per_layer(base, tmp_path, capsys):
    path = made(base, tmp_path / "a", MOLA, capsys)
    _, out, _ = run(capsys, "inspect", str(path), "--json")
    report = json.loads(out)
    assert report["top_k"] == [1, 2, 2] and report["passport_bytes"] == 0
    router = report["router"]
    assert router["experts_of_routers"] == [2, 3, 4] and router["routers"] == 21
    assert router["bias"] and router["shared_A"] and router["logits"] == "abs"
    assert report["experts"][0]["share_any"] is None


@pytest.mark.parametrize(
    "options, words", [(LATER, "`router.layer`"), (MOLA, "each linear has a router")]
)
def test_route_is_refused_where_context_decides(options, words, base, tmp_path, capsys):
    path = made(base, tmp_path / "a", options, capsys)
    status, out, err = run(capsys, "route", str(path), "--text", "hello")
    said = " ".join((out + err).split())
    assert status == 1 and "Traceback" not in said
    assert words in said and "no table of the vocabulary" in said and "reference.load" in said


def test_a_later_router_is_shown(base, tmp_path, capsys):
    path = made(base, tmp_path / "a", LATER, capsys)
    _, out, _ = run(capsys, "inspect", str(path))
    assert "input embedding at layer 1" in " ".join(out.split())


def test_options_that_do_not_go_together(base, tmp_path, capsys):
    command = ["random", str(base), str(tmp_path / "a"), "--mix", "ffn_output"]
    status, _, err = run(capsys, *command)
    assert status == 1 and 'goes with `routing` "layer_wise" only' in " ".join(err.split())
