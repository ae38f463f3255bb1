"""What the compiler makes of every kernel, to compare before and after a change that is to have no
effect.

    python tests/ptx.py build [FILE]    writes hashes of normalised PTX, default build/nets/ptx.json
    python tests/ptx.py check [FILE]    compares with them; names of kernels may differ

About 90 s on two cores, less with Triton's cache. Constants are those of compile_kernels.py and
compile_layer_kernels.py, typed by hand: what launchers hand over, `launches.py` sees.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from uninterpreted import run_compiled

DEFAULT = Path(__file__).parents[1] / "build" / "nets" / "ptx.json"
SCRIPTS = "compile_kernels.py", "compile_layer_kernels.py"


def main() -> None:
    command, path = sys.argv[1:2], Path(sys.argv[2]) if sys.argv[2:] else DEFAULT
    if command not in (["build"], ["check"]) or len(sys.argv) > 3:
        sys.exit(__doc__)
    cache = path.parent / "triton"
    rows = [(row["kernel"], row["ptx"]) for name in SCRIPTS for row in run_compiled(name, cache)]
    print(f"{len(rows)} kernels")
    if command == ["build"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        return
    known = [tuple(row) for row in json.loads(path.read_text())]
    before, after = Counter(h for _, h in known), Counter(h for _, h in rows)
    for sign, those, count in (("then", known, before - after), ("now ", rows, after - before)):
        for name, digest in those:
            if digest in count:
                print(f"{sign} {name} {digest}")
    sys.exit(before != after)


if __name__ == "__main__":
    main()
