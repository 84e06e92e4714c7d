"""The IDX reader: right values or a ValueError that names the file, whatever the bytes."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from l2l_fast.problems.data import read_idx


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6))


@given(arrays, st.booleans())
def test_returns_what_was_written(array: np.ndarray, compressed: bool) -> None:
    contents = idx_bytes(array)
    pieces = []
    found = read_idx(gzip.compress(contents) if compressed else contents, array.shape, on_bytes=pieces.append)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array)
    assert b"".join(pieces) == contents


def test_reads_paths_and_result_is_read_only(tmp_path) -> None:
    (tmp_path / "images").write_bytes(idx_bytes(IMAGES))
    found = read_idx(str(tmp_path / "images"))
    np.testing.assert_array_equal(found, IMAGES)
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0, 0] = 1


@given(arrays.filter(lambda a: a.size > 0), st.data(), st.booleans())
def test_truncation_is_an_error(array: np.ndarray, data: st.DataObject, compressed: bool) -> None:
    contents = gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array)
    cut = data.draw(st.integers(0, len(contents) - 1))
    with pytest.raises(ValueError, match=r"truncated|not an IDX file"):
        read_idx(contents[:cut])


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_in_compressed_data_never_gives_wrong_values(position: int, change: int) -> None:
    contents = bytearray(gzip.compress(idx_bytes(IMAGES), mtime=0))
    position %= len(contents)
    contents[position] ^= change
    try:
        found = read_idx(bytes(contents))
    except ValueError:
        return
    # Some bits do not matter: the time stamp, the padding behind the last block.
    np.testing.assert_array_equal(found, IMAGES)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\0\0\x08\x01", b"\0\0\x08\x03\0\0\0\x02", b"\x1f\x8b\x08\0"]))
def test_any_bytes_give_an_array_or_a_value_error(tail: bytes, head: bytes) -> None:
    try:
        array = read_idx(head + tail)
    except ValueError as error:
        assert "the IDX bytes given" in str(error)  # noqa: PT017 (the point is that nothing else is raised)
    else:
        assert array.dtype == np.uint8


def test_messages(tmp_path) -> None:
    path = tmp_path / "x-idx3-ubyte"
    path.write_bytes(idx_bytes(IMAGES) + b"!")
    with pytest.raises(ValueError, match=r"x-idx3-ubyte: goes on after the announced 60 values"):
        read_idx(path)
    with pytest.raises(ValueError, match=r"x-idx3-ubyte: holds an array of shape \(3, 4, 5\), expected \(3, 4\)"):
        read_idx(path, (3, 4))
    with pytest.raises(ValueError, match=r"starts with 00 00 0d 01, expected 00 00 08"):
        read_idx(b"\0\0\x0d\x01" + bytes(8))
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "none")


def test_a_header_that_announces_too_much_reserves_nothing() -> None:
    huge = b"\0\0\x08\x04" + b"\xff" * 16
    with pytest.raises(ValueError, match="more than the limit"):
        read_idx(huge)
    with pytest.raises(ValueError, match="truncated: 3 of the announced 2147483647 values"):
        read_idx(b"\0\0\x08\x01\x7f\xff\xff\xff" + b"abc")
