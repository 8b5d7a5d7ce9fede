"""Residual branches: the f of y = x + f(x), which can be dropped so that y = x + a constant.

A branch can be dropped if the other summand is its input itself, nothing inside it is read
elsewhere, and a module gives its output. That module is replaced by one that returns a constant for
each channel (`Constant`), and the other modules of the branch by ones that cost next to nothing
(`FirstChannel`). The network's own `forward` stays as it is.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.channel_ids import Ids
from secateur.graph.dependency import DependencyGraph, Removed, aliases_of
from secateur.graph.network_graph import argument, operation_name

BEHIND_MODULES = frozenset({"mul", "permute", "transpose", "dropout", "feature_dropout", "clone"})
"""Operations that may lie between the module that gives a branch's output and the sum."""
PRODUCTS = frozenset(
    {
        *("matmul", "bmm", "baddbmm", "mm", "addmm", "einsum", "inner", "tensordot"),
        "scaled_dot_product_attention",
    }
)
"""Products of feature maps, as in attention: branches with these stay."""


@dataclass(frozen=True, eq=False)
class ResidualBranch:
    """A branch that can be dropped."""

    name: str
    """The module whose forward has the sum; `module` where that has several, or is the network."""
    module: str
    """The module that gives the branch's output."""
    others: tuple[str, ...]
    """The other modules of the branch, without those inside of one another."""
    shortcut: Node
    """The branch's input, which is the other summand."""
    sum: Node
    end: Node
    """The operation that gives the output of `module`."""
    behind: tuple[Node, ...]
    """Operations between it and the sum, in the order of execution."""
    nodes: frozenset[Node]
    """Operations up to `end`, which are no longer needed."""
    channel_dim: int
    """Dimension of `end` that the channels lie along."""
    channels: Ids
    """Ids along that dimension."""
    tensors: frozenset[str]
    """Parameters and buffers that are no longer needed."""

    @property
    def constant(self) -> str:
        """Name of the parameter that takes the place of the branch."""
        return f"{self.module}.value"

    def value(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the constant, with sizes of 1 along all dimensions but that of the channels."""
        shape = [1] * len(self.end.meta["val"].shape)
        shape[self.channel_dim] = -1
        return state[self.constant].view(shape)


class Constant(nn.Module):
    """Returns a constant for each channel, in the size of its input otherwise."""

    def __init__(self, value: Tensor, channel_dim: int) -> None:
        """Take `value [channel]`; the channels of the output lie along `channel_dim`."""
        super().__init__()
        self.value: nn.Parameter = nn.Parameter(value)
        self.channel_dim: int = channel_dim

    def forward(self, maps: Tensor, *_: object, **__: object) -> Tensor:
        """Return the constant at each position; other arguments than the first are ignored."""
        shape = [1] * maps.dim()
        shape[self.channel_dim] = len(self.value)
        sizes = [-1 if dim == self.channel_dim else size for dim, size in enumerate(maps.shape)]
        return _copied(self.value.view(shape).expand(sizes), maps)  # the network may add in place


class FirstChannel(nn.Module):
    """Returns a copy of the first channel of its input, so that what follows costs little."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim: int = channel_dim

    def forward(self, maps: Tensor, *_: object, **__: object) -> Tensor:
        """Return the first channel; other arguments than the first are ignored."""
        return _copied(maps.narrow(self.channel_dim, 0, 1), maps)  # the network may write in place


def _copied(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy whose numbers lie in memory as those of another tensor: channels last or not.

    Of a tensor with one channel only its strides tell.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_channels_last = like.dim() in formats and like.stride(1) == 1
    layout = formats[like.dim()] if is_channels_last else torch.contiguous_format
    return value.clone(memory_format=layout)


def residual_branches(
    model: nn.Module, dependencies: DependencyGraph, exclude: Sequence[str] = ()
) -> dict[str, ResidualBranch]:
    """Return the branches that can be dropped, by name, in the order of execution.

    Of branches inside of one another only the innermost are returned. Those with a layer whose name
    matches a pattern in `exclude` are left out.
    """
    search = _Search(model, dependencies)
    sums = [node for node in dependencies.graph.nodes if operation_name(node) == "add"]
    branches = [branch for branch in map(search.branch_into, sums) if branch is not None]
    owners = [_owner(node) for node in sums if node in dependencies.axes]
    result = {}
    for branch in branches:
        layers = [layer.name for layer in dependencies.layers if layer.node in branch.nodes]
        has_inner = any(other.sum in branch.nodes for other in branches if other is not branch)
        is_excluded = any(fnmatch.fnmatchcase(*pair) for pair in itertools.product(layers, exclude))
        if not has_inner and not is_excluded:
            owner = _owner(branch.sum)
            name = owner if owner and owners.count(owner) == 1 else branch.module
            result[name] = replace(branch, name=name)
    return result


def drop_branches(
    smaller: nn.Module,
    dependencies: DependencyGraph,
    removed: Removed,
    branches: Iterable[ResidualBranch],
) -> None:
    """Replace the modules of some branches of a network that has lost channels; constants are 0."""
    stays = dependencies.kept_ids(dependencies.kept_channels(removed))
    for branch in branches:
        like = next(smaller.get_submodule(branch.module).parameters(), None)
        like = next(smaller.parameters()) if like is None else like
        value = like.new_zeros(int(stays[branch.channels].sum()))
        for name in (branch.module, *branch.others):
            path, _, attribute = name.rpartition(".")
            is_module = name == branch.module
            dim = branch.channel_dim
            new = Constant(value.detach(), dim) if is_module else FirstChannel(dim)
            old = smaller.get_submodule(name)
            setattr(smaller.get_submodule(path), attribute, new.train(old.training))


def _modules_around(node: Node) -> list[str]:
    """Return the modules that an operation is called in, the outermost first."""
    return [name for name in node.meta.get("nn_module_stack", {}).values() if name]


def _owner(node: Node) -> str:
    """Return the module in whose forward an operation is; empty for the network itself."""
    return next(reversed(_modules_around(node)), "")


class _Search:
    """Looks for the branches of a network."""

    def __init__(self, model: nn.Module, dependencies: DependencyGraph) -> None:
        self._dependencies = dependencies
        self._graph = dependencies.graph
        self._aliases = aliases_of(model)
        self._place = {node: number for number, node in enumerate(self._graph.nodes)}
        self._nodes_of: dict[str, set[Node]] = {}
        """Operations that are called in a module, directly or not."""
        self._from_images = {self._graph.image}
        """Values that depend on the images, without their sizes."""
        for node in self._graph.nodes:
            for name in _modules_around(node):
                self._nodes_of.setdefault(name, set()).add(node)
            has_values = isinstance(node.meta.get("val"), Tensor | tuple | list)
            if has_values and not self._from_images.isdisjoint(node.all_input_nodes):
                self._from_images.add(node)

    def branch_into(self, total: Node) -> ResidualBranch | None:
        """Return the branch whose output goes into a sum; None if it can't be dropped."""
        summands = [source for source in total.args[:2] if isinstance(source, Node)]
        if len(set(summands)) != 2 or argument(total, "alpha", 1) != 1:
            return None
        shapes = {tuple(node.meta["val"].shape) for node in (total, *summands)}
        if len(shapes) != 1 or not self._from_images.issuperset(summands):
            return None
        shortcut, output = sorted(summands, key=self._place.__getitem__)
        behind: list[Node] = []
        for end, dim in self._ends(output, total):
            nodes = self._between(shortcut, end)
            if nodes is None:
                return None
            module = self._module_that_gives(end, nodes)
            if module is not None:
                branch = self._branch(total, shortcut, end, dim, nodes, module)
                return branch and replace(branch, behind=tuple(behind))
            behind.insert(0, end)
        return None

    def _ends(self, output: Node, total: Node) -> Iterator[tuple[Node, int]]:
        """Yield operations that a branch may end with, and the dimension of their channels."""
        axes = self._dependencies.axes.get(total, ())
        dims = [dim for dim, ids in enumerate(axes) if ids is not None]
        if len(dims) != 1 or dims[0] == 0:
            return
        dim, node, consumer = dims[0], output, total
        while list(node.users) == [consumer] and node not in self._graph.outputs:
            yield node, dim
            sources = [s for s in node.all_input_nodes if s in self._from_images]
            if operation_name(node) not in BEHIND_MODULES or len(sources) != 1:
                return
            if operation_name(node) == "permute":
                dim = argument(node, "dims")[dim] % len(axes)
            elif operation_name(node) == "transpose":
                one, other = (argument(node, name) % len(axes) for name in ("dim0", "dim1"))
                dim = {one: other, other: one}.get(dim, dim)
            consumer, node = node, sources[0]

    def _between(self, shortcut: Node, end: Node) -> frozenset[Node] | None:
        """Return the operations that compute `end` from the shortcut alone, for `end` alone.

        None if other values take part, if other operations read values inside, or if there is no
        layer.
        """
        nodes: set[Node] = set()
        parameters: set[Node] = set()
        pending = [end]
        while pending:
            node = pending.pop()
            if node is shortcut or node in nodes or node in parameters:
                continue
            inputs = node.all_input_nodes
            if node not in self._from_images:
                parameters.add(node)
                inputs = [source for source in inputs if source not in self._from_images]
            elif self._place[node] < self._place[shortcut]:
                return None
            else:
                nodes.add(node)
            pending += inputs
        is_closed = all(
            node is end or (nodes.issuperset(node.users) and node not in self._graph.outputs)
            for node in nodes
        )
        is_whole = nodes.isdisjoint(end.users) and not nodes.isdisjoint(shortcut.users)
        has_layer = any(layer.node in nodes for layer in self._dependencies.layers)
        has_products = not PRODUCTS.isdisjoint(map(operation_name, nodes))
        if not (is_closed and is_whole and has_layer) or has_products:
            return None
        for node in sorted(parameters, key=self._place.__getitem__, reverse=True):
            if node.op == "call_function" and nodes.issuperset(node.users):
                nodes.add(node)
        return frozenset(nodes)

    def _module_that_gives(self, end: Node, nodes: frozenset[Node]) -> str | None:
        """Return the outermost module of a branch whose only output is `end`."""
        for name in _modules_around(end):
            inside = self._nodes_of[name]
            is_only_output = all(node is end or inside.issuperset(node.users) for node in inside)
            if inside <= nodes and is_only_output:
                return name
        return None

    def _branch(
        self,
        total: Node,
        shortcut: Node,
        end: Node,
        dim: int,
        nodes: frozenset[Node],
        module: str,
    ) -> ResidualBranch | None:
        """Return the branch whose output `module` gives; None if others use its tensors."""
        inside = [name for name, mine in self._nodes_of.items() if mine <= nodes]
        replaced = [
            name for name in inside if not any(name.startswith(f"{other}.") for other in inside)
        ]
        tensors = {
            name
            for name in self._dependencies.shapes
            if any(name.startswith(f"{other}.") for other in replaced)
        }
        users: set[Node] = set()
        for node, name in self._graph.tensor_names.items():
            users.update(node.users if name in tensors else ())
        is_shared = any(not tensors.issuperset(self._aliases[name]) for name in tensors)
        channels = self._dependencies.axes[end][dim]
        is_outer = any(module.startswith(f"{name}.") for name in inside)
        if is_shared or is_outer or channels is None or not nodes.issuperset(users):
            return None
        others = tuple(name for name in replaced if name != module)
        return ResidualBranch(
            name=module,
            module=module,
            others=others,
            shortcut=shortcut,
            sum=total,
            end=end,
            behind=(),
            nodes=nodes,
            channel_dim=dim,
            channels=channels,
            tensors=frozenset(tensors),
        )
