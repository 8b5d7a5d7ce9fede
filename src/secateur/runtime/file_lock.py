"""One run at a time in a folder: whoever comes second is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import RunFolderError
from secateur.runtime import distributed

PATIENCE = 20.0
"""Seconds to wait for what a process that was killed has started and that still holds the lock."""

HELD = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES})
"""What the system says where another process holds a lock."""
LACKING = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What it says where a file system has no locks."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[int | None]:
    """Holds a folder, which need not be there yet, until the block ends or the process does.

    What the block is given is the file descriptor of the lock, or None in a process without it:
    processes that inherit it hold the folder, too, as long as they live.

    The lock is the operating system's, on a file beside the folder that is gone afterwards: a
    process that is killed leaves none. Of several processes of one run the first one holds it.
    Raises `RunFolderError` where another run holds it, in all processes. Does nothing where the
    system (Windows) or the file system has no such locks.
    """
    with contextlib.ExitStack() as stack:
        descriptor, reason = None, ""
        if distributed.is_main_process():
            try:
                descriptor = stack.enter_context(lock_exclusively(folder))
            except RunFolderError as error:
                reason = str(error)
        reason = "".join(distributed.all_gather(reason))
        if reason:
            raise RunFolderError(reason)
        yield descriptor


@contextlib.contextmanager
def lock_exclusively(folder: Path) -> Iterator[int | None]:
    """As `locked`, for this process alone, whatever others of its run do."""
    path = _lock_file(folder)
    descriptor = _acquire(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is held, so that nobody waits for this one
            os.close(descriptor)


def _lock_file(folder: Path) -> Path:
    folder = Path(os.path.realpath(folder))
    return folder.parent / f".{folder.name}.lock"


def _acquire(path: Path) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    until = time.monotonic() + PATIENCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                is_left = not _is_alive(os.read(descriptor, 20))
                os.close(descriptor)
                if error.errno in LACKING:
                    path.unlink(missing_ok=True)
                    return None
                if error.errno not in HELD:
                    raise
                if is_left and time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                name = path.name.removeprefix(".").removesuffix(".lock")
                raise RunFolderError(
                    f"another run is at work in {path.parent / name}: wait for its end, or choose "
                    "another folder"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    _sign(descriptor)
                    return descriptor
            os.close(descriptor)  # whoever held it has taken it away since it was opened
    except OSError as error:
        raise RunFolderError(f"can't write beside {path}: {error}") from error


def _sign(descriptor: int) -> None:
    """Leaves this process's number in a lock; where that can't be, lets go of it."""
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    except OSError:
        os.close(descriptor)
        raise


def _is_alive(number: bytes) -> bool:
    """Whether the process with the number in a lock is still there."""
    try:
        os.kill(int(number), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
