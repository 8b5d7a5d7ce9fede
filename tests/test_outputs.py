"""Networks with outputs of every form are pruned, and their figures are those of their outputs."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur import PruneResult, SecateurError
from secateur.runtime.errors import AccuracyError

COUNT, CLASSES = 120, 3
PLAIN = {"refit.layers": "none", "refit.recalibrate_batchnorm": False}
"""Settings that leave a cut network so bad that no figure of it can be 100 % but by mistake."""
Named = namedtuple("Named", ["logits", "aux_logits"])


class Net(nn.Module):
    """A small network whose outputs are centred, and whose weights are too large for a new one."""

    def __init__(self, images: Tensor, outputs: int, head: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        )
        self.linear = nn.Linear(48, outputs)
        self.head = head
        with torch.no_grad():
            for name in ("body.0.weight", "body.2.weight", "linear.weight"):
                self.get_parameter(name).mul_(4)
            logits = self.linear(self.body(images))
            self.linear.bias.sub_(logits.median(0).values)

    def forward(self, images: Tensor) -> Any:
        features = self.body(images)
        return self.head(self.linear(features))


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(COUNT, 3, 8, 8, generator=generator)


def make(images: Tensor, outputs: int, head: Callable[[Tensor], Any] = lambda x: x) -> Net:
    return Net(images, outputs, head).eval()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output


def held_out(values: Tensor) -> Tensor:
    """The images, or their labels, that `secateur.prune` holds out for the scores."""
    return values[4::5]


def prune(model: nn.Module, images: Any, **options: Any) -> PruneResult:
    settings = {**PLAIN, **options.pop("settings", {})}
    options = {"target": 0.3, "criterion": "random", **options}
    return secateur.prune(model, images, settings=settings, **options)


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("head", [lambda x: x, lambda x: x[:, 0], lambda x: x[:, :, None, None]])
def test_one_output_is_scored_by_its_sign(
    images: Tensor, head: Callable[[Tensor], Tensor], has_labels: bool
) -> None:
    model = make(images, 1, head)
    z = logits_of(model, images).flatten()
    labels = (z > 0).long()
    result = prune(model, [(images, labels)] if has_labels else images)
    after = logits_of(result.model, held_out(images)).flatten()
    same = float(((after > 0) == (held_out(z) > 0)).float().mean())
    assert 0 < same < 1
    cut = result.scores["cut"]
    assert cut.agreement_fraction == pytest.approx(same)
    assert cut.metric == pytest.approx(same)
    if has_labels:
        loss = F.binary_cross_entropy_with_logits(after, held_out(labels).float())
        assert cut.loss == pytest.approx(float(loss), rel=1e-5)
    else:
        assert cut.loss is None
    assert cut.top5_fraction is None
    assert result.scores["before"].agreement_fraction is None
    assert f"{100 * same:.2f}" in repr(result)
    assert "one output: above 0 it means class 1" in repr(result)


@pytest.mark.parametrize("labels", [torch.tensor([0.2, 0.7]), torch.tensor([4, 9])])
def test_labels_that_are_no_classes_are_refused_before_any_work(
    images: Tensor, labels: Tensor
) -> None:
    model = make(images, 1)
    with pytest.raises(SecateurError, match="for a regression"):
        prune(model, (images, labels.repeat(COUNT // 2)))


def test_one_output_of_one_sign_has_no_agreement(images: Tensor) -> None:
    model = make(images, 1, lambda x: x.square() + 1)
    with pytest.raises(AccuracyError, match="above 0 for all 24 test images"):
        prune(model, images, settings={"model.allow_untrained": True})


@pytest.mark.parametrize("head", [lambda x: x, torch.sigmoid])
def test_several_labels_are_scored_one_by_one(
    images: Tensor, head: Callable[[Tensor], Tensor]
) -> None:
    model = make(images, 4, head)
    z = logits_of(model, images)
    middle = 0.0 if head is not torch.sigmoid else 0.5
    labels = (z > middle).float()
    result = prune(model, [(images, labels)], epochs=1)
    finetuned = result.scores["finetuned"]
    after = logits_of(result.model, held_out(images)) > middle
    assert finetuned.metric == pytest.approx(float((after == held_out(labels)).float().mean()))
    assert finetuned.agreement_fraction == finetuned.metric
    losses = result.scores["cut"].loss, finetuned.loss
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] > losses[1]
    assert "label accuracy %" in repr(result)


def test_a_multi_label_network_may_be_said_to_be_one(images: Tensor) -> None:
    result = prune(make(images, 4), images, settings={"model.task": "multi-label"})
    assert result.result.task.kind == "multi-label"
    assert prune(make(images, 4), images).result.task.kind == "single-label"


@pytest.mark.parametrize(
    "head",
    [
        lambda x: x[:, :, None, None],
        lambda x: (x, x * 2),
        pytest.param(lambda x: [x, x * 2], marks=pytest.mark.slow),
        pytest.param(lambda x: {"logits": x, "hidden": None}, marks=pytest.mark.slow),
        lambda x: SimpleNamespace(logits=x),
    ],
)
def test_other_forms_give_the_figures_of_plain_logits(
    images: Tensor, head: Callable[[Tensor], Any]
) -> None:
    plain = make(images, CLASSES)
    labels = logits_of(plain, images).argmax(1)
    expected = prune(plain, (images, labels), criterion="vote")
    result = prune(make(images, CLASSES, head), (images, labels), criterion="vote")
    assert result.plan.removed == expected.plan.removed
    for stage, score in expected.scores.items():
        other = result.scores[stage]
        assert (other.metric, other.loss) == (score.metric, score.loss)
    output = result.model(images[:2])
    assert type(output) is type(head(torch.zeros(2, CLASSES)))
    is_tensor = isinstance(output, Tensor)
    assert any("logits are" in note for note in result.result.notes) != is_tensor


def test_a_network_that_returns_maps_needs_a_class_for_each_position(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(SecateurError, match="give masks"):
        secateur.prune(model, (images, torch.zeros(len(images)).long()))


@pytest.mark.parametrize("temperature", [1.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_softmax_at_the_end_is_undone(images: Tensor, temperature: float) -> None:
    plain = make(images, CLASSES, lambda x: x / temperature)
    labels = logits_of(plain, images).argmax(1)
    expected = prune(plain, (images, labels), epochs=1)
    model = make(images, CLASSES, lambda x: (x / temperature).softmax(1))
    result = prune(model, (images, labels), epochs=1)
    assert result.plan.removed == expected.plan.removed
    for stage, score in expected.scores.items():
        assert result.scores[stage].loss == pytest.approx(score.loss, rel=0.02), stage
    assert any("ends in a softmax" in note for note in result.result.notes)


def test_logits_beside_auxiliary_ones_in_training_are_trained(images: Tensor) -> None:
    class WithAuxiliary(Net):
        def forward(self, images: Tensor) -> Any:
            logits = super().forward(images)
            return Named(logits, 2 * logits) if self.training else logits

    model = WithAuxiliary(images, CLASSES, lambda x: x).eval()
    labels = logits_of(model, images).argmax(1)
    result = prune(model, (images, labels), epochs=1)
    losses = result.scores["cut"].loss, result.scores["finetuned"].loss
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] > losses[1]


@pytest.mark.parametrize(
    "criterion", ["vote", pytest.param("vote-iou", marks=pytest.mark.slow), "taylor"]
)
@pytest.mark.parametrize("outputs", [1, 4])
def test_criteria_work_with_labels_of_every_task(
    images: Tensor, outputs: int, criterion: str
) -> None:
    model = make(images, outputs)
    labels = (logits_of(model, images) > 0).long()
    settings = {"score.use_labels": True}
    result = prune(model, (images, labels), criterion=criterion, settings=settings)
    scores = torch.tensor([score for group in result.result.groups for score in group.scores])
    assert bool(scores.isfinite().all())
    assert len(scores.unique()) > 4


def test_a_network_with_its_classes_in_another_order_is_not_pruned(images: Tensor) -> None:
    model = make(images, CLASSES)
    labels = (logits_of(model, images).argmax(1) + 1) % CLASSES
    with pytest.raises(AccuracyError, match="label 0 is output 2") as raised:
        prune(model, (images, labels))
    assert "\n" not in str(raised.value)
    result = prune(model, (images, labels), settings={"model.allow_untrained": True})
    assert "Before pruning, the network is right on 0.0 % of the test images" in repr(result)


def test_a_network_that_guesses_is_not_pruned_unless_it_is_untrained(
    images: Tensor, generator: torch.Generator
) -> None:
    labels = torch.randint(CLASSES, (COUNT,), generator=generator)
    with pytest.raises(AccuracyError, match="of 24 test images, and chance is"):
        prune(make(images, CLASSES), (images, labels))
    new = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, CLASSES),
    )
    assert "Before pruning, the network is right on" in repr(prune(new, (images, labels)))


def test_a_network_with_one_output_is_evaluated(images: Tensor) -> None:
    model = make(images, 1)
    z = logits_of(model, images)[:, 0]
    labels = torch.where(z > 0, 1, -1)
    assert secateur.evaluate(model, [(images, labels)]).metric == 1.0
