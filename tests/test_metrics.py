"""What `/metrics` says of adapters, without an engine; test_lora_server.py asks a real server. The
dashboard and the rules in deploy/ name no metric that is not there."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm_adafuse.patches import metrics as patch
from vllm_adafuse.serving import metrics, scratch
from vllm_adafuse.serving.adapters import stamp_path
from vllm_adafuse.serving.meter import Meter
from vllm_adafuse.serving.metrics import AdapterCollector, counts_refusals
from vllm_adafuse.serving.pool import Size

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


def engine(rank=0, index=0, section=None):
    return SimpleNamespace(
        instance_id=f"abc12_dp{index}",
        parallel_config=SimpleNamespace(rank=rank, data_parallel_rank=0),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(adafuse=section)),
    )


def request(adapter, name, content):
    path = stamp_path("/p", content * 64, Size(4, 2))
    return SimpleNamespace(lora_int_id=adapter, lora_name=name, lora_path=path)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path))


def shown(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def test_what_a_worker_counts_is_what_a_scrape_says():
    config = engine()
    one, two = Meter(config, 8), Meter(engine(index=1), 4)
    collector = AdapterCollector()
    collector.follow(config)
    hosted = SimpleNamespace(kind="mixture", size=Size(4, 2), config=None, passports=None)
    one.begin(7), one.begin(8)
    one.loaded(request(7, 'a"b\n', "e"), hosted)
    one.moved(4, 1)
    one.failed(8)
    one.moved(3, 1, 2)
    text = shown(collector)
    (info,) = [f for f in text_string_to_metric_families(text) if f.name == metrics.INFO]
    named = {"adapter": 'a"b\n', "content": "e" * 64, "engine": "0", "kind": "mixture"}
    assert [(one.labels, one.value) for one in info.samples] == [(named, 1.0)]
    for line in (
        'adafuse_pool_pages{engine="0"} 8.0', 'adafuse_pool_pages_used{engine="0"} 3.0',
        'adafuse_pool_pages{engine="1"} 4.0', 'adafuse_adapter_load_failures_total{engine="0"} 1.0',
        'adafuse_adapter_uploads_total{engine="0"} 2.0',
        'adafuse_adapter_evictions_total{engine="0"} 2.0',
        'adafuse_adapter_load_seconds_count{engine="0"} 1.0',
    ):  # fmt: skip
        assert f"\n{line}\n" in text
    assert float(re.search(r'load_seconds_sum\{engine="0"\} (\S+)', text)[1]) > 0
    one.forgot(7)
    assert "adafuse_adapter_info{" not in shown(collector)
    assert one.file.name == "0.json" and two.file.parent == one.file.parent
    assert two.file.parent.stat().st_mode & 0o777 == 0o700


def test_a_load_that_was_given_up_is_not_waited_for(monkeypatch):
    now = iter([1.0, 50.0, 50.5])
    meter = Meter(engine(), 8)
    monkeypatch.setattr("vllm_adafuse.serving.meter.time.monotonic", lambda: next(now))
    hosted = SimpleNamespace(kind="lora", size=Size(1), config=None, passports=None)
    meter.begin(7)
    meter.forgot(7)
    meter.begin(7)
    meter.loaded(request(7, "a", "e"), hosted)
    assert meter.counts.load_seconds == 0.5


def test_other_ranks_write_nothing_and_a_worker_without_room_serves_on(tmp_path, monkeypatch):
    assert Meter(engine(rank=1), 8).file is None and not list(tmp_path.iterdir())
    said = []
    monkeypatch.setattr(scratch.logger, "warning", lambda text, *args: said.append(text % args))
    (tmp_path / "file").touch()
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    blind = Meter(engine(), 8)
    blind.moved(3)
    assert len(said) == 1 and "set TMPDIR" in said[0] and blind.counts.pages_used == 3


def test_a_folder_of_another_user_is_not_written(monkeypatch):
    Meter(engine(), 8)
    folder = scratch.directory_of(engine())
    monkeypatch.setattr(scratch, "directory_of", lambda config: folder)
    monkeypatch.setattr(scratch.os, "getuid", lambda: 12345)
    assert Meter(engine(), 8).file is None


def test_a_torn_file_is_left_out_and_the_rest_is_said():
    config = engine()
    good = Meter(config, 8)
    good.file.with_name("9.json").write_text("{")
    collector = AdapterCollector()
    collector.follow(config)
    text = shown(collector)
    assert 'adafuse_pool_pages{engine="0"} 8.0' in text and 'engine="9"' not in text


def test_requests_count_for_their_adapter_and_else_for_the_pinned_one():
    def value(name, *labels):
        return getattr(metrics, name)().labels(*labels)._value.get()

    bare, pinned = AdapterCollector(), AdapterCollector()
    section = {"adapter": "/x/mine", "content": "f" * 64}
    pinned.follow(engine(section=section))
    bare.follow(engine())
    assert f'content="{"f" * 64}",engine="",kind="pinned"' in shown(pinned)
    others = value("tokens_counter", "", "prompt")  # of engines in this process
    bare.count("unit-a", 5, 3, "stop")
    bare.count(None, 2, 1, "length")
    pinned.count(None, 7, 4, "stop")
    pinned.count("unit-a", 1, 1, "stop")
    bare.flush(), pinned.flush()
    assert value("tokens_counter", "unit-a", "prompt") == 6
    assert value("tokens_counter", "unit-a", "generation") == 4
    assert value("requests_counter", "unit-a", "stop") == 2
    assert value("tokens_counter", "", "prompt") == others + 2
    assert value("tokens_counter", "mine", "generation") == 4


def test_an_engines_counters_are_there_before_a_scrape(monkeypatch):
    """One that is made while a registry is asked would lack in the answer."""
    made, names = [], ["tokens_counter", "experts_counter", "requests_counter"]
    for name in names:
        monkeypatch.setattr(metrics, name, lambda name=name: made.append(name))
    AdapterCollector().follow(engine())
    assert made == names


def test_vllms_statistics_of_an_ended_request_are_counted(monkeypatch):
    from vllm.v1.engine.output_processor import OutputProcessor

    patch.apply()
    counted = []
    monkeypatch.setattr(metrics.COLLECTOR, "count", lambda *args: counted.append(args))
    monkeypatch.setattr(metrics.COLLECTOR, "count_experts", lambda *args: counted.append(args))
    stats = SimpleNamespace(num_generation_tokens=3)
    answer = SimpleNamespace(output_token_ids=[7, 8, 9])
    state = SimpleNamespace(
        stats=stats, lora_name="a", lora_request="l", detokenizer=answer, prompt_token_ids=[1, 2, 3, 4, 5], prompt_embeds=None, prompt_len=5, external_req_id="r", request_id="r",
        max_tokens_param=1, num_cached_tokens=0, parent_req=None,
    )  # fmt: skip
    processor = SimpleNamespace(
        lora_states=SimpleNamespace(request_finished=lambda request_id, name: None)
    )
    iteration = SimpleNamespace(
        update_from_finished_request=lambda **known: None, n_params_iter=[],
        max_num_generation_tokens_iter=[],
    )  # fmt: skip
    from vllm.v1.engine import FinishReason

    OutputProcessor._update_stats_from_finished(processor, state, FinishReason.STOP, iteration)
    OutputProcessor._update_stats_from_finished(processor, state, FinishReason.STOP, None)
    assert counted == [("a", 5, 3, "stop"), ("l", [1, 2, 3, 4, 5], [7, 8, 9])]
    state.prompt_embeds = object()  # beside ids
    OutputProcessor._update_stats_from_finished(processor, state, FinishReason.STOP, iteration)
    state.prompt_token_ids = None
    OutputProcessor._update_stats_from_finished(processor, state, FinishReason.STOP, iteration)
    assert counted[2:] == [("a", 5, 3, "stop")] * 2


def test_the_registry_of_metrics_has_ours_once(monkeypatch):
    import vllm.v1.metrics.prometheus as seam

    patch.apply()
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    registry = seam.get_prometheus_registry()
    assert registry is seam.get_prometheus_registry()
    assert list(registry._collector_to_names).count(metrics.COLLECTOR) == 1


def test_a_seam_that_moved_is_told_of(monkeypatch):
    said = []
    import vllm.logger

    fake = SimpleNamespace(warning=lambda text, *args: said.append(text % args))
    monkeypatch.setattr(vllm.logger, "init_logger", lambda name: fake)
    patch._wrap(SimpleNamespace(__name__="x"), "gone", "tokens", lambda original: original)
    assert said == ["AdaFuse: vLLM's x has no gone, so /metrics lacks tokens"]


def test_refusals_are_counted_by_their_kind():
    class Odd(ValueError):
        pass

    @counts_refusals
    def refuse():
        raise Odd

    with pytest.raises(Odd):
        counts_refusals(refuse)()
    assert metrics.refusals_counter().labels("Odd")._value.get() == 1


def known_metrics():
    """Names of samples of ours."""
    names = {metrics.INFO, *(name for name, _ in metrics.GAUGES.values())}
    names |= {f"{name}_total" for name, _ in metrics.COUNTERS.values()}
    names |= {f"adafuse_adapter_load_seconds_{end}" for end in ("sum", "count")}
    counters = [getattr(metrics, f"{what}s_counter") for what in ("token", "request", "refusal", "expert")]
    return names | {f"{counter()._name}_total" for counter in counters}


def asked(expression):
    return set(re.findall(r"\badafuse_\w+", expression))


def test_the_dashboard_asks_for_what_there_is():
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text("utf-8"))
    targets = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
    used = set().union(*map(asked, targets))
    assert used and used <= known_metrics()
    assert known_metrics() - used <= {"adafuse_adapter_load_seconds_count"}
    spots = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(spots)) == len(spots) and len({p["id"] for p in board["panels"]}) == len(spots)
    assert all(expr.count("(") == expr.count(")") for expr in targets)


def test_the_rules_ask_for_what_there_is():
    rules = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text("utf-8"))
    listed = [rule for group in rules["groups"] for rule in group["rules"]]
    assert listed and all({"alert", "expr", "for", "labels", "annotations"} <= rule.keys() for rule in listed)
    used = set().union(*(asked(rule["expr"]) for rule in listed))
    assert used and used <= known_metrics()
    assert all(rule["expr"].count("(") == rule["expr"].count(")") for rule in listed)
