"""`vllm-adafuse train` without its command line: files to a saved adapter, by Trainer."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.pretrained import check_checkpoint, load_tokenizer, read_config
from vllm_adafuse.format.vocabulary import require_rows
from vllm_adafuse.training.config import MixtureConfig
from vllm_adafuse.training.data import Blocks, Example, places, read_jsonl, split
from vllm_adafuse.training.evaluate import next_token_scores
from vllm_adafuse.training.health import NotFinite
from vllm_adafuse.training.model import AdaFuseModel
from vllm_adafuse.training.resume import WEIGHTS, digest, find_checkpoint, make_recorder
from vllm_adafuse.training.watch import count_experts, watch

logger = logging.getLogger(__name__)
LOADS = ("full", "8bit", "4bit")


@dataclass(frozen=True)
class TrainOptions:
    """A training run; checked at construction.

    Attributes:
        base: the backbone's directory.
        data: jsonl files.
        output: the adapter directory to write. Checkpoints and TensorBoard logs go to
            `<output>-training`.
        mixture: what is trained.
        length: tokens of a block.
        pack: fill blocks with several examples.
        epochs: passes over the data.
        steps: optimizer steps, instead of epochs; 0: by epochs.
        batch_size: blocks per step and device.
        accumulate: batches per optimizer step.
        lr: the peak learning rate (AdamW, cosine, 3 % warm-up).
        weight_decay: AdamW's.
        held_out: share of the examples to judge by.
        load: "full", or the backbone in "8bit" or "4bit" (bitsandbytes, NVIDIA GPU).
        dtype: of the backbone: "auto" is bfloat16 on a GPU, float32 else.
        gradient_checkpointing: less memory, a third more time.
        resume: go on from the last whole checkpoint of `<output>-training`.
        save_every: steps between checkpoints; 0: none.
        log_every: steps between log lines.
        tensorboard: also log for TensorBoard.
        seed: of data order and fresh weights.
        quiet: no progress bars.
    """

    base: str
    data: tuple[str, ...]
    output: str
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    length: int = 1024
    pack: bool = True
    epochs: float = 3.0
    steps: int = 0
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 5e-4
    weight_decay: float = 0.0
    held_out: float = 0.05
    load: str = "full"
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    resume: bool = False
    save_every: int = 500
    log_every: int = 10
    tensorboard: bool = False
    seed: int = 0
    quiet: bool = False

    def __post_init__(self):
        problems = [
            f"`{name}` is {getattr(self, name)}, expected {low} or more"
            for name, low in (("length", 2), ("batch_size", 1), ("accumulate", 1),
                              ("log_every", 1), ("save_every", 0), ("steps", 0))
            if getattr(self, name) < low
        ]  # fmt: skip
        problems += [
            f"`{name}` is {getattr(self, name)}, expected a number above 0"
            for name in ("epochs", "lr")
            if not getattr(self, name) > 0
        ]
        if not 0 <= self.held_out < 1:
            problems.append(f"`held_out` is {self.held_out}, expected a share from 0 to below 1")
        if self.load not in LOADS:
            problems.append(f"`load` is {self.load}, expected one of {LOADS}")
        if not self.data:
            problems.append("`data` is empty, expected at least one jsonl file")
        if problems:
            raise AdapterError("training options", problems)

    @property
    def work(self) -> Path:
        """Where checkpoints and logs are kept."""
        return Path(f"{self.output.rstrip('/')}-training")


@dataclass(frozen=True)
class TrainReport:
    """What a run gave.

    Attributes:
        adapter: the directory written.
        examples: trained on.
        held_out: examples held out.
        tokens: with loss, of one epoch.
        before: scores of the bare backbone on the held-out text, see `next_token_scores`.
        after: scores of the adapted model.
        usage: each expert's share of the held-out tokens' slots.
        first: whether this process is the first of a distributed run.
    """

    adapter: Path
    examples: int
    held_out: int
    tokens: int
    before: dict[str, float]
    after: dict[str, float]
    usage: list[float]
    first: bool


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise AdapterError(
            "training",
            [
                f"package {name} is not installed; pip install "
                + (name if name == "bitsandbytes" else "'vllm-adafuse[train]'")
                for name in missing
            ],
        )


def load_backbone(base: str, load: str = "full", dtype: str = "auto") -> Any:
    """The backbone to train on, on the CPU or, quantised, on the GPU.

    Args:
        base: its directory.
        load: one of LOADS.
        dtype: "auto", or the name of a torch dtype.

    Raises:
        AdapterError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True}
    check_checkpoint(base)
    options["config"] = read_config(base)
    if load != "full":
        from transformers import BitsAndBytesConfig

        _need("bitsandbytes", "accelerate")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load == "8bit",
            load_in_4bit=load == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=options["dtype"],
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        raise AdapterError(f"backbone {base}", [f"transformers cannot load it: {e}"]) from e
    model.config._name_or_path = str(Path(base).resolve())
    return model


def learnable(
    name: str, examples: Sequence[Example], options: TrainOptions, pad: int
) -> Blocks:
    """The blocks of some examples that have a token with loss; says if examples are in vain.

    Raises:
        AdapterError: there are examples, and no such block.
    """
    blocks = Blocks(examples, options.length, options.pack, pad)
    if examples and not len(blocks):
        raise AdapterError(
            name, [f"no token with loss fits into {options.length} tokens; raise --length"]
        )
    if blocks.unlearnt:
        logger.warning(
            "%s: %d of %d lines have no token with loss in the first %d and teach nothing; raise "
            "--length: %s",
            name, len(blocks.unlearnt), len(examples), options.length, places(blocks.unlearnt),
        )  # fmt: skip
    return blocks


def named(error: NotFinite, blocks: Blocks) -> AdapterError:
    """An error of a batch, with the lines that were in it."""
    sources = [source for ids in error.batches for source in blocks.sources_of(ids)]
    return AdapterError(error.subject, [*error.problems, f"it held {places(sources)}"])


def record_of(
    options: TrainOptions, model: AdaFuseModel, blocks: Blocks, processes: int
) -> dict[str, Any]:
    """What a run must share with the one that it goes on with: all that its result depends on, but
    for how long it is."""
    kept = "length pack batch_size accumulate lr weight_decay held_out load seed".split()
    return {
        "data": digest(blocks.ids, blocks.labels),
        "backbone": digest(*model.backbone.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "processes": processes,
        **{name: getattr(options, name) for name in kept},
        **asdict(options.mixture),
    }


def train(options: TrainOptions) -> TrainReport:
    """Trains and saves an adapter.

    Raises:
        AdapterError: bad data or options, a package is missing, or training diverged.
    """
    _need("accelerate", *(["tensorboard"] if options.tensorboard else []))
    from transformers import Trainer, TrainingArguments

    tokenizer = load_tokenizer(options.base)
    examples, held = split(read_jsonl(options.data, tokenizer), options.held_out)
    shapes = Backbone.from_path(str(options.base))
    shapes.require_head("train")
    require_rows(
        (token for example in (*examples, *held) for token in example.ids),
        shapes.vocab_size, tokenizer, options.base,
    )  # fmt: skip
    pad = tokenizer.pad_token_id
    pad = (tokenizer.eos_token_id or 0) if pad is None else pad
    blocks = learnable("training data", examples, options, pad)
    judged = learnable("held-out data", held, options, pad)
    backbone = load_backbone(options.base, options.load, options.dtype)
    longest = getattr(backbone.config, "max_position_embeddings", options.length)
    if options.length > longest:
        raise AdapterError(
            "training options",
            [f"`length` is {options.length}, expected at most the backbone's {longest} positions"],
        )
    model = AdaFuseModel.from_backbone(backbone, options.mixture)
    model.recent = deque(maxlen=options.accumulate)
    trainer = watch(
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(options.work),
                num_train_epochs=options.epochs,
                max_steps=options.steps or -1,
                per_device_train_batch_size=options.batch_size,
                gradient_accumulation_steps=options.accumulate,
                learning_rate=options.lr,
                weight_decay=options.weight_decay,
                lr_scheduler_type="cosine",
                warmup_steps=0.03,  # below 1: a share
                bf16=model.dtype == torch.bfloat16,
                gradient_checkpointing=options.gradient_checkpointing,
                logging_steps=options.log_every,
                logging_nan_inf_filter=False,  # the run ends there
                save_strategy="steps" if options.save_every else "no",
                save_steps=options.save_every or 500,
                save_total_limit=2,
                report_to=["tensorboard"] if options.tensorboard else [],
                seed=options.seed,
                ddp_find_unused_parameters=False,
                disable_tqdm=options.quiet,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=blocks,
        ),
        model,
    )
    first = trainer.is_world_process_zero()
    record = record_of(options, model, blocks, trainer.args.world_size)
    trainer.add_callback(make_recorder(record))
    found = find_checkpoint(options.work, record) if options.resume else None
    steps = math.ceil(len(trainer.get_train_dataloader()) / options.accumulate)  # of an epoch
    total = options.steps or math.ceil(options.epochs * steps)
    if found and found.step >= total and not found.recorded:
        raise AdapterError(
            f"checkpoint {found.path}",
            [f"it is at step {found.step} already, and these texts and options end at step "
             f"{total}: nothing would be trained; raise --steps or --epochs, or leave out "
             "--resume and name another --output to start anew"],
        )  # fmt: skip
    if found and first:
        for said in found.notes:
            logger.warning("%s", said)

    def scores() -> dict[str, float]:
        return next_token_scores(model, DataLoader(judged, options.batch_size))

    with model.disabled():
        before = scores() if first else {}
    if held and first and not math.isfinite(before["loss"]):
        raise AdapterError(
            f"backbone {options.base}",
            [f"its loss on the held-out lines is {before['loss']}; check its weights, or try "
             "another dtype"],
        )  # fmt: skip
    if found and found.step >= total:  # Trainer would take one step more
        model.load_state_dict(load_file(found.path / WEIGHTS))
        if first:
            logger.warning("the run had ended at step %d: nothing was left to train", found.step)
    else:
        try:
            trainer.train(resume_from_checkpoint=str(found.path) if found else None)
        except NotFinite as e:
            raise named(e, blocks) from e
    after, usage = {}, []
    if first:
        model.save_pretrained(options.output)
        after = scores()
        if held:
            usage = count_experts(model, DataLoader(judged.ids, options.batch_size))
            usage = usage.mean(0).tolist()
    return TrainReport(
        adapter=Path(options.output),
        examples=len(examples) - len(blocks.unlearnt),
        held_out=len(held),
        tokens=blocks.tokens,
        before=before,
        after=after,
        usage=usage,
        first=first,
    )
