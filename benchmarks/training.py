"""Training speed: AdaFuse beside plain LoRA of the same active rank, same model, same data.

    python -m benchmarks.training --model llama-2-7b --layers 8 --batch 4 --length 1024
    python -m benchmarks.training --model tiny --batch 4 --length 128 --methods peft,adafuse

Methods: `peft`, Hugging Face PEFT's LoRA of rank k r (needs peft); `lora`, the same formula as a
module of a few lines, where peft is not installed; `adafuse`, our mixture; `layerwise`, ours with
a router for every linear. The backbone is frozen with random weights, on a GPU in bfloat16; each
step is forward, backward and AdamW. Methods take turns, so that drift of the clock hits all alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.cli.cmd_random import names
from vllm_adafuse.tiny import tiny_config
from vllm_adafuse.training import AdaFuseModel, MixtureConfig

from benchmarks import record
from benchmarks.engine import SHAPES

RESULTS = Path(__file__).parent / "quality" / "results"
METHODS = ("peft", "lora", "adafuse", "layerwise")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Options:
    """What to measure; checked at construction."""

    model: str = "llama-2-7b"
    layers: int | None = None
    methods: list[str] = field(default_factory=lambda: ["lora", "adafuse", "layerwise"])
    batch: int = 4
    length: int = 1024
    experts: int = 8
    top_k: int = 2
    r: int = 16
    steps: int = 5
    repeats: int = 5

    def __post_init__(self):
        if self.model not in SHAPES:
            raise ValueError(f"model is {self.model}, expected one of {', '.join(SHAPES)}")
        if bad := [m for m in self.methods if m not in METHODS]:
            raise ValueError(f"methods has {bad[0]}, expected {', '.join(METHODS)}")


class Lora(torch.nn.Module):
    """y + s B A x, as PEFT computes it: float32 weights, autocast decides the product's dtype."""

    def __init__(self, base: torch.nn.Linear, r: int):
        super().__init__()
        self.base = base
        self.A = torch.nn.Linear(base.in_features, r, bias=False)
        self.B = torch.nn.Linear(r, base.out_features, bias=False)
        torch.nn.init.zeros_(self.B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + self.B(self.A(x)) * 2.0


def backbone(options: Options) -> Any:
    """The frozen model, with random weights."""
    from transformers import AutoModelForCausalLM

    name, hidden, inter, layers, heads, kv_heads, vocab = SHAPES[options.model]
    config = tiny_config(
        name, hidden_size=hidden, intermediate_size=inter, vocab_size=vocab,
        num_hidden_layers=options.layers or layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, max_position_embeddings=16384,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.config.use_cache = False  # for all methods alike
    return model.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32).requires_grad_(False)


def build(method: str, model: Any, options: Options) -> Any:
    """A method on a backbone of its own."""
    rank = options.top_k * options.r
    if method == "peft":
        from peft import LoraConfig, get_peft_model

        targets = [n for n, m in model.named_modules()
                   if isinstance(m, torch.nn.Linear) and ".layers." in n]  # fmt: skip
        leaves = sorted({n.rsplit(".", 1)[1] for n in targets})
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=leaves))
    if method == "lora":
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                model.set_submodule(name, Lora(module, rank).to(DEVICE))
        return model
    routing = "pre_gated" if method == "adafuse" else "layer_wise"
    config = MixtureConfig(options.experts, options.top_k, options.r, routing=routing)
    return AdaFuseModel.from_backbone(model, config)


def measure(options: Options) -> list[dict[str, Any]]:
    """Tokens per second of each method, one row a method."""
    base = backbone(options)
    vocab = SHAPES[options.model][-1]
    ids = torch.randint(3, vocab, (options.batch, options.length), device=DEVICE)
    made: dict[str, tuple[Any, torch.optim.Optimizer]] = {}
    for method in options.methods:
        model = build(method, copy.deepcopy(base), options).train()
        params = [p for p in model.parameters() if p.requires_grad]
        made[method] = model, torch.optim.AdamW(params, lr=1e-4, fused=DEVICE == "cuda")
    values: dict[str, list[float]] = {method: [] for method in made}
    memory: dict[str, int] = {}
    for repeat in range(options.repeats + 1):
        for method, (model, optimizer) in made.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
            begin = time.perf_counter()
            for _ in range(options.steps):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                memory[method] = torch.cuda.max_memory_allocated() - before
            if repeat:  # the first is warm-up
                values[method].append(
                    options.steps * ids.numel() / (time.perf_counter() - begin)
                )
    rows = []
    for method, speeds in values.items():
        row = {"what": "training", "method": method, "unit": "tokens/s", **record.summary(speeds)}
        row["of_first"] = row["median"] / record.summary(values[options.methods[0]])["median"]
        row["step_bytes"] = memory.get(method, 0)
        rows.append(row)
        print(
            f"{method:10} {row['median']:12,.0f} tokens/s ({row['min']:,.0f} to "
            f"{row['max']:,.0f})  {row['of_first']:.1%} of {options.methods[0]}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama-2-7b", choices=SHAPES)
    add("--layers", type=int, help="fewer layers")
    add("--methods", default="lora,adafuse,layerwise", type=names)
    for name, default in (("batch", 4), ("length", 1024), ("experts", 8), ("top-k", 2), ("r", 16),
                          ("steps", 5), ("repeats", 5)):  # fmt: skip
        add(f"--{name}", type=int, default=default)
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    add("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    options = Options(**arguments)
    rows = measure(options)
    path = record.save("training", [{"options": vars(options)}, *rows], out, commit)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
