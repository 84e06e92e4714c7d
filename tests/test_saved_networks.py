"""What save() writes is what the network computes with, and what load() builds again; anything else is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import l2l_fast as l2l
from l2l_fast.networks import files, interchange, trained
from tests.helpers import random_network


class Halved(nn.Module):
    def forward(self, value):
        return value / 2


class Noisy(nn.Module):
    def forward(self, value):
        return value + torch.randn_like(value) if self.training else value


def old_weight_norm(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net, "weight_ih_l1")


def pruned_twice(net):
    prune.l1_unstructured(net, "weight_hh_l0", 0.3)
    prune.random_unstructured(net, "weight_hh_l0", 0.5)


CHANGES = {
    "pruned": lambda net: prune.l1_unstructured(net, "weight_hh_l0", 0.3),
    "pruned twice": pruned_twice,
    "pruned in rows": lambda net: prune.ln_structured(net, "weight_ih_l1", 0.5, n=2, dim=0),
    "pruned over all": lambda net: prune.global_unstructured(
        [(net, name) for name, _ in list(net.named_parameters())], prune.L1Unstructured, amount=0.4
    ),
    "parametrized": lambda net: parametrize.register_parametrization(net, "bias_l1", Halved()),
    "parametrized twice": lambda net: [parametrize.register_parametrization(net, "weight_out", Halved()) for _ in "ab"],
    "noisy while training": lambda net: parametrize.register_parametrization(net, "weight_out", Noisy()),
    "orthogonal": lambda net: parametrizations.orthogonal(net, "weight_hh_l1"),
    "weight norm": lambda net: parametrizations.weight_norm(net, "weight_hh_l0"),
    "spectral norm": lambda net: parametrizations.spectral_norm(net, "weight_hh_l0"),
    "old weight norm": old_weight_norm,
    "old spectral norm": lambda net: nn.utils.spectral_norm(net, "weight_hh_l0"),
    "tied": lambda net: setattr(net, "weight_hh_l1", net.weight_hh_l0),
    "not contiguous": lambda net: setattr(net, "weight_hh_l0", nn.Parameter(torch.randn(20, 80).T)),
    "an expanded bias": lambda net: setattr(net, "bias_l0", nn.Parameter(torch.ones(1).expand(80))),
}


@pytest.fixture(params=[l2l.CoordinatewiseLSTM, l2l.NTMBFGS], ids=lambda kind: kind.__name__)
def net(request):
    torch.manual_seed(0)
    return request.param()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_effective_weights_are_written(net, change, tmp_path):
    plain, kind = net.phi().detach().clone(), type(net)
    change(net)
    state, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    random = torch.get_rng_state()
    net.save(tmp_path / "one")
    trained.save(nn.ModuleDict({"a": net}), tmp_path / "several")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert flags == [module.training for module in net.modules()]
    expected = net.eval().phi().detach()
    assert not torch.equal(plain, expected) or change is CHANGES["noisy while training"]
    for again in (l2l.load(tmp_path / "one"), files.load(tmp_path / "one"), trained.load(tmp_path / "several")["a"]):
        assert type(again) is kind and again.options() == net.options()
        assert [name for name, _ in again.named_parameters()] == list(net._names)
        assert torch.equal(again.phi(), expected)


@pytest.mark.parametrize("change", ["pruned", "old weight norm", "old spectral norm"])
def test_weights_that_hooks_make_are_never_stale(change, tmp_path):
    net = random_network()
    CHANGES[change](net)
    net.eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.25
    stale = net.phi().detach()  # no forward since the weights changed
    net.save(tmp_path / "x")
    update, _ = net(torch.ones(3), net.init_state(3))
    assert torch.equal(stale, net.phi()) and torch.equal(l2l.load(tmp_path / "x").phi(), stale)
    other = l2l.load(tmp_path / "x")
    assert torch.equal(other(torch.ones(3), other.init_state(3))[0], update)
    cells, linear = net.to_lstm_cells()
    state = {f"{k}.{name}": value for k, cell in enumerate(cells) for name, value in cell.state_dict().items()}
    state |= {f"out.{name}": value for name, value in linear.state_dict().items()}
    assert torch.equal(interchange.from_state_dict(state).phi(), stale)


class More(l2l.CoordinatewiseLSTM):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Counting(l2l.CoordinatewiseLSTM):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)


class Doubled(l2l.CoordinatewiseLSTM):
    def forward(self, *arguments):
        update, state = super().forward(*arguments)
        return 2 * update, state


class Renamed(l2l.CoordinatewiseLSTM):
    def options(self):
        return {**super().options(), "colour": "red"}


def changed(change):
    net = l2l.CoordinatewiseLSTM()
    change(net)
    return net


@pytest.mark.parametrize(
    "make, words",
    [
        (More, "'scale'"),
        (Counting, "'count'"),
        (Doubled, "another forward"),
        (Renamed, "colour"),
        (lambda: changed(lambda net: delattr(net, "bias_l0")), "bias_l0: the network has no such weight"),
        (lambda: changed(lambda net: setattr(net, "bias_l0", None)), "bias_l0: the network has no such weight"),
        (lambda: changed(lambda net: setattr(net, "more", nn.Linear(1, 1))), "more.weight"),
        (lambda: changed(lambda net: setattr(net, "dropout", nn.Dropout())), "dropout"),
        (lambda: changed(lambda net: setattr(net, "weight_out", nn.Parameter(torch.ones(2, 20)))), "weight_out.*shape"),
        (lambda: changed(lambda net: setattr(net, "bias_l0", nn.Parameter(torch.ones(3)))), "bias_l0.*shape"),
        (lambda: changed(lambda net: setattr(net, "bias_out", nn.Parameter(torch.ones(1).half()))), "one floating"),
        (lambda: l2l.CoordinatewiseLSTM().to(torch.complex64), "one floating"),
        (lambda: changed(lambda net: setattr(net, "weight_out", nn.Parameter(torch.ones(1, 20).to(torch.int8), False))),
         "one floating"),
        (lambda: l2l.CoordinatewiseLSTM(device="meta"), "device meta"),
    ],
)  # fmt: skip
def test_what_load_would_not_build_again_is_refused(make, words, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = make()
    path = tmp_path / "x"
    random_network().save(path)
    old = path.read_bytes()
    for save in (net.save, lambda place: trained.save(net, place)):
        with pytest.raises(ValueError, match=f"net: cannot be saved.*{words}"):
            save(path)
    with pytest.raises(ValueError, match=f"b: net: cannot be saved.*{words}|on one device"):
        trained.save(nn.ModuleDict({"a": random_network(), "b": net}), path)
    assert path.read_bytes() == old and [each.name for each in tmp_path.iterdir()] == ["x"]


def test_a_subclass_that_is_the_same_network(tmp_path):
    class Named(l2l.CoordinatewiseLSTM):
        def hello(self):
            return "hello"

    net = Named()
    net.save(tmp_path / "x")
    assert torch.equal(l2l.load(tmp_path / "x").phi(), net.phi())


def test_networks_of_two_dtypes_are_not_one_file(tmp_path):
    both = nn.ModuleDict({"a": l2l.CoordinatewiseLSTM(), "b": l2l.CoordinatewiseLSTM(dtype=torch.float64)})
    with pytest.raises(ValueError, match="net: cannot be saved: expected tensors of one dtype"):
        trained.save(both, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: torch.save({"a": torch.ones(1)}, path), "interchange.load_torch"),
        (lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False), "interchange"),
        (lambda path: path.write_bytes(b"not at all"), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
    ],
)
def test_foreign_files_are_recognised(write, words, tmp_path):
    write(tmp_path / "x")
    for load in (l2l.load, files.load, trained.read_record):
        with pytest.raises(ValueError, match=f"x'.*{words}"):
            load(tmp_path / "x")


def test_files_of_the_package_say_what_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = l2l.MetaTrainer(l2l.CoordinatewiseLSTM(hidden_size=4), l2l.problems.Quadratic(dim=2, batch=2), 2, 2)
    run.save("checkpoint")
    with pytest.raises(ValueError, match="a checkpoint, whose best network l2l_fast.meta.load_best reads"):
        l2l.load("checkpoint")
    trained.save(nn.ModuleDict({"a": random_network()}), "several")
    with pytest.raises(ValueError, match="several networks, which l2l_fast.load reads"):
        files.load("several")
    with pytest.raises(FileNotFoundError, match=r"load_pretrained\('mnist-mlp'\)"):
        l2l.load("mnist-mlp")
    with pytest.raises(FileNotFoundError, match="not expanded"):
        l2l.load("~/x.safetensors")
