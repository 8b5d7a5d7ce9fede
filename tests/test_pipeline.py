"""The whole method on real digits: its result, its files, and what it must not change."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runs import DigitsRun, outputs, small_config
from secateur import data
from secateur.config import DataSection, ModelSection, RunConfig
from secateur.data import DataSet, TensorImages
from secateur.experiments import run_folder
from secateur.experiments.run import run
from secateur.models import zoo
from secateur.models.score import Score
from secateur.pipeline import prune as pipeline
from secateur.pipeline import stages
from secateur.pipeline.inputs import preprocessing_of
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import RunResult, latency_notice
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.pruning.cost.latency_profiler import Stopwatch
from secateur.runtime.errors import DataError, SecateurError, UnknownName, UsageError


def prune_small(config: RunConfig, dataset: DataSet) -> Pruned:
    model = zoo.load(config.model.name, num_classes=10)
    return pipeline.prune(model, dataset, config)


def without_latency(score: Score) -> Score:
    return replace(score, latency_ms=0.0, latency_batch=0)


def test_every_stage_is_scored_on_the_test_images(digits_run: DigitsRun) -> None:
    result = digits_run.result
    assert [stage.stage for stage in result.stages] == ["before", "cut", "refit", "finetuned"]
    test_images = len(data.load("digits").test.labels)
    assert {stage.score.images for stage in result.stages} == {test_images}
    before, tuned = result.score("before"), result.score("finetuned")
    assert before is not None
    assert tuned is not None
    assert before.metric > 0.8
    assert 0.45 * before.macs < tuned.macs <= 0.5 * before.macs


def test_refit_removes_most_of_the_error_of_the_cut(digits_run: DigitsRun) -> None:
    before, cut, refit = (digits_run.result.score(s) for s in ("before", "cut", "refit"))
    assert before is not None
    assert cut is not None
    assert refit is not None
    assert refit.loss is not None
    assert cut.loss is not None
    assert refit.loss < cut.loss
    lost = before.metric - cut.metric
    assert before.metric - refit.metric < 0.5 * lost


def test_run_checks_that_the_cut_network_equals_the_masked_original(digits_run: DigitsRun) -> None:
    assert digits_run.result.equivalence_error < 1e-4


def test_run_folder_holds_its_files(digits_run: DigitsRun) -> None:
    expected = {
        *("config.toml", "plan.json", "model.safetensors", "program.json", "manifest.json"),
        *("result.json", "report.html", "log.jsonl"),
    }
    assert {path.name for path in digits_run.folder.iterdir()} == expected


def test_result_is_read_back_as_it_was(digits_run: DigitsRun) -> None:
    text = (digits_run.folder / "result.json").read_text()
    assert RunResult.model_validate_json(text) == digits_run.result


def test_result_holds_all_that_a_repetition_needs(digits_run: DigitsRun) -> None:
    result = digits_run.result
    assert result.config.data.image_size == 32
    assert result.config.data.interpolation == "bilinear"
    assert result.config.model.num_classes == 10
    assert result.environment.torch == torch.__version__
    assert result.environment.threads == torch.get_num_threads()
    assert result.finetuning is not None
    assert len(result.finetuning.epochs) == 1


def test_same_seed_gives_the_same_plan_and_scores(model_file: Path) -> None:
    config = small_config(model_file, finetune={"epochs": 1})
    dataset = data.load("digits")
    one, other = (prune_small(config, dataset) for _ in range(2))
    assert one.plan == other.plan
    assert [without_latency(s.score) for s in one.result.stages] == [
        without_latency(s.score) for s in other.result.stages
    ]
    assert torch.equal(outputs(one.model), outputs(other.model))


def test_a_cut_network_is_timed_beside_the_first_one(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"target": "macs=0.5", "rounds": 2}
    config = small_config(model_file, plan=plan, finetune={"epochs": 1})
    model, fractions = zoo.load(config.model.name, num_classes=10), iter((0.5, 0.25))

    class Measured(Stopwatch):
        def __init__(self, whole: nn.Module, *_: object, size: int, is_only_shown: bool) -> None:
            assert whole is model
            assert size == 16
            assert is_only_shown

        def fraction_left(self, smaller: nn.Module) -> float:
            assert smaller is not model
            return next(fractions)

    monkeypatch.setattr(stages, "Stopwatch", Measured)
    before, *others = pipeline.prune(model, data.load("digits"), config).result.stages
    assert before.score.latency_ms > 0
    shares = {(stage.round, stage.score.latency_ms / before.score.latency_ms) for stage in others}
    assert shares == {(1, 0.5), (2, 0.25)}


def test_another_seed_draws_other_calibration_images(model_file: Path) -> None:
    dataset = data.load("digits")
    one = prune_small(small_config(model_file), dataset)
    other = prune_small(small_config(model_file).model_copy(update={"seed": 1}), dataset)
    assert [g.scores for g in one.result.groups] != [g.scores for g in other.result.groups]


def test_network_that_is_pruned_stays_as_it_was(model_file: Path) -> None:
    config = small_config(model_file, finetune={"epochs": 1})
    model = zoo.load(config.model.name, num_classes=10).train()
    before = copy.deepcopy(model.state_dict())
    pipeline.prune(model, data.load("digits"), config)
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_label_is_read_unless_requested(model_file: Path) -> None:
    config = small_config(
        model_file,
        data={"stratified": False},
        distill={"epochs": 1},
        finetune={"epochs": 1, "label_weight": 0.0},
    )
    dataset = data.load("digits")
    assert isinstance(dataset.train, TensorImages)
    wrong = (dataset.train.labels + 3) % 10
    mislabelled = replace(dataset, train=TensorImages(dataset.train.pixels, wrong))
    one, other = prune_small(config, dataset), prune_small(config, mislabelled)
    assert one.plan == other.plan
    assert torch.equal(outputs(one.model), outputs(other.model))


@pytest.mark.parametrize(
    ("criterion", "concepts"),
    [
        *(("vote-iou", "saliency"), ("random", "evidence"), ("l1", "evidence")),
        *(("taylor", "evidence"), ("activation_std", "evidence")),
    ],
)
def test_every_criterion_and_concept_source_runs(
    model_file: Path, criterion: str, concepts: str
) -> None:
    score = {"criterion": criterion, "concepts": concepts}
    pruned = prune_small(small_config(model_file, score=score), data.load("digits"))
    assert pruned.plan.criterion == criterion
    assert pruned.result.equivalence_error < 1e-4


@pytest.mark.parametrize("target", ["macs=0.8", "params=0.5", "filters=0.6"])
def test_budgets_are_met(model_file: Path, target: str) -> None:
    pruned = prune_small(small_config(model_file, plan={"target": target}), data.load("digits"))
    before, cut = pruned.result.stages[0].score, pruned.result.stages[1].score
    filters = sum(group.filters for group in pruned.result.groups)
    removed = sum(len(group.removed) for group in pruned.result.groups)
    left = {
        "macs": cut.macs / before.macs,
        "params": cut.parameters / before.parameters,
        "filters": 1 - removed / filters,
    }
    quantity, _, fraction = target.partition("=")
    assert float(fraction) - 0.1 < left[quantity] <= float(fraction)


def test_a_run_with_a_target_of_latency_keeps_the_times(model_file: Path, tmp_path: Path) -> None:
    # All of it: how much faster the small network gets is not for a test to rely on.
    config = small_config(model_file, plan={"target": "latency=1"})
    run(config, tmp_path / "run")
    table = LatencyTable.from_json((tmp_path / "run" / run_folder.LATENCY).read_text())
    assert [layer.layer for layer in table.layers] == ["stem.0", "conv1", "conv2", "conv3", "head"]
    log = [
        json.loads(line) for line in (tmp_path / "run" / run_folder.LOG).read_text().splitlines()
    ]
    (event,) = (entry for entry in log if entry["event"] == "latency")
    assert event["hardware"] == table.hardware.model_dump()


def test_steps_can_be_left_out(model_file: Path) -> None:
    config = small_config(model_file, refit={"layers": "none", "recalibrate_batchnorm": False})
    pruned = prune_small(config, data.load("digits"))
    assert [stage.stage for stage in pruned.result.stages] == ["before", "cut"]
    assert pruned.result.refit == ()


def test_norms_are_a_part_of_the_refit(model_file: Path) -> None:
    dataset = data.load("digits")
    change = prune_small(small_config(model_file), dataset).result.batchnorm_recalibration
    assert change is not None
    assert change.divergence_after <= change.divergence_before
    without = prune_small(
        small_config(model_file, refit={"recalibrate_batchnorm": False}), dataset
    ).result
    assert without.batchnorm_recalibration is None
    alone = prune_small(small_config(model_file, refit={"layers": "none"}), dataset).result
    assert [stage.stage for stage in alone.stages] == ["before", "cut", "refit"]
    assert alone.refit == ()
    assert alone.batchnorm_recalibration is not None
    assert (
        alone.batchnorm_recalibration.divergence_after
        <= alone.batchnorm_recalibration.divergence_before
    )


def test_images_are_resized_as_the_configuration_says_or_the_network_wants() -> None:
    model = ModelSection(name="torchvision:efficientnet_b0")
    config = RunConfig(model=model, data=DataSection(source="digits"))
    assert preprocessing_of(config).interpolation == "bicubic"
    config = RunConfig(model=model, data=DataSection(source="digits", interpolation="bilinear"))
    assert preprocessing_of(config).interpolation == "bilinear"


def test_distillation_is_a_stage_of_its_own(model_file: Path) -> None:
    config = small_config(
        model_file, distill={"epochs": 3, "flip": False}, finetune={"epochs": 1, "flip": False}
    )
    result = prune_small(config, data.load("digits")).result
    names = [stage.stage for stage in result.stages]
    assert names == ["before", "cut", "refit", "distilled", "finetuned"]
    assert result.distillation is not None
    assert len(result.distillation.epochs) == 3
    assert result.finetuning is not None
    assert len(result.finetuning.epochs) == 1
    kept = [result.distillation.before, *(epoch.held_out for epoch in result.distillation.epochs)]
    best = kept[result.distillation.chosen]
    assert best.divergence == min(candidate.divergence for candidate in kept)


def test_consumers_alone_can_be_refitted(model_file: Path) -> None:
    dataset = data.load("digits")
    everywhere = {"allocation": "uniform"}  # so that both groups lose something
    config = small_config(model_file, plan=everywhere, refit={"layers": "consumers"})
    refitted = [layer.layer for layer in prune_small(config, dataset).result.refit]
    config = small_config(model_file, plan=everywhere)
    every = [layer.layer for layer in prune_small(config, dataset).result.refit]
    assert refitted == ["conv2", "head"]
    assert every == ["conv2", "conv3", "head"]


def test_calibration_images_are_training_images_that_are_not_held_out() -> None:
    dataset = data.load("digits")
    assert isinstance(dataset.validation, TensorImages)
    assert isinstance(dataset.test, TensorImages)
    calibration = data.draw_calibration_images(dataset.train, 300)
    assert isinstance(calibration, TensorImages)

    def keys(images: TensorImages) -> set[bytes]:
        return {image.numpy().tobytes() for image in images.pixels[:]}

    assert keys(calibration).isdisjoint(keys(dataset.validation))
    assert keys(calibration).isdisjoint(keys(dataset.test))


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"score": {"criterion": "vote-respond"}}, UnknownName, "did you mean vote-response"),
        ({"score": {"concepts": "evidense"}}, UnknownName, "did you mean evidence"),
        ({"model": {"name": "resnet21"}}, UnknownName, "did you mean resnet20"),
        (
            {"model": {"name": "resnet20", "allow_untrained": False}},
            UsageError,
            "resnet20 needs --weights",
        ),
        ({"data": {"source": "folder:nowhere"}}, DataError, "no folder nowhere"),
        ({"plan": {"target": "macs=0.000001"}}, UsageError, "out of reach"),
    ],
)
def test_a_run_that_fails_leaves_nothing(
    tmp_path: Path,
    model_file: Path,
    section: dict[str, dict[str, object]],
    error: type[SecateurError],
    message: str,
) -> None:
    parent = tmp_path / "runs"
    parent.mkdir()
    with pytest.raises(error, match=message):
        run(small_config(model_file, **section), parent / "a")
    assert list(parent.iterdir()) == []


def test_log_says_why_a_run_has_no_program(model_file: Path, tmp_path: Path) -> None:
    text = model_file.read_text().replace("x = self.stem(x).relu()", "x = self.stem(x).erfc()")
    model_file.write_text(text)
    run(small_config(model_file), tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    (reason,) = [event["reason"] for event in events if event["event"] == "no_program"]
    assert reason == "the operation aten.erfc can't be part of a program"
    assert not (tmp_path / "run" / "program.json").exists()


def test_rounds_reach_the_target_step_by_step(model_file: Path, tmp_path: Path) -> None:
    training = {"epochs": 1, "batch_size": 64, "warmup_steps": 0, "flip": False}
    plan = {"target": "macs=0.4", "rounds": 2}
    config = small_config(model_file, plan=plan, finetune=training)
    folder = tmp_path / "run"
    result = run(config, folder)
    assert [(stage.stage, stage.round) for stage in result.stages] == [
        *(("before", 1), ("cut", 1), ("refit", 1), ("finetuned", 1)),
        *(("cut", 2), ("refit", 2), ("finetuned", 2)),
    ]
    macs = [stage.score.macs / result.stages[0].score.macs for stage in result.stages]
    assert 0.5 < macs[1] <= 0.4**0.5
    assert 0.3 < macs[-1] <= 0.4
    model = zoo.load(config.model.name, num_classes=10)
    assert result.plan_hash == run_folder.read_plan(folder).hash
    network = run_folder.load(folder, architecture=model)
    assert torch.equal(outputs(network), outputs(run_folder.load_program(folder)))
    pruned = pipeline.prune(model, data.load("digits"), config)
    assert pruned.plan == run_folder.read_plan(folder)
    assert torch.equal(outputs(network), outputs(pruned.model))
    for group in result.groups:
        assert len(group.scores) == group.filters
        assert len(set(group.removed)) == len(group.removed) < group.filters


@pytest.mark.parametrize(
    ("rounds", "steps"),
    [
        (2, ["prune_round"]),
        pytest.param(3, ["prune_round", "finetune", "prune_round"], marks=pytest.mark.slow),
    ],
)
def test_rounds_resume_where_they_were_interrupted(
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds: int,
    steps: list[str],
) -> None:
    training = {"epochs": 1, "batch_size": 64, "warmup_steps": 0, "flip": False}
    plan = {"target": "macs=0.4", "rounds": rounds}
    config = small_config(model_file, plan=plan, finetune=training)
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    run(config, alone)
    interrupted = 0
    for name in steps:
        step, calls = getattr(pipeline, name), 0

        def once(*arguments: Any, step: Any = step, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise KeyboardInterrupt
            return step(*arguments, **options)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(pipeline, name, once)
            run(config, parts, resume=True)
            interrupted -= 1
        interrupted += 1
    assert interrupted > 0
    run(config, parts, resume=True)
    for name in ("plan.json", "model.safetensors"):
        assert (parts / name).read_bytes() == (alone / name).read_bytes()


def cost(macs: int, latency_ms: float) -> Score:
    return Score(0.9, 1.0, 0.1, 100, macs, 10, latency_ms)


@pytest.mark.parametrize(
    ("after", "round_to", "words"),
    [
        (cost(50, 9.2), 1, "Latency fell by only 8% while the MACs fell by 50% (16 images"),
        (cost(50, 7.6), 1, "can help: --round-to 16, another batch size, --engine onnx"),
        (cost(50, 9.9), 16, "can help: another batch size, --engine onnxruntime, if you"),
        (cost(50, 12.0), 1, "Latency did not fall while the MACs fell by 50%"),
        (cost(90, 9.96), 1, "Latency did not fall while the MACs fell by 10%"),
    ],
)
def test_a_latency_that_lags_behind_the_macs_is_said(
    after: Score, round_to: int, words: str
) -> None:
    notice = latency_notice(cost(100, 10.0), after, round_to)
    assert words in notice
    assert "--actions" not in notice
    of_split = latency_notice(cost(100, 10.0), after, round_to, is_split=True)
    assert "What can help: --actions channels (two thin layers take longer than one), " in of_split


@pytest.mark.parametrize(
    "after", [cost(50, 7.5), cost(50, 5.0), cost(96, 10.5), cost(100, 10.0), cost(50, math.nan)]
)
def test_a_latency_that_follows_the_macs_is_not_commented(after: Score) -> None:
    assert latency_notice(cost(100, 10.0), after, 1) == ""


def test_a_run_says_where_it_got_smaller_but_not_faster(digits_run: DigitsRun) -> None:
    first, last = digits_run.result.stages[0], digits_run.result.stages[-1]
    slow = replace(last.score, latency_ms=first.score.latency_ms)
    slower = (*digits_run.result.stages[:-1], last.model_copy(update={"score": slow}))
    result = digits_run.result.model_copy(update={"stages": slower})
    assert any(notice.startswith("Latency did not fall") for notice in result.notices)
