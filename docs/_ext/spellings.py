"""Sphinx extension: the search finds a word in British and in American spelling.

Words that the two spell differently are added to their page in the other spelling too, as keywords,
which Sphinx puts into its search index beside the text. Readers of the page see no difference.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

VERBS = (
    *("binar", "custom", "factor", "general", "initial", "maxim", "minim", "normal", "optim"),
    *("organ", "parallel", "quant", "random", "recogn", "regular", "serial", "standard"),
    *("summar", "synchron", "vector", "visual"),
)
"""Beginnings of verbs in `-ise` or `-ize`."""
PAIRS = (
    *((rf"{verb}is(?=[ei]|a[bt])", rf"{verb}iz(?=[ei]|a[bt])") for verb in VERBS),
    *((rf"{verb}ll(?=e[dr]|ing)", rf"{verb}l(?=e[dr]|ing)") for verb in ("cance", "labe", "mode")),
    ("analyse", "analyze"),
    ("artefact", "artifact"),
    ("behaviour", "behavior"),
    ("catalogue", "catalog(?!u)"),
    ("centred", "centered"),
    ("centre(?!d)", "center(?!ed)"),
    ("colour", "color"),
    ("defence", "defense"),
    ("favour", "favor"),
    ("grey", "gray"),
    ("licence", "license"),
    ("neighbour", "neighbor"),
)
"""Parts of words as patterns: British, American. What they look ahead to stays."""
WORD = re.compile(r"[a-z]+")
LOOK_AHEAD = re.compile(r"\(\?.*\)")


def other_spellings(word: str) -> set[str]:
    """Return the lower-case word in the other spelling, or nothing if both spell it alike."""
    spellings = {word}
    for british, american in PAIRS:
        spellings.add(re.sub(british, LOOK_AHEAD.sub("", american), word))
        spellings.add(re.sub(american, LOOK_AHEAD.sub("", british), word))
    return spellings - {word}


def add_keywords(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Add the other spellings of a page's words to its keywords."""
    words = set(WORD.findall(doctree.astext().lower()))
    others = {other for word in words for other in other_spellings(word)} - words
    if others:
        doctree.insert(0, nodes.meta(name="keywords", content=", ".join(sorted(others))))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the extension."""
    app.connect("doctree-resolved", add_keywords)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
