"""What a batch that comes from Python holds: images and labels, in any form that people use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.runtime.errors import DataError
from secateur.runtime.packed_inputs import Parameters, Passing, parameters_of
from secateur.runtime.torch_internals import Convolution

IMAGE_NAMES = ("pixel_values", "images", "image", "img", "inputs", "input", "x")
"""What images are called in batches with names; the first that a batch has is taken."""
LABEL_NAMES = ("labels", "label", "targets", "target", "y")
AXES = {
    1: "[image, channel, time]",
    2: "[image, channel, height, width]",
    3: "[image, channel, depth, height, width]",
}
"""Shape of a batch, by the dimensions that a network's convolutions move along."""
BYTES = "; secateur.prune does it batch by batch with settings={'data.mean': …, 'data.std': …}"
"""What to do with uint8 pictures."""


@dataclass(frozen=True)
class Form:
    """What an image is, as the network that takes it tells."""

    dims: int = 2
    """Dimensions that the network's convolutions move along: 2 for images."""
    channels: int | None = None
    """Channels of an image, if the network tells."""
    parameters: Parameters = field(default_factory=Parameters)
    """What the network's call takes."""
    runs: Callable[[Tensor], bool] = field(default=lambda images: False, compare=False)
    """Whether the network can be run on a batch of another shape than its convolutions tell."""
    normalise: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    """Makes what the network takes of uint8 pictures; None if they are not taken."""

    @property
    def axes(self) -> str:
        """The shape of a batch, in words."""
        return AXES[self.dims]

    def fits(self, pixels: Tensor) -> bool:
        """Return whether the network can be run on a batch; see `runs`."""
        return self.runs(pixels if self.normalise is None else self.normalise(pixels[:2]))


def form_of(
    model: nn.Module,
    forward: Callable[..., Any] | None = None,
    runs: Callable[[Tensor], bool] = lambda images: False,
) -> Form:
    """Return what an image is for a network, as its call and its first convolution tell.

    With `forward` it is that function's call. For `runs` see `Form`.
    """
    layers = (module for module in model.modules() if isinstance(module, Convolution))
    first, parameters = next(layers, None), parameters_of(model, forward)
    if first is None:
        return Form(parameters=parameters, runs=runs)
    return Form(len(first.kernel_size), first.in_channels, parameters, runs)


def is_batch(source: object, form: Form) -> bool:
    """Return whether a source is one batch itself: images, or images with labels."""
    if isinstance(source, Tensor | np.ndarray | Mapping):
        return True
    if not isinstance(source, tuple | list) or not source:
        return False
    if isinstance(source, tuple) and _several(source, form) is not None:
        return True
    if len(source) != 2:
        return False
    images, labels = source
    if not isinstance(labels, Tensor | np.ndarray) or not labels.ndim:
        return False
    if isinstance(images, tuple | list):
        fits = (_is_floats(part) and len(part) == len(labels) for part in images)
        return isinstance(source, tuple) and all(fits)
    return (
        isinstance(images, Tensor | np.ndarray)
        and images.ndim > 2
        and labels.shape[:1] == images.shape[:1]
        and (labels.ndim <= 2 or not _is_floats(labels))
    )


@dataclass(frozen=True)
class SeveralInputs:
    """Several inputs of a batch, or of one image."""

    parts: tuple[Any, ...]
    passing: Passing
    names: tuple[str, ...] = ()


def _several(batch: Sequence[Any], form: Form) -> tuple[SeveralInputs, Any] | None:
    """Return the inputs of a batch and its labels, if it holds several inputs side by side."""
    count = len(form.parameters.needed)
    is_split = count > 1 and len(batch) in (count, count + 1)
    if not is_split or not all(map(_is_floats, batch[:count])):
        return None
    return SeveralInputs(tuple(batch[:count]), "arguments"), batch[count] if batch[count:] else None


def _several_named(batch: Any, form: Form, *, is_inner: bool) -> SeveralInputs | None:
    """Return the inputs in a mapping, if it holds several.

    They are what the network's call takes by name, or else all floats of a mapping that stands in
    a batch beside the labels (`is_inner`).
    """
    keys = list(batch.keys())
    tensors = {str(key): batch[key] for key in keys if _is_floats(batch[key])}
    is_label = frozenset(LABEL_NAMES).difference(form.parameters.needed)
    known = [key for key in tensors if key in form.parameters.names and key not in is_label]
    if len(known) > 1:
        return SeveralInputs(tuple(tensors[key] for key in known), "keywords", tuple(known))
    if is_inner and len(tensors) > 1 and not any(key in IMAGE_NAMES for key in tensors):
        return SeveralInputs(tuple(tensors.values()), "dict", tuple(tensors))
    return None


def split_batch(batch: Any, form: Form, name: str) -> tuple[Any, Any]:
    """Return the images of a batch and its labels, None if it has none."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch, None
    names = _names_of(batch)
    label_name = next((known for known in LABEL_NAMES if known in names), None)
    if hasattr(batch, "keys"):
        inputs = _several_named(batch, form, is_inner=False)
        if inputs is not None:
            has_label = label_name is not None and label_name not in inputs.names
            return inputs, batch[label_name] if has_label else None
    image_name = next((known for known in IMAGE_NAMES if known in names), None)
    if image_name is not None:
        return _value(batch, image_name), label_name and _value(batch, label_name)
    if hasattr(batch, "keys"):
        raise DataError(
            f"{name}: batches hold {', '.join(map(str, batch.keys()))}: call the images "
            f"{', '.join(IMAGE_NAMES[:-1])} or {IMAGE_NAMES[-1]}, and the labels "
            f"{', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}"
        )
    if not isinstance(batch, tuple | list) or not batch:
        return batch, None
    several = _several(batch, form)
    if several is not None:
        return several
    if len(batch) == 1:
        return split_batch(batch[0], form, name)
    if isinstance(batch, list) and all(_is_floats(part, form.dims + 1) for part in batch):
        return batch, None  # images that are not stacked yet
    first, second, *others = batch
    if others and not _is_class_numbers(second):
        parts = ", ".join(map(_description, batch))
        raise DataError(f"{name}: batches hold {parts}: yield images, or images and labels")
    if hasattr(first, "keys"):
        named = _several_named(first, form, is_inner=True)
        return (named or split_batch(first, form, name)[0]), second
    if isinstance(first, tuple | list) and len(first) > 1 and all(map(_is_floats, first)):
        passing = form.parameters.passing_of(first)
        if passing == "arguments" or any(part.ndim > form.dims + 1 for part in first):
            return SeveralInputs(tuple(first), passing), second
    return first, second


def _names_of(batch: Any) -> frozenset[str]:
    """Return the names in a batch: keys of a mapping, or attributes of an object with such."""
    if hasattr(batch, "keys"):
        return frozenset(map(str, batch.keys()))
    if type(batch) in (tuple, list):
        return frozenset()
    return frozenset(name for name in (*IMAGE_NAMES, *LABEL_NAMES) if hasattr(batch, name))


def _value(batch: Any, name: str) -> Any:
    return batch[name] if hasattr(batch, "keys") else getattr(batch, name)


def _is_floats(part: object, dims: int | None = None) -> bool:
    """Return whether a part of a batch holds floats, with so many dimensions if they are named."""
    if isinstance(part, np.ndarray):
        return part.dtype.kind == "f" and dims in (None, part.ndim)
    return isinstance(part, Tensor) and part.is_floating_point() and dims in (None, part.ndim)


def _is_class_numbers(part: object) -> bool:
    if isinstance(part, Tensor | np.ndarray):
        return not _is_floats(part) and (part.ndim <= 1 or part.shape[1:] == (1,))
    return isinstance(part, int | np.integer)


def _description(part: object) -> str:
    if isinstance(part, Tensor | np.ndarray):
        return f"{type(part).__name__} {list(part.shape)}"
    return type(part).__name__


def tensor_of(images: Any, form: Form, name: str) -> Tensor:
    """Return images as a float32 tensor on the CPU; uint8 pictures that are taken stay so.

    Memory is shared where nothing is converted, with arrays that are mapped from files, too.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "fiub":
        images = shared_tensor(images)
    if isinstance(images, list | tuple) and images and all(map(_is_floats, images)):
        sizes = sorted({tuple(image.shape) for image in images})
        if len(sizes) > 1:
            raise DataError(
                f"{name}: tensors {list(sizes[0])} and {list(sizes[-1])} of one image each: all "
                "must have one size"
            )
        images = torch.stack([torch.as_tensor(image) for image in images])
    if not isinstance(images, Tensor):
        raise DataError(
            f"{name} must be tensors {form.axes}; got {type(images).__name__}: the transform of a "
            "Dataset must end in a tensor, as v2.ToImage() and v2.ToDtype(torch.float32, "
            "scale=True) give one"
        )
    if images.dtype == torch.uint8 and form.normalise is not None and images.ndim > 2:
        bytes_: Tensor = images.detach().cpu()
        return bytes_
    if not images.is_floating_point():
        raise DataError(
            f"{name} must be floating-point tensors {form.axes}, as the network takes them; got "
            f"{list(images.shape)} of {images.dtype}: scale and normalise them as in training"
            f"{BYTES if images.dtype == torch.uint8 and form.dims == 2 else ''}"
        )
    pixels: Tensor = images.detach().cpu().float()
    if pixels.numel() and not bool(torch.stack(pixels.aminmax()).isfinite().all()):
        raise DataError(f"{name}: an image holds a number that is not finite")
    return pixels


def shared_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, of the same memory if it is float32 or uint8.

    torch warns of arrays that can't be written, such as those mapped from files to be read. Nothing
    writes into images.
    """
    if array.dtype not in (np.float32, np.uint8) or any(step < 0 for step in array.strides):
        return torch.tensor(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def as_batch(
    pixels: Tensor, labels: Tensor | None, form: Form, name: str, *, is_single: bool
) -> tuple[Tensor, bool]:
    """Return images as a batch, and whether they were a single image, which has no first axis."""
    rank = form.dims + 2
    if labels is not None and not labels.ndim and pixels.ndim > rank - 2:
        is_batch_of_one = pixels.ndim >= rank and len(pixels) == 1
        return (pixels, False) if is_batch_of_one else (pixels[None], True)
    if pixels.ndim == rank:
        return pixels, False
    is_labelled_batch = labels is not None and labels.ndim > 0 and len(labels) == len(pixels)
    is_single &= not is_labelled_batch or len(pixels) in (1, form.channels)
    if pixels.ndim == rank - 1 and is_single:
        is_likely = is_labelled_batch or len(pixels) in (1, form.channels)
        if is_likely or form.fits(pixels[None]) or not form.fits(pixels):
            return pixels[None], True
        return pixels, False
    if pixels.ndim > 1 and form.fits(pixels):
        return pixels, False
    if is_single and form.fits(pixels[None]):
        return pixels[None], True
    what = f"{list(pixels.shape)}" + (
        f" with {labels.numel()} labels" if labels is not None else ""
    )
    raise DataError(
        f"{name} must be floating-point tensors {form.axes}, as the network takes them; got {what}"
    )


def as_batches(
    tensors: list[Tensor], labels: Tensor | None, form: Form, name: str, *, is_single: bool
) -> tuple[list[Tensor], bool]:
    """Return several inputs as batches, and whether they were those of a single image."""
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    rank = max(tensor.ndim for tensor in tensors)
    has_many_labels = labels is not None and labels.ndim > 0 and len(labels) in counts
    is_one = labels is not None and not labels.ndim and (rank != form.dims + 2 or counts != {1})
    if not is_one and is_single and not has_many_labels:
        is_one = len(counts) > 1 or rank <= form.dims + 1
    if is_one:
        return [tensor[None] for tensor in tensors], True
    if len(counts) > 1:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise DataError(f"{name}: inputs {shapes} are of different numbers of images")
    return tensors, False


def labels_as_tensor(labels: Any, name: str) -> Tensor:
    """Return labels of one image or of a batch as they are, as a tensor."""
    if isinstance(labels, list | tuple) and any(isinstance(label, Tensor) for label in labels):
        labels = [label.item() if label.numel() == 1 else label for label in labels]
    try:
        numbers: Tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        first = labels[0] if isinstance(labels, list | tuple) and labels else labels
        raise DataError(
            f"{name}: labels must be class numbers, not {first!r} ({type(first).__name__})"
        ) from error
    return numbers.detach().cpu()
