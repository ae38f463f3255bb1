"""`vllm-adafuse train`: data and its errors, splits, blocks, the command, and two processes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cli_fixtures import base, run  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.server import free_port
from vllm_adafuse.tiny import real_texts
from vllm_adafuse.training.data import Blocks, Example, places, read_jsonl, split
from vllm_adafuse.training.evaluate import next_token_scores
from vllm_adafuse.training.run import TrainOptions


@pytest.fixture(scope="module")
def tokenizer(base):  # noqa: F811
    return AutoTokenizer.from_pretrained(base)


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def learnt(tokenizer, example):
    return tokenizer.decode([t for t, on in zip(example.ids, example.learn) if on])


def test_what_is_learnt(tokenizer, tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second answer"},
    ]
    rows = [{"text": "all of it"}, "", {"prompt": "ask ", "completion": "reply"},
            {"messages": chat}]  # fmt: skip
    text, pair, talk = read_jsonl([write(tmp_path / "a.jsonl", rows)], tokenizer)
    assert learnt(tokenizer, text) == "all of it<|eos|>" == tokenizer.decode(text.ids)
    assert learnt(tokenizer, pair) == "reply<|eos|>"
    assert tokenizer.decode(pair.ids) == "ask reply<|eos|>"
    assert learnt(tokenizer, talk) == "first answer<|end|>\nsecond answer<|end|>\n"
    assert tokenizer.decode(talk.ids) == tokenizer.apply_chat_template(chat, tokenize=False)


BAD = {
    "not json": ("{'text': 1}", "is not JSON"),
    "a list": ("[1]", "holds [1], expected an object"),
    "no key": ({"txt": "x"}, "has the keys txt; expected exactly one of"),
    "two kinds": ({"text": "x", "prompt": "y", "completion": "z"}, "expected exactly one of"),
    "half a pair": ({"prompt": "y"}, "`completion` is missing"),
    "empty": ({"text": ""}, '`text` is "", expected a text that is not empty'),
    "number": ({"text": 3}, "`text` is 3, expected a text"),
    "no list": ({"messages": "hi"}, '`messages` is "hi", expected a list of objects'),
    "no content": ({"messages": [{"role": "user"}]}, "expected a list of objects with the texts"),
    "nobody answers": ({"messages": [{"role": "user", "content": "x"}]}, "none of role assistant"),
    "answers first": ({"messages": [{"role": "assistant", "content": "x"}]},
                      "put what it answers first"),
}  # fmt: skip


def test_bad_lines_are_named_with_file_and_line(tokenizer, tmp_path):
    rows = [row for bad, _ in BAD.values() for row in ({"text": "fine"}, bad)]
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(AdapterError) as caught:
        read_jsonl([path], tokenizer)
    assert len(caught.value.problems) == len(BAD)
    for i, (problem, (_, said)) in enumerate(zip(caught.value.problems, BAD.values())):
        assert problem.startswith(f"{path}:{2 * i + 2}: ") and said in problem
    path.write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(AdapterError, match=r"bad.jsonl:2: is not UTF-8"):
        read_jsonl([path], tokenizer)
    path.write_text("\n\n")
    with pytest.raises(AdapterError, match="no lines"):
        read_jsonl([path], tokenizer)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_jsonl([tmp_path / "nowhere.jsonl"], tokenizer)
    path.write_text("nonsense\n" * 99)
    with pytest.raises(AdapterError) as caught:
        read_jsonl([path], tokenizer)
    said, stopped = caught.value.problems  # once, not 99 times
    assert said.startswith(f"{path}:1: is not JSON") and said.endswith(f"(so are {path}:2-20)")
    assert "stopped looking" in stopped


def test_chat_without_a_template_is_refused(tokenizer, tmp_path):
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    rows = [{"messages": [{"role": "user", "content": "x"}]}]
    with pytest.raises(AdapterError, match="needs a tokenizer with a chat template"):
        read_jsonl([write(tmp_path / "chat.jsonl", rows)], plain)


def example(*ids):
    return Example(ids, (True,) * len(ids))


def test_equal_lines_stay_on_one_side_of_the_split():
    examples = [example(i % 40, i % 7) for i in range(400)]
    kept, held = split(examples, 0.2)
    assert len(kept) + len(held) == 400 and not set(kept) & set(held)
    assert 0.1 < len({*held}) / len({*examples}) < 0.3
    assert split(examples, 0.2)[1] == held and split(examples, 0) == (examples, [])
    assert len(split([example(1), example(2)], 0.01)[1]) == 1
    with pytest.raises(AdapterError, match="none is left"):
        split([example(1), example(1)], 0.5)


def test_packing_loses_nothing_and_mixes_no_first_token():
    examples = [example(*range(10, 15)), Example((20, 21, 22, 23), (False, False, True, True)),
                example(30, 31)]  # fmt: skip
    blocks = Blocks(examples, 4, pack=True, pad=0)
    assert blocks.ids.tolist() == [[10, 11, 12, 13], [14, 20, 21, 22], [23, 30, 31, 0]]
    off = -100
    assert blocks.labels.tolist() == [[off, 11, 12, 13], [14, off, off, 22], [23, off, 31, off]]
    assert blocks.mask.sum() == 11
    apart = Blocks(examples, 4, pack=False, pad=0)
    assert apart.ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 0, 0]]
    assert apart.tokens == 3 + 2 + 1


def test_blocks_without_a_token_with_loss_are_left_out():
    long = Example((1, 2, 3, 4, 5, 6), (False,) * 5 + (True,), "a.jsonl:1")
    short = Example((7, 8), (False, True), "a.jsonl:2")
    packed = Blocks([long, short], 2, pack=True, pad=0)
    assert packed.ids.tolist() == [[5, 6], [7, 8]] and packed.left_out == 2
    assert packed.unlearnt == [] and packed.sources == [["a.jsonl:1"], ["a.jsonl:2"]]
    assert len(Blocks([long, short], 2, pack=True, pad=0, every=True)) == 4
    apart = Blocks([long, short, replace(short, source="a.jsonl:3")], 4, pack=False, pad=0)
    assert apart.ids.tolist() == [[7, 8, 0, 0]] * 2 and apart.unlearnt == ["a.jsonl:1"]
    assert apart.sources_of(apart.ids[:1]) == ["a.jsonl:2", "a.jsonl:3"]  # equal blocks: both
    # A label at a block's first place is no token with loss: nothing comes before it.
    shifted = Blocks([Example((1, 2, 3, 4, 5), (True,) * 5)], 4, pack=True, pad=0)
    assert shifted.ids.tolist() == [[1, 2, 3, 4]]
    at_start = Example((1, 2, 3, 4), (False, False, False, True), "a.jsonl:9")
    assert Blocks([at_start, short], 3, pack=True, pad=0).unlearnt == ["a.jsonl:9"]


def test_lines_are_named_in_ranges():
    lines = [f"x:y.jsonl:{n}" for n in (9, 3, 2, 11, 10)] + ["a.jsonl:1"]
    assert places(lines) == "a.jsonl:1, x:y.jsonl:2-3, 9-11"
    assert places(lines, 1) == "a.jsonl:1 and 2 more"


def test_scores_by_hand():
    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 4)
            logits[..., 2] = torch.log(torch.tensor(5.0))  # 2: 5/8, others 1/8
            return type("Output", (), {"logits": logits})

    scores = next_token_scores(Model(), [{"input_ids": torch.tensor([[0, 2, 1, 2]]),
                                          "labels": torch.tensor([[0, 2, 1, -100]])}])  # fmt: skip
    assert scores["perplexity"] == pytest.approx((8 / 5 * 8) ** 0.5)
    assert scores["accuracy"] == 0.5 and scores["tokens"] == 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rows = [{"text": text} for text in list(real_texts())[:120]]
    return write(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


def test_the_command_from_jsonl_to_a_checked_adapter(base, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "adapter"
    arguments = ("train", "--base", base, "--data", texts, "--output", out, "--length", 64,
                 "--num-experts", 4, "--r", 4, "--lr", "1e-2", "--epochs", 2, "--quiet",
                 "--held-out", 0.1, "--save-every", 20)  # fmt: skip
    code, said, err = run(capsys, *arguments)
    assert code == 0, err
    before, after = next(line for line in said.splitlines() if "perplexity" in line).split()[1::2]
    assert float(after) < 0.8 * float(before)
    assert "expert_3" in said and "inspect" in said
    code, said, _ = run(capsys, "check", out, "--base", base)
    assert code == 0 and "ok: " in said
    assert any((tmp_path / "adapter-training").glob("checkpoint-*/model.safetensors"))
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "it is not empty" in err
    for file in out.iterdir():
        file.unlink()
    code, _, err = run(capsys, *arguments, "--resume", "--epochs", 3)
    assert code == 0, err


def test_prompts_longer_than_a_block_are_named(base, tmp_path, capsys, caplog):  # noqa: F811
    """Most steps hold no label; what can be learnt is, and the rest is said."""
    rows = [{"prompt": f"{i} " + "words " * (40 if i % 4 else 1), "completion": "an answer"}
            for i in range(24)]  # fmt: skip
    data = write(tmp_path / "long.jsonl", rows)
    arguments = ("train", "--base", base, "--data", data, "--length", 32, "--num-experts", 2,
                 "--r", 2, "--batch-size", 1, "--held-out", 0, "--quiet", "--no-packing")  # fmt: skip
    code, said, err = run(capsys, *arguments, "--output", tmp_path / "a")
    assert code == 0, err
    assert "trained on 6 examples" in said
    assert f"18 of 24 lines have no token with loss in the first 32 and teach nothing; raise " \
        f"--length: {data}:2-4, 6-8" in caplog.text  # fmt: skip
    data = write(tmp_path / "none.jsonl", rows[1:4])
    code, said, err = run(capsys, *arguments, "--data", data, "--output", tmp_path / "b")
    assert code == 0, err  # files are taken together
    code, _, err = run(capsys, *(data if a == tmp_path / "long.jsonl" else a for a in arguments),
                       "--output", tmp_path / "c")  # fmt: skip
    assert code == 1 and "no token with loss fits into 32 tokens; raise --length" in err


def test_a_run_that_diverges_says_at_which_lines(base, texts, tmp_path, capsys):  # noqa: F811
    code, _, err = run(capsys, "train", "--base", base, "--data", texts, "--output",
                       tmp_path / "a", "--length", 64, "--lr", "1e30", "--save-every", 1,
                       "--held-out", 0, "--steps", 9, "--quiet")  # fmt: skip
    assert code == 1 and not (tmp_path / "a").exists()
    assert re.search(r"^vllm-adafuse: the batch of step \d cannot be used:\n  - its (loss is nan|loss "
                     r"is inf|gradients).* lower the learning rate", err, re.MULTILINE), err  # fmt: skip
    assert re.search(rf"it held {texts}:\d+", err)
    assert err.splitlines()[-3].startswith("vllm-adafuse: ")  # no traceback under it
    for kept in (tmp_path / "a-training").glob("checkpoint-*"):
        assert all(t.isfinite().all() for t in load_file(kept / "model.safetensors").values())


@pytest.mark.parametrize(
    "options,said",
    [
        (("--length", 4096), "expected at most the backbone's 512 positions"),
        (("--top-k", 9), "`top_k` is 9"),
        (("--held-out", 1), "`held_out` is 1.0"),
        (("--resume",), "holds no checkpoint to resume from"),
        (("--target-modules", "c_attn"), "target module c_attn is not in"),
        (("--base", "/nowhere"), "neither a directory with a config.json nor in the"),
    ],
)
def test_bad_options_are_refused(base, texts, tmp_path, capsys, options, said):  # noqa: F811
    code, _, err = run(capsys, "train", "--base", base, "--data", texts, "--output",
                       tmp_path / "a", "--length", 64, "--quiet", *options)  # fmt: skip
    assert code == 1 and said in err
    assert not (tmp_path / "a").exists()


def test_options_are_checked_together():
    with pytest.raises(AdapterError) as caught:
        TrainOptions("base", (), "out", length=1, lr=0, load="2bit")
    for said in ("`length` is 1", "`lr` is 0", "`load` is 2bit", "`data` is empty"):
        assert said in str(caught.value)


DDP = """
import os, sys, torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
from training_models import make, random_ids, randomise
from vllm_adafuse.training.health import NotFinite
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
torch.set_num_threads(1)
found = []
mine = random_ids(8, 24)[4 * rank : 4 * rank + 4]
nothing = torch.full_like(mine, -100)
for options in {cases}:
    model = randomise(make({base!r}, balance_coef=0.5, z_loss_coef=0.1, **options))
    wrapped = DistributedDataParallel(model.train())
    wrapped(input_ids=mine, labels=mine).loss.backward()
    found.append([p.grad for p in model.trainable()])
# Only one process has labels, then none has: Trainer tells the number of all, times processes.
for labels, items in ((mine if rank == 0 else nothing, 4 * 23), (nothing, 0)):
    model = randomise(make({base!r}, balance_coef=0.0, z_loss_coef=0.0))
    wrapped = DistributedDataParallel(model.train())
    loss = wrapped(input_ids=mine, labels=labels, num_items_in_batch=torch.tensor(items)).loss
    (2 * loss).backward()
    found.append([p.grad for p in model.trainable()])
if rank == 1:
    with torch.no_grad():
        model.groups[0].A[0, 0, 0, 0] = float("nan")
try:  # both leave, or one would wait for the other for ever
    wrapped(input_ids=mine, labels=mine)
except NotFinite as e:
    said = str(e)
assert ("its loss is nan" if rank == 1 else "another process's part") in said, said
if rank == 0:
    torch.save(found, {out!r})
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_the_joint_batch(base, tmp_path):  # noqa: F811
    from training_models import difference, make, random_ids, randomise

    cases = [{"router_layer": 1}, {"routing": "layer_wise"}, {"num_experts": 1, "top_k": 1}]
    script, out = tmp_path / "ddp.py", tmp_path / "gradients.pt"
    script.write_text(DDP.format(tests=os.path.dirname(__file__), base=str(base), out=str(out),
                                 cases=cases))  # fmt: skip
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                                "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, script], env=environment | {"RANK": str(rank)},
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
    *joint, one_labelled, none_labelled = torch.load(out)
    for options, found in zip(cases, joint, strict=True):
        model = randomise(make(base, balance_coef=0.5, z_loss_coef=0.1, **options)).train()
        ids = random_ids(8, 24)
        model(input_ids=ids, labels=ids).loss.backward()
        assert len(found) == len(model.trainable())
        for gradient, parameter in zip(found, model.trainable()):
            assert parameter.grad.norm() > 0 and difference(gradient, parameter.grad) <= 1e-4
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in none_labelled)
    model = randomise(make(base, balance_coef=0.0, z_loss_coef=0.0)).train()
    ids = random_ids(8, 24)[:4]
    model(input_ids=ids, labels=ids).loss.backward()
    for gradient, parameter in zip(one_labelled, model.trainable()):
        assert difference(gradient, parameter.grad) <= 1e-4
