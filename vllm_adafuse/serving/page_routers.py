"""The routers of mixtures that requests choose, where vLLM hands a model embeddings
(`--enable-prompt-embeds`): a token may have no id then, so no passport."""

from __future__ import annotations

import torch
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.kernels.gate import normed
from vllm_adafuse.kernels.live_route import CHUNK
from vllm_adafuse.kernels.page_routes import EXPERT, OWNER, TOP_K

# Rows of `numbers`.
BIAS, TEMPERATURE, SCALE, NORMED, SOFTMAX_FIRST, FIRST = range(6)


class PageRouters(torch.nn.Module):
    """All of them at once, in static buffers: each page has its expert's row.

    Args:
        pages: P, of the pool.
        hidden_size: H.
        norm_eps: epsilon of the first layer's norm.

    Attributes:
        weight: [P, H] float32.
        norm_weight: [H] float32, factors of the first layer's norm.
        numbers: [6, P] float32, of each page its expert's bias and scale, its adapter's
            temperature, whether that reads the norm and softmaxes first (1 or 0), and whether it is
            the first of its expert's pages.
    """

    def __init__(self, pages: int, hidden_size: int, norm_eps: float):
        super().__init__()
        self.norm_eps = norm_eps
        for name, tensor in (
            ("weight", torch.zeros(pages, hidden_size)),
            ("norm_weight", torch.ones(hidden_size)),
            ("numbers", torch.ones(6, pages)),
        ):
            self.register_buffer(name, tensor.float(), persistent=False)

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
        numbers = torch.zeros(6, len(experts))
        if (bias := tensors.get("router.bias")) is not None:
            numbers[BIAS] = bias[index].float()
        numbers[TEMPERATURE] = config.temperature
        numbers[SCALE] = torch.tensor(config.scales)[index]
        numbers[NORMED] = float(config.router_input == "first_norm")
        numbers[SOFTMAX_FIRST] = float(config.router_weights == "softmax_topk")
        numbers[FIRST] = (index.diff(prepend=index.new_full((1,), -1)) != 0).float()
        self.weight.index_copy_(0, pages, tensors["router.weight"][index].float().to(pages.device))
        self.numbers.index_copy_(1, pages, numbers.to(pages.device))

    def decide(
        self, embeddings: torch.Tensor, slots: torch.Tensor, directory: torch.Tensor, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes the tokens of a step, each by its own adapter's router, as `gate` does.

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

    def _logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What each page's router says of each token, divided by its temperature: [T, P]."""
        found = embeddings.new_empty(len(embeddings), len(self.weight), dtype=torch.float32)
        weight = self.weight.double().t()
        for out, hidden in zip(found.split(CHUNK), embeddings.split(CHUNK)):
            plain, norm = (
                normed(hidden, factors, self.norm_eps).double() @ weight
                for factors in (None, self.norm_weight)
            )
            out.copy_(torch.where(self.numbers[NORMED] != 0, norm, plain))
        return found.add_(self.numbers[BIAS]).div_(self.numbers[TEMPERATURE])
