"""Scripts that need Triton's compiler, which its interpreter replaces in the tests' own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_compiled(script: str, cache: Path) -> Any:
    """What a script beside this file prints as JSON in its last line, with a cache of its own."""
    path = Path(__file__).with_name(script)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(path.parent)}
    command = [sys.executable, "-P", path]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
