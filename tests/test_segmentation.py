"""Segmentation from end to end: training, pruning with and without masks, drop, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import secateur
from secateur.config import BaseConfig, RunConfig
from secateur.experiments.run import run
from secateur.experiments.train_base import train_base
from secateur.models import zoo

CLASSES = ("dark", "bright", "void")
HEIGHT, WIDTH = 16, 24
NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.join = nn.Sequential(nn.Conv2d(28, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Conv2d(12, num_classes, 1)

    def forward(self, images):
        fine = self.fine(images)
        coarse = nn.functional.interpolate(self.coarse(fine), fine.shape[2:])
        logits = self.head(self.join(torch.cat([fine, coarse], 1)))
        return nn.functional.interpolate(logits, images.shape[2:], mode="bilinear")
"""


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Dark pictures with a bright rectangle; masks of where that is, and 2 in the first row."""
    images = torch.randint(0, 90, (count, 3, HEIGHT, WIDTH), generator=generator)
    masks = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.int64)
    for image, mask in zip(images, masks, strict=True):
        top, left = (int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(2))
        image[:, top : top + 7, left : left + 11] += 150
        mask[top : top + 7, left : left + 11] = 1
        mask[0] = 2
    return images.to(torch.uint8), masks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with masks in two parts, the code of a network, and its trained weights in `base`."""
    root = tmp_path_factory.mktemp("segmentation")
    (root / "net.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("val", 12)):
        for kind in ("", "_masks"):
            (root / "data" / f"{part}{kind}").mkdir(parents=True)
        for place, (image, mask) in enumerate(zip(*pictures(count, generator), strict=True)):
            path = root / "data" / part / f"{place}.png"
            Image.fromarray(image.movedim(0, 2).contiguous().numpy()).save(path)
            path = root / "data" / f"{part}_masks" / f"{place}.png"
            Image.fromarray(mask.to(torch.uint8).numpy()).save(path)
    (root / "data" / "classes.json").write_text(json.dumps(CLASSES))
    train_base(
        BaseConfig.model_validate(
            tables(root)
            | {
                "train": {
                    "epochs": 6,
                    "batch_size": 8,
                    "optimiser": "adamw",
                    "learning_rate": 0.02,
                    "warmup_steps": 0,
                    "crop": "random_crop",
                    "workers": 0,
                }
            }
        ),
        root / "base",
    )
    return root


def tables(root: Path) -> dict[str, dict[str, object]]:
    return {
        "model": {"name": f"{root}/net.py:Net"},
        "data": {
            "source": f"segmentation:{root}/data",
            "image_size": [HEIGHT, WIDTH],
            "fit": "stretch",
            "batch_size": 8,
        },
    }


def run_config(root: Path, **plan: object) -> RunConfig:
    content = tables(root)
    content["model"]["weights"] = f"{root}/base"
    return RunConfig.model_validate(content | {"plan": plan, "report": {"images": 8}})


def test_masks_are_trained_on_and_scored_by_their_mean_iou(folder: Path) -> None:
    recipe = json.loads((folder / "base" / "training.json").read_text())
    assert recipe["class_names"] == ["dark", "bright"]
    assert recipe["task"]["metric_name"] == "mIoU"
    assert recipe["score"]["metric"] > 0.8
    assert recipe["epochs"][-1]["loss"] < recipe["epochs"][0]["loss"]


def test_a_run_votes_by_the_class_maps_and_reports_them(folder: Path, tmp_path: Path) -> None:
    result = run(run_config(folder, target="macs=0.7"), tmp_path / "run")
    before, after = result.score("before"), result.score("refit")
    assert before is not None
    assert after is not None
    assert after.macs <= 0.7 * before.macs
    assert set(before.details) >= {"IoU dark", "IoU bright"}
    assert after.metric > before.metric - 0.2
    assert (result.concepts, result.task.kind) == ("outputs", "segmentation")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "with concepts from\n<strong>outputs</strong>" in page
    assert "mIoU" in page


def test_a_drop_of_mean_iou_sets_the_size(folder: Path, generator: torch.Generator) -> None:
    network = zoo.load(f"{folder}/net.py:Net", folder / "base", num_classes=2)
    images, masks = pictures(30, generator)
    masks[masks == 2] = -1
    settings = {"plan.max_drop": 10.0, "refit.layers": "none"}
    result = secateur.prune(
        network, [(images.float() / 255, masks)], class_names=CLASSES[:2], settings=settings
    )
    trials = result.result.size_trials
    assert len(trials) > 1
    assert result.result.task.metric_name == "mIoU"


def test_images_without_masks_are_enough(folder: Path, generator: torch.Generator) -> None:
    network = zoo.load(f"{folder}/net.py:Net", folder / "base", num_classes=2)
    images = pictures(30, generator)[0].float() / 255
    result = secateur.prune(network, images, target=0.6)
    assert not result.has_labels
    assert result.result.concepts == "outputs"
    assert result.scores["refit"].macs <= 0.6 * result.scores["before"].macs
    smaller = result.model(images[:2])
    assert smaller.shape == (2, 2, HEIGHT, WIDTH)


@pytest.mark.parametrize("concepts", ["evidence", "saliency", "outputs,colours"])
def test_other_sources_of_concepts(folder: Path, concepts: str, generator: torch.Generator) -> None:
    network = zoo.load(f"{folder}/net.py:Net", folder / "base", num_classes=2)
    images = pictures(20, generator)[0].float() / 255
    settings = {"refit.layers": "none", "refit.recalibrate_batchnorm": False}
    result = secateur.prune(network, images, target=0.7, concepts=concepts, settings=settings)
    assert result.result.concepts == concepts


def test_masks_in_python(folder: Path, generator: torch.Generator) -> None:
    network: nn.Module = zoo.load(f"{folder}/net.py:Net", folder / "base", num_classes=2)
    images, masks = pictures(30, generator)
    masks[masks == 2] = -1
    coarse = F.interpolate(masks[:, None].float(), scale_factor=0.5)[:, 0].long()
    result = secateur.prune(
        network, [(images.float() / 255, coarse)], target=0.7, class_names=CLASSES[:2]
    )
    assert set(result.scores["before"].details) >= {"IoU dark", "IoU bright"}
