"""Whole numbers in launchers: plain Python, since Triton's own cost microseconds on every call."""


def cdiv(count: int, size: int) -> int:
    """How many pieces of a size hold so many."""
    return -(-count // size)


def power_of_2(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()
