"""Fixtures of every test module: checked shapes, one thread, a seed and the staged data."""

from __future__ import annotations

import dataclasses
import fcntl
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from shape_checks import check_shapes

if TYPE_CHECKING:
    from runs import DigitsRun

# Before the first `import secateur`: its annotated shapes are checked from here on.
check_shapes()

torch.set_num_threads(1)

# Property tests without settings of their own; see `test_random_networks`.
settings.register_profile("quick", deadline=None, max_examples=10, derandomize=True, database=None)
settings.register_profile("full", settings.get_profile("quick"), max_examples=40)
settings.register_profile("thorough", deadline=None, max_examples=500, database=None)
settings.load_profile("quick")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def generator() -> torch.Generator:
    """Randomness that is the same in every run, for one test."""
    return torch.Generator().manual_seed(20_240_229)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds what a module's constructor draws from, which takes no generator."""
    torch.manual_seed(7)
    return 7


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets and weights staged beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no staged data in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def short_timing() -> Iterator[None]:
    """Networks are timed once, not eleven times: no test is about how long they take."""
    from secateur.runtime.timing import Rounds  # not before the hook

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.models.evaluate.LATENCY_ROUNDS", Rounds(1, 1))
        patch.setattr("secateur.pruning.cost.latency_profiler.INTERLEAVED_ROUNDS", Rounds(1, 1))
        patch.setattr("secateur.pruning.cost.latency_profiler.SHOWN_ROUNDS", Rounds(1, 1))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_synthesis() -> Iterator[None]:
    """Synthesises no images beside few ones, which takes longer than all else of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.pipeline.synthetic_data.FEW_IMAGES", 0)
        yield


@pytest.fixture(scope="session")
def digits_run(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, short_timing: None, no_synthesis: None
) -> DigitsRun:
    """A real run folder; see `runs.make_digits_run`. Each process has a copy of the first one's."""
    from runs import make_digits_run

    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    made = shared / "digits_run.pickle"
    with (shared / "digits_run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            (shared / "digits").mkdir()
            made.write_bytes(pickle.dumps(make_digits_run(shared / "digits")))
    digits: DigitsRun = pickle.loads(made.read_bytes())
    folder = tmp_path_factory.mktemp("digits") / "run"
    shutil.copytree(digits.folder, folder)
    return dataclasses.replace(digits, folder=folder)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A user's own file with a small network in it."""
    from fault_case import MODEL

    path = tmp_path / "own.py"
    path.write_text(MODEL)
    return path
