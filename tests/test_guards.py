"""Results that are worse than before are dropped, and files of another network are refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fault_case import Case
from networks import Chain, random_images
from secateur import apply_plan, build_dependency_graph
from secateur.config import Budget, RefitSection
from secateur.data import Batch
from secateur.experiments import run as runs
from secateur.experiments import run_folder
from secateur.graph.dependency import DependencyGraph
from secateur.models import zoo
from secateur.models.score import Score
from secateur.pipeline import stages
from secateur.pipeline.result import RESULT, read_result
from secateur.pruning.plan import PruningPlan, make_plan
from secateur.pruning.refit import refit_and_check
from secateur.pruning.refit.layerwise import RefitInputs
from secateur.pruning.refit.refit_and_check import RefitImages
from secateur.runtime.errors import DataError, RunFolderError, UsageError
from secateur.runtime.hashing import architecture_hash, weights_hash
from secateur.training.outcome import Epoch, has_collapsed


@pytest.fixture
def case(tmp_path: Path) -> Case:
    small_case = Case(tmp_path, report_images=0)
    small_case.write()
    return small_case


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained nothing, to be copied."""
    case = Case(tmp_path_factory.mktemp("cut"), report_images=0)
    case.write()
    runs.run(case.config(epochs=0), case.folder / "run")
    return case.folder / "run"


# --- the better one stays ----------------------------------------------------------------------


def chain_and_cut() -> tuple[nn.Module, nn.Module, DependencyGraph, PruningPlan, list[Batch]]:
    model = Chain().eval()
    images = random_images(48)
    dependencies = build_dependency_graph(model, images[:4])
    scores = {name: torch.arange(float(len(group))) for name, group in dependencies.groups.items()}
    plan = make_plan(scores, dependencies, Budget("macs", 0.6), "test")
    parts = torch.arange(48).split(12)
    batches = [Batch(images[part], torch.zeros(len(part)).long(), part) for part in parts]
    return model, apply_plan(model, dependencies, plan), dependencies, plan, batches


def test_a_refit_that_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, smaller, dependencies, plan, batches = chain_and_cut()
    before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}

    def spoil(*_: object, **__: object) -> tuple[()]:
        with torch.no_grad():
            for parameter in smaller.parameters():
                parameter.mul_(-3.0)
        return ()

    settings = RefitSection(recalibrate_batchnorm=False)
    inputs = RefitInputs(model, smaller, dependencies, plan.removed)
    parts = RefitImages(lambda: batches, lambda: batches[:3], lambda: batches[3:])
    with monkeypatch.context() as patch:
        patch.setattr(refit_and_check, "refit", spoil)
        result = refit_and_check.refit_and_check(inputs, parts, settings, seed=0)
    assert result.check is not None
    assert not result.check.is_kept
    assert result.check.divergence_refit > result.check.divergence_cut > 0
    assert all(torch.equal(before[name], t) for name, t in smaller.state_dict().items())

    result = refit_and_check.refit_and_check(inputs, parts, settings, seed=0)
    assert result.check is not None
    assert result.check.is_kept
    assert result.check.divergence_refit < result.check.divergence_cut
    assert any(not torch.equal(before[name], t) for name, t in smaller.state_dict().items())


def test_a_refit_that_gives_no_numbers_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, smaller, dependencies, plan, batches = chain_and_cut()

    def spoil(*_: object, **__: object) -> tuple[()]:
        with torch.no_grad():
            next(smaller.parameters()).fill_(float("nan"))
        return ()

    monkeypatch.setattr(refit_and_check, "refit", spoil)
    inputs = RefitInputs(model, smaller, dependencies, plan.removed)
    parts = RefitImages(lambda: batches, lambda: batches[:3], lambda: batches[3:])
    settings = RefitSection(recalibrate_batchnorm=False)
    result = refit_and_check.refit_and_check(inputs, parts, settings, seed=0)
    assert result.check is not None
    assert not result.check.is_kept
    assert all(bool(tensor.isfinite().all()) for tensor in smaller.state_dict().values())


@pytest.mark.parametrize(
    ("validations", "collapsed"),
    [
        ((), False),
        ((None,), False),
        ((0.5, 0.81), False),
        ((0.95, 0.79), True),
        ((0.0, 0.9), False),
    ],
)
def test_a_collapse_is_a_large_fall_at_the_end(
    validations: tuple[float | None, ...], collapsed: bool
) -> None:
    epochs = [Epoch(number, 1.0, 0.1, accuracy) for number, accuracy in enumerate(validations, 1)]
    assert has_collapsed(0.9, epochs) == collapsed


def first_grades(*fractions: float) -> Callable[..., Score]:
    """`evaluate`, but its first calls, on the validation images before and after, find these."""
    evaluate, remaining = vars(stages)["evaluate"], iter(fractions)

    def graded(*arguments: Any, **options: Any) -> Score:
        score: Score = evaluate(*arguments, **options)
        return replace(score, metric=next(remaining, score.metric))

    return graded


def test_a_training_that_breaks_the_network_leaves_it_as_it_was(
    case: Case, cut_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(cut_run, case.folder / "run"))
    before = load_file(run / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", first_grades(0.9, 0.4))
        changes = {"epochs": 1, "learning_rate": 0.5}
        result = runs.finetune(run, run, changes, named={"model.name": case.model_name})
    after = load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.finetuning is not None
    assert result.finetuning.kept == "start"
    assert result.stages[-1].score == result.stages[-2].score
    (notice,) = [notice for notice in result.notices if "fell from" in notice]
    assert "fell from 90.00 to 40.00 %" in notice
    assert "fell from 90.00 to 40.00 %" in (run / "report.html").read_text()
    assert read_result(run) == result


def test_a_second_training_that_breaks_the_network_has_the_score_of_the_first(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = case.folder / "run"
    first = runs.run(case.config(epochs=1), run)
    came = replace(first.stages[-1].score, metric=0.77)
    changed = first.model_copy(
        update={"stages": (*first.stages[:-1], first.stages[-1].model_copy(update={"score": came}))}
    )
    (run / RESULT).write_text(changed.model_dump_json())
    monkeypatch.setattr(stages, "has_collapsed", lambda before, epochs: True)
    result = runs.finetune(run, run, {"epochs": 1}, named={"model.name": case.model_name})
    assert result.finetuning is not None
    assert result.finetuning.kept == "start"
    assert result.stages[-1].score == came


def test_a_finished_run_is_not_resumed_with_other_rules(case: Case) -> None:
    run = case.folder / "run"
    runs.run(case.config(epochs=1), run)
    changed = case.config(epochs=1)
    other = changed.finetune.model_copy(update={"keep": "best"})
    with pytest.raises(UsageError, match=r"made with finetune\.keep = last, not best"):
        runs.run(changed.model_copy(update={"finetune": other}), run, resume=True)
    same = changed.finetune.model_copy(update={"workers": 0, "checkpoint_minutes": 1.0})
    again = runs.run(changed.model_copy(update={"finetune": same}), run, resume=True)
    assert again.finetuning is not None


def test_a_small_fall_is_said_and_the_last_epoch_stays(
    case: Case, cut_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(cut_run, case.folder / "run"))
    monkeypatch.setattr(stages, "evaluate", first_grades(0.9, 0.85))
    result = runs.finetune(run, run, {"epochs": 1}, named={"model.name": case.model_name})
    assert result.finetuning is not None
    assert result.finetuning.kept == "last"
    (notice,) = [notice for notice in result.notices if "fell from" in notice]
    assert "fell from 90.00 to 85.00 %" in notice
    assert "--keep best" in notice


# --- of another network ------------------------------------------------------------------------


def test_hashes_of_other_architectures_and_weights_differ() -> None:
    shapes = {"a": (2, 3), "b": (4,)}
    assert architecture_hash(shapes) == architecture_hash(dict(reversed(shapes.items())))
    assert architecture_hash(shapes) != architecture_hash({**shapes, "b": (5,)})
    assert architecture_hash(shapes) != architecture_hash({"a": (2, 3), "c": (4,)})
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(()).bfloat16()}
    same = {"b": tensors["b"], "a": tensors["a"].T.contiguous().T}
    assert weights_hash(tensors) == weights_hash(same)
    assert weights_hash(tensors) != weights_hash({**tensors, "a": tensors["a"] + 1e-6})
    assert weights_hash(tensors) != weights_hash({**tensors, "a": tensors["a"].reshape(3, 2)})


def test_a_plan_does_not_cut_another_architecture() -> None:
    model, _, _, plan, _ = chain_and_cut()
    assert plan.architecture is not None
    other = nn.Sequential(model, nn.Identity())  # the same layers under other names
    with pytest.raises(RunFolderError, match="made for another network"):
        apply_plan(other, build_dependency_graph(other, random_images(4)), plan)
    by_hand = PruningPlan(plan.removed, plan.budget, plan.criterion)
    with pytest.raises(RunFolderError, match="not a prunable group"):
        apply_plan(other, build_dependency_graph(other, random_images(4)), by_hand)


def test_a_plan_keeps_its_hashes_in_json_and_older_ones_are_read() -> None:
    plan = replace(chain_and_cut()[3], weights="abc")
    assert PruningPlan.from_json(plan.to_json()) == plan
    older = PruningPlan(plan.removed, plan.budget, plan.criterion)
    assert "architecture" not in older.to_json()
    assert PruningPlan.from_json(older.to_json()) == older


def test_a_run_is_not_trained_by_another_teacher_than_it_was_cut_from(case: Case) -> None:
    torch.manual_seed(3)
    weights = case.folder / "base.safetensors"
    save_file(zoo.load(case.model_name, num_classes=3).state_dict(), weights)
    config = case.config(epochs=0)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"weights": str(weights)})}
    )
    run = case.folder / "run"
    runs.run(config, run)
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(RunFolderError, match=r"made from other weights than .*base\.safetensors"):
        runs.finetune(run, run, {"epochs": 1}, named={"model.name": case.model_name})
    with pytest.raises(RunFolderError, match="made from other weights"):
        runs.report(run, named={"model.name": case.model_name}, images=8)
    run_folder.load(run, architecture=zoo.load(case.model_name, num_classes=3))  # any will do


def test_a_strangers_run_names_no_code_that_is_run(case: Case) -> None:
    """A run folder with a file of code in it, which says that its network is from there."""
    run = case.folder / "run"
    runs.run(case.config(epochs=0), run)
    (case.folder / "own.py").rename(case.folder / "mine.py")
    (run / "own.py").write_text("from pathlib import Path; Path(__file__).with_name('ran').touch()")
    text = (run / "result.json").read_text()
    (run / "result.json").write_text(text.replace(case.model_name, f"{run / 'own.py'}:small"))
    with pytest.raises(UsageError, match=r"from a file of code, .*own\.py:small: if that is yours"):
        runs.finetune(run, run, {"epochs": 1})
    with pytest.raises(UsageError, match="--model"):
        runs.report(run, images=8)
    runs.report(run, images=0)
    assert not (run / "ran").exists()
    moved = f"{case.folder / 'mine.py'}:small"
    text, factory = (run / "result.json").read_text(), f'"criterion": "{run / "own.py"}:make"'
    changed = re.sub(r'"criterion": "vote"', factory, text)
    assert changed != text
    (run / "result.json").write_text(changed)
    runs.report(run, named={"model.name": moved}, images=8)
    assert not (run / "ran").exists()
    runs.finetune(run, case.folder / "finetuned", {"epochs": 1}, named={"model.name": moved})
    assert not (run / "ran").exists()


def test_an_interrupted_fine_tuning_that_had_ended_is_not_done_again(
    case: Case, cut_run: Path
) -> None:
    run = Path(shutil.copytree(cut_run, case.folder / "run"))
    copy = case.folder / "copy"
    shutil.copytree(run, copy)
    changes = {"epochs": 1}
    runs.finetune(run, run, changes, named={"model.name": case.model_name})
    weights = (run / "model.safetensors").read_bytes()
    (run / "report.html").unlink()  # as if it had been killed before the report
    runs.finetune(run, run, changes, named={"model.name": case.model_name}, resume=True)
    assert (run / "model.safetensors").read_bytes() == weights
    assert (run / "report.html").is_file()
    runs.finetune(copy, copy, changes, named={"model.name": case.model_name}, resume=True)
    assert (copy / "model.safetensors").read_bytes() == weights


def test_a_mistyped_path_of_the_data_loses_no_checkpoints(case: Case, cut_run: Path) -> None:
    run = Path(shutil.copytree(cut_run, case.folder / "run"))
    left = run / "checkpoints" / "000000001.safetensors"
    left.parent.mkdir()
    left.touch()
    changes = {"epochs": 1}
    mistyped = {"model.name": case.model_name, "data.source": "folder:nowhere"}
    with pytest.raises(DataError):
        runs.finetune(run, run, changes, named=mistyped)
    assert left.exists()
    runs.finetune(run, run, changes, named={"model.name": case.model_name})
    assert not left.parent.exists()
