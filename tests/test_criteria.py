from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Chain, make_network, random_images
from secateur.concepts import Concept, ConceptMasks, at_resolution
from secateur.criteria import Criterion, Kernels, criteria, make
from secateur.data import Batch
from secateur.errors import UnknownName
from secateur.reading import make_wiring
from secateur.scoring import score_filters
from secateur.wiring import Wiring

IMAGES = random_images(6)
LABELS = torch.tensor([0, 3, 1, 4, 2, 2])
QUANTILE = 0.15
TOP = 0.3
GROUPS = ("conv1", "conv2")


class TwoRegions:
    """Where an image's first channel is positive, and its left half: two concepts."""

    concepts = (Concept("bright", "test"), Concept("left", "test"))

    def find(self, images: Tensor, labels: Tensor | None) -> ConceptMasks:
        bright = images[:, 0] > 0
        left = torch.zeros_like(bright)
        left[:, :, :4] = True
        return ConceptMasks(
            torch.stack([bright, left], 1), torch.tensor([0, 1]).repeat(len(images), 1)
        )


def probe() -> Iterator[Batch]:
    for images, labels in zip(IMAGES.split(4), LABELS.split(4), strict=True):
        yield Batch(images, labels)


@pytest.fixture(scope="module")
def chain() -> Chain:
    model = make_network("chain")
    assert isinstance(model, Chain)
    return model


@pytest.fixture(scope="module")
def wiring(chain: Chain) -> Wiring:
    return make_wiring(chain, random_images(2))


def scores_of(
    name: str, model: nn.Module, wiring: Wiring, *, seed: int = 0, use_labels: bool = True
) -> dict[str, Tensor]:
    criterion = make(name, top_fraction=TOP, seed=seed)
    found = score_filters(
        model,
        wiring,
        probe,
        {name: criterion},
        TwoRegions(),
        quantile=QUANTILE,
        use_labels=use_labels,
    )
    assert found[name].criterion == name
    return found[name].scores


def maps_by_hand(model: Chain) -> dict[str, Tensor]:
    """What `conv2` and the pooling read, caught by hooks on an eager run."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.bn1.register_forward_hook(lambda m, x, y: seen.update(conv1=F.relu(y))),
        model.bn2.register_forward_hook(lambda m, x, y: seen.update(conv2=F.relu(y))),
    ]
    with torch.no_grad():
        model(IMAGES)
    for hook in hooks:
        hook.remove()
    return seen


def regions_by_hand(size: tuple[int, int]) -> Tensor:
    return at_resolution(TwoRegions().find(IMAGES, None).masks, size)


def outgoing_norms(model: Chain) -> dict[str, list[float]]:
    readers = {"conv1": model.conv2.weight, "conv2": model.linear.weight}
    return {
        name: [
            float(weight.detach()[:, c].double().square().sum().sqrt())
            for c in range(weight.shape[1])
        ]
        for name, weight in readers.items()
    }


def votes_for_response(model: Chain, group: str) -> list[int]:
    maps = maps_by_hand(model)[group]
    images, filters, height, width = maps.shape
    masks = regions_by_hand((height, width))
    mean = [float(maps[:, c].double().mean()) for c in range(filters)]
    norm = outgoing_norms(model)[group]
    votes = [0] * filters
    for i in range(images):
        for region in range(2):
            for row in range(height):
                for column in range(width):
                    if not masks[i, region, row, column]:
                        continue
                    strength = [
                        abs(float(maps[i, c, row, column]) - mean[c]) * norm[c]
                        for c in range(filters)
                    ]
                    order = sorted(range(filters), key=lambda c: -strength[c])
                    for c in order[: math.ceil(TOP * filters)]:
                        votes[c] += 1
    return votes


def votes_for_iou(model: Chain, group: str) -> list[int]:
    maps = maps_by_hand(model)[group]
    images, filters, height, width = maps.shape
    masks = regions_by_hand((height, width))
    reached = max(1, round(QUANTILE * images * height * width))
    thresholds = [
        sorted(maps[:, c].flatten().tolist(), reverse=True)[reached - 1] for c in range(filters)
    ]
    votes = [0] * filters
    for i in range(images):
        for region in range(2):
            inside = {tuple(p) for p in masks[i, region].nonzero().tolist()}
            iou = []
            for c in range(filters):
                active = {tuple(p) for p in (maps[i, c] > thresholds[c]).nonzero().tolist()}
                iou.append(len(active & inside) / max(1, len(active | inside)))
            order = sorted(range(filters), key=lambda c: (-iou[c], c))
            for c in order[: math.ceil(TOP * filters)]:
                votes[c] += iou[c] > 0
    return votes


@pytest.mark.parametrize("group", GROUPS)
def test_response_votes_are_those_of_every_position(
    chain: Chain, wiring: Wiring, group: str
) -> None:
    scores = scores_of("vote-response", chain, wiring)[group]
    assert scores.tolist() == votes_for_response(chain, group)


@pytest.mark.parametrize("group", GROUPS)
def test_response_votes_sum_to_the_voters(chain: Chain, wiring: Wiring, group: str) -> None:
    scores = scores_of("vote-response", chain, wiring)[group]
    size = {"conv1": (8, 8), "conv2": (4, 4)}[group]
    positions = int(regions_by_hand(size).sum())
    assert torch.equal(scores, scores.round())
    assert int(scores.sum()) == positions * math.ceil(TOP * len(scores))


@pytest.mark.parametrize("group", GROUPS)
def test_iou_votes_are_those_of_every_region(chain: Chain, wiring: Wiring, group: str) -> None:
    scores = scores_of("vote-iou", chain, wiring)[group]
    assert scores.tolist() == votes_for_iou(chain, group)
    assert 0 < int(scores.sum()) <= len(IMAGES) * 2 * math.ceil(TOP * len(scores))


@pytest.mark.parametrize("group", GROUPS)
def test_activation_std_is_that_of_every_position(chain: Chain, wiring: Wiring, group: str) -> None:
    scores = scores_of("activation_std", chain, wiring)[group]
    for c, score in enumerate(scores.tolist()):
        values = maps_by_hand(chain)[group][:, c].flatten().tolist()
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert score == pytest.approx(variance**0.5, rel=1e-5, abs=1e-7)


def test_activation_std_keeps_its_digits_far_from_zero() -> None:
    """The spread of a filter that answers with 1000 and a little more or less."""
    model = make_network("chain")
    assert isinstance(model, Chain)
    with torch.no_grad():
        model.bn1.bias[0] = 1000.0
    wiring = make_wiring(model, random_images(2))
    maps = maps_by_hand(model)["conv1"][:, 0].double()
    score = scores_of("activation_std", model, wiring)["conv1"][0]
    assert float(score) == pytest.approx(float(maps.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize("use_labels", [True, False])
def test_taylor_is_the_squared_change_of_each_image_by_autograd(
    chain: Chain, wiring: Wiring, use_labels: bool
) -> None:
    scores = scores_of("taylor", chain, wiring, use_labels=use_labels)
    expected = {group: torch.zeros(len(scores[group]), dtype=torch.float64) for group in GROUPS}
    for i in range(len(IMAGES)):
        first = F.relu(chain.bn1(chain.conv1(IMAGES[i : i + 1])))
        second = F.relu(chain.bn2(chain.conv2(first)))
        logits = chain.linear(second.mean((2, 3)))[0]
        label = int(LABELS[i]) if use_labels else int(logits.argmax())
        loss = logits.exp().sum().log() - logits[label]
        gradients = torch.autograd.grad(loss, (first, second))
        for group, maps, gradient in zip(GROUPS, (first, second), gradients, strict=True):
            for c in range(maps.shape[1]):
                change = float((maps[0, c] * gradient[0, c]).sum().detach())
                expected[group][c] += change**2
    for group in GROUPS:
        assert scores[group].max() > 0
        torch.testing.assert_close(scores[group], expected[group], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_norms_are_those_of_each_kernel(
    chain: Chain, wiring: Wiring, name: str, power: int
) -> None:
    scores = scores_of(name, chain, wiring)
    for group, weight in (("conv1", chain.conv1.weight), ("conv2", chain.conv2.weight)):
        for c, score in enumerate(scores[group].tolist()):
            values = [abs(value) for value in weight[c].flatten().tolist()]
            assert score == pytest.approx(sum(v**power for v in values) ** (1 / power), rel=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_norms_of_tied_layers_add_up(name: str) -> None:
    model = make_network("residual")
    wiring = make_wiring(model, random_images(2), cut_stream=True)
    scores = scores_of(name, model, wiring)["stem.0"]
    total = torch.zeros(6, dtype=torch.float64)
    for layer in ("stem", "conv2", "conv4"):
        kernel = model.get_parameter(f"{layer}.0.weight").detach().double().flatten(1)
        total += kernel.abs().sum(1) if name == "l1" else kernel.square().sum(1).sqrt()
    torch.testing.assert_close(scores, total / 3)


def kernels(filters: int) -> Kernels:
    numbers = torch.arange(filters)
    return Kernels(((torch.ones(filters, 2), numbers),), numbers, torch.ones(filters))


def test_random_scores_depend_on_seed_and_group_alone() -> None:
    def draw(seed: int, group: str) -> Tensor:
        return make("random", top_fraction=TOP, seed=seed).score(group, kernels(50))

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    assert not torch.equal(draw(1, "a"), draw(2, "a"))
    assert not torch.equal(draw(1, "a"), draw(1, "b"))
    assert len(set(draw(1, "a").tolist())) == 50
    assert 0 <= draw(1, "a").min() < 0.2 < 0.8 < draw(1, "a").max() < 1


def test_random_scores_leave_torch_its_own_randomness(seed: int) -> None:
    make("random", top_fraction=TOP, seed=3).score("a", kernels(5))
    drawn = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("name", ["vote-response", "vote-iou"])
@pytest.mark.parametrize("fraction", [0.01, 1.0])
def test_at_least_one_filter_gets_a_vote_and_at_most_all(
    chain: Chain, wiring: Wiring, name: str, fraction: float
) -> None:
    criterion = make(name, top_fraction=fraction, seed=0)
    found = score_filters(
        chain,
        wiring,
        probe,
        {name: criterion},
        TwoRegions(),
        quantile=QUANTILE,
        use_labels=True,
    )
    voters = {
        "vote-response": int(regions_by_hand((8, 8)).sum()),
        "vote-iou": 2 * len(IMAGES),
    }[name]
    scores = found[name].scores["conv1"]
    if fraction < 1:
        assert 0 < int(scores.sum()) <= voters
    else:
        assert int(scores.max()) <= voters
        assert int((scores > 0).sum()) > 1


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("vote-respons", "did you mean vote-response"),
        ("tailor", "did you mean taylor"),
        ("xyzzy", "known: activation_std, l1, l2, random, taylor, vote-iou, vote-response"),
    ],
)
def test_an_unknown_criterion_names_the_near_match(asked: str, hint: str) -> None:
    with pytest.raises(UnknownName, match=f"unknown criterion '{asked}': {hint}"):
        make(asked, top_fraction=TOP, seed=0)


@pytest.mark.parametrize("name", list(criteria()))
def test_every_criterion_scores_every_filter_and_leaves_the_network_alone(name: str) -> None:
    model = make_network("chain").train()
    model.get_submodule("bn2").eval()
    model.get_parameter("conv2.bias").requires_grad_(False)
    wiring = make_wiring(model, random_images(2))
    modes = [module.training for module in model.modules()]
    requires = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    scores = scores_of(name, model, wiring)

    assert scores.keys() == wiring.groups.keys()
    for group, score in scores.items():
        assert score.dtype == torch.float64
        assert score.shape == (len(wiring.groups[group]),)
        assert torch.isfinite(score).all()
        assert not score.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == requires
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", list(criteria()))
def test_every_criterion_says_what_it_needs(name: str) -> None:
    criterion: Criterion = make(name, top_fraction=TOP, seed=0)
    needs: dict[str, tuple[bool, bool]] = {
        "random": (False, False),
        "l1": (False, False),
        "l2": (False, False),
        "taylor": (True, True),
    }
    expected = needs.get(name, (True, False))
    assert (criterion.needs_images, criterion.needs_gradients) == expected


def dead_filter(model: Chain) -> None:
    """Filter 2 of `conv1` answers zero everywhere."""
    with torch.no_grad():
        model.bn1.weight[2] = 0.0
        model.bn1.bias[2] = -1.0


def unread_filter(model: Chain) -> None:
    """Nothing listens to filter 2 of `conv1`."""
    with torch.no_grad():
        model.conv2.weight[:, 2] = 0.0


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("vote-response", dead_filter),
        ("vote-response", unread_filter),
        ("vote-iou", dead_filter),
        ("taylor", dead_filter),
        ("taylor", unread_filter),
        ("activation_std", dead_filter),
    ],
)
def test_a_filter_that_does_nothing_scores_nothing(
    name: str, harm: Callable[[Chain], None]
) -> None:
    model = make_network("chain")
    assert isinstance(model, Chain)
    harm(model)
    scores = scores_of(name, model, make_wiring(model, random_images(2)))["conv1"]
    assert scores[2] == 0
    assert scores.max() > 0
