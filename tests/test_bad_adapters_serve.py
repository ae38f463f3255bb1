"""Bad input: `vllm serve` refuses every broken adapter, ends by itself and leaves nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from broken_adapters import BROKEN, break_copy, make_backbones, make_good
from serve_forks import ENVIRONMENT, TIME_LIMIT, ServeForks, session_members, stop_session


@pytest.fixture(scope="module")
def bases():
    # Not under pytest's own directory: other users may not enter that one.
    with tempfile.TemporaryDirectory(prefix="bad_adapters_") as root:
        yield make_backbones(Path(root))


@pytest.fixture(scope="module")
def good(bases):
    return make_good(bases["llama"], bases["llama"].parent / "good")


@pytest.fixture(scope="module")
def forks():
    with ServeForks() as forks:
        yield forks


@pytest.fixture
def folder(good):
    folder = Path(tempfile.mkdtemp(dir=good.parent))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve_arguments(base: Path, adapter, port: int) -> list[str]:
    overrides = json.dumps({"adafuse_adapter": adapter})
    options = f"--dtype float32 --enforce-eager --host 127.0.0.1 --port {port}".split()
    options += ["--gpu-memory-utilization", "0.2", "--max-model-len", "128"]
    return ["serve", str(base), "--hf-overrides", overrides, *options]


def assert_refused(said: str, code: int, port: int, words: tuple[str, ...]):
    assert code == 1, said
    missing = [word for word in (*words, "cannot be used:\n  - ") if word not in said]
    assert not missing, f"{missing} not in:\n{said}"
    assert said.count("cannot be used:") == 1, said  # one message, not one per layer of vLLM
    assert "Starting vLLM server" not in said and "EngineCore" not in said
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "something still listens"


def run_case(forks, base, adapter, folder, words, user=0):
    port = free_port()
    result = forks.run(serve_arguments(base, adapter, port), folder / "output.txt", user)
    said = (folder / "output.txt").read_text(errors="replace")
    assert not result["hung"], f"still running after {TIME_LIMIT} s:\n{said}"
    assert not result["left"], f"processes {result['left']} outlived it:\n{said}"
    assert_refused(said, result["code"], port, words)


@pytest.mark.parametrize("name", BROKEN)
def test_serve_refuses(name, forks, bases, good, folder):
    case = BROKEN[name]
    adapter = break_copy(case, good, folder / "adapter")
    run_case(forks, bases[case.base], str(adapter), folder, case.words, case.user)


def test_override_of_a_wrong_type(forks, bases, folder):
    words = ("adafuse_adapter is 7", "expected the path of an adapter directory")
    run_case(forks, bases["llama"], 7, folder, words)


def test_harness_tells_good_from_bad(forks, folder):
    """A command that succeeds is seen to succeed, so a refusal is not the harness's own."""
    result = forks.run(["--version"], folder / "output.txt")
    assert result == {"code": 0, "hung": False, "left": []}
    assert (folder / "output.txt").read_text().strip()


def test_good_adapter_passes(bases, good):
    """The engine's config, made from the very arguments of the command line."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = serve_arguments(bases["llama"], str(good), free_port())[1:]
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    arguments.model = arguments.model_tag
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.model_config.architectures == ["AdaFuseLlamaForCausalLM"]


def test_fresh_process_refuses(bases, good, folder):
    """The console script itself, as people start it."""
    case, port = BROKEN["key twice"], free_port()
    adapter = break_copy(case, good, folder / "adapter")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("vllm")]
        + serve_arguments(bases[case.base], str(adapter), port),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=TIME_LIMIT)
        assert not session_members(process.pid)
    finally:
        stop_session(process.pid)
    assert_refused(said.decode(), process.returncode, port, case.words)
