"""YOLOX-Nano pruned without labels and without training, and what it costs in COCO's AP.

    python bench/detection.py --data DIR

`DIR` holds the network's weights, `yolox_nano_fp16.safetensors`, and a data set in YOLO's layout:
images to calibrate on, without labels, and annotated ones to score, which choose nothing.

`vote` is secateur's default, `reconstruction` another criterion with a plan of its own. `l1` and
`random` remove as many channels of every group as `vote`, ranked otherwise, with the same refit.
After Torch-Pruning the batch-norm statistics are estimated again on the calibration images. Each
method adds a line to `results/detection.jsonl` as soon as it is measured; lines that are there are
not measured again. `--tables` only writes the tables in docs/how_to/detection.md. Intervals are by
bootstrap over the scored images, 95 %; those of a difference draw the same images before and after.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import peer
from measurements import Measurement, append_measurement, key_of, read_measurements
from peer_search import cut_to
from rows import ROOT, reason_of, revision, surroundings
from secateur.config import PlanSection, RunConfig, parse_budget
from secateur.data import Batch, DataSet
from secateur.graph.cut import cut
from secateur.graph.dependency import Removed
from secateur.integrations import yolox
from secateur.models.examine import run_network
from secateur.models.metrics.coco import SIZES, Evaluation
from secateur.models.metrics.detection import AveragePrecision
from secateur.pipeline.inputs import load_inputs, resolve_config
from secateur.pipeline.scoring_context import ScoringContext, make_scoring_context
from secateur.pruning.plan_inputs import PlanInputs, make_plan_inputs
from secateur.pruning.ranking import rank
from secateur.pruning.refit.layerwise import RefitInputs
from secateur.pruning.refit.refit_and_check import refit_and_check
from secateur.scoring.criteria import make_criterion
from tables import with_table

RESULTS = ROOT / "results" / "detection.jsonl"
PAGE = ROOT / "docs" / "how_to" / "detection.md"
KEY = ("method", "target", "stage")
TARGETS = ("0.9", "0.8")
BEFORE = "before"
OURS = ("vote", "reconstruction", "l1", "random")
PEERS = (
    ("l2", False),
    ("bn_scale", False),
    ("fpgm", False),
    ("l2", True),
    ("lamp", True),
)
"""Criteria of Torch-Pruning, and whether it ranks all layers together."""
RESAMPLES = 300
BATCH_SIZE = 4
POSITIONS = 128
"""In the refit, of each image: there are few images. Chosen by the agreement with the original's
boxes on 32 of the calibration images, held out."""


@dataclass(frozen=True, eq=False)
class Study:
    """The network, its images, and what is measured on them."""

    model: nn.Module
    config: RunConfig
    dataset: DataSet
    context: ScoringContext

    def score(self, network: nn.Module) -> Evaluation:
        """Return the evaluation on the annotated images."""
        metric = AveragePrecision(yolox.decode, "box", self.dataset.class_names)
        with torch.inference_mode():
            for batch in self.context.reader.read_shard(self.dataset.test):
                metric.update(network, run_network(network, batch.images), batch)
        metric.merge()
        return metric.evaluation()

    def calibration(self) -> Iterator[Batch]:
        """Yield the calibration images."""
        yield from self.context.reader.read_shard(self.context.calibration)

    def removals(self) -> dict[tuple[str, str], Removed]:
        """Return the channels that each of `OURS` removes for each target."""
        parts = self.context, self.config
        planned = _plan_inputs(self.model, *parts, OURS[:2], PlanSection())
        others = _plan_inputs(self.model, *parts, OURS[2:], PlanSection(allocation="uniform"))
        groups = self.context.dependencies.groups
        removals: dict[tuple[str, str], Removed] = {}
        for target in TARGETS:
            budget = parse_budget(f"macs={target}")
            removals |= {(n, target): inputs.plan(budget).removed for n, inputs in planned.items()}
            removed = removals["vote", target]
            counts = {
                name: len(group) - len(removed.get(name, ())) for name, group in groups.items()
            }
            for name, inputs in others.items():
                ranking = rank(inputs.scores.scores, self.context.dependencies, name)
                removals[name, target] = ranking.removed(counts)
        return dict(sorted(removals.items(), key=lambda item: OURS.index(item[0][0])))

    def refit(self, smaller: nn.Module, removed: Removed) -> None:
        """Refit a cut network in place."""
        refit_and_check(
            RefitInputs(self.model, smaller, self.context.dependencies, removed),
            self.context.refit_images,
            self.config.refit,
            seed=self.config.seed,
        )


def _plan_inputs(
    model: nn.Module,
    context: ScoringContext,
    config: RunConfig,
    names: Sequence[str],
    plan: PlanSection,
) -> dict[str, PlanInputs]:
    criteria = {name: make_criterion(name, context.source, config) for name in names}
    return make_plan_inputs(
        model,
        context.dependencies,
        context.plan_images,
        criteria,
        context.source,
        config.score,
        plan,
    )


def load_study(data: Path) -> Study:
    """Return the study of the network and images in a folder."""
    config = RunConfig.model_validate(
        {
            "model": {
                "name": "yolox:yolox_nano",
                "weights": str(data / "yolox_nano_fp16.safetensors"),
            },
            "data": {
                "source": f"yolo:{data}",
                "calibration_images": 128,
                "stratified": False,
                "validation_fraction": 0.01,  # nothing is chosen on validation images
                "batch_size": BATCH_SIZE,
            },
            "refit": {"positions": POSITIONS},
        }
    )
    dataset, model = load_inputs(config)
    config = resolve_config(config, dataset, model)
    context = make_scoring_context(model, dataset, config, criterion_names=("vote",))
    return Study(model, config, dataset, context)


def measure(study: Study, only: str) -> None:
    """Append what is missing."""
    known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
    generator = torch.Generator().manual_seed(0)
    count = len(study.dataset.test.labels)
    draws = torch.randint(count, (RESAMPLES, count), generator=generator)
    whole = study.score(study.model)
    before = _resampled(whole, draws)
    origin = {
        "images": count,
        "calibration_images": len(study.context.calibration.labels),
        "command": "python bench/detection.py --data DIR",
        "revision": revision(),
        "environment": surroundings("torch-pruning"),
    }

    def note(method: str, target: str, stage: str, network: nn.Module, left: float) -> None:
        since = time.perf_counter()
        evaluation = whole if stage == BEFORE else study.score(network)
        row: Measurement = {"method": method, "target": target, "stage": stage, "macs_left": left}
        row |= _figures(evaluation, before, draws, study.dataset.class_names) | origin
        append_measurement(RESULTS, row)
        print(method, target, stage, f"{100 * row['AP']:.1f}", round(time.perf_counter() - since))

    def is_wanted(method: str, target: str, stage: str) -> bool:
        return fnmatch.fnmatch(method, only) and (method, target, stage) not in known

    if is_wanted(BEFORE, "1.0", BEFORE):
        note(BEFORE, "1.0", BEFORE, study.model, 1.0)
    if any(is_wanted(name, target, "refit") for name in OURS for target in TARGETS):
        _measure_ours(study, is_wanted, note)
    _measure_peers(study, is_wanted, note)


Note = Callable[[str, str, str, nn.Module, float], None]


def _measure_ours(study: Study, is_wanted: Callable[[str, str, str], bool], note: Note) -> None:
    dependencies = study.context.dependencies
    for (name, target), removed in study.removals().items():
        if not is_wanted(name, target, "refit"):
            continue
        smaller = cut(study.model, dependencies, removed)
        left = dependencies.macs(removed) / dependencies.macs()
        note(name, target, "cut", smaller, left)
        study.refit(smaller, removed)
        note(name, target, "refit", smaller, left)


def _measure_peers(study: Study, is_wanted: Callable[[str, str, str], bool], note: Note) -> None:
    image = study.context.example[:1]
    last = ("head.cls_preds.", "head.reg_preds.", "head.obj_preds.")
    whole = frozenset(n for n, _ in study.model.named_modules() if n.startswith(last))
    for target in TARGETS:
        for criterion, is_global in PEERS:
            name = f"torch-pruning {criterion}, {'global' if is_global else 'uniform'}"
            if not is_wanted(name, target, "recalibrated"):
                continue
            settings = peer.Settings(criterion, is_global, whole)
            try:
                peer_cut = cut_to(study.model, image, settings, float(target))
            except Exception as error:  # whatever the peer raises is a result
                print(name, target, reason_of(error))
                continue
            smaller = copy.deepcopy(peer_cut.model)
            recalibrate(smaller, study.calibration())
            note(name, target, "recalibrated", smaller, peer_cut.macs_left)


def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Estimate batch-norm statistics again, as `torch.optim.swa_utils.update_bn` does.

    All else stays in evaluation mode, because YOLOX in training mode asks for labels.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.inference_mode():
        for batch in batches:
            model(batch.images)
    model.eval()


def _resampled(evaluation: Evaluation, draws: Tensor) -> Tensor:
    """Return AP and AP50 of each draw of images, `[draw, 2]`."""
    rows = (evaluation.resampled(draw) for draw in draws)
    return torch.tensor([[row["AP"], row["AP50"]] for row in rows])


def _figures(
    evaluation: Evaluation, before: Tensor, draws: Tensor, names: tuple[str, ...]
) -> Measurement:
    figures = evaluation.figures(names)
    general = ("AP", "AP50", "AP75", *(f"AP {size}" for size in SIZES))
    after = _resampled(evaluation, draws)
    drop = before - after
    return {
        **{name: round(figures.pop(name), 5) for name in general if name in figures},
        "AP interval": _interval(after[:, 0]),
        "AP50 interval": _interval(after[:, 1]),
        "drop interval": _interval(drop[:, 0]),
        "classes": {name.removeprefix("AP "): round(ap, 4) for name, ap in figures.items()},
    }


def _interval(values: Tensor) -> list[float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975])).tolist()
    return [round(low, 4), round(high, 4)]


# --- tables ------------------------------------------------------------------------------------


def table(rows: list[Measurement]) -> str:
    """Return AP by method and target, with intervals and sizes."""
    lines = [
        "| method | MACs left | AP | points lost (95 %) | AP50 | small | medium | large |",
        "|---|---|---|---|---|---|---|---|",
    ]
    whole = next(row for row in rows if row["stage"] == BEFORE)
    ordered = sorted(rows, key=lambda row: (-float(row["target"]), -row["AP"]))
    for row in ordered:
        name = row["method"]
        if row["stage"] in ("cut", "refit"):
            name += " without refit" if row["stage"] == "cut" else ", refit"
        low, high = (100 * bound for bound in row["drop interval"])
        lost = (
            "" if row is whole else f"{100 * (whole['AP'] - row['AP']):.1f} ({low:.1f}–{high:.1f})"
        )
        sizes = " | ".join(f"{100 * row[f'AP {size}']:.1f}" for size in SIZES)
        lines.append(
            f"| {name} | {row['macs_left']:.3f} | {100 * row['AP']:.1f} | {lost} | "
            f"{100 * row['AP50']:.1f} | {sizes} |"
        )
    low, high = (100 * bound for bound in whole["AP interval"])
    lines += [
        "",
        f"COCO's AP in % on {whole['images']} images of val2017, calibrated on "
        f"{whole['calibration_images']} images of train2017 without labels; the interval of the AP "
        f"before is {low:.1f}–{high:.1f}.",
    ]
    return "\n".join(lines)


def class_table(rows: list[Measurement], most: int = 12) -> str:
    """Return the AP of the classes that lose most by the default at the first target."""
    whole = next(row for row in rows if row["stage"] == BEFORE)
    chosen = [
        next((r for r in rows if key_of(r, KEY) == ("vote", target, "refit")), None)
        for target in TARGETS
    ]
    after = [row for row in chosen if row is not None]
    lines = [
        f"| class | before | {' | '.join(row['target'] for row in after)} |",
        f"|---|---|{'---|' * len(after)}",
    ]
    by_loss = sorted(
        whole["classes"], key=lambda name: after[0]["classes"][name] - whole["classes"][name]
    )
    for name in by_loss[:most]:
        values = [whole["classes"][name], *(row["classes"][name] for row in after)]
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return "\n".join(lines)


def write_tables() -> None:
    """Write the tables of the page."""
    rows = read_measurements(RESULTS, KEY)
    text = with_table(PAGE.read_text(), "results/detection.jsonl", table(rows))
    PAGE.write_text(with_table(text, "results/detection.jsonl classes", class_table(rows)))


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the weights and of the images")
    parser.add_argument("--only", default="*", help="pattern of methods")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.tables:
        if arguments.data is None:
            parser.error("--data is needed")
        measure(load_study(arguments.data), arguments.only)
    write_tables()


if __name__ == "__main__":
    main()
