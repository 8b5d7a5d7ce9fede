"""What a network is taught by: labels, mixed images, and the answers of another network."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms import v2

from secateur.config import TrainingSection
from secateur.data.batches import check_labels
from secateur.errors import UsageError
from secateur.runtime.module_state import evaluating
from secateur.training.feature_distillation import ResidualSum, difference, observed


class DistillationLoss:
    """The loss of a network, and of a teacher's answers, on accelerate's devices and processes."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        settings: TrainingSection,
        accelerator: Accelerator,
        sums: tuple[ResidualSum, ...] = (),
    ) -> None:
        self._model, self._settings, self._accelerator = model, settings, accelerator
        self._label_weight = 1.0 if teacher is None else settings.label_weight
        if settings.feature_weight and (teacher is None or not sums):
            raise UsageError(
                "feature_weight needs a teacher and a network with residual sums: leave it at 0"
            )
        self._sums = sums if settings.feature_weight else ()
        self._teacher = teacher if self._label_weight < 1 or self._sums else None
        # accelerate changes the forward of what it is given: that of a wrapper, not the user's.
        student = accelerator.prepare_model(_Student(model))
        if settings.compile:
            # Each network counts against torch's limit of compilations of one `forward`, after
            # which it quietly does without: that of an earlier training, too.
            torch.compiler.reset()
            student = torch.compile(student)
        self._student = student
        self._mixing: v2.Transform | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether any weight is on a teacher's answers."""
        return self._teacher is not None

    def without_sums(self) -> AbstractContextManager[None]:
        """Within the block gradients stay those of this process."""
        context: AbstractContextManager[None] = self._accelerator.no_sync(self._student)
        return context

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean loss, in nats, of images `[image, rgb, height, width]` and class numbers `[image]`.

        Raises `DataError` where a label lies outside the network's classes.
        """
        settings, device = self._settings, self._accelerator.device
        images = images.to(device, non_blocking=True)
        images, classes = self._mixed(images, labels)
        images = images.contiguous(memory_format=torch.channels_last)
        with observed(self._model, self._sums) as own:
            logits = self._student(images).float()
        loss = torch.zeros((), device=device)
        if self._label_weight > 0:
            check_labels(labels, logits.shape[1])
            entropy = F.cross_entropy(
                logits, classes.to(device), label_smoothing=settings.label_smoothing
            )
            loss = loss + self._label_weight * entropy
        if self._teacher is not None:
            with (
                torch.no_grad(),
                self._accelerator.autocast(),
                observed(self._teacher, self._sums) as wanted,
            ):
                taught = self._teacher(images).float()
            if self._sums:
                error = difference(self._sums, own.by_module, wanted.by_module)
                loss = loss + settings.feature_weight * error
            temperature = settings.temperature
            divergence = F.kl_div(
                F.log_softmax(logits / temperature, dim=1),
                F.log_softmax(taught / temperature, dim=1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + (1 - self._label_weight) * temperature**2 * divergence
        return loss

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed among themselves, and the shares of the classes `[image, class]`."""
        settings = self._settings
        if not (settings.mixup or settings.cutmix):
            return images, labels
        if self._mixing is None:
            with evaluating(self._model), torch.inference_mode():
                classes = self._model(images[:1]).shape[1]
            ways = [
                way(alpha=alpha, num_classes=classes)
                for way, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
                if alpha
            ]
            self._mixing = v2.RandomChoice(ways)
        if self._label_weight == 0:
            labels = torch.zeros_like(labels)  # no label is looked at, so there may be none
        check_labels(labels, self._mixing.transforms[0].num_classes)
        mixed: tuple[Tensor, Tensor] = self._mixing(images, labels.to(images.device))
        return mixed


class _Student(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits
