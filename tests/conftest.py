"""Runs before any test imports vLLM."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    # The models are too small for threads: they would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# On a GPU an engine's process takes its memory and its graphs along when it ends.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if HAS_GPU else "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # apply_model, collective_rpc
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# The files that take longest, first: then processes that share the tests end together.
LONG = "test_tutorial", "test_engine", "test_server", "test_compiled"


def pytest_collection_modifyitems(items):
    """GPU tests run where there is a GPU, and only they do there: the rest needs a CPU build."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONG))
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
