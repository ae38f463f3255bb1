"""The one error people see when an adapter, a backbone or the installation is at fault."""

from __future__ import annotations

from vllm_adafuse.text import clip, clip_all


class AdapterError(ValueError):
    """An adapter that cannot be used, with every problem found.

    Attributes:
        problems: one sentence each: file, key or tensor, what was found, what was
            expected, the way out. Of hundreds the first are kept, and of long ones both ends:
            what a file holds may be of any length.
    """

    def __init__(self, subject: str, problems: list[str]):
        self.subject, self.problems = clip(subject, 400), clip_all(list(problems))
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{self.subject} cannot be used:{listed}")

    def __reduce__(self):
        # Errors cross process borders (engine core to front end) by pickle.
        return type(self), (self.subject, self.problems)


def is_panic(e: BaseException) -> bool:
    """Whether a library in Rust gave up, such as a tokenizer over its regular expression: PyO3
    makes no Exception of that."""
    return type(e).__name__ == "PanicException"


def brief(e: BaseException, most: int = 240) -> str:
    """Another library's error on one line: its type and the beginning of what it says.

    Some list every class that they know, or explain over a page.
    """
    text = " ".join(str(e).split())
    text = text if len(text) <= most else f"{text[:most].rsplit(' ', 1)[0]} …"
    return f"{type(e).__name__}: {text}" if text else type(e).__name__
