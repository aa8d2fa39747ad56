"""Checks of plain numbers that a user sets."""

import numbers


def check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """Raises a TypeError unless `value` is an integer, a ValueError unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        wanted = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value}")


def check_number(name: str, value: object) -> None:
    """Raises a TypeError unless `value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
