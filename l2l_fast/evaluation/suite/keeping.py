"""Runs that are made once: from the store if they are there, else now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .curves import Run
from .material import Folder
from .networks import Network
from .running import Make, run
from .store import Key, Store


class MissingRun(ValueError):
    """A run is in no file, and none may be made."""


@dataclass
class Keeper:
    """Makes runs and keeps them.

    Attributes:
        store: where.
        folder: where data sets lie.
        frozen: make none: MissingRun for what is not kept.
        on_run: told of every run that was made.
    """

    store: Store = field(default_factory=Store)
    folder: Folder = field(default_factory=Folder)
    frozen: bool = False
    on_run: Callable[[Key, Run], None] | None = None

    def run(
        self,
        network: Network,
        seed: int,
        steps: int,
        make: Make,
        optimizer: str,
        *,
        options: dict[str, float] | None = None,
        schedule: str = "constant",
        search: bool = False,
    ) -> Run:
        """The run of ``make`` that is known as ``optimizer`` with ``options``; nameless ones are not kept.

        Raises:
            MissingRun: it is not kept, and the keeper is frozen.
        """
        data = self.folder.name(network.kind)
        key = Key(network.name, network.version, data, optimizer, options or {}, schedule, seed, steps, search)
        found = self.store.get(key) if optimizer else None
        if found is not None:
            return found
        if self.frozen:
            what = f"{network.name} on {data}, {steps:,} steps, seed {seed}"
            raise MissingRun(f"no run of {optimizer} is kept for {what}")
        made = run(network, make, seed, steps, folder=self.folder, schedule=schedule, give_up=search)
        if self.on_run is not None:
            self.on_run(key, made)
        # As it is kept, so that figures are the same now and when it is read again.
        return self.store.add(key, made, write=bool(optimizer))
