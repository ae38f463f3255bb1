"""Engines that take turns at the same work: decode steps, prefills, and requests of everyday
lengths; the time of each, and the host's share of it."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks import record
from benchmarks.engine_options import SHAPES, Size, name_of, sizes
from benchmarks.prompts import Ids, everyday, read_ids

if TYPE_CHECKING:
    from benchmarks.engine_options import Options

PREFILLS = 3  # timed per turn, of which the median counts: one is over in milliseconds


@dataclass
class Engine:
    """A running engine, and what each of its requests carries.

    Attributes:
        lora: of every request; of a list, requests carry one after the other in turn.
        control: tokens that switch an adapter on; prompts begin with them in turn.
    """

    llm: Any
    lora: Any = None
    control: list[int] = field(default_factory=list)

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def timed(engine: Engine, lengths: Sequence[tuple[int, int]], ids: Ids) -> float:
    """Seconds from requests to their last token.

    The prompts wait in the engine until all are there. Else the first would be prefilled alone,
    and it would be chance how many join it.

    Args:
        lengths: tokens of the prompt, and of the output, of each request.
        ids: what they are made of.
    """
    from vllm import SamplingParams

    control, lora, prompts, params = engine.control, engine.lora, [], []
    if isinstance(lora, list):
        lora = [lora[i % len(lora)] for i in range(len(lengths))]
    for i, (length, tokens) in enumerate(lengths):
        prompt = ids.prompt(length, len(control))
        if control:
            prompt[0] = control[i % len(control)]
        prompts.append({"prompt_token_ids": prompt})
        params.append(
            SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                allowed_token_ids=ids.said(),
            )
        )  # fmt: skip
    engine.llm.sleep(level=0)  # holds the scheduler, and nothing else
    engine.llm.enqueue(prompts, params, lora_request=lora, use_tqdm=False)
    begin = time.perf_counter()
    engine.llm.wake_up(tags=["scheduling"])
    engine.llm.wait_for_completion(use_tqdm=False)
    return time.perf_counter() - begin


def decode_ms(engine: Engine, count: int, length: int, steps: Sequence[int], ids: Ids) -> float:
    """Milliseconds of a decode step: of a long generation less a short one, per step more.

    Args:
        count, length: prompts, and tokens of each.
        steps: tokens of the short generation, and of the long one.
        ids: as in `timed`.
    """
    if engine.lora is not None:
        # Brings adapters back whose place another row's have taken: the short generation would, and
        # by as much the steps seem shorter.
        timed(engine, [(1 + len(engine.control), 1)] * count, ids)
    short, long = (timed(engine, [(length, tokens)] * count, ids) for tokens in steps)
    return (long - short) / (steps[1] - steps[0]) * 1e3


def _watch(worker) -> None:
    """Has a worker's runner keep the time of its thread in every step, in milliseconds."""
    runner = worker.model_runner
    if hasattr(runner, "host_ms"):
        return
    runner.host_ms = []

    def kept(function, begins: bool):
        def call(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = (time.thread_time() - start) * 1e3
                if begins or not runner.host_ms:
                    runner.host_ms.append(0.0)
                runner.host_ms[-1] += spent

        return call

    runner.execute_model = kept(runner.execute_model, True)
    if hasattr(runner, "sample_tokens"):
        runner.sample_tokens = kept(runner.sample_tokens, False)


def _watched(worker) -> list[float]:
    """Since the last call, the time of each step."""
    kept, worker.model_runner.host_ms = worker.model_runner.host_ms, []
    return kept


def host_ms(engine: Engine) -> float | None:
    """Median CPU time of a step since the last call, of the slowest worker: from the scheduler's
    word to the sampled tokens; None where there was no step."""
    steps = [kept for kept in engine.llm.collective_rpc(_watched) if kept]
    return max(map(statistics.median, steps), default=None)


def _once(options: Options | argparse.Namespace, engine: Engine, size: Size, ids: Ids) -> float:
    """Milliseconds of one turn."""
    what, count, length = size
    if what == "decode":
        return decode_ms(engine, count, length, options.steps, ids)
    if what == "mixed":
        return timed(engine, everyday(count), ids) * 1e3
    return statistics.median(timed(engine, [(length, 1)] * count, ids) for _ in range(PREFILLS)) * 1e3


def take_turns(
    options: Options | argparse.Namespace,
    engines: dict[str, Engine],
    is_asked: Callable[[str, Size], bool] = lambda kind, size: True,
) -> Iterator[dict]:
    """Times engines at every size that they are asked for, a row for each; overheads are over the
    first.

    The row's `ids` say what prompts were made of; `host_ms` is as in `host_ms`.
    """
    rng, vocab = random.Random(0), SHAPES[options.model][-1]
    kinds = [Ids(vocab, rng)] if "uniform" in options.ids else []
    if "text" in options.ids:
        kinds.append(Ids(vocab, rng, read_ids(options.text_ids)))
    for engine in {id(engine.llm): engine for engine in engines.values()}.values():
        engine.llm.collective_rpc(_watch)
    for size in sizes(vars(options)):
        asked = {kind: engine for kind, engine in engines.items() if is_asked(kind, size)}
        for ids in kinds:
            yield from _rows(options, asked, size, ids)


def _rows(
    options: Options | argparse.Namespace, engines: dict[str, Engine], size: Size, ids: Ids
) -> Iterator[dict]:
    times: dict[str, list[float]] = {kind: [] for kind in engines}
    hosts: dict[str, list[float]] = {kind: [] for kind in engines}
    for repeat in range(options.repeats + 1):
        for kind, engine in engines.items():
            value = _once(options, engine, size, ids)
            host = host_ms(engine)
            if repeat:  # the first is warm-up
                times[kind].append(value)
                hosts[kind] += [] if host is None else [host]
    what, batch, length = size
    first = next(iter(engines))
    base = statistics.median(times[first])
    for kind, values in times.items():
        row = {"engine": kind, "what": what, "batch": batch, "length": length, "unit": "ms"}
        row |= {"ids": ids.name} | record.summary(values)
        row["overhead"] = row["median"] / base - 1
        text = ""
        if hosts[kind] and hosts[first]:
            row["host_ms"] = statistics.median(hosts[kind])
            row["host_overhead"] = row["host_ms"] / statistics.median(hosts[first]) - 1
            text = f"; host {row['host_ms']:.3f} ms {row['host_overhead']:+.1%}"
        print(
            f"{name_of(size):18} {ids.name:8} {kind:16} {row['median']:9.3f} ms "
            f"({row['min']:.3f} to {row['max']:.3f}) {row['overhead']:+.1%}{text}",
            flush=True,
        )
        yield row
