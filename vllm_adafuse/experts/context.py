"""A router's rows trained over LoRAs that stay as they are, of a router that sees a request's past
above all.

The text needs no labels: the router learns what makes the mixture predict it best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm
from vllm_adafuse.convert.bank import Bank
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter, load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.format.context_keys import CONTEXT_KEY, CONTEXT_WEIGHT, show_half_life
from vllm_adafuse.format.layout import ENTRANCE_ROUTER
from vllm_adafuse.format.pretrained import load_tokenizer
from vllm_adafuse.format.vocabulary import require_rows
from vllm_adafuse.text import show
from vllm_adafuse.training.config import CONTEXT_SCALE, MixtureConfig
from vllm_adafuse.training.data import Blocks, Example, read_jsonl, split
from vllm_adafuse.training.evaluate import next_token_scores
from vllm_adafuse.training.model import AdaFuseModel
from vllm_adafuse.training.run import load_backbone

# Adam moves every weight by about the rate, and a logit by as much as there are of them.
RATE_TIMES_HIDDEN = 8.0
WARM_UP, LAST_RATE = 0.05, 0.1  # shares of the steps and of the rate
LABEL_COEF = 0.1  # of the loss that labels add


@dataclass(frozen=True)
class ContextOptions:
    """How a router learns to use the past; checked at construction.

    Attributes:
        data: texts without labels: jsonl, or else plain UTF-8.
        labelled: expert's name -> texts of its domain; may be empty.
        scale: `router.context_scale`.
        half_life: `router.context_half_life`; None: the mean of all.
        steps: of the optimizer.
        length: tokens of a block: how much past the router meets.
        batch_size: blocks of a step.
        lr: peak learning rate; None: RATE_TIMES_HIDDEN over the backbone's width.
        held_out: share of the blocks to judge by.
        dtype: of the backbone, as in `TrainOptions`.
        seed: of fresh rows and of the order.
        router_from: an adapter whose rows are taken, and kept, for experts of the same name.

    Raises:
        ValueError: a value that none of these can have.
    """

    data: tuple[Path, ...]
    labelled: tuple[tuple[str, Path], ...] = ()
    scale: float = CONTEXT_SCALE
    steps: int = 200
    length: int = 512
    batch_size: int = 16
    lr: float | None = None
    held_out: float = 0.2
    dtype: str = "auto"
    seed: int = 0
    router_from: Path | None = None
    half_life: float | None = None

    def __post_init__(self):
        for name, low in (("steps", 1), ("length", 2), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} or more")
        if not (0 < self.scale < math.inf and (self.lr is None or 0 < self.lr < math.inf)):
            raise ValueError(f"scale is {self.scale} and lr {self.lr}, expected numbers above 0")
        if self.half_life is not None and not 0 < self.half_life < math.inf:
            raise ValueError(f"half_life is {self.half_life}, expected a number of tokens above 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, expected a share above 0 and below 1")
        if not self.data and not self.labelled:
            raise ValueError("there is no text to train the router on; name some with --data FILE")


@dataclass(frozen=True)
class Form:
    """What a router computes, whatever its numbers: fields as in `MixtureConfig`."""

    top_k: int
    router_input: str = "first_norm"
    router_context: str = "mean"
    context_scale: float = CONTEXT_SCALE
    router_weights: str = "topk_softmax"
    router_bias: bool = False
    temperature: float = 1.0
    context_half_life: float | None = None


# Of an expert, tensor's name -> its row.
Rows = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ContextRouter:
    """The result.

    Attributes:
        names: of the experts.
        tensors: the router's, float32, by their names in the format.
        kept: names of the experts whose rows were taken over.
        before, after: perplexity on the held-out blocks, of the bare backbone and of the mixture.
        tokens: with loss, held out.
        usage: share of the held-out slots that each expert got.
    """

    names: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    kept: tuple[str, ...]
    before: float
    after: float
    tokens: int
    usage: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Figures for the adapter's config."""
        return {
            "tokens": self.tokens,
            "perplexity_before": round(self.before, 4),
            "perplexity": round(self.after, 4),
            "usage": [round(part, 4) for part in self.usage],
        }


def train_router(
    base: Path, bank: Bank, names: Sequence[str], form: Form, kept: Mapping[str, Rows],
    options: ContextOptions, progress: bool = False,
) -> ContextRouter:  # fmt: skip
    """Trains the rows of a router; experts and backbone stay, and rows that are given.

    Args:
        base: the backbone's directory.
        bank: of the experts.
        names: theirs.
        form: of the router.
        kept: expert's name -> its rows; the others' are trained.
        options: of the training.
        progress: show a progress bar.

    Raises:
        AdapterError: the text cannot be used, or training diverged.
    """
    shapes = Backbone.from_path(str(base))
    shapes.require_head("compose-experts")
    blocks, judged, labels = _read_blocks(base, shapes, names, options)
    model = _model(base, bank, names, form, options)
    rows = _router_tensors(model)
    fresh = torch.tensor([name not in kept for name in names], device=model.device)
    with torch.no_grad():
        for e, name in enumerate(names):
            for tensor, row in kept.get(name, {}).items():
                rows[tensor][e] = row.to(model.device)
    with model.disabled():
        before = next_token_scores(model, DataLoader(judged, options.batch_size))
    if not math.isfinite(before["loss"]):
        raise AdapterError(
            f"backbone {base}",
            [f"its loss on the held-out text is {before['loss']}; check its weights, or try "
             "another dtype"],
        )  # fmt: skip
    if fresh.any():
        _fit(model, blocks, labels, fresh, options, progress)
    after = next_token_scores(model, DataLoader(judged, options.batch_size))
    usage = _usage(model, judged, options.batch_size)
    return ContextRouter(
        tuple(names),
        {name: tensor.detach().cpu().float() for name, tensor in rows.items()},
        tuple(name for name in names if name in kept),
        before["perplexity"], after["perplexity"], after["tokens"], usage,
    )  # fmt: skip


def _router_tensors(model: AdaFuseModel) -> Rows:
    """Views of the router's parameters, an expert a row."""
    router = model.all_routers[0]
    views = {"router.weight": router.weight[0]}
    if router.bias is not None:
        views["router.bias"] = router.bias[0]
    if router.context is not None:
        views[CONTEXT_WEIGHT] = router.context
    return views


def _model(base, bank, names, form: Form, options: ContextOptions) -> AdaFuseModel:
    """The mixture on its backbone, only its router to be trained."""
    backbone = load_backbone(str(base), dtype=options.dtype)
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    rank, linears = max(bank.ranks), [n.removesuffix(".lora_A") for n in bank.tensors]
    config = MixtureConfig(
        num_experts=len(names), r=rank, lora_alpha=float(rank), seed=options.seed,
        target_modules=tuple(sorted({n.split(".")[-2] for n in bank.tensors})), **vars(form),
    )  # fmt: skip
    linears = [name for name in linears if not name.endswith(".lora_B")]
    model = AdaFuseModel(backbone, config, str(base), linears)
    # The model has one scale, 1 here: each expert's own goes into its B.
    scales = torch.tensor(_scales(bank))[:, None, None]
    state = model.state_dict()
    for name in linears:
        state[f"{name}.lora_A"] = bank.tensors[f"{name}.lora_A"].float()
        state[f"{name}.lora_B"] = bank.tensors[f"{name}.lora_B"].float() * scales
    model.load_state_dict(state)
    model.groups.requires_grad_(False).to(backbone.dtype)
    return model


def _scales(bank: Bank) -> tuple[float, ...]:
    """s_e of every expert, by the format's own rule."""
    return AdapterConfig(
        "", len(bank.ranks), 1, tuple(bank.ranks), tuple(map(float, bank.alphas)), (),
        bank.use_rslora,
    ).scales  # fmt: skip


def _read_blocks(
    base: Path, shapes: Backbone, names: Sequence[str], options: ContextOptions
) -> tuple[Blocks, Blocks, torch.Tensor]:
    """Blocks to train on and to judge by, and of the former the label, -1 for none."""
    tokenizer = load_tokenizer(base)
    start = tokenizer("", verbose=False)["input_ids"]
    begin = start[:1] if start and start[0] == tokenizer.bos_token_id else []
    room, pieces, labels = options.length - len(begin), [], {}
    texts = [(path, -1) for path in options.data]
    texts += [(path, names.index(name)) for name, path in options.labelled]
    for path, label in texts:
        for example in _examples(path, tokenizer):
            for at in range(0, len(example.ids), room):
                ids, learn = example.ids[at : at + room], example.learn[at : at + room]
                if len(begin) + len(ids) < 2 or not any(learn):
                    continue
                lead = [] if ids[: len(begin)] == tuple(begin) else begin
                piece = Example((*lead, *ids), (False,) * len(lead) + learn, example.source)
                pieces.append(piece)
                labels[piece] = label
    if not pieces:
        raise AdapterError("text for the router", ["it is empty; name some with --data FILE"])
    require_rows((t for p in pieces for t in p.ids), shapes.vocab_size, tokenizer, base)
    kept, held = split(pieces, options.held_out)
    pad = tokenizer.pad_token_id
    pad = (tokenizer.eos_token_id or 0) if pad is None else pad
    blocks, judged = (Blocks(p, options.length, False, pad, every=True) for p in (kept, held))
    return blocks, judged, torch.tensor([labels[piece] for piece in kept])


def _examples(path: Path, tokenizer) -> list[Example]:
    if path.suffix == ".jsonl":
        return read_jsonl([path], tokenizer)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or e
        raise AdapterError(f"text {path}", [f"cannot be read as UTF-8 text ({why})"]) from e
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [Example(tuple(ids), (True,) * len(ids), str(path))]


def read_rows(adapter: Adapter) -> dict[str, Rows]:
    """Expert's name -> its rows of the router at the entrance."""
    with adapter.reader() as read:
        tensors = {n: read(n).float() for n in ENTRANCE_ROUTER if n in adapter.tensors}
    return {
        name: {tensor: rows[e] for tensor, rows in tensors.items()}
        for e, name in enumerate(adapter.config.expert_names)
    }


def rows_from(path: Path, names: Sequence[str], form: Form, shapes: Backbone) -> dict[str, Rows]:
    """Rows of another adapter, for the experts that it shares.

    Raises:
        AdapterError: its rows mean something else, or there are none to share.
    """
    adapter = load_adapter(path, shapes)
    config, problems = adapter.config, []
    if not config.router_context:
        problems.append(f"it has no `{CONTEXT_KEY}`, expected a router that sees the past")
    found = config.router_input, config.context_scale, config.temperature
    if not problems and found != (form.router_input, form.context_scale, form.temperature):
        problems.append(
            f"its router reads {found[0]} with scale {found[1]:g} at temperature {found[2]:g}, "
            f"expected {form.router_input}, {form.context_scale:g} and {form.temperature:g}: rows "
            "mean the same only so"
        )
    halves = [show_half_life(which.context_half_life) for which in (config, form)]
    if not problems and halves[0] != halves[1]:
        problems.append(f"its router remembers {halves[0]}, expected {halves[1]}: rows mean the same only so")
    if "router.bias" in adapter.tensors:
        problems.append(
            "its router has a bias, which routers trained here have not; --mixture takes it as it is"
        )
    if not set(names) & set(config.expert_names):
        problems.append(
            f"none of its experts ({show(list(config.expert_names))}) is one of {', '.join(names)}"
        )
    if problems:
        raise AdapterError(f"adapter {path}", problems)
    return {name: rows for name, rows in read_rows(adapter).items() if name in names}


def _fit(model, blocks, labels, fresh, options: ContextOptions, progress: bool) -> None:
    router = model.all_routers[0]
    every = ((router.weight, 1), (router.context, 0), (router.bias, 1))
    axes = [(parameter, axis) for parameter, axis in every if parameter is not None]
    for parameter, axis in axes:
        keep = fresh.view([-1 if i == axis else 1 for i in range(parameter.dim())])
        parameter.register_hook(lambda grad, keep=keep: grad * keep)
    lr = options.lr or RATE_TIMES_HIDDEN / router.weight.shape[-1]
    parameters = [parameter for parameter, _ in axes]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    draw = torch.Generator().manual_seed(options.seed)
    model.train()
    with tqdm(range(options.steps), desc="train router", disable=not progress) as bar:
        for step in bar:
            warm = min(1.0, (step + 1) / max(1.0, WARM_UP * options.steps))
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / options.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * (LAST_RATE + (1 - LAST_RATE) * cosine)
            model.set_progress(step / options.steps)
            chosen = torch.randint(len(blocks), (options.batch_size,), generator=draw)
            batch = {
                "input_ids": blocks.ids[chosen], "labels": blocks.labels[chosen],
                "attention_mask": blocks.mask[chosen],
            }  # fmt: skip
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            loss = model(**batch).loss
            loss = loss + _label_loss(router, labels[chosen].to(model.device), batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{model.last_losses['loss'].item():.3f}", refresh=False)
    model.eval()


def _label_loss(router, labels: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the router's softmax over all experts gets wrong in blocks with a label."""
    at = (batch["attention_mask"] > 0) & (labels >= 0)[:, None]
    wanted = labels[:, None].expand_as(at)[at]
    logits = router.logits[..., 0, :][at]
    return LABEL_COEF * cross_entropy(logits, wanted, reduction="sum") / max(1, len(wanted))


@torch.no_grad()
def _usage(model: AdaFuseModel, judged: Blocks, batch_size: int) -> tuple[float, ...]:
    model.eval()
    router = model.all_routers[0]
    counts = torch.zeros(router.weight.shape[1], dtype=torch.double, device=model.device)
    for batch in DataLoader(judged, batch_size):
        mask = batch["attention_mask"].to(model.device)
        model(input_ids=batch["input_ids"].to(model.device), attention_mask=mask)
        chosen = router.chosen[..., 0, :][mask > 0].flatten()
        counts += torch.bincount(chosen, minlength=len(counts))
    return tuple((counts / counts.sum()).tolist())
