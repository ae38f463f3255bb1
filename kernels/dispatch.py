"""Which kernel runs: every limit at which a choice changes, and the choices.

`plan` says of a projection and a number of tokens which kernels compute it and how they are cut;
launchers branch on a plan and on nothing else. Choices hang on shapes, the number of tokens and the
device alone, never on routes: so that one captured CUDA graph per size is right for every routing.

Every limit on tokens is a power of two, and one of `TOKEN_LIMITS`: warm-up runs steps on both sides
of each. Figures are of an H200 unless they say otherwise, those of limits at the commit named.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from vllm_adafuse.kernels.configs import (
    BLOCK_ER,
    MAX_BITS,
    MAX_SPLIT_K,
    ExpandConfig,
    GemmConfig,
    NormConfig,
    configs_of,
    expert_blocks,
    shape_key,
)
from vllm_adafuse.kernels.device.epilogues import is_gate_up, tiled_widths
from vllm_adafuse.kernels.plans import (
    ADD_NORM,
    CUBLAS,
    DECODE_GEMM,
    EXPAND,
    FP8_SHRINK,
    NONE,
    PAGE_SHRINK,
    SHRINK,
    TMA_EXPAND,
    TMA_GEMM,
    Device,
    Plan,
    Shape,
)
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# W is streamed up to so many tokens, but before a rotary embedding, up to the second number where that
# is the better config, and tiled up to the third: then cuBLAS is faster. (a24accf, 3772b8a, b1bfbb7:
# streaming 128 tokens takes 42.7 us for qkv, cuBLAS 30; tiles are the better config from 17 on.)
MAX_STREAM_ONLY_TOKENS, MAX_STREAM_TOKENS = 16, 32
MAX_TILE_TOKENS = 128
# Beyond so many tokens tiles are for a rotary embedding: a norm of so many programs leaves no processor
# for each streamed tile (dc5dc15: qkv of 8 tokens 19.7 us streamed, 27.3 tiled, of 16 24.1 and 19.4).
MAX_UNTILED_TOKENS = 8
# So many rows of a tile outside of x cost more than to copy it (dc5dc15, qkv: 32 4.1 us, 16 0.3).
MIN_MISSING_ROWS = 24
# With more ranks over all experts 17 to 32 tokens are streamed: tiles would take inactive experts
# along (dc5dc15: E 64, 24 tokens, gate_up 84 us, 95 tiled, but qkv 42 and 37), more left to cuBLAS, but
# 33 to 64 of qkv and down (56: gate_up 94 us tiled, 91; o 28.4, 24.5; qkv 38, 39; down 51, 57; d08f767:
# 128, qkv 95, 42). gate_up is streamed from 129 ranks to the second (7bf8d2a: E 16 61, 65; E 32 78, 75).
MAX_TILED_RANKS, MAX_STREAMED_GATE_UP_RANKS = 512, 256
# Beyond 128 ranks the shrink outlasts a streamed W unless its steps are long, and rotary's other
# programs leave room for it (b4c16c0: E 32, 8 tokens, qkv 24.3 us, 21.6; of 4 mixtures 28.1, 25.4).
MANY_SHRINK_COLS, MAX_MANY_STAGES = 512, 4
# Of an H100 or H200 (7bf8d2a: gate_up, E 16, 128 tokens, in 144 programs 78.3 us, in 114 67.8); and
# `in` beyond o's (128 tokens, E 16: down 45.3 us tiled, 49.8 by cuBLAS, o 22.0 and 20.9).
PROCESSORS, MIN_LONG_IN = 132, 8192
# Rows of W, or pairs of them, with which whole tiles are programs enough: to add up split-K sums
# within the kernel costs 0.9 to 1.8 us more than the norm does (87f739b). Tiles for a large GPU (b1bfbb7).
MIN_TILED_ROWS = 3072
# Of fewer programs tiles are halved (d08f767: qkv of 3072 rows of pairs, in 48 tiles 19.8 us, in 96
# 18.8; of 5120, in 80 48.0, in 160 57.2; streamed, of 2304, in 72 17.1, in 144 22.0).
MIN_TILES = 66
# Tiles that are one round of a large GPU beside the shrink: of whole ones (d08f767: 75 pairs of
# 14336 64.5 us, 76.1 in two rounds; 8192 even), of slices before a norm (down 36.9 us in 86, 44.9
# in 129), and programs up to which streamed tiles are cut into slices (o in 192 13.6, in 128 14.6).
MAX_ROUND_TILES, MAX_NORM_TILES, MAX_STREAM_PROGRAMS = 116, 112, 190
# Tiles of few rows end here, and those of norms: beyond, cuBLAS and an expand, for shared memory
# has no place for them. (d08f767, 64 tokens: o 16.5 us tiled, 18.7 by cuBLAS, down 38.1 and 41.3.)
MAX_LOW_TILE_TOKENS = 64
# The expand adds a bias at no cost; longer steps have no place for it (7fbd763: at once 6 to 115 us less).
MAX_BIAS_TOKENS = 256
# With fewer tokens the expand asks of each expert if it is active, where one product has not all.
# (d08f767, E 64: one token of qkv 11.4 us, 12.8 without, o 11.7 and 10.8; four 19.0 and 14.1.)
MIN_DENSE_TOKENS = 2
# Two slices of `in` for cuBLAS end here (d08f767: down of 70B 180 us in slices, 194 without, 512
# tokens 332 and 322), and `expand`, where `tma_expand` takes the ranks: of gate_up beyond tiles already
# (e1dd462, gate_up, qkv: 200 tokens 99.6 us for 93.0, 28.3 for 28.7; 512 197 for 186, 66.8 for 51.9;
# 1000 419 for 381, 102 for 88; E 64, 1504 tokens 1102 for 728, 352 for 213).
MAX_SHORT_TOKENS = 256
# Longer steps have long programs in `expand` (e1dd462: 512 tokens of qkv 66.8 us, 51.9 in short ones).
MAX_SHORT_EXPAND_TOKENS = 1024
# Below, pages are for `expand`, which goes by lists too; longer steps have large programs.
MIN_WIDE_TOKENS = 4096
# Rows of A from which those steps shrink by the pages that their tiles list, fewer all of them with W
# (3cc4061: qkv of 32 pages, 1536 rows, with W 651 us, by lists 593; of 16 581, 584; down of 32 1404, 1484).
MIN_PAGE_SHRINK_ROWS = 1536
# Ranks of all experts, up to which long steps take cuBLAS for those beyond one product, or for all
# before a norm (d08f767, 8192 tokens: o 633 us for 1060 at E r 1024, 791 for 1656 at 2048). Beyond, as
# with 8 ranks an expert, `expand` multiplies all, for two to four times as long (f34e476, 64/32/2: 375, 959).
MAX_DENSE_RANKS = 2048
# From so many tokens on the norm adds the deltas: before, its programs are too few. (d08f767: o and
# down 277 and 705 us so at 4096, 251 and 667 else; at 8192 488 and 1357, 490 and 1414.)
MIN_FUSED_NORM_TOKENS = 8192
# Over a quantised W: shrink by its own kernel; beyond, by one product over all experts (d08f767, with
# the expand: at 64 qkv 9.4 us for 12.9, down 12.0 for 12.8; at 128 12.0 for 13.7, 16.6 for 13.6).
MAX_SHRINK_TOKENS = 64
# Up to so many tokens `active` tells the truth; longer steps touch all experts, and say so: one program
# has to know them all (d08f767, `spread_routes` at 256: E 64 4.4 us for 5.7; at 512 8.8 for 5.8). A
# layer's own router tells it to fewer (d08f767, qkv, E 16: 8 tokens 26.1 us for 24.8, 16 28.0 for 23.9).
MAX_ACTIVE_TOKENS = 256
MAX_LAYER_ACTIVE_TOKENS = 8
# Layer-wise: tokens of a program of `route_layer` change here (d08f767: at 512 and 1024 within 2 %);
# beyond, one float32 product for W, A and the routers would write too much (d08f767: at 256 qkv
# 33.3 us for 38.8; at 512 57.2 for 58.5, gate_up 226 for 199).
MAX_SMALL_ROUTE_TOKENS = 512
MAX_LAYER_FUSED_TOKENS = 256

TOKEN_LIMITS = (
    MIN_DENSE_TOKENS, MAX_UNTILED_TOKENS, MAX_LAYER_ACTIVE_TOKENS, MAX_STREAM_ONLY_TOKENS,
    MAX_STREAM_TOKENS, MAX_LOW_TILE_TOKENS, MAX_SHRINK_TOKENS, MAX_TILE_TOKENS, MAX_BIAS_TOKENS,
    MAX_SHORT_TOKENS, MAX_ACTIVE_TOKENS, MAX_LAYER_FUSED_TOKENS, MAX_SMALL_ROUTE_TOKENS,
    MAX_SHORT_EXPAND_TOKENS, MIN_WIDE_TOKENS, MIN_FUSED_NORM_TOKENS,
)  # fmt: skip


@functools.cache
def plan(shape: Shape, num_tokens: int, device: Device) -> Plan:
    """Which kernels compute a projection of T tokens, and how they are cut. Rows of its input begin at
    multiples of 16 bytes wherever `size_in` elements are one."""
    if not shape.fused or shape.fp8 and num_tokens > MAX_STREAM_TOKENS:
        few = num_tokens <= MAX_SHRINK_TOKENS and not (shape.fp8 and shape.num_experts > MAX_BITS)
        return Plan(SHRINK if few else FP8_SHRINK if shape.fp8 else CUBLAS, expand=EXPAND)
    if config := gemm_config(shape, num_tokens, device):
        return config_plan(shape, config)
    return cublas_plan(shape, num_tokens, device)


def config_plan(shape: Shape, config: GemmConfig) -> Plan:
    """With a kernel of ours, cut like this."""
    split_k = config.split_k if shape.epilogue == "norm" else 1
    return Plan(TMA_GEMM if config.tma else DECODE_GEMM, config, split_k, True)


@functools.cache
def cublas_plan(shape: Shape, num_tokens: int, device: Device) -> Plan:
    """With cuBLAS, whatever the number of tokens."""
    s, norm = shape, shape.epilogue == "norm"
    if norm and product_split_k(s, num_tokens) > 1:
        return Plan(CUBLAS, None, product_split_k(s, num_tokens), True, EXPAND)
    # Rows of the result begin at multiples of 16 bytes, which cuBLAS's best kernels need.
    aligned = s.fused_rows * s.itemsize % 16 == 0
    lists = lists_shrink(s, num_tokens, device)
    one_gemm = aligned and not lists and (not s.has_bias or num_tokens <= MAX_BIAS_TOKENS)
    kernel = PAGE_SHRINK if lists else CUBLAS
    if norm and num_tokens >= MIN_FUSED_NORM_TOKENS and not s.tile_blocks:
        dense = BLOCK_ER < s.ranks <= MAX_DENSE_RANKS
        return Plan(kernel, None, 1, one_gemm, NONE if dense else ADD_NORM, 0 if dense else None)
    if not (s.has_bias and one_gemm):  # else a bias is to be added, which `expand` alone does
        if tma_expands(s, num_tokens, one_gemm, device):
            first = experts_at_once(s.num_experts, s.rank)
            dense_from = first if first < s.num_experts and not s.tile_blocks else None
            return Plan(kernel, None, 1, one_gemm, TMA_EXPAND, dense_from)
    return Plan(kernel, None, 1, one_gemm, EXPAND)


def gemm_config(shape: Shape, num_tokens: int, device: Device) -> GemmConfig | None:
    """The config of a kernel of ours for W and A: the tuned one of a near number of tokens, or
    `default_config`. None: cuBLAS is faster."""
    s = shape
    if num_tokens > MAX_TILE_TOKENS:
        return None
    key = s.size_in, s.tiled_rows, s.epilogue, s.itemsize
    some, many = MAX_STREAM_ONLY_TOKENS < num_tokens <= MAX_STREAM_TOKENS, s.ranks > BLOCK_ER
    most, rotary, norm = s.ranks > MAX_TILED_RANKS, s.epilogue == "rotary", s.epilogue == "norm"
    gate_up = many and is_gate_up(s.kernel_epilogue)
    long = norm and s.size_in > MIN_LONG_IN and s.itemsize == 2
    if some and (most and not rotary or gate_up and s.ranks <= MAX_STREAMED_GATE_UP_RANKS):
        return default_config(num_tokens, *key)
    by_cublas = gate_up or norm and not long
    if most and num_tokens > (MAX_STREAM_TOKENS if by_cublas else MAX_LOW_TILE_TOKENS):
        return None
    tma, few = can_tile(s, device), most and rotary and num_tokens <= MAX_STREAM_ONLY_TOKENS
    like = min(num_tokens, MAX_UNTILED_TOKENS) if few else num_tokens  # streamed, by the list
    found = find_config(device.name, power_of_2(like), *key, tma)
    if found is None and many and tma and long:
        split_k = min(MAX_SPLIT_K, max(1, MAX_NORM_TILES // cdiv(s.tiled_rows, 128)))
        found = GemmConfig(128, 128, split_k, 4, 3, shrink_split_k=4, tma=True)
    if many and found and found.tma:  # configs are tuned for 128 ranks
        tiles = sum(cdiv(w, found.rows) for w in tiled_widths(s.widths, s.kernel_epilogue))
        room, shrinks = PROCESSORS - tiles * found.split_k, cdiv(s.fused_rows - s.size_out, 64)
        # Three linears wait longer for a shrink in one piece (d08f767: E 32, 32 tokens, 31.6 us, 29).
        least = 2 if rotary and (most or num_tokens <= MAX_STREAM_TOKENS) else 1
        return found.with_room(max(room, least * shrinks), shrinks)
    if many and found:
        stages = min(found.stages, MAX_MANY_STAGES) if rotary else found.stages
        return replace(found, shrink_cols=MANY_SHRINK_COLS, stages=stages)
    return found


def can_tile(shape: Shape, device: Device) -> bool:
    """Whether the tensor memory accelerator is there, and can read all: rows of x, W and A, and of
    B and s (all experts together), begin at multiples of 16 bytes, and none is in fp8."""
    whole = math.gcd(shape.size_in, shape.ranks) * shape.itemsize % 16 == 0
    return device.hopper and whole and not shape.fp8


@functools.cache
def find_config(
    device: str, tokens: int, size_in: int, rows: int, epilogue: str, itemsize: int, tma: bool
) -> GemmConfig | None:
    """The tuned config of the nearest number of tokens, or `default_config`.

    Args:
        device: its name.
        tokens: of the step, a power of two: all numbers up to it are cut alike.
        size_in: elements of `in`.
        rows: of W; of one member where rows come in pairs (gate of gate_up, half heads of qkv).
        epilogue: "", "silu", "gelu_tanh", "rotary", or "norm", which adds up split-K sums.
        itemsize: bytes of an element.
        tma: `can_tile`.
    """
    tuned = configs_of(device).get(shape_key(size_in, rows, epilogue, itemsize), {})
    fits = {t: config for t, config in tuned.items() if serves(config, tokens, tma)}
    if not fits:
        return default_config(tokens, size_in, rows, epilogue, itemsize, tma)
    return fits[min(fits, key=lambda t: (abs(math.log2(t / tokens)), t))]


def serves(config: GemmConfig | None, tokens: int, tma: bool) -> bool:
    """Whether a config, or cuBLAS, is one for so many tokens, with the accelerator or without."""
    if config is None:
        return tokens > MAX_STREAM_TOKENS
    return tokens <= (MAX_TILE_TOKENS if config.tma else MAX_STREAM_TOKENS) and config.tma <= tma


def default_config(
    tokens: int, size_in: int, rows: int, epilogue: str, itemsize: int, tma: bool = False
) -> GemmConfig | None:
    """A sane config for any device; None: cuBLAS is faster. `find_config` has the arguments."""
    least = MAX_UNTILED_TOKENS if epilogue == "rotary" else MAX_STREAM_ONLY_TOKENS
    tiles = tma and least < tokens <= MAX_TILE_TOKENS
    config = _tiled(tokens, size_in, rows, epilogue, itemsize) if tiles else None
    if tokens > MAX_STREAM_TOKENS:
        return config
    streams_better = itemsize > 2 or (epilogue == "norm" and size_in <= 8192)
    if config and not streams_better:
        return config
    return _streamed(tokens, rows, epilogue, itemsize, tma)


def _tiled(tokens: int, size_in: int, rows: int, epilogue: str, itemsize: int) -> GemmConfig | None:
    if epilogue == "norm":
        if tokens > MAX_LOW_TILE_TOKENS:
            return None
        if itemsize > 2:
            return GemmConfig(32, 32, min(MAX_SPLIT_K, max(1, cdiv(128, cdiv(rows, 32)))), tma=True)
        if size_in <= 8192:
            return GemmConfig(64, 128, 1, 4, 5, shrink_split_k=2, tma=True)
        split_k = min(MAX_SPLIT_K, max(1, MAX_NORM_TILES // cdiv(rows, 96)))
        return GemmConfig(96, 128, split_k, 4, 5, shrink_split_k=4, tma=True)
    pairs = bool(epilogue)
    if rows < (MIN_TILED_ROWS if pairs else 2 * MIN_TILED_ROWS):
        return None
    if tokens > MAX_LOW_TILE_TOKENS and not pairs:
        return None
    if itemsize > 2:
        return GemmConfig(32, 32, 1, 4, 3, tma=True)
    if epilogue in ("", "rotary"):
        if cdiv(rows, 64) < MIN_TILES:
            stages = 5 if tokens <= MAX_LOW_TILE_TOKENS else 4
            return GemmConfig(32, 128, 1, 4, stages, shrink_split_k=2, tma=True)
        if tokens <= MAX_LOW_TILE_TOKENS:
            return GemmConfig(64, 128, 1, 4, 4, shrink_split_k=2, tma=True)
        return GemmConfig(64, 64, 1, 8, 6, shrink_split_k=2, tma=True)
    # A second round costs as much as the first.
    one_round = cdiv(rows, 96) <= MAX_ROUND_TILES
    if tokens <= MAX_LOW_TILE_TOKENS:
        config = (96, 128, 1, 4, 3) if one_round else (64, 64, 1, 4, 4)
    else:
        tall = not one_round and cdiv(rows, 128) <= MAX_ROUND_TILES
        config = (128, 64, 1, 8, 4) if tall else (96, 64, 1, 8, 5)
    return GemmConfig(*config, shrink_split_k=2, tma=True)


def _streamed(tokens: int, rows: int, epilogue: str, itemsize: int, roomy: bool) -> GemmConfig:
    # Hopper's processors have room for 110 kB; others must do with less.
    few, pairs = tokens <= MAX_STREAM_ONLY_TOKENS, epilogue not in ("", "norm")
    cols, most = 128 if itemsize == 2 else 64, 1 if pairs else 3
    height = 64 if roomy or not pairs or not few else 32
    while height > 16 and cdiv(rows, height) * most < MIN_TILES:
        height //= 2
    if epilogue == "rotary" and few and roomy:
        return GemmConfig(min(height, 32), cols, 1, 4, 6 if cdiv(rows, 32) <= PROCESSORS else 4)
    if epilogue == "rotary":
        return GemmConfig(height, cols // 2, 1, 4, 6 if roomy else 4)
    if pairs:
        return GemmConfig(height, cols if few else cols // 2, 1, 4, 3 if few else 4)
    # Programs that fill a second round by a fifth alone wait for that fifth.
    tiles = cdiv(rows, height)
    split_k = min(most, cdiv(MAX_STREAM_PROGRAMS, tiles))
    # One round of two slices beats more of three (d08f767: 3584 rows, 8 tokens 11.2 us, 12.0).
    if few and epilogue == "norm" and split_k > 1 and roomy and 2 * tiles <= MAX_ROUND_TILES:
        return GemmConfig(height, cols, 2, 4, 6, 512, 2)
    shrink_split_k = 1 if split_k == 1 else 2 if few else 3
    stages = 3 if few and epilogue == "norm" else 4
    shrink_cols = 512 if few and split_k > 1 else 256
    return GemmConfig(height, cols, split_k, 4, stages, shrink_cols, shrink_split_k)


def product_split_k(shape: Shape, num_tokens: int) -> int:
    """Slices of `in` for cuBLAS before a norm, in short steps where one product of the expand has
    all experts. Two, where whole tiles of W leave half of the processors idle, or `in` is long."""
    s, rows = shape, shape.fused_rows
    if not MAX_STREAM_ONLY_TOKENS < num_tokens <= MAX_SHORT_TOKENS or s.itemsize != 2:
        return 1
    small = 2048 <= s.size_in and rows <= 66 * 64 or s.size_in > 8192
    if not small or s.size_in % 32 or rows % 8:
        return 1
    return 2 if expert_blocks(s.num_experts, s.rank, False)["ONE"] else 1


def lists_shrink(shape: Shape, num_tokens: int, device: Device) -> bool:
    """Whether a step takes `page_shrink`: long, and over many pages."""
    many = shape.tile_blocks and shape.fused_rows - shape.size_out >= MIN_PAGE_SHRINK_ROWS
    return many and num_tokens >= MIN_WIDE_TOKENS and shape.itemsize == 2 and can_tile(shape, device)


def in_wide_ranks(experts: int, rank: int) -> bool:
    """Whether `tma_expand` takes experts of this rank, after `dense_expand` if they are many. Of 8
    ranks it takes no fewer than one whole product."""
    ranks = experts * rank
    fits = 16 <= rank <= BLOCK_ER or rank == 8 and ranks > BLOCK_ER
    return fits and not rank & (rank - 1) and ranks <= MAX_DENSE_RANKS


def in_whole_tiles(shape: Shape) -> bool:
    """Whether every slice has experts, and columns come in tiles of 64, or of heads."""
    s = shape
    if s.adapted != tuple(range(len(s.widths))) or s.head_dim not in (0, 32, 64, 128):
        return False
    return not any(width % (s.head_dim or 64) for width in s.widths)


def experts_at_once(experts: int, rank: int) -> int:
    """Places for experts in one product: the first of them, or more than there are."""
    return min(power_of_2(experts), BLOCK_ER // rank)


def tma_expands(shape: Shape, num_tokens: int, one_gemm: bool, device: Device) -> bool:
    """Whether `tma_expand` is the one to take: many tokens, ranks that it has, columns in whole
    tiles, and the tensor memory accelerator can read the product."""
    s = shape
    most = MAX_TILE_TOKENS if is_gate_up(s.kernel_epilogue) else MAX_SHORT_TOKENS
    short = num_tokens < MIN_WIDE_TOKENS if s.tile_blocks else num_tokens <= most
    rows = s.fused_rows if one_gemm else s.size_out
    if short or not device.hopper or s.itemsize != 2 or rows % 8:
        return False
    return (s.tile_blocks or in_wide_ranks(s.num_experts, s.rank)) and in_whole_tiles(s)


@functools.cache
def choose_expand(tokens: int, epilogue: bool, itemsize: int) -> ExpandConfig:
    """How `expand` is cut."""
    if tokens <= MAX_SHORT_EXPAND_TOKENS or itemsize > 2:
        block_t = min(64 if itemsize == 2 else 32, max(16, power_of_2(tokens)))
        return ExpandConfig(block_t, 64, 1, 4, 1)
    return ExpandConfig(64, 64, 8, 4, 1 if epilogue else 3)


@functools.cache
def choose_wide(tokens: int, widths: tuple[int, ...], epilogue: str) -> ExpandConfig:
    """How `tma_expand` is cut. Found on an H200 at the shapes of Llama-2-7B."""
    # Two programs to a processor, and about as many as have a place at once: each begins by
    # fetching its s.
    if tokens < MIN_WIDE_TOKENS:
        columns = 32 if epilogue else 64
        tiles = sum(tiled_widths(widths, epilogue)) // columns * cdiv(tokens, 64)
        loop = round(math.log2(max(1, tiles / (2 * PROCESSORS))))
        return ExpandConfig(64, columns, 1 << min(4, loop), 4, 3)
    if is_gate_up(epilogue):
        groups = max(2, (1 << 15) // power_of_2(tokens))
        return ExpandConfig(128, 32, cdiv(widths[0] // 32, groups), 8, 3)
    # Others gain or lose 4 % (d08f767); 32 heads take a register too many with pages.
    return ExpandConfig(64, 32, 16, 4, 3) if epilogue else ExpandConfig(128, 64, 8, 8, 3)


def choose_wide_many(config: ExpandConfig) -> ExpandConfig:
    """The same for tokens with several blocks of pages: few tiles, whose programs have s of two."""
    return replace(config, tokens=min(config.tokens, 64), warps=4, stages=2, loop=min(config.loop, 8))


@functools.cache
def choose_norm(width: int, expand: bool, is_split: bool, itemsize: int) -> NormConfig:
    """How `add_norm` is cut. Found on an H200 at the shapes of Llama-2-7B."""
    whole = power_of_2(width)
    if not expand:
        return NormConfig(1, whole, whole, 8 if is_split or whole > 4096 else 4)
    if itemsize > 2:
        return NormConfig(32, 32, 32, 8)
    return NormConfig(64, 64, 128, 8, 3)
