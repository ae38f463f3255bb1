"""Whole numbers in launchers: plain Python, since Triton's own cost microseconds on every call."""


def cdiv(count: int, size: int) -> int:
    """How many pieces of a size hold so many."""
    return -(-count // size)


def power_of_2(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()


def token_counts(most: int) -> list[int]:
    """Numbers of tokens up to `most`, one of each kind that kernels tell apart, falling.

    Blocks are powers of two, and every limit stands at one: so those, their neighbours, and what
    lies between.
    """
    powers = [1 << i for i in range(most.bit_length())]
    near = {p + d for p in powers for d in (-1, 0, 1)} | {p * 3 // 2 for p in powers}
    return sorted((n for n in near | {most} if 1 <= n <= most), reverse=True)
