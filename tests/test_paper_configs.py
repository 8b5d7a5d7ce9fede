"""The paper's tables: each file loads, names what exists, and runs in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from layouts import write_classes
from secateur import data
from secateur.config import from_dict, read_tables
from secateur.experiments.compare.runner import CELLS, COMPARISON, read_job, read_spec, work
from secateur.experiments.compare.spec import BenchmarkSpec, jobs_of
from secateur.experiments.report.comparison import MARKDOWN, write_comparison
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
def test_a_file_names_what_exists_and_how_to_run_it(path: Path) -> None:
    comparison = read_spec(path)
    assert {"vote", "l1", "random"} <= set(comparison.criteria)
    (network,) = comparison.networks
    zoo.check_name(network.name)
    assert network.weights is not None
    kind, _, folder = comparison.data.source.partition(":")
    assert kind in data.READERS
    assert folder == "data"
    assert f"configs/paper/{path.name} --data {kind}:DIR" in path.read_text()
    assert comparison.score_on == "test"


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
    comparison = from_dict(tables, BenchmarkSpec)
    (cell,) = jobs_of(comparison)
    (tmp_path / "out" / CELLS).mkdir(parents=True)
    replace_file(tmp_path / "out" / COMPARISON, tomli_w.dumps(tables))
    with (tmp_path / "said").open("w") as say:
        work(tmp_path / "out", [cell.id], say)  # what a process of a sweep does
    found = read_job(tmp_path / "out", cell)
    assert found is not None
    assert found.outcome == "done", found.reason
    assert found.result is not None
    assert [stage.stage for stage in found.result.stages] == ["before", "cut", "refit", "finetuned"]
    assert (tmp_path / "said").read_text() == f"begun {cell.id}\nended {cell.id}\n"
    write_comparison(tmp_path / "out", comparison, [found])
    assert "| vote |" in (tmp_path / "out" / MARKDOWN).read_text()
