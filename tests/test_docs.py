"""README and docs agree with the code and with the measurements."""

from __future__ import annotations

from pathlib import Path

from secateur.config import DATA_FORMS

ROOT = Path(__file__).parents[1]


def test_every_package_is_on_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    packages = {path.parent.name for path in (ROOT / "src" / "secateur").glob("*/__init__.py")}
    assert {name for name in packages if f"`{name}/`" not in text} == set()


def test_every_kind_of_data_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "data.md").read_text()
    kinds = [form.partition(":")[0] for form in DATA_FORMS]
    assert [kind for kind in kinds if f"| `{kind}` |" not in page] == []


def test_the_pictures_of_the_pages_are_there_and_small() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 600_000
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert [path.name for path in pictures if f"images/{path.name}" not in pages] == []
