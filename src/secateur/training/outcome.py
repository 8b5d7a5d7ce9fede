"""Results of training and distillation, as a run folder keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.evaluation.score import OutputDivergence

KEYS_WITHOUT_EFFECT = frozenset({"checkpoint_minutes", "workers"})
"""Keys of `TrainingSection` that change no result."""
KEYS_FREE_ON_RESUME = KEYS_WITHOUT_EFFECT | {"max_minutes", "keep", "patience"}
"""Keys of `TrainingSection` that may change when a training is resumed: its steps stay the same."""


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
    """The epoch whose weights were kept; 0 if none diverged less than the network before it."""
