"""`vllm-adafuse random`: an adapter with random weights, to try a backbone or to load-test."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_adafuse.cli.common import add_example
from vllm_adafuse.cli.parser import COUNT, value_of
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import (
    LAYER_WISE,
    MIXES,
    PRE_GATED,
    ROUTER_INPUTS,
    ROUTER_LOGITS,
    ROUTER_SCOPES,
    ROUTER_WEIGHTS,
)
from vllm_adafuse.format.context_keys import CONTEXTS
from vllm_adafuse.format.places import output_problem, require_backbone
from vllm_adafuse.text import printable

DESCRIPTION = """\
Writes an adapter for a backbone with random weights, so sized that its deltas matter. It makes
the model talk nonsense, at the speed of a trained adapter of the same shape.
"""


def integers(text: str) -> list[int]:
    """"4,8,16" -> [4, 8, 16]."""
    return [int(part) for part in text.split(",")]


def numbers(text: str) -> list[float]:
    """"8,16.5" -> [8.0, 16.5]."""
    return [float(part) for part in text.split(",")]


def layer_ranges(text: str) -> list[int]:
    """"0-3,5" -> [0, 1, 2, 3, 5]."""
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"{part} runs backwards")
        layers.update(range(low, high + 1))
    return sorted(layers)


INTEGERS = value_of(integers, "whole numbers such as 4,8,16")
NUMBERS = value_of(numbers, "numbers such as 8,16.5")
LAYERS = value_of(layer_ranges, "layers such as 0-3,5")


def experts_per_token(text: str) -> int | dict[str, int] | list[int]:
    """"2" -> 2, "self_attn=1,mlp=2" -> an object of blocks, "1,2,2" -> a list of layers."""
    if "=" in text:
        pairs = (part.split("=") for part in text.split(","))
        return {block.strip(): int(value) for block, value in pairs}
    values = integers(text)
    return values if len(values) > 1 else values[0]


def names(text: str) -> list[str]:
    """"q_proj,v_proj" -> ["q_proj", "v_proj"]."""
    return [part.strip() for part in text.split(",")]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "random", help="make an adapter with random weights", description=DESCRIPTION
    )
    add_example(
        parser,
        "  vllm-adafuse random ./Llama-2-7b-hf ./adapter --num-experts 4 --top-k 2 "
        "--r 4,8,16,16 \\\n      --target-modules q_proj,v_proj --layers 0-3,5\n"
        "  vllm-adafuse random ./Llama-2-7b-hf ./mixlora --routing layer_wise "
        "--router-scope block \\\n      --mix ffn_output "
        "--expert-modules gate_proj,up_proj,down_proj",
    )
    parser.add_argument("base", metavar="BASE", help="the backbone: a directory or a cached name")
    parser.add_argument("out", metavar="OUT", help="the adapter directory to make")
    add = parser.add_argument
    add("--num-experts", type=COUNT, default=8, metavar="E", help="experts (default 8)")
    many = value_of(experts_per_token, "2, self_attn=1,mlp=2 or 1,2,2")
    add("--top-k", type=many, default=2, metavar="K",
        help="experts per token (default 2); layer-wise also self_attn=1,mlp=2 or one per layer: "
        "1,2,2,…")  # fmt: skip
    add("--r", type=INTEGERS, default=[16], metavar="R", help="rank, or E ranks: 4,8,16,16")
    add("--lora-alpha", type=NUMBERS, metavar="ALPHA", help="alpha, or E of them (default 2 r)")
    add("--target-modules", type=names, metavar="NAMES", help="q_proj,v_proj (default: all)")
    add("--layers", type=LAYERS, metavar="LAYERS", help="adapted layers: 0-3,5 (default all)")
    inputs, weights = ROUTER_INPUTS, ROUTER_WEIGHTS
    add("--router-input", choices=inputs,
        help=f"what the router reads (default {inputs[0]})")  # fmt: skip
    add("--router-weights", choices=weights, default=weights[0], help="from logits to weights")
    add("--router-temperature", type=float, default=1.0, metavar="T", help="divides the logits")
    add("--use-rslora", action="store_true", help="scale by alpha / sqrt(r) instead of alpha / r")
    add("--router-bias", action="store_true", help="also write router.bias")
    add("--router-layer", type=int, metavar="M", help="the router reads what enters layer M")
    add("--router-context", choices=CONTEXTS, help="the router sees the request's past too")
    add("--router-context-scale", type=float, metavar="S",
        help="of what the past says (default 1)")  # fmt: skip
    add("--router-context-half-life", type=float, metavar="N",
        help="what was said counts half after N tokens (default: all counts alike)")  # fmt: skip
    group = parser.add_argument_group("layer-wise routing")
    group.add_argument("--routing", choices=(PRE_GATED, LAYER_WISE), default=PRE_GATED,
                       help="layer_wise: routers inside the layers")  # fmt: skip
    wise = group.add_argument
    wise("--router-scope", choices=ROUTER_SCOPES, help="what has a router of its own")
    wise("--router-logits", choices=ROUTER_LOGITS, help="abs: |W x + b|, as Arrow")
    wise("--mix", choices=MIXES, help="ffn_output: whole MLPs are mixed, as MixLoRA")
    wise("--shared-A", action="store_true", help="one lora_A for all experts, as HydraLoRA")
    wise("--layer-experts", type=INTEGERS, metavar="E,E,…", help="experts of each layer, as MoLA")
    wise("--expert-modules", type=names, metavar="NAMES", help="those with experts (default: all)")
    wise("--always-r", type=int, metavar="R", help="rank of LoRA parts that are always on")
    wise("--always-alpha", type=float, metavar="ALPHA", help="their alpha (default 2 R)")
    wise("--always-modules", type=names, metavar="NAMES", help="where they are (default: all)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the adapter, with a progress bar on stderr."""
    import torch
    from vllm_adafuse.format.random_adapter import make_random_adapter

    out = Path(args.out)
    if problem := output_problem(out):
        raise AdapterError(f"output directory {out}", [problem])
    alphas = args.lora_alpha
    options = {
        key: getattr(args, key)
        for key in ("router_layer", "router_context", "router_context_scale",
                    "router_context_half_life", "router_scope", "router_logits", "mix", "always_r",
                    "always_alpha")
        if getattr(args, key) is not None
    }  # fmt: skip
    if args.shared_A:
        options["shared_A"] = True
    if args.always_r and args.always_alpha is None:
        options["always_alpha"] = 2 * args.always_r
    if args.routing == LAYER_WISE:
        options["routing"] = LAYER_WISE
    if args.routing == PRE_GATED or args.router_input is not None:
        options["router_input"] = args.router_input or ROUTER_INPUTS[0]
    made = make_random_adapter(
        require_backbone(args.base),
        out,
        num_experts=args.num_experts,
        top_k=args.top_k,
        r=args.r[0] if len(args.r) == 1 else args.r,
        lora_alpha=alphas[0] if alphas and len(alphas) == 1 else alphas,
        target_modules=args.target_modules,
        layers=args.layers,
        router_bias=args.router_bias,
        dtype=getattr(torch, args.dtype),
        seed=args.seed,
        progress=True,
        layer_experts=args.layer_experts,
        expert_modules=args.expert_modules,
        always_modules=args.always_modules,
        router_weights=args.router_weights,
        router_temperature=args.router_temperature,
        use_rslora=args.use_rslora,
        **options,
    )
    print(printable(f"wrote {made}; look into it with: vllm-adafuse inspect {made}"))
    return 0
