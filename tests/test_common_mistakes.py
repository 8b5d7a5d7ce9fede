"""Every mistake in docs/reference/common_mistakes.md gets the message of the page, in one line."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

import secateur
from mistakes import python_names, write_desk
from secateur.cli import app
from secateur.runtime.errors import SecateurError

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "common_mistakes.md"
FEWEST = 40
"""Mistakes that the page must list."""


def mistakes() -> list[tuple[str, str]]:
    """What is typed and the message, as the page's tables say."""
    rows = re.findall(r"^\| (`+)(.+?)\1 \| (`+)(.+?)\3 \|$", PAGE.read_text(), re.M)
    return [(typed.replace(r"\|", "|"), text.replace(r"\|", "|")) for _, typed, _, text in rows]


ROWS = mistakes()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    write_desk(folder)
    return folder


def files(folder: Path) -> list[str]:
    """All files but the bytecode of `net.py`."""
    paths = (path for path in folder.rglob("*.*") if path.parent.name != "__pycache__")
    return sorted(str(path.relative_to(folder)) for path in paths)


def message_on_the_command_line(command: str) -> str:
    """The only line on stderr, without the word `error:`."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", shlex.split(command)),
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as stop,
    ):
        app.main()
    assert stop.value.code in (1, 2)
    (line,) = said.getvalue().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def message_in_python(code: str) -> str:
    with pytest.raises(SecateurError) as raised:
        eval(code, {**python_names(), "secateur": secateur})
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_the_page_lists_enough_mistakes() -> None:
    assert len(ROWS) == len(dict(ROWS)) >= FEWEST
    assert len(ROWS) == len(re.findall(r"^\| `", PAGE.read_text(), re.M))


@pytest.mark.parametrize(("typed", "message"), ROWS, ids=[typed for typed, _ in ROWS])
def test_a_mistake_gets_one_line(
    typed: str, message: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    before = files(desk)
    is_command = typed.startswith("secateur ")
    assert (message_on_the_command_line if is_command else message_in_python)(typed) == message
    assert files(desk) == before
