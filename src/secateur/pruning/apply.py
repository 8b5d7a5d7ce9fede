"""Check a pruning plan against a network, and cut a copy of the network."""

from __future__ import annotations

from torch import nn

from secateur.graph.cut import cut
from secateur.graph.dependency import DependencyGraph
from secateur.graph.factorisation import matrix_of, replace_by_factors
from secateur.graph.residual_branches import (
    ResidualBranch,
    drop_branches,
    residual_branches,
)
from secateur.graph.wrappers import unwrapped
from secateur.integrations.widths import refuse_save_pretrained, update_widths
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import RunFolderError


def apply_plan(model: nn.Module, dependencies: DependencyGraph, plan: PruningPlan) -> nn.Module:
    """Return a copy of `model` without the plan's filters and everything that depends on them.

    Convolutions with a rank in the plan are two each (`graph.factorisation`), and residual branches
    that it drops are constants (`graph.residual_branches`), without the hooks that they had.
    The copy has the mode, hooks, dtype, memory format and `requires_grad` of `model`, which is not
    changed; its modules state the widths that they have now (`integrations.widths`). Of a network
    that is compiled or wrapped in `DataParallel` the network itself is copied and returned. Raises
    `RunFolderError` if the plan was made for another network, or names a group, filter, convolution
    or branch that the network lacks.
    """
    check_plan(dependencies, plan)
    model = unwrapped(model)
    branches = dropped_branches(model, dependencies, plan)
    smaller = cut(model, dependencies, plan.removed)
    update_widths(model, smaller, dependencies, plan.removed)
    _check_ranks(smaller, plan)
    replace_by_factors(smaller, plan.ranks)
    drop_branches(smaller, dependencies, plan.removed, branches)
    if plan.ranks or branches:
        refuse_save_pretrained(smaller)
    return smaller


def dropped_branches(
    model: nn.Module, dependencies: DependencyGraph, plan: PruningPlan
) -> list[ResidualBranch]:
    """Return the residual branches that a plan drops, in the order of execution.

    Raises `RunFolderError` if it drops one that the network lacks.
    """
    branches = residual_branches(model, dependencies) if plan.dropped else {}
    for name in plan.dropped:
        if name not in branches:
            raise RunFolderError(
                f"the plan drops {name!r}, which is not a residual branch that can be dropped"
            )
    return [branch for name, branch in branches.items() if name in plan.dropped]


def check_plan(dependencies: DependencyGraph, plan: PruningPlan) -> None:
    """Raise `RunFolderError` if the plan does not fit the network, or empties a layer."""
    if plan.architecture not in (None, dependencies.architecture):
        raise RunFolderError(
            "the plan was made for another network: the layers of this one have other names or "
            "other sizes"
        )
    for name, filters in plan.removed.items():
        if name not in dependencies.groups:
            raise RunFolderError(f"the plan cuts {name!r}, which is not a prunable group")
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
        name = next(n for n, group in dependencies.groups.items() if emptied[0] in group.channels)
        raise RunFolderError(f"the plan removes all channels of a part of {name!r}")


def _check_ranks(smaller: nn.Module, plan: PruningPlan) -> None:
    """Raise `RunFolderError` if the plan has a rank for what is no convolution of the network."""
    modules = dict(smaller.named_modules())
    for name, rank in plan.ranks.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d) or module.groups != 1:
            raise RunFolderError(f"the plan splits {name!r}, which is not a convolution to split")
        most = min(matrix_of(module.weight.detach()).shape)
        if not isinstance(rank, int) or not 1 <= rank <= most:
            raise RunFolderError(
                f"the plan gives {name!r} the rank {rank}, not one from 1 to {most}"
            )
