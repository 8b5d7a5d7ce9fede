from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import CLASSES, random_images, wired
from secateur.config import Budget, Quantity, parse_budget
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.pruning.plan import PruningPlan, make_plan
from secateur.runtime.errors import RunFolderError, TargetError, UsageError

NAMES = ["chain", "concat", "residual", "flattened", "gated", "depthwise"]
QUANTITIES: tuple[Quantity, ...] = ("macs", "params", "filters")
"""Those that every filter adds to; `test_quantities` and `test_latency_model` test the others."""


def random_scores(dependencies: DependencyGraph, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randn(len(group), generator=generator)
        for name, group in dependencies.groups.items()
    }


def amount(dependencies: DependencyGraph, quantity: Quantity, removed: Removed) -> int:
    if quantity == "macs":
        return dependencies.macs(removed)
    if quantity == "params":
        return dependencies.params(removed)
    return sum(len(g) - len(removed.get(name, ())) for name, g in dependencies.groups.items())


def kept_counts(dependencies: DependencyGraph, plan: PruningPlan) -> dict[str, int]:
    return {
        name: len(g) - len(plan.removed.get(name, ())) for name, g in dependencies.groups.items()
    }


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", ["chain", "concat", "residual"])
def test_the_target_is_met_and_one_filter_more_would_miss_it(
    name: str, quantity: Quantity, fraction: float, generator: torch.Generator
) -> None:
    dependencies = wired(name, True)[1]
    plan = make_plan(
        random_scores(dependencies, generator), dependencies, Budget(quantity, fraction), "random"
    )
    limit = fraction * amount(dependencies, quantity, {})
    assert amount(dependencies, quantity, plan.removed) <= limit
    with_one_more = [
        amount(dependencies, quantity, {**plan.removed, group: filters[1:]})
        for group, filters in plan.removed.items()
    ]
    assert any(value > limit for value in with_one_more)


@settings(deadline=None, max_examples=80, derandomize=True, database=None)
@given(st.data())
def test_every_group_keeps_the_same_share_but_for_one_filter(data: st.DataObject) -> None:
    dependencies = wired(data.draw(st.sampled_from(NAMES)), True)[1]
    target = Budget(data.draw(st.sampled_from(QUANTITIES)), data.draw(st.floats(0.3, 1.0)))
    scores = random_scores(
        dependencies, torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    try:
        plan = make_plan(scores, dependencies, target, "random")
    except TargetError as error:
        assert "out of reach" in str(error)  # noqa: PT017 - both outcomes are right
        return
    kept = kept_counts(dependencies, plan)
    assert all(1 <= count <= len(dependencies.groups[name]) for name, count in kept.items())

    def fits(share: float) -> bool:
        least = {n: max(1, int(share * len(g) + 1e-9)) for n, g in dependencies.groups.items()}
        return all(count in (least[name], least[name] + 1) for name, count in kept.items())

    shares = {n / len(g) for g in dependencies.groups.values() for n in range(len(g) + 1)}
    assert any(fits(share) for share in shares)
    total = amount(dependencies, target.quantity, {})
    assert amount(dependencies, target.quantity, plan.removed) <= target.fraction_left * total


@pytest.mark.parametrize("name", NAMES)
def test_the_lowest_scored_filters_go(name: str, generator: torch.Generator) -> None:
    dependencies = wired(name, True)[1]
    scores = random_scores(dependencies, generator)
    plan = make_plan(scores, dependencies, Budget("macs", 0.5), "random")
    assert plan.removed
    for group, filters in plan.removed.items():
        kept = [i for i in range(len(dependencies.groups[group])) if i not in filters]
        assert scores[group][list(filters)].max() < scores[group][kept].min()
        assert list(filters) == sorted(set(filters))


def test_between_equal_scores_the_smaller_number_stays() -> None:
    dependencies = wired("chain")[1]
    equal = {name: torch.full((len(group),), 0.5) for name, group in dependencies.groups.items()}
    plan = make_plan(equal, dependencies, Budget("filters", 0.5), "equal")
    for name, filters in plan.removed.items():
        size = len(dependencies.groups[name])
        assert filters == tuple(range(size - len(filters), size))


def test_scores_that_differ_by_less_than_float32_resolves_still_count() -> None:
    dependencies = wired("chain")[1]
    scores = {
        name: 1 - 1e-12 * torch.arange(len(group), dtype=torch.float64).flip(0)
        for name, group in dependencies.groups.items()
    }
    plan = make_plan(scores, dependencies, Budget("filters", 0.5), "close")
    assert all(filters == tuple(range(len(filters))) for filters in plan.removed.values())


def test_only_the_order_of_scores_matters(generator: torch.Generator) -> None:
    dependencies = wired("concat")[1]
    scores = random_scores(dependencies, generator)
    stretched = {name: 5 * score.exp() for name, score in scores.items()}
    target = Budget("params", 0.6)
    assert make_plan(scores, dependencies, target, "x") == make_plan(
        stretched, dependencies, target, "x"
    )


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_all_may_stay(quantity: Quantity, generator: torch.Generator) -> None:
    dependencies = wired("chain")[1]
    scores = random_scores(dependencies, generator)
    assert make_plan(scores, dependencies, Budget(quantity, 1.0), "random").removed == {}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_smaller_target_removes_no_fewer_of_any_group(
    quantity: Quantity, generator: torch.Generator
) -> None:
    dependencies = wired("concat")[1]
    scores = random_scores(dependencies, generator)
    amounts = [
        amount(
            dependencies,
            quantity,
            make_plan(scores, dependencies, Budget(quantity, f), "x").removed,
        )
        for f in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    assert amounts == sorted(amounts)


def test_a_target_out_of_reach_says_how_far_one_can_go(generator: torch.Generator) -> None:
    dependencies = wired("residual")[1]
    scores = random_scores(dependencies, generator)
    least = {name: tuple(range(1, len(group))) for name, group in dependencies.groups.items()}
    reached = dependencies.macs(least) / dependencies.macs()
    expected = (
        rf"target macs=0.01 .* {reached:.3f} of the macs .* 2 prunable groups "
        r"\(11 filters are frozen; prune_residual \(--prune-residual\) would free 6 of them; "
    )
    with pytest.raises(TargetError, match=expected):
        make_plan(scores, dependencies, Budget("macs", 0.01), "random")
    plan = make_plan(scores, dependencies, Budget("macs", reached + 1e-9), "random")
    assert set(kept_counts(dependencies, plan).values()) == {1}


def test_a_target_out_of_reach_says_why_most_filters_stay() -> None:
    dependencies = build_dependency_graph(wired("chain")[0], random_images(2), exclude=["*"])
    expected = r"filters are frozen, \d+ of them because: excluded by '\*'; `secateur inspect`"
    with pytest.raises(TargetError, match=expected):
        make_plan({}, dependencies, Budget("macs", 0.5), "random")


def without_groups() -> DependencyGraph:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, CLASSES))
    return build_dependency_graph(model, random_images(2))


def test_a_network_without_prunable_groups_reaches_no_target() -> None:
    with pytest.raises(TargetError, match=r"1.000 of the macs remain.* 0 prunable groups"):
        make_plan({}, without_groups(), Budget("macs", 0.5), "random")


@pytest.mark.parametrize("quantity", ["macs", "filters"])
def test_a_network_without_prunable_groups_may_stay_whole(quantity: Quantity) -> None:
    plan = make_plan({}, without_groups(), Budget(quantity, 1.0), "random")
    assert plan.removed == {}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("macs=0.7", Budget("macs", 0.7)),
        ("params=1", Budget("params", 1.0)),
        ("filters=5e-1", Budget("filters", 0.5)),
        ("memory=0.5", Budget("memory", 0.5)),
        ("latency=0.8", Budget("latency", 0.8)),
    ],
)
def test_targets_are_parsed(text: str, target: Budget) -> None:
    assert parse_budget(text) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not understood"),
        ("macs", "is not understood"),
        ("macs:0.5", "is not understood"),
        ("flops=0.5", "is not understood"),
        ("MACs=0.5", "is not understood"),
        ("macs=", "has no number"),
        ("macs=half", "has no number"),
        ("macs=0.5=1", "has no number"),
        ("macs=0", "is out of range"),
        ("macs=-0.5", "is out of range"),
        ("macs=1.01", "is out of range"),
        ("macs=70", "is out of range"),
        ("macs=nan", "is out of range"),
        ("macs=inf", "is out of range"),
    ],
)
def test_a_wrong_target_is_refused_with_the_expected_form(text: str, message: str) -> None:
    expected = "give macs=F, params=F, filters=F, memory=F or latency=F with the fraction"
    with pytest.raises(TargetError, match=f"target '{text}' {message}: {expected}"):
        parse_budget(text)


@given(st.sampled_from(QUANTITIES), st.floats(1e-6, 1.0))
@settings(max_examples=50, derandomize=True, database=None)
def test_a_target_written_and_parsed_is_the_same(quantity: Quantity, fraction: float) -> None:
    target = Budget(quantity, fraction)
    assert parse_budget(str(target)) == target


REMOVED = st.dictionaries(
    st.text(max_size=8),
    st.lists(st.integers(0, 511), unique=True, max_size=6).map(lambda f: tuple(sorted(f))),
    max_size=4,
)


@given(REMOVED, st.sampled_from(QUANTITIES), st.integers(1, 1000), st.text(max_size=8))
@settings(max_examples=50, derandomize=True, database=None, deadline=None)
def test_a_plan_comes_back_from_json(
    removed: dict[str, tuple[int, ...]], quantity: Quantity, thousandths: int, criterion: str
) -> None:
    plan = PruningPlan(removed, Budget(quantity, thousandths / 1000), criterion)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash
    assert json.loads(plan.to_json())["hash"] == plan.hash


def test_the_hash_depends_on_all_that_is_decided_and_not_on_the_order_of_groups() -> None:
    plan = PruningPlan({"a": (1,), "b": (2,)}, Budget("macs", 0.5), "l1")
    assert plan.hash == PruningPlan({"b": (2,), "a": (1,)}, Budget("macs", 0.5), "l1").hash
    others = [
        PruningPlan({"a": (1,), "b": (3,)}, Budget("macs", 0.5), "l1"),
        PruningPlan({"a": (1,), "b": (2,)}, Budget("macs", 0.6), "l1"),
        PruningPlan({"a": (1,), "b": (2,)}, Budget("params", 0.5), "l1"),
        PruningPlan({"a": (1,), "b": (2,)}, Budget("macs", 0.5), "l2"),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("removed", {"conv1": [0, 2]}, "has been changed"),
        ("removed", {"conv2": [0, 1]}, "has been changed"),
        ("target", "macs=0.6", "has been changed"),
        ("criterion", "l2", "has been changed"),
        ("hash", "0" * 64, "has been changed"),
        ("hash", None, "has been changed"),
        ("schema_version", 1, "has schema version 1"),
        ("schema_version", None, "has schema version None"),
        ("target", "macs=7", "can't be read"),
        ("target", 3, "can't be read"),
        ("removed", {"conv1": 3}, "can't be read"),
        ("removed", [1], "can't be read"),
    ],
)
def test_a_changed_plan_is_refused(key: str, value: object, message: str) -> None:
    text = PruningPlan({"conv1": (0, 1)}, Budget("macs", 0.5), "l1").to_json()
    content = {**json.loads(text), key: value}
    with pytest.raises(RunFolderError, match=message):
        PruningPlan.from_json(json.dumps(content))


@pytest.mark.parametrize(
    "text", ["", "no json", "null", "3", "[]", '"text"', "{}", '{"removed": {}}', "[" * 100_000]
)
def test_a_file_that_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(RunFolderError, match="the plan can't be read"):
        PruningPlan.from_json(text)


def test_scores_that_are_missing_or_no_numbers_are_refused() -> None:
    dependencies = wired("chain", False)[1]
    scores = random_scores(dependencies, torch.Generator().manual_seed(0))
    name = next(iter(dependencies.groups))
    target = Budget("macs", 0.7)
    with pytest.raises(UsageError, match=f"'{name}' needs one score for each of"):
        make_plan({**scores, name: scores[name][:-1]}, dependencies, target, "own")
    with pytest.raises(UsageError, match=f"'{name}' needs one score for each of"):
        make_plan({n: s for n, s in scores.items() if n != name}, dependencies, target, "own")
    with pytest.raises(UsageError, match="not a finite number"):
        make_plan({**scores, name: scores[name] * float("nan")}, dependencies, target, "own")


@pytest.mark.parametrize("round_to", [2, 4])
def test_widths_are_rounded_to_multiples_or_left_whole(
    round_to: int, generator: torch.Generator
) -> None:
    dependencies = wired("concat", True)[1]
    plan = make_plan(
        random_scores(dependencies, generator),
        dependencies,
        Budget("macs", 0.8),
        "random",
        round_to=round_to,
    )
    assert plan.removed
    assert dependencies.macs(plan.removed) <= 0.8 * dependencies.macs()
    for name, count in kept_counts(dependencies, plan).items():
        assert count % round_to == 0 or count == len(dependencies.groups[name])


@pytest.mark.parametrize(
    ("channels", "fraction", "multiple"),
    [
        (64, 0.5, 4),  # half of the channels is a multiple of 4
        (12, 0.6, 1),  # 7 of 12: with 4 or 6 the budget would be missed by far
        (12, 0.5, 2),  # 6 of 12
    ],
)
def test_widths_are_multiples_of_4_unless_that_removes_too_much(
    channels: int, fraction: float, multiple: int
) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, 4, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).eval()
    dependencies = build_dependency_graph(network, torch.rand(2, 3, 4, 4))
    (name,) = dependencies.groups
    plan = make_plan(
        {name: torch.arange(channels).float()},
        dependencies,
        Budget("filters", fraction),
        "own",
        round_to=None,
    )
    count = channels - len(plan.removed[name])
    assert count == int(fraction * channels)
    assert math.gcd(count, 4) == multiple
    kept = {
        4: "",
        2: "Layers keep filters in multiples of 2: ",
        1: "Layers keep any number of filters",
    }
    assert plan.note.startswith(kept[multiple])
    assert bool(plan.note) == (multiple < 4)


def test_rounding_counts_filters_where_several_go_at_once(generator: torch.Generator) -> None:
    """A channel of the first group is two filters, one of each group of the convolution."""
    dependencies = wired("grouped", True)[1]
    plan = make_plan(
        random_scores(dependencies, generator),
        dependencies,
        Budget("macs", 0.5),
        "random",
        round_to=4,
    )
    shape = dependencies.shapes_after(plan.removed)["stem.0.weight"]
    assert shape[0] in (4, 6)
    assert dependencies.shapes_after(plan.removed)["grouped.0.weight"][0] in (4, 8)


def test_every_group_keeps_the_requested_minimum(generator: torch.Generator) -> None:
    dependencies = wired("chain")[1]
    scores = random_scores(dependencies, generator)
    plan = make_plan(scores, dependencies, Budget("filters", 0.7), "random", min_filters=4)
    assert min(kept_counts(dependencies, plan).values()) >= 4
    with pytest.raises(TargetError, match="out of reach"):
        make_plan(scores, dependencies, Budget("filters", 0.2), "random", min_filters=4)
    with pytest.raises(TargetError, match=r"in multiples of 8: a smaller round_to \(--round-to\)"):
        make_plan(scores, dependencies, Budget("filters", 0.2), "random", round_to=8)
