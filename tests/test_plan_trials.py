"""Several plans for one budget, of which the best one after the refit is carried out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runs import small_config
from secateur import data
from secateur.config import Budget, PlanSection
from secateur.experiments.run import run
from secateur.graph.factorisation import factorable_layers
from secateur.graph.residual_branches import residual_branches
from secateur.models import zoo
from secateur.models.divergence import divergence_from, outputs_of
from secateur.pipeline.plan_trials import DEPTH_WEIGHTS, best_plan
from secateur.pipeline.scoring_context import Baseline, make_baseline
from secateur.pruning.actions import Actions, BranchChoice, RankChoice
from secateur.pruning.apply import apply_plan

HALF = Budget("macs", 0.5)


def baseline_of(trials: int) -> Baseline:
    config = small_config(
        Path("unused"), model={"name": "resnet20"}, plan={"trials": trials, "round_to": 1}
    )
    return make_baseline(zoo.load("resnet20"), data.load("digits"), config)


def test_the_first_layers_lose_more_with_weights_of_depth() -> None:
    inputs = baseline_of(1).plan_inputs["vote"]

    def lost_first(weight: float) -> int:
        removed = inputs.plan(HALF, weight).removed
        return sum(len(gone) for name, gone in removed.items() if name.startswith("layer1"))

    assert inputs.plan(HALF, 0.0) == inputs.plan(HALF)
    assert lost_first(-4.0) < lost_first(0.0) < lost_first(4.0)
    assert inputs.dependencies.macs(inputs.plan(HALF, 4.0).removed) <= 0.5 * (
        inputs.dependencies.macs()
    )


def test_weights_of_depth_go_for_ranks_and_branches_too() -> None:
    """Every kernel and every branch costs the same, so that only the weights differ."""
    model, inputs = zoo.load("resnet20"), baseline_of(1).plan_inputs["vote"]
    dependencies = inputs.dependencies
    layers = factorable_layers(model, dependencies)
    falling = {
        name: [0.1 * n / layer.whole_rank for n in range(layer.whole_rank + 1)]
        for name, layer in layers.items()
    }
    branches = residual_branches(model, dependencies)
    actions = Actions(
        RankChoice(layers, falling), BranchChoice(branches, dict.fromkeys(branches, 0.1))
    )
    allocation = replace(inputs.allocation, actions=actions, keeps_channels=True)
    only_actions = replace(inputs, allocation=allocation)
    first, last = (only_actions.plan(Budget("macs", 0.8), weight) for weight in (6.0, -6.0))
    assert {name.partition(".")[0] for name in (*first.ranks, *first.dropped)} == {"layer1"}
    assert {name.partition(".")[0] for name in (*last.ranks, *last.dropped)} == {"layer3"}


def test_the_plan_that_diverges_least_is_carried_out() -> None:
    baseline, model = baseline_of(3), zoo.load("resnet20")
    inputs, context = baseline.plan_inputs["vote"], baseline.context
    settings = small_config(Path("unused"), refit={"layers": "none"}).refit
    plan, trials = best_plan(model, inputs, HALF, context, settings, seed=0)
    assert [trial.depth_weight for trial in trials] == list(DEPTH_WEIGHTS[:3])
    held_out = context.refit_images.held_out
    expected = outputs_of(model, held_out())
    for trial in trials:
        smaller = apply_plan(model, context.dependencies, inputs.plan(HALF, trial.depth_weight))
        divergence = divergence_from(expected, smaller, held_out()).divergence
        assert trial.divergence == pytest.approx(divergence, rel=1e-6)
    best = min(trials, key=lambda trial: trial.divergence)
    assert plan == inputs.plan(HALF, best.depth_weight)


def test_one_plan_is_not_tried() -> None:
    baseline, model = baseline_of(1), zoo.load("resnet20")
    inputs = baseline.plan_inputs["vote"]
    settings = small_config(Path("unused")).refit
    assert best_plan(model, inputs, HALF, baseline.context, settings, seed=0) == (
        inputs.plan(HALF),
        (),
    )


def test_trials_are_in_the_log_of_a_run(tmp_path: Path) -> None:
    few = {"calibration_images": 30}
    model, plan = {"name": "resnet20"}, {"trials": 2}
    config = small_config(Path("unused"), model=model, plan=plan, data=few)
    run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    tried = [event for event in events if event["event"] == "plan_trial"]
    assert [event["depth_weight"] for event in tried] == [0.0, 1.0]
    assert all(event["divergence"] >= 0 for event in tried)


@pytest.mark.parametrize(
    "other", [{"allocation": "uniform"}, {"max_drop": 1.0}, {"target": "latency=0.5"}]
)
def test_trials_need_a_size_and_sensitivities(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"trials \(--trials\) need"):
        PlanSection.model_validate({"trials": 2, **other})
