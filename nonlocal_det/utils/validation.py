"""Argument checks whose errors list what would be right."""

from __future__ import annotations

from typing import Optional


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError that lists the choices unless ``value`` is one of them."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} is {value!r}; it must be one of {listed}.")


def check_positive_int(name: str, value: object, divides: Optional[dict[str, int]] = None) -> None:
    """Raise a ValueError unless ``value`` is a positive integer that divides the numbers named."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
    for other, number in (divides or {}).items():
        if number % value:
            raise ValueError(f"{name} is {value}; it must divide {other}, which is {number}.")
