"""The network and the images that a configuration names, and how those are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur import data
from secateur.config import PREPROCESSING_KEYS, Fit, RunConfig
from secateur.data import DataSet, NormalisedImages
from secateur.data.batch_reader import BatchReader
from secateur.data.in_memory import split_images
from secateur.data.kept_classes import KeptClasses
from secateur.data.preprocessing import Preprocessing
from secateur.data.same_classes import compare_classes
from secateur.data.vocabulary import read_vocabulary
from secateur.engines.registry import find_engine
from secateur.graph.build import traceable_forward
from secateur.graph.forward import with_forward
from secateur.integrations.image_text import check_image_text_model
from secateur.models import libraries, user_code, zoo
from secateur.models.labelled_images import label_images
from secateur.models.metrics import by_name as metrics
from secateur.models.outputs import through_logits
from secateur.models.reparameterize import NOTHING_TO_FOLD, reparameterized
from secateur.pipeline.input_fit import fit_channels
from secateur.pipeline.kept_classes import cut_to_classes
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.synthetic_data import (
    describe_synthetic,
    is_synthetic,
    noise_images,
    synthetic_images,
)
from secateur.pipeline.user_data import UserData, call_loader, read_user_data
from secateur.runtime.device import find_device
from secateur.runtime.errors import DataError, UsageError
from secateur.runtime.torch_internals import Convolution
from secateur.scoring import concepts, criteria
from secateur.training import own_loss

WHOLE: dict[str, Fit] = {"masks": "stretch", "objects": "letterbox"}
"""How images with masks or objects are fitted to networks whose own way is to crop."""


def check_names(config: RunConfig) -> None:
    """Raise `UsageError` if the network, engine, criterion or another thing does not exist.

    Likewise the image–text model and the vocabulary (`DataError`) that are to name filters.
    """
    zoo.check_name(config.model.name)
    if config.model.forward is not None:
        user_code.check_file(config.model.forward, "function")
    if user_code.is_user_code(config.data.source):
        user_code.check_file(config.data.source, "loader")
    metrics.check_name(config.model.metric)
    criteria.check_name(config.score.criterion)
    concepts.parse(config.score.concepts)
    own_loss.check_name(config.finetune.loss)
    find_engine(config.plan.engine)  # its package may be missing
    if config.report.naming_model is not None:
        check_image_text_model(config.report.naming_model)
        read_vocabulary(config.report.vocabulary)


def check_weights(config: RunConfig) -> None:
    """Raise `UsageError` if a network that needs a weight file has none, unless that is allowed."""
    is_user_code = user_code.is_user_code(config.model.name)
    comes_with_them = is_user_code or libraries.has_weights(config.model.name)
    if config.model.weights is None and not comes_with_them and not config.model.allow_untrained:
        raise UsageError(
            f"{config.model.name} needs --weights (or --allow-untrained, with random weights)"
        )


def load_inputs(
    config: RunConfig,
    *,
    new_head: bool = False,
    run_context: RunContext | None = None,
    is_estimate: bool = False,
) -> tuple[DataSet, nn.Module]:
    """Load the data set and the network that a configuration names.

    The notes of the data set say what the weight file left open, too. For `new_head` see
    `load_weights`. Images that are to be synthesised are noise for an estimate. Raises
    `SecateurError`.
    """
    source = config.data.source
    loaded = call_loader(source) if user_code.is_user_code(source) else _load_named(config)
    classes = len(loaded.class_names)
    num_classes = config.model.num_classes or classes or None
    is_binary = num_classes == 1 and classes == 2
    if num_classes is not None and num_classes < classes and not is_binary:
        raise DataError(
            f"{source} has {classes} classes but --num-classes is {num_classes}; it must be at "
            f"least {classes}"
        )
    notes: list[str] = []
    device = find_device(config.model.device)
    model = zoo.load(
        config.model.name,
        config.model.weights,
        num_classes=num_classes,
        new_head=new_head,
        seed=config.seed,
        weights_key=config.model.weights_key,
        notify=notes.append,
    ).to(device)
    if config.model.reparameterize:
        folded = reparameterized(model, _noise(model, config))
        notes += [NOTHING_TO_FOLD] if folded is model else []
        model = folded
    if config.model.forward is not None:
        model = with_forward(model, user_code.find(config.model.forward, "function"))
    elif zoo.may_return_more(config.model.name):
        model = with_forward(model, traceable_forward(model))
    if isinstance(loaded, UserData):
        dataset, model = read_user_data(loaded, model, config)
        dataset = replace(dataset, notes=(*dataset.notes, *notes))
        return _cut_to_classes(dataset, model, config, run_context)
    if is_synthetic(config):
        loaded, model = _synthesise(loaded, model, config, run_context, is_estimate=is_estimate)
    dataset = replace(loaded, notes=(*loaded.notes, *notes))
    if config.model.forward is None and zoo.may_return_more(config.model.name):
        model = through_logits(model, _examples(dataset, config, model), config.model.task)
    return _cut_to_classes(dataset, model, config, run_context)


def _cut_to_classes(
    dataset: DataSet, model: nn.Module, config: RunConfig, run_context: RunContext | None
) -> tuple[DataSet, nn.Module]:
    """Return the images and the network with only the classes that a configuration keeps."""
    if not config.data.keep_classes:
        return dataset, model
    run_context = (run_context or RunContext()).collecting_unreadable(config)
    reader = make_reader(resolve_config(config, dataset, model), run_context)
    return cut_to_classes(dataset, model, config, reader)


def load_data(
    config: RunConfig,
    model: nn.Module,
    class_names: Sequence[str] = (),
    kept: KeptClasses | None = None,
) -> DataSet:
    """Load the data set that a configuration names, to score a pruned network on it.

    One that a function of the user's returns is read as `model` takes it. `class_names` are those
    of the network, if they are known; see `compare_classes`. If it has only the classes `kept`, so
    has the data set. Raises `SecateurError`.
    """
    source = config.data.source
    if user_code.is_user_code(source):
        dataset, _ = read_user_data(call_loader(source), model, config, kept)
    elif is_synthetic(config):
        raise UsageError(
            "synthesised images can't tell how good a network is: name real ones, --data folder:DIR"
        )
    else:
        dataset = _load_named(config)
    numbers = range(len(class_names)) if kept is None else kept.numbers
    expected = dict(zip(numbers, class_names, strict=False))
    of = len(class_names) if kept is None else kept.of
    note = compare_classes(source, dataset.class_names, expected, of)
    if note:
        dataset = replace(dataset, notes=(*dataset.notes, note))
    return dataset if kept is None else dataset.of_classes(kept)


def _noise(model: nn.Module, config: RunConfig) -> Tensor:
    """Return two images of noise for a network of the first layer's channels."""
    kernels = (module for module in model.modules() if isinstance(module, Convolution))
    channels = next((layer.in_channels for layer in kernels), 3)
    size = config.data.image_size or zoo.preprocessing(config.model.name).image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(2, channels, height, width, generator=generator)


def _load_named(config: RunConfig) -> DataSet:
    return data.load(
        config.data.source,
        validation_fraction=config.data.validation_fraction,
        ignore_index=config.data.ignore_index,
        seed=config.seed,
    )


def _synthesise(
    nothing: DataSet,
    model: nn.Module,
    config: RunConfig,
    run_context: RunContext | None,
    *,
    is_estimate: bool,
) -> tuple[DataSet, nn.Module]:
    """Return images synthesised from the network, or noise in their place, and the network."""
    if config.data.image_size is None and user_code.is_user_code(config.model.name):
        raise UsageError(
            "the size of the images to synthesise is not known for a network from a file of your "
            "own: --image-size SIDE"
        )
    preprocessing = preprocessing_of(resolve_config(config, nothing, model))
    normalise = preprocessing.normalise
    images = noise_images(
        config.data.synthetic_images, preprocessing.shape, normalise, seed=config.seed
    )
    model = through_logits(model, images.pixels[:2], config.model.task)
    if not is_estimate:
        images = synthetic_images(model, images, normalise, run_context or RunContext())
    dataset = label_images(split_images(images, None), model, config.model.task, ())
    dataset = describe_synthetic(dataset, len(images.pixels), is_tested=False)
    return replace(dataset, name=nothing.name), model


def _examples(dataset: DataSet, config: RunConfig, model: nn.Module) -> torch.Tensor:
    """Return two images: those in memory, or black ones."""
    if isinstance(dataset.train, NormalisedImages):
        return dataset.train.tensors[:2]
    return torch.zeros(2, *preprocessing_of(resolve_config(config, dataset, model)).shape)


def resolve_config(config: RunConfig, dataset: DataSet, model: nn.Module) -> RunConfig:
    """Return the configuration with the defaults that depend on the network or data filled in.

    A network that is named is tried on black images: whether it takes colours or grey, see
    `fit_channels`. Images with masks are not cropped, nor are those with objects, unless the
    configuration says so. Raises `UsageError` if the network can't be run on images of that size.
    """
    in_memory = dataset.train if isinstance(dataset.train, NormalisedImages) else None
    if config.data.image_size is None and in_memory is not None:
        shape = in_memory.tensors.shape
        config = _with_data(config, image_size=min(shape[2:] or shape[1:]))
    elif config.data.image_size is None and user_code.is_user_code(config.model.name):
        height, width = dataset.stored_size or (0, 1)
        if height == width:
            config = _with_data(config, image_size=height)
        elif dataset.stored_size is not None and dataset.kind in WHOLE:
            config = _with_data(config, image_size=dataset.stored_size)
    is_cropped = zoo.preprocessing(config.model.name).fit == "crop"
    if config.data.fit is None and dataset.kind in WHOLE and is_cropped:
        config = _with_data(config, fit=WHOLE[dataset.kind])
    preprocessing = preprocessing_of(config)
    mean, std = preprocessing.mean, preprocessing.std
    is_resolved = all(getattr(config.data, key) is not None for key in PREPROCESSING_KEYS)
    if (
        not is_resolved
        and in_memory is None
        and not config.model.name.startswith(f"{zoo.IN_MEMORY}:")
    ):
        channels = fit_channels(model, preprocessing.size)
        mean = _by_channel("mean", mean, channels, is_own=config.data.mean is not None)
        std = _by_channel("std", std, channels, is_own=config.data.std is not None)
    values = {key: getattr(preprocessing, key) for key in PREPROCESSING_KEYS}
    config = _with_data(config, **{**values, "mean": mean, "std": std})
    classes = len(dataset.class_names) if dataset.kept is None else dataset.kept.of
    num_classes = config.model.num_classes or classes or None
    model_section = config.model.model_copy(update={"num_classes": num_classes})
    return config.model_copy(update={"model": model_section})


def describe_inputs(
    config: RunConfig, resolved_config: RunConfig, dataset: DataSet
) -> tuple[str, ...]:
    """Return notes on how images are read, where that was not said in `config`."""
    if isinstance(dataset.train, NormalisedImages):
        return ()
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
