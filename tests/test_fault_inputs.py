"""Changed files of every format: a small part of `bench/faults.py inputs`."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest

from fault_case import Case
from fault_inputs import Reader, mutate, readers, write_files
from secateur.runtime.errors import SecateurError

TRIES = 12


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    """Every reader, with valid files; making them checks that those are accepted."""
    folder = tmp_path_factory.mktemp("valid")
    Case(folder).write()
    return readers(folder)


def test_changed_files_are_refused_in_one_line_or_read_the_same(
    all_readers: list[Reader], tmp_path: Path
) -> None:
    said = []
    for reader in all_readers:
        for number in range(TRIES):
            generator = random.Random(f"test {reader.name} {number}")
            folder = tmp_path / f"{reader.name} {number}".replace("/", "-")
            folder.mkdir()
            write_files(mutate(reader.files, generator, reader.fix), folder)
            try:
                with warnings.catch_warnings(action="ignore"):  # of Pillow, on odd images
                    value = reader.read(folder)
            except SecateurError as error:
                said.append(str(error))
            else:
                assert reader.expected in (None, value), reader.name
    assert len(said) > len(all_readers) * TRIES // 2
    assert all(text and "\n" not in text for text in said)
