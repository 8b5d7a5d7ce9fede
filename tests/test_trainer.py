"""Training: it learns, changes nothing else, and is repeatable."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from networks import Chain, randomise_norms
from secateur.config import TrainingSection
from secateur.data import TensorImages
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.errors import DataError, RunFolderError, SecateurError, UsageError
from secateur.runtime.precision import accelerator_for, autocast, has_fast_bfloat16
from secateur.training.checkpoint import Checkpoints
from secateur.training.loss import DistillationLoss
from secateur.training.outcome import Epoch
from secateur.training.trainer import Training, TrainingCallbacks, train
from secateur.training.training_data import TrainingData

PREPARE = Preprocessing(8, 8)


@pytest.fixture
def images(generator: torch.Generator) -> TensorImages:
    """Sixty images whose class is told by their brightness."""
    labels = torch.arange(60) % 5
    noise = torch.randint(0, 30, (60, 3, 8, 8), generator=generator)
    pixels = (noise + 45 * labels[:, None, None, None]).to(torch.uint8)
    return TensorImages(pixels, labels)


def settings(**changes: object) -> TrainingSection:
    base = {"epochs": 3, "batch_size": 16, "warmup_steps": 2, "precision": "float32"}
    return TrainingSection.model_validate({**base, **changes})


def trained(
    model: Chain,
    teacher: Chain | None,
    images: TensorImages,
    section: TrainingSection,
    seed: int = 0,
) -> tuple[Chain, list[Epoch]]:
    epochs: list[Epoch] = []
    copied = copy.deepcopy(model)
    callbacks = TrainingCallbacks(after_epoch=epochs.append)
    data = TrainingData(images, PREPARE)
    train(copied, teacher, data, section, seed=seed, callbacks=callbacks)
    return copied, epochs


def chain() -> Chain:
    """The same network every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain()


def is_equal(one: Chain, other: Chain) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in states)


def test_loss_falls_and_every_epoch_is_reported(images: TensorImages) -> None:
    _, epochs = trained(chain(), None, images, settings(epochs=6, learning_rate=0.1))
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].loss < 0.8 * epochs[0].loss
    assert epochs[-1].learning_rate == pytest.approx(0, abs=1e-6)


def test_same_seed_gives_the_same_weights(images: TensorImages) -> None:
    model = chain()
    one, _ = trained(model, None, images, settings())
    same, _ = trained(model, None, images, settings())
    other, _ = trained(model, None, images, settings(), seed=1)
    assert is_equal(one, same)
    assert not is_equal(one, other)


def test_teacher_is_left_alone_and_learnt_from(
    images: TensorImages, generator: torch.Generator
) -> None:
    teacher = chain().train()
    randomise_norms(teacher, generator)
    before = copy.deepcopy(teacher)
    _, epochs = trained(
        chain(), teacher, images, settings(epochs=8, label_weight=0.0, learning_rate=0.1)
    )
    assert is_equal(teacher, before)
    assert teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert epochs[-1].loss < epochs[0].loss


def test_without_label_weight_labels_do_not_matter(images: TensorImages) -> None:
    model, teacher = chain(), chain()
    wrong = TensorImages(images.pixels, images.labels.flip(0))
    one, _ = trained(model, teacher, images, settings(label_weight=0.0))
    other, _ = trained(model, teacher, wrong, settings(label_weight=0.0))
    with_labels, _ = trained(model, teacher, wrong, settings(label_weight=0.5))
    assert is_equal(one, other)
    assert not is_equal(one, with_labels)


def loss_of(
    model: Chain, teacher: Chain | None, images: Tensor, labels: Tensor, **changes: object
) -> float:
    section = settings(**changes)
    distillation = DistillationLoss(model, teacher, section, accelerator_for(section.precision))
    return float(distillation.loss(images, labels).detach())


def test_loss_is_the_weighted_sum_of_its_parts(generator: torch.Generator) -> None:
    model, teacher = chain().eval(), chain().eval()
    images, labels = torch.rand(6, 3, 8, 8, generator=generator), torch.arange(6) % 5
    temperature, weight, smoothing = 2.5, 0.3, 0.2
    loss = loss_of(
        model,
        teacher,
        images,
        labels,
        temperature=temperature,
        label_weight=weight,
        label_smoothing=smoothing,
    )
    student, taught = model(images), teacher(images)
    p, q = (F.softmax(t / temperature, dim=1) for t in (taught, student))
    divergence = (p * (p / q).log()).sum(1).mean() * temperature**2
    wanted = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
    entropy = -(wanted * F.log_softmax(student, dim=1)).sum(1).mean()
    expected = weight * entropy + (1 - weight) * divergence
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_copy_of_the_teacher_has_nothing_to_learn(generator: torch.Generator) -> None:
    model = chain().eval()
    images = torch.rand(6, 3, 8, 8, generator=generator)
    labels = torch.zeros(6, dtype=torch.int64)
    loss = loss_of(model, copy.deepcopy(model), images, labels, label_weight=0.0)
    assert loss == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_every_optimiser_learns(images: TensorImages, optimiser: str) -> None:
    section = settings(epochs=6, learning_rate=0.05, optimiser=optimiser)
    model, epochs = trained(chain(), None, images, section)
    other, _ = trained(chain(), None, images, settings(epochs=6, learning_rate=0.05))
    assert epochs[-1].loss < 0.8 * epochs[0].loss
    assert is_equal(model, other) == (optimiser == "sgd")


def test_statistics_of_norms_move_in_training_mode_only(images: TensorImages) -> None:
    model = chain()
    for is_fixed in (False, True):
        moved, _ = trained(model, None, images, settings(freeze_batchnorm=is_fixed))
        name = "bn1.running_mean"
        assert torch.equal(moved.state_dict()[name], model.state_dict()[name]) == is_fixed
        assert not torch.equal(moved.conv1.weight, model.conv1.weight)
        assert moved.training


def test_mode_comes_back(images: TensorImages) -> None:
    model = chain().eval()
    model.bn1.train()
    train(model, None, TrainingData(images, PREPARE), settings(epochs=1), seed=0)
    assert (model.training, model.bn1.training, model.bn2.training) == (False, True, False)


def test_loss_that_explodes_is_an_error(images: TensorImages) -> None:
    with pytest.raises(SecateurError, match="smaller learning rate"):
        train(chain(), None, TrainingData(images, PREPARE), settings(learning_rate=1e20), seed=0)


def test_label_outside_the_head_is_an_error(images: TensorImages) -> None:
    wrong = TensorImages(images.pixels, images.labels + 3)
    with pytest.raises(DataError, match="has 5 classes"):
        train(chain(), None, TrainingData(wrong, PREPARE), settings(), seed=0)


def test_precision_is_the_requested_one() -> None:
    product = torch.nn.Linear(4, 4)
    expected = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if has_fast_bfloat16() else torch.float32,
    }
    with autocast("float32"):
        assert product(torch.ones(1, 4)).dtype == expected["float32"]
    with autocast("bfloat16"):
        assert product(torch.ones(1, 4)).dtype == expected["bfloat16"]
    with autocast("auto"):
        assert product(torch.ones(1, 4)).dtype == expected["auto"]


# --- what it can be told ------------------------------------------------------------------------


def test_precision_of_half_needs_an_accelerator(images: TensorImages) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(UsageError, match="float16 needs an accelerator"):
        trained(chain(), None, images, settings(precision="float16"))


def test_split_steps_equal_the_whole_step(images: TensorImages) -> None:
    whole, _ = trained(chain(), None, images, settings(freeze_batchnorm=True))
    parts, _ = trained(
        chain(), None, images, settings(freeze_batchnorm=True, gradient_accumulation_steps=3)
    )
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1}])
def test_mixed_images_teach_and_can_be_repeated(
    images: TensorImages, changes: dict[str, object]
) -> None:
    section = settings(epochs=8, learning_rate=0.1, **changes)
    one, epochs = trained(chain(), None, images, section)
    same, _ = trained(chain(), None, images, section)
    plain, _ = trained(chain(), None, images, settings(epochs=8, learning_rate=0.1))
    assert is_equal(one, same)
    assert not is_equal(one, plain)
    assert epochs[-1].loss < epochs[0].loss


def test_mixing_without_labels_needs_none(images: TensorImages) -> None:
    unknown = TensorImages(images.pixels, torch.full_like(images.labels, -1))
    section = settings(mixup=0.4, label_weight=0.0)
    _, epochs = trained(chain(), chain(), unknown, section)
    assert len(epochs) == 3


def test_the_averaged_weights_are_kept(images: TensorImages) -> None:
    decay = 0.5
    section = settings(
        epochs=1, batch_size=30, freeze_batchnorm=True, momentum=0, learning_rate=0.1
    )
    averaged, _ = trained(chain(), None, images, section.model_copy(update={"ema_decay": decay}))
    # Two steps: the average starts at the first step's weights and then takes in the second's.
    states = Steps(images, section)
    expected = decay * states.weights[0] + (1 - decay) * states.weights[1]
    torch.testing.assert_close(averaged.conv1.weight.detach(), expected)


class Steps:
    """The first layer's weights after every step."""

    def __init__(self, images: TensorImages, section: TrainingSection) -> None:
        self.weights: list[Tensor] = []
        model = chain()

        def note(*_: object) -> None:
            self.weights.append(model.conv1.weight.detach().clone())

        hook = register_optimizer_step_post_hook(note)
        try:
            train(model, None, TrainingData(images, PREPARE), section, seed=0)
        finally:
            hook.remove()


def validations(*values: float) -> Callable[[nn.Module], float]:
    """A validation that returns one value after another."""
    remaining = iter(values)
    return lambda network: next(remaining)


def measured(images: TensorImages, *values: float, **changes: object) -> tuple[Chain, Training]:
    model = chain()
    section = settings(epochs=len(values) - 1, **changes)
    training = train(
        model,
        None,
        TrainingData(images, PREPARE),
        section,
        seed=0,
        callbacks=TrainingCallbacks(validate=validations(*values)),
    )
    return model, training


def test_the_best_epoch_can_be_kept(images: TensorImages) -> None:
    model, training = measured(images, 0.1, 0.5, 0.7, 0.7, 0.6, keep="best")
    assert (training.before, training.best_epoch, training.ended) == (0.1, 2, "whole")
    assert [epoch.validation for epoch in training.epochs] == [0.5, 0.7, 0.7, 0.6]
    last, again = measured(images, 0.1, 0.5, 0.7, 0.7, 0.6)
    assert again.best_epoch == 2
    assert not is_equal(model, last)
    for name, tensor in last.state_dict().items():
        assert torch.equal(tensor, again.last[name])
        assert torch.equal(model.state_dict()[name], again.best[name])


def test_training_that_only_harms_leaves_the_network_as_it_came(images: TensorImages) -> None:
    model, training = measured(images, 0.9, 0.5, 0.7, keep="best")
    assert training.best_epoch == 0
    assert is_equal(model, chain())


def test_every_part_of_a_step_has_images_enough_for_a_norm(images: TensorImages) -> None:
    """The last batch has two images, and a norm behind the pooling sees one value of each."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(4),
        nn.Linear(4, 5),
    )
    few = images.take(torch.arange(10))
    section = settings(epochs=1, batch_size=8, gradient_accumulation_steps=8)
    training = train(model, None, TrainingData(few, PREPARE), section, seed=0)
    assert math.isfinite(training.epochs[0].loss)


def test_patience_ends_the_training(images: TensorImages) -> None:
    _, training = measured(images, 0.1, 0.5, 0.4, 0.5, 0.9, 0.9, patience=2)
    assert training.ended == "patience"
    assert len(training.epochs) == 3


def test_time_ends_the_training(images: TensorImages) -> None:
    _, training = measured(images, 0.1, 0.5, 0.4, max_minutes=1e-9)
    assert training.ended == "time"
    assert len(training.epochs) == 1


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(images: TensorImages) -> None:
    plain, _ = trained(chain(), None, images, settings(epochs=1))
    compiled, _ = trained(chain(), None, images, settings(epochs=1, compile=True))
    for one, other in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_each_network_is_compiled_however_many_there_were(
    images: TensorImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    limit = "recompile" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size"
    fail = "recompile" if limit == "recompile" else "cache"  # torch 2.6 has these names
    patch = {f"{limit}_limit": 2, f"fail_on_{fail}_limit_hit": True}
    with torch._dynamo.config.patch(patch):
        for width in (4, 5, 6):  # two compilations each: the last batch is not whole
            network = chain()
            network.conv2 = nn.Conv2d(6, width, 3)
            network.bn2, network.linear = nn.BatchNorm2d(width), nn.Linear(width, 5)
            trained(network, None, images, settings(epochs=1, compile=True))


# --- checkpoints --------------------------------------------------------------------------------

LONG = {
    "epochs": 4,
    "ema_decay": 0.9,
    "cutmix": 1.0,
    "checkpoint_minutes": 0,
    "optimiser": "adamw",
    "learning_rate": 0.01,
}


class Stop(Exception):
    """What ends a training in these tests."""


def stopped_after(steps: int, folder: Path, images: TensorImages, section: TrainingSection) -> None:
    """Trains and breaks off, as if the process were gone, after so many steps."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done > steps:
            raise Stop

    hook = register_optimizer_step_post_hook(count)
    try:
        with pytest.raises(Stop):
            resumed(folder, images, section)
    finally:
        hook.remove()


def resumed(folder: Path, images: TensorImages, section: TrainingSection) -> tuple[Chain, Training]:
    model = chain()
    training = train(
        model,
        None,
        TrainingData(images, PREPARE),
        section,
        seed=0,
        callbacks=TrainingCallbacks(
            validate=lambda network: float(network.state_dict()["bn1.running_mean"].sum())
        ),
        checkpoints=Checkpoints(folder),
    )
    return model, training


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_resumed_training_ends_where_an_undisturbed_one_does(
    images: TensorImages, tmp_path: Path, optimiser: str
) -> None:
    section = settings(**{**LONG, "optimiser": optimiser})
    expected, whole = resumed(tmp_path / "whole", images, section)
    for steps in (1, 3, 2, 4):
        stopped_after(steps, tmp_path / "parts", images, section)
    model, training = resumed(tmp_path / "parts", images, section)
    assert is_equal(model, expected)
    assert training.epochs == whole.epochs
    assert (training.before, training.best_epoch) == (whole.before, whole.best_epoch)
    for name in whole.best:
        assert torch.equal(training.best[name], whole.best[name])


def test_a_finished_training_is_not_trained_again(images: TensorImages, tmp_path: Path) -> None:
    section = settings(**LONG)
    expected, whole = resumed(tmp_path, images, section)
    model, again = resumed(tmp_path, images, section)
    assert is_equal(model, expected)
    assert again.epochs == whole.epochs


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_training_that_time_has_ended_is_not_resumed(
    images: TensorImages, tmp_path: Path, epochs: int
) -> None:
    section = settings(**{**LONG, "epochs": epochs, "max_minutes": 1e-9})
    expected, first = resumed(tmp_path, images, section)
    model, again = resumed(tmp_path, images, section)
    assert is_equal(model, expected)
    assert again.epochs == first.epochs
    assert (first.ended, again.ended) == ("time", "time")
    _, longer = resumed(tmp_path, images, settings(**{**LONG, "epochs": epochs}))
    assert len(longer.epochs) == epochs


def test_time_that_is_over_within_an_epoch_ends_it_without_a_step(
    images: TensorImages, tmp_path: Path
) -> None:
    stopped_after(2, tmp_path, images, settings(**LONG))
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        _, training = resumed(tmp_path, images, settings(**{**LONG, "max_minutes": 1e-9}))
    finally:
        hook.remove()
    assert steps == []
    assert (len(training.epochs), training.ended) == (1, "time")


def test_a_checkpoint_of_another_training_is_refused(images: TensorImages, tmp_path: Path) -> None:
    resumed(tmp_path, images, settings(**LONG))
    changed = settings(**{**LONG, "learning_rate": 0.02})
    with pytest.raises(UsageError, match=r"learning_rate 0\.01, not 0\.02"):
        resumed(tmp_path, images, changed)
    longer = settings(**{**LONG, "max_minutes": 100, "checkpoint_minutes": 1})
    resumed(tmp_path, images, longer)  # what changes nothing may differ


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_leaves_a_checkpoint(
    images: TensorImages, tmp_path: Path, number: signal.Signals
) -> None:
    section = settings(**{**LONG, "checkpoint_minutes": 1000})
    expected, _ = resumed(tmp_path / "whole", images, section)
    done = 0

    def ask(*_: object) -> None:
        nonlocal done
        done += 1
        if done == 6:
            os.kill(os.getpid(), number)

    hook = register_optimizer_step_post_hook(ask)
    before = signal.getsignal(number)
    try:
        with pytest.raises(KeyboardInterrupt):
            resumed(tmp_path / "parts", images, section)
    finally:
        hook.remove()
    assert signal.getsignal(number) is before
    checkpoint = Checkpoints(tmp_path / "parts").latest()
    assert checkpoint is not None
    position = checkpoint.facts["position"]
    assert (position["epoch"], position["step"]) == (2, 2)
    model, _ = resumed(tmp_path / "parts", images, section)
    assert is_equal(model, expected)


def test_two_checkpoints_are_kept_and_a_damaged_one_is_stepped_over(
    images: TensorImages, tmp_path: Path
) -> None:
    section = settings(**LONG)
    expected, _ = resumed(tmp_path / "whole", images, section)
    stopped_after(7, tmp_path / "parts", images, section)
    older, newest = sorted((tmp_path / "parts").iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    model, _ = resumed(tmp_path / "parts", images, section)
    assert is_equal(model, expected)
    for path in (tmp_path / "whole").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(RunFolderError, match=r"\.safetensors can't be read"):
        resumed(tmp_path / "whole", images, section)
    assert older.name < newest.name


def test_weights_come_back_to_where_they_were(images: TensorImages) -> None:
    model = chain()
    layout = model.conv1.weight.is_contiguous()
    train(model, None, TrainingData(images, PREPARE), settings(epochs=1), seed=0)
    assert model.conv1.weight.is_contiguous() == layout
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(model)


def test_epochs_are_reported_once(images: TensorImages, tmp_path: Path) -> None:
    reported: list[Epoch] = []
    model = chain()
    training = train(
        model,
        None,
        TrainingData(images, PREPARE),
        settings(),
        seed=0,
        callbacks=TrainingCallbacks(after_epoch=reported.append),
    )
    assert tuple(reported) == training.epochs
    assert dataclasses.asdict(reported[0])["validation"] is None
