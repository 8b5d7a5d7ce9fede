"""Batches to train on: their images, their order, and their augmentation."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from processes import started
from secateur.data import Batch, FileImages, TensorImages, Unreadable
from secateur.data.augmentation import Augmentation, AugmentedImages
from secateur.data.preprocessing import Preprocessing
from secateur.data.training_stream import TrainingStream
from secateur.runtime.atomic_io import replace_file
from secateur.runtime.errors import DataError, UsageError

NATIVE = Preprocessing(16, 16)
STILL = Augmentation("none", flip=False)


def numbered(count: int, side: int = 16) -> TensorImages:
    """Images whose every pixel is their number in the list, and so is their label."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return TensorImages(pixels.expand(-1, 3, side, side).contiguous(), torch.arange(count))


def stream(images: TensorImages | FileImages, size: int = 7, **changes: object) -> TrainingStream:
    options: dict[str, object] = {"augmentation": Augmentation(), "batch_size": size, "seed": 3}
    return TrainingStream(images, NATIVE, **{**options, **changes})  # type: ignore[arg-type]


def labels_of(batches: list[Batch]) -> list[int]:
    return [label for batch in batches for label in batch.labels.tolist()]


def is_equal(one: list[Batch], other: list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs
    )


def test_readers_leave_a_request_to_stop_to_the_process_they_read_for() -> None:
    """Of `scancel` or `torchrun` it goes to all processes; the step in hand still needs images."""
    expected = list(stream(numbered(60)).epoch(1))
    batches = stream(numbered(60), workers=2).epoch(1)
    drawn = [next(batches)]
    workers = psutil.Process().children()
    assert len(workers) >= 2
    for worker in workers:
        worker.terminate()
    assert is_equal([*drawn, *batches], expected)


def _read_and_wait(note: Path) -> None:
    batches = stream(numbered(60), workers=1).epoch(1)
    next(batches)
    workers = psutil.Process().children(recursive=True)
    replace_file(note, " ".join(str(worker.pid) for worker in workers))
    time.sleep(1000)


@pytest.mark.slow
def test_readers_end_with_the_process_they_read_for(tmp_path: Path) -> None:
    """However it ended, and where a server of processes started them and is still there."""
    note = tmp_path / "workers"
    process = started(_read_and_wait, note)
    while not note.exists():
        assert process.is_alive()
        time.sleep(0.05)
    workers = [psutil.Process(int(number)) for number in note.read_text().split()]
    assert workers
    process.kill()
    process.join()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


# --- order --------------------------------------------------------------------------------------


@given(st.integers(4, 40), st.integers(3, 12), st.integers(1, 3))
@settings(max_examples=40, derandomize=True, database=None, deadline=None)
def test_every_process_gets_its_share_and_together_they_see_the_epoch(
    count: int, size: int, processes: int
) -> None:
    images = numbered(count)
    shards = [stream(images, size, shard=(rank, processes)) for rank in range(processes)]
    epochs = [list(local_shard.epoch(1)) for local_shard in shards]
    (whole,) = [list(stream(images, size).epoch(1))]
    steps = shards[0].steps
    assert {len(epoch) for epoch in epochs} == {steps}
    for step in range(steps):
        joined = [label for epoch in epochs for label in epoch[step].labels.tolist()]
        assert sorted(joined) == sorted(whole[step].labels.tolist())
        assert len(joined) == shards[0].size(step)
    seen = sorted(label for epoch in epochs for label in labels_of(epoch))
    assert len(seen) == len(set(seen))
    left_out = count - len(seen)
    assert left_out == 0 or left_out == count % size < 2 * processes


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    images = numbered(49)
    first, second = (labels_of(list(stream(images).epoch(number))) for number in (1, 2))
    other = labels_of(list(stream(images, seed=4).epoch(1)))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(49))
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(49))}) == 4


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(randaugment=True)])
def test_resuming_mid_epoch_yields_the_remaining_batches(augmentation: Augmentation) -> None:
    whole = stream(numbered(40), augmentation=augmentation)
    assert is_equal(list(whole.epoch(2))[3:], list(whole.epoch(2, first_step=3)))


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(randaugment=True)])
def test_changes_do_not_depend_on_processes_or_workers(augmentation: Augmentation) -> None:
    images = numbered(40)
    whole = list(stream(images, augmentation=augmentation).epoch(1))
    assert is_equal(whole, list(stream(images, augmentation=augmentation, workers=2).epoch(1)))
    for rank in range(2):
        local_shard = list(stream(images, augmentation=augmentation, shard=(rank, 2)).epoch(1))
        for all_images, shard in zip(whole, local_shard, strict=True):
            assert torch.equal(all_images.images[rank::2], shard.images)


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(
        stream(
            numbered(20), augmentation=Augmentation("random_resized_crop", randaugment=True)
        ).epoch(1)
    )
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("count", "size"), [(2, 7), (20, 2)])
def test_fewer_images_than_processes_is_an_error(count: int, size: int) -> None:
    said = f"{count} images in batches of {size} can't be trained on by 3 processes"
    with pytest.raises(UsageError, match=said):
        _ = stream(numbered(count), size, shard=(0, 3)).steps


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_on_request(workers: int, tmp_path: Path) -> None:
    paths = tuple(tmp_path / f"{number}.png" for number in range(12))
    for number, path in enumerate(paths):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(path)
    images = FileImages(paths, torch.arange(12))
    whole = list(stream(images, 4, workers=workers).epoch(1))
    paths[5].write_bytes(b"")
    unreadable = Unreadable()
    for augmentation in (Augmentation(), Augmentation("random_resized_crop")):
        training = stream(
            images, 4, workers=workers, unreadable=unreadable, augmentation=augmentation
        )
        drawn = list(training.epoch(1))
        assert sorted(labels_of(drawn)) == [number for number in range(12) if number != 5]
        if augmentation == Augmentation():
            for one, other in zip(whole, drawn, strict=True):
                stays = one.labels != 5
                assert torch.equal(one.images[stays], other.images)
    assert unreadable.names == (str(paths[5]),)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line_that_names_it(workers: int, tmp_path: Path) -> None:
    paths = tuple(tmp_path / f"{number}.png" for number in range(4))
    for path in paths:
        Image.new("RGB", (20, 20)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:40])
    images = FileImages(paths, torch.arange(4))
    with pytest.raises(DataError, match=r"2\.png can't be read") as error:
        list(stream(images, 2, workers=workers).epoch(1))
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()  # even while the error is referenced


# --- changes ------------------------------------------------------------------------------------


def moved(augmentation: Augmentation, images: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    height, width = images.shape[-2:]
    return augmentation.draw(len(images), (height, width), generator).apply(images)


@pytest.mark.parametrize("flip", [False, True])
def test_shifts_and_flips_equal_those_image_by_image(
    flip: bool, generator: torch.Generator
) -> None:
    images = torch.randn(16, 3, 16, 16, generator=generator)
    flipped = moved(Augmentation(flip=flip), images, seed=3)
    draws = torch.Generator().manual_seed(3)
    top = torch.randint(5, (16, 1), generator=draws)
    left = torch.randint(5, (16, 1), generator=draws)
    mirrored = torch.rand(16, 1, generator=draws) < 0.5
    for number, image in enumerate(images):
        canvas = torch.zeros(3, 20, 20)
        canvas[:, 2:18, 2:18] = image
        y, x = int(top[number]), int(left[number])
        window = canvas[:, y : y + 16, x : x + 16]
        expected = window.flip(2) if flip and mirrored[number] else window
        assert torch.equal(flipped[number], expected)


def test_moving_draws_for_each_image_and_reaches_every_shift() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4, 3] = 1
    shifted = moved(Augmentation(), image.expand(400, 1, 8, 8))
    places = {tuple(place) for place in shifted[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in (3, 4, 5) for x in (2, 3, 4, 5)}


def test_no_flip_keeps_left_left() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 1] = 1
    assert moved(Augmentation(flip=False), image.expand(100, 1, 8, 8))[..., 4:].abs().max() == 0


def test_an_image_of_a_few_pixels_is_left_in_place(generator: torch.Generator) -> None:
    images = torch.randn(4, 3, 7, 7, generator=generator)
    assert torch.equal(moved(Augmentation(flip=False), images), images)


def test_without_changes_an_epoch_has_the_images_as_they_are() -> None:
    images = numbered(20)
    for batch in stream(images, augmentation=STILL).epoch(1):
        assert torch.equal(batch.images, NATIVE.normalise(images.read(batch.indices, NATIVE)))


def test_a_resized_crop_is_a_part_of_the_stored_image(tmp_path: Path) -> None:
    ramp = torch.arange(64).expand(48, 64).to(torch.uint8)
    path = tmp_path / "ramp.png"
    Image.fromarray(torch.stack([ramp, ramp, ramp], dim=2).numpy()).save(path)
    images = FileImages((path,) * 30, torch.zeros(30, dtype=torch.int64))
    changed, _, _ = AugmentedImages(images, Augmentation("random_resized_crop"), (0, 1)).read(
        torch.arange(30), NATIVE
    )
    assert changed.shape == (30, 3, 16, 16)
    widths = changed[:, 0, 8, -1].int() - changed[:, 0, 8, 0].int()
    assert (widths >= 0).all()
    assert widths.min() < 30 < 40 < widths.max()
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 20


def test_a_resized_crop_is_made_as_the_network_wants_it() -> None:
    pixels = torch.randint(256, (4, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    images = TensorImages(pixels.to(torch.uint8), torch.arange(4))
    changed = AugmentedImages(images, Augmentation("random_resized_crop"), (0, 1))
    bicubic = replace(NATIVE, interpolation="bicubic")
    results = [
        changed.read(torch.arange(4), preprocessing)[0] for preprocessing in (NATIVE, bicubic)
    ]
    assert 0 < (results[0].int() - results[1].int()).abs().float().mean() < 30  # of the same parts


def test_randaugment_changes_pixels_and_nothing_else() -> None:
    pixels = torch.randint(256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = TensorImages(pixels.to(torch.uint8), torch.arange(12))
    augmentation = Augmentation("none", flip=False, randaugment=True)
    changed, _, _ = AugmentedImages(images, augmentation, (0, 1)).read(torch.arange(12), NATIVE)
    assert changed.dtype == torch.uint8
    assert changed.shape == images.pixels.shape
    assert not torch.equal(changed, images.pixels[:])
