"""The compute of AdaFuse: one op per file, registered as `torch.ops.vllm_adafuse.*`.

    gate           hidden states          -> routes   (live router; fills the passports once)
    gather_routes  token ids, passports   -> routes   (one gather per step)
    shrink         x, A, routes           -> s        (rank-space activations of chosen experts)
    expand         s, B, routes, y        -> y + delta

A route is a pair of [T, k] tensors, expert ids (int32) and weights (float32), written once per
step and read by every layer. Nothing here imports vLLM. Importing the package registers the ops.
"""

from vllm_adafuse.kernels.expand import expand
from vllm_adafuse.kernels.gate import gate
from vllm_adafuse.kernels.gather_routes import gather_routes
from vllm_adafuse.kernels.shrink import shrink

__all__ = ["expand", "gate", "gather_routes", "shrink"]
