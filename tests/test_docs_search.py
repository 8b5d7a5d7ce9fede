"""The documentation's search finds British and American spellings alike."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXTENSIONS = Path(__file__).parents[1] / "docs" / "_ext"


@pytest.fixture(scope="module")
def spellings() -> ModuleType:
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("spellings", EXTENSIONS / "spellings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("british", "american"),
    [
        ("optimiser", "optimizer"),
        ("normalised", "normalized"),
        ("quantisation", "quantization"),
        ("labelled", "labeled"),
        ("modelling", "modeling"),
        ("colours", "colors"),
        ("neighbouring", "neighboring"),
        ("licence", "license"),
        ("centre", "center"),
        ("centred", "centered"),
        ("catalogue", "catalog"),
    ],
)
def test_each_spelling_leads_to_the_other(
    spellings: ModuleType, british: str, american: str
) -> None:
    assert spellings.other_spellings(british) == {american}
    assert spellings.other_spellings(american) == {british}


@pytest.mark.parametrize("word", ["model", "labels", "analysis", "organism", "precise", "noise"])
def test_words_that_both_spell_alike_have_no_other(spellings: ModuleType, word: str) -> None:
    assert spellings.other_spellings(word) == set()


def test_the_search_index_has_both_spellings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    source, out = tmp_path / "docs", tmp_path / "html"
    source.mkdir()
    conf = f"import sys\nsys.path.append({str(EXTENSIONS)!r})\nextensions = ['spellings']\n"
    (source / "conf.py").write_text(conf)
    page = "Page\n====\n\nThe optimiser colors and normalizes every licence.\n"
    (source / "index.rst").write_text(page)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(source), str(out)]
    subprocess.run(command, check=True)
    text = (out / "searchindex.js").read_text()
    terms = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))["terms"]
    # The index and the query are both stemmed.
    wanted = {"optimis", "optim", "colour", "color", "normalis", "normal", "licenc", "licens"}
    assert wanted <= set(terms)
