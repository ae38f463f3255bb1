"""The worker's adapters, behind the interface that vLLM's model runners have for LoRA.

Mixtures and plain LoRAs alike are experts on pages of 16 ranks (`pool.py`). A request names its
adapter by vLLM's `LoRARequest`; before each step the manager sees to it that the adapters of the
step lie on the device and says whose each token is (`page_step.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.adapters import split_path
from vllm_adafuse.serving.hosted import Hosted, Loader
from vllm_adafuse.serving.meter import Meter
from vllm_adafuse.serving.page_bank import PageBank
from vllm_adafuse.serving.page_step import LOST, NO_ADAPTER, PageStep
from vllm_adafuse.serving.paged_model import wrap_model
from vllm_adafuse.serving.pool import PAGE_RANKS, Place, Pool, Size, misfits, pool_size, total
from vllm_adafuse.serving.reads import Reads, Uploads
from vllm_adafuse.serving.rest import Rest
from vllm_adafuse.serving.wrap.hooks import also_after_reloading
from vllm_adafuse.serving.wrap.steps import watch

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")


def _raised_once(ask: Callable[..., bool]) -> Callable[..., bool]:
    """What an engine asks of all ranks, and all refuse by a ValueError or none: the last one alone
    raises it, the others say no. vLLM reads answers up to the first error, and would take those
    behind it for answers to what it asks next."""

    @functools.wraps(ask)
    def asked(*arguments: Any) -> bool:
        try:
            return ask(*arguments)
        except ValueError as e:
            if get_pp_group().is_last_rank and get_tp_group().is_last_rank:
                raise
            logger.error("AdaFuse: %s", e)
            return False

    return asked


class AdapterManager:
    """Stands where vLLM's `LRUCacheWorkerLoRAManager` does.

    Args:
        vllm_config: with a `lora_config`.
        device: of the model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        self.device, lora = device, vllm_config.lora_config
        self.max_loras, self.max_lora_rank = lora.max_loras, lora.max_lora_rank
        size = pool_size(self.max_loras, self.max_lora_rank)
        self.pool = Pool(replace(size, rests=self.max_loras))
        # Adapters whose tensors are on the host; which, the front end decides (`holds.py`).
        self.hosted: dict[int, Hosted] = {}
        self.lost: dict[int, str] = {}
        # Read, and not all ready yet: how that begins, and what is left of it.
        self.coming: dict[int, tuple[Callable[[], Iterator[None]], Iterator[None]]] = {}
        # Of the last step with adapters, and those that steps know the pages of.
        self.active: set[int] = set()
        self.listed: set[int] = set()
        self.dummies: set[int] = set()
        self.step: PageStep
        self.banks: list[PageBank]
        self.rest: Rest | None = None
        self.loader: Loader
        self.reads: Reads
        self.meter = Meter(vllm_config, self.pool.size.pages)
        self.uploads: Uploads

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Gives a loaded model's linears pages; returns the model.

        Raises:
            AdapterError: none of them can have any.
        """
        self.step, self.banks = wrap_model(model, vllm_config, self.pool.size, self.device)
        if vllm_api.shares_lora(vllm_config):
            self.rest = Rest(model, vllm_config, self.device)
        self.loader = Loader(model, vllm_config, self.banks, self.rest)
        self.step.routers = self.loader.routers(self.step)
        self.reads = Reads(self.loader, self.device)
        self.uploads = Uploads(self.loader, self.step, self.device)
        self.uploads.rehearse()
        watch(model, self.step)
        also_after_reloading(model, self.stamp_again)
        pages = self.pool.size.pages
        logger.info(
            "AdaFuse: LoRA requests are served on a pool of %d pages of %d ranks in %d projections "
            "(--max-loras %d x --max-lora-rank %d): %d bytes%s, and %d of passports; all pages free",
            pages, PAGE_RANKS, len(self.banks), self.max_loras, self.max_lora_rank,
            sum(bank.nbytes for bank in self.banks), " in fp8" * self.banks[0].fp8,
            self.step.table_ids.nbytes + self.step.table_weights.nbytes,
        )  # fmt: skip
        return model

    # Adapters come and go.

    @_raised_once
    def add_adapter(self, request: Any) -> bool:
        """Reads an adapter beside the steps, unless it is there; returns whether it is there now.

        Whoever sent a stamped request (`serving/adapters.py`) asks again until it is; an error is
        raised when it is known. For others it is read at once.

        Raises:
            AdapterError: it cannot be served; what is there stays as it is.
        """
        lost = self.lost.get(request.lora_int_id)
        if not vllm_api.everywhere(lost is None):
            raise AdapterError(
                f"adapter {request.lora_name}",
                [
                    f"{lost or 'another rank has lost it'}; requests were under way then, and what "
                    "they left in the KV cache is not this adapter's: load it under another name"
                ],
            )
        return self._add(request, wait=split_path(request.lora_path)[1] is None)

    def _add(self, request: Any, wait: bool, in_step: bool = False) -> bool:
        adapter = request.lora_int_id
        if adapter in self.hosted and not request.load_inplace:
            return True
        self.meter.begin(adapter)
        coming = self.coming.pop(adapter, None)
        if coming is None:
            hosted = self._read(request, wait, in_step)
            if hosted is None:
                return False
            begin = functools.partial(self._take_in, request, hosted, in_step)
            coming = begin, begin()
        for _ in coming[1]:
            if not wait:
                self.coming[adapter] = coming
                return False
        return True

    def _read(self, request: Any, wait: bool, in_step: bool) -> Hosted | None:
        """An adapter from its files; None while they are read.

        Raises:
            AdapterError: it cannot be served, or another rank says so.
        """
        adapter = request.lora_int_id
        read, everywhere = self.reads.start(adapter, request.lora_path), vllm_api.everywhere
        # Ranks that read their own copies of the files go the same way.
        if not everywhere(wait or read.done(), in_step):
            return None
        self.reads.forget(adapter)
        hosted, error = None, None
        try:
            hosted = read.result()
            if problems := misfits(hosted.size, self.max_loras, self.max_lora_rank):
                raise AdapterError(f"adapter {request.lora_name}", problems)
        except AdapterError as e:
            error = e
        if not everywhere(error is None, in_step):
            self.meter.failed(adapter)
            raise error or AdapterError(
                f"adapter {request.lora_name}",
                [f"{request.path}: another rank could not read it; its log says why"],
            )
        return hosted

    def _take_in(self, request: Any, hosted: Hosted, in_step: bool) -> Iterator[None]:
        """Makes what was read ready for steps, a little at a time: a step that waits for a whole
        vocabulary's passports is seen by everybody's users."""
        adapter = request.lora_int_id
        yield from self.loader.stamp(hosted)
        left = self.meter.leave_table(split_path(request.lora_path)[1] or "", hosted)
        # One rank alone writes. Those that share its layers wait: should weights be reloaded now, all of
        # them stamp at the same time, or none.
        while not (in_step or vllm_api.everywhere(left.done(), in_step=True)):
            yield
        self._release(adapter)
        self.hosted[adapter] = hosted
        self.meter.loaded(request, hosted)
        if not in_step:
            self._place_beside(adapter)
        logger.info(
            "AdaFuse: adapter %s (%s) is loaded: %s, %d pages, %d bytes on the host",
            request.lora_name, request.path, hosted.kind, hosted.size.pages, hosted.nbytes,
        )  # fmt: skip

    def stamp_again(self) -> None:
        """Makes the passports of all mixtures anew, and vLLM's slots: the backbone's weights are others,
        maybe after a sleep in which all went that is no buffer (see patches/reload.py)."""
        # Not read again: a later stage of a pipeline, which stamps nothing, may have it all by now, and
        # ranks read together.
        self.coming = {adapter: (begin, begin()) for adapter, (begin, _) in self.coming.items()}
        if self.step.routers is not None:
            self.loader.read_norm(self.step.routers)
        for adapter, hosted in self.hosted.items():
            for _ in self.loader.stamp(hosted):
                pass
            self.meter.stamped(adapter, hosted)
            if (place := self.pool.placed.get(adapter)) is not None:
                self.uploads.finish(adapter)
                self.loader.write_passports(hosted, place, self.step)
        if self.rest:
            placed = {adapter: self.hosted[adapter].rest for adapter in self.pool.placed}
            self.rest.restore({a: rest for a, rest in placed.items() if rest is not None})

    def remove_adapter(self, adapter: int) -> bool:
        """Forgets an adapter; returns whether it was there."""
        self._release(adapter)
        self.reads.forget(adapter)
        self.coming.pop(adapter, None)
        self.pool.pinned.discard(adapter)
        self.meter.forgot(adapter)
        return self.hosted.pop(adapter, None) is not None

    def remove_all_adapters(self) -> None:
        """Forgets all adapters; behind dummy steps those of the steps alone."""
        if self.dummies:
            self.dummies.clear()
            self.step.has_adapters.fill_(False)
            if self.rest:
                self.rest.clear()
            return
        for adapter in [*self.hosted, *self.pool.placed, *self.coming]:
            self.remove_adapter(adapter)

    @_raised_once
    def pin_adapter(self, adapter: int) -> bool:
        """Keeps an adapter on the host, and on the device as long as steps can run so.

        Raises:
            ValueError: it is not there.
        """
        if adapter not in self.hosted:
            raise ValueError(f"Pinning failed. LoRA {adapter} is not registered.")
        self.pool.pinned.add(adapter)
        self._place_beside(adapter)
        return True

    def list_adapters(self) -> set[int]:
        """Ids of the adapters that are there."""
        return {*self.hosted, *self.dummies}

    # A step.

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any | None) -> None:
        """Prepares a step: as vLLM says it, token by token."""
        ids = np.asarray(mapping.index_mapping if mapping else (), dtype=np.int64)
        rows = np.asarray(mapping.prompt_mapping if mapping else (), dtype=np.int64)
        self.name_step(list(requests), ids, np.ones(len(ids), dtype=np.int32), rows)

    def name_step(
        self, requests: list[Any], ids: np.ndarray, counts: np.ndarray, rows: np.ndarray
    ) -> None:
        """Prepares a step.

        Args:
            requests: the step's LoRA requests.
            ids: [R] the `lora_int_id` of each request of the batch, 0 for none.
            counts: [R] tokens of each.
            rows: likewise the id of each row that logits are computed of.
        """
        self.step.has_adapters.fill_(bool(requests))
        if not requests:
            if self.rest:
                self.rest.clear()
            return
        slots = np.full(len(ids), NO_ADAPTER, dtype=np.int32)
        here = self._ensure({r.lora_int_id: r for r in requests})
        for adapter in {r.lora_int_id for r in requests} - self.dummies:
            slots[ids == adapter] = self.pool.placed[adapter].slot if adapter in here else LOST
        self.step.name(slots, counts)
        if self.rest and self.dummies:
            self.rest.name_dummies(self.dummies, np.repeat(ids, counts), rows)
        elif self.rest:
            adapters = {a for a in here if self.hosted[a].rest is not None}
            self.rest.name(adapters, np.repeat(ids, counts), rows)

    def _ensure(self, requests: dict[int, Any]) -> set[int]:
        """Has the adapters of a step on the device; returns those that are."""
        self.active = requests.keys() - self.dummies - self.lost.keys()
        wanted, taken = set(), Size(0)
        for adapter, request in requests.items():
            if adapter not in self.active:
                continue
            try:
                self._add(request, wait=True, in_step=True)
                taken += (size := self.hosted[adapter].size)
                if not taken.within(self.pool.size):  # of an engine whose scheduler is not vLLM's
                    raise AdapterError(f"adapter {request.lora_name}", [f"no room for {size}"])
            except AdapterError as e:
                self._lose(adapter, request, e)
            else:
                wanted.add(adapter)
        self._place(wanted)
        return wanted

    def _lose(self, adapter: int, request: Any, error: AdapterError) -> None:
        """Gives up an adapter that a running request names. Nobody could be told of an error here,
        so its requests say nothing from now on; others go on."""
        self.lost[adapter] = f"it could not be read when a request needed it ({error})"
        logger.error(
            "AdaFuse: requests of adapter %s get no sensible answer from now on, and no "
            "other's: %s", request.lora_name, error,
        )  # fmt: skip

    def _place(self, wanted: set[int]) -> None:
        """Has the adapters of a step on the device, all at once."""
        self._hold({adapter: self.hosted[adapter].size for adapter in sorted(wanted)})
        self.active = wanted
        for adapter in sorted(wanted - self.listed):
            hosted = self.hosted[adapter]
            self.uploads.finish(adapter)
            self.step.list(self.pool.placed[adapter], hosted.experts, hosted.scale, hosted.config)
            self.listed.add(adapter)

    def _place_beside(self, adapter: int) -> None:
        """Copies an adapter to the device while steps run, if there is room beside theirs; else it
        is copied when a step needs it."""
        stay = self.active | self.pool.pinned
        wanted = {a: p.size for a, p in self.pool.placed.items() if a in stay}
        wanted[adapter] = self.hosted[adapter].size
        if total(wanted.values()).within(self.pool.size):
            self._hold(wanted)

    def _hold(self, wanted: dict[int, Size]) -> None:
        before = dict(self.pool.placed)
        new = self.pool.hold(wanted)
        gone = before.keys() - self.pool.placed.keys()
        for adapter in gone:
            self._strike(adapter, before[adapter])
            self._remove_rest(before[adapter], adapter)
        if new:
            self.meter.moved(self.pool.taken.pages, len(new), len(gone))
        for adapter in new:
            place = self.pool.placed[adapter]
            self.uploads.start(adapter, self.hosted[adapter], place)
            taken = self.pool.taken.pages
            logger.info(
                "AdaFuse: adapter %d is on %d pages; of %d pages %d are taken, %d free", adapter,
                len(place.pages), self.pool.size.pages, taken, self.pool.size.pages - taken,
            )  # fmt: skip

    def _strike(self, adapter: int, place: Place) -> None:
        if adapter in self.listed:
            self.listed.remove(adapter)
            self.step.strike(place)

    def _release(self, adapter: int) -> None:
        place = self.pool.placed.get(adapter)
        if place is not None:
            self.pool.release(adapter)
            self._strike(adapter, place)
            self._remove_rest(place, adapter)
            self.meter.moved(self.pool.taken.pages)

    def _remove_rest(self, place: Place, adapter: int) -> None:
        if self.rest and place.rests:
            self.rest.remove(adapter)

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
