"""Data that a function of the user's returns: `path/to/file.py:loader`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.data.batch_forms import form_of
from secateur.data.in_memory import (
    TEST_EVERY,
    VALIDATION_EVERY,
    ImageBatches,
    read_images,
    split_images,
)
from secateur.data.kept_classes import KeptClasses
from secateur.graph.forward import forward_of, with_inputs, without_forward
from secateur.graph.working_copy import can_run
from secateur.models import user_code
from secateur.models.labelled_images import label_images
from secateur.models.outputs import through_logits
from secateur.runtime.errors import DataError

KEYS = ("train", "test", "class_names")
"""Keys of what a loader may return."""


@dataclass(frozen=True, eq=False)
class UserData:
    """What a loader has returned."""

    name: str
    train: ImageBatches
    test: ImageBatches | None
    class_names: tuple[str, ...]


def call_loader(name: str) -> UserData:
    """Return what the loader `path/to/file.py:loader` returns when it is called.

    That is what `secateur.prune` takes as images; or a pair of such, to train on and to test with;
    or a dict with `train` and, if there are any, `test` and `class_names`. Raises `UsageError` if
    the file or the function fails, and `DataError` for a dict with other keys.
    """
    loaded: Any = user_code.call(name, user_code.find(name, "loader"))
    if isinstance(loaded, Mapping) and "train" in loaded:
        unknown = [str(key) for key in loaded if key not in KEYS]
        if unknown:
            raise DataError(f"{name} returns {', '.join(unknown)}: expected {', '.join(KEYS)}")
        names = tuple(map(str, loaded.get("class_names") or ()))
        return UserData(name, loaded["train"], loaded.get("test"), names)
    if isinstance(loaded, tuple) and len(loaded) == 2 and not any(map(_is_tensor, loaded)):
        return UserData(name, *loaded, ())
    return UserData(name, loaded, None, ())


def _is_tensor(part: object) -> bool:
    return isinstance(part, Tensor | np.ndarray)


def read_user_data(
    loaded: UserData,
    model: nn.Module,
    config: RunConfig,
    kept: KeptClasses | None = None,
) -> tuple[DataSet, nn.Module]:
    """Return a loader's images as a data set, and the network such that it takes them.

    The network may take several inputs; see `with_inputs`. Of the images to train on only so many
    are read as a run needs without fine-tuning, a random sample if they are a `Dataset`. If the
    network has only the classes `kept`, labels are still those of all its original ones. Raises
    `DataError`.
    """
    function = forward_of(model)
    bare = without_forward(model)
    form = form_of(bare, function, lambda images: can_run(model, images[:2]))
    most = None if config.finetune.epochs else _needed(config, is_split=loaded.test is None)
    images = read_images(loaded.train, form, f"{loaded.name}, train", most=most, seed=config.seed)
    test = None if loaded.test is None else read_images(loaded.test, form, f"{loaded.name}, test")
    parts = split_images(images, test)
    network = with_inputs(model, images.inputs)
    network = through_logits(network, parts.score.pixels[:2], config.model.task)
    dataset = label_images(
        parts, network, config.model.task, loaded.class_names, None if kept is None else kept.of
    )
    return replace(dataset, name=loaded.name), network


def _needed(config: RunConfig, *, is_split: bool) -> int:
    """Return how many images leave enough for calibration when others are held out."""
    count = config.data.calibration_images * VALIDATION_EVERY / (VALIDATION_EVERY - 1)
    return math.ceil(count * (TEST_EVERY / (TEST_EVERY - 1) if is_split else 1))
