"""Factors: parts found by factorising the last feature maps, without labels.

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
from secateur.graph.taps import as_maps
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, UsageError
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext
from secateur.scoring.concepts.evidence import last_map

DEFAULT_COUNT = 8
IMAGES = 512
"""Images that the factors are learnt from: those with the lowest indices in the sample."""
POSITIONS = 16
"""Positions of each of these images: with 2,048 channels all rows together take 64 MiB."""
UPDATES = 50
"""Multiplicative updates of the strengths of the factors in an image."""


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
        """`[position, channel]` by image index, for at most `IMAGES` images."""
        self._dictionary: Tensor | None = None
        """`[factor, channel]`, each row of unit length."""

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The factors, named by their numbers from 1 on."""
        return tuple(Concept(f"factor {number + 1}", "factor") for number in range(self._count))

    @property
    def node(self) -> Node:
        """The last feature map."""
        return self._map

    @property
    def needs_learning(self) -> bool:
        """True: the factors are learnt from the calibration set."""
        return True

    def learn(self, concept_input: ConceptInput) -> None:
        """Keep some positions of each image, which depend on the image's index alone."""
        indices = concept_input.indices.tolist()
        for index, features in zip(indices, _features(concept_input), strict=True):
            rows = features.flatten(1).T  # [position, channel]
            generator = torch.Generator().manual_seed(index)
            drawn = torch.randperm(len(rows), generator=generator)[:POSITIONS]
            self._rows[index] = rows[drawn].cpu().clone()
        self._rows = _lowest(self._rows)

    def finish_learning(self) -> None:
        """Factorise the rows of all processes.

        The dictionary doesn't depend on how the images were spread over processes. Raises
        `DataError` if the maps hold nothing to factorise, `UsageError` without scikit-learn.
        """
        all_rows: dict[int, Tensor] = {}
        for rows in distributed.all_gather(self._rows):
            all_rows |= rows
        chosen = _lowest(all_rows)
        dictionary = _factorise(torch.cat([chosen[n] for n in sorted(chosen)]), self._count)
        # Take the main process's, since another machine may round differently.
        self._dictionary = distributed.all_gather(dictionary)[0]
        self._rows = {}

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return a region for each factor that is strongest somewhere, on the last map's grid."""
        masks = strongest(self.strengths(concept_input))
        factors = torch.arange(self._count, device=masks.device).expand(masks.shape[:2])
        return ConceptMasks(masks, torch.where(masks.any(dim=3).any(dim=2), factors, UNLABELLED))

    def strengths(self, concept_input: ConceptInput) -> Float[Tensor, "image factor h w"]:
        """Return how strong each factor is at each position.

        This is the non-negative A with the least squared error of A · dictionary, approached by
        multiplicative updates (Lee & Seung, NIPS 2000, eq. 4, with the dictionary fixed) from the
        features' projections. It avoids matrix products, which may round differently in batches of
        another size.
        """
        assert self._dictionary is not None
        features = _features(concept_input)
        dictionary = self._dictionary.to(features.device)
        rows = dictionary[:, None, :, None, None]  # [factor, 1, channel, 1, 1]
        projected = torch.stack([(features * row).sum(1) for row in rows], dim=1)
        products = (dictionary[:, None] * dictionary).sum(2)  # [factor, factor]
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
    """Return the number of factors from the source's argument; raises `UsageError`."""
    if not argument:
        return DEFAULT_COUNT
    if not argument.isdecimal() or int(argument) < 1:
        raise UsageError(f"factors:{argument}: expected a number of parts, as in factors:8")
    return int(argument)


def strongest(strengths: Float[Tensor, "image factor h w"]) -> Bool[Tensor, "image factor h w"]:
    """Return the cells where each factor is positive and the strongest, the first of ties."""
    most = strengths.amax(dim=1, keepdim=True)
    reaches = (strengths == most) & (most > 0)
    return reaches & (reaches.cumsum(1) == 1)


def _features(concept_input: ConceptInput) -> Tensor:
    """Return the features, `[image, channel, h, w]`, with negative values set to zero."""
    assert concept_input.value is not None
    return as_maps(concept_input.value.detach()).float().clamp(min=0)


def _lowest(rows: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: rows[index] for index in sorted(rows)[:IMAGES]}


def _factorise(rows: Tensor, count: int) -> Tensor:
    """Return `[factor, channel]`, rows of unit length, from `[row, channel]`; deterministic."""
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
        # A dictionary near the optimum is good enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows.numpy())
    dictionary: Tensor = torch.from_numpy(model.components_).float()
    lengths: Tensor = dictionary.norm(dim=1, keepdim=True)
    return dictionary / lengths.clamp(min=1e-12)
