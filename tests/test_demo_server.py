"""The demo's adapters: experts of a mixture as LoRAs, and the mixture with one expert a token."""

import json
from types import SimpleNamespace

import pytest
import torch
from engines import load_reference, make_pair
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from vllm_adafuse import demo_server
from vllm_adafuse.demo_server import LATER, Client, make_adapters


@pytest.mark.parametrize("r", [4, [4, 6, 3, 5]])
def test_a_lora_is_the_expert_that_it_is_named_after(tmp_path, r):
    base, mixture = make_pair(tmp_path, r=r, expert_names=["code", "a", "b", "prose"])
    made = make_adapters(mixture, tmp_path)
    assert list(made) == ["mixture", "code", "prose", LATER]
    assert json.loads((made[LATER] / "adapter_config.json").read_text())["top_k"] == 1
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = load_reference(base, mixture)
    for name, expert in (("code", 0), ("prose", 3)):
        own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        lora = PeftModel.from_pretrained(own, made[name]).eval()
        gates = torch.zeros(1, 4, 4)
        gates[..., expert] = 1
        whole.adafuse._decide = lambda *_, gates=gates: gates
        with torch.no_grad():
            assert torch.allclose(lora(ids).logits, whole(ids).logits, atol=1e-4), name


def test_metrics_that_do_not_move_are_an_error(monkeypatch):
    text = (
        'adafuse_tokens_total{adapter="",kind="generation"} 3.0\n'
        'adafuse_tokens_total{adapter="mix",kind="prompt"} 9.0\n'
        'adafuse_tokens_total{adapter="mix",kind="generation"} 4.0\n'
        'adafuse_pool_pages_used{engine="0"} 6.0\n'
    )

    class Answer:
        def __enter__(self):
            return SimpleNamespace(read=text.encode)

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(demo_server, "_DIRECT", SimpleNamespace(open=lambda *a, **k: Answer()))
    server = SimpleNamespace(url="http://127.0.0.1:1", api="http://127.0.0.1:1/v1")
    client = Client(server, Console(quiet=True))
    now = client.metrics()
    assert now == {
        "tokens of the base": 3, "tokens of mix": 4, "pages of the pool in use": 6
    }  # fmt: skip
    client.show_metrics({})
    with pytest.raises(RuntimeError, match="did not move"):
        client.show_metrics(now)
