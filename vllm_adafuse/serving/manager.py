"""The worker's adapters, behind the interface that vLLM's model runners have for LoRA.

Mixtures and plain LoRAs alike are experts on pages of 16 ranks (`pool.py`). A request names its
adapter by vLLM's `LoRARequest`; before each step the manager sees to it that the adapters of the
step lie on the device and says whose each token is (`page_step.py`).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.hosted import Hosted, Loader
from vllm_adafuse.serving.page_bank import PageBank
from vllm_adafuse.serving.page_step import LOST, NO_ADAPTER, PageStep, watch
from vllm_adafuse.serving.paged_model import wrap_model
from vllm_adafuse.serving.pool import PAGE_RANKS, Pool, Size, misfits, pool_size

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")


class AdapterManager:
    """Stands where vLLM's `LRUCacheWorkerLoRAManager` does.

    Args:
        vllm_config: with a `lora_config`.
        device: of the model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        self.device, lora = device, vllm_config.lora_config
        self.max_loras, self.max_cpu_loras = lora.max_loras, lora.max_cpu_loras or lora.max_loras
        self.max_lora_rank = lora.max_lora_rank
        self.pool = Pool(pool_size(self.max_loras, self.max_lora_rank))
        # Adapters whose tensors are on the host, the one used least recently first.
        self.hosted: OrderedDict[int, Hosted] = OrderedDict()
        # What every adapter takes that a request may still name, on the host or not.
        self.sizes: dict[int, Size] = {}
        self.lost: dict[int, str] = {}
        self.dummies: set[int] = set()
        self.step: PageStep
        self.banks: list[PageBank]
        self.loader: Loader

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Gives a loaded model's linears pages; returns the model.

        Raises:
            AdapterError: none of them can have any.
        """
        self.step, self.banks = wrap_model(model, vllm_config, self.pool.size, self.device)
        self.loader = Loader(model, vllm_config, self.banks)
        watch(model, self.step)
        pinned = getattr(model, "reload_adapter", None)  # of a mixture that is everybody's default
        model.reload_adapter = lambda: (pinned and pinned(), self.stamp_again())
        pages = self.pool.size.pages
        logger.info(
            "AdaFuse: LoRA requests are served on a pool of %d pages of %d ranks in %d projections "
            "(--max-loras %d x --max-lora-rank %d): %d bytes, and %d of passports; all pages free",
            pages, PAGE_RANKS, len(self.banks), self.max_loras, self.max_lora_rank,
            sum(bank.nbytes for bank in self.banks),
            self.step.table_ids.nbytes + self.step.table_weights.nbytes,
        )  # fmt: skip
        return model

    # Adapters come and go.

    def add_adapter(self, request: Any) -> bool:
        """Reads an adapter, unless it is there; returns whether it is there now.

        Raises:
            AdapterError: it cannot be served; what is there stays as it is.
        """
        adapter = request.lora_int_id
        if adapter in self.lost:
            raise AdapterError(
                f"adapter {request.lora_name}",
                [
                    f"{self.lost[adapter]}; requests were under way then, and what they left in "
                    "the KV cache is not this adapter's: load it under another name"
                ],
            )
        if adapter in self.hosted and not request.load_inplace:
            self.hosted.move_to_end(adapter)
            return True
        hosted, error = None, None
        try:
            hosted = self.loader.read(request.lora_path)
            self._check_fits(adapter, request.lora_name, hosted.size)
        except AdapterError as e:
            error = e
        # Ranks that read their own copies of the files go the same way.
        if not vllm_api.everywhere(error is None):
            raise error or AdapterError(
                f"adapter {request.lora_name}",
                [f"{request.path}: another rank could not read it; its log says why"],
            )
        self.loader.stamp(hosted)
        self._release(adapter)
        self.hosted[adapter], self.sizes[adapter] = hosted, hosted.size
        self.hosted.move_to_end(adapter)
        self._make_room_on_host({adapter})
        logger.info(
            "AdaFuse: adapter %s (%s) is loaded: %s, %d pages, %d bytes on the host",
            request.lora_name, request.path, hosted.kind, hosted.size.pages, hosted.nbytes,
        )  # fmt: skip
        return True

    def stamp_again(self) -> None:
        """Makes the passports of all mixtures anew: the backbone's weights are others (see
        patches/reload.py). Newer vLLM forgets all adapters besides, and reads them again."""
        for adapter, hosted in self.hosted.items():
            self.loader.stamp(hosted)
            if (place := self.pool.placed.get(adapter)) is not None:
                self.loader.write_passports(hosted, place, self.step)

    def _check_fits(self, adapter: int, name: str, size: Size) -> None:
        """Refuses what some batch of `max_loras` adapters could not be served with."""
        others = [own for other, own in self.sizes.items() if other != adapter]
        if problems := misfits(size, others, self.max_loras, self.max_lora_rank):
            raise AdapterError(f"adapter {name}", problems)

    def remove_adapter(self, adapter: int) -> bool:
        """Forgets an adapter; returns whether it was there."""
        self._release(adapter)
        self.pool.pinned.discard(adapter)
        self.sizes.pop(adapter, None)
        return self.hosted.pop(adapter, None) is not None

    def remove_all_adapters(self) -> None:
        """Forgets all adapters; behind dummy steps those of the steps alone."""
        if self.dummies:
            self.dummies.clear()
            self.step.active.fill_(False)
            return
        for adapter in [*self.hosted, *self.pool.placed]:
            self.remove_adapter(adapter)

    def pin_adapter(self, adapter: int) -> bool:
        """Keeps an adapter on the host and on the device, as long as steps can run so.

        Raises:
            ValueError: it is not there.
        """
        if adapter not in self.hosted:
            raise ValueError(f"Pinning failed. LoRA {adapter} is not registered.")
        self._place({adapter})
        self.pool.pinned.add(adapter)
        return True

    def list_adapters(self) -> set[int]:
        """Ids of the adapters that are there."""
        return {*self.hosted, *self.dummies}

    # A step.

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any | None) -> None:
        """Prepares a step: as vLLM says it, token by token."""
        ids = np.asarray(mapping.index_mapping if mapping else (), dtype=np.int64)
        self.name_step(list(requests), ids, np.ones(len(ids), dtype=np.int32))

    def name_step(self, requests: list[Any], ids: np.ndarray, counts: np.ndarray) -> None:
        """Prepares a step.

        Args:
            requests: the step's LoRA requests.
            ids: [R] the `lora_int_id` of each request of the batch, 0 for none.
            counts: [R] tokens of each.
        """
        self.step.active.fill_(bool(requests))
        if not requests:
            return
        slots = np.full(len(ids), NO_ADAPTER, dtype=np.int32)
        here = self._ensure({r.lora_int_id: r for r in requests})
        for adapter in {r.lora_int_id for r in requests} - self.dummies:
            slots[ids == adapter] = self.pool.placed[adapter].slot if adapter in here else LOST
        self.step.name(slots, counts)

    def _ensure(self, requests: dict[int, Any]) -> set[int]:
        """Has the adapters of a step on the device; returns those that are."""
        wanted = set()
        for adapter, request in requests.items():
            if adapter in self.dummies or adapter in self.lost:
                continue
            if adapter in self.hosted:
                self.hosted.move_to_end(adapter)
            elif not self._read_again(adapter, request):
                continue
            wanted.add(adapter)
        self._make_room_on_host(wanted)
        self._place(wanted)
        return wanted

    def _read_again(self, adapter: int, request: Any) -> bool:
        """Reads an adapter that a running request names. Nobody could be told of an error here, so
        its requests say nothing from now on; others go on."""
        try:
            return self.add_adapter(request)
        except AdapterError as e:
            self.lost[adapter] = f"it could not be read when a request needed it ({e})"
            logger.error(
                "AdaFuse: requests of adapter %s get no sensible answer from now on, and no "
                "other's: %s", request.lora_name, e,
            )  # fmt: skip
            return False

    def _place(self, wanted: set[int]) -> None:
        """Puts adapters on the device, all at once."""
        before = dict(self.pool.placed)
        new = self.pool.hold({adapter: self.hosted[adapter].size for adapter in sorted(wanted)})
        for adapter in before.keys() - self.pool.placed.keys():
            self.step.strike(before[adapter])
        for adapter in new:
            place, hosted = self.pool.placed[adapter], self.hosted[adapter]
            self.step.list(place, hosted.experts, hosted.scale)
            self.loader.write(hosted, place, self.step)
            taken = self.pool.taken.pages
            logger.info(
                "AdaFuse: adapter %d is on %d pages; of %d pages %d are taken, %d free", adapter,
                len(place.pages), self.pool.size.pages, taken, self.pool.size.pages - taken,
            )  # fmt: skip

    def _release(self, adapter: int) -> None:
        place = self.pool.placed.get(adapter)
        if place is not None:
            self.pool.release(adapter)
            self.step.strike(place)

    def _make_room_on_host(self, needed: set[int]) -> None:
        """Forgets tensors of adapters used least recently, as --max-cpu-loras says; they are read
        again when a request names them."""
        keep = needed | self.pool.pinned
        for adapter in [a for a in self.hosted if a not in keep]:
            if len(self.hosted) <= self.max_cpu_loras:
                return
            self._release(adapter)
            del self.hosted[adapter]

    # What vLLM runs before it serves.

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """An adapter without weights, for steps that only warm up, measure or capture."""
        self.dummies.add(request.lora_int_id)
        return True

    @contextlib.contextmanager
    def dummy_lora_cache(self):
        """Around calls of `add_dummy_lora`: nothing is made, so nothing is kept."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """The rank that `add_dummy_lora` is called with."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Whether what stands before a language model takes adapters."""
        return False
