"""Estimate the constants in the place of dropped residual branches.

A constant is what the sum behind the branch lacks in the mean over images and positions, for each
channel. If only a ReLU reads the sum, it is what the output of the ReLU lacks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.interpreter import apply, value_of
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.network_graph import operation_name
from secateur.graph.residual_branches import ResidualBranch
from secateur.pruning.refit.activation_cache import ActivationCache
from secateur.pruning.refit.regression_targets import State
from secateur.runtime import distributed
from secateur.runtime.device import sums_device

SMALLEST_SCALE = 1e-3
"""Where the network scales a constant by less, it stays 0."""


class ConstantEstimator:
    """Estimates constants in the order of execution, and writes them into the state."""

    def __init__(self, kept: KeptChannels, state: State, cache: ActivationCache) -> None:
        self._kept, self._state, self._cache = kept, state, cache
        self._nodes = kept.dependencies.graph.nodes
        self._left = sorted(kept.dropped, key=lambda branch: self._nodes.index(branch.sum))

    def estimate_before(self, node: Node | None) -> None:
        """Estimate the constants of sums before an operation, by default of all that are left.

        The cached batches then stand behind the branch. Of branches that follow one another with
        nothing between them, only the last one gets a constant.
        """
        until = len(self._nodes) if node is None else self._nodes.index(node)
        while self._left and self._nodes.index(self._left[0].sum) < until:
            branch = self._left.pop(0)
            behind = {branch.sum, *branch.sum.users}
            if not any(other.shortcut in behind for other in self._left):
                self._estimate(branch)

    def _estimate(self, branch: ResidualBranch) -> None:
        missing = self._missing_mean(branch)
        if missing is not None:
            old = self._state[branch.constant]
            scale = self._scale_behind(branch).to(missing)
            is_scaled = scale.abs() > SMALLEST_SCALE
            value = torch.where(is_scaled, missing / scale.where(is_scaled, 1.0), 0.0)
            self._state[branch.constant] = value.to(old)

    def _missing_mean(self, branch: ResidualBranch) -> Float[Tensor, "channel"] | None:
        """Return what the sum lacks in the mean; None if there are no positions."""
        axes = self._kept.dependencies.axes[branch.sum]
        (dim,) = (dim for dim, ids in enumerate(axes) if ids is not None)
        is_rectified = [operation_name(user) for user in branch.sum.users] == ["relu"]
        constant = self._state[branch.constant]
        total = torch.zeros(
            len(constant) + 1, dtype=torch.float64, device=sums_device(constant.device)
        )
        for batch in self._cache:
            images = len(batch.indices)
            batch.full.advance(branch.sum)
            batch.cut.advance(branch.sum)
            wanted = batch.full.copy().step(branch.sum)
            wanted = self._kept.select(branch.sum, wanted)[:images]
            wanted = wanted.relu() if is_rectified else wanted
            lacks = wanted - batch.cut.value(branch.shortcut)[:images]
            rows = lacks.to(total.device).movedim(dim, 0).flatten(1).double()
            total += torch.cat([rows.sum(1), rows.new_tensor([rows.shape[1]])])
        distributed.all_reduce_sum([total])
        return total[:-1] / total[-1] if total[-1] else None

    def _scale_behind(self, branch: ResidualBranch) -> Float[Tensor, "channel"]:
        """Return what the network multiplies a constant by before it is added."""
        graph = self._kept.dependencies.graph
        constant = self._state[branch.constant]
        values = {branch.end: branch.value({branch.constant: torch.ones_like(constant)})}
        for node in branch.behind:
            values[node] = apply(
                node,
                lambda source: (
                    values[source] if source in values else value_of(graph, source, self._state)
                ),
                self._kept.sizes.get(node, {}),
            )
        last = branch.behind[-1] if branch.behind else branch.end
        return values[last].flatten()
