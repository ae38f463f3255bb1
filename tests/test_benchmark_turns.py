"""What benchmarks send, how engines take turns, and what is said of issue 23's figures."""

import random
from types import SimpleNamespace

import benchmark_package  # noqa: F401
import numpy as np
import pytest

from benchmarks import bars, prompts, turns
from benchmarks.engine_options import Options, longest, sizes, too_large
from benchmarks.prompts import Ids, everyday, read_ids

TEXT = np.arange(1 << 14, dtype=np.uint32) % 900


class FakeLLM:
    """An engine that notes what it is sent and takes `step` seconds per token of its longest output.

    A clock stands still but for it.
    """

    now = 0.0

    def __init__(self, step):
        self.step, self.sent, self.asleep = step, [], False
        self.model_runner = SimpleNamespace(execute_model=self.execute, sample_tokens=lambda: 7)
        self.host = 0.25

    def execute(self):
        FakeLLM.now += self.host

    def collective_rpc(self, function):
        return [function(self)]

    def sleep(self, level):
        self.asleep = True

    def enqueue(self, prompts, params, lora_request, use_tqdm):
        assert self.asleep
        self.sent.append((prompts, params, lora_request))

    def wake_up(self, tags):
        self.asleep = False

    def wait_for_completion(self, use_tqdm):
        _, params, _ = self.sent[-1]
        for _ in range(max(p.max_tokens for p in params)):
            self.model_runner.execute_model()
            self.model_runner.sample_tokens()
            FakeLLM.now += self.step - self.host


@pytest.fixture
def clock(monkeypatch):
    FakeLLM.now = 0.0
    monkeypatch.setattr(turns.time, "perf_counter", lambda: FakeLLM.now)
    monkeypatch.setattr(turns.time, "thread_time", lambda: FakeLLM.now)


def rows_of(options, **engines):
    return list(turns.take_turns(options, {k: turns.Engine(v) for k, v in engines.items()}))


def test_turns_are_timed_over_the_first_and_so_is_the_hosts_share(clock, capsys):
    stock, ours = FakeLLM(1.0), FakeLLM(1.5)
    ours.host = 0.5
    options = Options(model="tiny", batches=[3], prefill=[(2, 30)], mixed=5, steps=(4, 12), repeats=2)
    rows = rows_of(options, stock=stock, ours=ours)
    assert [(r["engine"], r["what"], r["batch"], r["length"]) for r in rows] == [
        ("stock", "decode", 3, 128), ("ours", "decode", 3, 128), ("stock", "prefill", 2, 30),
        ("ours", "prefill", 2, 30), ("stock", "mixed", 5, 0), ("ours", "mixed", 5, 0),
    ]  # fmt: skip
    outputs = max(tokens for _, tokens in everyday(5))
    for row, ms in zip(rows, (1000, 1500, 1000, 1500, 1000 * outputs, 1500 * outputs)):
        assert row["median"] == pytest.approx(ms) and row["ids"] == "uniform"
        assert len(row["all"]) == 2
        ratio = 1.0 if row["engine"] == "stock" else 1.5
        assert row["overhead"] == pytest.approx(ratio - 1)
        assert row["host_ms"] == pytest.approx(250.0 if ratio == 1 else 500.0)
        assert row["host_overhead"] == pytest.approx(0.0 if ratio == 1 else 1.0)
    assert "5 mixed requests" in capsys.readouterr().out
    # A warm-up and two turns, of a short and a long generation, and of three prefills each.
    assert len(stock.sent) == 3 * 2 + 3 * turns.PREFILLS + 3


def test_adapters_that_took_turns_in_the_pool_are_back_before_a_turn_is_timed(clock):
    class Small(FakeLLM):
        here = None

        def wait_for_completion(self, use_tqdm):
            lora = self.sent[-1][2]
            FakeLLM.now += 2.0 * (lora is not None and lora != self.here)
            self.here = lora if lora is not None else self.here
            super().wait_for_completion(use_tqdm)

    llm = Small(1.0)
    options = Options(model="tiny", batches=[3], prefill=[], steps=(1, 5), repeats=2)
    rows = turns.take_turns(options, {name: turns.Engine(llm, name) for name in ("one", "other")})
    assert [row["all"] for row in rows] == [[1000.0, 1000.0]] * 2


def test_engines_are_timed_at_the_sizes_that_they_are_asked_for(clock):
    options = Options(model="tiny", batches=[1, 4], prefill=[(4, 8)], steps=(1, 2), repeats=1)
    engines = {"stock": turns.Engine(FakeLLM(1.0)), "two": turns.Engine(FakeLLM(1.0))}
    asked = lambda kind, size: kind == "stock" or size[1] >= 2  # noqa: E731
    rows = turns.take_turns(options, engines, asked)
    assert [(row["engine"], row["batch"]) for row in rows] == [
        ("stock", 1), ("stock", 4), ("two", 4), ("stock", 4), ("two", 4),
    ]  # fmt: skip


def test_requests_of_text_are_stretches_of_it_and_say_its_tokens(clock, tmp_path):
    np.save(tmp_path / "text.npy", TEXT)
    options = Options(
        model="tiny", batches=[40], prefill=[(1, 8)], steps=(1, 2), repeats=1,
        ids=["uniform", "text"], text_ids=str(tmp_path / "text.npy"),
    )  # fmt: skip
    llm = FakeLLM(1.0)
    assert [row["ids"] for row in rows_of(options, stock=llm)] == ["uniform", "text"] * 2
    (uniform, params, _), (text, spoken, _) = llm.sent[0], llm.sent[4]
    assert all(p.allowed_token_ids is None for p in params)
    assert len({p.allowed_token_ids[0] for p in spoken}) > 20
    for prompt in text:
        ids = prompt["prompt_token_ids"]
        assert all((b - a) % 900 == 1 for a, b in zip(ids, ids[1:])) and len(ids) == 128
    assert len({i for prompt in uniform for i in prompt["prompt_token_ids"]}) > 900


def test_ids_keep_off_what_the_vocabulary_ends_with(clock):
    llm = FakeLLM(1.0)
    engine = turns.Engine(llm, control=[998, 999])
    for ids in (Ids(1000, random.Random(0)), Ids(1000, random.Random(0), TEXT + 100)):
        turns.timed(engine, [(500, 1)] * 3, ids)
        for i, prompt in enumerate(llm.sent[-1][0]):
            first, *rest = prompt["prompt_token_ids"]
            assert first == 998 + i % 2 and max(rest) <= 997
    with pytest.raises(ValueError, match="has id 899, the model's vocabulary 500 ids"):
        Ids(500, random.Random(0), TEXT)


def test_everyday_requests_are_the_same_each_time_and_differ():
    requests = everyday(400)
    assert requests == everyday(400)
    lengths, outputs = map(sorted, zip(*requests))
    assert 100 < lengths[200] < 150 and 70 < outputs[200] < 95
    assert lengths[0] >= 8 and lengths[-1] <= 1500 and outputs[0] >= 4 and outputs[-1] <= 256
    options = {"batches": [1], "prompt": 8, "prefill": [(1, 8)], "steps": (1, 2), "mixed": 400}
    assert sizes(options)[-1] == ("mixed", 400, 0) and longest(options) == 1500 + 256 + 8
    assert longest(options | {"mixed": 0}) == 18
    shape = {"model": "llama-3-8b", "layers": None, "dtype": "bfloat16", "cache": 13.0}
    assert list(too_large(options | shape)) == [("mixed", 400, 0)]
    assert not too_large(options | shape | {"tp": 2})


@pytest.mark.parametrize(
    "content,said",
    [
        (None, "No such file"), (b"x", "benchmarks.prompts writes one"),
        (np.zeros((1 << 14, 2), int), r"int64 \[16384, 2\], expected at least 16384 integers"),
        (np.zeros(1 << 14), r"float64 \[16384\], expected at least 16384 integers"),
        (np.zeros(9, int), r"int64 \[9\], expected at least 16384 integers"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_text_is_refused(tmp_path, content, said):
    path = tmp_path / "ids.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=said) as e:
        read_ids(path)
    assert f"--text-ids {path}" in str(e.value)


@pytest.mark.parametrize(
    "changed,said",
    [
        ({"ids": ["uniform", "zipf"]}, "ids has zipf, expected uniform, text or both"),
        ({"ids": []}, "ids has nothing, expected"),
        ({"ids": ["text"]}, "name the file with --text-ids"),
    ],
)
def test_ids_that_are_not_to_be_had(changed, said):
    with pytest.raises(ValueError, match=said):
        Options(**changed)


def test_a_tokenizer_of_the_wanted_vocabulary_makes_ids(tmp_path):
    draw = random.Random(0)
    for i in range(400):
        words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(200)]
        for suffix in ("py", "rst", "h", "html", "json"):
            (tmp_path / f"{i}.{suffix}").write_text("\n".join([suffix, *words]))
    ids = prompts.ids_of_text(600, [tmp_path], 0.5)
    assert ids.dtype == np.uint32 and ids.max() < 600 and len(np.unique(ids)) > 250
    with pytest.raises(ValueError, match="tokens for a vocabulary of 900000; name more --roots"):
        prompts.ids_of_text(900_000, [tmp_path], 0.5)


FULL = bars.FULL[8, 16, 2]


def run_of(overheads, **options):
    rows = [{"options": vars(Options(model="qwen3-8b", engines=["stock", "adafuse:8/16/2"], **options))}]
    for (what, batch, length), over in zip(bars.COLUMNS, overheads):
        row = {"engine": "adafuse:8/16/2", "what": what, "batch": batch, "overhead": over / 100}
        rows.append(row | {"length": length or 128, "ids": "uniform", "host_overhead": 0.04})
    return rows


def test_a_row_is_met_with_nine_of_eleven_cells_and_none_far_off():
    for missed, told in (
        ({}, "row met: 11 of 11 cells met"),
        ({0: 3.0, 10: 0.1}, "row met: 9 of 11 cells met, the furthest missed by 3.0"),
        ({0: 0.1, 1: 0.1, 10: 0.1}, "row MISSED: 8 of 11 cells met, the furthest missed by 0.1"),
        ({4: 3.1}, "row MISSED: 10 of 11 cells met, the furthest missed by 3.1"),
    ):
        found = [bar + missed.get(i, 0) for i, bar in enumerate(FULL)]
        title, head, at, cells, off, host = bars.lines(run_of(found))
        assert title == f"qwen3-8b, adafuse:8/16/2, uniform ids: {told}"
        assert len(off.split("met")) - 1 == 11 - len(missed)
        assert host.split()[3:] == ["+4.0"] * 11 or host.count("+4.0") == 11
    assert head.split() == " ".join(bars.HEADS).split() and at.count("≤") == 11
    assert "by 3.1" in off and f"{FULL[0]:+.1f}" in cells


def test_cells_that_were_not_measured_are_told_of():
    printed = bars.lines(run_of(FULL[:4]))
    assert printed[0].endswith(": 4 of 4 cells met; 7 cells not measured")
    assert printed[3].count("–") == 7
    old = run_of(FULL)
    for row in old[1:]:
        del row["ids"]  # as files have none whose engines captured the measured sizes
    assert bars.lines(old) == []


def test_rows_that_the_issue_has_not_are_left_out():
    for options in ({"layers": 8}, {"tp": 2}, {"quantization": "fp8"}, {"dtype": "float16"}):
        assert bars.lines(run_of(FULL, **options)) == []
    large = Options(model="llama-3-70b", layers=20, tp=2)
    assert bars.bars_of(large, "adafuse") == bars.SHARDED
    assert bars.bars_of(large, "adafuse:64/16/2") is None
    assert bars.bars_of(large, "layer_wise") is None and bars.bars_of(large, "stock") is None
    assert {len(bars.COLUMNS), len(bars.HEADS)} == {len(row) for row in [*bars.FULL.values(), bars.SHARDED]}
