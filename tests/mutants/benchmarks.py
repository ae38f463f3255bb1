"""Faults of what measures: figures that look right; as catalogue.py."""

from __future__ import annotations

from mutants.mutant import Mutant

LORA = "tests/test_lora_benchmark.py::test_"
EACH = f"{LORA}each_engine_has_the_adapters_of_its_rows_before_the_first_turn"
AT_ONCE = f"{LORA}an_engine_loads_several_adapters_at_once_and_is_asked_one_by_one"
SERVE = "tests/test_serve_benchmark.py::test_"
TURNS = "tests/test_benchmark_turns.py::test_"

BENCHMARKS = [
    Mutant(
        "two threads ask an engine", "benchmarks/lora.py",
        "        with one:\n            return ask(request)", "        return ask(request)", AT_ONCE,
        "a socket is written to by several threads: an engine hangs on a GPU that is paid for",
    ),
    Mutant(
        "one adapter after the other", "benchmarks/lora.py", "ThreadPoolExecutor(LOADS)",
        "ThreadPoolExecutor(1)", AT_ONCE, "minutes of a GPU go by on reading files",
    ),
    Mutant(
        "engines load in their turns", "benchmarks/lora.py", "            load(llm, loads)",
        "            pass", f"{LORA}engines_start_at_once_and_load_while_others_start",
        "one adapter after the other is read in the first turns",
    ),
    Mutant(
        "one too many for the host", "benchmarks/lora.py", '"max_cpu_loras": len(loras) + 1',
        '"max_cpu_loras": len(loras)', EACH, "every turn reads a LoRA from its file again",
    ),
    Mutant(
        "a cache without room to spare", "benchmarks/lora.py", "* 1.1 + 0.5", "* 0.9",
        f"{LORA}the_cache_is_what_the_sizes_need_unless_vllm_is_to_choose",
        "some sequences wait for others: no time is one of its size",
    ),
    Mutant(
        "uploads within a turn", "benchmarks/turns.py", "if engine.lora is not None:",
        "if engine.lora is None:",
        f"{TURNS}adapters_that_took_turns_in_the_pool_are_back_before_a_turn_is_timed",
        "the short generation brings adapters back: steps seem shorter than they are",
    ),
    Mutant(
        "servers end one by one", "benchmarks/serve.py",
        "server.process.send_signal(signal.SIGINT)", "server.healthy()",
        f"{SERVE}servers_start_at_once_and_end_at_once",
        "20 seconds for each that is slow, while the job's time is up",
    ),
    Mutant(
        "servers start one by one", "benchmarks/serve.py",
        "servers[kind] = stack.enter_context(started_server(argv, log))",
        "servers[kind] = stack.enter_context(started_server(argv, log))\n"
        "                    wait_until_healthy(servers[kind], 2)",
        f"{SERVE}servers_start_at_once_and_end_at_once",
        "a minute of a GPU for each",
    ),
    Mutant(
        "the last turn is the figure", "benchmarks/serve.py",
        "statistics.median(turn[name] for turn in turns)", "turns[-1][name]",
        f"{SERVE}servers_take_turns_and_a_figure_is_the_median_of_them",
        "a second in which the host was busy is told as an engine's throughput",
    ),
    Mutant(
        "more servers than the device holds", "benchmarks/serve.py", "+ self.cache_gib + BESIDE",
        "", f"{SERVE}as_many_servers_run_at_once_as_the_device_holds",
        "servers run out of memory as they start",
    ),
]
