"""Adapters whose answers can only be NaN or Inf: values are finite, what is made of them is not.

Estimates take inputs of size 1, as a norm leaves them: a sum of n products has about the size of
the weights' norm. So a warning means that usual inputs overflow, not that some input might.
"""

from __future__ import annotations

import math

import torch
from vllm_adafuse.format.adapter import Adapter, open_weights
from vllm_adafuse.format.config import CONFIG_FILE, WEIGHTS_FILE
from vllm_adafuse.format.tensor_file import TORCH_DTYPES, TensorFile
from vllm_adafuse.format.values import one_thread
from vllm_adafuse.text import show, some

_FLOAT32 = torch.finfo(torch.float32).max


@one_thread()
def overflow_warnings(adapter: Adapter, dtype: torch.dtype | None = None) -> list[str]:
    """One sentence for everything that overflows.

    Args:
        adapter: a checked adapter.
        dtype: in which the backbone is served; None: one with the range of float32.

    Raises:
        AdapterError: the weights cannot be read any more.
    """
    with open_weights(adapter.path / WEIGHTS_FILE) as weights:
        return _Estimates(adapter, weights, dtype or torch.bfloat16).warnings()


class _Estimates:
    def __init__(self, adapter: Adapter, weights: TensorFile, dtype: torch.dtype):
        self.adapter, self.config, self.weights = adapter, adapter.config, weights
        self.dtype = str(dtype).removeprefix("torch.")
        self.most = torch.finfo(dtype).max
        self.largest = {name: self._largest(name) for name in adapter.tensors}
        self.alike: dict[str, list[str]] = {}

    def warnings(self) -> list[str]:
        found = self._routers()
        for name, value in self.largest.items():
            if not name.endswith(("router.weight", "router.bias")) and value > self.most:
                self._say(name, f"holds values that are infinite in {self.dtype}, in which it is "
                          "served")  # fmt: skip
        for kind, scales in (
            ("lora", self.config.scales),
            ("always", (self.config.always_scale,)),
        ):
            names = self.adapter.projections if kind == "lora" else self.adapter.always_on
            for name in names:
                self._pair(name, kind, scales)
        lines = (f"{WEIGHTS_FILE}: tensor {some(n)}: {text}" for text, n in self.alike.items())
        return [*found, *lines]

    def _say(self, name: str, text: str) -> None:
        self.alike.setdefault(text, []).append(name)

    def _largest(self, name: str) -> float:
        entry = self.weights.entries[name]
        pieces = self.weights.pieces(entry.start, entry.end, TORCH_DTYPES[entry.dtype])
        return max((float(piece.abs().max()) for piece in pieces), default=0.0)

    def _routers(self) -> list[str]:
        """Logits are float32: one that is infinite makes all weights NaN."""
        temperature, found = self.config.temperature, []
        for name in self.largest:
            if not name.endswith("router.weight"):
                continue
            bias = self.largest.get(f"{name.removesuffix('weight')}bias", 0.0)
            width = self.adapter.tensors[name].shape[-1]
            if (self.largest[name] * math.sqrt(width) + bias) / temperature <= _FLOAT32:
                continue
            norm = float(self.weights.read(name).double().norm(dim=-1).max())
            if norm + bias > _FLOAT32:
                self._say(name, f"logits of about {norm + bias:.1e} are infinite in float32, and "
                          "all weights NaN")  # fmt: skip
            elif (norm + bias) / temperature > _FLOAT32:
                found.append(
                    f"{CONFIG_FILE}: `router.temperature` is {show(temperature)}: logits of about "
                    f"{norm + bias:.1e} divided by it are infinite in float32, and all weights NaN"
                )
        return found[:1]

    def _pair(self, name: str, kind: str, scales: tuple[float, ...]) -> None:
        """s B (A x) of every expert of a linear."""
        a, b = f"{name}.{kind}_A", f"{name}.{kind}_B"
        rank, size_in = self.adapter.tensors[a].shape[-2:]
        scale = max(map(abs, scales))
        low = self.largest[a] * math.sqrt(size_in)
        # No more than this, whatever the values: most adapters are done here.
        most = scale * low * max(1.0, self.largest[b] * math.sqrt(rank))
        if most <= self.most and low <= _FLOAT32:
            return
        norms = self.weights.read(a).view(-1, rank, size_in).double().norm(dim=-1)
        up = self.weights.read(b).double().view(-1, self.adapter.tensors[b].shape[-2], rank)
        blamed, worst, worst_scale = [], 0.0, 0.0
        for expert, weight in enumerate(up):
            norm, factor = norms[expert % len(norms)], abs(scales[expert])
            inner = float(norm.max())
            size = max(factor * inner, factor * float((weight * norm).norm(dim=-1).max()))
            if size > self.most or inner > _FLOAT32:
                blamed.append(str(expert))
                if max(size, inner) > worst:
                    worst, worst_scale = max(size, inner), factor
        if blamed:
            who = f"expert {blamed[0]} adds" if len(blamed) == 1 else f"experts {some(blamed)} add"
            self._say(
                a,
                f"with {kind}_B and a scale of {worst_scale:.3g}, {who} about {worst:.1e} to the "
                f"linear, which is infinite in {self.dtype}, so that a token's answer is NaN",
            )
