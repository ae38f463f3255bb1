"""Regular expressions that a stranger wrote, matched where they cannot run for ever.

Some expressions take longer than the universe to fail on a name of forty letters, and nothing in
Python stops one that has begun. So they run in a process of their own, with a second of CPU time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from vllm_adafuse.text import clip

SECONDS, MEMORY = 1, 256 << 20
_CHILD = f"""\
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(rf"(.*\\.)?({{pattern}})$") for pattern in patterns]
    found = [next((i for i, c in enumerate(compiled) if c.match(name)), None) for name in names]
except (re.error, RecursionError, MemoryError, OverflowError) as e:
    found = f"{{type(e).__name__}}: {{e}}"
print(json.dumps(found))
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """The first pattern that matches the end of each name, from a dot on, as PEFT asks it.

    Args:
        patterns: regular expressions.
        names: of modules.

    Returns:
        For each name the pattern's index, or None.

    Raises:
        ValueError: one is no regular expression, or together they take more than a second.
    """
    if not patterns or not names:
        return [None] * len(names)
    try:
        # -I -S: nothing but Python itself is looked for or imported.
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([list(patterns), list(names)]).encode(),
            capture_output=True,
            timeout=10 * SECONDS,
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # killed: it said nothing
        raise ValueError(
            f"matching them takes more than {SECONDS} s; write names of modules"
        ) from None
    if isinstance(found, str):
        raise ValueError(clip(found, 200))
    return found
