"""Read image sets in batches as a network takes them: preprocessed, sharded, with progress."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.data.batches import Batch, batches
from secateur.data.images import Images
from secateur.data.preprocessing import Preprocessing
from secateur.data.unreadable import Unreadable
from secateur.runtime import distributed
from secateur.runtime.device import CPU
from secateur.runtime.errors import DataError
from secateur.runtime.progress import ProgressCallback, no_progress


@dataclass(frozen=True, eq=False)
class BatchReader:
    """How images are read for one network.

    Every method takes the images and the title of their progress bar; without a title none is
    shown.
    """

    preprocessing: Preprocessing
    batch_size: int
    progress: ProgressCallback = no_progress
    unreadable: Unreadable | None = None
    """Collects the images that can't be read; None makes them an error."""
    device: torch.device = CPU
    """Where batches bring their images; labels stay on the CPU."""

    def read_first(self, images: Images, count: int) -> Tensor:
        """Return at most `count` of the first images `[image, channel, height, width]`.

        Raises `DataError` if none of `images` can be read.
        """
        few = replace(self, batch_size=min(count, self.batch_size))
        batch = next(iter(few.read(images)), None)
        if batch is None:
            raise DataError(f"none of {len(images.labels)} calibration images can be read")
        return batch.images

    def read(self, images: Images, title: str = "") -> Iterable[Batch]:
        """Return all images, in every process."""
        return self._batches(images, title)

    def read_shard(self, images: Images, title: str = "") -> Iterable[Batch]:
        """Return every n-th batch, for process n of `distributed`.

        `Batch.indices` count the images of this process.
        """
        chunks = torch.arange(len(images.labels)).split(self.batch_size)
        local_shard = images.take(torch.cat([*distributed.shard(chunks), chunks[0][:0]]))
        return self._batches(local_shard, title)

    def read_image_shard(self, images: Images, title: str = "") -> Iterable[Batch]:
        """Return batches of every n-th image, for process n of `distributed`.

        `Batch.indices` count the images of all processes.
        """
        return self._batches(images, title, distributed.rank_and_world_size())

    def _batches(
        self, images: Images, title: str, shard: tuple[int, int] = (0, 1)
    ) -> Iterable[Batch]:
        stream = batches(
            images,
            self.batch_size,
            self.preprocessing,
            shard=shard,
            unreadable=self.unreadable,
        )
        if self.device != CPU:
            stream = (replace(batch, images=batch.images.to(self.device)) for batch in stream)
        if not title:
            return stream
        return self.progress(
            stream, title, math.ceil(len(images.labels) / (self.batch_size * shard[1]))
        )
