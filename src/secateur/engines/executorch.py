"""ExecuTorch on the CPU, by its XNNPACK kernels. Needs the extra `executorch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from secateur.engines.flat_network import flat_network, inputs_in

Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Returns the outputs for inputs in the network's order."""


def make_program(model: nn.Module, batch: Tensor) -> bytes:
    """Return the content of a network's `.pte` file, for batches of exactly this size.

    The network is in evaluation mode. Raises what ExecuTorch does, and `ImportError` without it.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(flat_network(model), inputs_in(model, batch))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    content: bytes = edge.to_executorch().buffer
    return content


def load_program(content: bytes) -> Program:
    """Return what runs a `.pte` file, on as many threads as PyTorch has.

    Programs that were loaded with another number of threads must not be run any more. Raises what
    ExecuTorch does.
    """
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
