"""Where in the user's code an operation was called: file, line, and the function's name."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jaxtyping
import torch
from torch.fx.node import Node
from torch.overrides import TorchFunctionMode

from secateur.graph.network_graph import operation_name
from secateur.runtime.torch_internals import set_stack_trace

_OWN = f"{Path(__file__).parent}{os.sep}"
_LIBRARIES = tuple(
    f"{path}{os.sep}"
    for path in (
        Path(torch.__file__).parent,
        Path(__file__).parent,
        Path(jaxtyping.__file__).parent,  # wraps functions of this package
        Path(torch.__file__).parents[1] / "torchvision" / "ops",
        Path(jaxtyping.__file__).parent,
    )
)
"""Their lines are not the user's; the functions of torchvision.ops are operations themselves, and
jaxtyping wraps functions of this package."""


_READ_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class RecordCallSites(TorchFunctionMode):
    """Inside the block, records with every traced operation where it was called.

    That is the innermost line that is not of torch or of this package; `call_site` reads it. A
    tensor's `.data`, which the tracer can't follow, is `detach()`, which it can.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch; what it calls itself is not seen here."""
        set_stack_trace(f"{_place(sys._getframe(1))}\n{_name_of(func)}")
        try:
            if func == _READ_DATA:
                return args[0].detach()
            return func(*args, **(kwargs or {}))
        finally:
            set_stack_trace("")


def call_site(node: Node) -> str:
    """Return the function and the line where an operation was called: `add() at net.py:12`.

    If no line of the user's calls it, as in an `nn.Sequential`, the module stands there instead.
    """
    place, _, function = (node.stack_trace or "").partition("\n")
    modules = [name for name in node.meta.get("nn_module_stack", {}).values() if name]
    if not place:
        place = f"in module {modules[-1]!r}" if modules else ""
    return f"{function or operation_name(node)}() {place}".rstrip()


def raised_at(error: BaseException) -> str:
    """Return the user's line that raised an error, as ` (`x + y` at net.py:12)`; empty if none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = _shown(frame.filename)
        if file is not None and frame.line:
            return f" (`{frame.line}` at {file or 'line '}{':' if file else ''}{frame.lineno})"
    return ""


def _name_of(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute, such as `x.mT`
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_").partition(".")[0]


def _place(frame: FrameType | None) -> str:
    """Return the innermost line of a stack that is the network's: `at net.py:12`."""
    while frame is not None and not frame.f_code.co_filename.startswith(_OWN):
        file = _shown(frame.f_code.co_filename)
        if file is not None:
            return f"at {file}:{frame.f_lineno}" if file else f"at line {frame.f_lineno}"
        frame = frame.f_back
    return ""


@functools.cache
def _shown(file: str) -> str | None:
    """Return how a file is named in a message, empty for code without one, None if a library's."""
    if file.startswith(_LIBRARIES):
        return None
    if file.startswith("<") or "ipykernel" in file:  # `python -c`, a notebook's cell
        return ""
    parts = Path(file).parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:])
