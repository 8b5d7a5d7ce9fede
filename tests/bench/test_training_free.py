"""The bench of training-free pruning: its peer is used correctly, its page is current."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import peer
import training_free
from imagenet import unused
from measurements import Measurement
from networks import make_network, random_images
from peer_search import SHORTFALL, cut_to, gradients
from secateur.data import TensorImages
from secateur.graph.build import build_dependency_graph
from secateur.models.evaluate import count_macs
from training_free import all_but_inner, measured, page, readme, table


def test_gradients_are_those_of_every_image_by_itself() -> None:
    model, images = make_network("residual"), random_images(5)
    computed = gradients(model, images.split(3))
    by_image = []
    for image in images:
        model.zero_grad()
        logits = model(image[None])
        F.cross_entropy(logits, logits.argmax(1)).backward()
        by_image.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    for name in by_image[0]:
        stacked = torch.stack([grads[name] for grads in by_image])
        torch.testing.assert_close(computed.mean[name], stacked.mean(0))
        torch.testing.assert_close(computed.squared[name], stacked.square().mean(0))


@pytest.mark.parametrize("criterion", peer.CRITERIA)
def test_the_peer_cuts_inner_channels_to_the_target(criterion: str) -> None:
    pytest.importorskip("torch_pruning")
    model, images = make_network("residual"), random_images(5)
    whole = all_but_inner(model, build_dependency_graph(model, images))
    assert whole == {"stem.0", "conv2.0", "conv4.0", "linear"}
    settings = peer.Settings(criterion, is_global=True, whole=whole)
    gradients_by_name = gradients(model, [images]).of(criterion)
    cut = cut_to(model, images[:1], settings, 0.7, gradients_by_name)
    left = count_macs(cut.model, images[:1]) / count_macs(model, images[:1])
    assert cut.macs_left == left
    assert 0.7 - SHORTFALL <= left < 1
    assert cut.model(images).shape == (5, 5)


def measurement_of(method: str, options: str, seed: int, last: str, top1: float) -> Measurement:
    return {
        "study": "cifar10",
        "network": "resnet20",
        "seed": seed,
        "target": "macs=0.7",
        "method": method,
        "options": options,
        "base_fraction": 0.9,
        "cut_fraction": 0.3,
        f"{last}_fraction": top1,
        f"{last}_same_class_fraction": 0.5,
        "macs_left": 0.699,
        "images": 10000,
        "calibration_images": 2000,
    }


def test_losses_are_compared_with_the_best_peer() -> None:
    text = table(
        "cifar10",
        [
            measurement_of("secateur", "", 0, "refit", 0.88),
            measurement_of("torch-pruning l1", "global, inner", 0, "recalibrated", 0.79),
            measurement_of("torch-pruning l1", "global, inner", 1, "recalibrated", 0.81),
            measurement_of("torch-pruning l2", "global, inner", 0, "recalibrated", 0.7),
            {
                **measurement_of("torch-pruning l2", "global, all", 0, "recalibrated", 0.7),
                "outcome": "not applicable",
                "reason": "it broke (1x2 and 3x4)",
            },
        ],
    )
    assert "| torch-pruning l1, global, inner | 30.0 → 80.00 ± 1.41 |" in text
    assert "| resnet20 0.7 | 90.00 | 2.00 | 10.00 (l1, global, inner) | 0.20 |" in text
    assert "- resnet20, it broke: l2 (global, all)" in text


def test_networks_calibrated_without_the_tested_classes_come_first() -> None:
    def row(method: str, options: str, last: str, top1: float) -> Measurement:
        return {
            **measurement_of(method, options, 0, last, top1),
            "study": "imagenet",
            "network": "squeezenet1_1",
            "target": "macs=0.8",
            "agreement_fraction": 0.75,
            "macs_left": 0.8,
        }

    text = table(
        "imagenet",
        [
            row("torch-pruning l1", "uniform, inner", "recalibrated", 0.4),
            row("secateur", "300 images, tested classes", "refit", 0.89),
            row("secateur", "300 images", "refit", 0.87),
        ],
    )
    names = [line.split(" |")[0] for line in text.splitlines()[2:5]]
    assert names == [
        "| secateur, 300 images",
        "| secateur, 300 images, tested classes",
        "| torch-pruning l1, uniform, inner",
    ]
    assert "| 30.0 → 87.00 (75.0) |" in text
    assert (
        "| squeezenet1_1 0.8 | 90.00 | 3.00 | – | 1.00 | – | 50.00 (l1, uniform, inner) |" in text
    )


def test_unused_images_are_of_classes_that_calibration_does_not_show() -> None:
    images = TensorImages(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4))
    assert unused(images, images.take(torch.tensor([2, 0]))).labels.tolist() == [1, 3]


def test_pages_are_those_of_the_result_file() -> None:
    text = training_free.PAGE.read_text()
    assert page(text, measured()) == text
    text = training_free.README.read_text()
    assert readme(text, measured()) == text
