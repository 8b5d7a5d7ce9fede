"""Time cut networks beside whole ones in every engine, in float and in int8.

    python bench/engine_times.py [--networks PATTERN] [--threads 1 2] [--data DIR --weights DIR]

Each network is cut to 0.6 of its MACs with widths by default and, beside them, free widths and
multiples of 16. Where trained weights are at hand (`--weights`: MobileNetV2) the plan is the one
of `secateur prune`; other networks have random weights, a random ranking and equal shares, so that
every width is cut. All files of a network are timed interleaved, 1 and 16 images of 224² at a time,
with every engine that is installed. Each network adds a line to `results/engine_times.jsonl`, and
the tables are in docs/explanation/widths.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from secateur.config import Budget
from secateur.engines.file_engine import FileEngine
from secateur.engines.onnx_file import write_onnx
from secateur.engines.quantised_file import quantise_file
from secateur.engines.registry import find_engine
from secateur.graph.build import build_dependency_graph
from secateur.graph.cut import cut
from secateur.graph.module_state import evaluating
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.plan import Allocation, make_plan
from secateur.pruning.plan_inputs import make_plan_inputs
from secateur.runtime.timing import Rounds, interleaved_medians, repeat_to_batch
from tables import with_table

RESULTS = ROOT / "results" / "engine_times.jsonl"
PAGE = ROOT / "docs" / "explanation" / "widths.md"
KEY = ("network", "threads")
TRAINED = "mobilenetv2"
NETWORKS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
    *("regnet_y_400mf", "shufflenet_v2_x1_0", "densenet121", "convnext_tiny"),
)
"""Of torchvision, with random weights."""
TARGET = "macs=0.6"
WIDTHS: dict[str, int | None] = {"free": 1, "default": None, "16": 16}
SIDE, BATCHES, SEED = 224, (1, 16), 0
ROUNDS = Rounds(fewest=7, most=51, seconds=15.0, warm_up=2)
INT8_IMAGES = 8
"""Noise images that set the ranges of activations: only time is measured here."""


def main() -> None:
    """Measure the missing rows and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="*", help="pattern of networks")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--engines", nargs="+", default=("pytorch", "onnxruntime", "openvino"))
    parser.add_argument("--data", help="the folder of the ImageNet samples")
    parser.add_argument("--weights", type=Path, help="the folder of the weights")
    parser.add_argument("--tables", action="store_true", help="write the tables alone")
    arguments = parser.parse_args()
    networks = NETWORKS if arguments.weights is None else (TRAINED, *NETWORKS)
    if not arguments.tables:
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        for network in fnmatch.filter(networks, arguments.networks):
            threads = [count for count in arguments.threads if (network, count) not in known]
            if threads:
                measure(network, threads, arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/engine_times.jsonl", table(rows)))


def measure(network: str, threads: list[int], arguments: argparse.Namespace) -> None:
    """Append a row for each number of threads."""
    model, smaller = trained(arguments) if network == TRAINED else untrained(network)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(SEED))
    macs = {name: build_dependency_graph(one, images).macs() for name, one in smaller.items()}
    whole_macs = build_dependency_graph(model, images).macs()
    networks = {"whole": model, **smaller}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: written(one, images, Path(folder), name) for name, one in networks.items()}
        for count in threads:
            torch.set_num_threads(count)
            row: Measurement = {
                "network": network,
                "threads": count,
                "target": TARGET,
                "seed": SEED,
                "is_trained": network == TRAINED,
                "macs_left": {name: one / whole_macs for name, one in macs.items()},
                "milliseconds": {
                    str(batch): timed(networks, files, repeat_to_batch(images, batch), arguments)
                    for batch in BATCHES
                },
                "command": "python bench/engine_times.py",
                "revision": revision(),
                "environment": surroundings("onnx", "onnxruntime", *["openvino"] * has("openvino")),
            }
            append_measurement(RESULTS, row)
            print(network, count, table([row]), sep="\n", flush=True)


def has(package: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def untrained(network: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return a torchvision network with random weights, and cut ones by their widths."""
    torch.manual_seed(SEED)
    model = getattr(torchvision.models, network)().eval()
    dependencies = build_dependency_graph(model, torch.rand(2, 3, SIDE, SIDE))
    scores = {name: torch.rand(len(group)) for name, group in dependencies.groups.items()}
    budget = Budget(TARGET.partition("=")[0], float(TARGET.partition("=")[2]))  # type: ignore[arg-type]
    smaller = {}
    for name, multiple in WIDTHS.items():
        plan = make_plan(
            *(scores, dependencies, budget, "random"),
            allocation=Allocation("uniform"),
            round_to=multiple,
        )
        smaller[name] = cut(model, dependencies, plan.removed).eval()
    return model, smaller


def trained(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return the trained MobileNetV2, and networks that the default method cuts from it."""
    from actions import load_network

    config, dataset, model = load_network(
        TRAINED, argparse.Namespace(**{**vars(arguments), "study": "imagenet"})
    )
    smaller = {}
    for name, multiple in WIDTHS.items():
        plan = config.plan.model_copy(update={"target": TARGET, "round_to": multiple})
        run_config = config.model_copy(update={"plan": plan})
        context = make_scoring_context(
            model, dataset, run_config, criterion_names=(run_config.score.criterion,)
        )
        inputs = make_plan_inputs(
            *(model, context.dependencies, context.plan_images, context.criteria, context.source),
            *(run_config.score, run_config.plan),
        )[run_config.score.criterion]
        made = inputs.plan(plan.budget)
        smaller[name] = cut(model, context.dependencies, made.removed).eval()
    return model.eval(), smaller


def written(model: nn.Module, images: Tensor, folder: Path, name: str) -> dict[str, Path]:
    """Return the float and the int8 file of a network."""
    files = {form: folder / f"{name}.{form}.onnx" for form in ("float", "int8")}
    write_onnx(model, images, files["float"])
    noise = repeat_to_batch(images, INT8_IMAGES).contiguous().numpy()
    quantise_file(files["float"], files["int8"], [{"images": noise}])
    return files


def timed(
    networks: Mapping[str, nn.Module],
    files: Mapping[str, Mapping[str, Path]],
    batch: Tensor,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Return the median times by `engine form network`; those of an engine are interleaved."""
    medians: dict[str, float] = {}
    with torch.inference_mode():
        for engine_name in arguments.engines:
            if engine_name == "openvino" and not has("openvino"):
                continue
            engine = find_engine(engine_name)
            actions: dict[str, Callable[[], object]] = {}
            for name, model in networks.items():
                if not isinstance(engine, FileEngine):
                    with evaluating(model):
                        actions[f"{engine_name} float {name}"] = engine.prepare(model, batch)
                    continue
                for form, file in files[name].items():
                    action = engine.prepare_file(file, (batch,))
                    actions[f"{engine_name} {form} {name}"] = action
            medians |= interleaved_medians(actions, ROUNDS)
    return medians


def table(rows: list[Measurement]) -> str:
    """Return time over that of the whole network by network, engine, form and widths."""
    lines = [
        "| network | threads | engine | form | free, batch 1 / 16 | default | multiples of 16 |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: key_of(row, KEY)):
        kinds = dict.fromkeys(
            tuple(key.split()[:2]) for times in row["milliseconds"].values() for key in times
        )
        for engine, form in kinds:
            texts = []
            for name, batch in itertools.product(WIDTHS, map(str, BATCHES)):
                times = row["milliseconds"][batch]
                ratio = times[f"{engine} {form} {name}"] / times[f"{engine} {form} whole"]
                ratios.setdefault((engine, form, name), []).append(ratio)
                texts.append(f"{ratio:.2f}")
            pairs = [" / ".join(texts[start : start + 2]) for start in (0, 2, 4)]
            title = f"{row['network']}{', trained' if row['is_trained'] else ''}"
            lines.append(
                f"| {title} | {row['threads']} | {engine} | {form} | {' | '.join(pairs)} |"
            )
    for engine, form in dict.fromkeys(key[:2] for key in ratios):
        means = [statistics.geometric_mean(ratios[engine, form, name]) for name in WIDTHS]
        largest = [max(ratios[engine, form, name]) for name in WIDTHS]
        texts = [f"{mean:.2f}, most {most:.2f}" for mean, most in zip(means, largest, strict=True)]
        lines.append(f"| **geometric mean** | | {engine} | {form} | {' | '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
