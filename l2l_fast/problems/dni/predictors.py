"""Predictors of gradients, the M of the paper: from an activity, and perhaps the label, to dL / d activity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.checks import flag, positive_int, widths


def _check_classes(num_classes: int | None) -> int:
    return 0 if num_classes is None else positive_int("num_classes", num_classes)


def check_labels(labels: Tensor | None, num_classes: int, batch: int | None = None) -> Tensor:
    """``labels``. TypeError or ValueError unless they are classes, int64 ``[batch]`` in 0..num_classes - 1 (the range
    is looked at on a CPU only: elsewhere that would wait for the device). ``batch=None``: of any number."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor of classes, int64 [batch], got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected classes of dtype int64, got {labels.dtype}")
    if labels.dim() != 1 or batch not in (None, len(labels)):
        expected = "[batch]" if batch is None else f"[{batch}]"
        raise ValueError(f"labels: expected {expected}, a class for every sample, got {list(labels.shape)}")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels: expected classes in 0..{num_classes - 1}, got {low}..{high}")
    return labels


def _check_normalizable(normalized: bool, activity: Tensor) -> None:
    """ValueError if batch normalization would find one number of each kind, which has no variance."""
    if normalized and activity.numel() and activity.numel() == activity.shape[1]:
        raise ValueError(
            f"activity: expected at least two samples, as batch normalization needs in training, got shape "
            f"{tuple(activity.shape)}; batch_norm=False takes any"
        )


class Predictor(nn.Module):
    """A perceptron from an activity to the gradient with respect to it; its last layer starts at zero.

    Jaderberg et al. 2017, section 3.1 and appendix C: at most two hidden layers of 1,024 units, batch normalization and
    ReLU; the label joins the input as a one-hot vector. No hidden layers: a linear map.

    Args:
        features: numbers per sample.
        num_classes: number of classes, for predictions that know the label; None for those that do not.
        hidden: widths of the hidden layers.
        batch_norm: normalize hidden activities; needs batches of at least two samples in training.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    def __init__(
        self, features: int, num_classes: int | None = None, hidden: Iterable[int] = (1024,), batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.features = positive_int("features", features)
        self.num_classes = _check_classes(num_classes)
        sizes = (self.features + self.num_classes, *widths("hidden", hidden, "layer widths"))
        self.batch_norm = batch_norm = flag("batch_norm", batch_norm)
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            # The normalization has a bias of its own.
            layers += [nn.Linear(fan_in, fan_out, bias=not batch_norm)]
            layers += [nn.BatchNorm1d(fan_out)] if batch_norm else []
            layers += [nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(sizes[-1], self.features)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, activity: Tensor, labels: Tensor | None = None) -> Tensor:
        """Activity ``[batch, features]`` and, with ``num_classes``, labels int64 ``[batch]``: ``[batch, features]``.

        Raises:
            TypeError, ValueError: labels are no classes, or a single sample is to be normalized.
        """
        _check_normalizable(self.batch_norm and self.training and len(self.hidden) > 0, activity)
        if self.num_classes:
            labels = check_labels(labels, self.num_classes, len(activity))
            activity = torch.cat([activity, F.one_hot(labels, self.num_classes).to(activity.dtype)], 1)
        return self.out(self.hidden(activity))


class ConvPredictor(nn.Module):
    """Convolutions from an activity to the gradient with respect to it; they keep the size of the picture, and the last
    one starts at zero. The label joins the input as one-hot planes (appendix C of the paper).

    Args:
        channels: channels of the activity ``[batch, channels, height, width]``.
        num_classes: as in :class:`Predictor`.
        hidden: channels of the hidden layers.
        kernel_size: odd.
        batch_norm: normalize hidden activities.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int | None = None,
        hidden: Iterable[int] = (128,),
        kernel_size: int = 5,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.num_classes = _check_classes(num_classes)
        if positive_int("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that pictures keep their size, got {kernel_size}")
        sizes = (self.channels + self.num_classes, *widths("hidden", hidden, "numbers of channels"))
        self.batch_norm = batch_norm = flag("batch_norm", batch_norm)
        around = kernel_size // 2
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Conv2d(fan_in, fan_out, kernel_size, padding=around, bias=not batch_norm)]
            layers += [nn.BatchNorm2d(fan_out)] if batch_norm else []
            layers += [nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Conv2d(sizes[-1], self.channels, kernel_size, padding=around)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, activity: Tensor, labels: Tensor | None = None) -> Tensor:
        """Activity ``[batch, channels, height, width]`` and, with ``num_classes``, labels int64 ``[batch]``: a tensor
        of the activity's shape.

        Raises:
            TypeError, ValueError: labels are no classes, or a single number per channel is to be normalized.
        """
        _check_normalizable(self.batch_norm and self.training and len(self.hidden) > 0, activity)
        if self.num_classes:
            labels = check_labels(labels, self.num_classes, len(activity))
            planes = F.one_hot(labels, self.num_classes).to(activity.dtype)[:, :, None, None]
            activity = torch.cat([activity, planes.expand(-1, -1, *activity.shape[2:])], 1)
        return self.out(self.hidden(activity))


def predictor_for(
    shape: Sequence[int], num_classes: int | None = None, hidden: Iterable[int] | None = None, batch_norm: bool = True
) -> nn.Module:
    """The predictor that suits an activity of this shape, without the batch: ``(features,)`` or ``(channels, height,
    width)``. ``hidden=None`` is one hidden layer, of 1,024 units or 128 channels.

    Raises:
        ValueError: any other shape; for those, say what predicts.
    """
    shape = tuple(shape)
    if len(shape) == 1:
        return Predictor(shape[0], num_classes, (1024,) if hidden is None else hidden, batch_norm)
    if len(shape) == 3:
        return ConvPredictor(shape[0], num_classes, (128,) if hidden is None else hidden, batch_norm=batch_norm)
    raise ValueError(
        f"predictor: expected activities [batch, features] or [batch, channels, height, width], got [batch, "
        f"{', '.join(map(str, shape))}]; for others give predictor=function or predictors=[...]"
    )
