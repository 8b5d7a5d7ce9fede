"""Export a network to ONNX, check the file against PyTorch, and time both in several engines.

`export_onnx` writes the file and does the ONNX check: `_relative_difference` runs the file in
onnxruntime, and only a file whose outputs agree with PyTorch's to `TOLERANCE` is kept.
`compare_latency` times it. Needs the extra `export` (onnx, onnxscript, onnxruntime).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.config import EngineName
from secateur.engines.file_engine import FileEngine
from secateur.engines.flat_network import inputs_in, outputs_error, run_flat
from secateur.engines.onnx_file import Images, cause, check_packages, write_onnx
from secateur.engines.onnxruntime import onnx_runner
from secateur.engines.registry import find_engine
from secateur.experiments.exported_file import check_suffix, written_whole
from secateur.graph.forward import with_forward, with_inputs
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.network_graph import Forward
from secateur.graph.wrappers import unwrapped
from secateur.runtime.errors import ExportError
from secateur.runtime.packed_inputs import Inputs, Parameters, parameters_of, read_inputs
from secateur.runtime.timing import Rounds, interleaved_medians

SUFFIX = ".onnx"
TOLERANCE = 1e-4
"""Relative difference from PyTorch's outputs below which a file is kept."""
CHECKED_BATCHES = (1, 3, 8)
"""Batch sizes with which the file is checked, besides that of the example."""
LATENCY_BATCHES = (1, 16)
"""Batch sizes that are timed."""
LATENCY_ROUNDS = Rounds(fewest=5, most=31, seconds=20.0, warm_up=2)


@dataclass(frozen=True)
class ExportResult:
    """An ONNX file that has passed the check."""

    path: Path
    bytes: int
    opset: int
    error: float
    """Largest difference from PyTorch's outputs, relative to the largest absolute output."""
    batches: tuple[int, ...]
    """Batch sizes that were checked."""


@dataclass(frozen=True)
class Latency:
    """Median times of a forward pass of both networks in one engine; they vary between runs."""

    engine: EngineName
    batch: int
    pruned_ms: float
    original_ms: float | None
    """None if no original network was given."""


def export_onnx(
    model: nn.Module,
    example: Images | Sequence[Tensor] | Mapping[str, Tensor],
    path: str | Path,
    *,
    forward: Forward | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Export `model`, in evaluation mode, to an ONNX file that takes any number of images.

    `example` is a batch of images for the network, or a tuple or a dict of several inputs;
    `forward(model, images)` returns what the file is to return, if that is not what the network
    returns. The `opset` is the exporter's if none is asked for. The file is checked in onnxruntime
    on `example` and on uniform and normal noise in `CHECKED_BATCHES`, and kept only if each output
    differs from PyTorch's by less than `TOLERANCE`.
    The only input is called `images`, a classifier's output `logits`, and another one `output`.
    Several inputs have the names of the network's parameters, and several outputs those that they
    have in it, such as `boxes` or `features_0`.

    Raises:
        ExportError: the network can't be exported, is too large for one file or fails the check,
            or `path` exists and `overwrite` is not set.
        UsageError: the extra `export` is not installed, or `path` does not end in `.onnx`.
    """
    check_packages()
    model, path = unwrapped(model), Path(path)
    parameters = parameters_of(model, forward)
    packed, inputs = read_inputs(example, parameters)
    packed = as_input(model, packed)
    check_suffix(path, SUFFIX, "onnx")
    model = with_inputs(with_forward(model, forward), inputs)
    with written_whole(path, overwrite=overwrite) as draft:
        opset = write_onnx(model, packed, draft, _input_names(inputs, parameters), opset)
        error = _relative_difference(model, packed, draft)
        if not error < TOLERANCE:
            raise ExportError(
                f"the ONNX file's outputs differ from the network's: relative difference "
                f"{error:.1e}, and less than {TOLERANCE:.0e} was expected; no file is written"
            )
        size = draft.stat().st_size
    return ExportResult(path, size, opset, error, CHECKED_BATCHES)


def compare_latency(
    pruned: nn.Module,
    pruned_file: Path,
    original: nn.Module | None,
    example: Images,
    engines: Sequence[EngineName] = ("pytorch", "onnxruntime"),
) -> tuple[Latency, ...]:
    """Return the latency of both networks in some engines, by `LATENCY_BATCHES`.

    `pruned_file` is the file that `export_onnx` wrote. All runs of a batch size are interleaved, so
    that other load on the machine slows all alike; every engine gets PyTorch's number of threads.
    The values of the original's weights don't matter. Several inputs of a network (`with_inputs`)
    are one tensor in `example`. Raises as `export_onnx` does, and the errors of `find_engine`.
    """
    check_packages()
    timed = [find_engine(name) for name in engines]
    networks = {True: (pruned, pruned_file)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(pruned))
        stack.enter_context(torch.inference_mode())
        if original is not None:
            stack.enter_context(evaluating(original))
            file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "original.onnx"
            write_onnx(original, example, file)
            networks[False] = original, file
        latencies: list[Latency] = []
        for batch in LATENCY_BATCHES:
            images = _noise(example, batch, torch.randn)
            actions = {
                (engine.name, is_pruned): engine.prepare_file(file, inputs_in(pruned, images))
                if isinstance(engine, FileEngine)
                else engine.prepare(network, images)
                for engine in timed
                for is_pruned, (network, file) in networks.items()
            }
            times_ms = interleaved_medians(actions, LATENCY_ROUNDS)
            for name in engines:
                pruned_ms, original_ms = times_ms[name, True], times_ms.get((name, False))
                latencies.append(Latency(name, batch, pruned_ms, original_ms))
    return tuple(latencies)


def _input_names(inputs: Inputs | None, parameters: Parameters) -> tuple[str, ...]:
    """Return the names of the inputs in the file."""
    if inputs is None:
        return ("images",)
    count = len(inputs.shapes)
    names = inputs.names or parameters.positional[:count]
    return names if len(names) == count else tuple(f"input_{number}" for number in range(count))


def _relative_difference(model: nn.Module, example: Images, path: Path) -> float:
    """Return the largest relative difference of the file's outputs from the network's."""
    run = onnx_runner(path)
    noises = [
        _noise(example, count, draw)
        for count in CHECKED_BATCHES
        for draw in (torch.rand, torch.randn)
    ]
    largest = 0.0
    with evaluating(model), torch.inference_mode():
        for images in (example, *noises):
            try:
                expected, _ = run_flat(model, images)
                outputs = list(map(torch.from_numpy, run(*inputs_in(model, images))))
            except Exception as failure:  # the network is the user's; onnxruntime raises its own
                raise ExportError(
                    f"the network or its ONNX file fails on {len(images)} images: {cause(failure)}"
                ) from failure
            shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (outputs, expected)]
            if shapes[0] != shapes[1]:
                raise ExportError(
                    f"the ONNX file's outputs are {_in_words(shapes[0])}, and the network's are "
                    f"{_in_words(shapes[1])}"
                )
            error = outputs_error(outputs, expected)
            largest = error if not error <= largest else largest  # keeps a NaN
    return largest


def _in_words(shapes: Sequence[object]) -> str:
    return " and ".join(map(str, shapes))


def _noise(example: Images, count: int, draw: Callable[..., Tensor]) -> Tensor:
    """Return `count` noise images of the example's size and dtype."""
    generator = torch.Generator().manual_seed(count)
    return draw(count, *example.shape[1:], generator=generator).to(example)
