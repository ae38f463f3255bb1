"""Bad input: every broken adapter is refused by `check` and by `LLM(...)`, with a clear message."""

import importlib.util
import json
import math
import pickle
import random
import resource
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from broken_adapters import (
    BROKEN,
    CONFIG,
    GATE,
    WEIGHTS,
    Q,
    add,
    as_user,
    break_copy,
    edit_config,
    edit_tensors,
    make_backbones,
    make_good,
    set_value,
)
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import check_adapter, load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.values import all_finite

ENGINE = {
    "gpu_memory_utilization": 0.2,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 128,
}
ALL = pytest.mark.parametrize("broken", BROKEN, indirect=True)


@pytest.fixture(scope="module")
def bases():
    # Not under pytest's own directory: other users may not enter that one.
    with tempfile.TemporaryDirectory(prefix="bad_adapters_") as root:
        yield make_backbones(Path(root))


@pytest.fixture(scope="module")
def good(bases):
    return make_good(bases["llama"], bases["llama"].parent / "good")


@pytest.fixture
def broken(request, bases, good):
    """(case, its adapter, its backbone) of the case that the parameter names."""
    case = BROKEN[request.param]
    folder = Path(tempfile.mkdtemp(dir=good.parent))
    folder.chmod(0o755)
    yield case, break_copy(case, good, folder / "adapter"), bases[case.base]
    shutil.rmtree(folder)


def assert_says(message: str, words: tuple[str, ...]):
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in:\n{message}"


def try_check(adapter: Path, base: Path, user: int = 0) -> list[str]:
    with as_user(user):
        try:
            return check_adapter(adapter, Backbone.from_path(str(base)))[1]
        except AdapterError as e:  # the backbone's fault
            assert "backbone" in e.subject
            return e.problems


@ALL
def test_check_refuses(broken, good):
    case, adapter, base = broken
    assert check_adapter(good)[1] == []  # also imports what another user cannot
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = try_check(adapter, base, case.user)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 << 10
    assert problems
    assert_says("\n".join(problems), case.words)
    assert all(problem.isprintable() and len(problem) < 1200 for problem in problems)


@pytest.mark.skipif(
    not importlib.util.find_spec("vllm_adafuse.cli.main"), reason="the command is not built yet"
)
@ALL
def test_command_refuses(broken, capfd):
    from vllm_adafuse.cli.main import main

    case, adapter, base = broken
    with as_user(case.user):
        status = main(["check", str(adapter), "--base", str(base)])
    said = "".join(capfd.readouterr())
    assert status == 1, said
    assert "Traceback" not in said
    # The command may wrap its lines.
    assert_says("".join(said.split()), tuple("".join(word.split()) for word in case.words))


@ALL
def test_llm_refuses(broken, bases, good):
    from vllm import LLM

    case, adapter, base = broken
    front_end(bases["llama"], str(good))  # imports what another user cannot
    with pytest.raises(ValueError) as caught, as_user(case.user):
        LLM(str(base), hf_overrides={"adafuse_adapter": str(adapter)}, **ENGINE)
    assert_says(str(caught.value), (*case.words, "cannot be used:"))


def front_end(base: Path, adapter) -> object:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(base), hf_overrides={"adafuse_adapter": adapter}, **ENGINE)
    return arguments.create_model_config().hf_config


def test_good_adapter_passes(bases, good):
    from vllm.engine.arg_utils import EngineArgs

    assert try_check(good, bases["llama"]) == []
    arguments = EngineArgs(
        str(bases["llama"]), hf_overrides={"adafuse_adapter": str(good)}, **ENGINE
    )
    hf_config = arguments.create_engine_config().model_config.hf_config
    assert hf_config.architectures == ["AdaFuseLlamaForCausalLM"]
    assert hf_config.adafuse["adapter"] == str(good)


@pytest.mark.parametrize(
    "value",
    [
        7,
        "",
        ["a"],
        True,
        {"path": "a"},
    ],
)
def test_override_of_a_wrong_type(bases, value):
    with pytest.raises(ValueError, match="adafuse_adapter is .*expected the path of an adapter"):
        front_end(bases["llama"], value)


def test_check_lists_every_problem(bases, good, tmp_path):
    """Three faults in the config, two in the tensors: all five in one go."""
    adapter = Path(shutil.copytree(good, tmp_path / "five"))
    edit_config(top_k=9, router__temperature=-1, lora_dropuot=0.1)(adapter)
    edit_tensors(set_value(f"{Q}.lora_A", float("nan")))(adapter)
    edit_tensors(add("extra.weight", 3))(adapter)
    problems = try_check(adapter, bases["llama"])
    assert len(problems) == 5, problems
    expected = ("lora_dropuot", "top_k` is 9", "temperature` is -1", "extra.weight", "NaN")
    for problem, word in zip(problems, expected):
        assert word in problem

    with pytest.raises(AdapterError) as caught:
        load_adapter(adapter)
    assert caught.value.problems == problems
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.problems == problems


def test_alike_problems_share_a_line(good, tmp_path):
    adapter = Path(shutil.copytree(good, tmp_path / "alike"))
    edit_config(num_experts=2, r=4, lora_alpha=8, expert_names=None)(adapter)
    problems = check_adapter(adapter)[1]
    assert len(problems) < 15, problems
    assert any("and 3 more" in p or "and 9 more" in p for p in problems), problems
    edit_config(**{f"typo{i}": 1 for i in range(5000)})(adapter)
    assert "and 4997 more" in check_adapter(adapter)[1][0]


def test_values_are_read_beside_bad_shapes(good, tmp_path):
    adapter = Path(shutil.copytree(good, tmp_path / "both"))

    def damage(tensors):
        tensors[f"{Q}.lora_A"] = tensors[f"{Q}.lora_A"][:3]
        set_value(f"{GATE}.lora_B", float("inf"))(tensors)

    edit_tensors(damage)(adapter)
    shape, value = check_adapter(adapter)[1]
    assert f"{Q}.lora_A" in shape and f"{GATE}.lora_B" in value


def test_many_keys_take_no_time(good, tmp_path):
    """Repeated keys are counted, not searched for: a megabyte of them is read at once."""
    adapter = Path(shutil.copytree(good, tmp_path / "many"))
    (adapter / CONFIG).write_text("{" + ",".join(f'"{i}":1' for i in range(90_000)) + "}")
    _, problems = check_adapter(adapter)
    assert "and 89997 more" in "".join(problems)


def test_odd_paths(good, tmp_path):
    for path in ("\0", "~nobody_of_that_name/x", "x" * 5000):
        adapter, problems = check_adapter(path)
        assert adapter is None and len(problems) == 1
    edit_config(base_model_name_or_path="b" * 5000)(
        copy := Path(shutil.copytree(good, tmp_path / "c"))
    )
    adapter, problems = check_adapter(copy)
    assert problems == [] and adapter.config.base_path(copy) == "b" * 5000


def test_only_safetensors_is_opened(bases, good, tmp_path, monkeypatch):
    (adapter := Path(shutil.copytree(good, tmp_path / "a"))).joinpath("adapter_model.bin").touch()

    def refuse(*args, **kwargs):
        pytest.fail("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert try_check(adapter, bases["llama"]) == []
    (adapter / WEIGHTS).unlink()
    assert try_check(adapter, bases["llama"])


def _values(node):
    """(container, key) of every value of a parsed JSON, at every depth."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from _values(value)


STRANGE = (None, True, False, 0, -1, 3, 1e308, -0.0, float("inf"), 10**400, "", "\ud800", "ADAFUSE")
STRANGE += ([], {}, [[]], [0] * 4, ["a"] * 4, {"a": {"b": []}}, "x" * 10_000, 2**63, 1e-320, "\0")


def test_random_damage_never_raises(bases, good, tmp_path):
    """200 random edits of config values and of header bytes: problems, or a good adapter."""
    chance = random.Random(0)
    adapter = Path(shutil.copytree(good, tmp_path / "random"))
    config, weights = (adapter / CONFIG).read_text(), (adapter / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", weights[:8])[0]
    backbone = Backbone.from_path(str(bases["llama"]))
    refused = 0
    for step in range(200):
        raw, content = json.loads(config), bytearray(weights)
        if step % 2:
            container, key = chance.choice(list(_values(raw)))
            container[key] = chance.choice(STRANGE)
        else:
            # Half of them in the first bytes: the header's length.
            content[chance.randrange(8 if step % 4 else header)] = chance.randrange(256)
        (adapter / CONFIG).write_text(json.dumps(raw))
        (adapter / WEIGHTS).write_bytes(content)
        found, problems = check_adapter(adapter, chance.choice((backbone, None)))
        assert problems or found.config.top_k
        assert all(problem.isprintable() for problem in problems), (step, problems)
        refused += bool(problems)
    assert 100 < refused < 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_values_may_overflow_their_sum(dtype):
    most = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(most) and all_finite(-most) and all_finite(most[:0])
    for wrong in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]):
        bad = torch.zeros(100, dtype=dtype)
        bad[7 : 7 + len(wrong)] = torch.tensor(wrong)
        assert not all_finite(bad)
