"""Wrong arguments: one line of usage, one of what is wrong, and what may have been meant."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

_WAYS_OUT = {
    errno.ENOENT: "does not exist; check the path, and that the folder is there",
    errno.EISDIR: "is a directory, expected a file; name a file",
    errno.ENOTDIR: "has a file in the place of a folder; check the path",
    errno.EACCES: "permission denied; check who may read or write it, or name another path",
    errno.EPERM: "permission denied; check who may read or write it, or name another path",
    errno.EROFS: "is on a disk that cannot be written; name another path",
    errno.ENOSPC: "has no space left on its disk; free some, or name another disk",
}
_MAY_BE_EMPTY = ("--text",)


class Parser(argparse.ArgumentParser):
    """argparse's, with short errors. Parsers of subcommands are of this class too."""

    def usage_line(self) -> str:
        """What must be given, on one line; the options are left to --help."""
        named = [a for a in self._actions if a.option_strings and a.required]
        placed = [a for a in self._actions if not a.option_strings]
        words = [str(a.metavar or a.dest.upper()) for a in placed]
        words = [f"{w} …" if a.nargs in ("+", "A...") else w for a, w in zip(placed, words)]
        words += [
            f"({' | '.join(f'{a.option_strings[0]} {a.metavar or a.dest.upper()}' for a in group)})"
            for group in (g._group_actions for g in self._mutually_exclusive_groups if g.required)
        ]
        words += [f"{a.option_strings[0]} {a.metavar or a.dest.upper()}" for a in named]
        return f"usage: {self.prog} {' '.join([*words, '[options]'])}"

    def error(self, message: str) -> None:
        """Leaves with exit code 2."""
        print(self.usage_line(), file=sys.stderr)
        more = f"; {self.prog} --help says more"
        self.exit(2, f"{self.prog}: error: {_plain(message)}{more}\n")

    def parse_known_args(  # type: ignore[override]  # argparse's own is overloaded
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Looks for mistyped options first: argparse would name what it misses instead of them."""
        given = list(sys.argv[1:] if args is None else args)
        outer = self._subparsers is not None
        for before, word in zip(["", *given], given):
            if word == "--" or (outer and not word.startswith("-")):
                break
            if before in _MAY_BE_EMPTY and not word:
                continue
            if not word or re.fullmatch(r"--[\w-]+=", word):
                name = word or (before if before.startswith("--") else repr(word))
                self.error(f"{name} is empty; is a variable of the shell unset?")
            self._check_option(word.partition("=")[0])
        known, left = super().parse_known_args(given, namespace)
        if left and not outer:
            self.error(f"{' '.join(left)} is one argument too many")
        return known, left

    def _check_option(self, word: str) -> None:
        options = [option for action in self._actions for option in action.option_strings]
        if not re.match(r"--?[A-Za-z]", word) or any(o.startswith(word) for o in options):
            return
        near = get_close_matches("-" * (2 - word[:2].count("-")) + word, options, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        self.error(f"there is no option {word}{hint}")


def value_of(kind: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """A `type=` of argparse that says what it expects.

    Args:
        kind: raises ValueError.
        expected: "a number above 0".
    """

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected {expected}") from e

    return convert


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


COUNT = value_of(positive, "a whole number of at least 1")


def os_message(e: OSError) -> str:
    """An error of the operating system with the file and the way out."""
    if e.filename is None or e.errno is None:
        return str(e)
    return f"{e.filename}: {_WAYS_OUT.get(e.errno, e.strerror)}"


def _plain(message: str) -> str:
    """argparse's message with what may have been meant."""
    if match := re.fullmatch(r"(.*): invalid choice: '(.*)' \(choose from (.*)\)", message):
        where, given, listed = match.groups()
        names = re.findall(r"[\w-]+", listed)
        near = get_close_matches(given, names, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{where} is {given!r}, expected one of {', '.join(names)}{hint}"
    if match := re.fullmatch(r"argument (-\S+).*: expected one argument", message):
        option = match[1].partition("/")[0]
        return f"{option} has no value; one that begins with - is written {option}=-1"
    message = re.sub(r": invalid int value: (.*)", r" is \1, expected a whole number", message)
    message = re.sub(r": invalid float value: (.*)", r" is \1, expected a number", message)
    return message.replace(": is ", " is ")
