"""Whether a network fits its test data: better than chance, and with its classes in their order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import bdtr, bdtrc
from torch import Tensor, nn

from secateur.models.evaluate import Predictions
from secateur.models.task import Labels, Task
from secateur.runtime.errors import AccuracyError
from secateur.runtime.torch_internals import BatchNorm, Convolution

FEWEST_IMAGES = 20
"""From this number on classes in another order are looked for."""
MOST_CLASSES = 2000
"""Up to this number they are: with more it takes long."""
SHUFFLED_GAIN = 0.1
"""Fraction of images that another order must get right beyond those that are right as they are."""
NAMED_CLASSES = 3
CHECK = (
    "check that the weights belong to the network, and the class order, image size, mean and "
    "deviation and other preprocessing of the images"
)
CONTINUE_ANYWAY = "to continue anyway, add --allow-untrained (model.allow_untrained = true)"


@dataclass(frozen=True)
class Doubt:
    """A reason not to trust the scores of a network."""

    text: str
    remedy: str = ""
    """What to do before pruning makes sense; empty if it does anyway."""
    is_final: bool = False
    """Whether nothing can be measured before that is done."""

    def raise_unless(self, *, allowed: bool) -> None:
        """Raise `AccuracyError` if there is a remedy to try first, and it is not `allowed` not to.

        What can't be measured at all is never allowed.
        """
        if self.is_final or (self.remedy and not allowed):
            advice = "" if self.is_final else f"; {CONTINUE_ANYWAY}"
            raise AccuracyError(f"{self.text}: {self.remedy}{advice}")

    def note(self, start: str = "") -> str:
        """Return the doubt as a sentence for the user, with a `start` before it."""
        text = f"{start}{self.text}{f': {self.remedy}' if self.remedy else ''}."
        return text[0].upper() + text[1:]


def find_doubt_about(
    predictions: Predictions, task: Task, *, has_labels: bool, kind: str = "test"
) -> Doubt | None:
    """Return why a network's predictions of images of this `kind` look wrong, if they do."""
    if task.is_values or task.kind == "segmentation":
        return None
    predicted, labels = predictions.of_all_processes()
    if has_labels:
        return find_doubt(predicted, labels, predictions.class_count, kind)
    return find_constant(predicted, kind, is_binary=task.kind == "binary")


def find_doubt(predicted: Labels, labels: Labels, classes: int, kind: str = "test") -> Doubt | None:
    """Return why the predictions for labelled images of a `kind` look wrong, if they do.

    `classes` is how many the network distinguishes.
    """
    doubt = _shuffled(predicted, labels, classes, kind) or _chance(predicted, labels, classes, kind)
    if doubt is not None:
        return doubt
    if labels.ndim == 1 and len(labels.unique()) == 1 < len(labels):
        images = f"{len(labels)} {kind} images of class {int(labels[0])}"
        text = f"the network is scored on {images} alone, so accuracy says nothing of other classes"
        return Doubt(text)
    return find_constant(predicted, kind)


def find_constant(
    predicted: Labels, kind: str = "test", *, is_binary: bool = False
) -> Doubt | None:
    """Return a doubt if the predictions for all images are the same.

    Without labels nothing else can be noticed; the agreement with a single output of one sign would
    always be 100 %.
    """
    if len(predicted) < 2 or not bool((predicted == predicted[:1]).all()):
        return None
    count = len(predicted)
    if is_binary:
        sign = "above" if int(predicted[0]) else "not above"
        return Doubt(
            f"the network's one output is {sign} 0 for all {count} {kind} images, so agreement "
            "with it would be 100 % whatever is cut",
            "give images of both classes, with labels 0 and 1 if possible (an output that is not "
            "the logit of a class needs model.task or --task regression)",
            is_final=True,
        )
    text = f"the network predicts the same for all {count} {kind} images"
    return Doubt(f"{text}, so agreement with it says little")


def _chance(predicted: Tensor, labels: Tensor, classes: int, kind: str) -> Doubt | None:
    """Return a doubt if no more is right than by chance, or at most twice as much."""
    hits, count = int((predicted == labels).sum()), labels.numel()
    chance = expected_agreement(predicted, labels, classes)
    # A network that makes half of the errors of chance would rarely get as few right.
    are_enough = float(bdtr(hits, count, (1 + chance) / 2)) < 0.05
    if not are_enough or is_beyond_chance(predicted, labels, classes):
        return None
    what = "images" if labels.ndim == 1 else "labels"
    return Doubt(
        f"the network is right on {100 * hits / count:.1f} % of {count} {kind} {what}, and "
        f"chance is {100 * chance:.1f} %",
        CHECK,
    )


def is_beyond_chance(predicted: Labels, labels: Labels, classes: int) -> bool:
    """Return whether significantly more is right than by chance, and more than twice as much.

    With several labels for each image most are right by chance, so the latter is not asked.
    """
    hits, count = int((predicted == labels).sum()), labels.numel()
    chance = expected_agreement(predicted, labels, classes)
    is_significant = hits > 0 and float(bdtrc(hits - 1, count, chance)) < 0.01
    return is_significant and (labels.ndim > 1 or hits / count > twice(chance))


def twice(chance: float) -> float:
    """Return twice the accuracy of chance or, where that is above one half, twice its odds.

    Twice the odds of one half are two thirds.
    """
    return min(2 * chance, max(0.5, 2 * chance / (1 + chance)))


def expected_agreement(predicted: Labels, labels: Labels, classes: int) -> float:
    """Return how often predictions are right that don't depend on the image, as in Cohen's kappa.

    Labels of a single class can't tell: then it is one of all classes.
    """
    if labels.ndim > 1:
        often, true = predicted.double().mean(0), labels.double().mean(0)
        return float((often * true + (1 - often) * (1 - true)).mean())
    if len(labels.unique()) == 1:
        return 1 / classes
    size = int(max(predicted.max(), labels.max())) + 1
    often, true = (torch.bincount(part, minlength=size).double() for part in (predicted, labels))
    return float((often * true).sum()) / len(labels) ** 2


def _shuffled(predicted: Tensor, labels: Tensor, classes: int, kind: str) -> Doubt | None:
    """Return a doubt if far more is right once the network's classes are put in another order.

    The order is the best for every other image, and the others decide.
    """
    if len(labels) < FEWEST_IMAGES:
        return None
    columns = torch.arange(labels.shape[1]) if labels.ndim > 1 else torch.cat([predicted, labels])
    columns = columns.unique()
    if not 2 <= len(columns) <= MOST_CLASSES:
        return None
    outputs = _best_order(
        predicted[::2].contiguous(), labels[::2].contiguous(), columns
    )  # of each column
    predicted, labels = predicted[1::2], labels[1::2]
    if labels.ndim > 1:
        reordered = predicted[:, outputs]
    else:
        label_of = torch.zeros(int(columns.max()) + 1, dtype=torch.int64)
        label_of[outputs] = columns
        reordered = label_of[predicted]
    direct, after = predicted == labels, reordered == labels
    gained, lost = int((after & ~direct).sum()), int((direct & ~after).sum())
    # A sign test: if the order made no difference as many would be gained as lost.
    is_significant = gained > 0 and float(bdtrc(gained - 1, gained + lost, 0.5)) < 1e-3
    is_large = (gained - lost) / direct.numel() >= SHUFFLED_GAIN
    if not (is_large and is_significant and is_beyond_chance(reordered, labels, classes)):
        return None
    moves = zip(columns.tolist(), outputs.tolist(), strict=True)
    moved = [f"label {label} is output {output}" for label, output in moves if label != output]
    more = f" and {len(moved) - NAMED_CLASSES} more" if len(moved) > NAMED_CLASSES else ""
    before, now = (100 * float(hits.double().mean()) for hits in (direct, after))
    return Doubt(
        f"the network is right on {before:.1f} % of the {kind} images, but on {now:.1f} % "
        f"with its classes in another order ({', '.join(moved[:NAMED_CLASSES])}{more})",
        CHECK,
    )


def _best_order(predicted: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
    """Return for each of the columns the output that fits it best, each output once."""
    if labels.ndim > 1:  # for how many images each label equals each prediction
        true, often = labels.double(), predicted.double()
        table = true.T @ often + (1 - true).T @ (1 - often)
    else:  # how often each label gets each prediction
        size = len(columns)
        cells = torch.searchsorted(columns, labels) * size + torch.searchsorted(columns, predicted)
        table = torch.bincount(cells, minlength=size**2).reshape(size, size).double()
    _, matched = linear_sum_assignment(table.numpy(), maximize=True)
    order: Tensor = columns[torch.from_numpy(matched)]
    return order


def looks_untrained(model: nn.Module) -> bool:
    """Return whether a network's tensors are as torch initialises them.

    Its batch norms have seen no image or, if it has none, no weight of a convolution or a linear
    layer is beyond the bounds that torch draws them from.
    """
    means = [
        norm.running_mean
        for norm in model.modules()
        if isinstance(norm, BatchNorm) and norm.running_mean is not None
    ]
    if means:
        return not any(bool(mean.any()) for mean in means)
    layers = [layer for layer in model.modules() if isinstance(layer, Convolution | nn.Linear)]
    return all(_is_within_bounds(layer) for layer in layers)


def _is_within_bounds(layer: Convolution | nn.Linear) -> bool:
    """Return whether weights and biases are as small as Kaiming's uniform draw leaves them."""
    weight = layer.weight.detach()
    bound = 1.0001 / math.sqrt(weight[0].numel())
    tensors = [weight] if layer.bias is None else [weight, layer.bias.detach()]
    return all(float(tensor.abs().max()) <= bound for tensor in tensors)
