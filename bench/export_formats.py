"""Export whole and cut networks in every format: error, and the time that the cut leaves.

    python bench/export_formats.py [--data DIR --images DIR --weights DIR]

The trained ResNet-20 (`--data`: CIFAR-10) is cut to 0.5 of its MACs, and the trained MobileNetV2
(`--images`: the ImageNet samples) to 0.7, both as `secateur prune` plans it, without a refit;
networks of torchvision have random weights, and are cut to 0.6 by a random ranking. The whole and
the cut network are exported in each format whose package is installed, compared with PyTorch, and
timed interleaved: one image, one thread, processor time, since other programs hardly change that.
Each network and format adds a line to `results/export_formats.jsonl`, and the table is in
docs/how_to/export.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine_times import planned, untrained
from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, reason_of, revision, surroundings
from secateur.engines.onnxruntime import onnx_runner
from secateur.experiments.onnx_export import ExportResult, export_onnx
from secateur.experiments.other_formats import FORMATS, FormatResult, export_as
from secateur.graph.build import build_dependency_graph
from secateur.runtime.errors import ExportError
from secateur.runtime.timing import in_turn
from studies import load_study_network
from tables import with_table

RESULTS = ROOT / "results" / "export_formats.jsonl"
PAGE = ROOT / "docs" / "how_to" / "export.md"
KEY = ("network", "file_format")
TRAINED = {"resnet20": "macs=0.5", "mobilenetv2": "macs=0.7"}
UNTRAINED = ("resnet18", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0")
PACKAGES = {
    "onnx": ("onnx", "onnxruntime"),
    "ort": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "executorch": ("executorch", "torchao"),
    "coreml": ("coremltools",),
    "litert": ("litert_torch", "ai_edge_litert"),
    "aotinductor": (),
}
ROUNDS, WARM_UP = 20, 3
SIDES = {"resnet20": 32}


def main() -> None:
    """Measure the missing rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="*", help="pattern of networks")
    parser.add_argument("--formats", default="*", help="pattern of formats")
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--images", help="the folder of the ImageNet samples")
    parser.add_argument("--weights", type=Path, help="the folder of the weights")
    parser.add_argument("--tables", action="store_true", help="write the table alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.tables:
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        networks = UNTRAINED if arguments.weights is None else (*TRAINED, *UNTRAINED)
        formats = [
            file_format
            for file_format in fnmatch.filter(PACKAGES, arguments.formats)
            if all(importlib.util.find_spec(package) for package in PACKAGES[file_format])
        ]
        for network in fnmatch.filter(networks, arguments.networks):
            missing = [
                file_format for file_format in formats if (network, file_format) not in known
            ]
            if missing:
                measure(network, missing, arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/export_formats.jsonl", table(rows)))


def measure(network: str, formats: list[str], arguments: argparse.Namespace) -> None:
    """Append a row for each format."""
    whole, smaller = networks_of(network, arguments)
    side = SIDES.get(network, 224)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    macs = [build_dependency_graph(one, image).macs() for one in (whole, smaller)]
    for file_format in formats:
        row: Measurement = {
            "network": network,
            "file_format": file_format,
            "is_trained": network in TRAINED,
            "macs_left": macs[1] / macs[0],
            **measured(file_format, {"whole": whole, "cut": smaller}, image),
            "command": "python bench/export_formats.py --data DIR --images DIR --weights DIR",
            "revision": revision(),
            "environment": surroundings(*PACKAGES[file_format]),
        }
        append_measurement(RESULTS, row)
        print(network, table([row]), sep="\n", flush=True)


def networks_of(network: str, arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Return a network, whole and cut."""
    if network not in TRAINED:
        whole, smaller = untrained(network)
        return whole, smaller["default"]
    is_small = network in SIDES
    folders = {"data": arguments.data if is_small else arguments.images}
    study = {"study": "cifar10" if is_small else "imagenet", **folders}
    config, dataset, model = load_study_network(
        network, argparse.Namespace(**{**vars(arguments), **study})
    )
    return model.eval(), planned(model, dataset, config, TRAINED[network], None)


def measured(file_format: str, networks: dict[str, nn.Module], image: Tensor) -> dict[str, Any]:
    """Return bytes, error and milliseconds of networks in a format, and why, if it has none."""
    results: dict[str, ExportResult | FormatResult] = {}
    actions: dict[str, Callable[[], object]] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, model in networks.items():
            suffix = ".onnx" if file_format == "onnx" else FORMATS[file_format].suffix  # type: ignore[index]
            path = Path(folder) / f"{name}{suffix}"
            try:
                results[name], run = written(file_format, model, image, path)
            except ExportError as error:
                return {"reason": reason_of(error)}
            if run is not None:
                actions[name] = run
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            milliseconds = processor_ms(actions)
    errors = [result.error for result in results.values() if result.error is not None]
    return {
        "bytes": {name: result.bytes for name, result in results.items()},
        "error": max(errors, default=None),
        "export_seconds": seconds / len(networks),
        "processor_ms": milliseconds,
    }


def processor_ms(actions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median processor time in ms of each action; rounds run each once, in any order."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(WARM_UP + ROUNDS):
        for name in order.sample(list(actions), len(actions)):
            start = time.process_time()
            actions[name]()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(runs) for name, runs in times.items()}


def written(
    file_format: str, model: nn.Module, image: Tensor, path: Path
) -> tuple[ExportResult | FormatResult, Callable[[], object] | None]:
    """Write a network, and return what runs the file on the image, if anything can."""
    if file_format == "onnx":
        onnx_result = export_onnx(model, image, path)
        return onnx_result, in_turn(lambda: partial(onnx_runner(path), image))
    result = export_as(file_format, model, image, path)  # type: ignore[arg-type]
    load = FORMATS[result.format].load
    return result, None if load is None else in_turn(lambda: partial(load(path), (image,)))


def table(rows: list[Measurement]) -> str:
    """Return error and time by network and format."""
    networks = dict.fromkeys(row["network"] for row in rows)
    titles = {
        row["network"]: f"{row['network']}{', trained' * row['is_trained']}, "
        f"{row['macs_left']:.2f} of the MACs"
        for row in rows
    }
    titles_of_formats = " | ".join(f"`{name}`" for name in PACKAGES)
    lines = [
        f"| network | {titles_of_formats} |",
        "|---|" + "---|" * len(PACKAGES),
    ]
    by_key = {(row["network"], row["file_format"]): row for row in rows}
    for network in networks:
        texts = [text_of(by_key.get((network, file_format))) for file_format in PACKAGES]
        lines.append(f"| {titles[network]} | {' | '.join(texts)} |")
    return "\n".join(lines)


def text_of(row: Measurement | None) -> str:
    """Return a cell: time left, and the error."""
    if row is None:
        return "–"
    if "reason" in row:
        return "fails"
    if row["error"] is None:
        return "written"
    times = row["processor_ms"]
    return f"{times['cut'] / times['whole']:.2f}, {row['error']:.0e}"


if __name__ == "__main__":
    main()
