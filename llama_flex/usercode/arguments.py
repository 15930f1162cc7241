"""Check the numbers, options and devices that callers give."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Return a number of any integer type, at least `least`, as an int. Raises ValueError for anything else."""
    try:
        number = _index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def whole_numbers(name: str, values: Iterable[Any]) -> list[int]:
    """Return numbers of any integer type as ints. Raises ValueError, which begins with `name`, for anything else."""
    try:
        found = list(values)
        return found if {*map(type, found)} <= {int} else list(map(_index, found))  # prompts are long
    except TypeError:  # not iterable, too
        raise ValueError(f"{name}, not {values!r}") from None


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not known; choose {' or '.join(map(repr, choices))}")


def _index(value: Any) -> int:
    if isinstance(value, bool):  # Python's True is the number 1, but JSON's true is not a number
        raise TypeError
    return operator.index(value)


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, for options passed on by `name` that `function` does not know."""
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {option!r}{hint}")


def named_device(device: torch.device | str) -> torch.device:
    """Return a device by its name. Raises ValueError for a name that torch does not know, and a device not there."""
    try:
        named = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from None
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
    return named


def model_device(device: torch.device | str | None) -> torch.device:
    """Return the device for a model, by default the GPU if there is one. Raises ValueError unless CPU or CUDA."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = named_device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported; use cpu, cuda or cuda:N")
    return device
