"""Files and folders are replaced as a whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from fault_case import Case, FailingDisk, outcome
from secateur.experiments import run as runs
from secateur.experiments.manifest import read_contents
from secateur.runtime import atomic_io
from secateur.runtime.atomic_io import (
    UNFINISHED,
    append_line,
    make_folder,
    make_inner_folder,
    replace_file,
    replacing_folder,
)
from secateur.runtime.errors import SecateurError, WriteError
from secateur.runtime.event_log import EventLog
from secateur.training.checkpoint import Checkpoint, Checkpoints


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_at_any_moment_leaves_the_old_file(tmp_path: Path, number: int) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with FailingDisk(tmp_path).mounted() as disk:
        replace_file(path, "new, and longer")
    assert disk.count == 4  # open, write, flush, rename
    assert path.read_text() == "new, and longer"
    path.write_text("old")
    for place in range(1, disk.count + 1):
        failing = FailingDisk(tmp_path, place, number)
        with failing.mounted(), pytest.raises(WriteError, match=r"can't be written: ") as caught:
            replace_file(path, "new, and longer")
        assert os.strerror(number) in str(caught.value)
        assert names_in(tmp_path) == ["result.json"]
        assert path.read_text() == "old"


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    path = tmp_path / "file"
    path.symlink_to(outside)
    replace_file(path, "new")
    assert not path.is_symlink()
    assert outside.read_text() == "mine"
    path.with_name(f"file{UNFINISHED}").symlink_to(outside)
    with pytest.raises(WriteError, match=f"file{UNFINISHED} can't be written"):
        replace_file(path, "newer")
    assert outside.read_text() == "mine"


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    outside, log = tmp_path / "outside", tmp_path / "log.jsonl"
    outside.write_text("mine")
    log.symlink_to(outside)
    with pytest.raises(WriteError, match=r"log\.jsonl can't be written"):
        EventLog(log).write("start")
    assert outside.read_text() == "mine"


def test_checkpoints_are_not_written_to_a_folder_behind_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in range(4):
        (elsewhere / f"{number}.safetensors").write_text("mine")
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(WriteError, match="symbolic link"):
        Checkpoints(tmp_path / "checkpoints").save(9, Checkpoint({}, {}))
    assert len(names_in(elsewhere)) == 4


def test_an_unfinished_line_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    events = EventLog(log)
    events.write("start")
    with log.open("a") as file:
        file.write('{"event": "epo')
    events.write("epoch", number=2)
    events.write("end")
    lines = log.read_text().splitlines()
    assert [json.loads(line)["event"] for line in (lines[0], *lines[2:])] == [
        "start",
        "epoch",
        "end",
    ]


def test_lines_of_an_empty_log_start_at_once(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    append_line(tmp_path / "log", "one")
    append_line(tmp_path / "log", "two")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_replaces_another(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic_io, "_exchange", lambda first, second: False)
    elif sys.platform != "linux":
        pytest.skip("names can be exchanged on Linux only")
    folder = tmp_path / "run"
    for content in ("old", "new"):
        with replacing_folder(folder) as new:
            (new / "file").write_text(content)
            assert not (folder / "file").exists() or (folder / "file").read_text() == "old"
        assert (folder / "file").read_text() == content
        assert names_in(tmp_path) == ["run"]
    with pytest.raises(ZeroDivisionError), replacing_folder(folder) as new:
        _ = 1 // len(names_in(new))
    assert (folder / "file").read_text() == "new"
    assert names_in(tmp_path) == ["run"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in (f".run{UNFINISHED}", ".run.older"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    with replacing_folder(folder) as new:  # it was killed between two renames
        assert (folder / "file").read_text() == "old"
        assert names_in(new) == []
    assert names_in(tmp_path) == ["run"]
    (tmp_path / f".run{UNFINISHED}").symlink_to(tmp_path)
    with replacing_folder(folder):
        pass
    assert names_in(tmp_path) == ["run"]


def test_a_link_to_a_folder_on_another_disk_stays(tmp_path: Path) -> None:
    (tmp_path / "other disk").mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "other disk")
    with replacing_folder(link) as new:
        (new / "file").write_text("new")
    assert link.is_symlink()
    assert (link / "file").read_text() == "new"
    make_folder(link)
    make_folder(link / "inner")
    with pytest.raises(WriteError, match="symbolic link"):
        make_inner_folder(link)


def test_a_folder_on_which_a_disk_is_mounted_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for name in ("disk", "link"):
        with pytest.raises(WriteError, match="name a folder inside it"):
            replacing_folder(tmp_path / name).__enter__()
        with pytest.raises(WriteError, match="name a folder inside it"):
            runs.finetune(tmp_path / "run", tmp_path / name, {})
    assert names_in(tmp_path) == ["disk", "link"]
    with replacing_folder(tmp_path / "disk" / "inside"):
        pass
    assert names_in(tmp_path / "disk") == ["inside"]


def test_an_error_of_the_caller_is_not_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), replacing_folder(tmp_path / "run"):
        raise_reset()
    assert names_in(tmp_path) == []


def raise_reset() -> None:
    raise ConnectionResetError


@pytest.mark.slow
def test_a_run_on_a_disk_that_fails_loses_nothing_and_resumes(tmp_path: Path) -> None:
    """At one of its writes; `bench/faults.py disk` does all of them."""
    case = Case(tmp_path, checkpoint_minutes=60.0, report_images=0)
    case.write()
    with FailingDisk(tmp_path).mounted() as disk:
        case.prune(tmp_path / "alone")
    expected = outcome(tmp_path / "alone")
    assert disk.count > 50
    out = tmp_path / "full"
    failing = FailingDisk(tmp_path, disk.count - 30)  # while it is trained
    with failing.mounted(), pytest.raises(SecateurError, match="No space left on device"):
        case.prune(out)
    read_contents(out)  # raises where a file is damaged
    case.prune(out)
    assert outcome(out) == expected
    assert not [name for name in names_in(tmp_path) if name.startswith(".full")]


def test_an_older_run_stays_if_the_disk_is_full(tmp_path: Path) -> None:
    case = Case(tmp_path, report_images=0)
    case.write()
    run = tmp_path / "run"
    runs.run(case.config(epochs=0), run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with FailingDisk(tmp_path, 30).mounted(), pytest.raises(WriteError):
        runs.run(case.config(epochs=0), run, overwrite=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
