"""Tokens of experts in `/metrics`: tables that workers leave, and what a front end counts by them. Engines
are asked in test_engine_context_pages.py, a server in test_lora_server.py."""

import errno
import shutil
import time
from multiprocessing import get_context
from threading import current_thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_adafuse.kernels.context_routes import choose_by_past, fading_of
from vllm_adafuse.serving import expert_tables, metrics, scratch
from vllm_adafuse.serving.adapters import stamp_path
from vllm_adafuse.serving.expert_tables import KEPT, LINGERS, MAPPED, Experts, Tables
from vllm_adafuse.serving.meter import Meter
from vllm_adafuse.serving.metrics import AdapterCollector
from vllm_adafuse.serving.pool import Size

VOCABULARY = 50


def mixture(experts, top_k, past=False, seed=0, half_life=None):
    """Config and columns of a router."""
    draw = torch.Generator().manual_seed(seed)
    config = SimpleNamespace(
        num_experts=experts, top_k=top_k, router_context="mean" if past else "",
        context_half_life=half_life,
    )  # fmt: skip
    if past:
        w, c = torch.randn(2, experts, VOCABULARY, generator=draw)
        return config, (w.view(torch.int32), c)
    order = torch.rand(VOCABULARY, experts, generator=draw).argsort(1)[:, :top_k]
    return config, (order.t().int(), torch.ones(top_k, VOCABULARY))


def expected(config, columns, ids):
    if config.router_context:
        w, c = (t.view(torch.float32).t()[ids] for t in columns)
        fading = fading_of(config.context_half_life)
        chosen, _ = choose_by_past(w, c, torch.ones(config.num_experts), config.top_k, False, fading)
    else:
        chosen = columns[0].t()[ids]
    return torch.bincount(chosen.flatten(), minlength=config.num_experts).tolist()


@pytest.fixture
def place(tmp_path):
    return tmp_path / "engines" / "0"


@pytest.mark.parametrize("past, half_life", [(False, None), (True, None), (True, 2.5), (True, 1e-5)])
@pytest.mark.parametrize("experts,top_k", [(2, 1), (5, 2), (3, 3), (300, 2)])
def test_counts_are_those_of_the_routes(place, monkeypatch, experts, top_k, past, half_life):
    monkeypatch.setattr(expert_tables, "STRETCH", 20)
    config, columns = mixture(experts, top_k, past, half_life=half_life)
    Tables(place).leave("a", config, columns)
    ids = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    found = Experts().count([place.parent], "a", ids).tolist()
    assert found == expected(config, columns, ids) and sum(found) == 40 * top_k
    beyond = Experts().count([place.parent], "a", [VOCABULARY + 7]).tolist()
    assert beyond == expected(config, columns, [VOCABULARY - 1])  # as kernels clamp it
    parts = ids[:3], ids[3:24], ids[24:25], ids[25:]  # each request has a past of its own
    sums = np.sum([expected(config, columns, one) for one in parts], axis=0)
    assert Experts().count([place.parent], "a", *parts).tolist() == sums.tolist()


def test_what_has_no_table_is_not_counted(place):
    config, columns = mixture(2, 1)
    for content, *rest in (("", config, columns), ("lora", None, None), ("inside", config, None)):
        Tables(place).leave(content, *rest)
    assert not place.exists() and Experts().count([place.parent], "lora", [1]) is None
    Tables(None).leave("a", config, columns)  # another rank


def test_a_table_may_be_replaced_and_go(place):
    (config, one), (_, other) = mixture(4, 1), mixture(4, 1, seed=2)
    tables, experts, ids = Tables(place), Experts(), list(range(VOCABULARY))
    tables.leave("a", config, one)
    assert experts.count([place.parent], "a", ids).tolist() == expected(config, one, ids)
    tables.leave("a", config, other)  # the backbone's weights are others
    now = expected(config, other, ids)
    assert experts.count([place.parent], "a", ids).tolist() == now != expected(config, one, ids)
    next(place.glob("a.*")).unlink()
    assert experts.count([place.parent], "a", ids).tolist() == now
    assert Experts().count([place.parent], "a", ids) is None
    Tables(place.with_name("1")).leave("a", config, one)
    assert experts.count([place.parent], "a", ids).tolist() == expected(config, one, ids)


def test_tables_of_adapters_that_went_stay_for_a_while(place, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(expert_tables.time, "monotonic", lambda: now[0])
    config, columns = mixture(4, 1)
    tables = Tables(place)
    for number in range(KEPT + 2):
        tables.leave(f"{number}", config, columns)
        tables.forget(f"{number}")
    assert len(list(place.iterdir())) == KEPT + 2  # requests of all may wait to be counted
    now[0] += LINGERS
    tables.forget("0")
    assert len(list(place.iterdir())) == KEPT and not list(place.glob("1.*"))
    tables.leave("2", config, columns)  # is back
    for number in range(KEPT):
        tables.forget(f"again{number}")
    assert [file.name for file in place.iterdir()] == ["2.4.1.0.0.npy"]


def test_few_tables_are_mapped(place):
    config, columns = mixture(4, 1)
    tables, experts = Tables(place), Experts()
    for number in range(MAPPED + 3):
        tables.leave(f"{number}", config, columns)
        assert experts.count([place.parent], f"{number}", [1]) is not None
    assert len(experts._mapped) == MAPPED and "0" not in experts._mapped


def engine_config(index=0, section=None):
    return SimpleNamespace(
        instance_id=f"abc_dp{index}",
        parallel_config=SimpleNamespace(rank=0, data_parallel_rank=0),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(adafuse=section)),
    )


def request(adapter, name, digit, columns):
    path = stamp_path("/p", digit * 64, Size(4, columns))
    return SimpleNamespace(lora_int_id=adapter, lora_name=name, lora_path=path)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(scratch, "SECONDS", 600)  # a test says when it is counted


def told(name, experts):
    return [metrics.experts_counter().labels(name, str(e))._value.get() for e in range(experts)]


def test_nobody_waits_for_the_table_of_an_adapter_that_has_none(temporary):
    worker = Meter(engine_config(), 8)
    worker._writer.submit(time.sleep, 0.5)
    lora = SimpleNamespace(config=None, passports=None)
    assert worker.leave_table("e" * 64, lora).done()


def test_requests_count_for_experts_of_their_adapter(temporary):
    config, columns = mixture(3, 2)
    vllm_config = engine_config(section={"adapter": "/x/everybodys", "content": "9" * 64})
    worker, collector = Meter(vllm_config, 8), AdapterCollector()
    collector.follow(vllm_config)
    hosted = SimpleNamespace(kind="mixture", size=Size(4, 2), config=config, passports=columns)
    for adapter, name in ((1, "u-one"), (2, "u-two")):  # of one content
        worker.begin(adapter)
        worker.leave_table("e" * 64, hosted).result()
        worker.loaded(request(adapter, name, "e", 2), hosted)
    collector.count_experts(request(1, "u-one", "e", 2), [4])
    collector.flush()
    shown = {tuple(labels) for labels in metrics.experts_counter()._metrics}  # the idle one, too
    assert {("u-one", expert) for expert in "012"} <= shown
    collector.count_experts(request(1, "u-one", "e", 2), [5], [6])
    collector.count_experts(request(1, "u-one", "e", 2), [7])
    collector.flush()
    assert told("u-one", 3) == expected(config, columns, [4, 5, 6, 7])
    collector.count_experts(request(3, "u-lora", "e", 0), [4])
    collector.count_experts(request(2, "u-two", "e", 2), [])
    collector.flush()
    assert told("u-lora", 3) == told("u-two", 3) == [0, 0, 0]
    worker.tables.leave("9" * 64, config, columns)
    collector.count_experts(None, [8])
    collector.flush()
    assert told("everybodys", 3) == expected(config, columns, [8])
    worker.forgot(1)
    worker.leave_table("", hosted).result()  # behind all that was to be written
    assert list(worker.tables._gone) == []
    worker.forgot(2)
    worker.leave_table("", hosted).result()
    assert list(worker.tables._gone) == ["e" * 64]


def test_many_tokens_are_counted_beside_the_event_loop(temporary, monkeypatch):
    monkeypatch.setattr(metrics, "AT_ONCE", 2 * 40)
    config, columns = mixture(3, 2)
    worker, collector, where = Meter(engine_config(), 8), AdapterCollector(), []
    collector.follow(engine_config())
    hosted = SimpleNamespace(kind="mixture", size=Size(4, 2), config=config, passports=columns)
    worker.leave_table("e" * 64, hosted).result()
    count = collector.experts.count
    collector.experts.count = lambda *arguments: where.append(current_thread()) or count(*arguments)
    few, many = list(range(40)), list(range(41))
    collector.count_experts(request(1, "u-few", "e", 2), few)
    collector.flush()
    collector.count_experts(request(1, "u-many", "e", 2), many)
    collector._beside.submit(int).result()
    assert where[0] is current_thread() is not where[1]
    assert told("u-few", 3) == expected(config, columns, few)
    assert told("u-many", 3) == expected(config, columns, many)


@pytest.fixture
def served(temporary, monkeypatch):
    """The collector of an engine that has three mixtures, and what each is; the last sees the past."""
    worker, collector = Meter(engine_config(), 8), AdapterCollector()
    monkeypatch.setattr(metrics, "COLLECTOR", collector)
    collector.follow(engine_config())
    mixtures = [mixture(3, 2), mixture(4, 1, seed=1), mixture(3, 1, past=True, half_life=4.0)]
    for digit, (config, columns) in zip("abc", mixtures):
        hosted = SimpleNamespace(kind="mixture", size=Size(4, 2), config=config, passports=columns)
        worker.leave_table(digit * 64, hosted).result()
    return collector, mixtures


def test_what_ended_is_counted_together_when_somebody_asks(served):
    collector, mixtures = served
    asked, count = [], collector.experts.count
    collector.experts.count = lambda *args: asked.append((args[1][0], len(args) - 2)) or count(*args)
    draw = torch.Generator().manual_seed(3)
    ended = [(i % 3, torch.randint(0, VOCABULARY, (5 + i,), generator=draw).tolist()) for i in range(12)]
    for which, ids in ended:
        name = f"batch-{which}"
        collector.count(name, 4, len(ids) - 4, "stop" if which else "length")
        collector.count_experts(request(which, name, "abc"[which], 2), ids[:4], ids[4:])
    assert not asked and told("batch-0", 3) == [0, 0, 0]

    def shown(counter):
        return {tuple(s.labels.values()): s.value for s in next(iter(counter().collect())).samples
                if s.name.endswith("_total") and s.labels["adapter"].startswith("batch-")}  # fmt: skip

    tokens = shown(metrics.tokens_counter)  # all three are counted by what asks one of them
    assert asked == [("a", 4), ("b", 4), ("c", 4)]
    for which, (config, columns) in enumerate(mixtures):
        own, name = [ids for one, ids in ended if one == which], f"batch-{which}"
        assert tokens[name, "prompt"] == 16 and tokens[name, "generation"] == sum(map(len, own)) - 16
        sums = np.sum([expected(config, columns, ids) for ids in own], axis=0)
        assert told(name, config.num_experts) == sums.tolist()
    before = shown(metrics.requests_counter), shown(metrics.experts_counter)
    assert before[0] == {("batch-0", "length"): 4, ("batch-1", "stop"): 4, ("batch-2", "stop"): 4}
    collector.flush()
    assert (shown(metrics.requests_counter), shown(metrics.experts_counter)) == before and len(asked) == 3


@pytest.mark.parametrize("counter", ["requests_counter", "experts_counter"])
def test_each_counter_tells_of_all_that_ended(served, counter):
    collector, name = served[0], f"each-{counter}"
    collector.count(name, 1, 1, "stop")
    collector.count_experts(request(1, name, "b", 2), [1])
    (metric,) = getattr(metrics, counter)().collect()
    values = [s.value for s in metric.samples if s.labels["adapter"] == name and s.name.endswith("_total")]
    assert sum(values) == 1


def until(true):
    """Waits for another thread."""
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_many_tokens_do_not_wait(served, monkeypatch):
    monkeypatch.setattr(metrics, "MANY", 2 * 100)
    collector, where = served[0], []
    flush = collector.flush
    collector.flush = lambda: (where.append(current_thread().name), flush())
    for _ in range(10):
        collector.count_experts(request(1, "u-burst", "b", 2), range(10))
    assert not collector._soon._hurry.is_set() and len(collector._tokens) == 10
    collector.count_experts(request(1, "u-burst", "b", 2), [1])
    until(lambda: not collector._tokens and sum(told("u-burst", 4)) == 101)
    assert where == ["adafuse-ended"] and collector._waiting == 0


def test_what_nobody_asks_for_is_counted_soon(served, monkeypatch):
    said, errors, calls = [], [ValueError("odd")], []
    monkeypatch.setattr(scratch, "SECONDS", 0.05)
    monkeypatch.setattr(scratch.logger, "error", lambda text, *args: said.append(text % args))
    collector, flush = served[0], served[0].flush

    def fails_once():
        calls.append(current_thread())
        if errors:
            raise errors.pop()
        flush()

    collector.flush = fails_once
    collector.count("u-soon", 5, 2, "stop")
    until(lambda: said)
    assert said == ["AdaFuse: /metrics may lack requests that ended: ValueError('odd')"]
    collector.count("u-soon", 5, 2, "stop")
    until(lambda: metrics.requests_counter().labels("u-soon", "stop")._value.get() == 2)
    time.sleep(0.3)  # has nothing to do
    assert calls == [collector._soon._thread] * 2


def test_no_request_fails_for_what_cannot_be_counted(served, monkeypatch):
    collector, said = served[0], []
    for logger in (metrics.logger, scratch.logger):
        monkeypatch.setattr(logger, "warning", lambda text, *args: said.append(text % args))
        monkeypatch.setattr(logger, "error", lambda text, *args: said.append(text % args))

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(scratch.Thread, "start", start)
    collector.count("u-odd", 5, 2, "stop")
    assert len(said) == 1 and "requests that ended: RuntimeError" in said[0]
    collector.count_experts(request(1, "u-odd", "b", 2), [1, "two"])
    assert len(said) == 2 and "experts of u-odd" in said[1]
    collector.count_experts(request(1, "u-odd", "b", 2), [1])
    collector.flush()
    assert sum(told("u-odd", 4)) == 1 and len(said) == 2
    assert metrics.requests_counter().labels("u-odd", "stop")._value.get() == 1


def test_what_ended_last_is_counted_when_the_process_ends(temporary, tmp_path, monkeypatch):
    """As an API server, a process of multiprocessing; in others before the tables are taken away."""
    calls, collector = [], AdapterCollector()
    monkeypatch.setattr(metrics.atexit, "register", lambda call, *args, **kwargs: calls.append(call))

    def serve():
        collector.flush = lambda: (tmp_path / "counted").touch()
        collector.follow(engine_config())

    child = get_context("fork").Process(target=serve)
    child.start()
    child.join(60)
    assert child.exitcode == 0 and (tmp_path / "counted").exists()
    collector.follow(engine_config())
    assert calls == [shutil.rmtree, collector.flush]  # the last first


def test_a_table_that_cannot_be_made_is_told_of(temporary, monkeypatch):
    worker, said = Meter(engine_config(), 8), []
    monkeypatch.setattr(scratch.logger, "error", lambda text, *args: said.append(text % args))
    hosted = SimpleNamespace(config=mixture(3, 2)[0], passports=("no tensor",))
    assert worker.leave_table("e" * 64, hosted).exception() is not None
    worker.leave_table("", hosted).result()  # behind the other's callback
    assert len(said) == 1 and "experts of an adapter" in said[0]


def test_a_damaged_table_is_told_of(temporary, monkeypatch):
    vllm_config, collector, said = engine_config(), AdapterCollector(), []
    monkeypatch.setattr(metrics.logger, "warning", lambda text, *args: said.append(text % args))
    collector.follow(vllm_config)
    folder = scratch.place_of(vllm_config)
    folder.mkdir(parents=True)
    (folder / f"{'e' * 64}.3.2.npy").write_bytes(b"no array")
    collector.count_experts(request(1, "u-bad", "e", 2), [1])
    collector.flush()
    assert len(said) == 1 and "experts of u-bad" in said[0]


def test_a_worker_without_room_says_so_once(place, monkeypatch):
    said = []
    monkeypatch.setattr(scratch.logger, "warning", lambda text, *args: said.append(text % args))
    place.parent.parent.mkdir(exist_ok=True)
    place.parent.write_text("a file")
    tables = Tables(place)
    for _ in range(2):
        tables.leave("a", *mixture(2, 1))
    assert len(said) == 1 and "the experts'" in said[0] and "set TMPDIR" in said[0]


def test_a_full_disk_is_left_and_no_old_table_with_it(place, monkeypatch):
    tables = Tables(place)
    tables.leave("a", *mixture(2, 1))
    assert Experts().count([place.parent], "a", [0]) is not None

    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", write)
    tables.leave("a", *mixture(2, 1, seed=1))
    assert not place.exists() and Experts().count([place.parent], "a", [0]) is None


def test_a_process_takes_its_files_away(temporary, tmp_path):
    """Workers are processes of multiprocessing; one engine's others stay."""
    other = Meter(engine_config(index=1), 8)

    def work():
        worker = Meter(engine_config(), 8)
        worker.tables.leave("a", *mixture(2, 1))
        (tmp_path / "seen").write_text(str(worker.file.exists() and list(worker.tables.place.iterdir())))

    child = get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0 and "a.2.1.0.0.npy" in (tmp_path / "seen").read_text()
    folder = other.file.parent
    assert [file.name for file in folder.iterdir()] == ["1.json"]
    scratch._remove(other.file.with_suffix(""))
    assert not folder.exists()
