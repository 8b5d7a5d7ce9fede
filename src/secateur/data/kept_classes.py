"""Some classes of a data set: which they are, and the images that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.data.imagenet import class_names
from secateur.data.images import IGNORED, Images, NormalisedImages
from secateur.data.masks import MaskedImages
from secateur.data.splits import LabelKind
from secateur.runtime.errors import DataError, UnknownName, UsageError


@dataclass(frozen=True)
class KeptClasses:
    """The classes that a network is cut to."""

    numbers: tuple[int, ...]
    """Their numbers in the original head, ascending: output `i` of the cut head is class
    `numbers[i]`."""
    names: tuple[str, ...]
    """Empty if nothing names them."""
    of: int
    """Number of classes of the original head."""

    def renumber(self, classes: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Return the new number of each class; those that go, and negative numbers, are IGNORED."""
        table = torch.full((self.of + 1,), IGNORED)
        table[torch.tensor(self.numbers)] = torch.arange(len(self.numbers))
        is_class = (classes >= 0) & (classes < self.of)
        return table[torch.where(is_class, classes, self.of)]


def find_classes(wanted: Sequence[str], names: Sequence[str], of: int) -> KeptClasses:
    """Return the classes that are named, or numbered from 0, among the `of` outputs of a head.

    An entry may list several, separated by commas. Where the data has no `names`, 1,000 outputs are
    those of ImageNet. Raises `UnknownName` for a name that no class has, and `UsageError` for a
    number out of range or a name that two classes have. A class may be named twice.
    """
    if not names and of == len(class_names()):
        names = tuple(class_names().values())
    parts: list[str] = []
    for entry in wanted:
        parts += [entry] if entry in names else [part.strip() for part in entry.split(",")]
    if not any(parts):
        raise UsageError("--keep-classes names no class: list two or more, as cat,dog or 3,5")
    numbers = sorted({_find_class(part, names, of) for part in parts if part})
    kept_names = tuple(names[number] for number in numbers) if names else ()
    return KeptClasses(tuple(numbers), kept_names, of)


def _find_class(wanted: str, names: Sequence[str], of: int) -> int:
    matches = [number for number, name in enumerate(names[:of]) if name == wanted]
    if not matches:
        matches = [
            number for number, name in enumerate(names[:of]) if name.casefold() == wanted.casefold()
        ]
    if len(matches) > 1:
        numbers = " and ".join(map(str, matches))
        raise UsageError(f"several classes are called {wanted!r}: name it by its number, {numbers}")
    if matches:
        return matches[0]
    if wanted.removeprefix("-").isdecimal():
        known = min(of, len(names)) if names else of
        if not 0 <= int(wanted) < known:
            raise UsageError(f"there is no class {wanted}: they are numbered 0 to {known - 1}")
        return int(wanted)
    if not names:
        raise UsageError(
            f"the data does not name its classes, so {wanted!r} is unknown: give their numbers, "
            f"0 to {of - 1}"
        )
    raise UnknownName("class", wanted, names[:of])


def images_of_classes(images: Images, kept: KeptClasses, kind: LabelKind) -> Images:
    """Return the images that show one of the kept classes, with new labels.

    Of several labels each the others go, and all images stay; of masks, pixels of other classes
    count for nothing.
    """
    if kind == "masks":
        return _with_fewer_masks(images, kept)
    if images.labels.ndim == 1:
        labels = kept.renumber(images.labels)
        is_shown = (labels != IGNORED).nonzero()[:, 0]
        return _with_labels(images.take(is_shown), labels[is_shown])
    return _with_labels(images, images.labels[:, torch.tensor(kept.numbers)])


def _with_labels(images: Any, labels: Tensor) -> Images:
    relabelled: Images = replace(images, labels=labels)
    return relabelled


def _with_fewer_masks(images: Images, kept: KeptClasses) -> Images:
    if isinstance(images, MaskedImages):
        classes = images.class_of_value
        fewer = torch.where(classes < 0, classes, kept.renumber(classes))
        return replace(images, class_of_value=fewer)
    if isinstance(images, NormalisedImages) and images.values is not None:
        return replace(images, values=kept.renumber(images.values[:].long()))
    raise DataError("the masks of this data set can't be cut to some classes")
