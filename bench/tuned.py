"""What ten epochs of training leave of the differences between criteria, on CIFAR-10.

    python bench/tuned.py --data DIR --weights DIR [--jobs 2] [--compile]

runs the cells of `configs/tuned_cifar10.toml` as `secateur compare` does, and beside them what
Torch-Pruning cuts to the same MACs by the criterion that is its best without training
(results/training_free.jsonl): its own surgery, then the same training from the same teacher. A line
a cell goes to `results/tuned.jsonl`; cells that are there are not measured again, and one that was
interrupted goes on from its checkpoints in `runs/tuned`. `--compile` trains compiled networks: the
same sums, rounded otherwise, faster where odd widths are slow; it takes a C++ compiler.
`bench/results.py` writes the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import replace

import torch
from torch import nn

import comparisons
import peer
from cells import run_all
from peer_search import cut_to
from rows import ROOT
from secateur.config import parse_budget
from secateur.evaluation.evaluate import Score, evaluate
from secateur.experiments.compare.results import Row, place_of
from secateur.experiments.compare.spec import Job, jobs_of
from secateur.pipeline.inputs import (
    load_inputs,
    make_reader,
    preprocessing_of,
    resolve_config,
)
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.cost.latency_profiler import measure_fraction_left
from secateur.runtime.environment import environment
from secateur.training.checkpoint import Checkpoints
from secateur.training.trainer import train
from secateur.training.training_data import TrainingData
from training_free import all_but_inner

RESULTS = ROOT / "results" / "tuned.jsonl"
CONFIG = ROOT / "configs" / "tuned_cifar10.toml"
WORK = ROOT / "runs" / "finetuned"
PEER = peer.Settings("fpgm", is_global=True)
PEER_NAME = "torch-pruning fpgm, global"


def measure_peer(cell: Job) -> Row:
    """Torch-Pruning in the place of the cell's criterion."""
    config = cell.config
    dataset, model = load_inputs(config)
    config = resolve_config(config, dataset)
    context = make_scoring_context(model, dataset, config)
    image = context.example[:1]
    settings = replace(PEER, whole=all_but_inner(model, context.dependencies))
    start = time.perf_counter()
    smaller = cut_to(model, image, settings, parse_budget(cell.target).fraction_left).model
    cut_seconds = time.perf_counter() - start
    latency_left = measure_fraction_left(model, smaller, context.example)

    def score(network: nn.Module) -> Score:
        return evaluate(network, make_reader(config).read_shard(dataset.test))

    before, cut = score(model), score(smaller)
    training = train(
        smaller,
        model,
        TrainingData(dataset.train, preprocessing_of(config)),
        config.finetune,
        seed=config.seed,
        checkpoints=Checkpoints(WORK / f"peer-{cell.id}"),
    )
    tuned = score(smaller)
    return Row(
        **place_of(environment()),
        network=cell.network,
        variant="",
        criterion=PEER_NAME,
        target=cell.target,
        seed=cell.seed,
        outcome="done",
        reason="",
        score_on="test",
        images=tuned.images,
        before_top1_fraction=before.top1_fraction,
        cut_top1_fraction=cut.top1_fraction,
        finetuned_top1_fraction=tuned.top1_fraction,
        top1_fraction=tuned.top1_fraction,
        macs_left=tuned.macs / before.macs,
        parameters_left=tuned.parameters / before.parameters,
        latency_left=latency_left,
        seconds=round(cut_seconds + training.seconds, 1),
        id=hashlib.sha256(f"{PEER_NAME} {cell.id}".encode()).hexdigest()[:16],
    )


def main() -> None:
    """Measures what is missing, or the one cell of Torch-Pruning that this process is for."""
    parser = comparisons.parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="train the compiled networks")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    comparison = comparisons.asked_for(CONFIG, arguments)
    finetune = comparison.finetune.model_copy(update={"compile": arguments.compile})
    comparison = comparison.model_copy(update={"finetune": finetune})
    if arguments.peer is not None:
        (cell,) = (cell for cell in jobs_of(comparison) if cell.id == arguments.peer)
        torch.set_num_threads(comparison.threads)
        comparisons.put(RESULTS, measure_peer(cell))
        return
    comparisons.measure(comparison, RESULTS, arguments.jobs)
    known = {comparisons.key_of(row) for row in comparisons.rows_in(RESULTS)}
    options = ["--data", arguments.data, "--weights", str(arguments.weights)]
    options += ["--compile"] * arguments.compile
    calls = [
        [*options, "--peer", cell.id]
        for cell in jobs_of(comparison)
        if cell.criterion == comparison.criteria[0]  # once for each network, target and seed
        and comparisons.key_of(replace(cell, criterion=PEER_NAME)) not in known
    ]
    run_all("tuned.py", calls, arguments.jobs)


if __name__ == "__main__":
    main()
