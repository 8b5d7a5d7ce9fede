"""A user's file is run with its neighbours, and its modules stay apart from all others."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.models import user_code, zoo
from secateur.runtime.errors import UsageError

BLOCKS = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Width:
    out: int = 8

class Block(nn.Module):
    def __init__(self, width=Width()):
        super().__init__()
        self.conv = nn.Conv2d(3, width.out, 3)
        self.width = width
    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))
"""
NET = """
from __future__ import annotations
{statement}
def net(num_classes=8):
    return Block()
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names_of(before: set[str]) -> set[str]:
    """Modules that were imported since, other than those below a package of the user's."""
    return {name for name in sys.modules.keys() - before if not name.startswith("secateur_user_")}


STATEMENTS = {
    "of the package": "from .blocks import Block",
    "beside the file": "from blocks import Block",
    "from the working folder": "from nets.blocks import Block",
    "of the package, as a module": "from . import blocks\nBlock = blocks.Block",
    "beside the file, as a module": "import blocks\nBlock = blocks.Block",
    "by a dotted name": "import nets.blocks\nBlock = nets.blocks.Block",
    "by another name": "import nets.blocks as mine\nBlock = mine.Block",
    "with a star": "from nets.blocks import *",
    "from above": "from ..nets.blocks import Block",
    "in the factory": "def Block():\n    from nets.blocks import Block as B\n    return B()",
}


@pytest.mark.parametrize("is_package", [True, False], ids=["package", "plain folder"])
@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_file_may_import_its_neighbours(
    statement: str, is_package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    write(root / "nets" / "blocks.py", BLOCKS)
    write(root / "nets" / "small.py", NET.format(statement=STATEMENTS[statement]))
    if is_package:
        write(root / "nets" / "__init__.py", "")
    monkeypatch.chdir(root)
    before, path = set(sys.modules), list(sys.path)
    network = zoo.load("nets/small.py:net")
    assert network(torch.zeros(2, 3, 5, 5)).shape == (2, 8)
    assert sys.path == path
    assert not names_of(before) & {"blocks", "nets", "small"}


def test_a_package_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__", "deep/__init__"):
        write(tmp_path / "nets" / f"{name}.py", "")
    write(tmp_path / "nets" / "blocks.py", BLOCKS)
    statement = "from nets.blocks import Block as B\nfrom ..blocks import Block\nassert B is Block"
    file = write(tmp_path / "nets" / "deep" / "small.py", NET.format(statement=statement))
    monkeypatch.chdir(Path(__file__).parent)
    assert isinstance(zoo.load(f"{file}:net"), nn.Module)


def test_files_named_alike_have_neighbours_of_their_own(tmp_path: Path) -> None:
    for width in (8, 4):
        folder = tmp_path / str(width)
        write(folder / "blocks.py", BLOCKS.replace("= 8", f"= {width}"))
        write(folder / "small.py", NET.format(statement="from blocks import Block"))
    wide, narrow, again = (zoo.load(f"{tmp_path / name}/small.py:net") for name in ("8", "4", "8"))
    widths = [network(torch.zeros(1, 3, 5, 5)).shape[1] for network in (wide, narrow, again)]
    assert widths == [8, 4, 8]


def test_networks_can_be_copied_pickled_and_exported(tmp_path: Path) -> None:
    write(tmp_path / "blocks.py", BLOCKS)
    file = write(tmp_path / "small.py", NET.format(statement="from blocks import Block"))
    network = zoo.load(f"{file}:net")
    images = torch.rand(2, 3, 5, 5)
    stored = io.BytesIO()
    torch.save(network, stored)
    stored.seek(0)
    copies = [
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(stored, weights_only=False),
        torch.export.export(network, (images,)).module(),
    ]
    for other in copies:
        assert torch.equal(other(images), network(images))


def test_a_file_named_as_an_installed_package_gets_that_package(tmp_path: Path) -> None:
    text = "import torchvision\ndef net():\n    return torchvision.models.resnet18()\n"
    file = write(tmp_path / "torchvision.py", text)
    assert isinstance(zoo.load(f"{file}:net"), nn.Module)


def test_a_neighbour_named_as_an_installed_package_stays_apart(tmp_path: Path) -> None:
    write(tmp_path / "markupsafe.py", BLOCKS)
    write(tmp_path / "jinja2" / "note.txt", "a folder without code")
    statement = "from markupsafe import Block\nimport jinja2\njinja2.Template\nimport copy"
    file = write(tmp_path / "small.py", NET.format(statement=statement))
    write(tmp_path / "copy.py", "raise RuntimeError")
    installed = importlib.import_module("markupsafe")
    assert isinstance(zoo.load(f"{file}:net"), nn.Module)
    assert sys.modules["markupsafe"] is installed
    assert hasattr(installed, "Markup")


def test_a_package_that_imports_the_file_runs_it_once(tmp_path: Path) -> None:
    write(tmp_path / "nets" / "__init__.py", "from .small import net")
    write(tmp_path / "nets" / "blocks.py", BLOCKS)
    statement = "from .blocks import Block\nfrom nets import __name__ as above"
    file = write(tmp_path / "nets" / "small.py", NET.format(statement=statement))
    build = user_code.find(f"{file}:net", "network")
    module = sys.modules[build.__module__]
    assert isinstance(module, types.ModuleType)
    assert sys.modules[build.__module__.rpartition(".")[0]].net is build


def test_a_file_needs_no_more_of_its_package_than_it_imports(tmp_path: Path) -> None:
    write(tmp_path / "nets" / "__init__.py", "import not_there")
    write(tmp_path / "nets" / "blocks.py", BLOCKS)
    file = write(tmp_path / "nets" / "small.py", NET.format(statement=STATEMENTS["of the package"]))
    assert isinstance(zoo.load(f"{file}:net"), nn.Module)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'$"),
        ("import blocks.more", "No module named 'blocks.more'; 'blocks' is not a package$"),
        ("from .missing import Block", "No module named 'missing'$"),
        ("from blocks import Other", r"cannot import name 'Other' from 'blocks' \(.*blocks.py\)$"),
    ],
)
def test_what_cannot_be_imported_is_named_as_it_was_written(
    statement: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "blocks.py", BLOCKS)
    file = write(tmp_path / "small.py", NET.format(statement=statement))
    before = set(sys.modules)
    with pytest.raises(UsageError, match=f"small.py can't be run: .*{message}"):
        zoo.load(f"{file}:net")
    assert not {name for name in sys.modules.keys() - before if name.startswith("secateur_user_")}
