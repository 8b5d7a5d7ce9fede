"""Synthesised images have the statistics that batch norms keep, and a network is pruned by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
from networks import Chain, randomise_norms
from runs import small_config
from secateur.config import RunConfig, from_dict
from secateur.data import LabelKind, NormalisedImages, split_calibration
from secateur.data.batch_reader import BatchReader
from secateur.data.preprocessing import Preprocessing
from secateur.experiments.evaluate import evaluate_run
from secateur.experiments.run import run
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.synthetic_data import STAGE, extend, extended_by
from secateur.runtime.errors import UsageError
from secateur.training.synthetic_images import (
    Descent,
    black_and_white,
    copies,
    start_images,
    statistics_error,
    synthesise,
)

SHAPE = (3, 8, 8)
FEW = Descent(steps=30, learning_rate=0.1)


@pytest.fixture
def model(generator: torch.Generator) -> Chain:
    network = Chain()
    randomise_norms(network, generator)
    # The statistics of smooth pictures: those of any random numbers might be out of reach.
    with torch.no_grad():
        network.train()
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        network(0.5 + 0.3 * start_images(64, SHAPE, seed=7))
    return network


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pipeline.synthetic_data.FROM_NOISE", FEW)
    monkeypatch.setattr("secateur.pipeline.synthetic_data.FROM_COPIES", FEW)


def test_images_approach_the_statistics_of_the_batch_norms(model: Chain) -> None:
    start = start_images(32, SHAPE, seed=0)
    images = synthesise(model, start, FEW)
    model.eval()
    with torch.no_grad():
        before, after = (float(statistics_error(model, pixels)) for pixels in (start, images))
    assert before > 0.1
    assert after < 0.2 * before


def test_error_of_statistics_is_that_of_the_formula() -> None:
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])
    images = torch.tensor([[0.0, 2.0], [-1.0, 3.0]]).reshape(1, 2, 1, 2)  # deviations 1 and 2
    means, deviations = (0 / 4, 1 / 1), (1 / 4, 1 / 1)
    expected = (sum(means) + sum(deviations)) / 2
    assert float(statistics_error(norm.eval(), images)) == pytest.approx(expected)


def test_the_network_stays_as_it_is(model: Chain) -> None:
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    synthesise(model, start_images(16, SHAPE, seed=0), FEW)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_images_depend_on_the_seed_alone(model: Chain) -> None:
    first, again, other = (
        synthesise(model, start_images(16, SHAPE, seed=seed), FEW) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pixels_stay_between_black_and_white(model: Chain) -> None:
    normalise = Preprocessing(8, 8, (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)).normalise
    images = synthesise(
        model, start_images(16, SHAPE, normalise, seed=0), FEW, black_and_white(normalise)
    )
    for channel, limit in enumerate((2.0, 1.0, 0.5)):
        assert images[:, channel].abs().max() <= limit
    assert images[:, 2].abs().max() == 0.5


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 33), (1, 6, 7, 8)])
def test_noise_is_normalised_and_smooth(shape: tuple[int, ...]) -> None:
    noise = start_images(50, shape, seed=0)
    over = (0, *range(2, noise.ndim))
    assert noise.shape == (50, *shape)
    torch.testing.assert_close(noise.mean(over), torch.zeros(shape[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(noise.std(over), torch.ones(shape[0]))
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean()
    assert neighbours > 0.4  # their correlation


def test_grey_pictures_of_a_network_with_one_channel() -> None:
    normalise = Preprocessing(8, 8, (0.5,), (0.25,)).normalise
    start = start_images(5, (1, 8, 8), normalise, seed=0)
    assert start.shape == (5, 1, 8, 8)
    assert start.abs().max() <= 2


def test_networks_without_batch_norms_are_named_as_the_cause() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(UsageError, match="only from the statistics of batch norms"):
        synthesise(network, start_images(16, SHAPE, seed=0), FEW)


def test_prune_without_images(model: Chain, few_steps: None) -> None:
    settings = {"data.synthetic_images": 40}
    first, again = (
        secateur.prune(model, None, input_shape=SHAPE, target=0.7, settings=settings)
        for _ in range(2)
    )
    assert first.plan.removed == again.plan.removed
    assert first.scores["refit"] is not None
    assert first.scores["refit"].macs <= 0.7 * first.scores["before"].macs
    assert first.result.config.data.source == "synthetic"
    assert not first.has_labels
    (note,) = (note for note in first.result.notes if "synthesised" in note)
    assert note.startswith("No images were given: 40 were synthesised")
    assert "score the pruned network on real images" in note


def test_test_images_without_any_others_are_scored_by_their_labels(
    model: Chain, few_steps: None
) -> None:
    model.eval()
    images = start_images(20, SHAPE, seed=3)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:5] = (labels[:5] + 1) % 5
    pruned = secateur.prune(
        model,
        None,
        input_shape=SHAPE,
        test=(images, labels),
        settings={"data.synthetic_images": 16},
    )
    assert pruned.has_labels
    assert pruned.scores["before"].metric == 0.75
    assert any("Scores are on your test images" in note for note in pruned.result.notes)


def test_the_command_line_needs_no_images(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.pipeline.synthetic_data.FROM_NOISE", Descent(2, 0.1))
    data = {"source": "synthetic", "synthetic_images": 20}
    config = small_config(model_file, data=data, report={"images": 8})
    result = run(config, tmp_path / "run")
    assert result.stages[-1].score.images == 4  # every fifth
    assert any("20 were synthesised" in note for note in result.notes)
    assert (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(UsageError, match="can't tell how good a network is"):
        evaluate_run(tmp_path / "run", config, RunContext(), {"model.name"})
    sizeless = small_config(model_file, data={**data, "image_size": None})
    with pytest.raises(UsageError, match="--image-size SIDE"):
        run(sizeless, tmp_path / "other")


def test_what_is_missing_is_said(model: Chain) -> None:
    with pytest.raises(UsageError, match=r"input_shape=\(\) must be the shape of one image"):
        secateur.prune(model, None)


def test_an_estimate_synthesises_nothing(model: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr("secateur.pipeline.synthetic_data.synthesise", fail)
    expected = secateur.estimate(model, None, input_shape=SHAPE)
    assert expected.seconds[STAGE] > 0


def test_copies_are_shifted_and_mirrored() -> None:
    images = torch.rand(2, 3, 16, 16)
    sources = torch.tensor([1, 1, 0, 1] * 10)
    moved = copies(images, sources, flip=False, seed=0)
    assert moved.shape == (40, 3, 16, 16)
    middle = images[:, :, 4:12, 4:12]  # shifts are at most two pixels
    for copied, source in zip(moved, sources.tolist(), strict=True):
        windows = copied.unfold(1, 8, 1).unfold(2, 8, 1)  # [channel, top, left, 8, 8]
        parts = windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8)
        assert bool((parts == middle[source]).flatten(1).all(1).any())
    mirrored = copies(images, sources, flip=True, seed=0)
    same = (mirrored == moved).flatten(1).all(1)
    assert torch.equal(mirrored[~same], moved[~same].flip(3))
    assert 10 < int(same.sum()) < 30


def test_few_images_are_extended(model: Chain, few_steps: None) -> None:
    model.eval()
    images = start_images(40, SHAPE, seed=3)
    settings = {"data.synthetic_images": 30}
    extended = secateur.prune(model, images, test=images, settings=settings)
    (note,) = (note for note in extended.result.notes if "synthesised" in note)
    assert note.startswith("36 calibration images are few: 30 more were synthesised")
    alone = secateur.prune(model, images, test=images, settings={"data.synthetic_images": 0})
    assert not any("synthesised" in note for note in alone.result.notes)
    expected = secateur.estimate(model, images, test=images, settings=settings)
    assert expected.seconds[STAGE] > 0


@pytest.mark.parametrize(
    ("count", "kind", "side", "asked", "added"),
    [
        (32, "none", 8, None, 256),
        (128, "classes", 64, None, 256),
        (129, "none", 8, None, 0),
        (32, "none", 65, None, 0),
        (32, "none", 65, 100, 100),
        (1000, "none", 8, 100, 100),
        (32, "masks", 8, 100, 0),
        (32, "none", 8, 0, 0),
    ],
)
def test_how_many_are_added(
    model: Chain,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    kind: LabelKind,
    side: int,
    asked: int | None,
    added: int,
) -> None:
    monkeypatch.setattr("secateur.pipeline.synthetic_data.FEW_IMAGES", 128)
    images = torch.zeros(count, 3, side, side)
    calibration = NormalisedImages(images, torch.zeros(count, dtype=torch.int64))
    data = {"source": "images:photos", "synthetic_images": asked}
    config = from_dict({"model": {"name": "resnet20"}, "data": data}, RunConfig)
    assert extended_by(calibration, kind, model, config, images) == added
    no_norms = nn.Conv2d(3, 4, 3)
    assert extended_by(calibration, kind, no_norms, config, images) == 0


def test_labels_go_with_the_copies(model: Chain, few_steps: None) -> None:
    images, labels = start_images(10, SHAPE, seed=3), torch.arange(10)
    config = small_config(Path("own.py"))
    reader = BatchReader(Preprocessing(8, 8), batch_size=4)
    calibration = NormalisedImages(images, labels)
    extended = extend(calibration, 25, model, config, reader)
    assert torch.equal(extended.read(labels, reader.preprocessing), images)
    assert extended.labels.tolist() == [*range(10), *range(10), *range(10), *range(5)]
    fit, held_out = split_calibration(extended)
    assert len(fit.labels) == 28
    assert len(held_out.labels) == 7
