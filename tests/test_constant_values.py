"""Numbers that a network reads from its own tensors while it is traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import assert_cut_is_equivalent, random_images, random_plan
from secateur.graph.build import build_dependency_graph
from secateur.graph.interpreter import run
from secateur.graph.module_state import tensors_of
from secateur.graph.trace import trace
from secateur.runtime.errors import TraceError


class Reading(nn.Module):
    """Two convolutions; subclasses read numbers on the way."""

    count: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)
        self.stride = torch.tensor([8.0, 16.0])  # no buffer, as in ultralytics' Detect
        self.steps = [torch.tensor([2]), torch.tensor(3)]
        self.register_buffer("count", torch.tensor(2))
        self.temperature = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.body(F.relu(self.stem(x))))).mean((2, 3))
        return logits


class Filled(Reading):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * logits.new_full((1, 1), self.stride[0])  # type: ignore[arg-type]


class Items(Reading):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.stride.max().item() * int(self.steps[0][0]) + float(self.count)
        return super().forward(x * scale) / self.temperature.item()


class Branches(Reading):
    def forward(self, x: Tensor) -> Tensor:
        if self.count > 1 and torch.equal(self.stride, self.stride) and (self.stride > 9).any():
            x = x + 1
        return super().forward(x)


class Loops(Reading):
    def forward(self, x: Tensor) -> Tensor:
        for stride in self.stride:
            x = x + float(stride)
        for value in self.stride.sqrt().tolist():
            x = x * value
        first, _ = self.stride.split(1)
        return super().forward(x + first.item())


class Sizes(Reading):
    def forward(self, x: Tensor) -> Tensor:
        size = (int(self.steps[1]) * 2, int(self.steps[0].sum().item()) * 4)
        grid = torch.arange(4).max().item() + torch.tensor([1, 2]).sum().item()
        return super().forward(F.interpolate(x, size=size) + grid)


class Arrays(Reading):
    def forward(self, x: Tensor) -> Tensor:
        x = x * float(self.stride.numpy()[1]) + float(np.asarray(self.count))
        return super().forward(x / self.temperature.detach().numpy().item())


class Masks(Reading):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False] * 4))
        self.body = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.stem(x))
        same = features[:, self.mask] + features[:, self.mask.nonzero().flatten()]
        logits: Tensor = self.head(F.relu(self.body(same))).mean((2, 3))
        return logits


@pytest.mark.parametrize("kind", [Filled, Items, Branches, Loops, Sizes, Arrays, Masks])
def test_numbers_that_are_read_from_constants_are_known(kind: type[Reading]) -> None:
    model = kind().eval()
    dependencies = build_dependency_graph(model, random_images(2))
    assert "body" in dependencies.groups
    with torch.no_grad():
        for count in (1, 3):
            images = random_images(count)
            torch.testing.assert_close(
                run(dependencies.graph, tensors_of(model), images), model(images)
            )
    plan = random_plan(dependencies, torch.Generator().manual_seed(0))
    cut = assert_cut_is_equivalent(model, dependencies, plan, random_images(3))
    assert cut.get_parameter("body.weight").shape[0] < 6


def test_a_number_read_from_a_kernel_that_shrinks_freezes_it() -> None:
    class Scaled(Reading):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / self.body.weight.abs().max().item())

    dependencies = build_dependency_graph(Scaled().eval(), random_images(2))
    assert list(dependencies.groups) == []
    assert {group.name for group in dependencies.frozen} >= {"stem", "body"}


def test_a_grid_that_is_kept_for_the_next_call_is_made_anew_in_every_trace() -> None:
    class Gridded(Reading):
        shape: object = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            if self.shape != y.shape[2:]:  # as ultralytics' Detect keeps its anchors
                self.shape, self.grid = y.shape[2:], torch.arange(y.shape[3]) * 0.1
            y = torch.hstack([F.relu(y) + self.grid, y])  # is composed: the trace runs twice
            logits: Tensor = self.head(F.relu(self.body(y[:, :8]))).mean((2, 3))
            return logits

    model = Gridded().eval()
    assert list(build_dependency_graph(model, random_images(2)).groups) == ["body"]
    assert model.shape is None


def test_no_values_outlive_the_trace() -> None:
    graph = trace(Items().eval(), random_images(2))
    mode = graph.image.meta["val"].fake_mode
    assert len(mode._constants) == 0


def _branch(self: Reading, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def _assertion(self: Reading, x: Tensor) -> Tensor:
    assert not x.isnan().any(), "an image holds NaN"
    return x


def _loop(self: Reading, x: Tensor) -> Tensor:
    for _ in range(int(x.amax())):
        x = x + 1
    return x


def _array(self: Reading, x: Tensor) -> Tensor:
    return x * float(x.mean().numpy())


def _counted(self: Reading, x: Tensor) -> Tensor:
    self.count += 1
    return x if self.count < 9 else -x


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (
            _branch,
            r"`return x \* 2 if x.sum\(\) > 0 else x` at tests/test_constant_values.py:\d+\)",
        ),
        (_assertion, "`assert not x.isnan"),
        (_loop, r"`for _ in range\(int\(x.amax"),
        (_array, r"`return x \* float\(x.mean\(\).numpy"),
        (_counted, "`return x if self.count < 9"),
    ],
)
def test_branches_that_depend_on_the_images_are_refused_with_the_line(
    step: object, line: str
) -> None:
    class Dependent(Reading):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(step(self, x))  # type: ignore[operator]

    with pytest.raises(TraceError, match=f"reads a number, or branches, .* \\({line}"):
        build_dependency_graph(Dependent().eval(), random_images(2))
