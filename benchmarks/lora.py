"""Many adapters on one engine: what requests that choose theirs cost, over the bare backbone.

    python -m benchmarks.lora --model llama-3-8b --batches 1,8,32,64,128 --prefill 16x500

Rows, each an engine with what its requests name in turn:

    stock          the backbone, LoRA not enabled
    vllm_one       vLLM's own LoRA manager, one LoRA of rank r
    vllm_many      the same engine, N LoRAs
    one, many      ours (`--enable-lora` with this plugin), the same LoRAs
    base           the same engine with the LoRAs loaded, requests of the base
    both_one, both_many, both_base  as one, many and base, with vLLM's own LoRA beside ours
    both_rest      that engine, one LoRA that adapts embedding and output head too
    mixtures       ours, 4 mixtures of E experts, top-k, and the base
    fp8_one, fp8_many, fp8_mixtures  as one, many and mixtures, with experts in fp8

Random weights (`load_format="dummy"`), vLLM's default settings but for the share of
memory, greedy. Engines take turns as in `benchmarks.engine`, where the terms are explained.

Engines start all at once, and each loads its adapters while others start: all of them are there
before the first turn. What that takes is printed by phases.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from vllm.plugins import load_general_plugins

from benchmarks import record
from benchmarks.engine import VLLM_LORA, make_adapter, make_lora
from benchmarks.engine import write_config as write_backbone
from benchmarks.engine_options import (
    SHAPES,
    Options,
    add_work,
    cache_needs,
    check_ids,
    longest,
    name_of,
    too_large,
)
from benchmarks.phases import imported, phase
from benchmarks.spawn import spawned_with
from benchmarks.turns import Engine, take_turns

MIXTURES = 4
ENGINES = "vllm", "adafuse", "both", "mixtures", "fp8", "fp8_mixtures"
BOTH, FP8 = {"adafuse": {"lora": "both"}}, {"adafuse": {"lora_dtype": "fp8"}}
# Adapters that one engine is asked for at the same time; its worker reads as many at once.
LOADS = 4


def start(options: argparse.Namespace, root: Path, **extra: Any) -> Any:
    """One engine on the backbone under `root`."""
    from vllm import LLM

    torch.set_num_threads(1)  # vLLM forks this process
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    arguments = {"load_format": "dummy", "dtype": options.dtype, "max_model_len": options.longest}
    if options.cache is None:
        arguments["gpu_memory_utilization"] = options.memory
    else:  # the share is what must be free, and no more is asked of it
        arguments["gpu_memory_utilization"] = 0.05
        arguments["kv_cache_memory_bytes"] = int(options.cache * (1 << 30))
    return LLM(str(root / "base"), skip_tokenizer_init=True, **arguments | extra)


def load(llm: Any, requests: list) -> None:
    """Has an engine load adapters, LOADS at a time.

    Ours says at once whether it has an adapter by now, so it is asked for several; vLLM's own manager
    answers when it has loaded one.
    """
    if not requests:
        return
    engine, one = llm.llm_engine, Lock()
    ask = engine.engine_core.add_lora

    def ask_alone(request: Any) -> bool:  # vLLM's client of a process takes one thread at a time
        with one:
            return ask(request)

    with patch.object(engine.engine_core, "add_lora", ask_alone), ThreadPoolExecutor(LOADS) as pool:
        engine.add_lora(requests[0])  # by itself: it makes what the others share
        list(pool.map(engine.add_lora, requests[1:]))


def make_loras(options: argparse.Namespace, root: Path, count: int) -> list:
    """Writes the backbone and LoRAs under `root`; returns requests of the LoRAs."""
    write_backbone(Options(model=options.model, layers=options.layers), root / "base")
    return _copies(make_lora(root / "base", root / "lora0", options.r), count)


def make_mixtures(options: argparse.Namespace, root: Path) -> list:
    """Requests of mixtures for the backbone under `root`."""
    mixture = options.experts, options.r, options.top_k
    return _copies(make_adapter(root / "base", root / "mix0", mixture), MIXTURES)


def _copies(first: Path, count: int) -> list:
    """Requests of so many adapters, copies of the first, NAME0, under other names."""
    from vllm.lora.request import LoRARequest

    found = []
    for i in range(count):
        path = first.with_name(f"{first.name[:-1]}{i}")
        if i:
            shutil.copytree(first, path, copy_function=os.link)
        found.append(LoRARequest(path.name, i + 1, str(path)))
    return found


def add_rest(base: Path, lora: Path, out: Path, r: int) -> Path:
    """A copy of a LoRA that adapts the embedding and the output head too."""
    from safetensors.torch import load_file, save_file
    from vllm_adafuse.format.backbone import Backbone

    backbone = Backbone.from_path(str(base))
    vocab, hidden = backbone.vocab_size, backbone.hidden_size
    tensors = load_file(lora / "adapter_model.safetensors")
    for name, shape in {
        "lm_head.lora_A.weight": (r, hidden), "lm_head.lora_B.weight": (vocab, r),
        "model.embed_tokens.lora_embedding_A": (r, vocab),
        "model.embed_tokens.lora_embedding_B": (hidden, r),
    }.items():  # fmt: skip
        tensors[f"base_model.model.{name}"] = (torch.randn(shape) * hidden**-0.5).bfloat16()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    shutil.copy(lora / "adapter_config.json", out)
    return out


def start_all(
    options: argparse.Namespace, root: Path, wanted: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """An engine for each name, by the arguments that it has beside those of `start`; of these,
    `env` are variables of its process, and `loads` requests whose adapters it is to have.

    One after the other; all at once if each is told its share of the GPU (`options.cache`).
    """
    def one(name: str, arguments: dict[str, Any]) -> Any:
        extra = dict(arguments)
        loads = extra.pop("loads", [])
        with spawned_with(extra.pop("env", {})), phase(f"start of {name}"):
            llm = start(options, root, **extra)
        with phase(f"loads of {name}"):
            load(llm, loads)
        return llm

    if any("env" in arguments for arguments in wanted.values()) or options.cache is not None:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if options.cache is None:  # vLLM finds out what is free
        return {name: one(name, arguments) for name, arguments in wanted.items()}
    load_general_plugins()  # the first thread would, and the others would not wait for it
    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(one, wanted, wanted.values())))


def make_engines(options: argparse.Namespace, root: Path) -> dict[str, Engine]:
    """Row -> what is timed for it; rows of one engine share it."""
    from vllm.lora.request import LoRARequest

    rest, mixtures = None, []
    with phase("adapters are made"):
        loras = make_loras(options, root, options.loras)
        if {"mixtures", "fp8_mixtures"}.intersection(options.engines):
            mixtures = make_mixtures(options, root)
        if "both" in options.engines:
            path = add_rest(root / "base", root / "lora0", root / "rest", options.r)
            rest = LoRARequest("rest", len(loras) + 1, str(path))
    many = {
        "enable_lora": True, "max_loras": len(loras), "max_lora_rank": rank(options.r), "loads": loras
    }  # fmt: skip
    kinds = {
        "vllm": many | {"additional_config": VLLM_LORA}, "adafuse": many,
        "both": many | {
            "additional_config": BOTH, "max_cpu_loras": len(loras) + 1, "loads": [*loras, rest],
        },
        "mixtures": many | {
            "max_loras": MIXTURES, "max_lora_rank": rank(options.experts * options.r),
            "loads": mixtures,
        },
    }  # fmt: skip
    kinds["fp8"] = many | {"additional_config": FP8}
    kinds["fp8_mixtures"] = kinds["mixtures"] | {"additional_config": FP8}
    wanted: dict[str, dict] = {"stock": {}}
    wanted |= {name: extra for name, extra in kinds.items() if name in options.engines}
    rows: dict[str, Engine] = {}
    for name, llm in start_all(options, root, wanted).items():
        rows |= {
            "stock": {"stock": Engine(llm)},
            "vllm": {"vllm_one": Engine(llm, loras[0]), "vllm_many": Engine(llm, loras)},
            "adafuse": {
                "one": Engine(llm, loras[0]), "many": Engine(llm, loras), "base": Engine(llm)
            },
            "both": {
                "both_one": Engine(llm, loras[0]), "both_many": Engine(llm, loras),
                "both_base": Engine(llm), "both_rest": Engine(llm, rest),
            },
            "mixtures": {"mixtures": Engine(llm, [*mixtures, None])},
            "fp8": {"fp8_one": Engine(llm, loras[0]), "fp8_many": Engine(llm, loras)},
            "fp8_mixtures": {"fp8_mixtures": Engine(llm, [*mixtures, None])},
        }[name]  # fmt: skip
    return rows


def rank(wanted: int) -> int:
    """The least value of --max-lora-rank that vLLM takes and that holds so many ranks."""
    return min(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= wanted)


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each size and engine: times of every repeat, overhead over stock."""
    with tempfile.TemporaryDirectory() as scratch:
        engines = make_engines(options, Path(scratch))
        with phase("turns"):
            yield from take_turns(options, engines)
        with phase("engines stop"):
            for llm in {id(engine.llm): engine for engine in engines.values()}.values():
                llm.stop()


def add_options(parser: argparse.ArgumentParser, batches: str, prefill: str) -> None:
    """What every benchmark of many adapters takes."""
    add = parser.add_argument
    add("--model", default="llama-3-8b", choices=SHAPES)
    add("--layers", type=int, help="fewer layers, while working")
    add_work(parser, batches, prefill)
    add("--r", default=16, type=int, help="of the LoRAs and of each expert")
    add("--cache", type=float, metavar="GIB",
        help="of keys and values, for each engine; default what the sizes need")  # fmt: skip
    add("--memory", type=float,
        help="of the GPU, for each engine, where vLLM is to choose the cache: then one starts after "
        "the other")  # fmt: skip
    add("--dtype", default="bfloat16")
    add("--out", type=Path, help="folder of the result file")
    add("--commit", default="", help="of the measured code")


def run(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Iterator[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Saves rows as they come, behind one of the options; returns them.

    Raises:
        ValueError: the sizes do not fit the options.
    """
    imported()
    out, commit = options.out, options.commit
    check_ids(options.ids, options.text_ids)
    if options.cache is None and options.memory is None:
        options.cache = round(max(cache_needs(vars(options)).values()) * 1.1 + 0.5, 1)
    if large := too_large(vars(options)):
        size, need = max(large.items(), key=lambda item: item[1])
        raise ValueError(
            f"cache is {options.cache:g} GiB, expected at least {need:.2f} for {name_of(size)}"
        )
    options.longest = longest(vars(options))
    told = {k: v for k, v in vars(options).items() if k not in ("out", "commit")}
    rows, path = [{"options": told}], None
    for row in measure(options):
        rows.append(row)
        path = record.save(name, rows, out, commit, path)
    print(json.dumps({"saved": str(path)}))
    return rows


def engine_names(text: str) -> list[str]:
    """Engines of a command line, each known."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: expected some of {', '.join(ENGINES)} (stock is always there)"
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, "1,8,32,64,128", "16x500")
    parser.add_argument("--engines", default=["vllm", "adafuse", "mixtures"], type=engine_names,
                        help=f"beside stock: {', '.join(ENGINES)}; each has its rows")  # fmt: skip
    parser.add_argument("--loras", default=16, type=int)
    parser.add_argument("--experts", default=8, type=int, help="of each mixture")
    parser.add_argument("--top-k", default=2, type=int)
    run("lora", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
