"""Train a pruned network, without labels, towards the original network's outputs on calibration
images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from secateur.config import DistillSection, TrainingSection
from secateur.data import Batch
from secateur.models.divergence import divergence_from, outputs_of
from secateur.models.score import OutputDivergence
from secateur.models.state_dict import load_state
from secateur.models.task import Logits, Task
from secateur.training.feature_distillation import ResidualSum
from secateur.training.outcome import Distillation, DistillEpoch
from secateur.training.trainer import TrainingCallbacks, train
from secateur.training.training_data import TrainingData

GROWTH = 0.1
"""By how much of it the held-out divergence may grow. Networks trained on mixed images are less
sure of their outputs: at the same divergence they predict the original's classes more often."""


def distill(
    model: nn.Module,
    smaller: nn.Module,
    data: TrainingData,
    held_out: Callable[[], Iterable[Batch]],
    settings: DistillSection,
    *,
    seed: int,
    sums: tuple[ResidualSum, ...] = (),
    callbacks: TrainingCallbacks | None = None,
) -> Distillation:
    """Train `smaller` in place towards the outputs of `model`, and return the divergences.

    With `settings.feature_weight` also towards its feature maps at the residual `sums`, if any.

    The last epoch's weights are kept, unless the divergence on `held_out` has grown by more than
    `GROWTH`: then those with the smallest one, which may be those before the first epoch. It is
    computed from outputs softened as in training. Batch norm stays in evaluation mode. Raises
    `SecateurError` if the loss is no longer finite.
    """
    validation = _Validation(
        outputs_of(model, held_out(), data.task), held_out, settings.temperature, data.task
    )
    training = train(
        smaller,
        model,
        data,
        as_training(settings, data.task, has_features=bool(sums)),
        seed=seed,
        sums=sums,
        callbacks=replace(callbacks or TrainingCallbacks(), validate=validation),
    )
    before, *after = validation.divergences
    chosen = len(after)
    if after and after[-1].divergence > (1 + GROWTH) * before.divergence:
        chosen = training.best_epoch
        load_state(smaller, training.best)
    epochs = zip(training.epochs, after, strict=True)
    return Distillation(before, tuple(DistillEpoch(*pair) for pair in epochs), chosen)


@dataclass(frozen=True, eq=False)
class _Validation:
    """Measures how close a network is to the `expected` logits, and keeps the divergences."""

    expected: Sequence[Logits]
    held_out: Callable[[], Iterable[Batch]]
    temperature: float
    task: Task
    divergences: list[OutputDivergence] = field(default_factory=list)

    def __call__(self, network: nn.Module) -> float:
        """Return the negative divergence: higher is better."""
        divergence = divergence_from(
            self.expected, network, self.held_out(), self.temperature, self.task
        )
        self.divergences.append(divergence)
        return -divergence.divergence


def as_training(
    settings: DistillSection, task: Task, *, has_features: bool = False
) -> TrainingSection:
    """Return the training that distillation is: AdamW, no labels, frozen batch norm."""
    has_one_class = task.kind in ("single-label", "binary")
    return TrainingSection(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        flip=settings.flip,
        mixup=settings.mixup if has_one_class else 0.0,
        temperature=settings.temperature,
        feature_weight=settings.feature_weight if has_features else 0.0,
        precision=settings.precision,
        label_weight=0.0,
        optimiser="adamw",
        freeze_batchnorm=True,
    )
