"""scikit-learn's handwritten digits, for a run that needs no download.

1,797 images of 8×8 pixels: the test part of *Optical Recognition of Handwritten Digits* (Alpaydin
and Kaynak, UCI 1998), which scikit-learn ships.
"""

from __future__ import annotations

import torch
from torchvision.transforms import v2

from secateur.data.images import TensorImages
from secateur.data.splits import Splits, hold_out
from secateur.runtime.errors import UsageError

TEST_FRACTION = 0.25


def read_digits() -> Splits:
    """Return the digits as 32×32 RGB images; a fixed quarter of each class is for testing.

    Raises `UsageError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("digits need the extra: pip install 'secateur[demo]'") from error
    stored = load_digits()
    grey = torch.from_numpy(stored.images).float() / 16 * 255  # [image, 8, 8], 0 to 16 as stored
    large = v2.functional.resize(grey[:, None], [32, 32], antialias=True)
    pixels = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    images = TensorImages(pixels, torch.from_numpy(stored.target).long())
    train, test = hold_out(images, TEST_FRACTION, torch.Generator().manual_seed(0))
    return Splits(tuple(str(digit) for digit in range(10)), train, test)
