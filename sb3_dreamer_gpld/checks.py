"""Whether a value is allowed, and the text of the error if it is not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def unknown_name(kind: str, name: object, allowed: Iterable[str], brief: bool = False) -> str:
    """Text of the error for a name that does not exist, with the closest one that does.

    :param kind: what it should be the name of
    :param name: what was given
    :param allowed: those that exist
    :param brief: list these only if none is close to the name and they are fewer than 100, in alphabetical order
    """
    allowed = [str(each) for each in allowed]
    close = [each for each in allowed if each.lower() == str(name).lower()]
    close = close or difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    text = f"{kind} {name!r} does not exist"
    if not brief:
        return f"{text}.{hint} Allowed: {', '.join(allowed)}."
    if close:
        return f"{text}.{hint}"
    return f"{text}. Allowed: {', '.join(sorted(allowed))}" if len(allowed) < 100 else text


def check_int(name: str, value: Any, minimum: int) -> int:
    """:return: the value as an int

    :param name: what to call it in the error
    :param value: to check; True and False are no numbers here
    :param minimum: smallest that is allowed
    :raises ValueError: it is no whole number, or too small
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, not {value!r}")
    return int(value)


def check_bool(name: str, value: Any) -> None:
    """
    :param name: what to call it in the error
    :param value: to check
    :raises ValueError: it is neither True nor False
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_range(name: str, value: Any, low: float, high: float, low_open: bool = False) -> None:
    """
    :param name: what to call it in the error
    :param value: to check
    :param low, high: smallest and largest that are allowed
    :param low_open: ``low`` itself is not
    :raises ValueError: it is no finite number, or outside
    """
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < low or value > high or (low_open and value == low):
        raise ValueError(f"{name} must be a number in {'(' if low_open else '['}{low}, {high}], not {value!r}")
