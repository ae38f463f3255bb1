"""What of an adapter has no pages: vLLM's own LoRA beside ours, restricted to the modules where we
put no experts (`--additional-config '{"adafuse": {"lora": "both"}}'`).

vLLM's manager wraps the embedding, the output head and the backbone's own experts, and has buffers of
`max_loras` slots for each. Which adapters lie there is ours to say (`pool.py`); which slot, and whose a
step's tokens are to vLLM's kernels, is its own bookkeeping. A step without such an adapter leaves all of
it alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import (
    FusedMoEWithLoRA,
    LogitsProcessorWithLoRA,
    LoRAMapping,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.utils import is_in_target_modules
from vllm.utils.torch_utils import PIN_MEMORY
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.adapters import AdaptedLinear
from vllm_adafuse.serving.expert_loras import Pair, completed, sizes_of, takes_lora
from vllm_adafuse.serving.fits import check_engine
from vllm_adafuse.serving.plain_loras import EMBEDDINGS, EXPERTS, HEAD, VLLM_LORA, Heads
from vllm_adafuse.serving.wrap.vllm_lora import decide_head, decide_logits, unwrapped
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
            elif isinstance(module, vllm_api.classifier_wrapper()):
                decide_head(module, self._adapts)
        logger.info(
            "AdaFuse: vLLM's own LoRA takes what adapters have of %s: %d bytes of slots",
            self._there, self._modules.nbytes,
        )  # fmt: skip

    @property
    def _there(self) -> str:
        return some(list(self._modules.modules)) or "nothing"

    def misfits(self, wanted: Mapping[str, AdaptedLinear]) -> list[str]:
        """Why an adapter's rest cannot be served here.

        Args:
            wanted: of each module, by vLLM's name, what the adapter has.
        """
        problems, sizes = [], self._modules.sizes
        if unknown := wanted.keys() - sizes.keys():
            problems.append(
                f"adapts {some(sorted(unknown))}, which takes no adapter of vLLM's beside ours here "
                f"(what does: {self._there}); train without it, or let vLLM's own LoRA try all "
                f"({VLLM_LORA})"
            )
        for name, linear in wanted.items():
            size = sizes.get(name)
            if size is not None and size != (linear.size_in, linear.size_out):
                problems.append(
                    f"{name}: adapts {linear.size_in} inputs and {linear.size_out} outputs, the "
                    f"backbone's has {size[0]} and {size[1]}; serve it on its own backbone"
                )
        return problems

    def unfit_heads(self, wanted: Mapping[str, tuple[int, int]]) -> list[str]:
        """Why a classifier's heads that an adapter has whole cannot be served here.

        Args:
            wanted: of each, by vLLM's name, (in, labels).
        """
        problems, heads = [], self._modules.heads
        for name, (size_in, labels) in wanted.items():
            if name not in heads:
                problems.append(
                    f"replaces {name} (`modules_to_save`), which vLLM's own LoRA does in newer "
                    "versions, of classifiers of whole prompts alone: merge the adapter into a "
                    "backbone of its own (PEFT's merge_and_unload)"
                )
            elif size_in != heads[name].input_size:
                problems.append(
                    f"{name}: has {size_in} inputs, the backbone's has {heads[name].input_size}; "
                    "serve it on its own backbone"
                )
            elif labels > (most := heads[name].max_lora_cls_labels):
                problems.append(
                    f"{name}: has {labels} labels, and there is room for {most}: start with "
                    f"--max-lora-cls-labels {labels}"
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

    def pack(self, pairs: Mapping[str, Pair], heads: Heads) -> LoRAModel:
        """An adapter's rest as vLLM keeps it on the host.

        Args:
            pairs: of each module, by vLLM's name, A [r, in], B [out, r] and the scale of B A.
            heads: of each classifier's head, likewise, weight [labels, in] and bias [labels].
        """
        loras, every = {}, dict(pairs)
        for linears in self._modules.experts:
            if here := pairs.keys() & linears.keys():
                every |= completed({name: pairs[name] for name in here}, linears)
        for name, (a, b, scale) in every.items():
            # Like ours: the scale rounds once, with B.
            own = a.to(self._dtype, copy=True), (b.float() * scale).to(self._dtype)
            loras[name] = LoRALayerWeights(name, len(a), len(a), *own, scaling=1.0)
        lora = LoRAModel(1, max(map(_rank, loras.values()), default=1), loras)
        for name, (weight, bias) in heads.items():
            lora.modules_to_save[name] = vllm_api.full_weights(
                name, weight.to(self._dtype, copy=True), None if bias is None else bias.clone()
            )
        return self._modules.merged(lora)

    def put(self, adapter: int, lora: LoRAModel) -> None:
        """Copies an adapter into a slot, of which one is free, on the current stream."""
        lora.id = adapter
        self._modules.put(lora)

    def remove(self, adapter: int) -> None:
        """Frees an adapter's slot."""
        self._modules.remove_adapter(adapter)

    def restore(self, loras: Mapping[int, LoRAModel]) -> None:
        """Writes all anew that lies on the device: sleep may have taken it, of level 2.

        Args:
            loras: of the adapters that have a slot.
        """
        for module in self._modules.modules.values():
            for slot in range(self._modules.lora_slots):
                module.reset_lora(slot)
            if isinstance(module, FusedMoEWithLoRA):
                module.adapter_enabled.zero_()
            mapping = getattr(module, "sharded_to_full_mapping_gpu", None)
            if mapping is not None:
                mapping.copy_(torch.tensor(module.sharded_to_full_mapping))
        for adapter, lora in loras.items():
            self.remove(adapter)
            self.put(adapter, lora)
        self._named = True
        self.clear()

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
            self._modules.map_none(self._most)
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
    for head in vllm_api.whole_modules(lora):
        found += [head.weight, head.bias]
    lists = (side if isinstance(side, list) else [side] for side in found)
    return [tensor for own in lists for tensor in own if tensor is not None]


def _rank(lora: LoRALayerWeights) -> int:
    return lora.rank


def _sizes_of(name: str, module: torch.nn.Module, linears: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of what a wrapper adapts, by vLLM's name, (in, out) as the adapter's tensors have it."""
    if isinstance(module, FusedMoEWithLoRA):
        return sizes_of(module, linears)
    if isinstance(module, LogitsProcessorWithLoRA):
        return {name: (module.hidden_size, module.base_layer.org_vocab_size)}
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        return {name: (module.base_layer.org_vocab_size, module.base_layer.embedding_dim)}
    if isinstance(module, vllm_api.classifier_wrapper()):
        return {name: (module.input_size, module.output_size)}
    raise vllm_api.moved(f"vLLM adapts {name} by {type(module).__name__}, which is not known here")


class _Modules(LoRAModelManager):
    """vLLM's manager of the modules that get no pages; who lies in its slots is told from outside."""

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device):
        lora = copy.copy(vllm_config.lora_config)
        self._only = vllm_api.lora_targets(vllm_config)
        lora.max_loras += vllm_api.spare_lora_slots()
        lora.max_cpu_loras = max(lora.max_cpu_loras or 0, lora.max_loras)
        vllm_api.restrict_lora(lora, [*EMBEDDINGS, HEAD, EXPERTS])
        scheduler = vllm_config.scheduler_config
        super().__init__(
            model=model, max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            vocab_size=vllm_config.model_config.get_vocab_size(), lora_config=lora,
            device=device, vllm_config=vllm_config,
        )  # fmt: skip

        by_name = {
            name: _sizes_of(name, module, self.packed_modules.get(name, ()))
            for name, module in self.modules.items()
        }
        self.sizes = {linear: size for own in by_name.values() for linear, size in own.items()}
        # A classifier's head that may be replaced.
        self.heads = {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, vllm_api.classifier_wrapper())
            and self._pooling_task != "token_classify"
        }
        # Of each block of experts, those of its linears.
        self.experts = [
            by_name[name]
            for name, module in self.modules.items()
            if isinstance(module, FusedMoEWithLoRA)
        ]

    def _match_target_modules(self, module_name: str) -> bool:
        leaf = module_name.rpartition(".")[2]
        if not is_in_target_modules(module_name, self._only, self.packed_modules_mapping):
            return False
        # Classes say which of them may be wrapped: of some the embedding is also the output head.
        if leaf in (*EMBEDDINGS, HEAD):
            return leaf in self.supported_lora_modules
        return leaf == EXPERTS and self._takes_expert(self.model.get_submodule(module_name))

    def _takes_expert(self, module: torch.nn.Module) -> bool:
        """Whether these are experts with a pair of their own on each linear."""
        together = vllm_api.shares_expert_loras(self.lora_config)
        return not (self._is_3d_moe_model or together) and takes_lora(module)

    @property
    def nbytes(self) -> int:
        """Of the slots."""
        stacked = [
            tensor for module in self.modules.values()
            for own in (
                module.lora_a_stacked, module.lora_b_stacked,
                getattr(module, "full_weight_stacked", ()),
            )
            for tensor in (own if isinstance(own, (tuple, list)) else [own])
        ]  # fmt: skip
        return sum(tensor.nbytes for tensor in stacked)

    def merged(self, lora: LoRAModel) -> LoRAModel:
        """An adapter in the form of the slots; may be called beside steps."""
        if lora.loras:
            self._create_merged_loras_inplace(lora)
        elif PIN_MEMORY:
            for head in lora.modules_to_save.values():
                head.pin_memory()
        return lora

    def put(self, lora: LoRAModel) -> None:
        self._registered_adapters[lora.id] = lora
        self.activate_adapter(lora.id)

    def map(self, tokens: list[int], rows: list[int]) -> None:
        """Says whose a step's tokens and rows of logits are."""
        # Not vLLM's own test for an equal mapping: slots may have others in them.
        self._set_adapter_mapping(LoRAMapping(tuple(tokens), tuple(rows), is_prefill=True))

    def map_none(self, tokens: int) -> None:
        """Says that no token has an adapter here.

        Args:
            tokens: of the longest step: embeddings look up where these say, also of none.
        """
        self.map([0] * tokens, [])
        for wrapper in self.punica_wrapper_mapping.values():
            # Kernels for experts ask it whose a token is, and vLLM leaves there what was.
            if (meta := getattr(wrapper, "token_mapping_meta", None)) is not None:
                meta.token_lora_mapping.fill_(-1)
