"""Measure what each part of the method contributes on MobileNetV2, as `bench/ablations.py` does.

    python bench/ablations_imagenet.py --data DIR --weights DIR [--seeds 3]

MobileNetV2 is pruned to 0.8 of its MACs on 300 images of `imagenet_sample`, by the defaults,
without each part, with other criteria in place of the vote, and by channels and rank. It is not
trained and uses no label. The scored images (`bench/imagenet.py`) choose nothing. `--data` and
`--weights` are as for `bench/training_free.py imagenet`. Each measurement adds a line to
`results/ablations_imagenet.jsonl`, and the table is in docs/reference/results.md; `--tables` only
writes that.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence

import torch

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from tables import with_table
from training_free import CRITERIA, OURS, PARTS, RANK, Method, Study

RESULTS = ROOT / "results" / "ablations_imagenet.jsonl"
PAGE = ROOT / "docs" / "reference" / "results.md"
KEY = ("network", "seed", "part")
NETWORK, TARGET = "mobilenetv2", "macs=0.8"
ROWS = ("", *PARTS, *CRITERIA, RANK)
NAMES = {"": "the defaults", **{name: f"{name} in place of the vote" for name in CRITERIA}}


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of the ImageNet samples")
    parser.add_argument("--weights", help="folder of the weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.tables:
        if arguments.data is None or arguments.weights is None:
            parser.error("--data and --weights are needed")
        measure(arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/ablations_imagenet.jsonl", table(rows)))


def measure(arguments: argparse.Namespace) -> None:
    """Append the missing rows, seed by seed."""
    known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
    study: Study | None = None
    for seed, part in itertools.product(range(arguments.seeds), ROWS):
        if (NETWORK, seed, part) in known:
            continue
        study = study or Study("imagenet", NETWORK, arguments)
        (measurement,) = study.measure(Method(OURS, part), seed, [TARGET])
        head: Measurement = {"network": NETWORK, "seed": seed, "part": part, "target": TARGET}
        origin = {
            "command": "python bench/ablations_imagenet.py --data DIR --weights DIR",
            "revision": revision(),
            "environment": surroundings(),
        }
        append_measurement(RESULTS, head | study.base | measurement | origin)


def table(rows: Sequence[Measurement]) -> str:
    """Return top-1 and agreement by part, and their change on the same calibration sets."""
    lines = ["| | top-1 | change | agreement | change |", "|---|---|---|---|---|"]
    whole = {row["seed"]: row for row in rows if not row["part"]}
    for part in ROWS:
        mine = {row["seed"]: row for row in rows if row["part"] == part}
        if mine:
            cells = [
                *_cells(mine, whole if part else {}, "refit_fraction"),
                *_cells(mine, whole if part else {}, "agreement_fraction"),
            ]
            lines.append(f"| {NAMES.get(part, part)} | {' | '.join(cells)} |")
    if rows:
        sets = len({row["seed"] for row in rows})
        lines += [
            "",
            f"MobileNetV2 with {TARGET.removeprefix('macs=')} of its MACs, in %, with "
            f"{rows[0]['calibration_images']} images (calibration sets: {sets}); before: top-1 "
            f"{100 * rows[0]['base_fraction']:.2f}. Changes are in points, on the same "
            "calibration sets.",
        ]
    return "\n".join(lines)


def _cells(
    rows: Mapping[int, Measurement], whole: Mapping[int, Measurement], fraction: str
) -> tuple[str, str]:
    """Return the mean of a fraction in %, and its mean change against `whole`, by seed."""
    values = [100 * row[fraction] for row in rows.values()]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    changes = [
        100 * (row[fraction] - whole[seed][fraction]) for seed, row in rows.items() if seed in whole
    ]
    change = f"{statistics.mean(changes):+.2f}" if changes else ""
    return f"{statistics.mean(values):.2f}{spread}", change


if __name__ == "__main__":
    main()
