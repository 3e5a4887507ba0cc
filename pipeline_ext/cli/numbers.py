"""Parses the numbers of options. Each function is a ``type=`` of argparse."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole_number(text, 1)


def count_or_zero(text: str) -> int:
    """A whole number of at least 0."""
    return _whole_number(text, 0)


def counts(text: str) -> list[int]:
    """One or more whole numbers of at least 1, with commas between them."""
    return [count(part) for part in text.split(",")]


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def noise(text: str) -> float:
    """A coefficient of variation."""
    value = _number(text)
    if not 0 <= value <= 1000:
        raise ArgumentTypeError(f"{text!r} is not a coefficient of variation, from 0 to 1000")
    return value


def seconds(text: str) -> float:
    """A time such as 500ms, 5s or 1m; a number without a unit is in seconds."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(ms|s|m|)", text)
    if not found or not 0 < float(found[1]) < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a time; write it as in 500ms, 5s or 1m")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def cost(text: str) -> float | list[float]:
    """One or more finite numbers of at least 0, with commas between them."""
    return _one_or_more(text, lambda number: 0 <= number < math.inf, "a number of at least 0")


def factors(text: str) -> list[float]:
    """The same, as a list in any case."""
    found = cost(text)
    return found if isinstance(found, list) else [found]


def speed(text: str) -> float | list[float]:
    """One or more numbers above 0, inf included, with commas between them."""
    return _one_or_more(text, lambda number: number > 0, "a number above 0")


def _one_or_more(text: str, is_right: Callable[[float], bool], what: str) -> float | list[float]:
    numbers = [_number(part) for part in text.split(",")]
    if not all(map(is_right, numbers)):
        raise ArgumentTypeError(f"{text!r} is not {what}, or several with commas between them")
    return numbers if len(numbers) > 1 else numbers[0]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**63:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value
