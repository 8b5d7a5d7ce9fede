from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import CLASSES, Chain, Flattened, make_network, random_images
from secateur.concepts import Concept, at_resolution, sources
from secateur.concepts.evidence import Evidence
from secateur.concepts.saliency import Saliency
from secateur.errors import TraceError
from secateur.graph import tensors_of, trace

CLASS_NAMES = ("ant", "bee", "cow", "dog", "elk")
SIDES = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)


def evidence_of(model: nn.Module) -> Evidence:
    return Evidence(trace(model, random_images(2)), tensors_of(model), CLASS_NAMES)


def saliency_of(model: nn.Module) -> Saliency:
    return Saliency(trace(model, random_images(2)), tensors_of(model), CLASS_NAMES)


def random_masks(images: int, regions: int, height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, regions, height, width, generator=generator) < 0.3


# --- masks at another resolution ------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(height=SIDES, width=SIDES, seed=SEEDS)
def test_masks_at_their_own_resolution_stay_as_they_are(height: int, width: int, seed: int) -> None:
    masks = random_masks(2, 3, height, width, seed)
    assert torch.equal(at_resolution(masks, (height, width)), masks)


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 3), w=st.integers(1, 3), cell=st.integers(1, 4), seed=SEEDS)
def test_a_cell_is_inside_where_half_of_it_is(h: int, w: int, cell: int, seed: int) -> None:
    masks = random_masks(2, 2, h * cell, w * cell, seed)
    found = at_resolution(masks, (h, w))
    for i in range(2):
        for r in range(2):
            covered = {
                (y, x): sum(
                    bool(masks[i, r, y * cell + dy, x * cell + dx])
                    for dy in range(cell)
                    for dx in range(cell)
                )
                for y in range(h)
                for x in range(w)
            }
            most = max(covered.values())
            needed = cell * cell / 2 if 2 * most >= cell * cell else most
            for (y, x), count in covered.items():
                assert bool(found[i, r, y, x]) == (count > 0 and count >= needed)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(2, 16),
    width=st.integers(2, 16),
    h=SIDES,
    w=SIDES,
    data=st.data(),
)
def test_no_region_is_lost_and_it_stays_where_it_was(
    height: int, width: int, h: int, w: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, height - 1))
    column = data.draw(st.integers(0, width - 1))
    masks = torch.zeros(1, 1, height, width, dtype=torch.bool)
    masks[0, 0, row, column] = True  # one pixel
    found = at_resolution(masks, (h, w))
    assert found.shape == (1, 1, h, w)
    assert found.any()
    for y, x in found[0, 0].nonzero().tolist():  # the pixel lies in every cell that is inside
        assert y * height // h <= row <= -(-(y + 1) * height // h) - 1
        assert x * width // w <= column <= -(-(x + 1) * width // w) - 1


@settings(deadline=None, max_examples=30)
@given(height=SIDES, width=SIDES, h=SIDES, w=SIDES)
def test_nothing_stays_nothing_and_everything_everything(
    height: int, width: int, h: int, w: int
) -> None:
    masks = torch.zeros(1, 2, height, width, dtype=torch.bool)
    masks[:, 1] = True
    found = at_resolution(masks, (h, w))
    assert not found[:, 0].any()
    assert found[:, 1].all()


# --- class evidence -------------------------------------------------------------------------------


def last_maps_of_chain(model: Chain, images: Tensor) -> Tensor:
    x = F.relu(model.bn1(model.conv1(images)))
    maps: Tensor = F.relu(model.bn2(model.conv2(x))).detach()
    return maps


def chain() -> Chain:
    model = make_network("chain")
    assert isinstance(model, Chain)
    return model


def test_evidence_of_a_pooled_network_is_its_class_activation_map() -> None:
    model, images = chain(), random_images(4)
    labels = torch.tensor([0, 3, 3, 1])
    heat, classes = evidence_of(model).heat(images, labels)
    maps, rows = last_maps_of_chain(model, images), model.linear.weight.detach()
    assert torch.equal(classes, labels)
    assert heat.shape == (4, 4, 4)
    for i, label in enumerate(labels.tolist()):
        expected = sum(rows[label, c] * maps[i, c] for c in range(7))
        torch.testing.assert_close(heat[i], expected)


class RectifiedHead(nn.Module):
    """`Chain` with a rectifier after the pooling: it changes no value, but is no CAM head."""

    def __init__(self, body: Chain) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.body.bn1(self.body.conv1(images)))
        x = F.relu(self.body.bn2(self.body.conv2(x)))
        logits: Tensor = self.body.linear(F.relu(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return logits


def test_gradient_evidence_is_proportional_to_the_class_activation_map() -> None:
    model, images = chain(), random_images(4)
    cam, _ = evidence_of(model).heat(images, None)
    grad_cam, _ = evidence_of(RectifiedHead(model)).heat(images, None)
    # 4x4 positions share the gradient. Rectifying stops it where a mean is zero: so is the map.
    torch.testing.assert_close(grad_cam * 16, cam)


@pytest.mark.parametrize("with_labels", [True, False])
def test_evidence_of_a_flattening_network_is_its_grad_cam(with_labels: bool) -> None:
    model, images = make_network("flattened"), random_images(4)
    assert isinstance(model, Flattened)
    labels = torch.tensor([4, 0, 0, 2]) if with_labels else None
    heat, classes = evidence_of(model).heat(images, labels)

    expected = []
    for i in range(4):
        maps = model.features(images[i : i + 1]).detach().requires_grad_()
        logits = model.linear(F.gelu(model.hidden(maps.flatten(1))))[0]
        label = int(logits.argmax()) if labels is None else int(labels[i])
        assert int(classes[i]) == label
        (gradient,) = torch.autograd.grad(logits[label], maps)
        weights = gradient.mean((2, 3), keepdim=True)
        expected.append((weights * maps.detach()).sum(1)[0])
    torch.testing.assert_close(heat, torch.stack(expected))


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "flattened", "gated", "in_place"])
def test_evidence_is_the_top_quarter_of_each_image(name: str) -> None:
    model, images = make_network(name), random_images(5)
    evidence = evidence_of(model)
    found = evidence.find(images, None)
    heat, _ = evidence.heat(images, None)
    fine = F.interpolate(heat[:, None], (8, 8), mode="bilinear", align_corners=False)
    assert found.masks.shape == (5, 1, 8, 8)
    for mask, value in zip(found.masks, fine, strict=True):
        lowest = value[mask].min()
        assert int((value > lowest).sum()) < 16 <= int(mask.sum())
        assert torch.equal(mask, value >= lowest)  # all that ties with the last one, and no more


def test_class_is_the_label_or_else_the_prediction() -> None:
    model, images = chain(), random_images(6)
    evidence = evidence_of(model)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    labels = (predicted + 1) % CLASSES
    assert torch.equal(evidence.find(images, None).concepts, predicted[:, None])
    assert torch.equal(evidence.find(images, labels).concepts, labels[:, None])
    by_prediction = evidence.find(images, predicted).masks
    assert torch.equal(evidence.find(images, None).masks, by_prediction)
    assert not torch.equal(evidence.find(images, labels).masks, by_prediction)


def test_every_class_is_a_concept() -> None:
    assert evidence_of(chain()).concepts == tuple(
        Concept(name, "class evidence") for name in CLASS_NAMES
    )


@pytest.mark.parametrize("name", ["chain", "flattened"])
def test_evidence_leaves_no_gradient_behind(name: str) -> None:
    model, images = make_network(name), random_images(2)
    found = evidence_of(model).heat(images, None)[0]
    assert not found.requires_grad
    assert not images.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- saliency -------------------------------------------------------------------------------------


def test_saliency_is_what_lies_above_the_mean_of_the_summed_map() -> None:
    model, images = chain(), random_images(4)
    found = saliency_of(model).find(images, None)
    maps = last_maps_of_chain(model, images)
    for i in range(4):
        total = torch.stack(list(maps[i])).sum(0)
        fine = F.interpolate(total[None, None], (8, 8), mode="bilinear", align_corners=False)[0, 0]
        assert torch.equal(found.masks[i, 0], fine > total.mean())
        assert 0 < int(found.masks[i].sum()) < 64


def test_saliency_does_not_look_at_labels() -> None:
    model, images = chain(), random_images(3)
    saliency = saliency_of(model)
    without, labelled = (
        saliency.find(images, labels) for labels in (None, torch.tensor([4, 0, 2]))
    )
    assert torch.equal(without.masks, labelled.masks)
    assert torch.equal(without.concepts, torch.zeros(3, 1, dtype=torch.int64))
    assert saliency.concepts == (Concept("salient region", "saliency"),)


def test_a_flat_map_is_salient_everywhere() -> None:
    model = chain()
    with torch.no_grad():
        model.bn2.weight.zero_()  # every position of a channel holds the norm's offset
    assert saliency_of(model).find(random_images(2), None).masks.all()


# --- networks without a map -----------------------------------------------------------------------


class NoMap(nn.Module):
    """A head that concatenates: the way back from the output ends there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).mean((2, 3))
        return torch.cat([x, x], 1)


def perceptron() -> nn.Module:
    """Reads the pixels themselves: the only value with a height and a width is the image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()


@pytest.mark.parametrize("source", ["evidence", "saliency"])
@pytest.mark.parametrize("make", [NoMap, perceptron])
def test_a_network_without_a_feature_map_is_an_error(source: str, make: type[nn.Module]) -> None:
    model, images = make(), random_images(2)
    with pytest.raises(TraceError, match="no feature map to look for class evidence in"):
        sources()[source](trace(model, images), tensors_of(model), CLASS_NAMES).find(images, None)


class MaxPooledHead(nn.Module):
    """Pooled by the largest value of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.pool(self.conv(images)).flatten(1))
        return logits


def test_evidence_behind_a_largest_value_pooling() -> None:
    model, images = MaxPooledHead().eval(), random_images(3)
    labels = torch.tensor([0, 1, 2])
    heat, _ = evidence_of(model).heat(images, labels)
    maps = model.conv(images).detach()
    for i, label in enumerate(labels.tolist()):
        # One of 64 positions of each channel carries the whole gradient.
        expected = sum(model.linear.weight[label, c].detach() / 64 * maps[i, c] for c in range(6))
        torch.testing.assert_close(heat[i], expected)


class ChannelMeanHead(nn.Module):
    """Averages over channels, and has as many positions as channels: no CAM head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.conv(images).mean(1).flatten(1))
        return logits


def test_an_average_over_channels_is_not_taken_for_one_over_positions() -> None:
    model, images = ChannelMeanHead().eval(), random_images(3)
    labels = torch.tensor([0, 1, 2])
    heat, _ = evidence_of(model).heat(images, labels)
    maps = model.conv(images).detach()
    for i, label in enumerate(labels.tolist()):
        # d logit / d map[c] is row[position] / 16, for every channel c.
        weight = model.linear.weight[label].detach().mean() / 16
        torch.testing.assert_close(heat[i], weight * maps[i].sum(0))
