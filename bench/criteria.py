"""Every criterion under one protocol, without training: CIFAR-10 networks and ImageNet networks.

    python bench/criteria.py cifar10 --data DIR --weights DIR --jobs 2

ranks the filters of each network by each criterion, all from one pass over the calibration images,
cuts to each target with equal shares in every layer, refits the kernels on the same images and
scores the result on validation images, which are held out of the training images and are neither
probe nor test images. No label is used before that score. A line a cell goes to
`results/criteria.jsonl`; cells that are there are not measured again, so a run can be interrupted,
and `--jobs` processes work side by side. `--tables` only writes the tables into
docs/explanation/criteria.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from cells import Cell, key_of, put_cell, read_cells, run_all
from rows import ROOT, revision, surroundings
from secateur.config import CRITERIA, RunConfig, parse_budget
from secateur.errors import UsageError
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.scoring_context import (
    ScoringContext,
    make_criterion,
    make_scoring_context,
)
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import make_plan
from secateur.pruning.refit.layerwise import LayerOutputs, RefitInputs, refit
from secateur.runtime.module_state import tensors_of
from secateur.scoring.scores import score_filters
from secateur.scoring.taps import kernels_of
from studies import TARGETS, accuracy, channels_last, load_inputs, networks_of
from tables import with_table

RESULTS = ROOT / "results" / "criteria.jsonl"
PAGE = ROOT / "docs" / "explanation" / "criteria.md"
KEY = ("network", "seed", "target", "criterion")
SEEDS = 5


def cells() -> list[Cell]:
    """What has been measured."""
    return read_cells(RESULTS, KEY)


def measure(study: str, network: str, seed: int, arguments: argparse.Namespace) -> None:
    """Appends every cell of a network and a calibration set that is missing."""
    wanted = [
        (target, name)
        for target, name in itertools.product(TARGETS[study], CRITERIA)
        if (network, seed, target, name) not in {key_of(cell, KEY) for cell in cells()}
    ]
    if not wanted:
        return
    config, dataset, model = load_inputs(study, network, arguments)
    # The validation images are the same for every seed; the calibration set is what differs.
    config = config.model_copy(update={"seed": seed})
    context = make_scoring_context(model, dataset, config)
    names = [name for name in CRITERIA if any(name == other for _, other in wanted)]
    ruled_out = inapplicable(names, model, context, config)
    names = [name for name in names if name not in ruled_out]
    start = time.perf_counter()
    scores = score_filters(
        model,
        context.dependencies,
        lambda: context.reader.read_shard(context.calibration),
        {name: make_criterion(name, context.source, config) for name in names},
        context.source,
        config.score,
    )
    scoring_seconds = time.perf_counter() - start
    scored = dataset.validation if study == "cifar10" else dataset.test
    shown = channels_last(make_reader(config).read_shard(scored))
    probe = channels_last(context.reader.read_shard(context.calibration))
    base = accuracy(model, shown)
    layer_outputs: list[LayerOutputs] = []
    for target, name in wanted:
        cell: Cell = {
            "study": study,
            "network": network,
            "seed": seed,
            "target": target,
            "criterion": name,
        }
        if name in ruled_out:
            put_cell(RESULTS, cell | {"outcome": "not applicable", "reason": ruled_out[name]})
            continue
        start = time.perf_counter()
        plan = make_plan(scores[name].scores, context.dependencies, parse_budget(target), name)
        smaller = apply_plan(model, context.dependencies, plan)
        refit(
            RefitInputs(model, smaller, context.dependencies, plan.removed),
            probe,
            config.refit,
            seed=seed,
            layer_outputs=layer_outputs,
        )
        cell |= {
            "base_fraction": base,
            "refit_fraction": accuracy(smaller, shown),
            "images": len(scored.labels),
            "macs_left": context.dependencies.macs(plan.removed) / context.dependencies.macs(),
            "seconds": round(time.perf_counter() - start, 1),
            "scoring_seconds": round(scoring_seconds, 1),
            "calibration_images": len(context.calibration.labels),
            "concepts": config.score.concepts,
            "command": f"python bench/criteria.py {study} --data DIR --weights DIR",
            "revision": revision(),
            "environment": surroundings(),
        }
        put_cell(RESULTS, cell)


def inapplicable(
    names: Sequence[str], model: nn.Module, context: ScoringContext, config: RunConfig
) -> dict[str, str]:
    """Why a criterion that looks at weights alone has nothing to go by in a network."""
    parts = kernels_of(context.dependencies, tensors_of(model))
    found = {}
    for name in names:
        criterion = make_criterion(name, context.source, config)
        if criterion.needs:
            continue
        criterion.reset(parts)
        try:
            for part in parts:
                criterion.compute(part)
        except UsageError as error:
            found[name] = str(error)
    return found


# --- tables ------------------------------------------------------------------------------------


def table(study: str, found: list[Cell]) -> str:
    """Mean ± standard deviation over the calibration images sets, for each criterion and
    setting."""
    mine = [cell for cell in found if cell["study"] == study and "refit_fraction" in cell]
    networks = list(dict.fromkeys(cell["network"] for cell in mine))
    settings = list(itertools.product(sorted(networks), TARGETS[study]))
    seeds = {
        setting: sorted({c["seed"] for c in mine if (c["network"], c["target"]) == setting})
        for setting in settings
    }
    heads = [f"{network} {target.removeprefix('macs=')}" for network, target in settings]
    lines = [f"| criterion | {' | '.join(heads)} | mean |", f"|---|{'---|' * (len(heads) + 1)}"]
    ranked = []
    for name in CRITERIA:
        texts, means = [], []
        for network, target in settings:
            values = [
                100 * cell["refit_fraction"]
                for cell in mine
                if (cell["network"], cell["target"], cell["criterion"]) == (network, target, name)
            ]
            if values:
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                texts.append(f"{statistics.mean(values):.2f}{spread}")
                means.append(statistics.mean(values))
            else:
                texts.append("–")
        # A mean over fewer settings is another mean; such rows come last.
        mean = statistics.mean(means) if len(means) == len(settings) else None
        if means:
            ending = "–" if mean is None else f"{mean:.2f}"
            ranked.append((mean or 0.0, f"| {name} | {' | '.join(texts)} | {ending} |"))
    lines += [line for _, line in sorted(ranked, key=lambda each: -each[0])]
    bases = {cell["network"]: cell["base_fraction"] for cell in mine}
    before = ", ".join(f"{name} {100 * bases[name]:.2f}" for name in sorted(bases))
    counts = sorted({len(each) for each in seeds.values()})
    probes = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    images = mine[0]["images"]
    lines += [
        "",
        f"Top-1 in % of {images} images, {probes} calibration sets each; before: {before}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=list(TARGETS))
    parser.add_argument("--data", help="the folder of CIFAR-10, or of the ImageNet samples")
    parser.add_argument("--weights", help="folder of the weights")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(1)
        measure(arguments.study, arguments.child[0], int(arguments.child[1]), arguments)
        return
    if not arguments.tables:
        if arguments.data is None or arguments.weights is None:
            parser.error("--data and --weights are needed")
        options = ["--data", arguments.data, "--weights", arguments.weights]
        calls = [
            [arguments.study, *options, "--child", network, str(seed)]
            for seed in range(arguments.seeds)
            for network in networks_of(arguments.study)
        ]
        run_all("criteria.py", calls, arguments.jobs)
    text = PAGE.read_text()
    for study in TARGETS:
        if any(cell["study"] == study for cell in cells()):
            text = with_table(text, f"results/criteria.jsonl {study}", table(study, cells()))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
