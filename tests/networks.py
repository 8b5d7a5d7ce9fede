"""Tiny networks with known dependency graph, for every test that cuts one.

Each takes images `[image, 3, 8, 8]` and returns `[image, 5]`. Widths of layers that are not tied
differ, so that a mix-up of two axes can't go unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import masked_network
from secateur.pruning.plan import PruningPlan

SIDE = 8
CLASSES = 5


def _conv_norm(in_channels: int, out_channels: int, *, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class Chain(nn.Module):
    """conv - norm - relu - conv (with bias) - norm - relu - pooling - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 7, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(7)
        self.linear = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Residual(nn.Module):
    """A stem and two blocks; `stem`, `conv2` and `conv4` are tied by the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 6)
        self.conv1 = _conv_norm(6, 4)
        self.conv2 = _conv_norm(4, 6)
        self.conv3 = _conv_norm(6, 5)
        self.conv4 = _conv_norm(5, 6)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.conv4(F.relu(self.conv3(x))) + x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Concat(nn.Module):
    """Two branches joined along the channels, and joined again with the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 4)
        self.left = _conv_norm(4, 5)
        self.right = _conv_norm(4, 3)
        self.join = _conv_norm(8, 6)
        self.linear = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        joined = F.relu(self.join(F.relu(torch.cat([self.left(x), self.right(x)], dim=1))))
        both = torch.cat([joined, x], 1)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(both, 1).flatten(1))
        return logits


class Depthwise(nn.Module):
    """conv - depthwise conv - pointwise conv: the first two are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = _conv_norm(3, 6)
        self.depthwise = _conv_norm(6, 6, groups=6)
        self.project = nn.Conv2d(6, 4, 1)
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.expand(x))
        x = F.hardswish(self.depthwise(x))
        x = F.leaky_relu(self.project(x))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Flattened(nn.Module):
    """Pooled to 2x4 positions and flattened: each channel is eight inputs of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv_norm(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 4)))
        self.hidden = nn.Linear(6 * 8, 7)
        self.linear = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.features(x), 1)
        logits: Tensor = self.linear(F.dropout(F.gelu(self.hidden(x)), 0.5, self.training))
        return logits


class Shared(nn.Module):
    """One convolution used twice in a row: its filters are its own input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 5)
        self.twice = nn.Conv2d(5, 5, 3, padding=1)
        self.last = nn.Conv2d(5, 4, 1)
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        logits: Tensor = self.linear(F.relu(self.last(x)).mean((-1, -2)))
        return logits


class TiedWeights(nn.Module):
    """Two modules with one kernel between them, on two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 4)
        self.one = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.other = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.other.weight = self.one.weight
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        both = torch.cat([F.relu(self.one(x)), torch.sigmoid(self.other(x))], 1)
        logits: Tensor = self.linear(both.mean((2, 3)))
        return logits


class InPlace(nn.Module):
    """Activations and a residual sum that write over their input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 6)
        self.conv1 = _conv_norm(6, 5)
        self.conv2 = _conv_norm(5, 6)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.conv2(self.relu(self.conv1(x)))
        y += x
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1))
        return logits


class Grouped(nn.Module):
    """A convolution in two groups between two ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 6)
        self.grouped = _conv_norm(6, 8, groups=2)
        self.last = _conv_norm(8, 7)
        self.linear = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(F.relu(self.grouped(F.relu(self.stem(x))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class ChannelPad(nn.Module):
    """A residual block whose shortcut is subsampled and padded with channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 4)
        self.conv1 = nn.Conv2d(4, 7, 3, stride=2, padding=1)
        self.conv2 = _conv_norm(7, 6)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + short)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class ViewRest(nn.Module):
    """Flattened by `view(n, -1)`, with positions left: prunable."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv_norm(3, 6)
        self.linear = nn.Linear(6 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        logits: Tensor = self.linear(x.view(x.size(0), -1))
        return logits


class ViewFixed(nn.Module):
    """Flattened by `view(-1, 96)`: the width is in the code, so it can't change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, 4)
        self.conv = _conv_norm(4, 6)
        self.linear = nn.Linear(6 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(F.relu(self.stem(x)))), 2)
        logits: Tensor = self.linear(x.view(-1, 96))
        return logits


class Gated(nn.Module):
    """Squeeze and excitation: a gate `[image, channel, 1, 1]` multiplies the feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv_norm(3, 6)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        logits: Tensor = self.linear((x * torch.sigmoid(gate)).mean((2, 3)))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "concat": Concat,
    "depthwise": Depthwise,
    "flattened": Flattened,
    "shared": Shared,
    "tied_weights": TiedWeights,
    "in_place": InPlace,
    "grouped": Grouped,
    "channel_pad": ChannelPad,
    "view_rest": ViewRest,
    "view_fixed": ViewFixed,
    "gated": Gated,
}


def make_network(name: str, seed: int = 0) -> nn.Module:
    """The named network in evaluation mode, with random weights and norm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name]()
    randomise_norms(model, torch.Generator().manual_seed(seed))
    return model.eval()


@cache
def wired(name: str, prune_residual: bool = False) -> tuple[nn.Module, DependencyGraph]:
    """The named network and its dependency graph; made once, so that no test may change it."""
    model = make_network(name)
    return model, build_dependency_graph(model, random_images(2), prune_residual=prune_residual)


def random_plan(dependencies: DependencyGraph, generator: torch.Generator) -> PruningPlan:
    """A plan that removes at least one and leaves at least one random filter of each group."""
    removed: dict[str, tuple[int, ...]] = {}
    for name, group in dependencies.groups.items():
        if len(group) > 1:
            count = int(torch.randint(1, len(group), (), generator=generator))
            chosen = torch.randperm(len(group), generator=generator)[:count]
            removed[name] = tuple(sorted(chosen.tolist()))
    return PruningPlan(removed, Budget("macs", 0.5), "random")


def assert_cut_is_equivalent(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: PruningPlan,
    images: Tensor,
    *,
    limit: float = 1e-4,
) -> nn.Module:
    """Return the cut network, checked against the masked one, `macs`, `params`, `shapes_after`."""
    cut = apply_plan(model, dependencies, plan)
    with torch.no_grad():
        outputs, masked = cut(images), masked_network(model, dependencies, plan)(images)
    for one, other in zip(several(outputs), several(masked), strict=True):
        assert one.shape == other.shape
        assert torch.isfinite(one).all()
        assert relative_error(one, other) < limit
    assert dependencies.macs(plan.removed) == counted_macs(cut, images)
    assert dependencies.params(plan.removed) == sum(one.numel() for one in cut.parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in cut.state_dict().items()}
    predicted = dependencies.shapes_after(plan.removed)
    assert all(shapes[name] == predicted[name] for name in shapes)
    return cut


def several(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All the tensors that a network answers with."""
    return (values,) if isinstance(values, Tensor) else values


def counted_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one image as PyTorch's own counter sees them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images[:1])
    flops = int(counter.get_total_flops())
    assert flops % 2 == 0
    return flops // 2


def random_images(count: int = 3, side: int = SIDE, seed: int = 1) -> Tensor:
    """Images `[image, 3, side, side]` of normal noise."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def randomise_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Gives each batch norm a scale, shift and statistics unlike those it starts with.

    With the starting values a channel that is wrongly left out would often be zero anyway.
    """
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            shape = (module.num_features,)
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.copy_(torch.rand(shape, generator=generator) + 0.5)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.copy_(torch.randn(shape, generator=generator) * 0.5)
