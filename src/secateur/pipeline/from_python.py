"""What `secateur.prune` is asked for from Python, made into what a run works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from secateur.config import BudgetLike, RunConfig, TaskKind
from secateur.config.in_memory import config_in_memory, data_section, tables_in_memory
from secateur.data import SYNTHETIC, DataSet
from secateur.data.batch_forms import Form, form_of
from secateur.data.in_memory import ImageBatches, normaliser, read_images, split_images
from secateur.graph.build import traceable_forward
from secateur.graph.forward import with_forward, with_inputs, without_forward
from secateur.graph.network_graph import Forward
from secateur.graph.output_values import OutputPart
from secateur.graph.working_copy import can_run, working_copy
from secateur.graph.wrappers import without_wrappers
from secateur.models import zoo
from secateur.models.examine import FIRST_IMAGES
from secateur.models.labelled_images import label_images
from secateur.models.metrics.user_function import NetworkFunction
from secateur.models.outputs import with_logits
from secateur.models.plausibility import looks_untrained
from secateur.models.reparameterize import NOTHING_TO_FOLD, reparameterized
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.kept_classes import cut_to_classes
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.synthetic_data import (
    describe_synthetic,
    noise_images,
    synthetic_images,
    with_predicted_labels,
)
from secateur.runtime.device import AUTO
from secateur.runtime.errors import UsageError
from secateur.runtime.progress import StageLines, live_progress, print_to_stderr
from secateur.scoring import criteria
from secateur.scoring.criteria import CriterionLike
from secateur.training.own_loss import LossFunction, OwnLoss


@dataclass(frozen=True, eq=False)
class Asked:
    """The arguments of `prune` besides the network."""

    images: ImageBatches | None
    input_shape: Sequence[int] | None
    target: BudgetLike
    criterion: CriterionLike
    concepts: str
    test: ImageBatches | None
    forward: Forward | None
    class_names: Sequence[str]
    keep_classes: Sequence[str | int]
    task: Literal["auto"] | TaskKind
    outputs: Sequence[OutputPart]
    metric: str | NetworkFunction
    epochs: int
    loss: LossFunction | None
    max_images: int
    seed: int
    settings: Mapping[str, Any]
    progress: bool


def prepare(
    model: nn.Module, asked: Asked, *, is_estimate: bool = False
) -> tuple[nn.Module, DataSet, RunConfig, RunContext]:
    """Return what a run works on: the network, the images, the configuration, what goes along.

    Where there are no images they are synthesised; for an estimate noise takes their place.
    """
    forward = asked.forward or traceable_forward(model)
    _check_arguments(asked.class_names, epochs=asked.epochs, max_images=asked.max_images)
    outputs, task, metric, loss = _output_parts(asked.outputs), asked.task, asked.metric, asked.loss
    if outputs and task == "auto":
        task = "regression"
    name, passed_criterion = criteria.from_python(asked.criterion)
    network_name = f"{zoo.IN_MEMORY}:{type(model).__name__}"
    tables = tables_in_memory(network_name, asked.target, name, asked.concepts)
    tables |= {"finetune": {"epochs": asked.epochs}, "seed": asked.seed}
    if loss is not None:
        tables["finetune"]["loss"] = f"{zoo.IN_MEMORY}:{OwnLoss(loss).name}"
    tables["model"] |= {"allow_untrained": looks_untrained(model), "task": task}
    if isinstance(metric, str):
        tables["model"]["metric"] = metric
    elif not callable(metric):
        raise UsageError(f"metric={metric!r} must be a name or a function of the network")
    form = form_for(model, forward)
    form = replace(form, normalise=normaliser(tables, asked.settings))
    if asked.keep_classes:
        tables["data"]["keep_classes"] = asked.keep_classes
    if asked.images is None:
        tables["data"]["source"] = SYNTHETIC
        shape, section = asked.input_shape or (), data_section(tables, asked.settings)
        count = section.synthetic_images
        calibration = noise_images(count, shape, form.normalise, seed=asked.seed)
    else:
        calibration = read_images(
            asked.images, form, "images", most=asked.max_images, seed=asked.seed
        )
    test_images = None if asked.test is None else read_images(asked.test, form, "test")
    parts = split_images(calibration, test_images)
    config = config_in_memory(tables, asked.settings, parts.score.pixels.shape)
    if config.model.device != AUTO:
        raise UsageError(f'the network decides where it runs: model.to("{config.model.device}")')
    if loss is not None and config.finetune.epochs == 0:
        raise UsageError("loss is for fine-tuning: pass epochs=3, too, or leave it out")
    network = with_forward(model, forward)
    network = with_inputs(network, calibration.inputs)
    few = calibration.pixels[:FIRST_IMAGES]
    network = working_copy(network, few[:2])
    notes: tuple[str, ...] = ()
    if config.model.reparameterize:
        folded = reparameterized(network, few[:2])
        notes = (NOTHING_TO_FOLD,) if folded is network else ()
        network = folded
    original = with_logits(network, few, config.model.task)
    run_context = replace(
        _run_context(shows_progress=asked.progress),
        criterion=passed_criterion,
        outputs=outputs,
        metric=None if isinstance(metric, str) else metric,
        loss=loss,
    )
    if asked.images is None and not is_estimate:
        calibration = synthetic_images(original, calibration, form.normalise, run_context)
        if test_images is not None and test_images.labels is not None:
            labels = test_images.labels
            calibration = with_predicted_labels(calibration, original, labels, config.model.task)
        parts = split_images(calibration, test_images)
    dataset = label_images(parts, original, config.model.task, asked.class_names)
    if asked.images is None:
        dataset = describe_synthetic(
            dataset, len(calibration.pixels), is_tested=test_images is not None
        )
    dataset = replace(dataset, notes=(*dataset.notes, *notes))
    dataset, original = cut_to_classes(dataset, original, config, make_reader(config, run_context))
    return original, dataset, config, run_context


def form_for(model: nn.Module, forward: Forward | None) -> Form:
    """Return what an image is for a network that may run through a function of the user's."""
    network = with_forward(without_wrappers(model), forward)
    return form_of(without_forward(network), forward, lambda images: can_run(network, images[:2]))


def _run_context(*, shows_progress: bool) -> RunContext:
    if not shows_progress:
        return RunContext()
    return RunContext(live_progress(), StageLines(print_to_stderr))


def _check_arguments(class_names: Sequence[str], **counts: int) -> None:
    """Raise `UsageError` if an argument is not a list of names or a number of things."""
    if isinstance(class_names, str):
        raise UsageError(f"class_names={class_names!r} must be a list of names, one for each class")
    for name, count in counts.items():
        least = 0 if name == "epochs" else 1
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise UsageError(f"{name}={count!r} must be a whole number, {least} or more")


def _output_parts(outputs: Sequence[OutputPart]) -> tuple[OutputPart, ...]:
    """Return `outputs` as a tuple. Raises `UsageError` if they are no parts."""
    parts = tuple(outputs) if isinstance(outputs, Sequence) else (outputs,)
    if not all(isinstance(part, OutputPart) for part in parts):
        raise UsageError(f"outputs={outputs!r} must be a list of OutputPart")
    return parts
