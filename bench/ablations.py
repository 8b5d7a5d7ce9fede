"""What each part of the method is worth: `configs/ablations_*.toml`.

    python bench/ablations.py --data DIR --weights DIR [--jobs 2]

A line a cell goes to a file of `results/`; cells that are there are not measured again.
`bench/results.py` writes the tables.
"""

from __future__ import annotations

import comparisons
from rows import ROOT

CONFIGS = ROOT / "configs"
RESULTS = {
    CONFIGS / f"{name}_cifar10.toml": ROOT / "results" / f"{name}.jsonl"
    for name in ("ablations", "ablations_iou", "ablations_response")
}
"""By comparison."""


def main() -> None:
    """Measures what is missing."""
    arguments = comparisons.parser(__doc__).parse_args()
    for config, results in RESULTS.items():
        comparisons.measure(comparisons.asked_for(config, arguments), results, arguments.jobs)


if __name__ == "__main__":
    main()
