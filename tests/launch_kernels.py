"""Launches a kernel on a Hopper GPU that is not there, and prints as JSON what reached its driver.

A program of its own, because Triton's interpreter, which other tests use, replaces the compiler.
"""

import itertools
import json
import threading

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels import launch as module
from vllm_adafuse.kernels.launch import compile_only, launch

reached = []
numbers = itertools.count(1)


class Utils:
    def load_binary(self, *arguments):
        return 0, next(numbers), 100, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, *arguments):
        pass


class Launcher:
    def __init__(self, source, metadata):
        self.overlaps = metadata.launch_pdl
        self.made_by_main = threading.current_thread() is threading.main_thread()

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        if enter is not None:
            enter(metadata)
        # An address stands for its tensor.
        values = [str(v.data_ptr() if isinstance(v, torch.Tensor) else v) for v in arguments]
        reached.append([function, [x, y, z], stream, self.overlaps, values])


class Driver:
    utils, launcher_cls = Utils(), Launcher
    device = 0

    def get_current_device(self):
        return self.device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@triton.jit(do_not_specialize=["count"])
def kernel(x_ptr, bias_ptr, y_desc, count, stride, scale, HAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < count, other=0.0) * scale
    if HAS:
        x += tl.load(bias_ptr + at)
    y_desc.store([0, 0], x.to(y_desc.dtype)[None, :])


def main() -> None:
    driver.set_active(Driver())
    memory = torch.zeros(256)
    half, y = memory.half(), torch.zeros(1, 64)
    usual = {"x": memory, "bias": memory, "y": y, "count": 64, "stride": 16, "scale": 0.5,
             "HAS": True, "BLOCK": 64}  # fmt: skip
    changes = {
        "usual": {}, "another number": {"count": 1}, "another long stride": {"stride": 32},
        "another address": {"x": memory[4:]}, "misaligned": {"x": memory[1:]}, "dtype": {"x": half},
        "odd stride": {"stride": 5}, "stride of one": {"stride": 1}, "odd like one": {"stride": 17},
        "long": {"stride": 1 << 40},
        "no bias": {"bias": None, "HAS": False}, "block": {"BLOCK": 32},
        "y of another dtype": {"y": y.half()}, "device": {},
    }  # fmt: skip
    rows = {}
    for name, change in changes.items():
        Driver.device = int(name == "device")
        v = usual | change
        block = [1, v["BLOCK"]]
        arguments = (
            v["x"], v["bias"], TensorDescriptor.from_tensor(v["y"], block),
            v["count"], v["stride"], v["scale"],
        )  # fmt: skip
        constants = {"BLOCK": v["BLOCK"], "HAS": v["HAS"], "num_warps": 2, "launch_pdl": True}
        reached.clear()
        for _ in range(3):
            launch(kernel, (3, 2), *arguments, **constants)
        kernel[(3, 2)](*arguments, **constants)
        rows[name] = list(reached)
    Driver.device = 0
    try:
        launch(kernel, (1,), *arguments, True, BLOCK=64)
    except TypeError as e:
        refused = str(e)
    hooked, hooks = [], knobs.runtime.launch_enter_hook
    hooks.add(hook := lambda metadata: hooked.append(metadata.get()["name"]))
    launch(kernel, (3, 2), *arguments, **constants)
    hooks.remove(hook)
    launch(kernel, (3, 2), *arguments, **constants)
    reached.clear()
    module._compiled.clear()
    kernel.device_caches.clear()
    with compile_only() as built:
        for x in (memory, memory[1:], memory):
            launch(kernel, (1,), x, None, TensorDescriptor.from_tensor(y, [1, 64]), 3, 1, 1.5,
                   BLOCK=64, HAS=False, num_warps=2)  # fmt: skip
    loaded = next(numbers)
    launch(kernel, (1,), memory, None, TensorDescriptor.from_tensor(y, [1, 64]), 3, 1, 1.5,
           BLOCK=64, HAS=False, num_warps=2)  # fmt: skip
    alone = all(ready.run.made_by_main for ready in module._compiled.values())
    after = [len(built), len(reached), next(numbers) - loaded, alone]
    print(json.dumps({"rows": rows, "compiled only": after, "refused": refused, "hooked": hooked}))


if __name__ == "__main__":
    main()
