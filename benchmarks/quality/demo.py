"""Makes the trained backbone and adapter of `make demo`, from text that this machine carries.

    python -m benchmarks.quality.demo --steps 800       minutes on a CPU
    python -m benchmarks.quality.demo --steps 20000     minutes on a GPU, and it speaks better
    python -m benchmarks.quality.demo --steps 6000 --batch 128      as much text, sooner on a GPU
    python -m benchmarks.quality.demo --install demo_model.tgz      one made on another machine

A Llama of 1.6 million parameters learns Python and prose; a mixture of four experts is trained on
both, and each expert is named after what it is used for. Files: `vllm_adafuse/demo_model`, at most
2 MiB, the weights packed (`vllm_adafuse/packed.py`). Another machine has other texts, and so makes
another model; on one machine the recipe is fixed but for the noise of floating point.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.packed import SUFFIX, TOKENIZER, pack, pack_directory, unpack, unpack_directory
from vllm_adafuse.training import AdaFuseModel, MixtureConfig
from vllm_adafuse.training.align import fit_router, router_inputs
from vllm_adafuse.training.watch import count_experts

from benchmarks.quality.data import Data, prepare
from benchmarks.quality.sizes import MIB, Size
from benchmarks.quality.train import DEVICE, fit, generator, judge, lighten, pretrain

OUT = Path(__file__).parents[2] / "vllm_adafuse" / "demo_model"
LIMIT = 2 * MIB
FILES = {
    "made_with.json",
    *(f"adapter/adapter_{name}" for name in ("config.json", f"model{SUFFIX}")),
    *(f"backbone/{name}" for name in ("config.json", "generation_config.json", f"model{SUFFIX}",
                                      f"{TOKENIZER}.xz", "tokenizer_config.json")),
}  # fmt: skip
SHARES = {"python": 0.5, "prose": 0.5, "c": 0.0, "html": 0.0, "json": 0.0}
NAMED = 1.2
ADAPTER_STEPS = 300  # about once through its text; more, and it does worse on held-out text
# A conversation is text that goes on.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
SIZE = Size(
    hidden=160, layers=4, heads=5, inter=432, vocab=2048, length=128,
    pretrain_bytes=48 * MIB, adapt_bytes=2 * MIB, valid_bytes=MIB // 16, held_bytes=MIB // 8,
    pretrain_steps=800, pretrain_batch=32, pretrain_lr=4e-3, steps=200, batch=16, r=4, experts=4,
    choices=((1e-3, 0.05),), full_rate=0.25, seeds=(0,), judge_blocks=64,
)  # fmt: skip


class CodeAndProse(Data):
    """The corpus without its other domains."""

    def pretraining(self, rng: torch.Generator) -> torch.Tensor:
        return self.batch("pretrain", self.size.pretrain_batch, rng, SHARES)


def round_weights(base: Path) -> None:
    """Rounds a checkpoint to what a packed file holds; its config still asks for float32, as on a
    CPU."""
    file = base / "model.safetensors"
    save_file(unpack(pack(load_file(file))), file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["dtype"] = "float32"
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = base / "tokenizer_config.json"
    content = json.loads(tokenizer.read_text()) | {"chat_template": CHAT_TEMPLATE}
    tokenizer.write_text(json.dumps(content, indent=2) + "\n")


def name_experts(usage: dict[str, list[float]]) -> list[str]:
    """Names by use: code_… and prose_… where one domain uses an expert NAMED times as much."""
    names = []
    for e, (code, prose) in enumerate(zip(usage["python"], usage["prose"])):
        ratio = (code + 1e-9) / (prose + 1e-9)
        kind = "code" if ratio > NAMED else "prose" if ratio < 1 / NAMED else "both"
        names.append(f"{kind}_{e}")
    return names


def start_router(model: AdaFuseModel, data: Data) -> None:
    """The first half of the experts for code, the second for prose: routes that can be read.

    Routers that start by chance share the work as well, but by no rule that people see.
    """
    experts, rng = model.mixture.num_experts, generator(1)
    inputs, targets = [], []
    for i, domain in enumerate(d for d, share in SHARES.items() if share):
        only = dict.fromkeys(SHARES, 0.0) | {domain: 1.0}
        ids = data.batch("adapt", 8 * data.size.batch, rng, only)
        read = router_inputs(model, ids.split(data.size.batch))
        target = torch.zeros(len(read), experts)
        target[:, i * experts // 2 : (i + 1) * experts // 2] = 2 / experts
        inputs.append(read)
        targets.append(target)
    fit_router(model, torch.cat(inputs), torch.cat(targets))


def train_adapter(base: Path, data: Data, out: Path) -> dict[str, Any]:
    """Trains and saves the mixture on a backbone; returns held-out perplexities and usage."""
    from transformers import AutoModelForCausalLM

    size, rng = data.size, generator(0)
    backbone = lighten(
        AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, trust_remote_code=False
        ).to(DEVICE)
    )
    config = MixtureConfig(num_experts=size.experts, top_k=2, r=size.r, balance_coef=1e-3)
    model = AdaFuseModel.from_backbone(backbone, config, "../backbone")
    with model.disabled():
        before = judge(model, data)["domains"]
    start_router(model, data)
    rate, routers = size.choices[0]  # slow routers keep the rule that they start with
    fit(model, model.parameter_groups(1.0, routers),
        lambda: data.batch("adapt", size.batch, rng, SHARES), size.steps, rate, 0.0)  # fmt: skip
    after = judge(model, data)["domains"]
    domains = [d for d, share in SHARES.items() if share]
    usage = {
        d: count_experts(model, data.judged(d).split(size.batch)).mean(0).tolist() for d in domains
    }
    model.adapter_config["expert_names"] = name_experts(usage)
    model.save_pretrained(out, torch.bfloat16)
    perplexity = {
        d: {"backbone": math.exp(before[d]["loss"]), "adapted": math.exp(after[d]["loss"])}
        for d in domains
    }
    return {"held_out_perplexity": perplexity, "usage": usage}


def make(
    out: Path, size: Size, roots: list[Path] | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """Trains and writes the two directories; returns what `made_with.json` says.

    Args:
        out: is written anew.
        size: of backbone and training.
        roots: folders to take text from.
        seconds: for pretraining; the adapter's steps are cut in the same measure.

    Raises:
        ValueError: the files are larger than LIMIT.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        print("gathering text", flush=True)
        prepare(size, work, roots)
        data = CodeAndProse(size, work)
        print("pretraining the backbone", flush=True)
        pretrain(size, data, work, seconds)
        made = json.loads((work / "base.json").read_text())["steps"]
        steps = max(1, size.steps * made // size.pretrain_steps)
        data.size = size = dataclasses.replace(size, pretrain_steps=made, steps=steps)
        round_weights(work / "base")
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        print("training the adapter", flush=True)
        figures = train_adapter(work / "base", data, out / "adapter")
        shutil.copytree(work / "base", out / "backbone")
    pack_directory(out)
    about = {
        "made_by": "python -m benchmarks.quality.demo",
        "size": dataclasses.asdict(size),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "corpus": data.info["fingerprint"],
        **figures,
    }
    (out / "made_with.json").write_text(json.dumps(about, indent=1) + "\n")
    check(out)
    return about


def check(folder: Path) -> dict[str, Any]:
    """Checks what `make demo` and the package take: these files, small, an adapter that loads.

    Returns:
        What `made_with.json` says.

    Raises:
        ValueError: with all that is wrong.
    """
    sizes = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    wrong = [f"lacks {name}" for name in sorted(FILES - sizes.keys())]
    wrong += [f"has {name}, which does not belong there" for name in sorted(sizes.keys() - FILES)]
    if (total := sum(sizes.values())) > LIMIT:
        wrong.append(f"has {total} bytes, expected at most {LIMIT}")
    if not wrong:
        with tempfile.TemporaryDirectory() as scratch:
            unpacked = Path(scratch).resolve() / "pair"
            unpack_directory(folder, unpacked)
            backbone = Backbone.from_path(str(unpacked / "backbone"))
            adapter, wrong = check_adapter(unpacked / "adapter", backbone)
            named = adapter and adapter.config.base_path(adapter.path)
            if adapter and named != str(unpacked / "backbone"):
                wrong.append(f"has an adapter of {named}, expected its own backbone")
    if wrong:
        raise ValueError(f"{folder}: " + "; ".join(wrong))
    return json.loads((folder / "made_with.json").read_text())


def install(archive: Path, out: Path = OUT) -> dict[str, Any]:
    """Puts a model that was made elsewhere in the place of the one in `out`.

    Args:
        archive: a tar file of a folder `demo_model`, as `make` writes it.
        out: is replaced, once all is checked.

    Returns:
        What `made_with.json` says.

    Raises:
        ValueError: not such a folder, or adapting made it worse on held-out text.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        new = Path(scratch) / "demo_model"
        about = check(new)
        for domain, perplexity in about["held_out_perplexity"].items():
            before, after = perplexity["backbone"], perplexity["adapted"]
            if after >= before:
                raise ValueError(
                    f"{archive}: perplexity of {domain} is {after:.2f} adapted and {before:.2f} "
                    "before, expected less; train longer (--steps)"
                )
        for file in new.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    return about


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800, help="of pretraining; a quarter for "
                        f"the adapter, at most {ADAPTER_STEPS} (default 800)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=SIZE.pretrain_batch,
                        help="blocks of a step; half for the adapter (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=1e6,
                        help="of pretraining; fewer steps are made where these do not suffice")
    parser.add_argument("--out", type=Path, default=OUT, help="the directory to write anew")
    parser.add_argument("--roots", type=lambda t: [Path(p) for p in t.split(",")],
                        help="folders to take text from")  # fmt: skip
    parser.add_argument("--install", type=Path, metavar="TGZ",
                        help="train nothing: check this archive of a demo_model and unpack it to "
                        "--out")  # fmt: skip
    args = parser.parse_args()
    size = dataclasses.replace(
        SIZE, pretrain_steps=args.steps, pretrain_batch=args.batch,
        steps=min(ADAPTER_STEPS, max(1, args.steps // 4)), batch=max(1, args.batch // 2),
    )  # fmt: skip
    about = (install(args.install, args.out) if args.install
             else make(args.out, size, args.roots, 60 * args.minutes))  # fmt: skip
    print(json.dumps({k: about[k] for k in ("held_out_perplexity", "usage")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
