"""Results of training and distillation, as a run folder keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.models.score import OutputDivergence

KEYS_WITHOUT_EFFECT = frozenset({"checkpoint_minutes", "workers"})
"""Keys of `TrainingSection` that change no result."""
KEYS_FREE_ON_RESUME = KEYS_WITHOUT_EFFECT | {"max_minutes", "keep", "patience"}
"""Keys of `TrainingSection` that may change when a training is resumed: its steps stay the same."""

COLLAPSE = 0.1
"""Loss of top-1 fraction on the validation images from which training counts as broken. Smaller
losses are common if the original network was trained on these images: it forgets them while it
improves on the test images."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images."""

    number: int
    """From 1."""
    loss: float
    """Mean training loss in nats."""
    learning_rate: float
    """At the end of the epoch."""
    validation: float | None = None
    """What `validate` returned after it: in a run, top-1 fraction on the validation images."""


def has_collapsed(before: float, epochs: Sequence[Epoch]) -> bool:
    """Return whether training has left a network far worse than it was `before`."""
    last = epochs[-1].validation if epochs else None
    return last is not None and last < before - COLLAPSE


@dataclass(frozen=True)
class DistillEpoch:
    """One pass over the calibration images that are not held out."""

    epoch: Epoch
    held_out: OutputDivergence
    """From the original network on the held-out calibration images, after the pass; outputs are
    softened as in training."""


@dataclass(frozen=True)
class Distillation:
    """The result of distillation: divergences from the original network on held-out calibration
    images, of outputs softened as in training.
    """

    before: OutputDivergence
    """Before the first epoch."""
    epochs: tuple[DistillEpoch, ...]
    chosen: int
    """The epoch whose weights were kept; 0 for the network before the first one."""
