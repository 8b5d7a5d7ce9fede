"""The networks that studies prune, with their calibration and scored images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from measurements import Measurement
from secateur.config import RunConfig
from secateur.data import Batch, DataSet
from secateur.graph.module_state import evaluating
from secateur.pipeline import inputs

CIFAR10 = ("resnet20", "resnet32", "resnet56")
TARGETS = {"cifar10": ("macs=0.7", "macs=0.5"), "imagenet": ("macs=0.8",)}
CALIBRATION_IMAGES = 2000
REFIT_POSITIONS = 16
"""Output positions an image in the refit: 256 give the same accuracy to within noise."""
IMAGENET_CALIBRATION = "300 images"
"""Of the studies of widths, engines and actions, as in `imagenet.CALIBRATIONS`."""


def study_parser(doc: str | None, networks: Mapping[str, Sequence[str]]) -> argparse.ArgumentParser:
    """Return a parser of which study to run, on what images and weights, of which networks.

    `networks` are the networks by study, and `doc` is the text of `--help`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=sorted(networks), nargs="?", default="cifar10")
    parser.add_argument("--data", help="the folder of CIFAR-10, or that of the ImageNet samples")
    parser.add_argument("--weights", type=Path, help="the folder of the weights")
    parser.add_argument("--networks", default="*", help="pattern of networks")
    return parser


def networks_of(study: str) -> tuple[str, ...]:
    """Return the names of a study's networks."""
    if study == "cifar10":
        return CIFAR10
    from imagenet import NETWORKS

    return tuple(NETWORKS)


def load_inputs(
    study: str, network: str, arguments: argparse.Namespace
) -> tuple[RunConfig, DataSet, nn.Module]:
    """Return the resolved configuration of a network's run, the images, and the trained network.

    `arguments.data` and `arguments.weights` are the folders of the images and of the weights.
    """
    if study == "cifar10":
        config = cifar10(network, arguments)
        dataset, model = inputs.load_inputs(config)
    else:
        from imagenet import load_study

        config, dataset, model = load_study(network, arguments)
    return inputs.resolve_config(config, dataset, model), dataset, model


def load_study_network(
    network: str, arguments: argparse.Namespace
) -> tuple[RunConfig, DataSet, nn.Module]:
    """Return the configuration of a network's run, the images, and the trained network.

    ImageNet's networks are calibrated on `IMAGENET_CALIBRATION`.
    """
    if arguments.study == "cifar10":
        return load_inputs("cifar10", network, arguments)
    from imagenet import CALIBRATIONS, load_study

    config, dataset, model = load_study(network, arguments, CALIBRATIONS[IMAGENET_CALIBRATION])
    return inputs.resolve_config(config, dataset, model), dataset, model


def cifar10(network: str, arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration of a CIFAR-10 run."""
    return RunConfig.model_validate(
        {
            "model": {
                "name": network,
                "weights": f"{arguments.weights}/cifar10_{network}.safetensors",
            },
            "data": {
                "source": f"cifar10:{arguments.data}",
                "calibration_images": CALIBRATION_IMAGES,
                "stratified": False,
            },
            "refit": {"positions": REFIT_POSITIONS},
        }
    )


def search_budget(
    attempt: Callable[[float], Measurement], time_left: float, near: float, attempts: int
) -> Measurement:
    """Return the measurement whose `time_left` is nearest to the wanted one, with its `budget`.

    `attempt` prunes to a budget and measures. The search ends when the time is nearer than `near`,
    or after so many `attempts`.
    """
    budget, points = time_left, [(1.0, 1.0)]
    best: Measurement = {}
    for _ in range(attempts):
        row = {"budget": budget, **attempt(budget)}
        print(row, flush=True)
        distance = abs(row["time_left"] - time_left)
        if not best or distance < abs(best["time_left"] - time_left):
            best = row
        if distance < near:
            break
        points.append((budget, row["time_left"]))
        budget = min(0.95, max(0.1, next_budget(points, time_left)))
    return best


def next_budget(points: list[tuple[float, float]], time_left: float) -> float:
    """Return the budget at which the line through two points has the wanted time.

    `points` are budgets with their times. The two are the nearest ones on both sides of the wanted
    time; where one side has none, the two nearest ones, whose noise may point anywhere.
    """
    below = [point for point in points if point[1] <= time_left]
    above = [point for point in points if point[1] > time_left]
    if below and above:
        (x0, y0), (x1, y1) = max(below, key=by_time), min(above, key=by_time)
    else:
        (x0, y0), (x1, y1) = sorted(points, key=lambda point: abs(point[1] - time_left))[:2]
    rise = (y1 - y0) / (x1 - x0) if x1 != x0 else 1.0
    return x0 + (time_left - y0) / (rise if abs(rise) > 0.1 else 1.0)


def by_time(point: tuple[float, float]) -> float:
    """Return the time of a budget."""
    return point[1]


def channels_last(batches: Iterable[Batch]) -> list[Batch]:
    """Return the batches in the memory layout in which convolutions are fastest."""
    return [
        replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        for batch in batches
    ]


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the fraction of images that the network classifies correctly."""
    return fraction_equal(predictions(model, batches), labels(batches))


def predictions(model: nn.Module, batches: Sequence[Batch]) -> Int[Tensor, "image"]:
    """Return the class that the network predicts for each image, in evaluation mode."""
    with evaluating(model), torch.inference_mode():
        return torch.cat([model(batch.images).argmax(1) for batch in batches])


def labels(batches: Sequence[Batch]) -> Int[Tensor, "image"]:
    """Return the class of each image."""
    return torch.cat([batch.labels for batch in batches])


def fraction_equal(one: Int[Tensor, "image"], other: Int[Tensor, "image"]) -> float:
    """Return the fraction of images that have the same class in both."""
    return int((one == other).sum()) / len(one)
