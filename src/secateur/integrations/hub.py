"""Repositories on the Hugging Face Hub: `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`.

Files go through the package `huggingface_hub` (the extra `hub`), which is imported where it is
used. It takes the token, the address of the Hub and the cache from where it always does: `hf auth
login` or `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.runtime.errors import HubError, SecateurError, UsageError
from secateur.runtime.version import __version__

SCHEME = "hf://"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
LOGIN = "log in with hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class HubAddress:
    """A repository of models, and a branch, tag or commit of it."""

    repo: str
    """`OWNER/NAME`."""
    revision: str | None = None
    """None: the branch `main`."""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def parse_address(text: str) -> HubAddress:
    """Return the address in `hf://OWNER/NAME@REVISION`, with `hf://` or without.

    Raises `UsageError` if it is none.
    """
    repo, at, revision = text.removeprefix(SCHEME).partition("@")
    if not _NAME.fullmatch(repo) or (at and not revision):
        raise UsageError(
            f"{text!r} is not a repository on the Hub: write OWNER/NAME, or "
            f"{SCHEME}OWNER/NAME@REVISION to load one"
        )
    return HubAddress(repo, revision or None)


def address_in(path: Path) -> HubAddress | None:
    """Return the address that was given where a path is expected; None if it is a path.

    Raises as `parse_address` does.
    """
    scheme, *rest = path.parts or ("",)
    return parse_address(SCHEME + "/".join(rest)) if scheme == SCHEME.rstrip("/") else None


def download(address: HubAddress, files: Collection[str]) -> Path:
    """Return a folder with those of the `files` that the repository has; no other is fetched.

    It lies in the cache of `huggingface_hub`: what is there is not fetched again. Raises `HubError`
    if the repository can't be read.
    """
    library = _library()
    with _one_line(address, "read"):
        folder = library.snapshot_download(
            address.repo,
            revision=address.revision,
            allow_patterns=sorted(files),
            library_name="secateur",
            library_version=__version__,
        )
    return Path(folder)


def upload(
    address: HubAddress, files: Mapping[str, bytes], message: str, *, private: bool = False
) -> str:
    """Write files into a repository in one commit, and return the commit's address.

    The repository and the branch are made if need be; other files in it stay. Raises `HubError` if
    it can't be written, or if it is to be private and exists as a public one.
    """
    library = _library()
    api = library.HfApi(library_name="secateur", library_version=__version__)
    with _one_line(address, "write"):
        api.create_repo(address.repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(address.repo).private:
            raise HubError(
                f"{address.repo} exists and is public: make it private in its settings, or leave "
                "--private out; nothing was pushed"
            )
        if address.revision is not None:
            api.create_branch(address.repo, branch=address.revision, exist_ok=True)
        commit = api.create_commit(
            address.repo,
            [library.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
            revision=address.revision,
        )
    return str(commit.commit_url)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError("the Hub needs the extra: pip install 'secateur[hub]'") from error
    return huggingface_hub


@contextlib.contextmanager
def _one_line(address: HubAddress, action: str) -> Iterator[None]:
    """Raise `HubError`, which says what to do, for what the package raises in the block."""
    from huggingface_hub import errors

    try:
        yield
    except SecateurError:
        raise
    except errors.HFValidationError as error:
        raise UsageError(f"{address.repo!r} is not a name on the Hub: {_first(error)}") from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"no token for the Hub: {LOGIN}") from error
    except Exception as error:  # also of the HTTP client, which differs between releases
        # A failed look-up of the cache, or upload of one file, hides the reply of the Hub.
        hides = isinstance(error, errors.LocalEntryNotFoundError | RuntimeError)
        cause = error.__cause__ if hides and isinstance(error.__cause__, Exception) else error
        if isinstance(cause, errors.HfHubHTTPError):
            raise HubError(_refusal(address, action, cause)) from error
        is_of_client = type(cause).__module__.partition(".")[0] in ("httpx", "httpx2")
        if is_of_client or isinstance(cause, OSError):
            raise HubError(
                f"the Hub can't be reached to {action} {address.repo}: check the network (and "
                f"HF_ENDPOINT, HF_HUB_OFFLINE), or use a local folder ({_first(cause)})"
            ) from error
        raise


def _refusal(address: HubAddress, action: str, error: Any) -> str:
    """Return what the Hub refused, and what to do."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"{address.repo} is gated: ask for access on its page, then {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address.repo} has no branch, tag or commit {address.revision!r}"
    if action == "write" and status in (401, 403):
        return (
            f"the Hub does not let you write to {address.repo}: {LOGIN}, with a token that may "
            "write and an owner that is you or your organisation"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"no repository {address.repo} that you may read: check its name; if private, {LOGIN}"
        )
    return f"the Hub refused to {action} {address.repo}: {_first(error)}"


def _first(error: BaseException) -> str:
    """Return an error's first line, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
