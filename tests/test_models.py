from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from secateur.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from secateur.models import cifar, weights, zoo
from secateur.models.weights import read_weights
from secateur.models.zoo import load, preprocessing
from secateur.runtime.errors import UnknownName, UsageError, WeightsError


def residual_parameters(depth: int, classes: int) -> int:
    """He et al. (2016), section 4.2, counted by hand: 6n + 2 layers, option A, with norms."""
    n = (depth - 2) // 6
    convolutions = 3 * 16 * 9 + 2 * n * 16 * 16 * 9
    for narrow, wide in ((16, 32), (32, 64)):
        convolutions += narrow * wide * 9 + (2 * n - 1) * wide * wide * 9
    norms = 2 * 16 + 2 * 2 * n * (16 + 32 + 64)
    return convolutions + norms + 64 * classes + classes


@pytest.mark.parametrize(
    ("name", "published_millions"),
    [
        ("resnet20", 0.27),
        ("resnet32", 0.46),
        ("resnet44", 0.66),
        ("resnet56", 0.85),
        ("resnet110", 1.7),
    ],
)
def test_residual_networks_have_the_published_size(name: str, published_millions: float) -> None:
    count = sum(one.numel() for one in load(name).parameters())
    assert count == residual_parameters(int(name.removeprefix("resnet")), 10)
    assert count / 1e6 == pytest.approx(published_millions, rel=0.02)


def test_resnet_sizes_to_the_last_parameter() -> None:
    assert sum(one.numel() for one in load("resnet20").parameters()) == 269_722
    assert sum(one.numel() for one in load("resnet56").parameters()) == 853_018


def test_vgg_has_thirteen_convolutions_and_its_size() -> None:
    model = load("vgg16_bn", num_classes=10)
    convolutions = [one for one in model.modules() if isinstance(one, nn.Conv2d)]
    assert len(convolutions) == 13
    widths = [64, 64, 128, 128, *3 * [256], *6 * [512]]
    expected = sum(a * b * 9 + 3 * b for a, b in zip([3, *widths[:-1]], widths, strict=True))
    assert sum(one.numel() for one in model.parameters()) == expected + 512 * 10 + 10


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", "torchvision:resnet18"])
def test_the_number_of_classes_is_the_requested_one(name: str) -> None:
    model = load(name, num_classes=7)
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_shortcut_pads_with_zeros_on_both_sides() -> None:
    block = cifar.BasicBlock(4, 8, stride=2).eval()
    assert sum(one.numel() for one in block.parameters()) == 4 * 8 * 9 + 8 * 8 * 9 + 4 * 8
    with torch.no_grad():
        block.bn2.weight.zero_()
        images = torch.rand(2, 4, 6, 6)
        maps = block(images)
    assert torch.equal(maps[:, 2:6], images[:, :, ::2, ::2])
    assert maps[:, :2].abs().max() == maps[:, 6:].abs().max() == 0


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet56"])
def test_published_checkpoints_fit(name: str, shared_data: Path) -> None:
    path = shared_data / "weights" / f"cifar10_{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path}")
    stored = load_file(path)
    model = load(name, path)
    expected = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    assert {key for key in stored if not key.endswith("num_batches_tracked")} == expected
    assert torch.equal(
        model.get_parameter("layer3.0.conv1.weight"), stored["layer3.0.conv1.weight"]
    )


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def assert_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
def test_state_dicts_are_read_with_and_without_a_wrapper(
    suffix: str, wrapper: str | None, tmp_path: Path
) -> None:
    state, model = tiny().state_dict(), tiny()
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "best": 0.9}
    torch.save(content, tmp_path / f"w{suffix}")
    weights.load_weights(model, tmp_path / f"w{suffix}")
    assert_same(model, state)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_the_prefixes_of_parallel_and_compiled_networks_are_taken_off(
    prefix: str, tmp_path: Path
) -> None:
    state, model = tiny().state_dict(), tiny()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    weights.load_weights(model, str(tmp_path / "w.pth"))
    assert_same(model, state)


def test_a_prefix_that_only_some_names_have_belongs_to_them(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == {"module.a", "b"}


def test_safetensors_and_the_old_format_are_read(tmp_path: Path) -> None:
    state, model = tiny().state_dict(), tiny()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "old.th", _use_new_zipfile_serialization=False)
    for file in ("w.safetensors", "old.th"):
        weights.load_weights(model, tmp_path / file)
        assert_same(model, state)


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    state, model = tiny().half().state_dict(), tiny()
    save_file(state, tmp_path / "w.safetensors")
    weights.load_weights(model, tmp_path / "w.safetensors")
    assert model.state_dict()["0.weight"].dtype == torch.float32
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"].float())


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = {k: v for k, v in tiny().state_dict().items() if not k.endswith("batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    model = tiny()
    weights.load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.state_dict()["1.running_var"], state["1.running_var"])


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = tiny().state_dict()
    del state["2.bias"]
    state["head.weight"] = torch.zeros(1)
    state["0.weight"] = torch.zeros(5, 3, 3, 3)
    save_file(state, tmp_path / "w.safetensors")
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        weights.load_weights(model, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "don't fit the network" in message
    assert "1 missing: 2.bias" in message
    assert "1 unexpected: head.weight" in message
    assert "1 misshapen: 0.weight is [5, 3, 3, 3], not [4, 3, 3, 3]" in message
    assert_same(model, before)


def test_a_head_for_another_number_of_classes_is_said_to_be_that(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = zoo.load("resnet20", num_classes=100).state_dict()
    save_file(state, path)
    message = r"w\.safetensors are for 100 classes, but the data or --num-classes asks for 7$"
    with pytest.raises(WeightsError, match=message):
        zoo.load("resnet20", path, num_classes=7)
    state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(state, path)
    with pytest.raises(WeightsError, match="don't fit the network: 3 misshapen"):
        zoo.load("resnet20", path, num_classes=7)
    del state["conv1.weight"]
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"don't fit the network: 1 missing: conv1\.weight"):
        zoo.load("resnet20", path, num_classes=7)


def test_a_new_head_is_left_as_it_is_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = zoo.load("resnet20", num_classes=100, seed=3).state_dict()
    save_file(state, path)
    loaded = zoo.load("resnet20", path, num_classes=7, new_head=True).state_dict()
    untrained = zoo.load("resnet20", num_classes=7).state_dict()
    for name, tensor in loaded.items():
        expected = untrained if name.startswith("linear.") else state
        assert torch.equal(tensor, expected[name]), name
    same = zoo.load("resnet20", path, num_classes=100, new_head=True).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.items())
    state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(state, path)
    with pytest.raises(WeightsError, match="3 misshapen"):
        zoo.load("resnet20", path, num_classes=7, new_head=True)


def test_many_wrong_keys_are_cut_short(tmp_path: Path) -> None:
    save_file({"nothing": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"\d+ missing: conv1.weight, .*, …; 1 unexpected"):
        load("resnet20", tmp_path / "w.safetensors")


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not(
    new_format: bool, tmp_path: Path
) -> None:
    state = {**tiny().state_dict(), "bomb": Bomb(tmp_path / "exploded")}
    path = tmp_path / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightsError, match="holds more than tensors and is not read"):
        load("resnet20", path)
    assert not (tmp_path / "exploded").exists()


def test_a_whole_network_in_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(tiny(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"save the network's state_dict\(\) instead"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 1000, -10])
@pytest.mark.parametrize("file", ["w.pth", "w.th", "w.safetensors"])
def test_a_file_cut_short_is_refused_by_its_name(file: str, kept: int, tmp_path: Path) -> None:
    path, state = tmp_path / file, load("resnet20").state_dict()
    if file == "w.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file == "w.pth")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=file):
        read_weights(path)


@pytest.mark.parametrize("content", [b"no pickle at all", b".", b"XsX", b"\x80}\x01so", b"<html>"])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=path.name):
            read_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
        (torch.zeros(1), "holds no state dict"),
        ({"epoch": 3}, "holds more than tensors"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(
    content: object, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pth")


def test_missing_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights file"):
        load("resnet20", tmp_path / "none.pth")
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"read from \.safetensors, \.pth, \.pt or \.th"):
        load("resnet20", tmp_path / "w.onnx")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet2", "unknown model 'resnet2': did you mean .*resnet20"),
        ("vgg16", "unknown model 'vgg16': did you mean vgg16_bn"),
        ("torchvision:resnet51", "unknown torchvision model 'resnet51': did you mean resnet50"),
        ("hub:resnet20", "unknown model 'hub:resnet20'"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        load(name)


def test_the_names_listed_are_the_names_taken() -> None:
    listed = zoo.names()
    assert len(set(listed)) == len(listed)
    assert set(zoo.BUILT_IN) < set(listed)
    assert "torchvision:resnet50" in listed
    assert not any("quantized" in name or "segmentation" in name for name in listed)


def test_timm_networks_name_the_extra_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[timm\]'"):
        load("timm:resnet18")


NETWORK_FILE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.linear = nn.Linear(2, num_classes)

def with_classes(num_classes):
    return nn.Linear(2, num_classes)

def with_any(**settings):
    return nn.Linear(2, settings["num_classes"])

def without():
    num_classes = 3  # a local variable, not an argument
    return nn.Linear(2, num_classes)

def number():
    return 3

def failing():
    raise ValueError("no luck")

def demanding(width):
    return nn.Linear(2, width)

constant = 3
"""


@pytest.fixture
def network_file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(NETWORK_FILE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(("factory", "classes"), [("with_classes", 7), ("without", 3)])
def test_a_network_comes_from_a_factory_in_a_file(
    factory: str, classes: int, network_file: Path
) -> None:
    model = load(f"{network_file}:{factory}", num_classes=7)
    assert isinstance(model, nn.Linear)
    assert model.out_features == classes
    assert not model.training


def test_a_class_is_a_factory_and_gets_the_number_of_classes(network_file: Path) -> None:
    linear = load(f"{network_file}:Net", num_classes=7).get_submodule("linear")
    assert isinstance(linear, nn.Linear)
    assert linear.out_features == 7


def test_a_factory_with_keyword_arguments_gets_the_number_of_classes(
    network_file: Path,
) -> None:
    model = load(f"{network_file}:with_any", num_classes=7)
    assert isinstance(model, nn.Linear)
    assert model.out_features == 7


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("number", "mine.py:number: the network must be an nn.Module: got int"),
        ("withou", "unknown factory in .*mine.py 'withou': did you mean without"),
        ("failing", "mine.py.*failing.*ValueError: no luck"),
        ("demanding", "mine.py.*demanding.*width"),
        ("constant", "mine.py.*constant"),
    ],
)
def test_a_factory_that_does_not_work_is_named(
    factory: str, message: str, network_file: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        load(f"{network_file}:{factory}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "can't be run: SyntaxError"),
        ("import not_there_at_all", "can't be run: ModuleNotFoundError"),
        ("1 / 0", "can't be run: ZeroDivisionError"),
    ],
)
def test_a_file_that_can_not_be_run_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"broken.py {message}"):
        load(f"{path}:f")


def test_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "modern.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\nclass Sizes:\n    width: int = 3\n"
        "def build():\n    return nn.Linear(2, Sizes().width)\n"
    )
    model = load(f"{path}:build")
    assert isinstance(model, nn.Linear)
    assert model.out_features == 3


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file .*nowhere.py to take the network 'f' from"):
        load(f"{tmp_path / 'nowhere.py'}:f")


def test_code_is_refused_where_it_is_not_allowed_and_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(UsageError, match="is user code"):
        load(f"{path}:f", allow_code=False)
    assert not (tmp_path / "ran").exists()
    assert isinstance(load("resnet20", allow_code=False), nn.Module)


def test_weights_are_loaded_into_a_network_of_ones_own(network_file: Path, tmp_path: Path) -> None:
    state = nn.Linear(2, 7).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model = load(f"{network_file}:with_classes", tmp_path / "w.safetensors", num_classes=7)
    assert_same(model, state)


@pytest.mark.parametrize(
    ("name", "image_size", "resize"),
    [
        ("resnet56", 32, 32),
        ("vgg16_bn", 32, 32),
        ("torchvision:resnet50", 224, 256),
        ("torchvision:efficientnet_b3", 300, 320),
    ],
)
def test_preprocessing_is_that_of_the_origin(name: str, image_size: int, resize: int) -> None:
    prepare = preprocessing(name)
    assert (prepare.image_size, prepare.resize) == (image_size, resize)
    assert (prepare.mean, prepare.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("name", "interpolation"),
    [
        ("resnet56", "bilinear"),
        ("torchvision:resnet50", "bilinear"),
        ("torchvision:efficientnet_b0", "bicubic"),
        ("timm:resnet10t", "bicubic"),
        ("timm:vgg11_bn", "bilinear"),
    ],
)
def test_images_are_resized_as_by_the_origin(name: str, interpolation: str) -> None:
    assert preprocessing(name).interpolation == interpolation


def test_a_user_network_takes_images_of_the_default_size(network_file: Path) -> None:
    assert preprocessing(f"{network_file}:without") == Preprocessing(224, 256)
    assert preprocessing("nowhere.py:without") == Preprocessing(224, 256)


def test_preprocessing_of_an_unknown_network_names_near_ones() -> None:
    with pytest.raises(UnknownName, match="'resnet51': did you mean resnet50"):
        preprocessing("torchvision:resnet51")


def test_normalising_equals_torchvision(generator: torch.Generator) -> None:
    images = torch.randint(256, (2, 3, 5, 4), generator=generator, dtype=torch.uint8)
    transform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    torch.testing.assert_close(preprocessing("resnet20").normalise(images), transform(images))


def test_untrained_weights_depend_on_the_seed_alone() -> None:
    kernel = "layer1.0.conv1.weight"
    one = load("resnet20").get_parameter(kernel)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(load("resnet20").get_parameter(kernel), one)
    assert not torch.equal(load("resnet20", seed=1).get_parameter(kernel), one)
    assert torch.equal(torch.get_rng_state(), state)
