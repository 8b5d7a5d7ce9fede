"""Compare float and int8 in onnxruntime, cut and whole: accuracy and time.

    python bench/int8.py cifar10 --data DIR --weights DIR
    python bench/int8.py imagenet --data DIR --weights DIR [--networks PATTERN]

Each network is pruned without training, with multiples of 4 and of 8 or 16 channels, exported and
quantised on calibration images, and so is the whole network. Accuracy is that of the files on the
test images, which choose nothing; the four files of a pair are timed interleaved on one thread, 1
and 16 images at a time. Each measurement adds a line to `results/int8.jsonl`, and the table is in
docs/how_to/export.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from secateur.data import Batch
from secateur.engines.onnx_file import write_onnx
from secateur.engines.onnxruntime import onnx_runner
from secateur.engines.quantised_file import quantise_network
from secateur.pipeline.inputs import make_reader
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.runtime.timing import Rounds, in_turn, interleaved_medians, repeat_to_batch
from studies import channels_last, load_study_network, study_parser
from tables import with_table
from training_free import Ours

RESULTS = ROOT / "results" / "int8.jsonl"
PAGE = ROOT / "docs" / "how_to" / "export.md"
KEY = ("network", "target", "round_to")
TARGETS = {
    "resnet20": "macs=0.5",
    "mobilenetv2": "macs=0.8",
    "efficientnet_lite0": "macs=0.8",
}
NETWORKS = {"cifar10": ("resnet20",), "imagenet": ("mobilenetv2", "efficientnet_lite0")}
MULTIPLES = {"resnet20": (4, 8)}
"""Of channels; in ResNet-20 0.5 is out of reach with multiples of 16."""
BATCHES = (1, 16)
ROUNDS = Rounds(fewest=21, most=101, seconds=20.0, warm_up=3)
RANGE_IMAGES, RANGE_BATCH = 256, 32


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = study_parser(__doc__, NETWORKS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data is not None:
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        for network in fnmatch.filter(NETWORKS[arguments.study], arguments.networks):
            missing = [
                m
                for m in MULTIPLES.get(network, (4, 16))
                if (network, TARGETS[network], m) not in known
            ]
            if missing:
                measure(network, missing, arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/int8.jsonl", table(rows)))


def measure(network: str, multiples: list[int], arguments: argparse.Namespace) -> None:
    """Append a row for each multiple."""
    config, dataset, model = load_study_network(network, arguments)
    batches = channels_last(make_reader(config).read_shard(dataset.test))
    for multiple in multiples:
        plan = config.plan.model_copy(update={"target": TARGETS[network], "round_to": multiple})
        run_config = config.model_copy(update={"plan": plan})
        context = make_scoring_context(
            model, dataset, run_config, criterion_names=(run_config.score.criterion,)
        )
        pruned = Ours(model, context, run_config).prune(TARGETS[network])
        images = torch.cat(
            [batch.images for batch in itertools.islice(context.plan_images.sample(), 4)]
        )[:RANGE_IMAGES]
        with tempfile.TemporaryDirectory() as folder:
            files = {
                **made(model, images, Path(folder), "whole"),
                **made(pruned.stages["refit"], images, Path(folder), "cut"),
            }
            fractions = {name: accuracy(file, batches) for name, file in files.items()}
            times = {batch: times_ms(files, images, batch) for batch in BATCHES}
            sizes = {name: file.stat().st_size for name, file in files.items()}
        row: Measurement = {
            "network": network,
            "target": TARGETS[network],
            "round_to": multiple,
            "seed": run_config.seed,
            "macs_left": pruned.macs_left,
            "test_fraction": fractions,
            "milliseconds": times,
            "bytes": sizes,
            "range_images": len(images),
            "command": f"python bench/int8.py {arguments.study} --data DIR --weights DIR",
            "revision": revision(),
            "environment": surroundings("onnx", "onnxruntime"),
        }
        print(row, flush=True)
        append_measurement(RESULTS, row)


def made(model: nn.Module, images: torch.Tensor, folder: Path, name: str) -> dict[str, Path]:
    """Return the float and the int8 file of a network."""
    whole, int8 = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
    write_onnx(model.eval(), images[:2], whole)
    quantise_network(model, whole, int8, images.split(RANGE_BATCH))
    return {f"{name} float": whole, f"{name} int8": int8}


def accuracy(file: Path, batches: list[Batch]) -> float:
    """Return the fraction of images whose class a file predicts."""
    run = onnx_runner(file)
    right = total = 0
    for batch in batches:
        (logits,) = run(batch.images.contiguous())
        right += int((torch.from_numpy(logits).argmax(1) == batch.labels).sum())
        total += len(batch.labels)
    return right / total


def times_ms(files: dict[str, Path], images: torch.Tensor, batch: int) -> dict[str, float]:
    """Return the median times of the files, interleaved."""
    inputs = repeat_to_batch(images, batch).contiguous()
    actions = {name: in_turn(partial(runner, file, inputs)) for name, file in files.items()}
    return interleaved_medians(actions, ROUNDS)


def runner(file: Path, inputs: torch.Tensor) -> Callable[[], object]:
    """Return what runs a file on inputs."""
    return partial(onnx_runner(file), inputs)


def table(rows: list[Measurement]) -> str:
    """Return accuracy and time by network, multiple and form."""
    lines = [
        "| network | cut to, multiples of | form | top-1 whole → cut | time left, batch 1 / 16 | "
        "time over the whole in float, 1 / 16 |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: key_of(row, KEY)):
        for form in ("float", "int8"):
            fractions = [100 * row["test_fraction"][f"{name} {form}"] for name in ("whole", "cut")]
            times = [row["milliseconds"][str(batch)] for batch in BATCHES]
            left = [f"{one[f'cut {form}'] / one[f'whole {form}']:.2f}" for one in times]
            over = [f"{one[f'cut {form}'] / one['whole float']:.2f}" for one in times]
            lines.append(
                f"| {row['network']} | {row['macs_left']:.2f}, {row['round_to']} | {form} | "
                f"{fractions[0]:.1f} → {fractions[1]:.1f} | {' / '.join(left)} | "
                f"{' / '.join(over)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
