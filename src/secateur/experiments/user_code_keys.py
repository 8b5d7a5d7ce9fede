"""Which of a run's code may be run: what the user names, and nothing that a folder alone names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from secateur.config import USER_CODE_KEYS, RunConfig
from secateur.models import user_code
from secateur.runtime.errors import UsageError

_SUBJECTS = {"model.name": "of a network", "data.source": "on data"}


def check_named(folder: Path, config: RunConfig, named: Collection[str]) -> None:
    """Raise `UsageError` if a run's configuration names code, under a key that is not in `named`.

    A run folder may be a stranger's: it must not choose code to run.
    """
    for key, option in USER_CODE_KEYS.items():
        section, _, last = key.partition(".")
        name = getattr(getattr(config, section), last)
        if name is not None and key not in named and user_code.is_user_code(name):
            raise UsageError(
                f"the run in {folder} is {_SUBJECTS.get(key, 'made with a function')} from a file "
                f"of code, {name}: if that is yours, name it with {option} {name}"
            )


def check_original_named(folder: Path, architecture: str | None, name: str | None) -> None:
    """Raise `UsageError` if the user names another network for a run than the one that it pruned.

    `architecture` is what the run says, and `name` what the user says, if anything. Only what is
    user code, or was passed from Python, may have another name now.
    """
    if name in (None, architecture) or architecture is None:
        return
    if not user_code.is_user_code(architecture):
        raise UsageError(f"the run in {folder} is of {architecture}: leave --model out")
    if not user_code.is_user_code(name):
        raise UsageError(
            f"the run in {folder} is of a network from a file of code, {architecture}, and {name} "
            "is another one: name the file of code with --model"
        )


def check_loss_named(folder: Path, config: RunConfig) -> None:
    """Raise `UsageError` if it is code that a run's configuration names as the loss to train with.

    Only training runs that code.
    """
    name = config.finetune.loss
    if user_code.is_user_code(name):
        raise UsageError(
            f"the run in {folder} is trained with a function from a file of code, {name}: if that "
            f"is yours, name it with --set finetune.loss={name}"
        )
