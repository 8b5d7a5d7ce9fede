"""The words that filters can be named by: a file of the user's, or `vocabulary.txt`.

`vocabulary.txt` was written for secateur, under its licence: colours, textures, shapes, materials,
parts of bodies and of things, animals, plants, things, people, buildings and scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import TEXT, read_bounded


def read_vocabulary(path: str | Path | None, class_names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the words in a file, one a line, each once; without a file common words and classes.

    A line may hold several words, as in "a photo of a dog". Empty lines don't count. Raises
    `DataError` if the file can't be read, is no UTF-8 or holds fewer than two words.
    """
    if path is None:
        text = resources.files("secateur.data").joinpath("vocabulary.txt").read_text("utf-8")
        lines = [*text.splitlines(), *class_names]
    else:
        try:
            lines = (
                read_bounded(Path(path).expanduser(), TEXT, DataError)
                .decode("utf-8-sig")
                .splitlines()
            )
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no text in UTF-8: {error}") from error
    words = tuple(dict.fromkeys(word for line in lines if (word := " ".join(line.split()))))
    if len(words) < 2:
        raise DataError(
            f"the vocabulary {path} holds {len(words)} words: at least two are needed, one a line"
        )
    return words
