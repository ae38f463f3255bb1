"""The demo's server: several adapters and the base behind one address, chosen by `model=`."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from vllm_adafuse.format.config import CONFIG_FILE, WEIGHTS_FILE
from vllm_adafuse.server import Server

OPTIONS = "--served-model-name base --enable-lora --max-loras 4 --max-lora-rank 128".split()
LATER = "sharp"  # the adapter that is loaded while the server runs


def printable(text: str) -> Text:
    """Text on one line: a small model says any byte."""
    return Text("".join(c if c.isprintable() else " " for c in text).strip())


def make_adapters(mixture: Path, root: Path) -> dict[str, Path]:
    """More adapters out of one mixture, by name: two of its experts as plain PEFT LoRAs, and LATER,
    the mixture with one expert a token.

    Args:
        mixture: its directory.
        root: where the others are written.
    """
    config = json.loads((mixture / CONFIG_FILE).read_text())
    count = config["num_experts"]
    names = config.get("expert_names") or [f"expert_{e}" for e in range(count)]
    made = {"mixture": mixture}
    for expert in (0, count - 1):
        made[names[expert]] = _as_lora(mixture, config, expert, root / f"lora_{expert}")
    made[LATER] = root / LATER
    shutil.rmtree(made[LATER], ignore_errors=True)
    shutil.copytree(mixture, made[LATER])
    (made[LATER] / CONFIG_FILE).write_text(json.dumps(config | {"top_k": 1}))
    return made


def _as_lora(mixture: Path, config: dict[str, Any], expert: int, out: Path) -> Path:
    """One expert of a mixture as PEFT would save it."""
    r, alpha = (
        value[expert] if isinstance(value := config[key], list) else value
        for key in ("r", "lora_alpha")
    )
    tensors = {}
    for name, tensor in load_file(mixture / WEIGHTS_FILE).items():
        if name.endswith((".lora_A", ".lora_B")):
            own = tensor[expert][:r] if name.endswith("A") else tensor[expert][:, :r]
            tensors[f"base_model.model.{name}.weight"] = own.contiguous()
    out.mkdir(exist_ok=True)
    save_file(tensors, out / WEIGHTS_FILE)
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "bias": "none",
        "target_modules": config["target_modules"],
        "base_model_name_or_path": config["base_model_name_or_path"],
    }  # fmt: skip
    (out / CONFIG_FILE).write_text(json.dumps(told))
    return out


class Client:
    """What the demo asks of its server.

    Args:
        server: that runs.
        console: to show on.
    """

    def __init__(self, server: Server, console: Console):
        import httpx
        import openai

        self.server, self.console = server, console
        # The server is on loopback: a proxy named in the environment has no part in it.
        self.openai = openai.OpenAI(
            base_url=server.api, api_key="none", http_client=httpx.Client(trust_env=False),
            timeout=60, max_retries=0,
        )  # fmt: skip

    def models(self) -> list[str]:
        """Names that `model=` may be."""
        return [model.id for model in self.openai.models.list().data]

    def show_texts(self, models: Sequence[str], prompt: str, tokens: int) -> dict[str, str]:
        """What each model makes of one prompt, streamed; returns it.

        Raises:
            RuntimeError: one says nothing.
        """
        table = Table("model=", "goes on", title=f"{printable(prompt).plain[:60]} …")
        said = {}
        for model in models:
            stream = self.openai.completions.create(
                model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
            )
            said[model] = "".join(c.choices[0].text for c in stream if c.choices)
            if not said[model]:
                raise RuntimeError(f"the server streamed no text of {model}")
            table.add_row(model, printable(said[model]))
        self.console.print(table)
        return said

    def show_chat(self, model: str, question: str, tokens: int) -> None:
        """A chat completion."""
        answer = self.openai.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=tokens,
            temperature=0,
        )  # fmt: skip
        self.console.print(Text(f"chat with {model}: ", "bold") + Text(question))
        self.console.print(Text("  -> ") + printable(answer.choices[0].message.content or ""))

    def load(self, name: str, path: Path) -> None:
        """Loads an adapter into the running server."""
        body = json.dumps({"lora_name": name, "lora_path": str(path)}).encode()
        request = urllib.request.Request(
            f"{self.server.url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"}
        )
        with _DIRECT.open(request, timeout=60) as answer:
            self.console.print(f"  {answer.read().decode()}", style="dim", markup=False)

    def metrics(self) -> dict[str, float]:
        """Tokens generated so far by each adapter, and the pool's pages, from /metrics."""
        with _DIRECT.open(f"{self.server.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = {}
        for line in lines:
            if match := re.match(r'adafuse_tokens_total\{(.*)\} (\S+)', line):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
                if labels["kind"] == "generation":
                    found[f"tokens of {labels['adapter'] or 'the base'}"] = float(match[2])
            elif match := re.match(r'adafuse_pool_pages_used\{.*\} (\S+)', line):
                found["pages of the pool in use"] = float(match[1])
        return found

    def show_metrics(self, before: dict[str, float]) -> None:
        """What has moved.

        Raises:
            RuntimeError: nothing has.
        """
        after = self.metrics()
        table = Table("/metrics", "before", "now", title="adafuse_tokens_total, adafuse_pool_pages_used")
        for name, value in sorted(after.items()):
            table.add_row(name, f"{before.get(name, 0):.0f}", f"{value:.0f}")
        self.console.print(table)
        if after == before:
            raise RuntimeError("/metrics did not move")


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
