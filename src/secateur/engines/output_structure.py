"""What a network returns: its tensors, and the tuples, lists and dicts that hold them.

A structure is JSON: `{"tensor": N}` for the N-th tensor, `{"constant": value}`, `{"tuple": […]}`,
`{"list": […]}`, `{"dict": [[key, structure], …]}`, and `{"fields": […]}` or `{"record": […]}` with
such pairs for what also has its entries as attributes: named tuples, and transformers'
`ModelOutput` and data classes.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.runtime.errors import RunFolderError, TraceError

Structure = dict[str, Any]


class NamedTuple(tuple[Any, ...]):
    """A tuple whose entries are attributes, too."""

    _fields: tuple[str, ...]

    def __new__(cls, pairs: Sequence[tuple[str, Any]]) -> NamedTuple:
        """Return the tuple of the values."""
        made = super().__new__(cls, (value for _, value in pairs))
        made._fields = tuple(name for name, _ in pairs)
        return made

    def __getattr__(self, name: str) -> Any:
        """Return an entry by its name."""
        names = vars(self).get("_fields", ())
        if name not in names:
            raise AttributeError(name)
        return self[names.index(name)]


class NamedOutputs(OrderedDict[str, Any]):
    """A dict whose entries are attributes, too, and can be read by number."""

    def __getitem__(self, key: Any) -> Any:
        """Return an entry by its name or its number."""
        if isinstance(key, int | slice):
            return tuple(self.values())[key]
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        """Return an entry by its name."""
        if name not in self:
            raise AttributeError(name)
        return self[name]


def take_apart(output: object) -> tuple[tuple[Tensor, ...], Structure]:
    """Return the tensors in what a network returned, and their structure.

    Raises `TraceError` if there are none, or if an object of another kind holds them.
    """
    tensors: list[Tensor] = []

    def visit(value: Any) -> Structure:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if value is None or isinstance(value, bool | int | float | str | torch.SymInt):
            return {"constant": value}
        if isinstance(value, Mapping):
            is_plain = type(value) in (dict, OrderedDict)
            keys = list(value)
            if all(isinstance(key, str | int) for key in keys):
                pairs = [[key, visit(value[key])] for key in keys]
                return {"dict" if is_plain else "record": pairs}
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            pairs = [[name, visit(getattr(value, name))] for name in value._fields]
            return {"fields": pairs}
        elif isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [visit(entry) for entry in value]}
        elif dataclasses.is_dataclass(value):
            fields = [field.name for field in dataclasses.fields(value)]
            return {"record": [[name, visit(getattr(value, name))] for name in fields]}
        raise TraceError(
            f"the network returns a {type(value).__name__}: return tensors, or tuples, lists or "
            "dicts of them"
        )

    structure = visit(output)
    if not tensors:
        raise TraceError("the network must return tensors")
    return tuple(tensors), structure


_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "list": list}
_PAIRS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "fields": NamedTuple,
    "record": NamedOutputs,
}


def put_together(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the tensors in their structure; raise `RunFolderError` if it is none."""
    match list(structure.items()) if isinstance(structure, dict) else None:
        case [("tensor", int(number))] if 0 <= number < len(tensors):
            return tensors[number]
        case [("constant", value)]:
            return value
        case [(str(kind), list(entries))] if kind in _SEQUENCES:
            return _SEQUENCES[kind]([put_together(entry, tensors) for entry in entries])
        case [(str(kind), list(entries))] if kind in _PAIRS and all(map(_is_pair, entries)):
            return _PAIRS[kind]([(key, put_together(entry, tensors)) for key, entry in entries])
    raise RunFolderError(f"the program's outputs have a structure that is not one: {structure}")


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str | int)


def names_of(structure: Structure) -> tuple[str, ...]:
    """Return a name for each tensor of a structure, such as `boxes` or `features_0`.

    The only tensor of a structure without names is called `output`.
    """
    names: list[str] = []

    def visit(part: Structure, path: tuple[str, ...]) -> None:
        ((kind, content),) = part.items()
        if kind == "tensor":
            names.append("_".join(path))
        elif kind in _SEQUENCES:
            for number, entry in enumerate(content):
                visit(entry, (*path, str(number)))
        elif kind in _PAIRS:
            for key, entry in content:
                visit(entry, (*path, str(key)))

    visit(structure, ())
    return tuple(
        f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name for name in names
    )
