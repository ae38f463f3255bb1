"""Adapters on the host, as this rank will need them: read from their files, checked against the
model that is there."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.kernels.gate import Gate, gate
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.adapters import (
    LORA,
    OpenedAdapter,
    open_adapter,
    split_path,
)
from vllm_adafuse.serving.expert_loras import Pair
from vllm_adafuse.serving.fits import Fits
from vllm_adafuse.serving.page_bank import Packed, Packer, PageBank, sizes_of
from vllm_adafuse.serving.page_routers import PageRouters
from vllm_adafuse.serving.page_step import PageStep
from vllm_adafuse.serving.past import PastRouter
from vllm_adafuse.serving.plain_loras import VLLM_LORA, read_base, read_heads
from vllm_adafuse.serving.pool import Place, Size, pages_of_rank
from vllm_adafuse.serving.rest import Rest, rest_tensors
from vllm_adafuse.serving.routes import PASSPORT_CHUNK, Router, norm_factors
from vllm_adafuse.serving.wrap.vllm_lora import without_lora
from vllm_adafuse.text import some

# Pieces of a vocabulary that are stamped between two steps: some 3 ms on an H200.
PIECES_AT_ONCE = 8


@dataclass
class Hosted:
    """An adapter in host memory.

    Attributes:
        kind: "mixture" or "lora".
        size: what it takes of the pool.
        experts: of each of its pages, whose it is.
        packed: for each bank its share.
        config: of a mixture.
        router: of a mixture, the tensors of its router by name.
        passports: of a mixture, expert ids and weights [k, V]; of one that sees the past the bits
            of w, and c, [E, V] int32 and float32 (see `context_routes`).
        scale: of a LoRA, the weight of its pages.
        rest: of a LoRA what vLLM's own adds, its `LoRAModel`.
    """

    kind: str
    size: Size
    experts: list[int]
    packed: list[Packed | None]
    config: AdapterConfig | None = None
    router: dict[str, torch.Tensor] | None = None
    passports: tuple[torch.Tensor, torch.Tensor] | None = None
    scale: float = 1.0
    rest: Any = None

    @property
    def nbytes(self) -> int:
        tensors = [*(rest_tensors(self.rest) if self.rest else ()), *(self.passports or ())]
        return sum(of.nbytes for of in [*filter(None, self.packed), *tensors])


class Loader:
    """Reads adapters for a model.

    Args:
        model: wrapped.
        vllm_config: of the engine.
        banks: of the model.
        rest: what else takes adapters there, if anything does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vllm_config: VllmConfig,
        banks: list[PageBank],
        rest: Rest | None = None,
    ):
        self.model, self.banks, self.sizes, self.rest = model, banks, sizes_of(banks), rest
        self.model_config = vllm_config.model_config
        self.load_format = vllm_config.load_config.load_format
        self.renamed = vllm_api.renamed(model)
        self.fits = Fits(vllm_config)

    def read(self, path: str) -> Hosted:
        """Reads an adapter.

        Args:
            path: of a request, with the hash of its content or without.

        Raises:
            AdapterError: it cannot be served on this model, or its content is another.
        """
        plain_path, digest = split_path(path)
        opened = open_adapter(
            vllm_api.local_path(plain_path), self.fits.backbone, self.rest is not None
        )
        problems = self._misfits(opened)
        if digest is not None and digest != opened.digest:
            problems = [
                f"{opened.path}: its content has the hash {opened.digest[:16]}, the request is for "
                f"{digest[:16]}: the files changed since, or machines have different ones; load it "
                "again"
            ]
        if problems:
            raise AdapterError(f"adapter {opened.path}", problems)
        first_pages, experts = [], []
        for expert, rank in enumerate(opened.ranks):
            first_pages.append(len(experts))
            experts += [expert] * pages_of_rank(rank)
        experts += [0] * (opened.size.pages - len(experts))  # of one that has a rest alone
        packer = Packer(self.banks, first_pages, len(experts))
        plain = opened.kind == LORA
        # A mixture's scales are part of its passports. Of a LoRA the scale that most linears have
        # is its pages' weight: to multiply B would round it once more than PEFT does.
        common = 1.0
        if plain:
            scales = Counter(linear.scales[0] for linear in opened.linears.values())
            common = scales.most_common(1)[0][0] if scales else 1.0
        rest, router = {}, opened.router()  # before the iterator's end, which tells of changes
        for name, expert, a, b in opened.tensors():
            if name in opened.rest:
                rest[self.renamed(name)] = a[0], b[0], opened.rest[name].scales[0]
                continue
            if plain:
                b = b.float() * (opened.linears[name].scales[0] / common)
            packer.add(self._name(name), expert, a, b)
        return Hosted(
            opened.kind, opened.size, experts, packer.packed, opened.config, router,
            scale=common, rest=self._pack_rest(opened, rest) if opened.size.rests else None,
        )  # fmt: skip

    def _pack_rest(self, opened: OpenedAdapter, pairs: dict[str, Pair]) -> Any:
        heads = {}
        if opened.heads:
            heads = {self.renamed(name): head for name, head in read_heads(opened.path).items()}
            opened.check_unchanged()
        return self.rest.pack(pairs, heads)

    def _name(self, name: str) -> str:
        """A linear's name in vLLM's model."""
        renamed = self.renamed(name)
        return renamed if renamed in self.sizes else name

    def _misfits(self, opened: OpenedAdapter) -> list[str]:
        problems = []
        sizes = {name: self.sizes.get(self._name(name)) for name in opened.linears}
        unknown = [name for name, size in sizes.items() if size is None]
        if unknown and not self.fits.pipelined:  # a stage knows its own layers alone
            problems.append(
                f"adapts {some(unknown)}, which {type(self.model).__name__} has not, or not as a "
                f"linear that takes adapters here; train without it, or let vLLM's own LoRA try it "
                f"({VLLM_LORA})"
            )
        for name, size in sizes.items():
            found = opened.linears[name].size_in, opened.linears[name].size_out
            if size is not None and size != found:
                problems.append(
                    f"{name}: adapts a linear of {found[0]} inputs and {found[1]} outputs, the "
                    f"backbone's has {size[0]} and {size[1]}; serve it on its own backbone"
                )
        if opened.heads:
            heads = {self.renamed(name): size for name, size in opened.heads.items()}
            problems += self.rest.unfit_heads(heads)
        if opened.rest:
            rest = {self.renamed(name): linear for name, linear in opened.rest.items()}
            problems += self.rest.misfits(rest) or self._changed(opened)
        return problems + self.fits.problems(opened, warn=False)

    def _changed(self, opened: OpenedAdapter) -> list[str]:
        """PEFT saves an embedding and an output head whole beside a LoRA on them."""
        if self.load_format == "dummy":
            return []
        return [
            f"{name}.base_layer.weight: is another than the backbone's, which is all that is served "
            "under a LoRA; merge the adapter into a backbone of its own (PEFT's merge_and_unload)"
            for name, weight in read_base(opened.path)
            if name in opened.rest and self.rest.changes(self.renamed(name), weight)
        ]

    def routers(self, step: PageStep) -> PageRouters | None:
        """What decides by embeddings for a step, where this stage gets those and mixtures are taken."""
        if not vllm_api.has_embeddings(self.model_config) or self.fits.architecture is None:
            return None
        (rows, pages), text = step.gates.shape, self.model_config.hf_config
        with torch.device(step.slots.device):
            routers = PageRouters(rows, pages, text.hidden_size, text.rms_norm_eps)
        self.read_norm(routers)
        return routers

    @torch.no_grad()
    def read_norm(self, routers: PageRouters) -> None:
        """Gives routers the norm's factors, as they are now."""
        norm = self.model.model.layers[0].input_layernorm
        routers.norm_weight.copy_(norm_factors(norm, self.fits.architecture.norm_offset))

    @torch.no_grad()
    def rehearse_stamp(self) -> None:
        """Asks a router about nothing: kernels that a device has not met yet take it 0.1 s."""
        weight = self.banks[0].lora_b
        size = self.model_config.get_hidden_size()
        hidden, ones = weight.new_zeros(PASSPORT_CHUNK, size), weight.new_ones(size).float()
        of_two = ones.repeat(2, 1), None, ones, ones[:2]
        gate(hidden, Gate(*of_two, 1e-5, 1.0, 2, False))

    @torch.no_grad()
    def rehearse_write(self) -> None:
        """Writes zeros where no adapter is yet; see `rehearse_stamp`."""
        bank = self.banks[0]
        pages = torch.zeros(1, dtype=torch.int64).to(bank.lora_b.device, non_blocking=True)
        bank.write(pages, Packed.zeros(bank, 1))
        bank.write(pages, None)

    @torch.no_grad()
    def stamp(self, hosted: Hosted) -> Iterator[None]:
        """Asks a mixture's router about every token id, where the model is given those, in pieces
        between which steps may run; on all ranks of a pipeline stage together, piece by piece."""
        if hosted.config is None or not vllm_api.has_token_ids(self.model_config):
            return
        text = self.model_config.hf_config
        sizes = text.hidden_size, text.vocab_size, text.rms_norm_eps
        with torch.device(self.banks[0].lora_b.device):
            if hosted.config.router_context:
                router: Router = PastRouter(hosted.config, None, *sizes, None)
            else:
                router = Router(hosted.config, None, *sizes)
        router.load(hosted.router.__getitem__, "router.bias" in hosted.router)
        pieces = router.stamp(
            self.model.embed_input_ids, self.model.model.layers[0].input_layernorm,
            self.fits.architecture.norm_offset,
        )  # fmt: skip
        more = True
        while more:
            with without_lora(self.model):
                more = len(list(itertools.islice(pieces, PIECES_AT_ONCE))) == PIECES_AT_ONCE
            yield
        pinned = router.weight.is_cuda
        hosted.passports = tuple(
            t.pin_memory() if pinned else t for t in (c.cpu().contiguous() for c in router.columns)
        )

    def write(self, adapter: int, hosted: Hosted, place: Place, step: PageStep) -> None:
        """Puts an adapter on its pages, its passports into their columns and its rest into a slot,
        on the current stream."""
        device = step.slots.device
        pages = torch.tensor(place.pages).to(device, non_blocking=True)
        for bank, packed in zip(self.banks, hosted.packed):
            bank.write(pages, packed)
        self.write_passports(hosted, place, step)
        if hosted.config is not None and step.routers is not None:
            step.routers.put(pages, hosted.experts, hosted.config, hosted.router)
        if hosted.rest is not None:
            self.rest.put(adapter, hosted.rest)

    def write_passports(self, hosted: Hosted, place: Place, step: PageStep) -> None:
        """Puts a mixture's passports into its columns."""
        if hosted.passports is not None:
            for column, ids, weights in zip(place.columns, *hosted.passports):
                step.table_ids[column, : len(ids)].copy_(ids, non_blocking=True)
                step.table_weights[column, : len(ids)].copy_(weights, non_blocking=True)
