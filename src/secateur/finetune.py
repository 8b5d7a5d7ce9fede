"""Trains a network, alone or with the original one as its teacher."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.config import FinetuneSection
from secateur.data import Augmentation, Batch, Images, batches
from secateur.errors import SecateurError
from secateur.evaluate import check_labels
from secateur.graph import evaluating
from secateur.models import Preprocessing
from secateur.precision import autocast
from secateur.progress import Track, silent


@dataclass(frozen=True)
class Epoch:
    """How one pass over the training images went."""

    number: int
    """From 1."""
    loss: float
    """Mean training loss in nats."""
    learning_rate: float
    """At the end of the epoch."""


def finetune(
    model: nn.Module,
    teacher: nn.Module | None,
    images: Images,
    preprocessing: Preprocessing,
    settings: FinetuneSection,
    *,
    seed: int,
    track: Track = silent,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> None:
    """Trains `model` in place with a cosine schedule; it ends in the mode it came in.

    The loss is `label_weight` times the cross-entropy with the labels, plus the rest times the
    divergence from the teacher's softened answers (Hinton et al., 2015, arXiv 1503.02531, with
    their factor T²). Without a teacher all weight is on the labels; with `label_weight` 0 no label
    is looked at. Raises `SecateurError` where the loss stops being a number.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = _optimiser(model, settings)
    steps_an_epoch = math.ceil(len(images.labels) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, _cosine(settings.epochs * steps_an_epoch, settings.warmup_steps)
    )
    augmentation = Augmentation(flip=settings.flip)
    label_weight = 1.0 if teacher is None else settings.label_weight
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))  # for its end: the old modes come back
        if teacher is not None:
            stack.enter_context(evaluating(teacher))
        model.train(settings.mode == "training")
        for number in range(1, settings.epochs + 1):
            loss_sum, count = 0.0, 0
            stream = batches(
                images, settings.batch_size, preprocessing, shuffle=generator, augment=augmentation
            )
            for batch in track(stream, f"epoch {number}/{settings.epochs}", steps_an_epoch):
                optimiser.zero_grad(set_to_none=True)
                loss = _loss(model, teacher, batch, label_weight, settings)
                if not torch.isfinite(loss):
                    raise SecateurError(
                        f"the loss became {float(loss.detach())} in epoch {number}: "
                        "try a smaller learning rate"
                    )
                loss.backward()
                optimiser.step()
                schedule.step()
                loss_sum += float(loss.detach()) * len(batch.labels)
                count += len(batch.labels)
            if after_epoch is not None:
                after_epoch(Epoch(number, loss_sum / count, float(schedule.get_last_lr()[0])))
                model.train(settings.mode == "training")


def _optimiser(model: nn.Module, settings: FinetuneSection) -> torch.optim.Optimizer:
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )


def _loss(
    model: nn.Module,
    teacher: nn.Module | None,
    batch: Batch,
    label_weight: float,
    settings: FinetuneSection,
) -> Tensor:
    images = batch.images.contiguous(memory_format=torch.channels_last)
    with autocast(settings.precision):
        logits = model(images)
        if teacher is not None and label_weight < 1:
            with torch.no_grad():
                taught = teacher(images)
    logits = logits.float()
    loss = torch.zeros(())
    if label_weight > 0:
        check_labels(batch.labels, logits.shape[1])
        loss = loss + label_weight * F.cross_entropy(logits, batch.labels)
    if teacher is not None and label_weight < 1:
        temperature = settings.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, dim=1),
            F.log_softmax(taught.float() / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        loss = loss + (1 - label_weight) * temperature**2 * divergence
    return loss


def _cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """Factor on the learning rate: a linear rise, then half a cosine down to zero."""
    warmup = min(warmup, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor
