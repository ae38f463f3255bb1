"""Decode and prefill of whole vLLM engines, the stock backbone beside ours and beside LoRA.

    python -m benchmarks.engine --model llama-2-7b --batches 1,8,32,128 --repeats 5
    python -m benchmarks.engine --engines stock,lora,adafuse,adafuse:16/16/2 --group 3
    python -m benchmarks.engine --prefill 16x1000,1x512,1x2048 --mixed 400
    python -m benchmarks.engine --ids uniform,text --text-ids ids-32000.npy
    python -m benchmarks.engine --engines stock,adafuse,context,pages,pages_context

Engines: `stock`, the bare backbone; `lora`, vLLM's own LoRA with one static adapter of rank r;
`granite`, Granite Switch with E LoRAs of rank r, one active (see benchmarks/granite.py), and
`granite_bare`, its model without any;
`adafuse`, or `adafuse:E/r/k` for other experts, ranks and top-k than the options say;
`layer_wise`, or `layer_wise:E/r/k`, the same with a router in every linear; `context`, with a
router that sees the request's past; `pages` and `pages_context`, the mixtures of `adafuse` and
`context` where every request names its adapter (`--enable-lora`). All of ours take `:E/r/k`, so that
`adafuse:64/16/2,pages:64/16/2` puts a mixture that requests name beside the same one pinned.

Random weights (`load_format="dummy"`), vLLM's default settings but for its share of memory, greedy.
Prompts are uniform ids, or stretches of real text (benchmarks/prompts.py); a request behind one of
text says one token of the text over and over, drawn anew for each, as random weights would not say
text.

The engines live side by side in processes of their own and take turns, so that drift of the clock
hits all alike. The first engine is what the others are compared with. With `--group N` at most N
live at the same time, the first always among them and timed again beside each group.

With `--mixed N` also N requests of everyday lengths, all there from the start: the time of all.
Beside each time stands the CPU time that a step takes of the worker's thread. Where issue 23 has
figures to reach, they are printed beside what was found (benchmarks/bars.py).

Decode time per step is the difference of a long and a short generation over the difference of
their lengths. Prefill is the time until prompts have one token each; a single prompt's is the time
to its first token.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.files import save_tensors
from vllm_adafuse.format.keys import CONFIG_FILE, WEIGHTS_FILE
from vllm_adafuse.format.normals import Normals
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving.pool import COLUMNS_PER_ADAPTER, PAGE_RANKS, pages_of_rank

from benchmarks import bars, record
from benchmarks.engine_options import GRANITE, OURS, PAGES, SHAPES, Options, add_work
from benchmarks.turns import Engine, take_turns

# Of what sends the same prompts again.
FRESH = {"enable_prefix_caching": False}
NO_KEYS: dict[str, str] = {}
# Leaves LoRA requests to vLLM's own manager.
VLLM_LORA = {"adafuse": {"lora": "vllm"}}


def write_config(options: Options, path: Path) -> None:
    """A checkpoint directory with nothing but a config.json."""
    from vllm_adafuse.tiny import tiny_config

    name, hidden, inter, layers, heads, kv_heads, vocab = SHAPES[options.model]
    config = tiny_config(
        name,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=16384,
    )
    config.save_pretrained(path)


def _memory(worker) -> dict[str, int]:
    """Bytes on the device: all that is loaded, and of it experts and passports; then the peak of
    a step above it, and what is left for keys and values. 0 where vLLM does not count (CPU)."""
    from vllm_adafuse.serving import wrap

    model = worker.get_model()
    router = wrap.router_of(model)
    return {
        "model_bytes": int(getattr(worker.model_runner, "model_memory_usage", 0)),
        "bank_bytes": sum(bank.nbytes for bank in wrap.banks_of(model)),
        "passport_bytes": router.passport_bytes if router is not None else 0,
        "step_bytes": int(getattr(worker, "peak_activation_memory", 0)),
        "cache_bytes": int(getattr(worker, "available_kv_cache_memory_bytes", 0)),
    }


def make_lora(base: Path, out: Path, r: int, scale: float = 2.0) -> Path:
    """A random PEFT LoRA on all linears of a backbone; scale: of B A, both of which keep what they
    are given as large as it is."""
    backbone, tensors = Backbone.from_path(str(base)), {}
    normals = Normals(torch.default_generator, torch.bfloat16)
    for name, (size_in, size_out) in backbone.linears.items():
        for part, shape in (("A", (r, size_in)), ("B", (size_out, r))):
            value = normals.take(*shape, scale=shape[1] ** -0.5)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = value
    out.mkdir()
    save_tensors(tensors, out / WEIGHTS_FILE)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": scale * r,
        "target_modules": sorted(backbone.modules()),
        "base_model_name_or_path": str(base),
        "bias": "none",
    }
    (out / CONFIG_FILE).write_text(json.dumps(config))
    return out


def make_adapter(
    base: Path, out: Path, mixture: tuple[int, int, int], keys: Mapping[str, str] = NO_KEYS
) -> Path:
    """A random adapter of (E, r, k) on all linears of a backbone; keys: more of its config."""
    experts, r, top_k = mixture
    return make_random_adapter(
        base, out, num_experts=experts, top_k=top_k, r=r, dtype=torch.bfloat16, **keys
    )


def room_for(experts: int, r: int) -> dict[str, int]:
    """vLLM's options for a pool that one mixture of E experts fills, also if it sees the past."""
    from benchmarks.lora import rank

    loras = max(1, -(-experts // COLUMNS_PER_ADAPTER))
    ranks = -(-experts * pages_of_rank(r) // loras) * PAGE_RANKS
    return {"enable_lora": True, "max_loras": loras, "max_lora_rank": rank(ranks)}


def start(kind: str, options: Options, root: Path) -> tuple[Engine, dict]:
    """One engine of a kind on the shared backbone, and the figures of its start."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    # vLLM forks this process: a pool of threads, which random weights would start, hangs the copy.
    torch.set_num_threads(1)
    base, name = root / "base", kind.replace("/", "-").replace(":", "-")
    extra, lora, control = {}, None, []
    if mixture := options.mixture(kind):
        own = kind.partition(":")[0]
        adapter = str(make_adapter(base, root / name, mixture, OURS[own]))
        if own in PAGES:
            lora, extra = LoRARequest(own, 1, adapter), room_for(*mixture[:2])
        else:
            extra["hf_overrides"] = {"adafuse_adapter": adapter}
    elif kind == "lora":
        lora = LoRARequest("lora", 1, str(make_lora(base, root / name, options.r)))
        extra |= {"enable_lora": True, "max_lora_rank": max(8, options.r), "max_loras": 1}
        extra["additional_config"] = VLLM_LORA
    elif kind in GRANITE:
        from benchmarks import granite

        count = options.experts if kind == "granite" else 0
        control = granite.write_config(base, root / name, count, options.r)
        base, extra = root / name, granite.ARGUMENTS
    begin = time.perf_counter()
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `_memory`
    arguments = {"load_format": "dummy"} | options.settings | extra
    llm = LLM(
        str(base),
        skip_tokenizer_init=True,
        dtype=options.dtype,
        quantization=options.quantization,
        gpu_memory_utilization=options.memory if options.cache is None else 0.05,
        kv_cache_memory_bytes=options.cache and int(options.cache * (1 << 30)),
        max_model_len=options.longest,
        tensor_parallel_size=options.tp,
        **arguments,
    )
    seconds = time.perf_counter() - begin
    return Engine(llm, lora, control), {"start_s": seconds} | llm.collective_rpc(_memory)[0]


def start_all(
    kinds: Sequence[str], options: Options, root: Path
) -> Iterator[tuple[str, tuple[Engine, dict] | Exception]]:
    """Engines on the shared backbone, or why one did not start; see `start`.

    One after the other; all at once if each is told its share of the GPU (`options.cache`), which
    vLLM need not find out then.
    """
    tried = functools.partial(_tried, options=options, root=root)
    if options.cache is None or not kinds:
        yield from zip(kinds, map(tried, kinds))
        return
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # the first thread would, and the others would not wait for it
    # Threads that start processes must not copy the locks of one another.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    with ThreadPoolExecutor(len(kinds)) as pool:
        yield from zip(kinds, pool.map(tried, kinds))


def _tried(kind: str, options: Options, root: Path) -> tuple[Engine, dict] | Exception:
    try:
        return start(kind, options, root)
    except Exception as e:  # told of in its row
        traceback.print_exc()
        return e


def measure(options: Options) -> Iterator[dict]:
    """One row per engine for its start, then one per group, engine and size.

    An engine that does not start, unless it is the first, is told of in a row `failed`; the others
    go on, for their time was dear.

    Raises:
        RuntimeError: an engine needs a package that is not there.
    """
    if set(GRANITE) & set(options.engines):
        from benchmarks import granite

        granite.check_installed()
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_config(options, root / "base")
        for number, group in enumerate(options.groups):
            new = [kind for kind in group if kind not in engines]
            for kind, started in start_all(new, options, root):
                row = {"engine": kind, "group": number}
                if isinstance(started, Exception):
                    if kind == options.engines[0]:
                        raise started
                    error = f"{type(started).__name__}: {started}"
                    yield row | {"what": "failed", "error": error}
                    continue
                engines[kind], figures = started
                print(f"start    {kind:16} {figures}", flush=True)
                if options.cache is None:  # else each was in the others' way
                    yield row | {"what": "start"} | figures
            for row in take_turns(options, engines):
                yield row | {"group": number}
            for kind in list(engines)[1:]:
                engines.pop(kind).stop()
        for engine in engines.values():
            engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers, while working")
    parser.add_argument("--engines", default="stock,adafuse", type=lambda t: t.split(","))
    add_work(parser, "1,8,32,128", "16x1000")
    parser.add_argument("--experts", default=8, type=int)
    parser.add_argument("--top-k", default=2, type=int)
    parser.add_argument("--r", default=16, type=int)
    parser.add_argument("--memory", default=0.4, type=float, help="of the GPU, for each engine")
    parser.add_argument(
        "--cache", type=float, metavar="GIB",
        help="of keys and values, for each engine, enough for every size: then a group's engines "
        "start all at once, and neither their start nor their memory is timed",
    )  # fmt: skip
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share each engine")
    parser.add_argument("--group", type=int, help="engines at the same time; default all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="of the backbone, as vLLM names it: fp8")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    options = Options(**arguments)
    rows, path = [{"options": vars(options)}], None
    for row in measure(options):
        rows.append(row)
        path = record.save("engine", rows, out, commit, path)
    for line in bars.lines(rows):
        print(line)
    print(json.dumps({"saved": str(path)}))
    if failed := [row["engine"] for row in rows[1:] if row["what"] == "failed"]:
        raise SystemExit(f"did not start: {', '.join(failed)}")


if __name__ == "__main__":
    main()
