"""Images with objects in COCO's JSON and in YOLO's text files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur import data
from secateur.data.augmentation import Augmentation
from secateur.data.batches import batches
from secateur.data.coco import read_coco
from secateur.data.images_with_objects import ImagesWithObjects
from secateur.data.objects import Objects
from secateur.data.preprocessing import Geometry, Preprocessing
from secateur.data.training_stream import TrainingStream
from secateur.data.yolo import label_file
from secateur.runtime.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
BOX = (10, 6, 24, 12)
"""Left, top, right and bottom of the bright rectangle in every image."""
SIZE = (20, 32)


def write_image(path: Path, *, scale: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((SIZE[0] * scale, SIZE[1] * scale, 3), dtype=np.uint8)
    left, top, right, bottom = (scale * side for side in BOX)
    pixels[top:bottom, left:right] = 255
    Image.fromarray(pixels).save(path)


def coco_table(count: int, **changes: Any) -> dict[str, Any]:
    """Return annotations with one object an image, of the categories 3 and 7 in turn."""
    left, top, right, bottom = BOX
    row = {
        "bbox": [left, top, right - left, bottom - top],
        "area": 84.0,
        "iscrowd": 0,
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
    }
    images = [
        {"id": 100 + n, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]}
        for n in range(count)
    ]
    return {
        "images": images,
        "annotations": [
            {**row, "id": n, "image_id": 100 + n, "category_id": (3, 7)[n % 2], **changes}
            for n in range(count)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write_coco(root: Path, counts: dict[str, int], **changes: Any) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, count in counts.items():
        table = coco_table(count, **changes)
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(table))
        for number in range(count):
            write_image(root / part / f"{number}.png")


def test_coco_in_its_published_layout(tmp_path: Path) -> None:
    write_coco(tmp_path, {"train2017": 12, "val2017": 4})
    dataset = data.load(f"coco:{tmp_path}")
    assert dataset.kind == "objects"
    assert dataset.class_names == ("cat", "dog")
    assert [len(part) for part in dataset.all_labels] == [11, 1, 4]
    objects = dataset.test.read_targets(torch.tensor([0, 1]), Preprocessing(20, 20))
    assert objects is not None
    assert [one.classes.tolist() for one in objects] == [[0], [1]]
    assert objects[0].boxes.tolist() == [list(BOX)]
    assert objects[0].areas.tolist() == [84.0]
    assert objects[0].segments == ([[10, 6, 24, 6, 24, 12, 10, 12]],)
    assert objects[0].size == SIZE
    assert dataset.test.read_labels(torch.arange(2), Preprocessing(20, 20)).tolist() == [0, 0]


def test_crowds_keypoints_and_images_without_objects(tmp_path: Path) -> None:
    points = [12, 8, 2, 20, 10, 1, 0, 0, 0]
    encoded = {"size": [20, 32], "counts": [100, 40, 500]}
    write_coco(tmp_path, {"train": 11}, iscrowd=1, segmentation=encoded, keypoints=points)
    file = tmp_path / "annotations" / "instances_train.json"
    table = json.loads(file.read_text())
    table["annotations"] = table["annotations"][1:]
    file.write_text(json.dumps(table))
    for place in (tmp_path, file):
        dataset = data.load(f"coco:{place}")
        assert "a fifth of its images is held out" in dataset.notes[0]
        parts = (dataset.train, dataset.validation, dataset.test)
        both = [
            o
            for part in parts
            for o in part.read_targets(torch.arange(len(part.labels)), NET) or ()
        ]
        empty, *others = sorted(both, key=lambda objects: len(objects.boxes))
        assert empty.boxes.shape == (0, 4)
        assert empty.keypoints is not None
        assert empty.keypoints.shape == (0, 3, 3)
        assert empty.segments == ()
        assert all(one.is_crowd.all() and one.segments == (encoded,) for one in others)
        assert others[0].keypoints is not None
        assert others[0].keypoints[0].flatten().tolist() == points


NET = Preprocessing((32, 40), 32, fit="letterbox")


def test_annotations_beside_the_images(tmp_path: Path) -> None:
    for part, count in (("train", 11), ("valid", 3)):
        for number in range(count):
            write_image(tmp_path / part / f"{number}.png")
        table = coco_table(count)
        table["categories"].append({"id": 0, "name": "pets", "supercategory": "none"})
        for category in table["categories"][:2]:
            category["supercategory"] = "pets"
        table["categories"].reverse()
        (tmp_path / part / "_annotations.coco.json").write_text(json.dumps(table))
    dataset = data.load(f"coco:{tmp_path}")
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset.test.labels) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"annotations\[0\]: bbox must be a list of 4 numbers"),
        ({"bbox": [1, 2, -3, 4]}, r"annotations\[0\]: bbox has the sides -3"),
        ({"category_id": 5}, r"annotations\[0\]: there is no category 5"),
        ({"image_id": 5}, r"annotations\[0\]: there is no image 5"),
        ({"image_id": None}, r"annotations\[0\]: None is not a whole number"),
        ({"area": "large"}, r"annotations\[0\]: could not convert string"),
        ({"segmentation": [[1, 2, 3, 4]]}, r"annotations\[0\]: a polygon of segmentation needs"),
        ({"segmentation": {"size": [1, 2]}}, r"annotations\[0\]: segmentation needs size and"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_coco(tmp_path, {"train": 2}, **change)
    with pytest.raises(DataError, match=r"instances_train.json, " + message):
        data.load(f"coco:{tmp_path}")


def test_wrong_files_of_coco_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no annotations in .*: expected annotations/instances_PART"
    ):
        data.load(f"coco:{tmp_path}")
    write_coco(tmp_path, {"train": 11})
    file = tmp_path / "annotations" / "instances_train.json"
    table = json.loads(file.read_text())
    del table["images"][0]["height"]
    file.write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"images\[0\] has no 'height'"):
        data.load(f"coco:{tmp_path}")
    file.write_text(json.dumps(coco_table(11)))
    (tmp_path / "train").rename(tmp_path / "other")
    with pytest.raises(
        DataError, match=r"lists 0.png, which is in none of .*/train, .*images/train"
    ):
        data.load(f"coco:{tmp_path}")
    file.write_text("[1, 2")
    with pytest.raises(DataError, match=r"instances_train.json is not JSON"):
        data.load(f"coco:{tmp_path}")
    file.write_text("[]")
    with pytest.raises(DataError, match="needs the lists images, annotations and categories"):
        data.load(f"coco:{tmp_path}")


def bright(images: torch.Tensor) -> list[list[int]]:
    """Return the box around the bright pixels of each image."""
    boxes = []
    for image in images:
        rows, columns = torch.nonzero(image[0] > 0.5, as_tuple=True)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return [[int(side) for side in box] for box in boxes]


def plain(size: tuple[int, int] | int, **options: Any) -> Preprocessing:
    least = size if isinstance(size, int) else min(size)
    return Preprocessing(size, least, (0.0, 0, 0), (1.0, 1, 1), **options)


@pytest.mark.parametrize(
    "preprocessing",
    [
        plain(20),
        plain((16, 40)),
        plain((40, 64), fit="letterbox", pad_value=0),
        plain((64, 48), fit="letterbox", pad_value=0),
        plain((64, 48), fit="letterbox", pad_value=0, pad_at="top-left"),
        plain((30, 30), fit="stretch"),
    ],
)
def test_boxes_lie_where_the_input_shows_them(tmp_path: Path, preprocessing: Preprocessing) -> None:
    write_coco(tmp_path, {"train": 11})
    images = data.load(f"coco:{tmp_path}").train
    (batch, *_) = batches(images, 4, preprocessing)
    assert batch.targets is not None
    for shown, objects in zip(bright(batch.images), batch.targets, strict=True):
        (box,) = objects.boxes_in_input()
        assert (box - torch.tensor(shown)).abs().max() <= 1
        corners = objects.geometry.to_stored(box.reshape(2, 2)).flatten()
        assert torch.allclose(corners, objects.boxes[0])


def test_objects_of_a_larger_original_are_placed_in_the_file(tmp_path: Path) -> None:
    write_coco(tmp_path, {"train": 11})
    for number in range(11):
        write_image(tmp_path / "train" / f"{number}.png", scale=2)
    images = data.load(f"coco:{tmp_path}").train
    (batch, *_) = batches(images, 4, plain((40, 64), fit="letterbox"))
    assert batch.targets is not None
    assert batch.targets[0].size == SIZE
    assert bright(batch.images)[0] == batch.targets[0].boxes_in_input()[0].tolist()
    Image.new("RGB", (30, 30)).save(tmp_path / "train" / "0.png")
    everything = read_coco(tmp_path)
    parts = [
        part.take(torch.arange(len(part.labels))) for part in (everything.train, everything.test)
    ]
    message = r"train/0.png is 30×30, and its objects are annotated in one of 32×20"
    with pytest.raises(DataError, match=message):
        [part.read_targets(torch.arange(len(part.labels)), NET) for part in parts]


@pytest.mark.parametrize("crop", ["random_crop", "random_resized_crop", "none"])
def test_training_moves_image_and_boxes_together(tmp_path: Path, crop: str) -> None:
    write_coco(tmp_path, {"train": 11})
    images = data.load(f"coco:{tmp_path}").train
    preprocessing = plain((40, 64))
    stream = TrainingStream(images, preprocessing, Augmentation(crop), 8, seed=1)  # type: ignore[arg-type]
    (batch,) = stream.epoch(0)
    assert batch.targets is not None
    boxes = set()
    for image, objects in zip(batch.images, batch.targets, strict=True):
        (box,) = objects.boxes_in_input()
        box = torch.stack([box[0::2].clamp(0, 64), box[1::2].clamp(0, 40)], dim=1).flatten()
        boxes.add(tuple(box.tolist()))
        if (image > 0.5).any():
            (shown,) = bright(image[None])
            assert (box - torch.tensor(shown)).abs().max() <= 2
    assert len(boxes) > 1


def write_yolo(root: Path, lines: str, table: str = "names: [cat, dog]\n") -> None:
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{table}")
    for part, count in (("train", 11), ("val", 3)):
        for number in range(count):
            image = root / "images" / part / f"{number}.png"
            write_image(image)
            label_file(image).parent.mkdir(parents=True, exist_ok=True)
            label_file(image).write_text(lines)


LEFT, TOP, RIGHT, BOTTOM = (side / SIZE[1 - n % 2] for n, side in enumerate(BOX))
LINE = f"1 {(LEFT + RIGHT) / 2} {(TOP + BOTTOM) / 2} {RIGHT - LEFT} {BOTTOM - TOP}\n"
POLYGON = f"0 {LEFT} {TOP} {RIGHT} {TOP} {RIGHT} {BOTTOM} {LEFT} {BOTTOM}\n"


def first_objects(place: Path) -> Objects:
    objects = data.load(f"yolo:{place}").test.read_targets(torch.tensor([0]), NET)
    assert objects is not None
    return objects[0]


def test_yolo_boxes_and_polygons(tmp_path: Path) -> None:
    write_yolo(tmp_path, LINE + POLYGON + "\n" + LINE)
    dataset = data.load(f"yolo:{tmp_path}")
    assert (dataset.kind, dataset.class_names) == ("objects", ("cat", "dog"))
    assert [len(part) for part in dataset.all_labels] == [10, 1, 3]
    for place in (tmp_path, tmp_path / "data.yaml"):
        objects = first_objects(place)
        assert objects.classes.tolist() == [1, 0]
        assert torch.allclose(objects.boxes, torch.tensor([BOX, BOX]).float())
        assert torch.allclose(objects.areas, torch.tensor([84.0, 84.0]))
        assert objects.size == SIZE
        assert objects.segments is not None
        assert objects.segments[0] is None
        assert isinstance(objects.segments[1], list)
        assert np.allclose(objects.segments[1][0], [10, 6, 24, 6, 24, 12, 10, 12])
    assert torch.allclose(
        objects.geometry.to_input(torch.tensor([[0.0, 0], [32, 20]]))[1, 0], torch.tensor(40.0)
    )


def test_yolo_keypoints(tmp_path: Path) -> None:
    points = "0.5 0.5 2 0.25 0.1 1"
    write_yolo(tmp_path, LINE.strip() + f" {points}\n", "names: [cat, dog]\nkpt_shape: [2, 3]\n")
    keypoints = first_objects(tmp_path).keypoints
    assert keypoints is not None
    assert torch.allclose(keypoints, torch.tensor([[[16.0, 10, 2], [8, 2, 1]]]))
    write_yolo(tmp_path, LINE.strip() + " 0.5 0.5 0 0\n", "names: [cat, dog]\nkpt_shape: [2, 2]\n")
    keypoints = first_objects(tmp_path).keypoints
    assert keypoints is not None
    assert torch.allclose(keypoints, torch.tensor([[[16.0, 10, 2], [0, 0, 0]]]))
    write_yolo(tmp_path, LINE, "names: [cat, dog]\nkpt_shape: [2, 2]\n")
    with pytest.raises(DataError, match=r"0.txt, line 1 has 5 numbers, and kpt_shape asks for 9"):
        data.load(f"yolo:{tmp_path}")


def test_files_that_list_images(tmp_path: Path) -> None:
    write_yolo(tmp_path, LINE)
    (tmp_path / "val.txt").write_text("images/val/0.png\n./images/val/2.png\n")
    table = "path: ../nowhere\ntrain: [images/train]\nval: val.txt\nnames: {0: cat, 1: dog}\n"
    (tmp_path / "data.yaml").write_text(table)
    dataset = data.load(f"yolo:{tmp_path}")
    assert len(dataset.test.labels) == 2
    assert isinstance(dataset.test, ImagesWithObjects)


def test_parts_without_labels(tmp_path: Path) -> None:
    write_yolo(tmp_path, LINE)
    (tmp_path / "labels" / "val" / "1.txt").unlink()
    objects = data.load(f"yolo:{tmp_path}").test.read_targets(torch.arange(3), NET)
    assert objects is not None
    assert [len(one.boxes) for one in objects] == [1, 0, 1]
    for path in (tmp_path / "labels" / "train").iterdir():
        path.unlink()
    dataset = data.load(f"yolo:{tmp_path}")
    assert dataset.train.read_targets(torch.arange(3), NET) is None
    assert "The images of train have no labels" in dataset.notes[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1\n", "line 1 has 4 numbers: expected class x y width height"),
        ("0 0.5 0.5 0.1 0.1 0.3\n", "line 1 has 6 numbers"),
        (LINE + "2 0.5 0.5 0.1 0.1\n", "line 2: there is no class 2 of 2"),
        ("0.5 0.5 0.5 0.1 0.1\n", "line 1: there is no class 0.5 of 2"),
        ("\n0 0.5 0.5 0.1 7\n", "line 2 holds 7: coordinates are fractions"),
        ("0 0.5 nan 0.1 0.1\n", "line 1 holds nan"),
        ("cat 0.5 0.5 0.1 0.1\n", "line 1: could not convert string to float: 'cat'"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    write_yolo(tmp_path, LINE)
    (tmp_path / "labels" / "val" / "2.txt").write_text(line)
    with pytest.raises(DataError, match=f"labels/val/2.txt, {message}"):
        data.load(f"yolo:{tmp_path}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("names: [", "data.yaml is not YAML"),
        ("- 1", "describes no data set"),
        ("train: images/train", "names no classes"),
        ("names: {1: cat}\ntrain: images/train", "must be the numbers from 0 on"),
        ("names: [cat]\ntrain: images/elsewhere", "names images/elsewhere, but there is no"),
        ("names: [cat]\nval: images/val", "names no images to train on"),
        ("names: [cat]\ntrain: images/train\nkpt_shape: [1]", r"kpt_shape must be \[keypoints"),
    ],
)
def test_wrong_tables_are_named(tmp_path: Path, table: str, message: str) -> None:
    write_yolo(tmp_path, "")
    (tmp_path / "data.yaml").write_text(table)
    with pytest.raises(DataError, match=message):
        data.load(f"yolo:{tmp_path}")
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"has no data.yaml"):
        data.load(f"yolo:{tmp_path}")


def test_geometries_follow_one_another() -> None:
    one, other = Geometry(2, 3, 5, 7), Geometry(-1, 0.5, 40, -2)
    points = torch.tensor([[1.0, 2], [3, 4]])
    assert torch.equal(one.then(other).to_input(points), other.to_input(one.to_input(points)))
    assert torch.allclose(one.to_stored(one.to_input(points)), points)


@pytest.mark.skipif(not (SHARED / "yolox_nano_coco").is_dir(), reason="needs COCO's images")
def test_yolox_layout() -> None:
    dataset = data.load(f"yolo:{SHARED / 'yolox_nano_coco'}")
    assert len(dataset.class_names) == 80
    assert [len(part) for part in dataset.all_labels] == [115, 13, 128]
    assert dataset.train.read_targets(torch.arange(2), NET) is None
    objects = dataset.test.read_targets(torch.arange(128), NET)
    assert objects is not None
    assert sum(len(one.boxes) for one in objects) > 800
