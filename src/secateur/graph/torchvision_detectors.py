"""The traceable part of torchvision's detectors: everything but the boxes.

The number of boxes depends on the data. Backbone, feature pyramid and heads are traced as they are.
Two-stage detectors pool features of each box by RoIAlign, which keeps channels; it is replaced by
the sum of all pyramid levels, pooled to the same size, so that channels can be followed into the
heads of the second stage.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection

from secateur.graph.forward import forward_of
from secateur.graph.network_graph import Forward

_ONE_STAGE = (detection.RetinaNet, detection.FCOS, detection.ssd.SSD)
_SECOND_STAGE = ("box", "mask", "keypoint")


def traceable_forward(model: nn.Module) -> Forward | None:
    """Return the traceable part of a torchvision detector; None for other networks.

    A detector that runs through a function of the user's counts as another network.
    """
    if forward_of(model) is not None:
        return None
    if isinstance(model, _ONE_STAGE):
        return _one_stage
    return _two_stages if isinstance(model, detection.FasterRCNN) else None


def _one_stage(model: Any, images: Tensor) -> Any:
    return model.head(_levels(model.backbone(images)))


def _two_stages(model: Any, images: Tensor) -> Any:
    features = model.backbone(images)
    outputs = [model.rpn.head(_levels(features))]
    for name in _SECOND_STAGE:
        pool = getattr(model.roi_heads, f"{name}_roi_pool", None)
        if pool is None:
            continue
        levels = features if isinstance(features, dict) else {"0": features}
        pooled = [
            F.adaptive_avg_pool2d(levels[level], pool.output_size) for level in pool.featmap_names
        ]
        regions = getattr(model.roi_heads, f"{name}_head")(sum(pooled[1:], pooled[0]))
        outputs.append(getattr(model.roi_heads, f"{name}_predictor")(regions))
    return outputs


def _levels(features: Any) -> list[Tensor]:
    return list(features.values()) if isinstance(features, dict) else [features]
