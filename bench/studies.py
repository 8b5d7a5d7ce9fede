"""The networks that studies prune, with their probe and their scored images."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.config import RunConfig
from secateur.data import Batch, DataSet
from secateur.pipeline import inputs
from secateur.runtime.module_state import evaluating

CIFAR10 = ("resnet20", "resnet32", "resnet56")
TARGETS = {"cifar10": ("macs=0.7", "macs=0.5"), "imagenet": ("macs=0.8",)}
PROBE_IMAGES = 2000
REFIT_POSITIONS = 16
"""Output positions an image in the refit: 256 give the same accuracy to within noise."""


def networks_of(study: str) -> tuple[str, ...]:
    """Names of the networks of a study."""
    if study == "cifar10":
        return CIFAR10
    from imagenet import NETWORKS

    return tuple(NETWORKS)


def load_inputs(
    study: str, network: str, arguments: argparse.Namespace
) -> tuple[RunConfig, DataSet, nn.Module]:
    """The resolved configuration of a network's run, the images, and the trained network.

    `arguments.data` and `arguments.weights` are the folders of the images and of the weights.
    """
    if study == "cifar10":
        config = cifar10(network, arguments)
        dataset, model = inputs.load_inputs(config)
    else:
        from imagenet import load_study

        config, dataset, model = load_study(network, arguments)
    return inputs.resolve_config(config, dataset), dataset, model


def cifar10(network: str, arguments: argparse.Namespace) -> RunConfig:
    """The run that a cell is a part of."""
    return RunConfig.model_validate(
        {
            "model": {
                "name": network,
                "weights": f"{arguments.weights}/cifar10_{network}.safetensors",
            },
            "data": {
                "source": f"cifar10:{arguments.data}",
                "calibration_images": PROBE_IMAGES,
                "stratified": False,
            },
            "refit": {"positions": REFIT_POSITIONS},
        }
    )


def channels_last(batches: Iterable[Batch]) -> list[Batch]:
    """The batches in the layout that convolutions take least time with."""
    return [
        replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        for batch in batches
    ]


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Share of the images that the network classifies right."""
    return share(answers(model, batches), labels(batches))


def answers(model: nn.Module, batches: Sequence[Batch]) -> Int[Tensor, "image"]:
    """The class that the network gives to each image, in evaluation mode."""
    with evaluating(model), torch.inference_mode():
        return torch.cat([model(batch.images).argmax(1) for batch in batches])


def labels(batches: Sequence[Batch]) -> Int[Tensor, "image"]:
    """The class of each image."""
    return torch.cat([batch.labels for batch in batches])


def share(one: Int[Tensor, "image"], other: Int[Tensor, "image"]) -> float:
    """Share of the images that have the same class in both."""
    return int((one == other).sum()) / len(one)
