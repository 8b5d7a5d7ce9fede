"""CUB-200-2011 as published; its annotations as concepts are in `test_annotations`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layouts import prune_briefly, random_pixels, write_image
from secateur import data
from secateur.data import FileImages
from secateur.data.cub import Birds, read_birds
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.errors import DataError

SPECIES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
IMAGES = 8
"""Of each species; the last three are for testing."""


def write_cub(directory: Path) -> None:
    """The published folder: JPEGs, one of them grey, and every table with a line an image."""
    (directory / "parts").mkdir(parents=True)
    tables: dict[str, list[str]] = {
        "classes": [f"{number + 1} {name}" for number, name in enumerate(SPECIES)],
        **{name: [] for name in ("images", "image_class_labels", "train_test_split")},
        "bounding_boxes": [],
        "parts/parts": ["1 back", "2 beak"],
        "parts/part_locs": [],
    }
    pixels = random_pixels(len(SPECIES) * IMAGES, 20, 26, 3)
    for place, image in enumerate(pixels):
        species, number = divmod(place, IMAGES)
        file = f"{SPECIES[species]}/{SPECIES[species][4:]}_{number:04}_{place}.jpg"
        write_image(directory / "images" / file, image[:, :, 0] if place == 1 else image)
        bird = place + 1
        tables["images"].append(f"{bird} {file}")
        tables["image_class_labels"].append(f"{bird} {species + 1}")
        tables["train_test_split"].append(f"{bird} {int(number < IMAGES - 3)}")
        tables["bounding_boxes"].append(f"{bird} 2.0 3.0 15.0 12.0")
        tables["parts/part_locs"] += [f"{bird} 1 6.0 7.0 1", f"{bird} 2 0.0 0.0 0"]
    for name, lines in tables.items():
        (directory / f"{name}.txt").write_text("\n".join(lines) + "\n")


def test_the_official_split_is_read(tmp_path: Path) -> None:
    write_cub(tmp_path)
    splits = data.READERS["cub"](tmp_path)
    assert splits.class_names == (
        *("Black footed Albatross", "Laysan Albatross", "Sooty Albatross"),
    )
    assert splits.train.labels.tolist() == 5 * [0] + 5 * [1] + 5 * [2]
    assert splits.test.labels.tolist() == 3 * [0] + 3 * [1] + 3 * [2]
    assert isinstance(splits.test, FileImages)
    assert [path.stem[-2:] for path in splits.test.paths[:3]] == ["_5", "_6", "_7"]
    pixels = splits.train.read(torch.arange(15), Preprocessing(16, 18))
    assert pixels.shape == (15, 3, 16, 16)
    assert torch.equal(pixels[1, 0], pixels[1, 2])


def test_the_whole_method_runs_on_it(model_file: Path, tmp_path: Path) -> None:
    write_cub(tmp_path / "cub")
    result = prune_briefly(model_file, f"cub:{tmp_path / 'cub'}", tmp_path / "run")
    assert result.class_names[0] == "Black footed Albatross"
    assert {stage.score.images for stage in result.stages} == {9}


def _no_list(directory: Path) -> None:
    (directory / "images.txt").unlink()


def _no_split(directory: Path) -> None:
    (directory / "train_test_split.txt").unlink()


def _all_training(directory: Path) -> None:
    file = directory / "train_test_split.txt"
    file.write_text("".join(f"{line.split()[0]} 1\n" for line in file.read_text().splitlines()))


def _all_test(directory: Path) -> None:
    file = directory / "train_test_split.txt"
    file.write_text("".join(f"{line.split()[0]} 0\n" for line in file.read_text().splitlines()))


def _large_class(directory: Path) -> None:
    file = directory / "image_class_labels.txt"
    file.write_text(file.read_text().replace("24 3", "24 4"))


def _class_zero(directory: Path) -> None:
    file = directory / "image_class_labels.txt"
    file.write_text(file.read_text().replace("24 3", "24 0"))


def _no_test_image(directory: Path) -> None:
    next((directory / "images" / SPECIES[2]).glob("*_23.jpg")).unlink()


def _no_training_image(directory: Path) -> None:
    next((directory / "images" / SPECIES[0]).glob("*_0.jpg")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_list, r"no images\.txt or images\.txt\.gz of CUB-200-2011 in"),
        (_no_split, r"no train_test_split\.txt or train_test_split\.txt\.gz of CUB-200-2011 in"),
        (_all_training, "train_test_split leaves no test images"),
        (_all_test, "train_test_split leaves no training images"),
        (_large_class, "a class number outside 1 to 3"),
        (_class_zero, "a class number outside 1 to 3"),
        (_no_test_image, r"1 of 9 test images of CUB-200-2011 are missing, .*_23\.jpg among"),
        (_no_training_image, r"1 of 15 training images of CUB-200-2011 are missing, .*_0\.jpg"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_cub(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load(f"cub:{tmp_path}")


def test_the_real_lists_make_the_published_split(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = shared_data / "cub_annotations"
    if not staged.is_dir():
        pytest.skip(f"no {staged}")
    with pytest.raises(DataError, match="5994 of 5994 training images of CUB-200-2011 are missing"):
        data.load(f"cub:{staged}")

    def present(directory: Path, birds: Birds, numbers: torch.Tensor, _: str) -> tuple[Path, ...]:
        return tuple(directory / "images" / birds.files[number] for number in numbers.tolist())

    monkeypatch.setattr("secateur.data.cub.image_files", present)
    splits = data.READERS["cub"](staged)
    assert (len(splits.train.labels), len(splits.test.labels)) == (5_994, 5_794)
    assert len(set(splits.class_names)) == 200
    assert splits.class_names[0] == "Black footed Albatross"
    assert splits.class_names[-1] == "Common Yellowthroat"
    assert splits.train.labels.bincount(minlength=200).min() >= 29
    assert isinstance(splits.train, FileImages)
    assert isinstance(splits.test, FileImages)
    assert not set(splits.train.paths) & set(splits.test.paths)
    assert len(read_birds(staged).files) == 11_788
