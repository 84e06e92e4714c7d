"""A coordinatewise predictor of what lies beyond a segment: d(future loss) / d(h, c, theta) at its end.

One small map, shared by all coordinates of a network's tensors. What it has to predict spans decades, over coordinates,
tensors and the course of an episode, so it predicts numbers of order 1 that are multiplied by what is known: with the
gradients g of f held constant the gradient of the future loss with respect to theta is ``sum_t w_t g_t`` over the steps
to come, the weight that is left times a mean gradient. So

    d / d theta = left * r * s_0 * (m / r * y_0 + g / r * y_0'),      d / d (h, c)_k = left * r * s_k * m / r * y_k

with y = V [tanh(W x), x], where left is the sum of the weights to come (0 at the end of an episode, where the
prediction is exact), r the root of a moving mean square of the coordinate's gradients and m their moving mean, s_k how
large the k-th target has been in these units, and x what the coordinate knows: its h and c, g / r, m / r, r as a
logarithm, and how much of the episode is over. V is zero at first; y_0' = 1 / s_0 says "the gradient stays what it is".

The factors m / r and g / r hold the prediction to the direction that gradients have. d / d phi is a sum over all
coordinates, in which what a predictor without them gets wrong in the same way everywhere, its constant above all, does
not average out: it made a meta-gradient worse than none before it made it better. Without s, the steps of Adam, which
are of one size for all outputs, would be far too large for those with small targets.

No prediction, and no target, is beyond 2 left r of theta, or 4 left r s_k of h and c: where gradients grow a
thousandfold, as on a plateau's edge, a few examples would be all that the map learns.

A prediction is believed as far as it has been right: what is used is the above times ``<p, t> / <p, p>`` of earlier
predictions p and their targets t, within [0, 1], one number for theta and one for (h, c). While phi moves fast, or what
is to come cannot be told, that is near 0, and what is left is truncated back-propagation.

Everything is kept in tiles, ``[tiles, rows, 64]``, as states are; what a tile holds beyond the last coordinate is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.config import Config
from ...kernels.state import TILE, State, num_tiles

BETA = 0.9  # of the moving means
_P = 10.0  # of the logarithm, as in appendix A of Andrychowicz et al. 2016
_SIZES = 0.95  # of the sizes of targets
_MOST = 2.0, 4.0  # of theta, in units of left * r; of h and c, in units of left * r * s
_NONE = 1e30  # no bound; times 0 it is one
_AGREEMENT = 0.95  # of what earlier predictions and their targets have in common
_ADAM = (0.9, 0.99, 1e-8)
_OTHERS = 5  # inputs beside h and c
_PARTS = ("value", "exp_avg", "exp_avg_sq")  # of a matrix, in checkpoints


def tiled(x: Tensor) -> Tensor:
    """The coordinates of a tensor as a row of tiles, float32 ``[tiles, 1, 64]``."""
    flat, tiles = x.detach().reshape(-1).float(), num_tiles(x.numel())
    return torch.nn.functional.pad(flat, (0, tiles * TILE - x.numel())).view(tiles, 1, TILE)


class Moments:
    """Moving means of a tensor's gradient and of its square, as at the last of ``steps`` gradients."""

    def __init__(self, param: Tensor) -> None:
        self.numel = param.numel()
        self.grad = self.mean = self.square = torch.zeros_like(tiled(param))
        self.steps = 0

    def update(self, grad: Tensor) -> None:
        self.grad = tiled(grad)
        self.mean = torch.lerp(self.mean, self.grad, 1 - BETA)
        self.square = torch.lerp(self.square, self.grad.square(), 1 - BETA)
        self.steps += 1


class Boundary(NamedTuple):
    """What is known of a tensor at the boundary of a segment.

    Attributes:
        x: the inputs, ``[tiles, inputs, 64]``.
        r: ``[tiles, 1, 64]``.
        inside: which places of the tiles hold a coordinate, ``[tiles, 1, 64]``.
        left: the sum of the weights of the losses to come.
    """

    x: Tensor
    r: Tensor
    inside: Tensor
    left: float

    @classmethod
    def of(
        cls,
        moments: Moments,
        state: State | None,
        config: Config,
        left: float,
        progress: float,
        tiles: Tensor | slice = slice(None),
    ) -> Boundary:
        """state: None before the tensor's first step. progress: the part of the episode that is over. tiles: some of
        the tensor's only."""
        rows, grad = config.rows - config.averages, moments.grad[tiles]
        correction = 1 - BETA**moments.steps
        r = (moments.square[tiles] / correction).sqrt()
        inverse = torch.where(r > 0, 1 / r, 0.0)
        if state is None:
            hidden = grad.new_zeros(grad.shape[0], rows, TILE)
        else:
            hidden = state.data[tiles][:, :rows].float().tanh()
        number = torch.arange(moments.grad.shape[0], device=grad.device)[tiles].view(-1, 1, 1)
        inside = number * TILE + torch.arange(TILE, device=grad.device) < moments.numel
        common = grad.new_tensor([1.0, progress]).view(1, 2, 1).expand(grad.shape[0], 2, TILE)
        size = (r.log() / _P).clamp_min(-1.0)
        x = torch.cat([hidden, grad * inverse, moments.mean[tiles] / correction * inverse, size, common], dim=1)
        return cls(x.masked_fill_(~inside, 0.0), r, inside, left)


class Example(NamedTuple):
    """What a predictor learns from, of some tiles of a tensor: the target at a boundary, with respect to theta
    ``[tiles, 1, 64]`` and (h, c) ``[tiles, rows, 64]``; and, for the auxiliary task, the prediction at the next
    boundary with the weight that is left there."""

    at: Boundary
    theta: Tensor
    state: Tensor
    following: Tensor | None = None  # [tiles, 1 + rows, 64]
    following_left: float = 0.0


class _Task(NamedTuple):
    """An example in relative units: ``V [tanh(W x), x] * s * scale`` should be the target."""

    x: Tensor
    scale: Tensor
    target: Tensor
    following: Tensor | None

    @classmethod
    def of(cls, example: Example) -> _Task | None:
        """None where nothing moves, or nothing is to come."""
        at, following = example.at, None
        size = at.r.square().mean().sqrt()
        if at.left == 0.0 or size == 0:
            return None
        if example.following is not None and example.following_left > 0.0:
            following = example.following / (example.following_left * size)
        return cls(at.x, at.r / size, torch.cat([example.theta, example.state], dim=1) / (at.left * size), following)

    def within(self, bounds: Tensor) -> _Task:
        """With a target that can be predicted."""
        most = bounds * self.scale
        return self._replace(target=torch.clamp(self.target, -most, most))


class Predictor:
    """The map of one network, and its Adam.

    Args:
        config: of the network. units: of the hidden layer. generator: on the CPU, of the first layer's weights.
        auxiliary: whether it also predicts the next boundary's prediction.
    """

    def __init__(self, config: Config, units: int, generator: torch.Generator, auxiliary: bool = False) -> None:
        rows = config.rows - config.averages
        inputs = rows + _OTHERS
        bound = 1.0 / math.sqrt(inputs)
        first = (2.0 * torch.rand(units, inputs, generator=generator, dtype=torch.float32, device="cpu") - 1.0) * bound
        self.values = {"W": first, "V": torch.zeros(2 + rows, units + inputs, dtype=torch.float32, device="cpu")}
        if auxiliary:
            self.values["V_aux"] = torch.zeros_like(self.values["V"])
        self.sizes = torch.ones(1 + rows, 1, dtype=torch.float32, device="cpu")
        self.agreement = torch.zeros(2, 2, dtype=torch.float32, device="cpu")  # <p, t>, <p, p>; of theta, of (h, c)
        self.means = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.squares = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.steps = 0

    def to(self, device: torch.device) -> Predictor:
        for each in (self.values, self.means, self.squares):
            each.update({name: value.to(device) for name, value in each.items()})
        self.sizes, self.agreement = self.sizes.to(device), self.agreement.to(device)
        return self

    def fits(self, config: Config) -> bool:
        rows = config.rows - config.averages
        return self.values["V"].shape[0] == 2 + rows and self.values["W"].shape[1] == rows + _OTHERS

    def is_zero(self) -> bool:
        """Whether it predicts zero whatever it sees, as it does before it has learned."""
        return not bool(self.values["V"].any() & self.trust().any())

    def trust(self) -> Tensor:
        """How far predictions are believed, of theta and of (h, c): ``[2]``, from 0 to 1."""
        found, own = self.agreement
        return torch.where(own > 0, found / own, 0.0).clamp(0.0, 1.0)

    def predict(self, at: Boundary) -> Tensor:
        """``[tiles, 1 + rows, 64]``: with respect to theta, then to h and c of every layer."""
        with torch.no_grad():
            trust = self.trust()[[0] + [1] * (len(self.sizes) - 1)].unsqueeze(1)
            return self._bounded(at.x) * trust * (at.left * at.r)

    def learn(self, examples: Sequence[Example], lr: float, auxiliary: float = 0.0) -> float | None:
        """One step of Adam down the squared error, relative to the tensor's root mean square gradient, the weight that
        is left and ``s``; returns that error before, None if it is not finite and the step was left out."""
        tasks = [task for example in examples if (task := _Task.of(example)) is not None]
        if not tasks:
            return None
        bounds = self._bounds()
        tasks = [task.within(bounds) for task in tasks]
        square = torch.stack([task.target.square().mean((0, 2)) for task in tasks]).mean(0).unsqueeze(1)
        agreement = torch.lerp(self.agreement, self._agreement(tasks), 1 - _AGREEMENT)
        kept = _SIZES if self.steps else 0.0
        sizes = (kept * self.sizes.square() + (1 - kept) * square).sqrt()
        inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
        values = {name: value.detach().requires_grad_() for name, value in self.values.items()}
        total = torch.zeros((), dtype=torch.float32, device=sizes.device)
        for task in tasks:
            error = _error(self._relative(task.x, values, "V") * task.scale, task.target * inverse)
            if auxiliary and task.following is not None:
                later = self._relative(task.x, values, "V_aux") * task.scale
                error = error + auxiliary * _error(later, task.following * inverse)
            total = total + error / len(tasks)
        grads = torch.autograd.grad(total, list(values.values()), allow_unused=True, materialize_grads=True)
        if not bool(torch.stack([each.isfinite().all() for each in (total.detach(), sizes, agreement, *grads)]).all()):
            return None
        self.sizes, self.agreement = sizes, agreement
        self._step(dict(zip(values, grads, strict=True)), lr)
        return float(total.detach())

    @torch.no_grad()
    def _agreement(self, tasks: Sequence[_Task]) -> Tensor:
        """<p, t> and <p, p> of present predictions, as parts of <p, p> + <t, t>: every segment counts alike."""
        total = torch.zeros(2, 2, dtype=torch.float32, device=self.sizes.device)
        for task in tasks:
            p, t = self._bounded(task.x) * task.scale, task.target
            for k, (own, target) in enumerate(((p[:, :1], t[:, :1]), (p[:, 1:], t[:, 1:]))):
                square = own.square().sum()
                both = torch.stack([(own * target).sum(), square]) / (square + target.square().sum())
                total[:, k] += torch.where(square > 0, both, 0.0)
        return total / len(tasks)

    def _bounds(self) -> Tensor:
        """Of what is predicted, and of targets, in units of ``left * r``; at first h and c have none."""
        bounds = _MOST[1] * self.sizes if self.steps else torch.full_like(self.sizes, _NONE)
        bounds[0] = _MOST[0]
        return bounds

    def _bounded(self, x: Tensor) -> Tensor:
        bounds = self._bounds()
        return torch.clamp(self._relative(x, self.values, "V") * self.sizes, -bounds, bounds)

    @staticmethod
    def _relative(x: Tensor, values: Mapping[str, Tensor], head: str) -> Tensor:
        hidden = torch.matmul(values["W"], x).tanh()
        y = torch.matmul(values[head], torch.cat([hidden, x], dim=1))
        rows = y.shape[1] - 2
        grad, mean = x[:, rows : rows + 1], x[:, rows + 1 : rows + 2]
        # y_0' is the last row.
        return torch.cat([mean * y[:, :1] + grad * y[:, -1:], mean * y[:, 1:-1]], dim=1)

    @torch.no_grad()
    def _step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        first, second, eps = _ADAM
        self.steps += 1
        for name, grad in grads.items():
            mean, square = self.means[name].lerp(grad, 1 - first), self.squares[name].lerp(grad.square(), 1 - second)
            root = (square / (1 - second**self.steps)).sqrt() + eps
            self.values[name] = self.values[name] - lr / (1 - first**self.steps) * mean / root
            self.means[name], self.squares[name] = mean, square

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Tensor]:
        """A snapshot: nothing here is ever changed in place."""
        parts = {"value": self.values, "exp_avg": self.means, "exp_avg_sq": self.squares}
        found = {f"{name}.{part}": value for part, each in parts.items() for name, value in each.items()}
        return {
            **found,
            "sizes": self.sizes,
            "agreement": self.agreement,
            "step": torch.tensor(self.steps, device="cpu"),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], units: int, auxiliary: bool) -> Predictor:
        """What :meth:`state_dict` was taken of; ValueError if it was not, or of one with other options."""
        names = ["W", "V", *(["V_aux"] if auxiliary else [])]
        expected = {*(f"{name}.{part}" for name in names for part in _PARTS), "sizes", "agreement", "step"}
        if set(state) != expected:
            raise ValueError(f"checkpoint: expected the predictor's {sorted(expected)}, got {sorted(state)}")
        made = cls.__new__(cls)
        parts = ({name: state[f"{name}.{part}"] for name in names} for part in _PARTS)
        made.values, made.means, made.squares = parts
        made.sizes, made.agreement, made.steps = state["sizes"], state["agreement"], int(state["step"])
        first = made.values["W"]
        inputs = first.shape[1] if first.dim() == 2 else 0
        shapes = {"W": (units, inputs), "V": (inputs - _OTHERS + 2, units + inputs)}
        shapes["V_aux"] = shapes["V"]
        shapes.update(sizes=(inputs - _OTHERS + 1, 1), agreement=(2, 2))
        others = {"sizes": made.sizes, "agreement": made.agreement}
        for each in (made.values, made.means, made.squares, others):
            for name, value in each.items():
                if tuple(value.shape) != shapes[name] or not value.is_floating_point():
                    raise ValueError(
                        f"checkpoint: expected the predictor's {name} of shape {shapes[name]}, got {tuple(value.shape)}"
                    )
        return made


def _error(found: Tensor, target: Tensor) -> Tensor:
    """Of theta and, where there are any, of (h, c), mean squares that count alike."""
    square = (found - target).square()
    return square[:, :1].mean() + (square[:, 1:].mean() if square.shape[1] > 1 else 0.0)
