"""Every kernel under compute-sanitizer, and a table of what it says.

    python tests/sanitize.py memcheck racecheck

Runs every_kernel.py under each tool; logs stay in --out. Run every_kernel.py by itself
before, so that Triton has compiled the kernels.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROGRAM = Path(__file__).with_name("every_kernel.py")
# A line of the sanitizer that begins an error; what belongs to it is indented.
ERROR = re.compile(r"========= (?!COMPUTE-SANITIZER|Target|.* SUMMARY)\S")


def summary(tool: str, log: str, code: int) -> list[str]:
    """Lines of a table of what a tool said: a case and how many errors, then the total.

    Args:
        log: of every_kernel.py under compute-sanitizer.
        code: its exit status.
    """
    lines, name, found, ran = [], "", 0, 0
    for line in [*log.splitlines(), "case: end"]:
        if line.startswith("case: "):
            if name and found:
                lines.append(f"{tool:10} {name:32} {found} lines of errors")
            name, found = line.removeprefix("case: "), 0
            ran += name != "end"
        elif ERROR.match(line):
            found += 1
    said = [line.strip("= ") for line in log.splitlines() if "SUMMARY" in line]
    total = "; ".join(said) or "no summary: the tool did not run to the end"
    return [*lines, f"{tool:10} {ran} cases, exit code {code}: {total}"]


def sanitized(tool: str, folder: Path) -> list[str]:
    """`summary` of a run of every_kernel.py under a tool; its log is kept in the folder.

    Raises:
        FileNotFoundError: compute-sanitizer is not installed.
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise FileNotFoundError("compute-sanitizer is not on the PATH; CUDA's toolkit has it")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(PROGRAM)]
    path = folder / f"sanitizer-{tool}.log"
    with path.open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    return [*summary(tool, path.read_text(errors="replace"), code), f"{tool:10} log: {path}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="+", choices=TOOLS)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the logs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for tool in options.tools:
        print("\n".join(sanitized(tool, options.out)), flush=True)


if __name__ == "__main__":
    main()
