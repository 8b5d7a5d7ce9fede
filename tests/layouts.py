"""Published data sets in miniature, in their real file formats, and a short run on one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from secateur.config import RunConfig, from_dict
from secateur.experiments.run import run
from secateur.pipeline.result import RunResult

Pixels = npt.NDArray[np.uint8]


def random_pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, pixels: Pixels) -> None:
    """`[height, width, rgb]` or `[height, width]`, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def tiff_of(bands: int) -> bytes:
    """A TIFF of 8×8 pixels with so many bands of 8 bits."""
    sizes = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: bands, 278: 8, 279: 64 * bands}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sizes.items())
    start = struct.pack("<4sI", b"II*\0", 8 + 64 * bands)
    return start + bytes(64 * bands) + struct.pack("<H", len(sizes)) + tags + bytes(4)


def write_classes(directory: Path, names: list[str], count: int, *, seed: int = 0) -> None:
    """So many JPEGs of 18×16 in the folder of each class."""
    pixels = random_pixels(len(names), count, 16, 18, 3, seed=seed)
    for name, images in zip(names, pixels, strict=True):
        for number, image in enumerate(images):
            write_image(directory / name / f"{name}_{number}.JPEG", image)


def prune_briefly(model_file: Path, source: str, folder: Path, **data: object) -> RunResult:
    """The whole method without fine-tuning, on images of 16×16, by a small network."""
    return run(
        from_dict(
            {
                "model": {"name": f"{model_file}:small", "allow_untrained": True},
                "data": {"source": source, "image_size": 16, "calibration_images": 60, **data},
                "plan": {"target": "macs=0.7"},
                "finetune": {"epochs": 0},
                "report": {"images": 0},
            },
            RunConfig,
        ),
        folder,
    )
