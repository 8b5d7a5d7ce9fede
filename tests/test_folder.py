"""Class folders as people have them: read as they are meant, or refused with what to do instead."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from layouts import random_pixels
from secateur import data
from secateur.data import FileImages, image_files
from secateur.data.folder import read_folder
from secateur.data.folder_layout import role_of
from secateur.data.preprocessing import Preprocessing
from secateur.data.splits import Splits
from secateur.runtime.errors import DataError, UsageError


def write(directory: Path, counts: dict[str, int], suffix: str = ".png", **options: str) -> None:
    """Folders of so many images."""
    for name, count in counts.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.fromarray(random_pixels(9, 8, seed=number))
            image.save(directory / name / f"{number}{suffix}", **options)


def sizes(splits: Splits) -> tuple[int, int]:
    return len(splits.train.labels), len(splits.test.labels)


def paths(images: data.Images) -> list[str]:
    assert isinstance(images, FileImages)
    return ["/".join(path.parts[-3:]) for path in images.paths]


# Parts


@pytest.mark.parametrize("scored", ["test", "val"])
def test_a_folder_with_parts_is_read_as_it_is_split(scored: str, tmp_path: Path) -> None:
    write(tmp_path / "train", {"cat": 4, "ant": 3, "bee": 2})
    write(tmp_path / scored, {"ant": 1, "bee": 1, "cat": 2})
    splits = read_folder(tmp_path)
    assert splits.class_names == ("ant", "bee", "cat")
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert splits.test.labels.tolist() == [0, 1, 2, 2]
    assert paths(splits.test)[0] == f"{scored}/ant/0.png"


@pytest.mark.parametrize(
    ("train", "scored"),
    [
        ("train", "valid"),
        ("train", "validation"),
        ("train", "dev"),
        ("train", "holdout"),
        ("train", "eval"),
        ("Train", "Test"),
        ("TRAIN", "VAL"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("train-images", "hold_out"),
        ("trainset", "validation data"),
    ],
)
def test_parts_have_many_names(train: str, scored: str, tmp_path: Path) -> None:
    write(tmp_path / train, {"ant": 4, "bee": 3})
    write(tmp_path / scored, {"ant": 1, "bee": 2})
    splits = read_folder(tmp_path)
    assert splits.class_names == ("ant", "bee")
    assert sizes(splits) == (7, 3)


@pytest.mark.parametrize("name", ["ant", "0", "trains", "latest", "tested", "set", "devil", "n01"])
def test_other_names_are_no_parts(name: str) -> None:
    assert role_of(name) is None


def test_test_is_preferred_and_what_is_not_used_is_said(tmp_path: Path) -> None:
    for part, count in (("train", 2), ("test", 3), ("valid", 4)):
        write(tmp_path / part, {"ant": count, "bee": count})
    splits = read_folder(tmp_path)
    assert sizes(splits) == (4, 6)
    assert splits.notes == (f"Not used: {tmp_path}/valid/ (8 images).",)


def test_a_test_part_without_classes_is_passed_over_where_val_has_some(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 3)):
        write(tmp_path / part, {"ant": count, "bee": count})
    write(tmp_path, {"test": 5})
    splits = read_folder(tmp_path)
    assert sizes(splits) == (8, 6)
    assert splits.notes == (f"Not used: {tmp_path}/test/ (5 images).",)


@pytest.mark.parametrize("unlabelled", [0, 6], ids=["alone", "with an unlabelled test part"])
def test_of_a_training_part_alone_a_fifth_is_held_out(unlabelled: int, tmp_path: Path) -> None:
    write(tmp_path / "photos", {"ant": 10, "bee": 5})
    write(tmp_path / "parts" / "train", {"ant": 10, "bee": 5})
    if unlabelled:
        write(tmp_path / "parts", {"test": unlabelled})
    flat, part = read_folder(tmp_path / "photos"), read_folder(tmp_path / "parts")
    assert sizes(part) == (12, 3)
    assert [name.split("/")[1:] for name in paths(part.test)] == [
        name.split("/")[1:] for name in paths(flat.test)
    ]


def test_the_counts_of_images_are_those_that_are_used(tmp_path: Path) -> None:
    write(tmp_path, {"ant": 20, "bee": 10})
    dataset = data.load(f"folder:{tmp_path}")
    counts = [len(part.labels) for part in (dataset.train, dataset.validation, dataset.test)]
    (notice,) = dataset.notes
    assert counts == [21, 3, 6]
    assert notice == (
        f"{tmp_path} has no test part: a fifth of each class is held out for it. Used: 21 images "
        "to score filters and train on, 3 for choices, 6 to test."
    )
    write(tmp_path / "split" / "train", {"ant": 20, "bee": 10})
    write(tmp_path / "split" / "test", {"ant": 2, "bee": 1})
    assert data.load(f"folder:{tmp_path}/split").notes == ()


def test_a_flat_folder_gives_a_fifth_of_each_class_always_the_same(tmp_path: Path) -> None:
    write(tmp_path, {"ant": 10, "bee": 5})
    one, other = read_folder(tmp_path), read_folder(tmp_path)
    assert one.test.labels.tolist() == [0, 0, 1]
    assert one.train.labels.bincount().tolist() == [8, 4]
    assert paths(one.test) == paths(other.test)
    assert not set(paths(one.test)) & set(paths(one.train))


def test_a_part_may_hold_a_folder_of_its_name(tmp_path: Path) -> None:
    write(tmp_path / "seg_train" / "seg_train", {"ice": 3, "sea": 4})
    write(tmp_path / "seg_test" / "seg_test", {"ice": 1, "sea": 1})
    write(tmp_path, {"seg_pred": 2})
    splits = read_folder(tmp_path)
    assert splits.class_names == ("ice", "sea")
    assert sizes(splits) == (7, 2)
    assert splits.notes == (f"Not used: {tmp_path}/seg_pred/ (2 images).",)


def test_a_class_may_be_called_train_where_it_is_one_of_several(tmp_path: Path) -> None:
    write(tmp_path, {"bus": 5, "car": 5, "train": 5})
    assert read_folder(tmp_path).class_names == ("bus", "car", "train")


def test_a_training_part_that_is_named_itself_has_no_test_part(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        write(tmp_path / part, {"ant": 5, "bee": 5})
    (note,) = data.load(f"folder:{tmp_path}/train").notes
    assert f"held out for it (folder:{tmp_path} reads valid/ beside it). Used: 6 " in note


# Files


def test_all_that_pillow_opens_is_read(tmp_path: Path) -> None:
    formats = {
        ".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".gif": "GIF", ".pgm": "PPM",
        ".pnm": "PPM", ".tif": "TIFF", ".jp2": "JPEG2000", ".webp": "WEBP", ".AVIF": "AVIF",
        ".tga": "TGA", ".bmp": "BMP",
    }  # fmt: skip
    readable = [suffix for suffix in formats if suffix.lower() in image_files.image_suffixes()]
    assert len(readable) >= len(formats) - 2  # JPEG 2000 and AVIF depend on how Pillow was built
    for suffix in readable:
        write(tmp_path, {"ant": 2, "bee": 2}, suffix, format=formats[suffix])
    splits = read_folder(tmp_path)
    assert sum(sizes(splits)) == 4 * len(readable)
    assert splits.notes == ()
    images = splits.train.read(torch.arange(sizes(splits)[0]), Preprocessing(8, 8))
    assert images.shape[1:] == (3, 8, 8)


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part, {"ant": 4, "bee": 4})
        for name in ("a.txt", "b.TXT", "c.xml", "notes", ".hidden", "Thumbs.db"):
            (tmp_path / part / "ant" / name).write_text("no image")
    write(tmp_path, {"train": 3})
    assert read_folder(tmp_path).notes == (
        f"3 images were passed over beside the class folders of {tmp_path}/train: their class is "
        "unknown.",
        "8 files were passed over: 4 .txt, 2 without suffix, 2 .xml.",
    )


def test_photos_in_heif_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"ant": 4, "bee": 4})
    (tmp_path / "ant" / "IMG_1.HEIC").write_bytes(b"a photo")
    monkeypatch.setattr(image_files, "_has_heif", lambda: False)
    image_files.image_suffixes.cache_clear()
    assert read_folder(tmp_path).notes == (
        "1 file was passed over: 1 .heic; pip install pillow-heif reads photos in HEIF.",
    )
    monkeypatch.undo()
    image_files.image_suffixes.cache_clear()


def test_photos_in_heif_are_read_with_that_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replacement of the package registers a reader of such files that are PNG inside."""
    registered = []
    package = types.ModuleType("pillow_heif")
    package.__spec__ = importlib.machinery.ModuleSpec("pillow_heif", None)
    vars(package)["register_heif_opener"] = lambda: registered.append(True)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    for cache in (image_files.image_suffixes, image_files.register_heif):
        cache.cache_clear()
    write(tmp_path, {"ant": 3, "bee": 3}, ".heic", format="PNG")
    images = read_folder(tmp_path).train
    assert len(images.read(torch.tensor([0]), Preprocessing(8, 8))) == 1
    assert registered == [True]
    monkeypatch.undo()
    for cache in (image_files.image_suffixes, image_files.register_heif):
        cache.cache_clear()


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write(tmp_path / "elsewhere", {"queens": 3, "workers": 2, "wasps": 5})
    write(photos, {"ant": 5})
    (photos / "ant" / "queens").symlink_to(tmp_path / "elsewhere" / "queens")
    for number in range(2):
        target = tmp_path / "elsewhere" / "workers" / f"{number}.png"
        (photos / "ant" / f"worker{number}.png").symlink_to(target)
    (photos / "ant" / "loop").symlink_to(photos / "ant")
    (photos / "wasp").symlink_to(tmp_path / "elsewhere" / "wasps")
    splits = read_folder(photos)
    labels = torch.cat([splits.train.labels, splits.test.labels])
    assert labels.bincount().tolist() == [10, 5]
    (tmp_path / "link").symlink_to(photos)
    assert sizes(read_folder(tmp_path / "link")) == sizes(splits)


def test_hidden_files_and_folders_are_neither_class_nor_image(tmp_path: Path) -> None:
    write(tmp_path, {"ant": 10, "bee": 5, "__MACOSX": 1, ".ipynb_checkpoints": 1, "@eaDir": 1})
    write(tmp_path / "ant", {"winged": 2, ".ipynb_checkpoints": 3})
    (tmp_path / "bee" / "._0.png").write_bytes(b"what macOS leaves")
    splits = read_folder(tmp_path)
    assert splits.class_names == ("ant", "bee")
    assert sum(sizes(splits)) == 10 + 5 + 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"ant": 3, "bee": 3, "bee/deep": 1})
    (tmp_path / "bee" / "deep").chmod(0)
    with pytest.raises(DataError, match=r"the folder .*bee/deep can't be read: Permission denied"):
        read_folder(tmp_path)


# Refused


def _nothing(folder: Path) -> None:
    del folder


def _no_image_in_a_class(folder: Path) -> None:
    write(folder, {"ant": 3, "bee": 0})


def _texts_in_a_class(folder: Path) -> None:
    write(folder, {"ant": 3, "bee": 0})
    for name in ("0.txt", "1.txt", "2.heix"):
        (folder / "bee" / name).write_text("")


def _one_image(folder: Path) -> None:
    write(folder, {"ant": 3, "bee": 1})


def _one_class(folder: Path) -> None:
    write(folder, {"ant": 3})


def _one_class_in_parts(folder: Path) -> None:
    write(folder / "train", {"ant": 3})
    write(folder / "test", {"ant": 3})


def _nested_parts(folder: Path) -> None:
    for part in ("train", "test"):
        write(folder / "photos" / part, {"ant": 3, "bee": 3})


def _nested_classes(folder: Path) -> None:
    write(folder / "images", {"ant": 3, "bee": 3})
    (folder / "labels.csv").write_text("file,label")


def _deeply_nested(folder: Path) -> None:
    write(folder / "archive" / "v1" / "photos", {"ant": 3, "bee": 3})
    write(folder, {"__MACOSX": 1})


def _two_data_sets(folder: Path) -> None:
    for name in ("old", "new"):
        write(folder / "sets" / name, {"ant": 3, "bee": 3})


def _parts_in_classes(folder: Path) -> None:
    for name in ("ant", "bee"):
        write(folder / name, {"train": 3, "test": 3})


def _data_set_beside_documents(folder: Path) -> None:
    for part in ("train", "test"):
        write(folder / "photos" / part, {"ant": 3, "bee": 3})
    (folder / "documents").mkdir()


def _other_classes(folder: Path) -> None:
    write(folder / "train", {"ant": 3, "bee": 3})
    write(folder / "test", {"ant": 3, "wasp": 3})


def _fewer_classes(folder: Path) -> None:
    write(folder / "Training", {"ant": 3, "bee": 3})
    write(folder / "Validation", {"ant": 3})


def _train_without_classes(folder: Path) -> None:
    (folder / "train").mkdir()


def _train_of_images(folder: Path) -> None:
    write(folder, {"train": 4, "test1": 2})
    (folder / "train" / "labels.csv").write_text("file,label")


def _images_and_table(folder: Path) -> None:
    write(folder.parent, {folder.name: 4})
    (folder / "labels.csv").write_text("file,label")


def _archive(folder: Path) -> None:
    (folder / "photos.zip").write_bytes(b"")


def _class_itself(folder: Path) -> None:
    write(folder.parent, {folder.name: 4, "bee": 4})


def _documents(folder: Path) -> None:
    (folder / "notes.txt").write_text("")


def _no_train(folder: Path) -> None:
    for part in ("test", "val"):
        write(folder / part, {"ant": 3, "bee": 3})


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_nothing, "no class folders in DIR: it is empty"),
        (_no_image_in_a_class, "no images in DIR/bee: add some, or delete the class"),
        (
            _texts_in_a_class,
            r"no images in DIR/bee: .* read as images \(2 .txt, 1 .heix\): convert",
        ),
        (_one_image, "class 1 has 1 images: too few to hold out 1 of them"),
        (_one_class, r"DIR has only one class folder \('ant'\), but a classifier needs two"),
        (_one_class_in_parts, r"DIR/train has only one class folder \('ant'\)"),
        (_nested_parts, r"\('photos'\), and that holds test and train: name folder:DIR/photos$"),
        (_nested_classes, r"\('images'\), and that holds ant and bee: name folder:DIR/images$"),
        (_deeply_nested, r"\('archive'\), and that holds v1: name folder:DIR/archive/v1/photos$"),
        (_two_data_sets, "name folder:DIR/sets/new or folder:DIR/sets/old$"),
        (
            _parts_in_classes,
            "DIR/ant would be read as a class, but it holds test and train: move its images to "
            "train/ant/$",
        ),
        (_data_set_beside_documents, "DIR/photos would be .* class, .*: name folder:DIR/photos$"),
        (
            _other_classes,
            "classes: only train has bee, and only test has wasp; both need the same class fold",
        ),
        (
            _fewer_classes,
            "train and Validation have different classes: only train has bee; both need",
        ),
        (_train_without_classes, "no class folders in DIR/train: it is empty"),
        (
            _train_of_images,
            "no class folders in DIR/train: it holds 4 images and labels.csv, which",
        ),
        (_images_and_table, "it holds 4 images and labels.csv, which .* each class, DIR/CLASS/$"),
        (_class_itself, "it holds 4 images: sort .*/CLASS/; if they are one class, name folder:"),
        (_archive, "it holds photos.zip: unpack it, and name the folder that it makes"),
        (_documents, r"other files \(1 .txt\): put the images of each class into DIR/CLASS/"),
        (_no_train, "DIR has no folder train, and test, val would be read as classes"),
    ],
)
def test_other_layouts_are_refused_with_what_to_do(
    arrange: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "DIR"
    folder.mkdir()
    arrange(folder)
    with pytest.raises(DataError, match=message.replace("DIR", str(folder))):
        data.load(f"folder:{folder}")


# Names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ant/0.png", "data set 'DIR' has no kind: write folder:DIR$"),
        ("cifar-100-python/meta", "data set 'DIR' has no kind: write cifar100:DIR$"),
        ("FashionMNIST/raw/x", "data set 'DIR' has no kind: write fashion-mnist:DIR$"),
    ],
)
def test_a_folder_without_kind_is_told_its_kind(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / content).parent.mkdir(parents=True)
    (tmp_path / content).write_bytes(b"")
    with pytest.raises(UsageError, match=message.replace("DIR", str(tmp_path))):
        data.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["", "folder:", "imagenette:"])
def test_an_archive_is_to_be_unpacked(kind: str, tmp_path: Path) -> None:
    (tmp_path / "photos.tar.gz").write_bytes(b"")
    with pytest.raises((DataError, UsageError), match=r"photos.tar.gz.*: unpack it, and "):
        data.load(f"{kind}{tmp_path}/photos.tar.gz")


def test_a_folder_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "photos", {"ant": 5, "bee": 5})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.load("folder:~/photos").class_names == ("ant", "bee")
