"""Compare all criteria without training, on CIFAR-10 and ImageNet networks.

    python bench/criteria.py cifar10 --data DIR --weights DIR --workers 2

This scores the filters of each network by every criterion in one pass over the calibration images,
prunes to each target with the same fraction in every layer, refits the kernels on the same images
and scores the result on validation images, which are held out of the training images and are
neither calibration nor test images. No label is used before that score. Each measurement adds a
line to `results/criteria.jsonl`; rows that it holds are not measured again, so the bench can be
interrupted. `--workers` sets the number of processes. `--tables` only writes the tables in
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

from measurements import Measurement, append_measurement, key_of, read_measurements, run_all
from rows import ROOT, revision, surroundings
from secateur.config import CRITERIA, RunConfig, parse_budget
from secateur.graph.module_state import tensors_of
from secateur.graph.taps import kernels_of
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.scoring_context import ScoringContext, make_scoring_context
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import make_plan
from secateur.pruning.refit.layerwise import LayerOutputs, RefitInputs, refit
from secateur.runtime.errors import UsageError
from secateur.scoring.criteria import make_criterion
from secateur.scoring.scores import score_filters
from studies import TARGETS, accuracy, channels_last, load_inputs, networks_of
from tables import with_table

RESULTS = ROOT / "results" / "criteria.jsonl"
PAGE = ROOT / "docs" / "explanation" / "criteria.md"
KEY = ("network", "seed", "target", "criterion")
SEEDS = 5


def measured() -> list[Measurement]:
    """Return the rows measured so far."""
    return read_measurements(RESULTS, KEY)


def measure(study: str, network: str, seed: int, arguments: argparse.Namespace) -> None:
    """Append the missing measurements of a network and a calibration set."""
    wanted = [
        (target, name)
        for target, name in itertools.product(TARGETS[study], CRITERIA)
        if (network, seed, target, name)
        not in {key_of(measurement, KEY) for measurement in measured()}
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
    calibration = channels_last(context.reader.read_shard(context.calibration))
    base = accuracy(model, shown)
    layer_outputs: list[LayerOutputs] = []
    for target, name in wanted:
        measurement: Measurement = {
            "study": study,
            "network": network,
            "seed": seed,
            "target": target,
            "criterion": name,
        }
        if name in ruled_out:
            append_measurement(
                RESULTS, measurement | {"outcome": "not applicable", "reason": ruled_out[name]}
            )
            continue
        start = time.perf_counter()
        plan = make_plan(scores[name].scores, context.dependencies, parse_budget(target), name)
        smaller = apply_plan(model, context.dependencies, plan)
        refit(
            RefitInputs(model, smaller, context.dependencies, plan.removed),
            calibration,
            config.refit,
            seed=seed,
            layer_outputs=layer_outputs,
        )
        measurement |= {
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
        append_measurement(RESULTS, measurement)


def inapplicable(
    names: Sequence[str], model: nn.Module, context: ScoringContext, config: RunConfig
) -> dict[str, str]:
    """Return why criteria of the weights alone can't score a network, by their names."""
    kernels = kernels_of(context.dependencies, tensors_of(model))
    reasons = {}
    for name in names:
        criterion = make_criterion(name, context.source, config)
        if criterion.needs:
            continue
        criterion.reset(kernels)
        try:
            for tap in kernels:
                criterion.compute(tap)
        except UsageError as error:
            reasons[name] = str(error)
    return reasons


# --- tables ------------------------------------------------------------------------------------


def table(study: str, measurements: list[Measurement]) -> str:
    """Return mean ± standard deviation over the calibration sets, by criterion and setting."""
    mine = [
        measurement
        for measurement in measurements
        if measurement["study"] == study and "refit_fraction" in measurement
    ]
    networks = list(dict.fromkeys(measurement["network"] for measurement in mine))
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
                100 * measurement["refit_fraction"]
                for measurement in mine
                if (measurement["network"], measurement["target"], measurement["criterion"])
                == (network, target, name)
            ]
            if values:
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                texts.append(f"{statistics.mean(values):.2f}{spread}")
                means.append(statistics.mean(values))
            else:
                texts.append("–")
        # A mean over fewer settings can't be compared; such rows come last.
        mean = statistics.mean(means) if len(means) == len(settings) else None
        if means:
            ending = "–" if mean is None else f"{mean:.2f}"
            ranked.append((mean or 0.0, f"| {name} | {' | '.join(texts)} | {ending} |"))
    lines += [line for _, line in sorted(ranked, key=lambda pair: -pair[0])]
    bases = {measurement["network"]: measurement["base_fraction"] for measurement in mine}
    before = ", ".join(f"{name} {100 * bases[name]:.2f}" for name in sorted(bases))
    counts = sorted({len(values) for values in seeds.values()})
    sets = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    images = mine[0]["images"]
    lines += ["", f"Top-1 in % of {images} images, {sets} calibration sets each; before: {before}."]
    return "\n".join(lines)


def main() -> None:
    """Measure the missing rows and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=list(TARGETS))
    parser.add_argument("--data", help="the folder of CIFAR-10, or of the ImageNet samples")
    parser.add_argument("--weights", help="folder of the weights")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1)
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
        run_all("criteria.py", calls, arguments.workers)
    text = PAGE.read_text()
    for study in TARGETS:
        if any(measurement["study"] == study for measurement in measured()):
            text = with_table(text, f"results/criteria.jsonl {study}", table(study, measured()))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
