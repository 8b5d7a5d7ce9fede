"""Lock a folder, so that one run at a time works in it.

The lock is the operating system's (through `filelock`), on a file beside the folder that is removed
afterwards: a process that is killed leaves nothing locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from secateur.runtime import distributed
from secateur.runtime.errors import RunFolderError
from secateur.runtime.local_path import check_local

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""Errors of file systems that have no locks."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, which need not exist yet, for the length of a block.

    The main process of a run holds the lock for all its processes. If another run holds it, raises
    `RunFolderError` in every process. A folder on a file system without locks is not locked.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if distributed.is_main_process():
            try:
                stack.enter_context(lock_exclusively(folder))
            except RunFolderError as error:
                refusal = str(error)
        refusal = "".join(distributed.all_gather(refusal))
        if refusal:
            raise RunFolderError(refusal)
        yield


@contextlib.contextmanager
def lock_exclusively(folder: Path) -> Iterator[None]:
    """Lock a folder as `lock_folder` does, but for this process alone, whatever its rank."""
    check_local(folder, is_output=True)
    folder = Path(os.path.realpath(folder))
    path = folder.parent / f".{folder.name}.lock"
    lock = filelock.FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise RunFolderError(
            f"another run is using {folder}: wait until it ends, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunFolderError(f"can't write beside {path}: {error}") from error
        path.unlink(missing_ok=True)
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink()  # while locked: a process that has opened it can't lock it later
            lock.release()
