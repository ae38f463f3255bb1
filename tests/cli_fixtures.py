"""What the tests of the command line share."""

import json
import shutil

import pytest
from vllm_adafuse.cli.main import main
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone

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
