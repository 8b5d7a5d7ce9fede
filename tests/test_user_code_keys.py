"""Which network a user may name for a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.experiments.user_code_keys import check_original_named
from secateur.runtime.errors import UsageError

RUN = Path("runs/first")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("resnet20", None),
        ("resnet20", "resnet20"),
        ("net.py:make", "moved/net.py:make"),
        (None, "net.py:make"),
        (None, "resnet20"),
    ],
)
def test_the_runs_network_may_be_named(architecture: str | None, name: str | None) -> None:
    check_original_named(RUN, architecture, name)


@pytest.mark.parametrize(
    ("architecture", "name", "words"),
    [
        ("resnet20", "resnet56", "is of resnet20: leave --model out"),
        ("net.py:make", "resnet20", r"net\.py:make, and resnet20 is another one"),
    ],
)
def test_another_network_is_refused(architecture: str, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_original_named(RUN, architecture, name)
