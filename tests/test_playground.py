"""The playground: what it says of models, how it colours tokens, and its page in headless Chromium.
The server behind it answers as it is told."""

import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from browser import BROWSER, opened
from engines import make_pair
from loras import FEW, make_lora
from vllm_adafuse.cli.main import main
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline.routing import OfflineRouter
from vllm_adafuse.playground.routes import Upstream
from vllm_adafuse.playground.server import Playground

TEXT = "def area(width):\n\treturn <b>width</b>"
ANSWER = [70, 71, 300, 301, 302, 99]


class Handler(BaseHTTPRequestHandler):
    """Streams ANSWER, its third and fourth token at once, as vLLM does."""

    def do_GET(self):
        self.reply(200, {"data": self.server.cards})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        if body["model"] == "gone":
            return self.reply(404, {"error": {"message": "The model `gone` does not exist."}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chat, tokenizer = "messages" in body, self.server.tokenizer
        text = body["messages"][0]["content"] if chat else body["prompt"]
        events = [{"prompt_token_ids": tokenizer(text)["input_ids"]}]
        for ids in (ANSWER[:1], ANSWER[1:2], ANSWER[2:4], *([t] for t in ANSWER[4:])):
            said = tokenizer.decode(ids)
            delta = {"delta": {"content": said}} if chat else {"text": said}
            events.append({"choices": [{"token_ids": ids} | delta]})
        if self.server.fails:
            events = [*events[:3], {"error": {"message": "the engine is gone", "code": 500}}]
        else:
            events[-1]["choices"][0]["finish_reason"] = "length"
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args):
        pass


def serving(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("playground")
    base, mix = make_pair(root, expert_names=["code", "prose", "<i>law</i>", "numbers"])
    make_random_adapter(base, root / "past", num_experts=3, r=4, router_context="mean")
    make_lora(base, root / "lora", 1, **FEW)
    return SimpleNamespace(root=root, base=base, mix=mix)


@pytest.fixture
def behind(made):
    from transformers import AutoTokenizer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.fails = [], False
    server.tokenizer = AutoTokenizer.from_pretrained(made.base)
    paths = {"mix": made.mix, "past": made.root / "past", "lora": made.root / "lora"}
    server.cards = [{"id": "base", "root": str(made.base), "parent": None}]
    for name, path in paths.items():
        server.cards.append({"id": name, "root": str(path), "parent": "base"})
    server.cards.append({"id": "afar", "root": "/nowhere/adapter", "parent": "base"})
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield serving(server)
    server.shutdown()


@pytest.fixture
def playground(behind):
    with Playground(("127.0.0.1", 0), Upstream(behind.url, {}, None, "secret")) as server:
        yield serving(server)
        server.shutdown()


def ask(server, path, body=None, **headers):
    """Status and text."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def asked(model, **changed):
    return {"model": model, "text": TEXT, "chat": False, "max_tokens": 6, "temperature": 0} | changed


def generated(server, model, **changed):
    status, text = ask(server, "generate", asked(model, **changed))
    assert status == 200
    return [json.loads(line) for line in text.splitlines()]


def test_models_are_told_with_their_experts_or_why_they_have_none(playground):
    status, text = ask(playground, "models")
    models = {m["id"]: m for m in json.loads(text)["models"]}
    assert status == 200 and list(models) == ["base", "mix", "past", "lora", "afar"]
    names = [expert["name"] for expert in models["mix"]["experts"]]
    assert names == ["code", "prose", "<i>law</i>", "numbers"]
    assert len(models["past"]["experts"]) == 3 and not models["past"]["plain"]
    assert models["past"]["past"] and not models["mix"]["past"]
    for name, why in (("base", "no experts"), ("lora", "plain LoRA"), ("afar", "--adapter")):
        assert why in models[name]["plain"] and "experts" not in models[name]


@pytest.mark.parametrize("model", ["mix", "past"])
@pytest.mark.parametrize("chat", [False, True])
def test_tokens_have_the_experts_that_route_says(made, behind, playground, model, chat):
    prompt, *answers, end = generated(playground, model, chat=chat)
    (path, body, key), = behind.asked
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert body["model"] == model and body["return_token_ids"] and key == "Bearer secret"
    assert prompt["place"] == "prompt" and end == {"end": "length"}
    tokens = prompt["tokens"] + [t for part in answers for t in part["tokens"]]
    ids = behind.tokenizer(TEXT)["input_ids"] + ANSWER
    assert [token["id"] for token in tokens] == ids
    assert "".join(token["text"] for token in tokens) == TEXT + behind.tokenizer.decode(ANSWER)
    texts = [token["text"] for part in answers for token in part["tokens"]]
    assert texts == [behind.tokenizer.decode([token]) for token in ANSWER]
    adapter = load_adapter(made.root / ("adapter" if model == "mix" else "past"))
    experts, weights = OfflineRouter(adapter, made.base).routes(torch.tensor(ids))
    for token, chosen, shares in zip(tokens, experts.tolist(), weights.tolist()):
        assert [e for e, _ in token["experts"]] == chosen
        assert [w for _, w in token["experts"]] == pytest.approx(shares, abs=1e-4)


def test_tokens_of_others_are_plain_and_complete(behind, playground):
    for model in ("base", "lora", "afar"):
        *parts, _ = generated(playground, model)
        tokens = [token for part in parts for token in part["tokens"]]
        assert not any("experts" in token for token in tokens)
        assert "".join(t["text"] for t in tokens) == TEXT + behind.tokenizer.decode(ANSWER)


def test_an_adapter_that_the_server_does_not_name(made, behind):
    behind.cards = [{"id": "composed", "root": "/elsewhere", "parent": None}]
    upstream = Upstream(behind.url, {"composed": made.mix}, str(made.base))
    (model,) = upstream.models()
    assert len(model["experts"]) == 4
    parts = list(upstream.generate(asked("composed")))
    assert parts[0]["tokens"][0]["experts"] and parts[-1] == {"end": "length"}


def test_what_goes_wrong_is_said(behind, playground):
    assert generated(playground, "gone") == [{"error": "The model `gone` does not exist."}]
    behind.fails = True
    *_, last = generated(playground, "mix")
    assert last == {"error": "the engine is gone"}
    for body in (b"{", [], {"model": "mix"}, asked("mix", max_tokens="many")):
        status, text = ask(playground, "generate", body)
        assert status == 400 and json.loads(text)["error"]
    assert ask(playground, "nothing")[0] == 404 == ask(playground, "nothing", {})[0]
    status, text = ask(playground, "generate", asked("mix"), Origin="http://evil.example")
    assert status == 403 and "evil.example" in text
    rebound = {"Origin": "http://evil.example", "Host": "evil.example"}
    assert ask(playground, "generate", asked("mix"), **rebound)[0] == 403
    own = playground.url.rstrip("/")
    assert ask(playground, "generate", asked("mix"), Origin=own)[0] == 200
    behind.shutdown(), behind.server_close()
    status, text = ask(playground, "models")
    assert status == 502 and "does not answer" in json.loads(text)["error"]


def test_its_command_refuses_what_it_cannot_ask(capsys):
    assert main(["playground", "localhost:8000"]) == 1
    assert "begins with neither http://" in capsys.readouterr().err
    assert main(["playground", "http://x", "--adapter", "name"]) == 1
    assert "expected NAME=DIR" in capsys.readouterr().err


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")
def test_the_page_in_a_browser(behind, playground, tmp_path):
    pytest.importorskip("websockets")
    with opened(playground.url, tmp_path) as page:
        options = page.until("[...$('model').options].map(o => o.value).join()")
        assert options == "base,mix,past,lora,afar"
        assert page.js("$('model').value") == "mix"  # the first one with experts
        page.js(f"$('text').value = {json.dumps(TEXT)}; $('form').requestSubmit()")
        page.until("document.body.dataset.done")
        assert page.js("$('error').textContent") == ""
        assert "6 tokens in" not in page.js("$('out').textContent")
        assert "6 tokens in" in page.js("$('count').textContent")
        count = len(behind.tokenizer(TEXT)["input_ids"]) + len(ANSWER)
        assert page.js("document.querySelectorAll('#out .e').length") == count
        assert page.js("document.querySelectorAll('#out .prompt').length") == count - len(ANSWER)
        assert page.js("document.querySelectorAll('#out b, #legend i').length") == 0  # text stays text
        assert "<b>width</b>" in page.js("$('out').textContent")
        page.js("show({text: '<b>bold</b>'}, 'answer')")  # a token may be all of it
        assert page.js("document.querySelectorAll('#out b').length") == 0
        # Legend and text have one colour for one expert, and colours differ.
        colours = page.js(
            "[...$('legend').children].map(l => getComputedStyle(l).backgroundColor).join(';')"
        ).split(";")
        assert len(set(colours)) == 4
        first = page.js("$('out').children[0].dataset.expert")
        shown = page.js("getComputedStyle($('out').children[0]).backgroundColor")
        assert shown == colours[int(first)]
        assert "%" in page.js(f"$('legend').children[{first}].textContent")
        page.js("$('out').children[0].dispatchEvent(new Event('mouseenter'))")
        assert "id " in page.js("$('tip').textContent") and ": " in page.js("$('tip').textContent")
        page.js(f"$('legend').children[{first}].dispatchEvent(new Event('mouseenter'))")
        assert page.js("$('out').classList.contains('dim')")
        assert page.js("$('out').children[0].classList.contains('on')")

        assert page.js("$('settling').children.length") == 0  # routes by the token alone do not settle
        page.js("delete document.body.dataset.done; $('model').value = 'past'; $('model').onchange()")
        page.js("$('form').requestSubmit()")
        page.until("document.body.dataset.done")
        assert page.js("$('settling').children.length") == count
        heights = page.js(
            "[...$('settling').children].map(c => [...c.children].map("
            "b => `${b.dataset.expert}:${b.getBoundingClientRect().height}`).join()).join(';')"
        )
        columns = [dict(part.split(":") for part in column.split(",")) for column in heights.split(";")]
        assert all(list(column) == sorted(column) for column in columns)  # an expert's bands in a row
        tall = page.js("$('settling').clientHeight")
        assert all(abs(sum(map(float, column.values())) - tall) < 1 for column in columns)
        page.js("delete document.body.dataset.done; $('model').value = 'lora'; $('model').onchange()")
        assert page.js("$('settling').children.length") == 0
        assert "plain LoRA" in page.js("$('plain').textContent")
        assert not page.js("$('out').classList.contains('dim')")
        page.js("$('form').requestSubmit()")
        page.until("document.body.dataset.done")
        assert page.js("document.querySelectorAll('#out .e').length") == 0
        assert page.js("$('out').textContent.length") > len(TEXT)

        behind.fails = True
        page.js("delete document.body.dataset.done; $('form').requestSubmit()")
        page.until("document.body.dataset.done")
        assert page.js("$('error').textContent") == "the engine is gone"
        assert page.js("$('go').textContent") == "Send"
