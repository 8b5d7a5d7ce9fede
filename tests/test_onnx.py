"""An ONNX file is kept only if its outputs are the network's; nothing else is changed."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks import make_network, random_images, random_plan, wired
from secateur.experiments import onnx_export as export
from secateur.experiments.onnx_export import compare_latency, export_onnx
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.runtime.errors import ExportError, UsageError, WriteError
from secateur.runtime.timing import Rounds

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("name", ["chain", "concat", "depthwise", "view_rest", "gated"])
def test_file_of_a_pruned_network_has_the_same_outputs(
    name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    model, dependencies = wired(name)
    smaller = apply_plan(model, dependencies, random_plan(dependencies, generator))
    path = tmp_path / "new" / "model.onnx"
    result = export_onnx(smaller, random_images(2), path)
    assert result.path == path
    assert result.error < 1e-5
    assert result.bytes == path.stat().st_size
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(path))
    for count in (1, 2, 7):
        images = random_images(count)
        (outputs,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            assert relative_error(torch.from_numpy(outputs), smaller(images)) < 1e-5


def test_weights_are_inside_and_the_batch_is_open(tmp_path: Path) -> None:
    result = export_onnx(make_network("chain"), random_images(1), tmp_path / "model.onnx")
    content = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    onnx.checker.check_model(content)
    assert not [t for t in content.graph.initializer if t.external_data]
    (images,), (logits,) = content.graph.input, content.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    sizes = images.type.tensor_type.shape.dim
    assert sizes[0].dim_param
    assert [size.dim_value for size in sizes[1:]] == [3, 8, 8]
    assert result.opset == next(o.version for o in content.opset_import if not o.domain)


def test_outputs_have_the_names_that_they_have_in_the_network(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
            return {"boxes": images.mean((2, 3)), "levels": [images.relu(), 2 * images]}

    class Picture(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.relu()

    images, path = random_images(3), tmp_path / "model.onnx"
    for model, names in (
        (Several(), ["boxes", "levels_0", "levels_1"]),
        (Picture(), ["output"]),
    ):
        result = export_onnx(model.eval(), random_images(2), path, overwrite=True)
        assert result.error < 1e-5
        session = onnxruntime.InferenceSession(str(path))
        assert [value.name for value in session.get_outputs()] == names
        outputs = session.run(None, {"images": images.numpy()})
        expected = model(images)
        last = expected["levels"][1] if isinstance(expected, dict) else expected
        assert torch.allclose(torch.from_numpy(outputs[-1]), last)


def test_mode_and_gradients_are_left_as_they_are(tmp_path: Path) -> None:
    model = make_network("flattened").train()
    model.get_submodule("features").eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, random_images(2), tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Talking(nn.Module):
    """Prints, warns and logs while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            print("to stdout")
            print("to stderr", file=sys.stderr)
            warnings.warn("a warning", stacklevel=1)
            logging.getLogger("torch.onnx").error("an error")
        return x.mean((2, 3))


def test_the_exporter_does_not_write_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_onnx(Talking().eval(), random_images(2), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert not logging.root.manager.disable


class Forked(nn.Module):
    """Another function while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (1.001 if torch.onnx.is_in_onnx_export() else 1.0)


def test_a_file_with_other_outputs_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"relative difference 1\.0e-03, and less than 1e-04"):
        export_onnx(Forked().eval(), random_images(2), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Undefined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) * float("nan")

    with pytest.raises(ExportError, match="relative difference nan"):
        export_onnx(Undefined().eval(), random_images(2), tmp_path / "model.onnx")


def test_network_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3 * 8 * 8)

    with pytest.raises(ExportError, match=r"can.t be exported to ONNX|fails on 1 images"):
        export_onnx(Fixed().eval(), random_images(2), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export_onnx(make_network("chain"), random_images(2), path)
    with pytest.raises(ExportError, match=r"is a folder: name a file in it, .*model\.onnx"):
        export_onnx(make_network("chain"), random_images(2), tmp_path, overwrite=True)
    assert path.read_text() == "mine"
    export_onnx(make_network("chain"), random_images(2), path, overwrite=True)
    assert path.read_bytes() != b"mine"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(WriteError, match="a can't be written: File exists"):
        export_onnx(make_network("chain"), random_images(2), tmp_path / "a" / "model.onnx")


def test_network_too_large_for_one_file_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.zeros(1).expand(2**14, 2**16))  # takes no memory
    with pytest.raises(ExportError, match=r"take 4\.0 GiB, and an ONNX file holds 2 GiB"):
        export_onnx(model, random_images(2), tmp_path / "model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UsageError, match=rf"pip install 'secateur\[export\]' \(no module {package}"
    ):
        export_onnx(make_network("chain"), random_images(2), tmp_path / "model.onnx")


def test_latency_of_both_networks_in_both_engines(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LATENCY_ROUNDS", Rounds(1, 1))
    model, dependencies = wired("chain")
    smaller = apply_plan(model, dependencies, random_plan(dependencies, generator)).train()
    path = tmp_path / "model.onnx"
    export_onnx(smaller, random_images(2), path)
    times = compare_latency(smaller, path, model, random_images(2))
    assert [(one.engine, one.batch) for one in times] == [
        *(("pytorch", 1), ("onnxruntime", 1), ("pytorch", 16), ("onnxruntime", 16))
    ]
    assert all(one.original_ms and one.original_ms > 0 and one.pruned_ms > 0 for one in times)
    alone = compare_latency(smaller, path, None, random_images(2))
    assert [one.original_ms for one in alone] == [None] * 4
    assert smaller.training
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
