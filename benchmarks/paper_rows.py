"""The systems of the paper's table, each put on one transformers model and taken off again.

All have the same E experts of rank r on the same seven linears of every layer, with random
weights, and each token uses k of them. A row is a context manager: inside it the model is adapted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """Sizes of the adapter.

    Attributes:
        experts: E.
        top_k: k.
        r: rank.
    """

    experts: int = 8
    top_k: int = 2
    r: int = 16

    @property
    def scale(self) -> float:
        """LoRA's alpha / r with alpha = 2 r."""
        return 2.0

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts or self.r < 1:
            raise ValueError(f"{self}: expected 1 <= top_k <= experts and r >= 1")


def linears(model) -> dict[str, torch.nn.Linear]:
    """The adapted linears by their full names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in MODULES
    }


def normal(model, *shape: int, scale: float = 1.0) -> torch.Tensor:
    std = scale * shape[-1] ** -0.5
    return torch.empty(shape, dtype=model.dtype, device=model.device).normal_(std=std)


def make_bank(model, linear: torch.nn.Linear, m: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E, r, in] and B [E, out, r]."""
    a = normal(model, m.experts, m.r, linear.in_features)
    return a, normal(model, m.experts, linear.out_features, m.r, scale=0.1)


@contextmanager
def replaced(functions: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Modules run these functions instead of their forward."""
    for module, function in functions.items():
        module.forward = function
    try:
        yield
    finally:
        for module in functions:
            del module.forward


def route(x: torch.Tensor, router: torch.Tensor, m: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts [T, k] as MoLA and MixLoRA write it: softmax, top-k, renormalised."""
    probabilities = F.softmax(F.linear(x, router), dim=-1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, m.top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(x.dtype), chosen


@contextmanager
def backbone(model, m: Mixture) -> Iterator[Any]:
    """The bare model."""
    yield model


@contextmanager
def static_lora(model, m: Mixture) -> Iterator[Any]:
    """PEFT's LoRA of rank r, one for all tokens, not merged."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=m.r, lora_alpha=2 * m.r, target_modules=list(MODULES))
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    try:
        yield wrapped
    finally:
        wrapped.unload()


@contextmanager
def layer_wise_linear(model, m: Mixture) -> Iterator[Any]:
    """MoLA's form: a router in every linear, and a loop over all experts with masks.

    The loop is that of MoLA's published layer (and of Mixtral's, which it follows): where() finds
    the tokens of each expert, which makes the host wait; index_add_ puts them back.
    """

    def make(linear: torch.nn.Linear) -> Callable:
        router = normal(model, m.experts, linear.in_features)
        lora_a, lora_b = make_bank(model, linear, m)

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, linear.weight, linear.bias)
            flat = x.view(-1, x.shape[-1])
            weights, chosen = route(flat, router, m)
            mask = F.one_hot(chosen, m.experts).permute(2, 1, 0)
            total = torch.zeros(flat.shape[0], y.shape[-1], dtype=x.dtype, device=x.device)
            for expert in range(m.experts):
                place, tokens = torch.where(mask[expert])
                if tokens.shape[0] == 0:
                    continue
                low = F.linear(flat[tokens], lora_a[expert])
                delta = F.linear(low, lora_b[expert]) * m.scale
                total.index_add_(0, tokens, delta * weights[tokens, place, None])
            return y + total.view_as(y)

        return forward

    with replaced({linear: make(linear) for linear in linears(model).values()}):
        yield model


def gathered(x: torch.Tensor, weights, chosen, lora_a, lora_b, scale: float) -> torch.Tensor:
    """Σ g B A x of tokens [T, in] by gathering the chosen experts: no loop, no waiting."""
    low = torch.matmul(lora_a[chosen].flatten(1, 2), x[..., None]).view(*chosen.shape, -1)
    low = low * (weights * scale)[..., None]
    return torch.matmul(lora_b[chosen], low[..., None]).sum(1).squeeze(-1)


@contextmanager
def layer_wise_gather(model, m: Mixture) -> Iterator[Any]:
    """The same mixture as `layer_wise_linear`, written as well as eager code can be."""

    def make(linear: torch.nn.Linear) -> Callable:
        router = normal(model, m.experts, linear.in_features)
        lora_a, lora_b = make_bank(model, linear, m)

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, linear.weight, linear.bias)
            flat = x.view(-1, x.shape[-1])
            weights, chosen = route(flat, router, m)
            return y + gathered(flat, weights, chosen, lora_a, lora_b, m.scale).view_as(y)

        return forward

    with replaced({linear: make(linear) for linear in linears(model).values()}):
        yield model


@contextmanager
def layer_wise_mlp(model, m: Mixture) -> Iterator[Any]:
    """MixLoRA's form, our writing: a router per MLP, experts mixed at the MLP's output.

    The chosen experts' activations each go through down_proj, in a loop over experts with masks;
    attention has plain LoRA parts, always on.
    """
    with ExitStack() as stack:
        for layer in model.model.layers:
            router, banks = mixlora_weights(model, layer, m)
            plain = {getattr(layer.self_attn, n): banks[n] for n in MODULES if n not in MLP}
            plain = {linear: _plain(linear, a[0], b[0], m) for linear, (a, b) in plain.items()}
            stack.enter_context(replaced(plain))
            stack.enter_context(replaced({layer.mlp: _mixed_mlp(layer.mlp, router, banks, m)}))
        yield model


def mixlora_weights(model, layer, m: Mixture) -> tuple[torch.Tensor, dict[str, tuple]]:
    """The router [E, hidden] and the banks of a layer; one expert for each linear of attention."""
    router, banks = normal(model, m.experts, model.config.hidden_size), {}
    for name in MODULES:
        linear = getattr(layer.mlp if name in MLP else layer.self_attn, name)
        banks[name] = make_bank(model, linear, m if name in MLP else Mixture(1, 1, m.r))
    return router, banks


def _plain(linear: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, m: Mixture) -> Callable:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, linear.weight, linear.bias)
        return y + F.linear(F.linear(x, a), b) * m.scale

    return forward


def _mixed_mlp(mlp: torch.nn.Module, router: torch.Tensor, banks: dict, m: Mixture) -> Callable:
    def delta(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        a, b = banks[name]
        return F.linear(F.linear(x, a[expert]), b[expert]) * m.scale

    def forward(x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = route(flat, router, m)
        mask = F.one_hot(chosen, m.experts).permute(2, 1, 0)
        gate, up = mlp.gate_proj(flat), mlp.up_proj(flat)
        total = torch.zeros_like(flat)
        for expert in range(m.experts):
            place, tokens = torch.where(mask[expert])
            if tokens.shape[0] == 0:
                continue
            one = flat[tokens]
            h = mlp.act_fn(gate[tokens] + delta("gate_proj", expert, one))
            h = h * (up[tokens] + delta("up_proj", expert, one))
            out = mlp.down_proj(h) + delta("down_proj", expert, h)
            total.index_add_(0, tokens, out * weights[tokens, place, None])
        return total.view_as(x)

    return forward


@contextmanager
def mixlora_package(model, m: Mixture) -> Iterator[Any]:
    """pip's `mixlora` itself; its experts on the MLP, its plain LoRA on attention."""
    from mixlora import MixLoraConfig
    from mixlora.model import inject_adapter_in_model

    config = MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA",
            "routing_strategy": "mixlora", "num_experts": m.experts, "top_k": m.top_k,
            "r": m.r, "lora_alpha": 2 * m.r, "lora_dropout": 0.05,
            "target_modules": list(MODULES), "act_fn": model.config.hidden_act,
        }
    )  # fmt: skip
    config.adapter_name_, config.dtype_ = "default", model.dtype
    weights = {}
    for i, layer in enumerate(model.model.layers):
        root, (router, banks) = f"mixlora.layers.{i}", mixlora_weights(model, layer, m)
        weights[f"{root}.mlp.moe_gate.weight"] = router
        for name, (a, b) in banks.items():
            block = "mlp" if name in MLP else "self_attn"
            for expert in range(a.shape[0]):
                middle = f".experts.{expert}" if name in MLP else ""
                weights[f"{root}.{block}.{name}{middle}.lora_A.weight"] = a[expert]
                weights[f"{root}.{block}.{name}{middle}.lora_B.weight"] = b[expert]
    inject_adapter_in_model(model, config, weights)
    for layer in model.model.layers:  # the package keeps them where eval() does not reach
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
    model.eval()
    del weights
    try:
        yield model
    finally:
        for layer in model.model.layers:
            for name in MODULES[:4]:
                part = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, part.base_layer_)
            del layer.mlp.forward, layer.mlp.mixlora_moes
        del model._mixlora_config


@contextmanager
def layer_merge(model, m: Mixture) -> Iterator[Any]:
    """Naive merging: at each layer its router chooses, the experts are added to the layer's
    weights, the layer runs, and they are subtracted again. For prompts: by the last token."""
    handles = []
    for layer in model.model.layers:
        parts = [module for _, module in linears(layer).items()]
        banks = [make_bank(model, linear, m) for linear in parts]
        router = normal(model, m.experts, model.config.hidden_size)
        state: dict[str, Any] = {}

        def enter(module, args, kwargs, parts=parts, banks=banks, router=router, state=state):
            x = args[0] if args else kwargs["hidden_states"]
            weights, chosen = route(x[:, -1], router, m)
            state["deltas"] = []
            for linear, (a, b) in zip(parts, banks):
                tall = b[chosen[0]] * (weights[0] * m.scale)[:, None, None]
                delta = tall.transpose(0, 1).flatten(1) @ a[chosen[0]].flatten(0, 1)
                linear.weight.data.add_(delta)
                state["deltas"].append(delta)

        def leave(module, args, output, parts=parts, state=state):
            for linear, delta in zip(parts, state.pop("deltas")):
                linear.weight.data.sub_(delta)

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def make_routes(model, m: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Random passports of the vocabulary: expert ids [V, k] int32, weights [V, k]."""
    vocab = model.config.vocab_size
    ids = torch.rand(vocab, m.experts, device=model.device).argsort(1)[:, : m.top_k]
    weights = torch.rand(vocab, m.top_k, device=model.device) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    return ids.int().contiguous(), weights


@contextmanager
def pre_gated(model, m: Mixture) -> Iterator[Any]:
    """One decision per token, at the entrance; nothing fused: every linear gathers its experts."""
    ids, table = make_routes(model, m)
    now: dict[str, torch.Tensor] = {}

    def enter(module, args, kwargs):
        tokens = (args[0] if args else kwargs["input_ids"]).reshape(-1)
        now["chosen"], now["weights"] = ids[tokens], table[tokens].to(model.dtype)

    def make(linear: torch.nn.Linear) -> Callable:
        lora_a, lora_b = make_bank(model, linear, m)

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, linear.weight, linear.bias)
            flat = x.view(-1, x.shape[-1])
            delta = gathered(flat, now["weights"], now["chosen"], lora_a, lora_b, m.scale)
            return y + delta.view_as(y)

        return forward

    handle = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with replaced({linear: make(linear) for linear in linears(model).values()}):
            yield model
    finally:
        handle.remove()


@contextmanager
def switch(model, m: Mixture, **options: Any) -> Iterator[Any]:
    """AdaFuse as published: before each token one launch merges its experts into all weights."""
    from vllm_adafuse.offline.switch_runtime import SwitchRuntime

    ids, weights = make_routes(model, m)
    experts = {name: make_bank(model, linear, m) for name, linear in linears(model).items()}
    runtime = SwitchRuntime(model, experts, (ids, weights * m.scale), **options)
    try:
        yield model
    finally:
        runtime.close()


def _merge_by_torch(plan, expert_ids, weights, row, merged) -> None:
    """What `switch` does, by one product per linear, in the weights' own dtype."""
    ids, gates = expert_ids[row][0].long(), weights[row][0].to(plan.live[0].dtype)
    for live, pristine, a, b in zip(plan.live, plan.pristine, plan.banks_a, plan.banks_b):
        tall = (b[ids] * gates[:, None, None]).transpose(0, 1).flatten(1)
        torch.addmm(pristine, tall, a[ids].flatten(0, 1), out=live)


@contextmanager
def merge_all(model, m: Mixture) -> Iterator[Any]:
    """The switch without its kernel: the same merging, linear by linear, by torch."""
    with switch(model, m, merge=_merge_by_torch) as adapted:
        yield adapted


ROWS: dict[str, Callable] = {
    "backbone": backbone,
    "static_lora": static_lora,
    "layer_wise_linear": layer_wise_linear,
    "layer_wise_gather": layer_wise_gather,
    "layer_wise_mlp": layer_wise_mlp,
    "mixlora_package": mixlora_package,
    "layer_merge": layer_merge,
    "pre_gated": pre_gated,
    "merge_all": merge_all,
    "switch": switch,
}
NEEDS = {"static_lora": "peft", "mixlora_package": "mixlora"}


def missing_package(row: str) -> str | None:
    """The package that a row needs and that is not installed."""
    package = NEEDS.get(row)
    return package if package and importlib.util.find_spec(package) is None else None
