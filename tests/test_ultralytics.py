"""Networks of Ultralytics', pruned, in Ultralytics' own trainer, validator and exporter."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import secateur
from layouts import random_pixels, write_image
from networks import random_plan, several
from secateur.graph.build import build_dependency_graph, traceable_forward
from secateur.graph.dependency import DependencyGraph
from secateur.graph.forward import with_forward
from secateur.graph.ultralytics_networks import raw_maps
from secateur.models.divergence import relative_error
from secateur.pruning.equivalence import check_equivalence
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import UnknownName, UsageError

# Before the first import: where it writes its settings, and that it looks nothing up.
SETTINGS = tempfile.TemporaryDirectory()
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_CONFIG_DIR=SETTINGS.name)
ultralytics = pytest.importorskip("ultralytics")

from secateur.integrations.ultralytics import (  # noqa: E402
    as_yolo,
    build,
    decoder,
    load_yolo,
    names,
    preprocessing,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its dependencies
SIDE = 64
NETWORK = """
nc: 3
reg_max: {reg_max}
end2end: {end2end}
kpt_shape: [2, 3]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, C2f, [{width}, True]]
  - [-1, 1, {block}]
head:
  - {head}
"""
HEADS = {
    "detect": "[[2], 1, Detect, [nc]]",
    "segment26": "[[2], 1, Segment26, [nc, 8, 16]]",
    "pose26": "[[2], 1, Pose26, [nc, [2, 3]]]",
    "classify": "[-1, 1, Classify, [nc]]",
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Ultralytics' trainer sets the number of threads for good."""
    yield
    torch.set_num_threads(1)


def tiny(folder: Path, head: str, *, two_branches: bool = False) -> nn.Module:
    """A network of Ultralytics' parts, small enough for a test, whose outputs depend on images."""
    path = folder / f"{head}.yaml"
    ends = {"end2end": two_branches, "reg_max": 1 if two_branches else 16}
    width = 128 if head == "detect" else 16  # attention has a head for 64 channels
    block = "C2PSA, [128]" if head == "detect" else "Conv, [16, 3, 2]"
    path.write_text(NETWORK.format(head=HEADS[head], block=block, width=width, **ends))
    torch.manual_seed(0)
    model = build(str(path))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images(8))
    return model.eval()


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def pruned(model: nn.Module) -> tuple[nn.Module, DependencyGraph, PruningPlan]:
    dependencies = build_dependency_graph(model, images())
    plan = random_plan(dependencies, torch.Generator().manual_seed(0))
    return secateur.apply_plan(model, dependencies, plan), dependencies, plan


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("head", "two_branches"),
    [("detect", False), ("segment26", True), ("pose26", True), ("classify", False)],
)
def test_networks_of_every_task_are_cut_where_they_train_and_where_they_infer(
    head: str, two_branches: bool, tmp_path: Path
) -> None:
    model = tiny(tmp_path, head, two_branches=two_branches)
    before = [module.training for module in model.modules()]
    smaller, dependencies, plan = pruned(model)
    through = with_forward(smaller, raw_maps)
    assert check_equivalence(model, dependencies, plan, through, images(3)) < 1e-4
    with torch.no_grad():
        assert relative_error(raw_maps(smaller, images(3)), raw_maps(model, images(3))) > 1e-2
        smaller.eval()(images())
        smaller.train()(images())
    assert [module.training for module in model.modules()] == before
    for module in smaller.modules():
        if hasattr(module, "forward_split"):  # as Ultralytics exports it
            vars(module)["forward"] = module.forward_split
    smaller.eval()(images())
    assert "sized by a number" not in " ".join(group.reason for group in dependencies.frozen)
    layers = {layer.name for layer in dependencies.layers}  # of both branches, and of training
    convolutions = {name for name, module in model.named_modules() if is_convolution(module)}
    assert convolutions <= layers | {"model.3.dfl.conv"}


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def test_a_run_folder_is_loaded_without_the_original_weights(tmp_path: Path) -> None:
    model = tiny(tmp_path, "detect")
    smaller, _, plan = pruned(model)
    secateur.save(tmp_path / "run", smaller, plan, image_shape=(3, SIDE, SIDE))
    torch.manual_seed(1)
    loaded = secateur.load(tmp_path / "run", architecture=build(str(tmp_path / "detect.yaml")))
    assert type(loaded) is type(model)
    program = secateur.load_program(tmp_path / "run")
    with torch.no_grad():
        expected = several(raw_maps(smaller, images(3)))
        for network in (with_forward(loaded, raw_maps), program):
            outputs = several(network(images(3)))
            assert all(map(torch.equal, outputs, expected))
        actual, reference = loaded(images())[0], smaller(images())[0]
        assert torch.equal(actual, reference)


def test_prune_compares_the_raw_maps(tmp_path: Path) -> None:
    model = tiny(tmp_path, "detect")
    result = secateur.prune(
        model,
        images(12),
        target=0.7,
        criterion="l1",
    )
    assert type(result.model) is type(model)
    assert result.scores["refit"].macs <= 0.7 * result.scores["before"].macs
    assert result.model(images())[0].shape == model(images())[0].shape
    yolo = as_yolo(result.model, tmp_path / "pruned.pt")
    assert parameters(yolo.model) == parameters(result.model)


def write_data(folder: Path, task: str, classes: int) -> str:
    """Eight images with a box each, or in a folder for their class."""
    for number in range(8):
        part = "train" if number < 6 else "val"
        pixels = random_pixels(SIDE, SIDE, 3, seed=number)
        if task == "classify":
            name = str(number % classes)
            write_image(folder / part / name / f"{number}.png", pixels)
            continue
        write_image(folder / "images" / part / f"{number}.png", pixels)
        label = folder / "labels" / part / f"{number}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(f"{number % classes} 0.5 0.5 0.4 0.4\n")
    if task == "classify":
        return str(folder)
    listed = ", ".join(f"{number}: thing{number}" for number in range(classes))
    description = folder / "data.yaml"
    description.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{{listed}}}\n"
    )
    return str(description)


def train(yolo: Any, data: str, folder: Path) -> Path:
    yolo.train(
        data=data,
        epochs=1,
        imgsz=SIDE,
        batch=4,
        nbs=4,
        device="cpu",
        workers=0,
        plots=False,
        verbose=False,
        optimizer="SGD",
        project=str(folder),
        name="trained",
    )
    return folder / "trained" / "weights" / "last.pt"


@pytest.mark.filterwarnings("ignore")  # of Ultralytics and of torch's exporter
@pytest.mark.parametrize(
    ("head", "task", "classes"), [("detect", "detect", 2), ("classify", "classify", 3)]
)
def test_its_trainer_keeps_a_network_pruned_and_its_exporter_takes_it(
    head: str, task: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny(tmp_path, head, two_branches=head == "detect")
    smaller, _, _ = pruned(model)
    yolo = as_yolo(smaller, tmp_path / "pruned.pt")
    assert yolo.task == task
    if task == "detect":
        yolo.predict(torch.rand(1, 3, SIDE, SIDE), imgsz=SIDE, device="cpu", verbose=False)
    data = write_data(tmp_path / "data", task, classes)
    weights = train(yolo, data, tmp_path)
    trained = ultralytics.YOLO(weights)
    if classes == 3:
        assert parameters(trained.model) == parameters(smaller)
    else:  # the last layer of each class head has an output less
        expected = copy.deepcopy(smaller)
        shapes = {name: tensor.shape for name, tensor in expected.named_parameters()}
        changed = {n for n, t in trained.model.named_parameters() if t.shape != shapes[n]}
        assert changed
        assert all("cv3" in name and ".2." in name for name in changed)
        assert trained.names == {0: "thing0", 1: "thing1"}
    before = smaller.get_parameter("model.0.conv.weight").half().float()
    assert relative_error(trained.model.get_parameter("model.0.conv.weight"), before) > 1e-3
    again = load_yolo(weights)
    train(again, data, tmp_path / "again")
    assert parameters(again.model) == parameters(trained.model)
    metrics = ultralytics.YOLO(weights).val(
        data=data, imgsz=SIDE, device="cpu", workers=0, plots=False, verbose=False
    )
    assert metrics.results_dict
    monkeypatch.setattr("ultralytics.engine.exporter.file_size", lambda path: 1)  # MB, at least 0.1
    exported = ultralytics.YOLO(weights).export(
        format="onnx", imgsz=SIDE, device="cpu", simplify=False
    )
    assert Path(exported).stat().st_size > 0


def test_a_trainer_that_would_build_the_network_anew_is_refused(tmp_path: Path) -> None:
    yolo = as_yolo(tiny(tmp_path, "detect"), tmp_path / "network.pt")
    data = write_data(tmp_path / "data", "detect", 3)
    with pytest.raises(UsageError, match="can't be built from its YAML file"):
        yolo.train(data=data, pretrained=False, device="cpu", project=str(tmp_path), plots=False)


@pytest.mark.parametrize("two_branches", [False, True])
def test_raw_maps_are_decoded_as_ultralytics_does(two_branches: bool, tmp_path: Path) -> None:
    model: Any = tiny(tmp_path, "detect", two_branches=two_branches)
    head = model.model[-1]
    head.end2end = two_branches
    for layers in head.cv3:
        nn.init.zeros_(layers[-1].bias)  # above the threshold
    size = (SIDE, 2 * SIDE)
    x = torch.rand(2, 3, *size)
    decode = decoder(model)
    assert decode is not None
    with torch.no_grad():
        predictions = model(x)[0]
        by_image = decode(raw_maps(model, x), size)
    for detections, rows in zip(by_image, predictions, strict=True):
        if two_branches:  # [detection, left top right bottom score class], best first
            count = min(len(rows), len(detections.scores))
            torch.testing.assert_close(detections.scores[:count], rows[:count, 4])
            continue
        centres, sides = rows[:2].T, rows[2:4].T  # [4 + class, position]
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
        differences = (detections.boxes[:, None] - boxes).abs().amax(2)
        assert float(differences.amin(1).max()) < 1e-3


def test_networks_are_built_by_name() -> None:
    model: Any = build("yolov8n-cls.yaml", num_classes=7)
    assert model.model[-1].linear.out_features == 7
    assert not model.training
    assert traceable_forward(model) is raw_maps
    assert {"yolov8.yaml", "yolo11-seg.yaml", "yolo26-pose.yaml"} <= set(names())
    assert preprocessing("yolo11n.yaml").size == (640, 640)
    assert preprocessing("yolo11n-cls.yaml").size == (224, 224)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("yolo99n.yaml", UnknownName, "yolo99n.yaml"),
        ("best.pt", UsageError, r"pass secateur.prune the network YOLO\('best.pt'\).model"),
        ("yolov8-rtdetr.yaml", UsageError, "for the task None, which is not one of"),
    ],
)
def test_names_that_are_not_taken(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(name)


def test_other_networks_are_not_taken_for_ultralytics(tmp_path: Path) -> None:
    assert traceable_forward(nn.Conv2d(3, 4, 1)) is None
    with pytest.raises(UsageError, match="got Conv2d: pass a network of Ultralytics"):
        as_yolo(nn.Conv2d(3, 4, 1), tmp_path / "network.pt")
    with pytest.raises(UsageError, match=r"must end in \.pt"):
        as_yolo(nn.Conv2d(3, 4, 1), tmp_path / "network.onnx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny network and small images in place of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.engine.exporter.file_size", lambda path: 1)
    as_yolo(tiny(tmp_path, "detect"), "best.pt")
    Path(write_data(tmp_path / "data", "detect", 3)).rename("data.yaml")
    for number in range(12):
        pixels = random_pixels(48, SIDE, 3, seed=number)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg")
    page = (Path(__file__).parents[1] / "docs" / "how_to" / "ultralytics.md").read_text()
    text = page.replace("640", str(SIDE)).replace('"yolo11n.yaml", num_classes=80', '"detect.yaml"')
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, "ultralytics.md", "exec"), namespace)
    count = parameters(namespace["result"].model)
    assert count < parameters(tiny(tmp_path, "detect"))
    assert parameters(namespace["finetuned"].model) == parameters(namespace["loaded"]) == count
    assert (tmp_path / "pruned.onnx").is_file()
