"""Networks that other packages build, from the command line: `smp:NAME` and `transformers:DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layouts import random_pixels
from secateur.cli import app
from secateur.data.images import FileImages
from secateur.experiments.run_folder import load_pruned
from secateur.integrations import transformers as saved_networks
from secateur.models.examine import form_of_outputs

SMALL = ("--image-size", "64", "--allow-untrained")
FAST = ("--no-finetune", "--set", "report.images=0")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return int(ended.value.code or 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of twelve images without labels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(random_pixels(12, 64, 64, 3, seed=0)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Twelve images with masks of three classes."""
    folder = tmp_path / "fields"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for number, pixels in enumerate(random_pixels(12, 64, 64, 3, seed=0)):
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        mask = numbers.integers(0, 3, (64, 64), dtype=np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


def save_classifier(folder: Path, *, with_weights: bool = True) -> Path:
    """Save a small ResNet of transformers with random weights, and how it takes images."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_labels=3
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    settings = {
        "size": {"shortest_edge": 56},
        "crop_pct": 0.875,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if not with_weights:
        (folder / "model.safetensors").unlink()
    return folder


def test_a_network_of_segmentation_models_is_pruned(
    masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    name = ("-m", "smp:Linknet/tu-tf_mobilenetv3_small_minimal_100", "--num-classes", 3)
    out = tmp_path / "run"
    options = ("-d", f"segmentation:{masks}", "-t", "macs=0.8", *SMALL, *FAST, "-o", out)
    code = run(monkeypatch, "prune", *name, *options)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "mIoU" in captured.out
    model = load_pruned(out)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_what_is_missing_in_a_name_of_segmentation_models_is_said(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    for name, words in (
        ("smp:Unet", "name the encoder, too: smp:Unet/resnet34"),
        ("smp:Unett/resnet18", "did you mean Unet"),
        ("smp:Unet/resnet19", "resnet18"),
        ("smp:Unet/tu-resnet19", "the package can't build it: Unknown model (resnet19)"),
        ("smp:PAN/vgg11", "the package can't build it: "),
        ("smp:Unet/resnet18", "needs the number of classes: --num-classes"),
    ):
        classes = () if name == "smp:Unet/resnet18" else ("--num-classes", 3)
        options = ("-d", f"images:{photos}", *classes, *SMALL)
        assert run(monkeypatch, "inspect", "-m", name, *options) == 2
        assert words in capsys.readouterr().err


def test_a_folder_of_transformers_is_pruned(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = save_classifier(tmp_path / "resnet"), tmp_path / "run"
    network = ("-m", f"transformers:{folder}", "-d", f"images:{photos}")
    options = ("-t", "macs=0.95", *SMALL, *FAST, "-o", out)
    assert run(monkeypatch, "prune", *network, *options) == 0, capsys.readouterr().err
    assert load_pruned(out)(torch.rand(2, 3, 64, 64)).logits.shape == (2, 3)
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] is None  # the images have no labels
    assert run(monkeypatch, "evaluate", out) == 0
    titles = [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert titles[:5] == ["images", "agreement", "MACs", "parameters", "latency"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 56}, "crop_pct": 0.875}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("BitImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 56}),
        ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 56}),
        ("PoolFormerImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": 56}),
        ("SegformerImageProcessor", {"do_normalize": False, "size": {"height": 64, "width": 64}}),
    ],
)
def test_images_are_read_as_the_folder_says(
    name: str, options: dict[str, object], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    picture = Image.fromarray(random_pixels(1, 6, 8, 3, seed=0)[0]).resize((128, 96), 3)
    picture.save(tmp_path / "a.png")
    processor = getattr(transformers, name)(**options)
    processor.save_pretrained(tmp_path)
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    preprocessing = saved_networks.preprocessing(str(tmp_path))
    images = FileImages((tmp_path / "a.png",), torch.zeros(1, dtype=torch.int64))
    image = preprocessing.normalise(images.read(torch.tensor([0]), preprocessing))
    assert image.shape == expected.shape
    # Other libraries resize: pixels differ by a little, not by where they are.
    assert float((image - expected).abs().mean()) < 0.02 * float(expected.std())


def test_logits_beside_boxes_are_those_of_the_boxes() -> None:
    logits, boxes = torch.rand(4, 10, 6), torch.rand(4, 10, 4)
    assert form_of_outputs({"logits": logits}, 4) == "maps"
    assert form_of_outputs({"logits": logits, "pred_boxes": boxes}, 4) == "values"
