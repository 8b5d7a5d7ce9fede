# mypy: disable-error-code="no-any-return"
"""What networks do with channels and their number outside of the usual layers.

Either the cut network equals the masked original, or the channels are frozen and say why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import secateur
from networks import assert_cut_is_equivalent, random_images
from random_networks import random_plan
from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.rules import elementwise
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import masked_network
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import TraceError, UsageError

Step = Callable[[Any, Tensor], Tensor]

FIXED = "combined with a value of fixed size"
NUMBER = "sized by a number in the network's code"
ELSE = "with fewer channels the network's code does something else"
ORDER = "the order or the number of the channels matters"
UNREAD = "read by no convolution or linear layer"
POSITIONS = "pooled over as if they were positions"
KERNEL = "read by a kernel of fixed size"
PRODUCT = "multiplied by other feature maps, as in attention"


class Network(nn.Module):
    """conv - relu - conv `second` - relu - a step - conv: the step sees eight channels."""

    def __init__(self, step: Step, width: int, parts: dict[str, Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        for name, part in parts.items():
            if isinstance(part, Buffer):
                self.register_buffer(name, part.values)
            else:
                setattr(self, name, part)
        self.head = nn.Conv2d(width, 5, 1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.stem(x))) + 0.2)
        return self.head(self.step(self, x)).mean((2, 3))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


def network(step: Step, width: int = 8, **parts: Any) -> nn.Module:
    return Network(step, width, parts).double().eval()


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # [image, position, channel]


def maps(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, 8, 8)


def check(model: nn.Module, *, prune_residual: bool = True) -> DependencyGraph:
    images = random_images(3).double()
    dependencies = build_dependency_graph(model, images[:2], prune_residual=prune_residual)
    for seed in range(3):
        assert_cut_is_equivalent(
            model, dependencies, random_plan(dependencies, seed), images, limit=1e-6
        )
    return dependencies


class Joined(nn.ModuleDict):
    """A container with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.values()], 1)


def filled_by_slices(model: Any, x: Tensor) -> Tensor:
    """A tensor of zeros that two parts are written into, and one of their rows again."""
    value = x.new_zeros(x.shape)
    value[:, :, :4] = x[:, :, 4:]
    value[:, :, 4:] = x[:, :, :4]
    value[..., 1] *= 2
    return value


class Buffer(nn.Module):
    """Takes the place of a tensor that is registered as a buffer."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.values = torch.rand(shape, dtype=torch.float64)


# An operation without a rule, which says that it is pointwise. torch 2.6's custom_op has no tags.
torch.library.define("secateur_test::triple", "(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))


@torch.library.impl("secateur_test::triple", "default")
def triple(x: Tensor) -> Tensor:
    return x * 3


torch.library.register_fake("secateur_test::triple", torch.empty_like)
tripled = torch.ops.secateur_test.triple

CUT: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "a view of rows of four": (
        8,
        lambda: network(lambda m, x: x.view(x.shape[0], -1, 4).reshape(x.shape)),
    ),
    "channels repeated": (8, lambda: network(lambda m, x: x.repeat(1, 2, 1, 1), 16)),
    "halves swapped, by attribute": (
        8,
        lambda: network(lambda m, x: torch.cat([x[:, m.k :], x[:, : m.k]], 1), k=3),
    ),
    "the first channel moved behind the rest": (
        8,
        lambda: network(lambda m, x: torch.cat([x[:, 1:], x[:, :1]], 1)),
    ),
    "the first channel left out": (7, lambda: network(lambda m, x: x[:, 1:], 7)),
    "rolled over positions": (8, lambda: network(lambda m, x: torch.roll(x, 1, -1))),
    "softmax over channels": (8, lambda: network(lambda m, x: x.softmax(1))),
    "divided by the sum of the image": (
        8,
        lambda: network(lambda m, x: x / x.sum((1, 2, 3), keepdim=True)),
    ),
    "divided by the norm of the channels": (
        8,
        lambda: network(lambda m, x: x / (x.norm(dim=1, keepdim=True) + 1e-3)),
    ),
    "pixel norm": (
        8,
        lambda: network(lambda m, x: x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()),
    ),
    "batch norm without parameters": (
        8,
        lambda: network(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8, affine=False)),
    ),
    "batch norm without statistics": (
        8,
        lambda: network(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8, track_running_stats=False)),
    ),
    "layer norm without parameters": (
        8,
        lambda: network(
            lambda m, x: maps(m.norm(tokens(x))), norm=nn.LayerNorm(8, elementwise_affine=False)
        ),
    ),
    "instance norm without parameters": (
        8,
        lambda: network(lambda m, x: m.norm(x), norm=nn.InstanceNorm2d(8)),
    ),
    "padded by reflection": (
        8,
        lambda: network(
            lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        ),
    ),
    "padded around": (
        8,
        lambda: network(
            lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        ),
    ),
    "resized to a shape": (
        8,
        lambda: network(lambda m, x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:])),
    ),
    "a kernel transposed": (
        8,
        lambda: network(lambda m, x: maps(F.linear(tokens(x), m.w.t())), w=parameter(8, 8)),
    ),
    "one kernel both ways": (
        8,
        lambda: network(
            lambda m, x: F.conv_transpose2d(F.conv2d(x, m.w), m.w), w=parameter(6, 8, 1, 1)
        ),
    ),
    "a kernel divided by its sum": (
        8,
        lambda: network(
            lambda m, x: F.conv2d(x, m.w / m.w.sum((1, 2, 3), keepdim=True)),
            w=parameter(8, 8, 1, 1),
        ),
    ),
    "a kernel with a limited norm": (
        8,
        lambda: network(
            lambda m, x: F.conv2d(x, m.w.renorm(2, 0, 0.5)),
            w=parameter(8, 8, 1, 1),
        ),
    ),
    "backwards": (8, lambda: network(lambda m, x: x.flip(1))),
    "normalised by a function": (8, lambda: network(lambda m, x: F.normalize(x))),
    "a product with a matrix": (
        8,
        lambda: network(lambda m, x: maps(tokens(x) @ m.w), w=parameter(8, 8)),
    ),
    "a gated linear unit": (4, lambda: network(lambda m, x: F.glu(x, 1), 4)),
    "unpooled": (
        8,
        lambda: network(
            lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2])
        ),
    ),
    "an LSTM over positions": (
        8,
        lambda: network(
            lambda m, x: m.lstm(tokens(x))[0].transpose(1, 2)[..., None],
            4,
            lstm=nn.LSTM(8, 4, batch_first=True),
        ),
    ),
    "a GRU in both directions, positions first": (
        8,
        lambda: network(
            lambda m, x: m.gru(x.mean(2).permute(2, 0, 1))[0].permute(1, 2, 0)[..., None],
            8,
            gru=nn.GRU(8, 4, 2, bidirectional=True),
        ),
    ),
    "an RNN whose last state is read": (
        8,
        lambda: network(
            lambda m, x: m.rnn(x.mean(3).transpose(1, 2))[1][0][:, :, None, None],
            4,
            rnn=nn.RNN(8, 4, batch_first=True),
        ),
    ),
    "a blur in a buffer": (
        8,
        lambda: network(
            lambda m, x: F.conv2d(x, m.blur, groups=x.shape[1]), blur=Buffer(8, 1, 3, 3)
        ),
    ),
    "a blur that is expanded": (
        8,
        lambda: network(
            lambda m, x: F.conv2d(x, m.blur.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]),
            blur=Buffer(1, 1, 3, 3),
        ),
    ),
    "read by a kernel in a buffer": (
        8,
        lambda: network(lambda m, x: F.conv2d(x, m.k), 6, k=Buffer(6, 8, 3, 3)),
    ),
    "a mean expanded to the number of channels": (
        8,
        lambda: network(lambda m, x: x * x.mean(1, keepdim=True).expand(-1, x.shape[1], -1, -1)),
    ),
    "zeros of a shape, filled by slices": (8, lambda: network(filled_by_slices)),
    "one channel at a time repeated": (
        8,
        lambda: network(lambda m, x: x.repeat_interleave(3, 1), 24),
    ),
    "a parameter in an equation": (
        8,
        lambda: network(lambda m, x: torch.einsum("bchw,cd->bdhw", x, m.w), 6, w=parameter(8, 6)),
    ),
    "a parameter on the left": (
        8,
        lambda: network(
            lambda m, x: (m.w @ x.flatten(2)).view(x.shape[0], -1, 8, 8), 6, w=parameter(6, 8)
        ),
    ),
    "an operation of one's own that is tagged": (8, lambda: network(lambda m, x: tripled(x))),
    "one minus": (8, lambda: network(lambda m, x: 1 - x)),
    "a lower bound that is a parameter": (
        8,
        lambda: network(lambda m, x: torch.clamp(x, min=m.low), low=parameter(8, 1, 1)),
    ),
    "masked": (8, lambda: network(lambda m, x: x.masked_fill(x < 0.5, 0.1))),
    "an offset repeated for each image": (
        8,
        lambda: network(
            lambda m, x: x + m.w.expand(x.shape[0], -1, -1, -1), w=parameter(1, 8, 1, 1)
        ),
    ),
    "unflattened by attribute": (
        4,
        lambda: network(lambda m, x: m.apart(x).flatten(1, 2), apart=nn.Unflatten(1, (4, 2))),
    ),
    "maximum of neighbours": (
        4,
        lambda: network(lambda m, x: x.view(x.shape[0], -1, 2, 8, 8).max(2)[0], 4),
    ),
    "joined with coordinates": (
        8,
        lambda: network(lambda m, x: torch.cat([x, torch.ones(x.shape[0], 2, 8, 8)], 1), 10),
    ),
    "a container with a forward": (
        8,
        lambda: network(
            lambda m, x: m.both(x), both=Joined({"a": nn.Conv2d(8, 3, 1), "b": nn.Conv2d(8, 5, 1)})
        ),
    ),
    "sequences in sequences": (
        8,
        lambda: network(
            lambda m, x: m.inner(x),
            inner=nn.Sequential(
                nn.Sequential(nn.Conv2d(8, 6, 1)), nn.Sequential(nn.Conv2d(6, 8, 1))
            ),
        ),
    ),
    "positions mixed for each channel": (
        8,
        lambda: network(lambda m, x: m.mix(x.flatten(2)).reshape(x.shape), mix=nn.Linear(64, 64)),
    ),
    "one parameter in two roles": (
        8,
        lambda: network(
            lambda m, x: x * m.w[:, None, None] + m.w[None, :, None, None], w=parameter(8)
        ),
    ),
    "a dropout that gives back its input": (
        8,
        lambda: network(lambda m, x: F.relu_(m.drop(x - 1.0)) + x, drop=nn.Dropout()),
    ),
}
"""What can be cut, with the number of `second`'s channels that may go one by one."""


@pytest.mark.parametrize("name", CUT)
def test_followed_channels_can_be_cut(name: str) -> None:
    size, make = CUT[name]
    assert len(check(make()).groups["second"]) == size


FROZEN: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "a shape in the code": (
        NUMBER,
        lambda: network(lambda m, x: x.reshape(-1, 2, 4, 64).flip(-1).reshape(-1, 8, 8, 8)),
    ),
    "half of the width in an attribute": (
        NUMBER,
        lambda: network(lambda m, x: x.reshape(-1, m.half * 2, 8, 8), half=4),
    ),
    "halves swapped, by number": (
        NUMBER,
        lambda: network(lambda m, x: torch.cat([x[:, 4:], x[:, :4]], 1)),
    ),
    "a tensor of a fixed size": (NUMBER, lambda: network(lambda m, x: x + torch.zeros(8, 1, 1))),
    "a tensor that is no parameter": (
        FIXED,
        lambda: network(lambda m, x: x * m.q, q=torch.rand(8, 1, 1, dtype=torch.float64)),
    ),
    "expanded to a number": (
        NUMBER,
        lambda: network(lambda m, x: x * x.mean(1, keepdim=True).expand(-1, 8, -1, -1)),
    ),
    "an offset repeated": (
        FIXED,
        lambda: network(lambda m, x: x + m.w.repeat(x.shape[0], 1, 1, 1), w=parameter(1, 8, 1, 1)),
    ),
    "every other channel": ("every n-th channel", lambda: network(lambda m, x: x[:, ::2], 4)),
    "picked by a list": (
        ORDER,
        lambda: network(lambda m, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]]),
    ),
    "another operation for eight channels": (
        ELSE,
        lambda: network(lambda m, x: x * 2 if x.shape[1] == 8 else x),
    ),
    "another number for eight channels": (
        ELSE,
        lambda: network(lambda m, x: x * 2 - 1 if x.shape[1] == 8 else x * 3 - 1),
    ),
    "another order for eight channels": (
        ELSE,
        lambda: network(lambda m, x: x - x.tanh() if x.shape[1] == 8 else x.tanh() - x),
    ),
    "divided by the number of channels": (ELSE, lambda: network(lambda m, x: x / x.shape[1])),
    "a sum made a mean by hand": (
        ELSE,
        lambda: network(lambda m, x: x.sum(1, keepdim=True) / x.shape[1] * x),
    ),
    "the number of channels as a tensor": (
        ELSE,
        lambda: network(lambda m, x: x * torch.tensor(float(x.shape[1]))),
    ),
    "as many channels in as out": (
        ELSE,
        lambda: network(
            lambda m, x: m.conv(x) * 2 if m.conv.in_channels == m.conv.out_channels else m.conv(x),
            conv=nn.Conv2d(8, 8, 1),
        ),
    ),
    "rolled over channels": (ORDER, lambda: network(lambda m, x: torch.roll(x, 1, 1))),
    "mean over channels": (UNREAD, lambda: network(lambda m, x: x.mean(1, keepdim=True), 1)),
    "sorted": (ORDER, lambda: network(lambda m, x: x.sort(1)[0])),
    "summed one after the other": (
        ORDER,
        lambda: network(lambda m, x: x.cumsum(1)),
    ),
    "divided by the sum of all": (
        "reduced over every dimension",
        lambda: network(lambda m, x: x / x.sum()),
    ),
    "a product with itself": (
        PRODUCT,
        lambda: network(lambda m, x: x * torch.einsum("bchw,bdhw->bc", x, x)[..., None, None]),
    ),
    "pooled over tokens and channels": (
        POSITIONS,
        lambda: network(lambda m, x: maps(F.adaptive_avg_pool2d(tokens(x), (64, 8)))),
    ),
    "local response norm": (POSITIONS, lambda: network(lambda m, x: F.local_response_norm(x, 3))),
    "each channel an image": (
        "which mixes dimensions",
        lambda: network(lambda m, x: x.reshape(x.shape[0] * 8, 1, 8, 8).exp().reshape(x.shape)),
    ),
    "unflattened by number": (
        NUMBER,
        lambda: network(lambda m, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
    ),
    "channels along the height": (
        "convolved over as if they were positions",
        lambda: network(lambda m, x: m.conv(x.permute(0, 2, 1, 3)), conv=nn.Conv2d(8, 8, 1)),
    ),
    "picked by a mask": (
        "of a size that depends on the values",
        lambda: network(lambda m, x: x * x[x > 0.5].mean()),
    ),
    "places of values": (
        "of a size that depends on the values",
        lambda: network(lambda m, x: x + torch.nonzero(x > 0.5).shape[0]),
    ),
    "spectral norm": (
        "no rule for the operation 'mv'",
        lambda: network(
            lambda m, x: m.conv(x), conv=parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))
        ),
    ),
}
"""What is not followed, with the reason that the dependency graph gives for channels of
`second`."""


@pytest.mark.parametrize("name", FROZEN)
def test_other_channels_are_frozen_with_the_reason(name: str) -> None:
    reason, make = FROZEN[name]
    dependencies = check(make())
    assert any(reason in frozen.reason for frozen in dependencies.frozen if frozen.name == "second")
    assert "stem" in dependencies.groups


def test_filters_of_a_kernel_in_a_buffer_stay() -> None:
    model = network(
        lambda m, x: m.last(F.conv2d(x, m.edges)), last=nn.Conv2d(4, 8, 1), edges=Buffer(4, 8, 3, 3)
    )
    dependencies = check(model)
    assert "edges" not in dependencies.groups
    (frozen,) = [frozen for frozen in dependencies.frozen if frozen.name == "edges"]
    assert frozen.size == 4
    assert frozen.cause == "filters of a kernel that never trains, as it is in a buffer"


@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions_over_the_images_own_colours_stay(groups: int) -> None:
    """As the shift of the mean in networks for super-resolution."""
    shift = nn.Conv2d(3, 3, 1, groups=groups)
    model = nn.Sequential(shift, CUT["one minus"][1]()).double().eval()
    dependencies = check(model)
    assert "0" not in dependencies.groups
    assert "1.stem" in dependencies.groups
    assert any(frozen.name == "0" and frozen.size == 3 for frozen in dependencies.frozen)


def test_reasons_name_the_function_and_the_line_of_the_networks_code() -> None:
    def reason_of(step: Step) -> str:
        (reason,) = (f.reason for f in check(network(step)).frozen if f.name == "second")
        return reason

    place = "at tests/test_rules.py:"
    assert f"in cumprod() {place}" in reason_of(lambda m, x: x.cumprod(1))
    assert f"in cdist() {place}" in reason_of(lambda m, x: torch.cdist(x, x) + x)
    assert f"in getitem() {place}" in reason_of(lambda m, x: x[:, [0, 2, 1, 3, 4, 5, 6, 7]])


def test_without_a_line_of_its_own_the_module_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(2), nn.Conv2d(8, 5, 1))
    (reason, _) = (
        frozen.reason for frozen in build_dependency_graph(model, random_images()).frozen
    )
    assert reason.endswith("in local_response_norm() in module '1'")


def test_code_without_a_file_is_named_by_its_line() -> None:
    code = "\n\ndef step(model, x):\n    return x.cumsum(1)\n"
    namespace: dict[str, Any] = {}
    exec(compile(code, "<string>", "exec"), namespace)
    reasons = [f.reason for f in check(network(namespace["step"])).frozen if f.name == "second"]
    assert reasons == ["the order or the number of the channels matters, in cumsum() at line 4"]


def test_what_a_test_cut_changes_is_named() -> None:
    dependencies = check(network(lambda m, x: x.tanh() if x.shape[1] == 8 else x.sin()))
    (reason,) = [frozen.reason for frozen in dependencies.frozen if frozen.name == "second"]
    assert f"{ELSE}, in tanh() at tests/test_rules.py:" in reason


DEFORMABLE: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "a deformable convolution": (
        8,
        lambda: network(
            lambda m, x: m.conv(x, m.places(x)),
            7,
            conv=torchvision.ops.DeformConv2d(8, 7, 3, padding=1),
            places=nn.Conv2d(8, 18, 3, padding=1),
        ),
    ),
    "a deformable convolution with two sets of places": (
        4,
        lambda: network(
            lambda m, x: m.conv(x, m.places(x), m.mask(x).sigmoid()),
            conv=torchvision.ops.DeformConv2d(8, 8, 3, padding=1, groups=8),
            places=nn.Conv2d(8, 36, 3, padding=1),
            mask=nn.Conv2d(8, 18, 3, padding=1),
        ),
    ),
}


@pytest.mark.parametrize("name", DEFORMABLE)
def test_deformable_convolutions_are_followed(name: str) -> None:
    """Only the outputs: PyTorch's counter does not know the operation."""
    size, make = DEFORMABLE[name]
    model, images = make(), random_images(3).double()
    dependencies = build_dependency_graph(model, images[:2])
    assert len(dependencies.groups["second"]) == size
    (places,) = (f.cause for f in dependencies.frozen if f.name == "places")
    assert places == "places that a kernel reads"
    plan = random_plan(dependencies, 1)
    with torch.no_grad():
        outputs = apply_plan(model, dependencies, plan)(images)
    assert relative_error(outputs, masked_network(model, dependencies, plan)(images)) < 1e-6


def test_attention_of_torch_is_frozen() -> None:
    """Only the outputs: PyTorch's counter does not see into its fused attention."""
    model = network(
        lambda m, x: maps(m.attend(*[tokens(x)] * 3)[0]),
        attend=nn.MultiheadAttention(8, 2, batch_first=True),
    )
    images = random_images(3).double()
    dependencies = build_dependency_graph(model, images[:2])
    assert set(dependencies.groups) == {"stem", "attend.out_proj"}
    plan = random_plan(dependencies, 1)
    with torch.no_grad():
        outputs = apply_plan(model, dependencies, plan)(images)
    assert relative_error(outputs, masked_network(model, dependencies, plan)(images)) < 1e-6


def test_a_squeeze_without_dimensions_never_meets_a_single_channel() -> None:
    model = network(lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze()[:, :, None, None])
    images = random_images(3).double()
    dependencies = build_dependency_graph(model, images[:2])
    group = dependencies.groups["second"]
    assert len(group) == 7
    plan = PruningPlan({"second": tuple(range(6))}, Budget("macs", 0.5), "by hand")
    with torch.no_grad():
        outputs = apply_plan(model, dependencies, plan)(images)
    assert relative_error(outputs, masked_network(model, dependencies, plan)(images)) < 1e-6


def test_two_channels_of_one_index_are_distinguished() -> None:
    """A reshape to the shape of a map that another layer wrote, of as many channels."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
            self.head, self.second_head = nn.Linear(16, 5), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.one(x), self.other(x)
            logits: Tensor = self.head(one.reshape(other.shape).mean((2, 3)))
            return logits + self.second_head(other.mean((2, 3)))

    dependencies = check(Two().double().eval())
    assert not dependencies.groups


def test_one_attribute_with_two_numbers_is_not_changed() -> None:
    """Two parts of four channels from different layers, both sized by one attribute."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.first_half = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), 4
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.one(x).relu(), self.other(x).relu()
            parts = [
                one[:, : self.first_half],
                one[:, self.first_half :],
                other[:, : self.first_half],
            ]
            logits: Tensor = self.head(
                torch.cat([*parts, other[:, self.first_half :]], 1).mean((2, 3))
            )
            return logits

    dependencies = check(Halves().double().eval())
    assert any(NUMBER in frozen.reason for frozen in dependencies.frozen)


def test_one_parameter_under_three_names() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.layers = nn.ModuleList([nn.Conv2d(8, 6, 3)])
            self.again, self.kernel = self.layers[0], self.conv.weight
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.conv(x).relu()).relu().mean((2, 3)))

    model = Names().double().eval()
    dependencies = check(model)
    cut = apply_plan(model, dependencies, random_plan(dependencies, 1))
    assert cut.kernel is cut.get_parameter("conv.weight")
    assert cut.again is cut.get_submodule("layers.0")


@pytest.mark.parametrize("rank", [1, 3])
def test_signals_and_volumes_are_cut_like_images(rank: int) -> None:
    conv = nn.Conv1d if rank == 1 else nn.Conv3d
    norm = nn.BatchNorm1d if rank == 1 else nn.BatchNorm3d
    model = nn.Sequential(
        *(conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 6, 3), nn.ReLU()),
        *(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    model = model.double().eval()
    images = torch.randn(3, 3, *[4] * rank, dtype=torch.float64)
    dependencies = build_dependency_graph(model, images[:2])
    assert {name: len(group) for name, group in dependencies.groups.items()} == {"0": 8, "3": 6}
    assert_cut_is_equivalent(model, dependencies, random_plan(dependencies, 1), images, limit=1e-6)


@pytest.mark.parametrize("how", ["function", "method", "inner"])
def test_a_compiled_network_is_cut_as_it_was_before(how: str) -> None:
    plain = CUT["sequences in sequences"][1]()
    model: Any = torch.compile(plain) if how == "function" else plain
    if how == "method":
        model.compile()
    if how == "inner":
        model.inner.compile()
    images = random_images(3).double()
    dependencies = build_dependency_graph(model, images[:2])
    plan = random_plan(dependencies, 1)
    cut = apply_plan(model, dependencies, plan)
    assert type(cut) is Network
    assert (
        relative_error(cut.forward(images), masked_network(plain, dependencies, plan)(images))
        < 1e-6
    )


def test_a_network_of_half_precision_with_channels_last() -> None:
    model = CUT["padded by reflection"][1]().bfloat16().to(memory_format=torch.channels_last)
    images = random_images(3).bfloat16().contiguous(memory_format=torch.channels_last)
    dependencies = build_dependency_graph(model, images[:2])
    plan = random_plan(dependencies, 1)
    with torch.no_grad():
        outputs, expected = (
            apply_plan(model, dependencies, plan)(images),
            masked_network(model, dependencies, plan)(images),
        )
    assert outputs.dtype is torch.bfloat16
    assert isinstance(expected, Tensor)
    assert relative_error(outputs.float(), expected.float()) < 0.05


def test_of_an_example_only_the_shape_matters() -> None:
    model = CUT["one minus"][1]().bfloat16()
    of_floats = build_dependency_graph(model, random_images(2))
    of_its_own_type = build_dependency_graph(model, random_images(2).bfloat16())
    assert list(of_floats.groups) == list(of_its_own_type.groups) != []


def test_a_network_that_can_not_be_copied_is_refused() -> None:
    class Uncopied(nn.Conv2d):
        def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
            raise NotImplementedError("there is only one of it")

    with pytest.raises(TraceError, match="can't be copied: there is only one of it"):
        build_dependency_graph(nn.Sequential(Uncopied(3, 8, 3)), random_images(2))


@pytest.fixture(scope="module")
def doubling() -> Callable[[Tensor], Tensor]:
    """An operation of the user's own, `secateur_test::double`."""

    @torch.library.custom_op("secateur_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    return double


def test_an_operation_of_ones_own_needs_a_rule(doubling: Callable[[Tensor], Tensor]) -> None:
    model, images = network(lambda m, x: doubling(x)), random_images(3).double()
    reasons = [frozen.reason for frozen in build_dependency_graph(model, images[:2]).frozen]
    assert any("no rule for the operation 'secateur_test::double'" in why for why in reasons)

    dependencies = build_dependency_graph(
        model, images[:2], rules={"secateur_test::double": elementwise.keep}
    )
    assert len(dependencies.groups["second"]) == 8
    assert_cut_is_equivalent(model, dependencies, random_plan(dependencies, 1), images, limit=1e-6)


def test_a_rule_that_does_not_fit_its_operation_is_refused(
    doubling: Callable[[Tensor], Tensor],
) -> None:
    model, images = network(lambda m, x: doubling(x)), random_images(2).double()
    with pytest.raises(UsageError, match=r"'secateur_test::double' returns \[\] channels along"):
        build_dependency_graph(
            model, images, rules={"secateur_test::double": lambda propagation, node: ()}
        )


@pytest.mark.slow
def test_a_network_with_a_recurrent_layer_is_pruned_from_scores_to_refit() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(3, 12, 3), nn.LSTM(12, 4, batch_first=True)
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.lstm(F.relu(self.conv(x)).mean(2).transpose(1, 2))
            return self.head(states[:, -1])

    result = secateur.prune(Reader(), [random_images(40)], target="macs=0.7")
    lstm = result.model.get_submodule("lstm")
    assert isinstance(lstm, nn.LSTM)
    assert lstm.input_size == lstm.get_parameter("weight_ih_l0").shape[1] < 12
