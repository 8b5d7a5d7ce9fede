from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from secateur import data
from secateur.data import FileImages, TensorImages, batches
from secateur.data.cifar import CLASS_NAMES
from secateur.data.preprocessing import Preprocessing
from secateur.data.splits import HELD_OUT_EVERY, hold_out, is_held_out, split_calibration
from secateur.models import zoo
from secateur.runtime.errors import DataError, UnknownName, UsageError

SMALL = Preprocessing(8, 8)
Pixels = npt.NDArray[np.uint8]


def random_pixels(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Pixels:
    """`[image, height, width, rgb]`."""
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def numbered(labels: list[int], side: int = 8) -> TensorImages:
    """Images whose every pixel is their number in the list."""
    pixels = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return TensorImages(pixels.expand(-1, 3, side, side).contiguous(), torch.tensor(labels))


def numbers_of(images: data.Images) -> list[int]:
    """Inverse of `numbered`."""
    count = len(images.labels)
    return images.read(torch.arange(count), SMALL)[:, 0, 0, 0].tolist()


def write_stacked(directory: Path) -> tuple[Pixels, list[int], Pixels, list[int]]:
    """CIFAR-10 in miniature: four columns of five training images, two of three for testing."""
    train, test = random_pixels(20, seed=1), random_pixels(6, seed=2)
    train_labels, test_labels = [i % 10 for i in range(20)], [9, 8, 7, 0, 1, 2]
    parts = [("train_a", train[:5]), ("train_a", train[5:10]), ("train_b", train[10:15])]
    parts += [("train_b", train[15:]), ("test", test[:3]), ("test", test[3:])]
    for number, (folder, pixels) in enumerate(parts):
        (directory / folder).mkdir(exist_ok=True)
        image = Image.fromarray(pixels.reshape(-1, 32, 3))
        image.save(directory / folder / f"{folder}_{number:03}.webp", lossless=True)
    np.save(directory / "train_labels.npy", np.array(train_labels, dtype=np.uint8))
    np.save(directory / "test_labels.npy", np.array(test_labels, dtype=np.uint8))
    return train, train_labels, test, test_labels


def write_torchvision(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pixels, list[int]]:
    """Torchvision's layout in miniature, with its digests; returns what the training part holds."""
    folder = directory / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: object) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    pixels, labels = random_pixels(20), [i % 10 for i in range(20)]
    flat = pixels.transpose(0, 3, 1, 2).reshape(20, -1)
    train = [
        write(f"data_batch_{i + 1}", {"data": flat[i::2], "labels": labels[i::2]}) for i in (0, 1)
    ]
    test = [write("test_batch", {"data": flat[:4], "labels": labels[:4]})]
    meta = write("batches.meta", {"label_names": list(CLASS_NAMES)})
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", train)
    monkeypatch.setattr(cifar, "test_list", test)
    monkeypatch.setattr(cifar, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return np.concatenate([pixels[::2], pixels[1::2]]), labels[::2] + labels[1::2]


def write_folder(directory: Path, counts: dict[str, int], seed: int = 0) -> None:
    for name, count in counts.items():
        (directory / name).mkdir(parents=True)
        for number, pixels in enumerate(random_pixels(count, 12, 10, seed)):
            Image.fromarray(pixels).save(directory / name / f"{number}.png")


def whole(images: data.Images, preprocessing: Preprocessing) -> Tensor:
    return images.read(torch.arange(len(images.labels)), preprocessing)


def hashes(images: data.Images, preprocessing: Preprocessing = SMALL) -> list[int]:
    return [hash(one.numpy().tobytes()) for one in whole(images, preprocessing)]


# Shapes


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64)),
    ],
)
def test_shapes_are_checked_in_tests(pixels: Tensor, labels: Tensor) -> None:
    with pytest.raises(TypeCheckError):
        TensorImages(pixels, labels)


# CIFAR-10


def test_stacked_columns_are_read_in_the_order_of_the_labels(tmp_path: Path) -> None:
    train, train_labels, test, test_labels = write_stacked(tmp_path)
    splits = data.READERS["cifar10"](tmp_path)
    assert splits.class_names == CLASS_NAMES
    for part, pixels, labels in (
        (splits.train, train, train_labels),
        (splits.test, test, test_labels),
    ):
        images = whole(part, Preprocessing(32, 32))
        assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert part.labels.tolist() == labels
        assert part.labels.dtype == torch.int64


def test_loading_holds_training_images_out(tmp_path: Path) -> None:
    train, _, _, _ = write_stacked(tmp_path)
    dataset = data.load(f"cifar10:{tmp_path}", validation_fraction=0.5)
    assert dataset.name == f"cifar10:{tmp_path}"
    sizes = [len(part.labels) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [10, 10, 6]
    native = Preprocessing(32, 32)
    validation, rest = hashes(dataset.validation, native), hashes(dataset.train, native)
    original = [hash(one.transpose(2, 0, 1).tobytes()) for one in train]
    assert sorted(validation + rest) == sorted(original)
    assert not set(hashes(dataset.test, native)) & set(original)


def test_torchvisions_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = write_torchvision(tmp_path, monkeypatch)
    for directory in (tmp_path, tmp_path / "cifar-10-batches-py"):
        splits = data.READERS["cifar10"](directory)
        images = whole(splits.train, Preprocessing(32, 32))
        assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert splits.train.labels.tolist() == labels
        assert len(splits.test.labels) == 4


def test_torchvisions_layout_is_checked_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torchvision(tmp_path, monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=f"CIFAR-10 in {tmp_path} is incomplete or damaged"):
        data.load(f"cifar10:{tmp_path}")


def _cut_labels(directory: Path) -> None:
    np.save(directory / "train_labels.npy", np.zeros(19, dtype=np.uint8))


def _label_ten(directory: Path) -> None:
    np.save(directory / "test_labels.npy", np.full(6, 10))


def _label_below_zero(directory: Path) -> None:
    np.save(directory / "test_labels.npy", np.full(6, -1))


def _no_test_labels(directory: Path) -> None:
    (directory / "test_labels.npy").unlink()


def _empty_labels(directory: Path) -> None:
    (directory / "test_labels.npy").write_bytes(b"")


def _pickled_labels(directory: Path) -> None:
    np.save(directory / "test_labels.npy", np.array([{}, {}, {}, {}, {}, {}], dtype=object))


def _no_images(directory: Path) -> None:
    shutil.rmtree(directory / "test")


def _broken_image(directory: Path) -> None:
    (directory / "test" / "test_004.webp").write_bytes(b"RIFF")


def _truncated_image(directory: Path) -> None:
    file = directory / "test" / "test_004.webp"
    file.write_bytes(file.read_bytes()[:-200])


def _wide_image(directory: Path) -> None:
    image = Image.fromarray(random_pixels(1, 32, 40)[0])
    image.save(directory / "test" / "test_004.webp", lossless=True)


def _ragged_image(directory: Path) -> None:
    image = Image.fromarray(random_pixels(1, 40, 32)[0])
    image.save(directory / "test" / "test_004.webp", lossless=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_labels, "20 images but 19 labels"),
        (_label_ten, "a label outside 0 to 9"),
        (_label_below_zero, "a label outside 0 to 9"),
        (_no_test_labels, "test_labels.npy can't be read"),
        (_empty_labels, "test_labels.npy can't be read"),
        (_pickled_labels, "test_labels.npy can't be read"),
        (_no_images, r"no test\*/\*.webp files in"),
        (_broken_image, "test_004.webp can't be read"),
        (_truncated_image, "test_004.webp can't be read"),
        (_wide_image, "test_004.webp is 40×32, not a column of 32×32"),
        (_ragged_image, "test_004.webp is 32×40, not a column of 32×32"),
    ],
)
def test_damaged_columns_are_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_stacked(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load(f"cifar10:{tmp_path}")


def test_a_folder_without_cifar_is_an_error_with_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10 .*: expected train_labels.npy .* or torch"):
        data.load(f"cifar10:{tmp_path}")


def test_the_staged_test_images_are_cifars(shared_data: Path) -> None:
    from secateur.data.cifar import _stacked

    directory = shared_data / "cifar10"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    test = _stacked(directory, "test")
    assert test.pixels.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == 10 * [1000]


# Folders


def test_images_of_any_mode_and_depth_of_folder_are_read_as_rgb(tmp_path: Path) -> None:
    (tmp_path / "train" / "ant" / "deep").mkdir(parents=True)
    write_folder(tmp_path / "train", {"bee": 1})
    write_folder(tmp_path / "test", {"ant": 1, "bee": 1})
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        suffix = "JPEG" if mode == "CMYK" else "png"
        image = Image.fromarray(random_pixels(1, 9, 9)[0]).convert(mode)
        image.save(tmp_path / "train" / "ant" / "deep" / f"{mode}.{suffix}")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    train = data.READERS["folder"](tmp_path).train
    assert whole(train, SMALL).shape == (6, 3, 8, 8)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0"])
def test_images_are_preprocessed_as_for_the_published_weights(name: str) -> None:
    pixels = random_pixels(1, 300, 280)
    prepare = zoo.preprocessing(f"torchvision:{name}")
    images = TensorImages(torch.from_numpy(pixels).movedim(-1, 1), torch.zeros(1).long())
    normalised = prepare.normalise(images.read(torch.tensor([0]), prepare))
    published = next(iter(torchvision.models.get_model_weights(name))).transforms()
    level = 1 / 255 / min(prepare.std)  # Pillow rounds otherwise, in each direction
    expected = published(Image.fromarray(pixels[0]))[None]
    torch.testing.assert_close(normalised, expected, atol=2.01 * level, rtol=0)


def test_files_are_resized_and_cropped_as_torchvision_does(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 3})
    paths = tuple(sorted((tmp_path / "ant").iterdir()))
    images = FileImages(paths, torch.zeros(3, dtype=torch.int64))
    batch = images.read(torch.tensor([2, 0]), Preprocessing(6, 7))
    expected = []
    for path in (paths[2], paths[0]):
        pixels = v2.functional.pil_to_tensor(Image.open(path))
        resized = v2.functional.resize(pixels, [7], antialias=True)
        expected.append(v2.functional.center_crop(resized, [6]))
    assert torch.equal(batch, torch.stack(expected))


def test_images_in_memory_are_resized_like_those_in_files(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 3})
    paths = tuple(sorted((tmp_path / "ant").iterdir()))
    labels = torch.zeros(3, dtype=torch.int64)
    pixels = torch.stack([v2.functional.pil_to_tensor(Image.open(path)) for path in paths])
    in_memory, in_files = TensorImages(pixels, labels), FileImages(paths, labels)
    difference = whole(in_memory, SMALL).int() - whole(in_files, SMALL).int()
    assert difference.abs().max() <= 1


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 10, "bee": 3})
    for broken in (tmp_path / "ant").iterdir():
        broken.write_bytes(broken.read_bytes()[:60])
    dataset = data.load(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"the image .*ant/\d.png can't be read"):
        list(batches(dataset.train, 2, SMALL))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cifar1:x", UnknownName, "unknown data set 'cifar1': did you mean cifar10"),
        (
            "birds",
            UnknownName,
            "unknown data set 'birds': known: arrays, cifar10, cifar100, coco",
        ),
        ("imagenet", UsageError, "'imagenet' needs a folder: imagenet:DIR"),
        ("hf:", UsageError, "'hf:' needs a name or a folder: hf:NAME_OR_PATH"),
        ("folder", UsageError, "'folder' needs a folder: folder:DIR"),
        ("cifar10:", UsageError, "'cifar10:' needs a folder: cifar10:DIR"),
        ("folder:/no/where", DataError, "no folder /no/where to read folder from"),
    ],
)
def test_wrong_names_of_data_sets(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data.load(name)


# Digits


def test_digits_are_all_there_and_always_split_alike() -> None:
    pytest.importorskip("sklearn")
    one, other = data.load("digits"), data.load("digits", seed=1)
    assert one.class_names == tuple("0123456789")
    parts = (one.train, one.validation, one.test)
    assert sum(len(part.labels) for part in parts) == 1797
    assert torch.equal(one.test.labels, other.test.labels)
    native = Preprocessing(32, 32)
    assert hashes(one.test, native) == hashes(other.test, native)
    assert hashes(one.validation, native) != hashes(other.validation, native)
    pixels = whole(one.train, native)
    assert pixels.shape[1:] == (3, 32, 32)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert pixels.min() == 0
    assert pixels.max() > 240


def test_digits_name_the_extra_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[demo\]'"):
        data.load("digits")


# Splits


LABELS = st.lists(st.integers(2, 12), min_size=1, max_size=4).map(
    lambda sizes: [label for label, size in enumerate(sizes) for _ in range(size)]
)


@given(LABELS, st.floats(0, 0.6), st.integers(0, 99))
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
def test_a_fraction_of_each_class_is_held_out(
    labels: list[int], fraction: float, seed: int
) -> None:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = numbered(torch.tensor(labels)[order].tolist())
    sizes = images.labels.bincount()
    counts = [max(1, round(fraction * int(size))) for size in sizes]
    rest, held_out = hold_out(images, fraction, torch.Generator().manual_seed(seed))
    assert held_out.labels.bincount().tolist() == counts
    assert sorted(numbers_of(rest) + numbers_of(held_out)) == list(range(len(labels)))
    for part in (rest, held_out):
        assert part.labels.tolist() == images.labels[numbers_of(part)].tolist()
    again = hold_out(images, fraction, torch.Generator().manual_seed(seed))
    assert numbers_of(again[1]) == numbers_of(held_out)


@pytest.mark.parametrize("count", [5, 9, 10, 31])
def test_every_fifth_calibration_set_image_is_set_apart(count: int) -> None:
    fit, held_out = split_calibration(numbered([0] * count))
    expected = [number for number in range(count) if number % HELD_OUT_EVERY == 4]
    assert numbers_of(held_out) == expected
    assert sorted([*numbers_of(fit), *expected]) == list(range(count))
    assert is_held_out(torch.arange(count)).nonzero()[:, 0].tolist() == expected


def test_of_very_few_calibration_images_none_is_set_apart() -> None:
    fit, held_out = split_calibration(numbered([0] * 4))
    assert numbers_of(fit) == numbers_of(held_out) == [0, 1, 2, 3]


def test_another_seed_holds_others_out() -> None:
    images = numbered(20 * [0, 1])
    held_out = [
        numbers_of(hold_out(images, 0.3, torch.Generator().manual_seed(seed))[1])
        for seed in range(3)
    ]
    assert len({tuple(numbers) for numbers in held_out}) == 3


@pytest.mark.parametrize("fraction", [0.9, 1.0])
def test_a_class_can_not_be_held_out_whole(fraction: float) -> None:
    with pytest.raises(DataError, match="class 1 has 2 images: too few to hold out 2 of them"):
        hold_out(numbered([0] * 20 + [1, 1]), fraction - 0.05, torch.Generator().manual_seed(0))


def data_set_of(labels: list[int]) -> data.DataSet:
    images = numbered(labels)
    return data.DataSet("numbered", ("a", "b", "c"), images, images, images)


@pytest.mark.parametrize("count", [3, 4, 11, 12])
def test_a_stratified_calibration_set_is_equal_over_classes(count: int) -> None:
    dataset = data_set_of(10 * [0] + 30 * [1] + 5 * [2])
    calibration = data.draw_calibration_images(dataset.train, count)
    sizes = torch.bincount(calibration.labels, minlength=3)
    assert int(sizes.sum()) == count
    assert int(sizes.max() - sizes.min()) <= 1
    assert len(set(numbers_of(calibration))) == count


def test_a_small_class_is_used_up_and_the_others_fill_in() -> None:
    calibration = data.draw_calibration_images(data_set_of(10 * [0] + 30 * [1] + 2 * [2]).train, 20)
    assert calibration.labels.bincount().tolist() == [9, 9, 2]


@pytest.mark.parametrize("stratified", [False, True])
def test_a_calibration_set_depends_on_its_seed_alone(stratified: bool) -> None:
    images = data_set_of(20 * [0, 1, 2]).train
    drawn = [
        numbers_of(data.draw_calibration_images(images, 9, stratified=stratified, seed=s))
        for s in (0, 1)
    ]
    torch.manual_seed(99)
    assert numbers_of(data.draw_calibration_images(images, 9, stratified=stratified)) == drawn[0]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("stratified", [False, True])
def test_a_calibration_set_larger_than_the_data_is_all_of_it(stratified: bool) -> None:
    calibration = data.draw_calibration_images(
        data_set_of([0, 0, 1, 2, 2]).train, 100, stratified=stratified
    )
    assert sorted(numbers_of(calibration)) == [0, 1, 2, 3, 4]


def test_without_stratifying_labels_are_ignored() -> None:
    one, other = data_set_of(20 * [0, 1, 2]), data_set_of(60 * [0])
    shard_batches = [
        numbers_of(data.draw_calibration_images(d.train, 7, stratified=False)) for d in (one, other)
    ]
    assert shard_batches[0] == shard_batches[1]


# Batches


@given(st.integers(1, 23), st.integers(1, 30))
@settings(max_examples=40, derandomize=True, database=None, deadline=None)
def test_every_image_comes_once_and_the_last_batch_may_be_small(count: int, size: int) -> None:
    images = numbered(list(range(count)))
    all_batches = list(batches(images, size, SMALL))
    full, rest = divmod(count, size)
    assert [len(batch.labels) for batch in all_batches] == full * [size] + ([rest] if rest else [])
    labels = torch.cat([batch.labels for batch in all_batches]).tolist()
    assert labels == list(range(count))
    for batch in all_batches:
        expected = SMALL.normalise(whole(images, SMALL)[batch.labels])
        assert torch.equal(batch.images, expected)


def test_the_size_of_batches_changes_no_value(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 7})
    paths = tuple(sorted((tmp_path / "ant").iterdir()))
    images = FileImages(paths, torch.arange(7))
    whole_list = [
        torch.cat([batch.images for batch in batches(images, size, SMALL)]) for size in (1, 3, 7)
    ]
    assert torch.equal(whole_list[0], whole_list[1])
    assert torch.equal(whole_list[0], whole_list[2])


def test_stopping_early_leaves_nothing_running() -> None:
    stream = iter(batches(numbered(list(range(20))), 4, SMALL))
    assert next(stream).labels.tolist() == [0, 1, 2, 3]
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(stream)


def test_taking_images_takes_their_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 4})
    paths = tuple(sorted((tmp_path / "ant").iterdir()))
    in_files = FileImages(paths, torch.arange(4))
    for images in (numbered([4, 5, 6, 7]), in_files):
        selected = images.take(torch.tensor([3, 1]))
        assert selected.labels.tolist() == images.labels[[3, 1]].tolist()
        assert torch.equal(whole(selected, SMALL), whole(images, SMALL)[[3, 1]])
