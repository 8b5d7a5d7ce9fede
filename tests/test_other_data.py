"""Data without labels, in arrays, and from a function of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from secateur import data
from secateur.cli import app
from secateur.data import NormalisedImages
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.errors import DataError, UsageError

NETWORKS = """
import torch
from torch import nn

torch.manual_seed(0)


def signal():
    return nn.Sequential(
        nn.Conv1d(2, 12, 5, padding=2), nn.ReLU(), nn.Conv1d(12, 8, 5, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()


def picture():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()


def pair():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 2, 32, generator=generator)
    return [(images[:40], torch.arange(40) % 3)], [(images[40:], torch.arange(20) % 3)]


def alone():
    return torch.randn(80, 2, 32, generator=torch.Generator().manual_seed(0))


def named():
    images, labels = torch.rand(80, 3, 16, 16), torch.arange(80) % 3
    dataset = torch.utils.data.TensorDataset(images, labels)
    return {"train": dataset, "class_names": ["a", "b", "c"]}


def misnamed():
    return {"train": alone(), "validation": alone()}


def broken():
    raise FileNotFoundError("no such disk")
"""
EVERY = torch.arange


def invoke(*words: object) -> None:
    with (
        mock.patch("sys.argv", ["secateur", *map(str, words)]),
        pytest.raises(SystemExit) as stop,
    ):
        app.main()
    assert stop.value.code == 0


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    file = tmp_path / "net.py"
    file.write_text(NETWORKS)
    return file


def write_images(folder: Path, count: int, *, side: int = 16) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(count)
    for number in range(count):
        pixels = generator.integers(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


def test_images_without_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "b", 24)
    write_images(tmp_path / "c", 16)
    (tmp_path / "c" / "notes.txt").write_text("nothing")
    dataset = data.load(f"images:{tmp_path}")
    assert (dataset.kind, dataset.has_labels, dataset.class_names) == ("none", False, ())
    assert [len(part) for part in dataset.all_labels] == [29, 3, 8]
    assert "every 5th image is held out" in dataset.notes[0]
    assert "1 file was passed over: 1 .txt" in dataset.notes[1]
    assert dataset.train.read_targets(EVERY(3), Preprocessing(8, 8)) is None
    assert dataset.train.read_labels(EVERY(3), Preprocessing(8, 8)).tolist() == [0, 0, 0]


def test_images_without_labels_are_parted(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "deep", 20)
    write_images(tmp_path / "val", 5)
    dataset = data.load(f"images:{tmp_path}")
    assert [len(part) for part in dataset.all_labels] == [18, 2, 5]
    assert "val is the test part" in dataset.notes[0]


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 6)
    with pytest.raises(DataError, match="has 6 images, too few: give at least 10"):
        data.load(f"images:{tmp_path}")


def arrays_of(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def test_arrays_in_one_file(tmp_path: Path) -> None:
    inputs, labels = arrays_of(40, 2, 32), np.arange(40) % 3
    np.savez(tmp_path / "set.npz", x=inputs, y=labels)
    dataset = data.load(f"arrays:{tmp_path / 'set.npz'}")
    assert (dataset.kind, dataset.has_labels, len(dataset.class_names)) == ("classes", True, 3)
    assert isinstance(dataset.train, NormalisedImages)
    assert [len(part) for part in dataset.all_labels] == [28, 3, 9]
    first = dataset.train.read(torch.tensor([0]), Preprocessing(8, 8))[0]
    (place,) = np.flatnonzero((inputs == first.numpy()).all(axis=(1, 2)))
    assert labels[place] == dataset.train.labels[0]
    assert dataset.stored_size is None


@pytest.mark.parametrize(
    ("labels", "kind", "classes"),
    [
        (np.zeros((30, 4), dtype=np.int64), "classes", 4),
        (np.zeros((30, 8, 8), dtype=np.uint8) + 1, "masks", 2),
        (arrays_of(30), "values", 0),
        (arrays_of(30, 3, 8, 8), "values", 0),
        (None, "none", 0),
    ],
)
def test_arrays_in_a_folder(tmp_path: Path, labels: Any, kind: str, classes: int) -> None:
    np.save(tmp_path / "train_images.npy", arrays_of(30, 3, 8, 8))
    np.save(tmp_path / "images_test.npy", arrays_of(30, 3, 8, 8, seed=1))
    if labels is not None:
        np.save(tmp_path / "train_labels.npy", labels)
        np.save(tmp_path / "test_y.npy", labels)
    dataset = data.load(f"arrays:{tmp_path}")
    assert dataset.kind == kind
    assert len(dataset.class_names) == classes
    assert dataset.has_labels == (labels is not None)
    read = dataset.test.read_labels(EVERY(30), Preprocessing(8, 8))
    assert torch.equal(
        read, torch.from_numpy(np.zeros(30, int) if labels is None else labels).to(read)
    )
    assert dataset.stored_size == (8, 8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": arrays_of(9, 2, 8), "b": arrays_of(9, 2, 8)}, "has no inputs: call the array x"),
        ({"x": np.zeros((9, 2, 8), np.uint8)}, "inputs are uint8: save them as float32"),
        ({"x": arrays_of(9, 2)}, r"inputs must be numbers \[image, channel, …\]"),
        ({"x": arrays_of(9, 2, 8) * np.nan}, "an input holds a number that is not finite"),
        ({"x": arrays_of(9, 2, 8), "y": np.arange(8)}, r"9 inputs with labels int64 \[8\]"),
        ({"x": arrays_of(9, 2, 8), "y": np.arange(9) - 3}, "are no class numbers"),
        ({"x": arrays_of(9, 2, 8), "test_x": arrays_of(9, 2, 4)}, "inputs of train are"),
        ({"x": np.array([None])}, "can't be read"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        data.load(f"arrays:{tmp_path / 'set.npz'}")


def test_files_that_hold_no_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .npy or .npz files"):
        data.load(f"arrays:{tmp_path}")
    (tmp_path / "x.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"x.npy can't be read"):
        data.load(f"arrays:{tmp_path}")
    (tmp_path / "x.mat").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"x.mat is neither .npy nor .npz"):
        data.load(f"arrays:{tmp_path / 'x.mat'}")


PRUNE = ("--allow-untrained", "-t", "macs=0.6", "--no-finetune", "--set", "report.images=0")


def test_signals_in_arrays_are_pruned_on_the_command_line(tmp_path: Path, networks: Path) -> None:
    np.savez(tmp_path / "set.npz", x=arrays_of(80, 2, 32), y=np.arange(80) % 3)
    source, out = f"arrays:{tmp_path / 'set.npz'}", tmp_path / "run"
    invoke("prune", "-m", f"{networks}:signal", "-d", source, *PRUNE, "-o", out)
    assert json.loads((out / "manifest.json").read_text())["image_shape"] == [2, 32]


@pytest.mark.parametrize("loader", ["pair", "alone", "named"])
def test_a_loader_of_the_users_own(tmp_path: Path, networks: Path, loader: str) -> None:
    network = "picture" if loader == "named" else "signal"
    source, out = f"{networks}:{loader}", tmp_path / "run"
    invoke("prune", "-m", f"{networks}:{network}", "-d", source, *PRUNE, "-o", out)
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["data"]["source"] == source
    assert result["stages"][-1]["stage"] == "refit"


def test_what_is_wrong_with_a_loader(tmp_path: Path, networks: Path) -> None:
    from secateur.pipeline.user_data import call_loader

    with pytest.raises(DataError, match="returns validation: expected train, test, class_names"):
        call_loader(f"{networks}:misnamed")
    with pytest.raises(UsageError, match="broken failed: FileNotFoundError: no such disk"):
        call_loader(f"{networks}:broken")


def test_unlabelled_images_on_the_command_line(tmp_path: Path, networks: Path) -> None:
    write_images(tmp_path / "photos", 80)
    out = tmp_path / "run"
    source = f"images:{tmp_path / 'photos'}"
    invoke("prune", "-m", f"{networks}:picture", "-d", source, *PRUNE, "-o", out)
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["data"]["image_size"] == 16
