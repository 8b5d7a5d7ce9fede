"""Networks by name, and weights from files that can't run code.

`resnet20` … `resnet110` are the CIFAR networks of He et al. (2016, arXiv 1512.03385, section 4.2)
with the parameter-free shortcut (option A); `vgg16_bn` is VGG-16 (Simonyan & Zisserman 2015) with
batch norm for 32×32 images and one linear layer. Parameter names are those that published
checkpoints use.
"""

from __future__ import annotations

import inspect
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from secateur.errors import UnknownName, UsageError, WeightsError
from secateur.models import user_code
from secateur.runtime import safetensors_io

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Resizing = Literal["bilinear", "bicubic"]
"""How the pixels of a resized image are made from those around them, antialiased."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are brought to a network: sizes in pixels, mean and deviation of x / 255."""

    image_size: int
    resize: int
    """The shorter side before the centre crop to `image_size`."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Resizing = "bilinear"

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 `[image, rgb, height, width]` as float32, with zero mean and unit deviation.

        Floats are taken to be normalised, and come back as they are.
        """
        if images.is_floating_point():
            return images
        mean = torch.tensor(self.mean, device=images.device).reshape(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).reshape(3, 1, 1)
        return (images.float() / 255 - mean) / std


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut subsamples and pads with channels of zeros (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1: nn.Conv2d = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1: nn.BatchNorm2d = nn.BatchNorm2d(out_channels)
        self.conv2: nn.Conv2d = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2: nn.BatchNorm2d = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding: int = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`[image, in, h, w]` to `[image, out, h / stride, w / stride]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding or self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *2 * [self.padding]))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """He et al.'s network of depth 6n + 2 for 32×32 images: n blocks of 16, 32 and 64 filters."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1: nn.Conv2d = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1: nn.BatchNorm2d = nn.BatchNorm2d(16)
        self.layer1: nn.Sequential = _stage(16, 16, blocks, 1)
        self.layer2: nn.Sequential = _stage(16, 32, blocks, 2)
        self.layer3: nn.Sequential = _stage(32, 64, blocks, 2)
        self.linear: nn.Linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[image, 3, 32, 32]` to logits `[image, class]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    )


class CifarVGG(nn.Module):
    """VGG-16 with batch norm for 32×32 images: thirteen convolutions and one linear layer."""

    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
    """Filters a layer; 0 stands for a 2×2 max pooling."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self.WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features: nn.Sequential = nn.Sequential(*layers)
        self.classifier: nn.Linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[image, 3, 32, 32]` to logits `[image, class]`."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


IN_MEMORY = "memory"
"""`memory:NAME`: a network that was passed from Python, and can't be built by its name."""
BUILT_IN: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": lambda num_classes: CifarResNet(20, num_classes),
    "resnet32": lambda num_classes: CifarResNet(32, num_classes),
    "resnet44": lambda num_classes: CifarResNet(44, num_classes),
    "resnet56": lambda num_classes: CifarResNet(56, num_classes),
    "resnet110": lambda num_classes: CifarResNet(110, num_classes),
    "vgg16_bn": CifarVGG,
}
"""Networks for 32×32 images by name."""


def load(
    name: str,
    weights: str | Path | None = None,
    *,
    num_classes: int = 10,
    allow_code: bool = True,
    new_head: bool = False,
    seed: int = 0,
) -> nn.Module:
    """The named network in evaluation mode, with the weights of a file or, without one, untrained.

    `name` is one of `BUILT_IN`, `torchvision:NAME`, `timm:NAME` (needs the extra `timm`) or
    `path/to/file.py:factory`, where `factory(num_classes=…)` or `factory()` returns the network.
    With `allow_code=False` the last form is refused: a run folder must not choose code to run.
    Untrained weights depend on `seed` alone. For `new_head` see `load_weights`.
    Raises `UnknownName`, `UsageError` or `WeightsError`.
    """
    check_name(name)
    kind, _, rest = name.rpartition(":")
    if user_code.is_own_code(name) and not allow_code:
        raise UsageError(
            f"{name!r} is code of your own: build the network and pass it, or use load_program"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if user_code.is_own_code(name):
            model = _from_file(name, num_classes)
        elif kind == "torchvision":
            model = _from_torchvision(rest, num_classes)
        elif kind == "timm":
            model = _timm().create_model(rest, pretrained=False, num_classes=num_classes)
        else:
            model = BUILT_IN[name](num_classes)
    if weights is not None:
        load_weights(model, weights, num_classes, new_head=new_head)
    return model.eval()


def check_name(name: str) -> None:
    """Raises `UnknownName` or `UsageError` where `load` knows no network of this name."""
    kind, colon, rest = name.rpartition(":")
    if user_code.is_own_code(name):
        user_code.check_file(name, "network")
    elif kind == IN_MEMORY:
        raise UsageError(f"{rest} was passed from Python: it can't be built by its name")
    elif kind == "torchvision":
        known = _torchvision_names()
        if rest not in known:
            raise UnknownName("torchvision model", rest, known)
    elif kind == "timm":
        if not _timm().is_model(rest):
            raise UnknownName("timm model", rest, _timm().list_models())
    elif colon or name not in BUILT_IN:
        raise UnknownName("model", name, names())


def names() -> list[str]:
    """Every built-in and torchvision classification network, as `load` takes them."""
    return [*BUILT_IN, *(f"torchvision:{name}" for name in _torchvision_names())]


def _torchvision_names() -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models))


def preprocessing(name: str) -> Preprocessing:
    """What the named network expects of its images, where its origin says so.

    Built-in networks take 32×32 pixels; torchvision's and timm's what their published weights
    were trained with; a network of one's own 224×224. The mean and deviation are ImageNet's and
    images are resized bilinearly wherever nothing else is stated. Raises as `check_name` does, but
    not where a file of one's own is missing, for the file is not read.
    """
    if user_code.is_own_code(name) or name.startswith(f"{IN_MEMORY}:"):
        return Preprocessing(224, 256)
    check_name(name)
    kind, _, rest = name.rpartition(":")
    if name in BUILT_IN:
        return Preprocessing(32, 32)
    if kind == "torchvision":
        published = torchvision.models.get_model_weights(rest)
        preset = next(iter(published)).transforms()
        return Preprocessing(
            preset.crop_size[0],
            preset.resize_size[0],
            tuple(preset.mean),
            tuple(preset.std),
            _interpolation(preset.interpolation.value),
        )
    if kind == "timm":
        settings = _timm().get_pretrained_cfg(rest)
        if settings is not None:
            size = int(settings.input_size[-1])
            resize = round(size / float(settings.crop_pct))
            return Preprocessing(
                size,
                resize,
                tuple(settings.mean),
                tuple(settings.std),
                _interpolation(settings.interpolation),
            )
    return Preprocessing(224, 256)


def _interpolation(published: str) -> Resizing:
    """The one that is published; bilinear for others, such as one at random."""
    return "bicubic" if published == "bicubic" else "bilinear"


def _from_torchvision(name: str, num_classes: int) -> nn.Module:
    if name in ("inception_v3", "googlenet"):
        model = torchvision.models.get_model(
            name, num_classes=num_classes, init_weights=True, aux_logits=False
        )
    else:
        model = torchvision.models.get_model(name, num_classes=num_classes)
    assert isinstance(model, nn.Module)
    return model


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError("timm: networks need the extra: pip install 'secateur[timm]'") from error
    return timm


def _from_file(name: str, num_classes: int) -> nn.Module:
    build = user_code.find(name, "network")
    parameters = inspect.signature(build).parameters.values()
    takes_classes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    options = {"num_classes": num_classes} if takes_classes else {}
    model = user_code.call(name, build, **options)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} returned {type(model).__name__}, not an nn.Module")
    return model


def load_weights(
    model: nn.Module,
    path: str | Path,
    num_classes: int | None = None,
    *,
    new_head: bool = False,
) -> None:
    """Copies the weights of a file into `model`; every key must fit.

    With `new_head` a head that is for another number of classes than `num_classes` may stay as it
    is in `model`.

    Reads `.safetensors`, and `.pth`, `.pt` and `.th` with `weights_only=True`. A state dict inside
    a dict (`state_dict`, `model`, …) and the prefixes that data-parallel and compiled networks add
    are taken off. Raises `WeightsError` that names the missing, unexpected and misshapen keys or,
    where only the head is for another number of classes than `num_classes`, both numbers.
    """
    found = read_weights(Path(path))
    expected = model.state_dict()
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in found and name not in optional]
    unexpected = [name for name in found if name not in expected]
    unexpected.sort(key=lambda name: name.endswith("num_batches_tracked"))  # weights first
    shapes = {
        name: (list(tensor.shape), list(expected[name].shape))
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    }
    misshapen = [f"{name} is {shape}, not {wanted}" for name, (shape, wanted) in shapes.items()]
    heads = {shape[0] for shape, _ in shapes.values() if shape}
    only_heads = all(
        wanted == [num_classes, *shape[1:]] and shape for shape, wanted in shapes.values()
    )
    if len(heads) == 1 and only_heads and not missing and not unexpected:
        if not new_head:
            raise WeightsError(
                f"the weights in {path} tell {heads.pop()} classes apart, but the data or "
                f"--num-classes asks for {num_classes}"
            )
        found = {name: tensor for name, tensor in found.items() if name not in shapes}
        misshapen = []
    complaints = [
        f"{len(keys)} {title}: {', '.join(keys[:4])}{', …' if len(keys) > 4 else ''}"
        for title, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if keys
    ]
    if complaints:
        raise WeightsError(f"the weights in {path} don't fit the network: {'; '.join(complaints)}")
    model.load_state_dict(found, strict=False)


def _is_pickled(path: Path) -> bool:
    """Whether a file starts as a pickle does, or is a zip file as torch writes them."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _check_sums(path: Path) -> None:
    """Raises `ValueError` where a part of a zip file is not what its check sum says.

    `torch.load` does not look at them.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(
                f"the check sum of {damaged!r} does not match: it has been damaged, or written "
                "without check sums (torch.serialization.set_crc32_options)"
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, without wrappers and prefixes.

    Raises `WeightsError` where the file is missing, damaged or would need code to load.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            content: Any = safetensors_io.read(path)[0]
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a sound safetensors file: {error}") from error
    elif path.suffix in (".pth", ".pt", ".th"):
        try:
            with warnings.catch_warnings(action="ignore"):  # about oddities of damaged files
                _check_sums(path)
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not _is_pickled(path):
                raise WeightsError(f"{path} is no file of torch's") from error
            raise WeightsError(
                f"{path} holds more than tensors and is not read, since that could run code: "
                "save the network's state_dict() instead"
            ) from error
        except Exception as error:  # a damaged pickle raises whatever its bytes lead to
            reason = " ".join(str(error).split()) or type(error).__name__
            raise WeightsError(f"{path} can't be read: {reason}") from error
    else:
        raise WeightsError(f"{path}: weights are read from .safetensors, .pth, .pt or .th files")
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict")
    if not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise WeightsError(f"{path} holds more than tensors: save the network's state_dict()")
    tensors = {str(name): tensor for name, tensor in content.items()}
    prefixes = ("_orig_mod.", "module.")
    while prefix := next((p for p in prefixes if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
