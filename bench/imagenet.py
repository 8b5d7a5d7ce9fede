"""The study of `bench/criteria.py` on ImageNet networks, with the few images available.

Kernels are scored and refitted on training images: 800 of ten classes (`imagenette_subset/train`)
and one of each of the thousand classes (`imagenet_sample`). The score is a **10-class check**:
the 500 ILSVRC 2012 validation images of the ten classes, predicted over all 1,000 classes.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import nn

from imagenet_networks import NETWORKS, load_network
from secateur.config import RunConfig
from secateur.data import DataSet, FileImages, TensorImages
from secateur.data.preprocessing import Preprocessing

__all__ = ["NETWORKS", "load_study"]

IMAGE_SIZE = 224
CALIBRATION_IMAGES = 400
"""Of the 1,800 images that there are to draw from."""
BATCH_SIZE = 20
REFIT_POSITIONS = 16


def load_study(network: str, arguments: argparse.Namespace) -> tuple[RunConfig, DataSet, nn.Module]:
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
                "calibration_images": CALIBRATION_IMAGES,
                "stratified": False,
                "image_size": IMAGE_SIZE,
                "mean": expected.mean,
                "std": expected.std,
                "batch_size": BATCH_SIZE,
            },
            "refit": {"positions": REFIT_POSITIONS},
        }
    )
    dataset = read_images(Path(arguments.data))
    return config, dataset, load_network(network, Path(arguments.weights))


def read_images(folder: Path) -> DataSet:
    """Return training images for calibration, and validation images of ten classes to score."""
    subset = _listed(folder / "imagenette_subset", "", "imagenet_class_index")
    sample = _listed(folder / "imagenet_sample", "images", "class_index")
    train = [item for item in subset if item[0].parts[-3] == "train"] + sample
    scored = [item for item in subset if item[0].parts[-3] == "ilsvrc_val"]
    with (folder / "imagenet_sample" / "labels.tsv").open() as file:
        names = tuple(row["name"] for row in csv.DictReader(file, delimiter="\t"))
    nothing = TensorImages(
        torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.int64),
    )
    return DataSet("imagenet samples", names, _decoded(train), nothing, _decoded(scored))


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
