"""Faults in the memory of routers that see the past (`router.context_half_life`)."""

from __future__ import annotations

from mutants.mutant import Mutant

ROUTES = "tests/test_context_routes.py::test_"
CHUNKS = f"{ROUTES}chunks_of_requests_add_up"
ANY = f"{ROUTES}memories_of_any_length"
SEEDED = f"{ROUTES}a_seeded_ring_is_as_if_computed"
FORMAT = "tests/test_context.py::test_"
TRAINED = "tests/test_context_training.py::test_"
COMPOSED = "tests/test_compose_context.py::test_"
CHANGED = "tests/test_change_mixture.py::test_"
DISTILLED = "tests/test_distill.py::test_"
PAGES = "tests/test_engine_context_pages.py::test_"
KERNEL, PAST = "kernels/context_routes.py", "vllm_adafuse/serving/past.py"
LAYERS, COMPOSE = "vllm_adafuse/training/layers.py", "vllm_adafuse/experts/compose.py"

FADING = [
    Mutant("all memories are kept", KERNEL, "fading = (high | low)", "fading = (high & 0 | low & 0)",
           CHUNKS, "requests follow what they said long ago"),
    Mutant("the past of a block does not fade", KERNEL, "(past * before)[None, :]", "past[None, :]",
           CHUNKS, "routes are wrong from the second step on"),
    Mutant("a block hands on its past unfaded", KERNEL, "past * tl.exp(fading * turns)", "past",
           CHUNKS, "routes are wrong from the third step on"),
    Mutant("a block hands on what it said a turn late", KERNEL, "(turns - 1 - BLOCK_T", "(turns - BLOCK_T",
           CHUNKS, "the last token counts half too little"),
    Mutant("sums are divided by the tokens", KERNEL, "tl.where(fading < 0, faded, told) * before", "told * before",
           CHUNKS, "the past counts less and less"),
    Mutant("long memories lose digits", KERNEL, "tl.where(near, exact, tl.where(x > -1, x, power - 1))",
           "power - 1", ANY, "0 over 0 for a half-life of 1e38 tokens"),
    Mutant("powers run over", KERNEL, "LEAST_FADING = -20.0", "LEAST_FADING = -1e300", ANY,
           "inf times 0 for a memory of less than a token"),
    Mutant("memories have a least length", KERNEL, "LEAST_FADING = -20.0", "LEAST_FADING = -2.0", ANY,
           "a half-life of 0.02 tokens is served as 0.3"),
    Mutant("torch forgets nothing of earlier steps", KERNEL, "added = past * kept +", "added = past +",
           CHUNKS, "served on a CPU, routes are wrong from the second step on"),
    Mutant("a seed is what was said, unfaded", PAST, "(c[:, :start].double() * left)", "c[:, :start].double()",
           SEEDED, "after a prefix hit requests follow their first tokens"),
    Mutant("a seeded ring fades its first sum once", PAST, "first * torch.exp(fading * more)",
           "first * torch.exp(fading * more.clamp(max=1))", SEEDED, "after a rejected draft the past is too much"),
    Mutant("a pinned router is served with the mean", PAST,
           "fading = torch.tensor([fading_of(config.context_half_life)]", "fading = torch.tensor([0.0]",
           f"{PAGES}one_batch_of_all", "the key is read and not obeyed"),
    Mutant("pages seed the mean", "vllm_adafuse/serving/page_step.py", "said, fading)", "said, 0.0)",
           f"{PAGES}prefix_hits_and_others_pasts", "after a prefix hit routes are others"),
    Mutant("a pinned router seeds the mean", PAST,
           "said, fading_of(self.config.context_half_life))", "said, 0.0)",
           f"{PAGES}prefix_hits_and_others_pasts", "after a prefix hit routes are others"),
    Mutant("/metrics counts by the mean", "vllm_adafuse/serving/expert_tables.py", "float(fading))", "0.0)",
           "tests/test_expert_tables.py::test_counts_are_those_of_the_routes", "experts are miscounted"),
    Mutant("the reference forgets over padding", "vllm_adafuse/offline/reference.py",
           "torch.where(token > 0, kept * token, 1.0)", "kept", f"{FORMAT}padding_is_no_past",
           "the truth of a batch hangs on its padding"),
    Mutant("route shows the mean", "vllm_adafuse/offline/routing.py",
           ", fading_of(config.context_half_life),", ",",
           f"{FORMAT}reference_and_offline_routes_equal_the_formula", "route shows what is not served"),
    Mutant("a half-life alone is ignored", "vllm_adafuse/format/context_keys.py",
           "for key in (SCALE_KEY, HALF_LIFE_KEY)", "for key in (SCALE_KEY,)", f"{FORMAT}bad_configs",
           "who forgot router.context serves a router of tokens"),
    Mutant("a half-life may be below 0", "vllm_adafuse/format/context_keys.py",
           "keys.get(HALF_LIFE_KEY, None, is_positive", "keys.get(HALF_LIFE_KEY, None, bool",
           f"{FORMAT}bad_configs", "-16 tokens are served"),
    Mutant("training forgets over padding", LAYERS, "torch.where(real > 0, 0.5 ** (1 / half_life), 1.0)",
           "torch.full_like(real, 0.5 ** (1 / half_life))", f"{TRAINED}no_time_passes_in_padding",
           "trained is not what is served"),
    Mutant("training divides by the tokens", LAYERS, "told[..., -1:].clamp(min=1)", "real.cumsum(1).clamp(min=1)",
           f"{TRAINED}saved_is_what_was_trained", "trained is not what is served"),
    Mutant("a trained half-life is not saved", "vllm_adafuse/training/config.py",
           "float(self.context_scale), half_life)", "float(self.context_scale), None)",
           f"{TRAINED}saved_is_what_was_trained", "trained is not what is served"),
    Mutant("a composed half-life is not saved", COMPOSE,
           '"mean", options.context.scale, options.context.half_life', '"mean", options.context.scale, None',
           f"{COMPOSED}the_command", "composed is not what is served"),
    Mutant("a composed router learns with the mean", COMPOSE, "context_half_life=options.context.half_life",
           "context_half_life=None", f"{COMPOSED}the_command", "composed is not what is served"),
    Mutant("rows are taken from another memory", "vllm_adafuse/experts/context.py",
           "halves[0] != halves[1]", "False", f"{COMPOSED}rows_of_another_kind_are_refused",
           "kept rows mean something else"),
    Mutant("a changed mixture learns with the mean", "vllm_adafuse/experts/change.py",
           "                config.context_half_life,\n", "", f"{CHANGED}the_router_stays_of_its_form",
           "an added expert's row is of another router"),
    Mutant("a student starts with a past", "vllm_adafuse/training/align.py", "router.context.data.zero_()", "pass",
           f"{DISTILLED}a_student_may_see_the_past", "what it begins with is no imitation of its teacher"),
    Mutant("distill takes no half-life", "vllm_adafuse/cli/cmd_distill.py", ', "context_half_life"', "",
           f"{DISTILLED}the_command_states_what_was_lost", "an option is read and not obeyed"),
]  # fmt: skip
