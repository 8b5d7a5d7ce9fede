from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from networks import wired
from secateur.data.images import FileImages
from secateur.graph.build import build_dependency_graph
from secateur.graph.module_state import tensors_of
from secateur.graph.output_values import measured
from secateur.graph.taps import kernels_of
from secateur.integrations import yolox
from secateur.runtime.errors import UnknownName, UsageError

SIZE = (96, 64)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean yolox_nano"):
        yolox.build("yolox_nan")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "yolox.config", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[yolox\]'"):
        yolox.build("yolox_nano")


def test_boxes_are_those_of_yolox_itself() -> None:
    pytest.importorskip("yolox")
    from yolox.utils import postprocess

    model = yolox.build("yolox_nano", num_classes=3)
    with torch.no_grad():
        for name, bias in model.head.named_parameters():  # type: ignore[union-attr]
            if name.startswith(("obj_preds", "cls_preds")) and name.endswith("bias"):
                bias.zero_()  # scores of about a half, or nothing would be found
        images = 255 * torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
        detections = yolox.decode(model(images), SIZE)
        model.head.decode_in_inference = True  # type: ignore[union-attr]
        output = model(images)
    positions = (96 // 8) * (64 // 8) + (96 // 16) * (64 // 16) + (96 // 32) * (64 // 32)
    assert output.shape == (2, positions, 8)
    # YOLOX gives a position its best class alone, so each of its boxes is among ours.
    theirs = postprocess(output.clone(), 3, yolox.SCORE_THRESHOLD, yolox.IOU)
    for mine, rows in zip(detections, theirs, strict=True):
        assert len(mine.boxes) >= len(rows)
        best = rows[0]  # left, top, right, bottom, objectness, class score, class
        assert mine.scores[0] == pytest.approx(float(best[4] * best[5]), rel=1e-5)
        assert mine.classes[0] == int(best[6])
        torch.testing.assert_close(mine.boxes[0], best[:4], rtol=1e-4, atol=1e-3)


def test_training_it_trains_its_layers_and_returns_its_outputs() -> None:
    pytest.importorskip("yolox")
    import copy

    model = copy.deepcopy(yolox.build("yolox_nano", num_classes=3)).train()
    assert type(model).__name__ == "YoloxModule"
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.training for norm in norms)
    output = model(255 * torch.rand(2, 3, *SIZE))
    assert output.shape[2] == 8
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(module.training for module in model.eval().modules())


def test_images_are_read_as_yolox_wants_them(tmp_path: Path) -> None:
    pytest.importorskip("yolox")
    from PIL import Image

    Image.new("RGB", (100, 50), (200, 10, 30)).save(tmp_path / "a.png")
    preprocessing = yolox.preprocessing("yolox_nano")
    assert preprocessing.shape == (3, 416, 416)
    images = FileImages((tmp_path / "a.png",), torch.zeros(1, dtype=torch.int64))
    (image,) = preprocessing.normalise(images.read(torch.tensor([0]), preprocessing))
    assert image[:, 0, 0].tolist() == [30, 10, 200]
    assert image[:, 207, 415].tolist() == [30, 10, 200]
    assert (image[:, 208:] == 114).all()
    geometry = preprocessing.geometry(50, 100)
    assert (geometry.scale_x, geometry.scale_y) == (4.16, 4.16)
    assert (geometry.offset_x, geometry.offset_y) == (0, 0)


def test_the_network_is_traced_with_all_but_its_last_layers_in_groups() -> None:
    pytest.importorskip("yolox")
    model = yolox.build("yolox_nano")
    images = 255 * torch.rand(2, 3, 64, 64)
    dependencies = build_dependency_graph(model, images, prune_residual=True)
    assert len(dependencies.groups) == 67
    assert {group.reason for group in dependencies.frozen} == {"written to the network's output"}


def test_outputs_are_compared_where_there_are_objects() -> None:
    output = torch.rand(2, 126, 8, generator=torch.Generator().manual_seed(0))
    output[:, 1:, 4] = 0  # one position of each image has an object
    boxes, objects, scores = (part.read((output,)) for part in yolox.OUTPUT_PARTS)
    assert (boxes.shape, objects.shape, scores.shape) == ((2, 504), (2, 126), (2, 378))
    objectness = output[:, 0, 4:5]
    angles = 2 * output[:, 0, 5:].sqrt().asin()
    torch.testing.assert_close(scores[:, :3], (objectness * yolox.CLASS_WEIGHT).sqrt() * angles)
    boxes_there = (objectness * yolox.BOX_WEIGHT).sqrt() * output[:, 0, :4]
    torch.testing.assert_close(boxes[:, :4], boxes_there)
    torch.testing.assert_close(objects, 2 * output[:, :, 4].clamp_min(1e-12).sqrt().asin())
    assert float(boxes[:, 4:].abs().max()) < 1e-5
    assert float(scores[:, 3:].abs().max()) < 1e-5
    with pytest.raises(UsageError, match="outputs name the tensor 0, dimension 2"):
        measured(yolox.OUTPUT_PARTS, (output[:, 0],))


def test_an_output_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="returns 126 positions for images of 96×64"):
        yolox.decode(torch.zeros(1, 5, 8), SIZE)
    with pytest.raises(UsageError, match="this network does not"):
        yolox.decode((torch.zeros(1),), SIZE)


def test_a_norm_that_was_folded_and_put_back_says_nothing_of_its_kernels() -> None:
    model, dependencies = wired("chain", True)
    state = tensors_of(model)
    assert kernels_of(dependencies, state)["conv1"].is_rescaled
    norm = model.bn1
    assert isinstance(norm, nn.BatchNorm2d)
    state["bn1.weight"] = (state["bn1.running_var"] + norm.eps).sqrt()
    assert not kernels_of(dependencies, state)["conv1"].is_rescaled
    assert kernels_of(dependencies, state)["conv2"].is_rescaled
