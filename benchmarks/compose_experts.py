"""What a mixture of ready LoRAs is worth: perplexity on held-out text of every LoRA's domain.

    python -m benchmarks.compose_experts --work work/quality --size small

On the backbone and corpus of `benchmarks.quality` (made where the work folder has none) one PEFT
LoRA is trained per domain. Then each LoRA alone, their average, and mixtures with a fitted router
of several k are judged. The LoRA that was trained on a domain is the bound: a mixture is not told
which domain a text is of. Writes `benchmarks/results/compose-experts-*.json`, prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.quality.corpus import DOMAINS
from benchmarks.quality.sizes import SIZES, Size

MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def train_lora(domain: str, size: Size, data: Any, work: Path) -> Path:
    """One domain's LoRA, of the rank of all of the experiment's experts together."""
    import torch
    from peft import LoraConfig, get_peft_model

    from benchmarks.quality.train import fit, generator, load_backbone

    out = work / "loras" / domain
    if (out / "adapter_model.safetensors").exists():
        return out
    print(f"LoRA of {domain}", flush=True)
    torch.manual_seed(0)
    r = size.r * size.experts
    config = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=MODULES)
    model, rng = get_peft_model(load_backbone(work), config), generator(0)
    shares = {name: float(name == domain) for name in DOMAINS}
    rates = sorted({rate for rate, _ in size.choices})
    fit(
        model,
        [p for p in model.parameters() if p.requires_grad],
        lambda: data.batch("adapt", size.batch, rng, shares),
        size.steps,
        rates[len(rates) // 2] / 2,
        0.0,
    )
    model.save_pretrained(out)
    return out


def write_samples(data: Any, work: Path) -> dict[str, list[Path]]:
    """The text that the LoRAs were trained on, as plain files."""
    from transformers import AutoTokenizer

    tokenizer, files = AutoTokenizer.from_pretrained(work / "base", trust_remote_code=False), {}
    for domain in DOMAINS:
        file = work / "samples" / f"{domain}.txt"
        file.parent.mkdir(exist_ok=True)
        ids = data.tokens[domain, "adapt"].tolist()
        file.write_text(tokenizer.decode(ids, skip_special_tokens=True), "utf-8")
        files[domain] = [file]
    return files


def candidates(size: Size, data: Any, work: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, model, further figures) of everything that is judged."""
    import torch
    from peft import PeftModel
    from vllm_adafuse.experts.compose import RouterOptions, compose_experts
    from vllm_adafuse.offline import reference

    from benchmarks.quality.train import DEVICE, load_backbone

    yield "backbone", load_backbone(work), {}
    loras = {domain: train_lora(domain, size, data, work) for domain in DOMAINS}
    for domain, path in loras.items():
        yield f"LoRA of {domain}", PeftModel.from_pretrained(load_backbone(work), path), {}
    samples = write_samples(data, work)
    fits = [(f"fitted, k = {k}", k) for k in range(1, len(loras) + 1)]
    for name, k in [("uniform", None), *fits]:
        out = work / "mixtures" / name.replace(" ", "")
        shutil.rmtree(out, ignore_errors=True)
        options = RouterOptions(top_k=k) if k else RouterOptions(router="uniform")
        made = compose_experts(loras, out, work / "base", samples if k else None, options)
        figures = made.separability.to_json() if made.separability else {}
        model = reference.load(work / "base", out, dtype=torch.float32, device_map=DEVICE)
        yield name, model, figures


def table(rows: list[dict[str, Any]], domains: list[str]) -> str:
    """Perplexities, in Markdown; the last line takes each domain's own LoRA."""
    by_name = {row["name"]: row["perplexity"] for row in rows}
    own = {domain: by_name[f"LoRA of {domain}"][domain] for domain in domains}
    lines = [
        "| | " + " | ".join(domains) + " | all |",
        "|---" * (len(domains) + 2) + "|",
    ]
    for name, values in (by_name | {"each its own LoRA": own}).items():
        mean = math.exp(sum(math.log(values[d]) for d in domains) / len(domains))
        cells = [f"{values[d]:.2f}" for d in domains]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {mean:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs what the work folder does not have yet, and writes the result file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compose_experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="small", help="as benchmarks.quality's")
    add("--work", type=Path, default=Path("work/quality"), help="its work folder")
    add("--roots", type=Path, nargs="+", help="where to look for text")
    add("--out", type=Path, help="folder of the result file (default benchmarks/results)")
    add("--commit", default="", help="of the measured code, where there is no git history")
    args = parser.parse_args(argv)

    from benchmarks.quality.data import Data, prepare
    from benchmarks.quality.train import judge, pretrain

    size, work = SIZES[args.size], args.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "corpus.json").exists():
        prepare(size, work, args.roots)
    data = Data(size, work)
    if not (work / "base.json").exists():
        pretrain(size, data, work)
    made = {"r": size.r * size.experts, "steps": size.steps, "corpus": data.info["fingerprint"]}
    options = {"size": args.size, "models": [f"llama-{args.size}"], **made}
    rows: list[dict[str, Any]] = []
    for name, model, figures in candidates(size, data, work):
        judged = judge(model, data)["domains"]
        perplexity = {domain: math.exp(judged[domain]["loss"]) for domain in DOMAINS}
        rows.append({"name": name, "perplexity": perplexity, **figures})
        print(name, {d: round(p, 2) for d, p in perplexity.items()}, flush=True)
    print(table(rows, list(DOMAINS)))
    path = record.save("compose-experts", [{"options": options}, *rows], args.out, args.commit)
    print(json.dumps({"saved": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
