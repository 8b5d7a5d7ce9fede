"""What ten epochs of training leave of the differences between criteria, on CIFAR-10.

    python bench/tuned.py --data DIR --weights DIR [--jobs 2] [--seeds N]

runs the cells of `configs/tuned_cifar10.toml` as `secateur compare` does, and beside them what
Torch-Pruning cuts to the same MACs by the criterion that is its best without training
(results/training_free.jsonl): its own surgery, then the same training from the same teacher. A line
a cell goes to `results/tuned.jsonl`; cells that are there are not measured again, and one that was
interrupted goes on from its checkpoints in `runs/tuned`. `bench/results.py` writes the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import peer
from cells import run_all
from peer_search import cut_to
from rows import ROOT
from secateur import pipeline, sweep
from secateur.checkpoint import Checkpoints
from secateur.comparison import Cell, Comparison, cells_of
from secateur.evaluate import Score, evaluate
from secateur.plan import parse_target
from secateur.progress import silent
from secateur.report.comparison import accuracy_table, difference_table
from secateur.result import environment
from secateur.rows import Row, read_rows, row_of, to_lines
from secateur.standings import standings
from secateur.training import train
from training_free import all_but_inner

RESULTS = ROOT / "results" / "tuned.jsonl"
CONFIG = ROOT / "configs" / "tuned_cifar10.toml"
WORK = ROOT / "runs" / "tuned"
PEER = peer.Settings("fpgm", is_global=True)
PEER_NAME = "torch-pruning fpgm, global"


def known_rows() -> list[Row]:
    """What has been measured."""
    return read_rows(RESULTS) if RESULTS.is_file() else []


def put(row: Row) -> None:
    """Appends a row to the result file."""
    with RESULTS.open("a") as file:
        file.write(to_lines([row]))


def asked_for(arguments: argparse.Namespace) -> tuple[Comparison, tuple[Cell, ...]]:
    """The comparison and its cells, with the data and the weights that are given."""
    comparison = sweep.read_comparison(CONFIG).with_weights_in(arguments.weights)
    kind = comparison.data.source.partition(":")[0]
    data = comparison.data.model_copy(update={"source": f"{kind}:{arguments.data}"})
    comparison = comparison.model_copy(update={"data": data})
    return comparison, cells_of(comparison)


def measure(comparison: Comparison, cell: Cell) -> None:
    """Has a cell of the comparison worked off in a process."""
    only = {"criteria": (cell.criterion,), "targets": (cell.target,), "seeds": (cell.seed,)}
    (found,) = sweep.compare(comparison.model_copy(update=only), WORK / cell.id, retry=True)
    if found.result is None:
        raise SystemExit(f"{cell.criterion}, {cell.target}, seed {cell.seed}: {found.reason}")
    put(row_of(found))


def measure_peer(cell: Cell) -> Row:
    """Torch-Pruning in the place of the cell's criterion."""
    config = cell.config
    dataset, model = pipeline.load_inputs(config)
    config = pipeline.resolved(config, dataset)
    ground = pipeline.prepare_ground(model, dataset, config)
    image = ground.example[:1]
    settings = replace(PEER, whole=all_but_inner(model, ground.wiring))
    start = time.perf_counter()
    smaller = cut_to(model, image, settings, parse_target(cell.target).fraction_left).model

    def score(network: nn.Module) -> Score:
        return evaluate(network, pipeline.stream(dataset.test, config, silent, ""))

    before, cut = score(model), score(smaller)
    training = train(
        smaller,
        model,
        dataset.train,
        pipeline.preprocessing(config),
        config.finetune,
        seed=config.seed,
        checkpoints=Checkpoints(WORK / f"peer-{cell.id}"),
    )
    tuned = score(smaller)
    place = environment().model_dump(include={"secateur", "torch", "processor", "cores", "threads"})
    return Row(
        **place,
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
        tuned_top1_fraction=tuned.top1_fraction,
        top1_fraction=tuned.top1_fraction,
        macs_left=tuned.macs / before.macs,
        parameters_left=tuned.parameters / before.parameters,
        latency_left=tuned.latency_ms / before.latency_ms,
        seconds=round(training.seconds + time.perf_counter() - start, 1),
        id=hashlib.sha256(f"{PEER_NAME} {cell.id}".encode()).hexdigest()[:16],
    )


def table(rows: list[Row]) -> str:
    """Accuracies and their differences."""
    if not rows:
        return "Not measured yet."
    found = standings(rows, sweep.read_comparison(CONFIG).compared_with)
    return "\n\n".join(each.markdown() for each in (accuracy_table(found), difference_table(found)))


def main() -> None:
    """Measures what is missing, or the one cell of Torch-Pruning that this process is for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the folder of CIFAR-10")
    parser.add_argument(
        "--weights", type=Path, required=True, help="the folder of the base weights"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    comparison, cells = asked_for(arguments)
    if arguments.peer is not None:
        torch.set_num_threads(comparison.threads)
        put(measure_peer(next(cell for cell in cells if cell.id == arguments.peer)))
        return
    known = {(row.criterion, row.target, row.seed) for row in known_rows()}
    options = ["--data", arguments.data, "--weights", str(arguments.weights)]
    jobs: list[Callable[[], None]] = []
    for cell in sorted(cells, key=lambda cell: cell.seed):
        if arguments.seeds is not None and cell.seed >= arguments.seeds:
            continue
        if (cell.criterion, cell.target, cell.seed) not in known:
            jobs.append(partial(measure, comparison, cell))
        is_first = cell.criterion == comparison.criteria[0]
        if is_first and (PEER_NAME, cell.target, cell.seed) not in known:
            jobs.append(partial(run_all, "tuned.py", [[*options, "--peer", cell.id]], 1))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


if __name__ == "__main__":
    main()
