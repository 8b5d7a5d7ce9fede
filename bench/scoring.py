"""Measure the cost of scoring in forward passes, and how its memory grows with the images.

    python bench/scoring.py [--only PATTERN] [--threads 2] [--mode both]

Each network is measured in its own process and then added to `results/scoring.json`. Finally the
table in docs/explanation/scoring.md is written; `--tables` does only that. Costs are ratios to
`model(images)` under `inference_mode` on the same images in the same batches, interleaved in one
process, of processor seconds, which a busy machine distorts least; the file also has wall seconds.
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
from secateur.data.images import LabelledImages
from secateur.data.preprocessing import Preprocessing
from secateur.graph import interpreter
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Tap
from secateur.graph.module_state import tensors_of
from secateur.graph.taps import maps_of, taps_of
from secateur.models import zoo
from secateur.scoring import concepts, criteria
from secateur.scoring.batching import images_at_a_time
from secateur.scoring.feature_pass import run_feature_pass
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
"""Networks, and their numbers of images: multiples of 128, so that the sample for the first pass,
every eighth image, fills whole batches."""
MEMORY = {"resnet20": (256, 2048), "torchvision:resnet50": (64, 512)}
"""Two numbers of images between which the growth of peak memory is measured."""
OTHERS = tuple(name for name in CRITERIA if name not in ("taylor", "hrank"))
COMBINATIONS = {
    "vote-response": ("vote-response",),
    "vote-iou": ("vote-iou",),
    "vote": ("vote",),
    "all others": OTHERS,
    "hrank": ("hrank",),
    "taylor": ("taylor",),
}
"""Criteria that are scored in one pass, by the name of their timing."""
FEW_IMAGES = {
    "all others": 64,
    "hrank": 16,
    "taylor": 32,
    "Torch-Pruning Taylor": 32,
    "Torch-Pruning Hessian": 8,
    "literal dissection": 16,
}
"""Numbers of images that suffice on large networks if every image costs the same. Votes need more,
because their first pass uses a sample of the images."""
SMALL = 64
"""Networks with a smaller image side use all images, except for the last two timings."""
POOL = 128
"""Number of different images; further ones repeat them, so that the data takes constant memory."""
SEED = 0
ROUNDS = (1, 7)
"""Least and most rounds of each method; in between, until its part of `--seconds` is over."""
PACKAGES = ("torch-pruning",)


class Noise(LabelledImages):
    """A list of images of uniform noise, of which only a few are in memory."""

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
        """Return all images; nothing asks for a part."""
        assert len(indices) == len(self.labels)
        return self


@dataclass(frozen=True, eq=False)
class Subject:
    """A network that scoring is measured on."""

    model: nn.Module
    preprocessing: Preprocessing
    dependencies: DependencyGraph
    settings: ScoreSection

    def batches(self, count: int) -> Iterator[Batch]:
        """Yield `count` images, in batches of the size that scoring uses."""
        side = self.preprocessing.size[0]
        size = images_at_a_time(side, side)
        return batches(Noise(count, side), size, self.preprocessing)

    def forward(self, count: int) -> None:
        """Run the network alone, which scoring is compared with."""
        with torch.inference_mode():
            for batch in self.batches(count):
                self.model(batch.images)

    def score(self, names: tuple[str, ...], count: int) -> list[criteria.Criterion]:
        """Update criteria with the images, without computing their scores."""
        state = tensors_of(self.model)
        classes = tuple(map(str, range(CLASSES)))
        source = concepts.make(
            self.settings.concepts, self.dependencies.graph, state, classes, self.preprocessing
        )
        made = [criteria.make(name, self.settings, SEED, {}) for name in names]
        shown = partial(self.batches, count)
        run_feature_pass(self.model, self.dependencies, shown, made, source, self.settings)
        return made


def make_subject(name: str) -> Subject:
    """Return the named network, untrained; every layer that can be pruned is scored."""
    model = zoo.load(name, num_classes=CLASSES, seed=SEED)
    preprocessing = zoo.preprocessing(name)
    side = preprocessing.size[0]
    example = next(batches(Noise(2, side), 2, preprocessing)).images
    dependencies = build_dependency_graph(model, example, prune_residual=True)
    return Subject(model, preprocessing, dependencies, ScoreSection())


def dissect(subject: Subject, count: int) -> None:
    """Upsample each map to the images' size, binarise it and intersect it with one mask.

    This is eq. 1 of Bau et al. (Network Dissection, CVPR 2017) without finding thresholds, with one
    concept instead of many, and without reading masks.
    """
    side = subject.preprocessing.size[0]
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[: side // 2, : side // 2] = True
    state = tensors_of(subject.model)

    taps: dict[Node, list[Tap]] = {}
    for group in subject.dependencies.groups.values():
        for tap in taps_of(group).values():
            taps.setdefault(tap.node, []).append(tap)

    def see(node: Node, value: Tensor) -> None:
        for tap in taps[node]:
            maps = maps_of(tap, value)
            if maps.shape[2:].numel() == 1:
                continue
            for image in maps:  # all maps of all images would take gigabytes
                active = F.interpolate(image[None], (side, side), mode="bilinear")[0] > 0
                intersection = (active & mask).sum((1, 2))
                intersection.div(active.sum((1, 2)) + mask.sum() - intersection)

    hooks = {node: partial(see, node) for node in taps}
    with torch.inference_mode():
        for batch in subject.batches(count):
            interpreter.run(subject.dependencies.graph, state, batch.images, after=hooks)


class Peer:
    """Torch-Pruning's importance by gradients, accumulated and computed as its examples do."""

    def __init__(self, subject: Subject) -> None:
        import torch_pruning as tp

        self._subject = subject
        self._tp = tp
        self._example = next(iter(subject.batches(1))).images
        with warnings.catch_warnings(action="ignore"):
            self._dependencies = tp.DependencyGraph().build_dependency(
                subject.model, example_inputs=self._example
            )

    def taylor(self, count: int) -> None:
        """`GroupTaylorImportance`: one backward pass of the mean loss a batch."""
        model = self._subject.model
        model.zero_grad()
        for batch in self._subject.batches(count):
            F.cross_entropy(model(batch.images), batch.labels).backward()
        self._rank(self._tp.importance.GroupTaylorImportance())

    def hessian(self, count: int) -> None:
        """`GroupHessianImportance`: one backward pass an image."""
        model = self._subject.model
        importance = self._tp.importance.GroupHessianImportance()
        for batch in self._subject.batches(count):
            for loss in F.cross_entropy(model(batch.images), batch.labels, reduction="none"):
                model.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model)
        self._rank(importance)

    def _rank(self, importance: Any) -> None:
        model = self._subject.model
        with warnings.catch_warnings(action="ignore"):
            for group in self._dependencies.get_all_groups(
                ignored_layers=list(peer.heads(model).values())
            ):
                importance(group)
        model.zero_grad()


def measure_time(network: str, count: int, seconds: float, note: Note) -> None:
    """Time every method of scoring, with a plain forward pass on the same images before each."""
    note(stage="build")
    subject = make_subject(network)
    theirs = Peer(subject)
    methods: dict[str, Callable[[int], object]] = {
        **{name: partial(subject.score, names) for name, names in COMBINATIONS.items()},
        "Torch-Pruning Taylor": theirs.taylor,
        "Torch-Pruning Hessian": theirs.hessian,
        "literal dissection": partial(dissect, subject),
    }
    images_of = {name: min(count, FEW_IMAGES.get(name, count)) for name in methods}
    if subject.preprocessing.size[0] < SMALL:
        images_of |= dict.fromkeys((*COMBINATIONS, "Torch-Pruning Taylor"), count)
    timings: dict[str, Row] = {
        name: {"images": images, "plain": [], "seconds": [], "plain_cpu": [], "seconds_cpu": []}
        for name, images in images_of.items()
    }
    subject.forward(1)  # warms up
    subject.score(("vote-response",), 1)
    for name, run in methods.items():
        begin = time.perf_counter()
        for round_ in range(ROUNDS[1]):
            if round_ >= ROUNDS[0] and time.perf_counter() - begin > seconds / len(methods):
                break
            note(stage=f"{name}, round {round_}", timings=timings)
            for kind, action in (("plain", subject.forward), ("seconds", run)):
                start, start_cpu = time.perf_counter(), time.process_time()
                action(images_of[name])
                timings[name][kind].append(round(time.perf_counter() - start, 4))
                timings[name][f"{kind}_cpu"].append(round(time.process_time() - start_cpu, 4))
    note(stage="done", timings=timings)


def measure_memory(name: str, count: int, note: Note) -> None:
    """Score images once and record the peak memory."""
    note(stage="build")
    subject = make_subject(name)
    note(stage="score", before_mib=_peak_mib())
    subject.score(("vote-response",), count)
    note(stage="done", peak_mib=_peak_mib())


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, mode: str, count: int, arguments: argparse.Namespace) -> Row:
    """Measure one row in its own process."""
    options = ["--mode", mode, "--threads", str(arguments.threads), "--images", str(count)]
    options += ["--seconds", f"{arguments.seconds:g}"]
    with tempfile.TemporaryDirectory() as directory:
        result = run_child(
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
        **result,
    }


def child(arguments: argparse.Namespace) -> None:
    """Measure one network in this process."""
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


def ratio(timing: Row) -> float:
    """Return the cost of a method in plain forward passes: the median over the rounds."""
    pairs = zip(timing["seconds_cpu"], timing["plain_cpu"], strict=False)
    return float(statistics.median(after / before for after, before in pairs))


def table(rows: list[Row]) -> str:
    """Return the costs by network, then the growth of memory."""
    names = [*COMBINATIONS, "Torch-Pruning Taylor", "Torch-Pruning Hessian", "literal dissection"]
    lines = [
        f"| network | images | threads | rounds | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for row in rows:
        if row["mode"] != "time":
            continue
        timings = row.get("timings", {})
        done = {name: timings.get(name, {}).get("seconds", ()) for name in names}
        figures = [
            f"{ratio(timings[name]):.2f}" if done[name] else row["outcome"] for name in names
        ]
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
            for row in rows
            if (row["network"], row["mode"]) == (name, "memory") and "peak_mib" in row
        }
        if fewer in peaks and more in peaks:
            growth = peaks[more] / peaks[fewer] - 1
            lines.append(
                f"| {name} | {peaks[fewer]:.0f} ({fewer} images) "
                f"| {peaks[more]:.0f} ({more} images) | {100 * growth:+.1f} % |"
            )
    return "\n".join(lines)


def is_there(rows: list[Row], name: str, mode: str, count: int, threads: int) -> bool:
    """Return whether a row has the installed versions and this number of threads."""
    for row in rows:
        if (row["network"], row["mode"], row["images"]) == (name, mode, count):
            here = {"environment": surroundings(*PACKAGES)}
            same = "environment" in row and versions(row) == versions(here)
            return same and bool(row["environment"]["threads"] == threads)
    return False


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield the network, mode and number of images of every requested row."""
    for name, count in NETWORKS.items():
        if fnmatch.fnmatch(name, arguments.only):
            if arguments.mode in ("time", "both"):
                yield name, "time", arguments.images or count
            if arguments.mode in ("memory", "both"):
                for images in MEMORY.get(name, ()):
                    if arguments.images in (None, images):
                        yield name, "memory", images


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = bench_parser(__doc__, limit=3600)
    parser.set_defaults(threads=2)
    parser.add_argument("--mode", choices=["time", "memory", "both"], default="both")
    parser.add_argument("--images", type=int, help="instead of each network's own number")
    parser.add_argument(
        "--seconds", type=float, default=600, help="approximate time for the rounds of a network"
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
            reason = row.get("reason", "")
            print(name, mode, count, row["outcome"], row["wall_seconds"], reason, flush=True)
    page = PAGE.read_text()
    PAGE.write_text(with_table(page, "results/scoring.json", table(read_rows(RESULTS))))


if __name__ == "__main__":
    main()
