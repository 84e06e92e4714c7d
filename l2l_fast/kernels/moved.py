"""Where the modules of releases before 0.2 are now: their names go on importing, for programs, and for the pickles that
name the classes in them. Beside them, modules with a public name that is shorter than their place."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MOVED = {
    "baselines": "evaluation.baselines",
    "benchmark": "evaluation.benchmark",
    "checks": "kernels.checks",
    "comparison": "evaluation.comparison",
    "config": "kernels.config",
    "data": "problems.data",
    "decisions": "evaluation.decisions",
    "dni": "problems.dni",  # never was elsewhere
    "experiments": "evaluation.experiments",
    "files": "networks.files",
    "interchange": "networks.interchange",
    "memory": "networks.ntm_bfgs",
    "network": "networks.lstm",
    "ops": "kernels.operators",
    "optimizer": "optim.optimizer",
    "plots": "evaluation.plots",
    "pretrained": "networks.pretrained",
    "recipes": "meta.recipes",
    "reference": "kernels.reference",
    "state": "kernels.state",
    "trained": "networks.trained",
    "version": "kernels.version",
}


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old name as the very module that has it now."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        head, _, tail = name.removeprefix(f"{self.package}.").partition(".")
        if not name.startswith(f"{self.package}.") or head not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(name, self, loader_state=f"{MOVED[head]}.{tail}".rstrip("."))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{self.package}.{spec.loader_state}")
        self._own = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        module.__spec__ = self._own  # the import system has put the alias's there


def install(package: str) -> None:
    """Let ``import package.old`` find the moved modules."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias(package))  # before a file of that name that an older release left
