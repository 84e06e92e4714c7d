"""Synthetic gradients where back-propagation through time is cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.checks import flag, integer, non_negative, positive_int
from .predictors import Predictor
from .stage import checked_scale, scalar, scale_of, squared_error

State = Tensor | Sequence[Tensor]


class Segment(NamedTuple):
    """What one segment gave.

    Attributes:
        loss: of the segment, detached.
        outputs: the core's, detached.
        state: at the end of the segment, detached: the start of the next one.
        state_gradient: dL / d (start state), bootstrapped: of the losses of this segment and, predicted, of all later
            ones; detached, flat ``[batch, state_size]``. None if the core made its start state itself.
        predictor_loss: the squared error of the prediction at the start of the segment, summed over a sample, mean over
            the batch; None if the core made its start state itself.
        auxiliary_loss: the auxiliary task's; None without one, and at the end of an episode.
    """

    loss: Tensor
    outputs: Tensor
    state: State
    state_gradient: Tensor | None
    predictor_loss: Tensor | None
    auxiliary_loss: Tensor | None


class Recurrent(nn.Module):
    """Truncated back-propagation through time that looks beyond the truncation (Jaderberg et al. 2017, section 2.2).

    Back-propagation over a segment of T steps ignores what the state at its end does to later losses. Here a predictor
    M of that gradient is added::

        d theta = d L_segment / d theta + M(s_T) d s_T / d theta

    and M is trained by the squared error at the segment's start towards the bootstrapped constant ``d L_segment / d s_0
    + M(s_T) d s_T / d s_0``; at the end of an episode M(s_T) is 0. M's last layer starts at zero: the first segment's
    gradient is that of truncated back-propagation, exactly. ::

        net = dni.Recurrent(torch.nn.LSTM(10, 64), state_size=2 * 64)
        state = None
        for k, piece in enumerate(pieces):                # [T, batch, 10] each
            opt.zero_grad()
            segment = net.segment(piece, state, lambda outputs: loss(head(outputs), k), last=k == len(pieces) - 1)
            opt.step()
            state = segment.state

    With ``auxiliary`` the core's output after the first step also predicts (linearly, of size ``output_size``) what M
    will say at the end of the segment; the error of that trains the core and that map, but not M: its target is the
    gradient of the task's loss alone.

    Args:
        core: ``core(inputs, state) -> (outputs, state)`` as ``nn.LSTM`` and ``nn.GRU`` are: time first, a state of one
            tensor or a sequence of tensors, None to begin with.
        state_size: numbers per sample in all tensors of the state together.
        predictor: from ``[batch, state_size]`` to the same; a perceptron with one hidden layer of ``hidden`` units by
            default.
        hidden: units of that layer; 0: a linear map.
        batch_dim: which dimension of the state's tensors is the batch: 1 of ``nn.LSTM``'s, 0 of cells'.
        auxiliary: whether to use the auxiliary task; a module from ``[batch, output_size]`` to ``[batch, state_size]``
            takes the linear map's place.
        output_size: numbers per sample and step that the core gives out; needed for the auxiliary task.
        auxiliary_weight: what its loss is multiplied with.
        gradient_scale: what M gives is this many times the gradient; "batch": the number of samples; see
            :class:`Stage`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        core: nn.Module,
        state_size: int,
        predictor: nn.Module | None = None,
        *,
        hidden: int = 256,
        batch_dim: int = 1,
        auxiliary: bool | nn.Module = False,
        output_size: int | None = None,
        auxiliary_weight: float = 1.0,
        gradient_scale: float | str = "batch",
    ) -> None:
        super().__init__()
        if not isinstance(core, nn.Module):
            raise TypeError(f"core: expected an nn.Module, got {type(core).__name__}")
        if predictor is not None and not isinstance(predictor, nn.Module):
            raise TypeError(f"predictor: expected None or an nn.Module, got {type(predictor).__name__}")
        self.state_size = positive_int("state_size", state_size)
        self.batch_dim = integer("batch_dim", batch_dim, 0)
        self.auxiliary_weight = non_negative("auxiliary_weight", auxiliary_weight)
        self.gradient_scale = checked_scale(gradient_scale)
        self.core = core
        widths = (hidden,) if integer("hidden", hidden, 0) else ()
        self.predictor: nn.Module
        if predictor is None:
            self.predictor = Predictor(self.state_size, hidden=widths, batch_norm=False)
        else:
            self.predictor = predictor
        self.auxiliary = auxiliary if isinstance(auxiliary, nn.Module) else None
        if self.auxiliary is None and flag("auxiliary", auxiliary):
            if output_size is None:
                raise TypeError("output_size: expected an int >= 1 for the auxiliary task, got None")
            self.auxiliary = nn.Linear(positive_int("output_size", output_size), self.state_size)
            nn.init.zeros_(self.auxiliary.weight)  # as the predictor: nothing to say at first
            nn.init.zeros_(self.auxiliary.bias)
        if self.auxiliary is not None and getattr(core, "batch_first", False):
            raise ValueError("core: expected outputs time first for the auxiliary task, got one with batch_first=True")
        like = next((p for p in core.parameters() if p.is_floating_point()), None)
        if like is not None:
            for made, given in ((self.predictor, predictor), (self.auxiliary, auxiliary)):
                if made is not None and made is not given:
                    made.to(device=like.device, dtype=like.dtype)

    def forward(self, inputs: Any, state: State | None = None) -> tuple[Tensor, State]:
        """The core alone."""
        return self.core(inputs, state)

    def segment(
        self, inputs: Any, state: State | None, loss_fn: Callable[[Tensor], Tensor], *, last: bool | Tensor = False
    ) -> Segment:
        """One segment: adds to the ``.grad`` of core, predictor, and whatever else ``loss_fn`` made use of.

        Args:
            inputs: the core's, time first.
            state: ``Segment.state`` of the segment before; None at the start of an episode.
            loss_fn: from the core's outputs to a scalar, the sum over the segment's steps.
            last: the episode ends with this segment: nothing comes after it. A bool, or a bool tensor ``[batch]`` where
                samples end at different times (whose states the caller then sets to their start).

        Raises:
            TypeError, ValueError: the core or ``loss_fn`` gave something else than they promise.
            RuntimeError: gradients are switched off, or nothing requires any.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("gradients are switched off here (no_grad or inference_mode); nothing can be trained")
        starts = None if state is None else [part.detach().requires_grad_() for part in _parts(state)]
        given = state
        if starts is not None:
            given = starts[0] if state is None or isinstance(state, Tensor) else type_of(state)(starts)
        outputs, end = self.core(inputs, given)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"core: expected one tensor of outputs, time first, got {type(outputs).__name__}")
        ends = _parts(end)
        loss = scalar(loss_fn(outputs))
        flat = self._flat(ends)
        scale = scale_of(self.gradient_scale, len(flat))
        going = _going_on(last, flat)
        beyond = None if going is False else self._predict(flat).detach()
        if isinstance(going, Tensor) and beyond is not None:
            beyond = torch.where(going[:, None], beyond, torch.zeros_like(beyond))
        auxiliary = None if beyond is None else self._foresee(outputs[0], flat)
        pairs: list[tuple[Tensor, Tensor | None]] = []
        if beyond is not None:
            injected = self._unflat(beyond / scale, ends)
            pairs = [(part, g) for part, g in zip(ends, injected, strict=True) if part.requires_grad]
        if loss.requires_grad or not pairs:  # a segment in which nothing is asked may have a constant for its loss
            pairs = [(loss, None), *pairs]
        reached, upstream = [part for part, _ in pairs], [gradient for _, gradient in pairs]
        torch.autograd.backward(reached, upstream, retain_graph=auxiliary is not None)
        target = predictor_loss = None
        if starts is not None:
            target = self._flat([torch.zeros_like(p) if p.grad is None else p.grad for p in starts])
            predictor_loss = squared_error(self._predict(self._flat(starts)), target * scale)
            if predictor_loss.requires_grad:
                predictor_loss.backward()
            predictor_loss = predictor_loss.detach()
        if auxiliary is not None and beyond is not None:
            # After the target has been read: this task's gradient is no part of it.
            if isinstance(going, Tensor):  # where nothing comes after, nothing is to be foreseen
                auxiliary = torch.where(going[:, None], auxiliary, beyond)
            auxiliary_loss = squared_error(auxiliary, beyond)
            if auxiliary_loss.requires_grad:
                (self.auxiliary_weight * auxiliary_loss).backward()
            auxiliary = auxiliary_loss.detach()
        new = [part.detach() for part in ends]
        new_state = new[0] if isinstance(end, Tensor) else type_of(end)(new)
        return Segment(loss.detach(), outputs.detach(), new_state, target, predictor_loss, auxiliary)

    def _foresee(self, first: Tensor, flat: Tensor) -> Tensor | None:
        """What the auxiliary task says after the first step, if there is one."""
        if self.auxiliary is None:
            return None
        return _checked("auxiliary", self.auxiliary(first), flat, f" from the first outputs, {tuple(first.shape)}")

    def _predict(self, flat: Tensor) -> Tensor:
        return _checked("predictor", self.predictor(flat.detach()), flat)

    def _flat(self, parts: list[Tensor]) -> Tensor:
        """The state as ``[batch, state_size]``."""
        flat = torch.cat([part.movedim(self.batch_dim, 0).flatten(1) for part in parts], 1)
        if flat.shape[1] != self.state_size:
            raise ValueError(f"state_size: expected {flat.shape[1]}, as the core's state has, got {self.state_size}")
        return flat

    def _unflat(self, flat: Tensor, parts: list[Tensor]) -> list[Tensor]:
        pieces, at = [], 0
        for part in parts:
            moved = part.movedim(self.batch_dim, 0)
            size = moved[0].numel() if len(moved) else 0
            piece = flat[:, at : at + size].reshape(moved.shape).movedim(0, self.batch_dim)
            pieces.append(piece.to(part.dtype))
            at += size
        return pieces


def type_of(state: Sequence[Tensor]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """What makes a sequence like ``state`` of a list; of named tuples too."""
    return getattr(type(state), "_make", type(state))


def _parts(state: State) -> list[Tensor]:
    parts = [state] if isinstance(state, Tensor) else list(state)
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise TypeError(f"state: expected floating-point tensors, got {type(part).__name__}")
    return parts


def _going_on(last: bool | Tensor, flat: Tensor) -> bool | Tensor:
    """Whether there is anything after the segment, of all samples or of each."""
    if isinstance(last, Tensor) and last.dim() == 1:
        if last.dtype != torch.bool:
            raise TypeError(f"last: expected a bool or a bool tensor [batch], got dtype {last.dtype}")
        if last.shape != flat.shape[:1]:
            raise ValueError(f"last: expected shape ({len(flat)},), one for every sample, got {tuple(last.shape)}")
        return ~last
    return not flag("last", last)


def _checked(name: str, said: Any, flat: Tensor, given: str = "") -> Tensor:
    if not isinstance(said, Tensor) or said.shape != flat.shape:
        came = f"shape {tuple(said.shape)}" if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(f"{name}: expected a tensor of shape {tuple(flat.shape)}{given}, got {came}")
    return said
