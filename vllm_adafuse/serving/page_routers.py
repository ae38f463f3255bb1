"""The routers of mixtures that requests choose, where vLLM hands a model embeddings
(`--enable-prompt-embeds`): a token may have no id then, so no passport."""

from __future__ import annotations

import torch
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.format.context_keys import CONTEXT_WEIGHT
from vllm_adafuse.kernels.gate import normed
from vllm_adafuse.kernels.live_route import CHUNK
from vllm_adafuse.kernels.page_routes import EXPERT, OWNER, TOP_K

# Rows of `numbers`.
BIAS, TEMPERATURE, SCALE, NORMED, SOFTMAX_FIRST, FIRST = range(6)
# Rows of `context`.
DIVISOR, FACTOR = range(2)


class PageRouters(torch.nn.Module):
    """All of them at once, in static buffers: each page has its expert's row.

    Args:
        rows: N, of the largest step.
        pages: P, of the pool.
        hidden_size: H.
        norm_eps: epsilon of the first layer's norm.

    Attributes:
        weight: [2 P, H] float32: of each page what its router reads the token by; behind them what
            it reads the past by, zeros where it sees none.
        norm_weight: [H] float32, factors of the first layer's norm.
        numbers: [6, P] float32, of each page its expert's bias and scale, its adapter's
            temperature, whether that reads the norm and softmaxes first (1 or 0), and whether it is
            the first of its expert's pages.
        context: [2, P] float64, temperature and context scale / temperature.
        w, c: [P, N] float32, of each page and token of the step the terms that `context_routes` takes.
        turns: [N] int32, places in the step, which stand for ids there.
    """

    def __init__(self, rows: int, pages: int, hidden_size: int, norm_eps: float):
        super().__init__()
        self.norm_eps = norm_eps
        for name, tensor in (
            ("weight", torch.zeros(2 * pages, hidden_size, dtype=torch.float32)),
            ("norm_weight", torch.ones(hidden_size, dtype=torch.float32)),
            ("numbers", torch.ones(6, pages, dtype=torch.float32)),
            ("context", torch.ones(2, pages, dtype=torch.float64)),
            ("w", torch.zeros(pages, rows, dtype=torch.float32)),
            ("c", torch.zeros(pages, rows, dtype=torch.float32)),
            ("turns", torch.arange(rows, dtype=torch.int32)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def put(
        self,
        pages: torch.Tensor,
        experts: list[int],
        config: AdapterConfig,
        tensors: dict[str, torch.Tensor],
    ) -> None:
        """Gives an adapter's pages their rows.

        Args:
            pages: [n] int64, on the device.
            experts: whose each of them is, in rising order.
            config: of the adapter.
            tensors: of its router, by their names in the file.
        """
        index = torch.tensor(experts)
        numbers = torch.zeros(6, len(experts), dtype=torch.float32)
        if (bias := tensors.get("router.bias")) is not None:
            numbers[BIAS] = bias[index].float()
        numbers[TEMPERATURE] = config.temperature
        numbers[SCALE] = torch.tensor(config.scales, dtype=torch.float32)[index]
        numbers[NORMED] = float(config.router_input == "first_norm")
        numbers[SOFTMAX_FIRST] = float(config.router_weights == "softmax_topk")
        numbers[FIRST] = (index.diff(prepend=index.new_full((1,), -1)) != 0).float()
        context = torch.full((2, len(experts)), config.temperature, dtype=torch.float64)
        context[FACTOR] = config.context_scale / config.temperature
        weight = tensors["router.weight"]
        past = tensors.get(CONTEXT_WEIGHT, torch.zeros_like(weight))
        for rows, at in ((weight, pages), (past, pages + self.numbers.shape[1])):
            self.weight.index_copy_(0, at, rows[index].float().to(pages.device))
        self.numbers.index_copy_(1, pages, numbers.to(pages.device))
        self.context.index_copy_(1, pages, context.to(pages.device))

    def decide(
        self, embeddings: torch.Tensor, slots: torch.Tensor, directory: torch.Tensor, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes the tokens of a step, each by its own adapter's router, as `gate` does; of those that
        see the past it writes w and c.

        Args:
            embeddings: [T, H], any float dtype, as they enter layer 0.
            slots: [T] int32, of each token the slot of its adapter, below 0 for none.
            directory: as `page_routes` takes it.
            columns: C, routes that are wanted at most.

        Returns:
            Expert ids [T, C'] int32 and weights [T, C'] float32, C' at most C; of a token whose
            adapter has k experts a token the first k, of others none, mean something.
        """
        number, at = self.numbers, slots.clamp(min=0)
        own = (directory[OWNER] == slots[:, None]) & (slots >= 0)[:, None] & (number[FIRST] != 0)
        logits = self._logits(embeddings).masked_fill_(~own, float("-inf"))
        # A stable sort, because topk promises no order among equals.
        ordered, pages = torch.sort(logits, dim=-1, descending=True, stable=True)
        ordered, pages = ordered[:, :columns], pages[:, :columns]
        place = torch.arange(ordered.shape[1], device=ordered.device)
        chosen = ordered.masked_fill(place >= directory[TOP_K, at][:, None], float("-inf"))
        among_all = torch.softmax(logits, -1).gather(1, pages)
        softmax_first = (number[SOFTMAX_FIRST, at] != 0)[:, None]
        weights = torch.where(softmax_first, among_all, torch.softmax(chosen, -1))
        return directory[EXPERT][pages], weights * number[SCALE][pages]

    def said(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What routers say of tokens that are past: c [P, T] of embeddings [T, H]."""
        return (self._products(embeddings)[1] * self.context[FACTOR]).t().float()

    def _products(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of embeddings [T, H] with what each page reads a token by, and the past: [T, P] float64."""
        weight = self.weight.double().t()
        plain, norm = (
            normed(hidden, factors, self.norm_eps).double() @ weight
            for factors in (None, self.norm_weight)
        )
        reads_norm = (self.numbers[NORMED] != 0).repeat(2)
        by_token, by_past = torch.where(reads_norm, norm, plain).chunk(2, dim=1)
        return by_token, by_past

    def _logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What each page's router says of each token, divided by its temperature: [T, P]; writes w
        and c."""
        bias, tokens = self.numbers[BIAS], len(embeddings)
        found = embeddings.new_empty(tokens, len(bias), dtype=torch.float32)
        for start in range(0, tokens, CHUNK):
            own = slice(start, min(start + CHUNK, tokens))
            product, past = self._products(embeddings[own])
            found[own] = product
            self.w[:, own] = ((product + bias) / self.context[DIVISOR]).t()
            self.c[:, own] = (past * self.context[FACTOR]).t()
        return found.add_(bias).div_(self.numbers[TEMPERATURE])
