"""Weight files: safetensors and PyTorch checkpoints."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.published import Remap, adapt
from secateur.models.state_dict import load_state
from secateur.runtime import safetensors_io
from secateur.runtime.errors import WeightsError


def load_weights(
    model: nn.Module,
    path: str | Path,
    num_classes: int | None = None,
    *,
    new_head: bool = False,
    remap: Remap | None = None,
) -> None:
    """Copy the weights of a file into `model`; every key must fit, after `adapt`.

    With `new_head`, a head for another number of classes than `num_classes` is skipped: that of
    `model` stays as it is. Raises `WeightsError` that names the missing, unexpected and misshapen
    keys or, if only the head differs in its number of classes, both numbers. See `read_weights`
    for the files.
    """
    weights = adapt(model, read_weights(Path(path)), remap)
    expected = model.state_dict()
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in weights and name not in optional]
    unexpected = [name for name in weights if name not in expected]
    unexpected.sort(key=lambda name: name.endswith("num_batches_tracked"))  # weights first
    shapes = {
        name: (list(tensor.shape), list(expected[name].shape))
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    }
    misshapen = [f"{name} is {shape}, not {needed}" for name, (shape, needed) in shapes.items()]
    heads = {shape[0] for shape, _ in shapes.values() if shape}
    only_heads = all(
        needed == [num_classes, *shape[1:]] and shape for shape, needed in shapes.values()
    )
    if len(heads) == 1 and only_heads and not missing and not unexpected:
        if not new_head:
            raise WeightsError(
                f"the weights in {path} are for {heads.pop()} classes, but the data or "
                f"--num-classes asks for {num_classes}"
            )
        weights = {name: tensor for name, tensor in weights.items() if name not in shapes}
        misshapen = []
    complaints = [
        f"{len(keys)} {title}: {', '.join(keys[:4])}{', …' if len(keys) > 4 else ''}"
        for title, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if keys
    ]
    if complaints:
        raise WeightsError(f"the weights in {path} don't fit the network: {'; '.join(complaints)}")
    load_state(model, weights, strict=False)


def _is_pickled(path: Path) -> bool:
    """Return whether a file starts like a pickle, or is a zip file as torch writes them."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _check_sums(path: Path) -> None:
    """Raise `ValueError` if a zip file's checksums don't match; `torch.load` ignores them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(
                f"the checksum of {damaged!r} does not match: the file is damaged, or was written "
                "without checksums (torch.serialization.set_crc32_options)"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file by name, without wrappers and prefixes.

    Reads `.safetensors`, and `.pth`, `.pt` and `.th` with `weights_only=True`. A state dict may lie
    inside a dict (`state_dict`, `model`, …), and the prefixes of data-parallel and compiled
    networks are removed. Raises `WeightsError` if the file is missing, damaged or would need to
    run code.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            content: Any = safetensors_io.read(path)[0]
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a sound safetensors file: {error}") from error
    elif path.suffix in (".pth", ".pt", ".th"):
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns about damaged files
                _check_sums(path)
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not _is_pickled(path):
                raise WeightsError(f"{path} is not a file that torch.save wrote") from error
            raise WeightsError(
                f"{path} holds more than tensors and is not read, since that could run code: "
                "save the network's state_dict() instead"
            ) from error
        except Exception as error:  # a damaged pickle may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise WeightsError(f"{path} can't be read: {reason}") from error
    else:
        raise WeightsError(f"{path}: weights are read from .safetensors, .pth, .pt or .th files")
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict")
    if not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise WeightsError(f"{path} holds more than tensors: save the network's state_dict()")
    tensors = {str(name): tensor for name, tensor in content.items()}
    prefixes = ("_orig_mod.", "module.")
    while prefix := next((p for p in prefixes if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
