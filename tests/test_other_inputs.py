"""Networks of signals, volumes, clips and several inputs go through all that pictures do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import other_inputs
import secateur
from other_inputs import CASES
from processes import started
from secateur.config import RunConfig, from_dict
from secateur.data.batch_forms import form_of
from secateur.data.in_memory import read_images
from secateur.experiments import run as runs
from secateur.experiments.manifest import read_manifest
from secateur.models import user_code
from secateur.runtime.errors import DataError, UsageError
from secateur.runtime.packed_inputs import Inputs, parameters_of, read_inputs

COUNT = 60
LABELS = torch.arange(COUNT) % 4


@pytest.fixture(scope="module")
def pruned() -> dict[str, secateur.PruneResult]:
    """Every case pruned, with refit."""
    results: dict[str, secateur.PruneResult] = {}
    for name in CASES:
        loader = DataLoader(TensorDataset(*other_inputs.inputs(name, COUNT), LABELS), batch_size=20)
        settings = {"model.allow_untrained": True}
        results[name] = secateur.prune(
            other_inputs.make(name), loader, target="macs=0.6", settings=settings
        )
    return results


def load_all(folder: Path) -> None:
    """Load every case from its run folder, and keep what it returns."""
    for name in CASES:
        loaded = secateur.load(folder / name, architecture=other_inputs.make(name))
        batch = other_inputs.inputs(name, 3, 1)
        program = secateur.load_program(folder / name)
        with torch.inference_mode():
            outputs = {"load": loaded(*batch), "program": program(*batch)}
        torch.save(outputs, folder / f"{name}.pt")


def test_saved_networks_are_bit_equal_in_a_new_process(
    pruned: dict[str, secateur.PruneResult], tmp_path: Path
) -> None:
    for name, result in pruned.items():
        assert 0.4 < result.scores["refit"].macs / result.scores["before"].macs <= 0.6
        result.save(tmp_path / name)
    process = started(load_all, tmp_path)
    process.join()
    assert process.exitcode == 0
    for name, result in pruned.items():
        outputs = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        with torch.inference_mode():
            expected = result.model(*other_inputs.inputs(name, 3, 1))
        assert torch.equal(outputs["load"], expected), name
        assert torch.equal(outputs["program"], expected), name


@pytest.mark.parametrize("name", ["sound", "two pictures", "features"])
def test_onnx_files_have_the_inputs_of_the_network(
    name: str, pruned: dict[str, secateur.PruneResult], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    batch, model, path = other_inputs.inputs(name, 2), pruned[name].model, tmp_path / "model.onnx"
    result = secateur.export_onnx(model, batch if len(batch) > 1 else batch[0], path)
    assert result.error < 1e-4
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_inputs()]
    known = {"two pictures": ["before", "after"], "features": ["image", "features"]}
    assert names == known.get(name, ["images"])
    three = other_inputs.inputs(name, 3, 1)
    (logits,) = session.run(["logits"], {n: t.numpy() for n, t in zip(names, three, strict=True)})
    with torch.inference_mode():
        assert torch.allclose(torch.from_numpy(logits), model(*three), atol=1e-4)


def test_a_report_shows_what_filters_of_several_inputs_respond_to(
    pruned: dict[str, secateur.PruneResult], tmp_path: Path
) -> None:
    for name in ("sound", "two pictures", "features"):
        path = pruned[name].report(tmp_path / "report.html", images=20)
        assert "data:image/jpeg" in path.read_text() or "image" in path.read_text()


class Rows(Dataset[Any]):
    """Yields items one by one."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        *inputs, label = (tensor[index] for tensor in self.tensors)
        return tuple(inputs), label


@pytest.mark.parametrize("name", ["two pictures", "features"])
def test_several_inputs_come_in_any_common_form(name: str) -> None:
    model, batch = other_inputs.make(name), other_inputs.inputs(name, COUNT)
    form, names = form_of(model), parameters_of(model).needed
    named = dict(zip(names, batch, strict=True))
    expected, _ = read_inputs(batch, parameters_of(model))
    for source in (
        [(batch, LABELS)],
        (batch, LABELS),
        [(*batch, LABELS)],
        (*batch, LABELS),
        [(named, LABELS)],
        [{**named, "label": LABELS}],
        {**named, "label": LABELS},
        Rows(*batch, LABELS),
        DataLoader(Rows(*batch, LABELS), batch_size=7),
        DataLoader(TensorDataset(*batch, LABELS), batch_size=7),
        TensorDataset(*batch, LABELS),
    ):
        images = read_images(source, form, "images")
        assert torch.equal(images.pixels[:], expected)
        assert images.labels is not None
        assert torch.equal(images.labels, LABELS)
    for source in ([batch], batch, [named], named, TensorDataset(*batch)):
        images = read_images(source, form, "images")
        assert torch.equal(images.pixels[:], expected)
        assert images.labels is None
    short = tuple(tensor[..., :4] for tensor in batch)
    with pytest.raises(DataError, match=r"of one image each: all must have one size"):
        read_images([(batch, LABELS), (short, LABELS)], form, "images")
    with pytest.raises(DataError, match="are of different numbers of images"):
        read_images([((batch[0], batch[1][:2]), LABELS)], form, "images")


def test_inputs_are_packed_without_loss() -> None:
    shapes: tuple[tuple[int, ...], ...]
    for shapes in (((3, 4, 4), (1, 4, 4)), ((3, 4, 4), (5,), ()), ((2, 7), (2, 6)), ((3,), (2,))):
        batch = [torch.rand(6, *shape) for shape in shapes]
        inputs = Inputs(shapes)
        packed = inputs.pack(batch)
        assert packed.shape == (6, *inputs.packed_shape)
        for one, other in zip(inputs.unpack(packed), batch, strict=True):
            assert torch.equal(one, other)
    with pytest.raises(UsageError, match=r"must be \[3\] and \[2\] for each image; got \[6, 2\]"):
        inputs.pack(batch[::-1])


def test_inputs_are_passed_as_the_network_takes_them() -> None:
    class Slow(nn.Module):
        def forward(self, pathways: list[Tensor]) -> Tensor:
            return pathways[0] + pathways[1]

    pair = (torch.rand(2, 3), torch.rand(2, 3))
    for network, passed, passing in (
        (Slow(), pair, "list"),
        (Slow(), {"a": pair[0], "b": pair[1]}, "dict"),
        (other_inputs.Siamese(), pair, "arguments"),
        (other_inputs.Siamese(), {"after": pair[0], "before": pair[1]}, "keywords"),
    ):
        _, inputs = read_inputs(passed, parameters_of(network))
        assert inputs is not None
        assert inputs.passing == passing
        args, kwargs = inputs.arguments(pair)
        assert inputs.tensors(args, kwargs) == pair
    with pytest.raises(UsageError, match=r"not \[2\] of torch.int64: make it from one in forward="):
        read_inputs((pair[0], torch.arange(2)), parameters_of(network))


def test_a_network_of_two_inputs_is_saved_with_a_plan_of_its_own(tmp_path: Path) -> None:
    model = other_inputs.make("features")
    batch = other_inputs.inputs("features", 2)
    for forward in (None, lambda network, image, features: {"scores": network(image, features)}):
        dependencies = secateur.build_dependency_graph(model, batch, forward=forward)
        scores = {name: torch.arange(len(group)) for name, group in dependencies.groups.items()}
        plan = secateur.make_plan(scores, dependencies, secateur.Budget("macs", 0.6), "mine")
        smaller = secateur.apply_plan(model, dependencies, plan)
        folder = tmp_path / str(forward is None)
        secateur.save(folder, smaller, plan, image_shape=((3, 12, 12), (5,)), forward=forward)
        if forward is not None:
            with pytest.raises(UsageError, match="was made with forward="):
                secateur.load(folder, architecture=model)
        loaded = secateur.load(folder, architecture=model, forward=forward)
        assert torch.equal(loaded(*batch), smaller(*batch))
        output = secateur.load_program(folder)(*batch)
        logits = output if isinstance(output, Tensor) else output["scores"]
        assert torch.equal(logits, smaller(*batch))


def test_a_network_of_monai_is_saved_and_exported(tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = nets.UNet(3, 1, 2, channels=(4, 8), strides=(2,)).eval()
    volumes = torch.rand(20, 1, 8, 8, 8)
    result = secateur.prune(model, volumes, target="macs=0.7")
    result.save(tmp_path / "run")
    loaded = secateur.load(tmp_path / "run", architecture=model)
    with torch.inference_mode():
        assert torch.equal(loaded(volumes[:2]), result.model(volumes[:2]))
    exported = secateur.export_onnx(result.model, volumes[:2], tmp_path / "model.onnx")
    assert exported.error < 1e-4


def test_a_function_of_the_users_is_asked_for_again_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_FILE)
    name, forward = f"{tmp_path / 'own.py'}:network", f"{tmp_path / 'own.py'}:scores"
    config = from_dict(
        {
            "model": {"name": name, "forward": forward, "allow_untrained": True},
            "data": {"source": "digits", "image_size": 8, "calibration_images": 60},
            "plan": {"target": "macs=0.6"},
            "finetune": {"epochs": 0},
            "report": {"images": 8},
        },
        RunConfig,
    )
    run = tmp_path / "run"
    runs.run(config, run)
    assert read_manifest(run).forward == forward
    for action in (
        lambda named: runs.finetune(run, tmp_path / "finetuned", {"epochs": 1}, named=named),
        lambda named: runs.report(run, images=8, named=named),
    ):
        with pytest.raises(UsageError, match=f"name it with --model {name}"):
            action({})
        with pytest.raises(UsageError, match=f"name it with --forward {forward}"):
            action({"model.name": name})
    runs.report(run, images=8, named={"model.name": name, "model.forward": forward})
    images = torch.rand(3, 1, 8, 8)
    assert secateur.load_program(run)(images).shape == (3, 10)
    model = secateur.load_model(name)
    with pytest.raises(UsageError, match="was made with forward="):
        secateur.load(run, architecture=model)
    function = user_code.find(forward, "function")
    loaded = secateur.load(run, architecture=model, forward=function)
    assert torch.equal(loaded(images)["scores"], secateur.load_program(run)(images))


OWN_FILE = """
import torch
from torch import nn

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(256, 10)

    def forward(self, images):
        features = self.body(images)
        return {"features": features, "scores": self.head(features)}

def network():
    torch.manual_seed(0)
    return Named()

def scores(model, images):
    return model(images)["scores"]
"""
