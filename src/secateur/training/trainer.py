"""Trains a network, alone or with the original one as its teacher.

The loop runs on Hugging Face accelerate: the same code on a CPU, on an accelerator, or on many
processes. What a step does depends on the seed and the step's number alone (see `data.training`),
so a training that was interrupted goes on from a checkpoint as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.config import TrainingSection
from secateur.data import Batch, Images, NormalisedImages, TensorImages, Unreadable
from secateur.data.augmentation import LARGEST_SHIFTED, Augmentation
from secateur.data.preprocessing import Preprocessing
from secateur.data.training_stream import SMALLEST_SHARD, TrainingStream
from secateur.errors import SecateurError, UsageError
from secateur.runtime import distributed
from secateur.runtime.module_state import device_of, evaluating
from secateur.runtime.precision import accelerator_for
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.runtime.seeding import seed_of
from secateur.runtime.signals import defer_signals
from secateur.training.checkpoint import Checkpoint, Checkpoints
from secateur.training.feature_distillation import ResidualSum
from secateur.training.loss import DistillationLoss
from secateur.training.lr_schedule import Schedule
from secateur.training.memory_check import check_training
from secateur.training.sync_batchnorm import sync_batchnorm

WORKERS_FOR_FILES = 4
"""Reading processes, no more than processors, where images are files and nothing else is said."""
CHECKED_EVERY = 50
"""Steps after which an accelerator is asked whether the loss is still a number."""
KEYS_WITHOUT_EFFECT = frozenset({"checkpoint_minutes", "workers"})
"""Settings that change no result."""
KEYS_FREE_ON_RESUME = KEYS_WITHOUT_EFFECT | {"max_minutes", "keep", "patience"}
"""Settings that may differ where training is resumed: they don't change what is learnt."""


@dataclass(frozen=True)
class Epoch:
    """How one pass over the training images went."""

    number: int
    """From 1."""
    loss: float
    """Mean training loss in nats."""
    learning_rate: float
    """At the end of the epoch."""
    validation: float | None = None
    """What the network was worth after it, by the caller's measure: in a run the top-1 fraction on
    the validation images."""


@dataclass(frozen=True, eq=False)
class Training:
    """What a training came to."""

    epochs: tuple[Epoch, ...]
    before: float | None
    """What the network was worth before the first epoch, by the caller's measure."""
    best_epoch: int
    """The first one of those that were worth the most; 0: as the network came. Without a measure
    the last one."""
    ended: Literal["whole", "patience", "time"]
    """Why there is no further epoch."""
    seconds: float
    """What it took, over all resumptions."""
    last: dict[str, Tensor] = field(repr=False)
    """State of the network after the last epoch; with a running average, the average's."""
    best: dict[str, Tensor] = field(repr=False)
    """State of the network after the best epoch."""


def train(
    model: nn.Module,
    teacher: nn.Module | None,
    images: Images,
    preprocessing: Preprocessing,
    settings: TrainingSection,
    *,
    seed: int,
    sums: tuple[ResidualSum, ...] = (),
    progress: ProgressCallback = no_progress,
    validate: Callable[[nn.Module], float] | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
    checkpoints: Checkpoints | None = None,
    unreadable: Unreadable | None = None,
) -> Training:
    """Trains `model` in place; it ends in the mode it came in, with the weights of `settings.keep`.

    The loss is `label_weight` times the cross-entropy with the labels, plus the rest times the
    divergence from the teacher's softened answers (Hinton et al., 2015, arXiv 1503.02531, with
    their factor T²). Without a teacher all weight is on the labels; with `label_weight` 0 no label
    is looked at. With `feature_weight` the feature maps at `sums` count, too (see `features`).
    `validate` says what a network is worth, more being better.

    Images that can't be read are an error, unless there is `unreadable` to note them in: then a
    step goes without them. With `checkpoints` the training goes on from the latest one, to the same
    weights bit for bit on a CPU as if it had not been interrupted, and leaves new ones behind;
    SIGINT and SIGTERM then leave one more before they raise `KeyboardInterrupt`. Raises
    `SecateurError` where the loss stops being a number, and `UsageError` where the checkpoint is of
    another training.
    """
    accelerator = accelerator_for(settings.precision)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))  # for its end: the old modes come back
        stack.enter_context(_placed(model, accelerator.device))
        if teacher is not None:
            stack.enter_context(evaluating(teacher))
            stack.enter_context(_placed(teacher, accelerator.device))
        stack.enter_context(torch.random.fork_rng())
        if settings.sync_batchnorm:
            stack.enter_context(sync_batchnorm(model))
        stream = TrainingStream(
            images,
            preprocessing,
            augmentation(settings, preprocessing, images),
            settings.batch_size,
            seed,
            shard=distributed.rank_and_world_size(),
            workers=_workers(settings, images),
            unreadable=unreadable,
        )
        lesson = DistillationLoss(model, teacher, settings, accelerator, sums)
        run = _Run(model, lesson, stream, settings, accelerator)
        if checkpoints is not None and (found := checkpoints.latest()) is not None:
            run.restore(found)
        try:
            run.run(progress, validate, after_epoch, checkpoints)
        except KeyboardInterrupt:
            with defer_signals():
                run.save(checkpoints)
            raise
        finally:
            model.zero_grad(set_to_none=True)
    result = run.result()
    model.load_state_dict(result.best if settings.keep == "best" else result.last)
    return result


def augmentation(
    settings: TrainingSection, preprocessing: Preprocessing, images: Images
) -> Augmentation:
    """How training images are changed, with the crop that suits them where none is given.

    Images as a network takes them keep their sides, which need not be equal.
    """
    is_small = preprocessing.image_size <= LARGEST_SHIFTED
    is_shifted = is_small or isinstance(images, NormalisedImages)
    crop = settings.crop or ("random_crop" if is_shifted else "random_resized_crop")
    return Augmentation(crop, settings.flip, settings.randaugment)


def _workers(settings: TrainingSection, images: Images) -> int:
    if settings.workers is not None:
        return settings.workers
    if isinstance(images, TensorImages | NormalisedImages):
        return 0
    return min(WORKERS_FOR_FILES, os.cpu_count() or 1)


@contextlib.contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the network is on a device; then it goes back to where it was."""
    before = device_of(model)
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


@dataclass
class _Position:
    """How far a training has come, and all else that goes on from a checkpoint as plain values."""

    epoch: int = 1
    step: int = 0
    """Steps of the epoch that are done."""
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)
    before: float | None = None
    best: float | None = None
    best_epoch: int = 0
    ended: Literal["whole", "patience", "time"] = "whole"

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> _Position:
        return cls(**{**facts, "epochs": [Epoch(**epoch) for epoch in facts["epochs"]]})


class _Run:
    """A training under way."""

    def __init__(
        self,
        model: nn.Module,
        lesson: DistillationLoss,
        stream: TrainingStream,
        settings: TrainingSection,
        accelerator: Any,
    ) -> None:
        self._model, self._stream, self._settings = model, stream, settings
        self._lesson, self._accelerator = lesson, accelerator
        self._average: AveragedModel | None = None
        if settings.ema_decay:
            average = get_ema_multi_avg_fn(settings.ema_decay)
            self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._optimiser = accelerator.prepare_optimizer(_optimiser(model, settings))
        self._schedule = Schedule(
            settings.schedule,
            settings.epochs * stream.steps,
            settings.warmup_steps,
            settings.step_at,
            settings.step_factor,
        )
        self._at = _Position()
        self._losses: list[Tensor] = []
        self._best_state = self._state()
        self._since = time.monotonic()
        self._saved = self._since
        self._has_room = False

    # --- the loop ------------------------------------------------------------------------------

    def run(
        self,
        progress: ProgressCallback,
        validate: Callable[[nn.Module], float] | None,
        after_epoch: Callable[[Epoch], None] | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        """Trains from where it stands to the end."""
        at, settings = self._at, self._settings
        if validate is not None and at.before is None:
            at.before = at.best = validate(self._network)
        while at.epoch <= settings.epochs and not self._is_patience_over():
            is_late = self._done() > 0 and distributed.any_process(self._is_time_over())
            at.ended = "time" if is_late else "whole"
            if not is_late:
                self._go_through_epoch(progress, checkpoints)
            if at.step:
                self._end_epoch(validate, after_epoch, checkpoints)
            if at.ended == "time":
                return

    def _go_through_epoch(
        self, progress: ProgressCallback, checkpoints: Checkpoints | None
    ) -> None:
        """Does the steps of an epoch that are left, or as many as there is time for."""
        at = self._at
        title = f"epoch {at.epoch}/{self._settings.epochs}"
        self._model.train(not self._settings.freeze_batchnorm)
        with contextlib.closing(self._stream.epoch(at.epoch, at.step)) as batches:
            for batch in progress(batches, title, self._stream.steps - at.step):
                with defer_signals() as interrupts:
                    self._step(batch)
                    if self._is_due():
                        self.save(checkpoints)
                    asked = distributed.any_process(interrupts.is_pending)
                if asked or interrupts.is_pending:
                    raise KeyboardInterrupt
                if distributed.any_process(self._is_time_over()):
                    at.ended = "time"
                    return

    def _end_epoch(
        self,
        validate: Callable[[nn.Module], float] | None,
        after_epoch: Callable[[Epoch], None] | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        at = self._at
        distributed.broadcast(self._model.buffers())
        if self._average is not None:
            distributed.broadcast(self._average.module.buffers())
        self._count_losses()
        loss = distributed.sum_over_processes([at.loss_sum, float(at.images)])
        worth = None if validate is None else validate(self._network)
        rate = self._settings.learning_rate * self._schedule.factor(self._done())
        epoch = Epoch(at.epoch, loss[0] / loss[1], rate, worth)
        with defer_signals() as interrupts:
            at.epochs.append(epoch)
            if worth is None or at.best is None or worth > at.best:
                at.best, at.best_epoch, self._best_state = worth, at.epoch, self._state()
            at.epoch, at.step, at.loss_sum, at.images = at.epoch + 1, 0, 0.0, 0
            self.save(checkpoints)
        if after_epoch is not None:
            after_epoch(epoch)
        if interrupts.is_pending:
            raise KeyboardInterrupt

    def _step(self, batch: Batch) -> None:
        at, settings, lesson = self._at, self._settings, self._lesson
        rank, processes = self._stream.shard
        size = self._stream.size(at.step)
        rate = settings.learning_rate * self._schedule.factor(self._done())
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        _seed(seed_of(self._stream.seed, at.epoch, at.step, rank), self._accelerator.device)
        self._optimiser.zero_grad(set_to_none=True)
        parts = self._parts(len(batch.labels))
        pieces = zip(
            batch.images.tensor_split(parts), batch.labels.tensor_split(parts), strict=True
        )
        if not self._has_room:
            self._check_room(batch.images, math.ceil(len(batch.labels) / parts))
        total = torch.zeros((), device=self._accelerator.device)  # of the share, in nats
        for number, (images, labels) in enumerate(pieces):
            with contextlib.nullcontext() if number == parts - 1 else lesson.without_sums():
                loss = lesson.loss(images, labels)
                # Gradients are averaged over processes, whose shares may differ by an image.
                self._accelerator.backward(loss * (len(labels) * processes / size))
            total += loss.detach() * len(labels)
        self._losses.append(total)
        if total.device.type == "cpu" or len(self._losses) == CHECKED_EVERY:
            self._count_losses()
        self._optimiser.step()
        if self._average is not None:
            self._average.update_parameters(self._model)
        at.images += len(batch.labels)
        at.step += 1

    def _parts(self, count: int) -> int:
        """In how many parts a share of so many images is worked through, the same everywhere.

        Norms need as many images of each part as of a share.
        """
        most = self._settings.gradient_accumulation_steps
        if most == 1:
            return 1
        return max(1, min(most, distributed.all_reduce_min(count) // SMALLEST_SHARD))

    def _check_room(self, images: Tensor, at_once: int) -> None:
        """Before the first step: raises `SecateurError` where it would take too much memory."""
        few = images[:4].to(self._accelerator.device)
        with self._accelerator.autocast():
            check_training(self._model, few, at_once)
        self._has_room = True

    def _count_losses(self) -> None:
        """Adds up what the last steps lost; asking an accelerator for it makes it wait."""
        for loss in map(float, self._losses):
            if not math.isfinite(loss):
                raise SecateurError(
                    f"the loss became {loss} in epoch {self._at.epoch}: try a smaller learning rate"
                )
            self._at.loss_sum += loss
        self._losses.clear()

    def _done(self) -> int:
        """Steps of all epochs so far."""
        return (self._at.epoch - 1) * self._stream.steps + self._at.step

    def _is_patience_over(self) -> bool:
        at, patience = self._at, self._settings.patience
        if patience is None or at.best is None or at.epoch - 1 - at.best_epoch < patience:
            return False
        at.ended = "patience"
        return True

    def _is_time_over(self) -> bool:
        limit = self._settings.max_minutes
        return limit is not None and self._seconds() > 60 * limit

    def _seconds(self) -> float:
        return self._at.seconds + time.monotonic() - self._since

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved >= 60 * self._settings.checkpoint_minutes

    @property
    def _network(self) -> nn.Module:
        """What the training ends with: the average where there is one."""
        return self._model if self._average is None else self._average.module

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._network.state_dict().items()}

    def result(self) -> Training:
        """What the training came to."""
        at = self._at
        return Training(
            tuple(at.epochs),
            at.before,
            at.best_epoch,
            at.ended,
            self._seconds(),
            self._state(),
            self._best_state,
        )

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self, checkpoints: Checkpoints | None) -> None:
        """Leaves a checkpoint; the first process alone writes."""
        self._saved = time.monotonic()
        self._count_losses()
        if checkpoints is None or not distributed.is_main_process():
            return
        parts = {"model": self._model.state_dict(), "best": self._best_state}
        if self._average is not None:
            parts["ema_decay"] = self._average.state_dict()
        optimiser = self._optimiser.state_dict()["state"]
        parts["optimiser"] = {
            f"{number}.{key}": value
            for number, values in optimiser.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        tensors = {
            f"{part}.{name}": tensor
            for part, named in parts.items()
            for name, tensor in named.items()
        }
        scaler = self._accelerator.scaler
        facts = {
            "training": self._identity(),
            "position": dataclasses.asdict(dataclasses.replace(self._at, seconds=self._seconds())),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoints.write(self._done(), Checkpoint(tensors, facts))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint; raises `UsageError` where it is of another training."""
        expected, found = self._identity(), checkpoint.facts["training"]
        for key in expected:
            if expected[key] != found.get(key):
                raise UsageError(
                    f"the checkpoint was made with {key} {found.get(key)}, not {expected[key]}: "
                    "resume with what it was made with, or start anew"
                )
        self._model.load_state_dict(checkpoint.part("model"))
        self._best_state = {
            name: tensor.to(self._accelerator.device)
            for name, tensor in checkpoint.part("best").items()
        }
        if self._average is not None:
            self._average.load_state_dict(checkpoint.part("ema_decay"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.part("optimiser").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(checkpoint.facts["scaler"])
        self._at = _Position.from_facts(checkpoint.facts["position"])
        if not distributed.is_main_process():  # whose losses they are
            self._at.loss_sum, self._at.images = 0.0, 0

    def _identity(self) -> dict[str, Any]:
        """What must agree for a training to go on."""
        stream, settings = (
            self._stream,
            self._settings.model_dump(mode="json", exclude=set(KEYS_FREE_ON_RESUME)),
        )
        return {
            **settings,
            "seed": stream.seed,
            "training images": len(stream.images.labels),
            "image size": stream.preprocessing.image_size,
            "a teacher": self._lesson.has_teacher,
            "weights": sum(tensor.numel() for tensor in self._model.state_dict().values()),
        }


def _seed(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and one device; that for all takes most of a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _optimiser(model: nn.Module, settings: TrainingSection) -> torch.optim.Optimizer:
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
