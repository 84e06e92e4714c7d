"""The weights that a network computes with, where its parameters are something else: pruned, parametrized, normalised.

``torch.nn.utils.parametrize`` (and with it today's ``weight_norm`` and ``spectral_norm``) makes a weight a property;
``torch.nn.utils.prune`` and the older norms set it anew before every ``forward``, which the optimizer's kernels do not
call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

if TYPE_CHECKING:
    from .lstm import CoordinatewiseLSTM

_MAKERS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)
_HOOKED = ("orig", "mask", "g", "v", "u")  # what a hook keeps beside a weight: {weight}_{suffix}


def weight(net: CoordinatewiseLSTM, name: str) -> Tensor:
    """The weight ``name`` as it is now, differentiable in the parameters that it is made of.

    Raises:
        ValueError: the network has no such weight any more.
    """
    if net._parameters.get(name) is not None:
        return net._parameters[name]  # type: ignore[return-value]
    for hook in net._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(net)
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(net)
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return hook.compute_weight(net, do_power_iteration=False)
    value = getattr(net, name, None)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: the network has no such weight any more")
    return value


def kept(net: CoordinatewiseLSTM) -> dict[str, Any]:
    """The attributes of ``net`` without the weights that hooks make of others before every ``forward``: they belong to
    an autograd graph, and cannot be copied with it."""
    made = _hooked(net)
    return {key: value for key, value in net.__dict__.items() if key not in made}


def remake(net: CoordinatewiseLSTM) -> None:
    """Make those weights again, after ``net`` was made of what :func:`kept` gave, or the parameters that they are made
    of were loaded."""
    for name in _hooked(net):
        setattr(net, name, weight(net, name).detach())


def _hooked(net: CoordinatewiseLSTM) -> set[str]:
    """The weights that hooks make of others."""
    hooks = net._forward_pre_hooks.values()
    names = {getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in hooks if isinstance(hook, _MAKERS)}
    return {name for name in net._names if name in names}


@torch.no_grad()
def weights(net: CoordinatewiseLSTM) -> dict[str, Tensor]:
    """All weights by name, detached copies on the CPU. The network is left as it is: a ``spectral_norm`` makes no step
    of its power iteration, as in ``eval()``.

    Raises:
        ValueError: a weight is gone, or has no values (of the device "meta").
    """
    training = [module for module in net.modules() if module is not net and module.training]
    for module in training:
        module.training = False
    try:
        found = {}
        for name in net._names:
            value = weight(net, name).detach()
            if value.is_meta:
                raise ValueError(f"{name}: a tensor of the device meta has no values")
            value = value if value.layout == torch.strided else value.to_dense()
            found[name] = value.cpu().clone(memory_format=torch.contiguous_format)
        return found
    finally:
        for module in training:
            module.training = True


def is_plain(net: CoordinatewiseLSTM) -> bool:
    """Whether the weights are the network's own parameters, and nothing else is in its state dict."""
    return set(net.state_dict()) == set(net._names)


@torch.no_grad()
def changes_by_itself(net: CoordinatewiseLSTM) -> bool:
    """Whether every look at the weights finds others: noise, or a norm that goes on estimating. Leaves the network and
    the random state as they were."""
    if is_plain(net):
        return False
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        for parameter in net.parameters():  # an estimate that has settled would look still until the first update
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean())
        looks = [torch.cat([part.flatten() for part in (net.phi(), *net.beside_phi())]) for _ in range(2)]
    net.load_state_dict(before)
    return not torch.equal(*looks)


def strangers(net: CoordinatewiseLSTM) -> list[str]:
    """Parameters, buffers and modules of ``net`` that its weights are not made of."""
    hooked = {getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in net._forward_pre_hooks.values()}
    known = {*net._names, *(f"{name}_{suffix}" for name in net._names if name in hooked for suffix in _HOOKED)}
    own = tuple(f"parametrizations.{name}" for name in net._names if parametrize.is_parametrized(net, name))
    found = [name for name, _ in (*net.named_parameters(), *net.named_buffers(), *net.named_modules()) if name]
    return sorted(
        name
        for name in set(found)
        if name not in known and name != "parametrizations" and not any(f"{name}.".startswith(f"{o}.") for o in own)
    )
