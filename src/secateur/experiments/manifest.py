"""The manifest of a run folder: versions, origin, and the SHA-256 of each file that is loaded.

The hashes reveal damage and mix-ups. They are not a signature: anyone who can change a file can
change the manifest, too. Loading a stranger's folder is safe because of the file formats, JSON,
TOML and safetensors, none of which runs code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from pydantic import NonNegativeInt, PositiveInt

from secateur.data.kept_classes import KeptClasses
from secateur.integrations import hub
from secateur.runtime.atomic_io import replace_file
from secateur.runtime.errors import RunFolderError, UsageError
from secateur.runtime.input_limits import (
    PLAN_TEXT,
    SMALL_TEXT,
    TEXT,
    check_safetensors,
    read_bounded,
)
from secateur.runtime.packed_inputs import Passing
from secateur.runtime.schema import VersionedRecord, parse_record
from secateur.runtime.version import __version__

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
CONFIG, PLAN, WEIGHTS = "config.toml", "plan.json", "model.safetensors"
PROGRAM, CONSTANTS = "program.json", "program.safetensors"
NEEDED = frozenset({PLAN, WEIGHTS})
HASHED = frozenset({CONFIG, PLAN, WEIGHTS, PROGRAM, CONSTANTS})
TEXTS = {CONFIG: SMALL_TEXT, PLAN: PLAN_TEXT, PROGRAM: TEXT}
"""Largest size of each text file, in bytes; the others are safetensors."""


class SeveralInputs(VersionedRecord):
    """The inputs of a network that takes several; see `runtime.packed_inputs`."""

    shapes: tuple[tuple[PositiveInt, ...], ...]
    passing: Passing
    names: tuple[str, ...]


class Manifest(VersionedRecord):
    """The content of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    versions: dict[str, str]
    """Of secateur, torch and torchvision when the folder was written."""
    architecture: str | None
    """The unpruned network, as `load_model` takes it; None if it must be passed."""
    num_classes: PositiveInt | None
    """Outputs of a classifier's head, or classes of a named network; None for other networks."""
    kept_classes: KeptClasses | None = None
    """The classes that the head was cut to before the plan; None: all."""
    image_shape: tuple[PositiveInt, ...]
    """Shape of an image that the dependency graph was built with: `(rgb, height, width)`, say.
    Several inputs are one tensor there."""
    inputs: SeveralInputs | None = None
    """The inputs of a network that takes several."""
    outputs: dict[str, tuple[NonNegativeInt, ...]] | None = None
    """Name of each output -> its shape for one image, of a network that returns several."""
    transform_input: bool = False
    """Whether torchvision's GoogLeNet or Inception v3 maps its images to [-1, 1]."""
    prune_residual: bool
    exclude: tuple[str, ...] = ()
    """Both: how the dependency graph was built; see `build_dependency_graph`."""
    forward: str | None = None
    """Name of the function that the network runs through; None for its own forward pass."""
    reparameterized: bool = False
    """Whether the blocks of the unpruned network are to be folded; see `models.reparameterize`."""
    plan_hash: str
    no_program: str | None
    """Why the folder has no program; None if it has one."""
    files: dict[str, str]
    """File -> SHA-256 of its content, for every file that loading depends on."""


@dataclass(frozen=True)
class Contents:
    """The files of a run folder, all of them present and unchanged."""

    folder: Path
    manifest: Manifest
    files: dict[str, bytes]


def versions() -> dict[str, str]:
    """Return the installed versions, as a manifest states them."""
    return {
        "secateur": __version__,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in the folder that loading may depend on."""
    present = [name for name in sorted(HASHED) if (folder / name).is_file()]
    return {name: _hash((folder / name).read_bytes()) for name in present}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; all other files must be there."""
    # Earlier releases don't know these keys.
    late = ("forward", "inputs", "outputs", "kept_classes", "reparameterized")
    without = {key for key in late if not getattr(manifest, key)}
    text = manifest.model_dump_json(indent=1, exclude=without)
    replace_file(folder / MANIFEST, text + "\n")


def check_no_address(folder: Path) -> None:
    """Raise `UsageError` if a folder is an address on the Hub."""
    address = hub.address_in(folder)
    if address is not None:
        raise UsageError(
            f"{address} is a repository on the Hub, and this command needs a folder: hf download "
            f"{address.repo} --local-dir FOLDER fetches it"
        )


def check_run_folder(folder: Path) -> None:
    """Raise `RunFolderError`, which says what to name instead, if this is not a run folder.

    An address on the Hub is a `UsageError`; see `run_folder.fetched`.
    """
    if (folder / MANIFEST).is_file():
        return
    check_no_address(folder)
    if folder.is_file():
        inside = (folder.parent / MANIFEST).is_file()
        advice = f"name {folder.parent}" if inside else "name a folder that secateur prune wrote"
        raise RunFolderError(f"{folder} is a file, not a run folder: {advice}")
    if not folder.exists():
        raise RunFolderError(
            f"no run folder {folder}: name one that secateur prune wrote (its -o option)"
        )
    if (folder / PLAN).is_file():
        raise RunFolderError(f"no {MANIFEST} in {folder}: it is not a complete run folder")
    names = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if names:
        more = f" (or {', '.join(names[1:4])})" if names[1:] else ""
        advice = f"name {folder / names[0]}{more}"
    elif (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        advice = f"it holds a base network: secateur prune --weights {folder / WEIGHTS}"
    else:
        advice = f"it has no {MANIFEST}; secateur prune writes run folders"
    raise RunFolderError(f"{folder} is not a run folder: {advice}")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run folder; raise `RunFolderError` if it is missing or damaged."""
    check_run_folder(folder)
    path = folder / MANIFEST
    text = read_bounded(path, SMALL_TEXT, RunFolderError)
    return parse_record(Manifest, text, SCHEMA_VERSION, str(path))


def read_contents(folder: Path) -> Contents:
    """Read every file that the folder's manifest lists, and compare it with its hash.

    Raises `RunFolderError` that names a file which is missing, changed, or not part of a run.
    """
    manifest = read_manifest(folder)
    for name in sorted(manifest.files.keys() - HASHED):
        raise RunFolderError(f"{folder / MANIFEST} lists {name!r}, which is not a file of a run")
    for name in sorted(NEEDED - manifest.files.keys()):
        raise RunFolderError(f"{folder / MANIFEST} does not list {name}")
    files: dict[str, bytes] = {}
    for name, expected in manifest.files.items():
        files[name] = _read(folder, name)
        if _hash(files[name]) != expected:
            raise RunFolderError(
                f"{folder / name} is not the file that was written with this run: it has been "
                "damaged, changed or taken from another run"
            )
    return Contents(folder, manifest, files)


def _read(folder: Path, name: str) -> bytes:
    if not (folder / name).is_file():
        raise RunFolderError(f"no {name} in {folder}: it is not a complete run folder")
    path = folder / name
    if name in TEXTS:
        return read_bounded(path, TEXTS[name], RunFolderError)
    try:
        check_safetensors(path)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} can't be read: {error}") from error
