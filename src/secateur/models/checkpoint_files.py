"""Find the files that weights are in, and read them: one file, an index of shards, or a folder."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secateur.models import torch_files
from secateur.models.file_formats import format_of
from secateur.runtime import safetensors_io
from secateur.runtime.errors import WeightsError
from secateur.runtime.hashing import file_hash
from secateur.runtime.input_limits import TEXT, inside, read_bounded
from secateur.runtime.local_path import check_local

INDEX = ".index.json"
STANDARD = (
    *("model.safetensors.index.json", "model.safetensors"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Files of accelerate and transformers, the preferred first."""
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".th", ".pth.tar", ".pkl")
"""Other files in a folder that may hold weights."""
NO_WEIGHTS = (
    *("optimizer", "scheduler", "sampler", "scaler", "training_args"),
    *("random_states", "rng_state", "dl_state"),
)
"""First letters of files beside the weights, which hold something else."""
MOST_NAMES = 4
FOREIGN: tuple[tuple[str, str, str], ...] = (
    (
        "*.distcp",
        "a folder of torch.distributed.checkpoint",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth",
    ),
    ("zero_to_fp32.py", "a DeepSpeed folder", "python {folder}/zero_to_fp32.py {folder} weights"),
    (
        "data.pkl",
        "an unpacked torch file",
        "cd {folder}/.. && zip -0 -r weights.pth {name}",
    ),
    ("saved_model.pb", "a TensorFlow SavedModel", ""),
    ("*.data-?????-of-?????", "a TensorFlow checkpoint", ""),
    ("_CHECKPOINT_METADATA", "a JAX (Orbax) checkpoint", ""),
)
"""A file by which folders are known, what they are, and the command that converts them."""


def read_checkpoint(path: Path) -> Any:
    """Return what a file, an index of shards or a folder holds: tensors in dicts, and plain data.

    Raises `WeightsError` if it is missing, damaged, of another format or would need to run code.
    """
    place = _find(path)
    if not place.name.endswith(INDEX):
        return _read_file(place)
    names = _read_index(place)
    tensors: dict[str, Any] = {}
    for shard, keys in names.items():
        content = _read_file(shard)
        missing = [key for key in keys if key not in content]
        if missing:
            raise WeightsError(f"{shard} lacks {missing[0]}, which {place} lists there")
        tensors.update({key: content[key] for key in keys})
    return tensors


def digest(path: Path) -> str:
    """Return the SHA-256 of the file that weights are in, or of those of all shards."""
    place = _find(path)
    shards = _read_index(place) if place.name.endswith(INDEX) else ()
    try:
        hashes = [file_hash(file) for file in (place, *shards)]
    except OSError as error:
        raise WeightsError(f"the weights {path} can't be read: {error}") from error
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if shards else hashes[0]


def _read_file(file: Path) -> Any:
    if format_of(file) == "torch":
        return torch_files.read(file)
    try:
        return safetensors_io.read(file)[0]
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} is not a sound safetensors file: {error}") from error


def _find(path: Path) -> Path:
    """Return the file or the index that a path stands for."""
    if path.is_file():
        return path
    if not path.is_dir():
        check_local(path)
        raise WeightsError(f"no weights file {path}")
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise WeightsError(f"the folder {path} can't be read: {error}") from error
    _check_folder(path, names)
    standard = [name for name in STANDARD if name in names]
    if standard:
        pattern = f"{standard[0].partition('.')[0]}_[0-9]*"
        numbered = fnmatch.filter(names, pattern)
        if not numbered:
            return path / standard[0]
        raise WeightsError(
            f"{path} holds the weights of several networks: name one of "
            f"{_listed([standard[0], *numbered])}"
        )
    weights = [
        name
        for name in names
        if name.endswith((*SUFFIXES, INDEX)) and not name.startswith(NO_WEIGHTS)
    ]
    indices = [name for name in weights if name.endswith(INDEX)]
    candidates = indices or weights
    if len(candidates) == 1:
        return path / candidates[0]
    if candidates:
        raise WeightsError(f"{path} holds several weight files: name one of {_listed(candidates)}")
    raise WeightsError(
        f"the folder {path} holds no weight file, but {_listed(names) or 'nothing'}: name the file "
        "itself"
    )


def _check_folder(folder: Path, names: list[str]) -> None:
    """Raise `WeightsError` if the folder is of a kind that is not read."""
    if {"plan.json", "manifest.json"} <= set(names):
        raise WeightsError(
            f"{folder} is the run folder of a pruned network, not weights of the original: load it "
            "with secateur.load, or evaluate it with `secateur evaluate`"
        )
    for pattern, meaning, command in FOREIGN:
        if any(folder.glob(pattern)):
            remedy = "convert it with " + command if command else "save the tensors with torch.save"
            text = remedy.format(folder=folder, name=folder.name)
            raise WeightsError(f"{folder} is {meaning}, which is not read: {text}")


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:MOST_NAMES]) + (", …" if len(every) > MOST_NAMES else "")


def _read_index(index: Path) -> dict[Path, list[str]]:
    """Return the names of the tensors in each shard that an index lists."""
    try:
        content = json.loads(read_bounded(index, TEXT, WeightsError))
        names = content["weight_map"]
        pairs = [
            (str(name), inside(index.parent, str(file), WeightsError))
            for name, file in names.items()
        ]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of weight files: {error!r}") from error
    shards: dict[Path, list[str]] = {}
    for name, shard in pairs:
        shards.setdefault(shard, []).append(name)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise WeightsError(
            f"{index} lists {_listed(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "missing: copy all files of the folder"
        )
    return dict(sorted(shards.items()))
