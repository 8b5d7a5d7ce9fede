"""The command line: exit codes, one clear line for an error, results on stdout."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.core import TyperGroup
from typer.main import get_command

import secateur
from layouts import write_classes
from runs import DigitsRun, small_config
from secateur import data
from secateur.cli import app
from secateur.experiments import int8_export
from secateur.experiments import onnx_export as export
from secateur.experiments import run as runs
from secateur.experiments.inspect import filters_needed
from secateur.models import zoo
from secateur.pruning.outcome import SENSITIVITY_COLUMNS
from secateur.runtime.errors import DataError
from secateur.runtime.timing import Rounds
from secateur.scoring import concepts


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class Call:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.setenv("COLUMNS", "80")
    return Call(monkeypatch, capsys)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes with six images each, of 20×24 pixels."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            colour = (40 * number, 255 - 40 * number, 120 if name == "cat" else 10)
            image = Image.new("RGB", (20, 24), colour)
            image.save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_help_names_every_command(call: Call) -> None:
    outcome = call("--help")
    assert outcome.code == 0
    for command in (
        "prune",
        "finetune",
        "train",
        "evaluate",
        "inspect",
        "compare",
        "export",
        "models",
        "demo",
    ):
        assert command in outcome.out


@pytest.mark.parametrize(
    "command",
    ["prune", "finetune", "train", "evaluate", "inspect", "compare", "export", "models", "demo"],
)
def test_every_command_has_help(call: Call, command: str) -> None:
    outcome = call(command, "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


def test_help_says_what_the_defaults_are(call: Call) -> None:
    text = call("prune", "--help").out
    for default in ("macs=0.5", "vote", "auto", "2000", "downstream", "0.02"):
        assert f"default: {default}]" in " ".join(text.replace("│", " ").split())


def test_version(call: Call) -> None:
    assert call("--version").out.strip() == secateur.__version__


def test_the_package_is_the_command_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["secateur", "--version"])
    with contextlib.suppress(SystemExit):
        runpy.run_module("secateur", run_name="__main__")
    assert capsys.readouterr().out.strip() == secateur.__version__


def test_prune_on_a_folder_of_images(call: Call, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["prune", "-m", "resnet20", "-d", f"folder:{images}", "-t", "macs=0.6"]
    options = ["--allow-untrained", "--no-finetune", "--set", "report.images=0", "-o", run]
    outcome = call(*arguments, *options)
    assert outcome.code == 0
    first, *stages = outcome.err.splitlines()
    assert first.startswith("stages: score original → score filters and cut → refit; about ")
    assert [line.partition(":")[0].partition(" ·")[0] for line in stages] == [
        "score original",
        "score filters and cut",
        "refit",
        "report",
    ]
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["before", "cut", "refit"]
    assert max(len(line) for line in lines[:4]) <= 80
    assert lines[-1] == f"report: {run / 'report.html'}"
    scored = call("evaluate", run, "--json")
    assert scored.code == 0
    recorded = json.loads((run / "result.json").read_text())["stages"][-1]["score"]
    printed = json.loads(scored.out)
    assert "has no test part" in printed.pop("notes")[0]
    assert printed.pop("original_latency_ms") > 0
    timed = {"latency_ms": 0, "latency_batch": 0}  # both depend on what else the machine does
    assert printed | timed == recorded | timed


def test_json_on_stdout_is_the_result(call: Call, model_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        "prune",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    options = ["--calibration-images", 60, "--no-finetune", "--set", "report.images=0"]
    outcome = call(*arguments, *options, "--json", "-o", run)
    assert outcome.code == 0
    assert json.loads(outcome.out) == json.loads((run / "result.json").read_text())


def test_prune_distills_and_skips_batch_norm_on_request(
    call: Call, model_file: Path, tmp_path: Path
) -> None:
    arguments = [
        "prune",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    options = [
        "--calibration-images",
        60,
        "--no-finetune",
        "--no-recalibrate-batchnorm",
        "--distill",
        2,
        "--set",
        "report.images=0",
    ]
    outcome = call(*arguments, *options, "-o", tmp_path / "run")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["before", "cut", "refit", "distilled"]
    assert max(len(line) for line in lines[:5]) <= 80
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["batchnorm_recalibration"] is None
    assert len(result["distillation"]["epochs"]) == 2
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "distill" for line in log) == 2


def test_the_demonstration_takes_data_and_weights_of_ones_own(
    call: Call, images: Path, tmp_path: Path
) -> None:
    weights, run = tmp_path / "weights.safetensors", tmp_path / "run"
    save_file(zoo.load("resnet20", num_classes=2).state_dict(), weights)
    assert call("demo", "-w", weights, "-o", run).code == 2  # without data
    outcome = call("demo", "-d", f"folder:{images}", "-w", weights, "-o", run)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"report: {run / 'report.html'}"


def test_options_go_before_the_file(call: Call, model_file: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'seed = 3\n[model]\nname = "{model_file}:small"\nallow_untrained = true\n'
        '[data]\nsource = "digits"\nimage_size = 32\ncalibration_images = 60\n'
        '[plan]\ntarget = "macs=0.9"\n[finetune]\nepochs = 0\n[report]\nimages = 0\n'
    )
    run = tmp_path / "run"
    assert call("prune", "-c", config, "-t", "macs=0.8", "-o", run).code == 0
    saved = json.loads((run / "result.json").read_text())["config"]
    assert saved["plan"]["target"] == "macs=0.8"
    assert saved["seed"] == 3


def test_evaluate_a_named_network(call: Call, digits_run: DigitsRun) -> None:
    weights = digits_run.config.model.weights
    outcome = call("evaluate", "-m", "resnet20", "-w", weights, "-d", "digits")
    assert outcome.code == 0
    before = digits_run.result.score("before")
    assert before is not None
    assert f"{100 * before.metric:.2f} %" in outcome.out


def test_inspect_lists_frozen_layers_with_reasons(call: Call, digits_run: DigitsRun) -> None:
    weights = digits_run.config.model.weights
    common = [
        "inspect",
        "-m",
        "resnet20",
        "-w",
        weights,
        "-d",
        "digits",
        "--calibration-images",
        100,
    ]
    outcome = call(*common)
    assert outcome.code == 0
    assert "written to the network's output" in " ".join(outcome.out.split())
    printed = json.loads(
        call(*common, "--criterion", "l2", "--criterion", "vote-iou", "--json").out
    )
    assert {group["layer"] for group in printed["groups"]} == {
        group.name for group in digits_run.result.groups
    }
    first = printed["groups"][0]
    assert set(first["scores"]) == {"l2", "vote-iou"}
    assert len(first["concepts"]) == first["filters"] == 16
    assert all(0 <= seen["iou"] <= 1 for seen in first["concepts"])
    for group in printed["groups"]:
        counts = [seen["concept"] for seen in group["concepts"] if seen["is_detector"]]
        assert group["detectors"] == {name: counts.count(name) for name in counts}
        assert group["unique_detectors"] == len(set(counts))
        assert len(group["top_images"]) == group["filters"]
        for numbers in group["top_images"]:
            assert len(set(numbers)) == len(numbers) == 5
            assert all(0 <= number < printed["calibration_images"] for number in numbers)


def test_inspect_writes_pictures(call: Call, model_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    common = [
        "inspect",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    outcome = call(*common, "--calibration-images", 60, "--pictures", folder, "--json")
    assert outcome.code == 0
    groups = json.loads(outcome.out)["groups"]
    pictures = {f"{group['layer']}.png" for group in groups}
    assert {path.name for path in folder.iterdir()} == {*pictures, "index.html"}
    index = (folder / "index.html").read_text()
    for group in groups:
        best = max(concept["iou"] for concept in group["concepts"])
        part = index.partition(f'src="{group["layer"]}.png"')[2]
        numbers = re.findall(r"<tr><td>(\d+)</td><td>[^<]*</td><td>([\d.]+)</td>", part)
        assert float(numbers[0][1]) == pytest.approx(best, abs=1e-3)
        assert f"{group['filters']} filters" in index
    for path in map(folder.joinpath, pictures):
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 10


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Six images of 20×24 pixels with a bright square on the left or the right, and its mask."""
    folder = tmp_path / "annotated"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(6):
        image, mask = Image.new("RGB", (20, 24), (10, 60, 90)), Image.new("L", (20, 24), 0)
        left = 2 if number % 2 else 11
        image.paste((240, 200, 40 * number), (left, 6, left + 7, 18))
        mask.paste(1 + number % 2, (left, 6, left + 7, 18))
        image.save(folder / "images" / f"{number}.png")
        mask.save(folder / "masks" / f"{number}.png")
    (folder / "classes.json").write_text(json.dumps(["background", "right", "left"]))
    return folder


def test_inspect_with_annotated_concepts_needs_no_data(
    call: Call, model_file: Path, masks: Path
) -> None:
    common = ["inspect", "-m", f"{model_file}:small", "--allow-untrained", "--image-size", 32]
    source = ["--concepts", f"masks:{masks}"]
    outcome = call(*common, *source, "--num-classes", 4, "--json")
    assert outcome.code == 0, outcome.err
    printed = json.loads(outcome.out)
    assert printed["calibration_images"] == 6
    assert printed["concept_source"] == f"masks:{masks}"
    seen = {concept["concept"] for group in printed["groups"] for concept in group["concepts"]}
    assert seen <= {"left", "right"}
    assert call(*common, *source).code == 0  # with as many classes as the function gives


def test_inspect_shows_and_writes_the_sensitivity(
    call: Call, model_file: Path, tmp_path: Path
) -> None:
    network = ["inspect", "-m", f"{model_file}:small", "--allow-untrained", "-d", "digits"]
    common = [*network, "--image-size", 32, "--calibration-images", 60, "--criterion", "l1"]
    table = tmp_path / "curves.csv"
    outcome = call(*common, "--sensitivity", table)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[1].split() == ["layer", "filters", "−25%", "−50%", "−75%"]
    assert lines[-1] == f"written: {table}"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert tuple(rows[0]) == SENSITIVITY_COLUMNS
    conv1 = [float(row["error"]) for row in rows if row["layer"] == "conv1"]
    assert conv1[0] == 0
    assert max(conv1) > 0
    assert f"{conv1[round(0.5 * (len(conv1) - 1))]:.3g}" in lines[2].split()
    assert call(*common, "--sensitivity", tmp_path / "curves.png").code == 2
    assert call(*common, "--sensitivity", table, "--layer", "conv1").code == 2


def test_inspect_one_layer(call: Call, model_file: Path) -> None:
    common = [
        "inspect",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    outcome = call(*common, "--calibration-images", 60, "--layer", "conv1")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 1 + 12
    outcome = call(*common, "--calibration-images", 60, "--layer", "conv11")
    assert (outcome.code, outcome.out) == (2, "")
    assert "did you mean conv1" in outcome.err


def test_inspect_one_filter(call: Call, model_file: Path) -> None:
    common = [
        "inspect",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    common += ["--calibration-images", 60]
    printed = json.loads(call(*common, "--json").out)
    (group,) = (group for group in printed["groups"] if group["layer"] == "conv1")
    outcome = call(*common, "--layer", "conv1", "--filter", 3)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "conv1, filter 3 of 12"
    score = group["scores"]["vote"][3]
    rank = 1 + sum(other > score for other in group["scores"]["vote"])
    assert lines[1] == f"vote: {score:.4g}, rank {rank} of 12"
    assert lines[2].endswith(f"IoU {group['concepts'][3]['iou']:.3f}")
    rows = group["top_regions"][3]
    assert len(rows) == len(rows[0]) == 14
    assert [line.strip() for line in lines[4:]] == [
        row.replace("#", "██").replace(".", "··") for row in rows
    ]
    assert max(map(len, lines)) <= 80
    outcome = call(*common, "--layer", "conv1", "--filter", 12)
    assert (outcome.code, outcome.out) == (2, "")
    assert "filters 0 to 11, not 12" in outcome.err
    outcome = call(*common, "--filter", 3)
    assert outcome.code == 2
    assert "--layer" in outcome.err


def test_the_picture_of_a_network_fits_a_terminal(call: Call, model_file: Path) -> None:
    common = [
        "inspect",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    outcome = call(*common, "--calibration-images", 60)
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in outcome.out  # no colours where nobody sees them
    head = lines[0].split()
    assert head == ["layer", "filters", "needed", "MACs", "%", "detectors"]
    shares = {line.split()[0]: line.count("█") for line in lines[1:3]}
    assert max(shares.values()) == 8
    assert "stem.0" in outcome.out


@pytest.mark.parametrize(
    ("votes", "needed"),
    [([1.0] * 10, 9), ([10.0, 0.0, 0.0], 1), ([5.0, 4.0, 1.0], 2), ([0.0, 0.0], 1)],
)
def test_filters_that_hold_most_of_the_votes(votes: list[float], needed: int) -> None:
    assert filters_needed(votes) == needed


def test_inspect_names_the_pattern_that_excludes_a_layer(call: Call, model_file: Path) -> None:
    common = [
        "inspect",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    outcome = call(*common, "--calibration-images", 60, "--exclude", "conv1", "--json")
    assert outcome.code == 0
    frozen = {group["layer"]: group["reason"] for group in json.loads(outcome.out)["frozen"]}
    assert frozen["conv1"] == "excluded by 'conv1'"
    outcome = call(*common, "--exclude", "conv9")
    assert outcome.code == 2
    assert "layer to exclude 'conv9'" in outcome.err


def test_prune_excludes_rounds_and_keeps_a_minimum(
    call: Call, model_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    common = [
        "prune",
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        "digits",
        "--image-size",
        32,
    ]
    options = ["--exclude", "conv1", "--round-to", 4, "--min-filters", 8, "--no-finetune"]
    target = ["--target", "filters=0.5", "--calibration-images", 60, "--refit", "none"]
    outcome = call(*common, *options, *target, "-o", folder, "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert [group["name"] for group in result["groups"]] == ["conv3"]
    assert len(result["groups"][0]["removed"]) == 8
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["exclude"] == ["conv1"]


def test_inspect_a_head_with_more_classes_than_the_data(call: Call, images: Path) -> None:
    common = ["inspect", "-m", "resnet20", "--allow-untrained", "-d", f"folder:{images}"]
    outcome = call(*common, "--num-classes", 7, "--json")
    assert outcome.code == 0
    seen = {c["concept"] for g in json.loads(outcome.out)["groups"] for c in g["concepts"]}
    assert seen <= {"cat", "dog", *(f"class {number}" for number in range(2, 7))}


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("secateur rep", {"report"}),
        ("secateur prune --criterion vote-", {"vote-response", "vote-iou"}),
        ("secateur inspect --criterion fp", {"fpgm"}),
        ("secateur prune --model resnet5", {"resnet56"}),
        ("secateur prune -d cifar", {"cifar10", "cifar100"}),
        ("secateur prune --concepts sal", {"saliency"}),
    ],
)
def test_shells_complete_names(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: str, completions: set[str]
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # as the installed command
    monkeypatch.setenv("_SECATEUR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert set(call().out.split()) == completions


def test_every_command_can_print_json() -> None:
    group = get_command(app.app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        assert any("--json" in option.opts for option in command.params), name


def test_report_is_written_anew_or_as_pictures(
    call: Call, digits_run: DigitsRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(digits_run.folder, folder)
    outcome = call("report", folder, "--images", 0)
    assert (outcome.code, outcome.out) == (0, f"written: {folder / 'report.html'}\n")
    outcome = call("report", folder, "--images", 0, "--format", "png", "--json")
    assert outcome.code == 0
    written = json.loads(outcome.out)
    assert written
    assert all(Path(path).parent == folder / "charts" for path in written)
    for wrong, message in (
        (["--format", "pdf"], "Invalid value for '--format'"),
        (["--out", tmp_path], "--out is for --format png"),
    ):
        outcome = call("report", folder, *wrong)
        assert outcome.code == 2
        assert message in outcome.err


def test_export_writes_a_file_and_times_both_networks(
    call: Call, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "LATENCY_ROUNDS", Rounds(1, 1))
    path, run = tmp_path / "small.onnx", tmp_path / "run"
    path.touch()
    runs.run(small_config(model_file), run)
    named = ["--model", f"{model_file}:small"]
    outcome = call("export", run, "--out", path)
    assert outcome.code == 1
    assert "--overwrite" in outcome.err
    outcome = call("export", run, "--out", path, *named, "--overwrite")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == f"written: {path}"
    assert "relative error" in lines[1]
    assert lines[2].split() == ["engine", "batch", "original", "ms", "pruned", "ms", "ratio"]
    assert [line.split()[:2] for line in lines[3:7]] == [
        *(["pytorch", "1"], ["onnxruntime", "1"], ["pytorch", "16"], ["onnxruntime", "16"])
    ]
    assert all("the pruned network is slower than the original" in line for line in lines[7:])
    kept = json.loads((run / "engine_times.json").read_text())["times"]
    assert [(one["engine"], one["batch"]) for one in kept] == [
        *(("onnxruntime", 1), ("onnxruntime", 16), ("pytorch", 1), ("pytorch", 16))
    ]


def test_run_of_user_code_is_scored_and_exported_without_the_code(
    call: Call, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "LATENCY_ROUNDS", Rounds(1, 1))
    run = tmp_path / "run"
    runs.run(small_config(model_file), run)
    named = ["--model", f"{model_file}:small"]
    outcome = call("export", run, "--out", tmp_path / "timed.onnx", *named, "--json")
    assert all(one["original_ms"] > 0 for one in json.loads(outcome.out)["latency"])
    printed = json.loads(call("evaluate", run, *named, "--json").out)
    assert 0 < printed["agreement_fraction"] <= 1
    model_file.unlink()
    outcome = call("export", run, "--out", tmp_path / "pruned.onnx", "--json")
    exported = json.loads(outcome.out)
    assert all(one["original_ms"] is None for one in exported["latency"])
    (note,) = exported["notes"]
    assert note.startswith("The original network is not timed: its code is not run unless named")
    outcome = call("export", run, "--no-latency", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    exported = json.loads(outcome.out)
    assert exported["path"] == str(run / "model.onnx")
    assert exported["bytes"] == (run / "model.onnx").stat().st_size
    assert exported["error"] < 1e-4
    assert exported["latency"] == []
    recorded = json.loads((run / "result.json").read_text())["stages"][-1]["score"]
    printed = json.loads(call("evaluate", run, "--json").out)
    (note,) = printed.pop("notes")
    assert note.startswith("Agreement with the original network is not known: its code is not run")
    assert note.endswith(f"unless named, --model {model_file}:small.")
    beside_original = dict.fromkeys(("agreement_fraction", "lost", "gained"))
    assert {**printed, "latency_ms": 0} == {**recorded, **beside_original, "latency_ms": 0}


def test_export_of_a_folder_without_a_run_is_an_error(call: Call, tmp_path: Path) -> None:
    outcome = call("export", tmp_path)
    assert outcome.code == 1
    assert "no manifest.json" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_models_lists_what_can_be_named(call: Call) -> None:
    printed = json.loads(call("models", "--json").out)
    assert "resnet56" in printed["networks"]
    assert "torchvision:resnet50" in printed["networks"]
    assert "vote-response" in printed["criteria"]
    assert printed["networks"] == zoo.names()
    assert set(printed["concepts"]) == set(concepts.sources())
    assert {"evidence", "saliency", "factors", "colours", "masks"} <= set(printed["concepts"])
    kinds = {form.partition(":")[0] for form in printed["data"]}
    assert {*data.READERS, "segmentation", "hf", "digits", "synthetic"} == kinds
    assert {"mIoU", "box AP", "PSNR"} <= set(printed["metrics"])
    assert {"segmentation", "regression"} <= set(printed["tasks"])
    assert "resnet56" in call("models").out


def test_unreadable_images_are_skipped_on_request(
    call: Call, images: Path, model_file: Path, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        file = images / name / "0.png"
        file.write_bytes(file.read_bytes()[:50])
    common = [
        "-m",
        f"{model_file}:small",
        "--allow-untrained",
        "-d",
        f"folder:{images}",
        "--image-size",
        16,
    ]
    options = [*common, "--no-finetune"]
    fails(call, tmp_path / "run", 1, "0.png can't be read", *options)
    outcome = call("prune", *options, "--skip-unreadable", "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    lost = json.loads((tmp_path / "run" / "result.json").read_text())["unreadable"]
    assert lost
    assert set(lost) <= {f"{images}/cat/0.png", f"{images}/dog/0.png"}
    line = f"{len(lost)} images can't be read and were left out: {', '.join(lost)}"
    assert line in outcome.out.splitlines()
    scored = call("evaluate", *common, "--json", "--skip-unreadable")
    assert scored.code == 0
    printed = json.loads(scored.out)
    assert printed["images"] + len(printed["unreadable"]) == 2
    assert call("inspect", *common, "--skip-unreadable").code == 0


def test_weights_for_another_number_of_classes_than_the_data(
    call: Call, images: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(zoo.load("resnet20").state_dict(), weights)
    common = ["-m", "resnet20", "-w", weights, "-d", f"folder:{images}"]
    words = "are for 10 classes, but the data or --num-classes asks for 2"
    fails(call, tmp_path / "run", 1, words, *common)
    words = "are for 10 classes, but the data or --num-classes asks for 1"  # the sign says which
    fails(call, tmp_path / "run", 1, words, *common, "--num-classes", 1)


EMA_IS_LOADED = "'state_dict_ema' was loaded"


@pytest.fixture
def two_networks(images: Path, model_file: Path, tmp_path: Path) -> list[object]:
    """Options for a file that holds a network and its average."""
    name = f"{model_file}:small"
    raw, average = (dict(zoo.load(name, num_classes=2, seed=s).state_dict()) for s in (0, 1))
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "last.pth.tar")
    weights = tmp_path / "last.pth.tar"
    return ["-m", name, "-w", weights, "-d", f"folder:{images}", "--image-size", 16]


def test_which_network_of_a_file_is_evaluated_is_said_and_can_be_chosen(
    call: Call, two_networks: list[object]
) -> None:
    assert EMA_IS_LOADED in call("evaluate", *two_networks).out
    scores = {
        key: json.loads(call("evaluate", *two_networks, *options, "--json").out)
        for key, options in (
            ("default", []),
            ("average", ["--weights-key", "state_dict_ema"]),
            ("raw", ["--weights-key", "state_dict"]),
        )
    }
    assert scores["default"]["loss"] == scores["average"]["loss"] != scores["raw"]["loss"]
    assert EMA_IS_LOADED in str(scores["default"]["notes"])
    assert EMA_IS_LOADED not in str([scores["average"]["notes"], scores["raw"]["notes"]])


@pytest.mark.slow
def test_which_network_of_a_file_is_pruned_or_trained_is_said_and_recorded(
    call: Call, two_networks: list[object], tmp_path: Path
) -> None:
    outcome = call("prune", *two_networks, "--no-finetune", "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert EMA_IS_LOADED in outcome.out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert EMA_IS_LOADED in str(result["notes"])
    assert EMA_IS_LOADED in call("inspect", *two_networks, "--json").out
    assert EMA_IS_LOADED in call("inspect", *two_networks).out
    options = ["--epochs", 1, "--set", "train.workers=0", "-o", tmp_path / "base"]
    assert EMA_IS_LOADED in call("train", *two_networks, *options).out
    trained = json.loads((tmp_path / "base" / "training.json").read_text())
    assert EMA_IS_LOADED in str(trained["notes"])
    two_networks[3] = tmp_path / "base"  # the folder
    scored = json.loads(call("evaluate", *two_networks, "--json").out)
    assert scored["loss"] == trained["score"]["loss"]


def fails(call: Call, out: Path, code: int, words: str, *arguments: object) -> None:
    """One clear line, the right exit code, and no trace of a run folder."""
    outcome = call("prune", *arguments, "-o", out)
    assert outcome.code == code
    assert outcome.out == ""
    *stages, error = outcome.err.strip().splitlines()
    assert error.startswith("error: ")
    assert all(line.startswith(("stages: ", "score ")) for line in stages)
    assert words in outcome.err
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_missing_weights_file(call: Call, tmp_path: Path) -> None:
    common = ["-m", "resnet20", "-d", "digits"]
    weights = tmp_path / "none.safetensors"
    fails(call, tmp_path / "run", 1, f"no weights file {weights}", *common, "-w", weights)


def test_weights_of_another_architecture(call: Call, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(zoo.load("resnet32").state_dict(), weights)
    common = ["-m", "resnet20", "-d", "digits", "-w", weights]
    fails(call, tmp_path / "run", 1, "unexpected: layer1.3.", *common)


def test_empty_data_folder(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    common = ["-m", "resnet20", "--allow-untrained"]
    empty = tmp_path / "empty"
    fails(call, tmp_path / "run", 1, "no class folders", *common, "-d", f"folder:{empty}")
    fails(call, tmp_path / "run", 1, "no CIFAR-10", *common, "-d", f"cifar10:{empty}")


def test_unreadable_image(call: Call, images: Path, tmp_path: Path) -> None:
    for broken in (images / "dog").iterdir():
        broken.write_bytes(b"not an image")
    common = ["-m", "resnet20", "--allow-untrained", "-d", f"folder:{images}"]
    fails(call, tmp_path / "run", 1, "can't be read", *common)


@pytest.mark.parametrize("target", ["macs=1.5", "macs=0", "macs=half", "speed=0.5", "macs"])
def test_target_out_of_range(call: Call, tmp_path: Path, target: str) -> None:
    common = ["-m", "resnet20", "-d", "digits", "--allow-untrained", "-t", target]
    fails(call, tmp_path / "run", 2, target, *common)


def test_output_folder_that_exists(call: Call, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    outcome = call("prune", "-m", "resnet20", "-d", "digits", "--allow-untrained", "-o", tmp_path)
    assert outcome.code == 1
    assert "--overwrite" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_names_bring_the_near_ones(call: Call, tmp_path: Path) -> None:
    common = ["-d", "digits", "--allow-untrained"]
    out = tmp_path / "run"
    fails(call, out, 2, "did you mean resnet56", *common, "-m", "resnet57")
    fails(call, out, 2, "resnet50", *common, "-m", "torchvision:resnet51")
    criterion = ["-m", "resnet20", "--criterion", "tailor"]
    fails(call, out, 2, "did you mean taylor", *common, *criterion)


def test_usage_errors(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fails(call, out, 2, "no network is named", "-d", "digits")
    fails(call, out, 2, "no data is named", "-m", "resnet20")
    fails(call, out, 2, "needs --weights", "-m", "resnet20", "-d", "digits")
    contradiction = ["--no-finetune", "--epochs", 3]
    fails(call, out, 2, "exclude each other", "-m", "resnet20", "-d", "digits", *contradiction)
    assert call("prune", "--no-such-option").code == 2
    assert call("evaluate").code == 2


def test_brackets_in_a_message_are_shown(call: Call, tmp_path: Path) -> None:
    outcome = call("evaluate", tmp_path / "[red]run[/red]")
    assert outcome.code == 1
    assert "[red]run[/red]" in outcome.err


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupt_is_said_and_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(zoo.load("resnet20").state_dict(), weights)
    out = tmp_path / "runs" / "run"
    arguments = ["prune", "-m", "resnet20", "-w", str(weights), "-d", "digits", "-o", str(out)]
    code = "from secateur.cli.app import main; main()"
    command = [sys.executable, "-c", code, *arguments, "--epochs", "50"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not out.parent.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    try:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + sent
        assert said.splitlines()[-1] == "interrupted; nothing was written"
    finally:
        process.kill()
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_fine_tuning_is_resumed(
    call: Call, model_file: Path, tmp_path: Path
) -> None:
    def arguments(out: Path) -> list[str]:
        options = [
            "-d",
            "digits",
            "--image-size",
            "32",
            "--calibration-images",
            "100",
            "--epochs",
            "6",
        ]
        keys = ["--set", "finetune.flip=false", "--set", "finetune.checkpoint_minutes=0"]
        keys += ["--set", "data.synthetic_images=0"]  # as in this process
        return [
            "prune",
            "-m",
            f"{model_file}:small",
            "--allow-untrained",
            *options,
            *keys,
            "-o",
            str(out),
        ]

    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert call(*arguments(alone)).code == 0
    code = "from secateur.cli.app import main; main()"
    command = [sys.executable, "-c", code, *arguments(stopped)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how many there are
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | threads)
    deadline = time.monotonic() + 60
    while not (stopped / "checkpoints").is_dir() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    *lines, last = said.splitlines()
    assert last == f"interrupted; the same command with --resume resumes from {stopped}"
    assert all(line.startswith(("stages: ", "score ", "refit: ", "epoch ")) for line in lines)
    assert call("evaluate", stopped).code == 0  # what is there is a network that was repaired
    refused = call(*arguments(stopped), "--resume", "--learning-rate", 0.01)
    assert refused.code == 2
    assert "finetune.learning_rate = 0.02, not 0.01" in refused.err
    assert call(*arguments(stopped), "--resume").code == 0
    for name in ("model.safetensors", "plan.json"):
        assert (stopped / name).read_bytes() == (alone / name).read_bytes()
    assert not (stopped / "checkpoints").exists()
    epochs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (alone, stopped)
    ]
    told = [[event for event in lines if event["event"] == "epoch"] for lines in epochs]
    assert told[0] == told[1]


def test_a_training_that_diverges_says_what_remains_and_how_to_continue(
    call: Call, digits_run: DigitsRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(digits_run.folder, folder)
    weights = (folder / "model.safetensors").read_bytes()
    outcome = call("finetune", folder, "--epochs", 1, "--learning-rate", 1e30)
    assert outcome.code == 1
    assert "in epoch 1: try a smaller learning rate; " in outcome.err
    advice = f"secateur finetune {folder} --learning-rate 1e+29"
    assert outcome.err.splitlines()[-1].endswith(advice)
    assert (folder / "model.safetensors").read_bytes() == weights
    other = tmp_path / "base"
    arguments = ["-m", "resnet20", "-d", "digits", "--epochs", 1, "--learning-rate", 1e30]
    outcome = call("train", *arguments, "-o", other)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].endswith(
        f"{other} holds no weights: train in another folder with --learning-rate 1e+29"
    )


def test_a_run_is_fine_tuned_later(call: Call, model_file: Path, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "finetuned"
    options = ["-d", "digits", "--image-size", 32, "--calibration-images", 100]
    options += ["--set", "report.images=0"]
    at_once = ["--epochs", 2, "--set", "finetune.flip=false", "-o", tmp_path / "at once"]
    assert (
        call("prune", "-m", f"{model_file}:small", "--allow-untrained", *options, *at_once).code
        == 0
    )
    assert (
        call(
            "prune",
            "-m",
            f"{model_file}:small",
            "--allow-untrained",
            *options,
            "--no-finetune",
            "-o",
            run,
        ).code
        == 0
    )
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "log.jsonl"}
    arguments = ["-o", tuned, "--epochs", 2, "--set", "finetune.flip=false"]
    refused = call("finetune", run, *arguments)  # it is code that the folder names
    assert refused.code == 2
    assert f"name it with --model {model_file}:small" in refused.err
    outcome = call("finetune", run, "--model", f"{model_file}:small", *arguments)
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.out.splitlines()[1:5]] == [
        *("before", "cut", "refit", "finetuned")
    ]
    left = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert {name: left[name] for name in before} == before
    expected = (tmp_path / "at once" / "model.safetensors").read_bytes()
    assert (tuned / "model.safetensors").read_bytes() == expected
    assert call("finetune", run, "--set", "plan.target=macs=0.5").code == 2
    model = ["--model", f"{model_file}:small"]
    assert "epochs" in call("finetune", run, *model, "--epochs", 0).err


def test_training_a_base_network_leaves_weights_that_can_be_pruned(
    call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "base"
    options = ["-m", "resnet20", "-d", "digits", "--set", "train.flip=false"]
    outcome = call("train", *options, "--epochs", 1, "-o", out)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == f"weights: {out / 'model.safetensors'}"
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "training.json", "config.toml", "log.jsonl")
    }
    recipe = json.loads((out / "training.json").read_text())
    assert recipe["config"]["train"]["label_weight"] == 1
    assert len(recipe["epochs"]) == 1
    scored = call(
        "evaluate", "-m", "resnet20", "-w", out / "model.safetensors", "-d", "digits", "--json"
    )
    assert json.loads(scored.out)["metric"] == recipe["score"]["metric"]
    named_by_folder = call("evaluate", "-w", out, "--json")
    assert json.loads(named_by_folder.out)["loss"] == json.loads(scored.out)["loss"]
    assert "beside the weights: model.name = resnet20" in named_by_folder.err
    again = call("train", *options, "--epochs", 1, "-o", out)
    assert again.code == 1
    assert "--resume" in again.err
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    assert call("train", *options, "--epochs", 1, "-o", out, "--resume").code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == left
    other = call("train", *options, "--epochs", 2, "-o", out, "--resume")
    assert other.code == 2
    assert "was made with train.epochs = 1, not 2" in other.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finetune.mixup", "it must be KEY=VALUE"),
        ("finetune.mixpu=1", "finetune.mixpu"),
        ("finetune.keep=worst", "finetune.keep"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(
    call: Call, images: Path, text: str, said: str
) -> None:
    options = ["-m", "resnet20", "-d", f"folder:{images}", "--allow-untrained"]
    outcome = call("prune", *options, "--set", text)
    assert outcome.code == 2
    assert said in outcome.err


def test_threads_are_left_as_they_are(call: Call) -> None:
    before = torch.get_num_threads()
    call("models")
    assert torch.get_num_threads() == before


def small_run(call: Call, model_file: Path, out: Path, *options: object) -> dict[str, Any]:
    """The result of a run of the small network on digits that trains nothing."""
    common = ["-m", f"{model_file}:small", "--allow-untrained", "-d", "digits", "--image-size", 32]
    few = ["--calibration-images", 60, "--no-finetune", "--set", "report.images=0", "-o", out]
    assert call("prune", *common, *few, *options).code == 0
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def test_shares_come_from_a_file(call: Call, model_file: Path, tmp_path: Path) -> None:
    shares = tmp_path / "shares.toml"
    shares.write_text('"conv1" = 0.25\n"conv*" = 0.5\n')
    result = small_run(call, model_file, tmp_path / "run", "--shares", shares)
    kept = {group["name"]: group["filters"] - len(group["removed"]) for group in result["groups"]}
    assert kept == {"conv1": 3, "conv3": 8}
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    before, cut = (stage["score"]["macs"] for stage in result["stages"][:2])
    assert cut / before <= float(plan["target"].removeprefix("macs=")) < cut / before + 1e-4


def test_shares_that_can_not_be_used(call: Call, model_file: Path, tmp_path: Path) -> None:
    common = ["-m", f"{model_file}:small", "--allow-untrained", "-d", "digits", "--image-size", 32]
    shares, out = tmp_path / "shares.toml", tmp_path / "run"
    fails(call, out, 2, "no file", *common, "--shares", shares)
    shares.write_text('"conv1" = ')
    fails(call, out, 2, "is not TOML", *common, "--shares", shares)
    shares.write_text('"conv1" = 1.5')
    fails(call, out, 2, "plan.shares.conv1", *common, "--shares", shares)
    shares.write_text('"conv1" = 0.5')
    fails(call, out, 2, "exclude each other", *common, "--shares", shares, "--allocation", "global")
    fails(call, out, 2, "choose one of them", *common, "--shares", shares, "--max-drop", 1)


def test_the_smallest_network_within_a_drop(call: Call, model_file: Path, tmp_path: Path) -> None:
    everything = small_run(call, model_file, tmp_path / "all", "--max-drop", 100)
    assert all(trial["kept"] for trial in everything["size_trials"])
    nothing = small_run(call, model_file, tmp_path / "none", "--max-drop", 0)
    limit = nothing["size_trials"][0]["validation_metric"]
    for trial in nothing["size_trials"]:
        assert trial["kept"] == (trial["validation_metric"] >= limit)
    for result in (everything, nothing):
        smallest = min(t["fraction_left"] for t in result["size_trials"] if t["kept"])
        before, cut = (stage["score"]["macs"] for stage in result["stages"][:2])
        assert cut <= smallest * before


@pytest.mark.parametrize(
    ("allocation", "target"),
    [
        *(("sensitivity", "macs=0.6"), ("uniform", "params=0.6"), ("global", "memory=0.9")),
        *(
            pytest.param(allocation, target, marks=pytest.mark.slow)
            for allocation, target in [
                *(("sensitivity", "params=0.6"), ("sensitivity", "memory=0.9")),
                *(("uniform", "macs=0.6"), ("uniform", "memory=0.9")),
                *(("global", "macs=0.6"), ("global", "params=0.6")),
            ]
        ),
    ],
)
def test_every_allocation_meets_every_target(
    call: Call, model_file: Path, tmp_path: Path, allocation: str, target: str
) -> None:
    options = ["--allocation", allocation, "-t", target, "--criterion", "l2", "--prune-residual"]
    result = small_run(call, model_file, tmp_path / "run", *options)
    before, cut = (stage["score"] for stage in result["stages"][:2])
    assert cut["macs"] < before["macs"]
    if not target.startswith("memory"):
        quantity = "macs" if target.startswith("macs") else "parameters"
        assert cut[quantity] <= 0.6 * before[quantity]


def write_benchmark_file(folder: Path, model_file: Path, criterion: str) -> Path:
    """Write a benchmark of the L1 norm and another criterion on a few small images."""
    path = folder / "benchmark.toml"
    path.write_text(
        f"""
        criteria = ["l1", "{criterion}"]
        targets = ["macs=0.6"]
        networks = [{{ name = "{model_file}:small", label = "own", allow_untrained = true }}]
        data = {{ source = "cifar10:elsewhere", image_size = 16, calibration_images = 6 }}
        """
    )
    return path


def test_comparing_prints_tables_and_the_path_of_the_page(
    call: Call, images: Path, model_file: Path, tmp_path: Path
) -> None:
    file, out = write_benchmark_file(tmp_path, model_file, "random"), tmp_path / "comparison"
    options = ["-d", f"folder:{images}", "--set", "finetune.epochs=0", "-w", tmp_path, "-j", 1]
    outcome = call("compare", file, "-o", out, *options)
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.splitlines()[:-1])) <= 80
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["method", "own", "macs=0.6", "mean", "agreement"] in lines
    assert ["method", "own", "macs=0.6", "all", "settings", "verdict"] in lines
    assert outcome.out.splitlines()[-1] == f"page: {out / 'benchmark.html'}"
    as_json = json.loads(call("compare", file, "-o", out, *options, "--json").out)
    assert [row["criterion"] for row in as_json] == ["l1", "random"]
    assert call("compare", tmp_path / "none.toml").code == 2


@pytest.mark.slow
def test_comparing_ends_with_an_error_if_a_job_fails(
    call: Call, images: Path, model_file: Path, tmp_path: Path
) -> None:
    file = write_benchmark_file(tmp_path, model_file, "bn_scale")
    model_file.write_text(model_file.read_text().replace("BatchNorm2d", "Identity"))
    options = ["-d", f"folder:{images}", "--set", "finetune.epochs=0", "-w", tmp_path, "-j", 1]
    failed = call("compare", file, "-o", tmp_path / "other", *options)
    assert failed.code == 1
    assert "--retry" in failed.err
    assert "Failed" in failed.out
    assert call("compare", file, "-o", tmp_path / "other", *options, "--json").code == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model=3"], "configuration, model: must be a table; got 3"),
        (["finetune=3", "finetune.epochs=1"], "configuration, finetune: must be a table; got 3"),
    ],
)
def test_a_section_that_is_not_a_table_is_named(
    settings: list[str], words: str, call: Call
) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    outcome = call("prune", "-m", "resnet20", "-d", "digits", *options)
    assert outcome.code == 2
    assert words in outcome.err


SINGLE_OUTPUT = """
import torch
from torch import nn

def small(num_classes=1):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))

def maps(num_classes=2):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, num_classes, 1))
"""


@pytest.mark.parametrize("command", ["inspect", "prune", "evaluate", "train"])
def test_a_network_that_returns_maps_is_refused_before_any_work(
    call: Call, images: Path, tmp_path: Path, command: str
) -> None:
    file, out = tmp_path / "net.py", tmp_path / "out"
    file.write_text(SINGLE_OUTPUT)
    options = {"prune": ["--no-finetune", "-o", out], "train": ["-o", out]}.get(command, [])
    if command != "train":
        options.append("--allow-untrained")
    common = ["-m", f"{file}:maps", "-d", f"folder:{images}", "--image-size", 16]
    outcome = call(command, *common, *options)
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert "give masks [image, height, width], or leave the labels out" in outcome.err
    assert not out.exists()


def test_a_network_with_one_output_is_pruned_with_two_classes(
    call: Call, images: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "net.py", tmp_path / "out"
    file.write_text(SINGLE_OUTPUT)
    common = ["-m", f"{file}:small", "-d", f"folder:{images}", "--image-size", 16]
    options = ["--allow-untrained", "--no-finetune", "-o", out, "--set", "report.images=0"]
    outcome = call("prune", *common, "--num-classes", 1, *options)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[0].split()[:4] == ["stage", "accuracy", "%", "agree"]
    assert "one output: above 0 it means class 1" in outcome.out


def test_prune_stops_where_the_network_is_no_better_than_chance(
    call: Call, model_file: Path, tmp_path: Path
) -> None:
    common = ["prune", "-m", f"{model_file}:small", "-d", "digits", "--image-size", 32]
    options = ["--calibration-images", 60, "--no-finetune", "-o", tmp_path / "run"]
    outcome = call(*common, *options)
    assert outcome.code == 1
    assert "% of 450 test images, and chance is" in outcome.err
    assert "class order, image size, mean and deviation" in outcome.err
    assert outcome.err.endswith("add --allow-untrained (model.allow_untrained = true)\n")
    assert not (tmp_path / "run").exists()
    noted = call("evaluate", *common[1:])
    assert noted.code == 0
    assert "note: The network is right on" in noted.out


def test_evaluate_a_run_beside_its_original(call: Call, digits_run: DigitsRun) -> None:
    outcome = call("evaluate", digits_run.folder)
    last = digits_run.result.stages[-1].score
    assert last.agreement_fraction is not None
    assert ["agreement", f"{100 * last.agreement_fraction:.2f}", "%"] in [
        line.split() for line in outcome.out.splitlines()
    ]


def failing(*arguments: object, **options: object) -> None:
    raise DataError("nothing is left")


def test_export_to_int8_scores_both_files_and_times_them(
    call: Call, digits_run: DigitsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    for module in (export, int8_export):
        monkeypatch.setattr(module, "LATENCY_ROUNDS", Rounds(1, 1))
    monkeypatch.setattr(int8_export, "CALIBRATION_IMAGES", 64)
    path = tmp_path / "small.onnx"
    run = shutil.copytree(digits_run.folder, tmp_path / "run")
    arguments = ["export", run, "--out", path, "--int8"]
    outcome = call(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    exported = json.loads(outcome.out)
    assert all(one["original_ms"] > 0 for one in exported["latency"])
    quantised = exported["int8"]
    assert quantised["path"] == str(tmp_path / "small.int8.onnx")
    assert quantised["bytes"] < path.stat().st_size
    recorded = json.loads((digits_run.folder / "result.json").read_text())["stages"][-1]["score"]
    assert quantised["float_metric"] == pytest.approx(recorded["metric"], abs=0.01)
    assert quantised["int8_metric"] == pytest.approx(recorded["metric"], abs=0.05)
    assert [one["batch"] for one in quantised["latency"]] == [1, 16]
    outcome = call(*arguments)
    assert outcome.code == 1
    assert "--overwrite" in outcome.err
    monkeypatch.setattr(int8_export, "evaluate", failing)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.onnx")}
    outcome = call(*arguments, "--overwrite")
    assert "error: nothing is left" in outcome.err
    assert {file: file.read_bytes() for file in tmp_path.glob("*.onnx")} == before


def test_options_of_export_and_evaluate_that_do_not_go_together_are_refused(
    call: Call, model_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    path, photos, run = tmp_path / "small.onnx", tmp_path / "photos", tmp_path / "run"
    write_classes(photos, ["ant", "bee"], 10)
    runs.run(small_config(model_file), run)
    for options, words in (
        (["--opset", 99, "--overwrite"], "can't write opset 99"),
        (["--format", "coreml", "--int8"], "--int8 is for --format onnx, openvino, executorch"),
        (["--format", "openvino", "--opset", "18"], "--opset is for --format onnx"),
        (["--format", "nothing"], "there is no format 'nothing'"),
        (["--format", "torchscript"], "torch advises against TorchScript"),
        (["--data", "digits", "--overwrite"], "--data is for --int8"),
        (["--set", "plan.rounds=2", "--int8"], "--set plan.rounds has no meaning for an export"),
        (["--data", f"folder:{photos}", "--int8", "--overwrite"], "has other classes than the run"),
    ):
        outcome = call("export", run, "--out", path, *options)
        assert outcome.code in (1, 2)
        assert words in outcome.err
    missing = ["--int8", "--data", f"folder:{tmp_path / 'none'}"]
    outcome = call("export", run, "--out", tmp_path / "new" / "a.onnx", *missing)
    assert outcome.code == 1
    assert not (tmp_path / "new").exists()
    outcome = call("evaluate", run, "--set", "data.keep_classes=1,3")
    assert outcome.code == 2
    assert "a run's classes are those that it was pruned for" in outcome.err
