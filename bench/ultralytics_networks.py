"""Prune every kind of Ultralytics network, train it by Ultralytics' trainer, and export it.

    python bench/ultralytics_networks.py [--only PATTERN] [--tables]

Each of the 20 networks (four families, five tasks) is built from its YAML file with random
weights, cut to 60 % of its MACs, compared with the masked original, saved, loaded, trained for two
epochs on 24 images of COCO, and exported to ONNX; all in a process of its own. The rows go to
results/ultralytics.json, and the table to docs/how_to/ultralytics.md. The images are those of
`shared/data/yolox_nano_coco`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rows import (
    ROOT,
    Note,
    Row,
    bench_parser,
    put_row,
    read_rows,
    record,
    revision,
    run_child,
    surroundings,
    versions,
)
from secateur.config import Budget
from secateur.experiments.run_folder import load, save
from secateur.graph.build import build_dependency_graph
from secateur.graph.forward import with_forward
from secateur.graph.ultralytics_networks import raw_maps
from secateur.integrations.ultralytics import as_yolo, build, import_ultralytics
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import check_equivalence
from secateur.pruning.plan import make_plan
from tables import with_table

RESULTS = ROOT / "results" / "ultralytics.json"
PAGE = ROOT / "docs" / "how_to" / "ultralytics.md"
COCO = ROOT.parent / "shared" / "data" / "yolox_nano_coco"
FAMILIES = ("yolov8", "yolo11", "yolo12", "yolo26")
SUFFIXES = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}
SEED = 0
SIDE = 64
"""Height and width of the images that the networks are cut and trained with, in pixels."""
TARGET = 0.6
"""Fraction of the MACs that stays."""
TRAIN, VALIDATE = 16, 8
"""Images of each part of the training data."""
EPOCHS = 2
KEYPOINTS = 17
CLASSES = {"pose": 1, "classify": 2}
"""Classes of the training data, of 80 for the other tasks; the networks are built for them."""
PACKAGES = ("ultralytics", "onnx", "onnxruntime")


def names() -> list[str]:
    """Return the names of the networks."""
    return [f"{family}n{suffix}.yaml" for family in FAMILIES for suffix in SUFFIXES.values()]


def task_of(name: str) -> str:
    """Return Ultralytics' task of a network by its name."""
    stem = Path(name).stem
    return next((t for t, end in SUFFIXES.items() if end and stem.endswith(end)), "detect")


def write_data(task: str, folder: Path, images: Path, labels: Path) -> str:
    """Write a small data set in Ultralytics' layout for a task; return what `data=` takes.

    `images` are the first ones of a folder of COCO's that have objects, `labels` their YOLO text
    labels. Polygons are the corners of the boxes, key points lie inside them, and the class of a
    whole image is whether its largest object is a person.
    """
    pairs = [
        (path, labels / f"{path.stem}.txt")
        for path in sorted(images.glob("*.jpg"))
        if (labels / f"{path.stem}.txt").is_file() and (labels / f"{path.stem}.txt").read_text()
    ]
    parts = {"train": pairs[:TRAIN], "val": pairs[TRAIN : TRAIN + VALIDATE]}
    for part, chosen in parts.items():
        for path, label in chosen:
            boxes = np.loadtxt(label, ndmin=2)
            if task == "classify":
                largest = boxes[(boxes[:, 3] * boxes[:, 4]).argmax()]
                name = "person" if largest[0] == 0 else "other"
                _copy(path, folder / part / name / path.name)
                continue
            _copy(path, folder / "images" / part / path.name)
            target = folder / "labels" / part / label.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(f"{_label(task, box)}\n" for box in boxes))
    if task == "classify":
        for part in parts:  # each part needs each class
            for name in ("person", "other"):
                if not (folder / part / name).is_dir():
                    _copy(parts[part][0][0], folder / part / name / "extra.jpg")
        return str(folder)
    names = {0: "person"} if task == "pose" else {number: str(number) for number in range(80)}
    keypoints = f"kpt_shape: [{KEYPOINTS}, 3]\n" if task == "pose" else ""
    description = folder / "data.yaml"
    description.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\n{keypoints}"
        f"names: {json.dumps(names)}\n".replace('"', "")
    )
    return str(description)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _label(task: str, box: np.ndarray) -> str:
    """Return one line of a label file, from a class and a box (centre, width and height)."""
    number, x, y, width, height = box
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if task == "detect":
        values = [x, y, width, height]
    elif task == "pose":
        number, values = 0, [x, y, width, height]
        for point in range(KEYPOINTS):  # along the diagonal of the box, all visible
            along = (point + 0.5) / KEYPOINTS
            values += [left + along * width, top + along * height, 2]
    else:  # the four corners, as a polygon or as an oriented box
        values = [left, top, right, top, right, bottom, left, bottom]
    return " ".join([str(int(number)), *(f"{value:.6f}" for value in values)])


def with_statistics(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give the batch norms of an untrained network the statistics of some images.

    With those of its constructor features fade from layer to layer, and outputs are constants: any
    cut would leave them as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        model.train()(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.03  # Ultralytics'
    return model.eval()


def measure(name: str, folder: Path, note: Note) -> None:
    """Do with one network what this bench does; `note` records the results, step by step."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    images = torch.rand(4, 3, SIDE, SIDE, generator=generator)
    note(network=name, task=task_of(name), seed=SEED, side=SIDE, stage="build")
    classes = CLASSES.get(task_of(name), 80)
    model = with_statistics(build(name, num_classes=classes), images)
    note(stage="dependency graph")
    start = time.perf_counter()
    dependencies = build_dependency_graph(model, images[:2])
    note(dependency_graph_seconds=round(time.perf_counter() - start, 1), stage="cut")
    scores = {
        group: torch.rand(len(channels), generator=generator)
        for group, channels in dependencies.groups.items()
    }
    plan = make_plan(scores, dependencies, Budget("macs", TARGET), "random")
    smaller = apply_plan(model, dependencies, plan)
    error = check_equivalence(model, dependencies, plan, with_forward(smaller, raw_maps), images)
    with torch.no_grad():
        change = relative_error(raw_maps(smaller.eval(), images), raw_maps(model, images))
    parameters = count(smaller)
    note(
        macs=dependencies.macs(),
        macs_left=dependencies.macs(plan.removed) / dependencies.macs(),
        parameters=count(model),
        parameters_left=parameters,
        equivalence_error=error,
        change=change,
        stage="save",
    )
    run = folder / "run"
    save(run, smaller, plan, image_shape=(3, SIDE, SIDE))
    note(stage="load")
    loaded = load(run, architecture=build(name, num_classes=classes))
    with torch.no_grad():
        is_equal = all(
            torch.equal(one, other)
            for one, other in zip(
                _tuple(raw_maps(loaded, images)), _tuple(raw_maps(smaller, images)), strict=True
            )
        )
    note(loaded_is_equal=is_equal, stage="train")
    data = write_data(
        task_of(name), folder / "data", COCO / "images" / "val2017", COCO / "labels" / "val2017"
    )
    yolo = as_yolo(loaded, folder / "pruned.pt")
    start = time.perf_counter()
    yolo.train(
        data=data,
        epochs=EPOCHS,
        imgsz=SIDE,
        batch=8,
        nbs=8,  # a step after every batch
        seed=SEED,
        device="cpu",
        workers=0,
        plots=False,
        verbose=False,
        project=str(folder),
        name="trained",
    )
    seconds = time.perf_counter() - start
    weights = folder / "trained" / "weights" / "last.pt"
    library = import_ultralytics()
    trained = library.YOLO(weights)
    with torch.no_grad():
        moved = relative_error(
            trained.model.get_parameter("model.0.conv.weight"),
            # Checkpoints of its trainer hold half precision.
            loaded.get_parameter("model.0.conv.weight").half().float(),
        )
    note(
        train_seconds=round(seconds, 1),
        parameters_trained=count(trained.model),
        weights_moved=moved,
        classes=len(trained.names),
        stage="export",
    )
    exported = Path(trained.export(format="onnx", imgsz=SIDE, device="cpu", simplify=False))
    note(stage="run the export", onnx_bytes=exported.stat().st_size)
    note(onnx_error=_onnx_error(weights, exported, images[:1]), stage="done")


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _tuple(maps: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (maps,) if isinstance(maps, torch.Tensor) else maps


def _onnx_error(weights: Path, exported: Path, images: torch.Tensor) -> float:
    """Return how far the outputs of the exported file are from those of the trained network."""
    import onnxruntime

    model = import_ultralytics().YOLO(weights).model.eval()
    head = model.model[-1]
    head.export = True  # without raw maps, as it was exported
    session = onnxruntime.InferenceSession(exported)
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = _tuple(model(images))
    return max(
        relative_error(torch.from_numpy(actual), reference)
        for actual, reference in zip(outputs, expected, strict=True)
    )


def child(arguments: argparse.Namespace) -> None:
    """Measure one network in this process."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        record(
            lambda note: measure(arguments.network, Path(folder), note),
            Path(arguments.out),
            *PACKAGES,
        )


def table(rows: list[Row]) -> str:
    """Return the table of the how-to page."""
    lines = [
        "| network | task | MACs left | error | parameters | pruned | trained | ONNX error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["outcome"] != "ok":
            lines.append(f"| {row['network']} | {row['task']} | {row['reason']} | | | | | |")
            continue
        lines.append(
            f"| {Path(row['network']).stem} | {row['task']} | {100 * row['macs_left']:.1f} % "
            f"| {row['equivalence_error']:.0e} | {row['parameters']:,} "
            f"| {row['parameters_left']:,} | {row['parameters_trained']:,} "
            f"| {row['onnx_error']:.0e} |"
        )
    return "\n".join(lines)


def is_right(row: Row) -> bool:
    """Return whether everything about a network is as it must be."""
    return bool(
        row["outcome"] == "ok"
        and abs(row["macs_left"] - TARGET) <= 0.03
        and row["equivalence_error"] < 1e-4 < row["change"]
        and row["loaded_is_equal"]
        and row["parameters_trained"] == row["parameters_left"] < row["parameters"]
        and row["weights_moved"] > 0
        and row["onnx_error"] < 1e-3
    )


def summary(rows: list[Row]) -> str:
    """Return how many networks are as they must be, and where they were measured."""
    right = sum(map(is_right, rows))
    last = rows[-1]["environment"]
    listed = ", ".join(f"{name} {value}" for name, value in last.items())
    return (
        f"{right} of {len(rows)} networks pass every step. Measured with seed {SEED} at "
        f"{SIDE}×{SIDE} pixels; {listed}."
    )


def page(text: str, rows: list[Row]) -> str:
    """Return the how-to page with the table and its summary."""
    return with_table(text, "networks", f"{summary(rows)}\n\n{table(rows)}")


def main() -> None:
    """Measure the missing rows and write the table."""
    arguments = bench_parser(__doc__, limit=900).parse_args()
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
    if arguments.child:
        child(arguments)
        return
    for name in [] if arguments.tables else names():
        row = next((row for row in read_rows(RESULTS) if row["network"] == name), None)
        again = arguments.again and fnmatch.fnmatch(name, arguments.again)
        current = {"environment": surroundings(*PACKAGES)}
        is_there = row is not None and row["outcome"] == "ok" and versions(row) == versions(current)
        if not fnmatch.fnmatch(name, arguments.only) or (is_there and not again):
            continue
        out = RESULTS.with_suffix(f".{name}.part.json")
        options = ["--network", name, "--threads", str(arguments.threads)]
        row = run_child("ultralytics_networks.py", options, out, arguments.limit)
        row |= {"command": "python bench/ultralytics_networks.py", "revision": revision()}
        put_row(RESULTS, row, ("network",))
        print(name, row["outcome"], row.get("reason", ""), row["wall_seconds"], flush=True)
    order = {name: number for number, name in enumerate(names())}
    rows = sorted(read_rows(RESULTS), key=lambda row: order[row["network"]])
    PAGE.write_text(page(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
