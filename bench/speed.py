"""Measure how long pruning takes, and how much faster the pruned network is.

    python bench/speed.py [--only PATTERN] [--mode both]
    python bench/speed.py --mode whole --before DIR --data DIR --weights DIR

`--mode whole` measures whole runs of `secateur.prune` against an older version, whose working tree
is `--before`; `--data` is the folder of CIFAR-10 and `--weights` that of its networks.

Each network is measured in its own process and then added to `results/speed.json`. Rows that are
already there are kept, so the bench can be interrupted. Finally docs/reference/speed.md is written;
`--tables` does only that. Everything that is compared is timed interleaved, so that a busy machine
slows all of it alike.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peer
from coverage import l2_scores
from interleaved import ROUNDS, Forward, time_interleaved
from rows import (
    ROOT,
    Note,
    Row,
    bench_parser,
    put_row,
    read_rows,
    record,
    revision,
    run_child,
    surroundings,
    versions,
)
from secateur.config import Budget
from secateur.engines.onnxruntime import onnx_runner
from secateur.experiments.onnx_export import export_onnx
from secateur.graph.build import build_dependency_graph
from secateur.models.divergence import relative_error
from secateur.models.evaluate import count_macs
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import make_plan
from whole_run import CASES, PEER, Folders, whole_run_table
from whole_run import measure as measure_whole
from zoo import Member, build, of_side, random_images

RESULTS = ROOT / "results" / "speed.json"
DOCS = ROOT / "docs" / "reference" / "speed.md"
NETWORKS = {
    "surgery": ("resnet50", "densenet121", "efficientnet_b0", "convnext_tiny"),
    "latency": (
        "resnet50",
        "vgg16_bn",
        "mobilenet_v2",
        "efficientnet_b0",
        "densenet121",
        "convnext_tiny",
        "regnet_y_400mf",
    ),
}
"""torchvision's networks, by what is measured."""
PACKAGES = {
    "surgery": ("torch-pruning",),
    "whole": ("torch-pruning",),
    "latency": ("onnx", "onnxruntime", "onnxscript"),
}
SIDE = 224
SEED = 0
TARGET = Budget("macs", 0.5)
BATCHES = (1, 16)
WIDTHS = 16
"""Channel counts of the timed networks are multiples of this; others can run slowly."""
ENGINES = ("eager", "compiled", "onnxruntime")
SURGERY_REPEATS = 5


def measure_surgery(name: str, note: Note) -> None:
    """Time every step from a network to its smaller copy, secateur and Torch-Pruning interleaved.

    Torch-Pruning prunes by the ratio that leaves about half of the MACs. That ratio is searched
    first; the time of the search is recorded separately.
    """
    note(stage="build")
    model = _built(name)
    images = random_images(2, SIDE, SEED + 1)
    note(stage="search")
    start = time.perf_counter()
    ratio, peer_left = _ratio_for_half(model, images[:1])
    note(search_seconds=time.perf_counter() - start, ratio=ratio, peer_macs_left=peer_left)
    steps: dict[str, list[float]] = {}

    def timed(step: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        steps.setdefault(step, []).append(time.perf_counter() - start)
        return result

    for repeat in range(SURGERY_REPEATS + 1):  # the first round warms up
        if repeat == 1:
            steps.clear()
        note(stage=f"round {repeat}")
        dependencies = timed(
            "dependency_graph", lambda: build_dependency_graph(model, images, prune_residual=True)
        )
        scores = timed("scores", partial(l2_scores, model, dependencies))
        plan = timed("plan", partial(make_plan, scores, dependencies, TARGET, "l2"))
        timed("surgery", partial(apply_plan, model, dependencies, plan))
        twin = copy.deepcopy(model)
        timed("peer_graph", partial(peer.build_graph, twin, images[:1]))
        cut = peer.cut(model, images[:1], ratio)
        steps.setdefault("peer_pruner", []).append(cut.graph_seconds)
        steps.setdefault("peer_cut", []).append(cut.cut_seconds)
    note(
        macs_left=dependencies.macs(plan.removed) / dependencies.macs(), seconds=steps, stage="done"
    )


def _ratio_for_half(model: nn.Module, image: Tensor) -> tuple[float, float]:
    """Return the ratio at which Torch-Pruning leaves about half of the MACs, and what it leaves."""
    whole = peer.macs(model, image)
    low, high, ratio, left = 0.0, 1.0, peer.FIRST_RATIO, 1.0
    for _ in range(peer.TRIALS):
        left = peer.macs(peer.cut(model, image, ratio).model, image) / whole
        if abs(left - TARGET.fraction_left) < peer.CLOSE_ENOUGH:
            break
        low, high = (low, ratio) if left < TARGET.fraction_left else (ratio, high)
        ratio = (low + high) / 2
    return ratio, left


def measure_latency(name: str, note: Note) -> None:
    """Time the forward pass of a network and of its pruned half, by engine and batch size."""
    note(stage="cut")
    model = _built(name)
    example = random_images(2, SIDE, SEED + 1)
    dependencies = build_dependency_graph(model, example, prune_residual=True)
    plan = make_plan(l2_scores(model, dependencies), dependencies, TARGET, "l2", round_to=WIDTHS)
    networks = {"original": model, "cut": apply_plan(model, dependencies, plan).eval()}
    macs = {kind: count_macs(network, example[:1]) for kind, network in networks.items()}
    timings: list[Row] = []
    note(macs=macs, timings=timings)
    for engine in ENGINES:
        for batch in BATCHES:
            note(stage=f"{engine}, batch {batch}")
            images = random_images(batch, SIDE, SEED + 2)
            timing: Row = {"engine": engine, "batch": batch}
            try:
                forwards = {kind: _forward(n, engine, images) for kind, n in networks.items()}
                timing["difference"] = max(
                    _difference(forwards[kind], network, images)
                    for kind, network in networks.items()
                )
                timing["seconds"] = time_interleaved(forwards, images)
            except Exception as error:  # an engine that can't run a network is a finding
                timing["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
            timings.append(timing)
    note(timings=timings, stage="done")


def _forward(model: nn.Module, engine: str, images: Tensor) -> Forward:
    """Return a function that runs a batch of the shape of `images`."""
    if engine == "compiled":
        torch.compiler.reset()
        compiled: Forward = torch.compile(model, dynamic=False)
        return compiled
    if engine == "onnxruntime":
        return _in_onnxruntime(model, images)
    return model


def _in_onnxruntime(model: nn.Module, images: Tensor) -> Forward:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        export_onnx(model, images, path)
        runner = onnx_runner(path)  # it has read the file
    return lambda batch: torch.from_numpy(runner(batch)[0])


def _difference(forward: Forward, model: nn.Module, images: Tensor) -> float:
    """Return how far an engine's output is from PyTorch's; the first call also warms up."""
    with torch.no_grad():
        return relative_error(forward(images), model(images))


def _built(name: str) -> nn.Module:
    return build(Member(f"torchvision:{name}", "torchvision", of_side(SIDE)), SEED, disturbed=False)


def measure(name: str, mode: str, limit: float, threads: int) -> Row:
    """Measure one row in its own process."""
    with tempfile.TemporaryDirectory() as directory:
        result = run_child(
            "speed.py",
            ["--network", name, "--mode", mode, "--threads", str(threads)],
            Path(directory) / "row.json",
            limit,
        )
    command = ["python", "bench/speed.py", "--only", name, "--mode", mode]
    command += ["--threads", str(threads)]
    return {
        "network": name,
        "mode": mode,
        "command": shlex.join(command),
        "revision": revision(),
        "seed": SEED,
        "side": SIDE,
        "limit_seconds": limit,
        **result,
    }


def whole_row(case_name: str, folders: Folders, threads: int) -> Row:
    """Measure whole runs of a case against the version before."""
    case = next(case for case in CASES if case.name == case_name)
    command = ["python", "bench/speed.py", "--mode", "whole", "--only", case_name]
    command += ["--before", "DIR", "--data", "DIR", "--weights", "DIR", "--threads", str(threads)]
    since = time.perf_counter()
    result = measure_whole(case, folders, threads)
    return {
        "network": case_name,
        "mode": "whole",
        "command": shlex.join(command),
        "revision": revision(),
        "seed": SEED,
        **result,
        "environment": surroundings(*PACKAGES["whole"]) | {"threads": threads},
        "wall_seconds": round(time.perf_counter() - since, 1),
    }


def child(arguments: argparse.Namespace) -> None:
    """Measure one network in this process."""
    torch.set_num_threads(arguments.threads)
    measure = {"surgery": measure_surgery, "latency": measure_latency}[arguments.mode]
    packages = PACKAGES[arguments.mode]
    record(partial(measure, arguments.network), Path(arguments.out), *packages)


def surgery_table(rows: list[Row]) -> str:
    """Return median seconds of pruning, and how many times as long Torch-Pruning takes."""
    lines = [
        "| network | secateur: graph | scores + plan | removal "
        "| Torch-Pruning: graph | pruner | cut | graph + cut / graph + removal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["mode"] != "surgery":
            continue
        if row["outcome"] != "ok":
            lines.append(f"| {row['network']} | {row['outcome']}: {row['reason']} |||||||")
            continue
        median = {step: statistics.median(values) for step, values in row["seconds"].items()}
        ours = median["dependency_graph"] + median["surgery"]
        theirs = median["peer_graph"] + median["peer_cut"]
        cells = [
            row["network"],
            f"{median['dependency_graph']:.2f}",
            f"{median['scores'] + median['plan']:.2f}",
            f"{median['surgery']:.2f}",
            f"{median['peer_graph']:.2f}",
            f"{median['peer_pruner']:.2f}",
            f"{median['peer_cut']:.2f}",
            f"{theirs / ours:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def latency_table(rows: list[Row]) -> str:
    """Return milliseconds before and after, by engine and batch size."""
    lines = [
        "| network | engine | batch | original, ms | pruned, ms | speed-up | of the ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for timing in row.get("timings", ()) if row["mode"] == "latency" else ():
            head = [row["network"], timing["engine"], str(timing["batch"])]
            if "seconds" not in timing:
                lines.append(f"| {' | '.join(head)} | {_short(timing['reason'])} ||||")
                continue
            before, after = (
                1e3 * statistics.median(timing["seconds"][k]) for k in ("original", "cut")
            )
            ideal = row["macs"]["original"] / row["macs"]["cut"]
            figures = [f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}×"]
            figures.append(f"{100 * before / after / ideal:.0f} %")
            lines.append(f"| {' | '.join([*head, *figures])} |")
    return "\n".join(lines)


def _short(text: str) -> str:
    return text.splitlines()[0][:100].replace("|", "\\|")


def page(rows: list[Row]) -> str:
    """Return the whole of docs/reference/speed.md."""
    environment = rows[-1]["environment"] if rows else {}
    fewest, most = ROUNDS.fewest, ROUNDS.most
    before = next((row["revision_before"] for row in rows if "revision_before" in row), "?")
    listed = ", ".join(f"{name} {value}" for name, value in environment.items())
    return f"""# Speed of pruning, and of pruned networks

This page shows how long pruning takes, and how much faster the pruned networks run. It was
written by `python bench/speed.py`. `results/speed.json` has the command, seed, versions, hardware
and every single time of each row.

The networks are torchvision's, {SIDE}×{SIDE} pixels, float32, with random weights (seed {SEED}).
They are pruned to 50 % of their MACs, including channels coupled by skip connections
(`prune_residual`).

## Forward passes

Channel counts are multiples of {WIDTHS} (`round_to`), because other channel counts can be slower
than the unpruned network. Times are medians of {fewest} to {most} passes; original and
pruned network are interleaved. *Compiled* is `torch.compile` on the CPU. *Of the ideal* compares
the speed-up with the one that the MACs alone would give.

{latency_table(rows)}

## Whole runs

Processor seconds of one thread of a whole `secateur.prune(model, images, target="macs=0.5")`, from
the first score to the last re-estimated batch norm, of this version and of {before}. *Forward
passes* divides them by what one plain `model(images)` on the same images takes in the same process.
*MiB* is the peak memory of the process, images and libraries included. ResNet-20 has trained
weights and CIFAR-10 images; the other networks have random weights, noise as images (64×64 pixels
for ResNet-10, otherwise 224×224), and batch-norm statistics of these. *Graph* is the dependency
graph alone, with the trial cut that checks it, in the mean of five.

*{PEER}* is its Taylor importance on the same images with a backward pass of all of them before
each step, steps of a twentieth of the filters until half of the MACs are left, and batch-norm
statistics of the same images.

{whole_run_table(rows)}

## Pruning

Median seconds of {SURGERY_REPEATS} interleaved runs. For secateur, *graph* builds the dependency
graph and *removal* removes the filters. For Torch-Pruning, *graph* is its `DependencyGraph`
alone, *pruner* the whole constructor of its `MagnitudePruner`, which builds one too, and *cut*
one `step()` with a known ratio, including the importance. Torch-Pruning needs several rounds of
all this to find the ratio; secateur plans for the target from one dependency graph.

{surgery_table(rows)}

In the last column, a value below 1 means that Torch-Pruning takes less time.

Last row measured with: {listed}.
"""


def is_there(rows: list[Row], name: str, mode: str, threads: int) -> bool:
    """Return whether a row has the installed versions and this number of threads."""
    for row in rows:
        if (row["network"], row["mode"]) == (name, mode) and "environment" in row:
            here = {"environment": surroundings(*PACKAGES[mode])}
            same = versions(row) == versions(here)
            return same and bool(row["environment"]["threads"] == threads)
    return False


def main() -> None:
    """Measure the missing rows and write the tables."""
    parser = bench_parser(__doc__, limit=1800)
    parser.add_argument("--mode", choices=[*NETWORKS, "both", "whole"], default="both")
    for option in ("--before", "--data", "--weights"):
        parser.add_argument(option, type=Path, help="for --mode whole")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    if arguments.mode == "whole" and not arguments.tables:
        if None in (arguments.before, arguments.data, arguments.weights):
            parser.error("--mode whole needs --before, --data and --weights")
        folders = Folders(arguments.before, arguments.data, arguments.weights)
        for name in fnmatch.filter((case.name for case in CASES), arguments.only):
            row = whole_row(name, folders, arguments.threads)
            put_row(RESULTS, row, ("network", "mode"))
            print(name, row["outcome"], row["wall_seconds"], row.get("reason", ""), flush=True)
    for mode, names in NETWORKS.items():
        if arguments.tables or arguments.mode not in (mode, "both"):
            continue
        for name in fnmatch.filter(names, arguments.only):
            again = arguments.again and fnmatch.fnmatch(name, arguments.again)
            if again or not is_there(read_rows(RESULTS), name, mode, arguments.threads):
                row = measure(name, mode, arguments.limit, arguments.threads)
                put_row(RESULTS, row, ("network", "mode"))
                reason = row.get("reason", "")
                print(name, mode, row["outcome"], row["wall_seconds"], reason, flush=True)
    DOCS.write_text(page(read_rows(RESULTS)))


if __name__ == "__main__":
    main()
