"""The training log, also for TensorBoard. Needs tensorboard (``pip install l2l_fast[tensorboard]``)."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from ..networks import writing
from .log import TrainingLog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Of a line of the log by its event: the entry and the name of its curve.
_CURVES = {
    "episode": {
        "loss_first": "train/loss at the start",
        "loss_mean": "train/mean loss",
        "loss_final": "train/final loss",
        "lr": "train/learning rate",
        "skipped_updates": "train/skipped updates",
        "seconds": "train/seconds per episode",
    },
    "validation": {"loss_mean": "validation/mean loss", "loss_final": "validation/final loss"},
}


class TensorBoardLog(TrainingLog):
    """A :class:`TrainingLog` whose numbers also become curves over episodes in ``folder``; the settings are a text.
    What a resume drops from the file, TensorBoard drops from its curves.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
        ValueError, OSError: the file or the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
        _writer_class()
        super().__init__(path)
        self.folder = writing.checked_folder(folder, "tensorboard")
        self._writer: SummaryWriter | None = None
        self._purge_from: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, and its numbers to the curves; those that are not finite are left out."""
        super().append(record)
        if self._writer is None:
            self._writer = _writer_class()(str(self.folder), purge_step=self._purge_from)
            self._purge_from = None
        event, episode = record["event"], record.get("episode", 0)
        if event == "settings":
            settings = json.dumps(record, indent=1, default=str)
            self._writer.add_text("settings", "\n".join("    " + line for line in settings.splitlines()), 0)
        norms = [norm for norm in record.get("grad_norms", ()) if math.isfinite(norm)]
        if norms:
            self._writer.add_scalar("train/norm of the meta-gradient", sum(norms) / len(norms), episode)
        for key, curve in _CURVES.get(event, {}).items():
            if math.isfinite(record[key]):
                self._writer.add_scalar(curve, record[key], episode)

    def cut_back(self, episode: int) -> None:
        """See :meth:`TrainingLog.cut_back`."""
        super().cut_back(episode)
        self.flush()
        self._purge_from = episode + 1

    def flush(self) -> None:
        """Write out what TensorBoard has not yet; the next line opens a file of its own."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _writer_class() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"TensorBoard is not installed: pip install tensorboard (or l2l_fast[tensorboard]); {error}",
            name="tensorboard",
        ) from error
    return SummaryWriter
