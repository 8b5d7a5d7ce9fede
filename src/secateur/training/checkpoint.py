"""Save and restore the state of a training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from secateur.models.state_dict import load_state
from secateur.runtime import safetensors_io
from secateur.runtime.atomic_io import UNFINISHED, make_inner_folder, replace_file
from secateur.runtime.errors import RunFolderError, WriteError

KEPT = 2
"""Checkpoints in a folder: the newest, and the one before in case the newest is damaged."""
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors by name, and everything else as JSON."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with `prefix.`, by the rest of their names."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


@dataclass(frozen=True, eq=False)
class TrainedTensors:
    """What training changes: the network, its running average, the optimiser, the loss scaler."""

    model: nn.Module
    ema: AveragedModel | None
    optimiser: Optimizer
    scaler: Any
    """Of float16 training, else None."""

    def to_checkpoint(self, best: dict[str, Tensor], facts: dict[str, Any]) -> Checkpoint:
        """Return a checkpoint of this state, of the best network's so far, and of `facts`."""
        parts = {"model": self.model.state_dict(), "best": best}
        if self.ema is not None:
            parts["ema"] = self.ema.state_dict()
        parts["optimiser"] = {
            f"{number}.{key}": value
            for number, values in self.optimiser.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        tensors = {
            f"{part}.{name}": tensor
            for part, named_tensors in parts.items()
            for name, tensor in named_tensors.items()
        }
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return Checkpoint(tensors, {**facts, "scaler": scaler})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state that `to_checkpoint` has saved, in place."""
        load_state(self.model, checkpoint.part("model"))
        if self.ema is not None:
            load_state(self.ema, checkpoint.part("ema"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.part("optimiser").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        if self.scaler is not None:
            self.scaler.load_state_dict(checkpoint.facts["scaler"])


class Checkpoints:
    """The checkpoints of one training, in a folder of their own.

    Files are written atomically, so a process that is killed leaves the older ones intact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Write a step's checkpoint, and remove all but the last `KEPT`; raises `WriteError`."""
        content = safetensors_io.to_bytes(
            checkpoint.tensors, {"facts": json.dumps(checkpoint.facts)}
        )
        path = self.folder / f"{step:09}{SUFFIX}"
        make_inner_folder(self.folder)
        replace_file(path, content)
        try:
            for older in self._paths()[:-KEPT]:
                older.unlink()
            for unfinished in self.folder.glob(f"*{UNFINISHED}"):
                unfinished.unlink()
        except OSError as error:
            raise WriteError(
                f"{self.folder} can't be cleared of older checkpoints: {error}"
            ) from error

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that can be read, or None if there is no checkpoint.

        Raises `RunFolderError` if there are checkpoints and none can be read.
        """
        first_error: RunFolderError | None = None
        for path in reversed(self._paths()):
            try:
                return _read(path)
            except RunFolderError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{SUFFIX}"))


def _read(path: Path) -> Checkpoint:
    try:
        tensors, metadata = safetensors_io.read(path)
        return Checkpoint(tensors, json.loads(metadata["facts"]))
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise RunFolderError(f"the checkpoint {path} can't be read: {error}") from error
