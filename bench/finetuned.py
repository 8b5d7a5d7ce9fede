"""Compare criteria after ten epochs of fine-tuning, on CIFAR-10.

    python bench/finetuned.py --data DIR --weights DIR [--workers 2] [--compile]

This runs the jobs of `configs/finetuned_cifar10.toml` as `secateur compare` does, and beside them
Torch-Pruning, cut to the same MACs by its best criterion without training
(results/training_free.jsonl) and then trained in the same way from the same teacher. Each job adds
a line to `results/finetuned.jsonl`; jobs that are there are not run again, and an interrupted one
resumes from its checkpoints in `runs/finetuned`. `--compile` trains compiled networks: the same
sums, rounded differently, and faster if odd widths are slow; it needs a C++ compiler.
`bench/results.py` writes the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import replace

import torch
from torch import nn

import benchmarks
import peer
from measurements import run_all
from peer_search import cut_to
from rows import ROOT
from secateur.config import parse_budget
from secateur.experiments.compare.job import Job
from secateur.experiments.compare.results import Row, environment_fields
from secateur.experiments.compare.spec import jobs_of
from secateur.models.evaluate import evaluate
from secateur.models.score import Score
from secateur.pipeline.inputs import load_inputs, make_reader, preprocessing_of, resolve_config
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.cost.latency_profiler import Stopwatch
from secateur.runtime.environment import environment
from secateur.training.checkpoint import Checkpoints
from secateur.training.trainer import train
from secateur.training.training_data import TrainingData
from training_free import all_but_inner

RESULTS = ROOT / "results" / "finetuned.jsonl"
CONFIG = ROOT / "configs" / "finetuned_cifar10.toml"
WORK = ROOT / "runs" / "finetuned"
PEER = peer.Settings("fpgm", is_global=True)
PEER_NAME = "torch-pruning fpgm, global"


def measure_peer(job: Job) -> Row:
    """Return the row of a job with Torch-Pruning in place of its criterion."""
    config = job.config
    dataset, model = load_inputs(config)
    config = resolve_config(config, dataset, model)
    context = make_scoring_context(model, dataset, config)
    image = context.example[:1]
    settings = replace(PEER, whole=all_but_inner(model, context.dependencies))
    start = time.perf_counter()
    smaller = cut_to(model, image, settings, parse_budget(job.target).fraction_left).model
    cut_seconds = time.perf_counter() - start
    latency_left = Stopwatch(model, context.example).fraction_left(smaller)

    def score(network: nn.Module) -> Score:
        return evaluate(network, make_reader(config).read_shard(dataset.test))

    before, cut = score(model), score(smaller)
    training = train(
        smaller,
        model,
        TrainingData(dataset.train, preprocessing_of(config)),
        config.finetune,
        seed=config.seed,
        checkpoints=Checkpoints(WORK / f"peer-{job.id}"),
    )
    after = score(smaller)
    return Row(
        **environment_fields(environment()),
        network=job.network,
        variant="",
        criterion=PEER_NAME,
        target=job.target,
        seed=job.seed,
        outcome="done",
        reason="",
        score_on="test",
        images=after.images,
        before_top1_fraction=before.metric,
        cut_top1_fraction=cut.metric,
        finetuned_top1_fraction=after.metric,
        top1_fraction=after.metric,
        macs_left=after.macs / before.macs,
        parameters_left=after.parameters / before.parameters,
        latency_left=latency_left,
        seconds=round(cut_seconds + training.seconds, 1),
        id=hashlib.sha256(f"{PEER_NAME} {job.id}".encode()).hexdigest()[:16],
    )


def main() -> None:
    """Measure the missing rows, or the one job of Torch-Pruning that this process is for."""
    parser = benchmarks.make_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="train the compiled networks")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    spec = benchmarks.configured(CONFIG, arguments)
    finetune = spec.finetune.model_copy(update={"compile": arguments.compile})
    spec = spec.model_copy(update={"finetune": finetune})
    if arguments.peer is not None:
        (job,) = (job for job in jobs_of(spec) if job.id == arguments.peer)
        torch.set_num_threads(spec.threads)
        benchmarks.append_row(RESULTS, measure_peer(job))
        return
    benchmarks.measure(spec, RESULTS, arguments.workers)
    known = {benchmarks.key_of(row) for row in benchmarks.measured_rows(RESULTS)}
    options = ["--data", arguments.data, "--weights", str(arguments.weights)]
    options += ["--compile"] * arguments.compile
    calls = [
        [*options, "--peer", job.id]
        for job in jobs_of(spec)
        if job.criterion == spec.criteria[0]  # once for each network, target and seed
        and benchmarks.key_of(replace(job, criterion=PEER_NAME)) not in known
    ]
    run_all("finetuned.py", calls, arguments.workers)


if __name__ == "__main__":
    main()
