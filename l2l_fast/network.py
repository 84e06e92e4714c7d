"""phi, the network that learns to optimize: a coordinatewise LSTM (Andrychowicz et al. 2016, section 2.1)."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import ops, reference
from .ops import Config
from .state import State

FILE_FORMAT = "l2l_fast.CoordinatewiseLSTM"
FILE_VERSION = "1"


class CoordinatewiseLSTM(nn.Module):
    """A small LSTM applied to every coordinate alike: shared weights, one recurrent state per coordinate.

    Args:
        hidden_size: units per layer, 4..64 (the paper: 20).
        num_layers: 1..4 (the paper: 2).
        preprocess: ``"log_sign"`` (appendix A: two inputs per coordinate) or ``"identity"`` (the raw gradient).
        p: constant of log_sign; gradients below ``e^-p`` enter linearly. In (0, 70].
        output_scale: the read-out is multiplied by it (the paper's MNIST experiments: 0.1).
        gac_cells: global averaging cells; only 0 is supported.
        device, dtype: of the parameters.

    Parameters, named as in :class:`torch.nn.LSTM` (gate rows i, f, g, o; one bias per layer): ``weight_ih_l{k}``
    [4H, in], ``weight_hh_l{k}`` [4H, H], ``bias_l{k}`` [4H], and the read-out ``weight_out`` [1, H], ``bias_out`` [1].

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocess: str = "log_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
        gac_cells: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = _check_config(hidden_size, num_layers, preprocess, p, output_scale)
        if gac_cells != 0:
            raise ValueError(f"gac_cells: expected 0 (global averaging cells are not supported yet), got {gac_cells!r}")
        self.gac_cells = 0
        hidden = self.config.hidden_size
        names = []
        for k in range(self.config.num_layers):
            inputs = reference.input_size(preprocess) if k == 0 else hidden
            for name, shape in (
                (f"weight_ih_l{k}", (4 * hidden, inputs)),
                (f"weight_hh_l{k}", (4 * hidden, hidden)),
                (f"bias_l{k}", (4 * hidden,)),
            ):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                names.append(name)
        self.weight_out = nn.Parameter(torch.empty((1, hidden), device=device, dtype=dtype))
        self.bias_out = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self._names = (*names, "weight_out", "bias_out")  # in the order of phi
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

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise as the authors' code does: a normal truncated at two standard deviations, std
        ``1 / sqrt(in + H)`` for weights and biases of the LSTM layers and ``1 / sqrt(H)`` for the read-out, whose bias
        is zero. The forget-gate bias of 1, which that code adds at run time, is part of the trainable bias here."""
        hidden = self.hidden_size
        for weight_ih, weight_hh, bias in self._layers():
            std = 1.0 / math.sqrt(weight_ih.shape[1] + hidden)
            for parameter in (weight_ih, weight_hh, bias):
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
            bias[hidden : 2 * hidden] += 1.0
        std = 1.0 / math.sqrt(hidden)
        nn.init.trunc_normal_(self.weight_out, std=std, a=-2 * std, b=2 * std, generator=generator)
        nn.init.zeros_(self.bias_out)

    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        names = ("weight_ih_l", "weight_hh_l", "bias_l")
        return [tuple(getattr(self, f"{name}{k}") for name in names) for k in range(self.num_layers)]  # type: ignore[misc]

    def phi(self) -> Tensor:
        """All parameters as one flat vector ``[P]``, differentiable, in the order the operators expect."""
        own = self._parameters  # one dictionary look-up; a parametrized one is no longer there
        parts = [own[name] if name in own else getattr(self, name) for name in self._names]
        return torch.cat([part.reshape(-1) for part in parts])  # type: ignore[union-attr]

    def init_state(
        self, numel: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> State:
        """The zero state of ``numel`` coordinates (on the network's device by default)."""
        if device is None:
            device = self.weight_out.device
        return State.zeros(numel, self.hidden_size, self.num_layers, device=device, dtype=dtype)

    def forward(self, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """``update, new_state = phi(grad, state)``: functional, differentiable in grad, state and the parameters.

        Args:
            grad: any shape and strides, real floating point. float32, bfloat16 and float16 run in the fused kernel in
                float32 arithmetic; float64 (of grad or state) runs in :mod:`l2l_fast.reference`.
            state: from :meth:`init_state` or an earlier step, for ``grad.numel()`` coordinates.

        Returns:
            update, of grad's shape and dtype, and the new state. ``theta + update`` is the next iterate.

        Raises:
            TypeError: grad is not real floating point or is sparse; state is not a :class:`State`.
            ValueError: state is for another number of coordinates or another network; devices differ.
            NotImplementedError: no kernel for the device in this build.
        """
        check_gradient("grad", grad)
        if not isinstance(state, State):
            raise TypeError(f"state: expected l2l_fast.State, got {type(state).__name__}")
        if (state.numel, state.hidden_size, state.num_layers) != (grad.numel(), self.hidden_size, self.num_layers):
            raise ValueError(
                f"state: expected numel={grad.numel()}, hidden_size={self.hidden_size}, num_layers={self.num_layers}, "
                f"got {state!r}"
            )
        if not grad.device == state.device == self.weight_out.device:
            raise ValueError(
                f"grad, state and network must be on one device, got {grad.device}, {state.device} and "
                f"{self.weight_out.device}"
            )
        if grad.dtype == torch.float64 or state.dtype == torch.float64:
            update, logical = reference.step(self, grad, state.to_logical())
            return update, State.from_logical(logical)
        update, data = ops.lstm_step(grad, state.data, self.phi().float(), *self.config)
        return update, State(data, state.numel, state.hidden_size, state.num_layers)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config._asdict().items())

    # ---- exchange with torch.nn ----

    def to_lstm_cells(self) -> tuple[list[nn.LSTMCell], nn.Linear]:
        """The same network as one :class:`torch.nn.LSTMCell` per layer and a :class:`torch.nn.Linear` (H -> 1).

        Copies. The cells' second bias is zero; preprocessing and output_scale are not part of them.
        """
        place: dict[str, Any] = {"device": self.weight_out.device, "dtype": self.weight_out.dtype}
        cells = []
        linear = nn.utils.skip_init(nn.Linear, self.hidden_size, 1, **place)
        with torch.no_grad():
            for weight_ih, weight_hh, bias in self._layers():
                cell = nn.utils.skip_init(nn.LSTMCell, weight_ih.shape[1], self.hidden_size, **place)
                cell.weight_ih.copy_(weight_ih)
                cell.weight_hh.copy_(weight_hh)
                cell.bias_ih.copy_(bias)
                cell.bias_hh.zero_()
                cells.append(cell)
            linear.weight.copy_(self.weight_out)
            linear.bias.copy_(self.bias_out)
        return cells, linear

    @classmethod
    def from_lstm_cells(
        cls,
        cells: Sequence[nn.LSTMCell],
        linear: nn.Linear,
        preprocess: str = "log_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
    ) -> CoordinatewiseLSTM:
        """A network from one :class:`torch.nn.LSTMCell` per layer and a ``Linear(H, 1)``; copies their weights.

        The two biases of each cell are added. Raises ValueError if the sizes do not chain up
        (2 -> H for log_sign or 1 -> H for identity, then H -> H, then H -> 1), TypeError for other modules.
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
            device=cells[0].weight_ih.device,
            dtype=cells[0].weight_ih.dtype,
        )
        for k, cell in enumerate(cells):
            expected = (reference.input_size(preprocess) if k == 0 else hidden, hidden)
            if (cell.input_size, cell.hidden_size) != expected:
                raise ValueError(
                    f"cells[{k}]: expected input_size, hidden_size = {expected}, got "
                    f"{(cell.input_size, cell.hidden_size)} (preprocess={preprocess!r})"
                )
        if (linear.in_features, linear.out_features) != (hidden, 1):
            raise ValueError(
                f"linear: expected Linear({hidden}, 1), got Linear({linear.in_features}, {linear.out_features})"
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
        """Write parameters and configuration to one safetensors file, atomically: after a crash at any moment the
        path holds either the old file or the new one."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.named_parameters()}
        config = {**self.config._asdict(), "gac_cells": self.gac_cells}
        metadata = {"format": FILE_FORMAT, "format_version": FILE_VERSION, "config": json.dumps(config)}
        _write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> CoordinatewiseLSTM:
    """Read a network written by :meth:`CoordinatewiseLSTM.save`, configuration included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else; the message says what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    try:
        return _build(metadata, tensors, device)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _build(metadata: dict[str, str], tensors: dict[str, Tensor], device: torch.device | str) -> CoordinatewiseLSTM:
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError(f"expected format {FILE_FORMAT!r} in the metadata, got {metadata.get('format')!r}")
    if metadata.get("format_version") != FILE_VERSION:
        raise ValueError(f"expected format_version {FILE_VERSION!r}, got {metadata.get('format_version')!r}")
    config = json.loads(metadata.get("config", "null"))
    if not isinstance(config, dict) or set(config) != {*Config._fields, "gac_cells"}:
        raise ValueError(f"expected the configuration fields {[*Config._fields, 'gac_cells']}, got {config!r}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"expected tensors of one floating-point dtype, got {sorted(map(str, dtypes))}")
    net = nn.utils.skip_init(CoordinatewiseLSTM, **config, device=device, dtype=dtypes.pop())
    parameters = dict(net.named_parameters())
    missing, unknown = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or unknown:
        raise ValueError(f"tensors missing: {missing}, unknown: {unknown}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"tensor {name}: expected shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
                )
            parameter.copy_(tensors[name])
    return net


def check_gradient(name: str, grad: Any) -> None:
    """Raise TypeError unless ``grad`` is a dense, real, floating-point tensor of a supported dtype."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(grad).__name__}")
    if grad.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {grad.layout}")
    if grad.dtype not in ops.KERNEL_DTYPES and grad.dtype != torch.float64:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {grad.dtype}")


def _check_config(hidden_size: Any, num_layers: Any, preprocess: Any, p: Any, output_scale: Any) -> Config:
    for name, value, low, high in (("hidden_size", hidden_size, 4, 64), ("num_layers", num_layers, 1, 4)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int in {low}..{high}, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low}..{high}, got {value}")
    if preprocess not in ("identity", "log_sign"):
        raise ValueError(f'preprocess: expected "identity" or "log_sign", got {preprocess!r}')
    for name, value in (("p", p), ("output_scale", output_scale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    # Both are used in float32. The kernels count denormal gradients as zero: e^p must leave those negligible.
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= p <= 70.0:
        raise ValueError(f"p: expected a number in (0, 70], got {p}")
    if not abs(output_scale) <= limits.max:
        raise ValueError(f"output_scale: expected a finite float32 number, got {output_scale}")
    return Config(hidden_size, num_layers, preprocess, float(p), float(output_scale))


def _write_atomically(path: Path, content: bytes) -> None:
    # The temporary file must be in the same folder: os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
