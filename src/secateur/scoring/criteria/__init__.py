"""Criteria, which score filters: concept votes and the baselines.

A criterion sees the feature maps of every tap, batch by batch (`update`), and then returns one
score for each filter (`compute`): the higher, the more the filter deserves to stay. It keeps sums
over images only, never a feature map.

- `reconstruction`: the default vote, `vote`, and its baseline without concepts
- `votes`: `vote-response` and `vote-iou`
- `kernels`: `random`, `l1`, `l2`, `fpgm`, `bn_scale`, which need no images
- `statistics`: `apoz`, `activation_mean`, `activation_std`, `activation_entropy`, `hrank`
- `dependence`: `chip`
- `gradients`: `taylor`
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from secateur.config import CRITERIA, RunConfig, ScoreSection
from secateur.data.concept_masks import ConceptMasks, at_resolution, coverage_at
from secateur.graph.taps import Kernels
from secateur.models import user_code, zoo
from secateur.runtime.errors import UnknownName, UsageError
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.thresholds import ActivationStatistics

Need = Literal["maps", "statistics", "thresholds", "concepts", "gradients"]
"""What an observer needs: feature maps at all; each filter's activation statistics, which take a
sampled pass of their own; its threshold among them; concept masks; gradients of the loss."""


Size = tuple[int, int]


class Regions:
    """The concept masks of a batch, at any resolution."""

    def __init__(self, concept_masks: ConceptMasks) -> None:
        masks = concept_masks.masks
        self.concepts: Int[Tensor, "image region"] = concept_masks.concepts
        """Index of the concept that each region shows, or `UNLABELLED`."""
        self.size: Size = (masks.shape[2], masks.shape[3])
        """Resolution of the masks from their source: a finer one adds no detail."""
        self.masks_at: Callable[[Size], Bool[Tensor, "image region h w"]] = functools.cache(
            lambda size: at_resolution(masks, size)
        )
        """The masks at a resolution, see `concept_masks.at_resolution`."""
        self.coverage_at: Callable[[Size], UInt8[Tensor, "image region h w"]] = functools.cache(
            lambda size: coverage_at(masks, size)
        )
        """How much of each cell is inside, see `concept_masks.coverage_at`."""


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """The feature maps of one tap in one batch, with what observers need beside them."""

    tap: str
    maps: Float[Tensor, "image filter h w"]
    """Feature maps as the next layer reads them; 1×1 for hidden units of linear layers. Don't
    change or keep them: reduce them at once to what is needed later."""
    indices: Int[Tensor, "image"]
    """Index of each image in the calibration set; choose samples of images by it."""
    kernels: Kernels
    statistics: ActivationStatistics | None
    """For observers that need them."""
    grid: tuple[int, int]
    """Rows and columns of cells to average responses to: at most the size of the maps."""
    gradients: Float[Tensor, "image filter h w"] | None
    """Gradient of the images' summed loss, for observers that need it."""


DeferredUpdate = Callable[[Regions], None]
"""The rest of an update, which runs once the concept masks are known."""


@runtime_checkable
class Observer(Protocol):
    """Anything that accumulates over the feature maps of the calibration set."""

    @property
    def needs(self) -> frozenset[Need]:
        """What `update` needs; if it needs nothing it is never called."""

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew, before the first image; `taps` holds the weights around each tap."""

    def update(self, features: FeatureBatch) -> DeferredUpdate | None:
        """Add one tap's features of one batch; return the part that needs the concepts, if any."""

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images, always in the same order: processes add them in place."""


@runtime_checkable
class Criterion(Observer, Protocol):
    """An observer that scores filters."""

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the scores of a tap's filters, in float64; the higher stay."""


PARTS = ("needs", "reset", "update", "state", "compute")
"""Attributes of a criterion."""
CriterionLike = str | Criterion | Callable[..., Any]
"""A criterion's name, a criterion, a class or function that makes one, or a function of a layer's
kernels `[filter, value]`, see `kernels.KernelFunction`."""


def from_python(criterion: CriterionLike) -> tuple[str, Criterion | None]:
    """Return the name of a criterion, and the criterion itself if it was passed and not named.

    Raises `UnknownName` or `UsageError` if it is none.
    """
    from secateur.scoring.criteria.kernels import KernelFunction, checked

    if isinstance(criterion, str):
        check_name(criterion)
        return criterion, None
    name = getattr(criterion, "__name__", type(criterion).__name__)
    if callable(criterion) and _needs_no_arguments(criterion):
        criterion = criterion()
    if isinstance(criterion, Criterion) and not isinstance(criterion, type):
        return f"{zoo.IN_MEMORY}:{name}", criterion
    if not callable(criterion) or isinstance(criterion, type):
        missing = [part for part in PARTS if not hasattr(criterion, part)]
        raise UsageError(
            f"criterion: {name} is not one: it lacks {', '.join(missing)}; pass a name, such as "
            "'vote' or 'l1', a Criterion, or a function of a layer's kernels [filter, value] that "
            "returns one score a filter: lambda kernels: kernels.abs().sum(1)"
        )
    return f"{zoo.IN_MEMORY}:{name}", KernelFunction(checked(criterion, name))


def _needs_no_arguments(function: Callable[..., Any]) -> bool:
    """Return whether a class or function can be called without arguments: it makes a criterion."""
    if isinstance(function, Criterion) and not isinstance(function, type):
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return False
    return all(
        parameter.default is not parameter.empty
        or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in parameters
    )


def check_name(name: str) -> None:
    """Raise `UnknownName` or `UsageError` if there is no such criterion."""
    if name.startswith(f"{zoo.IN_MEMORY}:"):
        raise UsageError(f"{name}: the criterion was passed from Python: pass it again")
    if user_code.is_user_code(name):
        user_code.check_file(name, "criterion")
    elif name not in CRITERIA:
        raise UnknownName("criterion", name, CRITERIA)


def make(
    name: str,
    settings: ScoreSection,
    seed: int,
    weights: Mapping[int, float],
    memory_bytes: float = math.inf,
) -> Criterion:
    """Return the named criterion, or the one from `factory()` for `path/to/file.py:factory`.

    `settings` are those of the vote, `weights` what a vote for a concept counts, by its index, and
    `seed` is the seed of `random`; for `memory_bytes` see `Reconstruction`. Raises `UnknownName` or
    `UsageError`.
    """
    from secateur.scoring.criteria import kernels
    from secateur.scoring.criteria.dependence import ChannelIndependence
    from secateur.scoring.criteria.gradients import Taylor
    from secateur.scoring.criteria.reconstruction import Reconstruction
    from secateur.scoring.criteria.statistics import (
        ActivationEntropy,
        ActivationMean,
        ActivationStd,
        Apoz,
        MapRank,
    )
    from secateur.scoring.criteria.votes import OverlapVotes, ResponseVotes, VoteSettings

    vote = VoteSettings(settings.vote_mode, settings.voting_unit, settings.top_fraction, weights)
    table: dict[str, Callable[[], Criterion]] = {
        "vote": lambda: Reconstruction(vote, memory_bytes),
        "vote-response": lambda: ResponseVotes(vote),
        "vote-iou": lambda: OverlapVotes(replace(vote, vote_mode="top", voting_unit="regions")),
        "random": lambda: kernels.Random(seed),
        "l1": lambda: kernels.KernelFunction(kernels.l1),
        "l2": lambda: kernels.KernelFunction(kernels.l2),
        "fpgm": lambda: kernels.KernelFunction(kernels.distance_to_others),
        "bn_scale": kernels.NormScale,
        "apoz": Apoz,
        "activation_mean": ActivationMean,
        "activation_std": ActivationStd,
        "activation_entropy": ActivationEntropy,
        "hrank": MapRank,
        "chip": ChannelIndependence,
        "reconstruction": lambda: Reconstruction(memory_bytes=memory_bytes),
        "taylor": Taylor,
    }
    assert tuple(table) == CRITERIA
    if name in table:
        return table[name]()
    if not user_code.is_user_code(name):
        raise UnknownName("criterion", name, CRITERIA)
    criterion = user_code.call(name, user_code.find(name, "criterion"))
    if not isinstance(criterion, Criterion):
        raise UsageError(
            f"{name} returned {type(criterion).__name__}, which is not a criterion: it needs "
            f"{', '.join(PARTS[:-1])} and {PARTS[-1]}"
        )
    return criterion


def make_criterion(name: str, source: ConceptSource, config: RunConfig) -> Criterion:
    """Return the named criterion, which weighs the votes of concepts as the configuration says.

    Raises `UnknownName` where a weight is given for a concept that the source does not have.
    """
    weight_of = config.score.concept_weights
    weights = {
        number: weight_of.get(concept.name, weight_of.get(concept.category, 1.0))
        for number, concept in enumerate(source.concepts)
        if concept.name in weight_of or concept.category in weight_of
    }
    criterion = make(name, config.score, config.seed, weights, config.refit.memory_bytes)
    known = {name for concept in source.concepts for name in (concept.name, concept.category)}
    for concept_name in weight_of:
        if concept_name not in known:
            raise UnknownName("concept", concept_name, known)
    return criterion
