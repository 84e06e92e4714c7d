"""Every way in which a file cannot be written is said of the user's path; what can be written is written as by open."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.meta import MetaTrainer
from l2l_fast.networks import trained, writing
from tests.helpers import random_network


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Paths are relative to a fresh folder, which nothing may litter."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("*.tmp"))


def write(path):
    writing.write_atomically(path, b"new")


def save(path):
    random_network().save(path)


def save_several(path):
    trained.save(torch.nn.ModuleDict({"a": random_network()}), path)


@pytest.mark.parametrize("write", [write, save, save_several])
@pytest.mark.parametrize(
    "path, error, words",
    [
        ("missing/x", FileNotFoundError, "there is no folder 'missing'"),
        ("a/b/c/x", FileNotFoundError, "there is no folder 'a/b/c'"),
        ("~/x", FileNotFoundError, "there is no folder '~' .*not expanded"),
        ("~nobody/x", FileNotFoundError, "not expanded"),
        ("folder", IsADirectoryError, "this is a folder"),
        ("folder/", IsADirectoryError, "this is a folder"),
        ("link-to-folder", IsADirectoryError, "this is a folder"),
        ("new/", IsADirectoryError, "this is a folder"),
        (".", IsADirectoryError, "this is a folder"),
        ("folder/..", IsADirectoryError, "this is a folder"),
        ("file/x", NotADirectoryError, "'file' is not a folder"),
        ("circle", OSError, "cannot be written: Too many levels"),
        ("link-to-nowhere", FileNotFoundError, "there is no folder"),
        ("x" * 300, OSError, "File name too long"),
        ("", ValueError, "expected the name of a file, got ''"),
        ("a\0b", ValueError, "expected the name of a file"),
        (None, TypeError, "expected a path, got None"),
        (3, TypeError, "expected a path, got 3"),
    ],
)
def test_what_cannot_be_written(write, path, error, words, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "link-to-folder").symlink_to("folder")
    (tmp_path / "link-to-nowhere").symlink_to("missing/x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=f"^(.Errno [0-9]+. )?path: .*{words}") as caught:
        write(path)
    assert ".tmp" not in str(caught.value)
    if isinstance(caught.value, OSError):
        assert caught.value.filename == path and caught.value.errno
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_paths_of_every_kind(kind, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("x", "sub/x", "sub/../y", "näme with spaces", "n" * 255):
        save(kind(name))
        assert l2l.load(kind(name)).hidden_size == 20


def test_a_new_file_gets_what_the_umask_leaves_and_an_old_one_keeps_its_mode(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            write(f"new{mask}")
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / f"new{mask}").stat().st_mode) == mode
    for mode in (0o600, 0o640, 0o666, 0o755):
        (tmp_path / "old").write_bytes(b"old")
        (tmp_path / "old").chmod(mode)
        write("old")
        assert (tmp_path / "old").read_bytes() == b"new"
        assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == mode


def test_links_are_followed_and_kept(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("sub/target")
    (tmp_path / "chain").symlink_to("link")
    (tmp_path / "dangling").symlink_to("sub/fresh")
    for link, target in (("link", "target"), ("chain", "target"), ("dangling", "fresh")):
        (tmp_path / "sub" / "target").write_bytes(b"old")
        write(link)
        assert (tmp_path / link).is_symlink() and (tmp_path / "sub" / target).read_bytes() == b"new"


def test_devices_and_pipes_are_written_to_and_stay_what_they_are(tmp_path):
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "full").symlink_to("/dev/full")
    for path in ("/dev/full", "full"):
        with pytest.raises(OSError, match="path: cannot be written: No space left") as caught:
            write(path)
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == path
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_bytes()))
    reader.start()
    write("pipe")
    reader.join()
    assert read == [b"new"] and stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    save("x")
    old = Path("x").read_bytes()
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match="path: cannot be written: File too large: 'x'"):
            save("x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert Path("x").read_bytes() == old and os.listdir() == ["x"]


def test_without_permission(tmp_path):
    """In a process of its own, since root may write everywhere."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    for name in ("locked", "file"):
        (tmp_path / name).chmod(0o555)
    tmp_path.chmod(0o777)
    code = """
import os, sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("writing", sys.argv[1])
writing = module_from_spec(spec)
spec.loader.exec_module(writing)
if os.geteuid() == 0: os.setuid(65534)
for path in ("locked/x", "file"):
    for call in (lambda: writing.write_atomically(path, b"new"), lambda: writing.check_writable(path)):
        try: call()
        except PermissionError as error: assert error.filename == path and ".tmp" not in str(error), error
        else: sys.exit(f"{path} was written")
"""
    for outer in (*tmp_path.parents,)[:2]:
        outer.chmod(0o755)
    source = tmp_path / "copy.py"
    source.write_text(Path(writing.__file__).read_text())
    result = subprocess.run([sys.executable, "-c", code, str(source)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_can_be_known_before_is_said_before(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    writing.check_writable("new")
    writing.check_writable("file", "--json")
    writing.check_writable("a/b/new", make_folder=True)
    for path, error in (("a/new", FileNotFoundError), ("file/x", NotADirectoryError), (".", IsADirectoryError)):
        with pytest.raises(error, match="--json: "):
            writing.check_writable(path, "--json")
    with pytest.raises(NotADirectoryError, match="--plot"):
        writing.check_writable("file/a/b", "--plot", make_folder=True)
    assert os.listdir() == ["file"]


def test_a_folder_for_results_goes_again_if_nothing_came_of_it(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RuntimeError), writing.folder("a/b/c") as place:
        (place / "d" / "e").mkdir(parents=True)
        raise RuntimeError
    with pytest.raises(RuntimeError), writing.folder("old"):
        raise RuntimeError
    assert sorted(os.listdir()) == ["file", "old"]
    with pytest.raises(RuntimeError), writing.folder("a/b") as place:
        (place / "d").mkdir()
        (place / "log").write_text("something")
        raise RuntimeError
    assert sorted(str(path) for path in Path("a").rglob("*")) == ["a/b", "a/b/log"]
    for path, error in (("file", NotADirectoryError), ("file/x", NotADirectoryError), ("", ValueError), (3, TypeError)):
        with pytest.raises(error, match="--out: "), writing.folder(path, "--out"):
            pass


def test_checkpoints_too(tmp_path):
    run = MetaTrainer(l2l.CoordinatewiseLSTM(hidden_size=4), l2l.problems.Quadratic(dim=2, batch=2), 2, 2)
    (tmp_path / "folder").mkdir()
    for path in ("folder", ""):
        with pytest.raises((OSError, ValueError), match="path: expected"):
            run.save(path)
    assert os.listdir() == ["folder"]
