"""Tokens that a backbone has no row for: added to its tokenizer, and the backbone not resized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.text import show

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def require_rows(
    ids: Iterable[int], rows: int, tokenizer: PreTrainedTokenizerBase, base: str | Path
) -> None:
    """Refuses texts that hold such tokens. A tokenizer may have them, as long as no text does.

    Args:
        ids: of the texts' tokens.
        rows: of the embedding.
        tokenizer: the backbone's.
        base: the backbone's directory, for messages.

    Raises:
        AdapterError: a token has no row.
    """
    outside = sorted({token for token in ids if not 0 <= token < rows})
    if not outside:
        return
    listed = ", ".join(
        f"{show(tokenizer.convert_ids_to_tokens(token))} (id {token})" for token in outside[:3]
    )
    more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
    raise AdapterError(
        f"backbone {base}",
        [
            f"its embedding has {rows} rows and none for {listed}{more}, which its tokenizer makes "
            "of the text; take the tokenizer that belongs to the backbone, take such tokens out of "
            "the text, or give the backbone rows for them and save it: "
            "model.resize_token_embeddings(len(tokenizer))"
        ],
    )

