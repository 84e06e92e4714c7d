"""The embedded texts: whole, disjoint by blocks, and encoded without loss but for case and rare characters."""

import copy
import lzma
import pickle

import pytest
import torch

from l2l_fast.problems.data import text as module
from l2l_fast.problems.data.text import ALPHABET, BLOCK, TEXTS, VOCABULARY, decode, encode, load_text


@pytest.mark.parametrize(("name", "characters"), [("asv-genesis-luke", 330_631), ("wycliffe-john", 97_496)])
def test_splits_are_the_text_in_blocks_each_in_one_split(name, characters) -> None:
    text = load_text(name)
    whole = lzma.decompress((module._FOLDER / f"{name}.txt.xz").read_bytes()).decode()
    assert len(whole) == characters
    blocks = {whole[k * BLOCK : (k + 1) * BLOCK].lower() for k in range(characters // BLOCK)}
    found = {split: {decode(block) for block in text.split(split)} for split in ("train", "validation", "test")}
    listed = set(ALPHABET)
    expected = {"".join(c if c in listed else "~" for c in block) for block in blocks}
    assert found["train"] | found["validation"] | found["test"] == expected
    assert sum(map(len, found.values())) == len(expected)
    assert len(found["train"]) == pytest.approx(2 / 3 * len(expected), abs=2)
    assert len(found["validation"]) == pytest.approx(len(expected) / 6, abs=1)


def test_symbols() -> None:
    assert VOCABULARY <= 64
    assert len(set(ALPHABET)) == len(ALPHABET) == VOCABULARY - 1
    assert decode(encode("In the beginning,\n[God]")) == "in the beginning,\n~god~"
    train = load_text().split("train")
    assert train.dtype == torch.int64
    assert train.min() == 0
    assert train.max() == VOCABULARY - 1
    assert (train == VOCABULARY - 1).float().mean() < 0.01
    with pytest.raises(ValueError, match="text must be ASCII, got 'é' at 1"):
        encode("aé")


def test_read_once_and_copies_share_it() -> None:
    text = load_text("wycliffe-john")
    assert load_text("wycliffe-john") is text
    assert copy.deepcopy(text) is text
    assert pickle.loads(pickle.dumps(text)) is text
    assert len(pickle.dumps(text)) < 200


def test_errors(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"name must be one of \('asv-genesis-luke', 'wycliffe-john'\), got 'kjv'"):
        load_text("kjv")
    with pytest.raises(ValueError, match="split must be one of .* got 'dev'"):
        load_text().split("dev")
    monkeypatch.setattr(module, "_loaded", {})
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_text()
    place = tmp_path / "asv-genesis-luke.txt.xz"
    place.write_bytes(b"no xz")
    with pytest.raises(ValueError, match="is damaged"):
        load_text()
    place.write_bytes(lzma.compress(b"other"))
    with pytest.raises(ValueError, match=f"expected {TEXTS['asv-genesis-luke']}"):
        load_text()
