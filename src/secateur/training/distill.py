"""Trains a pruned network on its calibration images to answer as the original does, without
labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from secateur.config import DistillSection, TrainingSection
from secateur.data import Batch, Images, Unreadable
from secateur.data.preprocessing import Preprocessing
from secateur.evaluation.divergence import OutputDivergence, divergence_from, logits_of
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.training.trainer import Epoch, train


@dataclass(frozen=True)
class DistillEpoch:
    """One pass over the calibration images that are not held out; answers are softened as in
    training."""

    epoch: Epoch
    held_out: OutputDivergence
    """With the original network, on the held-out calibration images, after the pass."""


@dataclass(frozen=True)
class Distillation:
    """What polishing did, on held-out calibration images, whose answers are softened as in
    training."""

    before: OutputDivergence
    """With the original network, before the first epoch."""
    epochs: tuple[DistillEpoch, ...]
    chosen: int
    """The epoch whose weights stayed; 0 where none diverged less than the network as it came."""


def distill(
    model: nn.Module,
    smaller: nn.Module,
    fit: Images,
    held_out: Callable[[], Iterable[Batch]],
    preprocessing: Preprocessing,
    settings: DistillSection,
    *,
    seed: int,
    progress: ProgressCallback = no_progress,
    unreadable: Unreadable | None = None,
) -> Distillation:
    """Trains `smaller` in place on the images of `fit`; how near it came to `model`.

    The weights of the epoch that diverges least from the original on `held_out` stay, or those
    that were there before: the divergence never grows. It is that of answers softened as in
    training: what is trained is what is chosen by. Norms and all else are as in evaluation mode
    while it trains. Raises `SecateurError` where the loss stops being a number.
    """
    expected = logits_of(model, held_out())
    found: list[OutputDivergence] = []

    def validate(network: nn.Module) -> float:
        found.append(divergence_from(expected, network, held_out(), settings.temperature))
        return -found[-1].divergence

    training = train(
        smaller,
        model,
        fit,
        preprocessing,
        as_training(settings),
        seed=seed,
        progress=progress,
        validate=validate,
        unreadable=unreadable,
    )
    epochs = zip(training.epochs, found[1:], strict=True)
    return Distillation(
        found[0], tuple(DistillEpoch(*pair) for pair in epochs), training.best_epoch
    )


def as_training(settings: DistillSection) -> TrainingSection:
    """Polishing as training: by AdamW, with no weight on labels and norms as they are."""
    return TrainingSection(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        flip=settings.flip,
        temperature=settings.temperature,
        precision=settings.precision,
        label_weight=0.0,
        optimiser="adamw",
        freeze_batchnorm=True,
        keep="best",
    )
