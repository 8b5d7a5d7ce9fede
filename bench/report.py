"""Measure what a report costs, beside the scoring pass, for a large network.

    python bench/report.py --data imagenette:DIR [--model torchvision:resnet50]

Half of the MACs of a network are removed in uniform fractions, without training. Then the report
with its gallery and the scoring passes of two criteria run interleaved, all on the same `IMAGES`
calibration images. `results/report.json` gets the seconds of each and their ratios, the size of the
page and the most memory that the process had used until the first report was written; the table in
docs/how_to/read_the_report.md is written from it. Without `--weights` the weights are random: the
gallery then means nothing, but costs as much.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from measurements import run_all
from rows import ROOT, Row, revision, surroundings, write_json
from secateur.config import RunConfig, from_dict
from secateur.data import DataSet
from secateur.experiments.report.gallery import make_gallery
from secateur.experiments.report.page import write_report
from secateur.pipeline.inputs import load_inputs
from secateur.pipeline.prune import prune
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.scoring.criteria import make_criterion
from secateur.scoring.scores import score_filters
from tables import with_table

RESULTS = ROOT / "results" / "report.json"
PAGE = ROOT / "docs" / "how_to" / "read_the_report.md"
IMAGES = 512
TEST_IMAGES = 16
TURNS = 2
SCORING = ("vote", "vote-response")
"""Scoring passes: of the default criterion, and of the one that costs least."""
SEED = 0


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="imagenette:DIR or another data set; else the table only")
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--weights")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        write_json(RESULTS, measure(arguments.data, arguments.model, arguments.weights))
        return
    if arguments.data is not None:
        weights = [] if arguments.weights is None else ["--weights", arguments.weights]
        call = ["--data", arguments.data, "--model", arguments.model, *weights, "--child"]
        run_all("report.py", [call], 1)
    PAGE.write_text(with_table(PAGE.read_text(), "results/report.json", table()))


def measure(source: str, model_name: str, weights: str | None) -> Row:
    """Time the report and the scoring passes, interleaved."""
    config = configured(source, model_name, weights)
    dataset, model = load_inputs(config)
    # What is timed is neither the scores before and after nor the cut.
    few = DataSet(
        dataset.name,
        dataset.class_names,
        dataset.train,
        dataset.validation,
        dataset.test.take(torch.arange(TEST_IMAGES)),
    )
    pruned = prune(model, few, config)
    config = pruned.result.config
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"

        def report() -> None:
            gallery = make_gallery(model, pruned.model, few, pruned.result)
            write_report(pruned.result, page, gallery)

        def score(criterion: str) -> None:
            context = make_scoring_context(model, few, config)
            score_filters(
                model,
                context.dependencies,
                lambda: context.reader.read_image_shard(context.calibration),
                {criterion: make_criterion(criterion, context.source, config)},
                context.source,
                config.score,
            )

        seconds: dict[str, list[float]] = {"report": [], **{name: [] for name in SCORING}}
        memory = 0
        for _ in range(TURNS):
            seconds["report"].append(timed(report))
            memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            for name in SCORING:
                seconds[name].append(timed(partial(score, name)))
        size = page.stat().st_size
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": model_name,
        "weights": "random" if weights is None else Path(weights).name,
        "images": IMAGES,
        "filters": sum(group.filters for group in pruned.result.groups),
        "seconds": {
            name: [round(value, 2) for value in values] for name, values in seconds.items()
        },
        "ratios": {name: medians["report"] / medians[name] for name in SCORING},
        "page_mb": size / 1e6,
        "peak_memory_mib": memory,
        "seed": SEED,
        "command": "python bench/report.py --data imagenette:DIR",
        "revision": revision(),
        "environment": surroundings(),
    }


def configured(source: str, model_name: str, weights: str | None) -> RunConfig:
    """Return a run that does little beside what is measured."""
    return from_dict(
        {
            "model": {"name": model_name, "weights": weights, "num_classes": 1000},
            "data": {"source": source, "calibration_images": IMAGES, "batch_size": 64},
            "score": {"criterion": "l1"},
            "plan": {"allocation": "uniform"},
            "refit": {"layers": "none", "recalibrate_batchnorm": False},
            "finetune": {"epochs": 0},
            "report": {"images": IMAGES},
            "seed": SEED,
        },
        RunConfig,
    )


def timed(work: Callable[[], None]) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table() -> str:
    """Return the table of measured times and sizes."""
    measured = json.loads(RESULTS.read_text())
    medians = {name: statistics.median(values) for name, values in measured["seconds"].items()}
    timed_names = ("report", *SCORING)
    heads = [f"{name}, s" for name in timed_names] + [f"report / {name}" for name in SCORING]
    values = [f"{medians[name]:.1f}" for name in timed_names]
    values += [f"{measured['ratios'][name]:.2f}" for name in SCORING]
    lines = [
        f"| network | filters | calibration images | {' | '.join(heads)} | page, MB "
        "| memory, MiB |",
        f"|{'---|' * (len(heads) + 5)}",
        f"| {measured['model']} | {measured['filters']} | {measured['images']} "
        f"| {' | '.join(values)} | "
        f"{measured['page_mb']:.1f} | {measured['peak_memory_mib']} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
