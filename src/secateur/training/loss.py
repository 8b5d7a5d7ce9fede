"""The loss of training: labels, mixed images, and distillation from another network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms import v2

from secateur.config import TrainingSection
from secateur.data.objects import Objects
from secateur.graph.module_state import evaluating
from secateur.models.task import (
    SINGLE_LABEL,
    Reading,
    Task,
    check_labels,
)
from secateur.runtime.errors import UsageError
from secateur.training.feature_distillation import ResidualSum, observe, relative_feature_error
from secateur.training.own_loss import OwnLoss


class DistillationLoss:
    """The loss with labels plus distillation from a teacher, on accelerate's device.

    `own_loss` takes the place of the task's loss. Raises `UsageError` if feature distillation lacks
    a teacher or residual sums, if images with several labels should be mixed, and if there is no
    loss for the labels and no teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        settings: TrainingSection,
        accelerator: Accelerator,
        sums: tuple[ResidualSum, ...] = (),
        task: Task = SINGLE_LABEL,
        own_loss: OwnLoss | None = None,
    ) -> None:
        self._model, self._settings, self._accelerator = model, settings, accelerator
        self._task, self._own_loss = task, own_loss
        if task.kind not in ("single-label", "binary") and (settings.mixup or settings.cutmix):
            raise UsageError(
                "mixup and cutmix mix images of one class each, and these have several labels or "
                "none: set both to 0"
            )
        self._label_weight = 1.0 if teacher is None else settings.label_weight
        if own_loss is not None:
            if not task.has_labels:
                raise UsageError(f"loss {own_loss.name} needs labels, and the data has none")
            if settings.label_smoothing:
                raise UsageError(
                    f"label_smoothing belongs to the loss of classifiers, not to {own_loss.name}: "
                    "set it to 0"
                )
        elif not task.has_loss:
            if teacher is None:
                raise UsageError(
                    f"a {task.kind} network can't be trained on these labels: set train.loss to a "
                    "function, path/to/file.py:function, or train it with its own library"
                )
            self._label_weight = 0.0  # the original network's outputs are all there is
        if settings.feature_weight and (teacher is None or not sums):
            raise UsageError(
                "feature_weight needs a teacher and a network with residual sums: set it to 0"
            )
        self._sums = sums if settings.feature_weight else ()
        self._teacher = teacher if self._label_weight < 1 or self._sums else None
        # accelerate replaces the forward of its argument: of a wrapper, not of the user's module.
        student = accelerator.prepare_model(_Student(model))
        if settings.compile:
            # torch limits how often it compiles one `forward`, those of earlier trainings included,
            # and silently stops compiling beyond the limit.
            torch.compiler.reset()
            student = torch.compile(student)
        self._student = student
        self._mixing: v2.Transform | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether any weight is on a teacher's outputs."""
        return self._teacher is not None

    def without_gradient_sync(self) -> AbstractContextManager[None]:
        """Keep gradients local to this process within a block."""
        context: AbstractContextManager[None] = self._accelerator.no_sync(self._student)
        return context

    def loss(
        self, images: Tensor, labels: Tensor, targets: Sequence[Objects] | None = None
    ) -> Tensor:
        """Return the mean loss for images `[image, channel, …]` with their labels and objects.

        Raises `DataError` if a label is outside the network's classes.
        """
        settings, device = self._settings, self._accelerator.device
        images = images.to(device, non_blocking=True)
        images, classes = self._mix(images, labels)
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with observe(self._model, self._sums) as maps:
            output = self._student(images)
            reading = self._read(output, images)
        loss = torch.zeros((), device=device)
        if self._label_weight > 0:
            label_loss = self._label_loss(output, reading, classes.to(device), targets)
            loss = loss + self._label_weight * label_loss
        if self._teacher is not None:
            with (
                torch.no_grad(),
                self._accelerator.autocast(),
                observe(self._teacher, self._sums) as teacher_maps,
            ):
                expected = self._read(self._teacher(images), images)
            if self._sums:
                error = relative_feature_error(self._sums, maps.by_module, teacher_maps.by_module)
                loss = loss + settings.feature_weight * error
            divergence = self._task.divergence(reading, expected, settings.temperature)
            scale = 1 if self._task.is_values else settings.temperature**2
            loss = loss + (1 - self._label_weight) * scale * divergence
        return loss

    def _label_loss(
        self,
        output: object,
        reading: Reading,
        labels: Tensor,
        targets: Sequence[Objects] | None,
    ) -> Tensor:
        if self._own_loss is None:
            smoothing = self._settings.label_smoothing
            return self._task.training_loss(output, reading, labels, label_smoothing=smoothing)
        if targets is None:
            return self._own_loss(output, labels)
        return self._own_loss(output, tuple(one.to(labels.device) for one in targets))

    def _read(self, output: object, images: Tensor) -> Reading:
        return self._task.read(output, len(images)).float()

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images mixed by MixUp or CutMix, and their class fractions `[image, class]`."""
        settings = self._settings
        if not (settings.mixup or settings.cutmix):
            return images, labels
        if self._mixing is None:
            with evaluating(self._model), torch.inference_mode():
                classes = self._read(self._model(images[:1]), images[:1]).shape[1]
            transforms = [
                mix(alpha=alpha, num_classes=classes)
                for mix, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
                if alpha
            ]
            self._mixing = v2.RandomChoice(transforms)
        if self._label_weight == 0:
            labels = torch.zeros_like(labels)  # they are unused and may not exist
        check_labels(labels, self._mixing.transforms[0].num_classes)
        # torchvision mixes images only: signals and volumes become one axis, in which CutMix cuts.
        pictures = images.reshape(*images.shape[:2], -1, 1) if images.ndim != 4 else images
        mixed, fractions = self._mixing(pictures, labels.to(images.device))
        return mixed.reshape(images.shape), fractions


class _Student(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> object:
        output: object = self.network(images)
        return output
