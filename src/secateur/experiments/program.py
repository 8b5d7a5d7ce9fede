"""A network as a list of ATen operations in JSON, which runs without the network's Python code.

`torch.export.save` is not used because loading its archives is not safe: `torch.export.load`
unpickles example inputs and constants, evaluates sizes with sympy and runs guards as Python. Here
an operation is a name in `OPERATIONS`, a table of tensor arithmetic without any operation that
reads files, runs code or returns uninitialised memory. An argument is a number, a text, a torch
type or the name of an earlier value. Nothing is compiled, evaluated or unpickled.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from secateur.engines.output_structure import Structure, put_together
from secateur.runtime.errors import RunFolderError, UsageError
from secateur.runtime.packed_inputs import Inputs, Passing
from secateur.runtime.torch_internals import schema_of

SCHEMA_VERSION = 2
"""Version 1 had one input and one tensor as output."""

OPERATIONS = frozenset(
    """
    _weight_norm abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d add addcmul addmm alias alpha_dropout amax amin arange
    argmax argmin argsort atan atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bitwise_and
    bitwise_not bitwise_or bmm broadcast_to cat ceil celu channel_shuffle chunk clamp clamp_max
    clamp_min clone constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d cos cumsum detach div dropout einsum elu eq erf exp expand
    expand_as eye feature_alpha_dropout feature_dropout fft_rfft fill flatten flip floor
    floor_divide full full_like gather ge gelu glu grid_sampler group_norm gru gt hardshrink
    hardsigmoid hardswish hardtanh imag index index_select instance_norm layer_norm le leaky_relu
    lerp lift_fresh_copy linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid
    log_softmax logical_and logical_not logical_or logsumexp lstm lt mT masked_fill matmul max
    max_pool1d max_pool2d max_pool3d maximum mean meshgrid min minimum mish mm movedim mul narrow
    native_channel_shuffle ne neg new_full new_ones new_zeros norm numpy_T ones ones_like pad
    permute pixel_shuffle pixel_unshuffle pow prelu prod real reciprocal relu relu6 remainder repeat
    repeat_interleave reshape reshape_as rms_norm roll round rsqrt rsub scaled_dot_product_attention
    select selu sigmoid sign silu sin slice softmax softplus softshrink sort split split_with_sizes
    sqrt square squeeze stack std stft sub sum swapaxes swapdims sym_size t tan tanh threshold tile
    to topk transpose tril triu true_divide type_as unbind unflatten unfold unsqueeze
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d var var_mean view view_as view_as_real where zero zeros
    zeros_like
    """.split()  # noqa: SIM905
)
"""ATen operations that a program may name, also in their in-place form, but not with `out=`."""
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
}
"""Arithmetic with sizes, and access to the results of operations that return several tensors."""
DEVICE = "images.device"
"""The value that stands for any device; the values of operations have no dot in their names."""


@dataclass(frozen=True)
class Operation:
    """One step: the call, its arguments, and the name of the resulting value."""

    value: str
    call: str
    """`aten.NAME.OVERLOAD` or `python.NAME`."""
    args: list[Any]
    """As in JSON: numbers, texts, lists, `{"value": N}`, `{"torch": N}`, `{"float": N}`."""
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Program:
    """The operations of a network, in order, for images of one size."""

    input_values: tuple[str, ...]
    """The value that stands for each of the network's inputs."""
    inputs: Inputs
    """Their shapes, such as `(rgb, height, width)`, for any number of images."""
    parameters: dict[str, str]
    """Name of a value -> dotted name of the parameter."""
    buffers: dict[str, str]
    """Name of a value -> dotted name of the buffer or constant."""
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    """The values that the network returns."""
    structure: Structure
    """How it returns them; see `output_structure`."""
    constants: dict[str, Tensor] = field(default_factory=dict, compare=False)
    """Tensors that are not in the network's state dict, by name; not part of the JSON."""

    def to_json(self) -> str:
        """Return the program as JSON text with its schema version, one operation a line."""
        head = {
            "schema_version": SCHEMA_VERSION,
            "inputs": {
                "values": self.input_values,
                "shapes": self.inputs.shapes,
                "passing": self.inputs.passing,
                "names": self.inputs.names,
            },
            "parameters": self.parameters,
            "buffers": self.buffers,
            "outputs": {"values": self.outputs, "structure": self.structure},
        }
        steps = [[step.value, step.call, step.args, step.kwargs] for step in self.operations]
        lines = ",\n".join(json.dumps(step, allow_nan=False) for step in steps)
        return json.dumps(head, indent=1)[:-2] + f',\n "operations": [\n{lines}\n]}}\n'

    @staticmethod
    def from_json(text: str, constants: Mapping[str, Tensor]) -> Program:
        """Return the program that `to_json` wrote; raise `RunFolderError` for any other text."""
        try:
            content = json.loads(text)
            version = content["schema_version"]
            if version == 1:
                content = _from_version_1(content)
            elif version != SCHEMA_VERSION:
                raise RunFolderError(
                    f"the program has schema version {version}, and this secateur reads up to "
                    f"{SCHEMA_VERSION}"
                )
            inputs, outputs = content["inputs"], content["outputs"]
            return Program(
                input_values=tuple(map(str, inputs["values"])),
                inputs=_inputs(inputs),
                parameters=_texts(content["parameters"]),
                buffers=_texts(content["buffers"]),
                operations=tuple(
                    Operation(str(value), str(call), list(args), dict(kwargs))
                    for value, call, args, kwargs in content["operations"]
                ),
                outputs=tuple(map(str, outputs["values"])),
                structure=dict(outputs["structure"]),
                constants=dict(constants),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunFolderError(f"the program can't be read: {error!r}") from error


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Return a program of version 1 in the form of today."""
    inputs = {"values": [content["image"]], "shapes": [content["image_shape"]]}
    outputs = {"values": [content["output"]], "structure": {"tensor": 0}}
    return {**content, "inputs": inputs, "outputs": outputs}


def _inputs(content: dict[str, Any]) -> Inputs:
    """Return the inputs that a program's JSON describes; raise `ValueError` if there are none."""
    shapes = tuple(tuple(int(size) for size in shape) for shape in content["shapes"])
    names = tuple(map(str, content.get("names", ())))
    passing = content.get("passing", "arguments")
    if passing not in get_args(Passing) or not shapes or len(shapes) != len(content["values"]):
        raise ValueError(f"inputs {content}")
    if passing in ("keywords", "dict") and len(names) != len(shapes):
        raise ValueError(f"inputs {content}")
    return Inputs(shapes, passing, names)


def _texts(table: dict[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in table.items()}


@dataclass(frozen=True)
class _Reference:
    """A reference to an earlier value, among the arguments."""

    value: str


@dataclass(frozen=True, eq=False)
class _Step:
    value: str
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    last_uses: tuple[str, ...]
    """Values that no later step reads."""


class ProgramNetwork(nn.Module):
    """Runs a program, always in evaluation mode; its state dict has the names of the network."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        """Make the network with the tensors that the program names.

        Raises:
            RunFolderError: A tensor is missing, or the program names an operation outside the
                table or a value before it is computed.
        """
        super().__init__()
        self._inputs, self._input_values = program.inputs, program.input_values
        self._outputs, self._structure = program.outputs, program.structure
        put_together(program.structure, [torch.empty(0)] * len(program.outputs))
        self._steps = _make_steps(program)
        self._names = {**program.parameters, **program.buffers}
        for name in dict.fromkeys(program.parameters.values()):
            self._place(name, tensors, is_parameter=True)
        for name in dict.fromkeys(program.buffers.values()):
            self._place(name, tensors, is_parameter=False)
        self.eval()

    def _place(self, name: str, tensors: Mapping[str, Tensor], *, is_parameter: bool) -> None:
        """Register a tensor under its dotted name."""
        if name not in tensors:
            raise RunFolderError(f"the program needs the tensor {name!r}, which is not there")
        path, _, last = name.rpartition(".")
        owner: nn.Module = self
        try:
            for part in path.split(".") if path else []:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            tensor = tensors[name].detach()
            if is_parameter:
                owner.register_parameter(last, nn.Parameter(tensor, tensor.is_floating_point()))
            else:
                owner.register_buffer(last, tensor)
        except (KeyError, AttributeError) as error:
            raise RunFolderError(f"the program can't name a tensor {name!r}: {error}") from error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns for its inputs, of any number of images.

        The inputs are passed as to the network: mostly one tensor `[image, channel, …]`. Of named
        tuples and other outputs with attributes these are the same, and the class is another.

        Raises:
            UsageError: The inputs don't have the sizes that the program was made for.
        """
        tensors = self._inputs.tensors(args, kwargs)
        for tensor, shape in zip(tensors, self._inputs.shapes, strict=True):
            if tuple(tensor.shape[1:]) != shape:
                expected = "×".join(str(size) for size in shape)
                raise UsageError(
                    f"the program takes images [image, {expected}], not {list(tensor.shape)}"
                )
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        values: dict[str, Any] = {value: state[name] for value, name in self._names.items()}
        values |= dict(zip(self._input_values, tensors, strict=True))
        values[DEVICE] = tensors[0].device
        for step in self._steps:
            args = tuple(_resolve(argument, values) for argument in step.args)
            kwargs = {name: _resolve(argument, values) for name, argument in step.kwargs.items()}
            values[step.value] = step.function(*args, **kwargs)
            for value in step.last_uses:
                del values[value]
        outputs = [values[name] for name in self._outputs]
        assert all(isinstance(output, Tensor) for output in outputs)
        return put_together(self._structure, outputs)


def _make_steps(program: Program) -> tuple[_Step, ...]:
    """Return the operations with their functions, looked up in the tables."""
    known = {*program.input_values, DEVICE, *program.parameters, *program.buffers}
    last_use: dict[str, int] = {}
    decoded: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = []
    for number, step in enumerate(program.operations):
        reads: list[str] = []
        args = [_decode(argument, reads) for argument in step.args]
        kwargs = {str(name): _decode(argument, reads) for name, argument in step.kwargs.items()}
        for value in reads:
            if value not in known:
                raise RunFolderError(f"the program reads {value!r} before it is there")
        if step.value in known:
            raise RunFolderError(f"the program writes {step.value!r} twice")
        known.add(step.value)
        last_use |= dict.fromkeys([*reads, step.value], number)
        decoded.append((_function(step.call), args, kwargs))
    for output in program.outputs:
        if output not in known:
            raise RunFolderError(f"the program returns {output!r}, which it does not compute")
    last_uses: dict[int, list[str]] = {}
    for value, number in last_use.items():
        if value not in (*program.outputs, DEVICE):
            last_uses.setdefault(number, []).append(value)
    return tuple(
        _Step(step.value, *call, last_uses=tuple(last_uses.get(number, ())))
        for number, (step, call) in enumerate(zip(program.operations, decoded, strict=True))
    )


def _function(call: str) -> Callable[..., Any]:
    """Return the operation of this name; raise `RunFolderError` if it is not in the tables."""
    space, _, rest = call.partition(".")
    if space == "python" and rest in ARITHMETIC:
        return ARITHMETIC[rest]
    name, _, overload = rest.partition(".")
    if space == "aten" and name.removesuffix("_") in OPERATIONS:
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and overload in packet.overloads():
            operation: Any = getattr(packet, overload)
            if not any(argument.is_out for argument in schema_of(operation).arguments):
                function: Callable[..., Any] = operation
                return function
    raise RunFolderError(
        f"the program calls {call!r}, which is not one of the operations that a program may name"
    )


def _decode(argument: Any, reads: list[str]) -> Any:
    """Return an argument from JSON; add the values that it names to `reads`."""
    if isinstance(argument, list):
        return [_decode(part, reads) for part in argument]
    if not isinstance(argument, dict):
        return argument
    match list(argument.items()):
        case [("value", str(name))]:
            reads.append(name)
            return _Reference(name)
        case [("float", "inf" | "-inf" | "nan" as number)]:
            return float(number)
        case [("torch", str(name))]:
            constant = getattr(torch, name, None)
            if isinstance(constant, torch.dtype | torch.layout | torch.memory_format):
                return constant
    raise RunFolderError(f"the program has an argument that is not understood: {argument}")


def _resolve(argument: Any, values: Mapping[str, Any]) -> Any:
    """Return an argument with values in place of references."""
    if isinstance(argument, _Reference):
        return values[argument.value]
    if isinstance(argument, list):
        return [_resolve(part, values) for part in argument]
    return argument
