"""Runs tests written for the CPU on another device.

A tensor that a test makes without naming a device is made on that device; one that the package makes is not, so that a
device the package forgot to pass on is an error as it is for a user.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TESTS = str(Path(__file__).resolve().parent.parent)
LAYERS = str(Path(torch.nn.__file__).parent)
NAMES = "arange as_tensor empty eye full linspace logspace ones rand randint randn randperm tensor zeros"
FACTORIES = {getattr(torch, name) for name in NAMES.split()}


def made_by_a_test(frame: FrameType | None) -> bool:
    """Whether a test, or a module's constructor that a test calls, is at the frame."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(LAYERS) and frame.f_code.co_name not in ("__init__", "reset_parameters"):
            return name.startswith(TESTS)
        frame = frame.f_back
    return False


class Placement(TorchFunctionMode):
    """``with Placement("cuda"): ...``. What a generator of the CPU draws is drawn there and then moved."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in FACTORIES or kwargs.get("device") is not None or not made_by_a_test(sys._getframe(1)):
            return func(*args, **kwargs)
        if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        if kwargs.get("generator") is None:
            return func(*args, **{**kwargs, "device": self.device})
        grad = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(grad)
