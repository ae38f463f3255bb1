"""Training and judging: the backbone from nothing, then one method with one seed."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, rms_norm
from vllm_adafuse.tiny import tiny_config
from vllm_adafuse.training import AdaFuseModel
from vllm_adafuse.training.distill import DistillOptions, distill, make_student, mean_kl
from vllm_adafuse.training.watch import count_experts

from benchmarks.quality.data import Data
from benchmarks.quality.methods import Method
from benchmarks.quality.sizes import Size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a frozen backbone, as it is served; all weights are trained in float32 under autocast.
SERVED = torch.bfloat16 if DEVICE == "cuda" else torch.float32
WARMUP, CLIP = 0.05, 1.0
PROBE = 40  # steps after which the speed is known


def autocast(model: Any) -> torch.autocast:
    """Products in bfloat16 on a GPU over float32 weights; plain float32 on a CPU."""
    mixed = DEVICE == "cuda" and model.dtype == torch.float32
    return torch.autocast(DEVICE, torch.bfloat16, enabled=mixed)


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
    params: list[Any],
    batch: Callable[[], torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    lr: float,
    decay: float,
    seconds: float | None = None,
) -> dict[str, float]:
    """Trains; returns the last loss, steps, seconds and tokens per second (first tenth left out).

    Args:
        model: called as a Hugging Face causal LM.
        params: to train, or groups of them as `AdaFuseModel.parameter_groups(1.0, …)` gives
            them, whose rates are times `lr`.
        batch: makes int64 [blocks, length], or two of them: ids, and labels (-100: no loss).
        steps: of AdamW.
        lr: peak learning rate.
        decay: of weights, in groups that do not say otherwise.
        seconds: fewer steps are made where these do not suffice, decided after PROBE steps.
    """
    grouped = params if isinstance(params[0], dict) else [{"params": params, "lr": 1.0}]
    optimizer = torch.optim.AdamW(
        grouped, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=DEVICE == "cuda"
    )
    times = [group["lr"] for group in optimizer.param_groups]
    every = [p for group in grouped for p in group["params"]]
    model.train()
    begin = probe = start = time.perf_counter()
    counted, skip, step = 0, max(PROBE, steps // 10) if steps > PROBE else 0, 0
    while step < steps:
        if step in (PROBE // 2, PROBE, skip):
            _wait()
            now = time.perf_counter()
            if step == PROBE and seconds is not None:
                pace = (now - probe) / (PROBE - PROBE // 2)
                steps = max(2 * PROBE, min(steps, int((seconds - (now - begin)) / pace)))
                print(f"  {1e3 * pace:.1f} ms a step: {steps} steps", flush=True)
            probe = now if step == PROBE // 2 else probe
            start = now if step == skip else start
        made = batch()
        ids, labels = (
            t.to(DEVICE, non_blocking=True) for t in (made if isinstance(made, tuple) else (made,) * 2)
        )
        if hasattr(model, "set_progress"):
            model.set_progress(step / steps)
        for group, share in zip(optimizer.param_groups, times):
            group["lr"] = lr * share * rate_at(step, steps)
        with autocast(model):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counted += ids.numel() if step >= skip else 0
        step += 1
        if step % 100 == 0:
            print(f"  step {step:5} of {steps}  loss {loss.item():.4f}  "
                  f"{time.perf_counter() - begin:.1f} s", flush=True)  # fmt: skip
    _wait()
    now = time.perf_counter()
    return {"train_loss": loss.item(), "steps": steps, "seconds": now - begin,
            "tokens_per_s": counted / max(1e-9, now - start)}  # fmt: skip


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def lighten(model: Any) -> Any:
    """A model for training: no cache of keys, and RMSNorm in one kernel instead of six.

    Small models spend a good part of a step on launches.
    """
    model.config.use_cache = False
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(_norm, module)
    return model


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight.to(x.dtype)
    return rms_norm(x, weight.shape, weight, module.variance_epsilon)


def pretrain(size: Size, data: Data, work: Path, seconds: float | None = None) -> None:
    """The backbone, saved as a Hugging Face checkpoint in `work/base`; `seconds` as in `fit`."""
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
    model = lighten(AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(DEVICE))
    rng = generator(0)
    figures = fit(
        model, list(model.parameters()), lambda: data.pretraining(rng),
        size.pretrain_steps, size.pretrain_lr, 0.1, seconds,
    )  # fmt: skip
    figures |= {"parameters": sum(p.numel() for p in model.parameters())}
    model.config.use_cache = True  # for those who generate with it
    model.save_pretrained(work / "base")
    figures |= judge(model.to(SERVED), data)
    (work / "base.json").write_text(json.dumps(figures, indent=1))


@torch.no_grad()
def judge(model: Any, data: Data, split: str = "held") -> dict[str, Any]:
    """Loss and next-token accuracy per domain; "loss" and "accuracy" are their means."""
    model.eval()
    domains = {}
    for domain in data.domains:
        loss, right, count = 0.0, 0, 0
        for ids in data.judged(domain, split).split(data.size.batch):
            ids = ids.to(DEVICE)
            with autocast(model):
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


def load_backbone(work: Path, dtype: torch.dtype = SERVED) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        work / "base", dtype=dtype, trust_remote_code=False
    )
    return lighten(model.to(DEVICE))


def release() -> None:
    """Gives the memory of dropped models back: hooks hold them in cycles."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def adapt(
    method: Method, seed: int, rate: tuple[float, float], size: Size, data: Data, work: Path,
    out: Path | None, steps: int, split: str = "held",
) -> dict[str, Any]:  # fmt: skip
    """One method with one seed: trains, judges, saves.

    Args:
        method: what to train.
        seed: of fresh weights and of the batches.
        rate: peak learning rate, and that of the routers as its multiple.
        size: of the experiment.
        data: its texts.
        work: its folder.
        out: where the adapter (or, for all weights, the checkpoint) is kept; None: nowhere.
        steps: of the optimizer.
        split: to judge on.
    """
    torch.manual_seed(seed)
    rng = generator(1000 + seed)
    backbone = load_backbone(work, torch.float32 if method.mixture is None else SERVED)

    def batch() -> torch.Tensor:
        return data.batch("adapt", size.batch, rng)

    extra: dict[str, Any] = {}
    if method.mixture is None:
        model, params = backbone, list(backbone.parameters())
        extra["trained"] = sum(p.numel() for p in params)
    elif method.teacher:
        return _distil(method, seed, rate, size, data, work, out, steps, split, backbone, batch)
    else:
        model = AdaFuseModel.from_backbone(
            backbone, dataclasses.replace(method.mixture, seed=seed), str(work.resolve() / "base")
        )
        params = model.parameter_groups(1.0, rate[1])
        extra["trained"] = sum(p.numel() for p in model.trainable())
    figures = fit(model, params, batch, steps, rate[0], 0.1 if method.mixture is None else 0.0)
    return figures | extra | _finish(model, method, data, out, split)


def _finish(model: Any, method: Method, data: Data, out: Path | None, split: str) -> dict[str, Any]:
    if out:
        model.save_pretrained(out, **({} if method.mixture is None else {"dtype": torch.float32}))
    figures = judge(model.to(SERVED) if method.mixture is None else model, data, split)
    if method.mixture is not None and method.mixture.num_experts > 1:
        figures["usage"] = {
            domain: count_experts(model, data.judged(domain, split).split(data.size.batch))
            .mean(0).tolist()
            for domain in data.domains
        }  # fmt: skip
    return figures


def _distil(method, seed, rate, size, data, work, out, steps, split, backbone, batch):
    """As `adapt`, from the layer-wise run of the same seed."""
    path = work / "runs" / f"{method.teacher}-s{seed}"
    teacher = AdaFuseModel.from_pretrained(load_backbone(work), path).eval()
    begin = time.perf_counter()
    batches = [batch() for _ in range(steps)]
    student = make_student(
        str(path), teacher, backbone, batches,
        top_k=method.mixture.top_k, seed=seed, router_layer=method.mixture.router_layer,
    )  # fmt: skip
    start = judge(student, data, split)["loss"]
    lr = rate[0] / 2  # nothing is fresh
    options = DistillOptions(steps, lr * rate[1], lr if method.tune_experts else 0.0, WARMUP)
    history = distill(teacher, student, batches, options)
    held = [{"input_ids": b} for d in data.domains
            for b in data.judged(d, split).split(size.batch)]  # fmt: skip
    kl = mean_kl(teacher, student, held)
    student.base_model = student.adapter_config["base_model_name_or_path"] = str(
        work.resolve() / "base"
    )
    router = sum(p.numel() for p in student.routers.parameters())
    trained = sum(p.numel() for p in student.trainable()) if method.tune_experts else router
    figures = {
        "train_loss": history[-1] if history else None, "steps": steps,
        "seconds": time.perf_counter() - begin,
        "trained": trained, "kl": kl, "loss_before_distilling": start,
        "teacher_loss": judge(teacher, data, split)["loss"],
    }  # fmt: skip
    return figures | _finish(student, method, data, out, split)

