"""The settings of a run: checked when a trainer is made, stored in its checkpoints, and read back from there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.spectral_norm import SpectralNorm

from .. import problems
from ..kernels import checks
from ..networks import effective
from ..networks.several import Networks, build, config_of, members
from ..problems import Problem
from ..problems.scaled import Scaled
from .checkpoint import Checkpoint
from .protocol import cosine_decay

if TYPE_CHECKING:
    from .trainer import MetaTrainer


def settings_of(trainer: MetaTrainer) -> dict[str, Any]:
    """Everything the course of a run depends on, JSON-able. ``frozen`` is there only where parameters of the network
    are (requires_grad=False): their names. ``tied`` only where some are: every further name, and the first one."""
    meta_loss: Any = trainer.meta_loss
    if meta_loss is not None:
        meta_loss = getattr(meta_loss, "__qualname__", type(meta_loss).__name__)
    settings = {
        "network": config_of(trainer.net),
        "problem": trainer.problem.config(),
        "protocol": {
            **trainer.protocol.config(),
            "meta_loss": meta_loss,
            "autograd": trainer.autograd,
            "coordinate_fraction": trainer.coordinate_fraction,
        },
        "meta_optimizer": {
            "lr": trainer.lr,
            "betas": list(trainer.betas),
            "clip_norm": trainer.clip_norm,
            "decay_episodes": trainer.decay_episodes,
            "decay_to": trainer.decay_to,
        },
        "validation": {
            "every": trainer.validate_every,
            "episodes": trainer.validation_episodes,
            "patience": trainer.patience,
        },
        "seed": trainer.seed,
    }
    if trainer.frozen:
        settings["frozen"] = list(trainer.frozen)
    tied = tied_names(trainer.net)
    if tied:
        settings["tied"] = tied
    return json.loads(json.dumps(settings))  # tuples become lists, as they will in the file


def arguments_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a :class:`l2l_fast.MetaTrainer` with these settings; not its network, problem and
    meta_loss."""
    protocol, optimizer, validation = (settings[key] for key in ("protocol", "meta_optimizer", "validation"))
    weights = protocol["weights"]
    return {
        "horizon": protocol["horizon"],
        "unroll": protocol["unroll"],
        "weights": weights if isinstance(weights, list) else None,  # 1.0: all are
        "second_derivatives": protocol["second_derivatives"],
        "autograd": protocol["autograd"],
        "coordinate_fraction": protocol["coordinate_fraction"],
        "lr": optimizer["lr"],
        "betas": tuple(optimizer["betas"]),
        "clip_norm": optimizer["clip_norm"],
        "decay_episodes": optimizer["decay_episodes"],
        "decay_to": optimizer["decay_to"],
        "validate_every": validation["every"],
        "validation_episodes": validation["episodes"],
        "patience": validation["patience"],
        "seed": settings["seed"],
    }


def problem_of(settings: Mapping[str, Any], **changes: Any) -> Problem:
    """The problem of a run, with some of its options changed.

    Raises:
        ValueError, TypeError, FileNotFoundError: it is none that ``l2l_fast.problems.get`` can build.
    """
    config = {**settings["problem"], **changes}
    scales = config.pop("training_scales", None)
    problem = problems.get(**config)
    return problem if scales is None else Scaled(problem, scales[0], (scales[1], scales[2]))


def network_of(saved: Checkpoint, device: torch.device | str = "cpu") -> Networks:
    """A network of the run's shape, with uninitialised parameters, frozen and tied where the run's are.

    Raises:
        ValueError: the checkpoint has none, or parameters of another kind (pruned, parametrized, normalised).
    """
    weights = saved.part("net")
    if not weights:
        raise ValueError("the checkpoint holds no network")
    net = build(saved.settings["network"], device=device, dtype=next(iter(weights.values())).dtype)
    if set(weights) != set(net.state_dict()):
        raise ValueError(
            "the run's network was changed after it was built (pruned, parametrized, normalised), and a checkpoint "
            f"does not tell how; its parameters are {sorted(weights)}. Change a network in the same way and call "
            "MetaTrainer(net, ...).resume(path); load_best reads the weights alone"
        )
    for name, first in saved.settings.get("tied", {}).items():
        owner, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(owner), attribute, net.get_parameter(first))
    for name in saved.settings.get("frozen", ()):
        net.get_parameter(name).requires_grad_(False)
    return net


def frozen_names(net: Networks) -> tuple[str, ...]:
    """Which parameters of the network will not be trained.

    Raises:
        ValueError: all of them; or they cannot be trained: made under inference mode, or without effect on anything.
    """
    for name, parameter in net.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"net: {name} was made under torch.inference_mode() and can never be trained; build or load the "
                "network outside"
            )
        if parameter.requires_grad and any(s == 0 and n > 1 for s, n in zip(parameter.stride(), parameter.shape)):
            raise ValueError(
                f"net: {name} is expanded: several of its elements are one place in memory, which cannot be trained; "
                "give it memory of its own (.clone())"
            )
    for name, member in members(net).items():
        if member.output_scale == 0.0 and not member.add_read:
            which = f"net[{name!r}]" if name else "net"
            raise ValueError(f"{which}: with output_scale=0 its updates are zero whatever it learns")
    frozen = tuple(name for name, parameter in net.named_parameters() if not parameter.requires_grad)
    if len(frozen) == len(list(net.parameters())):
        raise ValueError(
            "net: all its parameters are frozen (requires_grad=False), there is nothing to train; "
            "net.requires_grad_(True) thaws them"
        )
    return frozen


def tied_names(net: Networks) -> dict[str, str]:
    """The further names of parameters that have several, and the first name of each."""
    first = {id(parameter): name for name, parameter in net.named_parameters()}
    listed = net.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in listed if first[id(parameter)] != name}


def check_can_train(trainer: MetaTrainer, episodes: int) -> None:
    """Raise ValueError if training until ``episodes`` would change nothing, or something else than was checked when the
    trainer was made."""
    if frozen_names(trainer.net) != trainer.frozen:
        raise ValueError("net: other parameters are frozen (requires_grad=False) than when the trainer was made")
    left = trainer.episode < episodes and not trainer.counters.stopped
    for name, member in members(trainer.net).items() if left else ():
        which = f"net[{name!r}]" if name else "net"
        hooks = member._forward_pre_hooks.values()
        estimating = trainer.autograd and member.training and any(isinstance(hook, SpectralNorm) for hook in hooks)
        # In autograd every step may look at other weights, but those of a segment of the kernels are one vector.
        if estimating or (not trainer.autograd and effective.changes_by_itself(member)):
            raise ValueError(
                f"{which}: its weights are others whenever they are looked at (a spectral norm in training mode, or "
                "noise), and a segment needs the same for all its steps; call net.eval() before"
            )
    if left and cosine_decay(trainer.episode, trainer.decay_episodes, trainer.decay_to) == 0.0:
        raise ValueError(
            f"episodes: with decay_to=0 the learning rate is 0 after {trainer.decay_episodes} episodes, "
            f"and {trainer.episode} are finished: {episodes - trainer.episode} more would change nothing"
        )


def check_range(name: str, value: Any, low: float, high: float, closed: bool = False) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number between the bounds."""
    number = checks.real(name, value, expected=f"a number between {low:g} and {high:g}")
    if not (low <= number <= high if closed else low < number < high):
        raise ValueError(f"{name}: expected a number between {low:g} and {high:g}, got {value}")


def check_options(
    lr: Any, meta_loss: Any, clip_norm: Any, betas: Any, decay_to: Any, validate_every: int, patience: int | None
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless these arguments of MetaTrainer are valid."""
    if meta_loss is not None and not callable(meta_loss):
        raise TypeError(f"meta_loss: expected a callable, got {type(meta_loss).__name__}")
    check_range("lr", lr, 0.0, math.inf)
    check_range("decay_to", decay_to, 0.0, 1.0, closed=True)
    if clip_norm is not None:
        check_range("clip_norm", clip_norm, 0.0, math.inf)
    if isinstance(betas, (str, bytes, Mapping)) or not (hasattr(betas, "__len__") and hasattr(betas, "__getitem__")):
        raise TypeError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    if len(betas) != 2 or not all(0.0 <= checks.real("betas", beta) < 1.0 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    if patience is not None and validate_every == 0:
        raise ValueError("patience: without validations (validate_every=0) there is nothing to wait for")


def checked_fraction(fraction: Any, autograd: bool, net: Networks) -> float:
    """``coordinate_fraction`` as a float; raises TypeError or ValueError where it cannot be served."""
    check_range("coordinate_fraction", fraction, 0.0, 1.0, closed=True)
    if fraction == 0.0:
        raise ValueError("coordinate_fraction: expected a number above 0, got 0")
    if autograd and fraction < 1.0:
        raise ValueError("coordinate_fraction: expected 1 with autograd, only the fused backward can sample")
    if fraction < 1.0 and any(member.communicates for member in members(net).values()):
        raise ValueError("coordinate_fraction: expected 1 with a network whose coordinates communicate")
    return float(fraction)
