"""The bench of VGG-16 on birds, with `secateur` replaced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import birds
from measurements import read_measurements

PAGE = "<!-- table: results/birds.jsonl -->\nold\n<!-- end -->\n"


def score(metric: float, macs: int, parameters: int) -> dict[str, object]:
    return {"images": 400, "metric": metric, "macs": macs, "parameters": parameters}


def result_of(seed: int) -> dict[str, object]:
    scores = {
        "before": score(0.5, 1000, 100),
        "cut": score(0.2, 480, 30),
        "refit": score(0.4, 480, 30),
        "finetuned": score(0.49 + seed / 100, 480, 30),
    }
    stages = [{"stage": name, "score": score, "seconds": 1.0} for name, score in scores.items()]
    return {"stages": stages, "config": {"finetune": {"epochs": 20}}}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The arguments of each call of `secateur`; that for seed 1 fails the first time."""
    made: list[Sequence[str]] = []

    def run_secateur(arguments: Sequence[str]) -> None:
        made.append(arguments)
        folder = Path(arguments[arguments.index("-o") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "train":
            is_better = str(birds.LEARNING_RATES[1]) in arguments
            epochs = [{"validation": 0.9}, {"validation": 0.6 if is_better else 0.5}]
            (folder / "training.json").write_text(json.dumps({"epochs": epochs}))
            return
        seed = int(arguments[arguments.index("--seed") + 1])
        if seed == 1 and not (folder / "began").is_file():
            (folder / "began").touch()
            raise SystemExit("a run failed: its message is above")
        (folder / "result.json").write_text(json.dumps(result_of(seed)))

    (tmp_path / "page.md").write_text(PAGE)
    for name in ("vgg16_features_fp16", "cub200_2010_classifier_fp16"):
        save_file({name: torch.ones(2).half()}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(birds, "run_secateur", run_secateur)
    monkeypatch.setattr(birds, "RESULTS", tmp_path / "birds.jsonl")
    monkeypatch.setattr(birds, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(birds, "WORK", tmp_path / "runs")
    argv = ["birds.py", "--data", str(tmp_path), "--weights", str(tmp_path), "--seeds", "2"]
    monkeypatch.setattr("sys.argv", argv)
    return made


def test_a_run_that_fails_loses_no_other_and_is_resumed(calls: list[Sequence[str]]) -> None:
    with pytest.raises(SystemExit, match="a run failed"):
        birds.main()
    assert [row["seed"] for row in read_measurements(birds.RESULTS, birds.KEY)] == [0]
    assert sorted(call[0] for call in calls) == ["prune", "prune", "train", "train"]
    assert all("--resume" in call for call in calls)
    calls.clear()
    birds.main()
    assert [call[call.index("--seed") + 1] for call in calls] == ["1"]
    measured = read_measurements(birds.RESULTS, birds.KEY)
    assert [row["base_learning_rate"] for row in measured] == [birds.LEARNING_RATES[1]] * 2
    assert birds.PAGE.read_text().splitlines()[3:5] == [
        "| 0.480 | 20 | 0 | 50.0 | 20.0 | 40.0 | 49.0 | 1.0 |",
        "| 0.480 | 20 | 1 | 50.0 | 20.0 | 40.0 | 50.0 | 0.0 |",
    ]
