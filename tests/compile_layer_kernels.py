"""Compiles the kernels of layer-wise routing, as `compile_kernels` does those of one decision."""

import json

from compile_kernels import NO_KV_SLOTS, POINTERS, build
from vllm_adafuse.kernels import expand
from vllm_adafuse.kernels.configs import expert_blocks
from vllm_adafuse.kernels.device import epilogues
from vllm_adafuse.kernels.dispatch import choose_expand
from vllm_adafuse.kernels.layerwise import ffn_down, ffn_mix
from vllm_adafuse.kernels.layerwise import route as route_layer

POINTERS |= dict.fromkeys(("lora_a_out_ptr", "logits_ptr", "scales_ptr"), "*fp32")
POINTERS |= {"gemm_out_ptr": "*bf16", "weighted_ptr": "*bf16", "temperature": "fp32"}


def main() -> None:
    rows = []
    route = {
        "SPLIT_FACTOR": 2048.0, "EXPERTS": 8, "NUM_ALL_EXPERTS": 8, "RANK": 16, "TOP_K": 2,
        "SOFTMAX_FIRST": False, "ABSOLUTE": False, "SHARED": False, "PLAIN": False,
        "HAS_LOGITS": True, "HAS_BIAS": True, "PDL": True, "BLOCK_E": 8, "BLOCK_C": 128,
    }  # fmt: skip
    plans = {
        "qkv": {"ROUTERS": 3, "SPLITS": 3, "LINEARS": 3},
        "block": {"ROUTERS": 1, "SPLITS": 1, "LINEARS": 2, "NUM_ALL_EXPERTS": 9, "PLAIN": True,
                  "BLOCK_E": 16},
        "shared": {"ROUTERS": 1, "SPLITS": 1, "LINEARS": 1, "SHARED": True, "ABSOLUTE": True},
        "reads": {"ROUTERS": 1, "SPLITS": 0, "LINEARS": 1, "HAS_LOGITS": False, "HAS_BIAS": False,
                  "bias_ptr": None, "logits_ptr": None},
        "softmax first": {"ROUTERS": 2, "SPLITS": 1, "LINEARS": 2, "SOFTMAX_FIRST": True},
        "no linears": {"ROUTERS": 1, "SPLITS": 3, "LINEARS": 0},
    }  # fmt: skip
    POINTERS["bias_ptr"] = "*fp32"
    for name, plan in plans.items():
        for tokens, one in ((1, True), (8, True), (2, False), (8, False)):
            constants = route | plan | {"ONE": one, "BLOCK_T": tokens}
            kernel = route_layer._route_layer_kernel
            title = f"route_layer {name} tokens={tokens} one={one}"
            rows.append(build(title, kernel, constants, 4, 3))
    for slots in (0, 2):
        for adapted in ((0, 1), (0, -1)):
            constants = {
                "WIDTH": 11008, "ADAPTED0": adapted[0], "ADAPTED1": adapted[1], "EXPERTS": 8,
                "NUM_ALL_EXPERTS": 9,
                "RANK": 16, "SLOTS": slots, "EPILOGUE": epilogues.EPILOGUES.index("silu"),
                "BLOCK_T": 16, "BLOCK_C": 64, "BLOCK_R": 16,
            }  # fmt: skip
            kernel = ffn_mix._ffn_mix_kernel
            rows.append(build(f"ffn_mix slots={slots} adapted={adapted}", kernel, constants, 4, 3))
    for always, shared in ((0, False), (1, True)):
        num_all_experts = 8 + always
        constants = {
            "EXPERTS": 8, "NUM_ALL_EXPERTS": num_all_experts, "RANK": 16, "SHARED": shared, "BLOCK_E": 8,
            "LORA_A_SIZE": 16 * (1 + always if shared else num_all_experts), "BLOCK_C": 128,
        }  # fmt: skip
        name = f"ffn_down always={always} shared={shared}"
        rows.append(build(name, ffn_down._slots_kernel, constants, 4, 3))
    # What a product in float32 leaves, to bfloat16.
    POINTERS["bias_ptr"] = POINTERS["lora_a_out_ptr"] = "*bf16"
    POINTERS["y_ptr"] = "*fp32"
    for act, widths, tokens in (
        ("", (4096, 4096, 4096), 4),
        ("", (4096, 4096, 4096), 128),
        ("silu", (11008, 11008, 0), 128),
    ):
        config = choose_expand(tokens, act != "", 2)
        constants = expert_blocks(8, 16, False) | {
            "WIDTH0": widths[0], "WIDTH1": widths[1], "WIDTH2": widths[2],
            "ADAPTED0": 0, "ADAPTED1": 1, "ADAPTED2": 2 if widths[2] else -1,
            "bias_ptr": None, "HAS_BIAS": False, "EPILOGUE": epilogues.EPILOGUES.index(act), "HALF": 0,
            "cos_sin_ptr": None, "gates_ptr": None, **NO_KV_SLOTS,
            "RAW": False, "SPLIT_K": 0, "ALL": True, "ALL_ADAPTED": True, "EVEN": True,
            "PDL": True, "BLOCK_T": config.tokens, "BLOCK_OUT": config.columns,
            "LOOP": config.loop, "STAGES": config.stages,
        }  # fmt: skip
        name = f"expand of float32 act={act} tokens={tokens}"
        rows.append(build(name, expand._expand_kernel, constants, config.warps, 2))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
