"""Networks by name, and the preprocessing that each expects.

`resnet20` … `resnet110` are the CIFAR networks of He et al. (2016, arXiv 1512.03385, section 4.2)
with the parameter-free shortcut (option A); `vgg16_bn` is VGG-16 (Simonyan & Zisserman 2015) with
batch norm for 32×32 images and one linear layer. Parameters have the names of published
checkpoints.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

from secateur.data.preprocessing import Preprocessing
from secateur.graph.working_copy import working_copy
from secateur.graph.wrappers import unwrapped
from secateur.models import libraries, published, user_code
from secateur.models.cifar import CifarResNet, CifarVGG
from secateur.models.weights import load_weights
from secateur.runtime.errors import SecateurError, UnknownName, UsageError

IN_MEMORY = "memory"
"""Prefix of networks passed from Python, `memory:NAME`, which can't be built by name."""
BUILT_IN: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": lambda num_classes: CifarResNet(20, num_classes),
    "resnet32": lambda num_classes: CifarResNet(32, num_classes),
    "resnet44": lambda num_classes: CifarResNet(44, num_classes),
    "resnet56": lambda num_classes: CifarResNet(56, num_classes),
    "resnet110": lambda num_classes: CifarResNet(110, num_classes),
    "vgg16_bn": CifarVGG,
}
"""Networks for 32×32 images by name."""


def _warn(note: str) -> None:
    warnings.warn(note, stacklevel=3)


def load(
    name: str,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = 10,
    allow_code: bool = True,
    new_head: bool = False,
    seed: int = 0,
    weights_key: str | None = None,
    notify: Callable[[str], None] = _warn,
) -> nn.Module:
    """Return the named network in evaluation mode, with a file's weights or untrained.

    `name` is one of `BUILT_IN`, `torchvision:NAME`, `timm:NAME` (needs the extra `timm`), a network
    of one of `libraries.LIBRARIES` (each needs its extra) or `path/to/file.py:factory`, where
    `factory(num_classes=…)` or `factory()` returns the network.
    `allow_code=False` refuses the last form: a run folder must not choose code to run. Untrained
    weights depend on `seed` alone. `weights` is a file or a folder; `weights_key` names one of
    several networks in it (`model_ema`). `notify` gets a sentence on what the file left open, such
    as which network was loaded; by default it is a warning. See `load_weights` for `new_head`.
    Raises `UnknownName`, `UsageError` or `WeightsError`.
    """
    check_name(name)
    kind, _, rest = name.rpartition(":")
    if weights is None and weights_key is not None:
        raise UsageError(f"weights_key = {weights_key!r} needs weights (--weights)")
    if user_code.is_user_code(name) and not allow_code:
        raise UsageError(
            f"{name!r} is user code: build the network and pass it, or use load_program"
        )
    remap: published.Remap | None = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if user_code.is_user_code(name):
            model = _from_file(name, num_classes)
        elif libraries.is_library(name):
            model = libraries.build(name, num_classes)
        elif num_classes is None:
            raise UsageError("without data the number of classes must be given: --num-classes")
        elif kind == "torchvision":
            model = published.build_torchvision(rest, num_classes)
        elif kind == "timm":
            model, remap = published.build_timm(rest, num_classes)
        else:
            model = BUILT_IN[name](num_classes)
    if weights is not None:
        for note in load_weights(
            model, weights, num_classes, key=weights_key, new_head=new_head, remap=remap
        ):
            notify(note)
    return model.eval()


def check_name(name: str) -> None:
    """Raise `UnknownName` or `UsageError` if `load` doesn't know the name."""
    kind, colon, rest = name.rpartition(":")
    if user_code.is_user_code(name):
        user_code.check_file(name, "network")
    elif libraries.is_library(name):
        return  # the library is imported where the network is built
    elif kind == IN_MEMORY:
        raise UsageError(f"{rest} was passed from Python: it can't be built by its name")
    elif kind not in ("torchvision", "timm") and (colon or name not in BUILT_IN):
        raise _unknown_name(name)
    elif kind == "torchvision":
        known = _torchvision_names()
        if rest not in known:
            raise UnknownName("torchvision model", rest, known)
    elif kind == "timm" and not published.import_timm().is_model(rest):
        raise UnknownName("timm model", rest, published.import_timm().list_models())


def may_return_more(name: str) -> bool:
    """Return whether a network may return something else than logits `[image, class]`."""
    kind, _, rest = name.rpartition(":")
    is_classifier = name in BUILT_IN or kind == "timm" or rest in _torchvision_names()
    return not is_classifier


def _unknown_name(name: str) -> UsageError:
    """Return the error for a name that no network has."""
    path = Path(name)
    if path.suffix == ".py":
        defined = (
            f" (it defines {', '.join(user_code.defined_names(path))})" if path.is_file() else ""
        )
        return UsageError(
            f"{name}: add the function that returns the network: {name}:NAME{defined}"
        )
    if path.is_file():
        return UsageError(
            f"{name} is a file: pass weights with --weights, and the network that they belong to "
            "with --model"
        )
    if "://" in name:
        return UsageError(
            f"{name}: networks to prune are not fetched; a pruned one on the Hub is loaded from "
            "Python by secateur.load, and scored by secateur evaluate"
        )
    stem = name.rpartition(":")[2].lower()
    same = [known for known in names() if known.startswith(stem) or known.endswith(f":{stem}")]
    return UnknownName("model", name, names(), same)


def names() -> list[str]:
    """Return the names of all built-in and torchvision classification networks, as for `load`."""
    return [*BUILT_IN, *(f"torchvision:{name}" for name in _torchvision_names())]


def _torchvision_names() -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models))


def preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing that the named network expects.

    Built-in networks take 32×32 pixels, torchvision's and timm's what their published weights were
    trained with, and user code 224×224. The mean and deviation are ImageNet's, and images are
    resized bilinearly, unless the origin says otherwise. An interpolation that is not supported,
    such as `random`, is replaced by the bilinear one. Raises what `check_name` raises, except
    that a file of user code need not exist: it isn't read.
    """
    if user_code.is_user_code(name) or name.startswith(f"{IN_MEMORY}:"):
        return Preprocessing(224, 256)
    check_name(name)
    if libraries.is_library(name):
        return libraries.preprocessing(name)
    kind, _, rest = name.rpartition(":")
    if name in BUILT_IN:
        return Preprocessing(32, 32)
    if kind == "torchvision":
        weights = next(iter(torchvision.models.get_model_weights(rest)))
        preset = weights.transforms()
        return Preprocessing(
            preset.crop_size[0],
            preset.resize_size[0],
            tuple(preset.mean),
            tuple(preset.std),
            "bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
        )
    if kind == "timm":
        settings = published.import_timm().get_pretrained_cfg(rest)
        if settings is not None:
            size = int(settings.input_size[-1])
            resize = round(size / float(settings.crop_pct))
            return Preprocessing(
                size,
                resize,
                tuple(settings.mean),
                tuple(settings.std),
                "bicubic" if settings.interpolation == "bicubic" else "bilinear",
            )
    return Preprocessing(224, 256)


def _from_file(name: str, num_classes: int | None) -> nn.Module:
    build = user_code.find(name, "network")
    parameters = inspect.signature(build).parameters.values()
    takes_classes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    options = {} if num_classes is None or not takes_classes else {"num_classes": num_classes}
    model = user_code.call(name, build, **options)
    try:
        return working_copy(unwrapped(model))
    except SecateurError as error:
        raise UsageError(f"{name}: {error}") from error
