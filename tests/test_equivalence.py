"""A wrong cut stops a run, and so do NaN and Inf; the error names the layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from networks import make_network, random_images
from runs import small_config
from secateur.config import Budget
from secateur.experiments.run import run
from secateur.graph import finite
from secateur.graph.build import build_dependency_graph
from secateur.graph.cut import cut
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.models.divergence import relative_error
from secateur.pipeline.inputs import load_inputs
from secateur.pruning import apply, equivalence
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import CutError, NotFiniteError


def plan_of(dependencies: DependencyGraph) -> PruningPlan:
    """One filter of every group."""
    removed: dict[str, tuple[int, ...]] = dict.fromkeys(dependencies.groups, (0,))
    return PruningPlan(removed, Budget("filters", 0.9), "none")


@pytest.fixture
def wired() -> tuple[nn.Module, DependencyGraph, PruningPlan]:
    model = make_network("residual")
    dependencies = build_dependency_graph(model, random_images(2))
    return model, dependencies, plan_of(dependencies)


Wired = tuple[nn.Module, DependencyGraph, PruningPlan]


def test_a_right_cut_passes(wired: Wired) -> None:
    model, dependencies, plan = wired
    smaller = apply_plan(model, dependencies, plan)
    assert (
        equivalence.check_equivalence(model, dependencies, plan, smaller, random_images(3))
        < equivalence.TOLERANCE
    )


def test_a_wrong_cut_names_its_layer(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second group's cut takes other filters than the plan says."""
    model, dependencies, plan = wired
    wrong = list(plan.removed)[1]

    def wrong_cut(model: nn.Module, dependencies: DependencyGraph, removed: Removed) -> nn.Module:
        others = {name: (1,) if name == wrong else f for name, f in removed.items()}
        return cut(model, dependencies, others)

    monkeypatch.setattr(apply, "cut", wrong_cut)
    smaller = wrong_cut(model, dependencies, plan.removed)
    with pytest.raises(CutError, match=f"after removing the filters of {wrong} "):
        equivalence.check_equivalence(model, dependencies, plan, smaller, random_images(3))


def test_a_cut_that_fails_only_as_a_whole_names_no_layer(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dependencies, plan = wired

    def wrong_cut(model: nn.Module, dependencies: DependencyGraph, removed: Removed) -> nn.Module:
        if len(removed) > 1:
            removed = dict.fromkeys(removed, (1,))
        return cut(model, dependencies, removed)

    monkeypatch.setattr(apply, "cut", wrong_cut)
    smaller = wrong_cut(model, dependencies, plan.removed)
    with pytest.raises(CutError, match="all layers together"):
        equivalence.check_equivalence(model, dependencies, plan, smaller, random_images(3))


def test_rounding_is_distinguished_from_a_wrong_cut(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that magnifies what float32 rounds passes by float64."""
    model, dependencies, plan = wired
    smaller = apply_plan(model, dependencies, plan)
    honest = relative_error

    def in_float32(outputs: Any, expected: Any) -> float:
        error = honest(outputs, expected)
        return 0.01 if expected.dtype == torch.float32 else error

    monkeypatch.setattr(equivalence, "relative_error", in_float32)
    assert (
        equivalence.check_equivalence(model, dependencies, plan, smaller, random_images(3)) == 0.01
    )


def test_outputs_with_nan_do_not_pass(wired: Wired) -> None:
    model, dependencies, plan = wired
    smaller = apply_plan(model, dependencies, plan)
    with torch.no_grad():
        next(smaller.parameters()).fill_(torch.nan)
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(CutError):
        equivalence.check_equivalence(model, dependencies, plan, smaller, random_images(3))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_with_nan_or_inf_are_named(wired: Wired, number: float) -> None:
    model, dependencies, _ = wired
    finite.check_finite(model, dependencies, random_images(2))
    name, tensor = list(model.named_parameters())[3]
    with torch.no_grad():
        tensor.view(-1)[0] = number
    with pytest.raises(NotFiniteError, match=f": {name}$"):
        finite.check_finite(model, dependencies, random_images(2))


class Overflows(nn.Module):
    """The second layer's values are too large for float32; a mask in between is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mask = torch.zeros(1, 4, 1, 1).masked_fill(torch.tensor(True), -torch.inf).exp()
        logits: Tensor = self.head((self.second(x + mask) * 2).mean((2, 3)))
        return logits


def test_the_first_layer_with_nan_or_inf_is_named() -> None:
    model = Overflows()
    dependencies = build_dependency_graph(model, random_images(2))
    finite.check_finite(model, dependencies, random_images(2))
    with torch.no_grad():
        model.first.weight.fill_(1e30)
        model.second.weight.fill_(1e30)
    with pytest.raises(NotFiniteError, match="second "):
        finite.check_finite(model, dependencies, random_images(2))


def test_a_run_stops_there(model_file: Path, tmp_path: Path) -> None:
    config = small_config(model_file)
    _, model = load_inputs(config)
    state: Mapping[str, Tensor] = model.state_dict()
    save_file(
        {**state, "conv1.weight": state["conv1.weight"] * torch.nan}, tmp_path / "nan.safetensors"
    )
    broken = config.model_copy(
        update={
            "model": config.model.model_copy(update={"weights": str(tmp_path / "nan.safetensors")})
        }
    )
    with pytest.raises(NotFiniteError, match=r"conv1\.weight"):
        run(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()
