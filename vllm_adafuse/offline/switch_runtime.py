"""One stream in plain transformers at nearly the backbone's speed: AdaFuse's own setting.

Before each decoding step one launch merges the experts of the step's token into all adapted
weights (`kernels/switch.py`), and the model then runs as if there were no adapter: same modules,
same number of launches but one (arXiv 2603.11873, section 3). A prompt has many routes at once; it
runs unmerged, each linear adding the mixture of its tokens.

Where the router reads the embedding, a token's route is known without its context: the routes of
the whole vocabulary are computed once and stay on the device, and the token's id is all that a
switch needs. Where it reads what enters a later layer (`router.layer`), it runs there, and the
switch follows it; layers below have no experts. Either way nothing is read back to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter, load_adapter, refuse_layer_wise
from vllm_adafuse.format.architectures import find_architecture
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.merge import refuse_quantised
from vllm_adafuse.format.pretrained import check_checkpoint, read_config
from vllm_adafuse.kernels.gate import Gate, gate
from vllm_adafuse.kernels.switch import FIELDS, SwitchConfig, SwitchPlan, switch
from vllm_adafuse.offline.routing import OfflineRouter, refuse_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Hidden states [T, H] -> expert ids [T, k] int32, weights [T, k] float32, LoRA's scale included.
Router = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SwitchMemory:
    """Bytes on the device beside the bare backbone's.

    Attributes:
        pristine: the second copy of every adapted weight, which keeps merging exact.
        experts: all experts, in the model's dtype.
        passports: routes of the vocabulary, expert ids and weights; 0 with a live router.
        table: pointers and sizes of the adapted weights.
    """

    pristine: int
    experts: int
    passports: int
    table: int

    @property
    def total(self) -> int:
        return self.pristine + self.experts + self.passports + self.table


def switch_memory(
    backbone: Backbone, adapter: Adapter, dtype: torch.dtype, config: SwitchConfig | None = None
) -> SwitchMemory:
    """What a `SwitchRuntime` will take beside the backbone, from shapes alone.

    Args:
        backbone: names and shapes.
        adapter: a checked adapter.
        dtype: of the model.
        config: of the kernel.
    """
    mixture, size = adapter.config, dtype.itemsize
    shapes = [backbone.linears[name] for name in adapter.projections]
    config = config or _default_config(backbone, adapter, dtype)
    rank_rows = mixture.num_experts * mixture.rank
    programs = sum(-(-o // config.rows) * -(-i // config.strip) for i, o in shapes)
    return SwitchMemory(
        pristine=sum(i * o for i, o in shapes) * size,
        experts=sum(rank_rows * (i + o) for i, o in shapes) * size,
        passports=0 if mixture.router_layer else backbone.vocab_size * mixture.top_k * (4 + 4),
        table=len(shapes) * FIELDS * 8 + programs * 4,
    )


def _default_config(backbone: Backbone, adapter: Adapter, dtype: torch.dtype) -> SwitchConfig:
    columns = adapter.config.top_k * adapter.config.rank
    sizes_in = [backbone.linears[name][0] for name in adapter.projections]
    return SwitchConfig.choose(dtype.itemsize, columns, sizes_in)


class SwitchRuntime:
    """A transformers model whose adapter is merged anew for every token.

    `model` may be used in any way that transformers offers (`generate` with sampling, streamers,
    every kind of cache): the work is done by a hook before its forward. Calls with one token
    are merged, all others (prompts, batches, beams) run unmerged.

    Attributes:
        model: in eval mode.
        plan: its weights, pristine and live.
        passports: routes of the vocabulary; None where the router runs in a layer.
        switches: launches so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: dict[str, tuple[torch.Tensor, torch.Tensor]],
        routes: tuple[torch.Tensor, torch.Tensor] | tuple[int, Router],
        config: SwitchConfig | None = None,
        merge: Callable = switch,
    ):
        """Takes over a loaded backbone; see `load` for the usual way.

        Args:
            model: the bare backbone on one device, not quantised.
            experts: full name of a linear -> A [E, r, in], B [E, out, r]; of any dtype and device.
            routes: the passports of the vocabulary, expert ids [V, k] int32 and weights [V, k]
                float32 with LoRA's scale; or a layer and the router of what enters it.
            config: how the kernel cuts its work.
            merge: what merges a route, with the arguments of `switch`.
        """
        self.model, self.switches, self._switch = model, 0, merge
        device, dtype = model.device, model.dtype
        modules = dict(model.named_modules())
        self._linears = [modules[name] for name in experts]
        banks_a, banks_b = (
            [pair[side].to(device, dtype).contiguous() for pair in experts.values()]
            for side in (0, 1)
        )
        pristine = [linear.weight.data.contiguous() for linear in self._linears]
        live = [torch.empty_like(w) for w in pristine]
        self.plan = SwitchPlan.make(live, pristine, banks_a, banks_b, config)
        self._gates: torch.Tensor | None = None
        self._merged: torch.Tensor | None = None
        self._hooks: list[Any] = []
        self._is_merged = False
        first, second = cast("tuple[Any, Any]", routes)
        entrance: Any
        decide: Callable
        self.passports: tuple[torch.Tensor, torch.Tensor] | None = None
        if isinstance(first, int):
            self._router, entrance, decide = second, model.model.layers[first], self._at_layer
        else:
            self.passports = first.to(device).contiguous(), second.to(device).contiguous()
            entrance, decide = model, self._at_entrance
        self._entrance = entrance.register_forward_pre_hook(decide, with_kwargs=True)
        self._unmerge()

    @classmethod
    def load(
        cls,
        base: str | Path,
        adapter: str | Path,
        config: SwitchConfig | None = None,
        **kwargs: Any,
    ) -> SwitchRuntime:
        """Loads a backbone with an adapter on it.

        Args:
            base: the backbone's directory.
            adapter: the adapter's directory; it is checked as `vllm-adafuse check` does.
            config: how the kernel cuts its work.
            **kwargs: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

        Raises:
            AdapterError: faults of the adapter, one that routes in every layer; a quantised
                backbone, or one spread over several devices.
        """
        from transformers import AutoModelForCausalLM

        backbone = Backbone.from_path(str(base))
        checked = load_adapter(adapter, backbone)
        refuse_layer_wise(
            checked, "each layer decides anew, when its input is there; the fused switch needs one "
            "route for all. Use mode='mixture'"
        )  # fmt: skip
        refuse_context(checked, "the fused switch merges by token id alone; use mode='mixture'")
        check_checkpoint(base)
        refuse_quantised(str(base), read_config(str(base)).to_dict())
        # Transformers' other attentions leave out Gemma-2's softcap.
        kwargs.setdefault("attn_implementation", "eager")
        model = AutoModelForCausalLM.from_pretrained(
            base, trust_remote_code=False, **kwargs
        ).eval()
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) > 1:
            found = f"it lies on {', '.join(devices)}, expected one device"
            raise AdapterError(f"backbone {base}", [f"{found}; pass device_map='cuda:0'"])
        if layer := checked.config.router_layer:
            routes = layer, live_router(checked, backbone, model)
        else:
            ids, gates = passports(checked, base, model)
            routes = ids, gates * torch.tensor(checked.config.scales)[ids.long()]
        with checked.reader() as read:
            experts = {
                name: tuple(read(f"{name}.lora_{side}").to(model.device) for side in "AB")
                for name in checked.projections
            }
        config = config or _default_config(backbone, checked, model.dtype)
        return cls(model, experts, routes, config)

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`transformers`' generate.

        Args:
            input_ids: [1, T] prompt (more rows run unmerged).
            **kwargs: of `GenerationMixin.generate`: max_new_tokens, do_sample, streamer, …

        Returns:
            [1, T + new] token ids, or what `return_dict_in_generate` asks for.
        """
        input_ids = input_ids.to(self.model.device)
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        # torch.compile would hold on to weights that change under it.
        kwargs.setdefault("disable_compile", True)
        return self.model.generate(input_ids, **kwargs)

    def memory(self) -> SwitchMemory:
        """Bytes held beside the bare backbone's."""
        plan = self.plan
        return SwitchMemory(
            pristine=sum(w.nbytes for w in plan.live),
            experts=sum(t.nbytes for t in (*plan.banks_a, *plan.banks_b)),
            passports=sum(t.nbytes for t in self.passports or ()),
            table=plan.table.nbytes + plan.places.nbytes,
        )

    def close(self) -> None:
        """Gives the model back as the bare backbone it was."""
        self._unmerge()
        for hook in (*self._hooks, self._entrance):
            hook.remove()
        self._hooks = []

    def _at_entrance(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the model: routes by the tokens' ids."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                "switch: the model was called without input_ids; a token's route follows from "
                "its id, so prompts given as embeddings need mode='mixture'"
            )
        if ids.numel() > 1:
            self._follow(self.passports, ids)
            return
        # A copy: the caller may write the next token into the same memory; and a slice of a
        # longer sequence has another alignment at every step, which Triton compiles anew.
        row = ids.reshape(1).clone()
        self._follow(self.passports, row)
        self._merged = row

    def _at_layer(self, layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the layer that the router reads: routes by hidden states."""
        hidden = args[0] if args else kwargs["hidden_states"]
        expert_ids, weights = self._router(hidden.flatten(0, -2))
        rows = torch.arange(len(expert_ids), device=hidden.device).view(hidden.shape[:-1])
        self._follow((expert_ids, weights), rows)

    def _follow(self, routes: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> None:
        """One row of the routes, ids and weights [N, k], is merged; several make gates for the
        mixture."""
        expert_ids, weights = routes
        if rows.numel() == 1:
            row = rows.reshape(1)
            self._switch(self.plan, expert_ids, weights, row, self._merged)
            self.switches += 1
            self._merge()
        else:
            self._unmerge()
            gates = weights.new_zeros(*rows.shape, self.plan.banks_a[0].shape[0])
            self._gates = gates.scatter(-1, expert_ids[rows].long(), weights[rows])

    def _merge(self) -> None:
        if not self._is_merged:
            for hook in self._hooks:
                hook.remove()
            for linear, w in zip(self._linears, self.plan.live):
                linear.weight.data = w
            self._hooks, self._gates, self._is_merged = [], None, True

    def _unmerge(self) -> None:
        if self._is_merged or not self._hooks:
            plan, self._is_merged = self.plan, False
            for linear, w in zip(self._linears, plan.pristine):
                linear.weight.data = w
            self._hooks = [
                linear.register_forward_hook(self._mixture(a, b))
                for linear, a, b in zip(self._linears, plan.banks_a, plan.banks_b)
            ]

    def _mixture(self, a: torch.Tensor, b: torch.Tensor) -> Callable:
        """y + Σ g_e B_e A_e x of each token, in float32 as the reference does."""
        rank = a.shape[1]

        def hook(module: torch.nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
            low = args[0].float() @ a.float().flatten(0, 1).T
            low = low * self._gates.repeat_interleave(rank, -1)
            delta = low @ b.float().transpose(0, 1).flatten(1).T
            return (y.float() + delta).to(y.dtype)

        return hook


def passports(
    adapter: Adapter, base: str | Path, model: PreTrainedModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes of the vocabulary for a model as it is loaded, in its dtype.

    Returns:
        Expert ids [V, k] int32, plain gates [V, k] float32, on the CPU.
    """
    router = OfflineRouter(adapter, base)
    # What the model's first layer gets is rounded to its dtype, which need not be the file's.
    router.embedding = router.embedding.to(model.dtype)
    if router.norm_weight is not None:
        offset = find_architecture(model.config.architectures, str(base)).norm_offset
        norm = model.model.layers[0].input_layernorm.weight
        router.norm_weight = norm.data.float().cpu() + offset
    return router.routes(torch.arange(router.vocab_size))


def live_router(adapter: Adapter, backbone: Backbone, model: PreTrainedModel) -> Router:
    """The router of an adapter whose `router.layer` is not the first."""
    config = adapter.config
    with adapter.reader() as read:
        weight = read("router.weight").float().to(model.device)
        has_bias = "router.bias" in adapter.tensors
        bias = read("router.bias").float().to(model.device) if has_bias else None
    norm = None
    if config.router_input == "first_norm":
        norm = model.model.layers[config.router_layer].input_layernorm.weight.data.float()
        norm = norm + backbone.architecture.norm_offset
    router = Gate(
        weight,
        bias,
        norm,
        scales=torch.tensor(config.scales, device=model.device),
        norm_eps=backbone.norm_eps,
        temperature=config.temperature,
        top_k=config.top_k,
        softmax_first=config.router_weights == "softmax_topk",
    )
    return functools.partial(gate, router=router)
