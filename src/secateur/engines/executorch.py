"""ExecuTorch on the CPU, by its XNNPACK kernels, as an engine. Needs the package executorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from secateur.config import EngineName
from secateur.engines.engine import Action, Program
from secateur.engines.flat_network import flat_network, inputs_in
from secateur.engines.onnx_file import cause, quiet
from secateur.graph.layer_calls import Key, LayerCall
from secateur.graph.module_state import evaluating
from secateur.runtime.errors import ExportError, UsageError


class ExecuTorch:
    """Runs what ExecuTorch makes of a network for batches of one size.

    Its layers are timed as in PyTorch: to make a program of a single layer takes about a second,
    and a table of times has hundreds of layers and widths.
    """

    name: EngineName = "executorch"
    grid: int = 1

    def __init__(self) -> None:
        try:
            with quiet():
                import executorch.exir  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "ExecuTorch needs its package: pip install 'executorch>=1.5' "
                f"(no module {error.name})"
            ) from error
        self.version: str = metadata.version("executorch")

    def prepare(self, model: nn.Module, batch: Tensor) -> Action:
        """Return what runs a network on a batch; see `Engine`."""
        try:
            with quiet(), evaluating(model), torch.no_grad():
                run = load_program(make_program(model, batch))
        except Exception as error:  # ExecuTorch raises many unrelated types
            raise ExportError(f"ExecuTorch can't run the network: {cause(error)}") from error
        inputs = inputs_in(model, batch)
        return lambda: run(inputs)

    def layer_seconds(self, calls: Mapping[Key, LayerCall]) -> dict[Key, float]:
        """Return nothing: layers are timed in PyTorch."""
        return {}


def make_program(model: nn.Module, batch: Tensor) -> bytes:
    """Return the content of a network's `.pte` file, for batches of exactly this size.

    The network is in evaluation mode. Raises what ExecuTorch does, and `ImportError` without it.
    """
    return lowered(torch.export.export(flat_network(model), inputs_in(model, batch)))


def lowered(program: ExportedProgram) -> bytes:
    """Return the content of the `.pte` file of a program that torch exported.

    Raises what ExecuTorch does, and `ImportError` without it.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    content: bytes = edge.to_executorch().buffer
    return content


def load_executorch(path: Path) -> Program:
    """Return what runs a `.pte` file; see `load_program`."""
    return load_program(path.read_bytes())


def load_program(content: bytes) -> Program:
    """Return what runs a `.pte` file, on as many threads as PyTorch has.

    Programs that were loaded with another number of threads must not be run any more. Raises what
    ExecuTorch does.
    """
    with quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

    if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
    program = Runtime.get().load_program(content)
    program.load_method("forward")

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        # The method itself keeps neither the program nor the content in memory.
        outputs: Sequence[Tensor] = program.load_method("forward").execute(list(inputs))
        return outputs

    return run
