"""What runs on an accelerator gives what it gives on the CPU, bit for bit where the sums are equal.

The accelerator pretends (`pretend_device`): its sums are the CPU's, so everything must be equal to
the last bit. `test_gpu.py` does the same on a real one, where sums round differently.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import secateur
from fault_case import VARYING, Case
from networks import make_network, random_images
from pretend_device import DEVICE, WITHOUT_FLOAT64, pretend_device
from secateur.config import CRITERIA, RunConfig, from_dict
from secateur.experiments import run as runs
from secateur.experiments.compare.job_files import prepare_folder, read_job
from secateur.experiments.compare.spec import jobs_of
from secateur.experiments.compare.worker import run_jobs
from secateur.experiments.evaluate import evaluate_run
from secateur.experiments.inspect import inspect_network
from secateur.experiments.manifest import PROGRAM
from secateur.pipeline.result import RunResult
from secateur.pipeline.run_context import RunContext

T = TypeVar("T")


def on_both(action: Callable[[torch.device], T]) -> tuple[T, T]:
    """What an action returns for the CPU, and for the pretend accelerator."""
    expected = action(torch.device("cpu"))
    with pretend_device() as device:
        return expected, action(device)


@pytest.fixture(autouse=True)
def no_joint_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the joint estimate out: the pretend device can't differentiate forwards."""
    monkeypatch.setattr("secateur.pruning.refit.segments.LEAST_REMOVED", math.inf)


def prune_on(
    device: torch.device, network: nn.Module, images: Any = None, **arguments: Any
) -> secateur.PruneResult:
    """Prune a copy of a network on a device."""
    images = random_images(60, 16) if images is None else images
    return secateur.prune(copy.deepcopy(network).to(device), images, target=0.6, **arguments)


def assert_equal(
    expected: secateur.PruneResult, result: secateur.PruneResult, device: torch.device = DEVICE
) -> None:
    """The same plan, the same scores and the same weights, but those on the device."""
    assert result.plan.hash == expected.plan.hash
    assert _timeless(result.result) == _timeless(expected.result)
    tensors = result.model.state_dict()
    assert {tensor.device for tensor in tensors.values()} == {device}
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensors[name].cpu(), tensor), name


def _timeless(result: RunResult) -> object:
    content = result.model_dump(mode="json", exclude={"config", "environment", "plan_hash"})

    def without_times(value: object) -> object:
        if isinstance(value, dict):
            return {key: without_times(v) for key, v in value.items() if key not in VARYING}
        return [without_times(v) for v in value] if isinstance(value, list) else value

    return without_times(content)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("residual", {"settings": {"refit.form": "channel", "plan.prune_residual": True}}),
        (
            "residual",
            {
                "settings": {
                    "refit.sampling": "importance",
                    "distill.epochs": 1,
                    "distill.precision": "float32",
                }
            },
        ),
        ("residual", {"settings": {"plan.actions": ["channels", "rank"]}}),
        ("flattened", {"criterion": "vote-response"}),  # its evidence is Grad-CAM's
        ("grouped", {"criterion": "bn_scale"}),
        ("depthwise", {"criterion": "taylor"}),
    ],
)
def test_pruning_is_equal(name: str, arguments: dict[str, Any]) -> None:
    network = make_network(name)
    assert_equal(*on_both(lambda device: prune_on(device, network, **arguments)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"criterion": "taylor"},
        {"criterion": "chip", "settings": {"refit.form": "channel"}},
        {"settings": {"plan.actions": ["rank"]}},
        {"concepts": "factors:3,colours"},
    ],
)
def test_pruning_is_equal_where_the_device_has_no_float64(arguments: dict[str, Any]) -> None:
    network = make_network("residual")
    expected = prune_on(torch.device("cpu"), network, **arguments)
    with pretend_device():
        result = prune_on(WITHOUT_FLOAT64, network, **arguments)
    assert_equal(expected, result, WITHOUT_FLOAT64)


def test_the_network_never_runs_on_the_cpu() -> None:
    network, on_cpu = make_network("residual").to("cpu"), Counter[str]()
    with pretend_device(on_cpu) as device:
        result = secateur.prune(network.to(device), random_images(60, 16))
    assert on_cpu["aten::convolution"] == 0
    assert on_cpu["aten::addmm"] == 0
    assert next(result.model.parameters()).device == device


def test_images_may_be_on_the_device_already() -> None:
    network, images = make_network("residual"), random_images(60, 16)
    expected = prune_on(torch.device("cpu"), network, images)
    with pretend_device() as device:
        result = prune_on(device, network, images.to(device))
        score = secateur.evaluate(
            network.to(device), (images.to(device), torch.zeros(60, dtype=torch.int64))
        )
    assert_equal(expected, result)
    labelled = (images, torch.zeros(60, dtype=torch.int64))
    assert score.metric == secateur.evaluate(make_network("residual"), labelled).metric


def test_a_network_that_is_saved_on_a_device_loads_on_the_cpu(tmp_path: Path) -> None:
    network, images = make_network("residual"), random_images(4, 16)
    results = on_both(lambda device: prune_on(device, network))
    assert_equal(*results)
    expected = results[0].save(tmp_path / "cpu")
    with pretend_device():
        result = results[1].save(tmp_path / "device")
    assert (expected / PROGRAM).read_bytes() == (result / PROGRAM).read_bytes()
    one, other = (secateur.load(folder, architecture=network) for folder in (expected, result))
    assert torch.equal(one(images), other(images))
    assert torch.equal(secateur.load_program(result)(images), one(images))
    with pretend_device() as device:
        loaded = secateur.load(expected, architecture=copy.deepcopy(network).to(device))
        assert torch.equal(loaded(images.to(device)).cpu(), one(images))


def _pictures(page: str) -> list[str]:
    return [part.partition('"')[0] for part in page.split('src="data:image')[1:]]


class Maps(nn.Module):
    """Class scores at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv2(self.conv1(x).relu()).relu())
        return logits


@pytest.mark.parametrize("concepts", ["auto", "evidence", "saliency"])
def test_segmentation_is_equal(concepts: str) -> None:
    network = Maps()
    assert_equal(*on_both(lambda device: prune_on(device, network, concepts=concepts)))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A small network and images in files."""
    made = Case(tmp_path, checkpoint_minutes=5, report_images=0)
    made.write()
    return made


def config_on(case: Case, device: torch.device, **score: object) -> RunConfig:
    content = case.config(epochs=1).model_dump(mode="json", exclude_none=True)
    content["model"]["device"] = "auto" if device == DEVICE else "cpu"
    content["finetune"] |= {"precision": "float32", "flip": False}
    content["score"] |= score
    return from_dict(content, RunConfig)


@pytest.mark.parametrize("concepts", ["evidence", "saliency", "factors:3,colours"])
def test_inspect_is_equal_by_all_criteria(case: Case, concepts: str) -> None:
    criteria = [name for name in CRITERIA if name != "bn_scale"]  # its last layer has no norm

    def inspect_on(device: torch.device) -> dict[str, Any]:
        return inspect_network(config_on(case, device, concepts=concepts), criteria)

    expected, result = on_both(inspect_on)
    assert expected["groups"][0]["scores"].keys() == set(criteria)
    assert result == expected


def test_a_run_its_report_and_its_evaluation_are_equal(case: Case, tmp_path: Path) -> None:
    named = {"model.name": case.model_name}

    def run_on(device: torch.device) -> list[object]:
        config, folder = config_on(case, device), tmp_path / device.type
        result = runs.run(config, folder)
        (page,) = runs.report(folder, named=named, images=10)
        score = evaluate_run(folder, config, RunContext(), named).score
        return [
            _timeless(result),
            (folder / "model.safetensors").read_bytes(),
            _pictures(page.read_text()),
            dataclasses.replace(score, latency_ms=0.0),
        ]

    expected, result = on_both(run_on)
    assert result == expected
    facts = [
        json.loads((tmp_path / folder / "result.json").read_text())["environment"]["accelerator"]
        for folder in ("cpu", DEVICE.type)
    ]
    assert facts == [None, "pretend lazy:0"]


def test_benchmarks_are_equal(case: Case, tmp_path: Path) -> None:
    def compare_on(device: torch.device) -> list[tuple[str, object]]:
        spec = case.benchmark().on_device("auto" if device == DEVICE else "cpu")
        finetune = spec.finetune.model_copy(update={"epochs": 0})
        spec = spec.model_copy(update={"finetune": finetune, "targets": ("macs=0.6",)})
        folder, jobs = tmp_path / device.type, jobs_of(spec)
        prepare_folder(folder, spec)
        with (tmp_path / "messages").open("w") as messages:
            run_jobs(folder, [job.id for job in jobs], messages)
        results = [read_job(folder, job) for job in jobs]
        return [
            (job.id, result and result.result and _timeless(result.result))
            for job, result in zip(jobs, results, strict=True)
        ]

    expected, result = on_both(compare_on)
    assert len(expected) == 2
    assert all(result for _, result in expected)
    assert result == expected
