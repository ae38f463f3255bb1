"""The reference of format version 2 against the formulas by hand, token by token in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline import reference
from vllm_adafuse.tiny import make_tiny_backbone

PROMPT = [17, 5, 900, 333, 42, 7, 260]
LAYER = 1
ATTENTION, MLP = f"model.layers.{LAYER}.self_attn", f"model.layers.{LAYER}.mlp"
EXPERTS, RANK = 4, 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {n: make_tiny_backbone(root / n, f"{n}ForCausalLM") for n in ("Qwen2", "Gemma2", "Phi3")}


def run(base, adapter):
    """The model after one forward, and (input, output) [T, …] in float64 of every module."""
    model, seen = reference.load(base, adapter, dtype=torch.float32), {}

    def record(name):
        def hook(module, args, kwargs, out):
            x = args[0] if args else kwargs["hidden_states"]
            out = out[0] if isinstance(out, tuple) else out
            seen[name] = x[0].double(), out[0].double()

        return hook

    for name, module in model.named_modules():
        if name.startswith("model.layers.") and "rotary" not in name:
            module.register_forward_hook(record(name), with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([PROMPT]))
    return model, seen


class ByHand:
    """The format's formulas over the files, one token at a time."""

    def __init__(self, base, adapter, **config):
        self.weights = {n: t.double() for n, t in load_file(base / "model.safetensors").items()}
        self.tensors = {
            n: t.double() for n, t in load_file(adapter / "adapter_model.safetensors").items()
        }
        self.config = config

    def scale(self, alpha, rank):
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def gates(self, u, router, top_k):
        z = self.tensors[f"{router}router.weight"] @ u
        z = z + self.tensors.get(f"{router}router.bias", 0.0)
        z = (abs(z) if self.config.get("router_logits") == "abs" else z).tolist()
        z = [value / self.config.get("router_temperature", 1.0) for value in z]
        order = sorted(range(len(z)), key=lambda e: (-z[e], e))
        over = order if self.config.get("router_weights") == "softmax_topk" else order[:top_k]
        total = sum(math.exp(z[e]) for e in over)
        return {e: math.exp(z[e]) / total for e in order[:top_k]}

    def plain(self, x, name):
        y = self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)
        if f"{name}.always_A" in self.tensors:
            a, b = self.tensors[f"{name}.always_A"], self.tensors[f"{name}.always_B"]
            scale = self.scale(self.config["always_alpha"], self.config["always_r"])
            y = y + scale * (b @ (a @ x))
        return y

    def expert(self, x, name, e):
        if f"{name}.lora_A" not in self.tensors:
            return 0.0
        a, b = self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]
        ranks = self.config.get("r", RANK)
        rank = ranks[e] if isinstance(ranks, list) else ranks
        a = a[0] if self.config.get("shared_A") else a[e]
        return self.scale(2 * rank, rank) * (b[e][:, :rank] @ (a[:rank] @ x))

    def linear(self, x, name, gates):
        return self.plain(x, name) + sum(g * self.expert(x, name, e) for e, g in gates.items())


def make(base, path, **config):
    options = {"num_experts": EXPERTS, "r": RANK, "top_k": 2, "dtype": torch.float32}
    return make_random_adapter(base, path, **options | config)


LINEAR = {
    "defaults": {},
    "dense": {"top_k": EXPERTS},
    "k per layer": {"top_k": [1, 3, 1]},
    "k per block": {"top_k": {"self_attn": 1, "mlp": 3}},
    "experts per layer": {"layer_experts": [4, 3, 2], "router_bias": True},
    "abs": {"router_logits": "abs", "router_bias": True, "router_temperature": 0.5},
    "softmax first": {"router_weights": "softmax_topk"},
    "abs, softmax first": {"router_weights": "softmax_topk", "router_logits": "abs"},
    "ranks, rslora": {"r": [1, 3, 2, 3], "use_rslora": True},
    "shared A": {"shared_A": True},
    "always on": {"always_r": 2, "always_alpha": 5},
    "always on alone": {
        "always_r": 2,
        "always_alpha": 5,
        "use_rslora": True,
        "expert_modules": ["q_proj", "down_proj"],
        "always_modules": ["q_proj", "k_proj", "up_proj"],
    },
}


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scope", ["linear", "block"])
@pytest.mark.parametrize("case", LINEAR)
def test_linears(case, scope, bases, tmp_path):
    config = {"routing": "layer_wise", "router_scope": scope} | LINEAR[case]
    adapter = make(bases["Qwen2"], tmp_path / "a", **config)
    model, seen = run(bases["Qwen2"], adapter)
    hand = ByHand(bases["Qwen2"], adapter, **config)
    top_k, different = config.get("top_k", 2), set()
    for block, leaves in ((ATTENTION, "qkvo"), (MLP, ("gate", "up", "down"))):
        k = top_k[LAYER] if isinstance(top_k, list) else top_k
        k = k[block.split(".")[-1]] if isinstance(k, dict) else k
        for name in (f"{block}.{leaf}_proj" for leaf in leaves):
            x, y = seen[name]
            owner = name if scope == "linear" else block
            for token in range(len(PROMPT)):
                gates = {}
                if f"{owner}.router.weight" in hand.tensors:
                    gates = hand.gates(seen[owner][0][token], f"{owner}.", k)
                    found = model.adafuse.gates[owner][0, token]
                    assert found.nonzero()[:, 0].tolist() == sorted(gates)
                    assert_close(found[sorted(gates)].double(), torch.tensor(
                        [gates[e] for e in sorted(gates)], dtype=torch.float64))  # fmt: skip
                    different.add(tuple(sorted(gates)))
                assert_close(y[token], hand.linear(x[token], name, gates))
    assert len(different) > 1 or case == "dense"


@pytest.mark.parametrize(
    "family, case",
    [
        ("Qwen2", {}),
        ("Qwen2", {"shared_A": True, "router_logits": "abs", "top_k": {"self_attn": 1, "mlp": 3}}),
        ("Qwen2", {"always_r": 2, "always_alpha": 5, "layer_experts": [4, 3, 4], "top_k": 3}),
        ("Qwen2", {"expert_modules": ["gate_proj", "down_proj"], "r": [1, 3, 2, 3]}),
        ("Gemma2", {"expert_modules": ["up_proj", "gate_proj"]}),
        ("Phi3", {"use_rslora": True}),
    ],
)
def test_ffn_output_is_the_mixture_of_whole_mlps(family, case, bases, tmp_path):
    """Σ g_e F_e(u) with F_e an MLP of its own: MixLoRA's definition, not the cheaper form."""
    config = {"routing": "layer_wise", "router_scope": "block", "mix": "ffn_output"} | case
    adapter = make(bases[family], tmp_path / "a", **config)
    model, seen = run(bases[family], adapter)
    hand = ByHand(bases[family], adapter, **config)
    x, y = seen[MLP]
    k = config.get("top_k", 2)
    k = k["mlp"] if isinstance(k, dict) else k

    def act(gate):
        return F.gelu(gate, approximate="tanh") if family == "Gemma2" else F.silu(gate)

    def expert_mlp(u, e):
        def adapted(v, leaf):
            return hand.plain(v, f"{MLP}.{leaf}") + hand.expert(v, f"{MLP}.{leaf}", e)

        if family == "Phi3":
            gate, up = adapted(u, "gate_up_proj").chunk(2)
        else:
            gate, up = adapted(u, "gate_proj"), adapted(u, "up_proj")
        return adapted(act(gate) * up, "down_proj")

    for token in range(len(PROMPT)):
        gates = hand.gates(x[token], f"{MLP}.", k)
        mixed = sum(g * expert_mlp(x[token], e) for e, g in gates.items())
        assert_close(y[token], mixed)
        if family == "Qwen2" and not case:  # mixing in every linear is another model
            gate, up = (hand.linear(x[token], f"{MLP}.{n}_proj", gates) for n in ("gate", "up"))
            other = hand.linear(act(gate) * up, f"{MLP}.down_proj", gates)
            assert (other - mixed).abs().max() > 0.02 * mixed.abs().max()
    if "expert_modules" not in case:  # attention mixes in its linears
        name = f"{ATTENTION}.o_proj"
        k = config.get("top_k", 2)
        k = k["self_attn"] if isinstance(k, dict) else k
        gates = hand.gates(seen[ATTENTION][0][2], f"{ATTENTION}.", k)
        assert_close(seen[name][1][2], hand.linear(seen[name][0][2], name, gates))


@pytest.mark.parametrize("router_input", ["first_norm", "embedding"])
@pytest.mark.parametrize("family", ["Qwen2", "Gemma2"])
def test_router_at_a_later_layer(family, router_input, bases, tmp_path):
    config = {"router_layer": LAYER, "router_input": router_input, "top_k": 2}
    adapter = make(bases[family], tmp_path / "a", **config)
    model, seen = run(bases[family], adapter)
    hand = ByHand(bases[family], adapter, **config)
    enters, _ = seen[f"model.layers.{LAYER}"]
    norm = hand.weights[f"model.layers.{LAYER}.input_layernorm.weight"]
    norm = norm + 1 if family == "Gemma2" else norm
    for token, e in enumerate(enters):
        u = e
        if router_input == "first_norm":
            u = e * torch.rsqrt(e.square().mean() + 1e-6) * norm
        gates = hand.gates(u, "", 2)
        assert model.adafuse.gates[0, token].nonzero()[:, 0].tolist() == sorted(gates)
        for layer in (LAYER, LAYER + 1):  # one decision for all layers
            name = f"model.layers.{layer}.mlp.up_proj"
            x, y = seen[name]
            assert_close(y[token], hand.linear(x[token], name, gates))
    assert not any(".layers.0." in name for name in hand.tensors)
