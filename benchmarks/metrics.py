"""What counting for `/metrics` costs: one engine of mixtures, counted and not counted in turn.

    python -m benchmarks.metrics --model llama-3-8b --batches 1,32,128

Statistics are on throughout, so that vLLM's own cost the same in all turns; what is switched is ours
alone. Workers count nothing in a step, so all that there is comes when requests end: whole generations
are timed, and a step is their time over their tokens. What ends is noted by the thread that ends it, and
counted with others by a thread beside, or, what is left then, at once after a turn. Rows:

    step    milliseconds of a step with and without, and the median difference of pairs of turns
    ending  seconds in our functions of the thread that ends requests, by the clock, over all of the time
    batches seconds of the processor in which they were counted, by whichever thread, over the same
    counts  both: what must stay below 0.3 % where the front end is in the engine's way, which a server's
            is not

Random weights, prompts and terms as in `benchmarks.lora`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from vllm_adafuse.cli.cmd_random import integers

from benchmarks import lora, record
from benchmarks.engine import write_config
from benchmarks.engine_options import SHAPES, Options
from benchmarks.prompts import Ids
from benchmarks.turns import Engine, timed

COUNTS = ("count", "count_experts")  # of the collector, for each request
BESIDE = ("adafuse-ended", "adafuse-count")  # its threads


@dataclass
class Spent:
    """Seconds of turns: of each call of ours in the thread that ends requests, and of batches."""

    ending: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)


def beside() -> float:
    """Seconds that a processor has spent in the threads beside."""
    threads = [t.ident for t in threading.enumerate() if t.name.startswith(BESIDE)]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads if ident)


@contextmanager
def counted(on: bool) -> Iterator[Spent]:
    """Around a turn: what it took to count it; off, it is not counted."""
    from vllm_adafuse.serving.metrics import COLLECTOR

    spent = Spent()

    def clocked(function):
        def run(*args):
            begin = time.perf_counter()
            function(*args)
            spent.ending.append(time.perf_counter() - begin)

        return run

    wrapped = {
        name: clocked(getattr(COLLECTOR, name)) if on else lambda *args: None for name in COUNTS
    }
    begin = beside()
    with patch.multiple(COLLECTOR, **wrapped):
        yield spent
    own = time.thread_time()
    COLLECTOR.flush()
    spent.batches.append(time.thread_time() - own + beside() - begin)


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each size."""
    ids = Ids(SHAPES[options.model][-1], random.Random(0))
    with tempfile.TemporaryDirectory() as scratch:
        write_config(Options(model=options.model, layers=options.layers), Path(scratch) / "base")
        mixtures = lora.make_mixtures(options, Path(scratch))
        llm = lora.start(
            options, Path(scratch), disable_log_stats=False, enable_lora=True,
            max_loras=lora.MIXTURES, max_lora_rank=lora.rank(options.experts * options.r),
        )  # fmt: skip
        engine = Engine(llm, mixtures)
        for batch in options.batches:
            times: dict[bool, list[float]] = {True: [], False: []}
            ours = Spent()
            for repeat in range(options.repeats + 1):
                for on in (True, False) if repeat % 2 else (False, True):
                    with counted(on) as spent:
                        value = timed(engine, [(options.prompt, options.tokens)] * batch, ids)
                    if repeat:  # the first is warm-up
                        times[on].append(value)
                        ours.ending += spent.ending
                        ours.batches += spent.batches
            yield row_of(batch, options.tokens, times, ours)
        engine.stop()


def row_of(batch: int, tokens: int, times: dict[bool, list[float]], ours: Spent) -> dict:
    """Figures of one size.

    Args:
        batch: requests at once.
        tokens: that each generates.
        times: seconds of the turns, by whether they were counted; those of a place are a pair.
        ours: what counting took in all of them; those that are not counted may have batches of those
            before.

    Raises:
        RuntimeError: nothing was counted.
    """
    if not ours.ending:
        raise RuntimeError("no request was counted: is the plugin there, and a server of vLLM's V1?")
    with_ms, without_ms = ([t / tokens * 1e3 for t in times[on]] for on in (True, False))
    pairs = [a / b - 1 for a, b in zip(with_ms, without_ms)]
    ending, batches, all_of_it = sum(ours.ending), sum(ours.batches), sum(times[True])
    return {
        "batch": batch, "unit": "ms", "with": record.summary(with_ms),
        "without": record.summary(without_ms), "overhead": statistics.median(pairs),
        "ending": ending / all_of_it, "batches": batches / all_of_it,
        "counts": (ending + batches) / all_of_it,
        "us_a_request": (ending + batches) / (len(times[True]) * batch) * 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama-3-8b", choices=SHAPES)
    add("--layers", type=int, help="fewer layers, while working")
    add("--batches", default="1,32,128", type=integers)
    add("--prompt", default=128, type=int, help="tokens of each prompt")
    add("--tokens", default=128, type=int, help="that are generated")
    add("--repeats", default=9, type=int)
    add("--experts", default=8, type=int, help="of each mixture")
    add("--top-k", default=2, type=int)
    add("--r", default=16, type=int, help="of each expert")
    add("--memory", default=0.5, type=float, help="of the GPU")
    add("--dtype", default="bfloat16")
    add("--out", type=Path, help="folder of the result file")
    add("--commit", default="", help="of the measured code")
    options = parser.parse_args()
    options.cache, options.longest = None, options.prompt + options.tokens + 8
    told = {k: v for k, v in vars(options).items() if k not in ("out", "commit")}
    rows, path = [{"options": told}], None
    for row in measure(options):
        print(
            f"{row['batch']:4} requests: {row['with']['median']:.3f} ms a step, "
            f"{row['without']['median']:.3f} without, {row['overhead']:+.2%} in pairs; "
            f"counting {row['counts']:.3%}, of which {row['ending']:.3%} where requests end, "
            f"{row['us_a_request']:.1f} us a request",
            flush=True,
        )
        rows.append(row)
        path = record.save("metrics", rows, options.out, options.commit, path)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
