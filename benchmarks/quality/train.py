"""Training and judging: the backbone from nothing, then one method with one seed."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from vllm_adafuse.tiny import tiny_config
from vllm_adafuse.training import AdaFuseModel
from vllm_adafuse.training.distill import DistillOptions, distill, make_student, mean_kl
from vllm_adafuse.training.watch import count_experts

from benchmarks.quality.data import DOMAINS, Data
from benchmarks.quality.methods import Method
from benchmarks.quality.sizes import Size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP, CLIP = 0.05, 1.0


def autocast() -> torch.autocast:
    """Products in bfloat16 on a GPU, over float32 weights; plain float32 on a CPU."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def fit(
    model: Any,
    params: list[torch.nn.Parameter],
    batch: Callable[[], torch.Tensor],
    steps: int,
    lr: float,
    decay: float,
) -> dict[str, float]:
    """Trains; returns the last loss, seconds and tokens per second (first tenth left out)."""
    optimizer = torch.optim.AdamW(
        params, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=DEVICE == "cuda"
    )
    model.train()
    losses, begin, counted = [], time.perf_counter(), 0
    skip = steps // 10
    start = begin
    for step in range(steps):
        if step == skip:
            _wait()
            start = time.perf_counter()
        ids = batch().to(DEVICE, non_blocking=True)
        if hasattr(model, "set_progress"):
            model.set_progress(step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(step, steps)
        with autocast():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counted += ids.numel() if step >= skip else 0
        if step % 100 == 99:
            losses.append(loss.item())
            print(f"  step {step + 1:5} of {steps}  loss {losses[-1]:.4f}", flush=True)
    _wait()
    now = time.perf_counter()
    return {"train_loss": loss.item(), "seconds": now - begin,
            "tokens_per_s": counted / max(1e-9, now - start)}  # fmt: skip


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def pretrain(size: Size, data: Data, work: Path) -> None:
    """The backbone, saved as a Hugging Face checkpoint in `work/base`."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(
        "LlamaForCausalLM",
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inter,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE)
    rng = generator(0)
    figures = fit(
        model, list(model.parameters()), lambda: data.pretraining(rng),
        size.pretrain_steps, size.pretrain_lr, 0.1,
    )  # fmt: skip
    figures |= {"parameters": sum(p.numel() for p in model.parameters())}
    figures |= judge(model, data)
    model.save_pretrained(work / "base")
    (work / "base.json").write_text(json.dumps(figures, indent=1))


@torch.no_grad()
def judge(model: Any, data: Data, split: str = "held") -> dict[str, Any]:
    """Loss and next-token accuracy per domain; "loss" and "accuracy" are their means."""
    model.eval()
    domains = {}
    for domain in DOMAINS:
        loss, right, count = 0.0, 0, 0
        for ids in data.judged(domain, split).split(data.size.batch):
            ids = ids.to(DEVICE)
            with autocast():
                logits = model(input_ids=ids).logits[:, :-1]
            logits, labels = logits.flatten(0, 1).float(), ids[:, 1:].flatten()
            loss += cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
            count += labels.numel()
        domains[domain] = {"loss": loss / count, "accuracy": right / count}
    return {
        "loss": sum(d["loss"] for d in domains.values()) / len(domains),
        "accuracy": sum(d["accuracy"] for d in domains.values()) / len(domains),
        "domains": domains,
    }


def _backbone(work: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).to(DEVICE)


def adapt(
    method: Method, seed: int, lr: float, size: Size, data: Data, work: Path,
    out: Path | None, steps: int, split: str = "held",
) -> dict[str, Any]:  # fmt: skip
    """One method with one seed: trains, judges, saves.

    Args:
        method: what to train.
        seed: of fresh weights and of the batches.
        lr: peak learning rate.
        size: of the experiment.
        data: its texts.
        work: its folder.
        out: where the adapter (or, for all weights, the checkpoint) is kept; None: nowhere.
        steps: of the optimizer.
        split: to judge on.
    """
    torch.manual_seed(seed)
    rng = generator(1000 + seed)
    backbone = _backbone(work)

    def batch() -> torch.Tensor:
        return data.batch("adapt", size.batch, rng)

    extra: dict[str, Any] = {}
    if method.mixture is None:
        model, params = backbone, list(backbone.parameters())
    elif method.teacher:
        return _distil(method, seed, lr, size, data, work, out, steps, split, backbone, batch)
    else:
        model = AdaFuseModel.from_backbone(
            backbone, dataclasses.replace(method.mixture, seed=seed), str(work.resolve() / "base")
        )
        params = model.trainable()
    extra["trained"] = sum(p.numel() for p in params)
    figures = fit(model, params, batch, steps, lr, 0.1 if method.mixture is None else 0.0)
    return figures | extra | _finish(model, method, data, out, split)


def _finish(model: Any, method: Method, data: Data, out: Path | None, split: str) -> dict[str, Any]:
    if out:
        model.save_pretrained(out, **({} if method.mixture is None else {"dtype": torch.float32}))
    figures = judge(model, data, split)
    if method.mixture is not None and method.mixture.num_experts > 1:
        with autocast():
            figures["usage"] = {
                domain: count_experts(model, data.judged(domain, split).split(data.size.batch))
                .mean(0).tolist()
                for domain in DOMAINS
            }  # fmt: skip
    return figures


def _distil(method, seed, lr, size, data, work, out, steps, split, backbone, batch):
    """As `adapt`, from the layer-wise run of the same seed."""
    path = work / "runs" / f"{method.teacher}-s{seed}"
    teacher = AdaFuseModel.from_pretrained(_backbone(work), path).eval()
    begin = time.perf_counter()
    batches = [batch() for _ in range(steps)]
    with autocast():
        student = make_student(
            str(path), teacher, backbone, batches,
            top_k=method.mixture.top_k, seed=seed, **_router_options(method),
        )  # fmt: skip
        start = judge(student, data, split)["loss"]
        options = DistillOptions(steps, lr, lr / 2 if method.tune_experts else 0.0, WARMUP)
        history = distill(teacher, student, batches, options)
        held = [{"input_ids": b} for d in DOMAINS for b in data.judged(d, split).split(size.batch)]
        kl = mean_kl(teacher, student, held)
    student.base_model = student.adapter_config["base_model_name_or_path"] = str(
        work.resolve() / "base"
    )
    router = sum(p.numel() for p in student.routers.parameters())
    trained = sum(p.numel() for p in student.trainable()) if method.tune_experts else router
    figures = {
        "train_loss": history[-1] if history else None, "seconds": time.perf_counter() - begin,
        "trained": trained, "kl": kl, "loss_before_distilling": start,
        "teacher_loss": judge(teacher, data, split)["loss"],
    }  # fmt: skip
    return figures | _finish(student, method, data, out, split)


def _router_options(method: Method) -> dict[str, Any]:
    return {"router_layer": method.mixture.router_layer}
