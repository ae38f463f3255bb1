"""Faults of routers that see the past where prompts are embeddings (`--enable-prompt-embeds`)."""

from __future__ import annotations

from mutants.mutant import Mutant

PAGE_STEP, PAST = "vllm_adafuse/serving/page_step.py", "vllm_adafuse/serving/past.py"
ROUTERS, REQUESTS = "vllm_adafuse/serving/page_routers.py", "vllm_adafuse/serving/requests.py"
SEAM = "patches/requests.py"
SAME = "tests/test_page_stages.py::test_pasts_of_embeddings_are_those_of_their_ids"
ENGINE = "tests/test_engine_context_embeds.py::test_"
OLDER, NEWER = (
    f"tests/test_requests_seams.py::test_prompts_of_embeddings_of_the_{which}_runner"
    for which in ("older", "newer")
)

EMBEDS = [
    Mutant(
        "scales in the model's dtype", ROUTERS,
        "torch.tensor(config.scales, dtype=torch.float32)", "torch.tensor(config.scales)",
        "tests/test_page_stages.py::test_numbers_of_routers_are_not_rounded_to_the_models_dtype",
        "experts of embeddings weigh up to 0.4 % more or less than they should",
    ),
    Mutant("every row is its page's next", PAGE_STEP, "if e != last)", "if True)", SAME,
           "an expert of two pages counts as two"),
    Mutant("rows are columns", PAGE_STEP, "if self.routers is not None:  # rows", "if False:  # rows", SAME,
           "requests hear what other adapters' experts say of their past"),
    Mutant("routes of embeddings look for passports", PAGE_STEP, " or self.routers is not None):", "):",
           "tests/test_page_stages.py::test_embeddings_are_routed_as_their_ids",
           "a mixture's tokens take what stands in another one's columns"),
    Mutant("pages seed by ids alone", PAGE_STEP, "if self.routers is not None:\n            pieces", "if False:\n            pieces",
           SAME, "after a prefix hit routes are others"),
    Mutant("routes are read of the vocabulary", PAGE_STEP, "if self.routers is not None:\n            w, c", "if False:\n            w, c",
           SAME, "w and c are what another step left there"),
    Mutant("the past is read by the router of the token", ROUTERS, "(past, pages + self.numbers.shape[1])", "(past, pages)",
           SAME, "what a request is about does not matter"),
    Mutant("the past has no scale", ROUTERS, "context[FACTOR] = config.context_scale / config.temperature",
           "context[FACTOR] = 1 / config.temperature", SAME, "half as sure as the offline route"),
    Mutant("w has no bias", ROUTERS, "((product + bias) / self", "(product / self", SAME, "routes are others"),
    Mutant("w has no temperature", ROUTERS, "((product + bias) / self.context[DIVISOR])", "(product + bias)", SAME,
           "routes are others"),
    Mutant("terms of the first piece", ROUTERS, "self.c[:, own] =", "self.c[:, : len(past)] =", SAME,
           "in steps of more than 1024 tokens the past is another's"),
    Mutant("a seed is of ids alone", REQUESTS, "if self.given is not None and start <", "if False and start <", SAME,
           "after a prefix hit an embedding counts as id 0"),
    Mutant("embeddings win over ids", REQUESTS, "if self.by_id is not None:", "if False:", SAME,
           "what a chat says around embeddings is taken for zeros"),
    Mutant("every piece begins at the first", REQUESTS, "given = self.given[start : start + len(rows)]",
           "given = self.given[: len(rows)]", SAME, "seeds of more than 1024 tokens are wrong"),
    Mutant("what follows a prompt is lost", REQUESTS, "torch.cat([given, rows[len(given) :]])", "given", SAME,
           "after preemption answers are no past"),
    Mutant("a pinned router seeds by ids alone", PAST, "if embed := self._requests[0].embed:", "if embed := None:",
           f"{ENGINE}prefix_hits", "after a prefix hit an embedding counts as whatever id stands there"),
    Mutant("a pinned router reads the vocabulary", PAST, "tables, input_ids = (self.own_w, self.own_c),",
           "tables, input_ids = (self.w, self.c),", f"{ENGINE}alone", "places in the step are taken for ids"),
    Mutant("embeddings reach a router unannounced", PAST, "if requests.embed is None:", "if False:",
           "tests/test_page_stages.py::test_embeddings_that_nobody_announced_are_refused",
           "routes of what another step left"),
    Mutant("nobody embeds", REQUESTS, "embed if embedded else None", "None", f"{ENGINE}prefix_hits",
           "a seed by embeddings has no model to ask"),
    Mutant("stale ids of the older runner", SEAM, "token_ids[~by_id.numpy()] = 0", "pass", OLDER,
           "a request is refused for what another one left"),
    Mutant("all of the older runner's are embeddings", SEAM,
           "Tokens(torch.from_numpy(token_ids), given, by_id)", "Tokens(torch.from_numpy(token_ids), given)", OLDER,
           "ids between embeddings count as zeros"),
    Mutant("the newer runner's embeddings", SEAM, "if embedded else {}", "if False else {}", NEWER,
           "after a prefix hit embeddings count as id 0"),
    Mutant("a newer runner without embeddings", SEAM, "if embedded := _requests_of(runner).embed is not None:",
           "embedded = _requests_of(runner).embed is not None\n    if False:",
           "tests/test_requests_seams.py::test_a_runner_without_the_seam_is_named", "a step ends the engine"),
    Mutant("experts of placeholders", "patches/metrics.py", "if req_state.prompt_embeds is not None:", "if False:",
           "tests/test_metrics.py::test_vllms_statistics_of_an_ended_request_are_counted",
           "/metrics counts experts that no token took"),
    Mutant("warm-up asks by ids", "vllm_adafuse/serving/models.py", "if router.by_id and embeds is not None:", "if False:",
           f"{ENGINE}warm_up_asks_the_default_as_steps_do", "the first request waits for a compiler"),
]  # fmt: skip
