"""One colour per expert, the same in the terminal and on the page."""

from __future__ import annotations

import colorsys

GOLDEN_ANGLE = 137.50776  # degrees: any number of hues in a row stay well apart


def hue(expert: int) -> float:
    """Degrees on the colour wheel."""
    return round(expert * GOLDEN_ANGLE % 360, 1)


def level(expert: int) -> int:
    """-1, 0 or 1: lightness changes with every dozen, when hues begin to crowd."""
    return (0, 1, -1)[expert // 12 % 3]


def terminal_style(expert: int) -> str:
    """Rich's style: black on a light tint, readable on dark and light terminals."""
    rgb = colorsys.hls_to_rgb(hue(expert) / 360, 0.72 + 0.12 * level(expert), 0.65)
    return "black on #" + "".join(f"{round(255 * part):02x}" for part in rgb)
