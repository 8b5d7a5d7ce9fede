"""Arrays in `.npy` and `.npz` files: images, signals or volumes as a network takes them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.data.batch_forms import shared_tensor
from secateur.data.folder_layout import Role, role_of
from secateur.data.images import Images, NormalisedImages
from secateur.data.splits import LabelKind, Splits, hold_out_fifth
from secateur.runtime.errors import DataError

KIND = "arrays"
INPUTS = ("x", "images", "image", "inputs", "input", "signals", "signal", "volumes", "data")
LABELS = ("y", "labels", "label", "targets", "target", "masks", "mask")
"""What inputs and labels are called, alone or behind the name of a part: `x`, `train_x`."""
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class _Part:
    inputs: Tensor
    labels: Tensor | None


def read_arrays(place: Path) -> Splits:
    """Return the inputs in an `.npz` file or in a folder of `.npy` files, with labels if there are.

    They are called `x` and `y`, or `train_x`, `train_y`, `test_x`, `test_y`; see `INPUTS` and
    `LABELS`. Inputs are floats `[image, channel, …]`, normalised as the network takes them. Labels
    are class numbers or 0 and 1 for each of several labels, masks of whole numbers, `[image,
    …]`, or floats to regress. Without a test part it is `val`, else a fifth of the images. A single
    `.npy` file holds inputs. Raises `DataError`.
    """
    parts = _parts(_read(place), place)
    if "train" not in parts:
        raise DataError(
            f"{place} has no inputs: call the array x (and the labels y), or train_x and test_x"
        )
    train_part = parts["train"]
    tested: Role | None = next((role for role in ("test", "val") if role in parts), None)
    kind, classes = _kind(train_part)
    train: Images = _images(train_part, kind)
    test: Images
    if tested is None:
        origin = f"{place} has no test part: a fifth of the images is held out for it"
        train, test = hold_out_fifth(train)
    else:
        origin = "" if tested == "test" else f"{tested} is the test part of {place}"
        _check_same(train_part, parts[tested], place)
        test = _images(parts[tested], kind)
        if kind == "classes" and test.labels.ndim == 1:
            classes = max(classes, int(test.labels.max()) + 1)
    names = tuple(f"class {number}" for number in range(classes))
    return Splits(names, train, test, origin=origin, kind=kind)


def _read(place: Path) -> Mapping[str, np.ndarray]:
    """Return the arrays by name; raises `DataError`."""
    if place.is_dir():
        files = sorted([*place.glob("*.npy"), *place.glob("*.npz")])
        if not files:
            raise DataError(f"{place} holds no .npy or .npz files")
        arrays: dict[str, np.ndarray] = {}
        for file in files:
            content = _load(file)
            arrays |= content if file.suffix == ".npz" else {file.stem: content["x"]}
        return arrays
    return _load(place)


def _load(file: Path) -> dict[str, np.ndarray]:
    if file.suffix not in (".npy", ".npz"):
        raise DataError(f"{file} is neither .npy nor .npz: save it with numpy.savez")
    try:
        # Pages of a .npy file are read as they are needed; of a .npz file the whole.
        content = np.load(file, allow_pickle=False, mmap_mode="r")
        if isinstance(content, np.ndarray):
            return {"x": content}
        with content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} can't be read: {' '.join(str(error).split())}") from error


def _parts(arrays: Mapping[str, np.ndarray], place: Path) -> dict[Role, _Part]:
    named: dict[Role, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        role, what = _meaning(name)
        if what:
            named.setdefault(role, {}).setdefault(what, array)
    if not named and len(arrays) == 1:
        named = {"train": {"inputs": next(iter(arrays.values()))}}
    return {
        role: _part(entries["inputs"], entries.get("labels"), f"{place}, {role}")
        for role, entries in named.items()
        if "inputs" in entries
    }


def _meaning(name: str) -> tuple[Role, str]:
    """Return the part that an array belongs to and whether it holds inputs, labels or neither."""
    words = name.lower().replace("-", "_").split("_")
    roles = [role for role in map(role_of, words) if role is not None]
    rest = [word for word in words if role_of(word) is None]
    role: Role = roles[0] if roles else "train"
    if len(rest) != 1:
        return role, ""
    return role, "inputs" if rest[0] in INPUTS else "labels" if rest[0] in LABELS else ""


def _part(inputs: np.ndarray, labels: np.ndarray | None, title: str) -> _Part:
    if inputs.dtype.kind not in "fiu" or inputs.ndim < 3 or not len(inputs):
        raise DataError(
            f"{title}: inputs must be numbers [image, channel, …], not {inputs.dtype} "
            f"{list(inputs.shape)}"
        )
    if inputs.dtype.kind != "f":
        raise DataError(
            f"{title}: inputs are {inputs.dtype}: save them as float32, scaled and normalised as "
            "the network takes them"
        )
    tensors = shared_tensor(inputs).float()
    if not bool(torch.stack(tensors.aminmax()).isfinite().all()):
        raise DataError(f"{title}: an input holds a number that is not finite")
    if labels is None:
        return _Part(tensors, None)
    if labels.dtype.kind not in "fiub" or labels.shape[:1] != inputs.shape[:1]:
        raise DataError(
            f"{title}: {len(inputs)} inputs with labels {labels.dtype} {list(labels.shape)}"
        )
    if labels.dtype.kind == "f":
        return _Part(tensors, torch.from_numpy(labels).float())
    return _Part(tensors, torch.from_numpy(labels.astype(np.int64)))


def _kind(part: _Part) -> tuple[LabelKind, int]:
    """Return what the labels are, and how many classes there are."""
    labels = part.labels
    if labels is None:
        return "none", 0
    if labels.is_floating_point():
        return "values", 0
    if labels.ndim <= 1 or labels.shape[1:] == (1,):
        classes = int(labels.max()) + 1
        if int(labels.min()) < 0 or classes > MOST_CLASSES:
            raise DataError(
                f"labels from {int(labels.min())} to {classes - 1} are no class numbers: save "
                "values to regress as float32"
            )
        return "classes", classes
    if labels.ndim == 2:
        return "classes", int(labels.shape[1])
    return "masks", int(labels.max()) + 1


def _images(part: _Part, kind: LabelKind) -> NormalisedImages:
    zeros = torch.zeros(len(part.inputs), dtype=torch.int64)
    if part.labels is None:
        return NormalisedImages(part.inputs, zeros)
    if kind == "classes":
        labels = part.labels
        return NormalisedImages(part.inputs, labels[:, 0] if labels.shape[1:] == (1,) else labels)
    return NormalisedImages(part.inputs, zeros, part.labels)


def _check_same(train: _Part, test: _Part, place: Path) -> None:
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise DataError(
            f"{place}: inputs of train are {list(train.inputs.shape[1:])}, of the test part "
            f"{list(test.inputs.shape[1:])}"
        )
    if (train.labels is None) != (test.labels is None):
        raise DataError(f"{place}: only one of train and the test part has labels")
