"""Write files and folders atomically: at any moment there is the old one or the new one, whole.

New content is written under another name, flushed to the disk and then renamed. A full disk, a
killed process or a power cut leaves at most an unfinished file beside the old one, which the next
write replaces. Symbolic links are not followed: a link in a folder that came from elsewhere can't
lead a write out of it.
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

from secateur.runtime.errors import WriteError
from secateur.runtime.local_path import check_local

UNFINISHED = ".unfinished"
"""Suffix of a file or folder that is being written."""
OLDER = ".older"
"""Suffix of a folder for the moment in which another one takes its place."""
RENAME_EXCHANGE, AT_FDCWD = 2, -100
"""Linux's constants for `renameat2`."""


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8, in place of an older one; raises `WriteError`."""
    with _as_write_error(path):
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
    """Append a line to a file, after ending an unfinished last line; raises `WriteError`."""
    with _as_write_error(path):
        is_unfinished = False  # the last line, if a process was killed while it wrote it
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                is_unfinished = file.read(1) != b"\n"
        start = "\n" if is_unfinished else ""
        _write(path, f"{start}{line}\n", os.O_CREAT | os.O_APPEND)


def make_folder(path: Path) -> None:
    """Create a folder that the user names, and its parents; raises `WriteError`.

    If the path is a symbolic link to a folder, that folder is used; see `make_inner_folder`. Raises
    `UsageError` if it is an address.
    """
    check_local(path, is_output=True)
    with _as_write_error(path):
        path.mkdir(parents=True, exist_ok=True)


def make_inner_folder(path: Path) -> None:
    """Create a folder inside a run folder; raises `WriteError`, also if it is a symbolic link."""
    if path.is_symlink():
        raise WriteError(f"{path} is a symbolic link: replace it by a folder")
    make_folder(path)


def move_file(draft: Path, path: Path) -> None:
    """Rename a finished file to `path`, on the same disk; raises `WriteError`."""
    with _as_write_error(path):
        _flush(draft)
        os.replace(draft, path)
        _flush_folder(path.parent)


def check_replaceable(folder: Path) -> None:
    """Raise `WriteError` if a folder can't be replaced because a disk is mounted on it.

    `replacing_folder` checks this too; long computations call it before they start.
    """
    if os.path.ismount(os.path.realpath(folder)):
        raise WriteError(f"{folder} is a mount point: name a folder inside it")


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill, which replaces `folder` if the block ends without an error.

    After an error the new folder is removed and `folder` is unchanged. The caller must have locked
    `folder` (see `file_lock`), since the name of the unfinished folder is always the same; one left
    by a killed process is removed. Raises `WriteError`.
    """
    check_replaceable(folder)
    folder = Path(os.path.realpath(folder))
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    with _as_write_error(folder):
        _undo_swap(folder)
        _remove(unfinished)
        unfinished.mkdir(parents=True)
    try:
        yield unfinished
        with _as_write_error(folder):
            for path in unfinished.rglob("*"):
                if path.is_dir():  # files are flushed as they are written
                    _flush_folder(path)
            _flush_folder(unfinished)
            if folder.exists():
                _swap(unfinished, folder)
            else:
                os.replace(unfinished, folder)
            _flush_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _as_write_error(path: Path) -> Iterator[None]:
    """Turn the system's errors into `WriteError`s of one line."""
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise WriteError(f"{place} can't be written: {error.strerror or error}") from error


def _write(path: Path, content: bytes | str, flags: int) -> None:
    remaining = memoryview(content.encode() if isinstance(content, str) else content)
    flags |= os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    if os.name == "posix":  # other systems can't open folders
        _flush(path)


def _swap(new: Path, old: Path) -> None:
    """Exchange two folders, in one step if the system can, else in two and without the old one."""
    if _exchange(new, old):
        return
    older = old.with_name(f".{old.name}{OLDER}")
    _remove(older)
    os.replace(old, older)
    os.replace(new, old)
    _remove(older)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step of the file system; return False if it can't."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _undo_swap(folder: Path) -> None:
    """Undo a swap in two steps that was interrupted between them."""
    older = folder.with_name(f".{folder.name}{OLDER}")
    if older.is_dir() and not folder.exists():
        os.replace(older, folder)


def _remove(path: Path) -> None:
    """Remove a leftover of a killed process; of a symbolic link, the link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
