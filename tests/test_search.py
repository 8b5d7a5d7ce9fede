from __future__ import annotations

from secateur.pruning.size_search import TRIALS, SizeTrial, bisect, smallest_kept


def test_the_smallest_network_that_keeps_to_the_limit_is_found() -> None:
    asked: list[float] = []

    def attempt(fraction: float) -> float:
        asked.append(fraction)
        return fraction

    trials = bisect(attempt, 0.62, 0.2)
    assert len(trials) == TRIALS
    assert [trial.fraction_left for trial in trials] == asked
    assert all(trial.kept == (trial.fraction_left >= 0.62) for trial in trials)
    assert 0.62 <= smallest_kept(trials) < 0.62 + 0.8 / 2**TRIALS + 1e-9


def test_where_every_network_is_too_bad_the_whole_one_is_left() -> None:
    trials = (SizeTrial(1.0, 0.9, kept=True), *bisect(lambda _: 0.1, 0.89, 0.1))
    assert smallest_kept(trials) == 1.0
