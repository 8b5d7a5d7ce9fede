"""Train a network, alone or with the original network as its teacher.

The loop runs on Hugging Face accelerate: the same code works on a CPU, on an accelerator and in
several processes. What a step does depends only on the seed and the step's number (see
`data.training_stream`), so a training that was interrupted resumes from a checkpoint as if it had
not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.config import TrainingSection
from secateur.data import Batch
from secateur.data.training_stream import SMALLEST_SHARD, TrainingStream
from secateur.graph.module_state import device_of, evaluating, on_device, trainable
from secateur.models.state_dict import load_state
from secateur.runtime import distributed
from secateur.runtime.errors import NotFiniteLoss, UsageError
from secateur.runtime.precision import accelerator_for
from secateur.runtime.progress import ProgressCallback, StageLines, no_progress
from secateur.runtime.seeding import forked_generators, seed_generators, seed_of
from secateur.runtime.signals import StopRequest, defer_signals
from secateur.training.checkpoint import Checkpoint, Checkpoints, TrainedTensors
from secateur.training.feature_distillation import ResidualSum
from secateur.training.loss import DistillationLoss
from secateur.training.lr_schedule import Schedule
from secateur.training.memory_check import check_training
from secateur.training.outcome import KEYS_FREE_ON_RESUME, Epoch
from secateur.training.sync_batchnorm import sync_batchnorm
from secateur.training.training_data import TrainingData, training_stream

CHECKED_EVERY = 50
"""Steps between checks that the loss is finite, on an accelerator."""


@dataclass(frozen=True, eq=False)
class Training:
    """The result of a training."""

    epochs: tuple[Epoch, ...]
    before: float | None
    """What `validate` returned before the first epoch."""
    best_epoch: int
    """The first epoch with the highest validation; 0 if none beat the network before training.
    Without `validate`, the last epoch."""
    ended: Literal["whole", "patience", "time"]
    """Why there is no further epoch."""
    seconds: float
    """Duration, including that before the training was resumed."""
    last: dict[str, Tensor] = field(repr=False)
    """State of the network after the last epoch; with EMA, of the averaged network."""
    best: dict[str, Tensor] = field(repr=False)
    """State of the network after the best epoch."""


@dataclass(frozen=True, eq=False)
class TrainingCallbacks:
    """Functions that the trainer calls."""

    progress: ProgressCallback = no_progress
    validate: Callable[[nn.Module], float] | None = None
    """Returns how good a network is (higher is better); called before and after each epoch."""
    after_epoch: Callable[[Epoch], None] | None = None
    lines: StageLines = field(default_factory=StageLines)
    """Gets a line when an epoch has ended."""
    describe: Callable[[float], str] | None = None
    """Puts what `validate` returns into words for people; None leaves it out."""


def train(
    model: nn.Module,
    teacher: nn.Module | None,
    data: TrainingData,
    settings: TrainingSection,
    *,
    seed: int,
    sums: tuple[ResidualSum, ...] = (),
    callbacks: TrainingCallbacks = TrainingCallbacks(),
    checkpoints: Checkpoints | None = None,
) -> Training:
    """Train `model` in place, and return how that went.

    The loss is `label_weight` times the loss with the labels, the task's or `data.own_loss`, plus
    the rest times the divergence from the teacher's softened outputs. Without a teacher all weight
    is on the labels; with `label_weight` 0 labels are not used. With `feature_weight`, the error of
    the feature maps at `sums` is added (see `feature_distillation`). Afterwards the network has its
    old mode, and the weights that `settings.keep` names.

    With `checkpoints`, training resumes from the latest one and writes new ones; on a CPU, the
    weights are the same bit for bit as without the interruption. SIGINT and SIGTERM then write one
    more checkpoint before they raise `KeyboardInterrupt`.

    Raises:
        NotFiniteLoss: the loss is no longer finite.
        SecateurError: a step would take too much memory.
        UsageError: the checkpoint belongs to another training.

    Source:
        Hinton et al., 2015, arXiv 1503.02531; as there, the divergence has a factor T².

    """
    with contextlib.ExitStack() as stack:
        networks = [network for network in (model, teacher) if network is not None]
        for network in networks:
            stack.enter_context(evaluating(network))  # restores the modes at the end
        stack.enter_context(trainable(model))
        accelerator = accelerator_for(settings.precision, device_of(model))
        others = [teacher, None if data.own_loss is None else data.own_loss.module]
        for module in filter(None, others):
            stack.enter_context(on_device(module, accelerator.device))
        stack.enter_context(forked_generators(accelerator.device))
        if settings.sync_batchnorm:
            stack.enter_context(sync_batchnorm(model))
        stream = training_stream(data, settings, seed)
        loss = DistillationLoss(
            model, teacher, settings, accelerator, sums, data.task, data.own_loss
        )
        run = _Run(model, loss, stream, settings, accelerator, callbacks, checkpoints)
        run.resume()
        try:
            result = run.run()
        except KeyboardInterrupt:
            with defer_signals():
                run.save()
            raise
        finally:
            model.zero_grad(set_to_none=True)
    load_state(model, result.best if settings.keep == "best" else result.last)
    return result


@dataclass
class _Position:
    """How far a training has come; what a checkpoint holds as JSON."""

    epoch: int = 1
    step: int = 0
    """Steps done in this epoch."""
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
    """A training in progress."""

    def __init__(
        self,
        model: nn.Module,
        loss: DistillationLoss,
        stream: TrainingStream,
        settings: TrainingSection,
        accelerator: Accelerator,
        callbacks: TrainingCallbacks,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._model, self._stream, self._settings = model, stream, settings
        self._loss, self._accelerator = loss, accelerator
        self._callbacks, self._checkpoints = callbacks, checkpoints
        self._ema: AveragedModel | None = None
        if settings.ema_decay:
            average = get_ema_multi_avg_fn(settings.ema_decay)
            self._ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._optimiser = accelerator.prepare_optimizer(_optimiser(model, settings))
        self._schedule = Schedule(
            settings.schedule,
            settings.epochs * stream.steps,
            settings.warmup_steps,
            settings.step_at,
            settings.step_factor,
        )
        self._tensors = TrainedTensors(model, self._ema, self._optimiser, accelerator.scaler)
        self._position = _Position()
        self._losses: list[Tensor] = []
        self._best_state = self._state()
        self._started = time.monotonic()
        self._last_saved = self._started
        self._is_memory_checked = False

    # --- the loop ------------------------------------------------------------------------------

    def run(self) -> Training:
        """Train from the current position to the end; return how that went."""
        position, validate = self._position, self._callbacks.validate
        if validate is not None and position.before is None:
            position.before = position.best = validate(self._network)
        while position.epoch <= self._settings.epochs and not self._is_patience_over():
            is_late = self._steps_done() > 0 and distributed.any_process(self._is_time_over())
            position.ended = "time" if is_late else "whole"
            if not is_late:
                self._run_epoch()
            if position.step:
                self._end_epoch()
            if position.ended == "time":
                break
        return Training(
            tuple(position.epochs),
            position.before,
            position.best_epoch,
            position.ended,
            self._seconds(),
            self._state(),
            self._best_state,
        )

    def _run_epoch(self) -> None:
        """Do the remaining steps of an epoch, or as many as there is time for."""
        position = self._position
        title = f"epoch {position.epoch}/{self._settings.epochs}"
        self._model.train(not self._settings.freeze_batchnorm)
        steps = self._stream.steps - position.step
        with contextlib.closing(self._stream.epoch(position.epoch, position.step)) as batches:
            for batch in self._callbacks.progress(batches, title, steps):
                with defer_signals() as signals:
                    self._step(batch)
                    if self._is_checkpoint_due():
                        self.save()
                    is_interrupted = distributed.any_process(signals.is_pending)
                if is_interrupted or signals.is_pending:
                    raise StopRequest(signals.number)
                if distributed.any_process(self._is_time_over()):
                    position.ended = "time"
                    return

    def _end_epoch(self) -> None:
        position, callbacks = self._position, self._callbacks
        distributed.broadcast(self._model.buffers())
        if self._ema is not None:
            distributed.broadcast(self._ema.module.buffers())
        self._count_losses()
        totals = distributed.sum_over_processes([position.loss_sum, float(position.images)])
        validation = None if callbacks.validate is None else callbacks.validate(self._network)
        rate = self._settings.learning_rate * self._schedule.factor(self._steps_done())
        epoch = Epoch(position.epoch, totals[0] / totals[1], rate, validation)
        with defer_signals() as signals:
            position.epochs.append(epoch)
            if validation is None or position.best is None or validation > position.best:
                position.best, position.best_epoch = validation, position.epoch
                self._best_state = self._state()
            position.epoch, position.step = position.epoch + 1, 0
            position.loss_sum, position.images = 0.0, 0
            self.save()
        if callbacks.after_epoch is not None:
            callbacks.after_epoch(epoch)
        text = f"loss {epoch.loss:.3f}"
        if callbacks.describe is not None and validation is not None:
            text += f", validation {callbacks.describe(validation)}"
        callbacks.lines.end_step("epoch", epoch.number, self._settings.epochs, text)
        if signals.is_pending:
            raise StopRequest(signals.number)

    def _step(self, batch: Batch) -> None:
        position, settings = self._position, self._settings
        rank, processes = self._stream.shard
        size = self._stream.size(position.step)
        rate = settings.learning_rate * self._schedule.factor(self._steps_done())
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        count = self._micro_batch_count(len(batch.labels))
        seed = seed_of(self._stream.seed, position.epoch, position.step, rank)
        seed_generators(seed, self._accelerator.device)
        self._optimiser.zero_grad(set_to_none=True)
        micro_batches = [
            (batch.images[part], batch.labels[part], batch.targets and batch.targets[part])
            for part in _slices(len(batch.labels), count)
        ]
        if not self._is_memory_checked:
            self._check_memory(batch.images, math.ceil(len(batch.labels) / count))
        loss_sum = torch.zeros((), device=self._accelerator.device)  # of this process, in nats
        for number, (images, labels, targets) in enumerate(micro_batches):
            is_last = number == count - 1
            with contextlib.nullcontext() if is_last else self._loss.without_gradient_sync():
                loss = self._loss.loss(images, labels, targets)
                if not loss.requires_grad:
                    raise UsageError(
                        "the network can't be trained, as its output has no gradient: its forward "
                        "must not run under torch.no_grad or torch.inference_mode, or detach"
                    )
                # Gradients are averaged over processes, whose shards may differ by an image.
                self._accelerator.backward(loss * (len(labels) * processes / size))
            loss_sum += loss.detach() * len(labels)
        self._losses.append(loss_sum)
        if loss_sum.device.type == "cpu" or len(self._losses) == CHECKED_EVERY:
            self._count_losses()
        self._optimiser.step()
        if self._ema is not None:
            self._ema.update_parameters(self._model)
        position.images += len(batch.labels)
        position.step += 1

    def _micro_batch_count(self, images: int) -> int:
        """Return into how many micro-batches a shard is split, the same in all processes.

        Batch norm needs as many images in each micro-batch as in a shard.
        """
        most = self._settings.gradient_accumulation_steps
        if most == 1:
            return 1
        return max(1, min(most, distributed.all_reduce_min(images) // SMALLEST_SHARD))

    def _check_memory(self, images: Tensor, batch_size: int) -> None:
        """Raise `SecateurError` before the first step if it would take too much memory."""
        few = images[:4].to(self._accelerator.device)
        with self._accelerator.autocast():
            check_training(self._model, few, batch_size)
        self._is_memory_checked = True

    def _count_losses(self) -> None:
        """Add up the losses of the last steps; reading them makes an accelerator wait."""
        for loss in map(float, self._losses):
            if not math.isfinite(loss):
                raise NotFiniteLoss(
                    f"the loss became {loss} in epoch {self._position.epoch}: try a smaller "
                    "learning rate"
                )
            self._position.loss_sum += loss
        self._losses.clear()

    def _steps_done(self) -> int:
        """Return the number of steps done in all epochs."""
        return (self._position.epoch - 1) * self._stream.steps + self._position.step

    def _is_patience_over(self) -> bool:
        at, patience = self._position, self._settings.patience
        if patience is None or at.best is None or at.epoch - 1 - at.best_epoch < patience:
            return False
        at.ended = "patience"
        return True

    def _is_time_over(self) -> bool:
        limit = self._settings.max_minutes
        return limit is not None and self._seconds() > 60 * limit

    def _seconds(self) -> float:
        return self._position.seconds + time.monotonic() - self._started

    def _is_checkpoint_due(self) -> bool:
        return time.monotonic() - self._last_saved >= 60 * self._settings.checkpoint_minutes

    @property
    def _network(self) -> nn.Module:
        """The network that training results in: with EMA, the averaged one."""
        return self._model if self._ema is None else self._ema.module

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._network.state_dict().items()}

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, on the main process and if there are `checkpoints`."""
        self._last_saved = time.monotonic()
        self._count_losses()
        if self._checkpoints is None or not distributed.is_main_process():
            return
        position = dataclasses.replace(self._position, seconds=self._seconds())
        facts = {"training": self._identity(), "position": dataclasses.asdict(position)}
        checkpoint = self._tensors.to_checkpoint(self._best_state, facts)
        self._checkpoints.save(self._steps_done(), checkpoint)

    def resume(self) -> None:
        """Continue from the latest checkpoint, if there is one; raises `UsageError`."""
        checkpoint = None if self._checkpoints is None else self._checkpoints.latest()
        if checkpoint is None:
            return
        self._check_identity(checkpoint)
        self._tensors.restore(checkpoint)
        self._best_state = {
            name: tensor.to(self._accelerator.device)
            for name, tensor in checkpoint.part("best").items()
        }
        self._position = _Position.from_facts(checkpoint.facts["position"])
        if not distributed.is_main_process():  # the sums are the main process's
            self._position.loss_sum, self._position.images = 0.0, 0

    def _check_identity(self, checkpoint: Checkpoint) -> None:
        expected, recorded = self._identity(), checkpoint.facts["training"]
        for key, value in expected.items():
            if value != recorded.get(key):
                raise UsageError(
                    f"the checkpoint was made with {key} {recorded.get(key)}, not {value}: "
                    "resume with what it was made with, or start anew"
                )

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a training to be resumed."""
        stream = self._stream
        return {
            **self._settings.model_dump(mode="json", exclude=set(KEYS_FREE_ON_RESUME)),
            "seed": stream.seed,
            "training images": len(stream.images.labels),
            "image size": _as_json(stream.preprocessing.image_size),
            "a teacher": self._loss.has_teacher,
            "weights": sum(tensor.numel() for tensor in self._model.state_dict().values()),
        }


def _slices(images: int, parts: int) -> list[slice]:
    """Return the parts of a batch, of equal size or one image more, the larger first."""
    small, larger = divmod(images, parts)
    starts = [part * small + min(part, larger) for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(starts)]


def _as_json(size: int | tuple[int, int]) -> int | list[int]:
    return size if isinstance(size, int) else list(size)


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
