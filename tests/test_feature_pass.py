from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import Node

from networks import CLASSES, Chain, Concat, ViewRest, make_network, random_images
from processes import side_by_side
from secateur import data
from secateur.config import CRITERIA, Precision, ScoreSection
from secateur.data import Batch, TensorImages
from secateur.data.concept_masks import Concept, ConceptMasks, at_resolution
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.module_state import tensors_of
from secateur.graph.taps import Kernels, kernels_of
from secateur.runtime import distributed
from secateur.runtime.errors import DataError
from secateur.scoring import batching, concepts, criteria
from secateur.scoring.concepts import ConceptInput
from secateur.scoring.criteria import DeferredUpdate, FeatureBatch, Need, Observer, Regions
from secateur.scoring.dissection import Dissection, TopImages
from secateur.scoring.feature_pass import run_feature_pass
from secateur.scoring.thresholds import StatisticsAccumulator

LABELS = torch.tensor([0, 3, 1, 4, 2, 2, 0])


class Bright:
    """One region an image, where its first channel is positive; the concept is the class."""

    concepts = tuple(Concept(str(number), "brightness") for number in range(CLASSES + 1))

    needs_gradient = False

    def __init__(self, *, needs_learning: bool = False) -> None:
        self.needs_learning = needs_learning
        self.node: Node | None = None
        self.steps: list[str] = []
        self.learnt: list[int] = []

    def learn(self, concept_input: ConceptInput) -> None:
        self.steps.append("learn")
        self.learnt += concept_input.indices.tolist()

    def finish_learning(self) -> None:
        self.steps.append("finish")

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        self.steps.append("find")
        shown = (
            torch.full((len(concept_input.images),), CLASSES)
            if concept_input.labels is None
            else concept_input.labels
        )
        return ConceptMasks(concept_input.images[:, :1] > 0, shown[:, None])


class Units(nn.Module):
    """Pooled to 2x4 positions, flattened, and read by a linear layer with hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 8, 7)
        self.linear = nn.Linear(7, CLASSES)

    def maps(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.conv(images)), (2, 4))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.gelu(self.hidden(self.maps(images).flatten(1))))
        return logits


EVERYTHING: frozenset[Need] = frozenset({"maps", "thresholds", "concepts"})
GRADIENTS: frozenset[Need] = frozenset({"maps", "gradients"})
NOTHING: frozenset[Need] = frozenset()


class Recorder:
    """Remembers what it is shown."""

    def __init__(self, needs: frozenset[Need] = EVERYTHING) -> None:
        self.needs = needs
        self.kernels: Mapping[str, Kernels] = {}
        self.batches_of: dict[str, list[FeatureBatch]] = {}
        self.regions: dict[str, list[Regions]] = {}

    def reset(self, kernels: Mapping[str, Kernels]) -> None:
        assert not self.batches_of
        self.kernels = kernels

    def update(self, features: FeatureBatch) -> DeferredUpdate | None:
        self.batches_of.setdefault(features.tap, []).append(features)
        if "concepts" not in self.needs:
            return None
        return self.regions.setdefault(features.tap, []).append

    def state(self) -> Iterable[Tensor]:
        return ()

    def maps(self, tap: str) -> Tensor:
        return torch.cat([features.maps for features in self.batches_of[tap]])

    def numbers(self, tap: str) -> list[int]:
        return torch.cat([features.indices for features in self.batches_of[tap]]).tolist()

    def gradients(self, tap: str) -> Tensor:
        gradients = [features.gradients for features in self.batches_of[tap]]
        return torch.cat([gradient for gradient in gradients if gradient is not None])


class CalibrationSet:
    """A calibration set that counts how often it is read."""

    def __init__(self, images: Tensor, labels: Tensor, size: int = 3) -> None:
        numbers = torch.arange(len(images)).split(size)
        self._parts = list(zip(images.split(size), labels.split(size), numbers, strict=True))
        self.reads = 0

    def __call__(self) -> Iterator[Batch]:
        self.reads += 1
        return (Batch(images, labels, indices) for images, labels, indices in self._parts)


def network(name: str) -> tuple[nn.Module, DependencyGraph]:
    model = Units().eval() if name == "units" else make_network(name)
    return model, build_dependency_graph(model, random_images(2))


def run(
    model: nn.Module,
    dependencies: DependencyGraph,
    calibration: CalibrationSet,
    observers: Iterable[Recorder],
    *,
    quantile: float = 0.2,
    use_labels: bool = True,
    sample_every: int = 1,
    source: Bright | None = None,
) -> None:
    settings = ScoreSection(quantile=quantile, use_labels=use_labels, sample_every=sample_every)
    run_feature_pass(
        model, dependencies, calibration, list(observers), source or Bright(), settings
    )


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images at a time, so that seven take four batches and the last is filled up."""
    monkeypatch.setattr(batching, "MOST_IMAGES_AT_A_TIME", 2)


def maps_by_hand(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The feature maps of each group as its readers read them, from the modules themselves."""
    if isinstance(model, Chain):
        first = F.relu(model.bn1(model.conv1(images)))
        return {"conv1": first, "conv2": F.relu(model.bn2(model.conv2(first)))}
    if isinstance(model, Units):
        maps = model.maps(images)
        hidden = F.gelu(model.hidden(maps.flatten(1)))
        return {"conv": maps, "hidden": hidden[:, :, None, None]}
    assert isinstance(model, Concat)
    stem = F.relu(model.stem(images))
    left, right = F.relu(model.left(stem)), F.relu(model.right(stem))
    join = F.relu(model.join(torch.cat([left, right], 1)))
    return {"stem.0": stem, "left.0": left, "right.0": right, "join.0": join}


def logits_by_hand(model: nn.Module, maps: dict[str, Tensor]) -> Tensor:
    linear = model.get_submodule("linear")
    if isinstance(model, Chain):
        logits = linear(maps["conv2"].mean((2, 3)))
    elif isinstance(model, Units):
        logits = linear(maps["hidden"][:, :, 0, 0])
    else:
        logits = linear(torch.cat([maps["join.0"], maps["stem.0"]], 1).mean((2, 3)))
    assert isinstance(logits, Tensor)
    return logits


TRACED = ["chain", "units", "concat"]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("name", TRACED)
def test_observers_are_shown_every_map_as_the_next_layer_reads_it(name: str) -> None:
    model, dependencies = network(name)
    images, recorder = random_images(7), Recorder()
    run(model, dependencies, CalibrationSet(images, LABELS), [recorder])
    with torch.no_grad():
        expected = maps_by_hand(model, images)
    assert recorder.batches_of.keys() == expected.keys() == dependencies.groups.keys()
    assert recorder.kernels.keys() == dependencies.groups.keys()
    for group, maps in expected.items():
        assert len(recorder.batches_of[group]) == 4  # once a batch
        assert recorder.numbers(group) == list(range(7))
        assert all(
            features.kernels is recorder.kernels[group] for features in recorder.batches_of[group]
        )
        torch.testing.assert_close(recorder.maps(group), maps)


def test_hidden_units_are_shown_as_maps_of_one_position() -> None:
    model, dependencies = network("units")
    with_gradients, recorder = Recorder(GRADIENTS), Recorder()
    calibration = CalibrationSet(random_images(7), LABELS, size=7)
    run(model, dependencies, calibration, [with_gradients, recorder])
    (features,) = with_gradients.batches_of["hidden"]
    assert features.maps.shape == (7, 7, 1, 1)
    assert features.gradients is not None
    assert features.gradients.shape == (7, 7, 1, 1)
    assert features.grid == (1, 1)
    (regions,) = recorder.regions["hidden"]
    assert regions.masks_at(features.grid).shape == (7, 1, 1, 1)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("use_labels", [True, False])
@pytest.mark.parametrize("name", TRACED)
def test_gradients_are_those_of_the_summed_loss(name: str, use_labels: bool) -> None:
    model, dependencies = network(name)
    images, recorder = random_images(7), Recorder(GRADIENTS)
    run(model, dependencies, CalibrationSet(images, LABELS), [recorder], use_labels=use_labels)

    maps = maps_by_hand(model, images)
    logits = logits_by_hand(model, maps)
    targets = LABELS if use_labels else logits.argmax(1)
    assert not torch.equal(LABELS, logits.argmax(1))
    loss = -logits.log_softmax(1)[torch.arange(7), targets].sum()
    expected = torch.autograd.grad(loss, list(maps.values()))
    for group, gradient in zip(maps, expected, strict=True):
        torch.testing.assert_close(recorder.gradients(group), gradient)
        torch.testing.assert_close(recorder.maps(group), maps[group].detach())


def test_only_observers_that_need_gradients_get_them() -> None:
    model, dependencies = network("chain")
    with_gradients, without = Recorder(GRADIENTS), Recorder()
    run(model, dependencies, CalibrationSet(random_images(7), LABELS), [without, with_gradients])
    for group in dependencies.groups:
        assert all(features.gradients is None for features in without.batches_of[group])
        assert all(features.gradients is not None for features in with_gradients.batches_of[group])
        assert torch.equal(without.maps(group), with_gradients.maps(group))


def test_the_calibration_set_is_not_read_for_those_who_need_no_images() -> None:
    model, dependencies = network("chain")
    calibration, blind = CalibrationSet(random_images(7), LABELS), Recorder(NOTHING)
    run(model, dependencies, calibration, [blind])
    assert calibration.reads == 0
    run(model, dependencies, calibration, [blind, Recorder()])
    assert blind.batches_of == {}
    assert blind.kernels.keys() == dependencies.groups.keys()


def test_more_observers_take_no_more_passes() -> None:
    model, dependencies = network("chain")
    reads = []
    for count in (1, 3):
        calibration = CalibrationSet(random_images(7), LABELS)
        run(model, dependencies, calibration, [Recorder() for _ in range(count)])
        reads.append(calibration.reads)
    assert reads == [2, 2]  # one for means and thresholds, one for the rest


@pytest.mark.parametrize("needs", [{"maps"}, {"maps", "gradients"}, {"maps", "concepts"}])
def test_no_sampled_pass_comes_first_unless_needed(needs: set[Need]) -> None:
    model, dependencies = network("chain")
    calibration, recorder = CalibrationSet(random_images(7), LABELS), Recorder(frozenset(needs))
    run(model, dependencies, calibration, [recorder])
    assert calibration.reads == 1
    assert all(features.statistics is None for features in recorder.batches_of["conv1"])


def test_no_source_is_needed_if_no_observer_needs_concepts() -> None:
    model, dependencies = network("chain")
    recorder, source = Recorder(GRADIENTS), Bright(needs_learning=True)
    run(model, dependencies, CalibrationSet(random_images(7), LABELS), [recorder], source=source)
    assert source.steps == []
    alone = Recorder(GRADIENTS)
    run_feature_pass(
        model, dependencies, CalibrationSet(random_images(7), LABELS), [alone], None, ScoreSection()
    )
    assert torch.equal(alone.maps("conv1"), recorder.maps("conv1"))


@pytest.mark.usefixtures("small_batches")
def test_a_source_learns_from_the_sample_before_it_finds() -> None:
    model, dependencies = network("chain")
    source, needs = Bright(needs_learning=True), frozenset[Need]({"maps", "concepts"})
    calibration = CalibrationSet(random_images(7), LABELS)
    run(model, dependencies, calibration, [Recorder(needs)], source=source, sample_every=3)
    assert calibration.reads == 2
    assert set(source.learnt) == {0, 3, 6}
    assert source.steps == ["learn", "learn", "finish", "find", "find", "find", "find"]


@pytest.mark.usefixtures("small_batches")
def test_masks_come_at_the_resolution_of_each_map() -> None:
    model, dependencies = network("chain")
    images, recorder = random_images(7), Recorder()
    run(model, dependencies, CalibrationSet(images, LABELS, size=7), [recorder])
    for group, size in (("conv1", (8, 8)), ("conv2", (4, 4))):
        assert all(features.grid == size for features in recorder.batches_of[group])
        masks = torch.cat([regions.masks_at(size) for regions in recorder.regions[group]])
        assert torch.equal(masks, at_resolution(images[:, :1] > 0, size))


@pytest.mark.parametrize("use_labels", [True, False])
def test_the_source_sees_labels_only_where_they_may_be_used(use_labels: bool) -> None:
    model, dependencies = network("chain")
    recorder = Recorder()
    run(
        model,
        dependencies,
        CalibrationSet(random_images(7), LABELS),
        [recorder],
        use_labels=use_labels,
    )
    shown = torch.cat([regions.concepts for regions in recorder.regions["conv1"]]).flatten()
    assert torch.equal(shown, LABELS if use_labels else torch.full((7,), CLASSES))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("sample_every", [1, 3, 8])
def test_activation_statistics_come_from_a_sample_of_the_calibration_set_before_the_pass(
    sample_every: int,
) -> None:
    """Every n-th image, by its number, however the batches lie."""
    model, dependencies = network("chain")
    images, recorder = random_images(7), Recorder()
    calibration = CalibrationSet(images, LABELS)
    run(model, dependencies, calibration, [recorder], quantile=0.1, sample_every=sample_every)
    with torch.no_grad():
        expected = maps_by_hand(model, images[::sample_every])
    for group, batches_of in recorder.batches_of.items():
        accumulator = StatisticsAccumulator(
            expected[group].shape[1], ScoreSection().threshold_positions
        )
        accumulator.update(expected[group])
        statistics = accumulator.compute(0.1)
        for features in batches_of:
            assert features.statistics is not None
            assert features.statistics.images == len(images)
            torch.testing.assert_close(features.statistics.mean, statistics.mean)
            torch.testing.assert_close(features.statistics.threshold, statistics.threshold)
            torch.testing.assert_close(features.statistics.largest, statistics.largest)


def test_a_label_beyond_the_classes_is_an_error_before_it_is_learnt_from() -> None:
    model, dependencies = network("chain")
    calibration = CalibrationSet(random_images(2), torch.tensor([0, CLASSES]))
    with pytest.raises(DataError, match="label 5, but the network has 5 classes"):
        run(model, dependencies, calibration, [Recorder(GRADIENTS)])


def norms_by_hand(*weights: Tensor) -> Tensor:
    """`[filter]` norm of all weights that read a filter, each `[reader, filter, ...]`."""
    filters = weights[0].shape[1]
    norms = []
    for c in range(filters):
        values = [value for weight in weights for value in weight[:, c].flatten().tolist()]
        norms.append(sum(value**2 for value in values) ** 0.5)
    return torch.tensor(norms, dtype=torch.float64)


def test_outgoing_norms_are_those_of_all_that_reads_a_filter() -> None:
    model, dependencies = network("concat")
    assert isinstance(model, Concat)
    left, right, join, linear = (
        model.get_parameter(name)
        for name in ("left.0.weight", "right.0.weight", "join.0.weight", "linear.weight")
    )
    expected = {
        "stem.0": norms_by_hand(left, right, linear[:, 6:]),
        "left.0": norms_by_hand(join[:, :5]),
        "right.0": norms_by_hand(join[:, 5:]),
        "join.0": norms_by_hand(linear[:, :6]),
    }
    state = tensors_of(model)
    for name in dependencies.groups:
        torch.testing.assert_close(
            kernels_of(dependencies, state)[name].outgoing_norm, expected[name]
        )


def test_outgoing_norms_behind_a_flattening_cover_every_position() -> None:
    model, dependencies = network("units")
    assert isinstance(model, Units)
    state = tensors_of(model)
    norms = {
        name: kernels.outgoing_norm for name, kernels in kernels_of(dependencies, state).items()
    }
    hidden = model.hidden.weight.reshape(7, 6, 8)  # [unit, channel, position]
    torch.testing.assert_close(norms["conv"], norms_by_hand(hidden))
    torch.testing.assert_close(norms["hidden"], norms_by_hand(model.linear.weight))

    viewed, dependencies = network("view_rest")
    assert isinstance(viewed, ViewRest)
    norm = kernels_of(dependencies, tensors_of(viewed))["conv.0"].outgoing_norm
    linear = viewed.linear.weight.reshape(CLASSES, 6, 16)
    torch.testing.assert_close(norm, norms_by_hand(linear))


def test_incoming_kernels_are_those_that_write_the_filters() -> None:
    model = make_network("residual")
    dependencies = build_dependency_graph(model, random_images(2), prune_residual=True)
    state = tensors_of(model)
    incoming = kernels_of(dependencies, state)["stem.0"].incoming
    expected = [state[f"{layer}.0.weight"] for layer in ("stem", "conv2", "conv4")]
    assert len(incoming) == 3
    for kernel in expected:
        same_shape = [other for other, _ in incoming if other.shape == kernel.shape]
        assert any(torch.equal(kernel, other) for other in same_shape)
    assert all(channel.tolist() == list(range(6)) for _, channel in incoming)


def test_nothing_stays_on_the_network() -> None:
    model, dependencies = network("chain")
    model.train()
    model.get_submodule("bn2").eval()
    model.get_parameter("conv1.weight").requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = random_images(7)
    pixels = images.clone()

    run(model, dependencies, CalibrationSet(images, LABELS), [Recorder(GRADIENTS), Recorder()])

    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(images, pixels)
    assert images.grad is None
    assert not images.requires_grad


def test_a_frozen_network_still_has_gradients() -> None:
    model, dependencies = network("chain")
    model.requires_grad_(False)
    recorder = Recorder(GRADIENTS)
    run(model, dependencies, CalibrationSet(random_images(7), LABELS), [recorder])
    assert recorder.gradients("conv1").abs().sum() > 0


# Batches and processes

COUNT = 48
AT_A_TIME = 16
SOURCE = "evidence,factors:3"
PREPROCESSING = Preprocessing(8, 8)


def pixels() -> TensorImages:
    """More images than go through the network at once, three times over."""
    generator = torch.Generator().manual_seed(3)
    shown = torch.randint(0, 256, (COUNT, 3, 8, 8), generator=generator).to(torch.uint8)
    return TensorImages(shown, torch.arange(COUNT) % CLASSES)


def everything(name: str, precision: Precision, size: int) -> dict[str, list[Tensor]]:
    """What this process's share of the images adds up to, with that of all other processes."""
    model = make_network(name)
    dependencies = build_dependency_graph(model, random_images(2), prune_residual=True)
    settings = ScoreSection(
        quantile=0.1, sample_every=2, use_labels=True, threshold_positions=9, precision=precision
    )
    names = tuple("abcde")
    source = concepts.make(SOURCE, dependencies.graph, tensors_of(model), names, PREPROCESSING)
    watching: dict[str, criteria.Criterion] = {
        criterion: criteria.make(criterion, settings, 0, {})
        for criterion in CRITERIA
        if criterion != "bn_scale" or name == "residual"  # where every layer has a batch norm
    }
    dissection, top = Dissection(tuple(concept.name for concept in source.concepts)), TopImages(3)
    observers: list[Observer] = [*watching.values(), dissection, top]

    def share() -> Iterator[Batch]:
        return data.batches(pixels(), size, PREPROCESSING, shard=distributed.rank_and_world_size())

    run_feature_pass(model, dependencies, share, observers, source, settings)
    top.merge()
    taps = list(kernels_of(dependencies, tensors_of(model)))
    states = {
        f"{criterion} state": list(observer.state()) for criterion, observer in watching.items()
    }
    states |= {
        f"{criterion} scores": [observer.compute(tap) for tap in taps]
        for criterion, observer in watching.items()
    }
    states["dissection"] = [*dissection.state(), *(dissection.thresholds[tap] for tap in taps)]
    states["top images"] = [top.top(tap).indices for tap in taps]
    states["top regions"] = [top.top(tap).regions for tap in taps]
    return states


def assert_bit_equal(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        for number, (value, same) in enumerate(zip(values, other[name], strict=True)):
            assert value.dtype == same.dtype
            assert torch.equal(value, same), (name, number)


PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["residual", "flattened"])
def test_states_do_not_depend_on_how_the_calibration_set_is_cut_into_batches(
    name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MOST_IMAGES_AT_A_TIME", AT_A_TIME)
    expected = everything(name, precision, size=100)
    assert all(any(bool(value.any()) for value in values) for values in expected.values() if values)
    for size in (1, 7):
        assert_bit_equal(everything(name, precision, size), expected)


def work(rank: int, folder: Path) -> None:
    """One of four processes; then two of them."""
    torch.set_num_threads(1)
    batching.MOST_IMAGES_AT_A_TIME = AT_A_TIME
    for processes in (4, 2):
        if rank >= processes:
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / str(processes)}",
            rank=rank,
            world_size=processes,
        )
        for precision in PRECISIONS:
            states = everything("residual", precision, size=10)
            torch.save(states, folder / f"{precision}_{processes}_{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.slow
def test_states_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MOST_IMAGES_AT_A_TIME", AT_A_TIME)
    side_by_side(work, 4, tmp_path)
    for precision in PRECISIONS:
        expected = everything("residual", precision, size=10)
        for processes in (2, 4):
            for rank in range(processes):
                states = torch.load(tmp_path / f"{precision}_{processes}_{rank}.pt")
                assert_bit_equal(states, expected)
