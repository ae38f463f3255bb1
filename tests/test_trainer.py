"""The stock transformers.Trainer: usage in its logs, resuming, accumulation, steps not taken."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_models import difference, make, random_ids
from transformers import Trainer, TrainerCallback, TrainingArguments
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.tiny import make_tiny_backbone
from vllm_adafuse.training import watch
from vllm_adafuse.training.health import NotFinite


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("trainer") / "base")


def rows_of(count=32, length=16):
    return [{"input_ids": row, "labels": row} for row in random_ids(count, length)]


def trainer_of(model, folder, callbacks=(), **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        logging_steps=2, report_to=[], disable_tqdm=True, max_steps=6, save_strategy="no", seed=3,
        **options,
    )  # fmt: skip
    return watch(Trainer(model=model, args=arguments, train_dataset=rows_of(),
                         callbacks=list(callbacks)))  # fmt: skip


class Reporter(TrainerCallback):
    """Stands for TensorBoard's: it comes before callbacks that users add."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_trainer_logs_usage_and_anneals(base, tmp_path):
    reporter = Reporter()
    model = make(base, temperature_start=4.0, anneal=0.5, expert_names=("a", "b", "c", "d"))
    trainer = trainer_of(model, tmp_path, [reporter], gradient_checkpointing=True)
    trainer.train()
    for logs in (reporter.logs, trainer.state.log_history):
        first, second, third = [log for log in logs if "loss" in log]
        assert sum(first[f"usage/{name}"] for name in "abcd") == pytest.approx(1, abs=1e-3)
        assert first["balance_loss"] > 0 and "router_z_loss" in first
        # As set before steps 2, 4, 6 of 6.
        assert [log["temperature"] for log in (first, second, third)] == [3.0, 1.0, 1.0]


def test_resuming_equals_an_uninterrupted_run(base, tmp_path):
    options = {"jitter": 0.05, "temperature_start": 2.0}
    through = make(base, **options)
    trainer_of(through, tmp_path / "a").train()
    trainer = trainer_of(make(base, **options), tmp_path / "b")
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
    trainer.state.save_steps = 3
    trainer.train()
    checkpoint = tmp_path / "b" / "checkpoint-3"
    assert set(load_file(checkpoint / "model.safetensors")) == set(through.state_dict())
    resumed = make(base, seed=7, **options)  # other weights, replaced by the checkpoint's
    trainer_of(resumed, tmp_path / "c").train(resume_from_checkpoint=str(checkpoint))
    start = make(base, **options).state_dict()
    for name, tensor in through.state_dict().items():
        apart, moved = (tensor - resumed.state_dict()[name]).norm(), (tensor - start[name]).norm()
        assert apart <= 1e-3 * moved and moved > 0, name


def test_accumulated_batches_equal_one_batch(base, tmp_path):
    states = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = make(base, balance_coef=0.0, z_loss_coef=0.01)
        trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=accumulate)
        trainer.args.per_device_train_batch_size = size
        trainer._train_batch_size = size
        trainer.train()
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert difference(states[1][name], tensor) < 1e-3, name


def without_labels(row):
    return row | {"labels": torch.full_like(row["labels"], -100)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_without_a_label_change_nothing(base, tmp_path, accumulate):
    """Prompts fill the blocks of some steps: a mean over no token at all is 0 there, not NaN."""
    model = make(base, balance_coef=0.5)
    rows = rows_of(12)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to=[],
            gradient_accumulation_steps=accumulate, max_steps=6, logging_steps=1,
            disable_tqdm=True, save_strategy="no", logging_nan_inf_filter=False,
        ),
        train_dataset=[without_labels(row) for row in rows],
        eval_dataset=[without_labels(row) for row in rows[:4]],
    )  # fmt: skip
    before = model.state_dict()
    trainer.train()
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == [0.0] * 6
    assert trainer.evaluate()["eval_loss"] == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Between steps that have labels, it is as if those tokens were not there.
    trainer.train_dataset = rows[:6] + [without_labels(row) for row in rows[6:]]
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not torch.equal(model.state_dict()["router.weight"], before["router.weight"])


class Spoil(TrainerCallback):
    """Makes a weight infinite at the end of a step, as an overflow of the optimizer does."""

    def __init__(self, model, step):
        self.model, self.step = model, step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.model.groups[0].A[0, 0, 0, 0] = float("inf")


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(base, tmp_path):
    model = make(base)
    trainer = trainer_of(model, tmp_path, [Spoil(model, 3)])
    with pytest.raises(NotFinite, match="the batch of step 4 .*\n.*its loss is nan") as caught:
        trainer.train()
    assert trainer.state.global_step == 3
    (ids,) = caught.value.batches
    assert [row.tolist() for row in ids if row.tolist() not in random_ids(32, 16).tolist()] == []


def test_a_step_with_bad_gradients_is_not_taken(base, tmp_path):
    model = make(base)
    before = model.state_dict()
    model.groups[0].A.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match="the batch of step 1 .*\n.*its gradients are not"):
        trainer_of(model, tmp_path).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_bad_checkpoint_pushes_no_good_one_out(base, tmp_path):
    model = make(base)
    trainer = trainer_of(model, tmp_path, [Spoil(model, 6)])
    trainer.args.save_strategy, trainer.args.save_total_limit = "steps", 1
    trainer.args.save_steps = trainer.state.save_steps = 3
    with pytest.raises(NotFinite, match="the weights after step 6"):
        trainer.train()
    (kept,) = tmp_path.glob("checkpoint-*")
    assert all(t.isfinite().all() for t in load_file(kept / "model.safetensors").values())


def test_a_loop_of_ones_own_is_stopped_too(base):
    model = make(base).train()
    ids = random_ids()
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    last = model.last_losses
    assert last["loss"] == 0 and nothing == 0.01 * last["balance"] + 0.001 * last["z"]
    with torch.no_grad():
        model.groups[0].A[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="forward pass 2 in training mode"):
        model(input_ids=ids, labels=ids)


def test_the_python_of_the_documentation_runs(base, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text("utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Llama-2-7b-hf").symlink_to(base)
    batch = random_ids(2, 16)
    names = {"dataset": rows_of(4), "batches": [{"input_ids": batch, "labels": batch}] * 2}
    exec(first.replace("bf16=True", "use_cpu=True"), names)
    assert check_adapter("adapter", Backbone.from_path(str(base)))[1] == []
    before = names["model"].state_dict()
    exec(second, names)
    assert not torch.equal(names["model"].state_dict()["router.weight"], before["router.weight"])
