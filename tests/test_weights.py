"""Weights are copied from checkpoints of every layout, and what does not fit is named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.models import zoo
from secateur.models.weights import load_weights
from secateur.runtime.errors import UsageError, WeightsError

Tensors = dict[str, Tensor]


class Network(nn.Module):
    """A network whose parts have names."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


def trained(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    model = Network()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1 + seed)
    return model


def state(seed: int = 0) -> Tensors:
    return dict(trained(seed).state_dict())


def renamed(name: Callable[[str], str], seed: int = 0) -> Tensors:
    return {name(key): tensor for key, tensor in state(seed).items()}


def load(content: object, folder: Path, **options: Any) -> tuple[Network, tuple[str, ...]]:
    """Save the content, load it into a fresh network; return that and the notices."""
    path = folder / "last.ckpt"
    torch.save(content, path)
    torch.manual_seed(99)
    model = Network()
    return model, load_weights(model, path, **options)


def assert_same(model: nn.Module, tensors: Tensors) -> None:
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def inside(key: str) -> Callable[[str], str]:
    """Return a function that puts a wrapper's name behind `features`."""
    return lambda name: name.replace("features.", f"features.{key}.")


def under(key: str) -> dict[str, object]:
    return {key: state(), "epoch": 3, "best": 0.9}


OPTIMISER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}},
    "param_groups": [{"lr": 0.1, "params": [0]}],
}
LAYOUTS: dict[str, Callable[[], object]] = {
    "plain": state,
    **{
        f"under {key}": partial(under, key)
        for key in ("state_dict", "model_state_dict", "model", "net", "module")
    },
    "with an optimiser": lambda: {"optimizer": OPTIMISER, "model": state(), "epoch": 3},
    "data parallel": lambda: renamed(lambda name: f"module.{name}"),
    "compiled": lambda: renamed(lambda name: f"_orig_mod.{name}"),
    "both": lambda: {"state_dict": renamed(lambda name: f"_orig_mod.module.{name}")},
    "data parallel inside": lambda: renamed(inside("module")),
    "compiled inside": lambda: {"state_dict": renamed(inside("_orig_mod"))},
    "recomputed inside": lambda: renamed(inside("_checkpoint_wrapped_module")),
    "Lightning": lambda: {
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {"lr": 0.1},
        "state_dict": renamed(lambda name: f"model.{name}"),
    },
    "averaged": lambda: {
        **renamed(lambda name: f"module.{name}"), "n_averaged": torch.tensor(7)
    },
    "epoch beside the tensors": lambda: {**state(), "epoch": 3, "seen": torch.tensor(40)},
    "profiled": lambda: {
        **state(),
        **{f"{name}.{count}": torch.zeros(1) for name in ("features.0", "head")
           for count in ("total_ops", "total_params")},
        "total_ops": torch.zeros(1),
    },
    "a state dict for each part": lambda: {
        "features": trained().features.state_dict(), "head": trained().head.state_dict(),
        "optimizer": OPTIMISER,
    },
    "parameters": lambda: {
        name: nn.Parameter(t, t.is_floating_point()) for name, t in state().items()
    },
    "not contiguous": lambda: {
        name: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
        for name, t in state().items()
    },
    "double precision": lambda: {
        name: t.double() if t.is_floating_point() else t for name, t in state().items()
    },
    "NumPy arrays": lambda: {name: tensor.numpy() for name, tensor in state().items()},
    "twice the same": lambda: {"last": state(), "best": state()},
    "a list of one": lambda: [state()],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_understood_without_a_word(layout: str, tmp_path: Path) -> None:
    model, notices = load(LAYOUTS[layout](), tmp_path, **OPTIONS.get(layout, {}))
    assert_same(model, state())
    assert not notices


OPTIONS: dict[str, dict[str, Any]] = {
    "twice the same": {"key": "last"},
    "a list of one": {"key": "0"},
}


@pytest.mark.parametrize("key", ["weights", "params", "ema", "state_dict_ema", "best_model"])
def test_an_unusual_key_is_named(key: str, tmp_path: Path) -> None:
    model, [notice] = load({key: state(), "epoch": 3}, tmp_path)
    assert_same(model, state())
    assert notice == f"The weights were taken from {key!r} in {tmp_path / 'last.ckpt'}."


def test_a_prefix_of_any_name_is_taken_off(tmp_path: Path) -> None:
    model, [notice] = load({"state_dict": renamed("my.classifier.{}".format)}, tmp_path)
    assert_same(model, state())
    assert "taken from 'state_dict.my.classifier' in" in notice


PAIRS: dict[str, tuple[Callable[[], dict[str, object]], str, str]] = {
    "torchvision": (
        lambda: {
            "model": state(1),
            "model_ema": {**renamed(lambda n: f"module.{n}"), "n_averaged": torch.tensor(3)},
        },
        "model_ema",
        "model",
    ),
    "timm": (
        lambda: {"state_dict": state(1), "state_dict_ema": state()}, "state_dict_ema", "state_dict"
    ),
    "BasicSR": (lambda: {"params": state(1), "params_ema": state()}, "params_ema", "params"),
    "ema-pytorch": (
        lambda: {
            **renamed(lambda n: f"online_model.{n}", 1),
            **renamed(lambda n: f"ema_model.{n}"),
            "initted": torch.tensor([True]),
            "step": torch.tensor([8]),
        },
        "ema_model",
        "online_model",
    ),
    "Lightning": (
        lambda: {
            "state_dict": renamed(lambda n: f"model.{n}"),
            "current_model_state": renamed(lambda n: f"model.{n}", 1),
        },
        "state_dict.model",
        "current_model_state.model",
    ),
    "a counter alone": (
        lambda: {"net": state(1), "other": {**state(), "n_averaged": torch.tensor(3)}},
        "other",
        "net",
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_an_average_is_preferred_and_said_and_the_other_can_be_chosen(
    pair: str, tmp_path: Path
) -> None:
    make, average, raw = PAIRS[pair]
    model, [notice] = load(make(), tmp_path)
    assert_same(model, state())
    assert f"{average!r} was loaded" in notice
    assert f"weights_key (--weights-key): {raw!r}" in notice
    for key, seed in ((raw, 1), (average, 0)):
        model, notices = load(make(), tmp_path, key=key)
        assert_same(model, state(seed))
        assert not notices


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"student": state(), "teacher": state(1)}, "student, teacher"),
        ({"state_dict": {**renamed("a.{}".format), **renamed("b.{}".format, 1)}},
         "state_dict.a, state_dict.b"),
        ({"folds": [state(), state(1)]}, "folds.0, folds.1"),
        ({"ema_1": state(), "ema_2": state(1), "raw": state(2)}, "ema_1, ema_2, raw"),
    ],
)  # fmt: skip
def test_of_several_networks_none_is_guessed(
    content: dict[str, object], keys: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError) as caught:
        load(content, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'last.ckpt'} holds several networks that fit: choose with weights_key "
        f"(--weights-key) one of {keys}"
    )
    for seed, key in enumerate(keys.split(", ")):
        assert_same(load(content, tmp_path, key=key)[0], state(seed))


def test_a_key_may_lie_below_others(tmp_path: Path) -> None:
    content = {"state_dict": {**renamed("a.{}".format), **renamed("b.{}".format, 1)}}
    assert_same(load(content, tmp_path, key="b")[0], state(1))


def test_of_several_networks_the_one_with_the_right_shapes_is_taken(tmp_path: Path) -> None:
    wide = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in state(1).items()
            if tensor.ndim}  # fmt: skip
    model, _ = load({"teacher": wide, "student": state()}, tmp_path)
    assert_same(model, state())


def test_a_key_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no tensors under 'ema': its keys are net$"):
        load({"net": state(), "epoch": 3}, tmp_path, key="ema")
    with pytest.raises(WeightsError, match=r"under 'ema': it holds one state dict, without key$"):
        load(state(), tmp_path, key="ema")


def test_what_lies_beside_the_network_is_named(tmp_path: Path) -> None:
    content = {
        **renamed("net.{}".format),
        "criterion.weight": torch.ones(2),
        **{f"teacher.{n}": torch.ones(3) for n in ("a", "b", "c")},
    }
    model, [notice] = load({"state_dict": content, "optimizer": OPTIMISER}, tmp_path)
    assert_same(model, state())
    path = tmp_path / "last.ckpt"
    assert notice == f"Not loaded from {path}: criterion.weight, teacher.* (3 tensors)."
    model, [notice] = load({**state(), "loss_fn.pos_weight": torch.ones(2)}, tmp_path)
    assert_same(model, state())
    assert notice == f"Not loaded from {path}: loss_fn.pos_weight."


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_weights_are_widened_and_said(dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state().items()}
    model, [notice] = load(narrow, tmp_path)
    assert_same(model, {name: t.float() for name, t in narrow.items()})
    assert f"stored as {str(dtype).removeprefix('torch.')}" in notice


def test_a_float16_network_takes_float32_weights(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pth")
    model = Network().half()
    assert load_weights(model, tmp_path / "w.pth") == ()
    assert_same(model, {n: t.half() if t.is_floating_point() else t for n, t in state().items()})


class Tied(nn.Module):
    """One convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = self.first


def test_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    stored, model = Tied(), Tied()
    save_model(stored, str(tmp_path / "w"))
    load_weights(model, tmp_path / "w")
    assert_same(model, stored.state_dict())
    assert model.first is model.second


def test_a_wrapped_network_takes_plain_weights(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pth")
    model = nn.DataParallel(Network())
    load_weights(model, tmp_path / "w.pth")
    assert_same(model.module, state())


def test_backbone_and_head_may_have_a_prefix_each(tmp_path: Path) -> None:
    def name(key: str) -> str:
        return f"head.{key}" if key.startswith("head.") else f"backbone.{key}"

    content = {"meta": {"epoch": 3}, "state_dict": renamed(name)}
    model, [note] = load(content, tmp_path)  # as OpenMMLab's image classifiers
    assert_same(model, state())
    assert "taken from 'state_dict.backbone'" in note
    other = {f"neck.{key}": tensor for key, tensor in state(1).items() if "head" in key}
    with pytest.raises(WeightsError, match=r"2 missing: head\.weight, head\.bias"):
        load({"state_dict": {**renamed(name), **other}}, tmp_path)


class Holder(nn.Module):
    """Holds a network, as modules of Lightning do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner


def test_a_network_that_holds_another_takes_the_weights_of_that(tmp_path: Path) -> None:
    for content in (state(), {"state_dict": renamed("net.{}".format)}):
        torch.save(content, tmp_path / "w.pth")
        model = Holder(Holder(Network()))
        load_weights(model, tmp_path / "w.pth")
        assert_same(model.model.model, state())  # type: ignore[arg-type]


def test_masks_of_pruning_are_applied(tmp_path: Path) -> None:
    masked = trained()
    for layer in (masked.features[0], masked.head):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    assert "features.0.weight_mask" in masked.state_dict()
    torch.save({"state_dict": nn.DataParallel(masked).state_dict()}, tmp_path / "w.pth")
    model = Network()
    load_weights(model, tmp_path / "w.pth")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(images), masked.eval()(images))
    again = Network()
    for layer in (again.features[0], again.head):
        prune.identity(layer, "weight")
    load_weights(again, tmp_path / "w.pth")
    assert_same(again, dict(masked.state_dict()))


def test_a_layer_with_a_wrappers_name_keeps_it(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})

    stored, model = build(), build()
    torch.save(stored.state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert_same(model, stored.state_dict())
    assert not torch.equal(model.state_dict()["module.bias"], model.state_dict()["other.bias"])


def test_names_that_the_network_itself_understands_are_read(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # the old function is deprecated
        stored = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)))
    torch.save({"state_dict": stored.state_dict()}, tmp_path / "w.pth")
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)))
    load_weights(model, tmp_path / "w.pth")
    images = torch.rand(1, 3, 2, 2)
    assert torch.equal(model(images), stored(images))


def test_published_names_are_understood_under_any_key(tmp_path: Path) -> None:
    new = torchvision.models.densenet121(num_classes=3).state_dict()
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))(\d)\.")
    old = {pattern.sub(r"\1.\2.", name): tensor for name, tensor in new.items()}
    assert old.keys() != new.keys()
    other = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in old.items()}
    torch.save({"model": other, "model_ema": old}, tmp_path / "w.pth")
    notes: list[str] = []
    model = zoo.load("torchvision:densenet121", tmp_path / "w.pth", num_classes=3,
                     notify=notes.append)  # fmt: skip
    assert_same(model, dict(new))
    assert "'model_ema' was loaded" in notes[0]
    torch.save({"a": other, "b": old}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"with weights_key \(--weights-key\) one of a, b$"):
        zoo.load("torchvision:densenet121", tmp_path / "w.pth", num_classes=3)


def test_kernels_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    quantised = {**state(), "features.0.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)}
    with pytest.raises(WeightsError, match=r"1 of another type: features\.0\.weight is int8, not"):
        load(quantised, tmp_path)
    empty = {**state(), "features.0.weight": torch.ones(4, 3, 3, 3, device="meta")}
    with pytest.raises(WeightsError, match=r"features\.0\.weight is without values \(meta\)"):
        load(empty, tmp_path)


def test_quantised_and_sparse_tensors_are_read(tmp_path: Path) -> None:
    kernels = state()["features.0.weight"]
    with warnings.catch_warnings(action="ignore"):  # deprecated, but in files
        stored = torch.quantize_per_tensor(kernels, 0.1, 0, torch.qint8)
    model, _ = load({**state(), "features.0.weight": stored}, tmp_path)
    assert torch.equal(model.get_parameter("features.0.weight"), stored.dequantize())
    model, _ = load({**state(), "features.0.weight": kernels.to_sparse()}, tmp_path)
    assert torch.equal(model.get_parameter("features.0.weight"), kernels)


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    without = {k: v for k, v in state().items() if not k.endswith("batches_tracked")}
    save_file(without, tmp_path / "w.safetensors")
    model = Network()
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(
        model.state_dict()["features.1.running_var"], state()["features.1.running_var"]
    )


@pytest.mark.parametrize("key", ["", "state_dict"])
def test_keys_that_do_not_fit_are_named(key: str, tmp_path: Path) -> None:
    wrong = {f"model.{name}": tensor for name, tensor in state().items()}
    del wrong["model.head.bias"]
    wrong["model.aux.weight"] = torch.zeros(1)
    wrong["model.features.0.weight"] = torch.zeros(5, 3, 3, 3)
    torch.save({key: wrong} if key else wrong, tmp_path / "w.pth")
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, tmp_path / "w.pth")
    place = f"w.pth, under '{key}.model'," if key else "w.pth, under 'model',"
    assert str(caught.value).endswith(
        f"{place} don't fit the network: 1 missing: head.bias; 1 unexpected: aux.weight; "
        "1 misshapen: features.0.weight is [5, 3, 3, 3], not [4, 3, 3, 3]"
    )
    assert_same(model, before)


def test_a_head_for_another_number_of_classes_is_said_to_be_that(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = zoo.load("resnet20", num_classes=100).state_dict()
    save_file(tensors, path)
    message = r"w\.safetensors are for 100 classes, but the data or --num-classes asks for 7$"
    with pytest.raises(WeightsError, match=message):
        zoo.load("resnet20", path, num_classes=7)
    tensors["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="don't fit the network: 3 misshapen"):
        zoo.load("resnet20", path, num_classes=7)
    del tensors["conv1.weight"]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"don't fit the network: 1 missing: conv1\.weight"):
        zoo.load("resnet20", path, num_classes=7)


def test_a_new_head_is_left_as_it_is_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = zoo.load("resnet20", num_classes=100, seed=3).state_dict()
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    loaded = zoo.load("resnet20", path, num_classes=7, new_head=True).state_dict()
    untrained = zoo.load("resnet20", num_classes=7).state_dict()
    for name, tensor in loaded.items():
        expected = untrained if name.startswith("linear.") else tensors
        assert torch.equal(tensor, expected[name]), name
    same = zoo.load("resnet20", path, num_classes=100, new_head=True).state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in same.items())
    tensors["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="3 misshapen"):
        zoo.load("resnet20", path, num_classes=7, new_head=True)


def test_many_wrong_keys_are_cut_short(tmp_path: Path) -> None:
    save_file({"nothing": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"\d+ missing: conv1.weight, .*, …; 1 unexpected"):
        zoo.load("resnet20", tmp_path / "w.safetensors")


def test_one_shard_of_several_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"features.0.weight": state()["features.0.weight"]}, path)
    with pytest.raises(WeightsError, match="it is one of several shards: name their folder"):
        load_weights(Network(), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no state dict$"),
        (torch.zeros(1), "holds no state dict$"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds no state dict, but epoch, args$"),
    ],
)
def test_a_file_without_tensors_is_refused(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        load(content, tmp_path)


def test_dicts_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["again"] = endless
    with pytest.raises(WeightsError, match="can't be read: its dicts nest too deeply"):
        load(endless, tmp_path)
    wide: object = torch.zeros(1)
    for _ in range(20):
        wide = [wide] * 2
    with pytest.raises(WeightsError, match="can't be read: its dicts nest too deeply"):
        load(wide, tmp_path)


def test_python_is_warned_of_what_the_file_left_open(tmp_path: Path) -> None:
    tensors = zoo.load("resnet20", num_classes=7).state_dict()
    torch.save({"state_dict": tensors, "state_dict_ema": tensors}, tmp_path / "same.pth")
    zoo.load("resnet20", tmp_path / "same.pth", num_classes=7, weights_key="state_dict")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"state_dict": tensors, "state_dict_ema": other}, tmp_path / "two.pth")
    with pytest.warns(UserWarning, match="'state_dict_ema' was loaded") as caught:
        zoo.load("resnet20", tmp_path / "two.pth", num_classes=7)
    assert len(caught) == 1


def test_a_key_or_a_name_without_a_file_is_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"weights_key = 'ema' needs weights \(--weights\)$"):
        zoo.load("resnet20", weights_key="ema")
    with pytest.raises(WeightsError, match="the weights have an empty name"):
        zoo.load("resnet20", "")


def test_an_error_of_the_network_itself_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\n\tsecond")

    monkeypatch.setattr(nn.Linear, "_load_from_state_dict", fail)
    with pytest.raises(WeightsError, match=r"last\.ckpt can't be loaded: first second$"):
        load(state(), tmp_path)
