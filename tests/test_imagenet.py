"""ImageNet and parts of it, in folders by WordNet id."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from layouts import prune_briefly, random_pixels, write_classes, write_image
from secateur import data
from secateur.data import FileImages
from secateur.data.imagenet import class_names
from secateur.data.preprocessing import Preprocessing
from secateur.models import zoo
from secateur.runtime.errors import DataError

WNIDS = list(class_names())
SOME = ["n01440764", "n02102040", "n03888257"]
"""Tench, English springer and parachute, of Imagenette's ten."""
THEIR_NUMBERS = [0, 217, 701]


def write_imagenette(directory: Path) -> None:
    write_classes(directory / "train", SOME, 6)
    write_classes(directory / "val", SOME, 2, seed=1)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images a class to train with and one to test with."""
    directory = tmp_path_factory.mktemp("imagenet")
    write_classes(directory / "train", WNIDS, 2)
    write_classes(directory / "val", WNIDS, 1, seed=1)
    return directory


# The table


def test_the_classes_are_those_of_ilsvrc_2012() -> None:
    names = class_names()
    assert len(names) == 1000
    assert sorted(names) == list(names)
    meta = torchvision.models.ResNet18_Weights.DEFAULT.meta
    assert list(names.values()) == meta["categories"]


def test_the_ids_are_timms() -> None:
    info = pytest.importorskip("timm.data").ImageNetInfo()
    assert info.label_names() == list(class_names())


# ImageNet


def test_every_class_has_its_number(imagenet: Path) -> None:
    splits = data.READERS["imagenet"](imagenet)
    assert splits.class_names == tuple(class_names().values())
    assert splits.test.labels.tolist() == list(range(1000))
    assert splits.train.labels.bincount().tolist() == 1000 * [2]
    assert isinstance(splits.test, FileImages)
    assert [path.parent.name for path in splits.test.paths] == WNIDS


@pytest.mark.slow
def test_the_whole_method_runs_on_imagenet(
    imagenet: Path, model_file: Path, tmp_path: Path
) -> None:
    result = prune_briefly(model_file, f"imagenet:{imagenet}", tmp_path / "run", batch_size=200)
    assert result.config.model.num_classes == 1000
    assert {stage.score.images for stage in result.stages} == {1000}
    assert all(group.removed for group in result.groups[:1])


def test_missing_and_unknown_classes_are_named(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in WNIDS:
            (tmp_path / part / wnid).mkdir(parents=True)
    (tmp_path / "val" / WNIDS[3]).rmdir()
    (tmp_path / "val" / WNIDS[9]).rmdir()
    missing = f"val lacks 2 of ImageNet's 1,000 classes: {WNIDS[3]}, {WNIDS[9]}; .* imagenette:DIR"
    with pytest.raises(DataError, match=missing):
        data.load(f"imagenet:{tmp_path}")
    (tmp_path / "train" / "tench").mkdir()
    with pytest.raises(DataError, match=r"train has folders .* WordNet ids .*: tench$"):
        data.load(f"imagenet:{tmp_path}")


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in WNIDS:
            (tmp_path / part / wnid).mkdir(parents=True)
    write_classes(tmp_path / "train", WNIDS[:1], 2)
    with pytest.raises(
        DataError, match=f"no images in .*train/{WNIDS[1]}: add some, or delete the class"
    ):
        data.load(f"imagenet:{tmp_path}")


# Imagenette


def test_labels_are_numbers_among_the_thousand(tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    dataset = data.load(f"imagenette:{tmp_path}")
    assert len(dataset.class_names) == 1000
    assert [dataset.class_names[number] for number in THEIR_NUMBERS] == [
        *("tench", "English springer", "parachute"),
    ]
    for part, count in ((dataset.train, 5), (dataset.validation, 1), (dataset.test, 2)):
        assert part.labels.unique().tolist() == THEIR_NUMBERS
        assert part.labels.unique(return_counts=True)[1].tolist() == 3 * [count]
    calibration = data.draw_calibration_images(dataset.train, 7)
    assert sorted(calibration.labels.unique(return_counts=True)[1].tolist()) == [2, 2, 3]


@pytest.mark.slow
def test_the_whole_method_runs_on_imagenette(model_file: Path, tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    result = prune_briefly(model_file, f"imagenette:{tmp_path}", tmp_path / "run")
    assert result.config.model.num_classes == 1000
    assert len(result.class_names) == 1000
    assert {stage.score.images for stage in result.stages} == {6}


def _flat_val(directory: Path) -> None:
    shutil.rmtree(directory / "val")
    write_image(directory / "val" / "ILSVRC2012_val_00000001.JPEG", random_pixels(9, 9, 3))


def _no_val(directory: Path) -> None:
    shutil.rmtree(directory / "val")


def _no_train(directory: Path) -> None:
    shutil.rmtree(directory / "train")


def _empty_val(directory: Path) -> None:
    shutil.rmtree(directory / "val")
    (directory / "val").mkdir()


def _other_classes(directory: Path) -> None:
    (directory / "val" / SOME[0]).rename(directory / "val" / WNIDS[1])


def _name_for_id(directory: Path) -> None:
    (directory / "train" / SOME[0]).rename(directory / "train" / "tench")


def _empty_class(directory: Path) -> None:
    shutil.rmtree(directory / "val" / SOME[2])
    (directory / "val" / SOME[2]).mkdir()


def _one_image(directory: Path) -> None:
    for number in range(5):
        (directory / "train" / SOME[1] / f"{SOME[1]}_{number}.JPEG").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flat_val, r"val are not sorted into class folders: torchvision.datasets.ImageNet"),
        (_no_val, "no folder val in .*: expected train/WNID/ and val/WNID/"),
        (_no_train, "no folder train in .*: expected train/WNID/ and val/WNID/"),
        (_empty_val, "no class folders in .*val"),
        (
            _other_classes,
            f"different classes: only train has {SOME[0]}, and only val has {WNIDS[1]}",
        ),
        (_name_for_id, "train has folders .* WordNet ids of .* classes: tench"),
        (_empty_class, f"no images in .*val/{SOME[2]}"),
        (_one_image, "class 217 has 1 images: too few to hold out 1 of them"),
    ],
)
def test_wrong_layouts_are_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_imagenette(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load(f"imagenette:{tmp_path}")


# Real images


def test_the_staged_part_of_imagenette(shared_data: Path, tmp_path: Path) -> None:
    staged = shared_data / "imagenette_subset"
    if not staged.is_dir():
        pytest.skip(f"no {staged}")
    (tmp_path / "train").symlink_to(staged / "train")
    (tmp_path / "val").symlink_to(staged / "ilsvrc_val")
    dataset = data.load(f"imagenette:{tmp_path}")
    numbers = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    for part, count in ((dataset.train, 72), (dataset.validation, 8), (dataset.test, 50)):
        classes, counts = part.labels.unique(return_counts=True)
        assert classes.tolist() == numbers
        assert counts.tolist() == 10 * [count]
    listed = {}
    for line in (staged / "labels.tsv").read_text().splitlines()[1:]:
        file, number, _, name = line.split("\t")
        listed[Path(file).name] = (int(number), name)
    for part in (dataset.train, dataset.test):
        assert isinstance(part, FileImages)
        for path, label in zip(part.paths, part.labels.tolist(), strict=True):
            assert listed[path.name] == (label, dataset.class_names[label])
    preprocessing = zoo.preprocessing("torchvision:resnet18")
    assert dataset.test.read(torch.tensor([0, 499]), preprocessing).shape == (2, 3, 224, 224)


def test_the_staged_images_of_every_class_have_its_number(
    shared_data: Path, tmp_path: Path
) -> None:
    staged = shared_data / "imagenet_sample"
    if not staged.is_dir():
        pytest.skip(f"no {staged}")
    expected = []
    for line in (staged / "labels.tsv").read_text().splitlines()[1:]:
        file, number, wnid, _ = line.split("\t")
        expected.append((int(number), file))
        for part in ("train", "val"):
            (tmp_path / part / wnid).mkdir(parents=True)
            (tmp_path / part / wnid / file).symlink_to(staged / "images" / file)
    test = data.READERS["imagenet"](tmp_path).test
    assert isinstance(test, FileImages)
    names = [path.name for path in test.paths]
    assert list(zip(test.labels.tolist(), names, strict=True)) == sorted(expected)
    assert test.read(torch.tensor([0, 999]), Preprocessing(8, 8)).shape == (2, 3, 8, 8)


# Kaggle's archive


def write_kaggle(directory: Path) -> Path:
    """Imagenette's miniature with `val` as Kaggle has it: unsorted, with a table."""
    root = directory / "ILSVRC" / "Data" / "CLS-LOC"
    write_imagenette(root)
    lines = ["ImageId,PredictionString"]
    for number, file in enumerate(sorted((root / "val").rglob("*.JPEG"), reverse=True)):
        name = f"ILSVRC2012_val_{number:08}"
        lines.append(f"{name},{file.parent.name} 1 2 3 4 {file.parent.name} 1 1 9 9 ")
        file.rename(root / "val" / f"{name}.JPEG")
    for wnid in SOME:
        (root / "val" / wnid).rmdir()
    (directory / "LOC_val_solution.csv").write_text("\n".join(lines))
    (directory / "ILSVRC" / "Annotations").mkdir()
    return root


def test_kaggles_archive_is_read_with_its_table(tmp_path: Path) -> None:
    root = write_kaggle(tmp_path)
    write_imagenette(tmp_path / "sorted")
    expected = data.READERS["imagenette"](tmp_path / "sorted")
    for directory in (tmp_path, tmp_path / "ILSVRC", root):
        splits = data.READERS["imagenette"](directory)
        assert splits.train.labels.tolist() == expected.train.labels.tolist()
        assert splits.test.labels.tolist() == [label for label in THEIR_NUMBERS for _ in range(2)]
        assert isinstance(splits.test, FileImages)
        assert [path.name[-7:-5] for path in splits.test.paths] == [
            "04",
            "05",
            "02",
            "03",
            "00",
            "01",
        ]


def test_an_incomplete_table_is_refused(tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text(table.read_text().replace(SOME[0], "n000"))
    message = (
        "LOC_val_solution.csv has no class of ImageNet for 2 of 6 images, ILSVRC2012_val_00000004"
    )
    with pytest.raises(DataError, match=message):
        data.load(f"imagenette:{tmp_path}")
    table.unlink()
    with pytest.raises(DataError, match="not sorted into class folders"):
        data.load(f"imagenette:{tmp_path}")


def test_the_folder_inside_is_named(tmp_path: Path) -> None:
    write_imagenette(tmp_path / "imagenette2-160")
    message = f"no folder train in {tmp_path}: .*; name imagenette:{tmp_path}/imagenette2-160$"
    with pytest.raises(DataError, match=message):
        data.load(f"imagenette:{tmp_path}")
