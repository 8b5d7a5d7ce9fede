"""Use secateur's criteria as the importance of a Torch-Pruning pruner.

::

    importance = CriterionImportance(model, example, "vote-response", loader)
    pruner = torch_pruning.pruner.MagnitudePruner(model, example, importance=importance, …)

The pruner calls the importance with each of its groups and removes the channels that score lowest.
Plan and removal are Torch-Pruning's; nothing else of secateur takes part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.module_state import tensors_of
from secateur.models.examine import examine_outputs, make_task
from secateur.models.task import Task
from secateur.runtime.errors import UsageError
from secateur.scoring import concepts, criteria
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.criteria import Criterion
from secateur.scoring.scores import score_filters

Labelled = tuple[Tensor, Tensor]
"""Images `[image, rgb, height, width]` and their classes `[image]`."""


class CriterionImportance:
    """Scores Torch-Pruning's groups by one of secateur's criteria; see `__call__`.

    `skipped` maps layers whose groups got no score to the reason; it fills as the pruner runs.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Float[Tensor, "example rgb height width"],
        criterion: str | ScoreSection,
        batches: Iterable[Labelled] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Take the same `model` object as the pruner, and at least two images as `example`.

        `criterion` is a name (`secateur models` lists them) or the whole `score` section of a
        configuration. `batches`, such as a `DataLoader` or a list, are the images of criteria that
        need some; they are iterated more than once. Raises `UnknownName`, and `UsageError` if
        Torch-Pruning or the batches are missing.
        """
        try:
            import torch_pruning
        except ImportError as error:
            raise UsageError(
                "CriterionImportance needs Torch-Pruning: pip install torch-pruning"
            ) from error
        self._producers = (
            torch_pruning.prune_conv_out_channels,
            torch_pruning.prune_depthwise_conv_out_channels,
            torch_pruning.prune_linear_out_channels,
        )
        self._settings = (
            ScoreSection(criterion=criterion) if isinstance(criterion, str) else criterion
        )
        if self._make_criterion(seed).needs and batches is None:
            raise UsageError(
                f"the criterion {self._settings.criterion!r} needs images: pass batches"
            )
        self._model = model
        self._example = example
        self._batches = batches
        self._seed = seed
        self._shapes: tuple[torch.Size, ...] = ()
        self._scores: dict[str, Tensor] = {}
        self._reasons: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def __call__(self, group: Any) -> Float[Tensor, "filter"] | None:
        """Return a score for each filter of the group's first layer; the pruner keeps high ones.

        If several layers that produce the group have scores, it is their mean. The network is
        scored at the first call, and again whenever it has been cut since, so iterative pruning
        works. Returns None, which makes the pruner leave the group whole, if secateur has no
        scores for it because it can't cut the group itself.
        """
        self._score()
        names = {module: name for name, module in self._model.named_modules()}
        layers = [
            (names[dep.target.module], item_indices, group[number].root_idxs)
            for number, (dep, item_indices) in enumerate(group)
            if dep.handler in self._producers and dep.target.module in names
        ]
        total = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        count = torch.zeros_like(total)
        for name, indices, root_indices in layers:
            scores = self._scores.get(name)
            if scores is not None and None not in root_indices:
                root = torch.tensor(root_indices)
                total.index_add_(0, root, scores[torch.tensor(indices)])
                count.index_add_(0, root, torch.ones(len(root), dtype=torch.float64))
        if bool((count == 0).any()):
            for name, _, _ in layers:
                self.skipped[name] = self._reasons.get(name, "tied to channels that can't be cut")
            return None
        return total / count

    def _score(self) -> None:
        """Score every filter, unless the network has not been cut since the last time."""
        shapes = tuple(parameter.shape for parameter in self._model.parameters())
        if shapes == self._shapes:
            return
        self._shapes = shapes
        dependencies = build_dependency_graph(self._model, self._example, prune_residual=True)
        criterion = self._make_criterion(self._seed)
        labels = [batch.labels for batch in itertools.islice(self._labelled_batches(), 1)]
        task = make_task(examine_outputs(self._model, self._example), labels)
        name, settings = self._settings.criterion, self._settings
        with torch.enable_grad():  # the pruner switches it off, and some criteria need it
            scores = score_filters(
                self._model,
                dependencies,
                self._labelled_batches,
                {name: criterion},
                self._source(dependencies, task) if "concepts" in criterion.needs else None,
                settings,
                task=task,
            )[name].scores
        self._scores, self._reasons = {}, {}
        for group in dependencies.groups.values():
            position = dependencies.index_table(group.channels)
            for layer in group.layers:
                assert layer.produced is not None
                positions = position[layer.produced]  # [filter]
                if (positions >= 0).all():
                    self._scores[layer.name] = scores[group.name].cpu().double()[positions]
                else:
                    self._reasons[layer.name] = "only some of its filters can be cut"
        self._reasons |= {frozen.name: frozen.reason for frozen in dependencies.frozen}

    def _make_criterion(self, seed: int) -> Criterion:
        settings = self._settings
        return criteria.make(settings.criterion, settings, seed, {})

    def _source(self, dependencies: DependencyGraph, task: Task) -> ConceptSource:
        class_names = tuple(map(str, range(task.concept_count(dependencies.graph.output))))
        height, width = self._example.shape[-2:]
        return concepts.make(
            self._settings.concepts,
            dependencies.graph,
            tensors_of(self._model),
            class_names,
            Preprocessing((height, width), min(height, width)),
            task,
        )

    def _labelled_batches(self) -> Iterator[Batch]:
        start = 0
        for images, labels in self._batches or ():
            yield Batch(images, labels, torch.arange(start, start + len(images)))
            start += len(images)
