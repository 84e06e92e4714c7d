"""Ambient modes of PyTorch that must not reach into the package's own arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast switched off on ``device``, if it can be on there: the step is float32 arithmetic, whatever the user's
    forward pass runs in."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
