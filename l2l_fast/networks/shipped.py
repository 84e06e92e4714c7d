"""The files of the trained optimizers that come with the package."""

from __future__ import annotations

from pathlib import Path

from ..kernels.checks import meant

_FOLDER = Path(__file__).parent / "pretrained"
_ALIKE = _FOLDER / "trained_alike"
_SUFFIX = ".safetensors"


def names() -> tuple[str, ...]:
    """The names that :func:`l2l_fast.load_pretrained` knows."""
    return tuple(sorted(path.name[: -len(_SUFFIX)] for path in _FOLDER.glob(f"*{_SUFFIX}")))


def path_of(name: str) -> Path:
    """The file of a pretrained optimizer.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"name: expected one of {names()}, got {name!r}{meant(name, names())}")
    return _FOLDER / f"{name}{_SUFFIX}"


def alike(name: str) -> dict[str, Path]:
    """The files of networks trained as the pretrained optimizer ``name`` was, from other seeds, by the word after its
    name ("seed 3"): ``trained_alike/NAME.seed-3.safetensors``."""
    found = {}
    for path in sorted(_ALIKE.glob(f"{name}.seed-*{_SUFFIX}")):
        found[path.name[len(name) + 1 : -len(_SUFFIX)].replace("-", " ")] = path
    return found
