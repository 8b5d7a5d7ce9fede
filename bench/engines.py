"""Measure what another engine would save in passes that only look at outputs, and what it costs.

    python bench/engines.py [--only PATTERN]

Evaluation and the tails of the sensitivity could run in onnxruntime or in code that
`torch.compile` has made, with frozen weights. Both must be made for every network first. For each
network this measures that once, and passes of the same images, interleaved, in processor seconds
of one thread; memory that is freed is kept (`kept_memory`), as in a run. The rows are in
`results/engines.json`; the table in docs/research/speed.md is written from them.
"""

from __future__ import annotations

import fnmatch
import shlex
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

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
)
from secateur.engines.onnxruntime import onnx_runner
from secateur.experiments.onnx_export import export_onnx
from secateur.graph.build import build_dependency_graph
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.module_state import tensors_of
from secateur.models.divergence import relative_error
from secateur.runtime.kept_memory import kept_memory
from tables import with_table
from zoo import Member, build, of_side, random_images

RESULTS = ROOT / "results" / "engines.json"
PAGE = ROOT / "docs" / "research" / "speed.md"
NETWORKS = ("resnet50", "efficientnet_b0", "mobilenet_v2", "vgg16_bn")
ENGINES = ("model(images)", "secateur's passes", "inductor, frozen", "onnxruntime")
SIDE, BATCH, SEED = 224, 16, 0
ROUNDS = 5
PACKAGES = ("onnx", "onnxruntime", "onnxscript")

Forward = Callable[[Tensor], Tensor]


def measure(name: str, note: Note) -> None:
    """Make each engine's network once, and time passes, interleaved."""
    model = build(
        Member(f"torchvision:{name}", "torchvision", of_side(SIDE)), SEED, disturbed=False
    )
    images = random_images(BATCH, SIDE, SEED + 1)
    graph = build_dependency_graph(model, images[:2]).graph
    state = tensors_of(model)

    def in_our_passes(batch: Tensor) -> Tensor:
        return GraphInterpreter(graph, state, batch).finish()[0]

    make: dict[str, Callable[[], Forward]] = {
        "model(images)": lambda: model,
        "secateur's passes": lambda: in_our_passes,
        "inductor, frozen": lambda: _compiled(model, images),
        "onnxruntime": lambda: _exported(model, images),
    }
    seconds_to_make: dict[str, float] = {}
    forwards: dict[str, Forward] = {}
    differences: dict[str, float] = {}
    with kept_memory(), torch.no_grad():
        expected = model(images)
        for engine in ENGINES:
            note(stage=engine)
            before = time.process_time()
            forwards[engine] = make[engine]()
            differences[engine] = relative_error(forwards[engine](images), expected)
            seconds_to_make[engine] = time.process_time() - before
        seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for _ in range(ROUNDS):
            for engine, forward in forwards.items():
                before = time.process_time()
                forward(images)
                seconds[engine].append((time.process_time() - before) / BATCH)
    note(
        stage="done",
        seconds_to_make=seconds_to_make,
        seconds_an_image=seconds,
        differences=differences,
    )


def _compiled(model: torch.nn.Module, images: Tensor) -> Forward:
    torch.compiler.reset()
    compiled: Forward = torch.compile(model, dynamic=False, options={"freezing": True})
    compiled(images)
    return compiled


def _exported(model: torch.nn.Module, images: Tensor) -> Forward:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        export_onnx(model, images, path)
        runner = onnx_runner(path)
    return lambda batch: torch.from_numpy(runner(batch)[0])


def engine_table(rows: list[Row]) -> str:
    """Return ms an image, seconds to make, and from how many images on that pays."""
    lines = [
        "| network | engine | ms an image | seconds to make it | pays from | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["outcome"] != "ok":
            lines.append(f"| {row['network']} | {row['outcome']}: {row['reason']} |||||")
            continue
        median = {e: statistics.median(values) for e, values in row["seconds_an_image"].items()}
        ours = median["secateur's passes"]
        for engine in ENGINES:
            cost, saved = row["seconds_to_make"][engine], ours - median[engine]
            is_other = engine in ENGINES[2:]
            pays = f"{cost / saved:,.0f} images" if saved > 0 else "never"
            cells = [row["network"], engine, f"{1e3 * median[engine]:.1f}"]
            cells += [f"{cost:.1f}", pays] if is_other else ["", ""]
            lines.append(f"| {' | '.join(cells)} | {row['differences'][engine]:.0e} |")
    return "\n".join(lines)


def child(arguments: Namespace) -> None:
    """Measure one network in this process."""
    torch.set_num_threads(arguments.threads)
    record(partial(measure, arguments.network), Path(arguments.out), *PACKAGES)


def main() -> None:
    """Measure the networks and write the table."""
    arguments = bench_parser(__doc__, limit=1800).parse_args()
    if arguments.child:
        child(arguments)
        return
    for name in fnmatch.filter(NETWORKS, arguments.only) if not arguments.tables else ():
        with tempfile.TemporaryDirectory() as directory:
            options = ["--network", name, "--threads", str(arguments.threads)]
            out = Path(directory) / "row.json"
            result = run_child("engines.py", options, out, arguments.limit)
        row: Row = {
            "network": name,
            "command": shlex.join(["python", "bench/engines.py", "--only", name]),
            "revision": revision(),
            "seed": SEED,
            "environment": surroundings(*PACKAGES),
            **result,
        }
        put_row(RESULTS, row, ("network",))
        print(name, row["outcome"], row.get("reason", ""), flush=True)
    if PAGE.is_file():
        PAGE.write_text(with_table(PAGE.read_text(), "engines", engine_table(read_rows(RESULTS))))


if __name__ == "__main__":
    main()
