"""Numbers, flags and choices that users give: accepted in every form that means one, kept as plain Python values.

A number may be an int or a float, a scalar of numpy, an array or tensor without dimensions, a fraction. What is kept is
always Python's own int or float: JSON, pickles and ``torch.load(weights_only=True)`` know nothing else. A bool is not a
number, and neither NaN nor an infinity is ever accepted.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def as_int(value: Any) -> int | None:
    """``value`` as a plain int; None if it is not a whole number by type (a float never is, nor a bool)."""
    if type(value) is int:
        return value
    value = _scalar(value)
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        return int(operator.index(value))
    except TypeError:
        return None


def as_float(value: Any) -> float | None:
    """``value`` as a plain float, perhaps NaN or infinite (as a number beyond the range of a float is); None if it is
    not a real number by type."""
    value = _scalar(value)
    if isinstance(value, (bool, str, bytes, bytearray)):
        return None
    if not isinstance(value, numbers.Real) and (isinstance(value, numbers.Complex) or not hasattr(value, "__float__")):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, -1 if value < 0 else 1)
    except (TypeError, ValueError):
        return None


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """``value`` as a plain int within ``low..high``.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is out of range.
    """
    number = as_int(value)
    span = f" in {low}..{high}" if low is not None and high is not None else ""
    span = span or ("" if low is None else f" >= {low}") or ("" if high is None else f" <= {high}")
    if number is None:
        raise TypeError(f"{name}: expected an int{span}, got {value!r}")
    if (low is not None and number < low) or (high is not None and number > high):
        short = f"{low}..{high}" if low is not None and high is not None else f"an int{span}"
        raise ValueError(f"{name}: expected {short}, got {number}")
    return number


def real(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    expected: str | None = None,
) -> float:
    """``value`` as a plain, finite float with ``low <= value <= high`` and ``above < value < below``.

    Args:
        expected: the words for the range in the message; by default made of the bounds.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is NaN, infinite or out of range.
    """
    number = as_float(value)
    if number is None:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    fits = (
        math.isfinite(number)
        and (low is None or number >= low)
        and (high is None or number <= high)
        and (above is None or number > above)
        and (below is None or number < below)
    )
    if not fits:
        signs = ((">=", low), (">", above), ("<=", high), ("<", below))
        bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)
        expected = expected or f"a finite number {bounds}".rstrip()
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    """``value`` as a plain bool; TypeError unless it is a bool, Python's or numpy's."""
    value = _scalar(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def device(name: str, value: Any, with_values: bool = True) -> torch.device:
    """``value`` as a device that exists here.

    Args:
        with_values: not the device "meta", on which nothing can be computed.

    Raises:
        TypeError: it does not name a device at all.
        ValueError: there is no such device.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{name}: expected a device such as 'cpu' or 'cuda:0', got {value!r}")
    try:
        found = torch.device(value)
    except (RuntimeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected a device such as 'cpu' or 'cuda:0', got {value!r}") from None
    if found.type == "meta" and with_values:
        raise ValueError(f"{name}: tensors of the device meta have no values; expected one such as 'cpu' or 'cuda:0'")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            seen = f"cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
            raise ValueError(f"{name}: torch sees {seen} here, got {value!r}")
    return found


def meant(given: Any, known: Iterable[object]) -> str:
    """For the end of a message: " (did you mean 'x'?)" if one of the ``known`` names is close to ``given``, else ""."""
    import difflib  # only where something is wrong already

    close = difflib.get_close_matches(str(given), [str(name) for name in known], 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def chosen(value: Any, allowed: Iterable[str]) -> bool:
    """Whether ``value`` is one of the ``allowed`` names; what is not a string, or cannot be hashed, is not."""
    return isinstance(value, str) and value in set(allowed)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """``value`` as a plain string; ValueError unless it is one of the ``allowed``."""
    allowed = tuple(allowed)
    if not chosen(value, allowed):
        raise ValueError(f"{name}: expected {' or '.join(map(_quoted, allowed))}, got {value!r}{meant(value, allowed)}")
    return str(value)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _scalar(value: Any) -> Any:
    # numpy's scalars, and arrays and tensors without dimensions; .item() of a long double is a long double.
    dimensions = getattr(value, "ndim", None)
    if dimensions == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return None if dimensions else value  # an array of one element is an array


def positive_int(name: str, value: int) -> int:
    """``value`` as a positive int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is not positive.
    """
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be a positive integer, got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def non_negative(name: str, value: float) -> float:
    """``value`` as a finite float that is not negative.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, infinite or NaN.
    """
    number = as_float(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return number


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """``value`` as a plain string.

    Raises:
        ValueError: it is not one of the ``allowed``.
    """
    allowed = tuple(allowed)
    if not chosen(value, allowed):
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{meant(value, allowed)}")
    return str(value)


def widths(name: str, values: Iterable[int], what: str) -> tuple[int, ...]:
    """``values`` as a tuple of positive ints; ``what`` they are is for the message.

    Raises:
        TypeError: not a sequence, or not of integers.
        ValueError: one of them is not positive.
    """
    try:
        if isinstance(values, (str, bytes, dict)):
            raise TypeError
        found = tuple(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of {what}, got {values!r}") from None
    return tuple(positive_int(name, value) for value in found)


def check_gradient(name: str, grad: Any) -> None:
    """Raise TypeError unless ``grad`` is a dense, real, floating-point tensor of a supported dtype."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(grad).__name__}")
    if grad.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {grad.layout}")
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {grad.dtype}")


def check_problems(num_problems: Any, numel: int) -> int:
    """Raise TypeError or ValueError unless ``num_problems`` is a number of equal parts of ``numel`` coordinates."""
    number = as_int(num_problems)
    if number is None:
        raise TypeError(f"num_problems: expected an int >= 1, got {num_problems!r}")
    if number < 1 or numel % number != 0:
        raise ValueError(f"num_problems: expected a divisor of the {numel} coordinates, got {num_problems}")
    return number


def check_extra(extra: Tensor | None, extra_inputs: int, grad: Tensor) -> None:
    """Raise TypeError or ValueError unless ``extra`` holds ``extra_inputs`` numbers per coordinate of ``grad``."""
    if extra_inputs == 0:
        if extra is not None:
            raise ValueError("extra: expected None, the network has no extra inputs")
        return
    if not isinstance(extra, Tensor):
        raise TypeError(f"extra: expected a tensor for the {extra_inputs} extra inputs, got {type(extra).__name__}")
    if not extra.is_floating_point() or extra.layout is not torch.strided:
        raise TypeError(f"extra: expected a dense real floating-point tensor, got {extra.dtype}, {extra.layout}")
    if extra.shape != (extra_inputs, *grad.shape):
        raise ValueError(f"extra: expected shape {(extra_inputs, *grad.shape)}, got {tuple(extra.shape)}")
    if extra.device != grad.device:
        raise ValueError(f"extra: expected device {grad.device}, got {extra.device}")
