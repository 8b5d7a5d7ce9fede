"""Quantise a network in PyTorch, for ExecuTorch and for the compiler of `torch.compile`.

Both take the program that torch exports, with the observers of torchao: the ranges that batches of
images give become its scales. Needs the package torchao, and ExecuTorch's file executorch.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph
from torch.nn import functional

from secateur.engines.bias_correction import STEPS, with_corrected_biases
from secateur.engines.engine import Program
from secateur.engines.executorch import load_executorch, lowered
from secateur.engines.flat_network import flat_network, inputs_in, outputs_error
from secateur.engines.onnx_file import cause, quiet
from secateur.engines.output_structure import take_apart
from secateur.graph.module_state import evaluating
from secateur.graph.trace import open_batch
from secateur.runtime.atomic_io import move_file
from secateur.runtime.errors import ExportError, UsageError
from secateur.runtime.timing import repeat_to_batch
from secateur.runtime.torch_internals import compile_ahead_of_time, load_compiled

FUNCTIONS: dict[Any, Callable[..., object]] = {
    torch.ops.aten.conv2d.default: functional.conv2d,
    torch.ops.aten.linear.default: functional.linear,
    torch.ops.aten.relu.default: functional.relu,
    torch.ops.aten.relu_.default: functional.relu,
    torch.ops.aten.hardtanh.default: functional.hardtanh,
    torch.ops.aten.hardtanh_.default: functional.hardtanh,
    torch.ops.aten.hardswish.default: functional.hardswish,
    torch.ops.aten.hardswish_.default: functional.hardswish,
    torch.ops.aten.add.Tensor: operator.add,
    torch.ops.aten.add_.Tensor: operator.add,
}
"""Functions of operations that torchao quantises for x86."""
TOLERANCE = 0.1
"""Relative, of the outputs of a quantised network's file: values may round either way."""
X86_STEPS = 127.5
"""Steps that torchao's observer for x86 divides the largest weight by."""


def check_torchao() -> None:
    """Raise `UsageError` if the package that quantises programs is missing."""
    _check("torchao", "torchao>=0.18")


def check_executorch() -> None:
    """Raise `UsageError` if a package that quantises for ExecuTorch is missing."""
    check_torchao()
    _check("executorch", "executorch>=1.5")


def quantise_executorch(network: nn.Module, target: Path, batches: Sequence[Tensor]) -> None:
    """Write the int8 `.pte` of a network, for one image at a time: weights in int8 by channel.

    The `batches` are run to find the range of each activation, and to correct the biases. Raises
    `ExportError`, and `UsageError` without the packages.
    """
    check_executorch()
    with quiet():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    network = with_corrected_biases(network, batches, STEPS)
    images = torch.cat(list(batches)).split(1)
    _write(network, quantizer, images, target, _write_pte, load_executorch, has_open_batch=False)


def quantise_aotinductor(network: nn.Module, target: Path, batches: Sequence[Tensor]) -> None:
    """Write the int8 `.pt2` of a network for x86 processors: weights in int8 by channel.

    The `batches` are run to find the range of each activation, and to correct the biases. Raises
    `ExportError`, and `UsageError` without torchao.
    """
    check_torchao()
    with quiet():
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    network = with_corrected_biases(network, batches, X86_STEPS)
    arguments = network, quantizer, batches, target, compile_ahead_of_time, load_compiled
    _write(*arguments, has_open_batch=True)


def _write(
    network: nn.Module,
    quantizer: Any,
    batches: Sequence[Tensor],
    target: Path,
    make: Callable[[ExportedProgram, Path], object],
    load: Callable[[Path], Program],
    *,
    has_open_batch: bool,
) -> None:
    """Write what `make` makes of the quantised program of a network, and check its outputs."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def export(module: nn.Module) -> ExportedProgram:
        size = torch.export.Dim.DYNAMIC if has_open_batch else None
        shapes = open_batch(module, size, len(example))
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)

    # A batch of one image would be taken for the only size.
    example = inputs_in(network, repeat_to_batch(batches[0], 1 + has_open_batch))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / target.name
        try:
            with quiet(), evaluating(network), torch.no_grad():
                module: Any = export(flat_network(network)).module()
                name_functions(module.graph)
                observed = prepare_pt2e(module, quantizer)
                for images in batches:
                    observed(*inputs_in(network, images))
                quantised = export(convert_pt2e(observed))
                if not any("quantize" in str(node.target) for node in quantised.graph.nodes):
                    raise ExportError("torchao knows none of its layers")
                make(quantised, draft)
                expected, _ = take_apart(quantised.module()(*example))
                difference = outputs_error(load(draft)(example), expected)
            if not difference < TOLERANCE:
                raise ExportError(
                    "the compiled file's outputs differ from those of the quantised network: "
                    f"relative difference {difference:.2f}"
                )
        except Exception as error:  # torchao and the compilers raise many unrelated types
            raise ExportError(f"the network can't be quantised: {cause(error)}") from error
        move_file(draft, target)


def name_functions(graph: Graph) -> None:
    """Note at the operations of a graph which function each is, where the exporter has not.

    torchao's quantiser for x86 looks for layers by these notes, and the exporter leaves them out
    where a network calls operations itself, as one that is loaded without its code does. Without
    them nothing is quantised, and nothing is said (torchao 0.18).
    """
    for node in graph.nodes:
        if node.target in FUNCTIONS:
            node.meta.setdefault("source_fn_stack", [(node.name, FUNCTIONS[node.target])])


def _write_pte(program: ExportedProgram, path: Path) -> None:
    path.write_bytes(lowered(program))


def _check(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UsageError(f"int8 needs its package: pip install '{extra}' (no module {package})")
