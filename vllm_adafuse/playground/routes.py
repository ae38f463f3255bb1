"""Models of a running server, and the experts of their tokens: from token ids alone, by the router's
own files, without asking the server."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adafuse.cli.colors import hue, level
from vllm_adafuse.cli.common import open_adapter
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import CONFIG_FILE
from vllm_adafuse.format.pretrained import load_tokenizer
from vllm_adafuse.format.reading import read_json
from vllm_adafuse.text import printable

PATIENCE = 300.0  # seconds that a server may be silent


@dataclass(frozen=True)
class Routed:
    """How a mixture's tokens are routed.

    Attributes:
        router: of the adapter, with `routes`.
        names: of its experts.
    """

    router: Any
    names: tuple[str, ...]

    @property
    def sees_past(self) -> bool:
        return bool(self.router.config.router_context)


class Upstream:
    """An OpenAI-compatible server, and what of its models lies on this machine.

    Args:
        url: of its root.
        adapters: directories of models, by name, where /v1/models does not say them.
        base: the backbone's directory, where /v1/models does not say it.
        key: for its Authorization header, or "".
    """

    def __init__(self, url: str, adapters: dict[str, Path], base: str | None, key: str = ""):
        self.url, self.adapters, self.base, self.key = url.rstrip("/"), adapters, base, key
        self._lock = threading.Lock()
        self._routed: dict[tuple[str, int], Routed | str] = {}
        self._tokenizers: dict[str, Any] = {}
        # A server on loopback is no business of a proxy named in the environment.
        local = "://127." in self.url or "://localhost" in self.url or "://[::1]" in self.url
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(*proxies)

    def ask(self, path: str, body: dict | None = None) -> Any:
        """An open answer.

        Raises:
            ConnectionError: no server answers, or it refuses; the message is its own.
        """
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            return self._opener.open(request, timeout=PATIENCE)
        except urllib.error.HTTPError as e:
            raise ConnectionError(_said(e)) from e
        except OSError as e:
            reason = getattr(e, "reason", e)
            raise ConnectionError(f"{self.url} does not answer: {reason}") from e

    def cards(self) -> list[dict[str, Any]]:
        """What /v1/models says.

        Raises:
            ConnectionError: as `ask`.
        """
        with self.ask("/v1/models") as answer:
            return json.loads(answer.read())["data"]

    def models(self) -> list[dict[str, Any]]:
        """For the page: of each model its id, what it is, why it has no colours, its experts, and
        whether they depend on the request's past."""
        cards, shown = self.cards(), []
        for card in cards:
            found = self.routed(card["id"], cards)
            told = {"id": card["id"], "adapter": card.get("parent") is not None}
            if isinstance(found, Routed):
                told["experts"] = [
                    {"name": printable(name), "hue": hue(e), "level": level(e)}
                    for e, name in enumerate(found.names)
                ]
                told["past"] = found.sees_past
            shown.append(told | {"plain": found if isinstance(found, str) else ""})
        return shown

    def routed(self, model: str, cards: list[dict[str, Any]] | None = None) -> Routed | str:
        """Routes of a model's tokens, or why there are none.

        Args:
            model: its name.
            cards: of the server, where they are known.
        """
        cards = self.cards() if cards is None else cards
        card = next((card for card in cards if card["id"] == model), {})
        path = self.adapters.get(model)
        if path is None and card.get("parent") is None:
            return "the base has no experts"
        path = Path(card.get("root") or "") if path is None else path
        config = path / CONFIG_FILE
        if not config.is_file():
            return f"its directory {path} is not on this machine; name it with --adapter"
        key = (str(path), config.stat().st_mtime_ns)
        with self._lock:
            if key not in self._routed:
                self._routed[key] = self._open(path, self._base_of(cards))
            return self._routed[key]

    def _base_of(self, cards: list[dict[str, Any]]) -> str | None:
        if self.base is not None:
            return self.base
        roots = [card.get("root") or "" for card in cards if card.get("parent") is None]
        return next((root for root in roots if root and Path(root).is_dir()), None)

    @staticmethod
    def _open(path: Path, base: str | None) -> Routed | str:
        from vllm_adafuse.offline.routing import OfflineRouter

        try:
            content, _ = read_json(path / CONFIG_FILE)
            if not isinstance(content, dict) or content.get("peft_type", "LORA") != "ADAFUSE":
                return "a plain LoRA: the same for every token"
            opened = open_adapter(str(path), base)
            if opened.adapter is None or opened.problems:
                return f"{path} has faults: {'; '.join(opened.problems)}"
            if opened.base is None:
                return "its backbone is not on this machine; name it with --base"
            router = OfflineRouter(opened.adapter, opened.base)
        except AdapterError as e:
            return str(e)
        return Routed(router, opened.adapter.config.expert_names)

    def tokenizer(self, base: str | None) -> Any:
        """The backbone's, or None where it is not on this machine."""
        if base is None:
            return None
        with self._lock:
            if base not in self._tokenizers:
                self._tokenizers[base] = load_tokenizer(Path(base))
            return self._tokenizers[base]

    def generate(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Streams an answer: {"place": "prompt" | "answer", "tokens": […]}, then {"end": reason}.

        A token has `text`, and where it is known `id` and `experts`, [[expert, weight], …].

        Args:
            asked: model, text, chat, max_tokens and temperature.

        Raises:
            ConnectionError: as `ask`.
            AdapterError: the backbone's tokenizer cannot be used.
        """
        cards = self.cards()
        routed, tokenizer = self.routed(asked["model"], cards), self.tokenizer(self._base_of(cards))
        body = {key: asked[key] for key in ("model", "max_tokens", "temperature")}
        body |= {"stream": True, "return_token_ids": True}
        chat = bool(asked.get("chat"))
        if chat:
            body["messages"] = [{"role": "user", "content": asked["text"]}]
        else:
            body["prompt"] = asked["text"]
        ids: list[int] = []
        with self.ask(f"/v1/{'chat/' if chat else ''}completions", body) as answer:
            for event in _events(answer):
                if "error" in event:
                    raise ConnectionError(str(event["error"].get("message", event["error"])))
                choice = (event.get("choices") or [{}])[0]
                prompt = choice.get("prompt_token_ids") or event.get("prompt_token_ids")
                if prompt and not ids:
                    tokens = _tokens(prompt, None, ids, routed, tokenizer)
                    yield {"place": "prompt", "tokens": tokens}
                delta = choice.get("delta", choice)
                text = delta.get("content" if chat else "text") or ""
                new = choice.get("token_ids") or []
                if new or text:
                    yield {"place": "answer", "tokens": _tokens(new, text, ids, routed, tokenizer)}
                if choice.get("finish_reason"):
                    yield {"end": choice["finish_reason"]}


def _said(error: urllib.error.HTTPError) -> str:
    """A server's own message, else its status."""
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answers {error.code} {error.reason}"


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """The JSON of a stream of server-sent events."""
    for line in answer:
        if line.startswith(b"data: ") and (content := line[6:].strip()) != b"[DONE]":
            yield json.loads(content)


def _tokens(
    new: list[int], text: str | None, ids: list[int], routed: Routed | str, tokenizer: Any
) -> list[dict[str, Any]]:
    """Tokens for the page; their ids are added to those of the request so far.

    Args:
        new: token ids.
        text: what they say together, if the server said it.
        ids: of the request so far.
        routed: how they are routed, or why not.
        tokenizer: of the backbone, or None.
    """
    import torch

    ids.extend(new)
    if text is not None and len(new) < 2 or tokenizer is None:
        texts = [text or ""] + [""] * (len(new) - 1)
    else:
        texts = [tokenizer.decode([token]) for token in new]
    tokens: list[dict[str, Any]] = [{"text": part} for part in texts]
    for token, number in zip(tokens, new):
        token["id"] = number
    if isinstance(routed, Routed) and new:
        # A router that sees the past needs the whole request.
        whole = ids if routed.sees_past else new
        experts, weights = (part[-len(new) :].tolist() for part in
                            routed.router.routes(torch.tensor(whole)))  # fmt: skip
        for token, chosen, shares in zip(tokens, experts, weights):
            token["experts"] = [[e, round(w, 4)] for e, w in zip(chosen, shares)]
    return tokens
