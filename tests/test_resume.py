"""`vllm-adafuse train --resume`: from the newest whole checkpoint of the same run, or not at all."""

import json
import shutil

import pytest
import torch
from cli_fixtures import base, run  # noqa: F401
from safetensors.torch import load_file
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.tiny import make_tiny_backbone
from vllm_adafuse.training.resume import RECORD, digest, find_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("many", 60), ("few", 20)):
        rows = [json.dumps({"text": f"{name} line {i} with words to learn"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


def train(capsys, base, data, out, *options):  # noqa: F811
    """Exit code, stdout and what is said on stderr."""
    code, said, err = run(
        capsys, "train", "--base", base, "--data", data, "--output", out, "--num-experts", 2,
        "--rank", 2, "--length", 32, "--batch-size", 2, "--save-every", 2, "--quiet", *options,
    )  # fmt: skip
    return code, said, err[err.find("vllm-adafuse: ") :]


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):  # noqa: F811
    """The adapter and the checkpoints 4 and 6 of a run of 6 steps."""
    from vllm_adafuse.cli.main import main

    out = tmp_path_factory.mktemp("made") / "a"
    assert main(["train", "--base", str(base), "--data", str(data / "many.jsonl"), "--output",
                 str(out), "--num-experts", "2", "--rank", "2", "--length", "32", "--batch-size",
                 "2", "--save-every", "2", "--steps", "6", "--quiet"]) == 0  # fmt: skip
    return out


@pytest.fixture
def work(made, tmp_path):
    """Its checkpoints, copied: what a run killed before it had written its adapter leaves."""
    return shutil.copytree(f"{made}-training", tmp_path / "a-training")


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name, share):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


TORN = {
    "as a kill leaves it": (remove("trainer_state.json", "scheduler.pt", "rng_state.pth", RECORD),
                            "trainer_state.json: missing"),
    "state cut": (cut("trainer_state.json", 0.5), "trainer_state.json: is not valid JSON"),
    "state empty": (cut("trainer_state.json", 0), "trainer_state.json: is not valid JSON"),
    "weights gone": (remove("model.safetensors"), "model.safetensors is missing or damaged"),
    "weights cut": (cut("model.safetensors", 0.9), "model.safetensors is missing or damaged"),
    "optimizer cut": (cut("optimizer.pt", 0.9), "optimizer.pt is missing or damaged"),
    "scheduler gone": (remove("scheduler.pt"), "scheduler.pt is missing or damaged"),
    "random state cut": (cut("rng_state.pth", 0.5), "rng_state is missing or damaged"),
    "random state gone": (remove("rng_state.pth"), "rng_state is missing or damaged"),
    "record cut": (cut(RECORD, 0.5), f"{RECORD}: is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", TORN)
def test_a_torn_checkpoint_is_passed_over(work, case):
    damage, said = TORN[case]
    record = json.loads((work / "checkpoint-4" / RECORD).read_text())
    whole = find_checkpoint(work, record)
    assert (whole.path.name, whole.step, whole.notes) == (
        "checkpoint-6", 6, ["going on from checkpoint-6"])  # fmt: skip
    damage(work / "checkpoint-6")
    found = find_checkpoint(work, record)
    assert (found.path.name, found.step, found.recorded) == ("checkpoint-4", 4, True)
    assert found.notes[0].startswith("checkpoint-6 is passed over: ") and said in found.notes[0]
    damage(work / "checkpoint-4")
    with pytest.raises(AdapterError) as caught:
        find_checkpoint(work, record)
    problems = caught.value.problems
    assert [p.split()[0] for p in problems[:2]] == ["checkpoint-6", "checkpoint-4"]
    assert "leave out --resume" in problems[-1]


def test_from_the_one_before_the_torn_one_the_result_is_the_same(
    base, data, made, work, capsys, caplog  # noqa: F811
):  # fmt: skip
    TORN["as a kill leaves it"][0](work / "checkpoint-6")
    out = work.parent / "a"
    code, _, err = train(capsys, base, data / "many.jsonl", out, "--steps", 6, "--resume")
    assert code == 0, err
    assert "checkpoint-6 is passed over: it was not written to its end" in caplog.text
    assert "going on from checkpoint-4" in caplog.text
    wanted, found = (load_file(path / "adapter_model.safetensors") for path in (made, out))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6)


OTHER = {
    "texts": (["--data", "few.jsonl"], "the texts are not those that it was trained on"),
    "rate": (["--lr", "1e-5"], "`lr` is 1e-05, and was 0.0005"),
    "shape": (["--rank", "4"], "`r` is 4, and was 2"),
    "balance": (["--balance", "0.5"], "`balance_coef` is 0.5, and was 0.01"),
    "batch": (["--accumulate", "2"], "`accumulate` is 2, and was 1"),
    "length": (["--length", "16"], "passed over: `length` is 16, and was 32\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_another_run_is_not_gone_on_with(base, data, work, capsys, case):  # noqa: F811
    options, said = OTHER[case]
    out = work.parent / "a"
    options = [str(data / o) if o.endswith(".jsonl") else o for o in options]
    code, _, err = train(capsys, base, data / "many.jsonl" if options[0] != "--data" else options[1],
                         out, "--steps", 9, "--resume", *options[2 * (options[0] == "--data") :])  # fmt: skip
    assert code == 1 and not out.exists()
    assert said in err and "name another --output to start anew" in err, err
    assert len(err.splitlines()) == 4, err


def test_another_backbone_is_not_gone_on_with(data, work, tmp_path, capsys):
    other = make_tiny_backbone(tmp_path / "other", seed=1)
    code, _, err = train(capsys, other, data / "many.jsonl", work.parent / "a", "--resume")
    assert code == 1 and "the backbone is not the one that it was trained on" in err


def test_a_run_that_had_ended_gives_its_adapter(base, data, made, work, capsys, caplog):  # noqa: F811
    out = work.parent / "a"
    code, _, err = train(capsys, base, data / "many.jsonl", out, "--steps", 6, "--resume")
    assert code == 0, err
    assert "the run had ended at step 6: nothing was left to train" in caplog.text
    wanted, found = (load_file(path / "adapter_model.safetensors") for path in (made, out))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_checkpoint_without_a_record_must_be_trained_on(base, data, work, capsys, caplog):  # noqa: F811
    for path in work.glob("checkpoint-*"):
        (path / RECORD).unlink()
    out = work.parent / "a"
    code, _, err = train(capsys, base, data / "few.jsonl", out, "--steps", 5, "--resume")
    assert code == 1 and not out.exists()
    assert "nothing would be trained; raise --steps or --epochs" in err
    code, _, err = train(capsys, base, data / "few.jsonl", out, "--steps", 7, "--resume")
    assert code == 0, err
    assert f"holds no {RECORD}" in caplog.text


def test_newer_checkpoints_of_another_run_are_passed_over(work):
    record = json.loads((work / "checkpoint-4" / RECORD).read_text())
    (work / "checkpoint-6" / RECORD).write_text(json.dumps(record | {"lr": 1.0}))
    (work / "checkpoint-x").mkdir()
    (work / "checkpoint-9").touch()
    found = find_checkpoint(work, record)
    assert found.path.name == "checkpoint-4"
    assert found.notes[0] == "checkpoint-6 is passed over: `lr` is 0.0005, and was 1.0"


def test_digests_tell_values_shapes_and_order_apart():
    a = torch.arange(10000.0)
    b = a.clone()
    b[2] = -1  # of the values that are looked at
    digests = {digest(a), digest(b), digest(a.view(100, 100)), digest(a, b), digest(b, a),
               digest(a.to(torch.bfloat16))}  # fmt: skip
    assert len(digests) == 6 and digest(a) == digest(a.clone())
