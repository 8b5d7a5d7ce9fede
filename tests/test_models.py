from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import v2

from secateur.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from secateur.models import cifar, zoo
from secateur.models.zoo import load, preprocessing
from secateur.runtime.errors import UnknownName, UsageError


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
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


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
