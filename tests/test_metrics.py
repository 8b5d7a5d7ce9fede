from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import config
from secateur.data import Batch, DataSet
from secateur.data.detections import Detections, non_maximum_suppression
from secateur.data.images import NormalisedImages
from secateur.data.objects import Objects
from secateur.data.preprocessing import Geometry
from secateur.graph.output_values import OutputPart
from secateur.models.metrics import Metric
from secateur.models.metrics.by_name import METRICS, MetricInputs, check_name, find_metric
from secateur.models.metrics.classification import MultiLabelAP, TopK
from secateur.models.metrics.coco import SIZES, Evaluation, image_objects
from secateur.models.metrics.decoders import TorchvisionDecoder, user_decoder
from secateur.models.metrics.detection import AveragePrecision
from secateur.models.metrics.regression import R2, ImageQuality
from secateur.models.metrics.segmentation import MapAgreement
from secateur.models.metrics.user_function import UserMetric
from secateur.models.task import Task
from secateur.pipeline.task import metric_of, validation_metric_of
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, UnknownName, UsageError

NETWORK = nn.Identity()
SEGMENTATION = Task("segmentation")
VALUES = Task("regression")


def batch(
    images: Tensor, labels: Tensor | None = None, targets: tuple[Objects, ...] | None = None
) -> Batch:
    numbers = torch.arange(len(images))
    return Batch(images, numbers if labels is None else labels, numbers, targets=targets)


def figures(metric: Metric, *updates: tuple[object, Batch]) -> dict[str, float]:
    for output, images in updates:
        metric.update(NETWORK, output, images)
    metric.merge()
    return metric.compute()


def in_two_processes(
    monkeypatch: pytest.MonkeyPatch, parts: Sequence[Metric], values: list[Any]
) -> None:
    """Let `distributed` gather what two processes would have, for those that `parts` stand for."""
    monkeypatch.setattr(distributed, "all_gather", lambda _: values)
    for part in parts:
        part.merge()


# --- classifiers -------------------------------------------------------------------------------


def test_top_k_counts_images_whose_class_is_among_the_best() -> None:
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    images = batch(torch.zeros(3, 3, 2, 2), torch.tensor([0, 0, 0]))
    assert figures(TopK(Task(), 1), (logits, images)) == {"top-1": 1 / 3}
    assert figures(TopK(Task(), 2), (logits, images)) == {"top-2": 2 / 3}
    assert figures(TopK(Task(), 9), (logits, images)) == {"top-9": 1.0}


def test_mean_average_precision_of_several_labels() -> None:
    pytest.importorskip("torchmetrics")
    logits = torch.tensor([[2.0, -1, 0], [1, 3, 0], [-1, 1, 0]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    detections = figures(
        MultiLabelAP(Task("multi-label"), ("cat", "dog")),
        (logits[:2], batch(torch.zeros(2, 3, 2, 2), labels[:2])),
        (logits[2:], batch(torch.zeros(1, 3, 2, 2), labels[2:])),
    )
    # Ranked by the first logit: right, wrong, right: (1 + 2/3) / 2. The third label is never shown.
    assert detections == pytest.approx({"mAP": (5 / 6 + 1) / 2, "AP cat": 5 / 6, "AP dog": 1.0})


def test_a_metric_needs_its_task() -> None:
    with pytest.raises(UsageError, match="mIoU needs a class for each position"):
        MapAgreement(Task())
    with pytest.raises(UsageError, match="top-1 needs one class for each image"):
        TopK(SEGMENTATION)


# --- segmentation ------------------------------------------------------------------------------


def one_hot(maps: Tensor, classes: int) -> Tensor:
    return nn.functional.one_hot(maps, classes).movedim(-1, 1).float()


def reference_iou(predicted: Tensor, masks: Tensor, classes: int) -> dict[int, float]:
    counts = masks >= 0
    result = {}
    for number in range(classes):
        mine, theirs = (predicted == number) & counts, masks == number
        if (mine | theirs).any():
            result[number] = float((mine & theirs).sum() / (mine | theirs).sum())
    return result


def test_mean_iou_is_that_of_a_loop_over_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(-1, 3, (4, 5, 7), generator=generator)
    predicted = torch.randint(0, 3, (4, 5, 7), generator=generator)
    output = one_hot(predicted, 5)
    images = torch.zeros(4, 3, 5, 7)
    whole = figures(MapAgreement(SEGMENTATION, ("road",)), (output, batch(images, masks)))
    by_class = reference_iou(predicted, masks, 5)
    assert set(by_class) == {0, 1, 2}
    assert list(whole) == ["mIoU", "pixel accuracy", "IoU road", "IoU 1", "IoU 2"]
    assert whole["mIoU"] == pytest.approx(sum(by_class.values()) / 3)
    assert whole["IoU road"] == pytest.approx(by_class[0])
    right = (predicted == masks)[masks >= 0].float().mean()
    assert whole["pixel accuracy"] == pytest.approx(float(right))
    parts = [(output[n : n + 1], batch(images[n : n + 1], masks[n : n + 1])) for n in range(4)]
    assert figures(MapAgreement(SEGMENTATION, ("road",)), *parts) == whole


def test_smaller_maps_are_resized_to_the_masks() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.int64)
    masks[:, :, 4:] = 1
    output = one_hot(torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]]), 2)
    assert figures(
        MapAgreement(SEGMENTATION, main="pixel accuracy"),
        (output, batch(torch.zeros(1, 3, 8, 8), masks)),
    ) == {"pixel accuracy": 1.0, "mIoU": 1.0, "IoU 0": 1.0, "IoU 1": 1.0}


def test_maps_agree_with_the_original_network() -> None:
    images = torch.rand(2, 3, 4, 4)
    original = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        output = original(images)
    metric = MapAgreement(SEGMENTATION, original=original)
    assert metric.name == "mIoU to original"
    assert figures(metric, (output, batch(images)))["mIoU to original"] == 1.0
    other = MapAgreement(SEGMENTATION, original=original)
    assert figures(other, (-output, batch(images)))["mIoU to original"] < 1


def test_masks_of_another_kind_are_refused() -> None:
    images = batch(torch.zeros(2, 3, 4, 4))
    with pytest.raises(DataError, match="needs a mask for each image"):
        MapAgreement(SEGMENTATION).update(NETWORK, torch.zeros(2, 3, 4, 4), images)
    nothing = batch(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), -1))
    with pytest.raises(DataError, match="no pixel of the masks has a class"):
        figures(MapAgreement(SEGMENTATION), (torch.zeros(1, 3, 4, 4), nothing))


# --- values ------------------------------------------------------------------------------------


def test_r2_is_that_of_torchmetrics_in_parts_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = pytest.importorskip("torchmetrics.functional.regression")
    generator = torch.Generator().manual_seed(1)
    wanted = 1e4 + torch.randn(9, 3, generator=generator)
    actual = wanted + 0.3 * torch.randn(9, 3, generator=generator)
    images = torch.zeros(9, 3, 2, 2)
    expected = functions.r2_score(actual.double(), wanted.double(), multioutput="variance_weighted")
    whole = figures(R2(), (actual, batch(images, wanted)))
    assert whole == {"R²": pytest.approx(float(expected))}
    parts = []
    for part in (slice(0, 4), slice(4, 9)):
        parts.append(R2())
        parts[-1].update(NETWORK, actual[part], batch(images[part], wanted[part]))
    values = [(part._images, part._first, part._sums) for part in parts]
    in_two_processes(monkeypatch, parts[:1], [*values, (0, None, None)])
    assert parts[0].compute() == {"R²": pytest.approx(float(expected))}


def test_r2_to_the_original_is_one_minus_the_relative_error() -> None:
    original = nn.Flatten()
    images = torch.rand(6, 1, 2, 2)
    error = torch.rand(6, 4) / 9
    values = images.flatten(1)
    expected = 1 - float(error.square().sum() / (values - values.mean(0)).square().sum())
    assert figures(R2(original=original), (values + error, batch(images))) == {
        "R² to original": pytest.approx(expected, abs=1e-5)
    }


def test_r2_says_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="have 4 values for each image"):
        R2().update(NETWORK, torch.zeros(2, 4), batch(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3)))
    same = batch(torch.zeros(2, 3, 2, 2), torch.ones(2, 4))
    with pytest.raises(DataError, match="two images with different values"):
        figures(R2(), (torch.zeros(2, 4), same))


def test_psnr_and_ssim_are_means_over_images() -> None:
    pytest.importorskip("torchmetrics")
    wanted = torch.rand(2, 3, 16, 16)
    output = wanted.clone()
    output[1] = (wanted[1] + 0.1).clamp(max=1)
    images = batch(torch.zeros(2, 3, 16, 16), wanted)
    detections = figures(ImageQuality("PSNR"), (output, images))
    error = float((output[1] - wanted[1]).square().mean())
    assert list(detections) == ["PSNR", "SSIM"]
    assert detections["PSNR"] == pytest.approx((100 - 10 * math.log10(error)) / 2, rel=1e-5)
    assert 0.5 < detections["SSIM"] < 1
    scaled = batch(torch.zeros(2, 3, 16, 16), 255 * wanted)
    again = figures(ImageQuality("SSIM", peak=255), (255 * output, scaled))
    assert again == pytest.approx(detections, rel=1e-4)
    with pytest.raises(DataError, match="PSNR takes values from 0 to 1"):
        ImageQuality("PSNR").update(NETWORK, output, scaled)
    small = batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(UsageError, match="at least 11×11"):
        ImageQuality("PSNR").update(NETWORK, torch.zeros(1, 3, 8, 8), small)


# --- detectors ---------------------------------------------------------------------------------


def objects(*rows: tuple[float, ...], size: tuple[int, int] = (100, 200)) -> Objects:
    """Objects from (class, left, top, right, bottom)."""
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    boxes = values[:, 1:]
    sides = boxes[:, 2:] - boxes[:, :2]
    return Objects(
        boxes=boxes,
        classes=values[:, 0].long(),
        is_crowd=torch.zeros(len(rows), dtype=torch.bool),
        areas=sides.prod(1),
        size=size,
        geometry=Geometry(0.5, 0.5, 4, 8),
    )


def found_in_input(wanted: Objects, scores: list[float]) -> Detections:
    return Detections(wanted.boxes_in_input().float(), torch.tensor(scores), wanted.classes.clone())


def decode_list(output: object, size: tuple[int, int]) -> list[Detections]:
    assert size == (64, 112)
    assert isinstance(output, list)
    return output


TWO = objects((0, 10, 10, 40, 40), (3, 0, 0, 150, 90))
ONE = objects((0, 50, 20, 90, 60))
IMAGES = torch.zeros(2, 3, 64, 112)


def test_boxes_that_are_found_have_an_ap_of_one_by_class_and_size() -> None:
    pytest.importorskip("pycocotools")
    detections = [found_in_input(TWO, [0.9, 0.8]), found_in_input(ONE, [0.3])]
    metric = AveragePrecision(decode_list, "box", ("person",))
    result = figures(metric, (detections, batch(IMAGES, targets=(TWO, ONE))))
    assert list(result)[:4] == ["box AP", "AP50", "AP75", "AP small"]
    assert set(result) == {
        *("box AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AP person", "AP 3"),
    }
    assert all(value == pytest.approx(1) for value in result.values())


def test_missed_and_wrong_boxes_cost_precision() -> None:
    pytest.importorskip("pycocotools")
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    half = figures(
        AveragePrecision(decode_list),
        ([found_in_input(TWO, [0.9, 0.8]), nothing], batch(IMAGES, targets=(TWO, ONE))),
    )
    # One of two objects of class 0 is found, at a recall of 0.5: 51 of the 101 recalls.
    assert half["AP 0"] == pytest.approx(51 / 101)
    assert half["AP 3"] == pytest.approx(1)
    ignored = Detections(nothing.boxes.new_ones(1, 4), torch.ones(1), torch.tensor([-1]))
    same = figures(
        AveragePrecision(decode_list),
        ([found_in_input(TWO, [0.9, 0.8]), ignored], batch(IMAGES, targets=(TWO, ONE))),
    )
    assert same == half


def test_images_of_all_processes_are_merged_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    detections = [found_in_input(TWO, [0.9, 0.2]), found_in_input(ONE, [0.3])]
    whole = AveragePrecision(decode_list)
    expected = figures(whole, (detections, batch(IMAGES, targets=(TWO, ONE))))
    parts = []
    for number in (1, 0):
        part = AveragePrecision(decode_list)
        targets = ((TWO, ONE)[number],)
        images = Batch(IMAGES[:1], torch.zeros(1).long(), torch.tensor([number]), targets=targets)
        part.update(NETWORK, [detections[number]], images)
        parts.append(part)
    in_two_processes(monkeypatch, parts[:1], [part._images for part in parts])
    assert parts[0].compute() == expected


def test_boxes_are_matched_with_the_originals() -> None:
    pytest.importorskip("pycocotools")

    class Detector(nn.Module):
        def forward(self, images: Tensor) -> list[Detections]:
            boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60]])
            return [Detections(boxes, torch.tensor([0.9, 0.1]), torch.tensor([0, 1]))] * len(images)

    metric = AveragePrecision(decode_list, original=Detector())
    assert metric.name == "box AP to original"
    result = figures(metric, (Detector()(IMAGES), batch(IMAGES)))
    # The second box is not sure enough to be an object, nor to be a wrong one.
    assert result["box AP to original"] == pytest.approx(1)
    assert result["F1"] == 1
    shifted = [
        Detections(detections.boxes + 15, detections.scores, detections.classes)
        for detections in Detector()(IMAGES)
    ]
    again = AveragePrecision(decode_list, original=Detector())
    result = figures(again, (shifted, batch(IMAGES)))
    assert result["box AP to original"] == result["F1"] == 0


def test_a_resample_counts_images_as_often_as_they_are_drawn() -> None:
    pytest.importorskip("pycocotools")
    detections = [found_in_input(TWO, [0.9, 0.8]), found_in_input(objects((0, 0, 0, 9, 9)), [0.9])]
    rows = [
        image_objects(n, wanted, mine, (64, 112), "box")
        for n, (wanted, mine) in enumerate(zip((TWO, ONE), detections, strict=True))
    ]
    both = Evaluation(rows, "box")
    whole = {name: value for name, value in both.figures().items() if name[3:] not in SIZES}
    assert both.resampled(torch.tensor([0, 1])) == whole
    assert both.resampled(torch.tensor([0, 0]))["AP"] == pytest.approx(1)
    assert both.resampled(torch.tensor([1, 1]))["AP"] == 0
    repeated = Evaluation([rows[0], rows[0], rows[1]], "box")
    order = torch.tensor([0, 0, 1])
    assert both.resampled(order)["AP"] == pytest.approx(repeated.figures()["AP"])


def masked(wanted: Objects) -> Objects:
    """The objects with rectangles for segments."""
    polygons = tuple(
        [[left, top, right, top, right, bottom, left, bottom]]
        for left, top, right, bottom in wanted.boxes.tolist()
    )
    return Objects(
        wanted.boxes,
        wanted.classes,
        wanted.is_crowd,
        wanted.areas,
        wanted.size,
        segments=polygons,
        geometry=wanted.geometry,
    )


def test_masks_are_compared_in_the_stored_image() -> None:
    pytest.importorskip("pycocotools")
    masks = torch.zeros(2, 64, 112, dtype=torch.bool)
    for mask, box in zip(masks, TWO.boxes_in_input().int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = True
    inner = found_in_input(TWO, [0.9, 0.8])
    detections = Detections(inner.boxes, inner.scores, inner.classes, masks)
    images = batch(IMAGES[:1], targets=(masked(TWO),))
    result = figures(AveragePrecision(decode_list, "mask"), ([detections], images))
    assert result["mask AP"] == pytest.approx(1)
    swapped = Detections(inner.boxes, inner.scores, inner.classes, masks.flip(0))
    images = batch(IMAGES[:1], targets=(masked(TWO),))
    result = figures(AveragePrecision(decode_list, "mask"), ([swapped], images))
    assert result["mask AP"] == 0
    with pytest.raises(DataError, match="needs segments"):
        AveragePrecision(decode_list, "mask").update(
            NETWORK, [detections], batch(IMAGES[:1], targets=(TWO,))
        )
    with pytest.raises(UsageError, match="decoder returns none"):
        AveragePrecision(decode_list, "mask").update(NETWORK, [inner], images)


@pytest.mark.parametrize("points", [17, 5])
def test_keypoints_are_compared_by_their_similarity(points: int) -> None:
    pytest.importorskip("pycocotools")
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, points, 2, generator=generator).double() * 20 + 10
    keypoints = torch.cat([places, torch.full((2, points, 1), 2.0)], dim=2)
    wanted = Objects(
        TWO.boxes,
        torch.zeros(2, dtype=torch.int64),
        TWO.is_crowd,
        TWO.areas,
        TWO.size,
        keypoints=keypoints,
        geometry=TWO.geometry,
    )
    in_input = torch.cat([wanted.geometry.to_input(places), torch.ones(2, points, 1)], dim=2)
    inner = found_in_input(TWO, [0.9, 0.8])

    def result(keypoints: Tensor) -> float:
        detections = Detections(inner.boxes, inner.scores, wanted.classes, None, keypoints)
        images = batch(IMAGES[:1], targets=(wanted,))
        return figures(AveragePrecision(decode_list, "keypoint"), ([detections], images))[
            "keypoint AP"
        ]

    assert result(in_input.float()) == pytest.approx(1)
    assert result((in_input + 200).float()) == 0


def test_without_objects_there_is_no_ap() -> None:
    pytest.importorskip("pycocotools")
    metric = AveragePrecision(decode_list)
    with pytest.raises(DataError, match="needs annotated objects"):
        metric.update(NETWORK, [], batch(IMAGES))
    with pytest.raises(UsageError, match="detections of 0 images for 2 images"):
        metric.update(NETWORK, [], batch(IMAGES, targets=(TWO, ONE)))
    nothing = objects()
    metric.update(NETWORK, [found_in_input(nothing, [])], batch(IMAGES[:1], targets=(nothing,)))
    with pytest.raises(DataError, match="no image shows any"):
        metric.compute()


def test_of_overlapping_boxes_of_a_class_the_best_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]])
    scores = torch.tensor([[0.9, 0.02], [0.8, 0.0], [0.005, 0.7]])
    detections = non_maximum_suppression(boxes, scores, threshold=0.01, iou=0.65)
    assert detections.classes.tolist() == [0, 1]
    assert detections.scores.tolist() == pytest.approx([0.9, 0.7])


# --- decoders and names ------------------------------------------------------------------------


def test_torchvision_classes_are_numbered_from_zero() -> None:
    image = {
        "boxes": torch.zeros(3, 4),
        "labels": torch.tensor([1, 3, 2]),
        "scores": torch.ones(3),
        "masks": torch.full((3, 1, 4, 4), 0.6),
    }
    (plain,) = TorchvisionDecoder()([image], (4, 4))
    assert plain.classes.tolist() == [0, 2, 1]
    assert plain.masks is not None
    assert plain.masks.shape == (3, 4, 4)
    names = ["__background__", "person", "N/A", "car"]
    (coco,) = TorchvisionDecoder(names)([image], (4, 4))
    assert coco.classes.tolist() == [0, 1, -1]
    with pytest.raises(UsageError, match="this network does not"):
        TorchvisionDecoder()(torch.zeros(3), (4, 4))


def test_a_decoder_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "boxes.py"
    file.write_text(
        "import torch\n"
        "def decode(output, size):\n"
        "    return [(torch.zeros(1, 4), torch.ones(1), torch.zeros(1).long()) for _ in output]\n"
        "def wrong(output, size):\n"
        "    return 3\n"
    )
    detections = user_decoder(f"{file}:decode")(torch.zeros(2, 5), (8, 8))
    assert [len(image.boxes) for image in detections] == [1, 1]
    with pytest.raises(UsageError, match="boxes, scores and classes; it returns int"):
        user_decoder(f"{file}:wrong")(torch.zeros(2, 5), (8, 8))


def test_a_function_of_the_network_is_a_metric() -> None:
    def weights(network: nn.Module) -> float:
        assert not network.training
        return sum(parameter.numel() for parameter in network.parameters())

    metric = UserMetric(weights)
    metric.update(nn.Linear(2, 3).train(), None, batch(IMAGES))
    metric.merge()
    assert metric.compute() == {"weights": 9.0}
    assert isinstance(metric, Metric)
    wrong_values: tuple[Any, ...] = (float("nan"), "good", None)
    for value in wrong_values:

        def returns(network: nn.Module, value: Any = value) -> Any:
            return value

        wrong = UserMetric(returns, "mine")
        wrong.update(NETWORK, None, batch(IMAGES))
        with pytest.raises(UsageError, match="metric mine must return a finite number"):
            wrong.compute()
    with pytest.raises(UsageError, match="must be a function of the network"):
        UserMetric(3)  # type: ignore[arg-type]


def test_metrics_are_found_by_name(tmp_path: Path) -> None:
    segmentation = MetricInputs(SEGMENTATION)
    factory = find_metric("auto", segmentation)
    assert factory is not None
    assert (factory().name, factory() is factory()) == ("mIoU", False)
    assert find_metric("auto", MetricInputs(Task())) is None
    regression = find_metric("auto", MetricInputs(VALUES))
    assert regression is not None
    assert regression().name == "R²"
    assert find_metric("auto", MetricInputs(Task("regression", has_labels=False))) is None
    file = tmp_path / "score.py"
    file.write_text("def mine(network):\n    return 0.5\n")
    own_boxes = find_metric(f"{file}:mine", segmentation)
    assert own_boxes is not None
    assert own_boxes().name == "mine"
    with pytest.raises(UnknownName, match="did you mean mIoU"):
        check_name("miou")
    with pytest.raises(UsageError, match="PSNR:255"):
        check_name("PSNR:big")
    with pytest.raises(UsageError, match="'top-1' needs labels"):
        find_metric("top-1", MetricInputs(Task(), original=NETWORK))
    with pytest.raises(UsageError, match="pass decode="):
        find_metric("box AP", MetricInputs(VALUES))


def test_the_configuration_names_every_metric() -> None:
    assert set(config.METRICS) == set(METRICS)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_says_its_name_and_unit(name: str) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    kinds = {"top-1": "single-label", "top-5": "single-label", "mAP": "multi-label"}
    kind = kinds.get(name, "segmentation" if name in ("mIoU", "pixel accuracy") else "detection")
    inputs = MetricInputs(Task(kind), decode=decode_list)  # type: ignore[arg-type]
    metric = METRICS[name](inputs)
    assert isinstance(metric, Metric)
    assert metric.name.replace("²", "2") == name
    assert metric.unit in ("%", "dB", "")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[metrics\]'"):
        AveragePrecision(decode_list)


def test_validation_images_need_no_annotated_objects(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    decoder = tmp_path / "boxes.py"
    decoder.write_text("def decode(output, size):\n    return []\n")
    images = NormalisedImages(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())
    dataset = DataSet("unlabelled", ("cat",), images, images, images, kind="objects")
    tables = {
        "model": {"name": "net.py:net", "metric": "box AP", "decoder": f"{decoder}:decode"},
        "data": {"source": "yolo:pets"},
        "plan": {"target": "macs=0.9"},
    }
    run_config = config.RunConfig.model_validate(tables)
    task = Task("detection", parts=(OutputPart(),))
    names = []
    for find in (metric_of, validation_metric_of):
        made = find(task, dataset, run_config, NETWORK)
        assert made is not None
        names.append(made().name)
    assert names == ["box AP", "box AP to original"]
