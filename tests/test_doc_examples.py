"""Every example in README and docs does what the page says."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from typer.main import get_command

from layouts import random_pixels
from secateur import data
from secateur.cli import app
from secateur.data import preprocessing
from secateur.experiments import onnx_export as export
from secateur.models import zoo
from secateur.pipeline import scoring_context, synthetic_data
from secateur.runtime.timing import Rounds
from secateur.training.synthetic_images import Descent

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = ("lightning", "monai", "timm", "transformers")
"""Packages that examples may use and that need not be installed."""
SMALL = preprocessing.Preprocessing(64, 73)
CLASSES = ("cat", "dog", "horse")


@dataclass(frozen=True)
class Block:
    """A fenced part of a page."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.stem}: {self.text.strip().splitlines()[0][:50]}"


def blocks(page: Path) -> list[Block]:
    blocks = re.findall(r"^```([a-z]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page, language, text) for language, text in blocks]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(page: Path) -> list[str]:
    """The command lines of a page in their order, each as one line."""
    texts = [block.text for block in blocks(page) if block.language == "console"]
    joined = "\n".join(texts).replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def arguments_of(command: str) -> list[str] | None:
    """What follows `secateur` in a command line, however it is launched."""
    words = shlex.split(command)
    return words[words.index("secateur") + 1 :] if "secateur" in words else None


@pytest.mark.parametrize(
    "block",
    [
        # The front page's prunes a ResNet-18.
        pytest.param(block, marks=pytest.mark.slow if block.page.stem == "index" else ())
        for block in BLOCKS
        if block.language == "python"
    ],
    ids=str,
)
def test_python_examples_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if 'secateur.load("runs/finetuned")' in block.text:
        pytest.skip("run with the commands of its page")
    if "hf://" in block.text:
        pytest.skip("needs the network; test_hub has a server of its own")
    if block.page.stem == "ultralytics":
        pytest.skip("run in order, with a network and data, by test_ultralytics")
    for package in OPTIONAL:
        if re.search(rf"^(import|from) {package}\b", block.text, re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic_data, "FROM_NOISE", Descent(steps=10, learning_rate=0.1))
    exec(compile(block.text, block.page.name, "exec"), {"__name__": block.page.stem})


@pytest.mark.parametrize(
    "command",
    [command for page in PAGES for command in commands(page) if arguments_of(command)],
)
def test_commands_name_options_that_exist(command: str) -> None:
    arguments = arguments_of(command)
    assert arguments
    if arguments == ["secateur"]:  # pip install secateur
        return
    group = get_command(app.app)
    name, subcommand, rest = group.resolve_command(  # type: ignore[attr-defined]
        group.make_context("secateur", list(arguments), resilient_parsing=True), arguments
    )
    context = subcommand.make_context(name, list(rest), resilient_parsing=True)
    assert not context.args
    options = {text for parameter in subcommand.params for text in parameter.opts}
    options |= {text for parameter in subcommand.params for text in parameter.secondary_opts}
    flags = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert flags <= options


def test_every_command_line_is_marked_as_one() -> None:
    for block in BLOCKS:
        if block.language == "console":
            for line in block.text.replace("\\\n", " ").splitlines():
                assert line.startswith("$ "), line


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: photos in three classes, and weights for other ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "LATENCY_ROUNDS", Rounds(1, 1))  # times are not looked at
    # The networks of the pages are trained for a moment, on a few images.
    monkeypatch.setattr(scoring_context, "find_doubt_about", lambda *_, **__: None)
    monkeypatch.setattr(zoo, "preprocessing", lambda _: SMALL)  # a tenth of the pixels
    for part, count in (("train", 12), ("test", 3)):
        for number, name in enumerate(CLASSES):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for place, pixels in enumerate(random_pixels(count, 40, 48, 3, seed=number)):
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{place}.jpg")
    published = zoo.load("torchvision:mobilenet_v3_small", num_classes=1000)
    torch.save(published.state_dict(), tmp_path / "mobilenet_v3_small-047dcff4.pth")
    return tmp_path


def run_all(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every command of a page but the installation, one after the other."""
    for command in commands(page):
        if command.startswith("pip "):
            continue
        arguments = arguments_of(command)
        assert arguments, command
        monkeypatch.setattr("sys.argv", ["secateur", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert not ended.value.code, command


def test_the_commands_of_the_readme_are_those_of_the_tutorial() -> None:
    tutorial = [
        " ".join(command.split())
        for command in commands(ROOT / "docs" / "tutorial" / "first_prune.md")
    ]
    readme = [" ".join(command.split()) for command in commands(ROOT / "README.md")]
    assert len(readme) > 4
    assert [command for command in tutorial if command in readme] == readme


@pytest.mark.slow
def test_the_commands_of_the_tutorial(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all(ROOT / "docs" / "tutorial" / "first_prune.md", monkeypatch)
    (example,) = (
        block.text
        for block in blocks(ROOT / "docs" / "tutorial" / "first_prune.md")
        if block.language == "python"
    )
    names: dict[str, torch.nn.Module] = {}
    exec(compile(example, "tutorial.md", "exec"), names)
    images = data.load(f"folder:{workplace / 'photos'}").test
    prepare = zoo.preprocessing("torchvision:mobilenet_v3_small")
    pixels = prepare.normalise(images.read(torch.arange(3), prepare))
    assert len(list((workplace / "charts").glob("*.png"))) == 4
    assert (workplace / "runs" / "finetuned" / "model.onnx").is_file()
    assert names["network"](pixels).shape == (3, len(CLASSES))


def test_the_commands_for_a_network_of_ones_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "how_to" / "your_network.md"
    (code,) = (block.text for block in blocks(page) if block.text.startswith("# blobs.py"))
    (workplace / "blobs.py").write_text(code)
    run_all(page, monkeypatch)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(  # type: ignore[no-untyped-call]
        ROOT / "docs" / "tutorial" / "first_steps.ipynb", as_version=4
    )
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    (shown,) = (
        output.data["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    )
    assert "<td>refit</td>" in shown
    assert (tmp_path / "digits.html").stat().st_size > 1e5
