"""Of two runs in one folder the second is refused, and no lock file stays behind."""

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
from secateur.experiments.compare.runner import run_benchmark
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.run import finetune, run
from secateur.experiments.train_base import train_base
from secateur.runtime.errors import RunFolderError
from secateur.runtime.file_lock import lock_folder


def hold(folder: Path, started_file: Path) -> None:
    with lock_folder(folder):
        started_file.touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """Another process that has locked `tmp_path / "run"`."""
    process = started(hold, tmp_path / "run", tmp_path / "started")
    while not (tmp_path / "started").exists():
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
    with pytest.raises(RunFolderError, match=f"another run is using {tmp_path / 'run'}"):
        work(tmp_path / "run", model_file)
    assert sorted(tmp_path.iterdir()) == before
    holder.kill()
    holder.join()
    with lock_folder(tmp_path / "run"):  # a killed process holds no lock
        pass
    assert not (tmp_path / ".run.lock").exists()


def test_fine_tuning_locks_both_folders(digits_run: DigitsRun, tmp_path: Path) -> None:
    for folder in (digits_run.folder, tmp_path / "finetuned"):
        with lock_folder(folder), pytest.raises(RunFolderError, match="another run is using"):
            finetune(digits_run.folder, tmp_path / "finetuned", {"epochs": 1})
    assert list(tmp_path.iterdir()) == []


def test_all_paths_of_a_folder_share_its_lock(
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


def test_a_symbolic_link_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="can't write beside"), lock_folder(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def lock_repeatedly(folder: Path, log: Path) -> None:
    ends = time.monotonic() + 2
    with log.open("w") as file:
        while time.monotonic() < ends:
            with contextlib.suppress(RunFolderError), lock_folder(folder):
                begin = time.monotonic()
                time.sleep(0.002)
                print(begin, time.monotonic(), file=file)


def test_no_two_processes_hold_the_lock_at_once(tmp_path: Path) -> None:
    """Each logs when it holds the lock, whose file is removed and created again all the time."""
    folder = tmp_path / "folder"
    folder.mkdir()
    files = [tmp_path / str(number) for number in range(3)]
    times = []
    for process in [started(lock_repeatedly, folder / "run", file) for file in files]:
        process.join()
        assert process.exitcode == 0
    for file in files:
        times += [tuple(map(float, line.split())) for line in file.read_text().splitlines()]
    times.sort()
    assert len(times) > 10
    for (_, end), (begin, _) in itertools.pairwise(times):
        assert end <= begin
    assert os.listdir(folder) == []


def fork_and_hold(folder: Path, started_file: Path) -> None:
    """As a run that is training with processes that read its images."""
    with lock_folder(folder):
        if os.fork() == 0:
            time.sleep(10)
            os._exit(0)
        started_file.touch()
        time.sleep(60)


def test_a_killed_process_leaves_no_lock_in_the_processes_that_it_forked(tmp_path: Path) -> None:
    process = started(fork_and_hold, tmp_path / "run", tmp_path / "started")
    while not (tmp_path / "started").exists():
        assert process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join()
    with lock_folder(tmp_path / "run"):
        pass


def test_a_disk_that_is_full_is_reported(tmp_path: Path) -> None:
    with (
        FailingDisk(tmp_path, 1).mounted(),
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
def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", refusing(number))
    with lock_folder(tmp_path / "run"):
        assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_is_not_mistaken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", refusing(errno.EIO))
    with pytest.raises(RunFolderError, match="Input/output error"), lock_folder(tmp_path / "run"):
        pass
