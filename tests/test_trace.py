from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import Node

from networks import NETWORKS, Chain, InPlace, Shared, TiedWeights, random_images, wired
from secateur.graph.build import build_dependency_graph
from secateur.graph.forward import with_forward
from secateur.graph.interpreter import GraphInterpreter, run
from secateur.graph.module_state import evaluating, tensors_of
from secateur.graph.network_graph import operation_name
from secateur.graph.trace import trace
from secateur.models.divergence import relative_error
from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import FakeTensor, FakeTensorMode, fake_of


class Forward(nn.Module):
    """A convolution, and whatever a test does with its output."""

    def __init__(self, then: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.spatial = nn.Conv2d(6, 4, 3, padding=1)
        self.linear = nn.Linear(6 * 64, 4)
        self.then = then

    def forward(self, x: Tensor) -> object:
        return self.then(self, self.conv(x))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("count", [1, 5])
def test_the_graph_has_the_outputs_of_the_network(name: str, count: int) -> None:
    model, dependencies = wired(name)
    images = random_images(count)
    with torch.no_grad():
        outputs = run(dependencies.graph, tensors_of(model), images)
        assert relative_error(outputs, model(images)) < 1e-6


def test_the_graph_runs_with_the_parameters_that_it_is_given() -> None:
    model, other = Chain().eval(), Chain().eval()
    images = random_images()
    graph = trace(model, images)
    with torch.no_grad():
        assert relative_error(run(graph, tensors_of(other), images), other(images)) < 1e-6
        assert relative_error(other(images), model(images)) > 1e-2


def test_running_a_graph_leaves_the_images_and_the_parameters_alone() -> None:
    model = InPlace().eval()
    images = random_images()
    graph = trace(model, images)
    state = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    before = images.clone()
    run(graph, state, images)
    assert torch.equal(images, before)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors_of(model).items())


def _relu_after_flatten(self: nn.Module, x: Tensor) -> Tensor:
    y = x.flatten(1)
    x.relu_()
    return F.linear(y, self.get_parameter("linear.weight"))


def _relu_after_slice(self: nn.Module, x: Tensor) -> Tensor:
    y = x[:, :, ::2, ::2]
    F.relu_(x)
    return F.conv2d(y, self.get_parameter("spatial.weight"))


def _relu_after_dropout(self: nn.Module, x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, self.training)
    x.relu_()
    return F.conv2d(y, self.get_parameter("spatial.weight"))


def _relu_of_a_view(self: nn.Module, x: Tensor) -> Tensor:
    x.flatten(1).relu_()
    return F.conv2d(x, self.get_parameter("spatial.weight"))


def _sum_into_itself(self: nn.Module, x: Tensor) -> Tensor:
    x += x.sigmoid()
    x *= 2
    return F.conv2d(x, self.get_parameter("spatial.weight"))


def _chunk_in_place(self: nn.Module, x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    one *= 2
    other += one
    return F.conv2d(x, self.get_parameter("spatial.weight"))


def _slices_in_place(self: nn.Module, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    rows = y[:, :, 1:]
    y[:, :2] = x[:, 4:]
    y[:, 2:] = x[:, :4]
    rows[..., 0] = 1
    y.select(3, 1)[:, 0].zero_()
    rows.transpose(1, 2).unsqueeze(1).add_(0.5)
    return F.conv2d(y, self.get_parameter("spatial.weight")) + rows.mean()


def _mask_and_list_in_place(self: nn.Module, x: Tensor) -> Tensor:
    x[x < 0] = 0.25
    x[..., [0, 2]] += 1
    return F.conv2d(x, self.get_parameter("spatial.weight"))


def _truth_in_place(self: nn.Module, x: Tensor) -> Tensor:
    y = x.gt_(0) + 0.5
    return F.conv2d(x + y, self.get_parameter("spatial.weight"))


def _diagonal_in_place(self: nn.Module, x: Tensor) -> Tensor:
    y = x.flatten(1).clone()
    y.fill_diagonal_(0)
    x.diagonal(dim1=2, dim2=3).mul_(3)
    for row in x.unbind(2):
        row.sub_(0.1)
    return F.conv2d(x + y.view_as(x), self.get_parameter("spatial.weight"))


def _into_out(self: nn.Module, x: Tensor) -> Tensor:
    y, values, places = x.clone(), x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1]).long()
    torch.multiply(x, x, out=y)
    torch.max(x, -1, out=(values, places))
    return F.conv2d(y + values[..., None], self.get_parameter("spatial.weight"))


def _in_place_variants(self: nn.Module, x: Tensor) -> Tensor:
    x.clip_(-1, 1).multiply_(2).negative_()
    F.elu_(x)
    x.swapaxes(1, 2).subtract_(1)
    return F.conv2d(x, self.get_parameter("spatial.weight"))


def _shape_in_place(self: nn.Module, x: Tensor) -> Tensor:
    y = x.exp()
    y.unsqueeze_(1).transpose_(2, 3)
    y.add_(1)
    y.swapaxes_(3, 2).squeeze_(1)
    return F.conv2d(y * x, self.get_parameter("spatial.weight"))


def _view_of_another_order(self: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(torch.kron(x, x.new_ones(1, 2)), self.get_parameter("spatial.weight"))


@torch.library.custom_op("secateur_test::halve", mutates_args={"x"})
def halve(x: Tensor) -> None:
    """An operation of one's own that writes in place and returns nothing."""
    x.div_(2)


def _own_operation_in_place(self: nn.Module, x: Tensor) -> Tensor:
    halve(x)
    halve(x[:, :2])
    return F.conv2d(x, self.get_parameter("spatial.weight"))


@pytest.mark.parametrize(
    "then",
    [
        _relu_after_flatten,
        _relu_after_slice,
        _relu_after_dropout,
        _relu_of_a_view,
        _sum_into_itself,
        _chunk_in_place,
        _slices_in_place,
        _mask_and_list_in_place,
        _truth_in_place,
        _diagonal_in_place,
        _into_out,
        _in_place_variants,
        _shape_in_place,
        _view_of_another_order,
        _own_operation_in_place,
    ],
)
def test_a_value_written_in_place_is_followed(then: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Forward(then).eval()
    images = random_images()
    graph = trace(model, images)
    shapes: dict[Node, torch.Size] = {}

    def note(node: Node) -> Callable[[Any], None]:
        def keep(value: Any) -> None:
            if isinstance(value, Tensor):
                shapes[node] = value.shape

        return keep

    after = {node: note(node) for node in graph.nodes}
    with torch.no_grad():
        output = run(graph, tensors_of(model), images, after=after)
        assert relative_error(output, model(images)) < 1e-6
    for node, shape in shapes.items():
        assert node.meta["val"].shape[1:] == shape[1:], node


def test_a_write_into_sliding_windows_is_refused() -> None:
    def then(self: nn.Module, x: Tensor) -> Tensor:
        x.unfold(2, 2, 2).zero_()
        return x

    with pytest.raises(TraceError, match="writes in place into what 'unfold' returns"):
        trace(Forward(then), random_images())


def test_one_image_is_enough_to_trace_with_an_open_batch_dimension() -> None:
    model, images = Chain().eval(), random_images(5)
    graph = trace(model, images[:1])
    with torch.no_grad():
        assert relative_error(run(graph, tensors_of(model), images), model(images)) < 1e-6


def test_a_branch_on_the_data_is_refused() -> None:
    def then(self: nn.Module, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="can't be traced"):
        trace(Forward(then), random_images())


class Gate(nn.Module):
    """A branch on the data inside a module."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_refused_branch_is_found_by_its_module_and_says_what_to_do() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.ReLU(), Gate()))
    with pytest.raises(TraceError, match=r"in module '1\.1'\): choose by torch\.where") as caught:
        trace(network, random_images())
    assert "\n" not in str(caught.value)


def test_both_branches_of_a_cond_are_followed() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)
            self.one, self.other = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 10, 1)
            self.one_head, self.other_head = nn.Conv2d(12, 4, 1), nn.Conv2d(10, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))

            def one(y: Tensor) -> Tensor:
                return self.one_head(F.relu(self.one(y)))  # type: ignore[no-any-return]

            def other(y: Tensor) -> Tensor:
                return self.other_head(F.relu(self.other(y)))  # type: ignore[no-any-return]

            value: Tensor = torch.cond(self.gate(x).mean() > 0, one, other, (x,))
            return value

    model, images = Conditional().eval(), random_images(3)
    dependencies = build_dependency_graph(model, images)
    assert list(dependencies.groups) == ["stem", "one", "other"]
    for bias in (9.0, -9.0):
        nn.init.constant_(model.gate.bias, bias)  # type: ignore[arg-type]
        expected = (model.one_head, model.other_head)[int(bias < 0)]
        layer = (model.one, model.other)[int(bias < 0)]
        with torch.no_grad():
            outputs = run(dependencies.graph, tensors_of(model), images)
            features = F.relu(model.stem(images))
            torch.testing.assert_close(outputs, expected(F.relu(layer(features))))


def test_an_error_of_the_network_itself_is_reported_in_one_line() -> None:
    def then(self: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("the moon is full\nand more")

    with pytest.raises(TraceError, match="the moon is full") as caught:
        trace(Forward(then), random_images())
    assert "\n" not in str(caught.value)


def test_the_data_of_a_tensor_is_followed() -> None:
    def then(self: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([x.data, torch.zeros_like(x).data], dim=1) * 2

    model, images = Forward(then).eval(), random_images()
    graph = trace(model, images)
    with torch.no_grad():
        assert relative_error(run(graph, tensors_of(model), images), model(images)) < 1e-6


def test_a_tensor_that_the_graph_can_not_hold_is_named_with_its_place() -> None:
    def then(self: nn.Module, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            copied = x.data
        return x + copied

    with pytest.raises(TraceError, match=r"can't hold, and reads it in add\(\) at tests/test_tr"):
        trace(Forward(then), random_images())


def test_a_network_may_have_two_outputs_but_not_where_one_is_asked_for() -> None:
    graph = trace(Forward(lambda self, x: {"one": x, "two": x + 1}), random_images())
    assert len(graph.outputs) == 2
    with pytest.raises(TraceError, match="must return one tensor, not 2"):
        _ = graph.output


def test_a_part_of_a_network_is_traced_by_a_function() -> None:
    model, images = Chain().eval(), random_images()

    def first_half(model: Chain, images: Tensor) -> Tensor:
        return F.relu(model.bn1(model.conv1(images)))

    graph = trace(with_forward(model, first_half), images)
    used = {name for node, name in graph.tensor_names.items() if node.users}
    assert "conv1.weight" in used
    assert "linear.weight" not in used
    with torch.no_grad():
        outputs = run(graph, tensors_of(model), images)
        assert relative_error(outputs, first_half(model, images)) < 1e-6


@pytest.mark.parametrize("enabled", [False, True])
def test_a_region_with_a_precision_of_its_own(enabled: bool) -> None:
    def then(self: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return F.conv2d(x, self.get_parameter("spatial.weight")) * 2

    model, images = Forward(then).eval(), random_images()
    if enabled:
        with pytest.raises(TraceError, match="switches automatic mixed precision on"):
            trace(model, images)
        return
    graph = trace(model, images)
    with torch.no_grad():
        assert relative_error(run(graph, tensors_of(model), images), model(images)) < 1e-6


def test_a_network_with_two_inputs_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(TraceError, match="can't be traced"):
        trace(Two(), random_images())


def _mixed_modes(model: nn.Module) -> dict[str, bool]:
    model.train()
    model.get_submodule("bn1").eval()
    return {name: module.training for name, module in model.named_modules()}


def test_tracing_leaves_every_modules_mode_alone() -> None:
    model = Chain()
    modes = _mixed_modes(model)
    trace(model, random_images())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2


def test_modes_come_back_after_an_error() -> None:
    model = Chain()
    modes = _mixed_modes(model)

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_tensors_are_listed_by_each_of_their_names() -> None:
    tensors = tensors_of(TiedWeights())
    assert tensors["one.weight"].data_ptr() == tensors["other.weight"].data_ptr()
    assert "stem.1.running_var" in tensors
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_taps_see_and_replace_values() -> None:
    model, dependencies = wired("chain")
    graph, state, images = dependencies.graph, tensors_of(model), random_images()
    relu = next(node for node in graph.nodes if operation_name(node) == "relu")
    linear = next(node for node in graph.nodes if operation_name(node) == "linear")
    seen: list[Tensor] = []
    plain = run(graph, state, images, after={relu: seen.append})
    assert seen[0].shape == (3, 6, 8, 8)
    assert float(seen[0].min()) == 0
    assert torch.equal(run(graph, state, images, after={relu: lambda value: value + 0}), plain)
    interpreter = GraphInterpreter(graph, state, images)
    interpreter.advance(overrides={linear: lambda lookup: lookup(linear.all_input_nodes[0]) * 0})
    assert interpreter.value(graph.output).shape == (3, 7)
    assert not interpreter.value(graph.output).any()
    again = run(graph, state, images, after={relu: torch.zeros_like})
    assert not torch.allclose(again, plain)


def test_running_step_by_step_arrives_where_a_run_does() -> None:
    model, dependencies = wired("residual")
    graph, state, images = dependencies.graph, tensors_of(model), random_images()
    interpreter = GraphInterpreter(graph, state, images)
    for node in graph.nodes:
        if node.op == "call_function":
            value = interpreter.step(node)
            assert value.shape[0] == 3
    assert torch.equal(interpreter.value(graph.output), run(graph, state, images))


def test_a_copy_does_not_disturb_its_original() -> None:
    model, dependencies = wired("residual")
    graph, state, images = dependencies.graph, tensors_of(model), random_images()
    relus = [node for node in graph.nodes if operation_name(node) == "relu"]
    interpreter = GraphInterpreter(graph, state, images)
    interpreter.advance(relus[1])
    copied = interpreter.copy()
    copied.advance(after={relus[1]: torch.zeros_like})
    interpreter.advance()
    assert torch.equal(interpreter.value(graph.output), run(graph, state, images))
    assert not torch.equal(copied.value(graph.output), interpreter.value(graph.output))


def test_parameters_are_looked_up_when_they_are_used() -> None:
    model, dependencies = wired("chain")
    graph, images = dependencies.graph, random_images()
    state = dict(tensors_of(model))
    interpreter = GraphInterpreter(graph, state, images)
    interpreter.advance(next(node for node in graph.nodes if operation_name(node) == "linear"))
    state["linear.weight"] = torch.zeros_like(state["linear.weight"])
    interpreter.advance()
    assert torch.equal(interpreter.value(graph.output), state["linear.bias"].expand(3, -1))


def test_values_that_nobody_needs_any_more_are_dropped() -> None:
    model, dependencies = wired("shared")
    relu = next(node for node in dependencies.graph.nodes if operation_name(node) == "relu")
    interpreter = GraphInterpreter(dependencies.graph, tensors_of(model), random_images())
    interpreter.step(relu)
    assert interpreter.value(relu).shape == (3, 5, 8, 8)
    interpreter.advance()
    with pytest.raises(KeyError):
        interpreter.value(relu)


def test_a_module_used_twice_is_two_operations_with_one_kernel() -> None:
    graph = trace(Shared(), random_images())
    convolutions = [node for node in graph.nodes if operation_name(node) == "conv2d"]
    kernels = [graph.tensor_names[node.all_input_nodes[1]] for node in convolutions]
    assert kernels == ["stem.0.weight", "twice.weight", "twice.weight", "last.weight"]


def test_a_fake_of_a_tensor_is_as_its_mode_makes_it() -> None:
    mode = FakeTensorMode()
    tensor = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    with mode:
        made = nn.Parameter(torch.empty_strided(tensor.shape, tensor.stride()), requires_grad=False)
    for real in (tensor, nn.Parameter(tensor)):
        fake = fake_of(real, mode)
        assert isinstance(fake, FakeTensor)
        assert isinstance(fake, nn.Parameter) == isinstance(real, nn.Parameter)
        assert (fake.shape, fake.stride(), fake.dtype) == (made.shape, made.stride(), made.dtype)
        assert fake.device == made.device == torch.device("cpu")
        assert not fake.requires_grad
