"""Routers that see a request's past (`router.context`): the format, the reference, offline routes."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from vllm_adafuse.cli.main import main
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import check_adapter, load_adapter
from vllm_adafuse.format.config import parse_config
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline import reference
from vllm_adafuse.offline.routing import OfflineRouter, vocabulary_routes
from vllm_adafuse.tiny import make_tiny_backbone

EXPERTS, SCALE, TEMPERATURE = 6, 4.0, 0.7
IDS = torch.randint(0, 1003, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Gemma2ForCausalLM"])
def base(request, tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("backbone"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("llama"))


def make(base, path, **options):
    defaults = {
        "num_experts": EXPERTS, "top_k": 2, "r": 4, "layers": [0], "router_bias": True,
        "router_context": "mean", "router_context_scale": SCALE,
        "router_temperature": TEMPERATURE, "dtype": torch.float32,
    }  # fmt: skip
    return make_random_adapter(base, path, **defaults | options)


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    return make(llama, tmp_path_factory.mktemp("made") / "adapter")


@pytest.fixture(scope="module", params=[None, 4.0])
def model(llama, adapter, request, tmp_path_factory):
    if request.param is not None:
        options = {"router_context_half_life": request.param}
        adapter = make(llama, tmp_path_factory.mktemp("made") / "fading", **options)
    return reference.load(llama, adapter, dtype=torch.float32)


def gates_by_hand(base, adapter, ids, model, half_life=None):
    """The formula in numpy float64, a token and an expert at a time."""
    weights = load_file(base / "model.safetensors")
    tensors = {n: t.double().numpy() for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    gemma = model.config.model_type == "gemma2"
    norm = weights["model.layers.0.input_layernorm.weight"].double().numpy() + gemma
    said, gates = [], []
    for t, token in enumerate(ids):
        e = weights["model.embed_tokens.weight"][token].double().numpy()
        e = e * (math.sqrt(len(e)) if gemma else 1)
        u = e / np.sqrt(np.mean(e * e) + 1e-6) * norm
        said.append(tensors["router.context.weight"] @ u)
        z = tensors["router.weight"] @ u + tensors["router.bias"]
        left = [1.0 if half_life is None else 2 ** (-(t - s) / half_life) for s in range(t + 1)]
        z = (z + SCALE * np.average(said, axis=0, weights=left)) / TEMPERATURE
        chosen = np.argsort(-z, kind="stable")[:2]
        g = np.zeros(len(z))
        g[chosen] = np.exp(z[chosen]) / np.exp(z[chosen]).sum()
        gates.append(g)
    return np.array(gates)


@pytest.mark.parametrize("half_life", [None, 3.0, 0.4])
def test_reference_and_offline_routes_equal_the_formula(base, tmp_path, half_life):
    memory = {} if half_life is None else {"router_context_half_life": half_life}
    path = make(base, tmp_path / "adapter", **memory)
    model = reference.load(base, path, dtype=torch.float32)
    with torch.no_grad():
        model(IDS)
    expected = gates_by_hand(base, path, IDS[0].tolist(), model, half_life)
    np.testing.assert_allclose(model.adafuse.gates[0].numpy(), expected, atol=2e-6)
    ids, gates = OfflineRouter(load_adapter(path), base).routes(IDS[0])
    found = torch.zeros(len(ids), EXPERTS).scatter(1, ids.long(), gates)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    # The past counts: the same token meets others elsewhere.
    alone, _ = OfflineRouter(load_adapter(path), base).routes(IDS[0, -1:])
    assert len(ids[:, 0].unique()) > 2
    with torch.no_grad():
        model(IDS[:, -1:])
    assert (model.adafuse.gates[0, 0].nonzero().flatten() == alone[0].sort().values).all()


def test_embeddings_are_routed_as_their_ids(model):
    """The reference, of embeddings: whole, and behind a cache of ids."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        model(IDS)
        expected, cache = model.adafuse.gates, DynamicCache()
        model(inputs_embeds=embedding(IDS))
        torch.testing.assert_close(model.adafuse.gates, expected)
        model(IDS[:, :25], past_key_values=cache)
        model(inputs_embeds=embedding(IDS[:, 25:]), past_key_values=cache)
        torch.testing.assert_close(model.adafuse.gates, expected[:, 25:])
        model(inputs_embeds=embedding(IDS) + 0.1 * torch.sin(torch.arange(128.0)))
        assert not torch.allclose(model.adafuse.gates, expected)


def test_offline_chunks_do_not_matter(llama, adapter, monkeypatch):
    whole = OfflineRouter(load_adapter(adapter), llama).routes(IDS[0])
    monkeypatch.setattr("vllm_adafuse.offline.routing.CHUNK", 7)
    parts = OfflineRouter(load_adapter(adapter), llama).routes(IDS[0])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_a_cache_holds_its_own_past(model):
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits[0, -1]
        expected, first, second = model.adafuse.gates[0], DynamicCache(), DynamicCache()
        other = model(IDS.flip(1)).logits[0, -1]
        model(IDS[:, :25], past_key_values=first)
        model(IDS.flip(1)[:, :30], past_key_values=second)
        again = model(IDS[:, 25:], past_key_values=first).logits[0, -1]
        torch.testing.assert_close(model.adafuse.gates[0], expected[25:])
        flipped = model(IDS.flip(1)[:, 30:], past_key_values=second).logits[0, -1]
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flipped, other, rtol=1e-4, atol=1e-4)


def test_generate_with_and_without_a_cache_and_by_beams(model):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    mask = torch.ones_like(IDS)
    found = model.generate(IDS, attention_mask=mask, **options)
    assert found.tolist() == model.generate(IDS, attention_mask=mask, use_cache=False, **options).tolist()
    # Of a short prompt, so that beams have pasts of their own.
    options |= {"num_beams": 4, "return_dict_in_generate": True, "output_scores": True}
    options |= {"attention_mask": mask[:, :2], "num_return_sequences": 4}
    beams = model.generate(IDS[:, :2], **options)
    slow = model.generate(IDS[:, :2], use_cache=False, **options)
    assert beams.sequences.tolist() == slow.sequences.tolist()
    torch.testing.assert_close(beams.sequences_scores, slow.sequences_scores, rtol=0, atol=1e-5)


def test_padding_is_no_past(model):
    left = torch.cat([torch.full((1, 9), 1), IDS], 1)
    mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 40)], 1).long()
    with torch.no_grad():
        model(IDS)
        expected = model.adafuse.gates[0]
        model(left, attention_mask=mask)
        torch.testing.assert_close(model.adafuse.gates[0, 9:], expected)
        # In the middle too: no time passes.
        split = [torch.cat([t[:, :20], t.new_zeros(1, 6), t[:, 20:]], 1) for t in (IDS, mask[:, 9:])]
        model(split[0], attention_mask=split[1])
        torch.testing.assert_close(model.adafuse.gates[0, 26:], expected[20:])
        with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
            model(IDS, attention_mask=torch.ones(1, 1, 40, 40).bool())


def test_a_cut_cache_is_refused(model):
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        cache.crop(20)
        with pytest.raises(ValueError, match="holds 20 tokens, of which the router was told 40"):
            model(IDS[:, 20:], past_key_values=cache)


def raw(**changes):
    config = {
        "peft_type": "ADAFUSE", "format_version": 2, "base_model_name_or_path": "b",
        "num_experts": 2, "top_k": 1, "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "router.context": "mean", "router.context_scale": 4.0,
    }  # fmt: skip
    return {k: v for k, v in (config | changes).items() if v is not None}


def test_config_goes_there_and_back():
    config, problems = parse_config(raw())
    assert not problems and (config.router_context, config.context_scale) == ("mean", 4.0)
    written = config.to_json()
    assert written["format_version"] == 2 and written["router.context_scale"] == 4.0
    assert parse_config(written) == (config, [])
    nested = raw(**{"router.context": None, "router.context_scale": None})
    assert parse_config(nested | {"router": {"context": "mean"}})[0].context_scale == 1.0
    assert config.context_half_life is None and "router.context_half_life" not in written
    fading, problems = parse_config(raw(**{"router.context_half_life": 16}))
    assert not problems and fading.context_half_life == 16.0
    assert fading.to_json()["router.context_half_life"] == 16.0
    assert parse_config(fading.to_json()) == (fading, [])
    plain, _ = parse_config(nested | {"format_version": 1})
    assert plain.format_version == 1 and not [k for k in plain.to_json() if "context" in k]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router.context": "max"}, '`router.context` is "max", expected one of'),
        ({"router.context": True}, "`router.context` is true"),
        ({"router.context": ["mean"]}, "`router.context` is"),
        ({"router.context_scale": 0}, "`router.context_scale` is 0, expected a finite number"),
        ({"router.context_scale": "4"}, "`router.context_scale` is"),
        ({"router.context": None}, "`router.context_scale` is 4.0, expected `router.context`"),
        *[
            ({"router.context_half_life": bad}, f"`router.context_half_life` is {said}, expected a finite")
            for bad, said in ((0, "0"), (-16.0, "-16.0"), (math.nan, "NaN"), (math.inf, "Infinity"),
                              ("16", '"16"'), (True, "true"), ([16], "[16]"))
        ],
        (
            {"router.context": None, "router.context_scale": None, "router.context_half_life": 16},
            "`router.context_half_life` is 16, expected `router.context` beside it",
        ),
        ({"format_version": 1, "router.context_half_life": 16},
         "`router.context_half_life` belongs to format version 2"),
        ({"routing": "layer_wise", "router.context_half_life": 16},
         'key `router.context_half_life` is 16, but goes with `routing` "pre_gated" only'),
        ({"router.layer": 1}, "`router.layer` 1, expected one of the two"),
        ({"routing": "layer_wise"}, 'goes with `routing` "pre_gated" only'),
        ({"format_version": 1}, "`router.context` belongs to format version 2"),
    ],
)
def test_bad_configs(changes, said):
    config, problems = parse_config(raw(**changes))
    assert config is None and any(said in problem for problem in problems), problems


def test_bad_tensors(adapter, llama, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def problems_of(changes, **keys):
        path = tmp_path / "changed"
        path.mkdir(exist_ok=True)
        kept = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(kept, path / "adapter_model.safetensors")
        new = {k: v for k, v in (config | keys).items() if v is not None}
        (path / "adapter_config.json").write_text(json.dumps(new))
        return check_adapter(path)[1]

    name, weight = "router.context.weight", tensors["router.context.weight"]
    assert not problems_of({})
    assert f"tensor {name} is missing, expected [6, hidden]" in problems_of({name: None})[0]
    assert f"tensor {name}: shape [5, 128]" in problems_of({name: weight[:5].clone()})[0]
    bad = weight.clone()
    bad[2, 3] = math.nan
    assert f"tensor {name} has 1 values that are NaN" in problems_of({name: bad})[0]
    without = problems_of({}, **{"router.context": None, "router.context_scale": None})
    assert "expected `router.context` in adapter_config.json" in without[0]


def test_what_cannot_use_the_past_says_so(adapter, llama, capsys):
    from vllm_adafuse.offline.switch_runtime import SwitchRuntime

    with pytest.raises(AdapterError, match="hang on the tokens before it"):
        vocabulary_routes(load_adapter(adapter), llama)
    with pytest.raises(AdapterError, match="use mode='mixture'"):
        SwitchRuntime.load(llama, adapter)
    assert main(["inspect", str(adapter), "--base", str(llama)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "and the mean of the past, scale 4" in said
    assert "(1003 x 6 x 8 bytes)" in said and "no shares of the vocabulary" in said


def test_random_check_and_route(llama, tmp_path, capsys):
    out = str(tmp_path / "adapter")
    options = ["--router-context", "mean", "--router-context-scale", "4", "--num-experts", "4"]
    options += ["--router-context-half-life", "1.5"]
    assert main(["random", str(llama), out, "--r", "2", *options]) == 0
    assert main(["check", out, "--base", str(llama)]) == 0
    capsys.readouterr()
    assert main(["route", out, "--base", str(llama), "--text", "return return return", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert load_adapter(out).config.context_half_life == 1.5
    ids, gates = OfflineRouter(load_adapter(out), llama).routes(
        torch.tensor([token["id"] for token in tokens])
    )
    assert [t["experts"][0]["expert"] for t in tokens] == ids[:, 0].tolist()
    assert [t["experts"][0]["weight"] for t in tokens] == pytest.approx(gates[:, 0].tolist())
