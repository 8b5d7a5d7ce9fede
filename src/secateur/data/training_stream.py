"""Training images by epoch and step, in random order and changed at random.

What a step sees depends on the seed, the number of the epoch and that of the step alone, not on
what came before, on the number of processes or on that of the reading workers. So training that
goes on from the middle of an epoch sees what it would have seen.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from secateur.data.augmentation import Augmentation, AugmentedImages
from secateur.data.batches import Batch
from secateur.data.images import Images
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import Unreadable, read_batch
from secateur.errors import DataError, UsageError
from secateur.runtime.seeding import seed_of
from secateur.runtime.signals import SIGNALS

PATIENCE_WITH_A_STEP = 10.0
"""Seconds that a worker goes on after a request to stop."""
SMALLEST_SHARD = 2
"""Images that a process needs in a last, incomplete batch, or else it is left out: the statistics
of a norm need two."""


@dataclass(frozen=True, eq=False)
class TrainingStream:
    """Batches to train on; each process gets its share of every batch."""

    images: Images
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    """Images a step, of all processes together."""
    seed: int
    shard: tuple[int, int] = (0, 1)
    """This process's number and how many there are."""
    workers: int = 0
    """Processes that read ahead; 0 reads when it is asked to."""
    unreadable: Unreadable | None = None
    """Notes images that can't be read, which then are left out of their step."""

    @property
    def steps(self) -> int:
        """Steps an epoch; a last, incomplete batch counts where it feeds every process.

        Raises `UsageError` where a batch has fewer images than there are processes.
        """
        count, processes = len(self.images.labels), self.shard[1]
        if min(count, self.batch_size) < processes:
            raise UsageError(
                f"{count} images in batches of {self.batch_size} can't be trained on by "
                f"{processes} processes"
            )
        whole, rest = divmod(count, self.batch_size)
        return whole + (rest >= SMALLEST_SHARD * processes or not whole)

    def size(self, step: int) -> int:
        """Images in a step from 0 on, of all processes together."""
        return min(self.batch_size, len(self.images.labels) - step * self.batch_size)

    def epoch(self, number: int, first_step: int = 0) -> Generator[Batch]:
        """This process's share of each step's batch, from a step of the epoch on.

        Closing it ends the workers. Raises `DataError` where an image can't be read.
        """
        loader: DataLoader[_Found] = DataLoader(
            _Epoch(self, number),
            batch_size=None,
            sampler=range(first_step, self.steps),
            num_workers=self.workers,
            generator=torch.Generator(),  # without one it draws from the global generator
            worker_init_fn=_prepare_worker,
        )
        # What is asked while a worker starts waits until it knows what to do about it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for found in batches:
                if isinstance(found, DataError):
                    raise found
                batch, missing = found
                if self.unreadable is not None:
                    self.unreadable.add(missing)
                yield batch
        finally:
            # Ends the workers. Left to the garbage collector, which may close their queues first,
            # they would not hear of it, and be waited for.
            del batches


def _prepare_worker(number: int) -> None:
    """A worker ends with the process that it reads for, and not before it."""
    del number
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _outlast_requests_to_stop()


def _end_with_parent() -> None:
    """Ends a worker whose batches nobody waits for any more.

    PyTorch's workers look at their parent by the operating system's account. Where Python starts
    processes by a server, as a rule from 3.14 on, that is the server, which lives as long as they.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _outlast_requests_to_stop() -> None:
    """A request to stop may come to all processes at once, and the step in hand needs its images.

    So a worker, which the process that it reads for ends as a rule, waits a while.
    """

    def end_later(*_: object) -> None:
        timer = threading.Timer(PATIENCE_WITH_A_STEP, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


_Found = tuple[Batch, tuple[str, ...]] | DataError
"""A batch and the files that are missing in it, or why there is none."""


class _Epoch(Dataset["_Found"]):
    """An epoch's batches by step; errors are returned, since a worker would wrap what it raises."""

    def __init__(self, stream: TrainingStream, number: int) -> None:
        self._stream, self._number = stream, number
        generator = torch.Generator().manual_seed(seed_of(stream.seed, number))
        self._order = torch.randperm(len(stream.images.labels), generator=generator)

    def __getitem__(self, step: int) -> _Found:
        missing = None if self._stream.unreadable is None else Unreadable()
        try:
            batch = self._read(step, missing)
        except DataError as error:
            return DataError(str(error))  # of a kind that comes through to another process
        return batch, () if missing is None else missing.names

    def _read(self, step: int, missing: Unreadable | None) -> Batch:
        stream = self._stream
        augmentation, preprocessing = stream.augmentation, stream.preprocessing
        start = step * stream.batch_size
        whole: Tensor = self._order[start : start + stream.size(step)]
        share = slice(stream.shard[0], None, stream.shard[1])
        own = whole[share]
        seeds = (stream.seed, self._number)
        changed = AugmentedImages(stream.images, augmentation, seeds)
        source = changed if augmentation.is_imagewise else stream.images
        found = read_batch(lambda some: source.read(some, preprocessing), own, missing)
        if found is None:
            raise DataError(f"none of the {len(own)} images of a step can be read")
        read, pixels = found
        generator = torch.Generator().manual_seed(seed_of(*seeds, step))
        moves = augmentation.draw(len(whole), preprocessing.image_size, generator)
        moves = moves.select(share)
        if len(read) < len(own):
            moves = moves.select(torch.isin(own, read))
        images = moves.apply(preprocessing.normalise(pixels))
        return Batch(images, stream.images.labels[read], read)
