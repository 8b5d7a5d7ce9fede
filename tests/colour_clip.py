"""A CLIP of transformers that knows colours: its weights are set, not trained.

With queries and keys of zero, attention averages over all tokens, so that the one that is read out
holds a share of the patch, or of the word. The patch is its mean colour, the word the colour that
it names, both with the opposite beside it: their cosine is that of the colours, as distances from
grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
    "white": (1.0, 1.0, 1.0),
    "black": (-1.0, -1.0, -1.0),
}
"""Distances from grey, by channel."""
SIDE, LENGTH = 8, 6
SPECIAL = ("<start>", "<end>", "<pad>", "<unk>")


def make_tokenizer(words: Sequence[str]) -> Any:
    """Return a tokenizer that knows some words, as the library's fast ones are."""
    import tokenizers
    import transformers

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(
        tokenizer_object=tokenizer,
        model_max_length=LENGTH,
        **dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True)),
    )


def tower(**values: int) -> dict[str, int]:
    """Return the sizes of one tower."""
    return {
        "hidden_size": 6,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        **values,
    }


def write_colour_clip(folder: Path) -> Path:
    """Write the model, its tokenizer and its preprocessing; return the folder."""
    import transformers

    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    words = len(SPECIAL) + len(COLOURS)
    config = transformers.CLIPConfig(
        text_config=tower(vocab_size=words, max_position_embeddings=LENGTH, **ends),
        vision_config=tower(image_size=SIDE, patch_size=SIDE),
        projection_dim=6,
    )
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")  # `pre_layrnorm` among them
            is_passed_on = name.endswith(("v_proj.weight", "out_proj.weight", "projection.weight"))
            parameter.copy_(torch.eye(6) if is_passed_on else torch.tensor(float(is_norm)))
        embedding = model.text_model.embeddings.token_embedding.weight
        embedding[len(SPECIAL) :] = with_opposite(torch.tensor(list(COLOURS.values())))
        patch = model.vision_model.embeddings.patch_embedding.weight  # [value, rgb, row, column]
        patch += with_opposite(torch.eye(3)).T[:, :, None, None] / SIDE**2
    model.save_pretrained(folder)
    make_tokenizer(list(COLOURS)).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=half, image_std=half
    ).save_pretrained(folder)
    return folder


def with_opposite(values: Tensor) -> Tensor:
    """Return rows with their opposites beside them, whose mean is zero."""
    return torch.cat([values, -values], 1)


def paint(colours: Sequence[str], side: int, generator: torch.Generator) -> Tensor:
    """Return an image of each colour, uint8, with some noise."""
    levels = torch.tensor([COLOURS[colour] for colour in colours])[:, :, None, None]
    noise = 0.2 * torch.randn(len(colours), 3, side, side, generator=generator)
    return ((0.7 * levels + noise + 1) * 127.5).clamp(0, 255).byte()
