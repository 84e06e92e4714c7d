"""The IDX file format of MNIST: big-endian header, then unsigned bytes; plain or gzip-compressed.

Layout (published with MNIST by LeCun, Cortes and Burges): two zero bytes, a type code (0x08: unsigned byte), the number
of dimensions, one big-endian uint32 per dimension, then the values in row-major order and nothing else.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_CHUNK = 1 << 20


def read_idx(
    source: str | os.PathLike[str] | bytes,
    shape: tuple[int, ...] | None = None,
    *,
    on_bytes: Callable[[bytes], object] | None = None,
    max_bytes: int = 1 << 31,
) -> np.ndarray:
    """Read one IDX file of unsigned bytes.

    Args:
        source: a path, or the file's contents. Compressed with gzip or not: the first two bytes tell.
        shape: the expected shape; checked before any value is read.
        on_bytes: called with every piece of the *uncompressed* file in order (a hash's ``update``, say).
        max_bytes: refuse a header that announces more values than this.

    Returns:
        A read-only uint8 array of the announced shape.

    Raises:
        ValueError: the contents are not IDX, are damaged, cut short or too long, or have another shape; the message
            names the file.
        OSError: the file cannot be opened.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "the IDX bytes given", shape, on_bytes, max_bytes)
    path = Path(source)
    with path.open("rb") as stream:
        return _read(stream, str(path), shape, on_bytes, max_bytes)


def _read(
    stream: BinaryIO,
    label: str,
    shape: tuple[int, ...] | None,
    on_bytes: Callable[[bytes], object] | None,
    max_bytes: int,
) -> np.ndarray:
    compressed = stream.read(2) == _GZIP_MAGIC
    stream.seek(0)
    plain = gzip.GzipFile(fileobj=stream) if compressed else stream
    try:
        return _parse(plain, label, shape, on_bytes, max_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{label}: damaged or truncated gzip data ({error})") from error


def _parse(
    stream: BinaryIO | gzip.GzipFile,
    label: str,
    shape: tuple[int, ...] | None,
    on_bytes: Callable[[bytes], object] | None,
    max_bytes: int,
) -> np.ndarray:
    def take(count: int) -> bytes:
        piece = stream.read(count)
        if on_bytes is not None and piece:
            on_bytes(piece)
        return piece

    head = take(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTE or not 1 <= head[3] <= 4:
        raise ValueError(
            f"{label}: not an IDX file of unsigned bytes: it starts with {head.hex(' ') or 'nothing'}, "
            "expected 00 00 08 and a number of dimensions from 1 to 4"
        )
    sizes = take(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise ValueError(f"{label}: truncated within the IDX header ({4 + len(sizes)} bytes)")
    found = struct.unpack(f">{head[3]}I", sizes)
    if shape is not None and found != tuple(shape):
        raise ValueError(f"{label}: holds an array of shape {found}, expected {tuple(shape)}")
    count = math.prod(found)
    if count > max_bytes:
        raise ValueError(f"{label}: the header announces {count} bytes of values, more than the limit of {max_bytes}")

    # Piece by piece: a damaged header must not make us reserve what the file does not hold.
    values = bytearray()
    while len(values) < count:
        piece = take(min(_CHUNK, count - len(values)))
        if not piece:
            raise ValueError(f"{label}: truncated: {len(values)} of the announced {count} values are there")
        values += piece
    # The read past the end also makes gzip compare its checksum.
    if take(1):
        raise ValueError(f"{label}: goes on after the announced {count} values")
    array = np.frombuffer(values, dtype=np.uint8).reshape(found)
    array.flags.writeable = False
    return array
