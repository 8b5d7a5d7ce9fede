"""Kernels that are computed: weight norm, masks, and other parametrizations."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as masks

from networks import assert_cut_is_equivalent, random_images, random_plan
from secateur.config import RefitSection
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.module_state import tensors_of
from secateur.graph.taps import kernels_of
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import masked_network
from secateur.pruning.refit.layerwise import RefitInputs, refit

Change = Callable[[nn.Module], object]


def _old(function: Callable[..., nn.Module], **options: Any) -> Change:
    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return function(layer, **options)

    return apply


class Net(nn.Module):
    """A convolution, one that changes, a transposed or grouped one, and a linear layer."""

    def __init__(self, change: Change | None = None, layers: tuple[str, ...] = ("body",)) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.upward = nn.ConvTranspose2d(8, 6, 2, 2)
        self.hidden, self.head = nn.Linear(6, 9), nn.Linear(9, 5)
        for name in layers if change else ():
            change(self.get_submodule(name))  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.body(F.relu(self.stem(x))))))
        logits: Tensor = self.head(F.relu(self.hidden(self.upward(x).relu().mean((2, 3)))))
        return logits


def _scaled(layer: nn.Module) -> None:
    """Give g values unlike the norms of v, some negative."""
    with torch.no_grad():
        for name, tensor in layer.named_parameters():
            if name.endswith(("weight_g", "original0")):
                tensor.mul_(torch.linspace(-2, 3, tensor.numel()).reshape(tensor.shape))


EVERY = ("stem", "body", "depthwise", "upward", "hidden", "head")
WEIGHT_NORMS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "new": (parametrizations.weight_norm, EVERY),
    "new, along inputs": (
        functools.partial(parametrizations.weight_norm, dim=1),
        ("body", "hidden"),
    ),
    "new, one norm": (
        _old(parametrizations.weight_norm, dim=None),
        ("body", "upward"),
    ),
    "old": (_old(nn.utils.weight_norm), EVERY),
    "old, one norm": (_old(nn.utils.weight_norm, dim=None), ("stem", "body")),
}


@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_weight_norm_is_cut_exactly_and_kept(name: str) -> None:
    change, layers = WEIGHT_NORMS[name]
    model = Net(change, layers).eval()
    for layer in layers:
        _scaled(model.get_submodule(layer))
    images = random_images(3)
    dependencies = build_dependency_graph(model, images)
    assert list(dependencies.groups) == ["stem", "body", "upward", "hidden"]
    plan = random_plan(dependencies, torch.Generator().manual_seed(1))
    cut = assert_cut_is_equivalent(model, dependencies, plan, images, limit=1e-5)
    body: Any = cut.get_submodule("body")
    assert (body.out_channels, body.in_channels) == tuple(body.weight.shape[:2])
    assert body.out_channels == 8 - len(plan.removed["body"])
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in cut.named_parameters()} == names
    cut(images).sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())


def test_a_filter_whose_kernel_is_zero_is_cut_to_zeros_not_to_nan() -> None:
    model = Net(parametrizations.weight_norm).eval()
    images = random_images(3)
    dependencies = build_dependency_graph(model, images)
    with torch.no_grad():
        kernel = torch.randn(8, 7, 3, 3)
        kernel[2, 3:] = 0
        model.body.weight = kernel
    plan = random_plan(dependencies, torch.Generator().manual_seed(1))
    removed = {"stem": (0, 1, 2)}
    cut: Any = assert_cut_is_equivalent(
        model, dependencies, type(plan)(removed, plan.budget, "mine"), images
    )
    assert not cut.body.weight[2].any()


def test_refit_sets_the_kernel_of_a_layer_with_weight_norm() -> None:
    torch.manual_seed(0)
    model = Net(parametrizations.weight_norm, ("body", "hidden")).eval()
    images = random_images(96)
    dependencies = build_dependency_graph(model, images[:2])
    removed = {"stem": (0, 2, 5), "upward": (1, 4)}
    plan = type(random_plan(dependencies, torch.Generator()))(removed, None, "mine")  # type: ignore[arg-type]
    cut = apply_plan(model, dependencies, plan)
    with torch.no_grad():
        before = relative_error(cut(images), model(images))
    batches = [Batch(images, torch.zeros(len(images)).long(), torch.arange(len(images)))]
    layers = refit(
        RefitInputs(model, cut, dependencies, removed),
        batches,
        RefitSection(layers="consumers"),
        seed=0,
    )
    notes = {layer.layer: layer.note for layer in layers}
    assert notes["body"] == notes["hidden"] == ""
    with torch.no_grad():
        assert relative_error(cut(images), model(images)) < 0.9 * before
    assert parametrize.is_parametrized(cut.get_submodule("body"), "weight")


class Absolute(nn.Module):
    """A parametrization that acts on each number alone."""

    def forward(self, kernel: Tensor) -> Tensor:
        return kernel.abs()


class Fixed(nn.Module):
    """A parametrization with a mask."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(8, 7, 3, 3) > 0.4).float())

    def forward(self, kernel: Tensor) -> Tensor:
        return kernel * self.mask


def _global_masks(model: nn.Module) -> None:
    layers = [(model.get_submodule(name), "weight") for name in EVERY]
    masks.global_unstructured(layers, pruning_method=masks.L1Unstructured, amount=0.4)


def _global_masks_and_forward(model: nn.Module) -> None:
    _global_masks(model)
    model(random_images(1))


def _parametrized(model: nn.Module, kind: type[nn.Module], tensor: str = "weight") -> None:
    parametrize.register_parametrization(model.get_submodule("body"), tensor, kind())


POINTWISE: dict[str, Callable[[Net], object]] = {
    "absolute": lambda model: _parametrized(model, Absolute),
    "a bias": lambda model: _parametrized(model, Absolute, "bias"),
    "a mask of one's own": lambda model: _parametrized(model, Fixed),
    "unstructured": lambda model: masks.l1_unstructured(model.body, "weight", 0.5),
    "structured": lambda model: masks.ln_structured(model.body, "weight", 0.5, n=2, dim=0),
    "a masked bias": lambda model: masks.random_unstructured(model.body, "bias", 0.5),
    "global": _global_masks,
    "after a forward": _global_masks_and_forward,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_masks_and_pointwise_parametrizations_are_cut_with_their_kernel(name: str) -> None:
    model = Net()
    POINTWISE[name](model)
    model.eval()
    images = random_images(3)
    dependencies = build_dependency_graph(model, images)
    assert list(dependencies.groups) == ["stem", "body", "upward", "hidden"]
    plan = random_plan(dependencies, torch.Generator().manual_seed(1))
    cut: Any = apply_plan(model, dependencies, plan)
    body = cut.body
    assert (body.out_channels, body.in_channels) == tuple(body.weight.shape[:2])
    with torch.no_grad():
        assert relative_error(cut(images), masked_network(model, dependencies, plan)(images)) < 1e-5
    if name in ("unstructured", "structured"):
        expected = body.weight.detach().clone()
        masks.remove(body, "weight")
        assert torch.equal(body.weight, expected)


@pytest.mark.parametrize(
    "change",
    [parametrizations.weight_norm, lambda layer: masks.l1_unstructured(layer, "weight", 30)],
)
def test_criteria_read_the_kernel_that_is_computed(change: Change) -> None:
    model = Net(change).eval()
    _scaled(model.body)
    dependencies = build_dependency_graph(model, random_images(2))
    kernels = kernels_of(dependencies, tensors_of(model))
    kernel = model.body.weight.detach()
    torch.testing.assert_close(kernels["body"].incoming[0][0], kernel)
    (consumer,) = kernels["stem"].consumers
    torch.testing.assert_close(consumer.weights, kernel.flatten(2).movedim(1, 2))


def test_criteria_read_a_matrix_that_is_transposed() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 8, 3)
            self.matrix = nn.Parameter(torch.randn(8, 6))
            self.head = nn.Linear(6, 2)

        def forward(self, signals: Tensor) -> Tensor:
            logits: Tensor = self.head((self.conv(signals).transpose(1, 2) @ self.matrix).mean(1))
            return logits

    model = Product().eval()
    dependencies = build_dependency_graph(model, torch.rand(2, 3, 12))
    kernels = kernels_of(dependencies, tensors_of(model))
    matrix = model.matrix.detach()
    torch.testing.assert_close(kernels["matrix"].incoming[0][0], matrix.T)
    (consumer,) = kernels["conv"].consumers
    torch.testing.assert_close(consumer.weights, matrix.T[:, None])


REMEDIES: dict[str, tuple[Change, str]] = {
    "spectral norm": (
        parametrizations.spectral_norm,
        "parametrize.remove_parametrizations(model.get_submodule('body'), 'weight')",
    ),
    "old spectral norm": (
        _old(nn.utils.spectral_norm),
        "remove_spectral_norm(model.get_submodule('body'), 'weight')",
    ),
    "orthogonal": (
        parametrizations.orthogonal,
        "parametrize.remove_parametrizations(model.get_submodule('body'), 'weight')",
    ),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_other_parametrizations_are_named_with_the_remedy_which_helps(name: str) -> None:
    change, remedy = REMEDIES[name]
    model = Net(change).eval()
    images = random_images(3)
    dependencies = build_dependency_graph(model, images)
    assert list(dependencies.groups) == ["upward", "hidden"]
    reasons = {group.name: str(group.reason) for group in dependencies.frozen}
    assert {"stem", "body"} <= set(reasons)
    assert f"call torch.nn.utils.{remedy} before pruning" in reasons["stem"]
    assert remedy in reasons["body"]
    expected = model(images)
    eval(f"torch.nn.utils.{remedy}", {"torch": torch, "model": model})
    torch.testing.assert_close(model(images), expected)
    dependencies = build_dependency_graph(model, images)
    assert list(dependencies.groups) == ["stem", "body", "upward", "hidden"]
