"""Damaged and foreign network files and optimizer state dicts: a clear error, or what the file says; never a crash."""

from __future__ import annotations

import copy
import json
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import l2l_fast as l2l
from tests.fuzz.cases import examples, identical, networks, phi_of, seeds
from tests.helpers import random_network, structured_gradient

# ---- network files ----


def small_file(folder: Path) -> tuple[Path, bytes]:
    path = folder / "net.safetensors"
    random_network(hidden_size=4, num_layers=1).save(path)
    return path, path.read_bytes()


def load_or_refuse(path: Path) -> l2l.CoordinatewiseLSTM | None:
    """The network, if the file holds one; None if it is refused with a ValueError that names the file."""
    try:
        net = l2l.load(path)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return None
    # What was accepted is whole: it holds the numbers of the file and computes.
    tensors = safetensors.torch.load_file(path)
    assert {name: p.shape for name, p in net.named_parameters()} == {name: t.shape for name, t in tensors.items()}
    assert all(identical(p.detach(), tensors[name]) for name, p in net.named_parameters())
    update, _ = net(torch.ones(3), net.init_state(3))
    assert update.shape == (3,)
    return net


@examples(10)
@given(net=networks())
def test_round_trip(net, tmp_path):
    net.save(tmp_path / "net.safetensors")
    loaded = load_or_refuse(tmp_path / "net.safetensors")
    assert loaded.config == net.config and identical(phi_of(loaded), phi_of(net))


def test_every_truncation_is_refused(tmp_path):
    path, content = small_file(tmp_path)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in {*range(header + 9), *range(header, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:length])
        assert load_or_refuse(path) is None, f"accepted the first {length} of {len(content)} bytes"


@examples(300)
@given(data=st.data())
def test_flipped_bits(data, tmp_path):
    path, content = small_file(tmp_path)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    damaged = bytearray(content)
    # Mostly the header: a bit of a weight makes another weight.
    where = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for position in data.draw(st.lists(where, min_size=1, max_size=3)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    load_or_refuse(path)


@examples(60)
@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda b: struct.pack("<Q", len(b)) + b)))
def test_any_bytes(content, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    assert load_or_refuse(path) is None


numbers = st.one_of(
    st.integers(-5, 100), st.sampled_from([10**400, -(2**63), 2**64]), st.floats(), st.booleans(), st.none(), st.text()
)
nested = st.one_of(st.lists(numbers, max_size=3), st.dictionaries(st.text(max_size=3), numbers, max_size=2))


def write_with_config(path: Path, config: str, **metadata: str) -> None:
    tensors = {name: p.detach() for name, p in random_network(hidden_size=4, num_layers=1).named_parameters()}
    basis = {"format": "l2l_fast.CoordinatewiseLSTM", "format_version": "1", "config": config}
    safetensors.torch.save_file(tensors, path, {**basis, **metadata})


def config_of_the_small_file() -> dict[str, Any]:
    return {**random_network(hidden_size=4, num_layers=1).config._asdict(), "gac_cells": 0}


@examples(80)
@given(field=st.sampled_from(sorted(config_of_the_small_file())), value=st.one_of(numbers, nested))
def test_a_strange_configuration(field, value, tmp_path):
    path = tmp_path / "net.safetensors"
    config = {**config_of_the_small_file(), field: value}
    write_with_config(path, json.dumps(config))
    net = load_or_refuse(path)
    if net is not None:
        assert getattr(net, field) == value


@pytest.mark.parametrize(
    "config",
    [
        "",
        "null",
        "[]",
        "{}",
        "{",
        "NaN",
        "[" * 100_000,
        '{"a":' * 100_000,
        json.dumps(list(config_of_the_small_file())),
        json.dumps({**config_of_the_small_file(), "extra": 1}),
        json.dumps(config_of_the_small_file()).replace("10.0", "Infinity"),
        json.dumps(config_of_the_small_file()).replace("10.0", "1" + "0" * 5000),
        json.dumps(config_of_the_small_file()).replace("0.1", "1e39"),
        json.dumps({**config_of_the_small_file(), "hidden_size": 5}),
        json.dumps({**config_of_the_small_file(), "num_layers": 2}),
        json.dumps({**config_of_the_small_file(), "preprocess": "identity"}),
        json.dumps({**config_of_the_small_file(), "gac_cells": 1}),
    ],
    ids=range(17),
)
def test_configurations_that_do_not_fit(config, tmp_path):
    """Among them those of other networks, and JSON that breaks parsers."""
    write_with_config(tmp_path / "net.safetensors", config)
    assert load_or_refuse(tmp_path / "net.safetensors") is None


@pytest.mark.parametrize("metadata", [{"format": "other"}, {"format_version": "2"}, {"format_version": ""}])
def test_another_format(metadata, tmp_path):
    write_with_config(tmp_path / "net.safetensors", json.dumps(config_of_the_small_file()), **metadata)
    assert load_or_refuse(tmp_path / "net.safetensors") is None


def change_bias(tensors, bias):
    tensors["bias_l0"] = bias


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clear(),
        lambda t: t.pop("bias_out"),
        lambda t: t.update(extra=torch.zeros(1)),
        lambda t: t.update(weight_out=t["weight_out"].T.contiguous()),
        lambda t: t.update({name: x.to(torch.int32) for name, x in t.items()}),
        lambda t: t.update({name: x.to(torch.complex64) for name, x in t.items()}),
        lambda t: t.update(bias_out=t["bias_out"].double()),
        lambda t: t.update(bias_l0=torch.zeros(0)),
    ],
    ids=["none", "missing", "extra", "transposed", "integers", "complex", "mixed", "zero-size"],
)
def test_tensors_that_do_not_fit(change, tmp_path):
    path, _ = small_file(tmp_path)
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    metadata = {"format": "l2l_fast.CoordinatewiseLSTM", "format_version": "1"}
    metadata["config"] = json.dumps(config_of_the_small_file())
    safetensors.torch.save_file(tensors, path, metadata)
    assert load_or_refuse(path) is None


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        l2l.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError):
        l2l.load(tmp_path)
    torch.save({"state": 1}, tmp_path / "checkpoint.pt")
    assert load_or_refuse(tmp_path / "checkpoint.pt") is None


# ---- state dicts of the optimizer ----


def optimizer_and_params(seed: int = 0) -> tuple[l2l.LearnedOptimizer, list[torch.nn.Parameter]]:
    net = random_network(seed, hidden_size=4, num_layers=1)
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(70))]
    optimizer = l2l.LearnedOptimizer([{"params": [params[0]], "lr": 0.5}, {"params": [params[1]]}], net)
    return optimizer, params


def take_step(optimizer, params, seed: int) -> None:
    for k, param in enumerate(params):
        param.grad = structured_gradient(tuple(param.shape), seed=seed + k)
    optimizer.step()


def paths_of(tree: Any, path: tuple = ()) -> list[tuple]:
    """The places of all values in nested dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [p for key, child in children for p in paths_of(child, (*path, key))]


STRANGE = [
    None, -1, 1.5, math.nan, math.inf, 10**400, "x", [], {}, True, torch.zeros(3, 1, 2, 4, dtype=torch.complex64),
    torch.zeros(3, 1, 2, 5), torch.zeros(0), torch.zeros(70, 1, 2, 4).to_sparse(), torch.zeros(3, 1, 2, 4),
]  # fmt: skip


@examples(250)
@given(data=st.data())
def test_a_damaged_state_dict(data):
    """Refused with nothing loaded, or loaded and working."""
    source, params = optimizer_and_params()
    take_step(source, params, 1)
    damaged = copy.deepcopy(source.state_dict())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths_of(damaged)))
        holder = damaged
        for key in path[:-1]:
            holder = holder[key]
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del holder[path[-1]]
        elif action == "replace":
            holder[path[-1]] = data.draw(st.sampled_from(STRANGE))
        elif isinstance(holder, list):
            holder.append(data.draw(st.sampled_from(STRANGE)))
        else:
            holder["unknown"] = data.draw(st.sampled_from(STRANGE))
        if not paths_of(damaged):
            break
    target, params = optimizer_and_params()
    take_step(target, params, 5)
    before = [(p.detach().clone(), target.state_of(p).data.clone()) for p in params]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in target.param_groups]
    try:
        with warnings.catch_warnings():  # another p, say, is allowed, with a warning
            warnings.simplefilter("ignore")
            target.load_state_dict(damaged)
    except (ValueError, TypeError) as error:
        assert str(error)
        for param, (value, state) in zip(params, before):
            assert identical(param.detach(), value) and identical(target.state_of(param).data, state)
        assert groups == [{k: v for k, v in group.items() if k != "params"} for group in target.param_groups]
    take_step(target, params, 9)


@examples(10)
@given(seed=seeds)
def test_state_dicts_of_other_networks_and_parameters(seed):
    source, params = optimizer_and_params()
    take_step(source, params, seed)
    saved = source.state_dict()
    for net, shapes in (
        (random_network(hidden_size=5, num_layers=1), (3, 70)),
        (random_network(hidden_size=4, num_layers=2), (3, 70)),
        (random_network(hidden_size=4, num_layers=1), (70, 3)),
        (random_network(hidden_size=4, num_layers=1), (3,)),
        (random_network(hidden_size=4, num_layers=1), (3, 70, 70)),
    ):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(n))]} for n in shapes]
        with pytest.raises(ValueError, match="state_dict|lstm_state"):
            l2l.LearnedOptimizer(groups, net).load_state_dict(saved)
