"""A Hugging Face causal LM, frozen, with a trainable mixture of LoRA experts on its linears."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.training import storage
from vllm_adafuse.training.config import MixtureConfig
from vllm_adafuse.training.health import check_loss
from vllm_adafuse.training.layers import ExpertGroup, Router
from vllm_adafuse.training.losses import at_least_one, routing_losses
from vllm_adafuse.training.placing import Decide, TellPadding, adapted, by_input


class AdaFuseModel(nn.Module):
    """The model to train. It is called, and answers, as the backbone is.

    Works under `transformers.Trainer`, accelerate, and in a plain loop:

        model = AdaFuseModel.from_backbone(backbone, MixtureConfig(num_experts=8, top_k=2))
        optimizer = torch.optim.AdamW(model.trainable(), lr=1e-3)
        for step, batch in enumerate(batches):
            model.set_progress(step / len(batches))
            model(**batch).loss.backward()
            ...
        model.save_pretrained("adapter")

    In training mode `loss` holds the auxiliary losses; in eval mode it is the backbone's own.
    `state_dict` is the adapter's tensors alone, under their names in the adapter format.

    Attributes:
        backbone: the frozen model; hooks on its linears add the deltas.
        mixture: what is trained.
        adapter_config: keys of adapter_config.json.
        groups: the experts, by shared input.
        routers: one (pre-gated), or one per block, or one per group.
        last_losses: of the last forward in training mode: "loss" (the backbone's), "balance",
            "z", detached.
        usage: float32 [R, E], sum of each expert's share per forward in training mode since
            `reset_usage`, over `usage_steps` forwards.
        forwards: how many there were in training mode.
        step: number of the optimizer step, from 1, where `watch` tells it.
        recent: input_ids of the last forwards in training mode, to name a batch by; the last one,
            unless it is replaced by a longer deque.
    """

    # The loss is scaled by num_items_in_batch, as transformers' own models do.
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        backbone: nn.Module,
        config: MixtureConfig,
        base_model: str | None = None,
        linears: list[str] | None = None,
    ):
        super().__init__()
        self.backbone, self.mixture = backbone.requires_grad_(False), config
        self.base_model = base_model or getattr(backbone.config, "_name_or_path", "") or "."
        shape = Backbone.from_hf_config(backbone.config, self.base_model)
        names = linears or adapted(config, shape)
        targets = sorted({name.rsplit(".", 1)[1] for name in names})
        self.adapter_config = config.to_adapter(self.base_model, targets)
        generator = torch.Generator().manual_seed(config.seed)
        layers = backbone.model.layers
        self.routers, self.groups = nn.ModuleList(), nn.ModuleList()
        # Which tensor of the format belongs to which router's part, for storage.
        self.router_names: list[tuple[str, Router, int]] = []
        shared: Router | None = None
        if config.routing == "pre_gated":
            shared = Router(config, 1, shape.hidden_size, generator)
            self.routers.append(shared)
            self.router_names.append(("router", shared, 0))
            layer = layers[config.router_layer]
            layer.register_forward_pre_hook(Decide(shared, self._first_norm), with_kwargs=True)
            if config.router_context:
                backbone.model.register_forward_pre_hook(TellPadding(shared), with_kwargs=True)
        blocks: dict[str, Router] = {}
        for members in by_input(names):
            block = members[0].rsplit(".", 1)[0]
            own = config.routing == "layer_wise" and config.router_scope == "linear"
            sizes = [shape.linears[name] for name in members]
            if own:
                router = Router(config, len(members), sizes[0][0], generator)
                self.router_names += [(f"{n}.router", router, p) for p, n in enumerate(members)]
            elif config.routing == "layer_wise":
                if block not in blocks:
                    blocks[block] = router = Router(config, 1, shape.hidden_size, generator)
                    self.routers.append(router)
                    self.router_names.append((f"{block}.router", router, 0))
                    module = backbone.get_submodule(block)
                    module.register_forward_pre_hook(Decide(router), with_kwargs=True)
                router = blocks[block]
            else:
                router = shared
            group = ExpertGroup(config, members, sizes, router, own, generator)
            group.attach([backbone.get_submodule(name) for name in members])
            self.groups.append(group)
        self.all_routers = [m for m in self.modules() if isinstance(m, Router)]
        device = getattr(backbone, "device", torch.device("cpu"))
        self.routers.to(device)
        self.groups.to(device)
        self.last_losses: dict[str, torch.Tensor] = {}
        self.usage: torch.Tensor | None = None
        self.usage_steps = 0
        self.forwards, self.step = 0, None
        self.recent: deque[torch.Tensor | None] = deque(maxlen=1)
        self._enabled = True
        self.set_progress(0.0)

    @classmethod
    def from_backbone(
        cls, model: nn.Module, config: MixtureConfig | None = None, base_model: str | None = None
    ) -> AdaFuseModel:
        """Puts fresh experts on a backbone; its weights are frozen.

        Args:
            model: a causal LM of a supported architecture, in any dtype, also loaded in 4 or 8
                bit: linears are adapted through their forward.
            config: default `MixtureConfig()`.
            base_model: base_model_name_or_path to save; default where the model came from.

        Raises:
            AdapterError: the architecture is not supported, or a module or layer is not there.
        """
        return cls(model, config or MixtureConfig(), base_model)

    @classmethod
    def from_pretrained(cls, model: nn.Module, adapter: str | Path, **changes: Any) -> AdaFuseModel:
        """Puts a saved adapter on a backbone, to train it further or to look at it.

        Args:
            model: its backbone.
            adapter: the adapter's directory.
            **changes: options of `MixtureConfig` that the format does not store
                (balance_coef, jitter, …).

        Raises:
            AdapterError: a faulty adapter, or one that this class cannot train.
        """
        config, base_model, tensors = storage.read(adapter, changes)
        linears = [n.removesuffix(".lora_A") for n in tensors if n.endswith(".lora_A")]
        made = cls(model, config, base_model, linears)
        made.load_state_dict(tensors)
        return made

    def _first_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the pre-gated router reads of the state [..., hidden] entering its layer."""
        if self.mixture.router_input == "embedding":
            return hidden
        with torch.autocast(hidden.device.type, enabled=False):
            norm = self.backbone.model.layers[self.mixture.router_layer].input_layernorm
            return norm(hidden.float())

    # -- calls ---------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward with the experts' deltas.

        Args:
            input_ids: int64 [batch, length].
            attention_mask: [batch, length]; tokens with 0 do not count in the auxiliary losses.
            labels: int64 [batch, length], -100 for tokens without loss. Where no token has loss,
                the loss is 0.
            num_items_in_batch: labels of the whole step, over accumulation and ranks (Trainer
                gives it); the auxiliary losses are weighted accordingly.
            **kwargs: for the backbone.

        Returns:
            The backbone's own output.

        Raises:
            NotFinite: the loss is NaN or infinite, in training mode.
        """
        if labels is not None:
            learnt = (kwargs.get("shift_labels", labels[..., 1:]) != -100).sum()
            # Told the number, the backbone divides a sum by it; else it would divide 0 by 0.
            items = at_least_one(learnt if num_items_in_batch is None else num_items_in_batch)
            kwargs["num_items_in_batch"] = items
        if self.training:  # nothing reads the keys and values again
            kwargs.setdefault("use_cache", False)
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )
        if self.training and self._enabled:
            balance, z, usage = routing_losses(self.all_routers, attention_mask)
            self.usage = usage if self.usage is None else self.usage + usage
            self.usage_steps += 1
            if labels is not None:
                self.last_losses = {
                    "loss": output.loss.detach(), "balance": balance.detach(), "z": z.detach()
                }  # fmt: skip
                aux = self.mixture.balance_coef * balance + self.mixture.z_loss_coef * z
                if num_items_in_batch is not None:
                    aux = aux * (learnt / items)
                output.loss = output.loss + aux
                self.forwards += 1
                self.recent.append(input_ids)
                check_loss(self, output.loss)
        return output

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's `generate`, with the experts."""
        if self.mixture.router_context:  # the router keeps nothing of what is in a cache
            kwargs["use_cache"] = False
        return self.backbone.generate(*args, **kwargs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare backbone, as long as the `with` block lasts."""
        self._enabled = False
        for group in self.groups:
            group.enabled = False
        try:
            yield
        finally:
            self._enabled = True
            for group in self.groups:
                group.enabled = True

    # -- training ------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """The parameters to train: routers and experts."""
        return [p for p in self.parameters() if p.requires_grad]

    def parameter_groups(self, lr: float, router_lr: float | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer: experts, and routers at a rate of their own, without decay."""
        routers = [p for router in self.all_routers for p in router.parameters() if p.requires_grad]
        ids = {id(p) for p in routers}
        experts = [p for p in self.trainable() if id(p) not in ids]
        groups = [{"params": experts, "lr": lr}]
        if routers:
            groups.append({"params": routers, "lr": router_lr or lr, "weight_decay": 0.0})
        return groups

    def set_progress(self, progress: float) -> None:
        """Sets the temperature for a share of the training, 0 to 1; call it before each step."""
        for router in self.all_routers:
            router.temperature = self.mixture.temperature_at(progress)

    def reset_usage(self) -> None:
        """Forgets the expert usage counted so far."""
        self.usage, self.usage_steps = None, 0

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **options: Any
    ) -> None:
        """Saves memory: layers are computed again in the backward pass.

        Args:
            gradient_checkpointing_kwargs: for torch's `checkpoint`.
            **options: of the backbone's method of this name.

        Raises:
            AdapterError: `use_reentrant` is true; a route that all layers share needs the other
                kind, which keeps gradients of tensors from outside a layer.
        """
        how = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if how["use_reentrant"]:
            raise AdapterError(
                "gradient checkpointing",
                ["`use_reentrant` is true, expected false: all layers share one route; leave the "
                 "option out"],
            )  # fmt: skip
        self.backbone.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=how, **options
        )

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        self.backbone.gradient_checkpointing_disable()

    # -- what Trainer asks a model for -----------------------------------------------------------

    @property
    def config(self) -> Any:
        """The backbone's Hugging Face config."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone; routers and experts are trained in float32."""
        return self.backbone.dtype

    @property
    def quantization_method(self) -> Any:
        """Of the backbone; Trainer does not move models of bitsandbytes."""
        return getattr(self.backbone, "quantization_method", None)

    # -- storage -------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination=None, prefix: str = "", keep_vars=False):
        """The adapter's tensors, float32, by their names in the format; not the backbone's."""
        tensors = storage.tensors(self)
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        if destination is not None:
            destination.update(tensors)
            return destination
        return tensors

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Takes tensors as `state_dict` gives them.

        Raises:
            AdapterError: a tensor is missing, unknown or of another shape.
        """
        return storage.load(self, state_dict)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes the adapter's directory, as `vllm-adafuse check` and the server want it.

        Args:
            path: the directory; adapter files in it are replaced.
            dtype: of the experts; default the backbone's, in which they were multiplied and are
                served. Routers stay float32.

        Raises:
            AdapterError: the tensors do not make a valid adapter, as after a run that diverged.
        """
        return storage.save(self, path, dtype or self.dtype)
