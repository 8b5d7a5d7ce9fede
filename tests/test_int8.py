"""What is said of an int8 file beside the float one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from networks import Chain
from secateur.engines import quantised_program
from secateur.engines.bias_correction import STEPS, with_corrected_biases
from secateur.engines.engine import Program
from secateur.engines.executorch import load_executorch
from secateur.engines.flat_network import outputs_error
from secateur.engines.openvino import load_openvino
from secateur.engines.quantised_openvino import quantise_openvino
from secateur.engines.quantised_program import quantise_aotinductor, quantise_executorch
from secateur.experiments.int8_export import FormLatency, Int8Result
from secateur.experiments.other_formats import write_openvino
from secateur.experiments.program import ProgramNetwork
from secateur.experiments.program_export import make_program
from secateur.models.score import Score
from secateur.models.task import SINGLE_LABEL
from secateur.runtime.errors import ExportError, UsageError
from secateur.runtime.torch_internals import load_compiled

SCORE = Score(0.9, None, 0.3, 100, 1, 1, 0.0)


def result(latency: FormLatency) -> Int8Result:
    return Int8Result(
        Path("int8.onnx"), 1, 64, SCORE, SCORE, SINGLE_LABEL, (), (latency,), "onnxruntime"
    )


@pytest.mark.parametrize(
    ("latency", "words"),
    [
        (FormLatency(16, 5.0, 2.5, 10.0, 5.0), ""),  # half of the time stays in both
        (FormLatency(16, 5.0, 2.5, None, None), ""),
        (
            FormLatency(16, 5.0, 4.0, 10.0, 4.1),
            "The cut saves less in int8: 0.98 of the time",
        ),
        (FormLatency(16, 5.0, 5.5, 10.0, 11.0), "int8 is slower than float here"),
    ],
)
def test_the_advice_compares_what_the_cut_saves(latency: FormLatency, words: str) -> None:
    advice = result(latency).advice
    assert advice.startswith(words)
    assert bool(advice) == bool(words)


def test_nncf_quantises_a_file_for_openvino(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="needs nncf")
    network, images = chain_and_images()
    files = [tmp_path / "model.xml", tmp_path / "model.int8.xml"]
    write_openvino(network, images, files[0])
    quantise_openvino(network, files[0], files[1], images.split(4))
    with torch.no_grad():
        expected = network(images)
    errors = [outputs_error(load_openvino(file)([images]), [expected]) for file in files]
    assert errors[0] < 1e-5
    assert 1e-4 < errors[1] < 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"model{form}{suffix}" for form in ("", ".int8") for suffix in (".bin", ".xml")
    )


def test_corrected_biases_keep_the_mean_of_what_rounded_layers_put_out() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    ]
    network, images = nn.Sequential(*layers).eval(), torch.rand(8, 3, 8, 8)
    corrected = with_corrected_biases(network, images.split(4))
    assert network[0].bias is None, "the network itself stays as it is"
    inputs = images
    with torch.no_grad():
        for layer, other in zip(network, corrected, strict=True):
            outputs = layer(inputs)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                scale = layer.weight.flatten(1).abs().amax(1) / STEPS
                scale = scale.view(-1, *[1] * (layer.weight.ndim - 1))
                rounded = torch.round(layer.weight / scale) * scale
                other.weight.copy_(rounded)
                axes = [0, 2, 3][: outputs.ndim - 1]
                bias = other.bias
                other.bias = layer.bias
                before = (other(inputs) - outputs).mean(axes)
                other.bias = bias
                after = (other(inputs) - outputs).mean(axes)
                assert before.abs().max() > 1e-4
                assert after.abs().max() < 1e-6
            inputs = outputs


def test_torchao_quantises_a_program_for_executorch(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="needs executorch")
    pytest.importorskip("torchao", reason="needs torchao")
    network, images = chain_and_images()
    file = tmp_path / "model.int8.pte"
    quantise_executorch(network, file, images.split(4))
    outputs = [load_executorch(file)([image])[0] for image in images.split(1)]
    with torch.no_grad():
        assert 1e-4 < outputs_error([torch.cat(outputs)], [network(images)]) < 0.1
    assert list(tmp_path.iterdir()) == [file]


def test_torchao_quantises_a_program_ahead_of_time(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs torchao")
    network, images = chain_and_images()
    file = tmp_path / "model.int8.pt2"
    quantise_aotinductor(network, file, images.split(4))
    run = load_compiled(file)
    with torch.no_grad():
        for size in (1, 3, 8):
            part = images[:size].clone()
            assert 1e-4 < outputs_error(run([part]), [network(part)]) < 0.1
    assert list(tmp_path.iterdir()) == [file]


def test_a_network_without_code_is_quantised_for_x86(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="needs torchao")
    programs: list[ExportedProgram] = []

    def keep(program: ExportedProgram, path: Path) -> None:
        programs.append(program)
        path.write_text("")

    def load(_: Path) -> Program:
        return lambda inputs: programs[0].module()(*inputs)

    monkeypatch.setattr(quantised_program, "compile_ahead_of_time", keep)
    monkeypatch.setattr(quantised_program, "load_compiled", load)
    network, images = chain_and_images()
    program = make_program(network, images)
    loaded = ProgramNetwork(program, {**program.constants, **network.state_dict()})
    quantise_aotinductor(loaded, tmp_path / "model.int8.pt2", images.split(4))
    targets = [str(node.target) for node in programs[0].graph.nodes]
    layers = sum(target.startswith(("aten.conv2d", "aten.linear")) for target in targets)
    assert layers == sum("dequantize_per_channel" in target for target in targets) == 3
    monkeypatch.setattr(
        quantised_program, "load_compiled", lambda _: lambda inputs: [torch.zeros(2, 5)]
    )
    with pytest.raises(ExportError, match="outputs differ from those of the quantised network"):
        quantise_aotinductor(loaded, tmp_path / "other.int8.pt2", images.split(4))
    assert not (tmp_path / "other.int8.pt2").exists()


def test_without_its_package_int8_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.engines.quantised_program.find_spec", lambda _: None)
    network, images = chain_and_images()
    with pytest.raises(UsageError, match=r"pip install 'torchao>=0\.18' \(no module torchao\)"):
        quantise_aotinductor(network, tmp_path / "model.int8.pt2", [images])
    assert not list(tmp_path.iterdir())


def chain_and_images() -> tuple[Chain, torch.Tensor]:
    torch.manual_seed(0)
    return Chain().eval(), torch.rand(8, 3, 8, 8)
