"""A text as tokens with their experts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_adafuse.format.pretrained import load_tokenizer
from vllm_adafuse.format.vocabulary import require_rows
from vllm_adafuse.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm_adafuse.format.adapter import Adapter

# What stands for a token that adds no character of its own: the later bytes of one.
CONTINUATION = "⋯"
# Tokens of the first of the spans in which a request is seen to settle.
FIRST_SPAN = 4


@dataclass(frozen=True)
class RoutedToken:
    """One token of a text.

    Attributes:
        id: token id.
        text: its part of the text; all parts together are the text, but for special tokens.
        experts: (expert, weight) of its k experts, by falling logit; LoRA's scale left out.
    """

    id: int
    text: str
    experts: tuple[tuple[int, float], ...]

    @property
    def first(self) -> int:
        """The expert with the largest weight."""
        return self.experts[0][0]


def route_text(adapter: Adapter, base: Path, text: str) -> list[RoutedToken]:
    """Tokenizes a text as a prompt (special tokens added) and routes its tokens.

    Args:
        adapter: a checked adapter.
        base: the backbone's directory, with its tokenizer.
        text: any text.

    Raises:
        AdapterError: no usable tokenizer or weights in `base`.
    """
    tokenizer = load_tokenizer(base)
    return _routed(adapter, base, tokenizer, _tokenize(tokenizer, text))


def route_ids(adapter: Adapter, base: Path, token_ids: list[int]) -> list[RoutedToken]:
    """Routes the tokens of a request, from its first on; arguments and errors as of `route_text`."""
    tokenizer = load_tokenizer(base)
    pieces = ((token, tokenizer.decode([token])) for token in token_ids)
    shown = [(token, CONTINUATION if "\ufffd" in piece else piece) for token, piece in pieces]
    return _routed(adapter, base, tokenizer, shown)


def _routed(
    adapter: Adapter, base: Path, tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[int, str]]
) -> list[RoutedToken]:
    import torch
    from vllm_adafuse.offline.routing import OfflineRouter

    token_ids = torch.tensor([token for token, _ in pieces], dtype=torch.long)
    router = OfflineRouter(adapter, base)
    require_rows(token_ids.tolist(), router.vocab_size, tokenizer, base)
    ids, weights = router.routes(token_ids)
    return [
        RoutedToken(token, piece, tuple(zip(experts, gates)))
        for (token, piece), experts, gates in zip(pieces, ids.tolist(), weights.tolist())
    ]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, str]]:
    if not tokenizer.is_fast:
        return [(token, tokenizer.decode([token])) for token in tokenizer(text)["input_ids"]]
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces, end = [], 0
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        if start == stop:
            piece = tokenizer.convert_ids_to_tokens(token)
        else:
            # From the last end: some tokenizers leave a token's leading space out.
            piece = text[end:stop] or CONTINUATION
        pieces.append((token, piece))
        end = max(end, stop)
    return pieces


def first_choices(tokens: list[RoutedToken]) -> dict[int, int]:
    """Expert -> tokens whose first expert it is, by index."""
    return dict(sorted(Counter(token.first for token in tokens).items()))


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `last` of a request, and how much of their weights each expert had, in
    shares of 1 [E]."""

    first: int
    last: int
    shares: tuple[float, ...]


def settling(tokens: list[RoutedToken], num_experts: int) -> list[Span]:
    """How a request's experts settle: spans from its first tokens on, each three times as long as
    all before it.

    Args:
        tokens: of the request, from its first.
        num_experts: E.
    """
    spans, first, end = [], 0, FIRST_SPAN
    while first < len(tokens):
        sums = [0.0] * num_experts
        for token in tokens[first:end]:
            for expert, weight in token.experts:
                sums[expert] += weight
        total = sum(sums) or 1.0
        shares = tuple(part / total for part in sums)
        spans.append(Span(first, min(end, len(tokens)) - 1, shares))
        first, end = end, 4 * end
    return spans


def describe(token: RoutedToken, names: tuple[str, ...]) -> str:
    """"math 0.73, code 0.27"."""
    return ", ".join(f"{printable(names[e])} {weight:.3f}" for e, weight in token.experts)
