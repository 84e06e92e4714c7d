"""What an optimizee is: a Problem is a distribution over functions f, a Task one function drawn from it.

Andrychowicz et al. 2016, section 2: an optimizer is trained on, and judged by, functions f drawn from a distribution.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..kernels import checks
from ..kernels.checks import non_negative as non_negative  # for problems of users
from ..kernels.checks import one_of as one_of
from ..kernels.checks import positive_int as positive_int
from ..kernels.checks import widths as widths
from . import sealed

SPLITS = ("train", "validation", "test")

MAX_STEPS = 10_000_000  # of an optimization; more is a slip of the pen, and lists of losses are kept

# How tasks draw their numbers: whatever torch.set_default_dtype and torch.set_default_device say.
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class Task(nn.Module):
    """One sampled optimizee f: its ``parameters()`` are theta, calling it evaluates f(theta).

    ``forward()`` takes nothing and returns a scalar: the loss on a freshly drawn minibatch, where the problem has
    minibatches. A task may hold several independent problems side by side (``num_problems``); ``forward()`` then
    returns the *sum* of their losses, so that each coordinate receives its own problem's gradient, and a reported loss
    is that sum divided by ``num_problems``.

    All randomness comes from ``generator``, a CPU generator whatever the device; its state together with
    ``state_dict()`` is the state of the task. Tasks work under ``torch.func.functional_call(task, parameters, ())`` and
    can be differentiated twice.
    """

    num_problems: int = 1
    origin: str = ""  # where it comes from, in words, for error messages

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    @property
    def side_by_side(self) -> int:
        """How many independent problems the task holds: ``num_problems``, unless that only takes out a factor."""
        return int(self.num_problems)

    @property
    def has_problem_dimension(self) -> bool:
        """Whether the first dimension of every parameter is that of the problems, so that a problem's own tensors have
        one dimension less: it is, of several side by side."""
        return self.side_by_side > 1

    def forward(self) -> torch.Tensor:
        """The loss at the present parameters: a scalar, differentiable in them."""
        raise TypeError(f"{type(self).__name__} must define forward()")

    def losses_by_problem(self) -> torch.Tensor | None:
        """The loss of each of several independent problems at the present parameters, ``[num_problems]``, where that is
        known and not a matter of a minibatch; their sum is what ``forward()`` returns."""
        return None

    def held_out_error(self) -> float | None:
        """The share of held-out examples that the present parameters get wrong, where there are such examples."""
        return None

    def hidden_modules(self) -> list[nn.Module]:
        """Modules that ``forward()`` evaluates although they are no submodules: theta is not in them, functions of it
        are."""
        return []

    def parameter_groups(self) -> dict[str, list[str]]:
        """The names of all parameters by kind, for optimizers that treat kinds differently; one kind by default."""
        return {"all": [name for name, _ in self.named_parameters()]}


class Problem(ABC):
    """A distribution over tasks. Subclasses give ``name``, ``make_task`` and ``config``."""

    name: str

    def sample(self, seed: int, split: str = "train", device: torch.device | str | None = None) -> Task:
        """Draw a task, at its own initial parameters theta_0.

        The same ``(seed, split)`` gives the same task, the same theta_0 and the same minibatches on every call; the
        global random state is neither read nor changed. Different splits never give the same problem, and use disjoint
        data where the problem has data.

        Args:
            seed: any integer.
            split: "train", "validation" or "test".
            device: where the parameters live; None is the CPU.

        Raises:
            ValueError: ``split`` is none of the three, there is no such device, or the task is a sealed one
                (:mod:`l2l_fast.problems.sealed`).
            TypeError: ``seed`` is not an integer.
        """
        number = checks.as_int(seed)
        if number is not None:
            sealed.check(number)
        place = torch.device("cpu") if device is None else checks.device("device", device, with_values=False)
        task = self.make_task(task_generator(seed, split), split, place)
        task.origin = f"problem {self.name!r}, task {seed} of split {split!r}"
        return task

    @abstractmethod
    def make_task(self, generator: torch.Generator, split: str, device: torch.device) -> Task:
        """Build the task that ``generator`` (CPU, freshly seeded; the task's own from now on) determines."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The name and the options as JSON-able values, for logs and checkpoints.

        For the problems of this package ``l2l_fast.problems.get(**config)`` builds the same problem again.
        """

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.config().items() if key != "name")
        return f"{type(self).__name__}({options})"


def task_generator(seed: int, split: str) -> torch.Generator:
    """The CPU generator of the task ``(seed, split)``.

    torch's CPU generator uses 32 bits of its seed: the two upper ones hold the split, so that no two splits ever share
    a stream of random numbers; the others are a hash of ``seed``, so that neighbouring seeds are unrelated.

    Raises:
        ValueError: ``split`` is not "train", "validation" or "test".
        TypeError: ``seed`` is not an integer.
    """
    split = checks.one_of("split", split, SPLITS)
    number = checks.as_int(seed)
    if number is None:
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    digest = hashlib.blake2b(str(number).encode(), digest_size=4).digest()
    bits = (SPLITS.index(split) << 30) | (int.from_bytes(digest, "big") >> 2)
    return torch.Generator().manual_seed(bits)


def horizon_of(value: int) -> int:
    """The argument ``horizon``, how many steps: 1 to MAX_STEPS. Errors as
    :func:`l2l_fast.kernels.checks.positive_int`."""
    number = checks.positive_int("horizon", value)
    if number > MAX_STEPS:
        raise ValueError(f"horizon must be at most {MAX_STEPS:,} steps, got {number:,}")
    return number


def seeds_of(name: str, values: Iterable[int]) -> list[int]:
    """The seeds of several tasks as plain ints, all of them looked at before the first is used.

    Raises:
        TypeError: not a sequence, or not of integers.
        ValueError: there are none.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected several integers, such as range(20), got {values!r}")
    found = []
    for value in values:
        number = checks.as_int(value)
        if number is None:
            raise TypeError(f"{name}: expected integers, got {value!r}")
        found.append(number)
    if not found:
        raise ValueError(f"{name} must name at least one task, got none")
    return found
