"""Which estimator serves the arguments of a MetaTrainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ...kernels import checks
from ...networks.several import Networks, members
from .autograd import AutogradBPTT
from .base import Estimator
from .evolution import Evolution
from .fused import FusedBPTT
from .pes import PES
from .synthetic import SyntheticGradients

_BY_NAME: dict[str, type[Estimator]] = {"pes": PES, "evolution": Evolution, "synthetic_gradients": SyntheticGradients}
NAMES = ("bptt", *_BY_NAME)
_SYNTHETIC = "synthetic_gradients"


def choose(
    net: Networks,
    *,
    autograd: bool,
    second_derivatives: bool,
    meta_loss: Any,
    coordinate_fraction: Any,
    estimator: Any = "bptt",
    synthetic_gradients: Any = False,
) -> Estimator:
    """The estimator that serves these arguments of :class:`l2l_fast.MetaTrainer`: of truncated back-propagation, the
    fused one wherever it can.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, or no estimator serves them together.
    """
    if meta_loss is not None and not callable(meta_loss):
        raise TypeError(f"meta_loss: expected a callable, got {type(meta_loss).__name__}")
    fraction = checks.real("coordinate_fraction", coordinate_fraction, expected="a number between 0 and 1")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"coordinate_fraction: expected a number between 0 and 1, got {coordinate_fraction}")
    if fraction == 0.0:
        raise ValueError("coordinate_fraction: expected a number above 0, got 0")
    if checks.flag("synthetic_gradients", synthetic_gradients) and not isinstance(estimator, SyntheticGradients):
        if isinstance(estimator, Estimator) or checks.one_of("estimator", estimator, NAMES) not in ("bptt", _SYNTHETIC):
            raise ValueError(
                f"synthetic_gradients: are for back-propagation, expected estimator='bptt', got {_told(estimator)}"
            )
        estimator = _SYNTHETIC
    if isinstance(estimator, Estimator) or checks.one_of("estimator", estimator, NAMES) != "bptt":
        options = {"autograd": autograd, "second_derivatives": second_derivatives, "meta_loss": meta_loss is not None}
        given = [name for name, value in {**options, "coordinate_fraction": fraction < 1.0}.items() if value]
        if given:
            raise ValueError(f"{given[0]}: is of back-propagation, expected estimator='bptt', got {_told(estimator)}")
        made = _BY_NAME[estimator]() if isinstance(estimator, str) else estimator
        if not isinstance(made, Evolution):
            _refuse_orthogonal(net, _told(estimator))
        if isinstance(made, SyntheticGradients):
            _check_segments(net)
        return made
    _refuse_orthogonal(net, "'bptt'")
    networks = members(net).values()
    with_memory = any(member.has_memory for member in networks)
    unrolled = autograd or second_derivatives or meta_loss is not None or with_memory
    if unrolled and fraction < 1.0:
        raise ValueError("coordinate_fraction: expected 1 with autograd, only the fused backward can sample")
    if fraction < 1.0 and any(member.communicates for member in networks):
        raise ValueError("coordinate_fraction: expected 1 with a network whose coordinates communicate")
    return AutogradBPTT(meta_loss) if unrolled else FusedBPTT(fraction)


def _refuse_orthogonal(net: Networks, told: str) -> None:
    """ValueError for a network whose steps only :class:`Evolution` takes."""
    if any(member.orthogonal for member in members(net).values()):
        raise ValueError(
            "estimator: expected 'evolution' for a network that orthogonalizes its updates of matrices, which has no "
            f"backward of its own, got {told}"
        )


def _told(estimator: str | Estimator) -> str:
    return repr(estimator) if isinstance(estimator, str) else f"{type(estimator).__name__}"


def make(name: str, **options: Any) -> str | Estimator:
    """The argument ``estimator`` of that name, with options of its own: ``make("pes", sigma=0.02)``.

    Raises:
        TypeError, ValueError: an unknown name, an option that this estimator does not have, or one out of range.
    """
    kind = _BY_NAME.get(checks.one_of("estimator", name, NAMES))
    known = () if kind is None else tuple(inspect.signature(kind).parameters)
    unknown = [option for option in options if option not in known]
    if unknown:
        having = [each for each, other in _BY_NAME.items() if unknown[0] in inspect.signature(other).parameters]
        expected = f"expected estimator {' or '.join(map(repr, having))}, got {name!r}"
        raise ValueError(f"{unknown[0]}: {expected}" if having else f"estimator: no option {unknown[0]!r}")
    return "bptt" if kind is None else kind(**options)


def _check_segments(net: Networks) -> None:
    """ValueError for a network that is unrolled in autograd, where nothing can be injected."""
    for key, member in members(net).items():
        if member.has_memory or member.num_outputs > 1:
            which = f"net[{key!r}]" if key else "net"
            raise ValueError(
                f"synthetic_gradients: need the fused backward of segments, and {which} has a memory or several "
                "outputs, which are unrolled in autograd"
            )


def saved(protocol: Mapping[str, Any]) -> str | Estimator:
    """The argument ``estimator`` of a run whose checkpoint has this protocol."""
    name = protocol.get("estimator", "bptt")
    if name == "bptt":
        return "bptt"
    kind = _BY_NAME[name]
    return kind(**{option: protocol[option] for option in inspect.signature(kind).parameters})
