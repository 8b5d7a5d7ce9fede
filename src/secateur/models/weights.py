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

from secateur.errors import WeightsError
from secateur.runtime import safetensors_io


def load_weights(
    model: nn.Module,
    path: str | Path,
    num_classes: int | None = None,
    *,
    new_head: bool = False,
) -> None:
    """Copies the weights of a file into `model`; every key must fit.

    With `new_head` a head that is for another number of classes than `num_classes` may stay as it
    is in `model`.

    Reads `.safetensors`, and `.pth`, `.pt` and `.th` with `weights_only=True`. A state dict inside
    a dict (`state_dict`, `model`, …) and the prefixes that data-parallel and compiled networks add
    are taken off. Raises `WeightsError` that names the missing, unexpected and misshapen keys or,
    where only the head is for another number of classes than `num_classes`, both numbers.
    """
    found = read_weights(Path(path))
    expected = model.state_dict()
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in found and name not in optional]
    unexpected = [name for name in found if name not in expected]
    unexpected.sort(key=lambda name: name.endswith("num_batches_tracked"))  # weights first
    shapes = {
        name: (list(tensor.shape), list(expected[name].shape))
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    }
    misshapen = [f"{name} is {shape}, not {wanted}" for name, (shape, wanted) in shapes.items()]
    heads = {shape[0] for shape, _ in shapes.values() if shape}
    only_heads = all(
        wanted == [num_classes, *shape[1:]] and shape for shape, wanted in shapes.values()
    )
    if len(heads) == 1 and only_heads and not missing and not unexpected:
        if not new_head:
            raise WeightsError(
                f"the weights in {path} tell {heads.pop()} classes apart, but the data or "
                f"--num-classes asks for {num_classes}"
            )
        found = {name: tensor for name, tensor in found.items() if name not in shapes}
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
    model.load_state_dict(found, strict=False)


def _is_pickled(path: Path) -> bool:
    """Whether a file starts as a pickle does, or is a zip file as torch writes them."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _check_sums(path: Path) -> None:
    """Raises `ValueError` where a part of a zip file is not what its check sum says.

    `torch.load` does not look at them.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(
                f"the check sum of {damaged!r} does not match: it has been damaged, or written "
                "without check sums (torch.serialization.set_crc32_options)"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, without wrappers and prefixes.

    Raises `WeightsError` where the file is missing, damaged or would need code to load.
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
            with warnings.catch_warnings(action="ignore"):  # about oddities of damaged files
                _check_sums(path)
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not _is_pickled(path):
                raise WeightsError(f"{path} is no file of torch's") from error
            raise WeightsError(
                f"{path} holds more than tensors and is not read, since that could run code: "
                "save the network's state_dict() instead"
            ) from error
        except Exception as error:  # a damaged pickle raises whatever its bytes lead to
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
