from __future__ import annotations

import pytest
import torch

from networks import wired
from secateur.pruning.ranking import rank
from secateur.runtime.errors import UsageError


def test_the_highest_score_comes_first_and_ties_are_broken() -> None:
    dependencies = wired("chain", True)[1]
    scores = {"conv1": torch.tensor([1.0, 3, 3, 0, 1, 3]), "conv2": torch.zeros(7)}
    assert rank(scores, dependencies, "x").order["conv1"] == [1, 2, 5, 0, 4, 3]
    ties = {"conv1": torch.tensor([0.0, 1, 2, 9, 1, 1]), "conv2": torch.arange(7.0)}
    ranking = rank(scores, dependencies, "x", ties=ties)
    assert ranking.order["conv1"] == [2, 1, 5, 4, 0, 3]
    assert ranking.order["conv2"] == [6, 5, 4, 3, 2, 1, 0]
    assert ranking.least == {"conv1": 1, "conv2": 1}


def test_scores_must_be_there_and_be_numbers() -> None:
    dependencies = wired("chain", True)[1]
    with pytest.raises(UsageError, match="'conv2' needs one score for each of 7 filters"):
        rank({"conv1": torch.zeros(6)}, dependencies, "x")
    with pytest.raises(UsageError, match="a score of 'conv2' is not a finite number"):
        rank({"conv1": torch.zeros(6), "conv2": torch.full((7,), torch.nan)}, dependencies, "x")
