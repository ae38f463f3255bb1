"""What is compared, each as a mixture to train (static LoRA is a mixture of one expert)."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_adafuse.training import MixtureConfig

from benchmarks.quality.sizes import Size


@dataclass(frozen=True)
class Method:
    """One way to adapt the backbone.

    Attributes:
        name: in files and on the command line.
        label: in tables.
        group: "all weights", "static", "layer-wise" or "pre-gated".
        mixture: None trains all weights.
        teacher: the layer-wise method that is distilled, if any.
        tune_experts: distilling trains the experts too.
        main: the comparison needs it; others are trained last, and dropped first where time is
            limited.
    """

    name: str
    label: str
    group: str
    mixture: MixtureConfig | None = None
    teacher: str | None = None
    tune_experts: bool = False
    main: bool = True

    @property
    def active_rank(self) -> int | None:
        """Rank at work for a token."""
        return self.mixture.top_k * self.mixture.r if self.mixture else None

    @property
    def total_rank(self) -> int | None:
        """Rank of all experts."""
        return self.mixture.num_experts * self.mixture.r if self.mixture else None


def methods(size: Size) -> dict[str, Method]:
    """All methods of the experiment, as tables list them."""
    r, experts = size.r, size.experts

    def mixture(k: int = 2, **options) -> MixtureConfig:
        return MixtureConfig(num_experts=experts, top_k=k, r=r, **options)

    def static(rank: int) -> MixtureConfig:
        return MixtureConfig(num_experts=1, top_k=1, r=rank)

    contexts = (1, 2) if size.layers >= 4 else (1,)
    linear = mixture(routing="layer_wise", router_scope="linear")
    block = mixture(routing="layer_wise", router_scope="block")
    # Fewer routers to imitate than with one per linear, and as good a teacher.
    teacher = "layerwise-block"
    made = [
        Method("full", "all weights", "all weights", main=False),
        Method("lora-active", f"LoRA, r = {2 * r}", "static", static(2 * r)),
        Method("lora-total", f"LoRA, r = {experts * r}", "static", static(experts * r),
               main=False),
        Method("layerwise-linear", "layer-wise, per linear", "layer-wise", linear),
        Method("layerwise-block", "layer-wise, per block", "layer-wise", block),
        Method("adafuse-k1", "AdaFuse, k = 1", "pre-gated", mixture(1)),
        Method("adafuse-k2", "AdaFuse, k = 2", "pre-gated", mixture(2)),
        Method("adafuse-k4", "AdaFuse, k = 4", "pre-gated", mixture(4)),
        *(Method(f"context-{m}", f"AdaFuse, decides at layer {m}", "pre-gated",
                 mixture(router_layer=m), main=m == contexts[-1]) for m in contexts),
        Method("distilled", "AdaFuse, distilled, experts kept", "pre-gated", mixture(),
               teacher, main=False),
        Method("distilled-tuned", "AdaFuse, distilled, experts tuned", "pre-gated", mixture(),
               teacher, True),
    ]  # fmt: skip
    return {method.name: method for method in made}
