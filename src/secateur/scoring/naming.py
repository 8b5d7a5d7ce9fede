"""Names for filters in open vocabulary, from an image–text model: CLIP-Dissect.

Source: Oikarinen & Weng, CLIP-Dissect, ICLR 2023, sections 3.2 and 3.3, with soft-WPMI. Each word's
probability in each image comes from the image–text model. A filter gets the word that is likely in
the images with its largest mean activation, and less likely in those of the layer's other filters.

Two departures. The paper takes the best 100 of 10,000 or more images; here they are 5 % of the
calibration images, between 5 and 100. And log-likelihoods are means over those images, not sums:
with a short vocabulary sums over 100 images are so far apart that a word's mean over the filters is
that of the best filter alone, and all words that fit one filter best tie. Where the likelihoods are
close, as with the paper's 20,000 words, both rank words alike (docs/explanation/naming.md compares
the two).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.graph.groups import Group
from secateur.graph.taps import Kernels, taps_of
from secateur.runtime import distributed
from secateur.scoring.criteria import FeatureBatch, Need

TEMPERATURE = 10.0
"""What cosines are multiplied by before the softmax over words, as in the authors' code."""
FIRST, LAST = 0.998, 0.97
"""Probability that the first of the top images is one of the filter's, and the limit for the last,
as in the authors' code."""
FEWEST_IMAGES, MOST_IMAGES, TOP_FRACTION = 5, 100, 0.05
BLOCK = 2**22
"""Log-likelihoods (filter × word) that are summed at a time."""


@dataclass(frozen=True, eq=False)
class ImageWords:
    """How well each word fits each calibration image."""

    words: tuple[str, ...]
    similarities: Float[Tensor, "image word"]
    """Cosine of the embeddings of image and word, float32 on the CPU."""

    @property
    def top_count(self) -> int:
        """Number of top images that a filter is named by."""
        return max(FEWEST_IMAGES, min(MOST_IMAGES, int(TOP_FRACTION * len(self.similarities))))


@dataclass(frozen=True)
class FilterName:
    """The word that fits a filter best."""

    word: str
    similarity: float
    """Soft-WPMI a top image, in nats: e to this power is how many times likelier the word is in the
    filter's top images than in those of the layer's filters on average."""


class Naming:
    """Keeps the images with each filter's largest mean activation, and names it; an `Observer`."""

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self, image_words: ImageWords) -> None:
        self._image_words = image_words
        self._count = image_words.top_count
        self._top: dict[str, tuple[Tensor, Tensor]] = {}
        """By tap, the largest means and the indices of their images, both `[filter, place]`."""

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._top = {}

    def update(self, features: FeatureBatch) -> None:
        """Keep the best images of this batch and of those before it."""
        means = features.maps.float().mean(dim=(2, 3)).T.cpu()  # [filter, image]
        indices = features.indices.expand_as(means)
        old = self._top.get(features.tap)
        parts = [(means, indices)] if old is None else [old, (means, indices)]
        self._top[features.tap] = self._best(parts)

    def _best(self, parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the largest means; of equal ones those of the images with the smaller index."""
        means, indices = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        by_index = indices.argsort(1)
        order = means.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
        places = by_index.gather(1, order[:, : self._count])
        return means.gather(1, places), indices.gather(1, places)

    def state(self) -> Iterable[Tensor]:
        """Return no tensors, since nothing here adds up over processes; see `merge`."""
        return ()

    def merge(self) -> None:
        """Keep the best images of all processes."""
        gathered = distributed.all_gather(self._top)
        self._top = {tap: self._best([top[tap] for top in gathered]) for tap in self._top}

    def top_images(
        self, tap: str
    ) -> tuple[Float[Tensor, "filter place"], Int[Tensor, "filter place"]]:
        """Return the largest means of a tap's filters and the indices of their images."""
        return self._top[tap]

    def names(self, group: Group) -> list[FilterName | None]:
        """Return the name of each channel; of several filters, that of the largest similarity.

        A filter has none if all of its top images get the same mean activation, as those of a
        filter that is never active do, or if the layer has no other filter to compare it with.
        """
        words = self._image_words.words
        largest = torch.full((len(group), len(words)), -math.inf)
        for tap_name, tap in taps_of(group).items():
            means, indices = self.top_images(tap_name)
            is_varied = means[:, 0] > means[:, -1]
            similarities = soft_wpmi(self._image_words.similarities, indices[is_varied])
            if len(similarities) > 1:
                channels = torch.from_numpy(tap.channel)[is_varied]
                index = channels[:, None].expand_as(similarities)
                largest.scatter_reduce_(0, index, similarities, "amax")
        return _best_words(words, largest)


def _best_words(
    words: tuple[str, ...], similarities: Float[Tensor, "channel word"]
) -> list[FilterName | None]:
    values, places = similarities.max(dim=1)
    return [
        FilterName(words[place], value) if value > -math.inf else None
        for place, value in zip(places.tolist(), values.tolist(), strict=True)
    ]


def soft_wpmi(
    similarities: Float[Tensor, "image word"], top_images: Int[Tensor, "filter place"]
) -> Float[Tensor, "filter word"]:
    """Return how much likelier each word is in a filter's top images than in all filters', in nats.

    `similarities` are the cosines of images and words, `top_images` the indices of each filter's
    images, the strongest first. The logarithm of a word's likelihood is its mean over the top
    images; the likelihood is then compared with its mean over the filters (see the module).
    """
    filters, count = top_images.shape
    probabilities = (TEMPERATURE * similarities).softmax(dim=1)  # [image, word]
    membership = FIRST - torch.arange(count) / count * (FIRST - LAST)
    logarithms = similarities.new_zeros(filters, similarities.shape[1])
    rows = max(1, BLOCK // similarities.shape[1])
    for block, top in zip(logarithms.split(rows), top_images.split(rows), strict=True):
        for place, member in enumerate(membership.tolist()):
            block += (1 - member + member * probabilities[top[:, place]]).log()
    logarithms /= count
    return logarithms - (logarithms.logsumexp(0) - math.log(max(filters, 1)))
