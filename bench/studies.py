"""The networks that studies prune, with their calibration and scored images."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.config import RunConfig
from secateur.data import Batch, DataSet
from secateur.graph.module_state import evaluating
from secateur.pipeline import inputs

CIFAR10 = ("resnet20", "resnet32", "resnet56")
TARGETS = {"cifar10": ("macs=0.7", "macs=0.5"), "imagenet": ("macs=0.8",)}
CALIBRATION_IMAGES = 2000
REFIT_POSITIONS = 16
"""Output positions an image in the refit: 256 give the same accuracy to within noise."""


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
