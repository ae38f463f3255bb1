"""Adapters are checked before an engine is asked: against files, once, and against the pool."""

import os
import shutil
import time
from types import SimpleNamespace

import convert_sources as sources
import pytest
from loras import ask, engine_config
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.patches import lora_requests
from vllm_adafuse.serving import versions as seam
from vllm_adafuse.serving.adapters import size_in_path
from vllm_adafuse.serving.pool import Size
from vllm_adafuse.serving.versions import (
    AdapterAbsent,
    AdapterRefused,
    Checks,
    Versions,
    loading,
)
from vllm_adafuse.tiny import make_tiny_backbone, tiny_config

WEIGHTS = "adapter_model.safetensors"

lora_requests.apply()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("versions") / "base")


@pytest.fixture(scope="module")
def good(base, tmp_path_factory):
    return sources.peft_lora(base, tmp_path_factory.mktemp("lora") / "lora")[1]


@pytest.fixture
def lora(good, tmp_path):
    return shutil.copytree(good, tmp_path / "lora")


def checks_of(architecture):
    model_config = SimpleNamespace(hf_config=tiny_config(architecture), model="base")
    return Checks(engine_config(model_config))


@pytest.fixture
def checks():
    return checks_of("LlamaForCausalLM")


@pytest.fixture
def reads(monkeypatch):
    """Directories that are read."""
    read = []

    def open_adapter(path, *arguments):
        read.append(path)
        return original(path, *arguments)

    original = seam.open_adapter
    monkeypatch.setattr(seam, "open_adapter", open_adapter)
    return read


def rewrite(path, factor=2.0):
    tensors = load_file(path / WEIGHTS)
    tensors[min(tensors)].mul_(factor)
    save_file(tensors, path / WEIGHTS)


def test_files_are_read_once(checks, reads, lora, monkeypatch):
    monkeypatch.setattr(seam, "SETTLED_NS", 0)
    opened = checks.open(str(lora))
    assert checks.open(str(lora)) is opened and len(reads) == 1
    assert checks.open(str(lora), again=True) is not opened and len(reads) == 2
    rewrite(lora)
    assert checks.open(str(lora)).digest != opened.digest and len(reads) == 3


def test_files_that_have_just_been_written_are_read_again(checks, reads, lora):
    """They could change within one tick of the file system's clock."""
    for file in lora.iterdir():
        os.utime(file)
    for _ in range(2):
        checks.open(str(lora))
    assert len(reads) == 2
    long_ago = time.time() - 60
    for file in lora.iterdir():
        os.utime(file, (long_ago, long_ago))
    for _ in range(3):
        checks.open(str(lora))
    assert len(reads) == 3


def test_errors_are_not_remembered(checks, reads, lora):
    good = (lora / WEIGHTS).read_bytes()
    (lora / WEIGHTS).write_bytes(good[:-8])
    for _ in range(2):
        with pytest.raises(AdapterRefused, match="not a sound safetensors file"):
            checks.open(str(lora))
    (lora / WEIGHTS).write_bytes(good)
    assert checks.open(str(lora)).linears and len(reads) == 3


def test_absent_and_otherwise_bad(checks, lora, tmp_path, monkeypatch):
    for path in (tmp_path / "nowhere", "~/no/such/dir", "no-such-org/no-such-name"):
        with pytest.raises(AdapterAbsent, match="no such directory"):
            checks.open(str(path))
    for path in (lora / WEIGHTS, lora.parent):
        with pytest.raises(AdapterRefused) as caught:
            checks.open(str(path))
        assert not isinstance(caught.value, AdapterAbsent)


def test_hub_names_are_resolved_first(checks, lora, monkeypatch):
    import vllm.lora.utils

    monkeypatch.setattr(vllm.lora.utils, "get_adapter_absolute_path", lambda path: str(lora))
    assert checks.open("org/name").path == lora


def test_an_adapter_must_fit_the_pool(base, checks, tmp_path):
    """The worker's rule (`pool.misfits`), so that nothing passes here and fails there."""
    for name, options in {"a": {"r": [4, 20, 33]}, "b": {"r": 2}, "wide": {"top_k": 9}}.items():
        options = {"num_experts": 3, "top_k": 1, "r": 1} | options
        options["num_experts"] = max(options["num_experts"], options["top_k"])
        make_random_adapter(base, tmp_path / name, **options)

    def stamped(versions, name, user_id=1):
        return ask(versions, name, user_id, str(tmp_path / name))

    with pytest.raises(AdapterRefused) as caught:
        stamped(Versions(checks.open, 2, 32), "a")
    for word in ("takes 6 pages", "pool has 4", "--max-lora-rank", "--max-loras", "96 or"):
        assert word in str(caught.value)
    beside = Versions(checks.open, 2, 48)
    assert size_in_path(stamped(beside, "a", 1).lora_path) == Size(6, 1)
    # Together they would not fit: the scheduler sees to that.
    assert size_in_path(stamped(beside, "b", 2).lora_path) == Size(3, 1)
    with loading(), pytest.raises(AdapterRefused, match="takes 6"):
        Versions(checks.open, 2, 32).stamp(LoRARequest("served", 1, str(tmp_path / "a")))
    with pytest.raises(AdapterRefused, match="takes 9 columns.* 8 are reserved: raise --max-loras to 3"):
        stamped(Versions(checks.open, 1, 512), "wide")


def test_a_class_outside_the_table_leaves_names_to_the_worker(lora):
    assert checks_of("OPTForCausalLM").open(str(lora)).kind == "lora"


def test_stamps_through_the_check(checks, lora):
    versions = Versions(checks.open, 2, 8)
    request = LoRARequest("a", 1, str(lora))
    first = versions.adopt(request, versions.stamp(request))
    rewrite(lora)
    assert versions.known(request) is first
    again = LoRARequest("a", 1, str(lora), load_inplace=True)
    second = versions.stamp(again)
    assert second != first and versions.stamp(again) == second
