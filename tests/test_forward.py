"""A network that runs through a function of the user's is a view of the user's network."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from networks import Chain, random_images
from secateur.graph.forward import forward_of, name_of, with_forward, without_forward
from secateur.graph.module_state import evaluating
from secateur.models.examine import logits_of
from secateur.models.outputs import through_logits, with_logits
from secateur.runtime.errors import UsageError


def doubled(model: nn.Module, images: Tensor) -> Tensor:
    outputs: Tensor = model(images)
    return 2 * outputs


def test_it_shares_everything_and_its_copies_share_nothing() -> None:
    model, images = Chain().eval(), random_images()
    network = with_forward(model, doubled)
    assert isinstance(network, Chain)
    assert list(network.state_dict()) == list(model.state_dict())
    assert torch.equal(network(images), 2 * model(images))
    copied = copy.deepcopy(network)
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert torch.equal(network(images), 2 * model(images))
    assert not torch.equal(copied(images), network(images))
    assert forward_of(copied) is doubled
    assert type(without_forward(copied)) is Chain
    assert forward_of(without_forward(copied)) is None


def test_its_mode_is_that_of_the_network() -> None:
    model = Chain().train()
    with evaluating(with_forward(model, doubled)):
        assert not model.training
    assert model.training


def test_any_kind_of_module_can_be_copied_and_run() -> None:
    model, images = Chain().eval(), random_images()
    compiled = cast("nn.Module", torch.compile(model))
    for original in (symbolic_trace(model), compiled, nn.Sequential(model)):
        network = copy.deepcopy(with_forward(original, doubled))
        assert torch.equal(network(images), 2 * model(images))


def test_the_user_gets_the_network_in_its_own_class() -> None:
    classes = []

    def forward(model: nn.Module, images: Tensor) -> Tensor:
        classes.append(type(model))
        outputs: Tensor = model(images)
        return outputs

    with_forward(with_forward(Chain(), doubled), forward)(random_images())
    assert classes == [Chain]


def test_a_name_is_no_function() -> None:
    with pytest.raises(UsageError, match="a function of the network and the images, not 'logits'"):
        with_forward(Chain(), "logits")  # type: ignore[arg-type]


def test_functions_have_names() -> None:
    assert name_of(doubled) == "test_forward.doubled"
    assert name_of(None) is None


class Returning(nn.Module):
    """Returns whatever a test makes of the logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.kind = kind

    def forward(self, images: Tensor) -> object:
        maps = self.body(images)
        logits = maps.mean((2, 3))
        if self.kind == "object":
            return type("Output", (), {"logits": logits, "loss": None})()
        if self.kind == "dict":
            return {"features": maps, "logits": logits}
        if self.kind == "tuple":
            return logits, maps
        if self.kind == "other dict":
            return {"left": logits, "right": logits}
        return {"out": logits} if self.kind == "one entry" else logits


@pytest.mark.parametrize("kind", ["object", "dict", "tuple", "one entry"])
def test_logits_are_taken_by_their_name_or_place(kind: str) -> None:
    network = with_logits(Returning(kind), random_images())
    assert forward_of(network) is logits_of
    assert network(random_images(3)).shape == (3, 4)


def test_what_may_be_the_logits_is_not_guessed() -> None:
    images, model = random_images(), Returning("other dict")
    assert forward_of(through_logits(model, images)) is None
    with pytest.raises(UsageError, match=r"dict with left, right: .* model\(images\)\['left'\]$"):
        with_logits(model, images)
    with pytest.raises(UsageError, match="by letting forward return one tensor"):
        with_logits(with_forward(model, lambda model, images: model(images)), images)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 8), r"1 channel, .* takes 3: repeat it, images.repeat_interleave\(3, dim=1\)"),
        ((2, 4, 8, 8), "4 channels, .* takes 3: pass images with the channels"),
        ((2, 8, 8, 3), r"pass images.movedim\(-1, 1\)"),
        ((2, 3, 2, 2), r"can't be run on images \[2, 3, 2, 2\]: .*[Kk]ernel size"),
    ],
)
def test_images_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_logits(Returning("tensor"), torch.rand(shape))
