"""What benches record beside their measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

import rows


def test_the_revision_is_empty_where_there_is_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    assert rows.revision() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rows.revision() == ""
