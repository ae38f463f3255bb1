"""The one error people see when an adapter, a backbone or the installation is at fault."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter that cannot be used, with every problem found.

    Attributes:
        problems: one sentence each: file, key or tensor, what was found, what was
            expected, the way out.
    """

    def __init__(self, subject: str, problems: list[str]):
        self.subject, self.problems = subject, list(problems)
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{subject} cannot be used:{listed}")

    def __reduce__(self):
        # Errors cross process borders (engine core to front end) by pickle.
        return type(self), (self.subject, self.problems)
