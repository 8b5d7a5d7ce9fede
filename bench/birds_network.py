"""VGG-16's convolutions, their mean over positions, and a linear head for 200 bird species."""

from __future__ import annotations

from collections import OrderedDict

import torchvision
from torch import nn

SPECIES = 200


def vgg16_birds() -> nn.Module:
    """Return the network with random weights; it maps `[image, 3, 224, 224]` to `[image, 200]`."""
    layers = OrderedDict(
        features=torchvision.models.vgg16().features,
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(512, SPECIES),
    )
    return nn.Sequential(layers)
