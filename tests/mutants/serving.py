"""Faults of an engine whose requests choose their adapters: stages of a pipeline, loads, long steps."""

from __future__ import annotations

from mutants.mutant import Mutant

PAGE_STAGES = "tests/test_page_stages.py::test_"
SHRINK = "tests/test_page_shrink.py::test_"
ENGINE = "tests/test_lora_engine.py::test_"
RELOAD = "tests/test_lora_reload.py::test_"
REPLACED = f"{RELOAD}files_that_another_adapter_takes_the_place_of["
STAMPED = f"{ENGINE}steps_go_on_while_passports_are_stamped[fused]"

STAGES = [
    Mutant(
        "columns of no passports", "vllm_adafuse/serving/page_step.py",
        "(sees or not self.vocab_size or", "(sees or", f"{PAGE_STAGES}a_later_stage_is_told",
        "a later pipeline stage reads an adapter's routes from another's columns",
    ),
    Mutant(
        "a stage keeps its loss to itself", "vllm_adafuse/serving/page_step.py",
        "ids.masked_fill_((slots == LOST)[:, None], LOST)", "...",
        f"{PAGE_STAGES}an_adapter_lost_at_one_stage_is_lost_at_the_last",
        "half of an adapter's layers answer in its name",
    ),
    Mutant(
        "a loss that nobody hears of", "vllm_adafuse/serving/page_step.py",
        "self.slots[:tokens].masked_fill_(ids[:, 0] == LOST, LOST)", "pass",
        f"{PAGE_STAGES}an_adapter_lost_at_one_stage_is_lost_at_the_last",
        "half of an adapter's layers answer in its name",
    ),
    Mutant(
        "steps without adapters pass on", "vllm_adafuse/serving/page_step.py",
        "if self.adapts:\n            slots", "if True:\n            slots",
        f"{PAGE_STAGES}steps_without_adapters_pass_nothing_on",
        "launches in a step that has no use for them",
    ),
    Mutant(
        "pasts are followed without tables", "vllm_adafuse/serving/page_step.py",
        "bool(config.router_context) and self.vocab_size > 0", "bool(config.router_context)",
        f"{PAGE_STAGES}a_stage_without_tables_follows_nobody",
        "a later pipeline stage seeds sums from a table that it has not",
    ),
    Mutant(
        "a pinned router follows without tables", "vllm_adafuse/serving/past.py",
        "return self.c.numel() > 0", "return True",
        f"{PAGE_STAGES}a_stage_without_tables_follows_nobody",
        "a later pipeline stage seeds sums from a table that it has not",
    ),
    Mutant(
        "routes stay among what the model gets", "vllm_adafuse/serving/wrap/hooks.py",
        "tensors.pop(name) for name in names", "tensors[name] for name in names",
        f"{PAGE_STAGES}routes_travel_beside_hidden_states_in_all_steps",
        "torch.compile takes them for inputs of the model",
    ),
    Mutant(
        "every page is an expert", "vllm_adafuse/serving/page_routers.py",
        " & (number[FIRST] != 0)", "", f"{PAGE_STAGES}embeddings_are_routed_as_their_ids",
        "an expert of two pages is chosen twice",
    ),
    Mutant(
        "k of whoever has most", "vllm_adafuse/serving/page_routers.py",
        "place >= directory[TOP_K, at][:, None]", "place < 0",
        f"{PAGE_STAGES}embeddings_are_routed_as_their_ids",
        "weights of embeddings' routes do not add up",
    ),
    Mutant(
        "the norm for all", "vllm_adafuse/serving/page_routers.py",
        "self.numbers[NORMED] != 0", "self.numbers[NORMED] < 2",
        f"{PAGE_STAGES}embeddings_are_routed_as_their_ids",
        "a router that reads the embedding itself is asked about another vector",
    ),
]

LOADS = [
    Mutant(
        "the first tile's list", "kernels/page_shrink.py", "first_token // TILE_TOKENS *",
        "first_token * 0 *", f"{SHRINK}equals_float64_where_tiles_list_blocks",
        "long steps over many pages shrink by pages that their tokens do not have",
    ),
    Mutant(
        "the first linear's A", "kernels/page_shrink.py", "[linear_idx * RANKS + first_rank, k]",
        "[first_rank, k]", f"{SHRINK}equals_float64_where_tiles_list_blocks",
        "keys and values get the deltas of queries",
    ),
    Mutant(
        "lists of few pages", "kernels/dispatch.py", ">= MIN_PAGE_SHRINK_ROWS",
        "> MIN_PAGE_SHRINK_ROWS", f"{SHRINK}which_steps_take_it",
        "the limit is not where its figures say",
    ),
    Mutant(
        "gate_up waits for the others", "kernels/dispatch.py",
        "MAX_TILE_TOKENS if is_gate_up(s.kernel_epilogue) else MAX_SHORT_TOKENS", "MAX_SHORT_TOKENS",
        "tests/test_dispatch.py::test_where_the_wide_expand_begins",
        "steps of 129 to 256 tokens take the slower of two kernels",
    ),
    Mutant(
        "pages take two launches", "kernels/dispatch.py",
        "num_tokens < MIN_WIDE_TOKENS if s.tile_blocks else num_tokens <= most", "num_tokens <= most",
        "tests/test_dispatch.py::test_where_the_wide_expand_begins",
        "steps of some hundred tokens on pages have launches without work",
    ),
    Mutant(
        "a few large programs", "kernels/dispatch.py", "tiles / (2 * PROCESSORS)", "tiles",
        "tests/test_dispatch.py::test_short_steps_have_two_programs_of_the_wide_expand_to_a_processor",
        "most processors have nothing to do",
    ),
    Mutant(
        "a whole vocabulary at once", "vllm_adafuse/serving/hosted.py",
        "itertools.islice(pieces, PIECES_AT_ONCE)", "pieces", STAMPED,
        "everybody's tokens wait for a load",
    ),
    Mutant(
        "half of an adapter that is gone", "vllm_adafuse/serving/manager.py",
        "self.reads.forget(adapter)\n        self.coming.pop(adapter, None)",
        "self.reads.forget(adapter)", STAMPED, "an adapter that was removed comes back",
    ),
    Mutant(
        "passports of old weights", "vllm_adafuse/serving/manager.py",
        "(begin, begin()) for adapter, (begin, _) in", "(begin, left) for adapter, (begin, left) in", STAMPED,
        "a router decides by a backbone that is gone",
    ),
    Mutant(
        "a router behind the check", "vllm_adafuse/serving/hosted.py",
        "packer.packed, opened.config, router,", "packer.packed, opened.config, opened.router(),", f"{REPLACED}alike]",
        "experts of one adapter are served by the router of another",
    ),
    Mutant(
        "a hash behind what it is of", "vllm_adafuse/serving/adapters.py",
        'digest = "" if problems else content_digest(path)\n    adapter = load_adapter(path, backbone)',
        "adapter = load_adapter(path, backbone)\n    digest = content_digest(path)", f"{REPLACED}alike]",
        "an adapter is served by the config of another",
    ),
    Mutant(
        "a header that nobody knows", "vllm_adafuse/format/adapter.py",
        "(found := _table(weights, Alike())) != self.tensors", "(found := self.tensors) != found",
        "tests/test_serving_adapters.py::test_tensors_that_are_others_when_they_are_read",
        "values are read by an old header's shapes",
    ),
    Mutant(
        "a pinned adapter of two", "vllm_adafuse/serving/content.py",
        "file_identity(path := self.adapter.path) != identity", "file_identity(path := self.adapter.path) is None",
        "tests/test_serving_adapters.py::test_values_of_a_pinned_adapter_that_change_while_they_are_read",
        "values of two adapters are served as one",
    ),
    Mutant(
        "asleep", "patches/lora_sleep.py", "if asleep and", "if not asleep and",
        f"{RELOAD}an_engine_that_sleeps_loads_nothing",
        "a load reads weights that are not there, which ends the engine",
    ),
    Mutant(
        "asleep with all that it has", "patches/lora_sleep.py", " not in self.list_loras()", " != 0",
        f"{RELOAD}an_engine_that_sleeps_loads_nothing",
        "requests of adapters that are there are refused while the engine sleeps",
    ),
    Mutant(
        "one expert of a run", "vllm_adafuse/serving/adapters.py",
        "slice(first, first + 1 + len(others))", "slice(first, first + 1)",
        f"{ENGINE}one_batch_of_base_mixtures_and_loras[fused]",
        "experts of a rank that others have say nothing",
    ),
    Mutant(
        "a norm without a record", "vllm_adafuse/serving/wrap/blocks.py",
        "    vllm_api.load_in_place_of(fused, norm)\n", "",
        f"{ENGINE}the_backbones_weights_are_loaded_anew[fused]",
        "weights cannot be reloaded, nor an engine wake from sleep of level 2",
    ),
]
