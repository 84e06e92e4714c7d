"""Steps of networks that orthogonalize their updates of matrices (:class:`l2l_fast.OrthogonalLSTM`).

The kernel adds its updates to zeros in the place of the matrices; what is made of them is then added to the matrices.
Tensors are taken in parts, so that those zeros are no second copy of a large model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import operators
from ..networks.orthogonal import matrix_shape, scales_of
from . import sharding

if TYPE_CHECKING:
    from .batch import Batch
    from .tensor_features import Common

PART = 1 << 25
"""Coordinates of matrices that are stepped at once: 128 MB of updates. A larger matrix is a part by itself."""


class Part(NamedTuple):
    """Some of the fused tensors of a batch, by their places in it, that are stepped by one launch."""

    places: list[int]
    matrices: dict[int, tuple[int, int]]  # those of the places that are matrices, with their shapes as a whole


def parts_of(batch: Batch) -> Iterator[Part]:
    """Everything that is no matrix with the first matrices, then further matrices."""
    shapes = [_shape(batch, param) for param in batch.params]
    part, held = Part([k for k, shape in enumerate(shapes) if shape is None], {}), 0
    for k, shape in enumerate(shapes):
        if shape is None:
            continue
        numel = shape[0] * shape[1]  # of the whole: processes that hold other shards must take the same parts
        if part.matrices and held + numel > PART:
            yield part
            part, held = Part([], {}), 0
        part.places.append(k)
        part.matrices[k] = shape
        held += numel
    if part.places:
        yield part


def _shape(batch: Batch, param: Tensor) -> tuple[int, int] | None:
    return matrix_shape(batch.owners.get(id(param), param).shape)


def targets_of(batch: Batch, part: Part) -> list[Tensor]:
    """What the kernel shall write to in the place of the part's parameters: float32 zeros for matrices."""
    zeros = {k: torch.zeros_like(batch.params[k], dtype=torch.float32) for k in part.matrices}
    return [zeros.get(k, batch.params[k]) for k in part.places]


@torch.no_grad()
def move(batch: Batch, part: Part, updates: Sequence[Tensor]) -> None:
    """Move the matrices of a part: weight decay, their updates, which are multiplied by lr already, and the orthogonal
    terms.

    Args:
        updates: of ``part.places``, as :func:`targets_of` gave them to the kernel.
    """
    if not part.matrices:
        return
    assert batch.common.tensor_inputs is not None
    matrices = list(part.matrices)
    gains = batch.network.orthogonal_gains(batch.common.tensor_inputs[matrices])
    scales = batch.lr * scales_of(batch.config.output_scale, gains, list(part.matrices.values()))
    scale_of = dict(zip(matrices, scales.float(), strict=True))
    update_of = dict(zip(part.places, updates, strict=True))
    owner_of = {k: batch.owners.get(id(batch.params[k])) for k in matrices}
    alike: dict[tuple[int, int], list[int]] = {}
    for k, shape in part.matrices.items():
        alike.setdefault(shape, []).append(k)
    for shape, places in alike.items():
        whole = [_whole(update_of[k], owner_of[k]).reshape(shape) for k in places]
        directions = operators.orthogonalized(torch.stack(whole))
        for k, direction in zip(places, directions, strict=True):
            param = batch.params[k]
            direction = _held(direction, owner_of[k], param)
            add(param, update_of[k], direction, scale_of[k], batch.lr * batch.weight_decay)


@torch.no_grad()
def move_exact(batch: Batch, param: Tensor, update: Tensor, common: Common) -> None:
    """The same of one exact tensor, a matrix or not; ``update`` in float64."""
    shape = _shape(batch, param)
    owner = batch.owners.get(id(param))
    update, direction, scale = update.view(param.shape), update.new_zeros(param.shape), update.new_zeros(())
    if shape is not None:
        assert common.tensor_inputs is not None
        gains = batch.network.orthogonal_gains(common.tensor_inputs)
        scale = batch.lr * scales_of(batch.config.output_scale, gains, [shape])[0]
        direction = _held(operators.orthogonalized(_whole(update, owner).reshape(1, *shape))[0], owner, param)
    add(param, update, direction, scale, batch.lr * batch.weight_decay)


def add(param: Tensor, update: Tensor, direction: Tensor, scale: Tensor, decay: float) -> None:
    """``param = param * (1 - decay) + (update + scale * direction)``, computed in the dtype of ``update``."""
    step = torch.addcmul(update, direction, scale.to(direction.dtype))
    if param.dtype is not step.dtype:
        param.copy_(param.to(step.dtype).mul_(1.0 - decay).add_(step))
    elif decay:
        param.mul_(1.0 - decay).add_(step)
    else:
        param.add_(step)


def _whole(update: Tensor, owner: Any) -> Tensor:
    """The update of the whole matrix: that of all shards, where ``owner`` is a DTensor."""
    if owner is None:
        return update
    from torch.distributed.tensor import DTensor  # not above: see sharding.is_dtensor

    place = {"run_check": False, "shape": owner.shape, "stride": owner.stride()}
    return DTensor.from_local(update, owner.device_mesh, owner.placements, **place).full_tensor()


def _held(whole: Tensor, owner: Any, param: Tensor) -> Tensor:
    """What this process holds of a direction, of the shape of ``param``."""
    if owner is None:
        return whole.view(param.shape)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = owner.device_mesh
    copies = DTensor.from_local(whole.view(owner.shape), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return sharding.local(copies.redistribute(mesh, owner.placements)).view(param.shape)
