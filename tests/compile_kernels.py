"""Compiles the kernels for a GPU that need not be there, and prints what came out as JSON.

A program of its own, because Triton's interpreter, which other tests use, replaces the compiler.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_adafuse.kernels import (
    add_norm,
    configs,
    context_routes,
    decode_gemm,
    dense_expand,
    dispatch,
    expand,
    fp8_shrink,
    page_shrink,
    shrink,
    spread_routes,
    switch,
    tma_expand,
    tma_gemm,
)
from vllm_adafuse.kernels.device import epilogues

HOPPER, BLACKWELL = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32)
POINTERS = {
    **dict.fromkeys("x_ptr w_ptr bias_ptr a_ptr b_ptr y_ptr out_ptr lora_a_out_ptr".split(), "*bf16"),
    **dict.fromkeys("residual_ptr weight_ptr z_ptr cos_sin_ptr".split(), "*bf16"),
    **dict.fromkeys("gates_ptr partial_ptr weights_ptr".split(), "*fp32"),
    **dict.fromkeys("tile_blocks_ptr token_ptr contexts_ptr requests_ptr rows_ptr".split(), "*i32"),
    **{"c_ptr": "*fp32", "sums_ptr": "*fp64"},
    **dict.fromkeys("split_k_semaphore_ptr semaphore_ptr semaphores_ptr ids_ptr places_ptr".split(), "*i32"),
    **dict.fromkeys("active_ptr table_ptr row_ptr merged_ptr slots_ptr".split(), "*i64"),
    **dict.fromkeys(("keys_ptr", "values_ptr"), "*bf16"),
}
ALIGNED = ("residual_stride", "x_stride", "y_stride", "out_stride", "lora_a_out_stride", "size_in", "rank")
ALIGNED += "split_stride", "block_size", "block_stride", "row_stride", "head_stride"
NO_KV_SLOTS = dict.fromkeys(("keys_ptr", "values_ptr", "slots_ptr", *ALIGNED[-4:]))
NO_KV_SLOTS |= {"KV": False}


def tool(name: str) -> str:
    """cuobjdump or ptxas, which Triton brings along."""
    root = Path(triton.__file__).parent / "backends" / "nvidia"
    return str(next(path for path in root.rglob(f"{name}*") if path.is_file()))


def is_serialized(ptx: str, target: GPUTarget) -> bool:
    """Whether tensor cores wait for each product before the next one, as ptxas says: it does so to
    a whole kernel if it cannot keep one product's sums where they are."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        options = "-v", f"--gpu-name=sm_{target.arch}a", "-o", file.name + ".cubin"
        command = [tool("ptxas"), *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        Path(file.name + ".cubin").unlink()
    return "serialized" in done.stdout + done.stderr


def normalised(ptx: str, name: str) -> str:
    """PTX without what hangs on names and places in the source: comments, line numbers, debug
    sections, the entry's name."""
    text = ptx.split("\t.section\t.debug", 1)[0].replace(name, "kernel")
    text = re.sub(r"//.*", "", text)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(x for x in lines if x and not x.startswith((".loc", ".file", "$L__tmp")))


def build(
    name: str, kernel, constants: dict, warps: int, stages: int, target: GPUTarget = HOPPER
) -> dict:
    """Registers, bytes of spills, global loads narrower than 8 bytes, stores of 2, questions to
    other programs, whether products wait for one another, and a hash of the PTX, `normalised`."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in constants and (POINTERS.get(n, "")[:1] == "*" or n in ALIGNED)
    }
    source = ASTSource(
        kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes
    )
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loads = re.findall(r"ld\.global\S*", built.asm["ptx"])
    narrow = [load for load in loads if not re.search(r"v[24]|b64|u64", load)]
    halves = re.findall(r"st\.global\S*\.b16", built.asm["ptx"])
    return {
        "kernel": name,
        "threads": 32 * warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "narrow": len(narrow),
        "halves": len(halves),
        "acquires": built.asm["ptx"].count(".acquire."),
        "shared": built.metadata.shared,
        "serialized": is_serialized(built.asm["ptx"], target),
        "ptx": hashlib.sha256(normalised(built.asm["ptx"], built.name).encode()).hexdigest()[:16],
    }


def of_fp8() -> list[dict]:
    """Of experts in fp8: as a pool has them, a page for an expert."""
    POINTERS.update(a_ptr="*fp8e4nv", b_ptr="*fp8e4nv", y_ptr="*bf16")
    gate_up = {"WIDTH0": 14336, "WIDTH1": 14336, "WIDTH2": 0, "ADAPTED0": 0, "ADAPTED1": 1, "ADAPTED2": -1}
    qkv = {"WIDTH0": 4096, "WIDTH1": 1024, "WIDTH2": 1024, "ADAPTED0": 0, "ADAPTED1": 1, "ADAPTED2": 2}
    rows = []
    for act, widths, size_out, steps, expands in (
        ("silu", gate_up, 14336, (16, 32), ((128, 8), (300, 32))),
        ("rotary", qkv, 3072, (16,), ((16000, 32),)),
    ):
        number = epilogues.EPILOGUES.index(act)
        turns = {"HALF": 64} if act == "rotary" else {"HALF": 0, "cos_sin_ptr": None}
        shape = widths | turns | {"bias_ptr": None, "HAS_BIAS": False, "EPILOGUE": number} | NO_KV_SLOTS
        for tokens in steps:
            config = dispatch.default_config(tokens, 4096, size_out, act, 2)
            constants = shape | {
                "EVEN": True, "SPLIT_K": config.split_k, "LEAVE": False, "BLOCK_T": tokens,
                "BLOCK_R": 16, "BLOCK_ER": decode_gemm.FP8_BLOCK_ER, "RANK": 16, "ROWS": config.rows, "COLS": config.cols,
                "SHRINK_COLS": config.shrink_cols, "SHRINK_STAGES": shrink.SHRINK_STAGES,
                "PDL": True, "STAGES": config.stages,
            }  # fmt: skip
            name = f"decode_gemm fp8 act={number} tokens={tokens}, listed"
            kernel, listing = decode_gemm._decode_gemm_kernel, constants | {"PADDED": 16}
            rows.append(build(name, kernel, listing, config.warps, config.stages))
        for tokens, pages in expands:
            config, listed = dispatch.choose_expand(tokens, True, 2), tokens > 256
            columns = min(config.columns, 64)
            constants = shape | configs.expert_blocks(pages, 16, False) | {
                "RAW": False, "gates_ptr": None, "ALL": True, "ALL_ADAPTED": True, "EVEN": True,
                "BLOCK_T": config.tokens, "BLOCK_OUT": columns, "LOOP": config.loop,
                "STAGES": config.stages, "PDL": True, "SPLIT_K": 0, "LISTED": 128 * listed,
            } | ({} if listed else {"tile_blocks_ptr": None})  # fmt: skip
            name = f"expand fp8 act={number} tokens={tokens}, {pages} pages"
            rows.append(build(name, expand._expand_kernel, constants, config.warps, 2))
        without = constants | {f"ADAPTED{i}": -1 for i in range(3)} | {"LISTED": 0}
        without |= {"tile_blocks_ptr": None, "ALL_ADAPTED": False}
        name = f"expand fp8 act={number}, no deltas"
        rows.append(build(name, expand._expand_kernel, without, config.warps, 2))
    block_in = shrink.fit_cols(shrink.BLOCK_IN, 16, 64, 2)
    constants = {"BLOCK_T": 64, "BLOCK_R": 16, "BLOCK_IN": block_in, "STAGES": 3, "PDL": True}
    rows.append(build("shrink fp8", shrink._shrink_kernel, constants, 4, 3))
    for block_e, listed in ((1, False), (2, True), (8, True)):
        constants = {
            "RANK": 16, "LISTED": 128 * listed, "PARTS": 8 // block_e, "BLOCK_T": 64,
            "BLOCK_E": block_e, "BLOCK_IN": shrink.fit_cols(fp8_shrink.BLOCK_IN, 16 * block_e, 64, 2),
            "STAGES": shrink.SHRINK_STAGES, "PDL": True,
        } | ({} if listed else {"tile_blocks_ptr": None})  # fmt: skip
        kernel, name = fp8_shrink._fp8_shrink_kernel, f"fp8_shrink of {block_e} pages"
        rows.append(build(name, kernel, constants, 8 if block_e == 8 else 4, 3))
    return rows


def main() -> None:
    qkv = {"WIDTH0": 4096, "WIDTH1": 4096, "WIDTH2": 4096, "ADAPTED0": 0, "ADAPTED1": 1, "ADAPTED2": 2}
    gate_up = qkv | {"WIDTH2": 0, "ADAPTED2": -1}
    rows = []
    # With an activation or the rotary embedding, rows of W in a tile are those of one member.
    for act, size_out, shape, paged in (
        ("", 12288, qkv, NO_KV_SLOTS),
        ("silu", 11008, gate_up, NO_KV_SLOTS),
        ("rotary", 6144, qkv, NO_KV_SLOTS),
        ("rotary", 6144, qkv, {"KV": True}),
    ):
        number = epilogues.EPILOGUES.index(act)
        shape = shape | {"bias_ptr": None, "HAS_BIAS": False, "EPILOGUE": number, "HALF": 0} | paged
        shape |= {"HALF": 64} if act == "rotary" else {"cos_sin_ptr": None}
        number = f"{number}, paged" if shape["KV"] else number
        for tokens in (16, 32):
            config = dispatch.default_config(tokens, 4096, size_out, act, 2, tokens == 16)
            constants = shape | {
                "EVEN": True,
                "SPLIT_K": config.split_k, "LEAVE": False,
                "BLOCK_T": tokens, "BLOCK_R": 16, "BLOCK_ER": 128, "RANK": 16,
                "ROWS": config.rows, "COLS": config.cols, "SHRINK_COLS": config.shrink_cols,
                "SHRINK_STAGES": shrink.SHRINK_STAGES, "PDL": True,
                "STAGES": config.stages,
            }  # fmt: skip
            kernel = decode_gemm._decode_gemm_kernel
            for listed in (False, True):
                name = f"decode_gemm act={number} tokens={tokens}" + ", listed" * listed
                listing = constants | {"PADDED": 16 * listed}
                rows.append(build(name, kernel, listing, config.warps, config.stages))
        for tokens in (64, 128):
            config = dispatch.default_config(tokens, 4096, size_out, act, 2, True)
            config = config or configs.GemmConfig(64, 64, stages=3)
            tall, piece1 = config.pieces
            constants = shape | {
                "SPLIT_K": 1, "SHRINK_SPLIT_K": config.shrink_split_k, "RANK": 16, "EXPERTS": 8,
                "RANKS": 128 * (2 if act == "silu" else 3), "SHRINK_ROWS": tma_gemm.SHRINK_ROWS,
                "LISTED": False,
                "BLOCK_T": tokens, "BLOCK_E": 16,
                "ROWS": tall, "PIECE1": piece1, "COLS": config.cols, "STAGES": config.stages,
                "PDL": True, "WAITS": True,
            }  # fmt: skip
            members = 2 if act else 1
            for name, block in {
                "x": (tokens, config.cols), "a": (tma_gemm.SHRINK_ROWS, config.cols),
                "lora_a_out": (tokens, config.cols),
                **dict.fromkeys(("w", "b", "up"), (members, tall, config.cols)),
                **dict.fromkeys(
                    ("piece1_w", "piece1_b", "piece1_up"), (members, piece1 or tall, config.cols)
                ),
            }.items():  # fmt: skip
                POINTERS[f"{name}_desc"] = f"tensordesc<bf16[{', '.join(map(str, block))}]>"
            kernel = tma_gemm._tma_gemm_kernel
            name = f"tma_gemm act={number} tokens={tokens}"
            if act != "silu":
                constants |= {"up_desc": None, "piece1_up_desc": None}
            rows.append(build(name, kernel, constants, config.warps, config.stages))
            later = constants | {"WAITS": False}
            for target in (HOPPER, BLACKWELL):
                full = f"{name}, two loops, sm_{target.arch}"
                rows.append(build(full, kernel, later, config.warps, config.stages, target))
        for tokens in (128, 16000):
            config = dispatch.choose_expand(tokens, act != "", 2)
            columns = min(config.columns, 64) if act == "rotary" else config.columns
            constants = shape | configs.expert_blocks(8, 16, False) | {
                "RAW": True, "ALL": True, "ALL_ADAPTED": True, "EVEN": True,
                "BLOCK_T": config.tokens, "BLOCK_OUT": columns,
                "LOOP": config.loop, "STAGES": config.stages, "PDL": True, "SPLIT_K": 0,
                "LISTED": 0, "tile_blocks_ptr": None,
            }  # fmt: skip
            name = f"expand act={number} tokens={tokens}"
            rows.append(build(name, expand._expand_kernel, constants, config.warps, 2))
            if tokens == 128 and not act:
                name, constants = f"{name}, slices", constants | {"SPLIT_K": 2}
                rows.append(build(name, expand._expand_kernel, constants, config.warps, 2))
        widths = [shape[f"WIDTH{i}"] for i in range(3) if shape[f"WIDTH{i}"]]
        for tokens, experts, many in ((2048, 8, 0), (16000, 8, 0), (16000, 16, 0), (16000, 32, 1)):
            config, half = dispatch.choose_wide(tokens, tuple(widths), act), shape["HALF"]
            config = dispatch.choose_wide_many(config) if many else config
            _, constants = tma_expand._plan(experts, 16, tuple(widths), act, half, config, True)
            constants = {k: v for k, v in constants.items() if k.isupper()} | paged
            constants |= {} if act == "rotary" else {"cos_sin_ptr": None}
            constants |= {"LISTED": 128 * many, "MANY": many > 0}
            constants |= {} if many else {"tile_blocks_ptr": None}
            block = f"tensordesc<bf16[{config.tokens}, {config.columns}]>"
            POINTERS.update(y_desc=block, out_desc=block)
            POINTERS["b_desc"] = f"tensordesc<bf16[{config.columns}, 128]>"
            POINTERS["lora_a_out_desc"] = f"tensordesc<bf16[{config.tokens}, 128]>"
            name, kernel = f"tma_expand act={number} {tokens}", tma_expand._tma_expand_kernel
            name += f", E={experts}" if experts != 8 else ""
            name += ", blocks in turn" if many else ""
            rows.append(build(name, kernel, constants, config.warps, config.stages))
    for tokens in (1, 100, 16000):
        split, expands = 2 * (tokens == 1), tokens > 1000
        config = dispatch.choose_norm(4096, expands, split > 0, 2)
        POINTERS["y_ptr"] = "*fp32" if split else "*bf16"
        constants = configs.expert_blocks(8, 16, False) | {
            "WIDTH": 4096, "SPLIT_K": split, "EXPAND": expands, "PDL": True, "STAGES": config.stages,
            "BLOCK_T": config.tokens, "COLS": config.columns, "NORM_COLS": config.norm_columns,
        }  # fmt: skip
        constants |= {} if expands else {"lora_a_out_ptr": None}
        kernel = add_norm._add_norm_kernel
        rows.append(build(f"add_norm tokens={tokens}", kernel, constants, config.warps, 3))
    for experts, first, rank in ((16, 8, 16), (64, 8, 16), (20, 0, 40)):
        _, bound = dense_expand._plan(experts, first, rank, True)
        constants = {k: v for k, v in bound.constants.items() if k.isupper()}
        warps, name = bound.constants["num_warps"], f"weigh E={experts} r={rank}"
        rows.append(build(name, dense_expand._weigh_kernel, constants, warps, 3))
    block_in = shrink.fit_cols(shrink.BLOCK_IN, 16, 64, 2)
    constants = {"BLOCK_T": 64, "BLOCK_R": 16, "BLOCK_IN": block_in, "STAGES": 3}
    constants["PDL"] = True
    rows.append(build("shrink", shrink._shrink_kernel, constants, 4, 3))
    config = page_shrink.CONFIG
    POINTERS["x_desc"] = f"tensordesc<bf16[{config.tokens}, {config.columns}]>"
    POINTERS["a_desc"] = f"tensordesc<bf16[128, {config.columns}]>"
    constants = {
        "RANKS": 512, "TILE_TOKENS": 128, "BLOCK_T": config.tokens, "BLOCK_R": 128,
        "BLOCK_IN": config.columns, "STAGES": config.stages, "PDL": True,
    }  # fmt: skip
    kernel = page_shrink._page_shrink_kernel
    rows.append(build("page_shrink", kernel, constants, config.warps, config.stages))
    kernel = spread_routes._spread_routes_kernel
    for experts in (8, 256):
        constants = {"BLOCK_T": 256, "BLOCK_E": experts, "ONE": True}
        rows.append(build(f"spread_routes E={experts}", kernel, constants, 8, 3))
    for ring, experts in ((1, 8), (4, 8), (4, 128)):
        constants = {"BLOCK_T": 16, "BLOCK_E": experts, "RING": ring}
        kernel = context_routes._context_routes_kernel
        rows.append(build(f"context_routes ring={ring} E={experts}", kernel, constants, 4, 3))
    for dtype, rank in ((tl.bfloat16, 16), (tl.bfloat16, 64), (tl.float32, 64)):
        config = switch.SwitchConfig.choose(dtype.primitive_bitwidth // 8, 2 * rank, [4096])
        constants = {
            "merged_ptr": None, "TYPE": dtype, "TOP_K": 2, "RANK": rank, "BLOCK_C": 2 * rank,
            "CHUNKS": 1, "SLOTS": 2, "FIELDS": switch.FIELDS, "ALIGN": 16, "EVEN": True,
            "FULL": True, "ROWS": config.rows, "COLS": config.cols, "STRIP": config.strip,
            "STAGES": config.stages,
        }  # fmt: skip
        name = f"switch {dtype} r={rank}"
        rows.append(build(name, switch._switch_kernel, constants, config.warps, config.stages))
    print(json.dumps(rows + of_fp8()))


if __name__ == "__main__":
    main()
