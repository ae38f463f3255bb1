"""One stream in plain transformers at nearly the backbone's speed: AdaFuse's own setting.

Before each decoding step one launch merges the experts of the step's token into all adapted
weights (`kernels/switch.py`), and the model then runs as if there were no adapter: same modules,
same number of launches but one (arXiv 2603.11873, section 3). A prompt has many routes at once; it
runs unmerged, each linear adding the mixture of its tokens.

What a token's route is, is known without its context, so the routes of the whole vocabulary are
computed once and stay on the device: the token's id is all that a switch needs, and nothing is
read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm_adafuse.adapter import Adapter, load_adapter
from vllm_adafuse.architectures import find_architecture
from vllm_adafuse.backbone import Backbone
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.kernels.switch import FIELDS, SwitchBlocks, SwitchPlan, switch
from vllm_adafuse.merge import refuse_quantised
from vllm_adafuse.routing import OfflineRouter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SwitchMemory:
    """Bytes on the device beside the bare backbone's.

    Attributes:
        pristine: the second copy of every adapted weight, which keeps merging exact.
        experts: all experts, in the model's dtype.
        passports: routes of the vocabulary, expert ids and weights.
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
    backbone: Backbone, adapter: Adapter, dtype: torch.dtype, blocks: SwitchBlocks | None = None
) -> SwitchMemory:
    """What a `SwitchRuntime` will take beside the backbone, from shapes alone.

    Args:
        backbone: names and shapes.
        adapter: a checked adapter.
        dtype: of the model.
        blocks: the cut of the kernel.
    """
    blocks, size = blocks or SwitchBlocks(), dtype.itemsize
    shapes = [backbone.linears[name] for name in adapter.projections]
    rank_rows = adapter.config.num_experts * adapter.config.rank
    programs = sum(-(-o // blocks.rows) * -(-i // blocks.strip) for i, o in shapes)
    return SwitchMemory(
        pristine=sum(i * o for i, o in shapes) * size,
        experts=sum(rank_rows * (i + o) for i, o in shapes) * size,
        passports=backbone.vocab_size * adapter.config.top_k * (4 + 4),
        table=len(shapes) * FIELDS * 8 + programs * 4,
    )


class SwitchRuntime:
    """A transformers model whose adapter is merged anew for every token.

    `model` may be used in any way that transformers offers (`generate` with sampling, streamers,
    every kind of cache): the work is done by a hook before its forward. Calls with one token
    are merged, all others (prompts, batches, beams) run unmerged.

    Attributes:
        model: in eval mode.
        plan: its weights, pristine and live.
        expert_ids, weights: passports [V, k], int32 and float32 (LoRA's scale included).
        switches: launches so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        experts: dict[str, tuple[torch.Tensor, torch.Tensor]],
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        blocks: SwitchBlocks | None = None,
        merge: Callable = switch,
    ):
        """Takes over a loaded backbone; see `load` for the usual way.

        Args:
            model: the bare backbone on one device, not quantised.
            experts: full name of a linear -> A [E, r, in], B [E, out, r]; of any dtype and device.
            expert_ids: routes of the vocabulary, [V, k] int32.
            weights: theirs, [V, k] float32, LoRA's scale included.
            blocks: how the kernel cuts its work.
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
        self.plan = SwitchPlan.make(live, pristine, banks_a, banks_b, blocks)
        self.expert_ids = expert_ids.to(device).contiguous()
        self.weights = weights.to(device).contiguous()
        self._gates: torch.Tensor | None = None
        self._merged: torch.Tensor | None = None
        self._hooks: list[Any] = []
        self._is_merged = False
        self._entrance = model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._unmerge()

    @classmethod
    def load(
        cls,
        base: str | Path,
        adapter: str | Path,
        blocks: SwitchBlocks | None = None,
        **kwargs: Any,
    ) -> SwitchRuntime:
        """Loads a backbone with an adapter on it.

        Args:
            base: the backbone's directory.
            adapter: the adapter's directory; it is checked as `vllm-adafuse check` does.
            blocks: how the kernel cuts its work.
            **kwargs: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

        Raises:
            AdapterError: faults of the adapter; one that routes by layer or from a later layer;
                a quantised backbone, or one spread over several devices.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        checked = load_adapter(adapter, Backbone.from_path(str(base)))
        _refuse_routing(checked)
        refuse_quantised(str(base), AutoConfig.from_pretrained(base).to_dict())
        # Transformers' other attentions leave out Gemma-2's softcap.
        kwargs.setdefault("attn_implementation", "eager")
        model = AutoModelForCausalLM.from_pretrained(base, **kwargs).eval()
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) > 1:
            found = f"it lies on {', '.join(devices)}, expected one device"
            raise AdapterError(f"backbone {base}", [f"{found}; pass device_map='cuda:0'"])
        ids, gates = passports(checked, base, model)
        weights = gates * torch.tensor(checked.config.scales)[ids.long()]
        with checked.reader() as read:
            experts = {
                name: tuple(read(f"{name}.lora_{side}").to(model.device) for side in "AB")
                for name in checked.projections
            }
        return cls(model, experts, ids, weights, blocks)

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
            passports=self.expert_ids.nbytes + self.weights.nbytes,
            table=plan.table.nbytes + plan.places.nbytes,
        )

    def close(self) -> None:
        """Gives the model back as the bare backbone it was."""
        self._unmerge()
        for hook in (*self._hooks, self._entrance):
            hook.remove()
        self._hooks = []

    def _before(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                "switch: the model was called without input_ids; a token's route follows from "
                "its id, so prompts given as embeddings need mode='mixture'"
            )
        if ids.numel() == 1:
            # A copy: the caller may write the next token into the same memory.
            row = ids.reshape(1).clone()
            self._switch(self.plan, self.expert_ids, self.weights, row, self._merged)
            self._merged, self.switches = row, self.switches + 1
            self._merge()
        else:
            self._unmerge()
            experts = self.plan.banks_a[0].shape[0]
            gates = self.weights.new_zeros(*ids.shape, experts)
            self._gates = gates.scatter(-1, self.expert_ids[ids].long(), self.weights[ids])

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


def _refuse_routing(adapter: Adapter) -> None:
    config, found = adapter.config, None
    if config.layer_wise:
        found = "`routing` is layer_wise: each layer decides anew, when its input is there"
    elif config.router_layer:
        found = (
            f"`router.layer` is {config.router_layer}: its decision needs the layers below, but "
            "the switch comes before the first"
        )
    if found:
        raise AdapterError(
            f"adapter {adapter.path}",
            [f"{found}; the fused switch needs a route per token id. Use mode='mixture'"],
        )
