"""What commands write has the mode that the umask gives, and is not for its owner alone."""

import json
import os
import pydoc_data.topics

import pytest
from cli_fixtures import base, run  # noqa: F401 (fixtures)
from convert_sources import peft_lora
from vllm_adafuse.kernels import configs
from vllm_adafuse.tiny import make_tiny_backbone


@pytest.fixture(params=[0o022, 0o027])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_that_is_written(base, umask, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(configs, "configs_file", lambda device: tmp_path / "cuts" / "gpu.json")
    lora = peft_lora(base, tmp_path / "lora-only", target_modules=["q_proj"])[1]
    topics = sorted(pydoc_data.topics.topics)
    for i, name in enumerate("ab"):
        text = "\n".join(pydoc_data.topics.topics[t] for t in topics[4 * i : 4 * i + 4])
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"text": f"hello you {i}"}) for i in range(40))
    )
    kept = set(tmp_path.rglob("*"))
    os.chmod(lora / "adapter_model.safetensors", 0o600)
    for command in (
        "random {base} {out}/random --r 2",
        "random {base} {out}/wise --r 2 --routing layer_wise",
        "compose {base} {out}/random {out}/copied --copy",
        "merge {out}/random --experts 0 {out}/merged",
        "convert {out}/lora-only {out}/converted",
        "compose-experts a={out}/lora-only b={out}/lora-only --samples a={out}/a.txt --samples "
        "b={out}/b.txt --output {out}/mixture --report {out}/report.html",
        "route {out}/random --text hello --html {out}/route.html",
        "train --base {base} --data {out}/data.jsonl --output {out}/trained --num-experts 2 "
        "--rank 2 --steps 2 --save-every 1 --length 16 --batch-size 2 --quiet",
        "distill {out}/wise --data {out}/data.jsonl --output {out}/student --steps 1 --length 16 "
        "--batch-size 2 --quiet",
    ):
        argv = [part.format(base=base, out=tmp_path) for part in command.split()]
        code, _, err = run(capsys, *argv)
        assert code == 0, err
    configs.save_configs("gpu", {}, {})
    make_tiny_backbone(tmp_path / "tiny", num_hidden_layers=1)
    written = {p for p in tmp_path.rglob("*") if p.is_file()} - kept
    assert {"copied", "merged", "converted", "mixture", "trained", "trained-training", "student",
            "cuts", "tiny"} <= {p.relative_to(tmp_path).parts[0] for p in written}  # fmt: skip
    wrong = {str(p): oct(p.stat().st_mode & 0o777) for p in written
             if p.stat().st_mode & 0o777 != 0o666 & ~umask}  # fmt: skip
    assert not wrong, wrong


def test_a_file_that_is_replaced_keeps_its_mode(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, "random", base, out, "--r", 2)[0] == 0
    file = out / "adapter_model.safetensors"
    file.chmod(0o640)
    from safetensors.torch import load_file
    from vllm_adafuse.format.files import save_tensors

    save_tensors(load_file(file), file)
    assert file.stat().st_mode & 0o777 == 0o640
