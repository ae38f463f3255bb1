"""`vllm-adafuse train`: data and its errors, splits, blocks, the command, and two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from cli_fixtures import base, run  # noqa: F401
from transformers import AutoTokenizer
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.server import free_port
from vllm_adafuse.tiny import real_texts
from vllm_adafuse.training.data import Blocks, Example, read_jsonl, split
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
    assert len(caught.value.problems) == 21  # not 99


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
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
torch.set_num_threads(1)
found = []
for options in {cases}:
    model = randomise(make({base!r}, balance_coef=0.5, z_loss_coef=0.1, **options))
    ids = random_ids(8, 24)[4 * rank : 4 * rank + 4]
    wrapped = DistributedDataParallel(model.train())
    wrapped(input_ids=ids, labels=ids).loss.backward()
    found.append([p.grad for p in model.trainable()])
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
    for options, found in zip(cases, torch.load(out), strict=True):
        model = randomise(make(base, balance_coef=0.5, z_loss_coef=0.1, **options)).train()
        ids = random_ids(8, 24)
        model(input_ids=ids, labels=ids).loss.backward()
        assert len(found) == len(model.trainable())
        for gradient, parameter in zip(found, model.trainable()):
            assert parameter.grad.norm() > 0 and difference(gradient, parameter.grad) <= 1e-4
