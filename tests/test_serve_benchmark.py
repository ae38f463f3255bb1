"""benchmarks.serve: servers that start at once and take turns, and vLLM's client in this process."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import benchmark_package  # noqa: F401
import pytest
import vllm.benchmarks.serve
from vllm_adafuse.server import Server

from benchmarks import engine, serve

GIB = 1 << 30


def test_the_servers_tokenizer_keeps_lengths(tmp_path):
    from transformers import AutoTokenizer

    serve.save_tokenizer(tmp_path, 500)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [7, 499, 7, *range(2, 500)]
    assert len(tokenizer) == 500 and tokenizer.all_special_ids == [0, 1]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    # What vLLM asks of a text before it counts its tokens (renderers/params.py).
    assert len(tokenizer.decode([499] * 100)) <= 100 * max(map(len, tokenizer.get_vocab()))
    assert tokenizer.num_special_tokens_to_add() == 0


def client(monkeypatch, results):
    """Puts a client in the place of vLLM's; returns the arguments that it gets."""
    asked, results = [], iter(results)

    def main(args):
        asked.append(args)
        print("a table")
        found = next(results)
        if isinstance(found, BaseException):
            raise found
        figures = dict.fromkeys(serve.FIGURES, 1.0) | {"completed": args.num_prompts}
        tokens = args.random_input_len, args.random_output_len
        totals = (args.num_prompts * n for n in tokens)
        return figures | dict(zip(("total_input_tokens", "total_output_tokens"), totals)) | found

    monkeypatch.setattr(vllm.benchmarks.serve, "main", main)
    return asked


def server_of(tmp_path):
    return Server("http://127.0.0.1:1", None, tmp_path / "serve-x.log")


def test_requests_of_a_server_with_many_adapters_name_one_of_them(tmp_path, monkeypatch, capsys):
    options = serve.Options(engines=["mixtures:4", "vllm:2"], num_prompts=6, input_len=2, output_len=3)
    for first in ("lora", "mixture"):
        (tmp_path / first).mkdir()
        (tmp_path / first / "adapter_model.safetensors").write_text("")
    ours, theirs = (serve.command(kind, options, tmp_path) for kind in options.engines)
    modules = [f"mixture{i}={tmp_path}/mixture{i}" for i in range(4)]
    assert ours[ours.index("--lora-modules") + 1 :] == modules
    assert ours[ours.index("--max-loras") :][:4] == ["--max-loras", "4", "--max-lora-rank", "128"]
    assert json.dumps(engine.VLLM_LORA) in theirs and json.dumps(engine.VLLM_LORA) not in ours
    files = [tmp_path / f"mixture{end}" / "adapter_model.safetensors" for end in ("", 0, 3)]
    assert len({file.stat().st_ino for file in files}) == 1
    asked = client(monkeypatch, [{"p99_itl_ms": 2}, {"completed": 5}, {"total_output_tokens": 17}])
    server, names = server_of(tmp_path), ["mixture0", "mixture1"]
    assert serve.load(server, "inf", options, tmp_path, 7, names)["p99_itl_ms"] == 2.0
    first = asked[0]
    assert first.lora_modules == names and first.lora_assignment == "random" and first.seed == 7
    assert first.request_rate == float("inf") and first.num_prompts == 6 and first.temperature == 0
    with pytest.raises(RuntimeError, match="5 of 6 requests completed"):
        serve.load(server, "inf", options, tmp_path, 0, [])
    assert not asked[1].lora_modules
    with pytest.raises(RuntimeError, match=r"\(12, 17\) tokens in and out, expected \(12, 18\)"):
        serve.load(server, "inf", options, tmp_path, 0, [])
    with pytest.raises(ValueError, match="engines has loras:0, expected stock, adafuse, loras:N"):
        serve.Options(engines=["loras:0"])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "serve-x.client.log").read_text() == "a table\n" * 3


def test_a_client_that_fails_says_where_it_printed_why(tmp_path, monkeypatch):
    options = serve.Options(num_prompts=6, input_len=2, output_len=3)
    client(monkeypatch, [ValueError("no server"), SystemExit(2)])
    for why in ("ValueError", "SystemExit"):
        with pytest.raises(RuntimeError, match=rf"{why}\(.*; {tmp_path}/serve-x.client.log has"):
            serve.load(server_of(tmp_path), "inf", options, tmp_path, 0, [])


def test_servers_take_turns_and_a_figure_is_the_median_of_them(monkeypatch, tmp_path, capsys):
    order = []

    def load(server, rate, options, root, seed, names):
        order.append((server, rate, seed, names))
        return dict.fromkeys(serve.FIGURES, float(len(order) ** 2))

    monkeypatch.setattr(serve, "load", load)
    names = {"stock": [], "loras:1": ["lora0"]}
    servers = {kind: kind.upper() for kind in names}
    stock, ours = serve.take_turns(servers, "8", serve.Options(repeats=3), tmp_path, names)
    assert order == [("STOCK", "8", 0, []), ("LORAS:1", "8", 0, ["lora0"])] * 3
    assert stock["all"] == [1.0, 9.0, 25.0] and ours["all"] == [4.0, 16.0, 36.0]
    assert (stock["engine"], stock["rate"], stock["output_throughput"]) == ("stock", "8", 9.0)
    assert ours["p99_itl_ms"] == 16.0
    assert "9.0 tokens/s (1.0 to 25.0)" in capsys.readouterr().out


def test_as_many_servers_run_at_once_as_the_device_holds():
    engines = ["stock", "loras:1", "loras:8", "mixtures:4"]
    options = serve.Options(model="llama-3-8b", engines=engines, num_prompts=160)
    # 160 requests of 640 tokens, 128 KiB each.
    assert 160 * 640 / 8192 < options.cache_gib < 1.1 * 160 * 640 / 8192 + 0.7
    assert 14.9 < options.engine_gib - options.cache_gib - serve.BESIDE < 15.0  # as vLLM says
    assert options.groups(140 * GIB) == [engines[:3], engines[3:]]
    assert options.groups(8 * GIB) == [[kind] for kind in engines]
    assert options.groups(None) == [engines]
    options.group = 2
    assert options.groups(None) == options.groups(140 * GIB) == [engines[:2], engines[2:]]
    for name in ("group", "repeats"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            serve.Options(**{name: 0})


@pytest.fixture
def events(monkeypatch):
    """What befalls servers that are none, in order; one named bad does not start."""
    found = []

    @contextmanager
    def started_server(argv, log, env=None):
        found.append(f"start {argv}")
        told = SimpleNamespace(send_signal=lambda number: found.append(f"tell {argv} {number.name}"))
        try:
            yield SimpleNamespace(process=told, log=log, name=argv)
        finally:
            found.append(f"stop {argv}")

    def wait_until_healthy(server, timeout):
        if server.name == "bad":
            raise RuntimeError("not healthy")
        found.append(f"wait {server.name}")

    monkeypatch.setattr(serve, "started_server", started_server)
    monkeypatch.setattr(serve, "wait_until_healthy", wait_until_healthy)
    return found


def test_servers_start_at_once_and_end_at_once(events, tmp_path, capsys):
    with serve.running({"x": "a", "y:1": "b"}, tmp_path) as servers:
        assert events == ["start a", "start b", "wait a", "wait b"]
        assert [server.log.name for server in servers.values()] == ["serve-x.log", "serve-y-1.log"]
    assert events[4:] == ["tell a SIGINT", "tell b SIGINT", "stop b", "stop a"]
    assert "phase    servers start" in capsys.readouterr().out


def test_a_server_that_does_not_start_ends_the_others(events, tmp_path):
    with pytest.raises(RuntimeError, match="not healthy"), serve.running(dict(x="a", y="bad"), tmp_path):
        raise AssertionError("they are not healthy")
    assert events[-4:] == ["tell a SIGINT", "tell bad SIGINT", "stop bad", "stop a"]
