"""What a source does not say, and the user must."""

from __future__ import annotations

from dataclasses import dataclass

GKS = ("subtract", "done")
EXPERT_LORA = ("used", "ignored")


@dataclass(frozen=True)
class Options:
    """Options of a conversion; None: not given.

    Attributes:
        top_k: k, or one for each layer of the backbone (MoLA does not save it).
        gks: whether Arrow's general knowledge is still to be subtracted from the experts.
        expert_lora: whether MixLoRA's `expert_lora` counts (MoE-PEFT) or not (pip mixlora).

    Raises:
        ValueError: a value that none of these can have.
    """

    top_k: int | tuple[int, ...] | None = None
    gks: str | None = None
    expert_lora: str | None = None

    def __post_init__(self):
        ks = self.top_k if isinstance(self.top_k, tuple) else (self.top_k or 1,)
        if not ks or any(k < 1 for k in ks):
            raise ValueError(f"top_k is {self.top_k}, expected integers of at least 1")
        for name, known in (("gks", GKS), ("expert_lora", EXPERT_LORA)):
            if (value := getattr(self, name)) is not None and value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {known}")

    def given(self) -> set[str]:
        """Names of the options that were given."""
        return {name for name, value in vars(self).items() if value is not None}
