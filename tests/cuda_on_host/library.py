"""A library of host-run kernels in this process: calls, device arrays, schedules, counters and errors."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .build import compile_kernels


class DeviceError(RuntimeError):
    """A launch or another call failed. ``code`` is the cudaError_t; the message names kernel, block, thread, line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"cudaError {code}: {message}")
        self.code = code


class DeviceArray:
    """A buffer of exactly the size of ``values`` in "device memory", where an access past its end is an error.

    ``offset`` elements are left out in front, so that the array does not start at a multiple of 16 bytes. Until
    something is written, memory holds 0xFF bytes: NaN in every floating-point format.
    """

    def __init__(self, library: Library, values: np.ndarray, offset: int = 0) -> None:
        values = np.ascontiguousarray(values)
        self._library = library
        self._base = library.cdll.cuda_on_host_malloc(values.nbytes + offset * values.itemsize)
        library.check()
        #: Address of the first element; null for an empty array.
        self.pointer: int = self._base + offset * values.itemsize if self._base and values.nbytes else 0
        if values.nbytes:
            buffer = (ctypes.c_char * values.nbytes).from_address(self.pointer)
            self._view = np.frombuffer(buffer, dtype=values.dtype).reshape(values.shape)
            self._view[...] = values
        else:
            self._view = values.copy()

    def numpy(self) -> np.ndarray:
        """A copy of the contents."""
        return self._view.copy()

    def free(self) -> None:
        """Returns the memory, as collection does. Raises DeviceError if bytes behind it were written."""
        base, self._base, self.pointer = self._base, None, 0
        self._view = np.empty(0, self._view.dtype)
        if base:
            self._library.cdll.cuda_on_host_free(base)
            self._library.check()

    def __del__(self) -> None:
        if getattr(self, "_base", None):
            self.free()


class Library:
    """Compiled kernels, loaded into this process (sanitizer "none" or "access")."""

    def __init__(self, path: str | Path) -> None:
        self.cdll = ctypes.CDLL(str(path))
        for name in ("message", "launch_log"):
            getattr(self.cdll, f"cuda_on_host_{name}").restype = ctypes.c_char_p
        self.cdll.cuda_on_host_malloc.restype = ctypes.c_void_p
        self.cdll.cuda_on_host_malloc.argtypes = [ctypes.c_size_t]
        self.cdll.cuda_on_host_free.argtypes = [ctypes.c_void_p]
        self.cdll.cuda_on_host_set_seed.argtypes = [ctypes.c_int]
        self.cdll.cuda_on_host_set_device.argtypes = [ctypes.c_char_p]
        self.cdll.cuda_on_host_counter.argtypes = [ctypes.c_char_p]
        self.cdll.cuda_on_host_counter.restype = ctypes.c_ulonglong

    @classmethod
    def build(
        cls,
        sources: Sequence[str | Path],
        *,
        sanitizer: str = "none",
        flags: Sequence[str] = (),
        include: Sequence[str | Path] = (),
    ) -> Library:
        """Compiles, as :func:`compile_kernels` does, and loads."""
        return cls(compile_kernels(sources, sanitizer=sanitizer, flags=flags, include=include))

    def call(self, name: str, *arguments: DeviceArray | int | float | np.ndarray | bytes | None) -> None:
        """Calls an extern "C" function, whatever it returns, and raises DeviceError if it left a CUDA error behind.

        A DeviceArray, a host array and None are passed as pointers, an int as 64 bits, a float as a C float.
        """
        converted: list[object] = []
        for value in arguments:
            if isinstance(value, DeviceArray):
                converted.append(ctypes.c_void_p(value.pointer))
            elif isinstance(value, np.ndarray):
                converted.append(ctypes.c_void_p(value.ctypes.data))
            elif isinstance(value, float):
                converted.append(ctypes.c_float(value))
            elif isinstance(value, (int, np.integer)):
                converted.append(ctypes.c_int64(int(value)))
            else:
                converted.append(value)
        self.cdll[name](*converted)
        self.check()

    def check(self) -> None:
        """Raises DeviceError if an error is pending, and clears it."""
        code = self.cdll.cuda_on_host_take_error()
        if code:
            raise DeviceError(code, self.cdll.cuda_on_host_message().decode())

    def array(self, values: np.ndarray, offset: int = 0) -> DeviceArray:
        """Copies an array to device memory; see :class:`DeviceArray`."""
        return DeviceArray(self, values, offset)

    @contextlib.contextmanager
    def seed(self, seed: int) -> Iterator[None]:
        """A schedule for a while: 0 in order, -1 reversed, from 1 on random."""
        self.cdll.cuda_on_host_set_seed(seed)
        try:
            yield
        finally:
            self.cdll.cuda_on_host_set_seed(0)

    def set_device(self, description: str) -> None:
        """The device to pretend: "sm_80,multiprocessors=8,registers=64". Raises ValueError if not understood."""
        if self.cdll.cuda_on_host_set_device(description.encode()) != 0:
            raise ValueError(f"device description {description!r} is not understood")

    def counter(self, name: str) -> int:
        """How many "launches", "copies", "allocations", "synchronizations" so far; "live_allocations" now."""
        value = self.cdll.cuda_on_host_counter(name.encode())
        if value == 2**64 - 1:
            raise ValueError(f"there is no counter named {name!r}")
        return value

    def launch_log(self) -> list[str]:
        """One line per launch since the last :meth:`reset_counters`: kernel, grid, block, shared memory."""
        return self.cdll.cuda_on_host_launch_log().decode().splitlines()

    def reset_counters(self) -> None:
        """Sets every counter to zero and empties the launch log."""
        self.cdll.cuda_on_host_reset_counters()
