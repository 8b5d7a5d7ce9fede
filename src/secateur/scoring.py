"""Filter scores: every asked-for criterion from one pass over the probe set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from secateur.activations import kernels_of, observe
from secateur.concepts import ConceptSource
from secateur.criteria import Criterion, Observer
from secateur.data import Batch
from secateur.graph import tensors_of
from secateur.wiring import Wiring


@dataclass(frozen=True, eq=False)
class FilterScores:
    """One score a filter, by group; the higher, the more the filter deserves to stay."""

    criterion: str
    scores: dict[str, Float[Tensor, "filter"]]


def score_filters(
    model: nn.Module,
    wiring: Wiring,
    batches: Callable[[], Iterable[Batch]],
    criteria: Mapping[str, Criterion],
    source: ConceptSource,
    *,
    quantile: float,
    use_labels: bool,
    observers: tuple[Observer, ...] = (),
) -> dict[str, FilterScores]:
    """The scores by each criterion; the arguments are those of `activations.observe`.

    `observers` look on in the same pass.
    """
    watching = [*criteria.values(), *observers]
    observe(model, wiring, batches, watching, source, quantile=quantile, use_labels=use_labels)
    state = tensors_of(model)
    kernels = {name: kernels_of(wiring, group, state) for name, group in wiring.groups.items()}
    return {
        name: FilterScores(
            name, {group: criterion.score(group, kernels[group]) for group in wiring.groups}
        )
        for name, criterion in criteria.items()
    }
