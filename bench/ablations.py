"""What each part of the method is worth: `configs/ablations_cifar10.toml`.

    python bench/ablations.py --data DIR --weights DIR [--jobs 2]

A line a cell goes to `results/ablations.jsonl`; cells that are there are not measured again.
`bench/results.py` writes the tables.
"""

from __future__ import annotations

import comparisons
from rows import ROOT

RESULTS = ROOT / "results" / "ablations.jsonl"
CONFIG = ROOT / "configs" / "ablations_cifar10.toml"


def main() -> None:
    """Measures what is missing."""
    arguments = comparisons.parser(__doc__).parse_args()
    comparisons.measure(comparisons.asked_for(CONFIG, arguments), RESULTS, arguments.jobs)


if __name__ == "__main__":
    main()
