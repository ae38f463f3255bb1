"""What LoRA options of a server show before its engine starts, and AdaFuse adapters for resolvers."""

import asyncio
import json
import os
import time
from types import SimpleNamespace

import pytest
import vllm.envs as envs
from engines import make_pair
from loras import FEW, engine_config, make_lora
from serve_forks import ServeForks
from transformers import AutoConfig
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving import resolvers
from vllm_adafuse.serving.lora_start import check_start
from vllm_adafuse.serving.plain_loras import BOTH_LORA
from vllm_adafuse.serving.versions import AdapterRefused, Checks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    base, _ = make_pair(root)
    make_random_adapter(base, root / "wide", num_experts=9, top_k=2, r=16)
    make_lora(base, root / "lora", 1, **FEW)
    return root


def config_of(root, **options):
    base = root / "base"
    model = SimpleNamespace(hf_config=AutoConfig.from_pretrained(base), model=str(base))
    config = engine_config(model, **options)
    config.lora_config = SimpleNamespace(max_loras=2, max_lora_rank=64)
    return config


def modules(root, *names):
    return [SimpleNamespace(name=name, path=str(root / name)) for name in names]


def test_good_modules_pass(root):
    check_start(config_of(root), modules(root, "adapter", "lora"))
    check_start(SimpleNamespace(lora_config=None), modules(root, "gone"))


@pytest.mark.parametrize("lora, refused", [("adafuse", "adapts the output head"), ("both", "")])
def test_what_has_no_pages_is_named_with_its_option(lora, refused, root, tmp_path):
    make_lora(root / "base", tmp_path / "head", 1, r=4, lora_alpha=4, target_modules=["lm_head"])
    head = [SimpleNamespace(name="head", path=str(tmp_path / "head"))]
    config = config_of(root, lora=lora)
    if not refused:
        return check_start(config, head)
    with pytest.raises(AdapterError) as found:
        check_start(config, head)
    assert refused in str(found.value) and BOTH_LORA in str(found.value)


def test_stages_where_vllms_lora_does_not_stand_beside_ours(root):
    model = SimpleNamespace(hf_config=AutoConfig.from_pretrained(root / "base"), model="base")
    config = engine_config(model, pipelined=True, lora="both")
    with pytest.raises(AdapterError, match="not stand beside ours with pipeline parallelism"):
        check_start(config, [])


def test_every_bad_module_is_named(root):
    with pytest.raises(AdapterError) as refused:
        check_start(config_of(root), modules(root, "gone", "lora", "wide", "base"))
    message = str(refused.value)
    assert message.startswith("--lora-modules cannot be used:\n  - gone: no such directory")
    for part in ("wide: takes 9 pages", "pool has 8", "144 or more", "  - base: "):
        assert part in message
    assert "lora: " not in message.replace("--lora-modules", "")
    check_start(config_of(root, lora="vllm"), modules(root, "gone"))


def test_a_server_with_a_bad_module_ends_at_once(root):
    """Not after its engine has started."""
    options = "--dtype float32 --enforce-eager --max-model-len 128 --gpu-memory-utilization 0.2"
    command = ["serve", str(root / "base"), *options.split(), "--enable-lora"]
    command += ["--lora-modules", f"good={root / 'lora'}", f"bad={root / 'gone'}"]
    with ServeForks() as forks:
        start = time.monotonic()
        ended = forks.run(command, root / "said")
        took = time.monotonic() - start
    said = (root / "said").read_text()
    assert ended["code"] == 1 and not ended["hung"] and not ended["left"], said
    assert "--lora-modules cannot be used:\n  - bad: no such directory" in said
    assert said.count("cannot be used:") == 1  # one message, not one per layer of vLLM
    assert "Loading weights" not in said and took < 60


def test_the_rust_front_end_is_refused(root, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(AdapterError, match="VLLM_USE_RUST_FRONTEND is set"):
        check_start(config_of(root), [])
    check_start(config_of(root, lora="vllm"), [])
    check_start(SimpleNamespace(lora_config=None), [])


def test_an_adapter_of_another_backbone(root, tmp_path, caplog):
    """The front end compares the hash of the embedding, as for a pinned adapter."""
    adapter = make_random_adapter(root / "base", tmp_path / "other", num_experts=2, top_k=1, r=4)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_hash": "0" * 64}))
    assert Checks(config_of(root)).open(str(adapter)).digest
    with pytest.raises(AdapterRefused, match="`base_model_hash` is 0000"):
        Checks(config_of(root, backbone="refuse")).open(str(adapter))
    assert Checks(config_of(root, backbone="refuse")).open(str(root / "adapter")).digest


@pytest.mark.parametrize("options, message", [
    ({"routing": "layer_wise"}, "`routing` layer_wise"),
    ({"router_layer": 1}, "`router.layer` 1"),
])  # fmt: skip
def test_mixtures_that_no_request_may_choose_are_refused_in_front(options, message, root, tmp_path):
    path = make_random_adapter(root / "base", tmp_path / "a", num_experts=4, top_k=2, **options)
    with pytest.raises(AdapterRefused, match=f"{message}.*serve it alone"):
        Checks(config_of(root)).open(str(path))


@pytest.fixture
def registry(monkeypatch):
    from vllm.lora.resolver import LoRAResolverRegistry

    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    return LoRAResolverRegistry


def test_the_file_system_resolver_finds_adafuse_directories(root, monkeypatch, registry):
    resolvers.register()
    assert not registry.get_supported_resolvers()
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(root))
    resolvers.register(), resolvers.register()
    (name,) = registry.get_supported_resolvers()
    resolver = registry.get_resolver(name)

    def found(lora_name):
        return asyncio.run(resolver.resolve_lora("base", lora_name))

    request = found("adapter")
    assert (request.lora_name, request.lora_path) == ("adapter", str(root / "adapter"))
    # A PEFT LoRA is for vLLM's own; none is outside of the directory.
    for other in ("lora", "base", "nowhere", f"../{root.name}/adapter/../../x", "."):
        assert found(other) is None
    outside = os.path.relpath(make_random_adapter(root / "base", root.parent / "out"), root)
    assert found(outside) is None


def test_the_hub_resolver_does_too(root, monkeypatch, registry):
    monkeypatch.setenv("VLLM_LORA_RESOLVER_HF_REPO_LIST", "org/one, org/two")
    resolvers.register()
    assert not registry.get_supported_resolvers()  # as vLLM's, only where it is named
    monkeypatch.setenv("VLLM_PLUGINS", "adafuse,lora_hf_hub_resolver")
    assert "lora_hf_hub_resolver" in envs.VLLM_PLUGINS
    resolvers.register()
    (name,) = registry.get_supported_resolvers()
    resolver = registry.get_resolver(name)
    assert resolver.repo_list == ["org/one", "org/two"]
    found = resolver._get_lora_req_from_path("org/one/a", str(root / "adapter"), "base")
    assert asyncio.run(found).lora_path == str(root / "adapter")
