"""Measure what each part of the method contributes: `configs/ablations*_cifar10.toml`.

    python bench/ablations.py --data DIR --weights DIR [--workers 2]

Each job adds a line to a file of `results/`; jobs that are there are not run again.
`bench/results.py` writes the tables.
"""

from __future__ import annotations

import benchmarks
from rows import ROOT

CONFIGS = ROOT / "configs"
RESULTS = {
    CONFIGS / f"{name}_cifar10.toml": ROOT / "results" / f"{name}.jsonl"
    for name in (
        "ablations",
        "ablations_strong_cuts",
        "ablations_iou",
        "ablations_response",
    )
}
"""Result files by benchmark."""


def main() -> None:
    """Measure the missing rows."""
    arguments = benchmarks.make_parser(__doc__).parse_args()
    for config, results in RESULTS.items():
        benchmarks.measure(benchmarks.configured(config, arguments), results, arguments.workers)


if __name__ == "__main__":
    main()
