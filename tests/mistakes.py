"""A folder as new users have it, for the mistakes in docs/reference/common_mistakes.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from layouts import random_pixels, write_image

NETWORK = """
from torch import nn

def small(num_classes=2):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )

class Net(nn.Sequential):
    def __init__(self, width, depth):
        super().__init__()
"""


def small(num_classes: int = 2) -> nn.Sequential:
    """The network of `NETWORK`."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def write_desk(folder: Path) -> None:
    """Write the files that the page lists."""
    (folder / "net.py").write_text(NETWORK)
    for number in range(6):
        for name in ("cat", "dog"):
            write_image(
                folder / "photos" / name / f"{number}.png", random_pixels(32, 32, 3, seed=number)
            )
            write_image(
                folder / "deep" / "photos" / name / f"{number}.png",
                random_pixels(32, 32, 3, seed=number),
            )
        write_image(folder / "loose" / f"{number}.png", random_pixels(32, 32, 3, seed=number))
    torch.save(small(5).state_dict(), folder / "five.pth")
    torch.save(small(), folder / "whole.pth")
    (folder / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    (folder / "page.pth").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    (folder / "run.yaml").write_text("model:\n  name: resnet20\n")
    (folder / "run.toml").write_text('[model]\nname = "resnet20"\n[plan]\ntaget = "macs=0.5"\n')
    (folder / "run").mkdir()
    (folder / "run" / "manifest.json").write_text("{}")
    (folder / "run" / "model.safetensors").write_bytes(b"")
    (folder / "base").mkdir()
    save_file(small().state_dict(), folder / "base" / "model.safetensors")
    (folder / "base" / "config.toml").write_text('[model]\nname = "net.py:small"\n')
    (folder / "base" / "training.json").write_text("{}")


def python_names() -> dict[str, object]:
    """What the Python rows of the page use."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 16, 16, generator=generator)
    labels = torch.arange(40) % 2
    return {"model": small(), "images": images, "labels": labels, "torch": torch, "np": np}
