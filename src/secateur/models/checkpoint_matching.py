"""Find a network's tensors in what a checkpoint holds.

All tensors get one dotted name, made from the keys of the dicts that they are in and from their
name in the state dict: `state_dict.model.conv1.weight`. Names of wrappers (`module`, `_orig_mod`)
are left out wherever they are. What stands before the network's names, here `state_dict.model.`,
is found by comparing with these names, so that keys and prefixes of any kind are understood.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.models.checkpoint_contents import DEPTH, Contents, Entry

WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""Names that wrappers of networks put into the names of tensors: data parallelism, compilation,
sharding and recomputed activations."""
COUNTERS = frozenset(("num_batches_tracked", "n_averaged", "total_ops", "total_params"))
"""Last names of tensors that count something: batches, averaged steps, a profiler's operations."""
AVERAGED = frozenset(("ema", "swa", "averaged", "average", "avg", "shadow"))
"""Words in the name of an averaged network, which is preferred."""
RAW = frozenset(("online", "current"))
"""Words in the name of the network that an average is of."""
FEW = 0.1
"""Fraction of a network's names that say nothing of where they are."""
LOSS = re.compile(r"criterion|loss")
"""In the first name of tensors that a loss function holds."""


@dataclass(frozen=True, eq=False)
class StateDict:
    """The tensors of a checkpoint that are meant for a network."""

    tensors: dict[str, Tensor]
    """By the network's names; those that the network lacks by what follows the prefix."""
    key: str
    """The key or prefix that they were under; empty if there is none."""
    others: tuple[str, ...] = ()
    """Keys of other tensors that would fit as well, but are not preferred."""
    rivals: tuple[str, ...] = ()
    """Keys of other tensors that would fit as well, with nothing to prefer either."""
    left_aside: tuple[str, ...] = ()
    """Names of tensors beside these, under another prefix."""


def pick(contents: Contents, model: nn.Module) -> StateDict:
    """Return the tensors that fit a network, or come nearest, without their prefix.

    Of several that fit, an average (EMA) is preferred.
    """
    names = NetworkNames.of(model)
    table = _table(contents.entries, names)
    fitting = _fitting(table, names) or _join_parts(table, names)
    for inner in names.without_prefix():
        if not fitting:
            fitting = _fitting(table, inner)
            names = inner if fitting else names
    fitting = fitting or _nearest(table, names)
    labels = {prefix: _label(table, names, prefix) for prefix in fitting}
    ranks = {prefix: _rank(labels[prefix], table, prefix) for prefix in fitting}
    best, *equals = [prefix for prefix in fitting if ranks[prefix] == max(ranks.values())]
    if not any(not names.are_equal(table, best, other) for other in equals):
        equals = []
    others = tuple(labels[prefix] for prefix in fitting if ranks[prefix] < ranks[best])
    rivals = tuple(labels[prefix] for prefix in equals)
    return _state_dict(table, names, best, others, rivals)


@dataclass(frozen=True, eq=False)
class NetworkNames:
    """The names of a network's tensors."""

    wrappers: Collection[str]
    """Names of wrappers that are left out of all names."""
    names: Mapping[str, str]
    """The network's names by the same name without wrappers."""
    tensors: Mapping[str, Tensor]
    """By the name without wrappers."""
    tied: tuple[tuple[str, ...], ...]
    """Names of one tensor, without wrappers; a file needs one of them."""
    prefix: str = ""
    """What all the network's names begin with, if it is left out of `names`."""

    def without_prefix(self) -> Iterator[NetworkNames]:
        """Yield the names without what all of them begin with, one part more each time.

        A network that only holds another one as `self.model` may get that one's weights.
        """
        prefix, names = self.prefix, self
        while len(starts := {name.partition(".")[:2] for name in names.names}) == 1:
            [(first, dot)] = starts
            if not dot:
                return
            prefix += f"{first}."
            names = NetworkNames(
                self.wrappers,
                {name.removeprefix(prefix): whole for name, whole in self.names.items()},
                {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()},
                tuple(tuple(n.removeprefix(prefix) for n in group) for group in self.tied),
                prefix,
            )
            yield names

    @staticmethod
    def of(model: nn.Module) -> NetworkNames:
        """Return the names of a network."""
        state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        wrappers: Collection[str] = WRAPPERS
        plain = [_without(name.split("."), wrappers) for name in state]
        if len(set(plain)) < len(plain):  # the network itself has both names
            wrappers, plain = (), list(state)
        tied: dict[object, list[str]] = {}
        for name, tensor in zip(plain, state.values(), strict=True):
            if name.rpartition(".")[2] in COUNTERS:
                continue
            is_memory = tensor.numel() > 0 and not tensor.is_meta
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride()) if is_memory else name
            tied.setdefault(memory, []).append(name)
        return NetworkNames(
            wrappers,
            dict(zip(plain, state, strict=True)),
            dict(zip(plain, state.values(), strict=True)),
            tuple(map(tuple, tied.values())),
        )

    def are_in(self, table: Mapping[str, Entry], prefix: str) -> bool:
        """Return whether the file has all tensors that the network needs below a prefix."""
        return all(any(prefix + name in table for name in names) for names in self.tied)

    def shapes_fit(self, table: Mapping[str, Entry], prefix: str) -> bool:
        """Return whether all tensors below a prefix have the network's shapes."""
        return all(
            table[prefix + name].tensor.shape == tensor.shape
            for name, tensor in self.tensors.items()
            if prefix + name in table and tensor.ndim
        )

    def are_equal(self, table: Mapping[str, Entry], one: str, other: str) -> bool:
        """Return whether two prefixes have the same values below them."""
        pairs = (
            (table.get(one + name), table.get(other + name))
            for names in self.tied
            for name in names
        )
        return all(
            a is not None
            and b is not None
            and a.tensor.dtype == b.tensor.dtype
            and torch.equal(a.tensor, b.tensor)
            for a, b in pairs
            if a is not b
        )


def _without(parts: Iterable[str], wrappers: Collection[str]) -> str:
    return ".".join(part for part in parts if part not in wrappers)


def _table(entries: Iterable[Entry], names: NetworkNames) -> dict[str, Entry]:
    """Return the tensors by their whole name without wrappers."""
    table: dict[str, Entry] = {}
    for entry in entries:
        name = _without(entry.parts, names.wrappers)
        table[".".join(entry.parts) if name in table else name] = entry
    return _with_masks_applied(table, names)


def _with_masks_applied(table: dict[str, Entry], names: NetworkNames) -> dict[str, Entry]:
    """Return the tensors with the masks of `torch.nn.utils.prune` applied, as the network would."""
    for name in [name for name in table if name.endswith("_mask")]:
        base = name.removesuffix("_mask")
        entry, mask = table.get(f"{base}_orig"), table[name].tensor
        if entry is None or base in table or any(rest in names.names for _, rest in _splits(name)):
            continue
        if entry.tensor.shape == mask.shape:
            product = Entry(entry.place, entry.name.removesuffix("_orig"), entry.tensor * mask)
            del table[name], table[f"{base}_orig"]
            table[base] = product
    return table


def _fitting(table: Mapping[str, Entry], names: NetworkNames) -> list[str]:
    """Return the prefixes below which all tensors of the network are, with its shapes if any."""
    fitting = [prefix for prefix in _prefixes(table, names) if names.are_in(table, prefix)]
    return [prefix for prefix in fitting if names.shapes_fit(table, prefix)] or fitting


def _join_parts(table: dict[str, Entry], names: NetworkNames) -> list[str]:
    """Give the tensors of two parts, such as `backbone.` and `head.`, the first one's prefix.

    Returns that prefix, or nothing if there are no two prefixes, or more, that fit together.
    """
    [first, *others] = _nearest(table, names)
    missing = [group for group in names.tied if not any(first + name in table for name in group)]
    seconds = [
        prefix
        for prefix in _prefixes(table, names)
        if all(any(prefix + name in table for name in group) for group in missing)
    ]
    if others or not missing or len(seconds) != 1:
        return []
    for name in (name for group in missing for name in group):
        if seconds[0] + name in table:
            table[first + name] = table.pop(seconds[0] + name)
    return [first]


def _prefixes(table: Mapping[str, Entry], names: NetworkNames) -> Counter[str]:
    """Return how many of the network's names stand behind each prefix in the file."""
    prefixes: Counter[str] = Counter()
    for name in table:
        for prefix, rest in _splits(name):
            if rest in names.names:
                prefixes[prefix] += 1
    return prefixes


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield a name in two, at its start and behind each dot."""
    yield "", name
    for match in list(re.finditer(r"\.", name))[: 2 * DEPTH]:
        yield name[: match.end()], name[match.end() :]


def _nearest(table: Mapping[str, Entry], names: NetworkNames) -> list[str]:
    """Return the prefixes with most of the network's names, or the dicts with most tensors."""
    counts = _prefixes(table, names)
    most = max(counts.values(), default=0)
    if most < max(2, FEW * len(names.names)):
        counts = Counter(_with_dot(_without(e.place, names.wrappers)) for e in table.values())
        most = max(counts.values())
    return [prefix for prefix, count in counts.items() if count == most]


def _with_dot(key: str) -> str:
    return f"{key}." if key else ""


def _label(table: Mapping[str, Entry], names: NetworkNames, prefix: str) -> str:
    """Return the key and the prefix that stand before the network's names in the file."""
    place = next((table[prefix + name].place for name in names.names if prefix + name in table), ())
    start = _with_dot(_without(place, names.wrappers))
    if not prefix.startswith(start):  # the names begin with keys of dicts
        return prefix.removesuffix(".")
    return ".".join((*place, *filter(None, prefix.removeprefix(start).split("."))))


def _rank(label: str, table: Mapping[str, Entry], prefix: str) -> int:
    """Return 1 for an average, -1 for the network that it is of, and 0 for others."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", label)}
    is_average = bool(words & AVERAGED) or f"{prefix}n_averaged" in table
    return is_average - bool(words & RAW)


def _state_dict(
    table: Mapping[str, Entry],
    names: NetworkNames,
    prefix: str,
    others: tuple[str, ...],
    rivals: tuple[str, ...],
) -> StateDict:
    """Return the tensors below a prefix, and the names of those beside it in the same dicts."""
    below = {name: entry for name, entry in table.items() if name.startswith(prefix)}
    ours = {n: entry for n, entry in below.items() if n.removeprefix(prefix) in names.names}
    places = {entry.place for entry in (ours or below).values()}
    tensors: dict[str, Tensor] = {}
    left_aside: list[str] = []
    for name, entry in table.items():
        rest = name.removeprefix(prefix)
        if name in ours:
            tensors[names.names[rest]] = entry.tensor
        elif entry.place not in places or _is_counter(rest, entry.tensor):
            continue
        elif name in below and not _is_of_loss(rest, names):
            tensors[rest] = entry.tensor
        elif not any(".".join(entry.parts).startswith(_with_dot(key)) for key in others):
            left_aside.append(entry.name)
    label = _label(table, names, prefix)
    return StateDict(tensors, label, others, rivals, tuple(left_aside))


def _is_counter(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor counts something, such as epochs, and is of no use to a network."""
    is_number = tensor.numel() == 1 and (tensor.ndim == 0 or not tensor.is_floating_point())
    return name.rpartition(".")[2] in COUNTERS or (is_number and "." not in name)


def _is_of_loss(name: str, names: NetworkNames) -> bool:
    """Return whether a tensor is of a loss function beside the network's layers."""
    first = name.partition(".")[0]
    is_layer = any(other.partition(".")[0] == first for other in names.names)
    return not is_layer and LOSS.search(first.lower()) is not None
