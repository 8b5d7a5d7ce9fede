"""A network that has been pruned so far, and all that the next step needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from secateur.graph.dependency import DependencyGraph
from secateur.models.evaluate import Predictions
from secateur.pipeline.result import RunResult
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.pruning.plan import PruningPlan


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller network and what is known of it."""

    model: nn.Module
    plan: PruningPlan
    """The filters removed from the original network, over all rounds."""
    result: RunResult
    latency: LatencyTable | None
    """Times of the layers before the cut, if the budget is one of latency."""
    dependencies: DependencyGraph
    """Of the network before the first cut."""
    predictions: Predictions | None = None
    """What the network before the first cut predicts of the test images; None until it is known:
    the next step needs it."""

    @property
    def round(self) -> int:
        """How often the network has been cut."""
        return self.result.stages[-1].round

    @property
    def is_finetuned(self) -> bool:
        """Whether it has been fine-tuned since the last cut, or is not to be."""
        return (
            self.result.config.finetune.epochs == 0 or self.result.stages[-1].stage == "finetuned"
        )

    @property
    def is_finished(self) -> bool:
        """Whether no step remains."""
        return self.is_finetuned and self.round == self.result.config.plan.rounds
