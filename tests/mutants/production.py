"""Faults of what is deployed and seen; as catalogue.py."""

from __future__ import annotations

from mutants.mutant import Mutant

METRICS = "tests/test_metrics.py::test_"
PRODUCTION = "tests/test_production.py::test_"
MANIFEST = "deploy/kubernetes.yaml"
FITS = f"{PRODUCTION}the_manifests_fit_together"
IMAGE = f"{PRODUCTION}the_image_writes_where_the_manifest_lets_it"
TABLES = "tests/test_expert_tables.py::test_"

DEPLOY = [
    Mutant(
        "an image of another version", MANIFEST, "image: vllm-adafuse:", "image: vllm-adafuse:1", FITS,
        "the pod waits for an image that nobody built",
    ),
    Mutant(
        "a probe of no port", MANIFEST, "port: http}, periodSeconds: 20", "port: web}, periodSeconds: 20",
        FITS, "the manifest is refused",
    ),
    Mutant(
        "a probe of another page", MANIFEST, "/health, port: http}, periodSeconds: 5",
        "/ready, port: http}, periodSeconds: 5", FITS, "the server never gets a request",
    ),
    Mutant(
        "a service of nobody", MANIFEST, "selector: {app: adafuse}", "selector: {app: server}", FITS,
        "every request is refused a connection",
    ),
    Mutant(
        "a model that is not mounted", MANIFEST, "mountPath: /models,", "mountPath: /model,", FITS,
        "the server does not start",
    ),
    Mutant(
        "a volume of no name", MANIFEST, "{name: shm, mountPath", "{name: memory, mountPath", FITS,
        "the manifest is refused",
    ),
    Mutant(
        "adapters can be written", MANIFEST, "mountPath: /adapters, readOnly: true", "mountPath: /adapters",
        FITS, "who breaks into a server changes what all servers say",
    ),
    Mutant(
        "the root can be written", MANIFEST, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false",
        FITS, "who breaks into a server changes its programs",
    ),
    Mutant(
        "an option that there is not", MANIFEST, '{"backbone":"refuse"}', '{"backbones":"refuse"}', FITS,
        "the server does not start",
    ),
    Mutant(
        "Prometheus is kept out", MANIFEST, "app.kubernetes.io/name: prometheus", "app: prometheus", FITS,
        "the dashboard stays empty",
    ),
    Mutant(
        "metrics of another port", MANIFEST, 'prometheus.io/port: "8000"', 'prometheus.io/port: "80"', FITS,
        "the dashboard stays empty",
    ),
    Mutant(
        "a folder that cannot be written", "deploy/Dockerfile", "TMPDIR=/cache/tmp", "TMPDIR=/tmp", IMAGE,
        "with a read-only root the server does not start",
    ),
    Mutant(
        "another user", "deploy/Dockerfile", "USER 2000:2000", "USER 1000:1000", IMAGE,
        "the caches are another user's",
    ),
    Mutant(
        "an image that nobody tried", "deploy/Dockerfile", "RUN vllm-adafuse doctor", "RUN true", IMAGE,
        "an image whose vLLM does not see the plugin serves the bare backbone",
    ),
    Mutant(
        "a command with a wrong option", "docs/production.md", "models/base --served-model-name base",
        "models/base --serve-the-model-as base", f"{PRODUCTION}servers_get_options_that_there_are",
        "who copies the command gets an error",
    ),
    Mutant(
        "a command of no file", "docs/production.md", "check adapters/mix/2", "check adapters/mix/two",
        f"{PRODUCTION}our_own_commands_run", "who copies the command gets an error",
    ),
    Mutant(
        "a body that vLLM does not take", "docs/production.md",
        '"lora_name": "mix-next"}', '"name": "mix-next"}', f"{PRODUCTION}requests_are_those_of_the_api",
        "who copies the command gets an error",
    ),
    Mutant(
        "an alert on nothing", "deploy/prometheus-rules.yaml", "(adafuse_adapter_load_failures_total[",
        "(adafuse_adapter_load_failure_total[", f"{METRICS}the_rules_ask_for_what_there_is",
        "nobody hears of adapters that cannot be read",
    ),
    Mutant(
        "a panel of nothing", "deploy/grafana-dashboard.json", "(adafuse_expert_tokens_total{",
        "(adafuse_experts_tokens_total{", f"{METRICS}the_dashboard_asks_for_what_there_is",
        "a panel stays empty",
    ),
    Mutant(
        "a wait for no table", "vllm_adafuse/serving/meter.py",
        "if hosted.passports is None:", "if hosted is None:",
        f"{TABLES}nobody_waits_for_the_table_of_an_adapter_that_has_none",
        "who loads a LoRA is asked to come again",
    ),
    Mutant(
        "experts of the first tokens alone", "vllm_adafuse/serving/expert_tables.py",
        "chosen.ravel(), minlength=int", "chosen[:1].ravel(), minlength=int",
        f"{TABLES}counts_are_those_of_the_routes", "an expert that works looks idle",
    ),
    Mutant(
        "a past without its length", "vllm_adafuse/serving/expert_tables.py",
        "said / -counts[: len(ids), None]", "-said", f"{TABLES}counts_are_those_of_the_routes",
        "experts are counted that no token took",
    ),
    Mutant(
        "the first stretch of a table alone", "vllm_adafuse/serving/expert_tables.py",
        "t[i : i + STRETCH] for t in turned for i", "t[:STRETCH] for t in turned for i",
        f"{TABLES}counts_are_those_of_the_routes", "experts are counted that no token took",
    ),
    Mutant(
        "one past for all requests", "vllm_adafuse/serving/expert_tables.py",
        "for ids in requests:", "for ids in [np.concatenate(requests)]:",
        f"{TABLES}counts_are_those_of_the_routes", "experts are counted that no token took",
    ),
    Mutant(
        "a table goes before its requests are counted", "vllm_adafuse/serving/expert_tables.py",
        "if now - since < LINGERS:", "if now < since:", f"{TABLES}tables_of_adapters_that_went_stay_for_a_while",
        "where many adapters come and go, experts of the last requests of each are not counted",
    ),
    Mutant(
        "tables stay for good", "vllm_adafuse/serving/expert_tables.py",
        "if now - since < LINGERS:", "if now >= since:", f"{TABLES}tables_of_adapters_that_went_stay_for_a_while",
        "the temporary directory fills up",
    ),
    Mutant(
        "a scrape before what ended is counted", "vllm_adafuse/serving/metrics.py",
        "        COLLECTOR.flush()", "        pass", f"{TABLES}what_ended_is_counted_together_when_somebody_asks",
        "a scrape lacks the requests of the last second",
    ),
    Mutant(
        "experts are asked for the time before", "vllm_adafuse/serving/metrics.py",
        'return Upto(\n        "adafuse_expert_tokens"', 'return Counter(\n        "adafuse_expert_tokens"',
        f"{TABLES}each_counter_tells_of_all_that_ended", "a scrape lacks the experts of the last second",
    ),
    Mutant(
        "requests are asked for the time before", "vllm_adafuse/serving/metrics.py",
        'return Upto("adafuse_requests"', 'return Counter("adafuse_requests"',
        f"{TABLES}each_counter_tells_of_all_that_ended", "a scrape lacks the requests of the last second",
    ),
    Mutant(
        "a counter that is made while a scrape asks", "vllm_adafuse/serving/metrics.py",
        "        tokens_counter(), experts_counter(), requests_counter()\n", "",
        f"{METRICS}an_engines_counters_are_there_before_a_scrape", "the first scrape lacks all requests",
    ),
    Mutant(
        "one request at a time", "vllm_adafuse/serving/metrics.py",
        "in batches.items():\n                self._count_experts(name, content, batch)",
        "in batches.items():\n                for one in batch:\n                    self._count_experts(name, content, [one])",
        f"{TABLES}what_ended_is_counted_together_when_somebody_asks", "counting costs the time of before",
    ),
    Mutant(
        "many tokens wait", "vllm_adafuse/serving/metrics.py", "self._waiting > MANY", "False",
        f"{TABLES}many_tokens_do_not_wait", "under load what waits takes memory, and a scrape is slow",
    ),
    Mutant(
        "all that came before waits", "vllm_adafuse/serving/metrics.py",
        "with self._lock:\n            self._waiting = 0", "with self._lock:\n            self._waiting += 0",
        f"{TABLES}many_tokens_do_not_wait", "requests are counted one at a time once there were many",
    ),
    Mutant(
        "ids that are no numbers", "vllm_adafuse/serving/metrics.py",
        "except struct.error as e:", "except OverflowError as e:",
        f"{TABLES}no_request_fails_for_what_cannot_be_counted", "a request fails for a metric",
    ),
    Mutant(
        "what ended last is lost", "vllm_adafuse/serving/metrics.py",
        "            Finalize(None, self.flush, exitpriority=0)\n", "",
        f"{TABLES}what_ended_last_is_counted_when_the_process_ends",
        "with several API servers the last second of one that ends is not counted",
    ),
    Mutant(
        "tables go before the last requests are counted", "vllm_adafuse/serving/metrics.py",
        "            atexit.register(self.flush)\n", "",
        f"{TABLES}what_ended_last_is_counted_when_the_process_ends",
        "the last second of a process that ends is not counted",
    ),
    Mutant(
        "no thread, no request", "vllm_adafuse/serving/scratch.py",
        "except RuntimeError as e:  # as many", "except OSError as e:  # as many",
        f"{TABLES}no_request_fails_for_what_cannot_be_counted", "a request fails for a metric",
    ),
    Mutant(
        "the thread beside ends with an error", "vllm_adafuse/serving/scratch.py",
        "except Exception as e:  # noqa: BLE001\n                _tell(self._missing, e)",
        "except Exception as e:  # noqa: BLE001\n                _tell(self._missing, e)\n                return",
        f"{TABLES}what_nobody_asks_for_is_counted_soon", "after one error what ends waits for a scrape",
    ),
    Mutant(
        "nobody hurries", "vllm_adafuse/serving/scratch.py",
        "            self._hurry.set()", "            pass",
        f"{TABLES}many_tokens_do_not_wait", "under load what waits takes memory, and a scrape is slow",
    ),
    Mutant(
        "due once", "vllm_adafuse/serving/scratch.py",
        "            self._due.clear()\n            try:", "            try:",
        f"{TABLES}what_nobody_asks_for_is_counted_soon", "a thread that wakes every second of a server's life",
    ),
    Mutant(
        "a table once read is kept", "vllm_adafuse/serving/expert_tables.py",
        "if known is None or known.state != state:", "if known is None:",
        f"{TABLES}a_table_may_be_replaced_and_go", "counts by the routes of weights that were replaced",
    ),
    Mutant(
        "a table of a content that is still served", "vllm_adafuse/serving/meter.py",
        'if gone["content"] not in', 'if gone["content"] in',
        f"{TABLES}requests_count_for_experts_of_their_adapter",
        "two names of one content: without one the other's experts are not counted",
    ),
    Mutant(
        "files stay", "vllm_adafuse/serving/scratch.py", "Finalize(None, _remove, (place,), exitpriority=0)",
        "pass", f"{TABLES}a_process_takes_its_files_away", "the temporary directory fills up",
    ),
    Mutant(
        "a request without its prompt", "vllm_adafuse/cli/cmd_route.py",
        'ids = [*prompt, *choice["token_ids"]]', 'ids = [*choice["token_ids"]]',
        "tests/test_cli_views.py::test_route_of_a_request_that_was_served",
        "the report is of half a request, and wrong where the router sees the past",
    ),
    Mutant(
        "ids below zero", "vllm_adafuse/cli/cmd_route.py", "is int and 0 <= token <", "is int and token <",
        "tests/test_cli_views.py::test_answers_that_tell_no_tokens_are_refused",
        "the last token's route is told for one that there is not",
    ),
    Mutant(
        "an empty panel", "benchmarks/dashboard.py", "        if not lines:", "        if False:",
        "tests/test_dashboard.py::test_what_shows_nothing_is_an_error",
        "a picture of a dashboard that shows nothing",
    ),
    Mutant(
        "an adapter that has gone", "benchmarks/dashboard.py", "if points[-1][0] == last", "if last",
        "tests/test_dashboard.py::test_every_panel_is_asked_and_drawn",
        "the picture's table has adapters that are no longer there",
    ),
    Mutant(
        "uncounted turns are counted", "benchmarks/metrics.py",
        "if on else lambda *args: None", "if True else lambda *args: None",
        "tests/test_dashboard.py::test_turns_are_counted_or_not", "the benchmark compares a thing with itself",
    ),
    Mutant(
        "batches for nothing", "benchmarks/metrics.py", "    COLLECTOR.flush()\n", "",
        "tests/test_dashboard.py::test_turns_are_counted_or_not", "the benchmark leaves out what it put off",
    ),
    Mutant(
        "threads for nothing", "benchmarks/metrics.py", " + beside() - begin)", ")",
        "tests/test_dashboard.py::test_what_is_counted_beside_is_timed",
        "the benchmark leaves out what is done beside",
    ),
    Mutant(
        "threads of all times", "benchmarks/metrics.py", " + beside() - begin)", " + beside())",
        "tests/test_dashboard.py::test_what_is_counted_beside_is_timed",
        "the benchmark counts the seconds of turns before once more",
    ),
]
