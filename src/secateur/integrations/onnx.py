"""ONNX: a network as one file for other runtimes; it is compared before it is left, and timed.

Needs the extra `export` (onnx, onnxscript, onnxruntime).
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import ExportError, UsageError
from secateur.evaluation.divergence import relative_error
from secateur.runtime.atomic_io import make_folder, move_file
from secateur.runtime.module_state import evaluating

PARITY = 1e-4
"""Relative difference from which on a file is not left."""
CHECKED_BATCHES = (1, 3, 8)
"""Images at a time when the file is compared with the network."""
LARGEST_FILE = 2**31 - 2**20
"""Bytes that one ONNX file can hold (protobuf's limit), with room for the graph."""
LATENCY_BATCHES = (1, 16)
LATENCY_ROUNDS = 31
LATENCY_SECONDS = 20.0
"""After this time a measurement ends early, but not before `FEWEST_ROUNDS`."""
FEWEST_ROUNDS = 5
WARM_UP_ROUNDS = 2

Engine = Literal["pytorch", "onnxruntime"]
Images = Float[Tensor, "image rgb height width"]
Runner = Callable[[Tensor], object]


@dataclass(frozen=True)
class ExportResult:
    """An ONNX file that answers as the network does."""

    path: Path
    bytes: int
    opset: int
    error: float
    """Largest relative difference found: of the answers, over the largest absolute answer."""
    batches: tuple[int, ...]
    """Sizes of the batches that were compared."""


@dataclass(frozen=True)
class Latency:
    """Median time of a forward pass of each network; a measurement, so it varies."""

    engine: Engine
    batch: int
    pruned_ms: float
    original_ms: float | None
    """None where there was no original network to time."""


def export_onnx(
    model: nn.Module, example: Images, path: str | Path, *, overwrite: bool = False
) -> ExportResult:
    """Writes `model`, in evaluation mode, as an ONNX file that takes any number of images.

    `example` is a batch of the images that the network takes. The file is run in onnxruntime on
    it, and on uniform and normal noise in `CHECKED_BATCHES`; it is left only where the answers
    differ by less than `PARITY`. Its input is called `images`, its output `logits`. Raises
    `ExportError` where the network can't be exported, is too large for one file or answers
    otherwise, and where `path` is there without `overwrite`; `UsageError` without the extra.
    """
    _check_packages()
    path = Path(path)
    check_free(path, overwrite=overwrite)
    with _folder_beside(path) as folder:
        draft = folder / path.name
        opset = _write(model, example, draft)
        error = _parity(model, example, draft)
        if not error < PARITY:
            raise ExportError(
                f"the ONNX file answers otherwise than the network: relative difference "
                f"{error:.1e}, and less than {PARITY:.0e} was expected; no file is left"
            )
        size = draft.stat().st_size
        move_file(draft, path)
    return ExportResult(path, size, opset, error, CHECKED_BATCHES)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises `ExportError` where a file can't be written to `path`."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder, not a file to write")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} is there already: choose another file or add --overwrite")


def compare_latency(
    pruned: nn.Module, pruned_file: Path, original: nn.Module | None, example: Images
) -> tuple[Latency, ...]:
    """How long both networks take in PyTorch and in onnxruntime, for each of `LATENCY_BATCHES`.

    `pruned_file` is what `export_onnx` left. All four take turns, so that whatever else the machine
    does slows them alike; both engines get PyTorch's number of threads. The original's weights do
    not matter. Raises as `export_onnx` does.
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
        found: list[Latency] = []
        for batch in LATENCY_BATCHES:
            times = _medians_ms(runners, _noise(example, batch, torch.randn))
            for engine in ("pytorch", "onnxruntime"):
                found.append(
                    Latency(engine, batch, times[engine, True], times.get((engine, False)))
                )
    return tuple(found)


def _medians_ms(
    runners: dict[tuple[Engine, bool], Runner], images: Images
) -> dict[tuple[Engine, bool], float]:
    """Median milliseconds of each runner, one pass of each in turn."""
    seconds: dict[tuple[Engine, bool], list[float]] = {key: [] for key in runners}
    begin = time.perf_counter()
    for number in range(WARM_UP_ROUNDS + LATENCY_ROUNDS):
        for key, runner in runners.items():
            start = time.perf_counter()
            runner(images)
            seconds[key].append(time.perf_counter() - start)
        is_late = time.perf_counter() - begin > LATENCY_SECONDS
        if is_late and number + 1 >= WARM_UP_ROUNDS + FEWEST_ROUNDS:
            break
    return {
        key: 1e3 * statistics.median(passes[WARM_UP_ROUNDS:]) for key, passes in seconds.items()
    }


def _check_packages() -> None:
    try:
        with _silence():
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ONNX needs the extra: pip install 'secateur[export]' (no module {error.name})"
        ) from error


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the disk that `path` is on; raises `ExportError` where none can be."""
    make_folder(path.parent)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ExportError(f"can't write beside {path}: {error}") from error
    with folder as name:
        yield Path(name)


def _write(model: nn.Module, example: Images, path: Path) -> int:
    """Writes the file, weights inside; its opset."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST_FILE:
        raise ExportError(
            f"the network's weights take {size / 2**30:.1f} GiB, and an ONNX file holds 2 GiB"
        )
    if len(example) < 2:  # one image would fix the batch size in the graph
        example = example.repeat(2, 1, 1, 1)
    try:
        with _silence(), evaluating(model), torch.no_grad():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=False)
    except Exception as error:  # the exporter raises many unrelated types
        raise ExportError(f"the network can't be exported to ONNX: {_cause(error)}") from error
    return int(program.model.opset_imports[""])


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _parity(model: nn.Module, example: Images, path: Path) -> float:
    """Largest relative difference between the file's answers and the network's."""
    run = onnx_runner(path)
    noises = [
        _noise(example, n, draw) for n in CHECKED_BATCHES for draw in (torch.rand, torch.randn)
    ]
    error = 0.0
    with evaluating(model), torch.inference_mode():
        for images in (example, *noises):
            try:
                expected = model(images)
                found = torch.from_numpy(run(images)).to(expected)
            except Exception as failure:  # the network is the user's; onnxruntime raises its own
                raise ExportError(
                    f"the network, or its file, can't take {len(images)} images: {_cause(failure)}"
                ) from failure
            if found.shape != expected.shape:
                raise ExportError(
                    f"the ONNX file answers {list(found.shape)} where the network answers "
                    f"{list(expected.shape)}"
                )
            one = relative_error(found, expected)
            error = one if not one <= error else error  # keeps a NaN
    return error


def _noise(example: Images, count: int, draw: Callable[..., Tensor]) -> Tensor:
    """Images of noise of the size and type of the example's."""
    generator = torch.Generator().manual_seed(count)
    return draw(count, *example.shape[1:], generator=generator).to(example)


def onnx_runner(path: Path) -> Callable[[Tensor], Any]:
    """Runs the file in onnxruntime on the CPU, on as many threads as PyTorch has.

    The answers are a NumPy array. Raises `ExportError` where the file can't be loaded.
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
    return lambda images: session.run(["logits"], {"images": images.cpu().numpy()})[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what the exporter says, prints and logs from the terminal."""
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
