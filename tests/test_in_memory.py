"""Images from Python: batches of every common form are read alike, others are explained."""

from __future__ import annotations

import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from secateur.data.batch_forms import Form, form_of
from secateur.data.in_memory import read_images, split_images
from secateur.runtime.errors import DataError

PICTURES, SIGNALS = Form(2), Form(1)
IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4

Item = namedtuple("Item", "image label")
Pair = namedtuple("Pair", "one other")


@dataclass
class Fields:
    images: Tensor
    targets: Tensor


class Rows(Dataset[Any]):
    """Reads whatever a test makes of an index, without ever raising IndexError."""

    def __init__(self, count: int, item: Callable[[int], Any]) -> None:
        self.count, self.item = count, item
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.item(index % 12)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(IMAGES, LABELS, strict=True))


@pytest.mark.parametrize(
    "source",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES.numpy(), LABELS.numpy()),
        {"pixel_values": IMAGES, "labels": LABELS},
        [{"image": IMAGES, "target": LABELS}],
        [UserDict(img=IMAGES, label=LABELS.tolist())],
        [({"pixel_values": IMAGES}, LABELS)],
        [Fields(IMAGES, LABELS)],
        [(list(IMAGES), list(LABELS))],
        [(IMAGES, LABELS[:, None], ["path"] * 12)],
        [(IMAGES.double().requires_grad_(), LABELS.int())],
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5),
        DataLoader(TensorDataset(IMAGES, LABELS)),
        DataLoader(Rows(12, lambda index: Item(IMAGES[index], LABELS[index])), batch_size=7),
        DataLoader(Rows(12, lambda index: Pair(IMAGES[index], LABELS[index])), batch_size=7),
        DataLoader(Rows(12, lambda index: {"x": IMAGES[index], "y": index % 4}), batch_size=6),
        Rows(12, lambda index: (IMAGES[index].numpy(), np.int64(index % 4))),
        Stream(),
        DataLoader(Stream(), batch_size=5),
        zip(IMAGES.split(5), LABELS.split(5), strict=True),
    ],
    ids=lambda source: type(source).__name__,
)
def test_labelled_batches_of_every_form_are_read_alike(source: Any) -> None:
    images = read_images(source, PICTURES, "images")
    assert torch.equal(images.pixels[:], IMAGES)
    assert images.labels is not None
    assert torch.equal(images.labels.flatten(), LABELS)


@pytest.mark.parametrize(
    "source",
    [
        IMAGES,
        IMAGES.numpy(),
        list(IMAGES),
        [list(IMAGES)],
        [(IMAGES,)],
        [(IMAGES, None)],
        {"inputs": IMAGES},
        iter(IMAGES.split(5)),
    ],
    ids=lambda source: type(source).__name__,
)
def test_images_alone_are_read_alike(source: Any) -> None:
    images = read_images(source, PICTURES, "images")
    assert torch.equal(images.pixels[:], IMAGES)
    assert images.labels is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_arrays_from_files_are_not_copied_unless_they_are_converted(
    dtype: type, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", (255 * IMAGES.numpy()).astype(dtype))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of arrays that can't be written
        read = read_images(mapped, replace(PICTURES, normalise=halve), "images")
    assert torch.equal(read.pixels[:], halve(torch.from_numpy(mapped.copy())))
    block = read.pixels.blocks[0]
    assert (block.data_ptr() == mapped.ctypes.data) == (dtype is not np.float64)


def halve(images: Tensor) -> Tensor:
    return images.float() if images.is_floating_point() else images.float() / 2


@pytest.mark.parametrize(
    "source",
    [
        (255 * IMAGES).byte(),
        (255 * IMAGES).byte().numpy(),
        list((255 * IMAGES).byte()),
        DataLoader(TensorDataset((255 * IMAGES).byte(), LABELS), batch_size=5),
    ],
    ids=lambda source: type(source).__name__,
)
def test_bytes_stay_bytes(source: Any) -> None:
    read = read_images(source, replace(PICTURES, channels=3, normalise=halve), "images")
    assert {block.dtype for block in read.pixels.blocks} == {torch.uint8}
    assert torch.equal(read.pixels[:], (255 * IMAGES).byte().float() / 2)


def test_floats_and_bytes_together_are_an_error() -> None:
    source = [IMAGES, (255 * IMAGES).byte(), IMAGES]
    with pytest.raises(DataError, match=r"some are torch.float32, others torch.uint8"):
        read_images(source, replace(PICTURES, normalise=halve), "images")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("photos", "'photos' is a text: .* --data folder:photos"),
        (5, "int holds no batches"),
        ([{"foo": IMAGES, "bar": LABELS}], "hold foo, bar: call the images pixel_values"),
        ([[torch.rand(3, 8, 8), torch.rand(3, 8, 6)]], "all must have one size"),
        ([(IMAGES, IMAGES[..., :4], LABELS)], r"Tensor \[12, 3, 8, 4\], Tensor \[12\]: yield"),
        ([(torch.arange(12), IMAGES, LABELS)], r"hold Tensor \[12\], Tensor \[12, 3, 8, 8\]"),
        ([Image.new("RGB", (8, 8))], r"got Image: .*v2.ToImage\(\)"),
        ([(255 * IMAGES).byte()], "torch.uint8: scale and normalise them as in training"),
        ([(IMAGES, ["cat"] * 12)], r"class numbers, not 'cat' \(str\)"),
        (torch.rand(12, 1, 64), "must be floating-point tensors"),
        ([(torch.rand(12, 1, 64), LABELS)], r"got \[12, 1, 64\] with 12 labels"),
    ],
)
def test_other_forms_are_explained_in_a_line(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_images(source, PICTURES, "images")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [None, torch.arange(12) % 3])
def test_signals_are_batches_for_a_network_of_signals(labels: Tensor | None) -> None:
    signals = torch.rand(12, 1, 64)
    batch = signals if labels is None else (signals, labels)
    assert read_images([batch], SIGNALS, "images").pixels.shape == (12, 1, 64)
    single = signals[0] if labels is None else (signals[0], 1)
    assert read_images([single], SIGNALS, "images").pixels.shape == (1, 1, 64)


def test_an_image_with_as_many_labels_as_channels_is_one_image() -> None:
    rows = Rows(12, lambda index: (IMAGES[index], torch.tensor([0.0, 1.0, 1.0])))
    form = form_of(nn.Conv2d(3, 4, 3))
    images = read_images(rows, form, "images")
    assert torch.equal(images.pixels[:], IMAGES)
    assert images.labels is not None
    assert images.labels.shape == (12, 3)


def test_images_of_any_shape_are_read_if_the_network_can_be_run_on_them() -> None:
    free = Form(2, runs=lambda images: True)
    frames = torch.rand(6, 5, 3, 8, 8)
    assert read_images([(frames, torch.arange(6))], free, "images").pixels.shape == frames.shape
    assert read_images([frames.flatten(1)], free, "images").pixels.shape == (6, 960)


@pytest.mark.parametrize(
    ("layer", "dims"),
    [(nn.Conv1d(1, 2, 3), 1), (nn.Conv2d(1, 2, 3), 2), (nn.Conv3d(1, 2, 3), 3), (nn.ReLU(), 2)],
)
def test_the_first_convolution_tells_what_an_image_is(layer: nn.Module, dims: int) -> None:
    assert form_of(nn.Sequential(layer, nn.Linear(2, 2))).dims == dims


def test_a_large_data_set_is_sampled_with_the_seed_and_an_iterable_is_not() -> None:
    def read(seed: int) -> list[int]:
        rows = Rows(600, lambda index: (IMAGES[index], index // 50))
        images = read_images(rows, PICTURES, "images", most=40, seed=seed)
        assert len(images.pixels) == 40
        assert not images.is_from_front
        return rows.read

    assert read(0) == read(0) != read(1)
    assert read(0) == sorted(set(read(0)))
    assert max(read(0)) > 500
    front = read_images(IMAGES.split(1), PICTURES, "images", most=5)
    assert torch.equal(front.pixels[:], IMAGES[:5])
    assert front.is_from_front


def test_a_small_data_set_is_read_whole_and_in_order() -> None:
    rows = Rows(30, lambda index: IMAGES[index])
    read_images(rows, PICTURES, "images", most=30)
    assert rows.read == list(range(30))


def test_parts_share_no_image() -> None:
    images = read_images(torch.arange(120.0).reshape(120, 1, 1, 1), PICTURES, "images")
    parts = split_images(images, None)
    pixels = [part.pixels[:].flatten() for part in (parts.score, parts.validation, parts.test)]
    assert [len(part) for part in pixels] == [87, 9, 24]
    assert torch.equal(torch.cat(pixels).sort().values, torch.arange(120.0))
