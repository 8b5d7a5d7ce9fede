from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

import licences


def test_the_page_says_what_the_installed_packages_say() -> None:
    assert licences.differences(licences.PAGE.read_text()) == []


def test_omissions_and_errors_of_the_page_are_reported() -> None:
    lines = licences.PAGE.read_text().splitlines()
    [rich] = [line for line in lines if line.startswith("| rich |")]
    lines.remove(rich)
    version = metadata.version("typer")
    typer = f"| typer | {version} | Beerware | – | {licences.PURPOSES['typer']} |"
    lines = [typer if line.startswith("| typer |") else line for line in lines]
    page = "\n".join([*lines, rich.replace("rich", "poor")])
    assert licences.differences(page) == [
        "typer: Beerware on the page, MIT installed",
        "rich is not on the page",
        "poor is no dependency",
    ]


@pytest.mark.parametrize(
    ("stated", "licence"),
    [
        ("License-Expression: MIT OR 0BSD\nLicense: MIT", "MIT OR 0BSD"),
        ("License: Apache 2.0", "Apache-2.0"),
        ("License: MIT-CMU", "MIT-CMU"),
        ("License: BSD\nClassifier: License :: OSI Approved :: MIT License", "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License", "BSD-2-Clause"),
    ],
)
def test_a_licence_is_read_from_the_metadata(
    stated: str, licence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "nobody-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: nobody\nVersion: 1\n{stated}\n")
    (about / "LICENSE").write_text("Redistribution and use in source and binary forms are fine.")
    (about / "RECORD").write_text("nobody-1.0.dist-info/LICENSE,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert licences.licence("nobody") == licence
