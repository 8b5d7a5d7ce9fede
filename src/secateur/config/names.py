"""Names that configurations take: criteria, concept sources, data sets, metrics, networks."""

from __future__ import annotations

CRITERIA = (
    *("vote", "vote-response", "vote-iou", "random", "l1", "l2", "fpgm", "bn_scale", "apoz"),
    *("activation_mean", "activation_std", "activation_entropy", "hrank", "chip"),
    *("reconstruction", "taylor"),
)
"""Names of the built-in criteria."""
CONCEPT_SOURCES = (
    *("evidence", "outputs", "saliency", "factors", "colours"),
    *("masks", "broden", "parts", "boxes"),
)
"""Names of the concept sources; the last four bring images of their own."""
DATA_READERS = (
    *("cifar10", "cifar100", "cub", "fashion-mnist", "folder", "imagenet", "imagenette"),
    *("segmentation", "images"),
)
"""Kinds of data sets that are read from a folder."""
DATA_FORMS = (
    *(f"{kind}:DIR" for kind in DATA_READERS),
    *("coco:DIR_OR_JSON", "yolo:DIR_OR_YAML", "arrays:DIR_OR_FILE", "hf:NAME_OR_PATH", "digits"),
    "synthetic",
)
"""How data sets are named."""
METRICS = (
    *("top-1", "top-5", "mAP", "mIoU", "pixel accuracy", "box AP", "mask AP", "keypoint AP"),
    *("PSNR", "SSIM", "R2"),
)
"""Names of the metrics; `PSNR:255` and `SSIM:255` are those of values up to 255."""
ENGINE_TITLES = {
    "pytorch": "PyTorch",
    "compile": "torch.compile",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
}
"""Names of the engines that latency is measured in, as people write them."""
LIBRARY_NETWORKS = (
    *("timm:NAME", "ultralytics:yolo11n.yaml", "smp:Unet/resnet34", "transformers:DIR"),
    "yolox:yolox_nano",
)
"""How networks of other libraries are named."""
BUILT_IN_NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg16_bn")
"""Networks for 32×32 images that come with secateur."""
