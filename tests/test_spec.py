"""The specification of a benchmark, and the jobs it makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from secateur.config import RunConfig, from_dict
from secateur.experiments.compare.job import method_name
from secateur.experiments.compare.spec import BenchmarkSpec, group_jobs, jobs_of, read_spec
from secateur.pipeline.result import comparable
from secateur.runtime.errors import UsageError, WeightsError

FILE = """
criteria = ["vote", "l1"]
targets = ["macs=0.7", "params=0.5"]
seeds = 2
baseline = "l1, coarse"

[variants.whole]

[variants.coarse]
refit.form = "channel"
"plan.shares" = {}

[[networks]]
name = "resnet20"
changes = { finetune.epochs = 7 }

[[networks]]
name = "resnet20"
label = "again"
targets = ["macs=0.5"]

[data]
source = "digits"

[finetune]
epochs = 3
"""


@pytest.fixture
def content() -> dict[str, Any]:
    return {"networks": [{"name": "resnet20"}], "data": {"source": "digits"}}


def test_jobs_are_the_product_of_all_axes(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.toml"
    path.write_text(FILE)
    spec = read_spec(path)
    assert spec.seeds == (0, 1)
    assert spec.compared_with == "l1, coarse"
    jobs = jobs_of(spec)
    assert len(jobs) == 2 * 2 * 2 * (2 + 1)
    assert len({job.id for job in jobs}) == len(jobs)
    for job in jobs:
        config = job.config
        assert (config.score.criterion, config.plan.target) == (job.criterion, job.target)
        assert config.seed == job.seed
        assert config.model.name == "resnet20"
        assert config.finetune.epochs == (7 if job.network == "resnet20" else 3)
        assert config.refit.form == ("channel" if job.variant == "coarse" else "patch")
    assert {job.target for job in jobs if job.network == "again"} == {"macs=0.5"}
    groups = group_jobs(jobs)
    assert len(groups) == 2 * 2 * 2
    assert [job for group in groups for job in group] == sorted(jobs, key=lambda job: job.seed)
    assert group_jobs([]) == []
    for group in groups:
        assert len({(job.network, job.variant, job.seed) for job in group}) == 1


def test_scoring_passes_are_divided_if_workers_would_be_idle(content: dict[str, Any]) -> None:
    jobs = jobs_of(from_dict(content | {"seeds": 3}, BenchmarkSpec))
    assert len(jobs) == 18
    for workers, sizes in (
        (1, [6, 6, 6]),
        (2, [6, 6, 3, 3]),
        (3, [6, 6, 6]),
        (4, 6 * [3]),
        (7, 9 * [2]),
        (10, 6 * [1, 2]),
        (99, 18 * [1]),
    ):
        pieces = group_jobs(jobs, workers)
        assert [len(piece) for piece in pieces] == sizes, workers
        in_order = [job for seed in range(3) for job in jobs if job.seed == seed]
        assert [job for piece in pieces for job in piece] == in_order


def test_by_default_three_criteria_are_compared_with_the_first(content: dict[str, Any]) -> None:
    spec = from_dict(content, BenchmarkSpec)
    assert [(c.criterion, c.target) for c in jobs_of(spec)] == [
        (criterion, target)
        for criterion in ("vote", "l1", "random")
        for target in ("macs=0.7", "macs=0.5")
    ]
    assert spec.compared_with == "vote"
    only = jobs_of(spec)[0].config
    expected = {
        "model": {"name": "resnet20"},
        "data": {"source": "digits"},
        "plan": {"target": "macs=0.7"},
    }
    assert comparable(only) == comparable(from_dict(expected, RunConfig))


@pytest.mark.parametrize(
    "changes",
    [
        {"finetune": {"keep": "best"}},
        {"finetune": {"patience": 3}},
        {"finetune": {"max_minutes": 5.0}},
        {"data": {"source": "digits", "batch_size": 20}},
    ],
)
def test_settings_that_may_differ_on_resume_make_another_job(
    content: dict[str, Any], changes: dict[str, Any]
) -> None:
    one, other = (
        jobs_of(from_dict(tables, BenchmarkSpec)) for tables in (content, content | changes)
    )
    assert not {job.id for job in one} & {job.id for job in other}
    same = content | {"finetune": {"workers": 1, "checkpoint_minutes": 1.0}}
    assert {job.id for job in jobs_of(from_dict(same, BenchmarkSpec))} == {job.id for job in one}


def test_changed_user_code_makes_another_job(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    ids = []
    for code in ("", "# changed"):
        file.write_text(code)
        jobs = jobs_of(from_dict(content | {"criteria": ["l1", f"{file}:own"]}, BenchmarkSpec))
        ids.append({job.id for job in jobs})
    assert ids[0] & ids[1] == {job.id for job in jobs if job.criterion == "l1"}
    assert len(ids[0] - ids[1]) == 2


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(score_on="validation"),
        lambda content: content.update(threads=2),
        lambda content: content.update(refit={"positions": 9}),
        lambda content: content["networks"][0].update(label="other"),
        lambda content: content.update(variants={"plain": {}}),
    ],
)
def test_a_job_changes_with_anything_that_matters(content: dict[str, Any], edit: Edit) -> None:
    changed = copy.deepcopy(content)
    edit(changed)
    one, other = (jobs_of(from_dict(tables, BenchmarkSpec)) for tables in (content, changed))
    assert not {job.id for job in one} & {job.id for job in other}


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(baseline="l1"),
        lambda content: content.update(criteria=["random", "vote", "l1"]),
        lambda content: content.update(finetune={"checkpoint_minutes": 1}),
    ],
)
def test_a_job_does_not_change_with_anything_else(content: dict[str, Any], edit: Edit) -> None:
    changed = copy.deepcopy(content)
    edit(changed)
    one, other = (jobs_of(from_dict(tables, BenchmarkSpec)) for tables in (content, changed))
    assert {job.id for job in one} == {job.id for job in other}


def test_a_job_depends_on_the_content_of_the_weights_not_on_their_path(
    content: dict[str, Any], tmp_path: Path
) -> None:
    def ids(name: str, value: float, key: str | None = None) -> list[str]:
        path = tmp_path / name
        save_file({"weight": torch.full((2,), value)}, path)
        content["networks"][0] |= {"weights": str(path), "weights_key": key}
        return [job.id for job in jobs_of(from_dict(content, BenchmarkSpec))]

    assert ids("one.safetensors", 1.0) == ids("other.safetensors", 1.0)
    assert ids("one.safetensors", 1.0) != ids("one.safetensors", 2.0)
    assert ids("one.safetensors", 1.0) != ids("one.safetensors", 1.0, "ema")
    content["networks"][0]["weights"] = str(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match=r"no weights file .*none\.safetensors"):
        jobs_of(from_dict(content, BenchmarkSpec))


def test_relative_weights_are_looked_for_in_a_folder(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["networks"] = [
        {"name": "resnet20", "weights": "a.safetensors"},
        {"name": "resnet32", "weights": "/elsewhere/b.safetensors"},
        {"name": "resnet56"},
    ]
    spec = from_dict(content, BenchmarkSpec)
    weights = [network.weights for network in spec.with_weights_in(tmp_path).networks]
    assert weights == [str(tmp_path / "a.safetensors"), "/elsewhere/b.safetensors", None]
    assert spec.with_weights_in(None) is spec


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(criterion=["vote"]), "criterion"),
        (lambda c: c.update(networks=[]), "networks"),
        (lambda c: c.update(seeds=[]), "seeds"),
        (lambda c: c.update(seeds=0), "seeds"),
        (lambda c: c.update(seeds=[1, 1]), "seeds has the same value twice"),
        (
            lambda c: c["networks"][0].update(targets=["macs=0.5", "macs=0.50"]),
            "targets of .* has the same value twice",
        ),
        (lambda c: c.update(targets=["macs=2"]), "target 'macs=2' is out of range"),
        (lambda c: c.update(plan={"target": "macs=0.5"}), "use targets"),
        (lambda c: c.update(score={"criterion": "l1"}), "use criteria"),
        (lambda c: c.update(baseline="l2"), "baseline must be one of vote, l1, random"),
        (lambda c: c["networks"].append({"name": "resnet20"}), "networks has the same value"),
        (lambda c: c.pop("data"), "data"),
    ],
)
def test_a_wrong_key_is_named(content: dict[str, Any], edit: Edit, message: str) -> None:
    edit(content)
    with pytest.raises(UsageError, match=message):
        from_dict(content, BenchmarkSpec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refit.layer": "none"}, "refit.layer"),
        ({"refit": {"layers": "all"}}, "refit.layers"),
        ({"model.name": "vgg16_bn"}, "model.name"),
        ({"epochs": 3}, "epochs"),
        ({"plan.target": "macs=0.1"}, "plan.target"),
    ],
)
def test_a_change_that_is_not_allowed_is_named(
    content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    content["variants"] = {"other": changes}
    with pytest.raises(UsageError, match=message):
        jobs_of(from_dict(content, BenchmarkSpec))


def test_methods_are_named_after_their_variant() -> None:
    assert method_name("vote", "") == "vote"
    assert method_name("vote", "no refit") == "vote, no refit"
