"""Argument checks whose error messages list the valid values."""

from __future__ import annotations

from typing import Optional


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that a value is one of the choices.

    Args:
        name: Name of the argument or config key, for the error message.
        value: Value to check.
        choices: Valid values.

    Raises:
        ValueError: If it is not; the message lists the choices.
    """
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} is {value!r}; it must be one of {listed}.")


def check_positive_int(name: str, value: object, divides: Optional[dict[str, int]] = None) -> None:
    """Check that a value is a positive integer, and a divisor of other numbers.

    Args:
        name: Name of the argument or config key, for the error message.
        value: Value to check.
        divides: Numbers that the value must divide, by name.

    Raises:
        ValueError: If it is not.
    """
    check_int_in(name, value, 1)
    for other, number in (divides or {}).items():
        if number % value:
            raise ValueError(f"{name} is {value}; it must divide {other}, which is {number}.")


def check_int_in(name: str, value: object, minimum: int, maximum: Optional[int] = None) -> None:
    """Check that a value is an integer in a range.

    Args:
        name: Name of the argument or config key, for the error message.
        value: Value to check.
        minimum: Smallest valid value.
        maximum: Largest valid value; None for no limit.

    Raises:
        ValueError: If it is not.
    """
    too_large = maximum is not None and isinstance(value, int) and value > maximum
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum or too_large:
        limit = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise ValueError(f"{name} is {value!r}; it must be an integer of {limit}.")
