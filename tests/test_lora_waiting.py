"""Which waiting requests a step may take in, by what their adapters need of the pool."""

import random
from types import SimpleNamespace

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm_adafuse.serving.adapters import size_in_path, split_path, stamp_path
from vllm_adafuse.serving.pool import Size
from vllm_adafuse.serving.waiting import PATIENCE_S, Waiting, put_back, take_out


class Request(SimpleNamespace):
    __hash__ = object.__hash__


def request(name, adapter=None, pages=0, columns=0):
    lora = None
    if adapter is not None:
        path = stamp_path("/x", "0" * 64, Size(pages, columns))
        lora = LoRARequest(str(adapter), adapter, path)
    return Request(request_id=name, lora_request=lora)


def names(requests):
    return [r.request_id for r in requests]


def test_the_size_travels_in_the_path():
    path = stamp_path("/a b#sha256=", "f" * 64, Size(7, 2))
    assert size_in_path(path) == Size(7, 2) and split_path(path) == ("/a b#sha256=", "f" * 64)
    assert size_in_path("/a") == Size(0) and split_path("/a") == ("/a", None)


def test_what_has_no_room_waits_and_others_pass():
    waiting = Waiting(max_loras=4, max_lora_rank=16)  # 4 pages, 16 columns
    running = [request("r1", 1, 3), request("r2", 1, 3), request("r3")]
    queue = [request("a", 2, 2), request("b", 1, 3), request("c"), request("d", 3, 1)]
    assert names(waiting.hold_back(running, queue)) == ["a"]
    assert names(waiting.hold_back(running, [*queue, request("e", 4, 1)])) == ["a", "e"]
    assert names(waiting.hold_back([], queue)) == ["b"]  # a and d are first
    assert names(waiting.hold_back([], [request("huge", 9, 5)])) == []  # alone, whatever it says


def test_columns_and_the_count_of_adapters():
    waiting = Waiting(max_loras=2, max_lora_rank=64)  # 8 pages, 8 columns
    queue = [request("a", 1, 1, 5), request("b", 2, 1, 4), request("c", 3, 1), request("d", 4, 1)]
    assert names(waiting.hold_back([], queue)) == ["b", "d"]


def test_nobody_is_overtaken_for_ever():
    time = [0.0]
    waiting = Waiting(max_loras=4, max_lora_rank=16, now=lambda: time[0])
    running, queue = [request("r", 1, 3)], [request("big", 2, 4), request("s", 1, 3), request("t")]
    assert names(waiting.hold_back(running, queue)) == ["big"]
    time[0] = PATIENCE_S + 1
    assert names(waiting.hold_back(running, queue)) == ["big", "s"]
    assert names(waiting.hold_back([], queue)) == ["s"]
    time[0] += 1  # whoever came in and is back waits anew
    assert names(waiting.hold_back(running, queue[:1])) == ["big"]
    assert names(waiting.hold_back(running, queue)) == ["big"]


def test_queues_keep_their_order():
    draw = random.Random(0)
    for _ in range(50):
        queues = {}
        for queue in ("waiting", "skipped_waiting"):
            many = range(draw.randint(0, 6))
            requests = [request(f"{queue}{i}", draw.randint(1, 5), draw.randint(1, 4)) for i in many]
            queues[queue] = FCFSRequestQueue(requests)
        scheduler = SimpleNamespace(running=[request("r", 1, 3)], **queues)
        before = {name: list(queue) for name, queue in queues.items()}
        waiting = Waiting(max_loras=3, max_lora_rank=32)
        taken = take_out(scheduler, waiting)
        held = [r for _, requests in taken for r in requests]
        assert held == waiting.hold_back(scheduler.running, [r for q in before.values() for r in q])
        for name, queue in queues.items():
            assert list(queue) == [r for r in before[name] if r not in held]
        put_back(taken)
        assert {name: sorted(names(q)) for name, q in queues.items()} == {
            name: sorted(names(q)) for name, q in before.items()
        }
        for name, queue in queues.items():
            own = [r for r in before[name] if r in held]
            assert list(queue) == own + [r for r in before[name] if r not in own]


def test_a_scheduler_of_a_base_alone_is_left_alone():
    scheduler = SimpleNamespace(running=[request("r")], waiting=FCFSRequestQueue([request("a")]))
    assert take_out(scheduler, Waiting(1, 16)) == []
    assert take_out(SimpleNamespace(running=[], waiting=FCFSRequestQueue()), Waiting(1, 16)) == []
