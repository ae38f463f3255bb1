"""The adapter's content in `system_fingerprint`, and not in the key of the compile cache."""

import pickle

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.utils import fingerprint
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("fingerprint") / "base")


def config_of(base, adapter=None, seed=0, r=2):
    """The engine's config with an adapter at one path, whatever its values."""
    options = {}
    if adapter is not None:
        make_random_adapter(base, adapter, num_experts=2, r=r, seed=seed)
        options["hf_overrides"] = {"adafuse_adapter": str(adapter)}
    return EngineArgs(str(base), **options).create_engine_config()


def test_values_change_the_fingerprint_and_no_compiled_model(base, tmp_path):
    adapter, prints, keys = tmp_path / "adapter", [], []
    for seed, r in ((0, 2), (1, 2), (0, 2), (0, 4)):
        config = config_of(base, adapter, seed, r)
        made = fingerprint.build_system_fingerprint(config)
        assert made.endswith(f"-adafuse-{content_hash(adapter)[:8]}")
        # The workers' own, from what they are sent.
        assert pickle.loads(pickle.dumps(config)).compute_hash() == config.compute_hash()
        assert config.model_config.hf_config.adafuse["content"] == content_hash(adapter)
        prints.append(made)
        keys.append(config.compute_hash())
    first, retrained, again, wider = prints
    assert first == again and len({first, retrained, wider}) == 3
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_other_modes_and_other_models_are_left_alone(base, tmp_path):
    config, plain = config_of(base, tmp_path / "adapter"), config_of(base)
    build = fingerprint.build_system_fingerprint
    assert build(config, "none") is None and build(config, "custom", "mine") == "mine"
    assert "-adafuse-" in build(config, "hash") and "adafuse" not in build(plain)
    assert "-adafuse-" in fingerprint.get_system_fingerprint(config)
