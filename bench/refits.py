"""What settings of the refit do: validation accuracy and CPU seconds, without training.

    python bench/refits.py resnet20 macs=0.5 --data DIR --weights DIR positions=16,rectified=false

cuts a CIFAR-10 network by the norms of its filters, as `bench/criteria.py` does, refits it on the
same probe images once with each of the settings (`seed` is one of them, by default 0) and scores it
on validation images. The figures in docs/research/refit.md are of one thread.
"""

from __future__ import annotations

import argparse
import time

import studies
from secateur import pipeline
from secateur.config import RefitSection
from secateur.plan import make_plan, parse_target
from secateur.progress import silent
from secateur.refit import refit
from secateur.scoring import score_filters
from secateur.surgery import apply_plan

CRITERION = "l2"


def main() -> None:
    """Prints a line for each of the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("target")
    parser.add_argument("settings", nargs="+", help="as in positions=16,form=channel,seed=1")
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    arguments = parser.parse_args()
    for text in arguments.settings:
        given = dict(pair.split("=") for pair in text.split(","))
        seed = int(given.pop("seed", 0))
        fraction, seconds = measure(arguments, RefitSection.model_validate(given), seed)
        print(f"{arguments.network} {arguments.target} {text}", end=": ")
        print(f"{100 * fraction:.2f} % in {seconds:.1f} CPU seconds", flush=True)


def measure(
    arguments: argparse.Namespace, settings: RefitSection, seed: int
) -> tuple[float, float]:
    """Accuracy on validation images, and the CPU seconds that the refit took."""
    config = studies.cifar10(arguments.network, arguments)
    dataset, model = pipeline.load_inputs(config)
    # The validation images are the same for every seed; the probe set is what differs.
    config = pipeline.resolved(config, dataset).model_copy(update={"seed": seed})
    ground = pipeline.prepare_ground(model, dataset, config)
    scores = score_filters(
        model,
        ground.wiring,
        lambda: pipeline.stream(ground.probe, config, silent, ""),
        {CRITERION: pipeline.make_criterion(CRITERION, ground.source, config)},
        ground.source,
        config.score,
    )[CRITERION].scores
    plan = make_plan(scores, ground.wiring, parse_target(arguments.target), CRITERION)
    smaller = apply_plan(model, ground.wiring, plan)
    probe = studies.channels_last(pipeline.stream(ground.probe, config, silent, ""))
    start = time.process_time()
    refit(model, smaller, ground.wiring, plan, probe, settings, seed=seed)
    seconds = time.process_time() - start
    shown = studies.channels_last(pipeline.stream(dataset.validation, config, silent, ""))
    return studies.accuracy(smaller, shown), seconds


if __name__ == "__main__":
    main()
