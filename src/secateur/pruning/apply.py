"""Apply a pruning plan to a network."""

from __future__ import annotations

from torch import nn

from secateur.errors import RunFolderError
from secateur.graph.cut import cut
from secateur.graph.dependency import DependencyGraph
from secateur.pruning.plan import PruningPlan
from secateur.runtime.hashing import architecture_hash


def apply_plan(model: nn.Module, dependencies: DependencyGraph, plan: PruningPlan) -> nn.Module:
    """A copy of `model` without the filters that the plan removes, wherever they reach.

    Mode, hooks, dtype, memory format and `requires_grad` are those of `model`, which is not
    changed; of a compiled network it is the original that is copied. Raises `RunFolderError` where
    the plan was made for another network, or names a group or filter that `dependencies` lacks.
    """
    check_plan(dependencies, plan)
    return cut(model, dependencies, plan.removed)


def check_plan(dependencies: DependencyGraph, plan: PruningPlan) -> None:
    """Raises `RunFolderError` where the plan does not fit the network, or empties a layer."""
    if plan.architecture not in (None, architecture_hash(dependencies.shapes)):
        raise RunFolderError(
            "the plan was made for another network: the layers of this one have other names or "
            "other sizes"
        )
    for name, filters in plan.removed.items():
        if name not in dependencies.groups:
            raise RunFolderError(f"the plan cuts {name!r}, which the network can't lose filters of")
        size = len(dependencies.groups[name])
        if not all(isinstance(f, int) and 0 <= f < size for f in filters):
            raise RunFolderError(
                f"the plan cuts filters that {name!r} does not have (0 to {size - 1})"
            )
        if len(set(filters)) != len(filters) or len(filters) >= size:
            raise RunFolderError(f"the plan cuts all {size} filters of {name!r}, or some twice")
    kept = dependencies.kept_channels(plan.removed)
    emptied = next((cover for cover in dependencies.covers if not kept[cover].any()), None)
    if emptied is not None:
        owner = next(n for n, group in dependencies.groups.items() if emptied[0] in group.channels)
        raise RunFolderError(f"the plan leaves nothing of a part of {owner!r} that is read alone")
