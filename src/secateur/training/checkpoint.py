"""Where training stands, in files that are whole or not there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import RunFolderError, WriteError
from secateur.runtime import safetensors_io
from secateur.runtime.atomic_io import UNFINISHED, make_inner_folder, replace_file

KEPT = 2
"""Checkpoints that a folder holds: the newest, and one more in case that one is damaged."""
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors by name, and all else as JSON holds it."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix.`, without it."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


class Checkpoints:
    """The checkpoints of one training in a folder of their own; see `KEPT`.

    A file is written under another name, flushed to the disk and renamed, so a process that is
    killed at any moment leaves the older ones as they were.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, checkpoint: Checkpoint) -> None:
        """Adds the checkpoint of a step, and removes what is older than the one before.

        Raises `WriteError`.
        """
        content = safetensors_io.to_bytes(
            checkpoint.tensors, {"facts": json.dumps(checkpoint.facts)}
        )
        path = self.folder / f"{step:09}{SUFFIX}"
        make_inner_folder(self.folder)
        replace_file(path, content)
        try:
            for older in self._paths()[:-KEPT]:
                older.unlink()
            for left in self.folder.glob(f"*{UNFINISHED}"):
                left.unlink()
        except OSError as error:
            raise WriteError(f"{self.folder} can't be tidied: {error}") from error

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read; None where there is none at all.

        Raises `RunFolderError` where there are some and none can be read.
        """
        first: RunFolderError | None = None
        for path in reversed(self._paths()):
            try:
                return _read(path)
            except RunFolderError as error:
                first = first or error
        if first is not None:
            raise first
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{SUFFIX}"))


def _read(path: Path) -> Checkpoint:
    try:
        tensors, metadata = safetensors_io.read(path)
        return Checkpoint(tensors, json.loads(metadata["facts"]))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise RunFolderError(f"the checkpoint {path} can't be read: {error}") from error
