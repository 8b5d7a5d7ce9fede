"""CIFAR-100 in torchvision's layout; CIFAR-10 is in `test_data`."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torchvision

from layouts import Pixels, random_pixels
from secateur import data
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.errors import DataError

NAMES = tuple(f"thing {number}" for number in range(100))
NATIVE = Preprocessing(32, 32)


def write_cifar100(
    directory: Path, monkeypatch: pytest.MonkeyPatch, *, names: int = 100, last: int = 99
) -> tuple[Pixels, list[int]]:
    """Two images a class to train with, with digests of their own; returns the training part."""
    folder = directory / "cifar-100-python"
    folder.mkdir()

    def write(name: str, content: object) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def entry(pixels: Pixels, labels: list[int]) -> dict[str, object]:
        flat = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        coarse = [label // 5 for label in labels]
        return {"data": flat, "fine_labels": labels, "coarse_labels": coarse}

    pixels, labels = random_pixels(200, 32, 32, 3), [*range(99), last, *range(100)]
    train = write("train", entry(pixels, labels))
    test = write("test", entry(pixels[:3], [7, 5, 3]))
    meta = {"fine_label_names": list(NAMES[:names]), "coarse_label_names": ["group"] * 20}
    meta_file = write("meta", meta)
    stored_as = torchvision.datasets.CIFAR100
    monkeypatch.setattr(stored_as, "train_list", [train])
    monkeypatch.setattr(stored_as, "test_list", [test])
    keys = {"filename": "meta", "key": "fine_label_names", "md5": meta_file[1]}
    monkeypatch.setattr(stored_as, "meta", keys)
    return pixels, labels


def test_fine_labels_and_their_names_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = write_cifar100(tmp_path, monkeypatch)
    for directory in (tmp_path, tmp_path / "cifar-100-python"):
        splits = data.READERS["cifar100"](directory)
        assert splits.class_names == NAMES
        assert splits.train.labels.tolist() == labels
        assert splits.test.labels.tolist() == [7, 5, 3]
        images = splits.train.read(torch.arange(200), NATIVE)
        assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_one_image_of_each_class_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar100(tmp_path, monkeypatch)
    dataset = data.load(f"cifar100:{tmp_path}")
    assert dataset.validation.labels.bincount().tolist() == 100 * [1]
    assert dataset.train.labels.bincount().tolist() == 100 * [1]


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_every_file_is_checked_before_it_is_unpickled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar100(tmp_path, monkeypatch)
    with (tmp_path / "cifar-100-python" / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=f"CIFAR-100 in {tmp_path} is incomplete or damaged"):
        data.load(f"cifar100:{tmp_path}")


def test_a_missing_file_is_an_incomplete_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar100(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "test").unlink()
    with pytest.raises(DataError, match=f"CIFAR-100 in {tmp_path} is incomplete or damaged"):
        data.load(f"cifar100:{tmp_path}")


def test_a_label_out_of_range_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, monkeypatch, last=100)
    with pytest.raises(DataError, match=f"{tmp_path} has a label outside 0 to 99"):
        data.load(f"cifar100:{tmp_path}")


def test_names_must_be_a_hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, monkeypatch, names=98)
    with pytest.raises(DataError, match=f"{tmp_path} has 98 class names, not 100"):
        data.load(f"cifar100:{tmp_path}")


def test_a_folder_without_it_is_an_error_with_the_expected_files(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"no CIFAR-100 in .*: expected .* cifar-100-python"):
        data.load(f"cifar100:{tmp_path}")
