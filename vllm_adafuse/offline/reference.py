"""The truth: an adapter on a plain Hugging Face model, by the format's formulas alone.

It shares no code with serving, reads the two files by itself, and is slow: every expert runs for
every token. Served tokens and logprobs must equal it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Past:
    """What a router with `router.context` was told of a batch of sequences; it lies in their cache
    of keys and values, so that each conversation has its own.

    Attributes:
        sums: [batch, E] float64, what the router says of their tokens, added up as it is remembered.
        counts: [batch, 1] float64, of how much that is; padding is none.
        tokens: those in the cache, padding included.
    """

    def __init__(self):
        self.sums: Any = 0.0
        self.counts: Any = 0.0
        self.tokens = 0

    @classmethod
    def of(cls, cache: Any) -> _Past:
        """Of the sequences in a cache; of none without one.

        Raises:
            ValueError: the cache holds tokens that the router has not seen in it.
        """
        held = 0 if cache is None else int(cache.get_seq_length())
        past = getattr(cache, "adafuse_past", None) if held else None
        told = past.tokens if past else 0
        if held != told:
            raise ValueError(
                f"the cache holds {held} tokens, of which the router was told {told}: with "
                "`router.context` a cache must be this model's own and not be cut; call it "
                "without past_key_values"
            )
        if past is None:
            past = cls()
            if cache is not None:
                cache.adafuse_past = past
                reorder = cache.reorder_cache

                def reorder_cache(order: torch.Tensor) -> None:  # of a beam search
                    reorder(order)
                    past.sums, past.counts = past.sums[order], past.counts[order]

                cache.reorder_cache = reorder_cache
        return past


class _Reference(torch.nn.Module):
    """Hooks on one model: routers decide the gates, adapted linears use them."""

    def __init__(self, model: PreTrainedModel, adapter: Path):
        super().__init__()
        config = json.loads((adapter / "adapter_config.json").read_text())
        config |= {f"router.{key}": value for key, value in config.get("router", {}).items()}
        self.config, self.dtype = config, model.dtype
        experts = config["num_experts"]
        ranks = config["r"] if isinstance(config["r"], list) else [config["r"]] * experts
        alphas = config["lora_alpha"]
        alphas = alphas if isinstance(alphas, list) else [alphas] * experts
        root = config.get("use_rslora", False)
        self.scales = [a / (math.sqrt(r) if root else r) for a, r in zip(alphas, ranks)]
        r = config.get("always_r", 1)
        self.always_scale = config.get("always_alpha", 0.0) / (math.sqrt(r) if root else r)
        self.tensors = load_file(adapter / "adapter_model.safetensors", device=str(model.device))
        # Pre-gated: [..., E]. Layer-wise: the same by the name of the router's linear or block.
        self.gates: Any = None
        self.attention_mask: torch.Tensor | None = None
        self.model = [model]  # in a list: not a submodule
        self.modules_by_name = dict(model.named_modules())
        if config.get("routing", "pre_gated") == "layer_wise":
            self.gates = {}
            self._hook_layers()
        else:
            self._hook_entrance()

    def _names(self, kind: str) -> list[str]:
        """Linears that have tensors `….{kind}_A`."""
        return sorted(n.rsplit(".", 1)[0] for n in self.tensors if n.endswith(f".{kind}_A"))

    def _pair(self, name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a linear, rounded to the model's dtype as a served model holds them."""
        a, b = (self.tensors[f"{name}.{kind}_{side}"] for side in "AB")
        return a.to(self.dtype).float(), b.to(self.dtype).float()

    def _decide(self, u: torch.Tensor, router: str, top_k: int) -> torch.Tensor:
        """Gates [..., E] of what a router reads, u [..., in]; "" is the router at the entrance."""
        return self._gates(self._logits(u.float(), router), top_k)

    def _logits(self, u: torch.Tensor, router: str) -> torch.Tensor:
        """W u + b in the dtype of u."""
        z = u @ self.tensors[f"{router}router.weight"].to(u.dtype).T
        if f"{router}router.bias" in self.tensors:
            z = z + self.tensors[f"{router}router.bias"].to(u.dtype)
        return z

    def _gates(self, z: torch.Tensor, top_k: int) -> torch.Tensor:
        """Gates of logits [..., E]."""
        if self.config.get("router.logits", "linear") == "abs":
            z = z.abs()
        z = z / self.config.get("router.temperature", 1.0)
        # Lower expert first among equals: argsort is stable.
        chosen = torch.argsort(-z, dim=-1, stable=True)[..., :top_k]
        if self.config.get("router.weights", "topk_softmax") == "topk_softmax":
            weights = torch.softmax(torch.gather(z, -1, chosen), dim=-1)
        else:
            weights = torch.gather(torch.softmax(z, dim=-1), -1, chosen)
        return torch.zeros_like(z).scatter(-1, chosen, weights)

    def _decide_by_past(self, u: torch.Tensor, cache: Any) -> torch.Tensor:
        """Gates [batch, T, E] of what the router reads, u [batch, T, hidden], and of its mean over
        each sequence so far: in float64, where padding counts for nothing, and no time passes."""
        told, seen, mask = _Past.of(cache), u.double(), self.attention_mask
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {mask.dim()} dimensions, expected [batch, length]: a router "
                "with `router.context` counts the tokens that it leaves in"
            )
        real = torch.ones_like(seen[..., 0]) if mask is None else mask[:, -u.shape[1] :].double()
        said = seen @ self.tensors["router.context.weight"].double().T * real[..., None]
        half_life, means = self.config.get("router.context_half_life"), []
        kept = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        for t in range(u.shape[1]):
            token = real[:, t, None]
            remembered = torch.where(token > 0, kept * token, 1.0)
            told.sums = remembered * told.sums + said[:, t]
            told.counts = remembered * told.counts + token
            means.append(told.sums / told.counts.clamp(min=1))
        told.tokens, mean = told.tokens + u.shape[1], torch.stack(means, 1)
        z = self._logits(seen, "") + self.config.get("router.context_scale", 1.0) * mean
        return self._gates(z, self.config["top_k"]).float()

    def _delta(self, x: torch.Tensor, expert: int, pair: tuple) -> torch.Tensor:
        """s_e B_e A_e x; a shared A has one entry."""
        a, b = pair
        a = a[0] if self.config.get("shared_A", False) else a[expert]
        return self.scales[expert] * ((x.float() @ a.T) @ b[expert].T)

    def _mix(self, x: torch.Tensor, y: torch.Tensor, gates: torch.Tensor, pair: tuple):
        delta = torch.zeros_like(y, dtype=torch.float32)
        for expert in range(gates.shape[-1]):
            delta += gates[..., expert, None] * self._delta(x, expert, pair)
        return (y.float() + delta).to(y.dtype)

    def _hook_entrance(self) -> None:
        layer = self.model[0].model.layers[self.config.get("router.layer", 0)]

        @torch.no_grad()
        def decide(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            e = args[0] if args else kwargs["hidden_states"]
            first_norm = self.config.get("router.input", "first_norm") == "first_norm"
            u = layer.input_layernorm(e.float()) if first_norm else e.float()
            if self.config.get("router.context"):
                self.gates = self._decide_by_past(u, kwargs.get("past_key_values"))
            else:
                self.gates = self._decide(u, "", self.config["top_k"])

        def keep_mask(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.attention_mask = kwargs.get("attention_mask")  # layers get another form of it

        self.model[0].model.register_forward_pre_hook(keep_mask, with_kwargs=True)

        layer.register_forward_pre_hook(decide, with_kwargs=True)
        for name in self._names("lora"):
            pair = self._pair(name, "lora")

            def hook(module, args, y, pair=pair):
                return self._mix(args[0], y, self.gates, pair)

            self.modules_by_name[name].register_forward_hook(hook)

    def _hook_layers(self) -> None:
        for name in self._names("always"):
            self._hook_always(name)
        of_linear = self.config.get("router.scope", "linear") == "linear"
        blocks = {name.rpartition(".")[0] for name in self._names("lora")}
        for block in () if of_linear else sorted(blocks):
            self._hook_block(block)
        for name in self._names("lora"):
            at_output = self.config.get("mix", "linear") == "ffn_output" and ".mlp." in name
            if not at_output:
                self._hook_linear(name, of_linear)

    def _top_k(self, name: str) -> int:
        top_k = self.config["top_k"]
        if isinstance(top_k, dict):
            return top_k["mlp" if ".mlp" in name else "self_attn"]
        return top_k[int(name.split(".")[2])] if isinstance(top_k, list) else top_k

    def _hook_always(self, name: str) -> None:
        a, b = self._pair(name, "always")

        def hook(module, args, y):
            return (y.float() + self.always_scale * (args[0].float() @ a.T @ b.T)).to(y.dtype)

        self.modules_by_name[name].register_forward_hook(hook)

    def _hook_linear(self, name: str, has_router: bool) -> None:
        pair, block = self._pair(name, "lora"), name.rpartition(".")[0]

        def hook(module, args, y):
            if has_router:
                self.gates[name] = self._decide(args[0], f"{name}.", self._top_k(name))
            return self._mix(args[0], y, self.gates[name if has_router else block], pair)

        self.modules_by_name[name].register_forward_hook(hook)

    def _hook_block(self, block: str) -> None:
        def decide(module, args, kwargs):
            u = args[0] if args else kwargs["hidden_states"]
            self.gates[block] = self._decide(u, f"{block}.", self._top_k(block))

        module = self.modules_by_name[block]
        module.register_forward_pre_hook(decide, with_kwargs=True)
        if self.config.get("mix", "linear") == "ffn_output" and block.endswith(".mlp"):
            module.register_forward_hook(
                lambda module, args, _: self._ffn_output(module, args[0], block)
            )

    def _ffn_output(self, mlp: torch.nn.Module, u: torch.Tensor, block: str) -> torch.Tensor:
        """Wd (Σ g_e h_e) + Σ g_e s_e Bd_e Ad_e h_e, with an activation h_e of every expert."""
        act = getattr(mlp, "act_fn", None) or mlp.activation_fn
        pairs = {
            name.rpartition(".")[2]: self._pair(name, "lora")
            for name in self._names("lora")
            if name.startswith(f"{block}.")
        }

        def up_to(leaf: str, expert: int) -> torch.Tensor:
            y = getattr(mlp, leaf)(u).float()
            return y + self._delta(u, expert, pairs[leaf]) if leaf in pairs else y

        gates = self.gates[block]
        mixed = delta = u.new_zeros(())
        for expert in range(gates.shape[-1]):
            if hasattr(mlp, "gate_up_proj"):
                gate, up = up_to("gate_up_proj", expert).chunk(2, -1)
            else:
                gate, up = up_to("gate_proj", expert), up_to("up_proj", expert)
            h, g = act(gate) * up, gates[..., expert, None]
            mixed = mixed + g * h
            if "down_proj" in pairs:
                delta = delta + g * self._delta(h, expert, pairs["down_proj"])
        return (mlp.down_proj(mixed.to(u.dtype)).float() + delta).to(u.dtype)


def load(base: str | Path, adapter: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a backbone with an adapter on it, in plain transformers and torch.

    Args:
        base: backbone, directory or hub name.
        adapter: adapter directory; see `vllm-adafuse check` for its faults.
        **kwargs: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

    Returns:
        The model in eval mode. `model.adafuse.gates` holds the gates [..., E] of the last call
        (zero for experts not chosen; without LoRA's scale); with layer-wise routing it is a dict
        of them, by the name of the linear or block that has the router.
    """
    from transformers import AutoModelForCausalLM

    # Transformers' other attentions leave out Gemma-2's softcap.
    kwargs.setdefault("attn_implementation", "eager")
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **kwargs).eval()
    # Not a submodule: saving the model saves the backbone as it was.
    object.__setattr__(model, "adafuse", _Reference(model, Path(adapter)))
    return model


def generate(
    base: str | Path,
    adapter: str | Path,
    input_ids: torch.Tensor,
    *,
    mode: str = "mixture",
    model_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Loads a backbone with an adapter, and lets transformers generate.

    Args:
        base, adapter: as in `load`.
        input_ids: [1, T] prompt.
        mode: "mixture", this module's hooks; or "switch", AdaFuse's fused switch: experts merged
            into the weights anew for every token, as fast as the bare backbone but for one launch
            (`offline.switch_runtime.SwitchRuntime`, which can be kept for more prompts).
        model_options: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.
        **kwargs: of transformers' `generate`: max_new_tokens, do_sample, streamer, …

    Returns:
        [1, T + new] token ids.

    Raises:
        ValueError: no such mode.
        AdapterError: "switch" cannot serve this adapter or backbone.
    """
    if mode == "switch":
        from vllm_adafuse.offline.switch_runtime import SwitchRuntime

        runtime = SwitchRuntime.load(base, adapter, **model_options or {})
        return runtime.generate(input_ids, **kwargs)
    if mode != "mixture":
        raise ValueError(f"mode is {mode!r}, expected mixture or switch")
    model = load(base, adapter, **model_options or {})
    input_ids = input_ids.to(model.device)
    kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
    return model.generate(input_ids, **kwargs)
