"""Measure how long the command line and the import take, against the import of torch.

    python bench/startup.py [--repeats 7] [--source src]

Runs `secateur --version`, `--help`, `prune --help`, a mistyped command, a shell completion and
`import secateur`, each in a process of its own, and interleaved with `import torch`: so a busy
machine slows all of them alike. Prints the median processor seconds (user and system) of each and
their ratio to those of `import torch`. Exits with 1 if a ratio exceeds its limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

COMMAND_LIMIT, IMPORT_LIMIT = 0.6, 1.3
"""At most this part of what `import torch` takes."""
COMMAND_LINE = "import sys; sys.argv[0] = 'secateur'; from secateur.cli import main; main()"
"""What the installed script `secateur` does."""


@dataclass(frozen=True)
class Start:
    """A process that is timed."""

    title: str
    code: str
    limit: float | None
    arguments: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    status: int = 0
    """What it exits with."""
    output: str = ""
    """What it must print among other things, to be sure that it did its work."""

    def run(self, source: Path) -> float:
        """Run it once and return its processor seconds.

        Raises `RuntimeError` if it exits or prints otherwise than it should.
        """
        environment = {**os.environ, "PYTHONPATH": str(source.resolve()), **self.variables}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        process = subprocess.Popen(
            [sys.executable, "-c", self.code, *self.arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != self.status or self.output not in printed:
            raise RuntimeError(f"{self.title} exited with {process.returncode}:\n{printed}")
        return usage.ru_utime + usage.ru_stime


BASELINE = Start("import torch", "import torch", None)
STARTS = (
    Start("secateur --version", COMMAND_LINE, COMMAND_LIMIT, ("--version",), output="."),
    Start("secateur --help", COMMAND_LINE, COMMAND_LIMIT, ("--help",), output="prune"),
    Start(
        "secateur prune --help", COMMAND_LINE, COMMAND_LIMIT, ("prune", "--help"), output="--target"
    ),
    Start(
        "secateur prnue",
        COMMAND_LINE,
        COMMAND_LIMIT,
        ("prnue",),
        status=2,
        output="No such command",
    ),
    Start(
        "completion of `secateur pru`",
        COMMAND_LINE,
        COMMAND_LIMIT,
        variables={
            "_SECATEUR_COMPLETE": "complete_bash",
            "COMP_WORDS": "secateur pru",
            "COMP_CWORD": "1",
        },
        output="prune",
    ),
    Start("import secateur", "import secateur", IMPORT_LIMIT),
)


def measure(source: Path, repeats: int) -> dict[str, float]:
    """Return the median processor seconds of each start by its title."""
    starts = (BASELINE, *STARTS)
    for start in starts:  # compiles what has changed
        start.run(source)
    seconds: dict[str, list[float]] = {start.title: [] for start in starts}
    for _ in range(repeats):
        for start in starts:
            seconds[start.title].append(start.run(source))
    return {title: statistics.median(times) for title, times in seconds.items()}


def main() -> None:
    """Measure, print a table and compare with the limits; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src")
    arguments = parser.parse_args()
    seconds = measure(arguments.source, arguments.repeats)
    baseline = seconds[BASELINE.title]
    print(f"{BASELINE.title:<30} {baseline:6.2f} s")
    is_within = True
    for start in STARTS:
        assert start.limit is not None
        ratio = seconds[start.title] / baseline
        is_within = is_within and ratio <= start.limit
        verdict = "" if ratio <= start.limit else "  TOO SLOW"
        print(
            f"{start.title:<30} {seconds[start.title]:6.2f} s  {ratio:5.2f} of at most "
            f"{start.limit}{verdict}"
        )
    sys.exit(0 if is_within else 1)


if __name__ == "__main__":
    main()
