"""Writes files and folders so that whatever happens there is the old one or the new one.

What is new is written under another name, flushed to the disk and then renamed. A full disk, a
process that is killed or a power cut leaves at most an unfinished file beside the old one, which
the next write replaces. Symbolic links are not followed: a link in a folder that came from
elsewhere can't lead a write out of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import WriteError

UNFINISHED = ".unfinished"
"""Ending of what is being written."""
OLDER = ".older"
"""Ending of a folder for the moment in which another one takes its place."""
EXCHANGE = 2
"""Linux's RENAME_EXCHANGE."""
HERE = -100
"""Linux's AT_FDCWD."""


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes a file, text as UTF-8, in the place of an older one; raises `WriteError`."""
    with _telling(path):
        unfinished = path.with_name(f"{path.name}{UNFINISHED}")
        try:
            _write(unfinished, content, os.O_CREAT | os.O_TRUNC)
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        _flush_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, on a line of its own whatever was there; raises `WriteError`."""
    with _telling(path):
        is_cut_off = False  # the last line, by whatever ended the process that wrote it
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                is_cut_off = file.read(1) != b"\n"
        start = "\n" if is_cut_off else ""
        _write(path, f"{start}{line}\n", os.O_CREAT | os.O_APPEND)


def make_folder(path: Path) -> None:
    """Makes a folder that the user names, and those above it; raises `WriteError`.

    A symbolic link to one is followed; see `make_inner_folder`.
    """
    with _telling(path):
        path.mkdir(parents=True, exist_ok=True)


def make_inner_folder(path: Path) -> None:
    """Makes a folder in one that may come from elsewhere; raises `WriteError`, also for a link."""
    if path.is_symlink():
        raise WriteError(f"{path} is a symbolic link, and none is followed there")
    make_folder(path)


def move_file(draft: Path, path: Path) -> None:
    """Puts a file that is written in the place of `path`, on the same disk; raises `WriteError`."""
    with _telling(path):
        _flush(draft)
        os.replace(draft, path)
        _flush_folder(path.parent)


def check_replaceable(folder: Path) -> None:
    """Raises `WriteError` where no other folder can take the place of one: a disk is mounted on it.

    For what takes long before it calls `replacing_folder`, which checks it, too.
    """
    if os.path.ismount(os.path.realpath(folder)):
        raise WriteError(f"{folder} is where a disk is mounted: name a folder inside it")


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends without an error.

    After an error nothing of it is left, and what was in `folder` is as it was. Whoever calls this
    holds `folder` (see `locks`), since the new one always has the same name until then; one that
    was left by a process that was killed is removed. Raises `WriteError`.
    """
    check_replaceable(folder)
    folder = Path(os.path.realpath(folder))
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    with _telling(folder):
        _put_back(folder)
        _remove(unfinished)
        unfinished.mkdir(parents=True)
    try:
        yield unfinished
        with _telling(folder):
            for each in unfinished.rglob("*"):
                if each.is_dir():  # files are flushed as they are written
                    _flush_folder(each)
            _flush_folder(unfinished)
            if folder.exists():
                _swap(unfinished, folder)
            else:
                os.replace(unfinished, folder)
            _flush_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Makes one line of the system's errors."""
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise WriteError(f"{place} can't be written: {error.strerror or error}") from error


def _write(path: Path, content: bytes | str, flags: int) -> None:
    left = memoryview(content.encode() if isinstance(content, str) else content)
    flags |= os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere folders can't be opened
        _flush(path)


def _swap(new: Path, old: Path) -> None:
    """Exchanges the names of two folders, at once where the system can."""
    if _exchange(new, old):
        return
    older = old.with_name(f".{old.name}{OLDER}")
    _remove(older)
    os.replace(old, older)
    os.replace(new, old)
    _remove(older)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two names could be exchanged in one step of the file system."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _put_back(folder: Path) -> None:
    """Undoes an exchange in two steps that was cut off between them."""
    older = folder.with_name(f".{folder.name}{OLDER}")
    if older.is_dir() and not folder.exists():
        os.replace(older, folder)


def _remove(path: Path) -> None:
    """Removes what a killed process has left; a symbolic link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
