"""Load the weights of a checkpoint into a network.

`checkpoint_files` finds and reads the files, `checkpoint_matching` finds the network's tensors in
what they hold, and `published` gives those of published files the network's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.models.checkpoint_contents import Contents, read_contents
from secateur.models.checkpoint_files import read_checkpoint
from secateur.models.checkpoint_matching import COUNTERS, StateDict, pick
from secateur.models.published import Remap, adapt
from secateur.models.state_dict import load_state
from secateur.runtime.errors import WeightsError

COMMON_KEYS = frozenset(
    ("", "module", "model", "model_state", "model_state_dict", "net", "network", "state_dict")
)
"""Keys of which no more is said, if nothing else in the file fits."""
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
MOST_NAMES = 4


def load_weights(
    model: nn.Module,
    path: str | Path,
    num_classes: int | None = None,
    *,
    key: str | None = None,
    new_head: bool = False,
    remap: Remap | None = None,
) -> tuple[str, ...]:
    """Copy the weights of a file or folder into `model`; return what to know about it, if anything.

    Every tensor of the network must be there, and no other below the same prefix, after `adapt`.
    `key` names the dict or the prefix to look in, where a file holds several networks. With
    `new_head`, a head for another number of classes than `num_classes` is skipped: that of `model`
    stays as it is. Raises `WeightsError` that names the missing, unexpected and misshapen keys or,
    if only the head differs in its number of classes, both numbers. See `read_checkpoint` for the
    files.
    """
    if path == "":  # it would be the current folder
        raise WeightsError("the weights have an empty name: check --weights")
    path = Path(path)
    state = _find(model, path, key)
    weights = adapt(model, state.tensors, remap)
    expected = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    complaints = _complaints(weights, expected)
    if set(complaints) == {"misshapen"}:
        heads = _heads(weights, expected, num_classes)
        if heads:
            _check_head(path, weights[heads[0]].shape[0], num_classes, new_head=new_head)
            weights = {name: weights[name] for name in weights if name not in heads}
            complaints = {}
    if complaints:
        place = f"{path}, under {state.key!r}," if state.key else str(path)
        hint = ": it is one of several shards: name their folder" if SHARD.search(path.name) else ""
        texts = "; ".join(_counted(title, names) for title, names in complaints.items())
        raise WeightsError(f"the weights in {place} don't fit the network: {texts}{hint}")
    if state.rivals:
        keys = ", ".join((state.key, *state.rivals, *state.others))
        raise WeightsError(
            f"{path} holds several networks that fit: choose with weights_key (--weights-key) one "
            f"of {keys}"
        )
    try:
        load_state(model, {n: _dense(t) for n, t in weights.items()}, strict=False)
    except (RuntimeError, ValueError) as error:  # of the network's code
        reason = " ".join(str(error).split())
        raise WeightsError(f"the weights in {path} can't be loaded: {reason}") from error
    return tuple(_notes(path, state, weights, expected, key))


def _find(model: nn.Module, path: Path, key: str | None) -> StateDict:
    """Return the tensors of a checkpoint that are meant for a network."""
    content = read_checkpoint(path)
    try:
        contents = read_contents(content)
    except ValueError as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
    if not contents.entries:
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else ""
        raise WeightsError(f"{path} holds no state dict{f', but {names}' if names else ''}")
    if key is not None:
        contents = _below(contents, key, path)
    return pick(contents, model)


def _below(contents: Contents, key: str, path: Path) -> Contents:
    inner = contents.below(key)
    if not inner.entries:
        keys = [name for name in contents.keys() if name]  # noqa: SIM118
        known = (
            f"its keys are {_shortened(keys)}" if keys else "it holds one state dict, without key"
        )
        raise WeightsError(f"{path} holds no tensors under {key!r}: {known}")
    return inner


def _complaints(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Return the names of tensors that don't fit, by what is wrong with them."""
    loaded = {
        expected[name].data_ptr() for name in weights if name in expected and expected[name].numel()
    }
    missing = [
        name
        for name, tensor in expected.items()
        if name not in weights
        and name.rpartition(".")[2] not in COUNTERS
        and not (tensor.numel() and tensor.data_ptr() in loaded)  # tied to another
    ]
    known = [(name, tensor, expected[name]) for name, tensor in weights.items() if name in expected]
    complaints = {
        "missing": missing,
        "unexpected": [name for name in weights if name not in expected],
        "misshapen": [
            f"{name} is {list(tensor.shape)}, not {list(needed.shape)}"
            for name, tensor, needed in known
            if _is_misshapen(tensor, needed)
        ],
        "of another type": [
            f"{name} is {_type(tensor)}, not {_type(needed)}"
            for name, tensor, needed in known
            if _is_other_type(tensor, needed)
        ],
    }
    return {title: names for title, names in complaints.items() if names}


def _is_misshapen(tensor: Tensor, needed: Tensor) -> bool:
    """Return whether a tensor has another shape; torch once wrote single numbers as vectors."""
    return tensor.shape != needed.shape and not (needed.ndim == 0 and tensor.shape == (1,))


def _is_other_type(tensor: Tensor, needed: Tensor) -> bool:
    """Return whether a tensor's values mean something else: whole numbers as kernels, say."""
    if tensor.is_meta or tensor.is_complex() != needed.is_complex():
        return True
    is_kernel = needed.ndim > 1 and needed.is_floating_point()
    return is_kernel and not (tensor.is_floating_point() or tensor.is_quantized)


def _type(tensor: Tensor) -> str:
    return "without values (meta)" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")


def _heads(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_classes: int | None
) -> list[str]:
    """Return the misshapen tensors if all are of a head for another number of classes."""
    names = [name for name in weights if _is_misshapen(weights[name], expected[name])]
    counts = {weights[name].shape[:1] for name in names}
    are_heads = all(
        weights[name].ndim and list(expected[name].shape) == [num_classes, *weights[name].shape[1:]]
        for name in names
    )
    return names if are_heads and len(counts) == 1 else []


def _check_head(path: Path, classes: int, num_classes: int | None, *, new_head: bool) -> None:
    if not new_head:
        raise WeightsError(
            f"the weights in {path} are for {classes} classes, but the data or --num-classes asks "
            f"for {num_classes}"
        )


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _counted(title: str, names: Sequence[str]) -> str:
    return f"{len(names)} {title}: {_shortened(names)}"


def _shortened(names: Sequence[str]) -> str:
    return f"{', '.join(names[:MOST_NAMES])}{', …' if len(names) > MOST_NAMES else ''}"


def _notes(
    path: Path,
    state: StateDict,
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    key: str | None,
) -> Iterator[str]:
    """Yield a sentence on each decision that the file left open."""
    if state.others:
        others = _shortened([repr(other) for other in state.others])
        yield (
            f"{path} holds several networks: {state.key!r} was loaded. To load another, set "
            f"weights_key (--weights-key): {others}."
        )
    elif key is None and state.key.rpartition(".")[2] not in COMMON_KEYS:
        yield f"The weights were taken from {state.key!r} in {path}."
    if state.left_aside:
        yield f"Not loaded from {path}: {_shortened(_groups(state.left_aside))}."
    narrow = {
        str(tensor.dtype).removeprefix("torch.")
        for name, tensor in weights.items()
        if name in expected
        and tensor.is_floating_point()
        and tensor.dtype.itemsize < expected[name].dtype.itemsize
    }
    if narrow:
        yield (
            f"The weights in {path} are stored as {' and '.join(sorted(narrow))}: they were "
            "widened, and their rounding stays."
        )


def _groups(names: Sequence[str]) -> list[str]:
    """Return names, those of one module as one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [
        members[0] if len(members) == 1 else f"{first}.* ({len(members)} tensors)"
        for first, members in groups.items()
    ]
