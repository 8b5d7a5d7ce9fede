from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concept_inputs import CLASS_NAMES, PREPROCESSING, concept_input_of, context_of, select_inputs
from networks import CLASSES, Chain, Flattened, make_network, random_images
from secateur.data.annotated import NO_CLASS
from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks, at_resolution
from secateur.graph.output_values import OutputPart
from secateur.models.task import SINGLE_LABEL, Task
from secateur.runtime.errors import DataError, TraceError, UnknownName, UsageError
from secateur.scoring.concepts import (
    ConceptInput,
    ConceptSource,
    annotated_sources,
    make,
    parse,
    resolve,
    sources,
)
from secateur.scoring.concepts.annotations import Annotations
from secateur.scoring.concepts.combined import Combined
from secateur.scoring.concepts.evidence import Evidence, last_map
from secateur.scoring.concepts.outputs import CONFIDENT

NETWORKS = ["chain", "residual", "concat", "flattened", "gated", "in_place"]


def chain() -> Chain:
    model = make_network("chain")
    assert isinstance(model, Chain)
    return model


def heat_of(
    model: nn.Module, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    context = context_of(model)
    evidence = Evidence(context)
    return evidence.heat(concept_input_of(evidence, context, images, labels))


def found_by(
    name: str, model: nn.Module, images: Tensor, labels: Tensor | None = None
) -> ConceptMasks:
    context = context_of(model)
    source = sources()[name](context)
    return source.find(concept_input_of(source, context, images, labels))


def last_maps_of_chain(model: Chain, images: Tensor) -> Tensor:
    x = F.relu(model.bn1(model.conv1(images)))
    maps: Tensor = F.relu(model.bn2(model.conv2(x))).detach()
    return maps


# --- class evidence -------------------------------------------------------------------------------


def test_evidence_of_a_pooled_network_is_its_class_activation_map() -> None:
    model, images = chain(), random_images(4)
    labels = torch.tensor([0, 3, 3, 1])
    heat, classes = heat_of(model, images, labels)
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
    cam, _ = heat_of(model, images)
    grad_cam, _ = heat_of(RectifiedHead(model), images)
    # 4x4 positions share the gradient. Rectifying stops it where a mean is zero: so is the map.
    torch.testing.assert_close(grad_cam * 16, cam)


def test_only_a_head_that_is_not_pooled_and_linear_needs_a_gradient() -> None:
    assert not Evidence(context_of(chain())).needs_gradient
    assert Evidence(context_of(RectifiedHead(chain()))).needs_gradient


@pytest.mark.parametrize("with_labels", [True, False])
def test_evidence_of_a_flattening_network_is_its_grad_cam(with_labels: bool) -> None:
    model, images = make_network("flattened"), random_images(4)
    assert isinstance(model, Flattened)
    labels = torch.tensor([4, 0, 0, 2]) if with_labels else None
    heat, classes = heat_of(model, images, labels)

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


def test_the_gradient_can_be_computed_again() -> None:
    context = context_of(make_network("flattened"))
    evidence = Evidence(context)
    concept_input = concept_input_of(evidence, context, random_images(3))
    assert torch.equal(evidence.heat(concept_input)[0], evidence.heat(concept_input)[0])
    concept_input.logits.sum().backward()


@pytest.mark.parametrize("name", NETWORKS)
def test_evidence_is_the_top_quarter_of_each_image(name: str) -> None:
    model, images = make_network(name), random_images(5)
    regions = found_by("evidence", model, images)
    heat, _ = heat_of(model, images)
    assert regions.masks.shape == (5, 1, *heat.shape[1:])
    count = round(heat[0].numel() / 4)
    for mask, value in zip(regions.masks[:, 0], heat, strict=True):
        lowest = value[mask].min()
        assert int((value > lowest).sum()) < count <= int(mask.sum())
        assert torch.equal(mask, value >= lowest)  # all that ties with the last one, and no more


def test_class_is_the_label_or_else_the_prediction() -> None:
    model, images = chain(), random_images(6)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    labels = (predicted + 1) % CLASSES
    regions = found_by("evidence", model, images)
    assert torch.equal(regions.concepts, predicted[:, None])
    labelled = found_by("evidence", model, images, labels)
    assert torch.equal(labelled.concepts, labels[:, None])
    assert torch.equal(regions.masks, found_by("evidence", model, images, predicted).masks)
    assert not torch.equal(labelled.masks, regions.masks)


def test_labels_of_images_without_classes_are_refused() -> None:
    labels = torch.tensor([0, NO_CLASS])
    with pytest.raises(DataError, match="label -1, but the network has 5 classes"):
        found_by("evidence", chain(), random_images(2), labels)


def test_every_class_is_a_concept() -> None:
    expected = tuple(Concept(name, "class evidence") for name in CLASS_NAMES)
    assert Evidence(context_of(chain())).concepts == expected


def test_classes_without_a_name_are_numbered() -> None:
    context = replace(context_of(chain()), class_names=CLASS_NAMES[:3])
    names = [concept.name for concept in Evidence(context).concepts]
    assert names == ["ant", "bee", "cow", "class 3", "class 4"]


@pytest.mark.parametrize("name", ["chain", "flattened"])
def test_evidence_leaves_no_gradient_behind(name: str) -> None:
    model, images = make_network(name), random_images(2)
    assert not heat_of(model, images)[0].requires_grad
    assert not images.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- saliency -------------------------------------------------------------------------------------


def test_saliency_covers_cells_above_the_mean_of_the_summed_map() -> None:
    model, images = chain(), random_images(4)
    regions = found_by("saliency", model, images)
    maps = last_maps_of_chain(model, images)
    for i in range(4):
        total = torch.stack(list(maps[i])).sum(0)
        assert torch.equal(regions.masks[i, 0], total > total.mean())
        assert 0 < int(regions.masks[i].sum()) < 16


def test_saliency_ignores_labels() -> None:
    model, images = chain(), random_images(3)
    without, labelled = (
        found_by("saliency", model, images, labels) for labels in (None, torch.tensor([4, 0, 2]))
    )
    assert torch.equal(without.masks, labelled.masks)
    assert torch.equal(without.concepts, torch.zeros(3, 1, dtype=torch.int64))
    saliency = sources()["saliency"](context_of(model))
    assert saliency.concepts == (Concept("salient region", "saliency"),)


def test_a_flat_map_is_salient_everywhere() -> None:
    model = chain()
    with torch.no_grad():
        model.bn2.weight.zero_()  # every position of a channel holds the norm's offset
    assert found_by("saliency", model, random_images(2)).masks.all()


# --- networks without a map -----------------------------------------------------------------------


class JoinedHead(nn.Module):
    """A head that concatenates: its map is the last that any branch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).mean((2, 3))
        return torch.cat([x, x], 1)


def perceptron() -> nn.Module:
    """Reads the pixels themselves: the only value with a height and a width is the image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()


@pytest.mark.parametrize("source", ["evidence", "saliency", "factors"])
def test_a_network_without_a_feature_map_is_an_error(source: str) -> None:
    with pytest.raises(TraceError, match="no feature map to look for class evidence in"):
        sources()[source](context_of(perceptron()))


def test_the_map_before_a_head_that_joins_branches() -> None:
    assert last_map(context_of(JoinedHead()).graph).meta["val"].shape[1:] == (4, 6, 6)


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
    heat, _ = heat_of(model, images, labels)
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
    heat, _ = heat_of(model, images, labels)
    maps = model.conv(images).detach()
    for i, label in enumerate(labels.tolist()):
        # d logit / d map[c] is row[position] / 16, for every channel c.
        weight = model.linear.weight[label].detach().mean() / 16
        torch.testing.assert_close(heat[i], weight * maps[i].sum(0))


# --- outputs of dense networks --------------------------------------------------------------------


class Dense(nn.Module):
    """Maps of `channels` behind two convolutions, `times` as fine as the last feature map."""

    def __init__(self, channels: int, times: int = 1, side: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=times, padding=1)
        self.conv2 = nn.Conv2d(6, channels, side, padding=side // 2)
        self.times = times

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.conv2(F.relu(self.conv1(images)))
        return (
            F.interpolate(maps, scale_factor=self.times, mode="bilinear")
            if self.times > 1
            else maps
        )


def dense_inputs(name: str, model: nn.Module, task: Task) -> tuple[ConceptSource, ConceptInput]:
    context = context_of(model.eval(), task=task)
    source = sources()[name](context)
    return source, concept_input_of(source, context, random_images(5))


def test_classes_of_a_segmentation_are_regions() -> None:
    source, concept_input = dense_inputs("outputs", Dense(5, times=2), Task("segmentation"))
    regions = source.find(concept_input)
    classes = concept_input.outputs[0].argmax(1)
    assert source.concepts == tuple(Concept(name, "class map") for name in CLASS_NAMES)
    for masks, numbers, image in zip(regions.masks, regions.concepts, classes, strict=True):
        shown = numbers[numbers != UNLABELLED]
        assert torch.equal(shown, image.unique())
        for mask, number in zip(masks, numbers, strict=True):
            assert torch.equal(mask, image == number)


def test_one_channel_is_two_classes() -> None:
    source, concept_input = dense_inputs("outputs", Dense(1), Task("segmentation"))
    regions = source.find(concept_input)
    assert [concept.name for concept in source.concepts] == ["ant", "bee"]
    is_one = concept_input.outputs[0][:, 0] > 0
    assert torch.equal(((regions.concepts == 1)[:, :, None, None] & regions.masks).any(1), is_one)


DETECTOR = (
    OutputPart(0, 1, 0, 4),
    OutputPart(0, 1, 4, 5, "sigmoid"),
    OutputPart(0, 1, 5, 10, "sigmoid"),
)


def test_a_detector_shows_the_classes_that_it_is_sure_of_and_where_it_sees_objects() -> None:
    model = Dense(10)
    with torch.no_grad():
        model.conv2.weight[4:] *= 8
    source, concept_input = dense_inputs("outputs", model, Task("detection", parts=DETECTOR))
    regions = source.find(concept_input)
    probabilities = concept_input.outputs[0].sigmoid()
    of_classes = probabilities[:, 4:5] * probabilities[:, 5:]
    assert [concept.name for concept in source.concepts] == [*CLASS_NAMES, "any object"]
    for image in range(5):
        for mask, number in zip(
            regions.masks[image], regions.concepts[image].tolist(), strict=True
        ):
            if number == 5:
                assert int(mask.sum()) == 16
            elif number != UNLABELLED:
                assert torch.equal(mask, of_classes[image, number] >= CONFIDENT)
    assert (regions.concepts == 5).sum(1).eq(1).all()
    shown = {n for n in regions.concepts.unique().tolist() if 0 <= n < 5}
    assert shown == set(of_classes.amax((0, 2, 3)).ge(CONFIDENT).nonzero()[:, 0].tolist())


class Flat(nn.Module):
    """A pyramid of two levels whose positions are returned in a row, as YOLO's."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 6, 4, stride=4)
        self.coarse = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.fine(images).flatten(2), self.coarse(images).flatten(2)], dim=2)


def test_positions_in_a_row_are_the_levels_of_a_pyramid() -> None:
    model = Flat()
    parts = (OutputPart(0, 1, 1, 6, "sigmoid"),)
    source, concept_input = dense_inputs("outputs", model, Task("detection", parts=parts))
    regions = source.find(concept_input)
    fine = model.fine(concept_input.images)[:, 1:].sigmoid()
    coarse = model.coarse(concept_input.images)[:, 1:].sigmoid()
    expected = torch.maximum(fine, coarse.expand(-1, -1, 2, 2)).detach() >= CONFIDENT
    for image in range(5):
        for mask, number in zip(
            regions.masks[image], regions.concepts[image].tolist(), strict=True
        ):
            if 0 <= number < 5:
                assert torch.equal(mask, expected[image, number])


def test_other_maps_show_the_strongest_quarter_of_each_channel() -> None:
    source, concept_input = dense_inputs(
        "outputs", Dense(3), Task("regression", parts=(OutputPart(),))
    )
    regions = source.find(concept_input)
    assert [concept.name for concept in source.concepts] == ["output 0", "output 1", "output 2"]
    maps = concept_input.outputs[0]
    assert regions.masks.sum((2, 3)).ge(16).all()
    assert regions.masks.flatten(2).gather(2, maps.flatten(2).argmax(2, keepdim=True)).all()


def test_outputs_without_maps_are_refused() -> None:
    task = Task("regression", parts=(OutputPart(),))
    with pytest.raises(UsageError, match="take saliency"):
        sources()["outputs"](context_of(make_network("chain"), task=task))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (SINGLE_LABEL, "evidence"),
        (Task("multi-label"), "evidence"),
        (Task("segmentation"), "outputs"),
        (Task("detection", parts=DETECTOR), "outputs"),
        (Task("regression", parts=(OutputPart(),)), "saliency"),
    ],
)
def test_auto_is_what_fits_the_task(task: Task, expected: str) -> None:
    graph = context_of(Dense(10)).graph
    assert resolve("auto", task, graph) == expected
    assert resolve("colours, auto", task, graph) == f"colours,{expected}"
    assert resolve("factors:3", task, graph) == "factors:3"


def test_the_last_map_of_a_dense_network_is_what_its_last_layer_reads() -> None:
    for side in (1, 3):
        graph = context_of(Dense(5, times=2, side=side)).graph
        assert last_map(graph).meta["val"].shape[1:] == (6, 4, 4)


def test_evidence_of_a_1x1_convolution_is_proportional_to_its_grad_cam() -> None:
    model, task = Dense(5, times=2).eval(), Task("segmentation")
    evidence, concept_input = dense_inputs("evidence", model, task)
    assert isinstance(evidence, Evidence)
    assert not evidence.needs_gradient
    heat, classes = evidence.heat(concept_input)
    maps = F.relu(model.conv1(concept_input.images)).detach().requires_grad_()
    logits = F.interpolate(model.conv2(maps), scale_factor=2, mode="bilinear")
    predicted = logits.argmax(1)
    for image, number in enumerate(classes.tolist()):
        assert number == int(predicted[image].flatten().mode().values)
        of_class = logits[image, number][predicted[image] == number].mean()
        (gradient,) = torch.autograd.grad(of_class, maps, retain_graph=True)
        expected = (gradient[image].mean((1, 2))[:, None, None] * maps[image].detach()).sum(0)
        torch.testing.assert_close(heat[image], 16 * expected)


# --- what every source must keep to ---------------------------------------------------------------


def source_and_input(text: str, network: str, count: int) -> tuple[ConceptSource, ConceptInput]:
    context = context_of(make_network(network))
    source = make(text, context.graph, context.state, CLASS_NAMES, PREPROCESSING)
    concept_input = concept_input_of(source, context, random_images(count))
    if source.needs_learning:
        source.learn(concept_input)
        source.finish_learning()
    return source, concept_input


@pytest.mark.parametrize("network", ["chain", "residual", "concat"])
@pytest.mark.parametrize("text", ["evidence", "saliency", "factors:3", "colours"])
def test_an_image_is_found_alike_in_any_batch(text: str, network: str) -> None:
    if "factors" in text:
        pytest.importorskip("sklearn")
    source, concept_input = source_and_input(text, network, 11)
    whole = source.find(concept_input)
    for size in (1, 2, 5):
        for start in range(0, 11, size):
            images = slice(start, start + size)
            regions = source.find(select_inputs(concept_input, images))
            assert torch.equal(regions.masks, whole.masks[images])
            assert torch.equal(regions.concepts, whole.concepts[images])


@pytest.mark.parametrize("shape", [(7, 7, 2048), (8, 8, 64), (3, 5, 13), (1, 9, 100), (14, 14, 33)])
def test_evidence_of_an_image_is_the_same_to_the_last_bit_in_any_batch(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    height, width, channels = shape

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 1)
            self.linear = nn.Linear(channels, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            maps = F.adaptive_avg_pool2d(self.conv(x), (height, width))
            logits: Tensor = self.linear(F.adaptive_avg_pool2d(maps, 1).flatten(1))
            return logits

    evidence = Evidence(context_of(Head().eval()))
    value = torch.randn(9, channels, height, width, generator=generator)
    for layout in (torch.contiguous_format, torch.channels_last):
        concept_input = ConceptInput(
            random_images(9),
            torch.arange(9),
            torch.arange(9) % CLASSES,
            None,
            value.to(memory_format=layout),
            torch.zeros(9, CLASSES),
        )
        whole, _ = evidence.heat(concept_input)
        for start, size in ((0, 1), (8, 1), (2, 2), (3, 5)):
            images = slice(start, start + size)
            assert torch.equal(
                evidence.heat(select_inputs(concept_input, images))[0], whole[images]
            )


@pytest.mark.parametrize("text", ["evidence", "saliency", "factors:3", "colours"])
def test_a_region_is_empty_where_and_only_where_it_is_absent(text: str) -> None:
    if "factors" in text:
        pytest.importorskip("sklearn")
    source, concept_input = source_and_input(text, "chain", 6)
    regions = source.find(concept_input)
    assert torch.equal(regions.masks.any(dim=3).any(dim=2), regions.concepts != UNLABELLED)
    assert int(regions.concepts.max()) < len(source.concepts)


@pytest.mark.parametrize("text", ["evidence", "saliency", "factors:3"])
def test_maps_in_half_precision_will_do(text: str) -> None:
    if "factors" in text:
        pytest.importorskip("sklearn")
    source, concept_input = source_and_input(text, "chain", 4)
    assert concept_input.value is not None
    regions = source.find(replace(concept_input, value=concept_input.value.bfloat16()))
    assert regions.masks.shape == source.find(concept_input).masks.shape


# --- names ----------------------------------------------------------------------------------------


def test_a_text_is_read_as_names_and_arguments() -> None:
    assert parse("evidence") == [("evidence", "")]
    assert parse("evidence, factors:8,masks:a:b/c") == [
        ("evidence", ""),
        ("factors", "8"),
        ("masks", "a:b/c"),
    ]
    assert set(annotated_sources()) < set(sources())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("evidense", UnknownName, "unknown concept source 'evidense': did you mean evidence"),
        ("evidence,", UnknownName, "unknown concept source ''"),
        ("masks", UsageError, "the concept source 'masks' needs a folder: masks:DIR"),
        ("evidence,parts:", UsageError, "the concept source 'parts' needs a folder: parts:DIR"),
        ("factors:many", UsageError, "factors:many: expected a number of parts, as in factors:8"),
        ("factors:0", UsageError, "factors:0: expected a number of parts"),
        ("colours:11", UsageError, "'colours' takes nothing after a colon: 'colours:11'"),
        ("evidence,evidence", UsageError, "'evidence,evidence' name one twice"),
    ],
)
def test_texts_that_name_no_source(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(text)


# --- several sources at once ----------------------------------------------------------------------


class Marked:
    """Always the same regions."""

    node = None
    needs_gradient = False
    needs_learning = False

    def __init__(self, names: str, masks: Tensor, numbers: Tensor) -> None:
        self.concepts = tuple(Concept(name, "letter") for name in names)
        self._found = ConceptMasks(masks, numbers)

    def learn(self, concept_input: ConceptInput) -> None:
        raise AssertionError("it does not learn")

    def finish_learning(self) -> None:
        raise AssertionError("it does not learn")

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        return self._found


def empty_input(images: Tensor, annotations: ConceptMasks | None = None) -> ConceptInput:
    count = len(images)
    logits = torch.zeros(count, CLASSES)
    return ConceptInput(images, torch.arange(count), None, annotations, None, logits)


def test_regions_of_several_sources_lie_side_by_side_at_the_finest_resolution(
    generator: torch.Generator,
) -> None:
    coarse = torch.rand(2, 1, 2, 2, generator=generator) < 0.5
    fine = torch.rand(2, 2, 4, 4, generator=generator) < 0.5
    one = Marked("ab", coarse, torch.tensor([[1], [UNLABELLED]]))
    other = Marked("cde", fine, torch.tensor([[0, 2], [UNLABELLED, 1]]))
    both = Combined((one, other))
    assert [concept.name for concept in both.concepts] == list("abcde")
    regions = both.find(empty_input(random_images(2)))
    assert regions.concepts.tolist() == [[1, 2, 4], [UNLABELLED, UNLABELLED, 3]]
    assert torch.equal(regions.masks[:, 1:], fine)
    assert torch.equal(regions.masks[:, :1], at_resolution(coarse, (4, 4)))
    assert torch.equal(at_resolution(regions.masks[:, :1], (2, 2)), coarse)


def test_no_resolution_is_finer_than_the_image() -> None:
    too_fine = Marked("a", torch.ones(2, 1, 32, 32).bool(), torch.zeros(2, 1).long())
    regions = Combined((too_fine, too_fine)).find(empty_input(random_images(2)))
    assert regions.masks.shape == (2, 2, 8, 8)


@pytest.mark.parametrize("network", ["chain", "flattened"])
def test_each_source_finds_the_same_regions_combined_and_alone(network: str) -> None:
    images = random_images(5)
    context = context_of(make_network(network))
    combined = make(
        "evidence,saliency,colours", context.graph, context.state, CLASS_NAMES, PREPROCESSING
    )
    alone = [sources()[name](context) for name in ("evidence", "saliency", "colours")]
    assert combined.node is alone[0].node
    assert combined.needs_gradient == alone[0].needs_gradient == (network == "flattened")
    regions = combined.find(concept_input_of(combined, context, images))
    expected = [source.find(concept_input_of(source, context, images)) for source in alone]
    masks = torch.cat([at_resolution(part.masks, (8, 8)) for part in expected], dim=1)
    assert torch.equal(regions.masks, masks)
    assert torch.equal(regions.concepts[:, :1], expected[0].concepts)
    assert torch.equal(regions.concepts[:, 1:2], expected[1].concepts + CLASSES)
    numbers = expected[2].concepts
    shown = numbers != UNLABELLED
    assert torch.equal(regions.concepts[:, 2:] != UNLABELLED, shown)
    assert torch.equal(regions.concepts[:, 2:][shown], numbers[shown] + CLASSES + 1)


def test_only_those_who_learn_are_taught() -> None:
    pytest.importorskip("sklearn")
    source, concept_input = source_and_input("colours,factors:2", "chain", 4)
    assert source.needs_learning
    still = Marked("a", torch.ones(4, 1, 2, 2).bool(), torch.zeros(4, 1).long())
    both = Combined((still, source))
    both.learn(concept_input)
    both.finish_learning()
    assert not Combined((still, still)).needs_learning


def test_sources_that_need_different_nodes_can_not_be_combined() -> None:
    one, other = (Evidence(context_of(chain())) for _ in range(2))
    with pytest.raises(AssertionError, match="different nodes"):
        Combined((one, other))


# --- annotated regions ----------------------------------------------------------------------------


def test_annotations_are_those_of_the_batch() -> None:
    source = Annotations((Concept("a", "letter"),))
    regions = ConceptMasks(torch.ones(2, 1, 8, 8).bool(), torch.zeros(2, 1).long())
    assert source.find(empty_input(random_images(2), regions)) is regions
    assert source.concepts == (Concept("a", "letter"),)


def test_images_without_annotations_are_an_error_with_a_remedy() -> None:
    source = Annotations((Concept("a", "letter"),))
    with pytest.raises(DataError, match="without annotated regions: take those that the concept"):
        source.find(empty_input(random_images(2)))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    context = context_of(chain())
    with pytest.raises(DataError, match=f"no folder {tmp_path}/no to read masks from"):
        make(f"masks:{tmp_path}/no", context.graph, context.state, (), PREPROCESSING)
