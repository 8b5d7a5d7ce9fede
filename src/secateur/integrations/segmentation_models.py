"""Networks of segmentation_models_pytorch: `smp:ARCHITECTURE/ENCODER`, such as `smp:Unet/resnet34`.

The package and its published weights are under the MIT License.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.data.preprocessing import Preprocessing
from secateur.graph.module_state import evaluating
from secateur.graph.widths import Widths
from secateur.runtime.errors import UnknownName, UsageError

IMAGE_SIZE = 256
"""Side of the images by default; the networks take any multiple of 32."""


def build(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return the named network with random weights, in evaluation mode.

    Raises `UnknownName`, or `UsageError` if the package is not installed or can't build it.
    """
    architecture, encoder = _split(name)
    library = _library()
    if num_classes is None:
        raise UsageError(f"smp:{name} needs the number of classes: --num-classes")
    try:
        model: nn.Module = library.create_model(
            architecture, encoder_name=encoder, encoder_weights=None, classes=num_classes
        )
    except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"smp:{name}: the package can't build it: {reason}") from error
    return model.eval()


def preprocessing(name: str) -> Preprocessing:
    """Return how most encoders' published weights take images: as on ImageNet.

    The library's own `get_preprocessing_params` downloads what it says, and nothing is downloaded
    here: set `data.mean` and `data.std` where an encoder differs (`inceptionv4`, `xception`).
    """
    _split(name)
    return Preprocessing(IMAGE_SIZE, IMAGE_SIZE, fit="stretch")


def _split(name: str) -> tuple[str, str]:
    """Return architecture and encoder in a name; raise `UnknownName` or `UsageError`."""
    architecture, slash, encoder = name.partition("/")
    library = _library()
    members = ((known, getattr(library, known)) for known in dir(library))
    known = [one for one, kind in members if isinstance(kind, type) and issubclass(kind, nn.Module)]
    if architecture.lower() not in map(str.lower, known):
        raise UnknownName("architecture of segmentation_models_pytorch", architecture, known)
    if not slash:
        raise UsageError(f"smp:{name}: name the encoder, too: smp:{name}/resnet34")
    encoders = library.encoders.get_encoder_names()
    if encoder not in encoders and not encoder.startswith(("tu-", "timm-")):
        raise UnknownName("encoder of segmentation_models_pytorch", encoder, encoders)
    return architecture, encoder


def _library() -> Any:
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise UsageError("smp: networks need the extra: pip install 'secateur[smp]'") from error
    return segmentation_models_pytorch


def update_widths(path: str, model: Any, smaller: Any, widths: Widths) -> None:
    """Set `out_channels` of an encoder in a cut network to what it returns for an image."""
    values = vars(smaller)
    if not isinstance(values.get("_out_channels"), list | tuple):
        return
    parameter = next(smaller.parameters())
    image = parameter.new_zeros(1, values["_in_channels"], *widths.image_size)
    with evaluating(smaller), torch.no_grad():
        features = smaller(image)
    channels = (feature.shape[1] for feature in features)
    values["_out_channels"] = type(values["_out_channels"])(channels)
