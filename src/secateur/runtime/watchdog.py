"""Tells the processes of one run when one of them has gone, in whatever they are doing just then.

A process that is killed is missed by the others only when they next add something up, which may
take long, and where its machine has lost its power not even then. So each of them says every few
seconds that it lives, in the store that the processes have found each other by, and looks whether
the others have.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from torch.distributed import TCPStore  # type: ignore[attr-defined]

BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without a sign of life after which a process is taken for lost."""
GRACE = 3.0
"""Seconds that this process then has to end by itself."""
FAILED = "failed"

_lost: list[str] = []


def lost_process() -> str | None:
    """What has been said of a process that was lost, if one was."""
    return _lost[0] if _lost else None


@contextlib.contextmanager
def watchdog(rank: int, size: int) -> Iterator[None]:
    """Within the block this process is missed where it goes, and ends where another one does.

    It is interrupted as by SIGTERM then, and `lost` says why; where it does not end within `GRACE`
    it is made to. The store is the one that `MASTER_ADDR` and `MASTER_PORT` name.
    """
    timeout = datetime.timedelta(seconds=SILENCE)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, is_master=False, timeout=timeout)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, rank, size, ended), daemon=True)
    beating.start()
    try:
        yield
    except BaseException as error:
        ended.set()
        if not isinstance(error, SystemExit) or error.code:
            with contextlib.suppress(RuntimeError):
                store.set(_key(rank), FAILED)
        raise
    ended.set()
    beating.join(SILENCE)


def _key(rank: int) -> str:
    """Of this attempt: torchrun's store outlives the processes that it starts again."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"secateur/alive/{attempt}/{rank}"


def _beat(store: TCPStore, rank: int, size: int, ended: threading.Event) -> None:
    others = [number for number in range(size) if number != rank]
    signs: dict[int, bytes] = {}
    seen = dict.fromkeys(others, time.monotonic())
    count = 0
    while not ended.is_set():
        try:
            store.set(_key(rank), str(count))
            count += 1
            for number in others:
                sign = store.get(_key(number)) if store.check([_key(number)]) else b""
                if sign == FAILED.encode():
                    return _end(f"process {number} of {size} has failed", ended)
                if sign != signs.get(number):
                    signs[number], seen[number] = sign, time.monotonic()
                elif time.monotonic() - seen[number] > SILENCE:
                    return _end(f"process {number} of {size} has gone", ended)
        except RuntimeError:
            return _end("the process that the others are joined by has gone", ended)
        ended.wait(BEAT)
    return None


def _end(reason: str, ended: threading.Event) -> None:
    if ended.is_set():
        return
    _lost.append(f"{reason}: this one ends, too")
    os.kill(os.getpid(), signal.SIGTERM)
    if not ended.wait(GRACE):
        sys.stderr.write(f"error: {_lost[0]}\n")
        sys.stderr.flush()
        os._exit(1)
