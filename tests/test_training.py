"""Training: what is trained is what is served; losses, gradients, what is refused."""

import copy
import dataclasses

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference
from safetensors.torch import load_file
from torch import nn
from training_models import backbone_of, difference, fit, make, random_ids, randomise
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts
from vllm_adafuse.training import AdaFuseModel, MixtureConfig
from vllm_adafuse.training.losses import routing_losses
from vllm_adafuse.training.watch import count_experts

KINDS = {
    "entrance": {},
    "top-1": {"top_k": 1},
    "all experts, cold": {"top_k": 4, "temperature": 0.5},
    "softmax first": {"router_weights": "softmax_topk", "router_input": "embedding"},
    "with bias, rslora": {"router_bias": True, "use_rslora": True, "lora_alpha": 3.0},
    "at layer 1": {"router_layer": 1},
    "partial": {"layers": (0, 2), "target_modules": ("k_proj", "v_proj", "down_proj")},
    "per linear": {"routing": "layer_wise"},
    "per block": {"routing": "layer_wise", "router_scope": "block", "router_bias": True},
    "one expert": {"num_experts": 1, "top_k": 1},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    names = ("Llama", "Gemma2", "Phi3")
    return {name: make_tiny_backbone(root / name, f"{name}ForCausalLM") for name in names}


@pytest.fixture(scope="module")
def base(bases):
    return bases["Llama"]


@pytest.mark.parametrize("family,kind", [("Llama", kind) for kind in KINDS]
                         + [("Gemma2", "entrance"), ("Phi3", "per block")])  # fmt: skip
def test_trained_equals_reference(bases, tmp_path, family, kind):
    base = bases[family]
    model = make(base, **KINDS[kind])
    fit(model, random_ids(), 4)
    path = model.save_pretrained(tmp_path / "adapter")
    assert check_adapter(path, Backbone.from_path(str(base)))[1] == []
    model.eval()
    ids = random_ids(seed=1)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        expected = load_reference(base, path)(ids).logits
        bare = backbone_of(base)(ids).logits
        again = AdaFuseModel.from_pretrained(backbone_of(base), path).eval()
        assert difference(again(input_ids=ids).logits, found) <= 1e-6
        with model.disabled():
            assert difference(model(input_ids=ids).logits, bare) <= 1e-6
    assert difference(found, expected) <= 1e-5
    assert difference(bare, expected) > 0.1  # the adapter matters


def test_trained_equals_served(base, tmp_path):
    model = make(base)
    fit(model, random_ids(8, 48), 12)
    path = model.save_pretrained(tmp_path / "adapter")
    with engine(base, path) as llm:
        outputs = llm.generate(real_prompts(8), greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, model.eval())
    with model.disabled(), pytest.raises(AssertionError):
        assert_greedy_equals(outputs, model)


@pytest.mark.parametrize("kind", ["entrance", "top-1", "at layer 1", "per linear", "per block"])
def test_training_lowers_the_loss_and_moves_everything(base, kind):
    model = make(base, **KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = [p.clone() for p in model.backbone.parameters()]
    losses = fit(model, random_ids(), 15)
    assert losses[-1] < losses[0] - 1
    still = [name for name, tensor in model.state_dict().items() if tensor.equal(before[name])]
    assert still == []
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.backbone.parameters()))


def test_gradients_are_those_of_a_loop_over_experts(base):
    """The dense, masked products against the format's sum, by autograd, in float64."""
    model = randomise(make(base, top_k=2, target_modules=("k_proj", "v_proj"))).double()
    model.routers.float()
    model.train()
    group = model.groups[1]
    x = torch.randn(2, 5, 128, dtype=torch.float64)
    router = model.routers[0]
    router(torch.randn(2, 5, 128))
    y = [group.add(p, x, torch.zeros(2, 5, 64, dtype=torch.float64)) for p in range(2)]
    weights = [torch.randn_like(one) for one in y]
    parameters = [group.A, *group.B, router.weight]
    sum((a * w).sum() for a, w in zip(y, weights)).backward(retain_graph=True)
    found = [p.grad.clone() for p in parameters]
    total = 0.0
    for part in range(2):
        for e in range(4):
            delta = (x @ group.A[part, e].T) @ group.B[part][:, e].T
            total = total + (router.gates[..., 0, e, None] * delta * weights[part]).sum()
    expected = torch.autograd.grad(total, parameters)
    for a, b in zip(found, expected):
        assert b.norm() > 0
        assert difference(a, b) <= 1e-6  # the router itself is float32


def test_balance_and_z_loss_by_hand(base):
    model = make(base, top_k=2, routing="layer_wise", router_scope="block")
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    model.train()(input_ids=ids, attention_mask=mask)
    balance, z_loss, usage = routing_losses(model.all_routers, mask)
    kept = mask.flatten().bool()
    expected_balance, expected_z = [], []
    for i, router in enumerate(model.all_routers):
        z = router.logits[..., 0, :].flatten(0, 1)[kept]
        top = torch.topk(z, 2).indices
        f = torch.bincount(top.flatten(), minlength=4) / top.numel()
        assert torch.allclose(usage[i], f)
        expected_balance.append(4 * (f * torch.softmax(z, -1).mean(0)).sum())
        expected_z.append(torch.log(torch.exp(z).sum(-1)).square().mean())
    assert torch.allclose(balance, torch.stack(expected_balance).mean())
    assert torch.allclose(z_loss, torch.stack(expected_z).mean())


def test_loss_holds_the_auxiliary_losses_in_training_only(base):
    model = make(base, balance_coef=0.5, z_loss_coef=0.25)
    ids = random_ids()
    loss = model.train()(input_ids=ids, labels=ids).loss
    last = model.last_losses
    assert torch.allclose(loss, last["loss"] + 0.5 * last["balance"] + 0.25 * last["z"])
    assert torch.allclose(model.eval()(input_ids=ids, labels=ids).loss, last["loss"])
    items = 3 * (ids.numel() - len(ids))  # this batch is a third of the step
    third = model.train()(input_ids=ids, labels=ids, num_items_in_batch=items).loss
    assert torch.allclose(3 * third, loss)


def test_one_expert_per_token_still_teaches_the_router(base):
    model = randomise(make(base, top_k=1, balance_coef=0.0, z_loss_coef=0.0))
    ids = random_ids()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.routers[0].weight.grad.norm() > 0
    gates = model.routers[0].gates
    assert torch.equal(gates.max(-1).values, torch.full_like(gates[..., 0], 2.0))  # weight 1


def synthetic(domain, rows, seed):
    """Text of one of two domains: 64 tokens of its own, in random order."""
    return random_ids(rows, low=10 + 400 * domain, high=74 + 400 * domain, seed=seed)


def test_experts_specialise_on_two_domains(base):
    model = make(base, r=1, num_experts=2, top_k=1)
    direction = torch.randn(128, generator=torch.Generator().manual_seed(6))
    direction /= direction.norm()
    with torch.no_grad():  # embeddings know the domain, as trained ones do
        embeddings = model.backbone.model.embed_tokens.weight
        size = embeddings.norm(dim=1).mean()
        embeddings[10:74] += size * direction
        embeddings[410:474] -= size * direction

    def apart():
        a, b = (count_experts(model, [synthetic(d, 32, 9)])[0] for d in (0, 1))
        return (a - b).abs().sum().item() / 2  # total variation, 0 to 1

    before = apart()
    optimizer = torch.optim.AdamW(model.trainable(), lr=1e-2)
    for step in range(60):
        ids = torch.cat([synthetic(domain, 8, step) for domain in (0, 1)])
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.7 and apart() > 0.9
    usage = count_experts(model, [synthetic(d, 32, 9) for d in (0, 1)])[0]
    assert usage.min() > 0.4  # one expert each


def test_gradient_checkpointing_changes_no_gradient(base):
    model = randomise(make(base, router_layer=1, jitter=0.1))
    ids = random_ids()

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.trainable()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert model.backbone.is_gradient_checkpointing
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(plain, again))
    with pytest.raises(AdapterError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_bfloat16_backbone(base, tmp_path):
    model = make(base, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.trainable())
    losses = fit(model, random_ids(), 12)
    assert losses[-1] < losses[0] - 0.5
    saved = load_file(model.save_pretrained(tmp_path / "a") / "adapter_model.safetensors")
    assert saved["router.weight"].dtype == torch.float32
    assert saved["model.layers.0.mlp.up_proj.lora_A"].dtype == torch.bfloat16


class Int8Linear(nn.Module):
    """Stands for a quantised linear: no nn.Linear, no weight that could be trained."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("q", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.q.to(x.dtype) * self.scale).T


def test_quantised_linears_are_adapted_through_their_forward(base):
    plain, quantised = backbone_of(base), backbone_of(base)
    for name, module in list(quantised.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            made = Int8Linear(module)
            quantised.set_submodule(name, made)
            plain.get_submodule(name).weight.data = made.q.float() * made.scale
    a, b = (AdaFuseModel.from_backbone(m, MixtureConfig(num_experts=4, r=4))
            for m in (plain, quantised))  # fmt: skip
    ids = random_ids()
    losses = [fit(model, ids, 6) for model in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_copies_are_independent(base):
    model = randomise(make(base))
    copied = copy.deepcopy(model)
    ids = random_ids()
    before = model.eval()(input_ids=ids).logits
    fit(copied, ids, 3)
    assert difference(model(input_ids=ids).logits, before) <= 1e-6
    assert difference(copied.eval()(input_ids=ids).logits, before) > 1e-2


@pytest.mark.parametrize(
    "options,said",
    [
        ({"top_k": 9}, "`top_k` is 9, expected an integer from 1 to num_experts (8)"),
        ({"num_experts": 0}, "`num_experts` is 0"),
        ({"r": 2.5}, "`r` is 2.5, expected a positive integer"),
        ({"routing": "both"}, "`routing` is \"both\", expected one of"),
        ({"routing": "layer_wise", "router_layer": 1}, "`router_layer` belongs to pre-gated"),
        ({"temperature": 0}, "`temperature` is 0, expected a number above 0"),
        ({"jitter": 1.0}, "`jitter` is 1.0, expected from 0 to below 1"),
        ({"balance_coef": float("nan")}, "`balance_coef`"),
        ({"target_modules": ()}, "`target_modules` is []"),
        ({"expert_names": ("a", "b")}, "`expert_names` has 2 entries, expected 8"),
        ({"anneal": 2}, "`anneal` is 2"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(AdapterError) as caught:
        MixtureConfig(**options)
    assert said in str(caught.value)


def test_what_the_backbone_lacks_is_named(base):
    with pytest.raises(AdapterError) as caught:
        make(base, target_modules=("c_attn",), layers=(0, 7), router_layer=1)
    for said in ("target module c_attn", "it has down_proj", "layer 7 is not there",
                 "layer 0 lies below `router_layer` 1"):  # fmt: skip
        assert said in str(caught.value)
    with pytest.raises(AdapterError, match="`router_layer` is 3"):
        make(base, router_layer=3)


def test_states_that_do_not_fit_are_refused(base, tmp_path):
    model = make(base)
    state = make(base, r=2).state_dict() | {"other": torch.zeros(1)}
    state.pop("router.weight")
    with pytest.raises(AdapterError) as caught:
        model.load_state_dict(state)
    for said in ("router.weight is missing", "other belongs to no router", "expected [4, 4, 128]"):
        assert said in str(caught.value)
    with torch.no_grad():
        model.groups[0].A[0, 0, 0, 0] = float("inf")
    with pytest.raises(AdapterError, match="q_proj.lora_A is not finite; the training diverged"):
        model.save_pretrained(tmp_path / "adapter")


def test_configs_survive_replace():
    config = MixtureConfig(r=4)
    assert dataclasses.replace(config, seed=3).lora_alpha == 8.0
