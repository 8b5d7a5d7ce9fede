"""Images with masks: layouts, classes, geometry, and augmentation of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secateur import data
from secateur.data.augmentation import Augmentation, AugmentedImages
from secateur.data.batches import batches
from secateur.data.images import FileImages
from secateur.data.masks import MaskedImages, MaskFiles
from secateur.data.preprocessing import Preprocessing
from secateur.data.training_stream import TrainingStream
from secateur.data.unreadable import Unreadable
from secateur.runtime.errors import DataError, UnreadableImage
from secateur.scoring.concepts.masks import read_masks

SHARED = Path(__file__).parents[2] / "shared" / "data"
HEIGHT, WIDTH = 12, 16
NATIVE = Preprocessing((HEIGHT, WIDTH), HEIGHT)


def pair(number: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return an image whose red channel is 40 times the class that its mask has there."""
    mask = np.random.default_rng(number).integers(0, classes, (HEIGHT // 4, WIDTH // 4))
    mask = mask.repeat(4, 0).repeat(4, 1).astype(np.uint8)
    mask[0, :classes] = range(classes)
    return np.stack([mask * 40, mask * 0, mask * 0], axis=2), mask


def write(
    image: Path, mask: Path, number: int, *, classes: int = 3, void: int | None = None
) -> None:
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels, values = pair(number, classes)
    if void is not None:
        values[-1] = void
    Image.fromarray(pixels).save(image)
    Image.fromarray(values).save(mask)


def write_parts(root: Path, layout: str) -> None:
    for part, count in (("train", 12), ("val", 4)):
        for number in range(count):
            image, mask = layout.format(part=part, number=number).split()
            write(root / image, root / mask, number)


LAYOUTS = {
    "beside": "{part}/{number}.png {part}_masks/{number}.png",
    "camvid": "{part}/{number}.png {part}annot/{number}.png",
    "parts inside": "images/{part}/{number}.png annotations/{part}/{number}.png",
    "parts around": "{part}/images/{number}.png {part}/masks/{number}_mask.png",
}


@pytest.mark.parametrize("name", ["beside", "camvid", "parts inside", "parts around"])
def test_layouts_with_parts(tmp_path: Path, name: str) -> None:
    write_parts(tmp_path, LAYOUTS[name])
    (tmp_path / "classes.json").write_text(json.dumps(["sky", "road", "car"]))
    dataset = data.load(f"segmentation:{tmp_path}")
    assert dataset.kind == "masks"
    assert dataset.class_names == ("sky", "road", "car")
    assert [len(part) for part in dataset.all_labels] == [11, 1, 4]
    assert all(not part.any() for part in dataset.all_labels)
    assert "val is the test part" in dataset.notes[0]
    assert_aligned(dataset.train, NATIVE)


def assert_aligned(images: data.Images, preprocessing: Preprocessing) -> None:
    """Check that each pixel's class is the one that the image shows there."""
    indices = torch.arange(len(images.labels))
    red = images.read(indices, preprocessing)[:, 0].long()
    masks = images.read_labels(indices, preprocessing)
    assert masks.shape == red.shape
    assert torch.equal(red[masks >= 0], 40 * masks[masks >= 0])


def test_one_folder_of_images_and_one_of_masks(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"images/a/{number}.png", tmp_path / f"masks/a/{number}.png", number)
    write(tmp_path / "images/b/20.png", tmp_path / "elsewhere.png", 20)
    dataset = data.load(f"segmentation:{tmp_path}", seed=1)
    assert [len(part) for part in dataset.all_labels] == [14, 2, 4]
    assert dataset.class_names == ("class 0", "class 1", "class 2")
    assert "a fifth of the images is held out" in dataset.notes[0]
    assert "names no classes" in dataset.notes[1]
    assert "20.png was passed over" in dataset.notes[2]


def test_segnets_camvid_needs_no_names(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for number in range(12):
            paths = tmp_path / part / f"{number}.png", tmp_path / f"{part}annot" / f"{number}.png"
            write(*paths, number, void=11)
    dataset = data.load(f"segmentation:{tmp_path}")
    assert dataset.class_names[:2] == ("sky", "building")
    assert len(dataset.class_names) == 11
    masks = dataset.test.read_labels(torch.arange(2), NATIVE)
    assert (masks[:, -1] == -1).all()
    assert set(masks.unique().tolist()) == {-1, 0, 1, 2}


def test_voc_has_its_own_names_lists_and_palette(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for number in range(14):
        image, mask = root / f"JPEGImages/{number}.jpg", root / f"SegmentationClass/{number}.png"
        write(image, mask, number, void=255)
        values = Image.open(mask)
        values.putpalette([7 * value % 256 for value in range(768)])
        values.save(mask)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(map(str, range(11))))
    (lists / "val.txt").write_text("11\n12\n")
    for place in (tmp_path, tmp_path / "VOCdevkit", root):
        dataset = data.load(f"segmentation:{place}")
        assert dataset.class_names[20] == "tvmonitor"
        assert [len(part) for part in dataset.all_labels] == [10, 1, 2]
    masks = dataset.test.read_labels(torch.arange(2), NATIVE)
    assert torch.equal(masks[0, :-1], torch.from_numpy(pair(11)[1])[:-1].long())
    assert (masks[:, -1] == -1).all()
    (lists / "val.txt").write_text("99\n")
    with pytest.raises(DataError, match=r"val.txt lists 99, but there is no .*99.jpg"):
        data.load(f"segmentation:{root}")


@pytest.mark.parametrize("ending", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path: Path, ending: str) -> None:
    for part in ("train", "val", "test"):
        for number in range(11):
            stem = f"{part}/bonn/bonn_{number}"
            image = tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png"
            mask = tmp_path / "gtFine" / f"{stem}_gtFine_{ending}.png"
            write(image, mask, number)
            values = np.full((HEIGHT, WIDTH), 7 if ending == "labelIds" else 0, dtype=np.uint8)
            values[0], values[1] = (33, 4) if ending == "labelIds" else (18, 255)
            Image.fromarray(values).save(mask)
    dataset = data.load(f"segmentation:{tmp_path}")
    assert (dataset.class_names[0], dataset.class_names[18]) == ("road", "bicycle")
    assert [len(part) for part in dataset.all_labels] == [10, 1, 11]
    classes = dataset.test.read_labels(torch.tensor([0]), NATIVE)[0]
    assert classes[:3, 0].tolist() == [18, -1, 0]


def test_a_mask_of_0_and_255_has_two_classes(tmp_path: Path) -> None:
    for number in range(12):
        image, mask = tmp_path / f"images/{number}.png", tmp_path / f"masks/{number}.png"
        write(image, mask, number, classes=2)
        Image.fromarray((np.asarray(Image.open(mask)) * 255).astype(np.uint8)).save(mask)
    dataset = data.load(f"segmentation:{tmp_path}")
    assert dataset.class_names == ("background", "foreground")
    assert_aligned(dataset.train, NATIVE)


def test_the_ignored_value_is_named_or_set(tmp_path: Path) -> None:
    write_parts(tmp_path, LAYOUTS["beside"])
    (tmp_path / "classes.txt").write_text("void\nroad\ncar\n")
    dataset = data.load(f"segmentation:{tmp_path}")
    assert dataset.class_names == ("void", "road", "car")
    assert set(dataset.test.read_labels(torch.arange(4), NATIVE).unique().tolist()) == {-1, 1, 2}
    dataset = data.load(f"segmentation:{tmp_path}", ignore_index=2)
    assert dataset.class_names == ("void", "road")
    assert set(dataset.test.read_labels(torch.arange(4), NATIVE).unique().tolist()) == {-1, 1}


def test_the_mask_has_the_geometry_of_its_image(tmp_path: Path) -> None:
    write_parts(tmp_path, LAYOUTS["beside"])
    images = data.load(f"segmentation:{tmp_path}").train
    for size in (HEIGHT // 2, (HEIGHT * 2, WIDTH * 2), (8, 16)):
        for fit in ("crop", "letterbox", "stretch"):
            preprocessing = Preprocessing(size, min(Preprocessing(size, 1).size), fit=fit)
            masks = images.read_labels(torch.arange(3), preprocessing)
            red = images.read(torch.arange(3), preprocessing)[:, 0].float() / 40
            inside = (masks >= 0) & ((red - red.round()).abs() < 0.05)
            # Between two classes an interpolated colour may be a third one's.
            assert (red.round()[inside] == masks[inside]).float().mean() > 0.9
            assert inside.float().mean() > 0.15


def test_a_larger_mask_is_resized_and_another_shape_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path, LAYOUTS["beside"])
    for path in (tmp_path / "train_masks").iterdir():
        mask = Image.open(path)
        mask.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST).save(path)
    images = data.load(f"segmentation:{tmp_path}").train
    assert_aligned(images, NATIVE)
    for path in (tmp_path / "train_masks").iterdir():
        Image.open(path).crop((0, 0, 2 * WIDTH, HEIGHT)).save(path)
    with pytest.raises(DataError, match=r"png is 32×12, its image 16×12"):
        images.read_labels(torch.arange(3), NATIVE)


def test_wrong_masks_are_named(tmp_path: Path) -> None:
    write_parts(tmp_path, LAYOUTS["beside"])
    (tmp_path / "classes.json").write_text('["sky", "road", "car"]')
    dataset = data.load(f"segmentation:{tmp_path}")
    mask = tmp_path / "val_masks" / "1.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, dtype=np.uint8)).save(mask)
    with pytest.raises(DataError, match=r"1.png holds the value 9, which is no class: name the"):
        dataset.test.read_labels(torch.arange(4), NATIVE)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(mask)
    with pytest.raises(UnreadableImage, match=r"1.png can't be read: it is in colours"):
        dataset.test.read_labels(torch.arange(4), NATIVE)
    mask.write_bytes(b"no image")
    unreadable = Unreadable()
    (batch,) = batches(dataset.test, 4, NATIVE, unreadable=unreadable)
    assert batch.indices.tolist() == [0, 2, 3]
    assert unreadable.names == (str(mask),)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.png"], "no masks in .*: expected images/ and masks/"),
        (["images/1.png", "masks/2.png"], "no image in .* has a mask of its name"),
        (["val/1.png", "val_masks/1.png"], "has no part train with masks, only val"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        write(tmp_path / name, tmp_path / "elsewhere.png", 0)
    with pytest.raises(DataError, match=message):
        data.load(f"segmentation:{tmp_path}")


@pytest.mark.parametrize("crop", ["random_crop", "random_resized_crop", "none"])
def test_training_moves_image_and_mask_together(tmp_path: Path, crop: str) -> None:
    write_parts(tmp_path, LAYOUTS["beside"])
    images = data.load(f"segmentation:{tmp_path}").train
    preprocessing = Preprocessing((HEIGHT, WIDTH), HEIGHT, (0.0, 0, 0), (1.0, 1, 1))
    stream = TrainingStream(images, preprocessing, Augmentation(crop), 11, seed=3)  # type: ignore[arg-type]
    (batch,) = stream.epoch(0)
    assert batch.labels.shape == (11, HEIGHT, WIDTH)
    red = batch.images[:, 0] * 255 / 40
    inside = (batch.labels >= 0) & ((red - red.round()).abs() < 0.05)
    assert (red.round()[inside] == batch.labels[inside]).float().mean() > 0.9
    assert inside.float().mean() > 0.4
    assert bool((batch.labels == -1).any()) == (crop == "random_crop")
    plain = images.read_labels(batch.indices, preprocessing)
    assert not torch.equal(plain, batch.labels)
    (again,) = stream.epoch(0)
    assert torch.equal(again.labels, batch.labels)


def test_a_random_part_of_a_mask_is_that_of_its_image(tmp_path: Path) -> None:
    write(tmp_path / "images/0.png", tmp_path / "masks/0.png", 0)
    paths = tmp_path / "images/0.png", tmp_path / "masks/0.png"
    ramp = np.arange(200, dtype=np.uint8)[None].repeat(150, 0)
    Image.fromarray(np.stack([ramp] * 3, axis=2)).save(paths[0])
    Image.fromarray(ramp).save(paths[1])

    labels = torch.zeros(20, dtype=torch.int64)
    images = FileImages((paths[0],) * 20, labels)
    masked = MaskedImages(images, MaskFiles((paths[1],) * 20), torch.arange(256))
    changed = AugmentedImages(masked, Augmentation("random_resized_crop"), (0, 1))
    pixels, masks, objects = changed.read(torch.arange(20), NATIVE)
    assert objects is None
    assert (pixels[:, 0].long() - masks).abs().max() <= 3  # nearest against antialiased


def test_hugging_face_masks(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [pair(number) for number in range(12)]
    table = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(image) for image, _ in rows],
            "label": [Image.fromarray(mask) for _, mask in rows],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Image()}),
    )
    parts = {"train": table, "test": table.select(range(3))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    dataset = data.load(f"hf:{tmp_path / 'set'}")
    assert dataset.kind == "masks"
    assert dataset.class_names == ("class 0", "class 1", "class 2")
    assert [len(part) for part in dataset.all_labels] == [11, 1, 3]
    assert_aligned(dataset.train, NATIVE)


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="needs CamVid")
def test_camvid() -> None:
    dataset = data.load(f"segmentation:{SHARED / 'camvid'}")
    assert len(dataset.class_names) == 11
    assert [len(part) for part in dataset.all_labels] == [330, 37, 101]
    counts = torch.zeros(12)
    for batch in batches(dataset.test, 50, Preprocessing((256, 341), 256)):
        counts += (batch.labels + 1).flatten().bincount(minlength=12)
    assert 0.01 < float(counts[0] / counts.sum()) < 0.06
    assert (counts > 0).all()


def test_layouts_of_data_sets_hold_concepts_too(tmp_path: Path) -> None:
    write_parts(tmp_path, LAYOUTS["parts inside"])
    (tmp_path / "classes.json").write_text(json.dumps(["background", "road", "car"]))
    annotated = read_masks(tmp_path)
    assert len(annotated.paths) == 16
    assert [concept.name for concept in annotated.concepts] == ["road", "car"]
    regions = annotated.regions(torch.tensor([0]), NATIVE)
    classes = torch.from_numpy(pair(0)[1]).long()
    for mask, concept in zip(regions.masks[0], regions.concepts[0].tolist(), strict=True):
        assert torch.equal(mask, classes == concept + 1)
