"""Data sets that the library `datasets` wrote, read from disk; nothing is fetched."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from layouts import Pixels, prune_briefly, random_pixels
from secateur import data
from secateur.data import Unreadable, batches
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.errors import DataError, UnreadableImage, UsageError

NATIVE = Preprocessing(16, 16)
NAMES = ["ant", "bee", "cow"]


def encoded(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The library, which keeps what it makes in a folder of the test and never asks the hub."""
    library = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def make_split(
    hub: Any, labels: Sequence[int | None], files: Sequence[bytes], names: Sequence[str] = NAMES
) -> Any:
    """Rows with the columns `picture`, `kind` and `weight`."""
    features = hub.Features(
        {
            "weight": hub.Value("float32"),
            "kind": hub.ClassLabel(names=list(names)),
            "picture": hub.Image(),
        }
    )
    rows = {
        "weight": [0.5] * len(labels),
        "kind": list(labels),
        "picture": [{"bytes": file, "path": None} for file in files],
    }
    return hub.Dataset.from_dict(rows, features=features)


def pictures(count: int, seed: int = 0) -> list[bytes]:
    return [encoded(pixels) for pixels in random_pixels(count, 16, 16, 3, seed=seed)]


def write(hub: Any, folder: Path, **splits: Any) -> str:
    hub.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


def write_data_set(hub: Any, folder: Path, second: str = "test") -> str:
    """Five images a class to train with, two to test with."""
    train = make_split(hub, 5 * [0, 1, 2], pictures(15))
    return write(
        hub, folder, train=train, **{second: make_split(hub, 2 * [2, 1, 0], pictures(6, 1))}
    )


def test_columns_are_found_by_their_type(hub: Any, tmp_path: Path) -> None:
    source = write_data_set(hub, tmp_path / "stored")
    dataset = data.load(source)
    assert dataset.name == source
    assert dataset.class_names == tuple(NAMES)
    assert dataset.test.labels.tolist() == 2 * [2, 1, 0]
    assert dataset.train.labels.bincount().tolist() == [4, 4, 4]
    assert dataset.validation.labels.bincount().tolist() == [1, 1, 1]
    pixels = dataset.test.read(torch.tensor([4, 0]), NATIVE)
    expected = torch.from_numpy(random_pixels(6, 16, 16, 3, seed=1)).permute(0, 3, 1, 2)
    assert torch.equal(pixels, expected[[4, 0]])
    selected = dataset.test.take(torch.tensor([5, 4]))
    assert torch.equal(selected.read(torch.tensor([1]), NATIVE), expected[[4]])
    assert selected.labels.tolist() == [0, 1]


def test_a_folder_that_the_library_can_read_is_read(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    make_split(hub, 5 * [0, 1, 2], pictures(15)).to_parquet(folder / "train-0.parquet")
    make_split(hub, [0, 1], pictures(2, 1)).to_parquet(folder / "validation-0.parquet")
    dataset = data.load(f"hf:{folder}")
    assert dataset.class_names == tuple(NAMES)
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.test.read(torch.arange(2), NATIVE).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("second", ["test", "validation", "valid", "val"])
def test_any_of_these_splits_is_the_test_part(hub: Any, second: str, tmp_path: Path) -> None:
    source = write_data_set(hub, tmp_path / "stored", second)
    assert len(data.load(source).test.labels) == 6


@pytest.mark.parametrize("withheld", [-1, None])
def test_a_split_without_labels_is_passed_over(
    hub: Any, tmp_path: Path, withheld: int | None
) -> None:
    source = write(
        hub,
        tmp_path / "stored",
        train=make_split(hub, 3 * [0, 1, 2], pictures(9)),
        test=make_split(hub, [withheld, withheld], pictures(2)),
        validation=make_split(hub, [0, 1, 2], pictures(3)),
    )
    assert data.load(source).test.labels.tolist() == [0, 1, 2]


def test_a_split_without_a_column_of_labels_is_passed_over(hub: Any, tmp_path: Path) -> None:
    source = write(
        hub,
        tmp_path / "stored",
        train=make_split(hub, 3 * [0, 1, 2], pictures(9)),
        test=make_split(hub, [0, 0], pictures(2)).remove_columns("kind"),
        validation=make_split(hub, [0, 1, 2], pictures(3)),
    )
    assert data.load(source).test.labels.tolist() == [0, 1, 2]


def test_the_whole_method_runs_on_it(hub: Any, model_file: Path, tmp_path: Path) -> None:
    source = write_data_set(hub, tmp_path / "stored")
    result = prune_briefly(model_file, source, tmp_path / "run")
    assert result.class_names == tuple(NAMES)
    assert {stage.score.images for stage in result.stages} == {6}


def test_an_image_that_can_not_be_read_is_named_by_its_row(hub: Any, tmp_path: Path) -> None:
    files = pictures(4)
    files[2] = files[2][:60]
    source = write(
        hub,
        tmp_path / "stored",
        train=make_split(hub, 3 * [0, 1, 2], pictures(9)),
        test=make_split(hub, [0, 1, 2, 0], files),
    )
    test = data.load(source).test.take(torch.tensor([3, 2, 1]))
    with pytest.raises(UnreadableImage, match=r"the image hf:.*stored, test\[2\] can't be read"):
        list(batches(test, 3, NATIVE))
    unreadable = Unreadable()
    (batch,) = batches(test, 3, NATIVE, unreadable=unreadable)
    assert batch.labels.tolist() == [0, 1]
    assert unreadable.names == (f"{source}, test[2]",)


def test_tables_without_images_and_labels_are_refused(hub: Any, tmp_path: Path) -> None:
    train = make_split(hub, 3 * [0, 1, 2], pictures(9))
    test = make_split(hub, [0, 1, 2], pictures(3))
    two_labels = test.add_column("sort", [0, 1, 2]).cast_column("sort", hub.ClassLabel(names=NAMES))
    cases = {
        "has no split train, only test": {"test": test},
        "has no labelled split test, validation, valid or val, only train": {"train": train},
        "only train, test": {"train": train, "test": make_split(hub, [-1], pictures(1))},
        r"train has no column of type Image, .* it has weight, kind": {
            "train": train.remove_columns("picture"),
            "test": test,
        },
        r"train has no column of type ClassLabel, .* it has weight, picture": {
            "train": train.remove_columns("kind"),
            "test": test,
        },
        r"test has several columns \(kind, sort\) of type ClassLabel": {
            "train": train,
            "test": two_labels,
        },
        "test has a label outside 0 to 2": {
            "train": train,
            "test": make_split(hub, [0, -1], pictures(2)),
        },
        "train has a label outside 0 to 2": {
            "train": make_split(hub, [0, None], pictures(2)),
            "test": test,
        },
        "train and test have different classes": {
            "train": train,
            "test": make_split(hub, [0], pictures(1), ["ant", "bee", "dog"]),
        },
    }
    for number, (message, splits) in enumerate(cases.items()):
        source = write(hub, tmp_path / f"stored_{number}", **splits)
        with pytest.raises(DataError, match=message):
            data.load(source)


def test_a_data_set_that_cannot_be_loaded_is_an_error_of_one_line(hub: Any, tmp_path: Path) -> None:
    for name in ("no-such/data-set", str(tmp_path / "nowhere")):
        with pytest.raises(DataError, match=f"hf:{name} can't be loaded: ") as caught:
            data.load(f"hf:{name}")
        assert len(str(caught.value).splitlines()) == 1


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[hf\]'"):
        data.load("hf:any")
