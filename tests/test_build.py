"""Wheel and sdist are reproducible, and hold the right files and dependencies."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from secateur import __version__

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".j2", ".js", ".txt", ".typed"}
"""Of the files that the package consists of."""
LARGEST_PICTURE = 200_000
"""In bytes: more is data, which has no place in an sdist."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository, without what git ignores."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(checkout: Path) -> dict[str, bytes]:
    return build(checkout)


def build(folder: Path) -> dict[str, bytes]:
    """Wheel and sdist of the project in a folder, by their suffix."""
    out = folder / "dist"
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    variables = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True)
    return {path.suffix: path.read_bytes() for path in out.iterdir()}


def test_builds_of_another_place_and_time_are_the_same_bytes(
    checkout: Path, built: dict[str, bytes], tmp_path: Path
) -> None:
    other = tmp_path / "a folder" / "of another depth"
    for path in sorted(checkout.rglob("*"), reverse=True):
        if path.is_file() and "dist" not in path.relative_to(checkout).parts:
            copy = other / path.relative_to(checkout)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copy.chmod(path.stat().st_mode & 0o700)
            os.utime(copy, (1e9, 1e9))
    assert sorted(built) == [".gz", ".whl"]
    assert build(other) == built


def test_a_wheel_of_the_sdist_is_the_wheel(built: dict[str, bytes], tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(built[".gz"])) as archive:
        archive.extractall(tmp_path, filter="data")
    assert build(tmp_path / f"secateur-{__version__}")[".whl"] == built[".whl"]


def test_the_wheel_holds_the_package_and_no_more(checkout: Path, built: dict[str, bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(built[".whl"])) as archive:
        names = set(archive.namelist())
    about = f"secateur-{__version__}.dist-info"
    source = checkout / "src"
    package = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    written = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert names == package | {f"{about}/{name}" for name in written}
    assert {Path(name).suffix for name in package} == SUFFIXES


def test_the_sdist_holds_sources_and_small_pictures(built: dict[str, bytes]) -> None:
    large = {}
    with tarfile.open(fileobj=io.BytesIO(built[".gz"])) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            content = file.read() if file else b""
            if len(content) > LARGEST_PICTURE and not is_text(content):
                large[member.name] = len(content)
    assert large == {}


def is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False
