"""Image–text models in a folder: CLIP, SigLIP and their kin, of transformers or open_clip.

A model of transformers is a folder as `save_pretrained` writes it: `config.json`,
`model.safetensors`, `preprocessor_config.json` and the tokenizer's files. A model of open_clip is a
folder as its Hub repositories hold it: `open_clip_config.json` and `open_clip_model.safetensors`
(or another file of weights); its tokenizer comes with the package. A folder with both is read by
transformers.

Nothing is downloaded, no code in the folder is run, and weights are read as tensors alone: from
safetensors, or by open_clip with `weights_only`. Both packages are optional (extra `naming`).
transformers is under the Apache License 2.0, open_clip under the MIT License.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms import v2

from secateur.integrations.transformers import without_progress_bars
from secateur.runtime.device import CPU
from secateur.runtime.errors import UsageError, WeightsError
from secateur.runtime.input_limits import SMALL_TEXT, read_bounded
from secateur.runtime.local_path import check_local

CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
METHODS = ("get_image_features", "get_text_features")
"""What transformers calls the embeddings of a model that has both."""
FIXED_LENGTH = "siglip"
"""Start of the type of models that were trained on texts padded to one length (Zhai et al., ICCV
2023): SigLIP and SigLIP 2."""


@runtime_checkable
class ImageTextModel(Protocol):
    """Embeds images and texts such that the cosine says how well they fit."""

    def embed_images(
        self, images: Sequence[UInt8[Tensor, "rgb _ _"]]
    ) -> Float[Tensor, "image value"]:
        """Return the embedding of each image, of any size, with length 1, on the CPU."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "text value"]:
        """Return the embedding of each text, with length 1, on the CPU."""


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A model of either package, as two functions that return its own embeddings."""

    images: Callable[[Sequence[Tensor]], Tensor]
    texts: Callable[[list[str]], Tensor]

    def embed_images(
        self, images: Sequence[UInt8[Tensor, "rgb _ _"]]
    ) -> Float[Tensor, "image value"]:
        """See `ImageTextModel.embed_images`."""
        with torch.inference_mode():
            return F.normalize(self.images(images).float(), dim=1).cpu().clone()

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "text value"]:
        """See `ImageTextModel.embed_texts`."""
        with torch.inference_mode():
            return F.normalize(self.texts(list(texts)).float(), dim=1).cpu().clone()


def load_image_text_model(folder: str | Path, device: torch.device = CPU) -> ImageTextModel:
    """Return the image–text model in a folder, in float32 and evaluation mode.

    Images go through the model's own preprocessing. Raises `UsageError` if the folder holds no
    such model, would need code or files from elsewhere, or the package is not installed, and
    `WeightsError` if its files can't be read.
    """
    check_image_text_model(folder)
    folder = Path(folder).expanduser()
    load = _load_transformers if (folder / CONFIG).is_file() else _load_open_clip
    return load(folder, device)


def check_image_text_model(folder: str | Path) -> None:
    """Raise `UsageError` if a folder holds no image–text model or its package is not installed.

    The model is not loaded.
    """
    check_local(folder)
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: name a folder with an image–text model")
    packages = {CONFIG: "transformers", OPEN_CLIP_CONFIG: "open_clip"}
    package = next((name for file, name in packages.items() if (folder / file).is_file()), None)
    if package is None:
        raise UsageError(
            f"{folder} holds neither {CONFIG} (of transformers) nor {OPEN_CLIP_CONFIG} (of "
            "open_clip): name the folder of a CLIP or SigLIP"
        )
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"the image–text model in {folder} needs {package}: pip install 'secateur[naming]'"
        )


def _load_transformers(folder: Path, device: torch.device) -> ImageTextModel:
    import transformers

    if not any(folder.glob("model*.safetensors")):
        raise WeightsError(f"no model.safetensors in {folder}: save_pretrained writes it")
    local = {"local_files_only": True, "trust_remote_code": False}

    def read(kind: Any, part: str, **options: Any) -> Any:
        try:
            with without_progress_bars():
                return kind.from_pretrained(folder, **local, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise WeightsError(
                f"the {part} in {folder} can't be loaded: {_first_line(error)}"
            ) from error

    config = read(transformers.AutoConfig, "configuration")
    kind = getattr(transformers, (config.architectures or ["no class"])[0], None)
    if not all(hasattr(kind, method) for method in METHODS):
        raise UsageError(
            f"{folder / CONFIG} names {(config.architectures or ['no class'])[0]}, which does not "
            "embed both images and texts: name the folder of a CLIP or SigLIP"
        )
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = read(kind, "model", **options)
    if info["missing_keys"]:
        raise WeightsError(
            f"the weights in {folder} lack {len(info['missing_keys'])} tensors of the model, such "
            f"as {sorted(info['missing_keys'])[0]}"
        )
    model = model.eval().to(device)
    processor = read(transformers.AutoImageProcessor, "image processor")
    tokenizer = read(transformers.AutoTokenizer, "tokenizer")
    positions = getattr(config.text_config, "max_position_embeddings", tokenizer.model_max_length)
    length = min(positions, tokenizer.model_max_length)
    padding = "max_length" if config.model_type.startswith(FIXED_LENGTH) else "longest"

    def images(batch: Sequence[Tensor]) -> Tensor:
        inputs = processor(images=list(batch), return_tensors="pt").to(device)
        return _embedding(model.get_image_features(**inputs))

    def texts(batch: list[str]) -> Tensor:
        inputs = tokenizer(
            batch, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        return _embedding(model.get_text_features(**inputs.to(device)))

    return _Loaded(images, texts)


def _embedding(features: Any) -> Tensor:
    """Return what `get_image_features` found: since transformers 5 it is a part of an output."""
    embedding: Tensor = getattr(features, "pooler_output", features)
    return embedding


def _load_open_clip(folder: Path, device: torch.device) -> ImageTextModel:
    _check_open_clip_config(folder / OPEN_CLIP_CONFIG)
    import open_clip

    name = f"local-dir:{folder}"
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # it raises what it meets: KeyError, RuntimeError, pickle's own, …
        raise WeightsError(
            f"the model in {folder} can't be loaded: {_first_line(error)}"
        ) from error
    model.eval()

    def images(batch: Sequence[Tensor]) -> Tensor:
        pictures = [preprocess(v2.functional.to_pil_image(pixels)) for pixels in batch]
        embedding: Tensor = model.encode_image(torch.stack(pictures).to(device))
        return embedding

    def texts(batch: list[str]) -> Tensor:
        embedding: Tensor = model.encode_text(tokenizer(batch).to(device))
        return embedding

    return _Loaded(images, texts)


def _check_open_clip_config(path: Path) -> None:
    """Raise `UsageError` if open_clip would look up parts of the model elsewhere, or run code."""
    try:
        config = json.loads(read_bounded(path, SMALL_TEXT, UsageError))
        model = config["model_cfg"]
        text, vision = model.get("text_cfg", {}), model.get("vision_cfg", {})
        elsewhere = [
            text.get("hf_model_name"),
            *(name for name in [vision.get("timm_model_name")] if name and ":" in name),
        ]
        tokenizer_options = text.get("tokenizer_kwargs", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no configuration of open_clip: {_first_line(error)}"
        ) from error
    for name in filter(None, elsewhere):
        raise UsageError(
            f"{path} takes a part of the model from elsewhere, {name}, and nothing is downloaded: "
            "save the whole model with save_pretrained of transformers"
        )
    if tokenizer_options.get("trust_remote_code"):
        raise UsageError(f"{path} asks for trust_remote_code, and no code in a folder is run")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
