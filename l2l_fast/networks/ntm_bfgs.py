"""NTMBFGS: a coordinatewise LSTM controller with an external memory (Andrychowicz et al. 2016, appendix D)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import checks
from ..kernels.renamed import takes_groups
from ..kernels.state import State
from . import files, quasi_newton
from .lstm import CoordinatewiseLSTM
from .memory import INITIAL, DenseMemory, LowRankMemory, Memory, from_digits

HEADS = ("free", "bfgs")


@files.known
class NTMBFGS(CoordinatewiseLSTM):
    """A coordinatewise LSTM whose coordinates also talk through a matrix, as those of BFGS do.

    At step t the controller sees, per coordinate, the gradient and ``i_t = M_t r_t``, and emits the update, the next
    read vector ``r_{t+1}`` and the write vectors ``a_t, b_t`` of every write head: ``M_{t+1} = M_t + sum_h a_h b_h^T``.
    One read head, three write heads and two global averaging cells suffice for BFGS (:mod:`l2l_fast.networks.memory`).

    Args:
        hidden_size, num_layers, preprocess, p, output_scale, gac_cells: as for :class:`CoordinatewiseLSTM`.
        read_heads: R, 1..15. write_heads: W, 1..7; ``1 + R + 2 W`` outputs at most 16.
        memory: ``"dense"``, n x n numbers per problem, or ``"low_rank"``, the last ``history`` writes only.
        history: m, steps that a low-rank memory remembers.
        initial: M_0, ``"zero"`` or ``"identity"``.
        add_read: the update is the controller's output plus ``i_t`` of the first read head, so that the memory moves
            theta directly, as in the skeleton ``theta + read(M, theta)`` that the paper starts from.
        heads: ``"free"``: what is read and written is what the controller says. ``"bfgs"``: it is what BFGS reads and
            writes, and the controller says how far to go and what to trust (:mod:`l2l_fast.networks.quasi_newton`);
            made by :meth:`from_bfgs`, which says what the other arguments then are.
        first_step, curvature, growth: of heads="bfgs" only, see :meth:`from_bfgs`.

    The memory belongs to an optimizee: :meth:`init_memory` makes one, :class:`l2l_fast.LearnedOptimizer` keeps one per
    parameter group.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; the message names it.
    """

    heads_kind: str = "free"  # of what earlier releases pickled, too
    safeguards = quasi_newton.Safeguards(None, 0.0, None)

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocess: str = "log_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
        gac_cells: int = 2,
        read_heads: int = 1,
        write_heads: int = 3,
        memory: str = "dense",
        history: int = 10,
        initial: str = "zero",
        add_read: bool = False,
        *,
        heads: str = "free",
        first_step: float | None = None,
        curvature: float = 0.0,
        growth: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.heads_kind = checks.choice("heads", heads, HEADS)
        read_heads = checks.integer("read_heads", read_heads, 1, 15)
        write_heads = checks.integer("write_heads", write_heads, 1, 7)
        if 1 + read_heads + 2 * write_heads > 16:
            raise ValueError(
                f"write_heads: expected 1 + read_heads + 2 * write_heads <= 16, got {read_heads} and {write_heads}"
            )
        self.read_heads = read_heads
        self.write_heads = write_heads
        self.memory = checks.choice("memory", memory, ("dense", "low_rank"))
        self.history = checks.integer("history", history, 1)
        self.initial = checks.choice("initial", initial, INITIAL)
        self.add_read = checks.flag("add_read", add_read)
        extra, outputs = read_heads, 1 + read_heads + 2 * write_heads
        self.safeguards = self._checked_safeguards(first_step, curvature, growth)
        if self.moves:
            extra, outputs = quasi_newton.INPUTS, quasi_newton.OUTPUTS
        super().__init__(
            hidden_size,
            num_layers,
            preprocess,
            p,
            output_scale,
            gac_cells,
            extra,
            outputs,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_bfgs(
        cls,
        memory: str = "dense",
        history: int = 10,
        initial: str = "zero",
        *,
        first_step: float | None = 1.0,
        curvature: float = 1e-10,
        growth: float | None = 10.0,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocess: str = "log_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
        gac_cells: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> NTMBFGS:
        """A network that is BFGS without a line search, for meta-training to go on from.

        Its read-out is zero, so the step is ``d = -M g`` with a memory that BFGS writes (dense) or L-BFGS (low rank).
        What the read-out learns, per problem: the length of the step, a momentum, a rate along the gradient, how much
        of a pair is written and how far back it is measured; and per coordinate a correction
        (:mod:`l2l_fast.networks.quasi_newton`).

        With ``first_step=None``, ``growth=None`` and ``initial="identity"`` the iterates are those of scipy's BFGS with
        steps of length 1; of a low-rank memory, with ``growth=None``, those of :class:`torch.optim.LBFGS` without a
        line search.

        Args:
            memory: ``"dense"``, n x n numbers per problem, or ``"low_rank"``, the last ``history`` pairs.
            history: m of L-BFGS, at least 1.
            initial: M_0 of a dense memory: ``"identity"``, or ``"zero"``: unknown until the first pair, which scales it
                (gamma I with gamma = s^T y / y^T y); until then steps go along the gradient. A low-rank memory, whose
                newest pair scales it always, takes ``"zero"`` only.
            first_step: a step taken without any pair is cut to this 1-norm; None: it is not cut.
            curvature: pairs with s^T y at most this are not written, at least 0.
            growth: d, and then the step, are cut to so many times the norm of the last step, more than 0; None: they
                are not. Without a line search this is what keeps a bad pair from doing harm.
            hidden_size, num_layers, preprocess, p, gac_cells, device, dtype: as for :class:`CoordinatewiseLSTM`.
            output_scale: of the correction alone, in units of the root mean square of d.

        Raises:
            TypeError, ValueError: an argument of the wrong type or out of range; the message names it.
        """
        memory = checks.choice("memory", memory, ("dense", "low_rank"))
        return cls(
            *(hidden_size, num_layers, preprocess, p, output_scale, gac_cells),
            read_heads=quasi_newton.READS,
            write_heads=3 if memory == "dense" else 1,
            memory=memory,
            history=history,
            initial=initial,
            heads="bfgs",
            first_step=first_step,
            curvature=curvature,
            growth=growth,
            device=device,
            dtype=dtype,
        )

    def _checked_safeguards(self, first_step: Any, curvature: Any, growth: Any) -> quasi_newton.Safeguards:
        if self.heads_kind != "bfgs":
            for name, value in (("first_step", first_step), ("curvature", curvature or None), ("growth", growth)):
                if value is not None:
                    raise ValueError(f'{name}: only of a network with heads="bfgs", got {value!r}')
            return type(self).safeguards
        expected = {"read_heads": quasi_newton.READS, "write_heads": 3 if self.memory == "dense" else 1}
        for name, value in {**expected, "add_read": False}.items():
            if getattr(self, name) != value:
                raise ValueError(f'{name}: expected {value} with heads="bfgs", got {getattr(self, name)}')
        if self.memory == "low_rank" and self.initial != "zero":
            raise ValueError(f"initial: expected 'zero' for a low-rank memory that is L-BFGS, got {self.initial!r}")
        bounds = {}
        for name, bound in (("first_step", first_step), ("growth", growth)):
            words = "a number above 0, or None"
            bounds[name] = None if bound is None else checks.real(name, bound, above=0.0, expected=words)
        return quasi_newton.Safeguards(curvature=checks.real("curvature", curvature, 0.0), **bounds)

    @property
    def moves(self) -> bool:
        return self.heads_kind == "bfgs"

    @property
    def communicates(self) -> bool:
        return True

    @property
    def has_memory(self) -> bool:
        return True

    def options(self) -> dict[str, Any]:
        fields = ["hidden_size", "num_layers", "preprocess", "p", "output_scale", "gac_cells"]
        fields += ["read_heads", "write_heads", "memory", "history", "initial", "add_read"]
        # Not among the options of files that earlier releases wrote.
        later = {"heads": self.heads_kind, **dataclasses.asdict(self.safeguards)} if self.moves else {}
        return {"type": "NTMBFGS", **{name: getattr(self, name) for name in fields}, **later}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As :meth:`CoordinatewiseLSTM.reset_parameters`, with the heads' rows of the read-out ten times smaller:
        a memory that starts small cannot yet drive the update anywhere. Of heads="bfgs" the whole read-out is zero."""
        super().reset_parameters(generator)
        if self.moves:
            self.weight_out.zero_()
        else:
            self.weight_out[1:] *= 0.1

    @takes_groups()
    def init_memory(
        self,
        numel: int,
        num_problems: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Memory:
        """The memory M_0 for ``num_problems`` problems of ``numel / num_problems`` coordinates each.

        Raises:
            TypeError, ValueError: ``num_problems`` is no number that divides ``numel``.
        """
        num_problems = checks.check_problems(num_problems, numel)
        device = self.weight_out.device if device is None else device
        n = numel // num_problems
        if self.memory == "dense":
            return DenseMemory.create(n, num_problems, self.read_heads, self.initial, device, dtype)
        return LowRankMemory.create(
            n, num_problems, self.read_heads, self.write_heads, self.history, self.initial, device, dtype
        )

    @takes_groups()
    def memory_from(self, entries: Mapping[str, Any], numel: int, num_problems: int = 1) -> Memory:
        """The memory that holds these very tensors, as :meth:`Memory.entries` gave them (or copies of them).

        Raises:
            TypeError, ValueError: entries are missing, or do not fit the network or the coordinates.
        """
        n, slots = numel // num_problems, self.history * self.write_heads
        shapes: dict[str, tuple[int, ...]] = {"memory_reads": (self.read_heads, num_problems, n)}
        if self.memory == "dense":
            shapes["memory_matrix"] = (num_problems, n, n)
        else:
            shapes["memory_left"] = shapes["memory_right"] = (num_problems, slots, n)
            shapes["memory_written"] = (4,)
        given = {name: entries[name] for name in Memory.KEYS if name in entries}
        if set(given) != set(shapes):
            raise ValueError(f"memory: expected the entries {sorted(shapes)}, got {sorted(given)}")
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.is_complex() or value.layout is not torch.strided:
                raise TypeError(f"memory: expected a dense real tensor as {name!r}, got {type(value).__name__}")
            floating = value.is_floating_point() and torch._debug_has_internal_overlap(value) != 1
            if name != "memory_written" and not floating:
                raise TypeError(f"memory: expected a floating-point {name!r} with memory of its own, got {value.dtype}")
            if tuple(value.shape) != shapes[name]:
                raise ValueError(f"memory: expected {name!r} of shape {shapes[name]}, got {tuple(value.shape)}")
        if self.memory == "dense":
            return DenseMemory(given["memory_matrix"], given["memory_reads"], self.initial)
        left, right, written = given["memory_left"], given["memory_right"], from_digits(given["memory_written"])
        if written is None or written % self.write_heads:
            raise ValueError(
                f"memory: expected a multiple of write_heads={self.write_heads}, in 4 digits to the base 256, as "
                f"'memory_written', got {given['memory_written'].tolist()}"
            )
        return LowRankMemory(left, right, written, given["memory_reads"], self.initial)

    def memory_for(
        self,
        numel: int,
        num_problems: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        entries: Mapping[str, Any] | None = None,
    ) -> Memory:
        if not entries:
            return self.init_memory(numel, num_problems, device, dtype)
        memory = self.memory_from(entries, numel, num_problems)
        device = self.weight_out.device if device is None else device
        fits = memory.reads.dtype == dtype and memory.reads.device == device
        return memory if fits else memory.to(device, dtype)  # nothing is copied if only the device's index is missing

    def step_with(
        self, grad: Tensor, state: State, num_problems: int = 1, memory: Memory | None = None
    ) -> tuple[Tensor, State, Memory]:
        assert memory is not None and memory.num_problems == num_problems
        return self(grad, state, memory)

    def write_(self, out: Tensor, memory: Memory) -> None:
        memory.write_(*self.heads(out, memory))

    def heads(self, out: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Write vectors a and b ``[W, num_problems, n]`` and read vectors r ``[R, num_problems, n]`` among the outputs
        ``[1 + R + 2 W, numel]`` of a step, whose coordinates are in the order of the memory. What is not finite counts
        as zero: it is neither written nor asked for."""
        rows = out[1:].reshape(out.shape[0] - 1, memory.num_problems, memory.size)
        # One coordinate whose gradient was NaN would spoil the whole matrix, and through it all others, for ever.
        if torch.is_grad_enabled():
            rows = rows.masked_fill(~rows.isfinite(), 0.0)
        else:  # the same in one pass, but its derivative would let a NaN from upstream through
            rows = rows.nan_to_num(0.0, 0.0, 0.0)
        r, a, b = rows.split([self.read_heads, self.write_heads, self.write_heads])
        return a, b, r

    def forward(  # type: ignore[override]
        self, grad: Tensor, state: State, memory: Memory
    ) -> tuple[Tensor, State, Memory]:
        """``update, new_state, new_memory``: functional, differentiable in everything, the memory included.

        Args:
            grad: any shape, the coordinates of ``memory.num_problems`` problems one after the other; several tensors as
                one, see :func:`l2l_fast.reference.join`.
            state: as for :class:`CoordinatewiseLSTM`. memory: from :meth:`init_memory` or an earlier step.

        Raises:
            TypeError, ValueError: as :meth:`CoordinatewiseLSTM.forward`; or a memory of another kind or size.
        """
        checks.check_gradient("grad", grad)
        self.check_memory(memory, grad.numel())
        if self.moves:
            by_problem = grad.reshape(memory.num_problems, memory.size).to(memory.reads.dtype)
            extra = self.seen(by_problem, memory).reshape(-1, *grad.shape)
            out, state = super().forward(grad, state, memory.num_problems, extra)
            update, written = self.move(out.flatten(1), by_problem, memory)
            memory = quasi_newton.remember(written, update)
            return update.view(grad.shape).to(grad.dtype), state, memory
        extra = memory.read(memory.reads).reshape(self.read_heads, *grad.shape)
        out, state = super().forward(grad, state, memory.num_problems, extra)
        update = out[0] + extra[0] if self.add_read else out[0]
        return update.to(grad.dtype), state, memory.write(*self.heads(out.flatten(1), memory))

    # ---- of heads="bfgs" ----

    def seen(self, grad: Tensor, memory: Memory) -> Tensor:
        """The extra inputs of a step ``[extra_inputs, num_problems, n]`` at this gradient ``[num_problems, n]``."""
        return quasi_newton.inputs(grad, memory)

    def move(self, out: Tensor, grad: Tensor, memory: Memory, lr: float = 1.0) -> tuple[Tensor, Memory]:
        """The update ``[num_problems, n]`` for the outputs ``[num_outputs, numel]`` and the gradient
        ``[num_problems, n]``, and the memory with the last pair written to it; functional and differentiable. lr: what
        the update will be multiplied by."""
        by_output = out.view(self.num_outputs, *grad.shape).to(grad.dtype)
        return quasi_newton.move(by_output, grad, memory, self.safeguards, lr)

    def keep_(self, written: Memory, step: Tensor, memory: Memory) -> None:
        """Put into ``memory`` what :meth:`move` has ``written`` and the step taken in the end, in place."""
        memory.copy_(quasi_newton.remember(written, step))

    def check_memory(self, memory: Memory, numel: int) -> None:
        """Raise TypeError or ValueError unless ``memory`` is one of this network for ``numel`` coordinates."""
        kind = DenseMemory if self.memory == "dense" else LowRankMemory
        if not isinstance(memory, kind):
            raise TypeError(f"memory: expected {kind.__name__}, got {type(memory).__name__}")
        if memory.num_problems * memory.size != numel or memory.reads.shape[0] != self.read_heads:
            raise ValueError(
                f"memory: expected {numel} coordinates and {self.read_heads} read heads, got "
                f"{memory.num_problems} x {memory.size} and {memory.reads.shape[0]}"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items() if name != "type")
