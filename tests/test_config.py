"""The configuration: one immutable value that travels whole."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch

import l2l_fast as l2l
from tests.gac_helpers import GAC_CONFIGS, GAC_IDS
from tests.helpers import CONFIG_IDS, CONFIGS

DEFAULTS = {"preprocess": "log_sign", "p": 10.0, "output_scale": 0.1}
EVERY = pytest.mark.parametrize(
    "config",
    [l2l.Config(**{**DEFAULTS, **options}) for options in CONFIGS + GAC_CONFIGS],
    ids=CONFIG_IDS + GAC_IDS,
)


def test_positions_names_and_defaults():
    plain = l2l.Config(20, 2, "log_sign", 10.0, 0.1)
    assert plain == l2l.Config(
        hidden_size=20, num_layers=2, preprocess="log_sign", p=10.0, output_scale=0.1, gac_cells=0, extra_inputs=0,
        num_outputs=1,
    )  # fmt: skip
    other = l2l.Config(20, 2, "log_sign", 10.0, 0.1, 3, 4, 5)
    assert (other.gac_cells, other.extra_inputs, other.num_outputs) == (3, 4, 5)
    names = [field.name for field in dataclasses.fields(l2l.Config)]
    assert names[:5] == ["hidden_size", "num_layers", "preprocess", "p", "output_scale"]
    assert names[5:8] == ["gac_cells", "extra_inputs", "num_outputs"]
    assert names[8:] == ["tensor_inputs", "betas"]  # of normalized networks: see tests/test_normalized.py
    with pytest.raises(TypeError):
        l2l.Config(20, 2)


def test_the_old_name_is_the_same_class():
    assert l2l.GacConfig is l2l.Config is l2l.ops.Config
    assert l2l.GacConfig(20, 2, "log_sign", 10.0, 0.1, 0, 0, 1) == l2l.CoordinatewiseLSTM().config


@EVERY
def test_frozen(config):
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(config, field.name)
    with pytest.raises(AttributeError):
        config.arguments = config.arguments
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.more = 1


@EVERY
def test_equal_and_hashable_by_value(config):
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    same = l2l.Config(**fields)
    assert same == config and hash(same) == hash(config) and len({same, config}) == 1
    _ = config.arguments  # which asking for changes nothing
    assert same == config and hash(same) == hash(config) and repr(same) == repr(config)
    for name, value in fields.items():
        other = (0.5,) * 4 if value is None else "other" if isinstance(value, str) else value + 1
        changed = dataclasses.replace(config, **{name: other})
        assert changed != config and {config: 1}.get(changed) is None
        assert changed.arguments != config.arguments


@EVERY
def test_copies_and_pickles(config):
    _ = config.arguments
    copies = [copy.copy(config), copy.deepcopy(config)]
    copies += [pickle.loads(pickle.dumps(config, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is l2l.Config and other == config and hash(other) == hash(config)
        assert other.arguments == config.arguments


@EVERY
def test_arguments_and_back(config):
    sizes, preprocess, constants = config.arguments
    assert sizes == (
        config.hidden_size, config.num_layers, config.gac_cells, config.extra_inputs, config.num_outputs,
    )  # fmt: skip
    assert (preprocess, constants) == (config.preprocess, (config.p, config.output_scale))
    assert l2l.Config.from_arguments(*config.arguments) == config
    # As operators hand them on.
    assert l2l.Config.from_arguments(list(sizes), preprocess, list(constants)) == config


@EVERY
def test_as_a_dictionary(config):
    """Of a plain network only what a plain network has: files of all releases look alike."""
    values = config.asdict()
    plain = (config.gac_cells, config.extra_inputs, config.num_outputs) == (0, 0, 1)
    assert config.is_plain == plain and len(values) == (5 if plain else 8)
    assert values == config._asdict() and list(values) == [f.name for f in dataclasses.fields(config)][: len(values)]
    assert l2l.Config(**values) == config and l2l.Config(**json.loads(json.dumps(values))) == config
    assert l2l.CoordinatewiseLSTM(**values).config == config


@EVERY
def test_sizes_that_follow(config):
    net = l2l.CoordinatewiseLSTM(**config.asdict())
    assert config.rows == net.init_state(1).data.shape[1] == 2 * config.num_layers * config.hidden_size
    weights = l2l.reference.unpack_phi(net.phi(), config).layers
    for layer, (weight_ih, _, _) in enumerate(weights):
        assert config.inputs(layer) == weight_ih.shape[1]
    assert config.features == weights[0][0].shape[1] - config.extra_inputs


def test_compiled_before_anything_has_asked_for_the_arguments():
    net = l2l.CoordinatewiseLSTM(hidden_size=4, num_layers=1)
    grad, state = torch.ones(5), net.init_state(5)
    config = l2l.Config(4, 1, "log_sign", 10.0, 0.1)
    compiled = torch.compile(
        lambda grad, data, phi: l2l.ops.step(grad, None, data, phi, config), fullgraph=True, backend="eager"
    )
    actual = compiled(grad, state.data, net.phi().detach())
    assert torch.equal(actual[0][0], net(grad, state)[0])
