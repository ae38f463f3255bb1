"""Routers that see a request's past, trained: what is saved is what was trained."""

import pytest
import torch
from safetensors.torch import load_file
from training_models import backbone_of, randomise
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.offline import reference
from vllm_adafuse.tiny import make_tiny_backbone
from vllm_adafuse.training import AdaFuseModel, MixtureConfig
from vllm_adafuse.training.layers import faded_sums

IDS = torch.randint(2, 1003, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("base"))


def fresh(base, **options):
    options = {"num_experts": 4, "r": 2, "router_context": "mean", "router_init": 3.0} | options
    config = MixtureConfig(**options)
    return randomise(AdaFuseModel.from_backbone(backbone_of(base), config, str(base)))


@pytest.mark.parametrize("half_life", [None, 3.0])
def test_saved_is_what_was_trained(base, tmp_path, half_life):
    model = fresh(base, router_bias=True, context_half_life=half_life)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2))
    before = model.all_routers[0].context.detach().clone()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, model.all_routers[0].context)
    model.save_pretrained(tmp_path / "adapter")
    assert check_adapter(tmp_path / "adapter", Backbone.from_path(str(base)))[1] == []
    served = reference.load(base, tmp_path / "adapter", dtype=torch.float32)
    left = torch.cat([torch.ones(2, 5).long(), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 24)], 1).long()
    model.eval()
    with torch.no_grad():
        expected = served(IDS).logits
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        padded = model(input_ids=left, attention_mask=mask).logits[:, 5:]
        torch.testing.assert_close(
            padded, served(left, attention_mask=mask).logits[:, 5:], rtol=1e-4, atol=1e-4
        )
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        assert torch.equal(
            model.generate(left, attention_mask=mask, **options),
            served.generate(left, attention_mask=mask, **options),
        )
    again = AdaFuseModel.from_pretrained(backbone_of(base), tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in again.state_dict().items())
    assert (again.mixture.context_scale, again.mixture.context_half_life) == (4.0, half_life)


def test_no_time_passes_in_padding():
    """Sums of a memory that fades, by the formula and with padding in the middle."""
    said = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    real = torch.ones(2, 50, 1, dtype=torch.float64)
    real[1, 20:31] = 0
    found = faded_sums(said * real, real, 5.0)
    for row, kept in ((0, range(50)), (1, [*range(20), *range(31, 50)])):
        total = torch.zeros(3, dtype=torch.float64)
        for t in kept:
            total = 0.5 ** (1 / 5) * total + said[row, t]
            torch.testing.assert_close(found[row, t], total, rtol=1e-6, atol=1e-6)


def test_a_cache_is_refused(base):
    model = fresh(base).eval()
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :10], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="pass use_cache=False"):
            model(input_ids=IDS[:, 10:], past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
            model(input_ids=IDS, attention_mask=torch.ones(2, 1, 24, 24).bool())


@pytest.mark.parametrize("options", [{"router_layer": 1}, {"routing": "layer_wise"},
                                     {"router_context": "max"}, {"context_scale": 0},
                                     {"context_half_life": 0}, {"context_half_life": float("nan")},
                                     {"router_context": "", "context_half_life": 8}])  # fmt: skip
def test_bad_options(options):
    with pytest.raises(AdapterError, match="context"):
        MixtureConfig(**{"router_context": "mean"} | options)


def test_the_command(base, tmp_path):
    from vllm_adafuse.cli.main import main

    data = tmp_path / "data.jsonl"
    lines = [f'{{"text": "line {i} of the text in a file"}}' for i in range(40)]
    data.write_text("\n".join(lines))
    done = main([
        "train", "--base", str(base), "--data", str(data), "--output", str(tmp_path / "out"),
        "--num-experts", "3", "--r", "2", "--layers", "0", "--steps", "2", "--length", "32",
        "--batch-size", "2", "--router-context", "mean", "--quiet",
        "--router-context-half-life", "12",
    ])  # fmt: skip
    assert done == 0
    adapter, problems = check_adapter(tmp_path / "out", Backbone.from_path(str(base)))
    assert not problems
    assert (adapter.config.router_context, adapter.config.context_scale) == ("mean", 4.0)
    assert adapter.config.context_half_life == 12.0
