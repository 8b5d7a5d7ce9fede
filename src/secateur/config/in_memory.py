"""The configuration of a run on images that are passed from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.config import DataSection, RunConfig, from_dict
from secateur.config.budget import BudgetLike, parse_budget
from secateur.config.tables import nearest_key
from secateur.runtime.errors import UsageError

SOURCE = "images in memory"


def tables_in_memory(
    network: str, target: BudgetLike, criterion: str, concepts: str
) -> dict[str, Any]:
    """Return the configuration of a run on a network and images that have no name, as tables."""
    return {
        "model": {"name": network},
        "data": {"source": SOURCE, "stratified": False},
        "score": {"criterion": criterion, "concepts": concepts},
        "plan": {"target": str(parse_budget(target))},
    }


def config_in_memory(
    tables: dict[str, Any], settings: Mapping[str, Any], shape: Sequence[int]
) -> RunConfig:
    """Return the configuration for images of a `shape`, with the settings that the user changes.

    `tables` are the configuration's; `settings` are as in `secateur.prune`. Raises `UsageError`.
    """
    is_pictures = len(shape) == 4
    tables["data"] |= {
        "image_size": min(shape[2:] or shape[1:]),
        "calibration_images": shape[0],
    }
    if not is_pictures:
        tables["finetune"] |= {"crop": "none", "flip": False}
        tables["distill"] = {"flip": False}
    for section, values in _by_section(settings).items():
        tables[section] = {**tables.get(section, {}), **values}
    config = from_dict(tables, RunConfig)
    if config.finetune.randaugment or config.finetune.crop == "random_resized_crop":
        raise UsageError(
            "randaugment and crop = 'random_resized_crop' change images in files, not tensors"
        )
    changes = config.finetune.crop != "none" or config.finetune.flip or config.distill.flip
    if changes and not is_pictures:
        raise UsageError(
            f"crop and flip change pictures [image, channel, height, width], not {list(shape)}: "
            "leave them out"
        )
    return config


def data_section(tables: Mapping[str, Any], settings: Mapping[str, Any]) -> DataSection:
    """Return what the configuration says of images before any is read; see `config_in_memory`."""
    section = {**tables["data"], **_by_section(settings).get("data", {})}
    return from_dict({**tables, "data": section}, RunConfig).data


def _by_section(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings as tables; raises `UsageError` for a key without a section."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if isinstance(value, Mapping) and not dot:
            tables[section] = {**tables.get(section, {}), **value}
            continue
        if not dot:
            near = nearest_key(key, RunConfig)
            raise UsageError(f"settings: {key!r} must be SECTION.KEY, as {near or 'plan.round_to'}")
        tables.setdefault(section, {})[name] = value
    return tables
