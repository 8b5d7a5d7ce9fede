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
from torch import nn
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

_MODULE = "_secateur_module"
"""Attribute of an error: the dotted name of the module that raised it."""


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
    """Return the user's line that raised an error, and the module; empty if there is none.

    As ` (`x + y` at net.py:12, in module 'layer1.0')`; see `note_module`.
    """
    module = getattr(error, _MODULE, "")
    inside = f", in module {module!r}" if module else ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = _shown(frame.filename)
        if file is not None and frame.line:
            place = f"{file or 'line '}{':' if file else ''}{frame.lineno}"
            return f" (`{frame.line}` at {place}{inside})"
    return ""


def note_module(error: BaseException, model: nn.Module) -> None:
    """Record with an error in which module of a network it was raised, for `raised_at`.

    That is the innermost one that was called, apart from those of torch's own classes.
    """
    names = {
        id(module): name
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
    }
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            setattr(error, _MODULE, name)


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
