"""The settings of a run: checked when a trainer is made, stored in its checkpoints, and read back from there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from .. import problems
from ..kernels import checks
from ..kernels.checks import positive_int
from ..kernels.surroundings import own_loop
from ..networks.several import Networks, build, config_of, members
from ..problems import Problem
from ..problems.scaled import Scaled
from . import estimators
from .checkpoint import Checkpoint
from .protocol import cosine_decay

if TYPE_CHECKING:
    from .trainer import MetaTrainer


@dataclass(frozen=True)
class MetaOptimizer:
    """How phi moves along a meta-gradient: Adam, with the gradient's norm cut and a falling rate."""

    lr: float
    betas: tuple[float, float]
    clip_norm: float | None
    decay_episodes: int | None
    decay_to: float

    @classmethod
    def make(cls, lr: Any, betas: Any, clip_norm: Any, decay_episodes: Any, decay_to: Any) -> MetaOptimizer:
        """Check and normalise the user's options; see :class:`l2l_fast.MetaTrainer` for their meaning.

        Raises:
            TypeError, ValueError: an option of the wrong type or out of range; the message names it.
        """
        decay_episodes = None if decay_episodes is None else positive_int("decay_episodes", decay_episodes)
        lr, decay_to = _between("lr", lr, 0.0, math.inf), _between("decay_to", decay_to, 0.0, 1.0, closed=True)
        clip_norm = None if clip_norm is None else _between("clip_norm", clip_norm, 0.0, math.inf)
        pair = hasattr(betas, "__len__") and hasattr(betas, "__getitem__")
        if isinstance(betas, (str, bytes, Mapping)) or not pair:
            raise TypeError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        if len(betas) != 2 or not all(0.0 <= checks.real("betas", beta) < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        return cls(lr, (float(betas[0]), float(betas[1])), clip_norm, decay_episodes, decay_to)

    def adam(self, net: Networks) -> torch.optim.Adam:
        """For the parameters of the network that are not frozen."""
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.lr, betas=self.betas, eps=1e-8, fused=True)

    def clip(self, net: Networks) -> float:
        """The norm of the network's gradient, which is then cut to ``clip_norm``; one that is not finite stays."""
        parameters = [parameter for parameter in net.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        found = float(norm)
        if self.clip_norm is not None and self.clip_norm < found < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        return found

    def decay(self, episode: int) -> float:
        """Factor on the learning rate in that episode, from 1 downwards."""
        return cosine_decay(episode, self.decay_episodes, self.decay_to)


@dataclass(frozen=True)
class Validation:
    """How often phi is looked at on validation tasks (0: never), on how many, and when a run gives up."""

    every: int
    episodes: int
    patience: int | None

    @classmethod
    def make(cls, every: Any, episodes: Any, patience: Any) -> Validation:
        """As :meth:`MetaOptimizer.make`."""
        patience = None if patience is None else positive_int("patience", patience)
        every = 0 if checks.as_int(every) == 0 else positive_int("validate_every", every)
        if patience is not None and every == 0:
            raise ValueError("patience: without validations (validate_every=0) there is nothing to wait for")
        return cls(every, positive_int("validation_episodes", episodes), patience)


def _option(group: str, name: str) -> Any:
    """A property of a trainer: an option in one of its groups, which assignment replaces."""

    def assign(trainer: Any, value: Any) -> None:
        setattr(trainer, group, dataclasses.replace(getattr(trainer, group), **{name: value}))

    return property(attrgetter(f"{group}.{name}"), assign)


class Arguments:
    """The settings in a trainer's groups, under the names of its arguments."""

    autograd = property(attrgetter("estimator.autograd"))
    coordinate_fraction = property(attrgetter("estimator.coordinate_fraction"))
    meta_loss = property(attrgetter("estimator.meta_loss"))
    lr = _option("meta_optimizer", "lr")
    betas = _option("meta_optimizer", "betas")
    clip_norm = _option("meta_optimizer", "clip_norm")
    decay_episodes = _option("meta_optimizer", "decay_episodes")
    decay_to = _option("meta_optimizer", "decay_to")
    validate_every = _option("validation", "every")
    validation_episodes = _option("validation", "episodes")
    patience = _option("validation", "patience")


def settings_of(trainer: MetaTrainer) -> dict[str, Any]:
    """Everything the course of a run depends on, JSON-able. ``frozen`` is there only where parameters of the network
    are (requires_grad=False): their names. ``tied`` only where some are: every further name, and the first one."""
    settings = {
        "network": config_of(trainer.net),
        "problem": trainer.problem.config(),
        "protocol": {**trainer.protocol.config(), **trainer.estimator.config()},
        "meta_optimizer": dataclasses.asdict(trainer.meta_optimizer),
        "validation": dataclasses.asdict(trainer.validation),
        "seed": trainer.seed,
    }
    if trainer.frozen:
        settings["frozen"] = list(trainer.frozen)
    tied = tied_names(trainer.net)
    if tied:
        settings["tied"] = tied
    return json.loads(json.dumps(settings))  # tuples become lists, as they will in the file


def arguments_of(
    saved: Checkpoint, problem: Problem | None, meta_loss: Any, device: torch.device | str | None
) -> dict[str, Any]:
    """The keyword arguments of a :class:`l2l_fast.MetaTrainer` that continues this run; not its log and device.

    Raises:
        TypeError, ValueError, FileNotFoundError: see :func:`network_of` and :func:`problem_of`; or the run had a
            meta_loss, and there is none.
    """
    settings = saved.settings
    if meta_loss is None and settings["protocol"]["meta_loss"] is not None:
        raise ValueError(f"meta_loss: the run had one ({settings['protocol']['meta_loss']}); give it again")
    with own_loop():
        net = network_of(saved, "cpu" if device is None else device)
        problem = problem_of(settings) if problem is None else problem
    protocol, optimizer, validation = (settings[key] for key in ("protocol", "meta_optimizer", "validation"))
    weights = protocol["weights"]
    return {
        "net": net,
        "problem": problem,
        "meta_loss": meta_loss,
        "horizon": protocol["horizon"],
        "unroll": protocol["unroll"],
        "weights": weights if isinstance(weights, list) else None,  # 1.0: all are
        "second_derivatives": protocol["second_derivatives"],
        "autograd": protocol["autograd"],
        "coordinate_fraction": protocol["coordinate_fraction"],
        "estimator": estimators.saved(protocol),
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
        if member.output_scale == 0.0 and not (member.add_read or member.moves):
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
        if not trainer.estimator.follows(member):
            raise ValueError(
                f"{which}: its weights are others whenever they are looked at (a spectral norm in training mode, or "
                "noise), and a segment needs the same for all its steps; call net.eval() before"
            )
    if left and trainer.meta_optimizer.decay(trainer.episode) == 0.0:
        raise ValueError(
            f"episodes: with decay_to=0 the learning rate is 0 after {trainer.meta_optimizer.decay_episodes} episodes, "
            f"and {trainer.episode} are finished: {episodes - trainer.episode} more would change nothing"
        )


def _between(name: str, value: Any, low: float, high: float, closed: bool = False) -> float:
    number = checks.real(name, value, expected=f"a number between {low:g} and {high:g}")
    if not (low <= number <= high if closed else low < number < high):
        raise ValueError(f"{name}: expected a number between {low:g} and {high:g}, got {value}")
    return number
