"""Sections of a configuration on training: distillation, fine-tuning, base networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from secateur.config.section import Section

Precision = Literal["auto", "float32", "bfloat16"]
TrainingPrecision = Literal["auto", "float32", "bfloat16", "float16"]
Optimiser = Literal["sgd", "adamw"]
Crop = Literal["random_crop", "random_resized_crop", "none"]
ScheduleName = Literal["cosine", "one_cycle", "step"]


class DistillSection(Section):
    """Distillation from the original network on the calibration images, without labels."""

    epochs: int = Field(default=0, ge=0)
    """Epochs of distillation on the calibration images, without labels; 0 skips this stage."""
    batch_size: int = Field(default=100, ge=2)
    """Images per step."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate of the cosine schedule, with AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of every parameter."""
    warmup_steps: int = Field(default=16, ge=0)
    """Steps over which the learning rate rises."""
    flip: bool = True
    """Mirror half of the images at random; turn it off for digits and letters."""
    mixup: float = Field(default=1.0, ge=0)
    """Parameter of mixup's Beta distribution, for classifiers of images with a class each; 0 turns
    mixup off."""
    temperature: float = Field(default=3.0, gt=0)
    """Temperature that softens the outputs of both networks."""
    feature_weight: float = Field(default=3.0, ge=0)
    """Weight of the feature maps at residual sums in the loss: their relative squared error, in the
    remaining channels. Networks without residual sums have no such part."""
    precision: Precision = "auto"
    """Precision; `auto` uses bfloat16 if the CPU has instructions for it."""


class TrainingSection(Section):
    """Training: of a base network, or fine-tuning after pruning."""

    epochs: int = Field(default=5, ge=0)
    """Epochs of training; 0 skips it."""
    batch_size: int = Field(default=128, ge=2)
    """Images per step, over all processes together."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Parts into which each process splits its batch to save memory."""
    optimiser: Optimiser = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    learning_rate: float = Field(default=0.02, gt=0)
    """Peak learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov momentum of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty on every parameter; decoupled from the gradient with AdamW."""
    schedule: ScheduleName = "cosine"
    """Learning-rate schedule: `cosine` falls to zero; `one_cycle` first rises for 30 % of the
    steps; `step` falls at `step_at`."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises; `one_cycle` has its own rise."""
    step_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    """Fractions of the training at which `step` multiplies the learning rate by `step_factor`."""
    step_factor: float = Field(default=0.1, gt=0, lt=1)
    """Factor of the `step` schedule."""
    crop: Crop | None = None
    """Crop augmentation: `random_crop` shifts images by up to an eighth of their side;
    `random_resized_crop` takes a random part of the stored image and resizes it; `none` leaves
    images as they are. By default `random_crop` for tensors and for images of up to 64 pixels a
    side, `random_resized_crop` for larger image files, and `none` for images that are trained on
    with numbers, pictures or objects as labels."""
    flip: bool | None = None
    """Mirror half of the training images at random; by default all but those that are trained on
    with numbers, pictures or objects as labels. Turn it off for digits and letters."""
    randaugment: bool = False
    """Apply RandAugment."""
    mixup: float = Field(default=0.0, ge=0)
    """Parameter of mixup's Beta distribution; 0 turns mixup off."""
    cutmix: float = Field(default=0.0, ge=0)
    """Parameter of CutMix's Beta distribution; 0 turns CutMix off. With mixup too, each step uses
    one of the two."""
    loss: str = "auto"
    """Loss with the labels: `auto` (cross-entropy, or the squared error of values), or
    path/to/file.py:function, which returns a number for the network's output and a batch's
    labels."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing: fraction of the label spread over all classes."""
    label_weight: float = Field(default=0.3, ge=0, le=1)
    """Weight of the labels in the loss; the rest is distillation from the original network. 0
    trains without labels."""
    temperature: float = Field(default=3.0, gt=0)
    """Temperature that softens the outputs of both networks."""
    feature_weight: float = Field(default=0.0, ge=0)
    """Weight of feature distillation in the loss: relative squared error of the feature maps at
    residual sums, in the remaining channels."""
    freeze_batchnorm: bool = False
    """Train in evaluation mode: batch norms keep their statistics and dropout is off."""
    sync_batchnorm: bool = True
    """Batch norms use the statistics of the batch over all processes."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the exponential moving average (EMA) of the weights; 0 turns EMA off."""
    keep: Literal["last", "best"] = "last"
    """Weights to keep: those of the last epoch, or of the best epoch on the validation images (the
    weights before training if no epoch was better)."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better result on the validation images."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop after this many minutes of training, resumptions included."""
    precision: TrainingPrecision = "auto"
    """Precision; `auto` uses bfloat16 if the hardware has instructions for it; `float16`, with loss
    scaling, needs an accelerator."""
    compile: bool = False
    """Compile the network for training with `torch.compile`; everything else that this process has
    compiled is recompiled on its next use."""
    workers: int | None = Field(default=None, ge=0)
    """Data-loading processes; by default 0 for images in memory and up to 4 for image files."""
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    """Minutes between two checkpoints within an epoch; every epoch ends with a checkpoint."""

    @model_validator(mode="after")
    def _check_compile(self) -> TrainingSection:
        if self.compile and self.feature_weight:
            raise ValueError("compile and feature_weight exclude each other")
        return self


class BaseTrainingSection(TrainingSection):
    """Training of a base network, without a teacher."""

    epochs: int = Field(default=100, ge=1)
    """Epochs of training."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Peak learning rate."""
    label_weight: Literal[1] = 1
    """All weight is on the labels."""
