"""Distilling a layer-wise mixture into a pre-gated one."""

import json

import pytest
import torch
from cli_fixtures import run
from engines import load_reference
from training_models import backbone_of, difference, random_ids
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone, real_texts
from vllm_adafuse.training.align import align, best_match, by_token
from vllm_adafuse.training.distill import DistillOptions, distill, kl_of, make_student, mean_kl
from vllm_adafuse.training.health import NotFinite


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("distill") / "base")


def layer_wise(base, path, **options):
    options = {"num_experts": 4, "r": 4, "dtype": torch.float32} | options
    return make_random_adapter(base, path, routing="layer_wise", **options)


def test_experts_that_belong_together_are_found():
    generator = torch.Generator().manual_seed(0)
    truth = torch.eye(5)[torch.randint(5, (400,), generator=generator)]  # [T, E]
    orders = {f"layer {i}": torch.randperm(5, generator=generator) for i in range(6)}
    gates = {}
    for name, order in orders.items():
        noise = torch.eye(5)[torch.randint(5, (400,), generator=generator)]
        wrong = torch.rand(400, 1, generator=generator) < 0.3
        gates[name] = torch.where(wrong, noise, truth)[:, torch.argsort(order)]
    numbers, consensus = align(gates, 5)
    # Up to one renumbering of all, every layer's true order.
    common = {
        tuple(torch.argsort(order)[numbers[name]].tolist()) for name, order in orders.items()
    }
    assert len(common) == 1
    assert torch.allclose(consensus.sum(1), torch.ones(400))


def test_fewer_experts_than_numbers_are_used_all():
    scores = torch.tensor([[5.0, 1.0], [4.0, 3.0], [9.0, 0.0]])
    chosen = best_match(scores)
    assert set(chosen) == {0, 1} and chosen[2] == 0
    assert best_match(torch.tensor([[3.0, 2.0], [2.9, 0.0]])) == [1, 0]  # not greedy


def test_an_entrance_router_knows_the_mean_of_a_token():
    gates = {"a": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 1.0]])}
    found = by_token(gates, torch.tensor([7, 3, 7, 3]))["a"]
    assert found.tolist() == [[0.75, 0.25], [0, 1], [0.75, 0.25], [0, 1]]


def test_kl_by_hand():
    a, b = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    p, q = torch.softmax(a, -1), torch.softmax(b, -1)
    assert torch.allclose(kl_of(a, b), (p * (p / q).log()).sum(-1).mean(), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"router_scope": "block"},
        {"shared_A": True},
        {"r": [1, 2, 4, 4], "lora_alpha": [3, 6, 2, 7]},
        {"always_modules": ["q_proj", "up_proj"], "always_r": 2, "always_alpha": 5},
        {"layer_experts": [4, 2, 3]},
    ],
    ids=["block", "shared A", "ranks", "always on", "experts per layer"],
)
def test_student_of_a_constant_route_is_the_teacher(base, tmp_path, options):
    """Where the route cannot differ, the student is exact: its experts are the teacher's."""
    from safetensors.torch import load_file, save_file

    path = layer_wise(base, tmp_path / "teacher", top_k=2, **options)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith("router.weight")]:
        tensors[name].zero_()  # equal logits: experts 0 and 1, each with weight 1/2
    save_file(tensors, file)
    teacher = load_reference(base, path)
    ids = random_ids()
    student = make_student(str(path), teacher, backbone_of(base), [ids]).eval()
    with torch.no_grad():
        wanted, imitated = teacher(ids).logits, student(input_ids=ids).logits
        student.routers[0].weight.zero_()
        exact = student(input_ids=ids).logits
        with student.disabled():
            bare = student(input_ids=ids).logits
    assert difference(exact, wanted) <= 1e-5
    assert difference(imitated, wanted) <= 1e-2 and difference(bare, wanted) > 0.1


def test_distilling_comes_nearer_to_the_teacher(base, tmp_path):
    path = layer_wise(base, tmp_path / "teacher", router_scope="block")
    teacher = load_reference(base, path)
    batches = [random_ids(8, 32, seed=seed) for seed in range(6)]
    held = [{"input_ids": random_ids(8, 32, seed=99)}]
    student = make_student(str(path), teacher, backbone_of(base), batches)
    experts = {n: t for n, t in student.state_dict().items() if ".lora_" in n}
    start = mean_kl(teacher, student, held)
    distill(teacher, student, batches, DistillOptions(steps=25, lr=1e-2))
    after = mean_kl(teacher, student, held)
    assert all(torch.equal(student.state_dict()[n], t) for n, t in experts.items())  # kept
    distill(teacher, student, batches, DistillOptions(steps=25, lr=1e-3, expert_lr=3e-3))
    tuned = mean_kl(teacher, student, held)
    assert tuned < after < start
    assert not any(torch.equal(student.state_dict()[n], t) for n, t in experts.items())
    saved = student.save_pretrained(tmp_path / "student")
    assert check_adapter(saved, Backbone.from_path(str(base)))[1] == []


def test_a_student_may_see_the_past(base, tmp_path):
    """It starts as one that does not, learns to, and is what plain transformers say of its files."""
    path = layer_wise(base, tmp_path / "teacher", router_scope="block")
    teacher = load_reference(base, path)
    batches = [random_ids(4, 32, seed=seed) for seed in range(3)]
    context = {"router_context": "mean", "context_scale": 2.0, "context_half_life": 6.0}
    students = [
        make_student(str(path), teacher, backbone_of(base), batches, **changes) for changes in ({}, context)
    ]
    with torch.no_grad():
        blind, seeing = (student.eval()(input_ids=batches[0]).logits for student in students)
    assert difference(seeing, blind) <= 1e-5
    distill(teacher, students[1], batches, DistillOptions(steps=9, lr=1e-2))
    saved = students[1].save_pretrained(tmp_path / "student")
    adapter, problems = check_adapter(saved, Backbone.from_path(str(base)))
    config = adapter.config
    assert not problems and (config.router_context, config.context_half_life) == ("mean", 6.0)
    assert students[1].routers[0].context.abs().max() > 1e-3
    with torch.no_grad():
        found = students[1].eval()(input_ids=batches[0]).logits
        expected = load_reference(base, saved)(batches[0]).logits
    assert difference(found, expected) <= 1e-3


def test_a_teacher_that_says_nan_stops_it_at_once(base, tmp_path):
    path = layer_wise(base, tmp_path / "teacher", router_scope="block")
    teacher = load_reference(base, path)
    batches = [random_ids(4, 16, seed=seed) for seed in range(3)]
    student = make_student(str(path), teacher, backbone_of(base), batches)
    before = student.state_dict()
    embeddings = teacher.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[batches[0][0, 0]] = float("nan")
    with pytest.raises(NotFinite, match="the batch of step 1 .*\n.*KL from the teacher is nan") as e:
        distill(teacher, student, batches, DistillOptions(steps=9, lr=1e-2))
    assert torch.equal(e.value.batches[0], batches[0])
    assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())


def test_text_without_labels_counts_for_nothing(base, tmp_path):
    teacher = load_reference(base, layer_wise(base, tmp_path / "teacher"))
    one = {"input_ids": random_ids(2, 16)}
    none = {"input_ids": random_ids(2, 16, seed=1), "labels": torch.full((2, 16), -100)}
    backbone = backbone_of(base)
    assert mean_kl(teacher, backbone, [one, none]) == mean_kl(teacher, backbone, [one]) > 0
    assert mean_kl(teacher, backbone, [none]) == 0.0


def test_the_command_states_what_was_lost(base, tmp_path, capsys):
    path = layer_wise(base, tmp_path / "teacher", router_scope="block", mix="ffn_output")
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": t}) for t in list(real_texts())[:30]))
    options = ("--data", data, "--length", 32, "--steps", 4, "--batch-size", 4, "--quiet")
    options += ("--router-context", "mean", "--router-context-half-life", 8)
    code, out, err = run(capsys, "distill", path, *options, "--output", tmp_path / "made")
    assert code == 0, err
    rows = {line[:14].strip(): line.split()[-4:] for line in out.splitlines()[2:-1]}
    assert list(rows) == ["teacher", "student, start", "student", "backbone"]
    assert float(rows["teacher"][-1]) == 0 < float(rows["student"][-1])
    assert run(capsys, "check", tmp_path / "made")[0] == 0
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert (config["router.context"], config["router.context_half_life"]) == ("mean", 8.0)
    code, _, err = run(capsys, "distill", tmp_path / "made", *options, "--output", tmp_path / "x")
    assert code == 1 and "it is pre-gated already" in err


def test_bad_options_are_refused():
    with pytest.raises(AdapterError) as caught:
        DistillOptions(steps=-1, lr=0)
    assert "`steps` is -1" in str(caught.value) and "`lr` is 0" in str(caught.value)
