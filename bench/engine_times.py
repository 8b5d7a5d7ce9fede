"""Time cut networks beside whole ones in every engine, in float and in int8.

    python bench/engine_times.py [--networks PATTERN] [--threads 1 2] [--data DIR --weights DIR]

Each network is cut to 0.6 of its MACs with widths by default and, beside them, free widths and
multiples of 16. Trained networks (`--data`, the folder of the ImageNet samples and of YOLOX's
images, and `--weights`) have the plan of `secateur prune`; others have random weights, a random
ranking and equal shares, so that every width is cut. What an engine runs of a network is timed
interleaved, 1 and 16 images at a time, for engines that are installed (`--engines compile` too, for
the default widths alone, since compiling takes minutes). Each network and engine adds a line to
`results/engine_times.jsonl`, and the tables are in docs/explanation/widths.md.
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
from secateur.config import Budget, EngineName, RunConfig
from secateur.data import DataSet
from secateur.engines.file_engine import FileEngine
from secateur.engines.onnx_file import write_onnx
from secateur.engines.quantised_file import quantise_file
from secateur.engines.registry import find_engine
from secateur.graph.build import build_dependency_graph
from secateur.graph.cut import cut
from secateur.graph.module_state import evaluating
from secateur.pipeline.scoring_context import make_scoring_context
from secateur.pruning.plan import Allocation, make_plan
from secateur.runtime.timing import Rounds, interleaved_medians, repeat_to_batch
from tables import with_table

RESULTS = ROOT / "results" / "engine_times.jsonl"
PAGE = ROOT / "docs" / "explanation" / "widths.md"
KEY = ("network", "threads", "engine")
TRAINED = ("mobilenetv2", "yolox_nano")
NETWORKS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
    *("regnet_y_400mf", "shufflenet_v2_x1_0", "densenet121", "convnext_tiny"),
)
"""Of torchvision, with random weights."""
TARGET = "macs=0.6"
WIDTHS: dict[str, int | None] = {"free": 1, "default": None, "16": 16}
COMPILED = ("whole", "default")
BATCHES, SEED = (1, 16), 0
SIDES = {"yolox_nano": 416}
SIDE = 224
ENGINES: tuple[EngineName, ...] = ("pytorch", "onnxruntime", "openvino")
ROUNDS = Rounds(fewest=7, most=51, seconds=12.0, warm_up=2)
INT8_IMAGES = 8
"""Noise images that set the ranges of activations: only time is measured here."""


def main() -> None:
    """Measure the missing rows and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="*", help="pattern of networks")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--data", help="the folder of the samples")
    parser.add_argument("--weights", type=Path, help="the folder of the weights")
    parser.add_argument("--tables", action="store_true", help="write the tables alone")
    arguments = parser.parse_args()
    networks = NETWORKS if arguments.weights is None else (*TRAINED, *NETWORKS)
    if not arguments.tables:
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        for network in fnmatch.filter(networks, arguments.networks):
            missing = [
                (threads, engine)
                for threads, engine in itertools.product(arguments.threads, arguments.engines)
                if (network, threads, engine) not in known
                and (engine != "openvino" or has("openvino"))
            ]
            if missing:
                measure(network, missing, arguments)
    rows = read_measurements(RESULTS, KEY)
    PAGE.write_text(with_table(PAGE.read_text(), "results/engine_times.jsonl", table(rows)))


def measure(
    network: str, missing: list[tuple[int, EngineName]], arguments: argparse.Namespace
) -> None:
    """Append a row for each number of threads and engine."""
    model, smaller = trained(network, arguments) if network in TRAINED else untrained(network)
    side = SIDES.get(network, SIDE)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    macs = {name: build_dependency_graph(one, images).macs() for name, one in smaller.items()}
    whole_macs = build_dependency_graph(model, images).macs()
    networks = {"whole": model, **smaller}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: written(one, images, Path(folder), name) for name, one in networks.items()}
        for threads, engine in missing:
            torch.set_num_threads(threads)
            row: Measurement = {
                "network": network,
                "threads": threads,
                "engine": engine,
                "target": TARGET,
                "seed": SEED,
                "is_trained": network in TRAINED,
                "macs_left": {name: one / whole_macs for name, one in macs.items()},
                "milliseconds": {
                    str(batch): timed(engine, networks, files, repeat_to_batch(images, batch))
                    for batch in BATCHES
                },
                "command": "python bench/engine_times.py",
                "revision": revision(),
                "environment": surroundings("onnx", "onnxruntime", *["openvino"] * has("openvino")),
            }
            append_measurement(RESULTS, row)
            print(network, threads, table([row]), sep="\n", flush=True)


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


def trained(network: str, arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return a trained network, and networks that the default method cuts from it."""
    config, dataset, model = load_trained(network, arguments)
    smaller = {
        name: planned(model, dataset, config, TARGET, multiple) for name, multiple in WIDTHS.items()
    }
    return model.eval(), smaller


def planned(
    model: nn.Module, dataset: DataSet, config: RunConfig, target: str, multiple: int | None
) -> nn.Module:
    """Return the network that the default method cuts from a trained one, without a refit."""
    plan = config.plan.model_copy(update={"target": target, "round_to": multiple})
    run_config = config.model_copy(update={"plan": plan})
    context = make_scoring_context(
        model, dataset, run_config, criterion_names=(run_config.score.criterion,)
    )
    inputs = context.make_plan_inputs(model, run_config)[run_config.score.criterion]
    made = inputs.plan(plan.budget)
    return cut(model, context.dependencies, made.removed).eval()


def load_trained(
    network: str, arguments: argparse.Namespace
) -> tuple[RunConfig, DataSet, nn.Module]:
    """Return the configuration of a network's run, the images, and the trained network."""
    if network == "yolox_nano":
        from detection import load_study

        study = load_study(Path(arguments.data) / "yolox_nano_coco")
        return study.config, study.dataset, study.model
    from studies import load_study_network

    changed = {**vars(arguments), "study": "imagenet"}
    return load_study_network(network, argparse.Namespace(**changed))


def written(model: nn.Module, images: Tensor, folder: Path, name: str) -> dict[str, Path]:
    """Return the float and the int8 file of a network."""
    files = {form: folder / f"{name}.{form}.onnx" for form in ("float", "int8")}
    write_onnx(model, images, files["float"])
    noise = repeat_to_batch(images, INT8_IMAGES).contiguous().numpy()
    quantise_file(files["float"], files["int8"], [{"images": noise}])
    return files


def timed(
    engine_name: EngineName,
    networks: Mapping[str, nn.Module],
    files: Mapping[str, Mapping[str, Path]],
    batch: Tensor,
) -> dict[str, float]:
    """Return the median times by `form network`, interleaved."""
    engine = find_engine(engine_name)
    actions: dict[str, Callable[[], object]] = {}
    with torch.inference_mode():
        for name, model in networks.items():
            if isinstance(engine, FileEngine):
                for form, file in files[name].items():
                    actions[f"{form} {name}"] = engine.prepare_file(file, (batch,))
            elif engine_name != "compile" or name in COMPILED:
                with evaluating(model):
                    actions[f"float {name}"] = engine.prepare(model, batch)
        return interleaved_medians(actions, ROUNDS)


def table(rows: list[Measurement]) -> str:
    """Return time over that of the whole network by network, engine, form and widths."""
    lines = [
        "| network | threads | engine | form | free, batch 1 / 16 | default | multiples of 16 |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: key_of(row, KEY)):
        engine = row["engine"]
        for form in dict.fromkeys(key.split()[0] for key in row["milliseconds"]["1"]):
            texts = []
            for name, batch in itertools.product(WIDTHS, map(str, BATCHES)):
                times = row["milliseconds"][batch]
                if f"{form} {name}" not in times:
                    texts.append("–")
                    continue
                ratio = times[f"{form} {name}"] / times[f"{form} whole"]
                ratios.setdefault((engine, form, name), []).append(ratio)
                texts.append(f"{ratio:.2f}")
            pairs = [" / ".join(texts[start : start + 2]) for start in (0, 2, 4)]
            title = f"{row['network']}{', trained' if row['is_trained'] else ''}"
            lines.append(
                f"| {title} | {row['threads']} | {engine} | {form} | {' | '.join(pairs)} |"
            )
    for engine, form in dict.fromkeys(key[:2] for key in ratios):
        lists = [ratios.get((engine, form, name)) for name in WIDTHS]
        texts = [
            f"{statistics.geometric_mean(one):.2f}, most {max(one):.2f}" if one else "–"
            for one in lists
        ]
        lines.append(f"| **geometric mean** | | {engine} | {form} | {' | '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
