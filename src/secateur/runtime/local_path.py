"""Paths that the user names: on this machine, and no addresses."""

from __future__ import annotations

import re
from pathlib import Path

from secateur.runtime.errors import UsageError

ADDRESS = re.compile(r"(\w{2,}):/{1,2}(\w.*)")
"""An address, as text or as `pathlib` writes it, with one slash. A drive has one letter."""
HUB = "hf"


def check_local(path: str | Path, *, is_output: bool = False) -> None:
    """Raise `UsageError`, which says what to do, if a path is an address such as `hf://OWNER/NAME`.

    With `is_output` it is a place to write to.
    """
    parts = ADDRESS.fullmatch(str(path))
    if parts is None or Path(path).exists():
        return
    scheme, rest = parts.groups()
    if is_output:
        advice = "name one to write to" + "; secateur push writes to the Hub" * (scheme == HUB)
    elif scheme == HUB:
        repo = "/".join(rest.split("/")[:2]).partition("@")[0]
        advice = f"hf download {repo} --local-dir FOLDER fetches it"
    else:
        advice = "download it, and name the file"
    raise UsageError(f"{scheme}://{rest} is an address, not a path on this machine: {advice}")
