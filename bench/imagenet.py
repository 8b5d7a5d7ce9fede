"""The studies of `bench/criteria.py` and `bench/training_free.py` on ImageNet networks.

Kernels are scored and refitted on training images: one of each of the thousand classes
(`imagenet_sample`), or besides these 800 of ten classes (`imagenette_subset/train`). The score is a
**10-class check**: the 500 ILSVRC 2012 validation images of the ten classes, predicted over all
1,000 classes. So calibration images of the ten classes favour the score.
"""

from __future__ import annotations

import argparse
import csv
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from imagenet_networks import NETWORKS, load_network
from secateur.config import RunConfig
from secateur.data import DataSet, FileImages, Images, TensorImages
from secateur.data.preprocessing import Preprocessing

__all__ = ["CALIBRATIONS", "NETWORKS", "load_study"]

IMAGE_SIZE = 224
BATCH_SIZE = 20
REFIT_POSITIONS = 16


@dataclass(frozen=True)
class Calibration:
    """Which images calibration sets are drawn from, and how many."""

    images: int
    has_tested_classes: bool
    """Whether 800 of the 1,800 images to draw from show the ten classes that are tested; without
    them, 10 of 1,000 do."""


CRITERIA_CALIBRATION = Calibration(400, has_tested_classes=True)
CALIBRATIONS = {
    "300 images": Calibration(300, has_tested_classes=False),
    "900 images": Calibration(900, has_tested_classes=False),
    "300 images, tested classes": Calibration(300, has_tested_classes=True),
    "900 images, tested classes": Calibration(900, has_tested_classes=True),
}


def load_study(
    network: str, arguments: argparse.Namespace, calibration: Calibration = CRITERIA_CALIBRATION
) -> tuple[RunConfig, DataSet, nn.Module]:
    """Return the configuration of a run, the images, and the network with its weights.

    `arguments.data` is the folder of `imagenette_subset` and `imagenet_sample`, `arguments.weights`
    that of the staged weights.
    """
    expected = NETWORKS[network]
    config = RunConfig.model_validate(
        {
            "model": {"name": f"{Path(__file__).with_name('imagenet_networks.py')}:{network}"},
            "data": {
                "source": "imagenet samples",
                "calibration_images": calibration.images,
                "stratified": False,
                "image_size": IMAGE_SIZE,
                "mean": expected.mean,
                "std": expected.std,
                "batch_size": BATCH_SIZE,
            },
            "refit": {"positions": REFIT_POSITIONS},
        }
    )
    dataset = read_images(Path(arguments.data), calibration.has_tested_classes)
    return config, dataset, load_network(network, Path(arguments.weights))


def read_images(folder: Path, has_tested_classes: bool = True) -> DataSet:
    """Return training images for calibration, and validation images of ten classes to score.

    The images that agreement is measured on, one of each class, are the validation part.
    """
    images = _read(folder)
    with (folder / "imagenet_sample" / "labels.tsv").open() as file:
        names = tuple(row["name"] for row in csv.DictReader(file, delimiter="\t"))
    train = images["with tested classes" if has_tested_classes else "sample"]
    return DataSet("imagenet samples", names, train, images["sample"], images["scored"])


def unused(images: Images, calibration: Images) -> Images:
    """Return the images of classes that no calibration image has."""
    return images.take((~torch.isin(images.labels, calibration.labels)).nonzero()[:, 0])


@functools.cache
def _read(folder: Path) -> dict[str, TensorImages]:
    """Return the images of a folder in memory."""
    subset = _listed(folder / "imagenette_subset", "", "imagenet_class_index")
    sample = _listed(folder / "imagenet_sample", "images", "class_index")
    files = {
        "sample": sample,
        "with tested classes": [item for item in subset if item[0].parts[-3] == "train"] + sample,
        "scored": [item for item in subset if item[0].parts[-3] == "ilsvrc_val"],
    }
    return {name: _decoded(listed) for name, listed in files.items()}


def _listed(folder: Path, images: str, column: str) -> list[tuple[Path, int]]:
    """Return the image files of a folder, each with the index of its class."""
    with (folder / "labels.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [(folder / images / row["file"], int(row[column])) for row in rows]


def _decoded(files: list[tuple[Path, int]]) -> TensorImages:
    """Return the images in memory, with the shorter side at 224 pixels and cropped to the centre.

    Those of `imagenette_subset` already have that size and are not resized again.
    """
    paths = tuple(path for path, _ in files)
    labels = torch.tensor([label for _, label in files])
    pixels = FileImages(paths, labels).read(
        torch.arange(len(files)), Preprocessing(IMAGE_SIZE, IMAGE_SIZE)
    )
    return TensorImages(pixels, labels)
