"""Read what `torch.save` wrote: tensors and plain data, without running code.

Beside their tensors, checkpoints hold settings: `argparse.Namespace`, paths, NumPy scalars,
configuration objects of other libraries. `torch.load(…, weights_only=True)` reads them if their
classes are listed as safe. Settings are not needed here, so `PLAIN` lists each name with a
placeholder that stores nothing and does nothing: no code of these classes runs. Every other class
is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from secateur.runtime.errors import WeightsError


class Placeholder:
    """Takes the place of an object of a class that is not loaded."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty_dict(*args: object) -> OrderedDict[object, object]:
    return OrderedDict()


def _empty_list(*args: object) -> list[object]:
    return []


Global = Callable[..., Any]
LIGHTNING = ("lightning.fabric", "lightning_fabric", "pytorch_lightning")
OBJECTS = {
    "argparse": "Namespace",
    "builtins": "bool bytes dict float frozenset int list object range slice str tuple",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fastcore.foundation": "L",
    "fractions": "Fraction",
    "ml_collections.config_dict.config_dict": "ConfigDict FieldReference FrozenConfigDict",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "omegaconf.base": "ContainerMetadata Metadata SCMode",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode "
    "StringNode",
    **dict.fromkeys(
        ("pathlib", "pathlib._local"),
        "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    ),
    "random": "Random",
    "torch.torch_version": "TorchVersion",
    "types": "SimpleNamespace",
    "typing": "Any Dict List Optional Tuple Union",
    "uuid": "SafeUUID UUID",
}
"""Classes of plain data by module, which placeholders replace."""
DICTS = {
    "addict.addict": "Dict",
    "box.box": "Box",
    "detectron2.config.config": "CfgNode",
    "easydict": "EasyDict",
    "fvcore.common.config": "CfgNode",
    "mmcv.utils.config": "ConfigDict",
    "mmengine.config.config": "ConfigDict",
    "munch": "Munch",
    "yacs.config": "CfgNode",
    **{f"{library}.utilities.data": "AttributeDict" for library in LIGHTNING},
    **{f"{library}.utilities.parsing": "AttributeDict" for library in LIGHTNING},
}
"""Subclasses of `dict`, read as ordered dicts."""
PLAIN: dict[str, Global] = {
    **{
        f"{module}.{name}": Placeholder
        for module, names in OBJECTS.items()
        for name in names.split()
    },
    **{f"{module}.{name}": OrderedDict for module, name in DICTS.items()},
    "collections.defaultdict": _empty_dict,
    "collections.deque": _empty_list,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    **{f"numpy.dtypes.{kind}": getattr(np.dtypes, kind) for kind in np.dtypes.__all__},
    **{
        f"numpy.{core}.multiarray.{name}": getattr(multiarray, name)
        for core in ("_core", "core")
        for name in ("_reconstruct", "scalar")
    },
}
"""What is read beside tensors, by its name in files."""
MOST_CLASSES = 100
"""Classes of a refused file that are looked at to say how to convert it."""
UNKNOWN = re.compile(r"GLOBAL (\S+) was not an allowed global")
LOAD = 'torch.load(FILE, map_location="cpu", weights_only=False)'
"""The Python expression that reads a file, and runs the code in it."""
WHOLE = f'(lambda content: getattr(content, "state_dict", lambda: content)())({LOAD})'
"""The same for files of torch before 1.6, which mark networks but can't be looked into."""
BLOCKED = re.compile(r"GLOBAL (\S+) whose module \S+ is blocked")


def read(path: Path) -> Any:
    """Return the content of a file that `torch.save` wrote.

    Raises `WeightsError` if it holds an object of another class, which is named together with a
    command that converts the file, or if it is damaged.
    """
    try:
        return _load(path, PLAIN)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path} can't be read: {reason}") from error


def conversion(path: Path, expression: str) -> str:
    """Return a shell command that writes a state dict; `expression` makes it from `FILE`."""
    tensors = expression.replace("FILE", json.dumps(str(path), ensure_ascii=False))
    code = f'import torch; torch.save({tensors}, "weights.pth")'
    return f"python -c {shlex.quote(code)}"


def _load(path: Path, allowed: Mapping[str, Global]) -> Any:
    pairs: list[Any] = [(function, name) for name, function in allowed.items()]
    with (
        torch.serialization.safe_globals(pairs),
        warnings.catch_warnings(action="ignore"),  # torch warns about damaged files
        path.open("rb") as file,  # by its name, torch would take some files for safetensors
    ):
        return torch.load(file, map_location="cpu", weights_only=True)


def _refusal(path: Path, reason: str) -> WeightsError:
    blocked = BLOCKED.search(reason)
    if blocked:
        return WeightsError(
            f"{path} calls {blocked[1]}, which could run code, and is not read: don't use the file"
        )
    if "DTensor" in reason:
        return WeightsError(
            f"{path} holds sharded tensors (DTensor): gather them before saving, with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and "
            "StateDictOptions(full_state_dict=True)"
        )
    if "Unsupported operand" in reason:
        return WeightsError(
            f"{path} was saved with pickle protocol 3 or later, which is not read: convert it, if "
            f"you trust the file, with {conversion(path, LOAD)}"
        )
    unknown = UNKNOWN.search(reason)
    if unknown is None:
        inner = reason.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()
        return WeightsError(f"{path} can't be read: {inner[0] if inner else 'it is damaged'}")
    expression = _expression(path)
    remedy = "name another file, with the network's state_dict()"
    if expression:
        remedy = f"if you trust the file, convert it with {conversion(path, expression)}"
    name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
    return WeightsError(
        f"{path} holds {name}, not only tensors and plain data, and is not read, since that could "
        f"run code: {remedy}"
    )


def _expression(path: Path) -> str:
    """Return the Python expression for the state dict in a file with unknown classes.

    It is empty if there seems to be none. Reads the file once more for each unknown class, which
    another placeholder replaces.
    """
    allowed = dict(PLAIN)
    for _ in range(MOST_CLASSES):
        try:
            content = _load(path, allowed)
        except Exception as error:  # as in `read`
            unknown = UNKNOWN.search(str(error))
            if unknown is None:
                return WHOLE if "persistent_load" in str(error) else ""
            name = unknown[1]
            for full_name in (name, f"builtins.{name}"):  # torch leaves `builtins.` out
                allowed[full_name] = type("Unknown", (_Unknown,), {})
            continue
        inner = _state_dict_of(content)
        return LOAD + inner if inner else ""
    return ""


class _Unknown(Placeholder):
    """Takes the place of an object of a class that is refused, and keeps its attributes."""

    attributes: Mapping[str, object] = {}

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.attributes = state

    @property
    def is_module(self) -> bool:
        """Whether it is a network."""
        return "_modules" in self.attributes


def _state_dict_of(content: Any) -> str:
    """Return how to get from a file's content to its largest state dict, or to a network's."""
    if isinstance(content, _Unknown):
        network = "" if content.is_module else next(_networks(content.attributes), None)
        return "" if network is None else f"{'.' * bool(network)}{network}.state_dict()"
    if not isinstance(content, Mapping):
        return ""
    sizes = {
        key: sum(isinstance(tensor, Tensor) for tensor in inner.values())
        for key, inner in content.items()
        if isinstance(inner, Mapping)
    }
    largest = max(sizes, key=lambda key: sizes[key], default=None)
    if largest is not None and sizes[largest]:
        return f"[{_literal(largest)}]"
    network = next(_networks(content), None)
    return "" if network is None else f"[{_literal(network)}].state_dict()"


def _networks(content: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the keys of networks."""
    for key, value in content.items():
        if isinstance(value, _Unknown) and value.is_module:
            yield key


def _literal(key: object) -> str:
    return json.dumps(key, ensure_ascii=False) if isinstance(key, str | int) else repr(key)
