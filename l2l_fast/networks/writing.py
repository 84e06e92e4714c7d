"""Files are written whole or not at all, and whatever goes wrong is said of the path that the user gave."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


def checked_path(path: str | os.PathLike[str], name: str = "path") -> str:
    """``path`` as the text of a file's path. A ``~`` is a character like any other, as for ``open`` and ``torch.save``.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, or holds a null character.
        IsADirectoryError: it names a folder, by its last character or because there is one.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"{name}: expected a path, got {path!r}") from None
    if not text or "\0" in text:
        raise ValueError(f"{name}: expected the name of a file, got {text!r}")
    if text.endswith(_SEPARATORS) or os.path.isdir(text):
        raise IsADirectoryError(errno.EISDIR, f"{name}: expected a file, but this is a folder", text)
    return text


def check_writable(path: str | os.PathLike[str], name: str = "path", make_folder: bool = False) -> None:
    """Raise what :func:`write_atomically` would raise, as far as that can be known without writing; for commands that
    compute for a long time first.

    Args:
        make_folder: missing folders do not matter, they are going to be made.
    """
    text = checked_path(path, name)
    _target(text, name)
    folder = os.path.dirname(os.path.realpath(text))
    while make_folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    _check_folder(folder, text, name)


def write_atomically(path: str | os.PathLike[str], content: bytes | str, name: str = "path") -> None:
    """Write a file such that a crash at any moment leaves either the old content or the new one; text as UTF-8.

    As with ``open(path, "wb")``, a symbolic link is followed (and kept), a new file gets the permissions that the umask
    leaves, an existing one keeps its own, and one that may not be written is refused. What is no regular file (a
    device, a pipe) is written to directly.

    Args:
        name: of the user's argument, for messages.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder does not exist; nothing is created in its place.
        IsADirectoryError: the path is a folder.
        OSError: it cannot be written (permissions, a full disk). Every message names ``path`` as it came.
        TypeError, ValueError: it is no path.
    """
    text = checked_path(path, name)
    content = content.encode() if isinstance(content, str) else content
    existing = _target(text, name)
    try:
        if existing is not None and not stat.S_ISREG(existing.st_mode):
            with open(text, "wb") as file:
                file.write(content)
            return
        _check_folder(os.path.dirname(os.path.realpath(text)), text, name)
        _replace(os.path.realpath(text), content, existing)
    except OSError as error:
        if error.filename == text and error.filename2 is None:
            raise
        # Not the temporary file's name, nor what a link points to: the user knows neither.
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"{name}: cannot be written: {reason}", text) from error


def _replace(target: str, content: bytes, existing: os.stat_result | None) -> None:
    # The temporary file must be in the same folder: os.replace is atomic only within one file system. Its name does not
    # grow with the file's, which may be as long as the file system allows.
    temporary = os.path.join(os.path.dirname(target), f".l2l_fast.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            if existing is not None:
                if (existing.st_uid, existing.st_gid) != (os.geteuid(), os.getegid()):
                    with suppress(PermissionError):
                        os.fchown(file.fileno(), existing.st_uid, existing.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(existing.st_mode))
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _target(text: str, name: str) -> os.stat_result | None:
    """What is there already, links followed; None if nothing. Raises if it may not be written."""
    try:
        found = os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a circle of links, a name too long, a folder that may not be entered
        raise OSError(error.errno, f"{name}: cannot be written: {error.strerror}", text) from error
    if not os.access(text, os.W_OK):
        raise PermissionError(errno.EACCES, f"{name}: cannot be written: {os.strerror(errno.EACCES)}", text)
    return found


def _check_folder(folder: str, text: str, name: str) -> None:
    if not os.path.lexists(folder):
        hint = " (~ is not expanded: use os.path.expanduser)" if text.startswith("~") else ""
        shown = os.path.dirname(text) or folder
        raise FileNotFoundError(errno.ENOENT, f"{name}: there is no folder {shown!r}{hint}", text)
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, f"{name}: {os.path.dirname(text)!r} is not a folder", text)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{name}: its folder cannot be written to", text)


def checked_folder(path: str | os.PathLike[str], name: str = "path") -> Path:
    """``path``, which is a folder or could become one, as far as that can be known without making it.

    Raises:
        TypeError, ValueError: it is no path.
        NotADirectoryError: there is something else of that name (a file, a link to nothing), or a file above it.
        PermissionError: it is missing and may not be made.
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"{name}: expected a path, got {path!r}") from None
    if not text or "\0" in text:
        raise ValueError(f"{name}: expected the name of a folder, got {text!r}")
    place = Path(text)
    if not place.is_dir() and os.path.lexists(place):
        what = "a link to nothing" if place.is_symlink() and not place.exists() else "a file"
        raise NotADirectoryError(errno.ENOTDIR, f"{name}: expected a folder, but this is {what}", text)
    above = os.path.abspath(place)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise NotADirectoryError(errno.ENOTDIR, f"{name}: the folder cannot be made: {above!r} is not a folder", text)
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{name}: the folder cannot be written to", text)
    return place


@contextmanager
def folder(path: str | os.PathLike[str], name: str = "path") -> Iterator[Path]:
    """A folder for results, made if it is missing, with the folders above it. If what happens inside fails, those that
    were made and are still without a file go again: a failure leaves no empty folders behind.

    Raises:
        TypeError, ValueError: it is no path.
        NotADirectoryError: there is a file of that name, or above it.
        OSError: it cannot be made; the message names ``path`` as it came.
    """
    place = checked_folder(path, name)
    text = os.fsdecode(path)
    missing = [each for each in (place, *place.parents) if not os.path.lexists(each)]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{name}: expected a folder, but this is a file", text) from error
    except OSError as error:
        _remove_empty(missing)
        raise OSError(error.errno, f"{name}: the folder cannot be made: {error.strerror}", text) from error
    try:
        yield place
    except BaseException:
        _remove_empty(missing)
        raise


def _remove_empty(made: list[Path]) -> None:
    """Remove what holds no files of the folders that were ``made``, the innermost first."""
    if made and made[0].is_dir():
        for inner, _, _ in os.walk(made[0], topdown=False):
            with suppress(OSError):
                os.rmdir(inner)
    for outer in made[1:]:
        with suppress(OSError):
            os.rmdir(outer)
