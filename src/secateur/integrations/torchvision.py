"""What torchvision's networks say of themselves besides their blocks' `out_channels`."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.graph.widths import Widths, set_width


def update_widths(path: str, model: Any, smaller: nn.Module, widths: Widths) -> None:
    """Set `last_channel` of MobileNetV2 and `inplanes` of ResNet, at `path` in a cut network."""
    start = f"{path}." if path else ""
    values = vars(model)
    if isinstance(values.get("last_channel"), int):
        width = widths.of_output(f"{start}features", values["last_channel"])
        set_width(smaller, "last_channel", width)
    if isinstance(values.get("inplanes"), int) and hasattr(model, "layer4"):
        set_width(smaller, "inplanes", widths.of_output(f"{start}layer4", values["inplanes"]))
