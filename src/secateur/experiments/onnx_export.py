"""Export a network to ONNX, check the file against PyTorch, and time both runtimes.

`export_onnx` writes the file and does the ONNX check: `_relative_difference` runs the file in
onnxruntime, and only a file whose outputs agree with PyTorch's to `TOLERANCE` is kept.
`compare_latency` times it. Needs the extra `export` (onnx, onnxscript, onnxruntime).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.experiments.flat_network import flat_network, inputs_in, outputs_error, run_flat
from secateur.experiments.output_structure import names_of
from secateur.graph.forward import inputs_of, with_forward, with_inputs
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.network_graph import Forward
from secateur.graph.trace import open_batch
from secateur.graph.wrappers import unwrapped
from secateur.runtime.atomic_io import make_folder, move_file
from secateur.runtime.errors import ExportError, UsageError
from secateur.runtime.packed_inputs import Inputs, Parameters, parameters_of, read_inputs
from secateur.runtime.timing import Rounds, interleaved_medians, repeat_to_batch

TOLERANCE = 1e-4
"""Relative difference from PyTorch's outputs below which a file is kept."""
CHECKED_BATCHES = (1, 3, 8)
"""Batch sizes with which the file is checked, besides that of the example."""
LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights in one ONNX file: protobuf's limit, less some space for the graph."""
FIRST_WITH_EXPORTER = (2, 8)
"""First torch whose exporter works with onnxscript 0.6; older ones use that of TorchScript."""
LATENCY_BATCHES = (1, 16)
"""Batch sizes that are timed."""
LATENCY_ROUNDS = Rounds(fewest=5, most=31, seconds=20.0, warm_up=2)

Engine = Literal["pytorch", "onnxruntime"]
Images = Float[Tensor, "image *axis"]
Runner = Callable[..., object]


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
    """Median times of a forward pass of both networks in one runtime; they vary between runs."""

    engine: Engine
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
    overwrite: bool = False,
) -> ExportResult:
    """Export `model`, in evaluation mode, to an ONNX file that takes any number of images.

    `example` is a batch of images for the network, or a tuple or a dict of several inputs;
    `forward(model, images)` returns what the file is to return, if that is not what the network
    returns. The file is checked in onnxruntime on `example` and on uniform and normal noise in
    `CHECKED_BATCHES`, and kept only if each output differs from PyTorch's by less than `TOLERANCE`.
    The only input is called `images`, a classifier's output `logits`, and another one `output`.
    Several inputs have the names of the network's parameters, and several outputs those that they
    have in it, such as `boxes` or `features_0`.

    Raises:
        ExportError: the network can't be exported, is too large for one file or fails the check,
            or `path` exists and `overwrite` is not set.
        UsageError: the extra `export` is not installed.
    """
    _check_packages()
    model, path = unwrapped(model), Path(path)
    parameters = parameters_of(model, forward)
    packed, inputs = read_inputs(example, parameters)
    packed = as_input(model, packed)
    check_free(path, overwrite=overwrite)
    model = with_inputs(with_forward(model, forward), inputs)
    with _folder_beside(path) as folder:
        draft = folder / path.name
        opset = _write(model, packed, draft, _input_names(inputs, parameters))
        error = _relative_difference(model, packed, draft)
        if not error < TOLERANCE:
            raise ExportError(
                f"the ONNX file's outputs differ from the network's: relative difference "
                f"{error:.1e}, and less than {TOLERANCE:.0e} was expected; no file is written"
            )
        size = draft.stat().st_size
        move_file(draft, path)
    return ExportResult(path, size, opset, error, CHECKED_BATCHES)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise `ExportError` if `path` is a folder, or exists and `overwrite` is not set."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder, not a file to write")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists already: choose another file or add --overwrite")


def compare_latency(
    pruned: nn.Module, pruned_file: Path, original: nn.Module | None, example: Images
) -> tuple[Latency, ...]:
    """Return the latency of both networks in PyTorch and in onnxruntime, by `LATENCY_BATCHES`.

    `pruned_file` is the file that `export_onnx` wrote. The four runs are interleaved, so that
    other load on the machine slows all alike; both runtimes get PyTorch's number of threads. The
    values of the original's weights don't matter. Several inputs of a network (`with_inputs`) are
    one tensor in `example`. Raises as `export_onnx` does.
    """
    _check_packages()
    runners: dict[tuple[Engine, bool], Runner] = {
        ("pytorch", True): pruned,
        ("onnxruntime", True): onnx_runner(pruned_file),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(pruned))
        stack.enter_context(torch.inference_mode())
        if original is not None:
            stack.enter_context(evaluating(original))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _write(original, example, folder / "original.onnx")
            runners["pytorch", False] = original
            runners["onnxruntime", False] = onnx_runner(folder / "original.onnx")
        latencies: list[Latency] = []
        for batch in LATENCY_BATCHES:
            images = _noise(example, batch, torch.randn)
            inputs = inputs_in(pruned, images)
            actions = {
                key: functools.partial(runner, *((images,) if key[0] == "pytorch" else inputs))
                for key, runner in runners.items()
            }
            times_ms = interleaved_medians(actions, LATENCY_ROUNDS)
            for engine in ("pytorch", "onnxruntime"):
                pruned_ms, original_ms = times_ms[engine, True], times_ms.get((engine, False))
                latencies.append(Latency(engine, batch, pruned_ms, original_ms))
    return tuple(latencies)


def _check_packages() -> None:
    try:
        with _quiet():
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ONNX needs the extra: pip install 'secateur[export]' (no module {error.name})"
        ) from error


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of `path`; raises `ExportError` if it can't be made."""
    make_folder(path.parent)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ExportError(f"can't write beside {path}: {error}") from error
    with folder as name:
        yield Path(name)


def _input_names(inputs: Inputs | None, parameters: Parameters) -> tuple[str, ...]:
    """Return the names of the inputs in the file."""
    if inputs is None:
        return ("images",)
    count = len(inputs.shapes)
    names = inputs.names or parameters.positional[:count]
    return names if len(names) == count else tuple(f"input_{number}" for number in range(count))


def _write(
    model: nn.Module, example: Images, path: Path, input_names: Sequence[str] = ("images",)
) -> int:
    """Write the file, with the weights inside, and return its opset."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST_FILE:
        raise ExportError(
            f"the network's weights take {size / 2**30:.1f} GiB, and an ONNX file holds 2 GiB"
        )
    if len(example) < 2:  # one image would fix the batch size in the graph
        example = repeat_to_batch(example, 2)
    try:
        with _quiet(), evaluating(model), torch.no_grad():
            return _export(model, example, path, list(input_names))
    except Exception as error:  # the exporter raises many unrelated types
        raise ExportError(f"the network can't be exported to ONNX: {_cause(error)}") from error


def _export(model: nn.Module, example: Images, path: Path, input_names: list[str]) -> int:
    """Let torch write the file, and return its opset."""
    outputs, structure = run_flat(model, example)
    is_one = structure == {"tensor": 0}
    network = model if is_one and inputs_of(model) is None else flat_network(model)
    inputs, output_names = inputs_in(model, example), list(names_of(structure))
    if is_one and outputs[0].ndim and outputs[0][0].numel() == outputs[0].shape[1:2].numel():
        output_names = ["logits"]
    names: dict[str, Any] = {"input_names": input_names, "output_names": output_names}
    if _torch_release() < FIRST_WITH_EXPORTER:
        import onnx

        torch.onnx.export(
            network,
            inputs,
            str(path),
            dynamo=False,
            dynamic_axes={name: {0: "batch"} for name in input_names},
            **names,
        )
        opsets = onnx.load(str(path)).opset_import
        return int(next(one.version for one in opsets if one.domain in ("", "ai.onnx")))
    program = torch.onnx.export(
        network,
        inputs,
        dynamo=True,
        dynamic_shapes=open_batch(network, torch.export.Dim("batch"), len(inputs)),
        verbose=False,
        **names,
    )
    assert program is not None
    program.save(path, external_data=False)
    return int(program.model.opset_imports[""])


def _torch_release() -> tuple[int, int]:
    """Return torch's major and minor version."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def _cause(error: BaseException) -> str:
    """Return the first line of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
                    f"the network or its ONNX file fails on {len(images)} images: {_cause(failure)}"
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


def onnx_runner(path: Path) -> Callable[..., list[Any]]:
    """Return a function that runs the file in onnxruntime, on as many CPU threads as PyTorch has.

    It takes the inputs in the file's order, and returns the outputs as NumPy arrays. Raises
    `ExportError` if the file can't be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has no root for its exceptions
        raise ExportError(f"onnxruntime can't load {path}: {_cause(error)}") from error
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Any]:
        arrays = (tensor.cpu().numpy() for tensor in inputs)
        outputs: list[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
        return outputs

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, prints and logs from the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)
