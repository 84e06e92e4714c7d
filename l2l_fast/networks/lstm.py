"""phi, the network that learns to optimize: a coordinatewise LSTM (Andrychowicz et al. 2016, section 2.1)."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.autograd import forward_ad

from ..kernels import checks, normalized, operators, reference
from ..kernels.renamed import takes_groups
from ..kernels.state import State
from . import effective, files
from .configuration import checked_config
from .files import FILE_FORMAT as FILE_FORMAT
from .files import PLAIN_VERSION as FILE_VERSION  # noqa: F401
from .files import load as load

if TYPE_CHECKING:
    from .memory import Memory


@files.known
class CoordinatewiseLSTM(nn.Module):
    """A small LSTM applied to every coordinate alike: shared weights, one recurrent state per coordinate.

    Args:
        hidden_size: units per layer, 4..64 (the paper: 20).
        num_layers: 1..4 (the paper: 2). A normalized network may do without an LSTM, ``num_layers=0, hidden_size=0``:
            its state are the moving averages, and its update is the nominal one, which ``weight_nominal`` makes.
        preprocess: ``"log_sign"`` (appendix A: two inputs per coordinate), ``"identity"`` (the raw gradient) or
            ``"normalized"`` (five inputs without a scale, made of the gradient and its moving averages, and an update
            that is Adam's times a bounded gain plus a bounded correction: :mod:`l2l_fast.kernels.normalized`).
        p: constant of log_sign; gradients below ``e^-p`` enter linearly. In (0, 70].
        output_scale: the update is multiplied by it (the paper's MNIST experiments: 0.1); the learning rate of the
            Adam that a new normalized network is.
        gac_cells: global averaging cells, 0..hidden_size (appendix D): the outgoing activations of the first so many
            cells of every layer are replaced by their mean over all coordinates, upward and as the next recurrent
            input; their c stays per coordinate.
        extra_inputs: inputs per coordinate beside the gradient, 0..16, not preprocessed.
        num_outputs: outputs per coordinate, 1..16; the first is the update, and only that is scaled by output_scale.
        tensor_inputs: inputs that all coordinates of a tensor have in common, 0..16, of a normalized network.
        betas: decay rates of its moving averages m1, m2, v1, v2, in [0.5, 1 - 2^-20]; by default 0.9, 0.99, 0.95 and
            0.999.
        device, dtype: of the parameters.

    Parameters, named as in :class:`torch.nn.LSTM` (gate rows i, f, g, o; one bias per layer): ``weight_ih_l{k}``
    [4H, in], ``weight_hh_l{k}`` [4H, H], ``bias_l{k}`` [4H], and the read-out ``weight_out`` [num_outputs, H],
    ``bias_out`` [num_outputs] (of a normalized network two rows, gain and correction, at first zero); with
    tensor_inputs also ``weight_tensor`` [4H, tensor_inputs], a part of the first layer's bias, and ``weight_nominal``
    [4, tensor_inputs], at first zero, which makes ``nominal`` of them (:meth:`nominal_of`): no meta-gradient goes
    through that, so it is trained by evolution strategies (``estimator="evolution"``).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, or a normalized network with gac_cells,
            extra_inputs or several outputs, or another one with tensor_inputs or betas; the message names it.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocess: str = "log_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
        gac_cells: int = 0,
        extra_inputs: int = 0,
        num_outputs: int = 1,
        *,
        tensor_inputs: int = 0,
        betas: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = (hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs)
        self.config = checked_config(*sizes, tensor_inputs, betas)
        hidden = self.config.hidden_size
        names = []
        for k in range(self.config.num_layers):
            for name, shape in (
                (f"weight_ih_l{k}", (4 * hidden, self.config.inputs(k))),
                (f"weight_hh_l{k}", (4 * hidden, hidden)),
                (f"bias_l{k}", (4 * hidden,)),
            ):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                names.append(name)
        read_outs = self.config.read_outs
        self.weight_out = nn.Parameter(torch.empty((read_outs, hidden), device=device, dtype=dtype))
        self.bias_out = nn.Parameter(torch.empty(read_outs, device=device, dtype=dtype))
        names += ["weight_out", "bias_out"]
        if self.tensor_inputs:
            shape = (4 * hidden, self.tensor_inputs)
            self.weight_tensor = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            names.append("weight_tensor")
            # Beside phi: it acts through nominal, which counts as a constant, so no meta-gradient reaches it.
            shape = (len(normalized.NOMINAL_BOUNDS), self.tensor_inputs)
            self.weight_nominal = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            names.append("weight_nominal")
        self._names = tuple(names)
        self._in_phi = self._names[:-1] if self.tensor_inputs else self._names  # in its order
        self.reset_parameters()

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def preprocess(self) -> str:
        return self.config.preprocess

    @property
    def p(self) -> float:
        return self.config.p

    @property
    def output_scale(self) -> float:
        return self.config.output_scale

    @property
    def gac_cells(self) -> int:
        return self.config.gac_cells

    @property
    def extra_inputs(self) -> int:
        return self.config.extra_inputs

    @property
    def num_outputs(self) -> int:
        return self.config.num_outputs

    @property
    def tensor_inputs(self) -> int:
        return self.config.tensor_inputs

    @property
    def betas(self) -> tuple[float, ...] | None:
        return self.config.betas

    @property
    def communicates(self) -> bool:
        """Whether a coordinate's update depends on other coordinates: then all of an optimizee are one step."""
        return self.gac_cells > 0

    @property
    def has_memory(self) -> bool:
        """Whether its extra inputs are read from a memory, which :meth:`memory_for` gives and its outputs write."""
        return False

    @property
    def moves(self) -> bool:
        """Whether its update is not its first output but what :meth:`move` makes of all of them and the memory."""
        return False

    orthogonal: bool = False  # whether updates of matrices are orthogonalized: :class:`l2l_fast.OrthogonalLSTM`
    add_read: bool = False  # whether the first of the extra inputs is added to the update

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able: what files and checkpoints store. Those of a plain network do not
        name extra_inputs and num_outputs; only those of a normalized one name tensor_inputs and betas."""
        return {**self.config.asdict(), "gac_cells": self.gac_cells}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as the authors' code does: a normal truncated at two standard deviations, std
        ``1 / sqrt(in + H)`` for weights and biases of the LSTM layers and ``1 / sqrt(H)`` for the read-out, whose bias
        is zero. The forget-gate bias of 1, which that code adds at run time, is part of the trainable bias here. The
        whole read-out of a normalized network is zero: it begins as Adam."""
        hidden = self.hidden_size
        for weight_ih, weight_hh, bias in self._layers():
            std = 1.0 / math.sqrt(weight_ih.shape[1] + hidden)
            for parameter in (weight_ih, weight_hh, bias):
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
            bias[hidden : 2 * hidden] += 1.0
        if self.config.averages:
            self.weight_out.zero_()
        else:
            std = 1.0 / math.sqrt(hidden)
            nn.init.trunc_normal_(self.weight_out, std=std, a=-2 * std, b=2 * std, generator=generator)
        nn.init.zeros_(self.bias_out)
        if self.tensor_inputs:
            std = 1.0 / math.sqrt(self.tensor_inputs + hidden)
            if hidden:
                nn.init.trunc_normal_(self.weight_tensor, std=std, a=-2 * std, b=2 * std, generator=generator)
            nn.init.zeros_(self.weight_nominal)

    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        names = ("weight_ih_l", "weight_hh_l", "bias_l")
        return [tuple(effective.weight(self, f"{name}{k}") for name in names) for k in range(self.num_layers)]  # type: ignore[misc]

    def phi(self) -> Tensor:
        """All parameters as one flat vector ``[P]``, differentiable, in the order the operators expect."""
        own = self._parameters  # one dictionary look-up; a parametrized one is no longer there
        parts = [own[name] if name in own else effective.weight(self, name) for name in self._in_phi]
        return _flatten_dense_tensors(parts)  # torch.cat of flat views, in one call

    def nominal_of(self, tensor_inputs: Tensor) -> Tensor:
        """``nominal`` of tensors with these inputs ``[tensors, tensor_inputs]``: what ``weight_nominal`` makes of them,
        see :func:`l2l_fast.kernels.normalized.nominal_of`. Of a network without such inputs ValueError."""
        if not self.tensor_inputs:
            raise ValueError("tensor_inputs: the network has none")
        return normalized.nominal_of(effective.weight(self, "weight_nominal"), tensor_inputs)

    def beside_phi(self) -> list[Tensor]:
        """Weights that act on steps and are no part of :meth:`phi`: constants in the meta-gradient."""
        return [effective.weight(self, "weight_nominal")] if self.tensor_inputs else []

    def orthogonal_gains(self, tensor_inputs: Tensor) -> Tensor:
        """Of a network that is ``orthogonal``: see :meth:`l2l_fast.OrthogonalLSTM.orthogonal_gains`."""
        raise NotImplementedError(f"{type(self).__name__} orthogonalizes nothing")

    def init_state(
        self, numel: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> State:
        """The zero state of ``numel`` coordinates (on the network's device by default)."""
        if device is None:
            device = self.weight_out.device
        averages = self.config.averages
        return State.zeros(numel, self.hidden_size, self.num_layers, device=device, dtype=dtype, averages=averages)

    # ---- the same three for all networks, those with a memory included ----

    def memory_for(
        self,
        numel: int,
        num_problems: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        entries: Mapping[str, Any] | None = None,
    ) -> Memory | None:
        """The memory of an optimizee of ``numel`` coordinates, None for a network without: one that shares the tensors
        ``entries`` where they are of this device and dtype (see :meth:`NTMBFGS.memory_from`), or a new one.

        Raises:
            TypeError, ValueError: entries are missing, or do not fit the network or the coordinates.
        """
        return None

    def step_with(
        self, grad: Tensor, state: State, num_problems: int = 1, memory: Memory | None = None
    ) -> tuple[Tensor, State, Memory | None]:
        """:meth:`forward` with whatever memory the network has: the update alone, new state, new memory."""
        out, state = self(grad, state, num_problems)
        return (out[0].to(grad.dtype) if self.num_outputs > 1 else out), state, None

    def seen(self, grad: Tensor, memory: Memory) -> Tensor:
        """Of a network that ``moves``: see :meth:`NTMBFGS.seen`."""
        raise NotImplementedError(f"{type(self).__name__} moves nothing by a memory")

    def move(self, out: Tensor, grad: Tensor, memory: Memory, lr: float = 1.0) -> tuple[Tensor, Memory]:
        """Of a network that ``moves``: see :meth:`NTMBFGS.move`."""
        raise NotImplementedError(f"{type(self).__name__} moves nothing by a memory")

    def keep_(self, written: Memory, step: Tensor, memory: Memory) -> None:
        """Of a network that ``moves``: see :meth:`NTMBFGS.keep_`."""
        raise NotImplementedError(f"{type(self).__name__} moves nothing by a memory")

    def write_(self, out: Tensor, memory: Memory) -> None:
        """Let the outputs ``[num_outputs, numel]`` of a step, in the order of the memory, write to it in place."""
        raise NotImplementedError(f"{type(self).__name__} has no memory")

    @takes_groups(stacklevel=4)  # through torch's __call__
    def forward(
        self,
        grad: Tensor,
        state: State,
        num_problems: int = 1,
        extra: Tensor | None = None,
        tensor_inputs: Tensor | Sequence[float] | None = None,
        nominal: Tensor | Sequence[float] | None = None,
    ) -> tuple[Tensor, State]:
        """``update, new_state = phi(grad, state)``: functional, differentiable in grad, state, extra and parameters; of
        a normalized network in h and c of the state and parameters alone, all else is a constant.

        Args:
            grad: any shape and strides, real floating point. float32, bfloat16 and float16 run in the fused kernel in
                float32 arithmetic; float64 (of grad or state) runs in :mod:`l2l_fast.reference`, and so does every
                dtype under the transforms of :mod:`torch.func` and in forward-mode differentiation.
            state: from :meth:`init_state` or an earlier step, for ``grad.numel()`` coordinates.
            num_problems: independent problems side by side (leading dimension): global averages do not mix them. An
                optimizee of several tensors is one ``grad`` of all its coordinates, see
                :func:`l2l_fast.reference.join`.
            extra: ``[extra_inputs, *grad.shape]``, float32 (float64 beside a float64 grad or state); None without.
            tensor_inputs: of a network with tensor_inputs, so many numbers; None without.
            nominal: of a normalized network, five numbers: gain, mu, nu, lam, correction; default: what it makes of its
                tensor_inputs; without them 0, 0, 0, 0, 0.5.

        Returns:
            update, of grad's shape and dtype, and the new state. ``theta + update`` is the next iterate. With several
            outputs: all of them, ``[num_outputs, *grad.shape]``, float32 or float64, the update first.

        Raises:
            TypeError: grad is not real floating point or is sparse; state is not a :class:`State`.
            ValueError: state is for another number of coordinates or another network; num_problems does not divide it;
                extra, tensor_inputs or nominal are missing, superfluous or of the wrong shape; devices differ; a
                normalized network with several problems.
            NotImplementedError: no kernel for the device in this build.
        """
        checks.check_gradient("grad", grad)
        if not isinstance(state, State):
            raise TypeError(f"state: expected l2l_fast.State, got {type(state).__name__}")
        averages = self.config.averages
        sizes = (grad.numel(), self.hidden_size, self.num_layers, averages)
        if (state.numel, state.hidden_size, state.num_layers, state.averages) != sizes:
            more = f"averages={averages}, " if averages != state.averages else ""
            raise ValueError(
                f"state: expected numel={grad.numel()}, hidden_size={self.hidden_size}, num_layers={self.num_layers}, "
                f"{more}got {state!r}"
            )
        if not grad.device == state.device == self.weight_out.device:
            raise ValueError(
                f"grad, state and network must be on one device, got {grad.device}, {state.device} and "
                f"{self.weight_out.device}"
            )
        checks.check_problems(num_problems, grad.numel())
        checks.check_extra(extra, self.extra_inputs, grad)
        wide = grad.dtype == torch.float64 or state.dtype == torch.float64
        common = [
            None
            if value is None
            else torch.as_tensor(value, dtype=torch.float64 if wide else torch.float32, device=grad.device).contiguous()
            for value in (tensor_inputs, nominal)
        ]
        reference.check_common(self.config, num_problems, *common)
        if self.tensor_inputs and common[1] is None:
            common[1] = self.nominal_of(common[0].unsqueeze(0))[0].to(common[0].dtype)  # type: ignore[union-attr]
        if wide or is_transformed(grad, state.data, extra, *self.parameters()):
            update, logical = reference.step(self, grad, state.to_logical(), num_problems, extra, *common)
            return update, State.from_logical(logical)
        phi = self.phi().float()
        extra = None if extra is None else extra.float().contiguous()
        arguments, age = (grad, extra, state.data, phi, self.config, num_problems), 0
        if averages:
            age = state.age + 1
            inputs, nominal = (None if value is None else value.unsqueeze(0) for value in common)
            update, data = operators.step(*arguments, ages=[age], tensor_inputs=inputs, nominal=nominal)
        else:
            update, data = operators.step(*arguments)
        if self.num_outputs == 1:
            update = update.view(grad.shape).to(grad.dtype)
        return update, State(data, state.numel, state.hidden_size, state.num_layers, averages, age)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.asdict().items())

    # Copies and pickles of a pruned or normalised network; of a parametrized one torch allows copies only.

    def __deepcopy__(self, memo: dict[int, Any]) -> CoordinatewiseLSTM:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(effective.kept(self), memo)
        effective.remake(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return effective.kept(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        effective.remake(self)

    # ---- exchange with torch.nn ----

    def to_lstm_cells(self) -> tuple[list[nn.LSTMCell], nn.Linear]:
        """The same network as one :class:`torch.nn.LSTMCell` per layer and a :class:`torch.nn.Linear`
        (H -> num_outputs, of a normalized network H -> 2).

        Copies. The cells' second bias is zero; preprocessing and output_scale are not part of them.

        Raises:
            ValueError: the network has global averaging cells, which torch's cells cannot express.
        """
        if self.gac_cells:
            raise ValueError(
                f"gac_cells: torch.nn.LSTMCell has no means over coordinates, so a network with gac_cells="
                f"{self.gac_cells} cannot be written as LSTM cells; expected 0"
            )
        if not self.num_layers:
            raise ValueError("num_layers: without layers there is no LSTM cell to write; expected 1..4, got 0")
        if self.tensor_inputs:
            raise ValueError(
                f"tensor_inputs: torch.nn.LSTMCell has no inputs in common, so a network with tensor_inputs="
                f"{self.tensor_inputs} cannot be written as LSTM cells; expected 0"
            )
        place: dict[str, Any] = {"device": self.weight_out.device, "dtype": self.weight_out.dtype}
        cells = []
        linear = nn.utils.skip_init(nn.Linear, self.hidden_size, self.config.read_outs, **place)
        with torch.no_grad():
            for weight_ih, weight_hh, bias in self._layers():
                cell = nn.utils.skip_init(nn.LSTMCell, weight_ih.shape[1], self.hidden_size, **place)
                cell.weight_ih.copy_(weight_ih)
                cell.weight_hh.copy_(weight_hh)
                cell.bias_ih.copy_(bias)
                cell.bias_hh.zero_()
                cells.append(cell)
            linear.weight.copy_(effective.weight(self, "weight_out"))
            linear.bias.copy_(effective.weight(self, "bias_out"))
        return cells, linear

    @classmethod
    def from_lstm_cells(
        cls,
        cells: Sequence[nn.LSTMCell],
        linear: nn.Linear,
        preprocess: str = "log_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
        *,
        extra_inputs: int = 0,
        num_outputs: int = 1,
    ) -> CoordinatewiseLSTM:
        """A network from one :class:`torch.nn.LSTMCell` per layer and a ``Linear(H, num_outputs)``; copies their
        weights.

        The two biases of each cell are added. Raises ValueError if the sizes do not chain up (2 -> H for log_sign or
        1 -> H for identity or 5 -> H for normalized, plus extra_inputs, then H -> H, then H -> num_outputs, or H -> 2
        for normalized), TypeError for other modules.
        """
        cells = list(cells)
        for k, cell in enumerate(cells):
            if not isinstance(cell, nn.LSTMCell):
                raise TypeError(f"cells[{k}]: expected torch.nn.LSTMCell, got {type(cell).__name__}")
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected torch.nn.Linear, got {type(linear).__name__}")
        if not cells:
            raise ValueError("cells: expected at least one LSTMCell, got none")
        hidden = cells[0].hidden_size
        net = nn.utils.skip_init(
            cls,
            hidden,
            len(cells),
            preprocess,
            p,
            output_scale,
            0,
            extra_inputs,
            num_outputs,
            device=cells[0].weight_ih.device,
            dtype=cells[0].weight_ih.dtype,
        )
        for k, cell in enumerate(cells):
            expected = (net.config.inputs(k), hidden)
            if (cell.input_size, cell.hidden_size) != expected:
                raise ValueError(
                    f"cells[{k}]: expected input_size, hidden_size = {expected}, got "
                    f"{(cell.input_size, cell.hidden_size)} (preprocess={preprocess!r})"
                )
        if (linear.in_features, linear.out_features) != (hidden, net.config.read_outs):
            raise ValueError(
                f"linear: expected Linear({hidden}, {net.config.read_outs}), got "
                f"Linear({linear.in_features}, {linear.out_features})"
            )
        with torch.no_grad():
            for cell, (weight_ih, weight_hh, bias) in zip(cells, net._layers(), strict=True):
                weight_ih.copy_(cell.weight_ih)
                weight_hh.copy_(cell.weight_hh)
                bias.copy_(cell.bias_ih + cell.bias_hh) if cell.bias else bias.zero_()
            net.weight_out.copy_(linear.weight)
            net.bias_out.zero_() if linear.bias is None else net.bias_out.copy_(linear.bias)
        return net

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration and, if the network carries one, the record of its training
        (:func:`l2l_fast.meta.record_of`) to one safetensors file, atomically: after a crash at any moment the path
        holds either the old file or the new one. :func:`l2l_fast.load` reads it.

        Weights that are pruned (``torch.nn.utils.prune``) or parametrized (``parametrize``, ``weight_norm``, ...) are
        written as what the network computes with.

        Raises:
            ValueError: :func:`l2l_fast.load` could not build this network again (parameters added, removed, or of
                another shape or dtype than the configuration says); nothing has been written then.
            OSError: the file cannot be written; ``path`` is taken as it is, a ``~`` is not expanded.
        """
        files.save(self, path)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether someone asks for what the operators do not have: forward-mode derivatives or torch.func's transforms."""
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
