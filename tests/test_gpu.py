"""What runs on a real accelerator comes near what the CPU gives; bit-equal is `test_on_device.py`.

Convolutions and sums round differently on another device, so plans may differ by filters that are
nearly as good as each other. Here each plan must cost the same, and each network score the same.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import secateur
from networks import make_network, random_images
from secateur.config import CRITERIA
from secateur.graph.module_state import device_of
from secateur.runtime.device import accelerator_name, find_device, sums_device

HAS_ACCELERATOR = torch.accelerator.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_ACCELERATOR, reason="torch finds no accelerator on this machine"),
]


def pruned_on(device: str, network: torch.nn.Module, **arguments: Any) -> secateur.PruneResult:
    moved = copy.deepcopy(network).to(find_device(device))
    return secateur.prune(moved, random_images(60, 16), target=0.6, **arguments)


def assert_near(expected: secateur.PruneResult, result: secateur.PruneResult) -> None:
    """The same number of filters went, and outputs differ as little from the original's."""
    assert device_of(result.model) == find_device("auto")
    one, other = expected.plan.removed, result.plan.removed
    removed = {name: len(filters) for name, filters in one.items()}
    assert {name: len(filters) for name, filters in other.items()} == pytest.approx(removed, abs=1)
    macs = [one.scores["refit"].macs for one in (expected, result)]
    assert macs[1] == pytest.approx(macs[0], rel=0.1)
    losses = [one.scores["refit"].agreement_fraction for one in (expected, result)]
    assert losses[0] is not None
    assert losses[1] == pytest.approx(losses[0], abs=0.2)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_every_criterion_prunes_alike(criterion: str) -> None:
    network = make_network("residual")
    results = [pruned_on(device, network, criterion=criterion) for device in ("cpu", "auto")]
    assert_near(*results)


@pytest.mark.parametrize(
    "arguments",
    [
        {"concepts": "saliency"},
        {"concepts": "factors:3,colours"},
        {"settings": {"refit.form": "channel"}},
        {"settings": {"refit.sampling": "importance"}},
        {"settings": {"plan.actions": ["channels", "rank"]}},
        {"settings": {"distill.epochs": 1}},
        {"epochs": 1},
    ],
)
def test_every_part_of_the_method_prunes_alike(arguments: dict[str, Any]) -> None:
    network = make_network("residual")
    results = [pruned_on(device, network, **arguments) for device in ("cpu", "auto")]
    assert_near(*results)


@pytest.mark.parametrize("name", ["flattened", "grouped", "depthwise", "concat"])
def test_weights_of_one_plan_are_near(name: str) -> None:
    """With a criterion that no rounding changes, and without a choice of sizes."""
    network = make_network(name)
    settings = {"plan.allocation": "uniform", "refit.recalibrate_batchnorm": False}
    expected, result = (
        pruned_on(device, network, criterion="l1", settings=settings) for device in ("cpu", "auto")
    )
    assert result.plan.removed == expected.plan.removed
    images = random_images(8, 16)
    with torch.inference_mode():
        output = result.model(images.to(device_of(result.model))).cpu()
        torch.testing.assert_close(output, expected.model(images), rtol=1e-2, atol=1e-2)


def test_the_original_stays_where_it_is_and_as_it_is() -> None:
    network = make_network("residual").to(find_device("auto"))
    before = copy.deepcopy(network.state_dict())
    secateur.prune(network, random_images(60, 16))
    assert device_of(network) == find_device("auto")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_what_is_saved_here_loads_on_the_cpu(tmp_path: Any) -> None:
    network, images = make_network("residual"), random_images(4, 16)
    result = pruned_on("auto", network)
    result.save(tmp_path / "run")
    loaded = secateur.load(tmp_path / "run", architecture=network)
    assert device_of(loaded) == torch.device("cpu")
    with torch.inference_mode():
        expected = result.model(images.to(device_of(result.model))).cpu()
        torch.testing.assert_close(loaded(images), expected, rtol=1e-2, atol=1e-2)


def test_facts_of_the_device() -> None:
    device = find_device("auto")
    assert accelerator_name(device)
    assert sums_device(device) in (device, torch.device("cpu"))
