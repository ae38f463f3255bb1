"""Configs: tuned ones are kept and found again; a damaged file is named and left out."""

import json
import logging

import pytest
import torch
from vllm_adafuse.kernels import configs
from vllm_adafuse.kernels.configs import GemmConfig, configs_file, save_configs, shape_key
from vllm_adafuse.kernels.dispatch import (
    TOKEN_LIMITS,
    choose_expand,
    choose_wide,
    default_config,
    find_config,
    gemm_config,
    plan,
    product_split_k,
)
from vllm_adafuse.kernels.plans import TMA_EXPAND, Device, Shape, on_pages
from vllm_adafuse.kernels.shrink import ShrinkGrid
from vllm_adafuse.kernels.whole import token_counts

SHAPE = (4096, 11008, "silu", 2)
GATE_UP = Shape(4096, (11008, 11008), (0, 1), 8, 16, 2, "silu")
DEVICE = "NVIDIA Test (80 GB)"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (configs.configs_of, find_config):
        function.cache_clear()
    yield
    for function in (configs.configs_of, find_config):
        function.cache_clear()


def test_the_nearest_number_of_tokens_is_taken():
    one, sixteen = GemmConfig(32, 64, 1, 4, 2), GemmConfig(64, 64, 1, 8, 4)
    path = save_configs(DEVICE, {shape_key(*SHAPE): {1: one, 16: sixteen}}, {"command": "test"})
    assert path == configs_file(DEVICE) and path.name == "tiles-NVIDIA-Test-80-GB.json"
    found = {tokens: find_config(DEVICE, tokens, *SHAPE, True) for tokens in (1, 2, 4, 8, 16, 32)}
    assert found == {1: one, 2: one, 4: one, 8: sixteen, 16: sixteen, 32: sixteen}
    other = 4096, 4096, "", 2
    assert find_config(DEVICE, 1, *other, True) == default_config(1, *other, True)
    assert find_config("other", 1, *SHAPE, True) == default_config(1, *SHAPE, True)


def test_a_cut_serves_only_steps_that_it_can():
    streamed, tiled = GemmConfig(32, 64, 1, 4, 2), GemmConfig(64, 64, 1, 4, 4, tma=True)
    save_configs(DEVICE, {shape_key(*SHAPE): {8: streamed, 32: tiled, 128: None}}, {})
    assert find_config(DEVICE, 32, *SHAPE, True) == tiled == find_config(DEVICE, 64, *SHAPE, True)
    assert find_config(DEVICE, 32, *SHAPE, False) == streamed
    assert find_config(DEVICE, 64, *SHAPE, False) is None
    assert find_config(DEVICE, 128, *SHAPE, True) is None
    assert gemm_config(GATE_UP, 129, Device(DEVICE, 9)) is None


def test_the_package_brings_cuts_that_can_be_read():
    for path in configs.packaged_file(DEVICE).parent.glob("*.json"):
        assert configs._read(path), path


def test_a_second_run_keeps_other_shapes():
    save_configs(DEVICE, {"a": {1: GemmConfig(16)}, "b": {1: GemmConfig(16)}}, {})
    save_configs(DEVICE, {"a": {1: GemmConfig(32), 8: GemmConfig(64)}}, {"command": "again"})
    content = json.loads(configs_file(DEVICE).read_text())
    assert content["configs"]["a"].keys() == {"1", "8"} and content["configs"]["a"]["1"]["rows"] == 32
    assert content["configs"]["b"]["1"]["rows"] == 16 and content["how"] == {"command": "again"}


def test_files_of_version_4_are_read_and_kept():
    path = configs_file(DEVICE)
    path.parent.mkdir(parents=True)
    old = {"rows": 32, "cols": 64, "split": 3, "warps": 8, "stages": 2, "slices": 5, "tma": False}
    path.write_text(json.dumps({"version": 4, "cuts": {"a": {"1": old, "64": None}}}))
    read = GemmConfig(32, 64, 3, 8, 2, shrink_split_k=5)
    assert configs._read(path) == {"a": {1: read, 64: None}}
    save_configs(DEVICE, {"a": {8: GemmConfig(16)}}, {})
    content = json.loads(path.read_text())
    assert content["version"] == 5 and content["configs"]["a"]["1"]["split_k"] == 3
    assert configs._read(path) == {"a": {1: read, 8: GemmConfig(16), 64: None}}


@pytest.mark.parametrize(
    "text,said",
    [
        ("{", "Expecting"),
        ('{"version": 9, "configs": {}}', "its version is 9, expected 5"),
        ('{"version": 5, "cuts": {}}', "configs"),
        ('{"version": 5, "configs": {"a": {"1": {"rows": 48}}}}', "rows is 48"),
        ('{"version": 5, "configs": {"a": {"1": {"heads": 8}}}}', "heads"),
        ("[]", "list"),
    ],
)
def test_a_damaged_file_is_named_and_left_out(text, said, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    path = configs_file(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level("WARNING", "vllm.adafuse"):
        assert find_config(DEVICE, 1, *SHAPE, True) == default_config(1, *SHAPE, True)
    assert str(path) in caplog.text and said in caplog.text and "vllm-adafuse tune" in caplog.text


def test_tokens_up_to_a_power_of_two_are_cut_alike():
    device = Device(DEVICE, 9)
    assert gemm_config(GATE_UP, 17, device) == gemm_config(GATE_UP, 32, device)


def test_a_bad_cut_is_refused():
    with pytest.raises(ValueError, match="rows is 48, expected a power of two"):
        GemmConfig(48)
    with pytest.raises(ValueError, match="split_k is 9"):
        GemmConfig(split_k=9)


@pytest.mark.parametrize("rows,height", [(11008, 96), (14336, 128), (13824, 128), (18944, 96)])
def test_long_tiles_take_one_round_of_processors_where_they_can(rows, height):
    assert default_config(128, 4096, rows, "silu", 2, True).rows == height


# Of Mistral-7B, Llama-3-70B, Llama-2-7B and 13B.
@pytest.mark.parametrize("rows", [3072, 5120, 6144, 7680])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 32, 64, 128])
def test_a_projection_of_heads_has_programs_for_a_large_gpu(rows, tokens):
    config = default_config(tokens, 4096, rows, "rotary", 2, True)
    assert 66 <= -(-rows // config.rows) <= 240 and config.tma == (tokens > 8)


@pytest.mark.parametrize("rows", [2304, 2560])  # of Qwen2.5-7B and Llama-3.2-3B
def test_programs_are_not_halved_twice_for_a_second_round(rows):
    assert {default_config(t, 4096, rows, "rotary", 2, True).rows for t in (1, 16)} == {32}


def test_slices_before_a_norm_are_one_round():
    def split_k(rows, tokens):
        return default_config(tokens, 4096, rows, "norm", 2, True).split_k

    assert [split_k(rows, 8) for rows in (3072, 3584, 4096, 8192)] == [2, 2, 3, 2]
    assert split_k(3584, 17) == 3


def test_every_limit_is_one_that_warm_up_steps_over():
    counts = set(token_counts(16384))
    for limit in TOKEN_LIMITS:
        assert {limit - 1, limit, limit + 1} <= counts


def llama3(experts, name):
    """A projection of Llama-3-8B with experts of rank 16."""
    size_in, widths, epilogue = {
        "qkv": (4096, (4096, 1024, 1024), "rotary"),
        "o": (4096, (4096,), "norm"),
        "gate_up": (4096, (14336, 14336), "silu"),
        "down": (14336, (4096,), "norm"),
    }[name]
    adapted, dim = tuple(range(len(widths))), 128 * (epilogue == "rotary")
    return Shape(size_in, widths, adapted, experts, 16, 2, epilogue, dim)


@pytest.mark.parametrize(
    "name,experts",
    [(name, experts) for name in ("qkv", "gate_up", "down") for experts in (8, 16, 32)]
    + [("down", 64)],  # whose tiles are split
)
def test_tiles_and_their_shrink_are_one_round(experts, name):
    shape = llama3(experts, name)
    for tokens in (32, 128):
        config = plan(shape, tokens, Device("NVIDIA H200", 9)).config
        if config is None or not config.tma:
            continue
        tiles = -(-shape.tiled_rows // config.rows) * config.split_k
        shrinks = -(-(shape.fused_rows - shape.size_out) // 64) * config.shrink_split_k
        if (experts, name, tokens) == (32, "qkv", 32):
            assert config.shrink_split_k == 2  # in short pieces all the same
        else:
            assert tiles + shrinks <= 132, tokens


def test_many_ranks_go_ways_of_their_own():
    def kernels(experts, tokens):
        names = ("qkv", "o", "gate_up", "down")
        plans = [plan(llama3(experts, n), tokens, Device("NVIDIA H200", 9)) for n in names]
        return [one.kernel for one in plans]

    tiled, streamed, cublas = "tma_gemm", "decode_gemm", "cublas"
    assert kernels(8, 32) == [tiled, streamed, tiled, tiled]
    assert kernels(16, 32) == [tiled, streamed, streamed, tiled]
    assert kernels(8, 128) == [tiled, cublas, tiled, cublas]
    assert kernels(16, 128) == [tiled, cublas, tiled, tiled]
    assert kernels(32, 32) == [tiled, streamed, tiled, tiled]
    assert kernels(8, 16) == [tiled, streamed, streamed, streamed] and kernels(8, 8) == [streamed] * 4
    assert kernels(64, 32) == [tiled, streamed, streamed, streamed]
    assert kernels(64, 16) == [streamed] * 4
    assert kernels(64, 33) == kernels(64, 64) == [tiled, cublas, cublas, tiled]
    assert kernels(32, 64) == [tiled] * 4 and kernels(64, 65) == [cublas] * 4


def test_where_the_wide_expand_begins():
    def least(shape):
        return min(t for t in (128, 129, 256, 257, 4095, 4096)
                   if plan(shape, t, Device("NVIDIA H200", 9)).expand == TMA_EXPAND)  # fmt: skip

    for experts in (8, 64):
        assert least(llama3(experts, "qkv")) == 257 == least(llama3(experts, "down"))
        assert least(llama3(experts, "gate_up")) == 129
    assert least(on_pages(llama3(64, "gate_up"))) == 4096  # by lists


@pytest.mark.parametrize("tokens, loops", [(129, (1, 4, 1)), (304, (2, 8, 1)), (4095, (16, 16, 16))])
def test_short_steps_have_two_programs_of_the_wide_expand_to_a_processor(tokens, loops):
    for name, loop in zip(("qkv", "gate_up", "o"), loops):
        shape = llama3(8, name)
        config = choose_wide(tokens, shape.widths, shape.kernel_epilogue)
        assert config.loop == loop and config.tokens == 64 and config.warps == 4


def test_a_streamed_projection_of_many_ranks_has_a_shrink_in_long_steps():
    device = Device("NVIDIA H200", 9)
    few, many = (gemm_config(llama3(experts, "qkv"), 8, device) for experts in (8, 32))
    assert few.shrink_cols < many.shrink_cols == 512 and few.stages > many.stages == 4
    few, many = (gemm_config(llama3(experts, "gate_up"), 8, device) for experts in (8, 32))
    assert few.stages == many.stages and many.shrink_cols == 512


@pytest.mark.parametrize("linears, slots", [(1, 16), (2, 16), (3, 24)])
def test_slots_of_a_shrink_for_tokens(linears, slots):
    grid = ShrinkGrid.of(torch.empty(linears, 32, 16, 512), 2).for_tokens(8, 32)
    assert grid.slots == slots


def test_slices_of_cublas_meet_programs_of_one_tile():
    # Programs of several tiles read s once, before their loop, and of the first slice alone.
    down = Shape(28672, (8192,), (0,), 8, 16, 2, "norm")
    sliced = [tokens for tokens in range(1, max(TOKEN_LIMITS) + 2) if product_split_k(down, tokens) > 1]
    assert sliced and {choose_expand(tokens, False, 2).loop for tokens in sliced} == {1}
