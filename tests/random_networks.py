# mypy: disable-error-code="no-any-return"
"""Random networks for the property test: a specification is a plain value, `build` a network.

A `Spec` is a tuple of steps `(kind, width, choice)`. `kind` names a block; `width` says how wide it
is; `choice` is a number whose digits pick the block's variants, so that any number is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.config import Budget, Quantity
from secateur.graph.dependency import DependencyGraph
from secateur.pruning.apply import check_plan
from secateur.pruning.plan import PruningPlan, make_plan
from secateur.runtime.errors import RunFolderError, TargetError

CLASSES = 5
SIDE = 8

Step = tuple[str, int, int]
Spec = tuple[Step, ...]


class Choice:
    """Digits of a number, each of which picks one of several options."""

    def __init__(self, number: int) -> None:
        self._rest = number

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        self._rest, index = divmod(self._rest, len(options))
        return options[index]


class Block(nn.Module):
    """A part of a network that takes `[image, width, side, side]` to sizes of its own."""

    width: int
    side: int


def _act(choice: Choice, width: int) -> nn.Module:
    return choice.pick(
        nn.ReLU(),
        nn.GELU(),
        nn.Hardswish(),
        nn.ReLU(inplace=True),
        nn.PReLU(),
        nn.PReLU(width),
        nn.Sigmoid(),
        nn.Identity(),
    )


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of `[image, channel, y, x]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormByHand(nn.Module):
    """Layer norm over channels as ConvNeXt's authors wrote it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def _norm(choice: Choice, width: int) -> nn.Module:
    groups = 2 if width % 2 == 0 else 1
    return choice.pick(
        lambda: nn.BatchNorm2d(width),
        nn.Identity,
        lambda: nn.BatchNorm2d(width, affine=False),
        lambda: nn.BatchNorm2d(width, track_running_stats=False),
        lambda: nn.InstanceNorm2d(width, affine=True),
        lambda: nn.InstanceNorm2d(width),
        lambda: nn.GroupNorm(groups, width),
        lambda: nn.GroupNorm(width // groups, width),
        lambda: nn.GroupNorm(1, width, affine=False),
        lambda: nn.GroupNorm(width // groups, width, affine=False),
        lambda: LayerNorm2d(width),
        lambda: LayerNorm2d(width, elementwise_affine=False),
        lambda: NormByHand(width),
    )()


def _unit(choice: Choice, inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    """Conv - norm - activation that keeps the side."""
    kernel = choice.pick(3, 1)
    conv = nn.Conv2d(
        inputs, outputs, kernel, padding=kernel // 2, bias=choice.pick(False, True), **options
    )
    return nn.Sequential(conv, _norm(choice, outputs), _act(choice, outputs))


def _outputs(unit: nn.Sequential) -> int:
    conv = unit[0]
    assert isinstance(conv, nn.Conv2d)
    return conv.out_channels


class Conv(Block):
    """A convolution of any kind, norm and activation."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        kernel = choice.pick(3, 1)
        stride = choice.pick(1, 2) if side > 3 else 1
        dilation = choice.pick(1, 2) if kernel == 3 else 1
        self.conv = nn.Conv2d(
            width,
            out,
            kernel,
            stride=stride,
            dilation=dilation,
            padding=dilation * (kernel // 2),
            padding_mode=choice.pick("zeros", "circular"),
            bias=choice.pick(False, True),
        )
        self.norm, self.act = _norm(choice, out), _act(choice, out)
        self.width, self.side = out, (side + stride - 1) // stride

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(Block):
    """Two convolutions around which the input goes by: as it is, projected or padded."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.kind = choice.pick("identity", "projected", "padded", "reversed")
        out = max(out, width) if self.kind == "padded" else out
        out = out if self.kind in ("projected", "padded") else width
        stride = 2 if self.kind == "padded" and side > 3 else 1
        self.inner = _unit(choice, width, choice.pick(out, 4, 7))
        middle = _outputs(self.inner)
        self.outer = nn.Conv2d(middle, out, 3, stride=stride, padding=1)
        self.norm, self.act = _norm(choice, out), _act(choice, out)
        self.short = nn.Conv2d(width, out, 1) if self.kind == "projected" else nn.Identity()
        self.before, self.behind = (out - width) // 2, (out - width + 1) // 2
        self.stride, self.width, self.side = stride, out, (side + stride - 1) // stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.outer(self.inner(x)))
        if self.kind == "padded":
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind)
            )
            return self.act(x + y)
        return (
            self.act(y + self.short(x)) if self.kind == "reversed" else self.act(self.short(x) + y)
        )


class Dense(Block):
    """Each layer reads all that came before."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            _unit(choice, width + number * out, out) for number in range(choice.pick(1, 2))
        )
        self.width, self.side = width + len(self.units) * out, side

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = torch.cat([unit(x), x], 1)
        return x


class Parts(Block):
    """The channels in two or more parts, of which some are changed; then all are joined."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        first = choice.pick(width // 2, width // 4, 3 * width // 4)
        self.sizes = [first, width - first]
        self.first, self.piece = first, width // 2
        self.how = choice.pick(
            "sizes", "int", "chunk", "attribute", "literal", "shape", "negative", "chunk4"
        )
        if self.how in ("int", "chunk"):
            self.sizes = [width // 2, width // 2]
        if self.how == "chunk4":
            self.sizes = [width // 4, 3 * width // 4]
        if self.how == "shape":
            self.sizes = [width // 2, width - width // 2]
        if self.how == "literal":
            self.sizes = [4, width - 4] if width > 4 else [2, width - 2]
        self.unit = _unit(choice, self.sizes[0], choice.pick(self.sizes[0], out))
        self.swap = choice.pick(False, True)
        self.width, self.side = _outputs(self.unit) + self.sizes[1], side

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        if self.how == "sizes":
            return torch.split(x, self.sizes, 1)
        if self.how == "int":
            return torch.split(x, self.piece, dim=1)
        if self.how == "chunk":
            return x.chunk(2, dim=1)
        if self.how == "chunk4":
            one, *others = x.chunk(4, dim=1)
            return one, torch.cat(others, 1)
        if self.how == "attribute":
            return x[:, : self.first], x[:, self.first :]
        if self.how == "negative":
            return x[:, : -self.sizes[1]], x[:, -self.sizes[1] :]
        if self.how == "literal":
            return (x[:, :4], x[:, 4:]) if x.shape[1] > 4 else (x[:, :2], x[:, 2:])
        half = x.shape[1] // 2
        return x[:, :half], x[:, half:]

    def forward(self, x: Tensor) -> Tensor:
        one, other = self._parts(x)
        one = self.unit(one)
        return torch.cat([other, one] if self.swap else [one, other], 1)


class Shuffle(Block):
    """Channels of two groups, or four, take turns."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.how = choice.pick("view", "function", "module", "kept", "flattened")
        self.groups = choice.pick(2, 4)
        self.each = width // self.groups
        self.shuffle = nn.ChannelShuffle(self.groups)
        self.width, self.side = width, side

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return F.channel_shuffle(x, self.groups)
        if self.how == "module":
            return self.shuffle(x)
        images, channels, height, width = x.shape
        group_width = self.each if self.how == "kept" else channels // self.groups
        if self.how == "flattened":
            x = x.reshape(images, self.groups, group_width, height * width).permute(0, 2, 1, 3)
            return x.reshape(images, channels, height, width)
        x = (
            x.contiguous()
            .view(images, self.groups, group_width, height, width)
            .transpose(1, 2)
            .contiguous()
        )
        return x.view(images, -1, height, width)


class Grouped(Block):
    """A convolution in groups, or one for each channel; the kernel may be transposed."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        groups = choice.pick(2, 4, width, width // 2)
        per_group = choice.pick(width // groups, 1, 2)
        outputs = groups * per_group
        kernel = choice.pick(3, 1)
        bias = choice.pick(False, True)
        options = {"groups": groups, "padding": kernel // 2, "bias": bias}
        kind = choice.pick(nn.Conv2d, nn.ConvTranspose2d)
        self.conv = kind(width, outputs, kernel, **options)
        self.norm, self.act = _norm(choice, outputs), _act(choice, outputs)
        self.width, self.side = outputs, side

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Resize(Block):
    """Another number of positions."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        smaller = [
            (lambda: nn.MaxPool2d(2), width, side // 2),
            (lambda: nn.AvgPool2d(3, 1, 1), width, side),
            (lambda: nn.AdaptiveAvgPool2d(2), width, 2),
            (lambda: nn.AdaptiveMaxPool2d((2, 2)), width, 2),
            (lambda: nn.PixelUnshuffle(2), width * 4, side // 2),
        ]
        larger = [
            (lambda: nn.Upsample(scale_factor=2), width, side * 2),
            (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), width, side * 2),
            (lambda: nn.ConvTranspose2d(width, out, 2, stride=2), out, side * 2),
            (lambda: nn.PixelShuffle(2), width // 4, side * 2),
        ]
        is_larger = side <= 4 and (side <= 2 or choice.pick(True, False))
        chosen = choice.pick(*(larger if is_larger else smaller))
        make, self.width, self.side = chosen
        self.resize = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(x)


class Gate(Block):
    """Feature maps times a gate: by channel, by position, by a parameter."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.how = choice.pick("conv", "linear", "position", "scale", "scale1", "shift", "eca")
        kind = nn.Linear if self.how == "linear" else lambda i, o: nn.Conv2d(i, o, 1)
        if self.how in ("conv", "linear"):
            self.squeeze, self.excite = kind(width, out), kind(out, width)
        if self.how == "position":
            self.is_summarised = choice.pick(True, False)
            self.attend = nn.Conv2d(2 if self.is_summarised else width, 1, 3, padding=1)
        if self.how in ("scale", "scale1", "shift"):
            shape = (1, width, 1, 1) if self.how == "scale1" else (width, 1, 1)
            self.scale = nn.Parameter(torch.rand(shape) + 0.5)
        self.act = choice.pick(nn.Sigmoid(), nn.Hardsigmoid(), nn.Softmax(1))
        self.width, self.side = width, side

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "conv":
            return x * self.act(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        if self.how == "linear":
            images, channels = x.shape[:2]
            squeezed = F.adaptive_avg_pool2d(x, 1).reshape(images, channels)
            gate = self.act(self.excite(F.relu(self.squeeze(squeezed))))
            return gate.view(images, channels, 1, 1) * x
        if self.how == "position":
            seen = x
            if self.is_summarised:
                seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
            return x * torch.sigmoid(self.attend(seen)) * 2
        if self.how == "eca":
            return x * self.act(x.mean((2, 3), keepdim=True)) + (1 - torch.sigmoid(x))
        return x + self.scale if self.how == "shift" else x * self.scale


class StandardisedConv(nn.Conv2d):
    """A convolution whose kernel is standardised first, filter by filter."""

    by_norm: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.by_norm:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        else:
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            deviation = self.weight.std((1, 2, 3), keepdim=True, unbiased=False)
            weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised(Block):
    """Weight standardisation, then a norm."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.conv = StandardisedConv(width, out, 3, padding=1, bias=choice.pick(True, False))
        self.conv.by_norm = choice.pick(True, False)
        self.norm, self.act = _norm(choice, out), _act(choice, out)
        self.width, self.side = out, side

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ConvNeXt(Block):
    """Depthwise convolution, layer norm and two linear layers with channels last."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = choice.pick(nn.LayerNorm, nn.RMSNorm)(width)
        self.expand, self.project = nn.Linear(width, out), nn.Linear(out, width)
        self.act = choice.pick(nn.GELU(), nn.PReLU())
        self.response = choice.pick(False, True)
        self.scale = nn.Parameter(torch.rand(width))
        self.is_residual = choice.pick(True, False)
        self.width, self.side = width, side

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.expand(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        if self.response:  # global response normalisation, as in ConvNeXt v2
            spread = y.norm(p=2, dim=(1, 2), keepdim=True)
            y = y * (spread / (spread.mean(-1, keepdim=True) + 1e-6)) + y
        y = (self.project(y) * self.scale).permute(0, 3, 1, 2)
        return x + y if self.is_residual else y


class Attended(Block):
    """Two branches weighted against each other, channel by channel, as in SK nets and ResNeSt."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.how = choice.pick("stack", "radix", "chunk")
        self.radix, self.out = 2, out
        if self.how == "stack":
            self.branches = nn.ModuleList(_unit(choice, width, out) for _ in range(2))
        else:
            self.branch = _unit(choice, width, 2 * out)
        self.squeeze, self.excite = nn.Conv2d(out, 4, 1), nn.Conv2d(4, 2 * out, 1)
        self.width, self.side = out, side

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "stack":
            both = torch.stack([branch(x) for branch in self.branches], 1)
        elif self.how == "chunk":
            both = torch.stack(self.branch(x).chunk(2, 1), 1)
        else:
            x = self.branch(x)
            both = x.reshape(x.shape[0], self.radix, x.shape[1] // self.radix, *x.shape[2:])
        gate = self.excite(F.relu(self.squeeze(both.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(x.shape[0], self.radix, -1, 1, 1).softmax(1)
        return (both * gate).sum(1)


class Twice(Block):
    """One module used twice, in a row or side by side."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.how = choice.pick("row", "side", "sum")
        self.unit = _unit(choice, width, width if self.how == "row" else out)
        self.width = {"row": width, "side": 2 * out, "sum": out}[self.how]
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "row":
            return self.unit(self.unit(x))
        one, other = self.unit(x), self.unit(x.flip(-1))
        return torch.cat([one, other], 1) if self.how == "side" else one + other


class Attention(Block):
    """Self-attention between positions."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.heads = choice.pick(1, 2)
        self.inner = 4 * self.heads
        self.how = choice.pick("apart", "together", "product")
        if self.how == "apart":
            self.queries, self.keys = nn.Linear(width, self.inner), nn.Linear(width, self.inner)
            self.values = nn.Linear(width, self.inner)
        else:
            self.all = nn.Linear(width, 3 * self.inner)
        self.project = nn.Linear(self.inner, width)
        self.is_residual = choice.pick(True, False)
        self.width, self.side = width, side

    def forward(self, x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.how == "apart":
            parts = [self.queries(tokens), self.keys(tokens), self.values(tokens)]
        else:
            parts = list(self.all(tokens).chunk(3, -1))
        q, k, v = (p.reshape(images, height * width, self.heads, -1).transpose(1, 2) for p in parts)
        if self.how == "product":
            y = ((q @ k.transpose(-1, -2)) * self.inner**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.project(y.transpose(1, 2).reshape(images, height * width, self.inner))
        y = y.transpose(1, 2).reshape(x.shape)
        return x + y if self.is_residual else y


class Head(Block):
    """Pooled or flattened, and one or two linear layers."""

    def __init__(self, width: int, side: int, out: int, choice: Choice) -> None:
        super().__init__()
        self.how = choice.pick("mean", "pool", "flatten", "view", "squeeze", "map")
        self.two = choice.pick(False, True)
        features = width * (4 if self.how in ("flatten", "view") else 1)
        self.hidden = nn.Linear(features, out)
        self.drop = nn.Dropout()
        self.logits = nn.Linear(out, CLASSES)
        self.other = nn.Linear(out, 2)
        self.to_map = nn.Conv2d(width, CLASSES, 1)
        self.width, self.side = CLASSES, 1

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.how == "map":
            return self.to_map(x).mean((2, 3))
        if self.how == "mean":
            x = x.mean((2, 3))
        elif self.how == "pool":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        elif self.how == "squeeze":
            x = F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
        elif self.how == "flatten":
            x = torch.flatten(F.adaptive_avg_pool2d(x, 2), 1)
        else:
            x = F.adaptive_max_pool2d(x, 2)
            x = x.reshape(x.size(0), -1)
        x = self.drop(F.relu(self.hidden(x)))
        return (self.logits(x), self.other(x)) if self.two else self.logits(x)


BLOCKS: dict[str, Callable[[int, int, int, Choice], Block]] = {
    "conv": Conv,
    "residual": Residual,
    "dense": Dense,
    "parts": Parts,
    "shuffle": Shuffle,
    "grouped": Grouped,
    "resize": Resize,
    "gate": Gate,
    "standardised": Standardised,
    "convnext": ConvNeXt,
    "attended": Attended,
    "twice": Twice,
    "attention": Attention,
}
_IN_FOURS = {"parts", "shuffle", "grouped", "resize"}
"""Blocks whose input must be a multiple of four channels wide."""


class RandomNetwork(nn.Module):
    """A stem, blocks and a head; takes images `[image, 3, 8, 8]`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        *steps, (_, width, number) = spec
        choice = Choice(number)
        stem = _unit(choice, 3, choice.pick(8, 4, 6))
        blocks: list[nn.Module] = [stem]
        channels, side = _outputs(stem), SIDE
        for kind, out, chosen in steps:
            if kind in _IN_FOURS and channels % 4:
                blocks.append(nn.Conv2d(channels, 4 + channels // 4 * 4, 1))
                channels = 4 + channels // 4 * 4
            block = BLOCKS[kind](channels, side, out, Choice(chosen))
            blocks.append(block)
            channels, side = block.width, block.side
        self.blocks = nn.Sequential(*blocks)
        self.head = Head(channels, side, width, choice)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.head(self.blocks(x))


def build(spec: Spec, seed: int = 0) -> RandomNetwork:
    """The network of a specification in float64 and evaluation mode, with random parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RandomNetwork(spec).double()
        with torch.no_grad():
            for module in model.modules():
                for name in ("weight", "running_var"):
                    tensor = getattr(module, name, None)
                    if isinstance(tensor, Tensor) and tensor.dim() == 1:
                        tensor.uniform_(0.5, 1.5)
                for name in ("bias", "running_mean"):
                    tensor = getattr(module, name, None)
                    if isinstance(tensor, Tensor):
                        tensor.normal_(0, 0.5)
    return model.eval()


def random_plan(dependencies: DependencyGraph, seed: int) -> PruningPlan:
    """A valid plan: any subset of the filters, or one made from random scores."""
    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    if number(3) == 0:
        scores = {
            n: torch.rand(len(g), generator=generator) for n, g in dependencies.groups.items()
        }
        quantities: list[Quantity] = ["macs", "params", "filters"]
        target = Budget(quantities[number(3)], 0.4 + number(50) / 100)
        round_to, min_filters = [1, 1, 2, 4][number(4)], 1 + number(3)
        try:
            return make_plan(
                scores, dependencies, target, "random", round_to=round_to, min_filters=min_filters
            )
        except TargetError:
            pass
    removed: dict[str, tuple[int, ...]] = {}
    for name, group in dependencies.groups.items():
        size = len(group)
        order = torch.randperm(size, generator=generator)[: number(size)].tolist()
        while order:
            attempt = {**removed, name: tuple(sorted(order))}
            try:
                check_plan(dependencies, PruningPlan(attempt, Budget("macs", 0.5), "random"))
            except RunFolderError:  # it empties a part: a filter less
                order.pop()
            else:
                removed = attempt
                break
    return PruningPlan(removed, Budget("macs", 0.5), "random")
