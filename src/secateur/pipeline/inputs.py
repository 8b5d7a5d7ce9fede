"""The network and the images that a configuration names, and how those are read."""

from __future__ import annotations

from torch import nn

from secateur import data
from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.data.batch_reader import BatchReader
from secateur.data.preprocessing import Preprocessing
from secateur.models import user_code, zoo
from secateur.pipeline.run_context import RunContext
from secateur.runtime.errors import DataError, UsageError
from secateur.scoring import concepts, criteria


def check_names(config: RunConfig) -> None:
    """Raise `UnknownName` if the network, criterion or concept source does not exist."""
    zoo.check_name(config.model.name)
    criteria.check_name(config.score.criterion)
    concepts.parse(config.score.concepts)


def check_weights(config: RunConfig, *, allow_untrained: bool) -> None:
    """Raise `UsageError` if a network that needs a weight file has none."""
    is_user_code = user_code.is_user_code(config.model.name)
    if config.model.weights is None and not is_user_code and not allow_untrained:
        raise UsageError(
            f"{config.model.name} needs --weights (or --allow-untrained, with random weights)"
        )


def load_inputs(
    config: RunConfig, run_context: RunContext | None = None, *, new_head: bool = False
) -> tuple[DataSet, nn.Module]:
    """Load the data set and the network that a configuration names.

    Notices go to `run_context`. For `new_head` see `load_weights`. Raises `SecateurError`.
    """
    dataset = data.load(
        config.data.source,
        validation_fraction=config.data.validation_fraction,
        seed=config.seed,
    )
    num_classes = config.model.num_classes or len(dataset.class_names)
    if not num_classes:
        raise UsageError("without data the number of classes must be given: --num-classes")
    if num_classes < len(dataset.class_names):
        raise DataError(
            f"{config.data.source} has {len(dataset.class_names)} classes but --num-classes is "
            f"{num_classes}; it must be at least {len(dataset.class_names)}"
        )
    model = zoo.load(
        config.model.name,
        config.model.weights,
        num_classes=num_classes,
        new_head=new_head,
        seed=config.seed,
        weights_key=config.model.weights_key,
        notify=(run_context or RunContext()).notices.append,
    )
    return dataset, model


def resolve_config(config: RunConfig, dataset: DataSet) -> RunConfig:
    """Return the configuration with the defaults that depend on the network or data filled in."""
    preprocessing = preprocessing_of(config)
    data_values = {
        "image_size": preprocessing.image_size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
    }
    num_classes = config.model.num_classes or len(dataset.class_names)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data_values),
            "model": config.model.model_copy(update={"num_classes": num_classes}),
        }
    )


def preprocessing_of(config: RunConfig) -> Preprocessing:
    """Return what the network expects of its images, unless the configuration says otherwise."""
    published = zoo.preprocessing(config.model.name)
    size = config.data.image_size or published.image_size
    return Preprocessing(
        image_size=size,
        resize=round(size * published.resize / published.image_size),
        mean=config.data.mean or published.mean,
        std=config.data.std or published.std,
        interpolation=config.data.interpolation or published.interpolation,
    )


def make_reader(config: RunConfig, run_context: RunContext | None = None) -> BatchReader:
    """Return the reader of images that the configuration describes."""
    run_context = run_context or RunContext()
    return BatchReader(
        preprocessing_of(config),
        config.data.batch_size,
        run_context.progress,
        run_context.unreadable,
    )
