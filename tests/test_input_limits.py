"""Hostile files are refused before they are parsed: fast, and in little memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import DigitsRun
from secateur.config import read_tables
from secateur.data import FileImages
from secateur.data.annotated import read_pixels
from secateur.data.preprocessing import Preprocessing
from secateur.experiments import run_folder
from secateur.experiments.manifest import MANIFEST, PLAN, WEIGHTS
from secateur.models import checkpoint_files
from secateur.runtime import input_limits
from secateur.runtime.errors import (
    DataError,
    RunFolderError,
    SecateurError,
    UsageError,
    WeightsError,
)

SECONDS, MIB = 2, 200


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickle_payload(folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save({"weight": torch.zeros(2), "payload": Payload(folder / "ran")}, path)
    return path


def old_pickle_payload(folder: Path) -> Path:
    path = folder / "weights.pt"
    path.write_bytes(pickle.dumps(Payload(folder / "ran")))
    return path


def large_header(folder: Path) -> Path:
    """A header of 1 GB, in a file that takes no room."""
    path = folder / "weights.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10**9))
        file.truncate(10**9 + 8)
    return path


def claimed_header(folder: Path) -> Path:
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    return path


def read_weights(path: Path) -> None:
    checkpoint_files.read_checkpoint(path)


def large_png(folder: Path) -> Path:
    """30,000 × 30,000 pixels of one colour, in some ten kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    packed = zlib.compress((b"\0" + bytes(30_000 // 8)) * 30_000, 9)
    path = folder / "large.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )
    return path


def read_image(path: Path) -> None:
    images = FileImages((path,), torch.zeros(1).long())
    images.read(torch.tensor([0]), Preprocessing(32, 32))


def read_mask(path: Path) -> None:
    read_pixels(path)


def dotted_toml(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text("a." * 400_000 + "a = 1\n")
    return path


def dotted_inline_toml(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text('a = {"x\\"" = 1, ' + "b." * 400_000 + "b = 1}\n")
    return path


def nested_toml(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text("a = " + "[" * 400_000)
    return path


def large_toml(folder: Path) -> Path:
    path = folder / "config.toml"
    with path.open("wb") as file:
        file.truncate(10**9)
    return path


def read_toml(path: Path) -> None:
    read_tables(path)


def gzip_bomb(folder: Path) -> Path:
    path = folder / "names.txt.gz"
    path.write_bytes(gzip.compress(bytes(300 * 2**20), 9))
    return path


def read_gzip(path: Path) -> None:
    input_limits.read_unzipped(path, input_limits.TEXT, DataError)


@pytest.fixture
def run(digits_run: DigitsRun, tmp_path: Path) -> Path:
    shutil.copytree(digits_run.folder, tmp_path / "run")
    return tmp_path / "run"


def many_indices(run: Path) -> Path:
    """A plan with a thousand million indices, in a file that takes no room."""
    with (run / PLAN).open("r+b") as file:
        file.truncate(2 * 10**9)
    return run


def indices_that_fit(run: Path) -> Path:
    """As many indices as a plan may have, with a manifest that agrees."""
    numbers = ",".join(["7"] * (input_limits.PLAN_TEXT // 2 - 1000))
    (run / PLAN).write_text(
        '{"schema_version": 1, "removed": {"layer1.0.conv1": [' + numbers + "]}}"
    )
    agree(run)
    return run


def outside_member(run: Path) -> Path:
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["files"]["../../x"] = "0" * 64
    (run / MANIFEST).write_text(json.dumps(manifest))
    return run


def header_in_run(run: Path) -> Path:
    large_header(run)
    (run / "weights.safetensors").replace(run / WEIGHTS)
    return run


def deep_manifest(run: Path) -> Path:
    (run / MANIFEST).write_text("[" * 100_000)
    return run


def large_manifest(run: Path) -> Path:
    with (run / MANIFEST).open("r+b") as file:
        file.truncate(10**9)
    return run


def agree(run: Path) -> None:
    """Makes the manifest say what the plan's hash is."""
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["files"][PLAN] = hashlib.sha256((run / PLAN).read_bytes()).hexdigest()
    (run / MANIFEST).write_text(json.dumps(manifest))


def load_run(path: Path) -> None:
    run_folder.load(path)


Make = Callable[[Path], Path]
Read = Callable[[Path], None]
FILES: list[tuple[Make, Read, type[SecateurError], str]] = [
    (pickle_payload, read_weights, WeightsError, "could run code"),
    (old_pickle_payload, read_weights, WeightsError, "could run code"),
    (large_header, read_weights, WeightsError, "header claims 1000000000 bytes"),
    (claimed_header, read_weights, WeightsError, "header claims"),
    (large_png, read_image, DataError, "large.png can't be read"),
    (large_png, read_mask, DataError, "large.png can't be read"),
    (dotted_toml, read_toml, UsageError, "nests too deeply"),
    (dotted_inline_toml, read_toml, UsageError, "nests too deeply"),
    (nested_toml, read_toml, UsageError, "nested too deeply"),
    (large_toml, read_toml, UsageError, "1000000000 bytes"),
    (gzip_bomb, read_gzip, DataError, "unpacks to more than"),
]
RUNS: list[tuple[Make, Read, type[SecateurError], str]] = [
    (many_indices, load_run, RunFolderError, "2000000000 bytes"),
    (indices_that_fit, load_run, RunFolderError, "plan can't be read"),
    (outside_member, load_run, RunFolderError, "lists '../../x', which is not a file of a run"),
    (header_in_run, load_run, RunFolderError, "header claims 1000000000 bytes"),
    (deep_manifest, load_run, RunFolderError, "manifest.json can't be read"),
    (large_manifest, load_run, RunFolderError, "1000000000 bytes"),
]


def names(cases: list[tuple[Make, Read, type[SecateurError], str]]) -> list[str]:
    return [f"{make.__name__}-{read.__name__}" for make, read, _, _ in cases]


@pytest.mark.parametrize(("make", "read", "error", "message"), FILES, ids=names(FILES))
def test_hostile_files_are_refused(
    make: Make, read: Read, error: type[SecateurError], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(error, match=message) as raised:
        read(path)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("make", "read", "error", "message"), RUNS, ids=names(RUNS))
def test_hostile_run_folders_are_refused(
    make: Make, read: Read, error: type[SecateurError], message: str, run: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        read(make(run))
    assert len(str(raised.value).splitlines()) == 1


MEASURE = """
import os, re, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import test_input_limits
from secateur.runtime.errors import SecateurError

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

for number, (make, read, _, _) in enumerate([*test_input_limits.FILES, *test_input_limits.RUNS]):
    path = make(Path(sys.argv[2]) / str(number))
    child = os.fork()  # its peak starts at what it has
    if not child:
        before, start = peak(), time.perf_counter()
        try:
            read(path)
        except SecateurError:
            print(time.perf_counter() - start, peak() - before, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_they_are_refused_fast_and_in_little_memory(digits_run: DigitsRun, tmp_path: Path) -> None:
    """Each in a process of its own, whose peak memory is compared with that before."""
    for number in range(len(FILES)):
        (tmp_path / str(number)).mkdir()
    for number in range(len(FILES), len(FILES) + len(RUNS)):
        shutil.copytree(digits_run.folder, tmp_path / str(number))
    paths = ":".join(path for path in sys.path if path.endswith(("tests", "bench")))
    command = [sys.executable, "-c", MEASURE, paths, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measurements = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(measurements) == len(FILES) + len(RUNS), done.stdout
    for (seconds, mib), name in zip(measurements, names([*FILES, *RUNS]), strict=True):
        assert seconds < SECONDS, name
        assert mib < MIB, name


def test_ordinary_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[model]\nname = "a.b.c"\n[plan.shares]\n"layer1.0.conv1" = 0.5\n')
    assert read_tables(path)["plan"]["shares"] == {"layer1.0.conv1": 0.5}
    path.write_text(f'source = "{"x." * 200}"\n')  # dots in a value nest nothing
    assert read_tables(path)["source"] == "x." * 200


def test_a_file_that_grows_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"x" * 11)
    assert input_limits.read_bounded(path, 11, DataError) == b"x" * 11
    with pytest.raises(DataError, match="11 bytes, and at most 10"):
        input_limits.read_bounded(path, 10, DataError)
    with pytest.raises(DataError, match="no file"):
        input_limits.read_bounded(tmp_path / "none", 10, DataError)
