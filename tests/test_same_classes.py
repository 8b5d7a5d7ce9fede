"""Whether data have the classes that a run knows."""

from __future__ import annotations

import pytest

from secateur.data.same_classes import compare_classes
from secateur.runtime.errors import DataError

RUN = {0: "tench", 1: "goldfish"}


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("tench", "goldfish"),
        ("n01440764", "n01443537"),  # the same in WordNet
        ("Tench, Tinca tinca", "goldfish, Carassius auratus"),
        ("tench", "goldfish", "cow"),
    ],
)
def test_the_same_classes_need_no_word(names: tuple[str, ...]) -> None:
    assert compare_classes("folder:x", names, RUN, 2) == ""


def test_as_many_classes_of_other_names_are_told() -> None:
    note = compare_classes("folder:x", ("tench", "cow"), RUN, 2)
    assert "class 1 is 'cow' there, and 'goldfish' in the run" in note


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        (("cow", "dog", "fox"), "class 0 is 'cow' there, and 'tench' in the run"),
        (("tench",), "no class 1 there, and 'goldfish' in the run"),
    ],
)
def test_other_classes_are_refused(names: tuple[str, ...], difference: str) -> None:
    with pytest.raises(DataError, match=f"other classes than the run: {difference}"):
        compare_classes("folder:x", names, RUN, 2)
