"""Faults that the tests must see, one place each; see run.py. Old texts stand in their files exactly
once: keep them short, so that they outlive refactorings."""

from __future__ import annotations

from mutants.benchmarks import BENCHMARKS
from mutants.embeds import EMBEDS
from mutants.fading import FADING
from mutants.mutant import Mutant
from mutants.production import DEPLOY, METRICS
from mutants.serving import LOADS, STAGES
from mutants.tiles import TILES

WAITS = "tests/test_waits.py::test_tiles_wait_for_all_of_the_shrink"
GPU_WAY = "tests/test_gpu_way.py::test_"
STREAM = "tests/test_decode_gemm.py::test_"
STRESS = "tests/test_gpu_stress.py::test_ten_thousand_launches_beside_a_busy_memory"

KERNELS = [
    Mutant(
        "no wait for the shrink", "kernels/device/sync.py",
        'sem="acquire") < count', 'sem="acquire") < 0', f"{WAITS}[one-part-whole-decode_gemm_triton]",
        "tiles read s before it is written: wrong answers under load alone",
    ),
    Mutant(
        "a wait for one too few", "kernels/device/sync.py",
        'sem="acquire") < count', 'sem="acquire") < count - 1', f"{WAITS}[one-part-whole-decode_gemm_triton]",
        "the last part of s is missing now and then",
    ),
    Mutant(
        "a list's shrinks are not counted", "kernels/decode_gemm.py",
        "shrinks = n_experts * of_expert, active.to(tl.int32) * of_expert",
        "shrinks = n_experts * of_expert, 1", f"{WAITS}[list-whole-decode_gemm_triton]",
        "with many experts tiles wait for the first of them alone",
    ),
    Mutant(
        "a loop that does not wait", "kernels/device/tma_steps.py",
        "(step == ahead) & (end > of_in)", "(step == ahead) & (end < 0)", f"{STRESS}[tile]",
        "the pipelined loop reads s before it is written", gpu=True,
    ),
    Mutant(
        "split-K semaphores stay", "kernels/device/sync.py",
        "tl.store(split_k_semaphore_ptr, 0)", "pass",
        "tests/test_shrink.py::test_a_second_launch_finds_its_tickets_at_zero",
        "the next launch adds up sums that are not yet there",
    ),
    Mutant(
        "a slice is not added", "kernels/device/sync.py",
        "for other in range(split_k):", "for other in range(1, split_k):",
        "tests/test_shrink.py::test_equals_float64_and_is_zero_where_not_chosen[slices-by_triton]",
        "s lacks a part of `in`",
    ),
    Mutant(
        "experts share sixteen ranks", "kernels/decode_gemm.py",
        "cdiv(rank, 16) * 16", "cdiv(rank, 8) * 8",
        f"{STREAM}a_token_does_not_see_its_company[1024-40-4]",
        "a token's bits hang on who else is in the batch",
    ),
    Mutant(
        "a turn the other way", "kernels/device/epilogues.py",
        "return a * cos - b * sin,", "return a * cos + b * sin,",
        f"{STREAM}queries_and_keys_are_turned[widths0-64-adapted0]",
        "positions are wrong in every layer",
    ),
    Mutant(
        "the second member has no delta", "kernels/decode_gemm.py",
        "asked_up = tl.where(linear_up >= 0, active, 0)", "asked_up = tl.where(linear_up < -1, active, 0)",
        f"{STREAM}gate_up_with_its_activation[adapted0-silu]",
        "up_proj goes without its experts",
    ),
    Mutant(
        "every tile ranks from the first", "kernels/device/gates.py",
        "chunk, first_rank = i // BLOCKS, i % BLOCKS * BLOCK_R",
        "chunk, first_rank = i // BLOCKS, 0",
        "tests/test_expand.py::test_cuts_of_the_tile[True-shape1]",
        "ranks past 128 are read twice, others never",
    ),
    Mutant(
        "what others see of an expert", "kernels/device/gates.py",
        "return tl.where(gates != 0, lora_a_out.to(tl.float32) * gates, 0.0)",
        "return (lora_a_out.to(tl.float32) * gates)",
        "tests/test_tma_expand.py::test_what_others_see_of_an_expert_does_not_matter[one-part]",
        "an infinity of one request becomes NaN in others",
    ),
    Mutant(
        "a norm without half of the split-K sums", "kernels/add_norm.py",
        "for _ in tl.static_range(1, SPLIT_K):", "for _ in tl.static_range(2, SPLIT_K):",
        "tests/test_add_norm.py::test_slices_are_added[2-default]",
        "half of a product is missing in front of a norm",
    ),
    Mutant(
        "the switch adds to what is there", "kernels/switch.py",
        "w = tl.load(w0_ptr + base + place, mask=inside, other=0.0)",
        "w = tl.load(w_ptr + base + place, mask=inside, other=0.0)",
        "tests/test_switch.py::test_the_kernel_forgets_the_last_route_too",
        "routes pile up in the merged weights",
    ),
]

DISPATCH = [
    Mutant(
        "programs of many tiles get slices", "kernels/dispatch.py",
        "MAX_SHORT_EXPAND_TOKENS = 1024", "MAX_SHORT_EXPAND_TOKENS = 192",
        "tests/test_dispatch.py::test_slices_of_cublas_meet_programs_of_one_tile",
        "of down's experts the half of `in` is left out",
    ),
    Mutant(
        "split-K sums without experts", "kernels/projection_norm.py",
        "    if way.expand == ADD_NORM:",
        "    if way.split_k > 1:\n        lora_a_out.zero_()\n    if way.expand == ADD_NORM:",
        f"{GPU_WAY}projection_and_norm[long]",
        "o_proj and down_proj go without their experts in steps of 65 to 256 tokens",
    ),
    Mutant(
        "a norm without experts", "kernels/projection_norm.py",
        "return add_norm_triton(y, lora_a_out, *behind)", "return add_norm_triton(y, None, *behind)",
        f"{GPU_WAY}projection_and_norm[short]",
        "the longest steps go without their experts in o_proj and down_proj",
    ),
    Mutant(
        "experts beyond one product", "kernels/projection.py",
        "dense_expand_triton(y, lora_a_out, p.lora_b, step.gates, *of)", "pass",
        "tests/test_tma_expand.py::test_experts_beyond_one_product_are_added_before[sixteen]",
        "long steps lack the experts from the ninth on",
    ),
    Mutant(
        "a bias is lost", "kernels/projection.py",
        "return y, lora_a_out, p.bias", "return y, lora_a_out, None", f"{GPU_WAY}parts_without_experts_and_a_bias",
        "Qwen's q, k and v lack their bias in middling steps",
    ),
    Mutant(
        "long steps beside quantised weights", "kernels/sgmm.py",
        "else:\n        lora_a_out = shrink_torch(x, p.lora_a, step.gates)",
        "else:\n        lora_a_out = shrink_torch(x, p.lora_a, step.gates * 0)",
        f"{GPU_WAY}deltas_beside_a_product_of_another",
        "no experts in steps of more than 64 tokens over fp8",
    ),
    Mutant(
        "a config for fewer tokens", "kernels/dispatch.py",
        "if serves(config, tokens, tma)}", "if True}", "tests/test_dispatch.py",
        "a tuned kernel gets more tokens than it has room for",
    ),
]

SHARDING = [
    Mutant(
        "key heads that are shared by ranks", "vllm_adafuse/serving/projections.py",
        "kv_rank = rank // layer.num_kv_head_replicas", "kv_rank = rank",
        "tests/test_sharding.py::test_heads[4]",
        "with more ranks than key heads, ranks hold other heads' experts, or none",
    ),
    Mutant(
        "every rank has the first columns", "vllm_adafuse/serving/projections.py",
        "Shard(full, rank * (full // size), full // size)", "Shard(full, 0, full // size)",
        "tests/test_sharding.py::test_columns_and_rows[2]",
        "gate_up of all ranks but the first has wrong experts",
    ),
    Mutant(
        "every rank has the first inputs", "vllm_adafuse/serving/projections.py",
        "first = layer.tp_rank * size_in", "first = 0",
        "tests/test_sharding.py::test_columns_and_rows[2]",
        "A of o_proj and down_proj reads other ranks' inputs",
    ),
    Mutant(
        "packed linears overlap", "vllm_adafuse/serving/projections.py",
        "start += shard.full", "start += shard.width", "tests/test_sharding.py::test_heads[2]",
        "Phi-3's k and v take rows of q",
    ),
]

ROUTING = [
    Mutant(
        "a norm without its offset", "vllm_adafuse/serving/routes.py",
        "return norm.weight.float() + offset", "return norm.weight.float()",
        "tests/test_gate.py::test_a_router_has_the_norms_factors_in_float32",
        "routers of Gemma that read the first norm read zeros, nearly",
    ),
    Mutant(
        "one expert a token", "kernels/spread_routes.py",
        "gates += tl.where(", "gates = tl.where(", "tests/test_spread_routes.py",
        "of k experts the last one is left",
    ),
    Mutant(
        "a bit for each of any number of experts", "kernels/spread_routes.py",
        "if BLOCK_E <= 64:", "if BLOCK_E <= 512:", "tests/test_spread_routes.py",
        "of more than 64 experts those beyond are left out over a quantised weight",
    ),
    Mutant(
        "ids outside the vocabulary", "kernels/gather_routes.py",
        "token_ids.clamp(0, table_ids.shape[0] - 1)", "token_ids",
        "tests/test_gather_routes.py", "padding rows of a graph read past the passports",
    ),
    Mutant(
        "a router in float32", "kernels/gate.py",
        "(u.double() @ router.weight.double().t()).float()", "u @ router.weight.t()",
        "tests/test_gate.py::test_a_row_does_not_depend_on_the_batch",
        "a live route is not the token's passport",
    ),
    Mutant(
        "no temperature", "kernels/gate.py",
        "choose(logits / router.temperature,", "choose(logits,",
        "tests/test_gate.py::test_equals_the_formula", "weights of experts are too even or too odd",
    ),
    Mutant(
        "half of what enters a layer", "kernels/live_route.py",
        "hidden[rows] + residual[rows]", "hidden[rows] + 0 * residual[rows]",
        "tests/test_live_route.py::test_equals_the_gate_of_the_sum",
        "a router at a later layer decides on the last layer's output alone",
    ),
    Mutant(
        "Gemma's embeddings", "vllm_adafuse/offline/routing.py",
        "if self.scaled_embedding:", "if False:", "tests/test_routing.py",
        "passports offline are other than those that are served",
    ),
    Mutant(
        "an always-on expert by halves", "kernels/layerwise/route.py",
        "weighted[:, :, experts:] = lora_a_out[:, :, experts:] * scales[experts:, None]",
        "weighted[:, :, experts:] = lora_a_out[:, :, experts:]",
        "tests/test_layerwise_route.py::test_equals_float64",
        "parts that are always on lack their scale",
    ),
    Mutant(
        "a plain LoRA has no weight", "kernels/page_routes.py",
        "gates = tl.where(own & (top_k == 0)[:, None], scale[:, None], 0.0)",
        "gates = tl.where(own & (top_k < 0)[:, None], scale[:, None], 0.0)",
        "tests/test_page_routes.py",
        "requests that name a LoRA get the base model's answer",
    ),
    Mutant(
        "every tile's first block alone", "kernels/page_routes.py",
        "tl.store(listed_ptr, count)", "tl.store(listed_ptr, tl.minimum(count, 1))",
        "tests/test_page_routes.py",
        "tokens at the border of two prompts go without the second one's adapter",
    ),
    Mutant(
        "blocks in turn but the last", "kernels/tma_expand.py",
        "tl.range(0, count, num_stages=1)", "tl.range(0, count - 1, num_stages=1)",
        "tests/test_tma_expand.py::test_blocks_of_pages_that_tiles_of_tokens_list",
        "in long steps tokens between two prompts lose an adapter",
    ),
    Mutant(
        "one block twice", "kernels/tma_expand.py", "[column, second_block *", "[column, first_block *",
        "tests/test_tma_expand.py::test_blocks_of_pages_that_tiles_of_tokens_list",
        "in long steps the second of two prompts in a tile gets the first one's experts",
    ),
    Mutant(
        "no more than two blocks", "kernels/tma_expand.py", "if count > 2:", "if count > 3:",
        "tests/test_tma_expand.py::test_blocks_of_pages_that_tiles_of_tokens_list",
        "in long steps of short prompts whole tiles of tokens have no result",
    ),
    Mutant(
        "blocks in the order of the pool", "kernels/device/gates.py",
        "chunk = tl.load(listed_ptr + 1 + chunk)", "pass",
        "tests/test_expand.py::test_blocks_of_pages_that_tiles_of_tokens_list",
        "steps of 257 to 4095 tokens take other adapters' experts",
    ),
    Mutant(
        "a short shrink for many ranks", "kernels/dispatch.py",
        "replace(found, shrink_cols=MANY_SHRINK_COLS, stages=stages)", "found",
        "tests/test_dispatch.py::test_a_streamed_projection_of_many_ranks_has_a_shrink_in_long_steps",
        "the shrink of many adapters outlasts the product: 10 % of a step of 8 requests",
    ),
    Mutant(
        "adapters in use make room", "vllm_adafuse/serving/pool.py",
        "self.placed.move_to_end(adapter)", "pass", "tests/test_pool.py",
        "the adapter that every request names is loaded anew again and again",
    ),
]

CACHE = [
    Mutant(
        "the first slot", "kernels/kv_slots.py",
        "kept = pages.slots >= 0", "kept = pages.slots > 0",
        "tests/test_kv_cache.py::test_a_step_of_the_op_writes_the_cache_that_vllm_would",
        "the first place of the cache is never written",
    ),
    Mutant(
        "values among the keys", "kernels/kv_slots.py",
        "tl.where(slice_idx == 2, values_ptr, keys_ptr)", "tl.where(slice_idx == 1, values_ptr, keys_ptr)",
        "tests/test_kv_slots.py::test_pages_hold_to_the_last_bit_what_the_result_would"
        "[by_stream-NHD-dtype0]",
        "keys and values change places in the cache",
    ),
    Mutant(
        "the step before has written", "vllm_adafuse/serving/kv_cache.py",
        "if written is None or written is not get_forward_context():", "if written is None:",
        "tests/test_kv_cache.py", "keys of a step are written by nobody: a prefix of zeros",
    ),
    Mutant(
        "a graph of pieces", "vllm_adafuse/serving/kv_cache.py",
        "context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE", "False",
        "tests/test_kv_cache.py", "slots of the captured step are replayed for all others",
    ),
    Mutant(
        "another adapter's prefix", "vllm_adafuse/format/digest.py",
        "digest.update(piece.numpy())", "pass", "tests/test_digest.py",
        "two adapters of one shape have one hash, and share cached prefixes",
    ),
]

DOCTOR = "tests/test_doctor.py::test_"
CONFIGS = "tests/test_dispatch.py::test_"

TOOLS = [
    Mutant(
        "equal messages are not marked alike", "vllm_adafuse/training/chat.py",
        "if m == self.messages[i]]", "if m is self.messages[i]]",
        "tests/test_chat.py::test_equal_turns_of_which_the_last_is_written_otherwise",
        "where two turns say the same, the reply between them is refused, or the wrong one learnt",
    ),
    Mutant(
        "blocks of the next reply", "vllm_adafuse/training/chat.py",
        "if found[k][0] >= place[0]), main[b])", "if found[k][0] >= place[0]), main[a] + 1)",
        "tests/test_chat.py::test_blocks_around_a_reply_are_its_own",
        "what a template writes behind a reply is learnt as the next one's, whatever its weight",
    ),
    Mutant(
        "blocks of the last reply", "vllm_adafuse/training/chat.py",
        "if found[k][0] >= place[0]), main[b])", "if found[k][0] < 0), main[b])",
        "tests/test_chat.py::test_blocks_around_a_reply_are_its_own",
        "a thought is learnt as the reply's before it, whatever its weight",
    ),
    Mutant(
        "a plugin with a blank before it", "vllm_adafuse/doctor.py",
        'PLUGIN not in allowed.split(",")', "PLUGIN not in allowed",
        f"{DOCTOR}a_hidden_plugin_is_told",
        "doctor says that vLLM sees the plugin, and vLLM serves the bare backbone",
    ),
    Mutant(
        "the first vLLM that is too new", "vllm_adafuse/doctor.py",
        "if not MINIMUM <= (major, minor) < BEFORE:", "if not MINIMUM <= (major, minor) <= BEFORE:",
        f"{DOCTOR}another_vllm", "doctor finds nothing wrong with a vLLM that is not supported",
    ),
    Mutant(
        "A of one linear alone", "vllm_adafuse/doctor.py",
        "parts = max(shape.adapted) + 1", "parts = 1",
        f"{DOCTOR}the_pool_is_that_of_the_options",
        "the bytes of the pool are too few: qkv has three of A, gate_up two",
    ),
    Mutant(
        "what does not fit is slow only", "vllm_adafuse/doctor.py",
        "(report.slower if alone else report.problems).extend(", "report.slower.extend(",
        f"{DOCTOR}adapters_of_both_kinds_and_what_does_not_fit_them",
        "exit code 0 for adapters that the server will refuse",
    ),
    Mutant(
        "kernels of one rank's shapes", "vllm_adafuse/doctor.py",
        "elif shapes and options.ranks > 1 and", "elif shapes and options.ranks > 2 and",
        f"{DOCTOR}what_keeps_projections_apart",
        "a launch more for each layer, and doctor does not say why",
    ),
    Mutant(
        "requests of the pinned adapter", "vllm_adafuse/serving/metrics.py",
        'name = adapter or next(iter(self.pinned), "")', 'name = adapter or ""',
        f"{METRICS}requests_count_for_their_adapter_and_else_for_the_pinned_one",
        "tokens of the pinned adapter count as the bare backbone's",
    ),
    Mutant(
        "a refusal counts at each level", "vllm_adafuse/serving/metrics.py",
        "e.is_counted = True", "e.is_counted_not = True",
        f"{METRICS}refusals_are_counted_by_their_kind", "alerts on refusals go off at half of them",
    ),
    Mutant(
        "seconds for loads", "vllm_adafuse/serving/metrics.py",
        "counts.loads, counts.load_seconds)", "counts.load_seconds, counts.loads)",
        f"{METRICS}what_a_worker_counts_is_what_a_scrape_says",
        "the mean time of a load is upside down",
    ),
    Mutant(
        "every rank counts", "vllm_adafuse/serving/scratch.py",
        "if parallel.rank != 0:", "if parallel.rank < 0:",
        f"{METRICS}other_ranks_write_nothing_and_a_worker_without_room_serves_on",
        "with tensor parallelism every load counts as often as there are ranks",
    ),
    Mutant(
        "names of version 4", "kernels/configs.py",
        "_VERSION_4.get(key, key): value for key", "key: value for key",
        f"{CONFIGS}files_of_version_4_are_read_and_kept",
        "what a user tuned is left out with a warning",
    ),
    Mutant(
        "the shrink has all the room", "kernels/configs.py",
        "most = max(1, programs // shrink_tiles)", "most = max(1, programs)",
        f"{CONFIGS}tiles_and_their_shrink_are_one_round",
        "a second round of programs: gate_up of 16 experts at 128 tokens takes 78 us, not 68",
    ),
    Mutant(
        "few ranks are streamed too", "kernels/dispatch.py",
        "gate_up = many and is_gate_up(", "gate_up = is_gate_up(",
        f"{CONFIGS}many_ranks_go_ways_of_their_own",
        "gate_up of 17 to 32 tokens with few experts takes the slower kernel",
    ),
]

MUTANTS = [*KERNELS, *DISPATCH, *SHARDING, *ROUTING, *STAGES, *LOADS, *CACHE, *TOOLS, *DEPLOY,
           *FADING, *EMBEDS, *TILES, *BENCHMARKS]  # fmt: skip
