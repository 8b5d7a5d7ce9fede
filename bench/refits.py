"""What settings of the refit do: validation accuracy and CPU seconds, without training.

    python bench/refits.py resnet20 macs=0.5 --data DIR --weights DIR positions=16,rectified=false

cuts a CIFAR-10 network by the norms of its filters, as `bench/criteria.py` does, refits it on the
same calibration images once with each of the settings (`seed` is one of them, by default 0) and
scores it on validation images. The figures in docs/research/refit.md are of one thread.
"""

from __future__ import annotations

import argparse
import time

import studies
from secateur.config import RefitSection, parse_budget
from secateur.pipeline.inputs import load_inputs, make_reader, resolve_config
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import make_plan
from secateur.pruning.refit.layerwise import RefitInputs, refit
from secateur.scoring.criteria import make_criterion
from secateur.scoring.scores import score_filters

CRITERION = "l2"


def main() -> None:
    """Print a line for each of the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("target")
    parser.add_argument("settings", nargs="+", help="as in positions=16,form=channel,seed=1")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    arguments = parser.parse_args()
    for text in arguments.settings:
        settings = dict(pair.split("=") for pair in text.split(","))
        seed = int(settings.pop("seed", 0))
        fraction, seconds = measure(arguments, RefitSection.model_validate(settings), seed)
        print(f"{arguments.network} {arguments.target} {text}", end=": ")
        print(f"{100 * fraction:.2f} % in {seconds:.1f} CPU seconds", flush=True)


def measure(
    arguments: argparse.Namespace, settings: RefitSection, seed: int
) -> tuple[float, float]:
    """Return accuracy on validation images, and the CPU seconds of the refit."""
    config = studies.cifar10(arguments.network, arguments)
    dataset, model = load_inputs(config)
    # The validation images are the same for every seed; the calibration set is what differs.
    config = resolve_config(config, dataset, model).model_copy(update={"seed": seed})
    context = make_scoring_context(model, dataset, config)
    scores = score_filters(
        model,
        context.dependencies,
        lambda: context.reader.read_shard(context.calibration),
        {CRITERION: make_criterion(CRITERION, context.source, config)},
        context.source,
        config.score,
    )[CRITERION].scores
    plan = make_plan(scores, context.dependencies, parse_budget(arguments.target), CRITERION)
    smaller = apply_plan(model, context.dependencies, plan)
    calibration = studies.channels_last(context.reader.read_shard(context.calibration))
    start = time.process_time()
    inputs = RefitInputs(model, smaller, context.dependencies, plan.removed)
    refit(inputs, calibration, settings, seed=seed)
    seconds = time.process_time() - start
    shown = studies.channels_last(make_reader(config).read_shard(dataset.validation))
    return studies.accuracy(smaller, shown), seconds


if __name__ == "__main__":
    main()
