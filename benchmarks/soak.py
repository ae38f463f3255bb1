"""A real server under mixed and hostile traffic for many minutes: every token that is known is right,
memory does not grow, nothing is answered by a 5xx.

    python -m benchmarks.soak --minutes 30
    python -m benchmarks.soak --minutes 8 --layers 24 --hidden 1024     on a GPU: half a billion

A llama-like backbone of random weights; mixtures, one of them with a router that sees the past, and
PEFT LoRAs, more than the pool holds at once and more than the host keeps. Probes ask greedily, by
completions and chat, streamed or not, and are held against plain transformers in float32. Beside them
clients sample, leave in the middle, load, unload and replace adapters, and send what has to be
refused. Memory is the proportional set size of the server's processes that stay, and the device's beside the
references' own; growth is that of the last fifth's median over the median of the fifth after the
warm-up. The exit code is 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.server import Server, running_server, vllm_serve
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

from benchmarks import record
from benchmarks.engine import make_lora
from benchmarks.soak_hostile import hostile, make_damaged, requests
from benchmarks.soak_traffic import (
    Tally,
    World,
    change,
    disconnect,
    other_request,
    probe,
    run_clients,
)
from benchmarks.soak_truth import BASE, Names, Truth

GROWTH = 0.01  # of memory after the warm-up, allowed
# Of the LoRAs: less than what the backbone's linears say, or errors of bfloat16 would grow from layer
# to layer, by plain torch too, until no tolerance could tell them from another adapter's tokens.
LORA_SCALE = 0.125
DEAD = "EngineDeadError"  # in the log of a server whose engine has ended


def make_world(root: Path, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Path]:
    """Writes the backbone under root/base, and adapters; returns their directories by content."""
    shape = {
        "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers, "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 128, "head_dim": 64,
        "vocab_size": options.vocabulary, "max_position_embeddings": 512,
    }  # fmt: skip
    base = make_tiny_backbone(root / "base", dtype=dtype, **shape)
    contents = {}
    for number, (experts, rank, past) in enumerate(
        [(4, 8, False), (8, 16, False), (4, 16, True)]
    ):
        name = f"mix{number}"
        extra = {"router_context": "mean"} if past else {}
        contents[name] = make_random_adapter(
            base, root / name, num_experts=experts, top_k=2, r=rank, seed=number, **extra
        )
    for number, rank in enumerate((8, 16, 40)):
        torch.manual_seed(number)
        contents[f"lora{number}"] = make_lora(base, root / f"lora{number}", rank, LORA_SCALE)
    shutil.copytree(contents["lora0"], root / "place")
    make_random_adapter(base, root / "large", num_experts=64, top_k=2, r=64)
    return contents


def command(root: Path, contents: dict[str, Path], dtype: torch.dtype, on_gpu: bool) -> list[str]:
    """The server's: a pool of two large adapters, four in host memory, and few blocks of keys and
    values, so that all three are taken from one and given to another all the time."""
    argv = "--max-model-len 512 --block-size 32 --num-gpu-blocks-override 96 --max-num-seqs 16"
    argv += " --max-num-batched-tokens 256 --enable-lora --max-loras 2 --max-lora-rank 128"
    argv += " --max-cpu-loras 4 --served-model-name base"
    argv += f" --dtype {str(dtype).removeprefix('torch.')}"
    argv += " --gpu-memory-utilization " + ("0.4" if on_gpu else "0.2 --enforce-eager")
    named = contents | {"moving": contents["lora1"], "place": root / "place"}
    modules = [f"{name}={path}" for name, path in named.items()]
    return vllm_serve(root / "base", *argv.split(), "--lora-modules", *modules)


def processes(leader: int) -> list[int]:
    """Process ids of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == leader:
                found.append(int(folder.name))
    return sorted(found)


def usage(server: Server) -> dict[str, Any]:
    """Bytes, open files and threads of a server's processes, and bytes of the device."""
    told: dict[str, Any] = {"bytes": 0, "files": 0, "threads": 0, "by_process": {}}
    for process in processes(server.process.pid):
        folder = Path(f"/proc/{process}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            size = next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            told["files"] += len(list((folder / "fd").iterdir()))
            told["threads"] += len(list((folder / "task").iterdir()))
        except (OSError, StopIteration):  # it has ended
            continue
        told["by_process"][process] = size
        told["bytes"] += size
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        told["device_bytes"] = total - free - torch.cuda.memory_reserved()
    return told


def growth(samples: list[tuple[float, dict[str, Any]]], key: str, warm_up: float) -> float:
    """Of a figure: the last fifth's median over that of the fifth after the warm-up, less 1.

    Args:
        samples: (seconds since the start, figures).
        key: of a figure.
        warm_up: seconds.
    """
    last = samples[-1][0]
    part = (last - warm_up) / 5
    first = [s[key] for at, s in samples if warm_up <= at <= warm_up + part]
    after = [s[key] for at, s in samples if at >= last - part]
    if not first or not after:
        raise ValueError(f"{len(samples)} samples are too few to tell growth: run it longer")
    return statistics.median(after) / statistics.median(first) - 1


def watch(server: Server, world: World, tell: float) -> list[tuple[float, dict[str, Any]]]:
    """Samples of the server's memory until the world's end; says now and then what was done."""
    start, told, samples = time.monotonic(), time.monotonic(), []
    while world.on():
        if server.process.poll() is not None:
            world.tally.fault("server", f"it ended with {server.process.returncode}")
            world.end = 0.0
            break
        samples.append((time.monotonic() - start, usage(server)))
        if time.monotonic() - told > tell:
            told = time.monotonic()
            print(
                f"{told - start:6.0f} s, {samples[-1][1]['bytes'] / 2**20:.1f} MiB "
                f"{[size >> 20 for size in samples[-1][1]['by_process'].values()]}, "
                f"{world.tally.failed} faults, {json.dumps(world.tally.counts)}",
                flush=True,
            )
        time.sleep(5)
    return samples


def lasting(samples: list[tuple[float, dict[str, Any]]]) -> None:
    """Counts the bytes of those processes alone that were there from first to last: others come to
    read one adapter, and share most of theirs with the one that sent them."""
    last = samples[-1][1]["by_process"].keys() & samples[0][1]["by_process"].keys()
    for _, figures in samples:
        figures["bytes"] = sum(figures["by_process"].get(process, 0) for process in last)


def ask_health(server: Server, tally: Tally) -> None:
    """What is wrong with a server, before it is told to end: that ends requests whose clients have gone,
    which vLLM logs like an engine's death."""
    if not server.healthy():
        tally.fault("server", "it is not healthy at the end")
    if DEAD in server.log.read_text("utf-8", errors="replace"):
        tally.fault("log", f"{DEAD} in {server.log}")


def verdict(world: World, samples: list, warm_up: float) -> dict[str, Any]:
    """The row of the result; growth is a fault too."""
    truth, tally = world.truth, world.tally
    probes = sum(n for what, n in tally.counts.items() if what.startswith("probes"))
    row: dict[str, Any] = {"probes": probes, "tokens": truth.tokens, "worst_nats": truth.worst}
    row |= {"ties": truth.ties, "held_against_another": truth.held, "mistaken": truth.mistaken}
    row["different_answers"] = len(truth.known)
    lasting(samples)
    keys = [key for key in ("bytes", "device_bytes", "files", "threads") if key in samples[0][1]]
    for key in keys:
        row[f"{key}_growth"] = growth(samples, key, warm_up)
        row[f"{key}_last"] = samples[-1][1][key]
        if key.endswith("bytes") and row[f"{key}_growth"] > GROWTH:
            tally.fault("growth", f"{key} grew by {row[f'{key}_growth']:.2%}")
    if not probes:
        tally.fault("probes", "none was answered")
    if truth.mistaken > truth.held / 10:
        tally.fault("probes", f"{truth.mistaken} of {truth.held} fit another content as well")
    return row | {"counts": dict(sorted(tally.counts.items())), "faults": tally.faults}


def soak(options: argparse.Namespace, root: Path, logs: Path) -> dict[str, Any]:
    """The whole run; its row."""
    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    contents = make_world(root, options, dtype)
    tolerance = options.tolerance or (0.6 if on_gpu else 1e-3)
    truth = Truth(root / "base", contents, tolerance, "cuda" if on_gpu else "cpu")
    meanings = {name: name for name in contents} | {BASE: BASE, "moving": "lora1"}
    names = Names(meanings | {"place": "lora0", "guest": None}, [*contents, BASE])
    wrong = requests(root, make_damaged(contents["lora0"], root), root / "large")
    texts = real_prompts(24) + [" ".join(real_prompts(6, words=90)[i : i + 2]) for i in range(4)]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_LOGGING_LEVEL": "INFO"}
    # Products of matrices are kept compiled for each number of rows: on a CPU that is growth, too.
    env |= {} if on_gpu else {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = logs / "soak-serve.log"
    with running_server(command(root, contents, dtype, on_gpu), log, 600, env) as server:
        end = time.monotonic() + 60 * options.minutes
        world = World(
            server.url, root, contents, names, truth, texts, Tally(), end, on_gpu, frozenset({"place"})
        )
        clients = {probe: options.probes, other_request: 2, disconnect: 1, change: 1}
        clients |= {hostile(wrong): 1}
        clients = {c: n for c, n in clients.items() if c.__name__ not in options.leave_out}
        threads = run_clients(world, clients, options.seed)
        samples = watch(server, world, tell=30)
        for thread in threads:
            thread.join()
        ask_health(server, world.tally)
    if server.process.returncode:
        world.tally.fault("server", f"it ended with {server.process.returncode}")
    warm_up = 60 * (options.minutes / 4 if options.warm_up is None else options.warm_up)
    return {"options": vars(options)} | verdict(world, samples, warm_up)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options from a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0)
    add("--warm-up", type=float, metavar="MINUTES", help="default: a quarter of all")
    add("--probes", type=int, default=4, help="clients whose answers are held against references")
    add("--layers", type=int, default=3, help="of the backbone")
    add("--hidden", type=int, default=128, help="its width, a multiple of 128")
    add("--vocabulary", type=int, default=1003, help="its tokens")
    add("--tolerance", type=float, metavar="NATS",
        help="of a near tie; default 0.001 in float32, 0.6 in bfloat16 (torch loses 0.23)")  # fmt: skip
    add("--leave-out", nargs="+", default=[], help="clients, to find out whose a fault is",
        choices=("other_request", "disconnect", "change", "hostile"))  # fmt: skip
    add("--seed", type=int, default=0)
    add("--out", help="folder of the result file and the server's log")
    add("--commit", default="", help="of the measured code")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs it; the exit code."""
    options = parse(argv)
    logs = Path(options.out or tempfile.mkdtemp()).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    # vLLM's own files, and sockets, whose paths must be short.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        row = soak(options, Path(scratch), logs)
    path = record.save("soak", [row], logs, options.commit)
    print(json.dumps({k: v for k, v in row.items() if k != "options"}, indent=1))
    print(json.dumps({"saved": str(path)}))
    return 1 if row["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
