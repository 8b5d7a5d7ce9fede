"""Files in the layout of published weights, and networks built as those want them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import DenseNet, WeightsEnum
from torchvision.models.vision_transformer import VisionTransformer

import secateur
from secateur.config import Budget
from secateur.experiments import run_folder
from secateur.graph.build import build_dependency_graph
from secateur.models import published, weights
from secateur.models.state_dict import load_state
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import make_plan
from secateur.runtime.errors import WeightsError

State = dict[str, Tensor]
tiny_densenet = partial(DenseNet, 4, (2, 1), 8, num_classes=3)
tiny_transformer = partial(
    VisionTransformer,
    patch_size=8,
    num_layers=2,
    num_heads=2,
    hidden_dim=8,
    mlp_dim=12,
    num_classes=3,
)


def disturbed(model: nn.Module) -> nn.Module:
    """Return the network in evaluation mode with other norms and heads than initially."""
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() < 3:
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


def outputs(model: nn.Module, side: int = 32) -> Tensor:
    with torch.inference_mode():
        logits = model(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)))
    assert isinstance(logits, Tensor)
    return logits


def renamed(state: Mapping[str, Tensor], pattern: str, replacement: str) -> State:
    return {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}


def from_torchvision(name: str, state: State, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return the network that torchvision itself builds for published weights."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    model = torchvision.models.get_model(name, weights="DEFAULT")
    assert isinstance(model, nn.Module)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("googlenet", {"init_weights": False}, 64),
        pytest.param("inception_v3", {"init_weights": False}, 96, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("heads", ["aux", "none"])
def test_a_file_with_auxiliary_heads_gives_the_outputs_of_torchvision(
    name: str,
    options: dict[str, Any],
    side: int,
    heads: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = disturbed(torchvision.models.get_model(name, **options)).state_dict()
    expected = from_torchvision(name, state, monkeypatch)
    if heads == "none":  # as saved after training that started from published weights
        state = {key: tensor for key, tensor in state.items() if not key.lower().startswith("aux")}
    save_file(state, tmp_path / "weights.safetensors")
    path = tmp_path / "weights.safetensors"
    model = secateur.load_model(f"torchvision:{name}", path, num_classes=1000)
    assert torch.equal(outputs(model, side), outputs(expected, side))
    fewer = secateur.load_model(f"torchvision:{name}", path, num_classes=4, new_head=True)
    assert outputs(fewer, side).shape == (2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("transforms", [True, False])
def test_a_run_folder_says_whether_googlenet_transforms_its_images(
    transforms: bool, tmp_path: Path
) -> None:
    model = disturbed(
        torchvision.models.googlenet(
            num_classes=4, init_weights=False, aux_logits=False, transform_input=transforms
        )
    )
    smaller = saved_smaller(model, tmp_path / "run", architecture="torchvision:googlenet")
    assert torch.equal(outputs(secateur.load(tmp_path / "run")), outputs(smaller))
    assert torch.equal(outputs(secateur.load_program(tmp_path / "run")), outputs(smaller))


@pytest.mark.parametrize(
    ("name", "is_said"),
    [
        ("torchvision:googlenet", True),
        ("torchvision:inception_v3", True),
        ("timm:inception_v3", False),
        ("torchvision:resnet18", False),
        ("googlenet", False),
        ("memory:googlenet", False),
        ("googlenet.py:googlenet", False),
    ],
)
def test_it_is_said_that_a_network_transforms_its_images(name: str, is_said: bool) -> None:
    assert ("transform_input=True" in published.transform_notice(name)) == is_said


def saved_smaller(
    model: nn.Module, folder: Path, *, side: int = 32, architecture: str | None = None
) -> nn.Module:
    """Return a network without every third filter, saved as a run folder."""
    dependencies = build_dependency_graph(model, torch.rand(2, 3, side, side))
    scores = {name: torch.arange(len(group)) for name, group in dependencies.groups.items()}
    plan = make_plan(scores, dependencies, Budget("macs", 0.7), "order")
    smaller = apply_plan(model, dependencies, plan).eval()
    run_folder.save(folder, smaller, plan, image_shape=(3, side, side), architecture=architecture)
    return smaller


@pytest.mark.parametrize("counters", [True, False])
def test_the_names_of_densenet_from_when_they_could_hold_dots(counters: bool) -> None:
    state = disturbed(tiny_densenet()).state_dict()
    old = renamed(state, r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2")
    if not counters:
        old = {name: old[name] for name in old if not name.endswith("num_batches_tracked")}
    assert old.keys() != state.keys()
    adapted = published.adapt(tiny_densenet(), old)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.items())
    assert adapted.keys() >= {name for name in state if not name.endswith("tracked")}


@pytest.mark.parametrize("version", [None, 2])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mnasnet_is_read_with_and_without_versions(
    version: int | None, suffix: str, tmp_path: Path
) -> None:
    model = disturbed(torchvision.models.mnasnet0_5(num_classes=4))
    path = tmp_path / f"weights{suffix}"
    state = model.state_dict()
    if suffix == ".pth":
        torch.save(state if version else dict(state), path)
    else:
        save_file(state, path)
    loaded = secateur.load_model("torchvision:mnasnet0_5", path, num_classes=4)
    assert torch.equal(outputs(loaded), outputs(model))


def short_mnasnet() -> nn.Module:
    model = torchvision.models.mnasnet0_5(num_classes=4)
    model.layers = nn.Sequential(*model.layers[:8], nn.Conv2d(8, 1280, 1), nn.ReLU())
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (short_mnasnet, None),
        pytest.param(
            partial(torchvision.models.mnasnet0_5, num_classes=4),
            "torchvision:mnasnet0_5",
            marks=pytest.mark.slow,
        ),
        (tiny_densenet, None),
    ],
)
def test_a_pruned_network_with_versions_is_loaded_from_its_run_folder(
    build: Callable[[], nn.Module], name: str | None, tmp_path: Path
) -> None:
    smaller = saved_smaller(disturbed(build()), tmp_path / "run", architecture=name)
    loaded = secateur.load(tmp_path / "run", architecture=None if name else build())
    assert torch.equal(outputs(loaded), outputs(smaller))


class Versioned(nn.Module):
    """A convolution whose weights were called `kernel` up to version 2."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).relu().mean((2, 3)))  # type: ignore[no-any-return]

    def _load_from_state_dict(
        self, state: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        if local_metadata.get("version", 1) < 3:
            state[f"{prefix}conv.weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


class Exporting(nn.Module):
    """Saves its tensors under names that start with `net.`, and reads such names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)
        self.register_state_dict_post_hook(self.add_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(self.remove_prefix)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).relu().mean((2, 3)))  # type: ignore[no-any-return]

    @staticmethod
    def add_prefix(module: nn.Module, state: State, prefix: str, _: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}net.{name.removeprefix(prefix)}"] = state.pop(name)

    @staticmethod
    def remove_prefix(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}net.")]:
            state[prefix + name.removeprefix(f"{prefix}net.")] = state.pop(name)


@pytest.mark.parametrize("build", [Versioned, Exporting])
def test_modules_with_versions_and_hooks_are_loaded_from_their_run_folder(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    smaller = saved_smaller(build(), tmp_path / "run")
    loaded = secateur.load(tmp_path / "run", architecture=build())
    assert torch.equal(outputs(loaded), outputs(smaller))


def test_old_names_are_those_that_the_networks_modules_know(tmp_path: Path) -> None:
    model = Versioned()
    torch.save(renamed(model.state_dict(), r"conv\.weight", "kernel"), tmp_path / "old.pth")
    loaded = Versioned()
    weights.load_weights(loaded, tmp_path / "old.pth")
    assert torch.equal(outputs(loaded), outputs(model))
    untouched = Versioned()
    torch.save({"kernel": torch.zeros(8, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"3 missing: conv\.bias, head\.weight, head\.bias$"):
        weights.load_weights(untouched, tmp_path / "part.pth")
    assert bool(untouched.conv.weight.any())


@pytest.mark.parametrize("classes", [3, 5])
def test_old_names_of_vision_transformers_and_their_image_size(classes: int) -> None:
    model = disturbed(tiny_transformer(image_size=24))
    names = ((r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2."))
    old: State = dict(model.state_dict())
    for pattern, replacement in names:
        old = renamed(old, pattern, replacement)
    other = tiny_transformer(image_size=32, num_classes=classes).eval()
    adapted = published.adapt(other, old)
    assert adapted.keys() == model.state_dict().keys()
    if classes == 3:
        load_state(other, adapted)
        assert torch.equal(outputs(other, 24), outputs(model, 24))


def test_what_is_no_auxiliary_head_is_not_left_out() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    model.auxiliary, model.downsample = None, None
    state = dict(model.state_dict())
    more = {"auxiliary.weight": torch.ones(1), "downsample.0.weight": torch.ones(1)}
    assert published.adapt(model, state | more).keys() == state.keys() | {"downsample.0.weight"}
    del model.auxiliary
    assert published.adapt(model, state | more).keys() == (state | more).keys()


def test_names_that_fit_nothing_are_complained_of_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"features.denseblock1.denselayer1.norm.1.weight": torch.ones(3)}, path)
    with pytest.raises(WeightsError, match=r"1 unexpected: features\.denseblock1.*norm\.1\.weight"):
        weights.load_weights(nn.Linear(2, 2), path)


def test_averaged_networks_with_versions_are_restored() -> None:
    average = AveragedModel(torchvision.models.mnasnet0_5(num_classes=2))
    other = AveragedModel(torchvision.models.mnasnet0_5(num_classes=2))
    load_state(other, dict(average.state_dict()))
    states = average.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_mnasnet_of_its_first_version_stays_what_it_is() -> None:
    model = torchvision.models.mnasnet0_5(num_classes=2)
    state = model.state_dict()
    state._metadata[""]["version"] = 1
    with pytest.warns(UserWarning, match="previous version"), pytest.raises(RuntimeError):
        model.load_state_dict(state)  # gives the network its old, wider stem first
    stem = model.layers[0]
    assert stem.weight.shape[0] == 32
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    load_state(model, tensors)
    assert model.layers[0] is stem
    assert torch.equal(stem.weight, tensors["layers.0.weight"])


def timm_reference(name: str, state: State) -> nn.Module:
    """Return the network that timm itself builds for published weights."""
    import timm

    overlay = {"state_dict": dict(state), "custom_load": False}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert isinstance(model, nn.Module)
    return model.eval()


FACEBOOK = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    ("conv_dw", "dwconv"),
    (r"mlp\.fc", "pwconv"),
    (r"^head\.norm", "norm"),
    (r"^head\.fc", "head"),
)


@pytest.mark.parametrize(
    ("name", "old_names"),
    [
        ("fbnetc_100", ()),  # whose published weights were trained with another epsilon
        ("convnext_atto", FACEBOOK),
        pytest.param("rdnet_tiny", ((r"^stem\.", "stem.stem."),), marks=pytest.mark.slow),
        pytest.param(
            "vgg11_bn",
            (
                (r"pre_logits\.fc1", "classifier.0"),
                (r"pre_logits\.fc2", "classifier.3"),
                (r"head\.fc", "classifier.6"),
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_files_that_timm_publishes_give_the_outputs_of_timm(
    name: str, old_names: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    state: State = dict(disturbed(timm.create_model(name)).state_dict())
    for pattern, replacement in old_names:
        state = renamed(state, pattern, replacement)
    save_file(state, tmp_path / "weights.safetensors")
    path = tmp_path / "weights.safetensors"
    model = secateur.load_model(f"timm:{name}", path, num_classes=1000)
    assert torch.equal(outputs(model, 224), outputs(timm_reference(name, state), 224))


def test_timm_loads_its_weights_again_after_a_network_was_built() -> None:
    pytest.importorskip("timm")
    from timm.models import _builder

    loader = _builder.load_pretrained
    secateur.load_model("timm:mobilenetv3_small_050", num_classes=3)
    assert _builder.load_pretrained is loader
