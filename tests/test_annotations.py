"""Images that come with regions: their readers, and the batches made of them."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from concept_inputs import PREPROCESSING, context_of
from networks import make_network
from secateur.data import TensorImages, batches, draw_calibration_images
from secateur.data.annotated import NO_CLASS, AnnotatedFiles, AnnotatedImages, join_annotations
from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks
from secateur.data.cub import read_birds
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.errors import DataError, UsageError
from secateur.scoring import concepts
from secateur.scoring.concepts.annotations import Annotations
from secateur.scoring.concepts.broden import read_broden
from secateur.scoring.concepts.combined import Combined
from secateur.scoring.concepts.cub import RADIUS_FRACTION, read_boxes, read_parts
from secateur.scoring.concepts.masks import read_masks

NATIVE = Preprocessing(16, 16)
CROPPED = Preprocessing(12, 14)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def random_values(height: int, width: int, top: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (height, width), dtype=np.uint8)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    shape = (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_masks(
    directory: Path, sizes: list[tuple[int, int]], top: int = 4
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`images/` and `masks/` of random values below `top`; returns both."""
    images, masks = [], []
    for number, (height, width) in enumerate(sizes):
        images.append(picture(height, width, number))
        masks.append(random_values(height, width, top, number))
        save(directory / "images" / f"{number}.png", images[-1])
        save(directory / "masks" / f"{number}.png", masks[-1])
    return images, masks


def name_values(directory: Path, names: list[str]) -> None:
    (directory / "classes.json").write_text(json.dumps({"classes": names}))


def everything(images: AnnotatedImages, preprocessing: Preprocessing = NATIVE) -> ConceptMasks:
    return images.regions(torch.arange(len(images.labels)), preprocessing)


def planes_of(regions: ConceptMasks, concepts: int) -> Tensor:
    """`[image, concept, height, width]`, with every concept at its number."""
    count, _, height, width = regions.masks.shape
    planes = torch.zeros(count, concepts, height, width, dtype=torch.bool)
    for image in range(count):
        for region, number in enumerate(regions.concepts[image].tolist()):
            if number == UNLABELLED:
                assert not regions.masks[image, region].any()
            else:
                planes[image, number] = regions.masks[image, region]
    return planes


# --- regions go where the image goes --------------------------------------------------------------


@given(
    height=st.integers(5, 24),
    width=st.integers(5, 24),
    size=st.integers(4, 20),
    margin=st.integers(0, 6),
)
def test_masks_have_the_geometry_of_their_images(
    height: int, width: int, size: int, margin: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("masks")
    _, (mask,) = write_masks(directory, [(height, width)])
    name_values(directory, ["void", "a", "b", "c"])
    regions = everything(read_masks(directory), Preprocessing(size, size + margin))
    for number in range(3):
        plane = torch.from_numpy(mask == number + 1)[None]
        resized = v2.functional.resize(
            plane, [size + margin], interpolation=v2.InterpolationMode.NEAREST_EXACT
        )
        expected = v2.functional.center_crop(resized, [size])[0]
        shown = (regions.concepts[0] == number).nonzero()[:, 0].tolist()
        assert len(shown) == int(expected.any())
        if shown:
            assert torch.equal(regions.masks[0, shown[0]], expected)


@pytest.mark.parametrize("preprocessing", [NATIVE, CROPPED, Preprocessing(13, 29)])
def test_a_mask_of_the_images_own_values_lies_on_the_image(
    preprocessing: Preprocessing, tmp_path: Path
) -> None:
    """Large flat blocks stay where they are in the image, whatever the resize."""
    blocks = np.repeat(np.repeat(np.array([[0, 1, 0], [1, 0, 1]], dtype=np.uint8), 10, 0), 12, 1)
    save(tmp_path / "images" / "0.png", np.stack([255 * blocks] * 3, axis=2))
    save(tmp_path / "masks" / "0.png", blocks + 1)
    name_values(tmp_path, ["void", "dark", "bright"])
    images = read_masks(tmp_path)
    pixels = images.read(torch.tensor([0]), preprocessing)[0, 0]
    planes = planes_of(everything(images, preprocessing), 2)[0]
    # Pixels that the blur of the resize mixes half and half are neither.
    assert not (planes[1] & (pixels < 110)).any()
    assert not (planes[0] & (pixels > 145)).any()
    assert torch.equal(planes.sum(0), torch.ones_like(pixels).long())


def test_the_margin_of_a_crop_shows_no_concept(tmp_path: Path) -> None:
    save(tmp_path / "images" / "0.png", picture(8, 8))
    save(tmp_path / "masks" / "0.png", np.ones((8, 8), dtype=np.uint8))
    name_values(tmp_path, ["void", "a"])
    regions = everything(read_masks(tmp_path), Preprocessing(12, 8))
    assert int(regions.masks.sum()) == 64
    assert regions.masks[0, 0, 2:10, 2:10].all()


def test_only_concepts_that_an_image_shows_are_regions(tmp_path: Path) -> None:
    _, masks = write_masks(tmp_path, [(16, 16), (16, 16), (16, 16)])
    masks[1][:] = 2
    masks[2][:] = 0
    for number in (1, 2):
        save(tmp_path / "masks" / f"{number}.png", masks[number])
    name_values(tmp_path, ["void", "a", "b", "c"])
    regions = everything(read_masks(tmp_path))
    assert regions.concepts.tolist() == [[0, 1, 2], [1, UNLABELLED, UNLABELLED], 3 * [UNLABELLED]]
    assert torch.equal(
        planes_of(regions, 3),
        torch.stack([torch.from_numpy(np.stack(masks)) == n for n in (1, 2, 3)], 1),
    )
    alone = read_masks(tmp_path).regions(torch.tensor([2]), NATIVE)
    assert alone.concepts.tolist() == [[UNLABELLED]]
    assert not alone.masks.any()


def test_taking_images_takes_their_regions(tmp_path: Path) -> None:
    write_masks(tmp_path, [(16, 16)] * 5)
    name_values(tmp_path, ["void", "a", "b", "c"])
    images = read_masks(tmp_path)
    assert isinstance(images, AnnotatedImages)
    selected = images.take(torch.tensor([4, 1])).take(torch.tensor([1, 0]))
    assert selected.concepts == images.concepts
    assert selected.labels.tolist() == [NO_CLASS, NO_CLASS]
    order = torch.tensor([1, 4])
    assert torch.equal(selected.read(torch.arange(2), CROPPED), images.read(order, CROPPED))
    regions, expected = everything(selected, CROPPED), images.regions(order, CROPPED)
    assert torch.equal(planes_of(regions, 3), planes_of(expected, 3))


# --- several annotations of the same images -------------------------------------------------------


def test_annotations_of_the_same_images_are_joined(tmp_path: Path) -> None:
    write_masks(tmp_path, [(16, 16)] * 3)
    name_values(tmp_path, ["void", "a", "b", "c"])
    one = read_masks(tmp_path)
    name_values(tmp_path, ["x", "void", "void", "y"])
    other = read_masks(tmp_path)
    both = join_annotations([one, other])
    assert [concept.name for concept in both.concepts] == ["a", "b", "c", "x", "y"]
    planes = planes_of(everything(both), 5)
    assert torch.equal(planes[:, :3], planes_of(everything(one), 3))
    assert torch.equal(planes[:, 3:], planes_of(everything(other), 2))
    assert join_annotations([one]) is one


def test_annotations_of_different_images_are_refused(tmp_path: Path) -> None:
    for name, count in (("one", 2), ("other", 3)):
        write_masks(tmp_path / name, [(16, 16)] * count)
        name_values(tmp_path / name, ["void", "a", "b", "c"])
    text = f"masks:{tmp_path}/one,evidence,masks:{tmp_path}/other"
    with pytest.raises(UsageError, match=r"brings 2 from .*one/images, another 3 from .*other/im"):
        concepts.annotated_images(text)
    context = context_of(make_network("chain"))
    with pytest.raises(UsageError, match="different images can't be used at once"):
        concepts.make(text, context.graph, context.state, (), PREPROCESSING)


def test_only_annotated_sources_bring_images(tmp_path: Path) -> None:
    write_masks(tmp_path, [(16, 16)] * 2)
    assert concepts.annotated_images("evidence,factors:8") is None
    images = concepts.annotated_images(f"evidence,masks:{tmp_path}")
    assert images is not None
    assert len(images.labels) == 2
    with pytest.raises(DataError, match=f"no folder {tmp_path}/no to read broden from"):
        concepts.annotated_images(f"broden:{tmp_path}/no")


def test_annotated_sources_are_made_for_the_images_that_they_bring(tmp_path: Path) -> None:
    write_masks(tmp_path, [(16, 16)] * 2)
    name_values(tmp_path, ["void", "a", "b", "c"])
    context = context_of(make_network("chain"))
    text = f"masks:{tmp_path}"
    alone = concepts.make(text, context.graph, context.state, (), PREPROCESSING)
    assert isinstance(alone, Annotations)
    images = concepts.annotated_images(text)
    assert images is not None
    assert alone.concepts == images.concepts
    both = concepts.make(f"colours,{text}", context.graph, context.state, (), PREPROCESSING)
    assert isinstance(both, Combined)
    assert both.concepts[11:] == images.concepts
    assert both.node is None


# --- batches --------------------------------------------------------------------------------------


def numbered(count: int) -> TensorImages:
    return TensorImages(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count))


@given(count=st.integers(1, 23), size=st.integers(1, 9), shards=st.integers(1, 5))
def test_numbers_say_where_an_image_is_in_the_list(count: int, size: int, shards: int) -> None:
    images, seen = numbered(count), []
    for rank in range(shards):
        shard_batches = list(batches(images, size, PREPROCESSING, shard=(rank, shards)))
        for batch in shard_batches:
            assert torch.equal(batch.indices, batch.labels)
            assert 0 < len(batch.indices) <= size
            assert batch.annotations is None
        numbers = [number for batch in shard_batches for number in batch.indices.tolist()]
        assert numbers == list(range(count))[rank::shards]
        seen += numbers
    assert sorted(seen) == list(range(count))


def test_regions_come_with_their_images(tmp_path: Path) -> None:
    write_masks(tmp_path, [(16, 18)] * 7)
    name_values(tmp_path, ["void", "a", "b", "c"])
    images = read_masks(tmp_path)
    whole = planes_of(everything(images, CROPPED), 3)
    for batch in batches(images, 3, CROPPED):
        assert batch.annotations is not None
        assert torch.equal(planes_of(batch.annotations, 3), whole[batch.indices])
        pixels = images.read(batch.indices, CROPPED)
        assert torch.equal(batch.images, CROPPED.normalise(pixels))


# --- masks ----------------------------------------------------------------------------------------


def test_values_without_names_are_the_concepts_that_the_masks_hold(tmp_path: Path) -> None:
    _, (mask,) = write_masks(tmp_path, [(16, 16)])
    mask[mask == 1] = 9
    mask[0, 0] = 255
    save(tmp_path / "masks" / "0.png", mask)
    images = read_masks(tmp_path)
    assert images.concepts == tuple(Concept(f"value {value}", "mask") for value in (2, 3, 9))
    planes = planes_of(everything(images), 3)[0]
    expected = np.stack([mask == value for value in (2, 3, 9)])
    assert torch.equal(planes, torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.json", '{"classes": ["Background", "a", "unlabelled", "c"]}'),
        ("labels.json", '{"labels": ["null", "a", "void", "c"], "note": "x"}'),
        ("labels.json", '["null", "a", "void", "c"]'),
        ("classes.txt", "void\na\nunlabeled\nc\n"),
    ],
)
def test_names_are_read_from_a_list(file: str, content: str, tmp_path: Path) -> None:
    _, (mask,) = write_masks(tmp_path, [(16, 16)])
    (tmp_path / file).write_text(content)
    images = read_masks(tmp_path)
    assert [concept.name for concept in images.concepts] == ["a", "c"]
    planes = planes_of(everything(images), 2)[0]
    assert torch.equal(planes, torch.from_numpy(np.stack([mask == 1, mask == 3])))


def test_a_palette_image_is_read_by_its_indices(tmp_path: Path) -> None:
    _, (mask,) = write_masks(tmp_path, [(16, 16)])
    name_values(tmp_path, ["void", "a", "b", "c"])
    expected = planes_of(everything(read_masks(tmp_path)), 3)
    image = Image.new("P", (16, 16))
    image.putdata(mask.flatten().tolist())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.save(tmp_path / "masks" / "0.png")
    assert torch.equal(planes_of(everything(read_masks(tmp_path)), 3), expected)


def test_parts_are_read_together_or_alone(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        write_masks(tmp_path / "all", [(16, 16)] * count)
        shutil.move(tmp_path / "all" / "images", tmp_path / part)
        shutil.move(tmp_path / "all" / "masks", tmp_path / f"{part}_masks")
    (tmp_path / "all").rmdir()
    name_values(tmp_path, ["void", "a", "b", "c"])
    whole = read_masks(tmp_path)
    assert [path.parent.name for path in whole.paths] == 3 * ["train"] + 2 * ["val"]
    alone = read_masks(tmp_path / "train")
    assert alone.paths == whole.paths[:3]
    assert alone.concepts == whole.concepts


def test_images_in_folders_have_their_masks_in_the_same_ones(tmp_path: Path) -> None:
    for name in ("a/0", "b/c/0"):
        save(tmp_path / "images" / f"{name}.png", picture(16, 16))
        save(tmp_path / "masks" / f"{name}.png", random_values(16, 16, 3))
    assert len(read_masks(tmp_path).paths) == 2


def _no_mask(directory: Path) -> None:
    (directory / "masks" / "1.png").unlink()


def _other_size(directory: Path) -> None:
    save(directory / "masks" / "1.png", random_values(16, 15, 4))


def _turned(directory: Path) -> None:
    save(directory / "masks" / "1.png", random_values(20, 16, 4))


def _unknown_value(directory: Path) -> None:
    mask = random_values(16, 20, 4)
    mask[3, 3] = 7
    save(directory / "masks" / "1.png", mask)


def _cut_mask(directory: Path) -> None:
    file = directory / "masks" / "1.png"
    file.write_bytes(file.read_bytes()[:-40])


def _damaged_mask(directory: Path) -> None:
    file = directory / "masks" / "1.png"
    content = bytearray(file.read_bytes())
    content[30:60] = bytes(30)
    file.write_bytes(bytes(content))


def _no_png(directory: Path) -> None:
    (directory / "masks" / "1.png").write_text("a mask")


def _coloured(directory: Path) -> None:
    save(directory / "masks" / "1.png", picture(16, 20))


def _no_image(directory: Path) -> None:
    shutil.rmtree(directory / "images")
    (directory / "images").mkdir()


def _no_folder(directory: Path) -> None:
    shutil.rmtree(directory / "masks")


def _no_images_beside(directory: Path) -> None:
    shutil.move(directory / "masks", directory / "test_masks")


def _no_list(directory: Path) -> None:
    (directory / "classes.json").write_text('{"names": ["a"]}')


def _no_json(directory: Path) -> None:
    (directory / "classes.json").write_text("a, b")


def _no_concept(directory: Path) -> None:
    name_values(directory, ["void", "void", "Void", "null"])


def _broken_image(directory: Path) -> None:
    (directory / "images" / "1.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_mask, r"the image .*images/1.png has no mask .*masks/1.png"),
        (_other_size, r"the mask .*1.png is 15×16, its image 20×16"),
        (_turned, r"the mask .*1.png is 16×20, its image 20×16"),
        (_unknown_value, r"1.png holds the value 7, which has no name"),
        (_cut_mask, r"the mask .*masks/1.png can't be read"),
        (_damaged_mask, r"the mask .*masks/1.png can't be read"),
        (_no_png, r"the mask .*masks/1.png can't be read"),
        (_coloured, r"1.png is in colours: expected one number for each pixel"),
        (_no_image, r"no images in .*images"),
        (_no_folder, r"no masks in .*: expected images/ and masks/, train/ and train_masks/"),
        (_no_images_beside, r"test_masks has no folder test of images beside it"),
        (_no_list, r"classes.json holds no list of names: expected it as 'classes' or 'labels'"),
        (_no_json, r"the names in .*classes.json can't be read"),
        (_no_concept, r"show nothing but background"),
        (_broken_image, r"the image .*images/1.png can't be read"),
    ],
)
def test_damaged_masks_are_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_masks(tmp_path, [(16, 20)] * 2)
    name_values(tmp_path, ["void", "a", "b", "c"])
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        everything(read_masks(tmp_path))


def shares_of(images: AnnotatedFiles, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Fraction of all pixels, and number of images, of each concept."""
    pixels, shown = (torch.zeros(len(images.concepts), dtype=torch.int64) for _ in range(2))
    total = 0
    for indices in torch.arange(len(images.labels)).split(16):
        regions = images.regions(indices, preprocessing)
        is_there = regions.concepts != UNLABELLED
        counts = regions.masks.sum((2, 3))
        pixels.index_add_(0, regions.concepts[is_there], counts[is_there])
        shown += torch.bincount(regions.concepts[is_there], minlength=len(shown))
        total += regions.masks[:, 0].numel()
    return pixels / total, shown


def test_camvid_is_read_as_it_is_described(shared_data: Path) -> None:
    directory = shared_data / "camvid"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    described = json.loads((directory / "classes.json").read_text())
    images = read_masks(directory)
    assert len(images.paths) == 468
    assert len(read_masks(directory / "train").paths) == 367
    assert len(read_masks(directory / "val").paths) == 101
    assert [concept.name for concept in images.concepts] == described["classes"][:-1]

    # Of whole masks, at the size of their images, since a crop shows less.
    for path in images.paths[::40]:
        with Image.open(path) as image:
            assert image.size == (341, 256)
    counts = torch.zeros(len(images.concepts) + 1, dtype=torch.int64)
    shown = torch.zeros_like(counts)
    for annotation in images.annotations:
        here = (annotation.planes(256, 341) - UNLABELLED).flatten().bincount(minlength=len(counts))
        counts += here
        shown += here > 0
    shares = counts / counts.sum()
    for number, concept in enumerate(images.concepts):
        expected = described["pixel_share"][concept.name]
        assert float(shares[number + 1]) == pytest.approx(expected, abs=1e-4)
        assert int(shown[number + 1]) == described["images_with_class"][concept.name]
    assert float(shares[0]) == pytest.approx(described["pixel_share"]["unlabelled"], abs=1e-4)


def test_sky_is_above_the_road_in_camvid(shared_data: Path) -> None:
    directory = shared_data / "camvid" / "val"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    images = read_masks(directory)
    names = [concept.name for concept in images.concepts]
    planes = planes_of(images.regions(torch.arange(0, 101, 20), Preprocessing(64, 72)), 11)
    rows = torch.arange(64.0)[:, None]

    def height(name: str) -> Tensor:
        region = planes[:, names.index(name)].float()
        return (region * rows).sum((1, 2)) / region.sum((1, 2))

    assert (height("sky") < height("building")).all()
    assert (height("building") < height("road")).all()


def test_clothes_are_read_as_they_are_described(shared_data: Path) -> None:
    directory = shared_data / "ccp"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    described = json.loads((directory / "labels.json").read_text())
    images = read_masks(directory)
    assert len(images.paths) == 250
    names = [concept.name for concept in images.concepts]
    assert names == described["labels"][1:]
    # Whole images at their own size, since a crop loses shoes.
    shown = dict.fromkeys(names, 0)
    for path, annotation in zip(images.paths, images.annotations, strict=True):
        with Image.open(path) as image:
            width, height = image.size
        planes = annotation.planes(height, width)
        for number in (planes.flatten() - UNLABELLED).bincount()[1:].nonzero()[:, 0].tolist():
            shown[names[number]] += 1
    with_class = described["images_with_class"]
    assert shown == {name: with_class.get(name, 0) for name in names}


def test_regions_of_real_images_are_in_proportion(shared_data: Path) -> None:
    directory = shared_data / "ccp"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    images = read_masks(directory).take(torch.arange(0, 250, 10))
    shares, shown = shares_of(images, Preprocessing(56, 64))
    names = [concept.name for concept in images.concepts]
    assert 0.01 < float(shares[names.index("skin")]) < 0.3
    assert int(shown[names.index("skin")]) >= 22  # the square in the middle cuts heads off
    assert float(shares.sum()) < 0.7


# --- Broden ---------------------------------------------------------------------------------------

LABELS = """number,name,category,frequency,coverage,syns
1,red-c,color(2),2,0.5,
2,wood,material(3);object(1),4,0.9,timber
3,street-s,concept_input(1),1,1.0,
5,dotted,texture(1),1,1.0,
300,leg,part(2),2,0.1,
"""
INDEX = """image,split,ih,iw,sh,sw,color,object,part,material,concept_input,texture
ade/0.jpg,train,16,20,8,10,ade/0_color.png,ade/0_object.png,ade/0_part_1.png;ade/0_part_2.png,,3,
dtd/1.jpg,val,16,16,16,16,dtd/1_color.png,,,,,5;2
dtd/2.jpg,val,16,16,16,16,,,,,,
"""


def encoded(labels: np.ndarray, instances: int = 7) -> np.ndarray:
    """Red and green make the label; what is blue separates objects of one label."""
    parts = [labels % 256, labels // 256, np.full_like(labels, instances)]
    return np.stack(parts, axis=2).astype(np.uint8)


def write_broden(directory: Path) -> dict[str, np.ndarray]:
    (directory / "label.csv").parent.mkdir(exist_ok=True)
    (directory / "label.csv").write_text(LABELS)
    (directory / "index.csv").write_text(INDEX)
    for name, size in (("ade/0", (16, 20)), ("dtd/1", (16, 16)), ("dtd/2", (16, 16))):
        save(directory / "images" / f"{name}.jpg", picture(*size))
    draw = np.random.default_rng(0)
    concepts = {
        "ade/0_color": draw.choice([0, 1], (8, 10)),
        "ade/0_object": draw.choice([0, 2], (8, 10)),
        "ade/0_part_1": draw.choice([0, 300], (8, 10)),
        "ade/0_part_2": draw.choice([0, 300, 2], (8, 10)),
        "dtd/1_color": draw.choice([0, 1], (16, 16)),
    }
    for name, labels in concepts.items():
        save(directory / "images" / f"{name}.png", encoded(labels))
    return concepts


def test_broden_is_read_in_its_published_layout(tmp_path: Path) -> None:
    labels = write_broden(tmp_path)
    images = read_broden(tmp_path)
    assert images.concepts == (
        Concept("red-c", "color"),
        Concept("wood", "material"),
        Concept("street-s", "concept_input"),
        Concept("dotted", "texture"),
        Concept("leg", "part"),
    )
    assert [path.name for path in images.paths] == ["0.jpg", "1.jpg"]  # the third has no label
    assert images.labels.tolist() == [NO_CLASS, NO_CLASS]

    first = images.annotations[0].planes(16, 20)
    numbers = {0: UNLABELLED, 1: 0, 2: 1, 300: 4}
    for layer, name in enumerate(["color", "object", "part_1", "part_2"]):
        large = labels[f"ade/0_{name}"].repeat(2, 0).repeat(2, 1)
        expected = np.vectorize(numbers.__getitem__)(large)
        assert torch.equal(first[layer], torch.from_numpy(expected))
    assert torch.equal(first[4:], torch.full((1, 16, 20), 2))  # the concept_input is everywhere

    planes = planes_of(everything(images), 5)
    assert planes[1, 3].all()
    assert planes[1, 1].all()  # the second texture of the image is a material elsewhere
    assert torch.equal(planes[1, 0], torch.from_numpy(labels["dtd/1_color"] == 1))
    assert not planes[1, [2, 4]].any()
    middle = first[:, :, 2:18]
    assert torch.equal(planes[0, 4], (middle == 4).any(0))
    assert torch.equal(planes[0, 1], (middle == 1).any(0))  # an object, and a part of one


def _no_index(directory: Path) -> None:
    (directory / "index.csv").unlink()


def _no_column(directory: Path) -> None:
    (directory / "label.csv").write_text("number,name\n1,red\n")


def _no_rows(directory: Path) -> None:
    (directory / "index.csv").write_text(INDEX.splitlines()[0])


def _no_labels(directory: Path) -> None:
    (directory / "index.csv").write_text("\n".join([INDEX.splitlines()[0], INDEX.splitlines()[3]]))


def _no_number(directory: Path) -> None:
    (directory / "label.csv").write_text(LABELS.replace("\n5,", "\nfive,"))


def _no_picture(directory: Path) -> None:
    (directory / "images" / "dtd" / "1.jpg").unlink()


def _no_label_image(directory: Path) -> None:
    (directory / "images" / "ade" / "0_part_2.png").unlink()


def _small_label_image(directory: Path) -> None:
    save(directory / "images" / "ade" / "0_part_2.png", encoded(np.zeros((8, 9), dtype=int)))


def _grey_label_image(directory: Path) -> None:
    save(directory / "images" / "ade" / "0_part_2.png", np.zeros((8, 10), dtype=np.uint8))


def _unlisted_label(directory: Path) -> None:
    save(directory / "images" / "ade" / "0_part_2.png", encoded(np.full((8, 10), 4)))


def _large_label(directory: Path) -> None:
    save(directory / "images" / "ade" / "0_part_2.png", encoded(np.full((8, 10), 301)))


def _unlisted_whole_label(directory: Path) -> None:
    (directory / "index.csv").write_text(INDEX.replace(",5;2", ",5;999"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_index, r"index.csv can't be read"),
        (_no_column, r"label.csv has no column 'category'"),
        (_no_rows, r"index.csv has no column 'image' or no rows"),
        (_no_labels, r"no image in .*index.csv has a label"),
        (_no_number, r"numbers of at most 65535; they hold 'five'"),
        (_no_picture, r"1 of 2 Broden images are missing: .*dtd/1.jpg"),
        (_no_label_image, r"no mask .*0_part_2.png"),
        (_small_label_image, r"0_part_2.png is 9×8; index.csv says 10×8"),
        (_grey_label_image, r"0_part_2.png is not in colours: expected red \+ 256 · green"),
        (_unlisted_label, r"0_part_2.png holds the value 4, which has no name"),
        (_large_label, r"0_part_2.png holds the value 301, which has no name"),
        (_unlisted_whole_label, r"index.csv holds the value 999, which has no name"),
    ],
)
def test_damaged_broden_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_broden(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        everything(read_broden(tmp_path))


# --- birds ----------------------------------------------------------------------------------------

BIRDS = {
    "images": "1 001.Auk/a.jpg\n2 001.Auk/b.jpg\n3 002.Emu/c.jpg\n",
    "classes": "1 001.Auk\n2 002.Emu\n",
    "image_class_labels": "1 1\n2 1\n3 2\n",
    "train_test_split": "1 1\n2 0\n3 1\n",
    "bounding_boxes": "1 2.0 4.0 10.0 8.0\n2 0.0 0.0 5.0 5.0\n3 1.0 1.0 30.0 12.0\n",
    "parts": "1 beak\n2 left eye\n",
    "part_locs": "1 1 5.0 6.0 1\n1 2 0.0 0.0 0\n2 1 1.0 1.0 1\n2 2 2.0 2.0 1\n"
    "3 1 10.0 7.0 1\n3 2 12.0 8.0 1\n",
}


def write_birds(directory: Path, *, published: bool = True, compressed: bool = False) -> None:
    for name, text in BIRDS.items():
        folder = directory / "parts" if published and name.startswith("part") else directory
        folder.mkdir(parents=True, exist_ok=True)
        if compressed:
            (folder / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.txt").write_text(text)
    for name, size in (("001.Auk/a", (16, 20)), ("001.Auk/b", (9, 9)), ("002.Emu/c", (20, 40))):
        save(directory / "images" / f"{name}.jpg", picture(*size))


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_birds_are_read_from_any_layout(published: bool, compressed: bool, tmp_path: Path) -> None:
    write_birds(tmp_path, published=published, compressed=compressed)
    birds = read_birds(tmp_path)
    assert birds.files == ("001.Auk/a.jpg", "001.Auk/b.jpg", "002.Emu/c.jpg")
    assert birds.classes == ("001.Auk", "002.Emu")
    assert birds.parts == ("beak", "left eye")
    assert birds.labels.tolist() == [0, 0, 1]
    assert birds.is_training.tolist() == [True, False, True]
    assert birds.boxes[2].tolist() == [1, 1, 30, 12]
    assert birds.is_visible.tolist() == [[True, False], [True, True], [True, True]]
    assert birds.points[2].tolist() == [[10, 7], [12, 8]]


def test_a_disc_lies_around_every_visible_part(tmp_path: Path) -> None:
    write_birds(tmp_path)
    images = read_parts(tmp_path)
    assert images.concepts == (Concept("beak", "part"), Concept("left eye", "part"))
    assert images.labels.tolist() == [0, 1]  # of training images alone
    for annotation, (height, width), points, box in (
        (images.annotations[0], (16, 20), {0: (5, 6)}, 10),
        (images.annotations[1], (20, 40), {0: (10, 7), 1: (12, 8)}, 30),
    ):
        planes = annotation.planes(height, width)
        assert set(planes.unique().tolist()) == {UNLABELLED, *points}
        for number, (x, y) in points.items():
            region = (planes == number).any(0)
            for row in range(height):
                for column in range(width):
                    near = (row - y) ** 2 + (column - x) ** 2 <= (RADIUS_FRACTION * box) ** 2
                    assert bool(region[row, column]) == near


def test_overlapping_parts_keep_all_of_their_discs(tmp_path: Path) -> None:
    write_birds(tmp_path)
    regions = read_parts(tmp_path).regions(torch.tensor([1]), Preprocessing(20, 20))
    assert regions.concepts.tolist() == [[0, 1]]
    assert (regions.masks[0, 0] & regions.masks[0, 1]).any()


def test_a_box_is_the_region_of_the_bird(tmp_path: Path) -> None:
    write_birds(tmp_path)
    images = read_boxes(tmp_path)
    assert images.concepts == (Concept("bird", "object"),)
    regions = everything(images)
    expected = torch.zeros(16, 20, dtype=torch.bool)
    expected[4:12, 2:12] = True
    assert torch.equal(regions.masks[0, 0], expected[:, 2:18])
    assert regions.concepts.tolist() == [[0], [0]]


def test_parts_and_boxes_are_used_at_once(tmp_path: Path) -> None:
    write_birds(tmp_path)
    images = concepts.annotated_images(f"parts:{tmp_path},boxes:{tmp_path}")
    assert images is not None
    assert [concept.name for concept in images.concepts] == ["beak", "left eye", "bird"]
    planes = planes_of(everything(images), 3)
    assert planes.flatten(2).any(2).tolist() == [[True, False, True], [True, True, True]]
    assert not (planes[:, 0] & ~planes[:, 2]).any()  # the beak is on the bird


def test_calibration_images_are_drawn_with_their_annotations(tmp_path: Path) -> None:
    write_birds(tmp_path)
    calibration = draw_calibration_images(read_boxes(tmp_path), 2)
    assert isinstance(calibration, AnnotatedImages)
    (batch,) = batches(calibration, 2, NATIVE)
    assert batch.annotations is not None
    assert sorted(batch.labels.tolist()) == [0, 1]


def _no_boxes(directory: Path) -> None:
    (directory / "bounding_boxes.txt").unlink()


def _lost_box(directory: Path) -> None:
    (directory / "bounding_boxes.txt").write_text("1 2 4 10 8\n3 1 1 30 12\n")


def _lost_point(directory: Path) -> None:
    lines = BIRDS["part_locs"].splitlines(keepends=True)
    (directory / "parts" / "part_locs.txt").write_text("".join(lines[:-1]))


def _words(directory: Path) -> None:
    (directory / "train_test_split.txt").write_text("1 yes\n2 no\n3 yes\n")


def _wide_table(directory: Path) -> None:
    (directory / "train_test_split.txt").write_text("1 1 0\n2 0 0\n3 1 0\n")


def _unnumbered(directory: Path) -> None:
    (directory / "classes.txt").write_text("0 Auk\n1 Emu\n")


def _other_class(directory: Path) -> None:
    (directory / "image_class_labels.txt").write_text("1 1\n2 1\n3 3\n")


def _no_bird(directory: Path) -> None:
    (directory / "images" / "002.Emu" / "c.jpg").unlink()


def _damaged_gzip(directory: Path) -> None:
    (directory / "classes.txt").rename(directory / "classes.txt.gz")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_boxes, r"no bounding_boxes.txt or bounding_boxes.txt.gz of CUB-200-2011 in"),
        (_lost_box, r"2 lines of bounding_boxes are not the 3 expected"),
        (_lost_point, r"5 lines of part_locs are not the 6 expected"),
        (_words, r"train_test_split is not a table of numbers"),
        (_wide_table, r"train_test_split has 3 columns, not 2"),
        (_unnumbered, r"the lines of classes are not numbered from 1 on"),
        (_other_class, r"a class number outside 1 to 2"),
        (_no_bird, r"1 of 2 training images of CUB-200-2011 are missing, .*c.jpg among them"),
        (_damaged_gzip, r"classes.txt.gz can't be read"),
    ],
)
def test_damaged_annotations_of_birds_are_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write_birds(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read_parts(tmp_path)


def test_the_real_annotations_of_birds(shared_data: Path) -> None:
    directory = shared_data / "cub_annotations"
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    birds = read_birds(directory)
    assert (len(birds.files), len(birds.classes), len(birds.parts)) == (11_788, 200, 15)
    assert birds.parts[:2] == ("back", "beak")
    assert int(birds.is_training.sum()) == 5_994
    sizes = birds.labels.bincount(minlength=200)
    assert (int(sizes.min()), int(sizes.max())) == (41, 60)
    for file, label in zip(birds.files, birds.labels.tolist(), strict=True):
        assert file.startswith(birds.classes[label] + "/")
    corner, size = birds.boxes[:, None, :2], birds.boxes[:, None, 2:]
    inside = ((birds.points >= corner) & (birds.points <= corner + size)).all(2)
    assert int(birds.is_visible.sum()) == 141_407
    assert inside[birds.is_visible].all()
    with pytest.raises(DataError, match="5994 of 5994 training images of CUB-200-2011 are missing"):
        read_parts(directory)
