"""Training images by epoch and step, in random order and with random augmentation.

The images of a step depend only on the seed, the epoch and the step, not on earlier steps, the
number of processes or the number of reading workers. So training that resumes in the middle of an
epoch sees the same images.
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
from secateur.data.objects import Objects
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import Unreadable, read_batch
from secateur.runtime.errors import DataError, UsageError
from secateur.runtime.seeding import seed_of
from secateur.runtime.signals import SIGNALS

PATIENCE_WITH_A_STEP = 10.0
"""Seconds that a worker keeps reading after a request to stop."""
SMALLEST_SHARD = 2
"""Images that each process needs of a last, incomplete batch, or else the batch is left out: batch
norm needs two."""


@dataclass(frozen=True, eq=False)
class TrainingStream:
    """Batches to train on; each process gets its shard of every batch."""

    images: Images
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    """Images of a step, over all processes."""
    seed: int
    shard: tuple[int, int] = (0, 1)
    """This process's rank, and the number of processes."""
    workers: int = 0
    """Processes that read ahead; with 0 each step reads its own images."""
    unreadable: Unreadable | None = None
    """Notes images that can't be read, which are then left out of their step."""

    @property
    def steps(self) -> int:
        """Steps of an epoch; a last, incomplete batch counts if every process gets enough of it.

        Raises `UsageError` if a batch has fewer images than there are processes.
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
        """Return the number of images in a step (from 0 on), over all processes."""
        return min(self.batch_size, len(self.images.labels) - step * self.batch_size)

    def epoch(self, number: int, first_step: int = 0) -> Generator[Batch]:
        """Yield this process's shard of each step's batch, from `first_step` of the epoch on.

        Closing the generator ends the workers. Raises `DataError` if an image can't be read.
        """
        loader: DataLoader[_ReadStep] = DataLoader(
            _Epoch(self, number),
            batch_size=None,
            sampler=range(first_step, self.steps),
            num_workers=self.workers,
            generator=torch.Generator(),  # the default draws from the global generator
            worker_init_fn=_prepare_worker,
        )
        # Signals that arrive while a worker starts wait until it has its handlers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for step in batches:
                if isinstance(step, DataError):
                    raise step
                batch, missing = step
                if self.unreadable is not None:
                    self.unreadable.add(missing)
                yield batch
        finally:
            # This ends the workers. The garbage collector may close their queues first: then they
            # would never learn that they should end, and be waited for.
            del batches


def _prepare_worker(number: int) -> None:
    """Make a worker end when its parent does, and not before."""
    del number
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _outlast_requests_to_stop()


def _end_with_parent() -> None:
    """End a worker when the process that it reads for has ended.

    PyTorch's workers watch their parent by its process id. If Python starts processes from a
    server, the default from 3.14 on, the parent is that server, which lives as long as they do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _outlast_requests_to_stop() -> None:
    """Make a worker keep reading for a while after a signal to stop.

    Such a signal may reach all processes at once, and the current step still needs its images. As a
    rule the process that the worker reads for ends it before the time is up.
    """

    def end_later(*_: object) -> None:
        timer = threading.Timer(PATIENCE_WITH_A_STEP, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


_ReadStep = tuple[Batch, tuple[str, ...]] | DataError
"""A batch and the files missing from it, or why there is no batch."""


class _Epoch(Dataset["_ReadStep"]):
    """An epoch's batches by step; returns errors, since a worker would wrap what it raises."""

    def __init__(self, stream: TrainingStream, number: int) -> None:
        self._stream, self._number = stream, number
        generator = torch.Generator().manual_seed(seed_of(stream.seed, number))
        self._order = torch.randperm(len(stream.images.labels), generator=generator)

    def __getitem__(self, step: int) -> _ReadStep:
        missing = None if self._stream.unreadable is None else Unreadable()
        try:
            batch = self._read(step, missing)
        except DataError as error:
            return DataError(str(error))  # subclasses may not unpickle in another process
        return batch, () if missing is None else missing.names

    def _read(self, step: int, missing: Unreadable | None) -> Batch:
        stream = self._stream
        augmentation, preprocessing = stream.augmentation, stream.preprocessing
        start = step * stream.batch_size
        indices: Tensor = self._order[start : start + stream.size(step)]
        shard = slice(stream.shard[0], None, stream.shard[1])
        local_shard = indices[shard]
        seeds = (stream.seed, self._number)
        changed = AugmentedImages(stream.images, augmentation, seeds)

        def read_all(part: Tensor) -> tuple[Tensor, Tensor, tuple[Objects, ...] | None]:
            if augmentation.is_imagewise:
                return changed.read(part, preprocessing)
            images = stream.images
            return (
                images.read(part, preprocessing),
                images.read_labels(part, preprocessing),
                images.read_targets(part, preprocessing),
            )

        readable = read_batch(read_all, local_shard, missing)
        if readable is None:
            raise DataError(f"none of the {len(local_shard)} images of a step can be read")
        read, (pixels, labels, objects) = readable
        generator = torch.Generator().manual_seed(seed_of(*seeds, step))
        moves = augmentation.draw(len(indices), preprocessing.size, generator)
        moves = moves.select(shard)
        if len(read) < len(local_shard):
            moves = moves.select(torch.isin(local_shard, read))
        images = moves.apply(preprocessing.normalise(pixels))
        labels = moves.apply_to_labels(labels, images)
        targets = objects and moves.move(objects, preprocessing.size[1])
        return Batch(images, labels, read, targets=targets)
