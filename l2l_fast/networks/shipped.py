"""The files of the trained optimizers that come with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "pretrained"
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
        raise ValueError(f"name: expected one of {names()}, got {name!r}")
    return _FOLDER / f"{name}{_SUFFIX}"
