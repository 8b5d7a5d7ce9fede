"""Two runs in one folder: the second is refused, and nothing is left of the lock."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fault_case import FailingDisk
from processes import started
from runs import DigitsRun, small_config
from secateur.config import BaseConfig, from_dict
from secateur.errors import RunFolderError
from secateur.experiments.compare.runner import run_benchmark
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.run import finetune, run
from secateur.experiments.train_base import train_base
from secateur.runtime.file_lock import lock_folder


def hold(folder: Path, noted: Path) -> None:
    with lock_folder(folder):
        noted.touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """Another process that is at work in `tmp_path / "run"`."""
    process = started(hold, tmp_path / "run", tmp_path / "noted")
    while not (tmp_path / "noted").exists():
        assert process.exitcode is None
        time.sleep(0.01)
    yield process
    process.kill()


def prune(folder: Path, model_file: Path) -> None:
    run(small_config(model_file), folder)


def train(folder: Path, model_file: Path) -> None:
    content = {"model": {"name": f"{model_file}:small"}, "data": {"source": "digits"}}
    train_base(from_dict(content, BaseConfig), folder)


def compare(folder: Path, model_file: Path) -> None:
    content = {"networks": [{"name": f"{model_file}:small"}], "data": {"source": "digits"}}
    run_benchmark(from_dict(content, BenchmarkSpec), folder)


@pytest.mark.parametrize("work", [prune, train, compare])
def test_the_second_is_refused(
    work: Callable[[Path, Path], None],
    holder: BaseProcess,
    tmp_path: Path,
    model_file: Path,
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunFolderError, match=f"another run is at work in {tmp_path / 'run'}"):
        work(tmp_path / "run", model_file)
    assert sorted(tmp_path.iterdir()) == before
    holder.kill()
    holder.join()
    with lock_folder(tmp_path / "run"):  # what was killed holds nothing
        pass
    assert not (tmp_path / ".run.lock").exists()


def test_fine_tuning_holds_both_folders(digits_run: DigitsRun, tmp_path: Path) -> None:
    for held in (digits_run.folder, tmp_path / "finetuned"):
        with lock_folder(held), pytest.raises(RunFolderError, match="another run is at work"):
            finetune(digits_run.folder, tmp_path / "finetuned", {"epochs": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_lock_by_whatever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        lock_folder(Path("run")),
        pytest.raises(RunFolderError),
        lock_folder(tmp_path / "x" / ".." / "run"),
    ):
        pass
    with lock_folder(tmp_path / "one"), lock_folder(tmp_path / "two"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".one.lock", ".two.lock"]
    assert list(tmp_path.iterdir()) == []


def test_no_file_elsewhere_is_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="can't write beside"), lock_folder(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def come_and_go(folder: Path, noted: Path) -> None:
    ends = time.monotonic() + 2
    with noted.open("w") as file:
        while time.monotonic() < ends:
            with contextlib.suppress(RunFolderError), lock_folder(folder):
                begin = time.monotonic()
                time.sleep(0.002)
                print(begin, time.monotonic(), file=file)


def test_many_that_come_and_go_never_hold_it_together(tmp_path: Path) -> None:
    """Each notes when it holds the lock; the file goes with each, and others wait for none."""
    place = tmp_path / "place"
    place.mkdir()
    files = [tmp_path / str(number) for number in range(3)]
    times = []
    for process in [started(come_and_go, place / "run", file) for file in files]:
        process.join()
        assert process.exitcode == 0
    for file in files:
        times += [tuple(map(float, line.split())) for line in file.read_text().splitlines()]
    times.sort()
    assert len(times) > 10
    for (_, end), (begin, _) in itertools.pairwise(times):
        assert end <= begin
    assert os.listdir(place) == []


def test_a_lock_that_can_not_be_signed_is_let_go_of(tmp_path: Path) -> None:
    writes = 3  # the folder above, the file, the number in it
    with (
        FailingDisk(tmp_path, writes).mounted(),
        pytest.raises(RunFolderError, match="No space left"),
        lock_folder(tmp_path / "run"),
    ):
        pass
    with lock_folder(tmp_path / "run"):
        pass


def refusing(number: int) -> Callable[[int, int], None]:
    """A `flock` that fails."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_worked_on_without(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", refusing(number))
    with lock_folder(tmp_path / "run") as descriptor:
        assert descriptor is None
        assert list(tmp_path.iterdir()) == []


def test_a_lock_that_fails_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", refusing(errno.EIO))
    with pytest.raises(RunFolderError, match="Input/output error"), lock_folder(tmp_path / "run"):
        pass
