"""Keep some classes: the head is cut to them, and the images of the others go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur
from runs import outputs, small_config
from secateur import data
from secateur.config import BaseConfig, from_dict
from secateur.data.images import IGNORED, NormalisedImages
from secateur.data.kept_classes import KeptClasses, find_classes, images_of_classes
from secateur.data.preprocessing import Preprocessing
from secateur.experiments import run as runs
from secateur.experiments import run_folder
from secateur.experiments.evaluate import evaluate_run
from secateur.experiments.manifest import read_manifest
from secateur.experiments.train_base import train_base
from secateur.models import zoo
from secateur.pipeline.run_context import RunContext
from secateur.pruning.head import cut_head, keep_classes
from secateur.runtime.errors import DataError, UsageError

NAMES = ("cat", "dog", "cow", "crane", "crane", "a, b")


class Classifier(nn.Module):
    """Five classes from grey images; what comes behind the last layer can be chosen."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 5)
        self.last = last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.head(self.more(self.body(x)).mean((2, 3))))
        return logits


class MapsOfClasses(nn.Module):
    """Segmentation: two heads of 1×1 convolutions that are added, and resized."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 6, 3, padding=1)
        self.coarse = nn.Conv2d(6, 7, 3, stride=2, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(6, 5, 1), nn.Conv2d(7, 5, 1)])

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x).relu()
        coarse = self.coarse(fine).relu()
        maps = self.heads[1](coarse)
        maps = nn.functional.interpolate(maps, scale_factor=2, mode="bilinear")
        logits: Tensor = self.heads[0](fine) + maps
        return logits


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(80, 1, 12, 12, generator=generator)


@pytest.fixture
def labels(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 5, (80,), generator=generator)


@pytest.mark.parametrize("network", [Classifier, MapsOfClasses])
def test_logits_of_the_kept_classes_stay(network: type[nn.Module], images: Tensor) -> None:
    model = network().eval()
    smaller = keep_classes(model, images[:2], (1, 4))
    torch.testing.assert_close(smaller(images), model(images)[:, [1, 4]])
    assert model(images).shape[1] == 5, "the original is not changed"


def test_the_head_itself_is_cut(images: Tensor) -> None:
    smaller = keep_classes(Classifier().train(), images[:2], (0, 2, 3))
    head = smaller.get_submodule("head")
    assert isinstance(head, nn.Linear)
    assert (head.out_features, tuple(head.weight.shape)) == (3, (3, 6))
    assert smaller.training


def test_a_softmax_is_over_the_kept_classes(images: Tensor) -> None:
    model = Classifier(nn.Softmax(dim=1)).eval()
    kept = model(images)[:, [1, 4]]
    smaller = keep_classes(model, images[:2], (1, 4))
    torch.testing.assert_close(smaller(images), kept / kept.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (nn.Unflatten(1, (1, 5)), "no linear layer or convolution writes"),
        (nn.Linear(5, 5), ""),
        (nn.BatchNorm1d(5), ""),
    ],
)
def test_what_stands_behind_the_last_layer(last: nn.Module, reason: str, images: Tensor) -> None:
    model = Classifier(last).eval()
    if reason:
        with pytest.raises(UsageError, match=reason):
            keep_classes(model, images[:2], (1, 4))
        return
    smaller = keep_classes(model, images[:2], (1, 4))
    torch.testing.assert_close(smaller(images), model(images)[:, [1, 4]])


def test_a_network_without_a_head_is_refused() -> None:
    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    with pytest.raises(UsageError, match="head can't be cut to some classes: no linear layer"):
        keep_classes(Means(), torch.rand(2, 3, 4, 4), (0, 1))


def test_a_class_that_the_head_lacks_is_refused(images: Tensor) -> None:
    with pytest.raises(UsageError, match="has 5 classes, 0 to 4, not 5"):
        cut_head(Classifier(), images[:2], (1, 5))


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [(["dog,cat"], (0, 1)), (["2", "Cat"], (0, 2)), (["a, b", "3"], (3, 5)), (["dog", "1"], (1,))],
)
def test_classes_are_found_by_name_or_number(wanted: list[str], numbers: tuple[int, ...]) -> None:
    assert find_classes(wanted, NAMES, 6).numbers == numbers


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("catt", "unknown class 'catt': did you mean cat?"),
        ("6", "there is no class 6: they are numbered 0 to 5"),
        ("-1", "there is no class -1: they are numbered 0 to 5"),
        ("", "--keep-classes names no class: list two or more, as cat,dog or 3,5"),
        ("crane", "several classes are called 'crane': name it by its number, 3 and 4"),
    ],
)
def test_a_wrong_name_is_said(wanted: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        find_classes([wanted], NAMES, 6)
    assert str(error.value) == message


def test_without_names_imagenet_has_those_of_imagenet() -> None:
    assert find_classes(["tench", "golf ball"], (), 1000).numbers == (0, 574)
    with pytest.raises(UsageError, match="does not name its classes"):
        find_classes(["tench"], (), 10)


def test_labels_are_renumbered_and_other_images_go() -> None:
    kept = KeptClasses((1, 3), (), 5)
    pixels = torch.arange(6.0).reshape(6, 1, 1, 1)
    fewer = images_of_classes(
        NormalisedImages(pixels, torch.tensor([3, 0, 1, 4, 3, 2])), kept, "classes"
    )
    assert fewer.labels.tolist() == [1, 0, 1]
    assert torch.cat(fewer.originals(torch.arange(3))).flatten().tolist() == [0, 2, 4]
    several = NormalisedImages(pixels, torch.eye(6, 5).long())
    assert images_of_classes(several, kept, "classes").labels.sum(0).tolist() == [1, 1]
    masks = NormalisedImages(pixels, torch.zeros(6).long(), torch.tensor([[[3, -1, 1, 0]]] * 6))
    read = images_of_classes(masks, kept, "masks").read_labels(torch.arange(1), Preprocessing(1, 1))
    assert read.tolist() == [[[1, IGNORED, 0, IGNORED]]]


SETTINGS = {"model.allow_untrained": True, "report.images": 0, "data.synthetic_images": 0}


def test_a_pruned_network_knows_the_kept_classes_only(
    images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    model = Classifier().eval()
    pruned = secateur.prune(
        model,
        [(images, labels)],
        keep_classes=("c", 1),
        class_names=tuple("abcde"),
        target="filters=0.6",
        settings=SETTINGS,
    )
    result = pruned.result
    assert pruned.model(images[:3]).shape == (3, 2)
    assert result.class_names == ("b", "c")
    assert result.kept_classes == KeptClasses((1, 2), ("b", "c"), 5)
    assert any(note.startswith("Of 5 classes 2 are kept: b, c.") for note in result.notes)
    tested = torch.isin(labels[4::5], torch.tensor([1, 2]))  # every fifth image is held out
    before = pruned.scores["before"]
    assert before.images == int(tested.sum())
    right = model(images[4::5][tested])[:, 1:3].argmax(1) + 1 == labels[4::5][tested]
    assert before.metric == pytest.approx(float(right.float().mean()))
    folder = pruned.save(tmp_path / "run")
    assert torch.equal(secateur.load(folder, architecture=model)(images), pruned.model(images))
    torch.testing.assert_close(secateur.load_program(folder)(images), pruned.model(images))
    manifest = read_manifest(folder)
    assert (manifest.num_classes, manifest.kept_classes) == (5, result.kept_classes)


def test_without_labels_the_network_chooses_the_images(images: Tensor) -> None:
    model = Classifier().eval()
    with torch.no_grad():
        model.head.bias.sub_(model(images).mean(0))  # so that it predicts several classes
    predicted = model(images).argmax(1)
    kept = predicted[4::5].unique()[:2].tolist()
    pruned = secateur.prune(
        model, images, keep_classes=kept, target="filters=0.6", settings=SETTINGS
    )
    assert pruned.model(images[:3]).shape == (3, 2)
    expected = int(torch.isin(predicted[4::5], torch.tensor(kept)).sum())
    assert pruned.scores["before"].images == expected
    assert "what the network predicts" in " ".join(pruned.result.notes)


def test_a_segmentation_network_is_cut_to_classes(images: Tensor) -> None:
    model = MapsOfClasses().eval()
    masks = torch.randint(0, 5, (80, 12, 12))
    pruned = secateur.prune(
        model,
        [(images, masks)],
        keep_classes=(0, 3),
        target="filters=0.8",
        metric="pixel accuracy",
        settings=SETTINGS,
    )
    assert pruned.model(images[:3]).shape == (3, 2, 12, 12)
    read = model(images[4::5])[:, [0, 3]].argmax(1) * 3 == masks[4::5]
    counts = (masks[4::5] == 0) | (masks[4::5] == 3)
    assert pruned.scores["before"].metric == pytest.approx(float(read[counts].float().mean()))


@pytest.mark.parametrize(
    ("keep", "settings", "message"),
    [
        ((1, 1), {}, "names one class only, 1: a classifier needs 2 or more different ones"),
        ((1, 7), {}, "there is no class 7: they are numbered 0 to 4"),
        ((1, 2), {"model.task": "regression"}, "not of one for regression"),
    ],
)
def test_what_cant_be_kept_is_said(
    keep: tuple[int, ...], settings: dict[str, str], message: str, images: Tensor
) -> None:
    with pytest.raises(UsageError, match=message):
        secateur.prune(
            Classifier().eval(), images, keep_classes=keep, settings={**SETTINGS, **settings}
        )


def test_images_of_other_classes_alone_are_refused(images: Tensor) -> None:
    labels = torch.zeros(80, dtype=torch.int64)
    with pytest.raises(DataError, match=r"no training image of .* shows one of the kept classes"):
        secateur.prune(
            Classifier().eval(), [(images, labels)], keep_classes=(1, 2), settings=SETTINGS
        )


def test_without_images_no_classes_can_be_kept() -> None:
    with pytest.raises(UsageError, match="synthesised images show none"):
        secateur.prune(
            secateur.load_model("resnet20", num_classes=10),
            None,
            input_shape=(3, 32, 32),
            keep_classes=(1, 2),
        )


def test_a_run_is_loaded_finetuned_reported_and_evaluated(model_file: Path, tmp_path: Path) -> None:
    config = small_config(
        model_file, data={"keep_classes": [3, "5,8"]}, plan={"target": "macs=0.7"}
    )
    folder, named = tmp_path / "run", {"model.name": config.model.name}
    result = runs.run(config, folder)
    assert result.class_names == ("3", "5", "8")
    assert result.config.model.num_classes == 10
    dataset = data.load("digits").of_classes(KeptClasses((3, 5, 8), ("3", "5", "8"), 10))
    before, refit = result.score("before"), result.score("refit")
    assert before is not None
    assert refit is not None
    assert before.images == len(dataset.test.labels)
    network = run_folder.load_pruned(folder)
    assert outputs(network).shape == (4, 3)
    loaded = secateur.load(folder, architecture=zoo.load(config.model.name))
    torch.testing.assert_close(outputs(loaded), outputs(network))
    evaluation = evaluate_run(folder, config, RunContext(), tuple(named))
    assert evaluation.score.metric == refit.metric
    changes = {"epochs": 1, "batch_size": 64}
    finetuned = runs.finetune(folder, tmp_path / "finetuned", changes, named=named)
    assert finetuned.kept_classes == result.kept_classes
    assert outputs(run_folder.load_pruned(tmp_path / "finetuned")).shape == (4, 3)
    runs.report(folder, named=named, images=20)
    assert "Of 10 classes 3 are kept: 3, 5, 8." in (folder / "report.html").read_text()


def test_a_base_network_is_not_trained_on_some_classes(tmp_path: Path) -> None:
    tables = {"model": {"name": "resnet20"}, "data": {"source": "digits", "keep_classes": ["1,2"]}}
    with pytest.raises(UsageError, match=r"data\.keep_classes is for pruning"):
        train_base(from_dict(tables, BaseConfig), tmp_path / "base")
