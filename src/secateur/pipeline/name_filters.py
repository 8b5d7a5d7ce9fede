"""Compare the calibration images with the words of a vocabulary, to name filters by them."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.config import RunConfig
from secateur.data import DataSet, Images
from secateur.data.batch_reader import BatchReader
from secateur.data.unreadable import read_batch
from secateur.data.vocabulary import read_vocabulary
from secateur.integrations.image_text import ImageTextModel, load_image_text_model
from secateur.pipeline.scoring_context import ScoringContext, context_class_names
from secateur.runtime import distributed
from secateur.runtime.errors import UsageError
from secateur.scoring.naming import ImageWords

TEXTS = 256
"""Texts that are embedded at a time."""


def image_words_of(
    config: RunConfig, context: ScoringContext, dataset: DataSet
) -> ImageWords | None:
    """Return how well each word fits each calibration image; None if no model is configured.

    The image–text model sees the images in the sizes in which they are stored. Raises
    `SecateurError`; see `read_vocabulary` and `load_image_text_model`.
    """
    section = config.report
    if section.naming_model is None:
        return None
    class_names = context_class_names(dataset, context.task, context.dependencies)
    words = read_vocabulary(section.vocabulary, class_names)
    model = load_image_text_model(section.naming_model, context.reader.device)
    return compare(model, words, context.calibration, context.reader)


def compare(
    model: ImageTextModel, words: tuple[str, ...], images: Images, reader: BatchReader
) -> ImageWords:
    """Return the cosines of images and words; images that can't be read have zeros.

    Each process embeds its share of the images.
    """
    texts = torch.cat(
        [model.embed_texts(words[start : start + TEXTS]) for start in range(0, len(words), TEXTS)]
    )
    similarities = torch.zeros(len(images.labels), len(words))
    rank, processes = distributed.rank_and_world_size()
    local_shard = torch.arange(len(images.labels))[rank::processes]
    chunks = [chunk for chunk in local_shard.split(reader.batch_size) if len(chunk)]
    for chunk in reader.progress(chunks, "comparing images with words", len(chunks)):
        readable = read_batch(images.originals, chunk, reader.unreadable)
        if readable is not None:
            indices, originals = readable
            similarities[indices] = model.embed_images(_checked(originals)) @ texts.T
    distributed.all_reduce_sum([similarities])
    return ImageWords(words, similarities)


def _checked(originals: list[Tensor]) -> list[Tensor]:
    """Return the images; raise `UsageError` unless they are 8-bit RGB."""
    for pixels in originals:
        if pixels.dtype != torch.uint8 or pixels.shape[:-2] != (3,):
            raise UsageError(
                "an image–text model names filters by 8-bit RGB images, and the data holds "
                f"{str(pixels.dtype).removeprefix('torch.')} tensors of shape {list(pixels.shape)}"
            )
    return originals
