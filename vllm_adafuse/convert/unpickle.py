"""A torch pickle's tensors as safetensors, read where a bad file can do no harm.

Runs as a process of its own (`python -m vllm_adafuse.convert.unpickle IN OUT`): torch's
`weights_only` unpickler refuses code, and the kernel refuses more memory than such a file needs.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

# Beside what the interpreter with torch takes: the tensors, their contiguous copies, the output.
COPIES, SLACK = 4, 256 << 20
SECONDS = 600


def unpickle(file: Path, out: Path) -> str | None:
    """Reads a torch pickle in a child process with limited memory.

    Args:
        file: a dict of name -> tensor, as `torch.save` writes it; an absolute path.
        out: the safetensors file to write, absolute, in a directory that holds nothing else.

    Returns:
        None, or what is wrong with the file in a few words.
    """
    command = [sys.executable, "-m", "vllm_adafuse.convert.unpickle", str(file), str(out)]
    # One thread: every further one would reserve address space against the limit.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        # Python looks for modules where it starts: not beside a stranger's file (torch.py, …).
        done = subprocess.run(
            command, capture_output=True, timeout=SECONDS, env=environment, cwd=out.parent
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {SECONDS} s"
    try:
        answer = json.loads(done.stdout.decode().splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"its reader ended with code {done.returncode}: {' '.join(last)[:200]}"
    return answer.get("problem")


def _limit(file: Path) -> None:
    """Caps this process's address space and the files it writes, by the size of its input."""
    size = file.stat().st_size
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + COPIES * size + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + SLACK, 2 * size + SLACK))


def _read(file: Path, out: Path) -> str | None:
    import pickle

    import torch
    from safetensors.torch import save_file

    _limit(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            return f"holds a {type(tensors).__name__}, expected a dict of tensors"
        plain = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                return f"entry {name!r:.60} is a {type(tensor).__name__}, expected a tensor"
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                return f"tensor {name:.60} is sparse, quantised or without values"
            # A copy: views of one storage are no safetensors.
            plain[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        save_file(plain, out)
    except pickle.UnpicklingError as e:
        if re.search(r"GLOBAL|global|class|function|instantiate", text := _short(e)):
            return f"holds more than tensors, and could run code when read: {text}"
        return f"is damaged, or no torch file: {text}"
    except MemoryError:
        return "needs far more memory than its size, as no sound file does"
    except RuntimeError as e:
        if "memory" in str(e).lower():
            return "needs far more memory than its size, as no sound file does"
        return f"is damaged: {_short(e)}"
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, IndexError) as e:
        return f"is damaged: {_short(e)}"
    return None


def _short(e: Exception) -> str:
    """The line of torch's long message that names the cause."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    cause = [line.removeprefix("WeightsUnpickler error:").strip() for line in lines[1:]
             if "WeightsUnpickler error" in line]  # fmt: skip
    return (cause or lines or [repr(e)])[0][:200]


if __name__ == "__main__":
    print(json.dumps({"problem": _read(Path(sys.argv[1]), Path(sys.argv[2]))}))
