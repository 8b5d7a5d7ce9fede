"""A single layer as an ONNX file, so that other engines can time it."""

from __future__ import annotations

from typing import Any

import torch

from secateur.graph.interpreter import with_sizes
from secateur.graph.layer_calls import LayerCall
from secateur.runtime.torch_internals import OpOverload, schema_of

OPSET = 17
"""Old enough for every engine."""
IR_VERSION = 8


def layer_file(call: LayerCall) -> bytes | None:
    """Return the ONNX file of a layer with arbitrary weights, whose only input is `x`.

    None for operations other than convolutions, transposed ones and linear layers in float32. Needs
    the package onnx.
    """
    from onnx import TensorProto, helper, numpy_helper

    values = [node.meta["val"] for node in call.node.all_input_nodes]
    if any(value.dtype != torch.float32 for value in values) or len(call.shapes) < 2:
        return None
    arguments = _arguments(call)
    attributes, operation, weight = _operation(str(call.node.target), arguments, call.shapes)
    if operation is None:
        return None
    first, *_ = call.shapes
    shapes = {"w": weight} if len(call.shapes) == 2 else {"w": weight, "b": call.shapes[2]}
    generator = torch.Generator().manual_seed(0)
    initializers = [
        numpy_helper.from_array(torch.randn(shape, generator=generator).numpy(), name)
        for name, shape in shapes.items()
    ]
    inputs = ["x", *shapes]
    if operation == "MatMul" and "b" in shapes:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["y"]),
        ]
    else:
        nodes = [helper.make_node(operation, inputs, ["y"], **attributes)]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(first))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    content: bytes = model.SerializeToString()
    return content


def _arguments(call: LayerCall) -> dict[str, Any]:
    """Return the arguments of a layer's operation by name, with their defaults."""
    args, kwargs = with_sizes(call.node, call.sizes)
    if not isinstance(call.node.target, OpOverload):
        return dict(kwargs)
    arguments = schema_of(call.node.target).arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _operation(
    target: str, arguments: dict[str, Any], shapes: tuple[tuple[int, ...], ...]
) -> tuple[dict[str, Any], str | None, tuple[int, ...]]:
    """Return ONNX's attributes, its operation (None: not known) and the shape of the weights."""
    first, weight, *_ = shapes
    if target.startswith("aten.linear."):
        return {}, "MatMul", weight[::-1]
    is_transposed = target.startswith("aten.conv_transpose")
    if not is_transposed and not target.startswith(("aten.conv1d", "aten.conv2d", "aten.conv3d")):
        return {}, None, weight
    axes = len(weight) - 2
    if len(first) != axes + 2:
        return {}, None, weight

    def by_axis(value: Any) -> list[int]:
        numbers = [value] if isinstance(value, int) else list(value)
        return [int(number) for number in numbers * (axes if len(numbers) == 1 else 1)]

    attributes: dict[str, Any] = {
        "strides": by_axis(arguments["stride"]),
        "dilations": by_axis(arguments["dilation"]),
        "group": int(arguments["groups"]),
    }
    if isinstance(arguments["padding"], str):
        attributes["auto_pad"] = "SAME_UPPER" if arguments["padding"] == "same" else "VALID"
    else:
        attributes["pads"] = by_axis(arguments["padding"]) * 2
    if is_transposed:
        attributes["output_padding"] = by_axis(arguments["output_padding"])
    return attributes, "ConvTranspose" if is_transposed else "Conv", weight
