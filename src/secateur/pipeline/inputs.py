"""The network and the images that a configuration names, and how those are read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from secateur import data
from secateur.config import PREPROCESSING_KEYS, RunConfig
from secateur.data import DataSet
from secateur.data.batch_reader import BatchReader
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import traceable_forward
from secateur.graph.forward import with_forward
from secateur.models import libraries, user_code, zoo
from secateur.models.outputs import through_logits
from secateur.pipeline.input_fit import fit_channels
from secateur.pipeline.run_context import RunContext
from secateur.runtime.errors import DataError, UsageError
from secateur.scoring import concepts, criteria
from secateur.training import own_loss


def check_names(config: RunConfig) -> None:
    """Raise `UsageError` if the network, criterion, concept source or loss does not exist."""
    zoo.check_name(config.model.name)
    if config.model.forward is not None:
        user_code.check_file(config.model.forward, "function")
    criteria.check_name(config.score.criterion)
    concepts.parse(config.score.concepts)
    own_loss.check_name(config.finetune.loss)


def check_weights(config: RunConfig) -> None:
    """Raise `UsageError` if a network that needs a weight file has none, unless that is allowed."""
    is_user_code = user_code.is_user_code(config.model.name)
    comes_with_them = is_user_code or libraries.has_weights(config.model.name)
    if config.model.weights is None and not comes_with_them and not config.model.allow_untrained:
        raise UsageError(
            f"{config.model.name} needs --weights (or --allow-untrained, with random weights)"
        )


def load_inputs(config: RunConfig, *, new_head: bool = False) -> tuple[DataSet, nn.Module]:
    """Load the data set and the network that a configuration names.

    The notes of the data set say what the weight file left open, too. For `new_head` see
    `load_weights`. Raises `SecateurError`.
    """
    dataset = data.load(
        config.data.source,
        validation_fraction=config.data.validation_fraction,
        ignore_index=config.data.ignore_index,
        seed=config.seed,
    )
    num_classes = config.model.num_classes or len(dataset.class_names) or None
    is_binary = num_classes == 1 and len(dataset.class_names) == 2
    if num_classes is not None and num_classes < len(dataset.class_names) and not is_binary:
        raise DataError(
            f"{config.data.source} has {len(dataset.class_names)} classes but --num-classes is "
            f"{num_classes}; it must be at least {len(dataset.class_names)}"
        )
    notes = list(dataset.notes)
    model = zoo.load(
        config.model.name,
        config.model.weights,
        num_classes=num_classes,
        new_head=new_head,
        seed=config.seed,
        weights_key=config.model.weights_key,
        notify=notes.append,
    )
    dataset = replace(dataset, notes=tuple(notes))
    if config.model.forward is not None:
        function = user_code.find(config.model.forward, "function")
        return dataset, with_forward(model, function)
    if zoo.may_return_more(config.model.name):
        model = with_forward(model, traceable_forward(model))
        preprocessing = preprocessing_of(resolve_config(config, dataset, model))
        model = through_logits(model, torch.zeros(2, *preprocessing.shape))
    return dataset, model


def resolve_config(config: RunConfig, dataset: DataSet, model: nn.Module) -> RunConfig:
    """Return the configuration with the defaults that depend on the network or data filled in.

    A network that is named is tried on black images: whether it takes colours or grey, see
    `fit_channels`. Raises `UsageError` if it can't be run on images of that size.
    """
    if config.data.image_size is None and user_code.is_user_code(config.model.name):
        height, width = dataset.stored_size or (0, 1)
        if height == width:
            config = _with_data(config, image_size=height)
    preprocessing = preprocessing_of(config)
    mean, std = preprocessing.mean, preprocessing.std
    is_resolved = all(getattr(config.data, key) is not None for key in PREPROCESSING_KEYS)
    if not is_resolved and not config.model.name.startswith(f"{zoo.IN_MEMORY}:"):
        channels = fit_channels(model, preprocessing.size)
        mean = _by_channel("mean", mean, channels, is_own=config.data.mean is not None)
        std = _by_channel("std", std, channels, is_own=config.data.std is not None)
    values = {key: getattr(preprocessing, key) for key in PREPROCESSING_KEYS}
    config = _with_data(config, **{**values, "mean": mean, "std": std})
    num_classes = config.model.num_classes or len(dataset.class_names) or None
    model_section = config.model.model_copy(update={"num_classes": num_classes})
    return config.model_copy(update={"model": model_section})


def describe_inputs(
    config: RunConfig, resolved_config: RunConfig, dataset: DataSet
) -> tuple[str, ...]:
    """Return notes on how images are read, where that was not said in `config`."""
    notes: list[str] = []
    preprocessing = preprocessing_of(resolved_config)
    mean, std = preprocessing.mean, preprocessing.std
    size = f"{preprocessing.size[1]}×{preprocessing.size[0]}"
    if config.data.image_size is None and user_code.is_user_code(config.model.name):
        stored = dataset.stored_size
        if stored == preprocessing.size:
            notes.append(
                f"Images are read at {size}, the size that they are stored in: --image-size sets "
                "another."
            )
        else:
            sizes = "of several sizes" if stored is None else f"of {stored[1]}×{stored[0]}"
            notes.append(
                f"Images {sizes} are read at {size}: if the network was trained at another size, "
                "pass it as --image-size."
            )
    if len(mean) == 1 and config.data.mean is None:
        notes.append(
            "The network takes one channel, so images are read in grey, with mean "
            f"{mean[0]:.3f} and deviation {std[0]:.3f}: if it was trained with others, set "
            "data.mean and data.std."
        )
    return tuple(notes)


def _with_data(config: RunConfig, **values: object) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def _by_channel(
    key: str, values: tuple[float, ...], channels: int, *, is_own: bool
) -> tuple[float, ...]:
    """Return one value for each channel: those of colours average to that of grey.

    Raises `UsageError` if the values are the user's own and differ.
    """
    if len(values) == channels:
        return values
    if is_own and len(set(values)) > 1:
        needed = "one channel: give one" if channels == 1 else "three channels: give three, or one"
        raise UsageError(f"data.{key} has {len(values)} values, but the network takes {needed}")
    return channels * (round(sum(values) / len(values), 6),)


def preprocessing_of(config: RunConfig) -> Preprocessing:
    """Return what the network expects of its images, unless the configuration says otherwise."""
    published = zoo.preprocessing(config.model.name)
    chosen = {key: getattr(config.data, key) for key in PREPROCESSING_KEYS}
    changed = replace(
        published,
        **{key: value for key, value in chosen.items() if value is not None},
        keeps_exact=user_code.is_user_code(config.model.name),
    )
    resize = round(min(changed.size) * published.resize / min(published.size))
    return replace(changed, resize=resize)


def make_reader(config: RunConfig, run_context: RunContext | None = None) -> BatchReader:
    """Return the reader of images that the configuration describes."""
    run_context = run_context or RunContext()
    return BatchReader(
        preprocessing_of(config),
        config.data.batch_size,
        run_context.progress,
        run_context.unreadable,
    )
