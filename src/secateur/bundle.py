"""A run folder: written as a whole or not at all, and read without running anything in it.

`config.toml` names the architecture, `plan.json` what was cut from it, `model.safetensors` holds
the weights that are left. Loading builds the architecture, replays the plan and loads the weights
strictly; nothing is unpickled or evaluated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import models
from secateur.config import RunConfig, read_config, to_toml
from secateur.errors import RunFolderError
from secateur.plan import PruningPlan
from secateur.surgery import apply_plan
from secateur.reading import make_wiring

CONFIG, PLAN, WEIGHTS = "config.toml", "plan.json", "model.safetensors"
RESULT, REPORT, LOG = "result.json", "report.html", "log.jsonl"
FORMAT = "secateur run 1"


@contextlib.contextmanager
def new_run_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    After an error nothing of it is left, and an older run is still there. Raises `RunFolderError`
    where `folder` is in the way: a file, or not empty without `overwrite`, or holding something
    that is not a run.
    """
    check_free(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise RunFolderError(f"can't write beside {folder}: {error}") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if folder.exists():
            older = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, older)
            os.replace(temporary, folder)
            shutil.rmtree(older)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raises `RunFolderError` where a run can't be written to `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a folder for a run")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise RunFolderError(f"{folder} is not empty: choose another folder or add --overwrite")
    if not (folder / PLAN).is_file():
        raise RunFolderError(f"{folder} holds something other than a run: it is not overwritten")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(folder: Path, model: nn.Module, plan: PruningPlan, config: RunConfig) -> None:
    """Writes what `load` needs into an existing folder."""
    (folder / CONFIG).write_text(to_toml(config), encoding="utf-8")
    (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, {"format": FORMAT, "plan": plan.hash})


def load(folder: str | Path, *, architecture: nn.Module | None = None) -> nn.Module:
    """The pruned network of a run folder, in evaluation mode.

    `architecture` is the unpruned network, with any weights: needed where the run was made from
    code of your own (`file.py:factory`), which a folder is not trusted to run. Raises
    `RunFolderError` where a file is missing, damaged, changed or does not fit the others.
    """
    folder = Path(folder)
    for name in (CONFIG, PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise RunFolderError(f"no {name} in {folder}: it is not a complete run folder")
    config = read_config(folder / CONFIG)
    plan = PruningPlan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    size, classes = config.data.image_size, config.model.num_classes
    if size is None or classes is None:
        raise RunFolderError(f"{folder / CONFIG} does not say image_size and num_classes")
    try:
        with safe_open(folder / WEIGHTS, "pt") as stored:
            metadata = stored.metadata() or {}
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"{folder / WEIGHTS} can't be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise RunFolderError(f"{folder / WEIGHTS} is not of the format {FORMAT!r}")
    if metadata.get("plan") != plan.hash:
        raise RunFolderError(f"{folder}: the weights belong to another plan than {PLAN}")
    model = architecture
    if model is None:
        model = models.load(config.model.name, num_classes=classes, allow_code=False)
    wiring = make_wiring(model, torch.zeros(2, 3, size, size), cut_stream=config.plan.cut_stream)
    smaller = apply_plan(model, wiring, plan)
    try:
        smaller.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        cause = str(error).splitlines()
        raise RunFolderError(
            f"the weights in {folder} don't fit the plan: {cause[-1].strip()}"
        ) from error
    return smaller.eval()


class EventLog:
    """One JSON object a line, written as things happen."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, event: str, **facts: object) -> None:
        """Adds a line; does nothing where there is no file."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")
