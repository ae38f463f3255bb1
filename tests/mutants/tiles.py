"""Faults of projections of few tokens: deltas of lists, and room for whole tiles."""

from __future__ import annotations

from mutants.mutant import Mutant

STREAM = "tests/test_decode_gemm.py::test_"

TILES = [
    Mutant(
        "a list's second block of s is the first", "kernels/decode_gemm.py",
        "b, b_up, s, s_up = later, later_up, later_s, later_s_up", "b, b_up = later, later_up",
        f"{STREAM}a_token_does_not_see_its_company[1024-40-4]",
        "with more than 128 active ranks a token gets other experts' sums",
    ),
    Mutant(
        "gate's s for up", "kernels/decode_gemm.py",
        "    s_up = s\n    if APART:", "    s_up = s\n    if False:",
        f"{STREAM}a_list_of_blocks_for_both_members",
        "up_proj's experts beyond the first 128 ranks multiply gate's sums",
    ),
    Mutant(
        "qkv of many experts is tiled early", "kernels/dispatch.py",
        "if few else num_tokens  # streamed", "if False else num_tokens  # streamed",
        "tests/test_dispatch.py::test_many_ranks_go_ways_of_their_own",
        "9 tokens of 64 experts take all 1024 ranks along",
    ),
    Mutant(
        "rows that are not there", "kernels/room.py",
        "if room - there < MIN_MISSING_ROWS:", "if True:",
        "tests/test_room.py::test_what_lacks_much_of_a_tile_is_copied",
        "the accelerator fills most of a tile with zeros: qkv of 20 tokens takes 26 us for 18",
    ),
    Mutant(
        "room beyond the memory", "kernels/room.py",
        "there = min(room, (elements - x.shape[1]) // x.stride(0) + 1)", "there = room",
        "tests/test_room.py::test_rows_that_are_in_memory_are_counted",
        "a tile reads what may not be mapped",
    ),
    Mutant(
        "no room is left", "kernels/room.py",
        "room = tile_tokens(tokens) if tiled and on_hopper(like) else tokens", "room = tokens",
        "tests/test_room.py::test_results_of_steps_that_are_tiled_have_room",
        "every tiled projection copies its input",
    ),
]
