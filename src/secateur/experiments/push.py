"""Pushes a run folder to the Hugging Face Hub, with a model card."""

from __future__ import annotations

from pathlib import Path

from secateur.experiments.engine_times import read_engine_times
from secateur.experiments.manifest import HASHED, MANIFEST, read_contents
from secateur.experiments.model_card import README, model_card
from secateur.integrations import hub
from secateur.pipeline.result import RESULT, read_result
from secateur.runtime.errors import RunFolderError
from secateur.runtime.input_limits import SMALL_TEXT, read_bounded

FILES = frozenset({*HASHED, MANIFEST, RESULT, README})
"""What a repository may hold of a run: JSON, TOML, safetensors and Markdown."""


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    card: bool = True,
) -> str:
    """Push the deployable files of a run folder in one commit; return the commit's address.

    These are the manifest, the plan, the weights, the program, the configuration and the result,
    as they are checked against their hashes, and a model card: no report, log or checkpoint.
    `repo` is `OWNER/NAME`, made if need be; `private` makes it private, and refuses one that exists
    and is public. `revision` is a branch, by default `main`. `base_model` names the repository of
    the original, for the card; `card=False` leaves the repository's own README as it is. The token
    is that of `hf auth login` or `HF_TOKEN`. Raises `RunFolderError`, `UsageError` and `HubError`.
    """
    folder, address = Path(folder), hub.parse_address(repo)
    if revision is not None:
        address = hub.HubAddress(address.repo, revision)
    contents = read_contents(folder)
    files = {
        **contents.files,
        MANIFEST: read_bounded(folder / MANIFEST, SMALL_TEXT, RunFolderError),
    }
    result = read_result(folder) if (folder / RESULT).is_file() else None
    if result is not None:
        files[RESULT] = (result.model_dump_json(indent=1) + "\n").encode()
    if card:
        times = read_engine_times(folder)
        text = model_card(address.repo, contents.manifest, result, times, base_model=base_model)
        files[README] = text.encode()
    return hub.upload(address, files, message or f"Push {folder.resolve().name}", private=private)
