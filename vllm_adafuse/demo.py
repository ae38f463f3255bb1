"""The whole way of an adapter, on a small model: `python -m vllm_adafuse.demo`.

Takes the trained backbone and adapter beside this file (`benchmarks.quality.demo` made them), or
makes a pair with random weights; generates offline through the plugin, shows how tokens were routed,
and writes a page of it; then one server has the base, the mixture and two of its experts as plain
LoRAs, chosen by `model=`, and takes a fourth adapter while it runs. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from vllm_adafuse.cli.page import render_page
from vllm_adafuse.cli.tokens import route_text
from vllm_adafuse.demo_server import LATER, OPTIONS, Client, make_adapters, printable
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline import reference
from vllm_adafuse.offline.routing import OfflineRouter
from vllm_adafuse.packed import unpack_directory
from vllm_adafuse.server import running_server, vllm_serve
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
BACKBONE: dict[str, Any] = {"vocab_size": 4001, "hidden_size": 256, "intermediate_size": 512}
TRAINED = Path(__file__).with_name("demo_model")
CODE_AND_PROSE = """\
def area(width, height):
    return width * height

The area of a rectangle is the product of its width and its height.
"""


def _option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Options of the demo; each is a command-line flag."""

    directory: str = _option("demo", "where backbone, adapter and logs are kept between runs")
    prompts: int = _option(16, "prompts of the offline batch")
    tokens: int = _option(24, "tokens to generate for each")
    weights: str = _option("trained", "the pair kept with this program", ("trained", "random"))
    experts: int = _option(8, "experts of a random adapter (E)")
    top_k: int = _option(2, "experts that each token of a random adapter uses (k)")
    rank: int = _option(8, "rank of each expert of a random adapter")
    seed: int = _option(0, "seed of random weights")
    timeout: float = _option(300.0, "seconds that the server may take to start")

    @property
    def trained(self) -> bool:
        """Whether the trained pair is used: an installed package may lack it."""
        return self.weights == "trained" and TRAINED.is_dir()


@dataclass(frozen=True)
class Place:
    """What the demo has made."""

    base: Path
    adapter: Path
    on_gpu: bool

    @property
    def engine_log(self) -> Path:
        return self.base.with_name("engine.log")

    @property
    def serve_log(self) -> Path:
        return self.base.with_name("serve.log")

    @property
    def overrides(self) -> dict[str, str]:
        """The one thing that names the adapter to vLLM."""
        return {"adafuse_adapter": str(self.adapter)}


def set_environment() -> bool:
    """Sets vLLM's variables, before it is imported; what the user has set stays.

    Returns:
        Whether there is an NVIDIA GPU.
    """
    on_gpu = torch.cuda.is_available()
    defaults = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # The demo computes before it starts vLLM: a fork would inherit torch's threads and hang.
    defaults["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if not on_gpu:
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    return on_gpu


def make_place(options: Options, on_gpu: bool) -> Place:
    """Copies or makes backbone and adapter, or finds those of an earlier run with these options."""
    root = Path(options.directory).resolve()
    root.mkdir(parents=True, exist_ok=True)
    base, adapter, stamp = root / "backbone", root / "adapter", root / "made_with.json"
    keys = ("experts", "top_k", "rank", "seed")
    recipe = json.dumps({**BACKBONE, **{k: v for k, v in asdict(options).items() if k in keys}})
    if options.trained:
        recipe = (TRAINED / "made_with.json").read_text()
    if stamp.is_file() and stamp.read_text() == recipe:
        return Place(base, adapter, on_gpu)
    for made in (base, adapter):
        if made.is_dir():
            shutil.rmtree(made)
    if options.trained:
        for made in (base, adapter):
            unpack_directory(TRAINED / made.name, made)
    else:
        make_tiny_backbone(base, seed=options.seed, **BACKBONE)
        make_random_adapter(
            base,
            adapter,
            num_experts=options.experts,
            top_k=options.top_k,
            r=options.rank,
            seed=options.seed,
        )
    stamp.write_text(recipe)
    return Place(base, adapter, on_gpu)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Sends this process's stdout and stderr to a file, C++'s and child processes' too."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def offline_engine(place: Place) -> Iterator[Any]:
    """A `vllm.LLM` with the adapter, gone at the end: the server needs its memory."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    small = {"gpu_memory_utilization": 0.2, "enforce_eager": True, "dtype": "float32"}
    small = {} if place.on_gpu else small
    llm = LLM(str(place.base), hf_overrides=place.overrides, disable_log_stats=True, **small)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def reference_tokens(
    place: Place, prompts: Sequence[Sequence[int]], count: int, adapted: bool
) -> list[list[int]]:
    """What plain transformers says, with the adapter by the reference or without it."""
    from transformers import AutoModelForCausalLM

    if adapted:
        model = reference.load(place.base, place.adapter, dtype="auto")
    else:
        model = AutoModelForCausalLM.from_pretrained(
            place.base, dtype="auto", trust_remote_code=False
        ).eval()
    said = []
    for prompt in track(prompts, "  plain transformers", console=console, transient=True):
        ids = torch.tensor([list(prompt)])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        said.append(out[0, ids.shape[1] :].tolist())
    return said


def show_effect(place: Place, outputs: Sequence[Any], tokens: int) -> None:
    """How many of the texts are the reference's, and how many the bare backbone's.

    Raises:
        RuntimeError: the adapter had no effect.
    """
    prompts = [output.prompt_token_ids for output in outputs]
    served = [list(output.outputs[0].token_ids) for output in outputs]
    equal, bare = (
        sum(a == b for a, b in zip(served, reference_tokens(place, prompts, tokens, adapted)))
        for adapted in (True, False)
    )
    console.print(
        f"{equal} of these {len(served)} texts are token for token those of the reference "
        f"(plain transformers), {bare} those of the backbone without the adapter."
    )
    if equal <= bare:
        raise RuntimeError("the texts are not those of the adapted model")


def show_texts(outputs: Sequence[Any]) -> None:
    """Prompts and what the adapted model made of them."""
    table = Table("prompt", "goes on", title="LLM.generate", show_lines=True)
    for output in outputs:
        table.add_row(printable(output.prompt), printable(output.outputs[0].text))
    console.print(table)


def show_routes(place: Place, tokens: Sequence[int], tokenizer: Any) -> None:
    """Every token of one prompt with its experts and their weights."""
    adapter = load_adapter(place.adapter)
    ids, gates = OfflineRouter(adapter, place.base).routes(torch.tensor(list(tokens)))
    names = adapter.config.expert_names
    table = Table("token", "id", "experts and weights", title="Routes")
    for token, experts, weights in zip(tokens, ids.tolist(), gates.tolist()):
        cell = Text()
        for expert, weight in zip(experts, weights):
            cell.append(f"{names[expert]} {weight:.2f}  ", COLOURS[expert % len(COLOURS)])
        first = COLOURS[experts[0] % len(COLOURS)]
        table.add_row(Text(repr(tokenizer.decode([token])), first), str(token), cell)
    console.print(table)


def write_routes(place: Place, text: str) -> Path:
    """A page with a text in the colours of its tokens' experts."""
    adapter = load_adapter(place.adapter)
    tokens, names = route_text(adapter, place.base, text), adapter.config.expert_names
    page = place.base.with_name("routes.html")
    facts = f"{len(tokens)} tokens, coloured by their first expert"
    page.write_text(render_page("Routes of the demo's mixture", facts, names, tokens), "utf-8")
    return page


def show_server(client: Client, adapters: dict[str, Path], output: Any, tokens: int) -> None:
    """Every model of one server on one prompt; another adapter loaded meanwhile; /metrics."""
    served = ["base", *(name for name in adapters if name != LATER)]
    if sorted(client.models()) != sorted(served):
        raise RuntimeError(f"the server has {client.models()}, expected {served}")
    before = client.metrics()
    said = client.show_texts(served, output.prompt, tokens)
    same = said["mixture"] == output.outputs[0].text
    same = "the same text" if same else "another text (a near tie in other company)"
    console.print(f"[dim]mixture: {same} as offline for this prompt[/dim]")
    client.show_chat("mixture", "Which experts does this token need?", tokens)
    console.print(f"[bold]loading {LATER} into the running server[/bold] (one expert a token)")
    client.load(LATER, adapters[LATER])
    client.show_texts([LATER], output.prompt, tokens)
    client.show_metrics(before)


class Stages:
    """Says what is under way and how long it took; remembers it for the error message."""

    name = "starting"

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.name, start = name, time.monotonic()
        console.print(Text(f"\n{name} ...", "bold"), soft_wrap=True)
        yield
        console.print(f"[dim]{time.monotonic() - start:.1f} s[/dim]")


def run(options: Options, stage: Stages) -> None:
    """Runs the demo.

    Args:
        options: of the demo.
        stage: names what is under way.
    """
    on_gpu = set_environment()
    from transformers.utils import logging

    logging.disable_progress_bar()
    console.print(
        "A model of 1.6 million parameters, trained on Python and prose: it speaks a little of "
        "both."
        if options.trained
        else "The weights are random, so every text below is babble: its sense is that it is the "
        "adapted model's own.",
        soft_wrap=True,
    )
    with stage(f"a small backbone and an adapter in {options.directory}/"):
        place = make_place(options, on_gpu)
    with stage(f"generating for {options.prompts} prompts with LLM.generate"):
        with output_to(place.engine_log), offline_engine(place) as llm:
            tokenizer = llm.get_tokenizer()
            from vllm import SamplingParams

            sampling = SamplingParams(temperature=0, max_tokens=options.tokens)
            outputs = llm.generate(real_prompts(options.prompts), sampling)
        show_texts(outputs)
        show_effect(place, outputs, options.tokens)
    with stage("routing code and prose"):
        page = write_routes(place, CODE_AND_PROSE)
        tokens = tokenizer(CODE_AND_PROSE)["input_ids"]
        show_routes(place, tokens if options.trained else outputs[0].prompt_token_ids, tokenizer)
    adapters = make_adapters(place.adapter, place.base.parent)
    modules = [f"{name}={path}" for name, path in adapters.items() if name != LATER]
    command = vllm_serve(place.base, *OPTIONS, "--lora-modules", *modules)
    shown = " ".join(["vllm serve", f"{options.directory}/backbone", *OPTIONS, "--lora-modules"])
    shown += "".join(f" {m.replace(str(place.base.parent), options.directory)}" for m in modules)
    with stage(f"starting {shown}"):
        if not on_gpu:
            command += ["--enforce-eager", "--gpu-memory-utilization", "0.2", "--dtype", "float32"]
        env = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        with running_server(command, place.serve_log, options.timeout, env) as server:
            console.print(f"healthy at {server.url}; its log: {place.serve_log}", soft_wrap=True)
            show_server(Client(server, console), adapters, outputs[0], options.tokens)
    console.print(
        f"\n[bold]Done.[/bold] The routes of a text: {page}\nThe same live, while a server runs: "
        "vllm-adafuse playground URL",
        soft_wrap=True,
    )


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_adafuse.demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for option in fields(Options):
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            type=type(option.default),
            default=option.default,
            choices=option.metadata["choices"],
            help=option.metadata["help"],
        )
    return Options(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    options, stage = parse_options(argv), Stages()
    try:
        run(options, stage)
    except Exception as e:
        log = Path(options.directory, "error.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        message = f"\nThe demo failed while {stage.name}: {e}\n(traceback: {log}, logs beside it)"
        console.print(Text(message, "red"))
        return 1
    return 0


console = Console(highlight=False)

if __name__ == "__main__":
    sys.exit(main())
