"""Networks as people have them: wrapped, of other types, frozen, or no networks at all."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import secateur
from networks import random_images
from secateur.graph.module_state import copy_of, trainable
from secateur.graph.trace import export_program
from secateur.graph.working_copy import like_original, working_copy
from secateur.graph.wrappers import unwrapped
from secateur.models import zoo
from secateur.runtime.errors import SecateurError, TraceError, UsageError

PIXELS = random_images(40)
LABELS = torch.arange(40) % 5


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.body(F.relu(self.stem(x)))).mean((2, 3)))
        return logits


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


class OptimizedModule(nn.Module):
    """Stands for what other libraries derive from torch's wrappers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


class _FabricModule(nn.Module):
    """Named as the wrapper of Lightning Fabric."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one process, as a distributed network needs it."""
    import torch.distributed as dist

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "DataParallel of a compiled one": lambda model: nn.DataParallel(compiled(model)),
    "derived": OptimizedModule,
    "Fabric": _FabricModule,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_network_is_taken_out_of_what_wraps_it(name: str) -> None:
    model = Net()
    wrapped = WRAPPERS[name](model)
    assert unwrapped(wrapped) is model
    dependencies = secateur.build_dependency_graph(wrapped, PIXELS[:2])
    assert list(dependencies.groups) == ["stem", "body"]
    plan = secateur.PruningPlan({"stem": (0, 3)}, secateur.Budget("macs", 0.5), "mine")
    cut: Any = secateur.apply_plan(wrapped, dependencies, plan)
    assert type(cut) is Net
    assert cut.stem.out_channels == 6


def test_a_distributed_network_is_taken_out(one_process: None) -> None:
    model = Net()
    assert unwrapped(nn.parallel.DistributedDataParallel(model)) is model


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_prune_and_every_other_function_take_wrapped_networks(
    wrap: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    model = Net().eval()
    wrapped = wrap(model)
    pruned = secateur.prune(wrapped, PIXELS, target=0.6, epochs=1)
    assert type(pruned.model) is Net
    pruned.save(tmp_path / "a")
    loaded = secateur.load(tmp_path / "a", architecture=wrap(Net()))
    assert torch.equal(loaded(PIXELS[:3]), pruned.model(PIXELS[:3]))
    secateur.save(tmp_path / "b", wrap(pruned.model), pruned.plan, image_shape=(3, 8, 8))
    loaded = secateur.load(tmp_path / "b", architecture=Net())
    assert torch.equal(loaded(PIXELS[:3]), pruned.model(PIXELS[:3]))


@pytest.mark.parametrize("wrap", [pytest.param(compiled, marks=pytest.mark.slow), nn.DataParallel])
def test_a_wrapped_network_is_evaluated_as_it_is(wrap: Callable[[nn.Module], Any]) -> None:
    model, batches = Net().eval(), [(PIXELS, LABELS)]
    scores = [secateur.evaluate(one, batches, known_ms=1.0) for one in (model, wrap(model))]
    assert scores[0].metric == scores[1].metric
    assert scores[0].macs == scores[1].macs > 0


@pytest.mark.slow
def test_export_takes_a_wrapped_network_of_another_type(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    secateur.export_onnx(nn.DataParallel(Net()), PIXELS[:2].double(), tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("torch.compile(net(), backend='eager')", ""),
        ("nn.DataParallel(net().bfloat16())", ""),
        ("(net(), None)", "own.py:build: .* got a tuple of 2: pass its item \\[0\\], a Sequential"),
        ("torch.jit.script(net())", "own.py:build: the network is TorchScript"),
    ],
)
def test_a_file_of_code_may_return_a_wrapped_network(
    body: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "import warnings, torch\nfrom torch import nn\nwarnings.simplefilter('ignore')\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 4, 1))\n"
        f"def build():\n    return {body}\n"
    )
    if message:
        with pytest.raises(UsageError, match=message):
            zoo.load(f"{file}:build")
    else:
        model = zoo.load(f"{file}:build")
        assert type(model) is nn.Sequential
        assert next(model.parameters()).dtype is torch.float32


def _quantised() -> nn.Module:
    engine = "qnnpack" if "qnnpack" in torch.backends.quantized.supported_engines else "fbgemm"
    torch.backends.quantized.engine = engine
    model: nn.Module = torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=torch.qint8)
    return model


def _prepared() -> nn.Module:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(3, 8, 3)).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)  # type: ignore[no-any-return]


def _packed() -> nn.Module:
    model = Net()
    packed = torch.zeros(6, 8, dtype=torch.int8)
    model.head.weight = nn.Parameter(packed, requires_grad=False)
    return model


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def _exported() -> torch.export.ExportedProgram:
    return torch.export.export(Net().eval(), (PIXELS[:2],))


class Learner:
    """Holds a network, as trainers of other libraries do."""

    def __init__(self) -> None:
        self.model = Net()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "script": (
        lambda: torch.jit.script(Net()),
        "the network is TorchScript (RecursiveScriptModule), which can't be cut: pass the Python "
        "module that it was made from",
    ),
    "trace": (lambda: torch.jit.trace(Net(), PIXELS[:1]), "is TorchScript (TopLevelTracedModule)"),
    "scripted layer": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.ReLU())),
        "the network's layer '1' is TorchScript",
    ),
    "program": (_exported, "got a program of torch.export: pass the Python module"),
    "module of a program": (
        lambda: _exported().module(),
        "the network is a program of torch.export: pass the Python module that was exported",
    ),
    "quantised": (
        _quantised,
        "the network's layer 'head' is quantised, or prepared for it (Linear): prune the float "
        "network, and quantise the result",
    ),
    "prepared": (_prepared, "is quantised, or prepared for it"),
    "packed": (
        _packed,
        "the network's tensor 'head.weight' is quantised (Parameter of torch.int8)",
    ),
    "meta": (
        _on_meta,
        "the network's tensor 'stem.weight' has no values, as it is on the meta device: call "
        "model.to_empty(device='cpu') and load its weights",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(4, 1)),
        "the network's tensor '0.weight' has no shape yet, as it belongs to a lazy layer: run the "
        "network on a batch of images once",
    ),
    "list": (
        lambda: [nn.Conv2d(3, 4, 1), nn.ReLU()],
        "got a list of 2 modules: pass nn.Sequential(*layers)",
    ),
    "tuple": (lambda: (3, Net()), "got a tuple of 2: pass its item [1], a Net"),
    "class": (lambda: Net, "Net is a class: pass an object of it, Net()"),
    "state dict": (
        lambda: Net().state_dict(),
        "got a state dict (6 tensors), which holds weights alone: build the network, call its "
        "load_state_dict",
    ),
    "checkpoint": (
        lambda: {"epoch": 3, "state_dict": {}},
        "got a dict with the keys 'epoch', 'state_dict': if that is a checkpoint, build",
    ),
    "dict of networks": (lambda: {"ema": Net()}, "got a dict: pass its item ['ema'], a Net"),
    "name": (
        lambda: "resnet20",
        "'resnet20' is text: pass the network, as secateur.load_model(name, weights) returns it",
    ),
    "path": (lambda: Path("model.pth"), "'model.pth' is text"),
    "learner": (Learner, "got Learner: pass its attribute .model"),
    "function": (lambda: F.relu, "got the function 'relu': pass the module it runs"),
    "nothing": (lambda: None, "the network must be an nn.Module: got NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prunable_network_is_refused_with_what_to_pass(name: str) -> None:
    make, message = REFUSED[name]
    with warnings.catch_warnings(action="ignore"):
        model: Any = make()
    with pytest.raises(SecateurError) as raised:
        secateur.prune(model, PIXELS)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(type(raised.value)):
        secateur.build_dependency_graph(model, PIXELS[:2])


def test_float_networks_that_can_be_quantised_are_taken() -> None:
    model = nn.Sequential(
        torch.ao.quantization.QuantStub(),
        torch.ao.quantization.fuse_modules(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), [["0", "1"]]
        ),
        torch.ao.nn.quantized.FloatFunctional(),
    )
    assert unwrapped(model) is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_other_types_are_pruned_and_come_back_in_theirs(dtype: torch.dtype) -> None:
    model = Net().to(dtype).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = secateur.prune(model, PIXELS, target=0.6)
    assert {parameter.dtype for parameter in pruned.model.parameters()} == {dtype}
    assert pruned.model(PIXELS[:2].to(dtype)).dtype is dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    score = secateur.evaluate(pruned.model, [(PIXELS, LABELS)])
    assert score.macs == pruned.scores["refit"].macs


class Mixed(Net):
    """Computes one layer in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.body.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x)).bfloat16()).float()
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


class HalfWithNorms(nn.Sequential):
    """Half precision except for the norms, as old recipes have it; takes half images."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
        self.bfloat16()
        self[1].float()


def test_a_network_of_several_types_stays_as_it_is_if_it_runs_on_the_images() -> None:
    mixed, half = Mixed().eval(), HalfWithNorms().eval()
    assert working_copy(mixed, PIXELS[:2]).get_parameter("body.weight").dtype is torch.bfloat16
    copied = working_copy(half, PIXELS[:2])
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float32}
    types = [parameter.dtype for parameter in half.parameters()]
    assert [parameter.dtype for parameter in like_original(copied, half).parameters()] == types


def test_a_float32_network_is_worked_on_itself() -> None:
    model = Net()
    assert working_copy(model) is model


@pytest.mark.parametrize("how", ["method", "forward"])
def test_compilation_in_place_stays_behind(how: str) -> None:
    model: Any = Net().eval()
    if how == "method":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    dependencies = secateur.build_dependency_graph(model, PIXELS[:2])
    assert list(dependencies.groups) == ["stem", "body"]
    copied = working_copy(model)
    assert copied is not model
    with torch.no_grad():
        copied.get_parameter("head.bias").fill_(7.0)
        assert not torch.allclose(copied(PIXELS[:1]), model(PIXELS[:1]))


class KeepsFeatures(Net):
    """Holds activations in attributes."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.stem(x)
        self.features = {"list": [self.last.relu()]}
        logits: Tensor = self.head(self.body(self.features["list"][0]).relu().mean((2, 3)))
        return logits


def _with_hook() -> nn.Module:
    model: Any = Net()
    model.cache = {}
    model.body.register_forward_hook(lambda *call: model.cache.update(body=call[2]))
    return model  # type: ignore[no-any-return]


def _with_lock() -> nn.Module:
    model = Net()
    model.lock = threading.Lock()  # type: ignore[assignment]
    model.stem.numbers = (number for number in range(3))  # type: ignore[assignment]
    model.body.register_forward_hook(lambda *call: call[2] * 2)
    return model


def _with_history() -> nn.Module:
    model = Net()
    model.doubled = [model.stem.weight * 2]  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("make", [KeepsFeatures, _with_hook, _with_lock, _with_history])
def test_networks_that_keep_activations_or_what_can_not_be_copied(
    make: Callable[[], nn.Module],
) -> None:
    model = make().eval()
    model(PIXELS[:2])
    with torch.no_grad():
        expected = model(PIXELS[:3])
    dependencies = secateur.build_dependency_graph(model, PIXELS[:2])
    plan = secateur.PruningPlan({"body": (0,)}, secateur.Budget("macs", 0.5), "mine")
    cut = secateur.apply_plan(model, dependencies, plan)
    assert cut.get_submodule("body").out_channels == 5
    assert not torch.allclose(cut(PIXELS[:3]), expected)
    with torch.no_grad():
        assert torch.equal(model(PIXELS[:3]), expected)
    copied = copy_of(model, share_tensors=False)
    assert len(copied.get_submodule("body")._forward_hooks) == len(
        model.get_submodule("body")._forward_hooks
    )
    assert (
        copied.get_submodule("body")._forward_hooks
        is not model.get_submodule("body")._forward_hooks
    )


def test_a_forward_that_holds_another_network_is_refused() -> None:
    model = Net().eval()
    body = model.body.forward
    vars(model.body)["forward"] = lambda x: body(x) * 2
    with pytest.raises(TraceError, match=r"reads body.weight of another object .* a method of"):
        secateur.build_dependency_graph(model, PIXELS[:2])


def test_a_frozen_network_is_scored_and_finetuned_and_stays_frozen() -> None:
    model = Net().eval().requires_grad_(requires_grad=False)
    settings = {"plan.allocation": "sensitivity"}
    pruned = secateur.prune(
        model,
        PIXELS,
        target=0.6,
        criterion="taylor",
        epochs=1,
        settings=settings,
    )
    assert not any(parameter.requires_grad for parameter in pruned.model.parameters())
    assert pruned.result.finetuning is not None
    assert pruned.result.finetuning.kept == "last"


def test_what_is_trainable_is_left_alone_unless_nothing_is() -> None:
    model = Net().requires_grad_(requires_grad=False)
    with trainable(model):
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.head.bias.requires_grad_()
    with trainable(model):
        assert sum(parameter.requires_grad for parameter in model.parameters()) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_without_gradients_is_pruned_but_not_trained(mode: Callable[[], Any]) -> None:
    class WithoutGradients(Net):
        def forward(self, x: Tensor) -> Tensor:
            with mode():
                return super().forward(x)

    model = WithoutGradients().eval()
    assert secateur.prune(model, PIXELS, target=0.6).plan.removed
    with pytest.raises(UsageError, match="can't be trained, as its output has no gradient"):
        secateur.prune(model, PIXELS, target=0.6, epochs=1)


def test_weights_made_in_inference_mode_can_have_gradients() -> None:
    with torch.inference_mode():
        model = Net().eval()
    pruned = secateur.prune(model, PIXELS, target=0.6, criterion="taylor", epochs=1)
    assert not next(pruned.model.parameters()).is_inference()
    assert next(model.parameters()).is_inference()


def test_a_batch_dimension_is_opened_in_star_arguments_too() -> None:
    program = export_program(AveragedModel(Net()).eval(), (PIXELS[:2],))
    assert program.module()(PIXELS[:3]).shape == (3, 5)
