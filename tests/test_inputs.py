"""Images come at the size and with the channels that a network takes, or a line says why not."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import secateur
from layouts import random_pixels, tiff_of, write_image
from secateur import data
from secateur.cli import app
from secateur.config import RunConfig, from_dict
from secateur.data import FileImages, TensorImages
from secateur.data.images import stored_size
from secateur.data.preprocessing import Preprocessing, to_grey
from secateur.experiments.manifest import read_manifest
from secateur.pipeline.input_fit import fit_channels
from secateur.pipeline.inputs import describe_inputs, load_inputs, resolve_config
from secateur.runtime.errors import DataError, UsageError

FLEXIBLE = """
from torch import nn
def net(num_classes=2):
    return nn.Sequential(
        nn.Conv2d({channels}, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""
FIXED = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, 4, 1)
        self.f = nn.Linear(8 * {side} * {side}, num_classes)
    def forward(self, x):
        return self.f(self.c(x).relu().{flatten})
net = Net
"""


def write_folder(folder: Path, *shape: int, count: int = 20) -> str:
    for name in ("ant", "bee"):
        for number in range(count):
            write_image(folder / name / f"{number}.png", random_pixels(*shape, seed=number))
    return f"folder:{folder}"


def config_of(text: str, source: str, folder: Path, **data_section: object) -> RunConfig:
    # A name of its own for every text: Python's bytecode of a file is known by size and second.
    path = folder / f"net_{zlib.crc32(text.encode()):x}.py"
    path.write_text(text)
    tables = {
        "model": {"name": f"{path}:net"},
        "data": {"source": source, **data_section},
        "finetune": {"epochs": 0},
        "report": {"images": 0},
    }
    return from_dict(tables, RunConfig)


def resolved(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    dataset, model = load_inputs(config)
    result = resolve_config(config, dataset, model)
    return result, describe_inputs(config, result, dataset)


# Sizes


@pytest.mark.parametrize("side", [24, 32, 50])
def test_images_of_one_size_are_read_at_that_size(side: int, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", side, side, 3)
    config, notices = resolved(config_of(FLEXIBLE.format(channels=3), source, tmp_path))
    assert config.data.image_size == side
    assert f"Images are read at {side}×{side}, the size that they are stored in" in notices[-1]
    dataset = data.load(source)
    images = dataset.train.read(torch.tensor([0]), Preprocessing(side, 99, keeps_exact=True))
    assert torch.equal(images[0], dataset.train.originals(torch.tensor([0]))[0])


def test_images_of_several_sizes_are_read_at_224(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", 32, 32, 3)
    write_image(tmp_path / "photos" / "ant" / "0.png", random_pixels(40, 40, 3))
    config, notices = resolved(config_of(FLEXIBLE.format(channels=3), source, tmp_path))
    assert config.data.image_size == 224
    assert "Images of several sizes are read at 224×224: if the network" in notices[-1]


def test_images_that_are_not_square_are_read_at_224(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", 30, 40, 3)
    config, notices = resolved(config_of(FLEXIBLE.format(channels=3), source, tmp_path))
    assert config.data.image_size == 224
    assert "Images of 40×30 are read at 224×224" in notices[-1]


def test_a_size_that_is_given_and_networks_of_the_zoo_keep_theirs(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", 40, 40, 3)
    text = FLEXIBLE.format(channels=3)
    config, notices = resolved(config_of(text, source, tmp_path, image_size=48))
    assert config.data.image_size == 48
    assert notices == ()
    config = from_dict({"model": {"name": "resnet20"}, "data": {"source": source}}, RunConfig)
    config, notices = resolved(config)
    assert config.data.image_size == 32
    assert notices == ()


def test_sizes_of_images_in_memory_in_files_and_of_none(tmp_path: Path) -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    assert stored_size(TensorImages(torch.zeros(3, 3, 5, 7, dtype=torch.uint8), labels)) == (5, 7)
    assert stored_size(FileImages((), labels[:0])) is None
    write_folder(tmp_path, 5, 7, 3)
    paths = tuple(sorted((tmp_path / "ant").iterdir()))[:3]
    assert stored_size(FileImages(paths, labels)) == (5, 7)
    paths[1].write_bytes(b"damaged")
    assert stored_size(FileImages(paths, labels)) == (5, 7)


@pytest.mark.parametrize(
    ("flatten", "cause"),
    [("flatten(1)", "cannot be multiplied"), ("reshape(-1, 512)", "for 2 images it returns 98")],
)
def test_the_message_names_the_size_that_images_come_at(
    flatten: str, cause: str, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "photos", 30, 40, 3)
    text = FIXED.format(side=8, flatten=flatten)
    message = (
        r"can't be run on images of 224×224 \(data.image_size\) with 3 channels: it can at "
        rf"--image-size 32. .*{cause}"
    )
    with pytest.raises(UsageError, match=message):
        resolved(config_of(text, source, tmp_path))
    config, _ = resolved(config_of(text, source, tmp_path, image_size=32))
    assert config.data.image_size == 32


@pytest.mark.parametrize(
    ("layers", "least"),
    [((nn.Conv2d(3, 4, 11, 4), nn.MaxPool2d(5)), 27), ((nn.Conv2d(3, 1, 21, 8),), 21)],
)
def test_the_message_names_the_smallest_size(layers: tuple[nn.Module, ...], least: int) -> None:
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert fit_channels(network, (least, least)) == 3
    message = f"of 16×16 .*: it needs at least {least}×{least}, so pass --image-size {least} or"
    with pytest.raises(UsageError, match=message):
        fit_channels(network, (16, 16))


def test_a_network_that_runs_at_no_size_says_why() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(5, 4, 3))
    with pytest.raises(UsageError, match=r"of 32×32 .* 3 channels: .* expected input.* 5 channels"):
        fit_channels(network, (32, 32))


# Channels


def test_grey_is_what_pillow_makes_of_colours() -> None:
    pixels = random_pixels(16, 16, 3)
    grey = to_grey(torch.from_numpy(pixels).movedim(-1, 0)[None])
    assert torch.equal(grey[0, 0], torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))))


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 3)], ids=["grey files", "files in colours"])
def test_a_network_of_one_channel_gets_grey(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", *shape)
    config, notices = resolved(config_of(FLEXIBLE.format(channels=1), source, tmp_path))
    assert config.data.mean == (0.449,)
    assert config.data.std == (0.226,)
    assert "The network takes one channel, so images are read in grey" in notices[-1]


def test_means_of_grey_and_of_colours(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", 16, 16, 3)
    grey, colour = (FLEXIBLE.format(channels=channels) for channels in (1, 3))
    config, notices = resolved(
        config_of(grey, source, tmp_path, mean=[0.5], std=[0.25, 0.25, 0.25])
    )
    assert (config.data.mean, config.data.std) == ((0.5,), (0.25,))
    assert not any("in grey" in notice for notice in notices)
    config, _ = resolved(config_of(colour, source, tmp_path, mean=[0.5]))
    assert config.data.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match=r"data\.std has 3 values, but the network takes one chan"):
        resolved(config_of(grey, source, tmp_path, std=[0.1, 0.2, 0.3]))
    for text, needed in ((grey, "one channel: give one"), (colour, "three channels: give three")):
        config = config_of(text, source, tmp_path, mean=[0.5, 0.4])
        with pytest.raises(UsageError, match=f"data.mean has 2 values, but .* takes {needed}"):
            resolved(config)
    with pytest.raises(UsageError, match=r"data\.mean: must be at most 3 values"):
        config_of(grey, source, tmp_path, mean=[0.5, 0.5, 0.5, 0.5])


def test_more_channels_are_for_python(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "photos", 16, 16, 3)
    message = "takes images with 4 channels, but image files are read with 3 .*: use secateur.prune"
    with pytest.raises(UsageError, match=message):
        resolved(config_of(FLEXIBLE.format(channels=4), source, tmp_path))


def test_grey_networks_are_pruned_saved_and_loaded_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "photos", 16, 16)
    config = config_of(FLEXIBLE.format(channels=1), source, tmp_path)
    arguments = ["-m", config.model.name, "-d", source, "-o", tmp_path / "run", "--no-finetune"]
    options = ["--calibration-images", 20, "--allow-untrained", "--set", "report.images=0"]
    monkeypatch.setattr(sys, "argv", ["secateur", "prune", *map(str, (*arguments, *options))])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0
    assert "images are read in grey" in " ".join(capsys.readouterr().out.split())
    dataset, model = load_inputs(config)
    manifest = read_manifest(tmp_path / "run")
    assert manifest.image_shape == (1, 16, 16)
    images = torch.rand(2, 1, 16, 16)
    program = secateur.load_program(tmp_path / "run")
    whole = secateur.load(tmp_path / "run", architecture=model)
    assert torch.equal(program(images), whole(images))
    assert isinstance(dataset.train, FileImages)
    read = dataset.train.read(torch.tensor([0]), Preprocessing(16, 16))
    normalised = Preprocessing(16, 16, (0.5,), (0.25,)).normalise(read)
    expected = Image.open(dataset.train.paths[0])
    torch.testing.assert_close(
        normalised[0, 0], (torch.from_numpy(np.array(expected)) / 255 - 0.5) / 0.25
    )


def test_files_of_other_depths_are_read_or_named(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for number in range(4):
            pixels = random_pixels(8, 8, 4, seed=number)
            write_image(tmp_path / name / f"{number}.png", pixels)  # RGBA
            deep = pixels[..., 0].astype(np.uint16) * 257
            Image.fromarray(deep).save(tmp_path / name / f"{number}.tif")
    dataset = data.load(f"folder:{tmp_path}")
    count = len(dataset.train.labels)
    assert dataset.train.read(torch.arange(count), Preprocessing(8, 8)).shape == (count, 3, 8, 8)
    for path in (tmp_path / "ant").glob("*.tif"):
        path.write_bytes(tiff_of(bands=5))
    with pytest.raises(DataError, match=r"ant/\d.tif can't be read: it is a TIFF whose bands or"):
        dataset.train.read(torch.arange(count), Preprocessing(8, 8))
