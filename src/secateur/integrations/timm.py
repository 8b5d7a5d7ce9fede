"""What timm's networks say of themselves: `num_features`, `head_hidden_size`, `feature_info`.

`reset_classifier` makes a new head by them. The package is under the Apache License 2.0.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.graph.widths import Widths, set_width

POOLS = ("pre_logits", "global_pool", "head.global_pool", "head")
"""Where the head of a network begins: what it takes is what `forward_features` returns."""


def update_widths(path: str, model: Any, smaller: Any, widths: Widths) -> None:
    """Set the widths that a network of timm states, at `path` in a cut network."""
    start = f"{path}." if path else ""
    pools = [f"{start}{pool}" for pool in POOLS if _has(model, pool)]
    settings = getattr(model, "pretrained_cfg", None) or {}
    classifiers = settings.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    for name, places in (
        ("num_features", pools),
        ("head_hidden_size", [f"{start}{classifier}" for classifier in classifiers]),
    ):
        before = vars(model).get(name)
        if isinstance(before, int):
            after = (widths.of_input(place, before) for place in places)
            set_width(smaller, name, next((width for width in after if width is not None), None))
    stages = _stages(smaller)
    for stage in stages:
        module = f"{start}{stage['module']}"
        for place in (module, f"{start}{stage['module'].replace('.', '_')}"):
            width = widths.of_output(place, stage["num_chs"])
            if width is not None:
                stage["num_chs"] = width
                break
        else:
            if stage is stages[-1] and stage["num_chs"] == getattr(model, "num_features", None):
                stage["num_chs"] = smaller.num_features  # of a last convolution that is no more


def _stages(network: nn.Module) -> list[dict[str, Any]]:
    """Return the entries of `feature_info`, which is a list or holds one."""
    info = vars(network).get("feature_info")
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    return [e for e in entries if isinstance(e, dict) and {"module", "num_chs"} <= e.keys()]


def _has(network: nn.Module, name: str) -> bool:
    return name in dict(network.named_modules())
