"""Trains a pruned network on its probe images to answer as the original does, without labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from secateur.agreement import Agreement, agreement_of, answers_of
from secateur.config import FinetuneSection, PolishSection
from secateur.data import Batch, Images
from secateur.finetune import Epoch, finetune
from secateur.models import Preprocessing
from secateur.progress import Track, silent


@dataclass(frozen=True)
class PolishEpoch:
    """One pass over the probe images that are not held out; answers are softened as in training."""

    epoch: Epoch
    held_out: Agreement
    """With the original network, on the held-out probe images, after the pass."""


@dataclass(frozen=True)
class Polish:
    """What polishing did, on held-out probe images, whose answers are softened as in training."""

    before: Agreement
    """With the original network, before the first epoch."""
    epochs: tuple[PolishEpoch, ...]
    chosen: int
    """The epoch whose weights stayed; 0 where none diverged less than the network as it came."""


def polish(
    model: nn.Module,
    smaller: nn.Module,
    fit: Images,
    held_out: Callable[[], Iterable[Batch]],
    preprocessing: Preprocessing,
    settings: PolishSection,
    *,
    seed: int,
    track: Track = silent,
) -> Polish:
    """Trains `smaller` in place on the images of `fit`; how near it came to `model`.

    The weights of the epoch that diverges least from the original on `held_out` stay, or those
    that were there before: the divergence never grows. It is that of answers softened as in
    training: what is trained is what is chosen by. Norms and all else are as in evaluation mode
    while it trains. Raises `SecateurError` where the loss stops being a number.
    """
    expected = answers_of(model, held_out())
    temperature = settings.temperature
    before = best = agreement_of(expected, smaller, held_out(), temperature)
    chosen, state = 0, copy.deepcopy(smaller.state_dict())
    epochs: list[PolishEpoch] = []

    def after_epoch(epoch: Epoch) -> None:
        nonlocal best, chosen, state
        found = agreement_of(expected, smaller, held_out(), temperature)
        epochs.append(PolishEpoch(epoch, found))
        if found.divergence < best.divergence:
            best, chosen, state = found, epoch.number, copy.deepcopy(smaller.state_dict())

    finetune(
        smaller,
        model,
        fit,
        preprocessing,
        training(settings),
        seed=seed,
        track=track,
        after_epoch=after_epoch,
    )
    smaller.load_state_dict(state)
    return Polish(before, tuple(epochs), chosen)


def training(settings: PolishSection) -> FinetuneSection:
    """Polishing as training: by AdamW, with no weight on labels and norms as they are."""
    return FinetuneSection(
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
        mode="evaluation",
    )
