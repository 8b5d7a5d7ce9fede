"""A pruned network is an ordinary one: other trainers take it and give it back pruned.

The trainers themselves run in the examples of `docs/how_to/train_elsewhere.md`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur
from networks import Residual
from secateur.api import PruneResult

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 5


@pytest.fixture(scope="module")
def result() -> PruneResult:
    torch.manual_seed(0)
    return secateur.prune(Residual(), [IMAGES], target="filters=0.6", criterion="l1")


@pytest.fixture
def network(result: PruneResult) -> nn.Module:
    return copy.deepcopy(result.model)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def step(network: nn.Module, call: nn.Module | None = None) -> float:
    """Trains for one step, through a wrapper if one is passed; returns the loss before it."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = F.cross_entropy((call or network)(IMAGES), LABELS)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def test_it_is_smaller_and_of_the_same_class(network: nn.Module) -> None:
    assert type(network) is Residual
    assert parameters(network) < parameters(Residual())


def test_it_trains_in_a_loop_of_ones_own(network: nn.Module) -> None:
    count = parameters(network)
    network.train()
    losses = [step(network) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert parameters(network) == count


def test_its_original_and_the_result_stay_as_they_were(result: PruneResult) -> None:
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    trained = copy.deepcopy(result.model).train()
    step(trained)
    assert all(torch.equal(before[name], t) for name, t in result.model.state_dict().items())


def test_its_state_is_saved_and_loaded(
    result: PruneResult, network: nn.Module, tmp_path: Path
) -> None:
    step(network.train())
    torch.save(network.state_dict(), tmp_path / "state.pt")
    torch.save(network, tmp_path / "network.pt")
    secateur.save(tmp_path / "run", network, result.plan, image_shape=(3, 8, 8))
    result.save(tmp_path / "untrained")
    others = [
        torch.load(tmp_path / "network.pt", weights_only=False),
        secateur.load(tmp_path / "run", architecture=Residual()),
        secateur.load(tmp_path / "untrained", architecture=Residual()),
    ]
    others[2].load_state_dict(torch.load(tmp_path / "state.pt"))
    expected = network.eval()(IMAGES)
    for other in others:
        assert type(other) is Residual
        assert torch.equal(other.eval()(IMAGES), expected)


def test_its_weights_are_averaged(network: nn.Module) -> None:
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    step(network.train())
    average.update_parameters(network)
    assert parameters(average.module) == parameters(network)
    assert average(IMAGES).shape == (40, 5)


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_it_trains_in_several_processes(network: nn.Module) -> None:
    parallel = nn.parallel.DistributedDataParallel(network.train())
    assert step(network, parallel) > step(network, parallel)


class Detector(nn.Module):
    """Returns boxes and scores in a dict, and has more methods than its `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 5, 1)

    def forward(self, images: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        features = self.body(images)
        return {"boxes": self.boxes(features) * scale, "scores": self.scores(features)}


def test_after_forward_its_own_call_comes_back() -> None:
    model = Detector()
    smaller = secateur.prune(
        model,
        [IMAGES],
        target="filters=0.5",
        criterion="l1",
        forward=lambda network, images: network(images)["scores"].mean((2, 3)),
    ).model
    assert type(smaller) is Detector
    assert parameters(smaller) < parameters(model)
    output = smaller(IMAGES, scale=2.0)
    assert output.keys() == {"boxes", "scores"}
    restored = copy.deepcopy(smaller)
    assert torch.equal(restored(IMAGES)["boxes"], smaller(IMAGES)["boxes"])


def test_a_network_of_transformers_stays_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = transformers.ResNetForImageClassification(config)
    images = torch.rand(40, 3, 32, 32)
    result = secateur.prune(model, [images], target="filters=0.6", criterion="l1")
    smaller: Any = result.model
    assert type(smaller) is transformers.ResNetForImageClassification
    assert smaller.num_parameters() < model.num_parameters()
    output = smaller(images, labels=LABELS)
    assert output.logits.shape == (40, 5)
    output.loss.backward()
    secateur.save(tmp_path / "run", smaller, result.plan, image_shape=(3, 32, 32))
    again: Any = secateur.load(
        tmp_path / "run", architecture=transformers.ResNetForImageClassification(config)
    )
    assert torch.equal(again(images).logits, output.logits)
    smaller.save_pretrained(tmp_path / "pretrained")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # it is built unpruned
        type(model).from_pretrained(tmp_path / "pretrained")
