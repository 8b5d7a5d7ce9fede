"""What is said of an int8 file beside the float one."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.experiments.int8_export import FormLatency, Int8Result
from secateur.models.score import Score
from secateur.models.task import SINGLE_LABEL

SCORE = Score(0.9, None, 0.3, 100, 1, 1, 0.0)


def result(latency: FormLatency) -> Int8Result:
    return Int8Result(Path("int8.onnx"), 1, 64, SCORE, SCORE, SINGLE_LABEL, (), (latency,))


@pytest.mark.parametrize(
    ("latency", "words"),
    [
        (FormLatency(16, 5.0, 2.5, 10.0, 5.0), ""),  # half of the time stays in both
        (FormLatency(16, 5.0, 2.5, None, None), ""),
        (
            FormLatency(16, 5.0, 4.0, 10.0, 4.1),
            "The cut saves less in int8: 0.98 of the time",
        ),
        (FormLatency(16, 5.0, 5.5, 10.0, 11.0), "int8 is slower than float here"),
    ],
)
def test_the_advice_compares_what_the_cut_saves(latency: FormLatency, words: str) -> None:
    advice = result(latency).advice
    assert advice.startswith(words)
    assert bool(advice) == bool(words)
