"""The memory matrix M of NTM-BFGS: read ``M r``, write ``M += sum_h a_h b_h^T`` (Andrychowicz et al. 2016, appendix D).

BFGS keeps an estimate of the inverse Hessian in such a matrix. With s the last step, y the change of the gradient,
u = M y and rho = 1 / (y^T s), its update is

    M' = M - rho s u^T - rho u s^T + (rho + rho^2 y^T u) s s^T

three outer products, one read, and two inner products that all coordinates share: 3 write heads, 1 read head, 2 global
averaging cells. Vectors are ``[heads, num_problems, n]``: ``num_problems`` independent problems of n coordinates each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..kernels import renamed
from ..kernels.products import product

INITIAL = ("zero", "identity")


class Memory(ABC):
    """What :class:`DenseMemory` and :class:`LowRankMemory` share.

    Attributes:
        initial: ``"zero"`` or ``"identity"``, the matrix M_0.
        reads: ``[R, num_problems, n]``, the vectors that the read heads emitted last, applied at the next step.

    A memory is a pytree node, as :class:`l2l_fast.State` is. How many rows of a low-rank one have been written is part
    of the tree, not a leaf: an exported program takes memories as full as that of its example.
    """

    # Under these names an optimizer keeps a memory in its state.
    KEYS = ("memory_matrix", "memory_left", "memory_right", "memory_reads", "memory_written")

    initial: str
    reads: Tensor

    @property
    def num_problems(self) -> int:
        return self.reads.shape[1]

    @property
    def groups(self) -> int:
        """The name of ``num_problems`` before 0.2."""
        renamed.warn(stacklevel=2)
        return self.num_problems

    @property
    def size(self) -> int:
        """n, coordinates of one problem."""
        return self.reads.shape[2]

    @abstractmethod
    def read(self, r: Tensor) -> Tensor:
        """``M r`` for every head and problem: ``[R, num_problems, n]`` to the same shape. Differentiable."""

    @abstractmethod
    def write(self, a: Tensor, b: Tensor, reads: Tensor) -> Memory:
        """The memory after ``M += sum_h a_h b_h^T`` (a, b: ``[W, num_problems, n]``), with the reads for the next step.
        Functional and differentiable."""

    @abstractmethod
    def write_(self, a: Tensor, b: Tensor, reads: Tensor) -> None:
        """:meth:`write` in place, without autograd."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`write_` writes to, by the names of ``KEYS``; no copies."""

    def copy_(self, other: Memory) -> None:
        """Take over the values of another memory of this kind and size, in place, without autograd."""
        for name, value in other.tensors().items():
            self.tensors()[name].copy_(value)

    def entries(self) -> dict[str, Tensor]:
        """Everything the memory holds, by the names of ``KEYS``; no copies."""
        return self.tensors()

    @abstractmethod
    def detach(self) -> Memory:
        """The same memory cut off from the autograd graph: what is carried across unrolled segments."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype) -> Memory:
        """A copy on another device or in another dtype."""


class DenseMemory(Memory):
    """M itself, ``[num_problems, n, n]``: n^2 numbers and multiply-adds, for small n."""

    def __init__(self, matrix: Tensor, reads: Tensor, initial: str = "zero") -> None:
        self.matrix, self.reads, self.initial = matrix, reads, initial

    @classmethod
    @renamed.takes_groups()
    def create(
        cls, n: int, num_problems: int, read_heads: int, initial: str, device: torch.device | str, dtype: torch.dtype
    ) -> DenseMemory:
        """M_0, and reads of zero."""
        matrix = torch.zeros(num_problems, n, n, device=device, dtype=dtype)
        if initial == "identity":
            matrix.diagonal(dim1=1, dim2=2).fill_(1.0)
        return cls(matrix, torch.zeros(read_heads, num_problems, n, device=device, dtype=dtype), initial)

    def read(self, r: Tensor) -> Tensor:
        # A memory that accumulates in bfloat16 forgets: no autocast reaches its products.
        return product(self.matrix, r.permute(1, 2, 0)).permute(2, 0, 1)

    def write(self, a: Tensor, b: Tensor, reads: Tensor) -> DenseMemory:
        matrix = product(a.permute(1, 2, 0), b.permute(1, 0, 2), onto=self.matrix)
        return DenseMemory(matrix, reads, self.initial)

    def write_(self, a: Tensor, b: Tensor, reads: Tensor) -> None:
        self.matrix.baddbmm_(a.permute(1, 2, 0), b.permute(1, 0, 2))
        self.reads.copy_(reads)

    def tensors(self) -> dict[str, Tensor]:
        return {"memory_matrix": self.matrix, "memory_reads": self.reads}

    def detach(self) -> DenseMemory:
        return DenseMemory(self.matrix.detach(), self.reads.detach(), self.initial)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> DenseMemory:
        return DenseMemory(self.matrix.to(device, dtype), self.reads.to(device, dtype), self.initial)


class LowRankMemory(Memory):
    """The last m writes instead of M: ``M r = M_0 r + sum a (b^T r)``, two passes over tall-skinny buffers.

    ``left`` and ``right`` are ``[num_problems, m * W, n]``, a ring of m slots of W rows; older writes are dropped. A
    read costs ``2 m W n`` multiply-adds and never forms a matrix of n^2.
    """

    def __init__(self, left: Tensor, right: Tensor, written: int, reads: Tensor, initial: str = "zero") -> None:
        self.left, self.right, self.written, self.reads, self.initial = left, right, written, reads, initial

    @classmethod
    @renamed.takes_groups()
    def create(
        cls,
        n: int,
        num_problems: int,
        read_heads: int,
        write_heads: int,
        history: int,
        initial: str,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> LowRankMemory:
        """An empty history, and reads of zero."""
        left = torch.zeros(num_problems, history * write_heads, n, device=device, dtype=dtype)
        reads = torch.zeros(read_heads, num_problems, n, device=device, dtype=dtype)
        return cls(left, torch.zeros_like(left), 0, reads, initial)

    def read(self, r: Tensor) -> Tensor:
        # The ring fills from the front; rows not written yet need not be visited.
        rows = min(self.written, self.left.shape[1])
        left, right = self.left[:, :rows], self.right[:, :rows]
        if r.shape[:2] == (1, 1):
            inner = product(right[0], r[0, 0])
            if self.initial == "identity":
                return product(left[0].T, inner, onto=r[0, 0]).view_as(r)
            return product(left[0].T, inner).view_as(r)
        inner = product(right, r.permute(1, 2, 0))
        result = product(left.transpose(1, 2), inner).permute(2, 0, 1)
        return r + result if self.initial == "identity" else result

    def _place(self, a: Tensor) -> tuple[int, int]:
        start = self.written % self.left.shape[1]
        return start, start + a.shape[0]

    def write(self, a: Tensor, b: Tensor, reads: Tensor) -> LowRankMemory:
        start, end = self._place(a)
        left = torch.slice_scatter(self.left, a.transpose(0, 1), 1, start, end)
        right = torch.slice_scatter(self.right, b.transpose(0, 1), 1, start, end)
        return LowRankMemory(left, right, self.written + a.shape[0], reads, self.initial)

    def write_(self, a: Tensor, b: Tensor, reads: Tensor) -> None:
        start, end = self._place(a)
        self.left[:, start:end].copy_(a.transpose(0, 1))
        self.right[:, start:end].copy_(b.transpose(0, 1))
        self.reads.copy_(reads)
        self.written += a.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"memory_left": self.left, "memory_right": self.right, "memory_reads": self.reads}

    def copy_(self, other: Memory) -> None:
        super().copy_(other)
        assert isinstance(other, LowRankMemory)
        self.written = other.written

    def entries(self) -> dict[str, Tensor]:
        return {**self.tensors(), "memory_written": as_digits(self.written)}

    def detach(self) -> LowRankMemory:
        return LowRankMemory(self.left.detach(), self.right.detach(), self.written, self.reads.detach(), self.initial)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRankMemory:
        left, right = self.left.to(device, dtype), self.right.to(device, dtype)
        return LowRankMemory(left, right, self.written, self.reads.to(device, dtype), self.initial)


def as_digits(count: int) -> Tensor:
    """A count as four digits to the base 256, int64 on the CPU. Tools around torch.optim convert what they find in a
    state to the parameter's dtype, and bfloat16 cannot count to 1000: but every digit survives it."""
    digits = [count & 255, count >> 8 & 255, count >> 16 & 255, count >> 24]
    with torch.inference_mode(False):
        return torch.tensor(digits, dtype=torch.int64, device="cpu")


def from_digits(digits: Tensor) -> int | None:
    """The inverse of :func:`as_digits`, whatever the dtype is now; None if these are no such digits."""
    values = digits.tolist()
    if not all(0 <= value < 1 << 32 and value == int(value) for value in values):
        return None
    return sum(int(value) << 8 * k for k, value in enumerate(values))


def _register(kind: type[Memory], tensors: tuple[str, ...], rest: tuple[str, ...]) -> None:
    def flatten(memory: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(memory, name) for name in tensors], tuple(getattr(memory, name) for name in rest)

    def flatten_with_keys(memory: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        leaves, context = flatten(memory)
        return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(tensors, leaves, strict=True)], context

    def unflatten(leaves: Any, context: tuple[Any, ...]) -> Any:
        memory = kind.__new__(kind)
        for name, value in zip((*tensors, *rest), (*leaves, *context), strict=True):
            setattr(memory, name, value)
        return memory

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"l2l_fast.{kind.__name__}",
        # Through JSON a tuple comes back as a list, which would be another tree.
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=flatten_with_keys,
    )
    # Tensors and plain data: an exported program with memories as example inputs loads with weights_only=True.
    torch.serialization.add_safe_globals([kind])


_register(DenseMemory, ("matrix", "reads"), ("initial",))
_register(LowRankMemory, ("left", "right", "reads"), ("written", "initial"))
