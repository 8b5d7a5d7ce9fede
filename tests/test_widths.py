"""What a cut network states of its widths is what it takes and returns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from networks import random_images, random_plan
from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.integrations.widths import refuse_save_pretrained
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import UsageError

IMAGES = random_images(2, 32)


def cut(model: nn.Module) -> Any:
    """Return a network without random channels of every group."""
    dependencies = build_dependency_graph(model.eval(), IMAGES, prune_residual=True)
    plan = random_plan(dependencies, torch.Generator().manual_seed(0))
    return apply_plan(model, dependencies, plan)


def widths_of_outputs(model: Any) -> dict[str, int]:
    """Return the channels of what each module returns."""
    widths: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: widths.update({name: output.shape[1]})
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(IMAGES)
    for hook in hooks:
        hook.remove()
    return widths


def test_timm_makes_a_new_head_that_fits() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_efficientnet", num_classes=10)
    before = copy.deepcopy(model.feature_info)
    smaller = cut(model)
    with torch.no_grad():
        features = smaller.forward_features(IMAGES)
        hidden = smaller.forward_head(features, pre_logits=True)
        stages = smaller.forward_intermediates(IMAGES, intermediates_only=True)

    assert smaller.num_features == features.shape[1] < model.num_features == 256
    assert smaller.head_hidden_size == hidden.shape[1] < model.head_hidden_size == 256
    widths = [stage["num_chs"] for stage in smaller.feature_info]
    assert widths == [stage.shape[1] for stage in stages]
    assert model.feature_info == before
    assert widths != [stage["num_chs"] for stage in before]
    smaller.reset_classifier(5)
    assert smaller.eval()(IMAGES).shape == (2, 5)


def test_torchvision_blocks_state_their_widths() -> None:
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
    model = mobilenet_v2(num_classes=10, width_mult=0.25, inverted_residual_setting=blocks)
    smaller = cut(model)
    widths = widths_of_outputs(smaller)
    stated = {
        name: module.out_channels
        for name, module in smaller.named_modules()
        if isinstance(vars(module).get("out_channels"), int)
    }
    assert len(stated) == 26
    assert stated == {name: widths[name] for name in stated}
    assert smaller.last_channel == widths["features"] < model.last_channel == 1280


def test_the_configuration_of_transformers_follows(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "layer_type": "basic"}
    config = transformers.ResNetConfig(**settings, embedding_size=16, num_labels=3)
    model = transformers.ResNetForImageClassification(config)
    smaller = cut(model)
    with torch.no_grad():
        outputs = smaller(IMAGES, output_hidden_states=True)

    widths = [stage.shape[1] for stage in outputs.hidden_states]
    assert [smaller.config.embedding_size, *smaller.config.hidden_sizes] == widths
    assert model.config.hidden_sizes == [16, 24, 32]
    smaller.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.ResNetForImageClassification.from_pretrained(tmp_path)


def test_an_encoder_states_what_it_returns() -> None:
    library = pytest.importorskip("segmentation_models_pytorch")
    model = library.Unet("resnet18", 3, None, decoder_channels=(8, 4, 4))
    smaller = cut(model)
    with torch.no_grad():
        features = smaller.encoder(IMAGES)
    assert list(smaller.encoder.out_channels) == [feature.shape[1] for feature in features]
    assert list(model.encoder.out_channels) == [3, 64, 64, 128]


class Attributes(nn.Module):
    """Attributes of the usual names that are no width, or one of another value."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(x))
        return logits


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.dim, self.in_features = 6, 5, 2, "six"
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def test_only_numbers_of_channels_change() -> None:
    model = Attributes().eval()
    dependencies = build_dependency_graph(model, IMAGES)
    plan = PruningPlan({"block.0": (0, 4)}, Budget("macs", 0.5), "random")
    head = apply_plan(model, dependencies, plan).head
    assert isinstance(head, Head)
    assert (head.in_channels, head.out_channels, head.dim, head.in_features) == (4, 5, 2, "six")
    assert model.head.in_channels == 6


def test_save_pretrained_is_refused_where_loading_would_invent_layers() -> None:
    class Saved(nn.Linear):
        def save_pretrained(self, folder: str) -> None:
            raise AssertionError(folder)

    model = nn.Sequential(Saved(2, 2), nn.ReLU())
    refuse_save_pretrained(model)
    for network in (model, copy.deepcopy(model)):
        layer: Any = network[0]
        with pytest.raises(UsageError, match="from_pretrained would fill their layers at random"):
            layer.save_pretrained("folder")
