from __future__ import annotations

from secateur.scoring.batching import images_at_a_time


def test_images_at_a_time_depend_on_their_size_alone() -> None:
    assert images_at_a_time(8, 8) == 64
    assert images_at_a_time(224, 224) == 16
    assert images_at_a_time(4000, 3000) == 1
    sizes = {images_at_a_time(side, side) for side in range(1, 2000, 7)}
    assert all(size & (size - 1) == 0 for size in sizes)
