"""The errors that secateur raises, by what went wrong.

::

    SecateurError            one clear line; the command line exits with 1
    ├── UsageError           the request itself is wrong; the command line exits with 2
    │   ├── UnknownName      a model, criterion or other name that does not exist
    │   └── TargetError      a target that no plan can meet or that makes no sense
    ├── DataError            a data set that is missing, empty or unreadable
    │   └── UnreadableImage  image files that are damaged or missing; may be skipped
    ├── WeightsError         a weight file that is missing, unsafe or does not fit
    ├── AccuracyError        an original network that does not fit its test images
    ├── TraceError           a network whose dependency graph can't be read
    ├── CutError             a pruned network whose outputs are wrong
    ├── NotFiniteError       weights or activations that are NaN or Inf
    │   └── NotFiniteLoss    the loss of a training
    ├── ExportError          a network that can't be written as ONNX, or whose outputs differ there
    ├── RunFolderError       an output folder that exists already, or a damaged run folder
    ├── HubError             a repository on the Hugging Face Hub that can't be read or written
    └── WriteError           a file or folder that can't be written
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence


class SecateurError(Exception):
    """Root of every error that secateur raises on purpose."""


class UsageError(SecateurError):
    """The request can't be carried out as written."""


MOST_NAMES = 20
"""Names that a message lists."""


class UnknownName(UsageError):
    """A name that is not in its table; the message names the near matches."""

    def __init__(
        self, kind: str, name: str, known: Iterable[str], near: Sequence[str] = ()
    ) -> None:
        names = sorted(known)
        if not near:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            near.sort(key=lambda match: -_same_start(match, name))
        more = ", …" if len(names) > MOST_NAMES else ""
        known_names = f"known: {', '.join(names[:MOST_NAMES])}{more}"
        hint = f"did you mean {' or '.join(near)}?" if near else known_names
        super().__init__(f"unknown {kind} {name!r}: {hint}")


def _same_start(one: str, other: str) -> int:
    """Return the length of the longest common prefix of two names."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


class TargetError(UsageError):
    """The target is out of range or out of reach."""


class DataError(SecateurError):
    """The data set is missing, empty, inconsistent or unreadable."""


class UnreadableImage(DataError):
    """Requested images are damaged or missing; see `data.unreadable`."""

    def __init__(self, files: dict[int, str], reason: object) -> None:
        self.files = files
        """The name of each file, by the number of its image; `reason` is that of the first."""
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        super().__init__(f"the image {next(iter(files.values()))} can't be read: {reason}{more}")


class WeightsError(SecateurError):
    """The weight file is missing, can't be read safely, or does not fit the network."""


class AccuracyError(SecateurError):
    """The original network is no better than chance, or its classes are in another order."""


class TraceError(SecateurError):
    """The network can't be exported to a graph."""


class CutError(SecateurError):
    """The outputs of the pruned network differ from those of the masked original."""


class NotFiniteError(SecateurError):
    """Weights, or what a network computes from images, hold NaN or Inf."""


class NotFiniteLoss(NotFiniteError):
    """The loss of a training became NaN or Inf."""


class ExportError(SecateurError):
    """The network can't be written as ONNX, or the file's outputs differ from the network's."""


class RunFolderError(SecateurError):
    """The run folder exists already, is incomplete, or has been changed."""


class HubError(SecateurError):
    """A repository on the Hugging Face Hub can't be reached, read or written."""


class WriteError(SecateurError):
    """A file or a folder can't be written: the disk is full, say, or it is not allowed."""
