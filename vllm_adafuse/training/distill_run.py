"""`vllm-adafuse distill` without its command line: adapter and files to a saved adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.pretrained import load_tokenizer
from vllm_adafuse.format.vocabulary import require_rows
from vllm_adafuse.offline import reference
from vllm_adafuse.training.data import Blocks, read_jsonl, split
from vllm_adafuse.training.distill import DistillOptions, distill, make_student, mean_kl
from vllm_adafuse.training.evaluate import next_token_scores
from vllm_adafuse.training.health import NotFinite
from vllm_adafuse.training.run import load_backbone, named


@dataclass(frozen=True)
class DistillReport:
    """What was lost, on held-out text.

    Attributes:
        tokens: with loss.
        teacher, start, student, backbone: scores, see `next_token_scores`; `start` is the student
            before distilling, with its router started by imitation.
        kl: KL from the teacher of start, student, backbone, per token in nats.
    """

    tokens: int
    teacher: dict[str, float]
    start: dict[str, float]
    student: dict[str, float]
    backbone: dict[str, float]
    kl: tuple[float, float, float]

    def rows(self) -> Iterator[tuple[str, dict[str, float], float]]:
        """(name, scores, KL from the teacher)."""
        yield "teacher", self.teacher, 0.0
        yield "student, start", self.start, self.kl[0]
        yield "student", self.student, self.kl[1]
        yield "backbone", self.backbone, self.kl[2]


def distil_files(
    teacher: Adapter,
    base: str | Path,
    data: Sequence[str],
    output: str | Path,
    options: DistillOptions,
    *,
    dtype: str = "auto",
    seed: int = 0,
    quiet: bool = False,
    **changes: Any,
) -> DistillReport:
    """Distils a layer-wise adapter on jsonl files and saves the student.

    Two copies of the backbone are in memory: the teacher's and the student's.

    Args:
        teacher: a checked layer-wise adapter.
        base: its backbone's directory.
        data: jsonl files.
        output: the adapter directory to write.
        options: of the training.
        dtype: of the backbone.
        seed: of the order.
        quiet: no progress bar.
        **changes: options of `MixtureConfig` for the student.

    Raises:
        AdapterError: a teacher that is pre-gated, bad data or options.
    """
    if not teacher.config.layer_wise:
        raise AdapterError(
            f"adapter {teacher.path}", ["it is pre-gated already; serve it as it is"]
        )
    tokenizer = load_tokenizer(base)
    examples, held = split(read_jsonl(data, tokenizer), options.held_out)
    shapes = Backbone.from_path(str(base))
    shapes.require_head("distill")
    require_rows(
        (token for example in (*examples, *held) for token in example.ids),
        shapes.vocab_size, tokenizer, base,
    )  # fmt: skip
    pad = tokenizer.pad_token_id
    pad = (tokenizer.eos_token_id or 0) if pad is None else pad
    judged = Blocks(held, options.length, True, pad)
    if not len(judged):
        raise AdapterError(
            "held-out data",
            [f"no token with loss fits into {options.length} tokens; raise --length"],
        )
    blocks = Blocks(examples, options.length, True, pad, every=True)  # the KL needs no labels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(str(base), dtype=dtype).to(device)
    model = reference.load(base, teacher.path, dtype=backbone.dtype).to(device)
    generator = torch.Generator().manual_seed(seed)
    batches = DataLoader(blocks.ids, options.batch_size, shuffle=True, generator=generator)
    student = make_student(str(teacher.path), model, backbone, batches, seed=seed, **changes)

    def scores(of: Any) -> tuple[dict[str, float], float]:
        held = DataLoader(judged, options.batch_size)
        return next_token_scores(of, held), mean_kl(model, of, held)

    with student.disabled():
        bare, bare_kl = scores(student)
    start, start_kl = scores(student)
    with tqdm(total=options.steps, desc="distilling", disable=quiet) as bar:

        def show(step: int, kl: float) -> None:
            bar.set_postfix(kl=f"{kl:.4f}", refresh=False)
            bar.update()

        try:
            distill(model, student, batches, options, show)
        except NotFinite as e:
            raise named(e, blocks) from e
    student.save_pretrained(output)
    after, after_kl = scores(student)
    return DistillReport(
        tokens=int(after["tokens"]),
        teacher=next_token_scores(model, DataLoader(judged, options.batch_size)),
        start=start,
        student=after,
        backbone=bare,
        kl=(start_kl, after_kl, bare_kl),
    )
