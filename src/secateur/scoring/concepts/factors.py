"""Factors: parts that the last feature maps fall into by themselves, without a label.

The maps of a sample of the calibration set, positions in rows, are factorised into few non-negative
directions (Lee & Seung, Nature 1999), as Deep Feature Factorization does (Collins, Achanta &
Süsstrunk, ECCV 2018); a cell belongs to the factor that is strongest there.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.fx.node import Node

from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks
from secateur.errors import DataError, UsageError
from secateur.runtime import distributed
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext
from secateur.scoring.concepts.evidence import last_map

DEFAULT_COUNT = 8
IMAGES = 512
"""Images that the factors are learnt from: those with the lowest numbers in the sample."""
POSITIONS = 16
"""Positions of each of them: with 2,048 channels all rows together take 64 MiB."""
UPDATES = 50
"""Multiplicative updates that the strength of the factors in an image gets."""


class Factors(ConceptSource):
    """Parts by non-negative matrix factorisation of the last feature maps."""

    def __init__(self, context: SourceContext) -> None:
        count = factor_count(context.argument)
        self._map = last_map(context.graph)
        channels = int(self._map.meta["val"].shape[1])
        if count > channels:
            raise UsageError(
                f"factors:{count} asks for more parts than the {channels} channels of the last "
                "feature map: ask for fewer"
            )
        self._count = count
        self._rows: dict[int, Tensor] = {}
        """Image number -> `[position, channel]`, at most `IMAGES` of them."""
        self._dictionary: Tensor | None = None
        """`[factor, channel]`, each row of unit length."""

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The factors, which have no names but their numbers."""
        return tuple(Concept(f"factor {number + 1}", "factor") for number in range(self._count))

    @property
    def node(self) -> Node:
        """The last feature map."""
        return self._map

    @property
    def needs_learning(self) -> bool:
        """Yes: the factors are those of the calibration set."""
        return True

    def learn(self, scene: ConceptInput) -> None:
        """Keeps some positions of each image; which ones depends on the image's number alone."""
        for number, features in zip(scene.indices.tolist(), _features(scene), strict=True):
            rows = features.flatten(1).T  # [position, channel]
            generator = torch.Generator().manual_seed(number)
            drawn = torch.randperm(len(rows), generator=generator)[:POSITIONS]
            self._rows[number] = rows[drawn].clone()
        self._rows = _lowest(self._rows)

    def finish_learning(self) -> None:
        """Factorises the rows of all processes.

        The dictionary does not depend on how the images were spread over them. Raises `DataError`
        where the maps hold nothing to factorise, `UsageError` without scikit-learn.
        """
        found: dict[int, Tensor] = {}
        for rows in distributed.all_gather(self._rows):
            found |= rows
        chosen = _lowest(found)
        dictionary = _factorise(torch.cat([chosen[n] for n in sorted(chosen)]), self._count)
        # The first process's, since another machine may round differently.
        self._dictionary = distributed.all_gather(dictionary)[0]
        self._rows = {}

    def find(self, scene: ConceptInput) -> ConceptMasks:
        """A region for each factor that is strongest somewhere, on the grid of the last map."""
        masks = strongest(self.strengths(scene))
        numbers = torch.arange(self._count).expand(masks.shape[:2])
        return ConceptMasks(masks, torch.where(masks.any(dim=3).any(dim=2), numbers, UNLABELLED))

    def strengths(self, scene: ConceptInput) -> Float[Tensor, "image factor h w"]:
        """How much of each factor is at each position, for pictures too.

        The non-negative A with the least squared error of A · dictionary, approached by
        multiplicative updates (Lee & Seung, NIPS 2000, eq. 4, with the dictionary fixed) from the
        features' projections. There is no matrix product in it, which may round differently in
        batches of another size.
        """
        assert self._dictionary is not None
        features = _features(scene)
        rows = self._dictionary[:, None, :, None, None]  # [factor, 1, channel, 1, 1]
        projected = torch.stack([(features * row).sum(1) for row in rows], dim=1)
        products = (self._dictionary[:, None] * self._dictionary).sum(2)  # [factor, factor]
        smallest = torch.finfo(projected.dtype).tiny
        strengths = projected
        for _ in range(UPDATES):
            explained = torch.zeros_like(strengths)
            for factor in range(self._count):
                column = products[:, factor, None, None]
                explained = explained + column * strengths[:, factor, None]
            strengths = strengths * (projected / explained.clamp(min=smallest))
        return strengths


def factor_count(argument: str) -> int:
    """The number of parts that the name of the source asks for; raises `UsageError`."""
    if not argument:
        return DEFAULT_COUNT
    if not argument.isdecimal() or int(argument) < 1:
        raise UsageError(f"factors:{argument}: expected a number of parts, as in factors:8")
    return int(argument)


def strongest(strengths: Float[Tensor, "image factor h w"]) -> Bool[Tensor, "image factor h w"]:
    """The cells where each factor is the strongest, and there at all; the first where some tie."""
    most = strengths.amax(dim=1, keepdim=True)
    reaches = (strengths == most) & (most > 0)
    return reaches & (reaches.cumsum(1) == 1)


def _features(scene: ConceptInput) -> Tensor:
    """`[image, channel, h, w]`; what is below zero, before or without a rectifier, is no part."""
    assert scene.value is not None
    return scene.value.detach().float().clamp(min=0)


def _lowest(rows: dict[int, Tensor]) -> dict[int, Tensor]:
    return {number: rows[number] for number in sorted(rows)[:IMAGES]}


def _factorise(rows: Tensor, count: int) -> Tensor:
    """`[factor, channel]` of unit length from `[row, channel]`, always the same."""
    try:
        from sklearn.decomposition import NMF
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise UsageError("factors need the extra: pip install 'secateur[factors]'") from error
    if not bool(torch.isfinite(rows).all()) or not bool(rows.any()):
        raise DataError("the last feature map has no positive, finite values to find factors in")
    if len(rows) < count:
        raise UsageError(
            f"factors:{count} needs more calibration images: {len(rows)} rows are too few"
        )
    model = NMF(n_components=count, init="nndsvda", random_state=0)
    with warnings.catch_warnings():
        # A dictionary near the optimum serves as well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows.numpy())
    dictionary: Tensor = torch.from_numpy(model.components_).float()
    lengths: Tensor = dictionary.norm(dim=1, keepdim=True)
    return dictionary / lengths.clamp(min=1e-12)
