"""Pickles of dicts and arrays of floats, read without running anything: pickles can name any function to be called."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

_KINDS = ("f4", "f8", "f2")


def name_of(key: Any) -> str:
    """A dict's key as text; Python 2 pickled names as bytes. ValueError if it is neither."""
    if isinstance(key, bytes):
        key = key.decode("latin1")
    if not isinstance(key, str):
        raise ValueError(f"expected a name, got {key!r}")
    return key


class _DType:
    """Stands in for numpy.dtype: floats only."""

    def __init__(self, kind: Any = "", *_: Any) -> None:
        self.kind = name_of(kind).lstrip("<>=|")
        self.order = "<"
        if self.kind not in _KINDS:
            raise ValueError(f"expected arrays of floats, got dtype {kind!r}")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|", b"<", b">", b"=", b"|"):
            self.order = name_of(state[1])


class PickledArray:
    """Stands in for numpy.ndarray: keeps the raw bytes until they have been checked."""

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def array(self) -> np.ndarray:
        """The values as float32."""
        state = self._state
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _DType)):
            raise ValueError("a damaged array")
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"an array of shape {shape!r}")
        if not isinstance(raw, (bytes, bytearray)):
            raise ValueError(f"array contents of type {type(raw).__name__}")
        values = np.frombuffer(raw, dtype=np.dtype(dtype.order.replace("|", "=") + dtype.kind))
        return np.ascontiguousarray(values.reshape(shape, order="F" if fortran else "C"), dtype=np.float32)


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # How Python 3 writes bytes for protocol 2.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("text in an unexpected encoding")
    return text.encode("latin1")


def _plain_defaultdict(*arguments: Any) -> dict[Any, Any]:
    return {}


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "defaultdict"): _plain_defaultdict,
    ("collections", "OrderedDict"): _plain_defaultdict,
    ("__builtin__", "dict"): _plain_defaultdict,
    ("builtins", "dict"): _plain_defaultdict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): PickledArray,
}
for _package in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = lambda *_: PickledArray()
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"the pickle asks for {module}.{name}; only dicts and arrays are read")
        return _ALLOWED[module, name]


def unpickle(content: bytes) -> Any:
    """What a pickle holds, with :class:`PickledArray` in the place of arrays.

    Raises:
        ValueError: it asks for anything beyond dicts and arrays of floats, or is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle can fail in nearly any way
        raise ValueError(f"not a readable pickle: {type(error).__name__}: {error}") from error
