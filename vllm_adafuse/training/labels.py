"""From places in a text to labels of its tokens, also where a token stands on both sides of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_adafuse.training.jsonl import Bad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # first character, and the one after the last


class Tokens:
    """A text's tokens and the characters that each stands for.

    Attributes:
        ids: token ids.
        spans: of each token; without gaps, so that a space that a tokenizer trims off counts.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase):
        """
        Raises:
            Bad: the tokenizer does not tell which characters a token stands for.
        """
        self.text, self.tokenizer = text, tokenizer
        self.ids, self.spans = self._encode(text)

    def _encode(self, text: str) -> tuple[list[int], list[Span]]:
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError as e:
            raise Bad(
                "`messages` needs a fast tokenizer (tokenizer.json), which this one is not; write "
                "the text yourself as `prompt` and `completion`"
            ) from e
        spans, end = [], 0
        for a, b in encoded["offset_mapping"]:
            spans.append((min(a, end), b))
            end = max(end, b)
        return list(encoded["input_ids"]), spans

    def floor(self, place: int) -> int:
        """A place, or where the token begins that it lies within."""
        return next((a for a, b in self.spans if a < place < b), place)

    def label(self, learn: Iterable[Span]) -> tuple[list[int], list[bool]]:
        """The ids, and for each whether it is in one of some spans.

        A token on both sides of a border is parted there, as a server parts the prompt it is given
        from the reply that it makes.

        Raises:
            Bad: the tokenizer does not give the same text in parts.
        """
        learn = sorted(learn)
        ids, spans = self.ids, self.spans
        borders = {place for span in learn for place in span}
        if cuts := sorted(place for place in borders if self.floor(place) != place):
            ids, spans = [], []
            for a, b in zip((0, *cuts), (*cuts, len(self.text))):
                part, at = self._encode(self.text[a:b])
                ids += part
                spans += [(a + first, a + last) for first, last in at]
            if self.tokenizer.decode(ids) != self.tokenizer.decode(self.ids):
                raise Bad(
                    "a token stands both in a reply and before or behind it, and the tokenizer "
                    "does not part it; write the text yourself as `prompt` and `completion`"
                )
        on, left = [], list(reversed(learn))
        for first, _ in spans:
            while left and first >= left[-1][1]:
                left.pop()
            on.append(bool(left) and first >= left[-1][0])
        return ids, on
