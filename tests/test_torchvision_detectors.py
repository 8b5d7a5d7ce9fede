"""Detectors: all but their boxes is in the dependency graph, and the whole runs after the cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import detection, segmentation

from networks import random_images, random_plan, randomise_norms
from secateur.graph.build import build_dependency_graph
from secateur.graph.torchvision_detectors import traceable_forward
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import masked_network

OUTPUT = "written to the network's output"


def backbone() -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
    )
    layers.out_channels = 12  # type: ignore[assignment]
    return layers


def one_stage() -> nn.Module:
    anchors = detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
    model: nn.Module = detection.RetinaNet(
        backbone(), 4, anchor_generator=anchors, min_size=64, max_size=64, topk_candidates=5
    )
    return model


def two_stages() -> nn.Module:
    anchors = detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
    pool = detection.faster_rcnn.MultiScaleRoIAlign(["0"], 3, 2)
    head = detection.faster_rcnn.TwoMLPHead(12 * 9, 20)
    predictor = detection.faster_rcnn.FastRCNNPredictor(20, 4)
    model: nn.Module = detection.FasterRCNN(
        backbone(),
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=head,
        box_predictor=predictor,
        min_size=64,
        max_size=64,
        box_detections_per_img=3,
    )
    return model


@pytest.mark.parametrize(
    ("make", "cut_layers", "outputs"),
    [
        (one_stage, {"0", "3", "head.classification_head.conv.0.0"}, {"bbox_reg", "cls_logits"}),
        (
            two_stages,
            {"0", "3", "rpn.head.conv.0.0", "roi_heads.box_head.fc6", "roi_heads.box_head.fc7"},
            {"cls_logits", "bbox_pred", "cls_score"},
        ),
    ],
)
def test_backbone_and_heads_of_a_detector_are_cut(
    make: object, cut_layers: set[str], outputs: set[str]
) -> None:
    assert callable(make)
    model = make().eval()
    randomise_norms(model, torch.Generator().manual_seed(0))
    images = random_images(2, 64)
    dependencies = build_dependency_graph(model, images)
    written = {name.removeprefix("backbone.") for name in dependencies.groups}
    assert cut_layers <= written
    assert {group.name.rpartition(".")[2] for group in dependencies.frozen} == outputs
    assert {group.reason for group in dependencies.frozen} == {OUTPUT}
    plan = random_plan(dependencies, torch.Generator().manual_seed(1))
    smaller = apply_plan(model, dependencies, plan)
    forward = traceable_forward(model)
    assert forward is not None
    with torch.no_grad():
        leaves = tuple(tree_leaves(forward(smaller, images)))
        assert relative_error(leaves, masked_network(model, dependencies, plan)(images)) < 1e-4
        boxes = smaller(list(images))
    assert [set(detection) for detection in boxes] == 2 * [{"boxes", "scores", "labels"}]


def test_a_network_that_segments_is_cut_like_any_other() -> None:
    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    assert traceable_forward(model) is None
    images = random_images(1, 64)
    dependencies = build_dependency_graph(model, images)
    (frozen,) = [group for group in dependencies.frozen if group.reason == OUTPUT]
    assert frozen.name == "classifier.low_classifier"
    plan = random_plan(dependencies, torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs: dict[str, Tensor] = apply_plan(model, dependencies, plan)(images)
        expected = masked_network(model, dependencies, plan)(images)
    assert relative_error(outputs["out"], expected) < 1e-4
