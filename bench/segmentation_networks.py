"""Two segmentation networks on MobileNetV2, and a command that converts its staged weights.

    python bench/segmentation_networks.py convert FILE OUT

This reads `mobilenetv2_100_fp16.safetensors` and writes the weights that training starts from into
the folder OUT, `unet.safetensors` and `lraspp.safetensors`: the encoder is the classifier's, the
decoder has random weights.

The backbone is TensorFlow's MobileNetV2 (Sandler et al., CVPR 2018), which pads at the bottom and
the right where the stride is 2. The decoders are those of U-Net (Ronneberger et al., MICCAI 2015),
with two 3×3 convolutions a level, and of LR-ASPP (Howard et al., ICCV 2019, section 6.4), whose
pooling is global.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

UNET_WIDTHS = (128, 64, 32, 16)
"""Channels of U-Net's levels, at 1/16, 1/8, 1/4 and 1/2 of the input's sides."""
LRASPP_WIDTH = 128


def unet(num_classes: int = 11) -> nn.Module:
    """U-Net on MobileNetV2, untrained: logits of `[image, class, height, width]`."""
    return UNet(num_classes)


def lraspp(num_classes: int = 11) -> nn.Module:
    """LR-ASPP on MobileNetV2, untrained: logits of `[image, class, height, width]`."""
    return LRASPP(num_classes)


class UNet(nn.Module):
    """An encoder, and a decoder that joins its maps from the coarsest to the finest."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = _backbone((0, 1, 2, 3, 4))
        features: Any = self.encoder.feature_info
        *skipped, channels = features.channels()
        self.decoder = nn.ModuleList()
        for skip, width in zip(reversed(skipped), UNET_WIDTHS, strict=True):
            self.decoder.append(nn.Sequential(_conv(channels + skip, width), _conv(width, width)))
            channels = width
        self.head = nn.Conv2d(channels, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits in the size of the images."""
        *skipped, value = self.encoder(images)
        for block, skip in zip(self.decoder, reversed(skipped), strict=True):
            value = F.interpolate(value, skip.shape[2:], mode="nearest")
            value = block(torch.cat([value, skip], dim=1))
        return _resize(self.head(value), images)


class LRASPP(nn.Module):
    """Maps at 1/16 of the sides, gated by their mean, beside those at 1/8."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = _backbone((2, 4), output_stride=16)
        features: Any = self.encoder.feature_info
        low, high = features.channels()
        self.reduce = _conv(high, LRASPP_WIDTH, 1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(high, LRASPP_WIDTH, 1, bias=False), nn.Sigmoid()
        )
        self.low_head = nn.Conv2d(low, num_classes, 1)
        self.high_head = nn.Conv2d(LRASPP_WIDTH, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits in the size of the images."""
        low, high = self.encoder(images)
        value = _resize(self.reduce(high) * self.gate(high), low)
        return _resize(self.low_head(low) + self.high_head(value), images)


def _backbone(stages: tuple[int, ...], output_stride: int = 32) -> nn.Module:
    import timm

    model = timm.create_model(
        "mobilenetv2_100",
        pretrained=False,
        features_only=True,
        out_indices=stages,
        output_stride=output_stride,
        pad_type="same",
    )
    assert isinstance(model, nn.Module)
    return model


def _conv(channels: int, width: int, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def _resize(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=False)


def convert(file: Path, out: Path) -> None:
    """Write both networks with the staged weights of the classifier in their encoder."""
    classifier = load_file(file)
    out.mkdir(parents=True, exist_ok=True)
    for build in (unet, lraspp):
        torch.manual_seed(0)
        state = build().state_dict()
        for name in state:
            stored = classifier.get(name.removeprefix("encoder."))
            if name.startswith("encoder.") and stored is not None:
                state[name] = stored.float()
        save_file(state, out / f"{build.__name__}.safetensors")


def main() -> None:
    """Convert the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["convert"])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.file, arguments.out)


if __name__ == "__main__":
    main()
