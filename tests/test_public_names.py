"""The public names, which users import, as `__all__` lists them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import secateur


def test_public_names() -> None:
    assert set(secateur.__all__) == {
        *("DataSet", "PruneResult", "PruningPlan", "RunConfig", "RunResult", "Score"),
        *(
            "SecateurError",
            "Budget",
            "DependencyGraph",
            "apply_plan",
            "estimate",
            "evaluate",
            "load",
            "load_data",
            "export_onnx",
            "Estimate",
            "ExportResult",
            "OutputPart",
        ),
        *(
            "load_model",
            "load_program",
            "make_plan",
            "build_dependency_graph",
            "prune",
            "push",
            "run",
            "save",
        ),
    }
    assert all(hasattr(secateur, name) for name in secateur.__all__)
    assert secateur.__doc__


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(secateur) == sorted(secateur.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="prun"):
        secateur.prun  # noqa: B018


@pytest.mark.parametrize(
    "line",
    [
        "import secateur",
        "import secateur.cli",
        "from secateur.cli.commands import prune, inspect, compare",
        "from secateur.cli.completion import networks; networks('')",
    ],
)
def test_the_front_door_imports_no_torch(line: str) -> None:
    heavy = "{'torch', 'torchvision', 'matplotlib', 'accelerate', 'onnx', 'numpy'}"
    code = f"{line}; import sys; sys.exit(str({heavy} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
