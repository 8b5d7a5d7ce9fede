"""What every test module shares: checked shapes, one thread, a seed and the staged data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from runs import DigitsRun

# Before the first `import secateur`: its annotated shapes are checked from here on.
jaxtyping.install_import_hook("secateur", "beartype.beartype")

torch.set_num_threads(1)

# Property tests without settings of their own; see `test_random_networks`.
settings.register_profile("quick", deadline=None, max_examples=40, derandomize=True, database=None)
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


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> DigitsRun:
    """A real run folder; see `runs.make_digits_run`."""
    from runs import make_digits_run

    return make_digits_run(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A user's own file with a small network in it."""
    from fault_case import MODEL

    path = tmp_path / "own.py"
    path.write_text(MODEL)
    return path
