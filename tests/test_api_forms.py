"""`secateur.prune` and `secateur.evaluate`: forms of targets, criteria, settings and networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secateur
from secateur.graph.taps import Kernels
from secateur.runtime.errors import TargetError, TraceError, UsageError
from secateur.scoring.criteria import FeatureBatch, Need

QUICK = {"refit.layers": "none", "refit.recalibrate_batchnorm": False}
"""Settings that leave the kernels as they are."""


def tail(dims: int) -> list[nn.Module]:
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    return [nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(12, 4)]


def classifier(dims: int = 2, channels: int = 3) -> nn.Sequential:
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    torch.manual_seed(0)
    layers = [layer(channels, 8, 3), nn.ReLU(), layer(8, 12, 3), *tail(dims)]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.rand(60, 3, 10, 10, generator=generator)


class TwoInputs(nn.Module):
    """Compares two images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.body(one), self.body(other)
        return first, first - second


def halves(model: nn.Module, images: Tensor) -> Tensor:
    difference: Tensor = model(images[:, :3], images[:, 3:])[1]
    return difference


class Output:
    """What networks of other libraries return."""

    def __init__(self, logits: Tensor) -> None:
        self.loss, self.logits = None, logits


class NamedLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()

    def forward(self, pixel_values: Tensor) -> Output:
        return Output(self.body(pixel_values))


class PositiveWeights:
    """A criterion written as a class."""

    needs: frozenset[Need] = frozenset()

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        self.taps = taps

    def update(self, features: FeatureBatch) -> None:
        raise AssertionError

    def state(self) -> Iterable[Tensor]:
        return ()

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        ((weights, _),) = self.taps[tap].incoming
        return weights.double().flatten(1).abs().sum(1)


@pytest.mark.parametrize("target", [0.7, "70%", " macs = 70 %", {"macs": 0.7}, {"macs": "70%"}])
def test_a_target_has_many_forms(images: Tensor, target: Any) -> None:
    result = secateur.prune(
        classifier(), images, target=target, criterion="l1", settings={"refit": {"layers": "none"}}
    )
    assert result.result.config.plan.target == "macs=0.7"
    assert result.scores["cut"].macs <= 0.7 * result.scores["before"].macs


@pytest.mark.parametrize("target", [0, -0.5, 1.5, True, None, {}, {"macs": 0.5, "params": 0.5}, 50])
def test_a_target_that_is_none_is_refused_at_once(target: Any) -> None:
    with pytest.raises(TargetError, match="with the fraction F to keep, 0 < F <= 1"):
        secateur.prune(classifier(), [], target=target)


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (lambda kernels: kernels.abs().sum(1), "<lambda>"),
        (lambda kernels: kernels.flatten(1).abs().sum(1).tolist(), "<lambda>"),
        (PositiveWeights(), "PositiveWeights"),
        (PositiveWeights, "PositiveWeights"),
    ],
)
def test_a_criterion_is_an_object_or_a_function(images: Tensor, criterion: Any, name: str) -> None:
    result = secateur.prune(classifier(), images, criterion=criterion, settings=QUICK)
    expected = secateur.prune(classifier(), images, criterion="l1", settings=QUICK)
    assert result.plan.removed == expected.plan.removed
    assert f"by {name}: " in repr(result)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (5, "int is not one: it lacks needs, reset, update, state, compute"),
        (lambda kernels: kernels.sum(), r"must return 8 scores, .*; it returned \[\]"),
        (lambda kernels: kernels.sum((1, 2)), r"gets kernels \[8, 27\], .* and fails: IndexError"),
        ("memory:mine", "was passed from Python"),
    ],
)
def test_other_criteria_are_refused(images: Tensor, criterion: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        secateur.prune(classifier(), images, criterion=criterion, settings=QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": True}, "epochs=True must be a whole number, 0 or more"),
        ({"max_images": 0}, "max_images=0 must be a whole number, 1 or more"),
        ({"class_names": "cat"}, "must be a list of names"),
        ({"settings": {"round_to": 8}}, r"must be SECTION\.KEY, as plan\.round_to"),
        ({"settings": {"finetune.epochs": True}}, "finetune.epochs: True is not a number"),
        ({"concepts": "colours"}, r"an image here is \[2, 40\]: use evidence"),
        ({"settings": {"finetune.flip": True}}, "leave them out"),
    ],
)
def test_other_arguments_are_refused_in_a_line(arguments: dict[str, Any], message: str) -> None:
    signals = torch.rand(60, 2, 40)
    with pytest.raises(UsageError, match=message):
        secateur.prune(classifier(1, 2), [signals], **arguments)


@pytest.mark.parametrize(
    ("dims", "shape", "epochs"),
    [
        (1, (2, 40), 0),
        (1, (2, 40), 1),
        pytest.param(3, (1, 7, 7, 7), 1, marks=pytest.mark.slow),
    ],
)
def test_signals_and_volumes_are_pruned(
    dims: int, shape: tuple[int, ...], epochs: int, generator: torch.Generator, tmp_path: Path
) -> None:
    model = classifier(dims, shape[0])
    images = torch.rand(60, *shape, generator=generator)
    settings = {"distill.epochs": epochs}
    result = secateur.prune(model, [images], target=0.6, epochs=epochs, settings=settings)
    stages = ["before", "cut", "refit", "distilled", "finetuned"]
    assert list(result.scores) == (stages if epochs else stages[:3])
    assert result.plan.removed
    folder = result.save(tmp_path / "run")
    assert torch.equal(secateur.load(folder, architecture=model)(images), result.model(images))
    assert secateur.load_program(folder)(images[:1]).shape == (1, 4)
    assert result.report(tmp_path / "report.html", images=8).is_file()


def test_images_may_be_as_narrow_as_the_network_takes(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, (1, 9)), nn.ReLU(), nn.Conv2d(8, 12, (4, 1)), *tail(2))
    images = torch.rand(60, 1, 4, 32, generator=generator)
    result = secateur.prune(model, images, target=0.7)
    assert result.result.config.data.image_size == 4


def test_a_network_runs_through_a_function(images: Tensor, tmp_path: Path) -> None:
    model, pairs = TwoInputs().eval(), torch.cat([images, images.flip(0)], dim=1)
    result = secateur.prune(model, pairs, forward=halves)
    assert type(result.model) is TwoInputs
    assert "body.0" in result.plan.removed
    outputs = result.model(images, images.flip(0))[1]
    folder = result.save(tmp_path / "run")
    with pytest.raises(UsageError, match=r"made with forward=test_api_forms\.halves: pass that"):
        secateur.load(folder, architecture=model)
    again = secateur.load(folder, architecture=model, forward=halves)
    assert torch.equal(again(images, images.flip(0))[1], outputs)
    program = secateur.load_program(folder)
    assert torch.allclose(program(pairs), outputs, atol=1e-6)
    labels = outputs.argmax(1)
    score = secateur.evaluate(result.model, [(pairs, labels)], forward=halves, known_ms=1.0)
    assert score.metric == 1.0


@pytest.mark.slow
def test_a_network_is_trained_and_reported_through_a_function(
    images: Tensor, tmp_path: Path
) -> None:
    pairs = torch.cat([images, images.flip(0)], dim=1)
    result = secateur.prune(TwoInputs().eval(), pairs, forward=halves, epochs=1)
    assert list(result.scores) == ["before", "cut", "refit", "finetuned"]
    assert result.report(tmp_path / "report.html", images=8).is_file()


def test_a_network_that_names_its_logits_needs_no_function(images: Tensor, tmp_path: Path) -> None:
    model = NamedLogits().eval()
    result = secateur.prune(model, {"pixel_values": images})
    plain = secateur.prune(model, images, forward=lambda model, images: model(images).logits)
    assert plain.plan.removed == result.plan.removed
    folder = result.save(tmp_path / "run")
    again = secateur.load(folder, architecture=model)
    assert torch.equal(again(images).logits, result.model(images).logits)


def test_two_things_need_a_function(images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"can't be run on images \[2, 3, 10, 10\]: .*missing"):
        secateur.prune(TwoInputs(), images)
    with pytest.raises(UsageError, match=r"a tuple of \[2, 4\] and \[2, 4\].*by letting forward"):
        secateur.prune(TwoInputs(), images, forward=lambda model, images: model(images, images))


def cut(model: nn.Module, images: Tensor, forward: Any = None) -> tuple[nn.Module, Any]:
    dependencies = secateur.build_dependency_graph(model, images, forward=forward)
    scores = {name: torch.rand(len(group)) for name, group in dependencies.groups.items()}
    plan = secateur.make_plan(scores, dependencies, secateur.Budget("macs", 0.6), "mine")
    return secateur.apply_plan(model, dependencies, plan).eval(), plan


def test_a_cut_network_is_saved_with_its_function(images: Tensor, tmp_path: Path) -> None:
    model, pairs = TwoInputs().eval(), torch.cat([images, images.flip(0)], dim=1)
    smaller, plan = cut(model, pairs, halves)
    secateur.save(tmp_path / "run", smaller, plan, image_shape=(6, 10, 10), forward=halves)
    again = secateur.load(tmp_path / "run", architecture=model, forward=halves)
    assert torch.equal(halves(again, pairs), halves(smaller, pairs))
    secateur.save(tmp_path / "without", smaller, plan, image_shape=(6, 10, 10))
    with pytest.raises(TraceError, match="if the run was made with forward=, pass it here"):
        secateur.load(tmp_path / "without", architecture=model)
    again = secateur.load(tmp_path / "without", architecture=model, forward=halves)
    assert torch.equal(halves(again, pairs), halves(smaller, pairs))


def test_images_sorted_by_class_get_a_note(images: Tensor) -> None:
    labels = torch.arange(60) // 15
    model = classifier()
    in_order = DataLoader(TensorDataset(images, labels), batch_size=10)
    few = secateur.prune(model, in_order, max_images=15, criterion="l1", settings=QUICK)
    assert "show 1 of the network's 4 classes" in repr(few)
    sampled = secateur.prune(
        model, TensorDataset(images, labels), max_images=30, criterion="l1", settings=QUICK
    )
    assert not any("classes" in notice for notice in sampled.result.notices)
    counts = [sampled.result.config.data.calibration_images, sampled.scores["before"].images]
    assert "images: 22 to score, 2 to choose, 6 to test" in repr(sampled)
    assert counts == [22, 6]


@pytest.mark.parametrize("form", [lambda x, y: (x, y), lambda x, y: {"image": x, "label": y}])
def test_labelled_images_of_any_form_are_scored(images: Tensor, form: Callable[..., Any]) -> None:
    model = classifier()
    labels = model(images).argmax(1)
    one_by_one = map(form, images, labels)
    score = secateur.evaluate(model, one_by_one, batch_size=7, known_ms=1.0)
    assert (score.metric, score.images) == (1.0, 60)
    with pytest.raises(secateur.SecateurError, match="no labels, which accuracy needs"):
        secateur.evaluate(model, images)
