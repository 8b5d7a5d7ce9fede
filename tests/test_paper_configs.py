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


def test_the_files_run_in_miniature(model_file: Path, tmp_path: Path) -> None:
    """All in one benchmark, of which each is a variant, to its own first target."""
    for part, count in (("train", 16), ("test", 4)):
        write_classes(tmp_path / "images" / part, ["bird", "cat"], count)
    files: dict[str, dict[str, Any]] = {path.stem: read_tables(path) for path in FILES}
    content = {
        "criteria": ["vote"],
        "targets": sorted({file["targets"][0] for file in files.values()}),
        "networks": [{"name": f"{model_file}:small", "label": "small", "allow_untrained": True}],
        "data": {
            "source": f"folder:{tmp_path / 'images'}",
            "image_size": 16,
            "calibration_images": 8,
            "validation_fraction": 0.1,
        },
        "variants": {
            name: {
                "data.stratified": file["data"].get("stratified", True),
                "finetune": {**file["finetune"], "epochs": 1, "batch_size": 8, "workers": 0},
            }
            for name, file in files.items()
        },
    }
    spec = from_dict(content, BenchmarkSpec)
    jobs = [job for job in jobs_of(spec) if job.target == files[job.variant]["targets"][0]]
    assert [job.variant for job in jobs] == list(files)
    out = tmp_path / "out"
    (out / JOBS).mkdir(parents=True)
    replace_file(out / SPEC, tomli_w.dumps(content))
    with (tmp_path / "messages").open("w") as messages:
        run_jobs(out, [job.id for job in jobs], messages)  # as a worker does
    results = [result for job in jobs if (result := read_job(out, job)) is not None]
    assert [(result.outcome, result.reason) for result in results] == [("done", "")] * len(files)
    for result in results:
        assert result.result is not None
        stages = [stage.stage for stage in result.result.stages]
        assert stages == ["before", "cut", "refit", "finetuned"]
    words = [f"{event} {job.id}" for job in jobs for event in ("started", "ended")]
    assert (tmp_path / "messages").read_text().splitlines() == words
    write_benchmark(out, spec, results)
    text = (out / MARKDOWN).read_text()
    assert [name for name in files if f"| vote, {name} |" not in text] == []
