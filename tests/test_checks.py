"""The checks of words and structure find violations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def printed(script: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("make_wiring(model)", "wiring"),
        ("class WiringError: ...", "Wiring"),
        ("MAKE_WIRING = 1", "WIRING"),
        ("# a StandIn, or a stand-in", "StandIn"),
        ("# the criteria are told\n# apart", "told # apart"),
        ("# ground truth, and the ground", "ground"),
    ],
)
def test_a_retired_word_is_found_in_any_form(line: str, word: str, tmp_path: Path) -> None:
    folder = tmp_path / "src" / "secateur" / "graph"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(f"\n{line}\n")
    output = printed("vocabulary", "--root", str(tmp_path), "--no-help")
    assert f"src/secateur/graph/module.py:2: {word} → " in output


@pytest.mark.parametrize(
    "line",
    [
        "# rewiring, background, ground truth",
        "held_out = 1  # it is held in memory, looked at and settled",
        "os.walk(folder)",
        'text = "a target, a trial, a sweep, a way"',
    ],
)
def test_other_senses_of_a_word_are_let_alone(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "src" / "secateur" / "graph"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(f"{line}\n")
    assert "0 retired words in 1 texts" in printed(
        "vocabulary", "--root", str(tmp_path), "--no-help"
    )


def test_the_network_climbs_where_a_higher_package_is_called_after_a_lower_one(
    tmp_path: Path,
) -> None:
    package = tmp_path / "small"
    (package / "low").mkdir(parents=True)
    (package / "__init__.py").write_text("from small.api import prune\n")
    (package / "low" / "__init__.py").write_text("from small.low.sizes import Sizes, size\n")
    (package / "low" / "sizes.py").write_text(
        "class Sizes:\n    def total(self):\n        return 1\n\n\n"
        "def size(model) -> Sizes:\n    return Sizes()\n"
    )
    (package / "middle.py").write_text(
        "from small.low import size\n\n\ndef cut(model):\n    return size(model)\n\n\n"
        "def refit(smaller, model):\n    return smaller\n"
    )
    (package / "api.py").write_text(
        "from small import middle\nfrom small.low import size\n\n\n"
        "def prune(model, other):\n    size(other)\n    smaller = middle.cut(model)\n"
        "    smaller.total()\n    return middle.refit(smaller, model)\n"
    )
    output = printed("architecture", "--source", str(package), "--journey")
    assert "longest chain of imports: 4 of" in output
    assert "`model` enters 3 modules and 4 functions, and climbs 1 times" in output
    assert "up from small.low.sizes to small.middle" in output
    assert "small.low.sizes  Sizes.total" not in output  # `cut` does not say what it returns


def test_a_function_that_is_too_long_is_reported(tmp_path: Path) -> None:
    package = tmp_path / "small"
    package.mkdir()
    lines = ["def prune(model):", *["    model += 1"] * 90]
    (package / "api.py").write_text("\n".join(lines))
    output = printed("architecture", "--source", str(package))
    assert "small.api.prune: 91 lines, at most 80" in output


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("import torch\n\ntorch._dynamo.reset()", "torch._dynamo"),
        ("from torch.nn import modules as m\n\nm.conv._ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("from torch.fx.experimental import proxy_tensor", "torch.fx.experimental.proxy_tensor"),
        ("def name(node):\n    return node.target._schema.name", "._schema"),
        ("network = lambda model: getattr(model, '_orig_mod')", "._orig_mod"),
        ("def mark(state):\n    state._metadata = {}", "._metadata"),
        ("NAME = 'torch._subclasses.fake_tensor'", "torch._subclasses.fake_tensor"),
    ],
)
def test_what_torch_does_not_document_is_named_in_one_module(
    line: str, name: str, tmp_path: Path
) -> None:
    package = tmp_path / "small"
    (package / "runtime").mkdir(parents=True)
    internals = package / "runtime" / "torch_internals.py"
    internals.write_text(f"{line}\n")
    assert "uses, 0 elsewhere" in printed("architecture", "--source", str(package))
    internals.rename(package / "graph.py")
    output = printed("architecture", "--source", str(package))
    number = len(line.splitlines())
    assert f"graph.py:{number}: {name} is not documented by torch" in output


@pytest.mark.parametrize(
    "line",
    [
        "import torch\n\nprint(torch.__version__)",
        "import os\n\nos._exit(1)",
        "class Tally:\n    def __init__(self):\n        self._count = 0\n        other._count = 1",
        "PREFIX = '_orig_mod.'",
        "import torch\n\naten = torch.ops.aten\naten._to_copy",
        "def names(batch):\n    return batch._fields",
    ],
)
def test_other_names_with_an_underscore_are_let_alone(line: str, tmp_path: Path) -> None:
    package = tmp_path / "small"
    package.mkdir()
    (package / "graph.py").write_text(f"{line}\n")
    assert "0 uses, 0 elsewhere" in printed("architecture", "--source", str(package))
