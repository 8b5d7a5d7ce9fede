"""Cut networks equal the masked originals, for random networks and random plans.

Five hundred of them: `pytest --hypothesis-profile=thorough tests/test_random_networks.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import assert_cut_is_equivalent, counted_macs, random_images, several
from random_networks import BLOCKS, Spec, build, random_plan
from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.models.divergence import relative_error
from secateur.pruning.equivalence import masked_network
from secateur.pruning.plan import PruningPlan

SPECS = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(2, 12), st.integers(0, 2**24)),
        min_size=1,
        max_size=4,
    ),
    st.tuples(st.just("head"), st.integers(2, 12), st.integers(0, 2**24)),
).map(lambda parts: (*parts[0], parts[1]))
SEEDS = st.integers(0, 2**16)

REGRESSIONS: list[tuple[Spec, bool, int]] = [
    ((("twice", 8, 1358430), ("dense", 10, 16305027), ("head", 8, 10177486)), False, 46930),
    ((("attention", 3, 12115078), ("head", 4, 10339343)), True, 27815),
    ((("attended", 8, 16192082), ("parts", 9, 9312048), ("head", 12, 5376411)), True, 64236),
    ((("parts", 3, 13181434), ("head", 4, 1451840)), True, 14738),
    ((("gate", 5, 5571267), ("grouped", 11, 9511263), ("head", 10, 9287404)), True, 1222),
    ((("attention", 8, 15222668), ("resize", 7, 8637846), ("head", 10, 12970702)), True, 5361),
    ((("residual", 10, 5433721), ("head", 5, 7764479)), False, 33533),
    ((("shuffle", 4, 13229950), ("parts", 11, 15048138), ("head", 8, 15437471)), False, 60865),
    (
        (("attention", 2, 8724501), ("standardised", 8, 10639572), ("head", 8, 8226222)),
        False,
        41420,
    ),
    (
        (
            *(("attended", 2, 8146459), ("parts", 2, 12927), ("attended", 2, 0)),
            *(("attended", 2, 0), ("head", 2, 0)),
        ),
        False,
        373,
    ),
    ((("twice", 2, 1262), ("attention", 2, 102), ("head", 2, 0)), False, 0),
]
"""Specification, `prune_residual` and seed of the plan of examples that once failed."""


def state_of(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    return {name: str(m) for name, m in model.named_modules()}, copy.deepcopy(model.state_dict())


def assert_all_holds(spec: Spec, prune_residual: bool, seed: int) -> None:
    model, images = build(spec), random_images(3).double()
    names, state = state_of(model)
    dependencies = build_dependency_graph(model, images[:2], prune_residual=prune_residual)
    with torch.no_grad():
        expected = model(images)
        nothing = PruningPlan({}, Budget("macs", 0.5), "none")
        assert relative_error(masked_network(model, dependencies, nothing)(images), expected) < 1e-9
    assert dependencies.macs() == counted_macs(model, images)
    plan = random_plan(dependencies, seed)
    cut = assert_cut_is_equivalent(model, dependencies, plan, images, limit=1e-6)
    torch.stack([one.sum() for one in several(cut.train()(images))]).sum().backward()
    after_names, after_state = state_of(model)
    assert after_names == names
    assert all(torch.equal(after_state[name], tensor) for name, tensor in state.items())


@given(SPECS, st.booleans(), SEEDS)
def test_the_cut_is_equivalent_for_random_networks(
    spec: Spec, prune_residual: bool, seed: int
) -> None:
    assert_all_holds(spec, prune_residual, seed)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if len(c[0]) > 4 else ()) for c in REGRESSIONS],
    ids=range(len(REGRESSIONS)),
)
def test_specs_that_once_failed(case: tuple[Spec, bool, int]) -> None:
    assert_all_holds(*case)
