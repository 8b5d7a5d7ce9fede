"""Training images by epoch and step, in random order and changed at random.

What a step sees depends on the seed, the number of the epoch and that of the step alone, not on
what came before, on the number of processes or on that of the reading workers. So training that
goes on from the middle of an epoch sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from secateur.data.augmentation import Augmentation, ChangedImages
from secateur.data.images import Batch, Images
from secateur.errors import DataError
from secateur.models import Preprocessing
from secateur.seeds import seed_of

SMALLEST_SHARE = 2
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

    @property
    def steps(self) -> int:
        """Steps an epoch; a last, incomplete batch counts where it feeds every process.

        Raises `DataError` where there are fewer images than processes.
        """
        count, processes = len(self.images.labels), self.shard[1]
        if count < processes:
            raise DataError(f"{count} images can't be trained on by {processes} processes")
        whole, rest = divmod(count, self.batch_size)
        return whole + (rest >= SMALLEST_SHARE * processes or not whole)

    def size(self, step: int) -> int:
        """Images in a step from 0 on, of all processes together."""
        return min(self.batch_size, len(self.images.labels) - step * self.batch_size)

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's share of each step's batch, from a step of the epoch on.

        Raises `DataError` where an image can't be read.
        """
        loader: DataLoader[Batch | DataError] = DataLoader(
            _Epoch(self, number),
            batch_size=None,
            sampler=range(first_step, self.steps),
            num_workers=self.workers,
            generator=torch.Generator(),  # without one it draws from the global generator
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Epoch(Dataset["Batch | DataError"]):
    """An epoch's batches by step; errors are returned, since a worker would wrap what it raises."""

    def __init__(self, stream: TrainingStream, number: int) -> None:
        self._stream, self._number = stream, number
        generator = torch.Generator().manual_seed(seed_of(stream.seed, number))
        self._order = torch.randperm(len(stream.images.labels), generator=generator)

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self._read(step)
        except DataError as error:
            return error

    def _read(self, step: int) -> Batch:
        stream = self._stream
        augmentation, preprocessing = stream.augmentation, stream.preprocessing
        start = step * stream.batch_size
        whole: Tensor = self._order[start : start + stream.size(step)]
        share = slice(stream.shard[0], None, stream.shard[1])
        own = whole[share]
        seeds = (stream.seed, self._number)
        changed = ChangedImages(stream.images, augmentation, seeds)
        source = changed if augmentation.is_imagewise else stream.images
        pixels = preprocessing.normalise(source.read(own, preprocessing))
        generator = torch.Generator().manual_seed(seed_of(*seeds, step))
        moves = augmentation.draw(len(whole), preprocessing.image_size, generator)
        return Batch(moves.of(share).apply(pixels), stream.images.labels[own], own)
