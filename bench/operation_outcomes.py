"""Which tensor functions are followed between two convolutions, and which freeze the channels.

    python bench/operation_outcomes.py

Each function of `operations` is put between two convolutions of random weights. If channels of the
first one can be cut, the cut network is compared with the masked original. The rows are written to
`results/operations.json`, the tables to docs/reference/operations.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from operations import FAMILIES, FUNCTIONS, SIDE, Function
from rows import ROOT, SCHEMA_VERSION, surroundings, write_json
from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import masked_network
from secateur.pruning.plan import make_plan
from tables import with_table

CHANNELS = 8
RESULTS = ROOT / "results" / "operations.json"
PAGE = ROOT / "docs" / "reference" / "operations.md"
LAYERS: dict[int, Callable[[int], nn.Module]] = {
    2: lambda channels: nn.Linear(channels, 5),
    3: lambda channels: nn.Conv1d(channels, 5, 1),
    4: lambda channels: nn.Conv2d(channels, 5, 1),
    5: lambda channels: nn.Conv3d(channels, 5, 1),
}
"""Rank of feature maps -> the layer that reads them."""


@dataclass(frozen=True)
class Outcome:
    """What becomes of the first convolution's channels."""

    function: str
    followed: int
    """Channels that can be cut, of `CHANNELS`."""
    cause: str
    """Why the others stay."""
    error: float
    """Largest difference of the cut network from the masked original, relative to the outputs."""


class Between(nn.Module):
    """A convolution, a function, and a layer that reads what the function returns."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.function = function
        with torch.no_grad():
            value = function(self.first(torch.rand(2, 3, SIDE, SIDE)))
        self.second = LAYERS[value.dim()](value.shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Return `[image, class]`."""
        maps: Tensor = self.second(self.function(self.first(images)).to(images.dtype))
        return maps.flatten(2).mean(-1) if maps.dim() > 2 else maps


def measure(name: str) -> Outcome:
    """Return the outcome of a function; raises an error if what is followed is wrong."""
    torch.manual_seed(0)
    model = Between(FUNCTIONS[name]).double().eval()
    images = torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64) - 0.5
    dependencies = build_dependency_graph(model, images[:2])
    reasons = [frozen for frozen in dependencies.frozen if frozen.name == "first"]
    group = dependencies.groups.get("first")
    if group is None:
        # The function, or what it is composed of, and the line that calls it.
        assert all("() at bench/operations.py:" in frozen.reason for frozen in reasons), reasons
        return Outcome(name, 0, reasons[0].cause, 0.0)
    errors = []
    for fraction in (0.5, 0.75):
        scores = {name: torch.rand(len(group)) for name, group in dependencies.groups.items()}
        plan = make_plan(scores, dependencies, Budget("filters", fraction), "random")
        with torch.no_grad():
            outputs = apply_plan(model, dependencies, plan)(images)
            expected = masked_network(model, dependencies, plan)(images)
        errors.append(relative_error(outputs, expected))
    assert max(errors) < 1e-6, f"{name}: {errors}"
    followed = len({channel for tap in group.taps for channel in tap.channel.tolist()})
    return Outcome(name, followed, reasons[0].cause if reasons else "", max(errors))


def page(text: str, rows: list[dict[str, Any]]) -> str:
    """Return the page with current tables."""
    followed = sum(row["followed"] > 0 for row in rows)
    summary = f"**{followed} of {len(rows)}** functions are followed; no function raises an error."
    text = with_table(text, "summary", summary)
    for family, functions in FAMILIES.items():
        lines = ["| function | channels that can be cut |", "|---|---|"]
        for row in rows:
            if row["function"] in functions:
                outcome = str(row["followed"]) if row["followed"] else f"none: {row['cause']}"
                lines.append(f"| `{row['function']}` | {outcome} |")
        text = with_table(text, family, "\n".join(lines))
    return text


def read_rows() -> list[dict[str, Any]]:
    """Return the rows of the result file."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]
    return rows


if __name__ == "__main__":
    rows = [asdict(measure(name)) for name in FUNCTIONS]
    content = {"schema_version": SCHEMA_VERSION, "environment": surroundings(), "rows": rows}
    write_json(RESULTS, content)
    PAGE.write_text(page(PAGE.read_text(), rows))
