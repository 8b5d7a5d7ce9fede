"""The paper's tables: each file loads, names existing weights, and runs in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from layouts import write_classes
from secateur import data
from secateur.config import from_dict, read_tables
from secateur.experiments.compare.job_files import JOBS, SPEC, read_job
from secateur.experiments.compare.spec import BenchmarkSpec, jobs_of, read_spec
from secateur.experiments.compare.worker import run_jobs
from secateur.experiments.report.benchmark import MARKDOWN, write_benchmark
from secateur.models import zoo
from secateur.runtime.atomic_io import replace_file

FILES = sorted((Path(__file__).parents[1] / "configs" / "paper").glob("*.toml"))


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_every_row_of_the_paper_is_there() -> None:
    assert names(FILES) == [
        *("resnet20_cifar10", "resnet32_cifar10", "resnet50_imagenet", "resnet56_cifar10"),
        *("vgg16_cifar10", "vgg16_cub"),
    ]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_file_names_existing_weights_and_its_command(path: Path) -> None:
    spec = read_spec(path)
    assert {"vote", "l1", "random"} <= set(spec.criteria)
    (network,) = spec.networks
    zoo.check_name(network.name)
    assert network.weights is not None
    kind, _, folder = spec.data.source.partition(":")
    assert kind in data.READERS
    assert folder == "data"
    assert f"configs/paper/{path.name} --data {kind}:DIR" in path.read_text()
    assert spec.score_on == "test"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_file_runs_in_miniature(path: Path, model_file: Path, tmp_path: Path) -> None:
    for part, count in (("train", 16), ("test", 4)):
        write_classes(tmp_path / "images" / part, ["bird", "cat"], count)
    tables: dict[str, Any] = read_tables(path)
    tables["networks"] = [{"name": f"{model_file}:small", "label": "small"}]
    tables["criteria"], tables["seeds"], tables["threads"] = ["vote"], 1, 1
    source = f"folder:{tmp_path / 'images'}"
    tables["data"] |= {"source": source, "image_size": 16, "calibration_images": 8}
    tables["data"]["validation_fraction"] = 0.1
    tables["finetune"] |= {"epochs": 1, "batch_size": 8, "workers": 0}
    spec = from_dict(tables, BenchmarkSpec)
    (job,) = jobs_of(spec)
    (tmp_path / "out" / JOBS).mkdir(parents=True)
    replace_file(tmp_path / "out" / SPEC, tomli_w.dumps(tables))
    with (tmp_path / "messages").open("w") as messages:
        run_jobs(tmp_path / "out", [job.id], messages)  # as a worker does
    result = read_job(tmp_path / "out", job)
    assert result is not None
    assert result.outcome == "done", result.reason
    assert result.result is not None
    assert [stage.stage for stage in result.result.stages] == [
        "before",
        "cut",
        "refit",
        "finetuned",
    ]
    assert (tmp_path / "messages").read_text() == f"started {job.id}\nended {job.id}\n"
    write_benchmark(tmp_path / "out", spec, [result])
    assert "| vote |" in (tmp_path / "out" / MARKDOWN).read_text()
