"""The networks that the benches measure, each with its image size.

Weights are random, from a fixed seed. Constant initial values (norm scales and shifts, biases,
layer scales) are made random too, and batch norms get the statistics of a batch, disturbed: with
the initial values a channel that is wrongly removed is often zero anyway, and the signal of a deep
network fades or explodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import third_party
from secateur.graph.torchvision_detectors import traceable_forward
from secateur.models import zoo
from third_party import Shape

CLASSES = 1000
Batch = Tensor | tuple[Tensor, ...]
"""What a network takes: a batch of images, or several inputs."""


@dataclass(frozen=True)
class Member:
    """One network of the zoo."""

    name: str
    """`part:network`; of torchvision's and timm's as `secateur.load_model` takes it."""
    part: str
    """A part of `third_party`, or "torchvision", "timm", "dense", "bonus"."""
    shapes: tuple[Shape, ...]
    """The shape of each of its inputs, without the dimension of the batch."""


def of_side(side: int) -> tuple[Shape]:
    """Return the shape of colour images of equal height and width."""
    return ((3, side, side),)


TIMM_RELEASE = "1.0.31"
"""The release of timm that has all its members here; older ones lack some."""

TIMM: dict[str, int] = {
    # Residual networks and what became of them.
    "resnet10t": 160,
    "resnet50_gn": 160,
    "resnetaa34d": 160,
    "resnetblur18": 160,
    "resnetrs50": 160,
    "resnet51q": 160,
    "resnetv2_50": 160,
    "resnetv2_50d_gn": 160,
    "wide_resnet50_2": 160,
    "resnext26ts": 160,
    "eca_resnext26ts": 160,
    "gcresnext26ts": 160,
    "bat_resnext26ts": 256,  # its attention is built for this size
    "ecaresnet50t": 160,
    "ecaresnext26t_32x4d": 160,
    "seresnet33ts": 160,
    "seresnext26d_32x4d": 160,
    "legacy_seresnet18": 160,
    "legacy_senet154": 128,
    "skresnet18": 160,
    "skresnext50_32x4d": 160,
    "resnest14d": 160,
    "resnest50d_1s4x24d": 160,
    "res2net50_26w_4s": 160,
    "res2next50": 160,
    "tresnet_m": 160,
    "gernet_s": 160,
    "nf_resnet50": 160,
    "nf_regnet_b0": 160,
    "eca_nfnet_l0": 160,
    "dm_nfnet_f0": 160,
    "regnetx_002": 160,
    "regnety_002": 160,
    "regnetz_005": 160,
    "regnetz_b16": 160,
    "regnetv_040": 160,
    # Networks that concatenate, and networks that aggregate.
    "densenet121": 160,
    "densenetblur121d": 160,
    "rdnet_tiny": 160,
    "dpn68": 160,
    "dla34": 160,
    "dla60x_c": 160,
    "vovnet39a": 160,
    "ese_vovnet19b_dw": 160,
    "hgnet_tiny": 160,
    "hgnetv2_b0": 160,
    "hrnet_w18_small": 160,
    "selecsls42b": 160,
    "darknet17": 160,
    "darknet53": 160,
    "cspdarknet53": 160,
    "cspresnet50": 160,
    "cspresnext50": 160,
    "cs3darknet_s": 160,
    "cs3darknet_focus_s": 160,
    "cs3sedarknet_l": 160,
    "cspnext_tiny": 160,
    # Plain ones, inceptions and searched ones.
    "vgg11_bn": 224,  # its first linear layer is a 7×7 convolution
    "repvgg_a0": 160,
    "mobileone_s0": 160,
    "inception_v3": 299,
    "inception_v4": 299,
    "inception_resnet_v2": 299,
    "xception41": 160,
    "legacy_xception": 160,
    "nasnetalarge": 160,
    "pnasnet5large": 160,
    # Mobile networks.
    "mobilenetv1_100": 160,
    "mobilenetv2_100": 160,
    "mobilenetv3_small_100": 160,
    "mobilenetv4_conv_small": 160,
    "mobilenet_edgetpu_v2_xs": 160,
    "mnasnet_small": 160,
    "semnasnet_075": 160,
    "spnasnet_100": 160,
    "fbnetc_100": 160,
    "fbnetv3_b": 160,
    "hardcorenas_a": 160,
    "lcnet_050": 160,
    "lcnetv2_small": 160,
    "tinynet_e": 106,
    "mixnet_s": 160,
    "rexnet_100": 160,
    "rexnetr_100": 160,
    "ghostnet_100": 160,
    "ghostnetv2_100": 160,
    "ghostnetv3_050": 160,
    "repghostnet_050": 160,
    "efficientnet_b0": 160,
    "efficientnet_b0_gn": 160,
    "efficientnet_blur_b0": 160,
    "efficientnet_cc_b0_4e": 160,
    "efficientnet_es": 160,
    "efficientnet_lite0": 160,
    "efficientnetv2_rw_t": 160,
    "tf_efficientnet_b0": 160,
    # Convolutional networks after the transformers.
    "convnext_atto": 160,
    "convnext_zepto_rms": 160,
    "convnextv2_atto": 160,
    "inception_next_tiny": 160,
    "convmixer_768_32": 112,
    "fasternet_t0": 160,
    "starnet_s1": 160,
    "mambaout_femto": 160,
    "poolformer_s12": 160,
    "poolformerv2_s12": 160,
    "convformer_s18": 160,
    "focalnet_tiny_srf": 160,
    "repvit_m0_9": 160,
    # Hybrids: convolutions and attention.
    "caformer_s18": 160,
    "botnet26t_256": 256,
    "sebotnet33ts_256": 256,
    "halonet26t": 256,
    "lambda_resnet26t": 256,
    "haloregnetz_b": 224,
    "coatnet_pico_rw_224": 224,
    "coatnext_nano_rw_224": 224,
    "mobilevit_xxs": 256,
    "mobilevitv2_050": 256,
    "mobilenetv4_hybrid_medium": 256,
    "edgenext_xx_small": 256,
    "efficientvit_b0": 224,
    "efficientvit_m0": 224,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "fastvit_t8": 256,
    "iformer_t": 224,
    "nextvit_small": 224,
    "shvit_s1": 224,
    "swiftformer_xs": 224,
    "lowformer_b0": 224,
    "cpubone_t0": 224,
    "visformer_tiny": 224,
    "levit_conv_128s": 224,
    "csatv2": 256,
}
"""Members of timm's convolutional and hybrid families, small ones, and the side of their images.

Most of them take images of any size; those get less than their papers' to save time.
"""

TIMM_BONUS: dict[str, int] = {
    "vit_tiny_r_s16_p8_224": 224,
    "pvt_v2_b0": 224,
    "coat_lite_tiny": 224,
    "tiny_vit_5m_224": 224,
    "maxvit_pico_rw_256": 256,
    "maxxvit_rmlp_nano_rw_256": 256,
    "davit_tiny": 224,
    "sequencer2d_s": 224,
}
"""Networks that are mostly attention, or recurrent: no promise is made for them."""

DENSE: dict[str, int] = {
    "fcn_resnet50": 224,
    "deeplabv3_mobilenet_v3_large": 224,
    "lraspp_mobilenet_v3_large": 224,
    "ssdlite320_mobilenet_v3_large": 320,
    "retinanet_resnet50_fpn": 224,
    "fcos_resnet50_fpn": 224,
    "fasterrcnn_resnet50_fpn": 224,
    "maskrcnn_resnet50_fpn": 224,
    "keypointrcnn_resnet50_fpn": 224,
}
"""torchvision's networks that segment and detect; of detectors all but the boxes is compared."""

TORCHVISION_BONUS = ("vit_", "swin", "maxvit")
"""How the names of torchvision's transformers start."""


def members() -> list[Member]:
    """The whole zoo: torchvision's networks, timm's, those of other packages, then the bonus."""
    names = torchvision.models.list_models(module=torchvision.models)
    sides = {"inception_v3": 299}
    transformers = [name for name in names if name.startswith(TORCHVISION_BONUS)]
    bonus = [f"torchvision:{name}" for name in transformers]
    return [
        *(
            Member(f"torchvision:{name}", "torchvision", of_side(sides.get(name, 224)))
            for name in names
            if name not in transformers
        ),
        *(Member(f"timm:{name}", "timm", of_side(side)) for name, side in TIMM.items()),
        *(Member(f"torchvision:{name}", "dense", of_side(side)) for name, side in DENSE.items()),
        *(
            Member(f"{part}:{name}", part, network.shapes)
            for part, networks in third_party.PARTS.items()
            for name, network in networks.items()
        ),
        *(
            Member(name, "bonus", of_side(256 if "swin_v2" in name else 224))
            for name in bonus
            if not name.endswith(("_l_16", "_l_32", "_h_14"))  # as the base ones, but larger
        ),
        *(Member(f"timm:{name}", "bonus", of_side(side)) for name, side in TIMM_BONUS.items()),
    ]


def build(member: Member, seed: int, *, disturbed: bool = True) -> nn.Module:
    """Return the network in evaluation mode; weights and norm statistics depend on the seed.

    Without `disturbed`, batch norms have the statistics of their inputs, so that a deep network
    does not amplify rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if member.part in third_party.PARTS:
            networks = third_party.PARTS[member.part]
            model = networks[member.name.partition(":")[2]].build().eval()
        elif member.part == "dense":
            name = member.name.removeprefix("torchvision:")
            model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
        else:
            model = zoo.load(member.name, num_classes=CLASSES, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    randomise_constants(model.parameters(), generator)
    with torch.random.fork_rng(devices=[]):  # some networks draw noise
        torch.manual_seed(seed)
        images = random_inputs(member, 4, seed)
        randomise_statistics(model, images, generator, disturbed=disturbed)
    return model


def outputs_of(model: nn.Module, inputs: Batch) -> tuple[Tensor, ...]:
    """Return all output tensors; of detectors those before boxes are selected."""
    forward = traceable_forward(model)
    # Copies, since some networks write into what they are given.
    copies = [tensor.clone() for tensor in (inputs if isinstance(inputs, tuple) else (inputs,))]
    outputs = model(*copies) if forward is None else forward(model, *copies)
    return tuple(value for value in tree_leaves(outputs) if isinstance(value, Tensor))


def random_inputs(member: Member, count: int, seed: int) -> Batch:
    """Return what a network takes, of normal noise: a tensor, or a tuple of several."""
    generator = torch.Generator().manual_seed(seed)
    parts = tuple(torch.randn(count, *shape, generator=generator) for shape in member.shapes)
    return parts if len(parts) > 1 else parts[0]


def random_images(count: int, side: int, seed: int) -> Tensor:
    """Return images `[image, 3, side, side]` of normal noise."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def randomise_constants(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    """Replace parameters that hold a single value with random values.

    Zeros become shifts around zero; other values become scales around the old value, or around one
    if it was close to zero.
    """
    with torch.no_grad():
        for parameter in parameters:
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            start = float(parameter.flatten()[0])
            if not bool((parameter == start).all()):
                continue
            if start == 0:
                fan_in = math.prod(parameter.shape[1:])
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.5 / math.sqrt(fan_in))
            else:
                scale = torch.rand(parameter.shape, generator=generator) + 0.5
                parameter.copy_(scale * (start if abs(start) > 0.01 else 1.0))


def randomise_statistics(
    model: nn.Module, images: Batch, generator: torch.Generator, *, disturbed: bool
) -> None:
    """Give each batch norm the mean and variance of its input, optionally disturbed."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        if norms:
            outputs_of(model, images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
            if not disturbed:
                continue
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            shift = torch.randn(mean.shape, generator=generator) * 0.5
            mean.add_(shift * variance.sqrt())
            variance.mul_(torch.rand(variance.shape, generator=generator) + 0.5)
