"""Whether a data set has the classes that a network was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.data.imagenet import readable_class_names
from secateur.runtime.errors import DataError


def compare_classes(source: str, names: Sequence[str], expected: Mapping[int, str], of: int) -> str:
    """Return what to say of a data set whose classes have other names than a run's; or nothing.

    `names` are those of the data `source`, and `expected` those of the run, by number, among the
    `of` classes before the cut. As many classes may be the same ones by other names. Raises
    `DataError` where that can't be: there are more classes or fewer, and one of the same number has
    another name.
    """
    if not names or not expected:
        return ""
    number = next((n for n, name in expected.items() if _name_at(names, n) != _plain(name)), None)
    if number is None:
        return ""
    there = f"class {number} is {names[number]!r}" if number < len(names) else f"no class {number}"
    differ = f"{there} there, and {expected[number]!r} in the run"
    if len(names) == of:
        return (
            f"The classes of {source} have other names than the run's: {differ}. If they are other "
            "classes, the accuracy means nothing."
        )
    raise DataError(
        f"{source} has other classes than the run: {differ}; name data of the run's classes, or "
        "images without labels, --data images:DIR"
    )


def _name_at(names: Sequence[str], number: int) -> str | None:
    return _plain(names[number]) if number < len(names) else None


def _plain(name: str) -> str:
    """Return a name such that `n01440764`, `tench` and `Tench, Tinca tinca` are the same."""
    [readable] = readable_class_names([name], 0)
    return readable.partition(",")[0].replace("_", " ").strip().casefold()
