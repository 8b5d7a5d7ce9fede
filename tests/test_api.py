"""From Python: any network, any iterable of tensors, with labels or without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import secateur
from secateur import PruneResult, data
from secateur.models import zoo
from secateur.runtime.errors import DataError, RunFolderError, UnknownName, UsageError


class Tall(nn.Module):
    """Takes grey images that are higher than wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return logits


@pytest.fixture
def model() -> nn.Module:
    return Tall().eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(100, 1, 24, 16, generator=generator)


@pytest.fixture
def labels(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 3, (100,), generator=generator)


def assert_same(one: PruneResult, other: PruneResult) -> None:
    assert one.plan == other.plan
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


class Pairs(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError(index)
        return self.images[index], int(self.labels[index])


def test_images_come_in_any_form(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    forms: list[Any] = [
        images.split(7),
        list(images),
        DataLoader(TensorDataset(images), batch_size=16),
        (batch for batch in images.split(50)),
    ]
    first, *others = (secateur.prune(model, form) for form in forms)
    for other in others:
        assert_same(first, other)
    assert not first.has_labels
    assert first.scores["before"].metric == 1.0
    assert first.scores["before"].images == 20
    with_labels: list[Any] = [
        zip(images.split(7), labels.split(7), strict=True),
        DataLoader(TensorDataset(images, labels), batch_size=16),
        DataLoader(Pairs(images, labels), batch_size=9),
        Pairs(images, labels),
    ]
    first, *others = (secateur.prune(model, form) for form in with_labels)
    for other in others:
        assert_same(first, other)
    assert first.has_labels
    with torch.inference_mode():
        hits = model(images[4::5]).argmax(1) == labels[4::5]
    assert first.scores["before"].metric == hits.float().mean()


def test_bytes_are_normalised_as_the_settings_say(model: nn.Module, images: Tensor) -> None:
    settings: dict[str, Any] = {"data.mean": [0.4], "data.std": [0.3]}
    pixels = images.mul(20).add(128).clamp(0, 255).byte()
    normalised = (pixels.float() / 255 - 0.4) / 0.3
    assert_same(secateur.prune(model, pixels, settings=settings), secateur.prune(model, normalised))
    with pytest.raises(DataError, match=r"scale and normalise .* settings={'data.mean'"):
        secateur.prune(model, pixels)
    two = {"data": {"mean": [0.4] * 2, "std": [0.3] * 2}}
    with pytest.raises(DataError, match="std need a value for each"):
        secateur.prune(model, pixels, settings=two)


def test_nothing_of_the_users_is_changed(model: nn.Module, images: Tensor) -> None:
    model.train()
    before, were = copy.deepcopy(model.state_dict()), images.clone()
    result = secateur.prune(model, [images], epochs=1)
    assert model.training
    assert torch.equal(images, were)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not result.model.training
    assert list(result.scores) == ["before", "cut", "refit", "finetuned"]


def test_the_network_gets_smaller_and_works(model: nn.Module, images: Tensor) -> None:
    result = secateur.prune(
        model, [images], target="params=0.6", settings={"refit.recalibrate_batchnorm": False}
    )
    before, after = result.scores["before"], result.scores["refit"]
    assert after.parameters <= 0.6 * before.parameters
    assert after.parameters == sum(p.numel() for p in result.model.parameters())
    assert result.plan.removed
    assert result.model(images).shape == (100, 3)


def test_a_test_split_is_scored(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    result = secateur.prune(model, [images[:60]], test=[(images[60:], labels[60:])])
    assert result.scores["before"].images == 40
    assert not result.has_labels  # those that it was pruned with had none
    result = secateur.prune(
        model, [(images[:60], labels[:60])], test=[(images[60:], labels[60:])], max_images=55
    )
    assert result.has_labels
    assert result.scores["before"].images == 40


def test_it_shows_itself(model: nn.Module, images: Tensor) -> None:
    result = secateur.prune(model, [images], class_names=("a", "<b>", "c"))
    text = repr(result)
    assert text.startswith("Tall pruned to macs=0.5 by vote: ")
    assert "no labels: agreement alone is known" in text
    lines = text.splitlines()
    assert lines[1].split() == ["stage", "agree", "%", "MACs", "params", "latency", "ms"]
    rows, (verdict, counts, *notes) = lines[2:5], lines[5:]
    assert [row.split()[0] for row in rows] == ["before", "cut", "refit"]
    assert len({len(line) for line in lines[1:5]}) == 1
    assert " fewer MACs, " in verdict or verdict.startswith("Half the MACs, ")
    assert counts == "images: 72 to score, 8 to choose, 20 to test"
    start = "Before pruning, the network predicts the same for all 20 test images"
    assert any(note.startswith(start) for note in notes)
    page = result._repr_html_()
    assert page.count("<tr>") == 4
    assert "<td>refit</td>" in page


def test_it_is_saved_and_loaded(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    result = secateur.prune(model, [images])
    folder = result.save(tmp_path / "run")
    expected = result.model(images)
    again = secateur.load(folder, architecture=Tall())
    assert torch.equal(again(images), expected)
    assert torch.allclose(secateur.load_program(folder)(images), expected, atol=1e-6)
    with pytest.raises(RunFolderError, match="not empty"):
        result.save(folder)
    result.save(folder, overwrite=True)
    assert secateur.load_program(folder)(images[:1]).shape == (1, 3)


def test_its_report_has_pictures(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    result = secateur.prune(model, [images], class_names=("a", "<b>", "c"))
    page = result.report(tmp_path / "report.html").read_text()
    assert "memory:Tall, pruned to macs=0.5" in page
    assert '"images": ["/9j/' in page  # JPEG
    plain = result.report(tmp_path / "plain.html", images=0).read_text()
    assert '"images": []' in plain


def test_a_network_of_this_package_does_as_well() -> None:
    dataset = data.load("digits")
    model = zoo.load("resnet20")
    prepare = zoo.preprocessing("resnet20")
    pixels = dataset.train.read(torch.arange(60), prepare)
    batch = (prepare.normalise(pixels), dataset.train.labels[:60])
    result = secateur.prune(model, [batch], criterion="l1", target="macs=0.7")
    assert result.plan.criterion == "l1"
    assert result.scores["refit"].macs <= 0.7 * result.scores["before"].macs


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: there are none"),
        (["a.png"], "got str"),
        ([torch.zeros(4, 1, 24, 16, dtype=torch.uint8)], r"got \[4, 1, 24, 16\] of torch.uint8"),
        ([torch.zeros(24, 16)], r"got \[24, 16\]"),
        ([torch.zeros(4, 1, 24, 16), torch.zeros(4, 1, 16, 16)], "all must have one size"),
        ([torch.full((4, 1, 24, 16), torch.nan)], "not finite"),
        ([(torch.zeros(4, 1, 24, 16), torch.zeros(3))], "4 images with 3 labels"),
        (
            [(torch.zeros(4, 1, 24, 16), torch.zeros(4)), torch.zeros(4, 1, 24, 16)],
            "some come with labels and some without",
        ),
        ([torch.zeros(8, 1, 24, 16)], "too few"),
    ],
)
def test_wrong_images_are_an_error(model: nn.Module, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        secateur.prune(model, images)


def test_unknown_settings_are_an_error(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"plan\.roundto"):
        secateur.prune(model, [images], settings={"plan.roundto": 8})
    with pytest.raises(UsageError, match=r"SECTION\.KEY"):
        secateur.prune(model, [images], settings={"round_to": 8})
    with pytest.raises(UnknownName, match="vote"):
        secateur.prune(model, [images], criterion="votes")
    with pytest.raises(UsageError, match="change images in files"):
        secateur.prune(model, [images], settings={"finetune.randaugment": True})


def test_its_run_folder_records_that_the_network_has_no_name(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    folder = secateur.prune(model, [images]).save(tmp_path / "run")
    with pytest.raises(UsageError, match="pass the unpruned network"):
        secateur.load(folder)
    with pytest.raises(UsageError, match="passed from Python"):
        zoo.load("memory:Tall")


def test_progress_is_shown_on_request(
    model: nn.Module, images: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    secateur.prune(model, [images])
    assert capfd.readouterr() == ("", "")
    secateur.prune(model, [images], progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    stages, *lines = err.splitlines()
    assert stages.startswith("stages: score original → score filters and cut → refit; about ")
    assert len(lines) == 3
