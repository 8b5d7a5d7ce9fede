"""What scoring costs, in forward passes, and how its memory grows with the images.

    python bench/scoring.py [--only PATTERN] [--threads 2] [--mode both]

measures every network in a process of its own and after each writes `results/scoring.json`; then it
writes the table into docs/explanation/scoring.md, and `--tables` does only that. Costs are ratios
to `model(images)` under `inference_mode` on the same images in the same batches, interleaved in one
process, of processor seconds, which a busy machine distorts least; the file has the clock's, too.
"""

from __future__ import annotations

import argparse
import fnmatch
import resource
import shlex
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from torch.fx.node import Node

import peer
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
from secateur.config import CRITERIA, ScoreSection
from secateur.data import Batch, batches
from secateur.data.preprocessing import Preprocessing
from secateur.graph import interpreter
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Tap
from secateur.models import zoo
from secateur.runtime.module_state import tensors_of
from secateur.scoring import concepts, criteria
from secateur.scoring.batching import images_at_a_time
from secateur.scoring.feature_pass import run_feature_pass
from secateur.scoring.taps import maps_of, taps_of
from tables import with_table
from zoo import CLASSES

RESULTS = ROOT / "results" / "scoring.json"
PAGE = ROOT / "docs" / "explanation" / "scoring.md"
NETWORKS = {
    "resnet20": 2048,
    "torchvision:resnet50": 128,
    "torchvision:vgg16_bn": 128,
    "torchvision:efficientnet_b0": 128,
    "torchvision:densenet121": 128,
}
"""Networks, and how many images each scores: a multiple of 128, so that the sample that is looked
at first, every eighth image, fills whole batches."""
MEMORY = {"resnet20": (256, 2048), "torchvision:resnet50": (64, 512)}
"""Numbers of images between which the growth of a process's peak memory is measured."""
OTHERS = tuple(name for name in CRITERIA if name not in ("taylor", "hrank"))
COMBINATIONS = {
    "vote-response": ("vote-response",),
    "vote-iou": ("vote-iou",),
    "vote": ("vote",),
    "all others": OTHERS,
    "hrank": ("hrank",),
    "taylor": ("taylor",),
}
"""What is scored in one pass, by the name of its cell."""
FEW_IMAGES = {
    "all others": 64,
    "hrank": 16,
    "taylor": 32,
    "Torch-Pruning Taylor": 32,
    "Torch-Pruning Hessian": 8,
    "literal dissection": 16,
}
"""How many of the large networks' images suffice where every image costs the same; the votes look
at a sample in a first pass and need as many as fill it."""
SMALL = 64
"""Networks for images of fewer pixels a side take all images, except for the last two."""
POOL = 128
"""Different images that there are; further ones repeat them, so that nothing grows with them."""
SEED = 0
TURNS = (1, 7)
"""Turns of each way: at least, and at most; between them until its share of `--seconds` is over."""
PACKAGES = ("torch-pruning",)


class Noise:
    """A list of images of uniform noise of which only a few are held."""

    def __init__(self, count: int, side: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        shape = (min(count, POOL), 3, side, side)
        self._pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def read(
        self, indices: Int[Tensor, "image"], preprocessing: Preprocessing
    ) -> UInt8[Tensor, "image rgb height width"]:
        """See `Images.read`."""
        return self._pixels[indices % len(self._pixels)]

    def originals(self, indices: Int[Tensor, "image"]) -> list[UInt8[Tensor, "rgb _ _"]]:
        """See `Images.originals`."""
        return list(self._pixels[indices % len(self._pixels)])

    def take(self, indices: Int[Tensor, "image"]) -> Noise:
        """All of them or none: nobody asks for a part."""
        assert len(indices) == len(self.labels)
        return self


@dataclass(frozen=True, eq=False)
class Ground:
    """A network that scoring is measured on."""

    model: nn.Module
    preprocessing: Preprocessing
    dependencies: DependencyGraph
    settings: ScoreSection

    def batches(self, count: int) -> Iterator[Batch]:
        """So many images, as many at a time as scoring takes."""
        side = self.preprocessing.image_size
        size = images_at_a_time(side, side)
        return batches(Noise(count, side), size, self.preprocessing)

    def forward(self, count: int) -> None:
        """What scoring is compared with."""
        with torch.inference_mode():
            for batch in self.batches(count):
                self.model(batch.images)

    def score(self, names: tuple[str, ...], count: int) -> list[criteria.Criterion]:
        """Shows the images to criteria; what they find in them is not computed yet."""
        state = tensors_of(self.model)
        classes = tuple(map(str, range(CLASSES)))
        source = concepts.make(
            self.settings.concepts, self.dependencies.graph, state, classes, self.preprocessing
        )
        made = [criteria.make(name, self.settings, SEED, {}) for name in names]
        shown = partial(self.batches, count)
        run_feature_pass(self.model, self.dependencies, shown, made, source, self.settings)
        return made


def make_ground(name: str) -> Ground:
    """The named network, untrained; every layer that can be cut is scored."""
    model = zoo.load(name, num_classes=CLASSES, seed=SEED)
    preprocessing = zoo.preprocessing(name)
    side = preprocessing.image_size
    example = next(batches(Noise(2, side), 2, preprocessing)).images
    dependencies = build_dependency_graph(model, example, prune_residual=True)
    return Ground(model, preprocessing, dependencies, ScoreSection())


def dissect(context: Ground, count: int) -> None:
    """Each map at the images' size, binarised and intersected with one mask: eq. 1 as it stands.

    (Bau et al., Network Dissection, CVPR 2017.) That it must find the thresholds first, that there
    are many concepts, and that masks must be read is not counted.
    """
    side = context.preprocessing.image_size
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[: side // 2, : side // 2] = True
    state = tensors_of(context.model)

    looks: dict[Node, list[Tap]] = {}
    for group in context.dependencies.groups.values():
        for look in taps_of(group).values():
            looks.setdefault(look.node, []).append(look)

    def see(node: Node, value: Tensor) -> None:
        for look in looks[node]:
            maps = maps_of(look, value)
            if maps.shape[2:].numel() == 1:
                continue
            for image in maps:  # all maps of all images would take gigabytes
                active = F.interpolate(image[None], (side, side), mode="bilinear")[0] > 0
                intersection = (active & mask).sum((1, 2))
                intersection.div(active.sum((1, 2)) + mask.sum() - intersection)

    taps = {node: partial(see, node) for node in looks}
    with torch.inference_mode():
        for batch in context.batches(count):
            interpreter.run(context.dependencies.graph, state, batch.images, after=taps)


class Peer:
    """Torch-Pruning's importance by gradients, accumulated and computed as its examples do."""

    def __init__(self, context: Ground) -> None:
        import torch_pruning as tp

        self._ground = context
        self._tp = tp
        self._example = next(iter(context.batches(1))).images
        with warnings.catch_warnings(action="ignore"):
            self._dependencies = tp.DependencyGraph().build_dependency(
                context.model, example_inputs=self._example
            )

    def taylor(self, count: int) -> None:
        """`GroupTaylorImportance`: one backward pass of the mean loss a batch."""
        model = self._ground.model
        model.zero_grad()
        for batch in self._ground.batches(count):
            F.cross_entropy(model(batch.images), batch.labels).backward()
        self._rank(self._tp.importance.GroupTaylorImportance())

    def hessian(self, count: int) -> None:
        """`GroupHessianImportance`: one backward pass an image."""
        model = self._ground.model
        importance = self._tp.importance.GroupHessianImportance()
        for batch in self._ground.batches(count):
            for loss in F.cross_entropy(model(batch.images), batch.labels, reduction="none"):
                model.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model)
        self._rank(importance)

    def _rank(self, importance: Any) -> None:
        model = self._ground.model
        with warnings.catch_warnings(action="ignore"):
            for group in self._dependencies.get_all_groups(
                ignored_layers=list(peer.heads(model).values())
            ):
                importance(group)
        model.zero_grad()


def measure_time(name: str, count: int, seconds: float, note: Note) -> None:
    """Times every way of scoring, with a plain forward pass on the same images before each."""
    note(stage="build")
    context = make_ground(name)
    theirs = Peer(context)
    ways: dict[str, Callable[[int], object]] = {
        **{cell: partial(context.score, names) for cell, names in COMBINATIONS.items()},
        "Torch-Pruning Taylor": theirs.taylor,
        "Torch-Pruning Hessian": theirs.hessian,
        "literal dissection": partial(dissect, context),
    }
    images_of = {cell: min(count, FEW_IMAGES.get(cell, count)) for cell in ways}
    if context.preprocessing.image_size < SMALL:
        images_of |= dict.fromkeys((*COMBINATIONS, "Torch-Pruning Taylor"), count)
    cells: dict[str, Row] = {
        cell: {"images": images, "plain": [], "seconds": [], "plain_cpu": [], "seconds_cpu": []}
        for cell, images in images_of.items()
    }
    context.forward(1)  # warms up
    context.score(("vote-response",), 1)
    for cell, run in ways.items():
        begin = time.perf_counter()
        for turn in range(TURNS[1]):
            if turn >= TURNS[0] and time.perf_counter() - begin > seconds / len(ways):
                break
            note(stage=f"{cell}, turn {turn}", cells=cells)
            for kind, action in (("plain", context.forward), ("seconds", run)):
                start, start_cpu = time.perf_counter(), time.process_time()
                action(images_of[cell])
                cells[cell][kind].append(round(time.perf_counter() - start, 4))
                cells[cell][f"{kind}_cpu"].append(round(time.process_time() - start_cpu, 4))
    note(stage="done", cells=cells)


def measure_memory(name: str, count: int, note: Note) -> None:
    """Scores images once; the process's peak memory is noted with whatever is."""
    note(stage="build")
    context = make_ground(name)
    note(stage="score", before_mib=_peak_mib())
    context.score(("vote-response",), count)
    note(stage="done", peak_mib=_peak_mib())


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, mode: str, count: int, arguments: argparse.Namespace) -> Row:
    """A row, from a process of its own."""
    options = ["--mode", mode, "--threads", str(arguments.threads), "--images", str(count)]
    options += ["--seconds", f"{arguments.seconds:g}"]
    with tempfile.TemporaryDirectory() as directory:
        found = run_child(
            "scoring.py",
            ["--network", name, *options],
            Path(directory) / "row.json",
            arguments.limit,
        )
    return {
        "network": name,
        "mode": mode,
        "images": count,
        "command": shlex.join(["python", "bench/scoring.py", "--only", name, *options]),
        "revision": revision(),
        "seed": SEED,
        "side": zoo.preprocessing(name).image_size,
        "limit_seconds": arguments.limit,
        **found,
    }


def child(arguments: argparse.Namespace) -> None:
    """Measures one network in this process."""
    torch.set_num_threads(arguments.threads)
    run = (
        partial(measure_time, seconds=arguments.seconds)
        if arguments.mode == "time"
        else measure_memory
    )
    record(
        lambda note: run(arguments.network, arguments.images, note=note),
        Path(arguments.out),
        *PACKAGES,
    )


def ratio(cell: Row) -> float:
    """How many plain forward passes a way of scoring takes: the median of the turns."""
    pairs = zip(cell["seconds_cpu"], cell["plain_cpu"], strict=False)
    return float(statistics.median(after / before for after, before in pairs))


def table(found: list[Row]) -> str:
    """Costs by network, then the growth of memory."""
    names = [*COMBINATIONS, "Torch-Pruning Taylor", "Torch-Pruning Hessian", "literal dissection"]
    lines = [
        f"| network | images | threads | turns | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for row in found:
        if row["mode"] != "time":
            continue
        cells = row.get("cells", {})
        done = {name: cells.get(name, {}).get("seconds", ()) for name in names}
        figures = [f"{ratio(cells[name]):.2f}" if done[name] else row["outcome"] for name in names]
        threads = row.get("environment", {}).get("threads", "")
        head = [row["network"], row["images"], threads, max(map(len, done.values()))]
        lines.append(f"| {' | '.join(map(str, [*head, *figures]))} |")
    lines += [
        "",
        "| network | peak memory, MiB | with more images, MiB | growth |",
        "|---|---|---|---|",
    ]
    for name, (fewer, more) in MEMORY.items():
        peaks = {
            row["images"]: row["peak_mib"]
            for row in found
            if (row["network"], row["mode"]) == (name, "memory") and "peak_mib" in row
        }
        if fewer in peaks and more in peaks:
            growth = peaks[more] / peaks[fewer] - 1
            lines.append(
                f"| {name} | {peaks[fewer]:.0f} ({fewer} images) "
                f"| {peaks[more]:.0f} ({more} images) | {100 * growth:+.1f} % |"
            )
    return "\n".join(lines)


def is_there(found: list[Row], name: str, mode: str, count: int, threads: int) -> bool:
    """Whether a row was measured with the versions that are installed, and as many threads."""
    for row in found:
        if (row["network"], row["mode"], row["images"]) == (name, mode, count):
            here = {"environment": surroundings(*PACKAGES)}
            same = "environment" in row and versions(row) == versions(here)
            return same and bool(row["environment"]["threads"] == threads)
    return False


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """The network, mode and number of images of every row that is asked for."""
    for name, count in NETWORKS.items():
        if fnmatch.fnmatch(name, arguments.only):
            if arguments.mode in ("time", "both"):
                yield name, "time", arguments.images or count
            if arguments.mode in ("memory", "both"):
                for images in MEMORY.get(name, ()):
                    if arguments.images in (None, images):
                        yield name, "memory", images


def main() -> None:
    """Measures what is missing and writes the table."""
    parser = bench_parser(__doc__, limit=3600)
    parser.set_defaults(threads=2)
    parser.add_argument("--mode", choices=["time", "memory", "both"], default="both")
    parser.add_argument("--images", type=int, help="instead of each network's own number")
    parser.add_argument(
        "--seconds", type=float, default=600, help="for the turns of a network, about"
    )
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    for name, mode, count in () if arguments.tables else wanted(arguments):
        again = arguments.again and fnmatch.fnmatch(name, arguments.again)
        if again or not is_there(read_rows(RESULTS), name, mode, count, arguments.threads):
            row = measure(name, mode, count, arguments)
            key = ("network", "mode", "images") if mode == "memory" else ("network", "mode")
            put_row(RESULTS, row, key)
            said = row.get("reason", "")
            print(name, mode, count, row["outcome"], row["wall_seconds"], said, flush=True)
    page = PAGE.read_text()
    PAGE.write_text(with_table(page, "results/scoring.json", table(read_rows(RESULTS))))


if __name__ == "__main__":
    main()
