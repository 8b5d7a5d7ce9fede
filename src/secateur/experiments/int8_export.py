"""Quantise an exported network to int8, and compare accuracy and latency with the float file.

Both files run in the same engine: onnxruntime, OpenVINO, which NNCF quantises for, ExecuTorch or
what `torch.compile` compiles ahead of time, which torchao quantises for.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.config import EngineName, RunConfig
from secateur.data import DataSet, draw_calibration_images
from secateur.engines.engine import Action, Program
from secateur.engines.executorch import load_executorch
from secateur.engines.flat_network import inputs_in, run_flat
from secateur.engines.onnx_file import check_packages, write_onnx
from secateur.engines.onnxruntime import load_onnx
from secateur.engines.openvino import load_openvino
from secateur.engines.output_structure import Structure, put_together
from secateur.engines.quantised_file import quantise_network
from secateur.engines.quantised_openvino import check_nncf, quantise_openvino
from secateur.engines.quantised_program import (
    check_executorch,
    check_torchao,
    quantise_aotinductor,
    quantise_executorch,
)
from secateur.experiments.engine_times import engine_time
from secateur.experiments.evaluate import task_and_metric
from secateur.experiments.onnx_export import LATENCY_BATCHES, LATENCY_ROUNDS, Latency
from secateur.experiments.other_formats import (
    write_aotinductor,
    write_executorch,
    write_openvino,
)
from secateur.graph.forward import inputs_of, with_inputs
from secateur.graph.module_state import evaluating
from secateur.models.evaluate import evaluate
from secateur.models.score import Score
from secateur.models.task import Task
from secateur.pipeline.inputs import make_reader, resolve_config
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.verdict import EngineTime
from secateur.runtime.errors import ExportError
from secateur.runtime.timing import in_turn, interleaved_medians, repeat_to_batch
from secateur.runtime.torch_internals import load_compiled

CALIBRATION_IMAGES = 256
"""Calibration images that the ranges of activations are taken from, at most."""
CALIBRATION_BATCH = 32
LEAST_EATEN = 0.1
"""More of the time that stays in int8 than in float, from which on it is said."""
TIMING_IMAGES = 8
"""Images that the original is quantised with to be timed; its weights are arbitrary, too."""


@dataclass(frozen=True)
class FormLatency:
    """Median times of a forward pass of the float and of the int8 file."""

    batch: int
    float_ms: float
    int8_ms: float
    original_float_ms: float | None
    original_int8_ms: float | None
    """None if no original network was given."""


@dataclass(frozen=True)
class Int8Result:
    """An int8 file beside the float one that it was made from."""

    path: Path
    bytes: int
    calibration_images: int
    float_score: Score
    int8_score: Score
    """Latency, MACs and parameters in these don't count."""
    task: Task
    notes: tuple[str, ...]
    """What to know of the data."""
    latency: tuple[FormLatency, ...]
    engine: EngineName
    """What runs both files."""

    @property
    def advice(self) -> str:
        """What to know of the two before one of them is deployed; empty if nothing."""
        if not self.latency:
            return ""
        last = self.latency[-1]
        if last.int8_ms > last.float_ms:
            return (
                "int8 is slower than float here: the processor may lack instructions for it. "
                "Deploy the float file, or time int8 on the device."
            )
        if last.original_float_ms is None or last.original_int8_ms is None:
            return ""
        in_float = last.float_ms / last.original_float_ms
        in_int8 = last.int8_ms / last.original_int8_ms
        together = last.int8_ms / last.original_float_ms
        if in_int8 - in_float < LEAST_EATEN:
            return ""
        return (
            f"The cut saves less in int8: {in_int8:.2f} of the time stays, and {in_float:.2f} in "
            f"float. Together they leave {together:.2f}, the uncut network in int8 "
            f"{last.original_int8_ms / last.original_float_ms:.2f}. Prune with --round-to 16, or "
            "further; if the uncut network in int8 is fast enough, deploy that."
        )


Quantise = Callable[[nn.Module, Path, Path, Sequence[Tensor]], None]
"""Writes the int8 form of a network, which a file holds in float: `(network, file, int8, batches)`.
The batches of images give the ranges of activations, and correct the biases."""


@dataclass(frozen=True)
class Quantiser:
    """How files of a format are written, quantised and run."""

    engine: EngineName
    suffixes: tuple[str, ...]
    """Of the files that it consists of, first the one that is named."""
    write: Callable[[nn.Module, Tensor, Path], object]
    check: Callable[[], object]
    """Raises `UsageError` if the package that quantises is not installed."""
    quantise: Quantise
    load: Callable[[Path], Program]
    batch: int | None = None
    """Images that files take at a time; None: any number."""


def _of_network(quantise: Callable[[nn.Module, Path, Sequence[Tensor]], None]) -> Quantise:
    return lambda network, _, int8, batches: quantise(network, int8, batches)


QUANTISERS: dict[str, Quantiser] = {
    "onnx": Quantiser(
        *("onnxruntime", (".onnx",), write_onnx),
        *(check_packages, quantise_network, load_onnx),
    ),
    "openvino": Quantiser(
        *("openvino", (".xml", ".bin"), write_openvino),
        *(check_nncf, quantise_openvino, load_openvino),
    ),
    "executorch": Quantiser(
        *("executorch", (".pte",), write_executorch),
        *(check_executorch, _of_network(quantise_executorch), load_executorch),
        batch=1,
    ),
    "aotinductor": Quantiser(
        *("compile", (".pt2",), write_aotinductor),
        *(check_torchao, _of_network(quantise_aotinductor), load_compiled),
    ),
}
"""By the name of the format."""


def int8_files(name: str, file: Path) -> list[Path]:
    """Return the files that the int8 form of a format's file consists of.

    Raises `UsageError` if the package that quantises is not installed.
    """
    quantiser = QUANTISERS[name]
    quantiser.check()
    return [int8_path(file).with_suffix(suffix) for suffix in quantiser.suffixes]


def int8_path(file: Path) -> Path:
    """Return where the int8 form of a file is written."""
    return file.with_suffix(f".int8{file.suffix}")


def exported_times(latencies: Sequence[Latency], quantised: Int8Result | None) -> list[EngineTime]:
    """Return the times of exported files, of float and of int8."""
    times = [
        engine_time(one.engine, one.batch, one.pruned_ms, one.original_ms) for one in latencies
    ]
    if quantised is None:
        return times
    for one in quantised.latency:
        both_ms = one.int8_ms, one.original_int8_ms
        times.append(engine_time(quantised.engine, one.batch, *both_ms, form="int8"))
    return times


def export_int8(
    quantiser: Quantiser,
    network: nn.Module,
    file: Path,
    dataset: DataSet,
    config: RunConfig,
    run_context: RunContext,
    *,
    original: nn.Module | None = None,
    is_timed: bool = True,
) -> Int8Result:
    """Quantise the file of a run's network, score both on the test images and time both.

    `network` is the run's, whose inputs are those of the file; `config` is the run's configuration,
    and `dataset` the data as the network takes them (`load_data_for`). At most `CALIBRATION_IMAGES`
    of the training images set the ranges of activations, drawn as the run's calibration images are.
    The `original` is timed only: the values of its weights don't matter. Nothing is timed unless
    `is_timed`. Raises `SecateurError`.
    """
    path = int8_path(file)
    config = resolve_config(config, dataset, network)
    reader = make_reader(config, run_context)
    task, metric = task_and_metric(network, network, dataset, config, run_context)
    calibration = draw_calibration_images(
        dataset.train, CALIBRATION_IMAGES, stratified=config.data.stratified, seed=config.seed
    )
    batches = [
        part
        for batch in reader.read(calibration, "calibrating int8")
        for part in batch.images.split(CALIBRATION_BATCH)
    ]
    example = reader.read_first(dataset.test, 2)
    _, structure = run_flat(network, example)
    quantiser.quantise(network, file, path, batches)

    def score(name: Path, title: str) -> Score:
        return evaluate(
            _FileNetwork(quantiser.load(name), network, structure, quantiser.batch),
            reader.read_shard(dataset.test, title),
            task=task,
            metric=metric,
            known_ms=0.0,
        )

    return Int8Result(
        path,
        sum(path.with_suffix(suffix).stat().st_size for suffix in quantiser.suffixes),
        len(calibration.labels),
        score(file, "scoring float"),
        score(path, "scoring int8"),
        task,
        dataset.notes,
        _latency(quantiser, network, file, path, original, example) if is_timed else (),
        quantiser.engine,
    )


class _FileNetwork(nn.Module):
    """A file as a network that takes and returns what the original module does."""

    def __init__(
        self, run: Program, network: nn.Module, structure: Structure, batch: int | None
    ) -> None:
        super().__init__()
        self._run = run
        self._batch = batch
        self._inputs = inputs_of(network)
        self._structure = structure

    def forward(self, images: Tensor) -> object:
        """Return the file's outputs for a batch."""
        parts = [
            self._run((part,) if self._inputs is None else self._inputs.unpack(part))
            for part in images.split(self._batch or len(images))
        ]
        # A single part may hold numbers that are not one for each image.
        outputs = parts[0] if len(parts) == 1 else list(map(torch.cat, zip(*parts, strict=True)))
        return put_together(self._structure, outputs)


def _latency(
    quantiser: Quantiser,
    network: nn.Module,
    file: Path,
    path: Path,
    original: nn.Module | None,
    example: Tensor,
) -> tuple[FormLatency, ...]:
    """Return the times of the float and the int8 file, and of the original's, interleaved."""
    files, latencies = {"float": file, "int8": path}, []
    with tempfile.TemporaryDirectory() as folder:
        if original is not None:
            original = with_inputs(original, inputs_of(network))
            whole, whole_int8 = (
                Path(folder) / f"{name}{path.suffix}" for name in ("whole", "int8")
            )
            with evaluating(original), torch.no_grad():
                quantiser.write(original, repeat_to_batch(example, quantiser.batch or 2), whole)
            few = repeat_to_batch(example, TIMING_IMAGES)
            # With arbitrary weights its int8 file may fail the check of what it computes.
            with contextlib.suppress(ExportError):
                quantiser.quantise(original, whole, whole_int8, [few])
                files |= {"original float": whole, "original int8": whole_int8}
        for batch in LATENCY_BATCHES if quantiser.batch is None else (quantiser.batch,):
            inputs = inputs_in(network, repeat_to_batch(example, batch))
            actions = {
                name: in_turn(partial(_loaded, quantiser, file, inputs))
                for name, file in files.items()
            }
            times = interleaved_medians(actions, LATENCY_ROUNDS)
            both = [times.get(f"original {form}") for form in ("float", "int8")]
            latencies.append(FormLatency(batch, times["float"], times["int8"], *both))
    return tuple(latencies)


def _loaded(quantiser: Quantiser, file: Path, inputs: Sequence[Tensor]) -> Action:
    return partial(quantiser.load(file), inputs)
