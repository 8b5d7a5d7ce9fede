"""Files that can't be read: named in an error or, on request, left out and counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from layouts import prune_briefly, random_pixels, write_image
from secateur import data
from secateur.config import BaseConfig, RunConfig, from_dict
from secateur.data import FileImages, Unreadable, batches, read_batch
from secateur.data.preprocessing import Preprocessing
from secateur.experiments.inspect import inspect_network
from secateur.experiments.run import run
from secateur.experiments.train_base import BaseResult, train_base
from secateur.models.evaluate import evaluate
from secateur.runtime.errors import DataError, UnreadableImage

SMALL = Preprocessing(8, 8)
FORMATS = ("jpg", "png", "webp", "bmp", "ppm", "tif")


def write_numbered(directory: Path, count: int, broken: set[int]) -> FileImages:
    """JPEGs whose label is their number, of which some are cut off in the middle."""
    paths = []
    for number, pixels in enumerate(random_pixels(count, 20, 24, 3)):
        paths.append(directory / f"{number:02}.jpg")
        write_image(paths[-1], pixels)
        if number in broken:
            paths[-1].write_bytes(paths[-1].read_bytes()[:400])
    return FileImages(tuple(paths), torch.arange(count))


def damaged(folder: Path) -> set[Path]:
    """Cuts one image of each class off, in every part, and returns them."""
    names = set()
    for directory in (*folder.glob("train/*"), *folder.glob("test/*")):
        file = min(directory.iterdir())
        file.write_bytes(file.read_bytes()[:200])
        names.add(file)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of eight images to train with and four to test with, in class folders."""
    for part, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("ant", "bee")):
            for number, pixels in enumerate(random_pixels(count, 16, 16, 3, seed=label)):
                write_image(tmp_path / "images" / part / name / f"{number}.png", pixels)
    return tmp_path / "images"


# Reading


def test_an_error_names_the_first_and_knows_them_all(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 6, {1, 4})
    with pytest.raises(UnreadableImage, match=r"the image .*04\.jpg can't be read: .* \(and 1 mo"):
        images.read(torch.tensor([5, 4, 2, 1]), SMALL)
    with pytest.raises(UnreadableImage) as error:
        images.read(torch.arange(6), SMALL)
    assert error.value.files == {1: str(tmp_path / "01.jpg"), 4: str(tmp_path / "04.jpg")}


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 2, set())
    images.paths[1].unlink()
    with pytest.raises(UnreadableImage, match=r"the image .*01\.jpg can't be read: .*No such file"):
        images.read(torch.arange(2), SMALL)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_16_bits_the_upper_8_are_read(suffix: str, tmp_path: Path) -> None:
    grey = random_pixels(1, 8, 8, 1)[0, ..., 0].astype(np.uint16)
    path = tmp_path / f"image.{suffix}"
    if suffix == "pgm":  # Pillow 10 does not write it
        path.write_bytes(b"P5 8 8 65535\n" + (grey << 8 | 77).astype(">u2").tobytes())
    else:
        Image.fromarray(grey << 8 | 77).save(path)
    read = FileImages((path,), torch.zeros(1).long()).read(torch.tensor([0]), SMALL)
    assert torch.equal(read, torch.from_numpy(grey.astype(np.uint8)).expand(1, 3, 8, 8))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_without_a_known_range_are_refused(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    Image.fromarray(np.ones((8, 8), kind)).save(path)
    with pytest.raises(
        UnreadableImage, match=r"image\.tif can't be read: .*: convert it to 8 bits"
    ):
        FileImages((path,), torch.zeros(1).long()).read(torch.tensor([0]), SMALL)


def damage_of(content: bytes, kind: str, generator: np.random.Generator) -> bytes:
    if kind == "cut":
        return content[: int(generator.integers(len(content)))]
    changed = bytearray(content)
    for place in generator.integers(0, min(len(changed), 200), 12):
        changed[place] = int(generator.integers(256))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", ["cut", "changed"])
def test_whatever_the_damage_it_is_an_error_of_ours_or_none(
    suffix: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(random_pixels(12, 14, 3)).save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(5)
    refused = 0
    for _ in range(40):
        path.write_bytes(damage_of(whole, kind, generator))
        try:
            FileImages((path,), torch.zeros(1).long()).read(torch.tensor([0]), SMALL)
        except UnreadableImage:
            refused += 1
    assert refused > (30 if kind == "cut" else 0)


def test_readable_images_come_in_order(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 8, {0, 5})
    unreadable = Unreadable()
    asked: list[list[int]] = []

    def read(indices: Tensor) -> Tensor:
        asked.append(indices.tolist())
        return images.read(indices, SMALL)

    batch = read_batch(read, torch.tensor([7, 5, 3, 0, 1]), unreadable)
    assert batch is not None
    indices, pixels = batch
    assert indices.tolist() == [7, 3, 1]
    assert torch.equal(pixels, images.read(torch.tensor([7, 3, 1]), SMALL))
    assert asked == [[7, 5, 3, 0, 1], [7, 3, 1]]
    assert unreadable.names == (str(tmp_path / "00.jpg"), str(tmp_path / "05.jpg"))


def test_without_a_counter_it_is_an_error(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 3, {2})
    with pytest.raises(UnreadableImage, match=r"02\.jpg"):
        read_batch(lambda indices: images.read(indices, SMALL), torch.arange(3))


def test_nothing_is_left_of_a_batch_of_damaged_files(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 3, {0, 1, 2})
    unreadable = Unreadable()
    assert (
        read_batch(lambda indices: images.read(indices, SMALL), torch.arange(3), unreadable) is None
    )
    assert len(unreadable.names) == 3


def test_other_errors_reach_the_caller() -> None:
    def read(indices: Tensor) -> Tensor:
        raise DataError("no table of numbers")

    with pytest.raises(DataError, match="no table of numbers"):
        read_batch(read, torch.arange(3), Unreadable())


# Batches


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_batches_skip_unreadable_images(size: int, tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 9, {2, 3, 8})
    whole = write_numbered(tmp_path / "whole", 9, set())
    unreadable = Unreadable()
    all_batches = list(batches(images, size, SMALL, unreadable=unreadable))
    assert all(len(batch.labels) for batch in all_batches)
    labels = torch.cat([batch.labels for batch in all_batches])
    assert labels.tolist() == [0, 1, 4, 5, 6, 7]
    assert torch.equal(labels, torch.cat([batch.indices for batch in all_batches]))
    expected = SMALL.normalise(whole.read(labels, SMALL))
    assert torch.equal(torch.cat([batch.images for batch in all_batches]), expected)
    assert [Path(name).stem for name in unreadable.names] == ["02", "03", "08"]


def test_files_are_counted_once_however_often_they_are_read(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 4, {1})
    unreadable = Unreadable()
    for _ in range(3):
        list(batches(images, 2, SMALL, unreadable=unreadable))
    assert unreadable.names == (str(tmp_path / "01.jpg"),)


def test_a_score_counts_readable_images(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 7, {1, 5})
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 7))
    shown = batches(images, 3, SMALL, unreadable=Unreadable())
    assert evaluate(model, shown).images == 5


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    images = write_numbered(tmp_path, 2, {0, 1})
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 7))
    with pytest.raises(DataError, match="there are no images to score"):
        evaluate(model, batches(images, 3, SMALL, unreadable=Unreadable()))


# Runs


def test_by_default_a_run_ends_at_the_first_one(
    folder: Path, model_file: Path, tmp_path: Path
) -> None:
    damaged(folder)
    with pytest.raises(UnreadableImage, match=r"the image .*train/bee/0\.png can't be read"):
        prune_briefly(model_file, f"folder:{folder}", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_names_the_skipped_images(folder: Path, model_file: Path, tmp_path: Path) -> None:
    lost = damaged(folder)
    options = {"skip_unreadable": True, "batch_size": 3}
    result = prune_briefly(model_file, f"folder:{folder}", tmp_path / "run", **options)
    dataset = data.load(f"folder:{folder}")
    assert isinstance(dataset.validation, FileImages)
    read = lost - set(dataset.validation.paths)  # which nobody looked at
    assert result.unreadable == tuple(sorted(map(str, read)))
    assert {stage.score.images for stage in result.stages} == {6}
    assert (
        f"{len(read)} image files can't be read" in (tmp_path / "run" / "report.html").read_text()
    )
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"unreadable"' in log


@pytest.mark.slow
def test_it_is_as_if_the_files_were_not_there(
    folder: Path, model_file: Path, tmp_path: Path
) -> None:
    lost = damaged(folder)
    options = {"calibration_images": 20, "stratified": False, "batch_size": 50}
    skipped = prune_briefly(
        model_file, f"folder:{folder}", tmp_path / "one", skip_unreadable=True, **options
    )
    for file in lost:
        file.unlink()
    other = prune_briefly(model_file, f"folder:{folder}", tmp_path / "other", **options)
    one, two = skipped.score("before"), other.score("before")
    assert one is not None
    assert two is not None
    assert (one.metric, one.images) == (two.metric, two.images)
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert other.unreadable == ()


def test_a_calibration_set_of_damaged_files_is_an_error(
    folder: Path, model_file: Path, tmp_path: Path
) -> None:
    for file in folder.glob("train/*/*"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of 14 calibration images can be read"):
        prune_briefly(model_file, f"folder:{folder}", tmp_path / "run", skip_unreadable=True)


def test_where_the_sample_is_damaged_all_images_are_used(
    folder: Path, model_file: Path, tmp_path: Path
) -> None:
    source = f"folder:{folder}"
    calibration = data.draw_calibration_images(data.load(source).train, 4)
    assert isinstance(calibration, FileImages)
    calibration.paths[0].write_bytes(b"")

    def scores(every: int) -> list[tuple[float, ...]]:
        config = from_dict(
            {
                "model": {"name": f"{model_file}:small", "allow_untrained": True},
                "data": {
                    "source": source,
                    "image_size": 16,
                    "calibration_images": 4,
                    "skip_unreadable": True,
                },
                "score": {"criterion": "vote-iou", "sample_every": every},
                "finetune": {"epochs": 0},
            },
            RunConfig,
        )
        result = run(config, tmp_path / str(every))
        assert result.unreadable == (str(calibration.paths[0]),)
        return [group.scores for group in result.groups]

    assert scores(8) == scores(1)


def test_inspecting_filters_leaves_them_out_too(folder: Path, model_file: Path) -> None:
    damaged(folder)
    source: dict[str, object] = {"source": f"folder:{folder}", "image_size": 16}
    network = {"name": f"{model_file}:small", "allow_untrained": True}

    def inspect(**options: object) -> dict[str, object]:
        config = from_dict({"model": network, "data": {**source, **options}}, RunConfig)
        return inspect_network(config, ("l1",))

    with pytest.raises(UnreadableImage, match="can't be read"):
        inspect()
    listed = inspect(skip_unreadable=True)["unreadable"]
    assert isinstance(listed, list)
    assert listed
    assert all("train" in name for name in listed)


def test_training_a_base_network_leaves_them_out_too(folder: Path, tmp_path: Path) -> None:
    damaged(folder)
    settings: dict[str, object] = {"epochs": 1, "batch_size": 4, "workers": 0, "warmup_steps": 0}

    def trained(**options: object) -> BaseResult:
        source = {"source": f"folder:{folder}", "image_size": 32, **options}
        config = from_dict(
            {"model": {"name": "resnet20"}, "data": source, "train": settings}, BaseConfig
        )
        return train_base(config, tmp_path / str(len(options)))

    with pytest.raises(DataError, match="can't be read"):
        trained()
    assert trained(skip_unreadable=True).unreadable
