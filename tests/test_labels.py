"""Labels of tokens from places in a text, with tokenizers of a few lines."""

import pytest
from vllm_adafuse.training.jsonl import Bad
from vllm_adafuse.training.labels import Tokens


class Letters:
    """A token for each pair of letters that are no spaces; a space has none."""

    def __call__(self, text, **_):
        ids, places, at = [], [], 0
        while at < len(text):
            if text[at] == " ":
                at += 1
                continue
            end = at + 1 + (text[at + 1 : at + 2] not in ("", " "))
            ids.append(text[at:end])
            places.append((at, end))
            at = end
        return {"input_ids": ids, "offset_mapping": places}

    def decode(self, ids):
        return "".join(ids)


def test_a_space_that_has_no_token_belongs_to_the_next():
    tokens = Tokens("ab cd", Letters())
    assert tokens.spans == [(0, 2), (2, 5)] and tokens.floor(3) == 2
    assert tokens.label([(2, 5)]) == (["ab", "cd"], [False, True])


def test_a_token_on_both_sides_of_a_border_is_parted():
    assert Tokens("abcd", Letters()).label([(1, 3)]) == (["a", "bc", "d"], [False, True, False])


def test_a_tokenizer_that_says_another_text_in_parts_is_refused():
    class Marking(Letters):
        def __call__(self, text, **_):
            made = super().__call__(text)
            return made | {"input_ids": ["^" + made["input_ids"][0], *made["input_ids"][1:]]}

    with pytest.raises(Bad, match="a token stands both in a reply and before or behind it"):
        Tokens("abcd", Marking()).label([(1, 4)])


def test_a_tokenizer_that_tells_no_places_is_refused():
    def slow(text, **_):
        raise NotImplementedError

    with pytest.raises(Bad, match="needs a fast tokenizer"):
        Tokens("ab", slow)
