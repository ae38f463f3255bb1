"""Buffers of a step whose requests name their adapters: written before it, read by all layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm_adafuse.kernels.page_routes import COLUMNS, EXPERT, OWNER, SCALE, TOP_K, page_routes
from vllm_adafuse.serving.pool import Place, Size
from vllm_adafuse.serving.routes import Route, SharedRotary, Step

# Slots of tokens whose request has no adapter, and of those whose adapter is lost.
NO_ADAPTER, LOST = -1, -2


class PageStep(Step):
    """A `Step` whose experts are the pages of a pool.

    Args:
        rows: N, of the largest step.
        size: of the pool.
        vocab_size: V, the rows of the passports.

    Attributes:
        has_adapters: [1] bool on the CPU. Ops read it when they run: a compiled model serves both
            kinds of steps, a captured graph the kind of its capture.
        slots: [N] int32, of each token the slot of its adapter, NO_ADAPTER or LOST.
        directory: [3 + C, pages] int32, see `page_routes`.
        table_ids, table_weights: [C, V] int32 and float32, the passports.
        rotary: the embedding that projections of queries and keys apply themselves; or None.
    """

    def __init__(self, rows: int, size: Size, vocab_size: int):
        super().__init__(rows, size.pages)
        self.rotary: SharedRotary | None = None
        # Not a buffer: those follow the model to its device.
        self.has_adapters = torch.zeros(1, dtype=torch.bool, device="cpu")
        directory = torch.full((COLUMNS + size.columns, size.pages), -1, dtype=torch.int32)
        tables = size.columns, vocab_size
        for name, tensor in (
            ("slots", torch.full((rows,), NO_ADAPTER, dtype=torch.int32)),
            ("directory", directory),
            ("table_ids", torch.zeros(tables, dtype=torch.int32)),
            ("table_weights", torch.zeros(tables, dtype=torch.float32)),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self._listed = np.full(directory.shape, -1, dtype=np.int32)
        self._named = 0
        self.cold = current_platform.is_cuda_alike()

    def name(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """Says whose the step's tokens are.

        Args:
            slots: [R] int32, of each request in the order of the batch.
            counts: [R], the tokens of each.
        """
        named = np.repeat(slots, counts).astype(np.int32, copy=False)
        # Rows past the step's are those of a captured graph's padding: nobody's.
        tokens = max(len(named), self._named)
        padded = np.full(tokens, NO_ADAPTER, dtype=np.int32)
        padded[: len(named)] = named
        _copy(self.slots[:tokens], padded)
        self._named = len(named)

    def list(self, place: Place, experts: Sequence[int], scale: float) -> None:
        """Enters an adapter into the directory; experts: whose each of its pages is; scale: of a
        plain LoRA."""
        listed, pages = self._listed, list(place.pages)
        listed[OWNER, pages], listed[EXPERT, pages] = place.slot, experts
        listed[TOP_K, place.slot] = len(place.columns)
        listed[SCALE, place.slot] = np.float32(scale).view(np.int32)
        listed[COLUMNS : COLUMNS + len(place.columns), place.slot] = place.columns
        _copy(self.directory, listed)

    def strike(self, place: Place) -> None:
        """Takes an adapter out of the directory."""
        self._listed[OWNER, list(place.pages)] = -1
        _copy(self.directory, self._listed)

    def route(self, token_ids: torch.Tensor) -> None:
        """Writes the gates of a step of T tokens, from their ids [T]."""
        page_routes(
            token_ids, self.slots, self.directory, self.table_ids, self.table_weights,
            self.gates, self.active, self.semaphores,
        )  # fmt: skip

    def take_from(self, route: Route, tokens: int) -> None:
        """Leaves a mixture that is everybody's default to the requests that name no adapter: the
        others have no weights in its route."""
        if self.has_adapters.item():
            named = self.slots[:tokens] != NO_ADAPTER
            route.gates[:tokens].masked_fill_(named[:, None], 0)


def _copy(target: torch.Tensor, source: np.ndarray) -> None:
    """To the device without waiting for it; the source may change at once."""
    host = torch.from_numpy(source.copy())
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)
