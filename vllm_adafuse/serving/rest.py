"""What of an adapter has no pages: vLLM's own LoRA beside ours, restricted to the modules where we
put no experts (`--additional-config '{"adafuse": {"lora": "both"}}'`).

vLLM's manager wraps the embedding and the output head and has buffers of `max_loras` slots for each.
Which adapters lie there is ours to say (`pool.py`); which slot, and whose a step's tokens are to
vLLM's kernels, is its own bookkeeping. A step without such an adapter leaves all of it alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    LoRAMapping,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.adapters import AdaptedLinear
from vllm_adafuse.serving.fits import check_engine
from vllm_adafuse.serving.plain_loras import EMBEDDINGS, HEAD
from vllm_adafuse.serving.wrap.vllm_lora import decide_logits, unwrapped
from vllm_adafuse.text import some

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")
# The backbone's weights after a way through other dtypes: relative and absolute.
_SAME = 1e-2, 1e-5
_COMPARED_ROWS = 1 << 13


class Rest:
    """The modules of a model that vLLM's own LoRA adapts.

    Args:
        model: loaded; modules of it are replaced by vLLM's wrappers.
        vllm_config: of the engine.
        device: of the model.

    Raises:
        AdapterError: this engine cannot have it.
    """

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device):
        check_engine(vllm_config)
        self.max_rank = vllm_config.lora_config.max_lora_rank
        self._dtype = vllm_config.lora_config.lora_dtype
        self._most = vllm_config.scheduler_config.max_num_batched_tokens
        self._modules = _Modules(model, vllm_config, device)
        self._rows: int | None = 0
        self._named = True
        self.clear()
        for module in self._modules.modules.values():
            if isinstance(module, LogitsProcessorWithLoRA):
                decide_logits(module, self._adapts)
        logger.info(
            "AdaFuse: vLLM's own LoRA takes what adapters have of %s: %d bytes of slots",
            ", ".join(self._modules.modules) or "nothing", self._modules.nbytes,
        )  # fmt: skip

    def misfits(self, wanted: Mapping[str, AdaptedLinear]) -> list[str]:
        """Why an adapter's rest cannot be served here.

        Args:
            wanted: of each module, by vLLM's name, what the adapter has.
        """
        problems, modules = [], self._modules.modules
        if unknown := wanted.keys() - modules.keys():
            problems.append(
                f"adapts {some(sorted(unknown))}, which takes no adapter of vLLM's here (there are: "
                f"{', '.join(modules) or 'none'}); train without it, or serve it on its own backbone"
            )
        for name, linear in wanted.items():
            size = _size_of(modules[name]) if name in modules else None
            if size is not None and size != (linear.size_in, linear.size_out):
                problems.append(
                    f"{name}: adapts {linear.size_in} inputs and {linear.size_out} outputs, the "
                    f"backbone's has {size[0]} and {size[1]}; serve it on its own backbone"
                )
        return problems

    def changes(self, name: str, weight: torch.Tensor) -> bool:
        """Whether weights that an adapter has of the backbone's own [V, H] are others than those that
        are served.

        Args:
            name: of the module, vLLM's.
        """
        layer = unwrapped(self._modules.model.get_submodule(name))
        if (served := vllm_api.vocab_weight(layer)) is None:
            logger.warning("AdaFuse: %s is quantised, so the adapter's is not compared", name)
            return False
        own = layer.shard_indices
        if tuple(weight.shape) != (layer.org_vocab_size, served.shape[1]):
            return True
        weight = weight[own.org_vocab_start_index : own.org_vocab_end_index]
        for start in range(0, len(weight), _COMPARED_ROWS):
            part = weight[start : start + _COMPARED_ROWS].to(served.device)
            same = served[start : start + len(part)].float()
            if not torch.allclose(part.float(), same, *_SAME):
                return True
        return False

    def pack(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]) -> LoRAModel:
        """An adapter's rest as vLLM keeps it on the host.

        Args:
            pairs: of each module, by vLLM's name, A [r, in], B [out, r] and the scale of B A.
        """
        loras = {}
        for name, (a, b, scale) in pairs.items():
            # Like ours: the scale rounds once, with B.
            own = a.to(self._dtype, copy=True), (b.float() * scale).to(self._dtype)
            loras[name] = LoRALayerWeights(name, len(a), len(a), *own, scaling=1.0)
        return self._modules.merged(LoRAModel(1, max(map(_rank, loras.values())), loras))

    def put(self, adapter: int, lora: LoRAModel) -> None:
        """Copies an adapter into a slot, of which one is free, on the current stream."""
        lora.id = adapter
        self._modules.put(lora)

    def remove(self, adapter: int) -> None:
        """Frees an adapter's slot."""
        self._modules.remove_adapter(adapter)

    def name(self, adapters: Iterable[int], tokens: np.ndarray, rows: np.ndarray) -> None:
        """Says whose a step's tokens are.

        Args:
            adapters: of the step, those that have a slot.
            tokens: [T] the adapter of each token, 0 for none.
            rows: [L] likewise of each row that logits are computed of.
        """
        if not (here := sorted(adapters)):
            return self.clear()
        own = (np.where(np.isin(ids, here), ids, 0).tolist() for ids in (tokens, rows))
        self._modules.map(*own)
        self._named, self._rows = True, len(rows)

    def name_dummies(self, ids: Iterable[int], tokens: np.ndarray, rows: np.ndarray) -> None:
        """As `name` for a dummy step, whose adapters are not there: whatever lies in the slots."""
        kept, names = self._modules.lora_index_to_id, sorted(ids)
        self._modules.lora_index_to_id = names + [None] * (len(kept) - len(names))
        try:
            self.name(names, tokens, rows)
        finally:
            self._modules.lora_index_to_id = kept
        self._rows = None  # of a dummy step's logits nobody asks whose they are

    def clear(self) -> None:
        """Says that no token of the steps from now on has an adapter here."""
        if self._named:
            # Of the longest step: embeddings look up where these say, also of none.
            self._modules.map([0] * self._most, [])
            self._named = False

    def _adapts(self, rows: int) -> bool:
        """Whether so many rows of logits are computed with adapters."""
        if self._named and self._rows not in (None, rows):
            raise RuntimeError(
                f"vllm-adafuse: logits of {rows} rows are asked for, the step has {self._rows}, so "
                "whose adapter each has is not known; this should be impossible, please report it"
            )
        return self._named


def rest_tensors(lora: LoRAModel) -> list[torch.Tensor]:
    """All tensors of an adapter's rest."""
    found = [side for own in lora.loras.values() for side in (own.lora_a, own.lora_b)]
    lists = (side if isinstance(side, list) else [side] for side in found)
    return [tensor for own in lists for tensor in own if tensor is not None]


def _rank(lora: LoRALayerWeights) -> int:
    return lora.rank


def _size_of(module: torch.nn.Module) -> tuple[int, int] | None:
    """(in, out) of what a wrapper adapts, as the adapter's tensors have it."""
    if isinstance(module, LogitsProcessorWithLoRA):
        return module.hidden_size, module.base_layer.org_vocab_size
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        return module.base_layer.org_vocab_size, module.base_layer.embedding_dim
    return None


class _Modules(LoRAModelManager):
    """vLLM's manager of the modules that get no pages; who lies in its slots is told from outside."""

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device):
        lora = copy.copy(vllm_config.lora_config)
        self._only = vllm_api.lora_targets(vllm_config)
        lora.max_loras += vllm_api.spare_lora_slots()
        lora.max_cpu_loras = max(lora.max_cpu_loras or 0, lora.max_loras)
        vllm_api.restrict_lora(lora, [*EMBEDDINGS, HEAD])
        scheduler = vllm_config.scheduler_config
        super().__init__(
            model=model, max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            vocab_size=vllm_config.model_config.get_vocab_size(), lora_config=lora,
            device=device, vllm_config=vllm_config,
        )  # fmt: skip

    def _match_target_modules(self, module_name: str) -> bool:
        leaf = module_name.rpartition(".")[2]
        if self._only is not None and {leaf, module_name}.isdisjoint(self._only):
            return False
        # Classes say which of them may be wrapped: of some the embedding is also the output head.
        return leaf in (*EMBEDDINGS, HEAD) and leaf in self.supported_lora_modules

    @property
    def nbytes(self) -> int:
        """Of the slots."""
        stacked = [
            tensor for module in self.modules.values()
            for own in (module.lora_a_stacked, module.lora_b_stacked)
            for tensor in (own if isinstance(own, (tuple, list)) else [own])
        ]  # fmt: skip
        return sum(tensor.nbytes for tensor in stacked)

    def merged(self, lora: LoRAModel) -> LoRAModel:
        """An adapter in the form of the slots; may be called beside steps."""
        self._create_merged_loras_inplace(lora)
        return lora

    def put(self, lora: LoRAModel) -> None:
        self._registered_adapters[lora.id] = lora
        self.activate_adapter(lora.id)

    def map(self, tokens: list[int], rows: list[int]) -> None:
        """Says whose a step's tokens and rows of logits are."""
        # Not vLLM's own test for an equal mapping: slots may have others in them.
        self._set_adapter_mapping(LoRAMapping(tuple(tokens), tuple(rows), is_prefill=True))
