"""Networks of other packages than torchvision and timm, and of papers, with their input shapes.

All are built from their configuration: small inputs, small widths, random weights.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn

import definitions

Shape = tuple[int, ...]
IMAGE = ((3, 64, 64),)
GREY = ((1, 64, 64),)
VOLUME = ((1, 32, 32, 32),)


@dataclass(frozen=True)
class Network:
    """How to build a network, and what it takes."""

    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    """The shape of each input, without the dimension of the batch."""
    task: Literal["auto", "regression"] = "auto"
    """What its outputs are for `secateur.prune`."""


def _call(path: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Return what a class or function, `module:name`, makes of some arguments."""
    module, _, name = path.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own
        function = getattr(importlib.import_module(module), name)
        model: nn.Module = function(*args, **kwargs)
    return model


def _smp(name: str, encoder: str = "resnet18", side: int = 64, **options: Any) -> Network:
    options = {"encoder_weights": None, "classes": 5, **options}
    path = f"segmentation_models_pytorch:{name}"
    return Network(partial(_call, path, encoder_name=encoder, **options), ((3, side, side),))


def _smp_unet(name: str, encoder: str = "resnet18", depth: int = 3, **options: Any) -> Network:
    """Return a network with the first stages of an encoder, and a narrow decoder."""
    widths = (64, 32, 16, 8)[:depth]
    return _smp(name, encoder, encoder_depth=depth, decoder_channels=widths, **options)


def _monai(name: str, shapes: tuple[Shape, ...], **options: Any) -> Network:
    return Network(partial(_call, f"monai.networks.nets:{name}", **options), shapes)


def _pytorchcv(name: str, side: int = 64, **options: Any) -> Network:
    build = partial(_call, "pytorchcv.model_provider:get_model", name, pretrained=False, **options)
    return Network(build, ((3, side, side),))


def _pytorchcv_resnet(kind: str, **more: Any) -> nn.Module:
    """Return a narrow classifier of pytorchcv of two blocks per stage, `module:class`."""
    channels = [[16, 16], [32, 32], [64, 64], [96, 96]]
    options = {"channels": channels, "init_block_channels": 16, "bottleneck": False, **more}
    return _call(f"pytorchcv.models.{kind}", **options)


def _pytorchcv_backbone() -> nn.Module:
    """Return the layers of a narrow ResNet before the last pooling; 96 channels come out."""
    features = _pytorchcv_resnet("resnet:ResNet", conv1_stride=True).features
    assert isinstance(features, nn.Sequential)
    return features[:-1]


def _hugging_face(
    name: str, head: str, shapes: tuple[Shape, ...] = IMAGE, **options: Any
) -> Network:
    def build() -> nn.Module:
        config = _call(f"transformers:{name}Config", **options)
        return _call(f"transformers:{name}{head}", config)

    return Network(build, shapes)


def _spandrel(path: str, shapes: tuple[Shape, ...] = IMAGE, **options: Any) -> Network:
    return Network(partial(_call, f"spandrel.architectures.{path}", **options), shapes)


def _braindecode(name: str, times: int = 500, **options: Any) -> Network:
    options = {"n_chans": 8, "n_outputs": 4, "n_times": times, "sfreq": 100, **options}
    return Network(partial(_call, f"braindecode.models:{name}", **options), ((8, times),))


def _seisbench(name: str, samples: int, channels: int = 3, **options: Any) -> Network:
    return Network(partial(_call, f"seisbench.models:{name}", **options), ((channels, samples),))


def _video(name: str, frames: int = 8, side: int = 64) -> Network:
    build = partial(_call, f"torchvision.models.video:{name}", weights=None, num_classes=10)
    return Network(build, ((3, frames, side, side),))


def _video_resnet(name: str) -> Network:
    """Return the first two stages of a network with a classifier."""
    whole = _video(name, frames=4, side=32)

    def build() -> nn.Module:
        model = whole.build()
        model.layer3, model.layer4 = nn.Identity(), nn.Identity()
        model.fc = nn.Linear(128, 10)
        return model

    return Network(build, whole.shapes)


def _lama() -> nn.Module:
    """Return LaMa with an eighth of its width, and two of its 18 blocks."""
    model = _call("spandrel.architectures.LaMa:LaMa", in_nc=4)
    path = "spandrel.architectures.LaMa.__arch.LaMa:FFCResNetGenerator"
    model.model = _call(path, 4, 3, ngf=8, n_blocks=2)
    return model


SMP: dict[str, Network] = {
    "Unet/resnet18": _smp_unet("Unet"),
    "Unet/mobilenet_v2": _smp_unet("Unet", "mobilenet_v2", 4),
    "Unet/densenet121": _smp_unet("Unet", "densenet121"),
    "Unet/vgg11_bn": _smp_unet("Unet", "vgg11_bn"),
    "Unet/tu-regnetx_002": _smp_unet("Unet", "tu-regnetx_002", 4),
    "Unet/resnet18, scSE, class head": _smp_unet(
        "Unet", decoder_attention_type="scse", aux_params={"classes": 3}
    ),
    "UnetPlusPlus/mobilenet_v2": _smp_unet("UnetPlusPlus", "mobilenet_v2", 4),
    "MAnet/resnet18": _smp_unet("MAnet"),
    "Linknet/resnet18": _smp("Linknet", encoder_depth=3),
    "FPN/efficientnet-b0": _smp("FPN", "efficientnet-b0"),
    "PSPNet/resnet18": _smp("PSPNet", psp_out_channels=64),
    "PAN/mobilenet_v2": _smp("PAN", "mobilenet_v2", 128, encoder_depth=4),
    "DeepLabV3/resnet18": _smp("DeepLabV3", encoder_depth=3, decoder_channels=64),
    "DeepLabV3Plus/mobilenet_v2": _smp("DeepLabV3Plus", "mobilenet_v2"),
    "Segformer/mit_b0": _smp("Segformer", "mit_b0"),
}

MONAI: dict[str, Network] = {
    "UNet, 2-D": _monai(
        "UNet",
        GREY,
        spatial_dims=2,
        in_channels=1,
        out_channels=3,
        channels=(16, 32, 64),
        strides=(2, 2),
    ),
    "UNet with residual units, 3-D": _monai(
        "UNet",
        VOLUME,
        spatial_dims=3,
        in_channels=1,
        out_channels=3,
        channels=(8, 16, 32),
        strides=(2, 2),
        num_res_units=2,
    ),
    "BasicUNet, 3-D": _monai("BasicUNet", VOLUME, spatial_dims=3, features=(8, 8, 16, 32, 64, 8)),
    "BasicUNetPlusPlus, 2-D": _monai(
        "BasicUNetPlusPlus", GREY, spatial_dims=2, features=(8, 8, 16, 32, 64, 8)
    ),
    "AttentionUnet, 2-D": _monai(
        "AttentionUnet",
        GREY,
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(16, 32, 64),
        strides=(2, 2),
    ),
    "SegResNet, 3-D": _monai("SegResNet", VOLUME, spatial_dims=3, init_filters=8),
    "SegResNetDS, 3-D": _monai("SegResNetDS", VOLUME, spatial_dims=3, init_filters=8, dsdepth=2),
    "DynUNet, 3-D": _monai(
        "DynUNet",
        VOLUME,
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(8, 16, 32),
        res_block=True,
    ),
    "HighResNet, 3-D": _monai(
        "HighResNet", ((1, 16, 16, 16),), spatial_dims=3, in_channels=1, out_channels=2
    ),
    "DenseNet, 3-D": _monai(
        "DenseNet",
        VOLUME,
        spatial_dims=3,
        in_channels=1,
        out_channels=4,
        init_features=16,
        growth_rate=8,
        block_config=(2, 4, 4),
    ),
    "ResNet, 3-D": _monai(
        "ResNet",
        VOLUME,
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[8, 16, 32, 64],
        n_input_channels=1,
        num_classes=4,
    ),
    "EfficientNetBN, 2-D": _monai(
        "EfficientNetBN", IMAGE, model_name="efficientnet-b0", pretrained=False, num_classes=10
    ),
    "FlexibleUNet, 2-D": _monai(
        "FlexibleUNet",
        IMAGE,
        in_channels=3,
        out_channels=2,
        backbone="efficientnet-b0",
        decoder_channels=(64, 32, 16, 8, 8),
    ),
    "AutoEncoder, 2-D": _monai(
        "AutoEncoder",
        GREY,
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(16, 32, 64),
        strides=(2, 2, 2),
        inter_channels=[64, 64],
        inter_dilations=[1, 2],
    ),
    "RegUNet, 3-D": _monai(
        "RegUNet", VOLUME, spatial_dims=3, in_channels=1, num_channel_initial=8, depth=2
    ),
    "Quicknat, 2-D": _monai(
        "Quicknat", GREY, num_classes=4, num_channels=1, num_filters=16, se_block=None
    ),
    "MedNeXt, 3-D": _monai(
        "MedNeXt",
        VOLUME,
        spatial_dims=3,
        init_filters=8,
        kernel_size=3,
        blocks_down=(1, 1, 1, 1),
        blocks_bottleneck=1,
        blocks_up=(1, 1, 1, 1),
    ),
    "Regressor, 2-D": _monai(
        "Regressor",
        GREY,
        in_shape=(1, 64, 64),
        out_shape=(2,),
        channels=(8, 16, 32),
        strides=(2, 2, 2),
    ),
    "VarAutoEncoder, 2-D": _monai(
        "VarAutoEncoder",
        GREY,
        spatial_dims=2,
        in_shape=(1, 64, 64),
        out_channels=1,
        latent_size=8,
        channels=(8, 16, 32),
        strides=(2, 2, 2),
        use_mean_at_inference=True,
    ),
    "UNETR, 3-D": _monai(
        "UNETR",
        VOLUME,
        in_channels=1,
        out_channels=2,
        img_size=32,
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    ),
}

PYTORCHCV: dict[str, Network] = {
    **{
        f"{name}_cifar10": _pytorchcv(f"{name}_cifar10", 32)
        for name in (
            "nin",
            "resnet20",
            "preresnet20",
            "seresnet20",
            "diaresnet20",
            "densenet40_k12",
            "xdensenet40_2_k24_bc",
            "rir",
            "resdropresnet20",
            "shakedropresnet20",
            "shakeshakeresnet20_2x16d",
        )
    },
    **{
        f"{name}_cityscapes": _pytorchcv(f"{name}_cityscapes", in_size=(64, 64))
        for name in ("cgnet", "dabnet", "edanet", "enet", "erfnet", "fpenet", "lednet")
    },
    "sinet_cityscapes": _pytorchcv("sinet_cityscapes", 128, in_size=(128, 128)),
    "linknet, narrow": Network(
        lambda: _call(
            "pytorchcv.models.linknet:LinkNet",
            _pytorchcv_backbone(),
            backbone_out_channels=96,
            channels=[64, 32, 16, 16],
            strides=[2, 2, 2, 1],
            output_paddings=[1, 1, 1, 0],
            in_size=(64, 64),
        ),
        IMAGE,
    ),
    "cbam_resnet, narrow": Network(
        partial(_pytorchcv_resnet, "cbamresnet:CbamResNet"), ((3, 224, 224),)
    ),
    "espnetv2_wd2": _pytorchcv("espnetv2_wd2", 224),
    "menet108_8x1_g3": _pytorchcv("menet108_8x1_g3", 224),
    "octresnet10_ad2": _pytorchcv("octresnet10_ad2", 224),
    "shufflenet_g3_w1": _pytorchcv("shufflenet_g3_w1", 224),
    "squeezeresnet_v1_1": _pytorchcv("squeezeresnet_v1_1", 224),
    "lwopenpose2d_mobilenet_cmupan_coco": _pytorchcv("lwopenpose2d_mobilenet_cmupan_coco"),
    "simplepose, narrow": Network(
        lambda: _call(
            "pytorchcv.models.simplepose_coco:SimplePose",
            _pytorchcv_backbone(),
            backbone_out_channels=96,
            channels=[64, 64, 64],
            in_size=(64, 64),
        ),
        IMAGE,
    ),
}

TRANSFORMERS: dict[str, Network] = {
    "ResNet": _hugging_face(
        "ResNet",
        "ForImageClassification",
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 2, 1],
        num_labels=10,
    ),
    "RegNet": _hugging_face(
        "RegNet",
        "ForImageClassification",
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 2, 1],
        groups_width=8,
        num_labels=10,
    ),
    "ConvNext": _hugging_face(
        "ConvNext",
        "ForImageClassification",
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        num_labels=10,
    ),
    "ConvNextV2": _hugging_face(
        "ConvNextV2",
        "ForImageClassification",
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        num_labels=10,
    ),
    "MobileNetV1": _hugging_face(
        "MobileNetV1", "ForImageClassification", depth_multiplier=0.5, num_labels=10
    ),
    "MobileNetV2": _hugging_face(
        "MobileNetV2", "ForImageClassification", depth_multiplier=0.5, num_labels=10
    ),
    "MobileNetV2, segmentation": _hugging_face(
        "MobileNetV2", "ForSemanticSegmentation", depth_multiplier=0.5, num_labels=5
    ),
    "EfficientNet": _hugging_face(
        "EfficientNet",
        "ForImageClassification",
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
        initializer_range=0.2,  # by default the signal fades to nothing
        num_labels=10,
    ),
    "BiT": _hugging_face(
        "Bit",
        "ForImageClassification",
        embedding_size=16,
        hidden_sizes=[64, 64, 128, 128],
        depths=[1, 1, 2, 1],
        num_groups=8,
        num_labels=10,
    ),
    "PoolFormer": _hugging_face(
        "PoolFormer",
        "ForImageClassification",
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_labels=10,
    ),
    "FocalNet": _hugging_face(
        "FocalNet",
        "ForImageClassification",
        image_size=64,
        embed_dim=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_labels=10,
    ),
    "MobileViT": _hugging_face(
        "MobileViT",
        "ForImageClassification",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 128],
        num_labels=10,
    ),
    "SegFormer": _hugging_face(
        "Segformer",
        "ForSemanticSegmentation",
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=5,
    ),
    "UperNet": Network(
        lambda: _call(
            "transformers:UperNetForSemanticSegmentation",
            _call(
                "transformers:UperNetConfig",
                backbone_config=_call(
                    "transformers:ConvNextConfig",
                    hidden_sizes=[16, 32, 48, 64],
                    depths=[1, 1, 1, 1],
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                ),
                hidden_size=32,
                auxiliary_channels=32,
                auxiliary_in_channels=48,
                num_labels=5,
            ),
        ),
        IMAGE,
    ),
    "DETR": Network(
        lambda: _call(
            "transformers:DetrForObjectDetection",
            _call(
                "transformers:DetrConfig",
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=_call(
                    "transformers:ResNetConfig",
                    embedding_size=16,
                    hidden_sizes=[32, 48, 64, 96],
                    depths=[1, 1, 2, 1],
                    out_features=["stage4"],
                ),
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                num_queries=10,
                num_labels=5,
            ),
        ),
        ((3, 128, 128),),
    ),
    "RT-DETR's ResNet": _hugging_face(
        "RTDetrResNet",
        "Backbone",
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 2, 1],
        out_features=["stage2", "stage3", "stage4"],
    ),
    "Swin2SR": _hugging_face(
        "Swin2SR",
        "ForImageSuperResolution",
        image_size=32,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
}

RESTORATION: dict[str, Network] = {
    "EDSR": Network(definitions.EDSR, ((3, 32, 32),)),
    "SRResNet": Network(definitions.SRResNet, ((3, 24, 24),)),
    "ESPCN": Network(definitions.ESPCN, ((1, 32, 32),)),
    "DnCNN (spandrel)": _spandrel("DnCNN:DnCNN", GREY, nc=32, nb=8),
    "RCAN (spandrel)": _spandrel(
        "RCAN:RCAN", ((3, 32, 32),), scale=2, n_resgroups=2, n_resblocks=3, n_feats=32
    ),
    "ESRGAN (spandrel)": _spandrel(
        "ESRGAN.__arch.RRDB:RRDBNet", ((3, 24, 24),), num_filters=32, num_blocks=2
    ),
    "Compact (spandrel)": _spandrel(
        "Compact.__arch.SRVGG:SRVGGNetCompact", ((3, 32, 32),), num_feat=32, num_conv=8
    ),
    "NAFNet (spandrel)": _spandrel(
        "NAFNet:NAFNet", width=16, middle_blk_num=2, enc_blk_nums=[1, 1, 2], dec_blk_nums=[1, 1, 1]
    ),
    "DRUNet (spandrel)": _spandrel(
        "DRUNet:DRUNet", ((4, 64, 64),), in_nc=4, nc=[16, 32, 48, 64], nb=1
    ),
    "SPAN (spandrel)": _spandrel(
        "SPAN:SPAN", ((3, 32, 32),), num_in_ch=3, num_out_ch=3, feature_channels=24, upscale=2
    ),
    "PLKSR (spandrel)": _spandrel("PLKSR:PLKSR", ((3, 32, 32),), dim=32, n_blocks=3),
    "FBCNN (spandrel)": _spandrel("FBCNN:FBCNN", nc=[16, 32, 48, 512], nb=1),
    "SAFMN (spandrel)": _spandrel("SAFMN:SAFMN", dim=32, n_blocks=3),
    "RealCUGAN (spandrel)": _spandrel("RealCUGAN:UpCunet2x"),
    "KBNet (spandrel)": _spandrel(
        "KBNet:KBNet_s", width=16, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]
    ),
    "MoSR (spandrel)": _spandrel("MoSR:MoSR", ((3, 32, 32),), dim=32, n_block=3),
}

SIGNALS: dict[str, Network] = {
    "M5": Network(definitions.M5, ((1, 8000),)),
    "TC-ResNet8": Network(definitions.TCResNet8, ((40, 101),)),
    "BC-ResNet": Network(definitions.BCResNet, ((1, 40, 101),)),
    "ResNet-1D": Network(definitions.ResNet1D, ((1, 512),)),
    "WaveNet": Network(definitions.WaveNet, ((1, 512),)),
    "EEGNet (braindecode)": _braindecode("EEGNet"),
    "ShallowFBCSPNet (braindecode)": _braindecode("ShallowFBCSPNet"),
    "Deep4Net (braindecode)": _braindecode("Deep4Net", 600),
    "BDTCN (braindecode)": _braindecode("BDTCN"),
    "EEGInceptionERP (braindecode)": _braindecode("EEGInceptionERP"),
    "EEGNeX (braindecode)": _braindecode("EEGNeX"),
    "ATCNet (braindecode)": _braindecode("ATCNet", 1000),
    "SleepStagerChambon2018 (braindecode)": _braindecode("SleepStagerChambon2018", 1000),
    "USleep (braindecode)": _braindecode("USleep", 3000, depth=4),
    "PhaseNet (seisbench)": _seisbench("PhaseNet", 3001),
    "GPD (seisbench)": _seisbench("GPD", 400),
    "BasicPhaseAE (seisbench)": _seisbench("BasicPhaseAE", 600),
    "EQTransformer (seisbench)": replace(  # three outputs, all of which count
        _seisbench("EQTransformer", 1024, in_samples=1024), task="regression"
    ),
    "CRED (seisbench)": Network(
        partial(_call, "seisbench.models:CRED", in_samples=3000), ((3, 151, 41),)
    ),
    "DeepDenoiser (seisbench)": Network(
        partial(_call, "seisbench.models:DeepDenoiser"), ((2, 31, 201),)
    ),
}

VIDEO: dict[str, Network] = {
    "r3d_18, two stages": _video_resnet("r3d_18"),
    "mc3_18, two stages": _video_resnet("mc3_18"),
    "r2plus1d_18, two stages": _video_resnet("r2plus1d_18"),
    "s3d": _video("s3d", 14, 224),
}

PAIRS: dict[str, Network] = {
    "Siamese": Network(definitions.Siamese, 2 * IMAGE, task="regression"),
    "FlowNetC": Network(definitions.FlowNetC, 2 * IMAGE),
    "FC-Siam-diff": Network(definitions.FCSiamDiff, 2 * IMAGE),
    "ImageAndVector": Network(definitions.ImageAndVector, (*IMAGE, (10,))),
    "change detection (smp Unet/resnet18)": Network(
        lambda: definitions.ChangeUnet(SMP["Unet/resnet18"].build()), 2 * IMAGE
    ),
    "VoxelMorph (monai)": _monai(
        "VoxelMorph",
        2 * VOLUME,
        backbone=None,
        integration_steps=2,
    ),
    "DiffusionModelUNet (monai)": _monai(
        "DiffusionModelUNet",
        ((1, 32, 32), ()),
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(16, 32),
        attention_levels=(False, False),
        num_res_blocks=1,
        norm_num_groups=8,
    ),
    "LaMa (spandrel)": Network(_lama, (*IMAGE, *GREY)),
    "raft_small (torchvision)": Network(
        partial(_call, "torchvision.models.optical_flow:raft_small", weights=None),
        2 * ((3, 128, 128),),
    ),
}

PARTS: dict[str, dict[str, Network]] = {
    "smp": SMP,
    "monai": MONAI,
    "pytorchcv": PYTORCHCV,
    "transformers": TRANSFORMERS,
    "restoration": RESTORATION,
    "signals": SIGNALS,
    "video": VIDEO,
    "several inputs": PAIRS,
}

TITLES = {
    "smp": "segmentation_models_pytorch",
    "monai": "MONAI",
    "pytorchcv": "pytorchcv",
    "transformers": "transformers",
    "restoration": "Restoration and super-resolution",
    "signals": "Signals, 1-D",
    "video": "Video networks of torchvision",
    "several inputs": "Several inputs",
}
"""What each part is called on the page."""

LICENCES = {
    "segmentation-models-pytorch": "MIT",
    "monai": "Apache-2.0",
    "pytorchcv": "MIT",
    "transformers": "Apache-2.0",
    "spandrel": "MIT",
    "braindecode": "BSD-3-Clause",
    "seisbench": "GPL-3.0",
}
"""Packages that networks are from, beside torchvision and timm, and their licences."""


def packages_of(part: str, name: str) -> tuple[str, ...]:
    """Return the packages that a network is from; their versions count."""
    if part == "smp":
        return ("segmentation-models-pytorch", "timm")
    if part in LICENCES:
        return (part,)
    named = name.partition("(")[2].partition(")")[0].partition(" ")[0]
    package = {"smp": "segmentation-models-pytorch"}.get(named, named)
    return (package,) if package in LICENCES else ()
