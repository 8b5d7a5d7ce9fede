"""Fashion-MNIST in torchvision's raw layout."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from layouts import Pixels, prune_briefly, random_pixels
from secateur import data
from secateur.data.fashion_mnist import CLASS_NAMES
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.errors import DataError

NATIVE = Preprocessing(28, 28)


def idx(values: Pixels) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def write_fashion_mnist(directory: Path, *, compressed: bool = True) -> None:
    """Five images a class to train with, two to test with."""
    directory.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 5), ("t10k", 2)):
        labels = np.tile(np.arange(10, dtype=np.uint8), count)
        pixels = random_pixels(10 * count, 28, 28, seed=count)
        for name, content in (("images-idx3", idx(pixels)), ("labels-idx1", idx(labels))):
            if compressed:
                (directory / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (directory / f"{part}-{name}-ubyte").write_bytes(content)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("below", ["FashionMNIST/raw", "raw", "."])
def test_every_layout_is_read(compressed: bool, below: str, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / below, compressed=compressed)
    splits = data.READERS["fashion-mnist"](tmp_path)
    assert splits.class_names == CLASS_NAMES
    assert splits.train.labels.tolist() == 5 * list(range(10))
    assert splits.test.labels.tolist() == 2 * list(range(10))
    pixels = splits.train.read(torch.arange(50), NATIVE)
    expected = torch.from_numpy(random_pixels(50, 28, 28, seed=5))
    assert torch.equal(pixels, expected[:, None].expand(-1, 3, -1, -1))


def test_images_equal_those_that_torchvision_reads(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", compressed=False)
    splits = data.READERS["fashion-mnist"](tmp_path)
    for images, is_training in ((splits.train, True), (splits.test, False)):
        stored = torchvision.datasets.FashionMNIST(str(tmp_path), train=is_training)
        assert torch.equal(images.read(torch.arange(20), NATIVE)[:, 1], stored.data[:20])
        assert torch.equal(images.labels, stored.targets)
    assert list(splits.class_names) == torchvision.datasets.FashionMNIST.classes


def test_the_whole_method_runs_on_it(model_file: Path, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    result = prune_briefly(model_file, f"fashion-mnist:{tmp_path}", tmp_path / "run")
    assert result.class_names == CLASS_NAMES
    assert {stage.score.images for stage in result.stages} == {20}


def _no_labels(raw: Path) -> None:
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()


def _truncated(raw: Path) -> None:
    file = raw / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])


def _no_gzip(raw: Path) -> None:
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"nothing")


def _garbled(raw: Path) -> None:
    file = raw / "t10k-images-idx3-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[300:400] = bytes(100)
    file.write_bytes(content)


def _short(raw: Path) -> None:
    content = idx(random_pixels(20, 28, 28))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content[:-1]))


def _empty(raw: Path) -> None:
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))


def _swapped(raw: Path) -> None:
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(
        (raw / "t10k-images-idx3-ubyte.gz").read_bytes()
    )


def _wide(raw: Path) -> None:
    content = idx(random_pixels(20, 28, 30))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))


def _few_labels(raw: Path) -> None:
    content = idx(np.zeros(19, dtype=np.uint8))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))


def _label_ten(raw: Path) -> None:
    content = idx(np.full(20, 10, dtype=np.uint8))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))


def _no_images(raw: Path) -> None:
    content = idx(np.zeros((0, 28, 28), dtype=np.uint8))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))


def _nothing(raw: Path) -> None:
    for file in raw.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_labels, r"no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz of Fashion-MNIST"),
        (_truncated, r"t10k-images-idx3-ubyte\.gz can't be read"),
        (_no_gzip, r"t10k-images-idx3-ubyte\.gz can't be read"),
        (_garbled, r"t10k-images-idx3-ubyte\.gz can't be read"),
        (_short, r"ubyte\.gz holds 15679 values, not the 15680 of its header"),
        (_empty, r"t10k-images-idx3-ubyte\.gz is not an IDX file of bytes in 3 dimensions"),
        (_swapped, r"t10k-labels-idx1-ubyte\.gz is not an IDX file of bytes in 1 dimensions"),
        (_wide, "images of t10k are 30×28, not 28×28"),
        (_few_labels, "t10k has 20 images but 19 labels"),
        (_label_ten, "t10k has a label outside 0 to 9"),
        (_no_images, "t10k holds no images"),
        (_nothing, r"no Fashion-MNIST in .*: expected FashionMNIST/raw/train-images-idx3-ubyte"),
    ],
)
def test_damaged_files_are_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_fashion_mnist(raw)
    damage(raw)
    with pytest.raises(DataError, match=message):
        data.load(f"fashion-mnist:{tmp_path}")
