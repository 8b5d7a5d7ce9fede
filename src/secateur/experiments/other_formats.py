"""Export a network to the formats of other engines than onnxruntime, and check what they compute.

Each format has its package: onnxruntime's `.ort` for builds without ONNX, OpenVINO's intermediate
representation, ExecuTorch's `.pte` (XNNPACK), Core ML's `.mlpackage`, LiteRT's `.tflite`, and the
package of `torch.compile`'s ahead-of-time compiler. The first two are made of an ONNX file, the
others of PyTorch's ExportedProgram. TorchScript is not among them: torch itself advises against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.config import FormatName
from secateur.engines.engine import Program
from secateur.engines.executorch import load_executorch, make_program
from secateur.engines.flat_network import flat_network, inputs_in, outputs_error, run_flat
from secateur.engines.onnx_file import Images, cause, check_packages, quiet, write_onnx
from secateur.engines.onnxruntime import load_onnx
from secateur.engines.openvino import load_openvino
from secateur.experiments.exported_file import PACKAGE, check_suffix, written_whole
from secateur.experiments.onnx_export import TOLERANCE
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.trace import export_program
from secateur.runtime.errors import ExportError, UsageError
from secateur.runtime.timing import repeat_to_batch
from secateur.runtime.torch_internals import compile_ahead_of_time, load_compiled


@dataclass(frozen=True)
class FormatResult:
    """A network in another format."""

    path: Path
    format: FormatName
    bytes: int
    error: float | None
    """Largest difference from PyTorch's outputs, relative to the largest absolute output; None
    where the format can't be run on this machine."""
    batch: int | None
    """Images that the file takes at a time; None: any number."""


@dataclass(frozen=True)
class _Format:
    suffix: str
    extra: str
    """The package that it needs."""
    write: Callable[[nn.Module, Tensor, Path], None]
    """Writes a network, for batches like the example."""
    load: Callable[[Path], Program] | None
    """Returns what runs a file, on as many threads as PyTorch has; None: not on this machine."""
    batch: int | None = None


def export_as(
    name: FormatName,
    model: nn.Module,
    example: Images,
    path: Path,
    *,
    overwrite: bool = False,
) -> FormatResult:
    """Write a network in evaluation mode in a format, and check its outputs where it can be run.

    `example` is what `model` takes, with several inputs in one tensor (`with_inputs`). The outputs
    for uniform noise must differ from PyTorch's by less than `TOLERANCE`, or no file stays. Formats
    that are written for one image at a time take one.

    Raises:
        ExportError: the format can't hold the network, or its outputs differ, or a file that is
            written exists and `overwrite` is not set.
        UsageError: the format's package is not installed, or `path` has not the format's suffix.
    """
    wanted = FORMATS[name]
    check_suffix(path, wanted.suffix, name)
    example = as_input(model, repeat_to_batch(example, wanted.batch or 2))
    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    with written_whole(path, overwrite=overwrite) as draft:
        try:
            with quiet(), evaluating(model), torch.no_grad():
                wanted.write(model, example, draft)
                expected, _ = run_flat(model, noise)
                run = None if wanted.load is None else wanted.load(draft)
                outputs = None if run is None else run(inputs_in(model, noise))
        except ImportError as missing:
            raise UsageError(
                f"the format {name} needs its package: pip install '{wanted.extra}' "
                f"(no module {missing.name})"
            ) from missing
        except UsageError:
            raise
        except Exception as failure:  # every package raises its own types
            raise ExportError(
                f"the network can't be exported to {name}: {cause(failure)}"
            ) from failure
        error = None if outputs is None else outputs_error(outputs, expected)
        if error is not None and not error < TOLERANCE:
            raise ExportError(
                f"the outputs of the {name} file differ from the network's: relative difference "
                f"{error:.1e}, and less than {TOLERANCE:.0e} was expected; no file is written"
            )
        parts = draft.parent.rglob("*")
        size = sum(part.stat().st_size for part in parts if part.is_file())
    return FormatResult(path, name, size, error, wanted.batch)


def _write_ort(model: nn.Module, example: Tensor, path: Path) -> None:
    import onnxruntime

    check_packages()
    file = path.with_suffix(".onnx")
    write_onnx(model, example, file, _input_names(model, example))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    # The layout that this optimizer writes down is that of some x86 processors alone.
    onnxruntime.InferenceSession(
        file, options, ["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )
    file.unlink()


def write_openvino(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write OpenVINO's `.xml` and `.bin` of a network, by way of ONNX."""
    import openvino

    # By way of ONNX, since `openvino.convert_model` reports to its makers what it converts.
    check_packages()
    file = path.with_suffix(".onnx")
    write_onnx(model, example, file, _input_names(model, example))
    openvino.save_model(openvino.Core().read_model(file), path, compress_to_fp16=False)
    file.unlink()


def write_executorch(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write ExecuTorch's `.pte` of a network, for batches of exactly the example's size."""
    path.write_bytes(make_program(model, example))


def _write_coreml(model: nn.Module, example: Tensor, path: Path) -> None:
    import coremltools

    # Core ML takes no ONNX files any more, and a program of basic operations only.
    program = torch.export.export(flat_network(model), inputs_in(model, example))
    converted = coremltools.convert(
        program.run_decompositions({}),
        source="pytorch",
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
    )
    converted.save(str(path))


def _write_litert(model: nn.Module, example: Tensor, path: Path) -> None:
    import litert_torch

    # Makes a program of its own. Inputs and outputs keep PyTorch's axes: images are NCHW.
    litert_torch.convert(flat_network(model), inputs_in(model, example)).export(str(path))


def _load_litert(path: Path) -> Program:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
    runner = interpreter.get_signature_runner()

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs = runner(**{f"args_{number}": one.numpy() for number, one in enumerate(inputs)})
        return [torch.from_numpy(outputs[f"output_{number}"]) for number in range(len(outputs))]

    return run


def write_aotinductor(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write the package of a network that `torch.compile`'s compiler makes ahead of time."""
    program = export_program(flat_network(model), inputs_in(model, example))
    compile_ahead_of_time(program, path)


def _input_names(model: nn.Module, example: Tensor) -> list[str]:
    return [f"input_{number}" for number in range(len(inputs_in(model, example)))]


FORMATS: dict[FormatName, _Format] = {
    "ort": _Format(".ort", "secateur[export]", _write_ort, load_onnx),
    "openvino": _Format(".xml", "secateur[openvino]", write_openvino, load_openvino),
    "executorch": _Format(".pte", "executorch>=1.5", write_executorch, load_executorch, batch=1),
    "coreml": _Format(PACKAGE, "coremltools>=9", _write_coreml, None, batch=1),
    "litert": _Format(".tflite", "litert-torch>=0.10", _write_litert, _load_litert, batch=1),
    "aotinductor": _Format(".pt2", "torch>=2.6", write_aotinductor, load_compiled),
}
