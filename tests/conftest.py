"""Runs before any test imports vLLM."""

import atexit
import gc
import getpass
import os
import tempfile

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    # The models are too small for threads: they would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Where torch is told to be on another CPU, its compiler would take what it made for this one.
if CAPABILITY := os.environ.get("ATEN_CPU_CAPABILITY"):
    OWN_CACHE = f"torchinductor_{getpass.getuser()}_{CAPABILITY}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), OWN_CACHE))
# On a GPU an engine's process takes its memory and its graphs along when it ends.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if HAS_GPU else "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # apply_model, collective_rpc
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def sums_of_sixteen(monkeypatch):
    """The interpreter's products as tensor cores make them, sixteen terms at a time: the order of
    every sum is this one and no library's, so that a token's bits may be held to depend on nothing
    but the token. (On a GPU the tensor cores' own.)"""
    if HAS_GPU:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, acc, *_):
        left, right, sums = (t.data.astype("float64") for t in (a, b, acc))
        for start in range(0, left.shape[1], 16):
            some = 0
            for k in range(start, min(start + 16, left.shape[1])):
                some = some + left[:, k, None] * right[k]  # of float32, exact
            sums = (sums + some).astype("float32").astype("float64")
        return interpreter.TensorHandle(sums.astype("float32"), acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


# The files that take longest, first: then processes that share the tests end together.
LONG = "test_tutorial", "test_engine", "test_server", "test_compiled"


def pytest_collection_modifyitems(items):
    """GPU tests run where there is a GPU, and only they do there: the rest needs a CPU build."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONG))
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish():
    """All that was imported stays: no collection need walk through it."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # the interpreter takes it apart at its end
