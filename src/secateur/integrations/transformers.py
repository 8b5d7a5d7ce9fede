"""Networks of transformers in a folder: `transformers:DIR`, as `save_pretrained` writes it.

The folder holds `config.json` and, as a rule, `model.safetensors`. No code in it is run, and
nothing is downloaded. The package is under the Apache License 2.0.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from secateur.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from secateur.graph.widths import Widths
from secateur.runtime.errors import UsageError, WeightsError
from secateur.runtime.local_path import check_local

WEIGHTS = "model.safetensors"
IMAGE_SIZE = 224
WARPED_SIZE = 384
"""From this side on, ConvNext's images are stretched to the input, not cropped."""


def build(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return the network in a folder, in evaluation mode, with the folder's weights if it has any.

    `num_classes` is that of a network without weights. Raises `UsageError` if the folder holds no
    network or the package is not installed, and `WeightsError` if the weights can't be read.
    """
    check_local(name)
    folder, library = Path(name).expanduser(), _library()
    if not (folder / "config.json").is_file():
        raise UsageError(f"no {folder / 'config.json'}: name a folder that save_pretrained wrote")
    config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or ["no class"]
    kind = getattr(library, names[0], None)
    if kind is None:
        raise UsageError(f"{folder / 'config.json'} names {names[0]}, which transformers lacks")
    if not (folder / WEIGHTS).is_file():
        if num_classes is not None:
            config.num_labels = num_classes
        model: nn.Module = kind(config)
        return model.eval()
    try:
        with without_progress_bars():
            model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{folder / WEIGHTS} can't be loaded: {reason}") from error
    return model.eval()


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Show none of transformers' own progress bars in the block."""
    logging = _library().utils.logging
    was_enabled = logging.is_progress_bar_enabled()
    if was_enabled:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def has_weights(name: str) -> bool:
    """Return whether the folder holds the network's weights."""
    return (Path(name).expanduser() / WEIGHTS).is_file()


def preprocessing(name: str) -> Preprocessing:
    """Return how the folder's `preprocessor_config.json` says that images are read."""
    path = Path(name).expanduser() / "preprocessor_config.json"
    settings: dict[str, Any] = {}
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is no JSON: {error}") from error
    is_flipped = bool(settings.get("do_flip_channel_order"))
    is_normalised = settings.get("do_normalize", not is_flipped)
    is_cropped, percentage = bool(settings.get("do_center_crop")), settings.get("crop_pct")
    shorter = _side(settings.get("size") or IMAGE_SIZE)
    side = _side(settings.get("crop_size") or shorter) if is_cropped else shorter
    if percentage and (is_cropped or side < WARPED_SIZE):
        shorter, is_cropped = int(shorter / percentage), True
    mean, std = settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std")
    power = 2 if settings.get("include_top") else 1  # EfficientNet's are divided a second time
    return Preprocessing(
        side,
        shorter,
        tuple(mean) if is_normalised else (0.0, 0.0, 0.0),
        tuple(s**power for s in std or IMAGENET_STD) if is_normalised else (1.0, 1.0, 1.0),
        "bicubic" if settings.get("resample") == 3 else "bilinear",  # Pillow's number
        fit="crop" if is_cropped or not settings else "stretch",
        channel_order="bgr" if is_flipped else "rgb",
    )


def _side(size: Any) -> int:
    """Return the shorter side in a size, which may be a number or a table."""
    if isinstance(size, dict):
        sides = [size[key] for key in ("shortest_edge", "height", "width") if key in size]
        return int(min(sides, default=IMAGE_SIZE))
    return int(size)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "transformers: networks need the extra: pip install 'secateur[transformers]'"
        ) from error
    return transformers


def update_widths(path: str, model: Any, smaller: Any, widths: Widths) -> None:
    """Set the widths in a network's configuration and of a backbone, at `path` in a cut network."""
    config = vars(model).get("config")
    sizes, embedded = getattr(config, "hidden_sizes", None), getattr(config, "embedding_size", None)
    if not isinstance(sizes, list | tuple):
        return
    start = f"{path}." if path else ""
    names = [name for name, _ in model.named_modules()]

    def width(ending: str, before: int) -> int:
        places = [f"{start}{name}" for name in names if f".{name}".endswith(f".{ending}")]
        after = (widths.of_output(place, before) for place in places)
        return next((size for size in after if size is not None), before)

    stages = [width(f"encoder.stages.{number}", size) for number, size in enumerate(sizes)]
    smaller.config.hidden_sizes = type(sizes)(stages)
    if isinstance(embedded, int):
        smaller.config.embedding_size = width("embedder", embedded)
        if vars(model).get("num_features") == [embedded, *sizes]:  # of a backbone
            smaller.num_features = [smaller.config.embedding_size, *stages]
