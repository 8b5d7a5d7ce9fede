"""An exported network has the outputs of the network, for any batch, or is refused by name."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import NETWORKS, SIDE, make_network, random_images, random_plan, wired
from secateur.experiments.program import Program, ProgramNetwork
from secateur.experiments.program_export import make_program
from secateur.graph.forward import with_inputs
from secateur.pruning.apply import apply_plan
from secateur.runtime.errors import TraceError, UsageError
from secateur.runtime.packed_inputs import Inputs


def rebuilt(model: nn.Module) -> ProgramNetwork:
    """Return a network that went through JSON."""
    program = make_program(model, random_images(2))
    read = Program.from_json(program.to_json(), program.constants)
    assert read == program
    return ProgramNetwork(read, {**program.constants, **model.state_dict()})


@pytest.mark.parametrize("name", NETWORKS)
def test_program_of_a_cut_network_is_bit_equal(name: str, generator: torch.Generator) -> None:
    model, dependencies = wired(name)
    smaller = apply_plan(model, dependencies, random_plan(dependencies, generator))
    network = rebuilt(smaller)
    with torch.inference_mode():
        for count in (1, 2, 5):
            images = random_images(count)
            assert torch.equal(network(images), smaller(images))
    assert network.state_dict().keys() <= smaller.state_dict().keys()
    assert count_of(network.parameters()) == count_of(smaller.parameters())


def count_of(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


class Sizes(nn.Module):
    """Sizes computed from the batch, a constant, a buffer that no state dict holds, and types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)
        self.offset: Tensor
        self.register_buffer("offset", torch.linspace(-1, 1, SIDE), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (x := self.conv(x)).shape
        x = x.reshape(n * c, h, w).double() + self.offset
        left, right = x.float().view(n, c, h * w).chunk(2, dim=2)
        x = torch.cat([left, right.clamp(max=float("inf"))], 2)
        x = x + torch.zeros(n, c, h * w, device=x.device, dtype=x.dtype)
        x = x * torch.tensor([0.5, 2.0]).sum()
        x = F.pad(x, (1, 0), value=float("-inf")).amax(2)
        logits: Tensor = self.linear(x)
        return logits


def test_program_with_sizes_constants_and_types(generator: torch.Generator) -> None:
    model = Sizes().eval()
    network = rebuilt(model)
    with torch.inference_mode():
        for count in (1, 2, 5):
            images = random_images(count)
            assert torch.equal(network(images), model(images))


def test_program_can_be_traced_again() -> None:
    network = rebuilt(make_network("gated"))
    assert rebuilt(network).state_dict().keys() == network.state_dict().keys()


def test_a_program_that_is_trained_stays_in_evaluation_mode() -> None:
    network = rebuilt(make_network("flattened"))
    images = random_images(3)
    before = network(images)
    assert torch.equal(network.train()(images), before)


def test_images_of_another_size_are_refused() -> None:
    network = rebuilt(make_network("chain"))
    with pytest.raises(UsageError, match=r"takes images \[image, 3×8×8\], not \[2, 3, 9, 8\]"):
        network(torch.zeros(2, 3, 9, 8))


def test_operation_outside_the_table_is_refused_by_name() -> None:
    class Distance(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x).mean((2, 3))

    with pytest.raises(TraceError, match=r"the operation aten\.cdist can't be part of a program"):
        make_program(Distance(), random_images(2))


def test_network_that_does_something_else_for_one_image_is_refused() -> None:
    class Squeezing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) * (2.0 if torch.compiler.is_compiling() else 1.0)

    with pytest.raises(TraceError, match="batch of 1"):
        make_program(Squeezing(), random_images(2))


def test_network_that_fixes_its_batch_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3 * SIDE * SIDE)

    with pytest.raises(TraceError, match=r"can't be traced|can't take a batch of 1"):
        make_program(Fixed(), random_images(2))


class Outputs(UserDict[str, Tensor]):
    pass


@dataclass
class Fields:
    heat: Tensor
    boxes: Tensor | None = None


Pair = namedtuple("Pair", "logits feature_map")


@pytest.mark.parametrize(
    "kind",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, [b, a]],
        lambda a, b: {"boxes": a, "levels": (b, None), 3: "text"},
        lambda a, b: Pair(a, b),
    ],
)
def test_a_program_returns_the_structure_of_the_network(kind: Callable[..., Any]) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return kind(x.mean((2, 3)), 2 * x)

    images = random_images(3)
    actual, expected = rebuilt(Several())(images), Several()(images)
    assert_same(actual, expected)
    if isinstance(expected, Pair):
        assert torch.equal(actual.feature_map, expected.feature_map)


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, tuple | list):
        assert isinstance(actual, tuple) == isinstance(expected, tuple)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def test_outputs_with_attributes_have_them_in_a_program() -> None:
    class Named(nn.Module):
        def __init__(self, kind: Callable[..., Any]) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor) -> Any:
            return self.kind(heat=x.relu())

    images = random_images(2)
    for kind in (Fields, Outputs):
        output = rebuilt(Named(kind))(images)
        assert torch.equal(output.heat, images.relu())
        assert torch.equal(output["heat"], output[0])
        assert not hasattr(output, "feet")
    with pytest.raises(TraceError, match="returns a SimpleNamespace: return tensors, or tuples"):
        make_program(Named(SimpleNamespace), images)


def test_several_inputs_are_those_of_the_program() -> None:
    class Beside(nn.Module):
        def forward(self, image: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            return image.mean((2, 3)) * features.sum(1, keepdim=True), image

    images, features = random_images(3), torch.rand(3, 5)
    for inputs in (
        Inputs(((3, SIDE, SIDE), (5,))),
        Inputs(((5,), (3, SIDE, SIDE)), "keywords", ("features", "image")),
    ):
        model = with_inputs(Beside(), inputs)
        order = (features, images) if inputs.names else (images, features)
        packed = inputs.pack(order)
        program = make_program(model, packed)
        read = Program.from_json(program.to_json(), {})
        assert read == program
        args, kwargs = inputs.arguments(order)
        assert_same(ProgramNetwork(read, {})(*args, **kwargs), Beside()(images, features))
        with pytest.raises(
            UsageError, match=r"takes 2 tensors: network\((image=|features=|\[image)"
        ):
            ProgramNetwork(read, {})(images)


def test_numbers_that_depend_on_the_batch_are_refused() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x.relu(), 2 * x.shape[0]

    with pytest.raises(TraceError, match="for a batch of 1 have another structure than for 2"):
        make_program(Counting(), random_images(2))


def test_a_program_of_version_1_is_read() -> None:
    text = """{"schema_version": 1, "image": "x", "image_shape": [3, 8, 8], "parameters": {},
    "buffers": {}, "output": "y",
    "operations": [["y", "aten.relu.default", [{"value": "x"}], {}]]}"""
    images = random_images(2)
    assert torch.equal(ProgramNetwork(Program.from_json(text, {}), {})(images), images.relu())
