"""A program names only tensor arithmetic, and is refused if it is malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from secateur.experiments.program import OPERATIONS, Operation, Program, ProgramNetwork
from secateur.runtime.errors import RunFolderError
from secateur.runtime.packed_inputs import Inputs


def test_every_operation_in_the_table_exists() -> None:
    assert all(hasattr(torch.ops.aten, name) for name in OPERATIONS)


def test_no_operation_in_the_table_reaches_out_of_the_tensors() -> None:
    forbidden = {"from_file", "set", "as_strided", "resize", "empty", "new_empty", "empty_like"}
    assert not OPERATIONS & forbidden
    for name in OPERATIONS:
        for overload in getattr(torch.ops.aten, name).overloads():
            arguments = getattr(getattr(torch.ops.aten, name), overload)._schema.arguments
            kinds = {str(argument.type) for argument in arguments}
            assert not {kind for kind in kinds if "Storage" in kind or "file" in kind}
            assert not {argument.name for argument in arguments} & {"filename", "ptr", "data_ptr"}


def program_of(*operations: tuple[str, list[Any]]) -> Program:
    """Runs operations on the images `x`; their values are `v0`, `v1`, …, the last is returned."""
    steps = tuple(Operation(f"v{i}", call, args, {}) for i, (call, args) in enumerate(operations))
    return one_tensor({}, steps, f"v{len(steps) - 1}")


def one_tensor(parameters: dict[str, str], steps: tuple[Operation, ...], output: str) -> Program:
    """Return a program with the images `x` as input and one tensor as output."""
    inputs = Inputs(((3, 4, 4),))
    return Program(("x",), inputs, parameters, {}, steps, (output,), {"tensor": 0})


def test_a_program_written_by_hand_runs() -> None:
    network = ProgramNetwork(program_of(("aten.relu.default", [{"value": "x"}])), {})
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(network(images), images.relu())


@pytest.mark.parametrize(
    "call",
    [
        *("aten.from_file.default", "aten.as_strided.default", "aten.set_.source_Tensor"),
        *(
            "aten.relu.nothing",
            "aten.relu.out",
            "aten.relu",
            "aten.relu.__class__",
            "aten.__class__.default",
        ),
        *("prims.add.default", "python.system", "python.eval", "os.system", "relu", "", "python."),
        *("python.getitem.__self__", "aten.relu.default.__class__", "aten._print.default"),
    ],
)
def test_a_call_outside_the_tables_is_refused(call: str) -> None:
    with pytest.raises(RunFolderError, match="not one of the operations"):
        ProgramNetwork(program_of((call, [{"value": "x"}])), {})


@pytest.mark.parametrize(
    "argument",
    [
        *({"torch": "load"}, {"torch": "os"}, {"torch": "__builtins__"}, {"float": "1"}),
        *({"value": 1}, {"value": "x", "torch": "float32"}, {}, {"eval": "1"}),
    ],
)
def test_an_argument_of_another_kind_is_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match="an argument that is not understood"):
        ProgramNetwork(program_of(("aten.relu.default", [argument])), {})


def test_values_come_before_they_are_read() -> None:
    later = program_of(("aten.relu.default", [{"value": "v1"}]), ("aten.relu.default", []))
    with pytest.raises(RunFolderError, match="reads 'v1' before it is there"):
        ProgramNetwork(later, {})
    nothing = one_tensor({}, (), "y")
    with pytest.raises(RunFolderError, match="returns 'y'"):
        ProgramNetwork(nothing, {})
    relu = Operation("x", "aten.relu.default", [{"value": "x"}], {})
    with pytest.raises(RunFolderError, match="writes 'x' twice"):
        ProgramNetwork(one_tensor({}, (relu,), "x"), {})


@pytest.mark.parametrize("name", ["forward", "training", "_steps", "__class__", "a..b", "", "a."])
def test_a_tensor_does_not_take_the_place_of_anything_else(name: str) -> None:
    program = one_tensor({"p": name}, (), "x")
    with pytest.raises(RunFolderError, match="can't name a tensor"):
        ProgramNetwork(program, {name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("schema_version", 3), ("operations", [1]), ("operations", None), ("inputs", {})),
        *(("inputs", {"values": ["x"], "shapes": [["a"]]}), ("outputs", [])),
        ("inputs", {"values": ["x"], "shapes": [[3, 4, 4]], "passing": "eval"}),
        *(("parameters", []), ("operations", [["v", "aten.relu.default", 1, {}]])),
    ],
)
def test_text_that_is_not_a_program_is_refused(key: str, value: Any) -> None:
    content = json.loads(program_of(("aten.relu.default", [{"value": "x"}])).to_json())
    with pytest.raises(RunFolderError, match="schema version 3" if value == 3 else "can't be read"):
        Program.from_json(json.dumps({**content, key: value}), {})
    del content[key]
    with pytest.raises(RunFolderError, match="can't be read"):
        Program.from_json(json.dumps(content), {})
