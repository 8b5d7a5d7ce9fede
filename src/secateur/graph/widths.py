"""Attributes of modules that state a width, for users of the network, which never reads them.

`out_channels` of a block, `num_features` of a network, `feature_info` of a backbone. A cut leaves
them as they were, and a head that is built by them does not fit. They are set to what the module
takes and returns in the cut network. Which of a library's attributes mean what is known in
`secateur.integrations`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.dependency import DependencyGraph, Removed

INPUT_WIDTHS = frozenset(
    (
        *("in_channels", "in_chs", "in_features", "inplanes", "in_planes", "num_features", "dim"),
        "groups",  # of a depthwise block, as many as it takes
    )
)
"""Names that say how many channels a module takes, in torchvision, timm and elsewhere."""
OUTPUT_WIDTHS = frozenset(("out_channels", "out_chs", "out_features", "out_planes"))
"""Names that say how many it returns."""


class Widths:
    """What modules take and return after a cut, in channels."""

    def __init__(self, dependencies: DependencyGraph, removed: Removed) -> None:
        self._dependencies = dependencies
        self._count = dependencies.count_after(removed)
        self._nodes: dict[str, list[Node]] = {}
        """Dotted name of a module -> the operations that were called in it or its children."""
        for node in dependencies.graph.nodes:
            if node.op == "call_function":
                stack = node.meta.get("nn_module_stack", {}).values()
                for module in {prefix for name in stack for prefix in _prefixes(name)}:
                    self._nodes.setdefault(module, []).append(node)

    @property
    def image_size(self) -> tuple[int, ...]:
        """Height and width of the images that the network was traced with."""
        return tuple(int(size) for size in self._dependencies.graph.image.meta["val"].shape[2:])

    def of_input(self, module: str, before: int) -> int | None:
        """Return how many of a module's `before` input channels stay; None if it takes no such."""
        inside = self._nodes.get(module, [])
        return self._after(
            (
                source
                for node in inside
                for source in node.all_input_nodes
                if source not in inside and source not in self._dependencies.graph.tensor_names
            ),
            before,
        )

    def of_output(self, module: str, before: int) -> int | None:
        """Return how many of a module's `before` output channels stay; None if it has no such."""
        inside = self._nodes.get(module, [])
        read = [node for node in inside if any(user not in inside for user in node.users)]
        return self._after(read or inside[-1:], before)

    def _after(self, values: Iterable[Node], before: int) -> int | None:
        """Return the width of the first value that has `before` channels, second or last."""
        for node in values:
            value, axes = node.meta.get("val"), self._dependencies.axes.get(node)
            if not isinstance(value, Tensor) or axes is None or value.dim() < 2:
                continue
            for dim in (1, value.dim() - 1):
                ids = axes[dim]
                if value.shape[dim] == before and ids is not None:
                    return self._count(ids, len(ids))
        return None


def update_widths(model: nn.Module, smaller: nn.Module, widths: Widths) -> None:
    """Set the widths that modules of a cut network state by the common names.

    `model` is the network before the cut. An attribute is changed only if it was the number of
    channels that its module took, or returned: others of these names mean something else.
    """
    modules = dict(smaller.named_modules())
    for path, module in model.named_modules():
        if not path or path not in modules or type(module).__module__.startswith("torch.nn."):
            continue
        for names, after in (
            (INPUT_WIDTHS, widths.of_input),
            (OUTPUT_WIDTHS, widths.of_output),
        ):
            for name in names & vars(module).keys():
                set_width(modules[path], name, after(path, vars(module)[name]))


def set_width(module: nn.Module, name: str, width: int | None) -> None:
    """Set an attribute, unless its width is not known (None) or is a property of the class."""
    if width is not None and name in vars(module):
        setattr(module, name, width)


def _prefixes(name: str) -> Iterable[str]:
    """Yield a module's dotted name and those of the modules around it, but the network itself."""
    while name:
        yield name
        name = name.rpartition(".")[0]
