"""What the folder of a base network says of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.cli.tables import put, table_of
from secateur.config import PREPROCESSING_KEYS, BaseConfig, Section, read_tables
from secateur.runtime.errors import UsageError

CONFIG, RECIPE = "config.toml", "training.json"
"""Files that `secateur train` leaves beside the weights."""
KEYS = (
    ("model", "name"),
    ("model", "num_classes"),
    *(("data", key) for key in ("source", *PREPROCESSING_KEYS)),
)
"""Keys that are taken from there."""
CODE = {"name": ("network", "--model"), "source": ("data", "--data")}
"""Those of them that may name code, with what they are and the option that sets them."""


def fill_in_recipe(tables: dict[str, Any], kind: type[Section]) -> None:
    """Take what is not set from the recipe beside the weights of a base network, and say so.

    `secateur train` leaves it there. It can't choose a file with code to run; a network that is
    trained on, `kind` says, may get another number of classes. Raises `UsageError`.
    """
    weights = table_of(tables, "model").get("weights")
    place = Path(weights or "")
    path = (place if place.is_dir() else place.parent) / CONFIG
    if weights is None or not path.is_file() or not (path.parent / RECIPE).is_file():
        return
    recipe = read_tables(path)
    filled = []
    for section, key in KEYS:
        value = table_of(recipe, section).get(key)
        is_new_head = kind is BaseConfig and key == "num_classes"
        if value is None or is_new_head or key in table_of(tables, section):
            continue
        if key in CODE and ".py:" in value:
            what, option = CODE[key]
            raise UsageError(
                f"no {what} is named: {path} names {value}, a file with code: if it is yours, add "
                f"{option} {value}"
            )
        put(tables, f"{section}.{key}", value)
        filled.append(f"{section}.{key} = {value}")
    if filled:
        from secateur.cli.console import show_note  # takes a moment to import

        show_note(f"from {path}, beside the weights: {', '.join(filled)}")
