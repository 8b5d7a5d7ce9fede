"""Export a network as a program: the operations of `torch.export`, translated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import Node

from secateur.engines.flat_network import flat_network, inputs_in, outputs_error, run_flat
from secateur.engines.output_structure import Structure, take_apart
from secateur.experiments.program import (
    ARITHMETIC,
    DEVICE,
    OPERATIONS,
    Operation,
    Program,
    ProgramNetwork,
)
from secateur.graph.forward import inputs_of
from secateur.graph.trace import export_program
from secateur.runtime.errors import RunFolderError, TraceError
from secateur.runtime.packed_inputs import Inputs
from secateur.runtime.torch_internals import OpOverload, schema_of

TOLERANCE = 1e-5
"""Largest relative difference between the outputs of a program and of its network."""
CHECKED_BATCHES = (1, 2, 3)
CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"})
"""Operations that only check assumptions; a program leaves them out."""

Images = Float[Tensor, "image *axis"]


def make_program(model: nn.Module, example: Images) -> Program:
    """Return the program of `model` in evaluation mode, for any number of images like `example`.

    `example` is what `model` takes, with several inputs in one tensor (`with_inputs`); the program
    takes them one by one.

    Raises:
        TraceError: `torch.export` can't trace the network, an operation is not in the table, or the
            outputs for 1, 2 or 3 images of noise differ from the network's.
    """
    try:
        _, structure = run_flat(model, example)
    except TraceError:
        raise
    except Exception as error:  # the network is the user's: it may raise anything
        raise TraceError(f"the network can't be run on {list(example.shape)}: {error}") from error
    is_plain = inputs_of(model) is None and structure == {"tensor": 0}
    network = model if is_plain else flat_network(model)
    inputs = inputs_of(model) or Inputs((tuple(example.shape[1:]),))
    exported = export_program(network, inputs_in(model, example))
    program = _program_of(exported, inputs, structure)
    _check_outputs(model, program, example)
    return program


def _program_of(exported: ExportedProgram, inputs: Inputs, structure: Structure) -> Program:
    tables: dict[InputKind, dict[str, str]] = {kind: {} for kind in InputKind}
    for spec in exported.graph_signature.input_specs:
        assert spec.arg.name is not None
        tables[spec.kind][spec.arg.name] = spec.target or spec.arg.name
    *nodes, last = exported.graph.nodes
    outputs = last.args[0]
    images = tables[InputKind.USER_INPUT]
    if len(images) != len(inputs.shapes) or not isinstance(outputs, tuple | list):
        raise TraceError("the network takes other inputs when it is exported")
    if tables[InputKind.CUSTOM_OBJ] or tables[InputKind.TOKEN]:
        raise TraceError("the network holds objects that are not tensors")
    if not all(isinstance(output, Node) for output in outputs):
        raise TraceError("the network returns something that does not depend on the images")
    used = {node.name for node in nodes if node.users}
    buffers = {**tables[InputKind.BUFFER], **tables[InputKind.CONSTANT_TENSOR]}
    program = Program(
        input_values=tuple(images),
        inputs=inputs,
        parameters={v: n for v, n in tables[InputKind.PARAMETER].items() if v in used},
        buffers={value: name for value, name in buffers.items() if value in used},
        operations=tuple(_operations(nodes)),
        outputs=tuple(output.name for output in outputs),
        structure=structure,
    )
    stored = exported.state_dict
    for name in program.buffers.values():
        if name not in stored:
            program.constants[name] = exported.constants[name]
    return program


def _operations(nodes: list[Node]) -> Iterator[Operation]:
    for node in nodes:
        if node.op == "placeholder":
            continue
        call = _call_of(node)
        if call is None:
            continue
        args = [_encode(argument, node) for argument in node.args]
        kwargs = {name: _encode(argument, node) for name, argument in node.kwargs.items()}
        yield Operation(node.name, call, args, kwargs)


def _call_of(node: Node) -> str | None:
    """Return the name of the node's operation in a program; None for a check."""
    target = node.target
    if isinstance(target, OpOverload):
        space, _, name = schema_of(target).name.partition("::")
        if space == "aten" and name in CHECKS:
            return None
        if space == "aten" and name.removesuffix("_") in OPERATIONS:
            return f"aten.{name}.{schema_of(target).overload_name or 'default'}"
        raise TraceError(f"the operation {space}.{name} can't be part of a program")
    for name, function in ARITHMETIC.items():
        if target is function:
            return f"python.{name}"
    raise TraceError(f"the operation {target} can't be part of a program")


def _encode(argument: Any, node: Node) -> Any:
    """Return an argument as JSON."""
    if isinstance(argument, Node):
        return {"value": argument.name}
    if isinstance(argument, torch.device):
        return {"value": DEVICE}
    if isinstance(argument, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(argument).removeprefix("torch.")}
    if isinstance(argument, list | tuple):
        return [_encode(part, node) for part in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    raise TraceError(f"{node.name} takes a {type(argument).__name__}, which JSON can't hold")


def _check_outputs(model: nn.Module, program: Program, example: Images) -> None:
    """Raise `TraceError` if the outputs of program and network differ."""
    tensors = {**program.constants, **model.state_dict()}
    try:
        network = ProgramNetwork(program, {name: t.contiguous() for name, t in tensors.items()})
    except RunFolderError as missing:  # the network saves its tensors under other names
        raise TraceError(str(missing)) from missing
    generator = torch.Generator().manual_seed(0)
    for count in CHECKED_BATCHES:
        images = torch.randn(count, *example.shape[1:], generator=generator).to(example)
        args, kwargs = program.inputs.arguments(inputs_in(model, images))
        try:
            with torch.no_grad():
                actual, _ = take_apart(network(*args, **kwargs))
            expected, structure = run_flat(model, images)
        except Exception as failure:  # the network is the user's: it may raise anything
            raise TraceError(
                f"exported, the network can't take a batch of {count}: {failure}"
            ) from failure
        if structure != program.structure:
            raise TraceError(
                f"the network's outputs for a batch of {count} have another structure than for "
                f"{len(example)}: it returns numbers that depend on the batch"
            )
        error = outputs_error(actual, expected)
        if not error <= TOLERANCE:
            raise TraceError(
                f"exported, the network has other outputs for a batch of {count}: "
                f"relative difference {error:.1e}"
            )
