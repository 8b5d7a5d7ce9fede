"""Images with annotated objects, for detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int, Num
from torch import Tensor

from secateur.data.images import Indices, StoredImages
from secateur.data.objects import Objects
from secateur.data.preprocessing import Geometry, Preprocessing
from secateur.runtime.errors import DataError

UNIT = (1, 1)
"""Size of the stored image for objects whose places are fractions of its sides."""


@dataclass(frozen=True, eq=False)
class ImagesWithObjects:
    """Images and the objects that each shows.

    Objects may be in pixels of an image of another size than the file's, such as the original of
    one that was reduced, or in fractions of its sides.
    """

    images: StoredImages
    objects: tuple[Objects, ...]

    @property
    def labels(self) -> Int[Tensor, "image"]:
        """Zeros: an image has no class of its own."""
        return self.images.labels

    def read(
        self, indices: Indices, preprocessing: Preprocessing
    ) -> Num[Tensor, "image rgb height width"]:
        """Return the images at `indices`, resized and cropped; see `Images.read`."""
        return self.images.read(indices, preprocessing)

    def read_labels(self, indices: Indices, preprocessing: Preprocessing) -> Int[Tensor, "image"]:
        """Return zeros; see `Images.read_labels`."""
        return self.images.read_labels(indices, preprocessing)

    def read_targets(self, indices: Indices, preprocessing: Preprocessing) -> tuple[Objects, ...]:
        """Return the objects of each image at `indices`; see `Images.read_targets`.

        Raises `DataError` if an image has another shape than the one that was annotated.
        """
        sizes = self.images.sizes(indices)
        return self.place(indices, [preprocessing.geometry(*size) for size in sizes], sizes)

    def place(
        self,
        indices: Indices,
        geometries: Sequence[Geometry],
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[Objects, ...]:
        """Return the objects of images of these sizes that lie so in the network's input."""
        return tuple(
            self._placed(index, geometry, size)
            for index, geometry, size in zip(indices.tolist(), geometries, sizes, strict=True)
        )

    def _placed(self, index: int, geometry: Geometry, size: tuple[int, int]) -> Objects:
        objects = self.objects[index]
        if objects.size == UNIT:
            objects = objects.at_size(size)
        (height, width), (rows, columns) = objects.size, size
        if abs(height * columns - width * rows) > max(height, width, rows, columns):
            raise DataError(
                f"the image {self.images.name(index)} is {columns}×{rows}, and its objects are "
                f"annotated in one of {width}×{height}"
            )
        reduced = Geometry(columns / width, rows / height)
        return replace(objects, geometry=reduced.then(geometry))

    def originals(self, indices: Indices) -> list[Num[Tensor, "rgb _ _"]]:
        """Return the images at `indices` as they are stored; see `Images.originals`."""
        return self.images.originals(indices)

    def take(self, indices: Indices) -> ImagesWithObjects:
        """Return a list of the images at `indices`; see `Images.take`."""
        objects = tuple(self.objects[index] for index in indices.tolist())
        return ImagesWithObjects(self.images.take(indices), objects)
