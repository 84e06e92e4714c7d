"""K optimizees side by side, with their parameters and losses in other units: z -> a f(c * z)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..base import Task
from .draws import Draw
from .layers import Theta
from .optimizee import Batch, Optimizee

RESCALINGS = ("none", "global", "tensor", "coordinate")
# ln c ~ U(-3, 3), as in Lv et al. 2017, section 4.1.
WIDTH = 3.0


class ZooTask(Task):
    """K problems of one architecture, which differ in theta_0, minibatches and units.

    Parameters lead with K and have torch's shapes behind it, float32: weights ``[K, out, in]``, kernels
    ``[K, out, in, kh, kw]``, biases ``[K, out]``, embeddings ``[K, vocabulary, width]``.

    Attributes:
        family: the name of the family that it is from.
        label: the architecture, in words.
        rescaling: "none", "global", "tensor" or "coordinate": what has a factor c of its own.
        loss_scales: float32 ``[K]``, the factors a; ``losses() / loss_scales`` are the losses in their usual units.
    """

    loss_scales: Tensor
    has_problem_dimension = True  # of one problem, too

    def __init__(
        self,
        draw: Draw,
        optimizee: Optimizee,
        problems: int,
        family: str,
        rescaling: str = "none",
        rescale_losses: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(draw.generator)
        self.num_problems = problems
        self.family = family
        self.label = optimizee.label
        self.rescaling = rescaling
        self._net = optimizee.net
        self._source = optimizee.source
        self._names = tuple(optimizee.leaves)
        one_c = (2 * draw.rand(problems) - 1) * WIDTH
        for name, leaf in optimizee.leaves.items():
            value = leaf.initial(problems, draw)
            if rescaling != "none":
                log_c = one_c.view(-1, *[1] * len(leaf.shape))
                if rescaling == "tensor":
                    log_c = (2 * draw.rand(*log_c.shape) - 1) * WIDTH
                elif rescaling == "coordinate":
                    log_c = (2 * draw.rand(*value.shape) - 1) * WIDTH
                # Not persistent: seed and split determine them, like the data.
                self.register_buffer(_factor(name), log_c.exp().to(device), persistent=False)
                value = value / log_c.exp()
            self.register_parameter(name, nn.Parameter(value.to(device)))
        log_a = (2 * draw.rand(problems) - 1) * WIDTH * rescale_losses
        self.register_buffer("loss_scales", log_a.exp().to(device), persistent=False)

    def forward(self) -> Tensor:
        """The sum of the K losses, each on a fresh minibatch of its own: a scalar."""
        return self.losses().sum()

    def losses(self) -> Tensor:
        """The K losses ``[K]``, each on a fresh minibatch of its own."""
        return self.losses_on(self.minibatch())

    def losses_on(self, batch: Batch) -> Tensor:
        """The K losses ``[K]`` on a minibatch of :meth:`minibatch`."""
        return self._net.losses(self.theta(), batch) * self.loss_scales

    def losses_of(self, parameters: Theta, batch: Batch) -> Tensor:
        """The losses, in f's own units, of other parameters than the task's, by name and in z's units; of one problem
        for any number of copies of it, ``[copies, ...]``."""
        return self._net.losses(self._in_units(parameters), batch)

    def minibatch(self) -> Batch:
        """The next minibatch of every problem; all tensors lead with K. Floats have theta's dtype."""
        like = self.loss_scales
        return tuple(
            value.to(like.device, like.dtype if value.is_floating_point() else None)
            for value in self._source.draw(self.num_problems, Draw(self.generator))
        )

    def theta(self) -> dict[str, Tensor]:
        """The parameters in f's own units, c * z, by name."""
        return self._in_units({name: getattr(self, name) for name in self._names})

    def _in_units(self, parameters: Theta) -> Theta:
        if self.rescaling == "none":
            return parameters
        return {name: value * getattr(self, _factor(name)) for name, value in parameters.items()}

    @property
    def coordinates(self) -> int:
        """The number of coordinates of one problem."""
        return sum(parameter.numel() for parameter in self.parameters()) // self.num_problems

    def fan_in(self, name: str) -> int:
        """Inputs per output of the parameter, by its shape for one problem, as torch counts them: the product of all
        dimensions but the first; 1 for vectors. ValueError if there is no such parameter."""
        shape = self._shape(name)
        return 1 if len(shape) < 2 else shape[1:].numel()

    def is_vector(self, name: str) -> bool:
        """Whether the parameter of one problem has one dimension: biases, gains, offsets. ValueError if there is no
        such parameter."""
        return len(self._shape(name)) < 2

    def _shape(self, name: str) -> torch.Size:
        if name not in self._names:
            raise ValueError(f"name must be one of {self._names}, got {name!r}")
        return getattr(self, name).shape[1:]

    def extra_repr(self) -> str:
        return f"{self.num_problems} x {self.family} ({self.label}), {self.coordinates} coordinates each"


def _factor(name: str) -> str:
    return f"factor_of_{name}"
