"""Run folders: written whole or not at all, loaded to the last bit, refused when damaged."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from networks import SIDE, make_network, random_images, random_plan, randomise_norms, wired
from runs import DigitsRun, outputs, small_config
from secateur.config import Budget
from secateur.experiments import run_folder
from secateur.experiments.manifest import read_manifest
from secateur.experiments.run import run
from secateur.graph.build import build_dependency_graph
from secateur.models import zoo
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import RunFolderError, UsageError


class Erfinv(nn.Module):
    """An operation that no program may name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(x.tanh())


@pytest.fixture
def folder(digits_run: DigitsRun, tmp_path: Path) -> Path:
    """A copy of a run folder, to be damaged."""
    return Path(shutil.copytree(digits_run.folder, tmp_path / "copy"))


IN_A_NEW_PROCESS = """
import sys, torch, secateur
torch.set_num_threads(1)
named, own, outputs = sys.argv[1:]
images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    found = [model(images) for model in (secateur.load(named), secateur.load_program(own))]
torch.save(found, outputs)
"""


@pytest.mark.slow
def test_loaded_in_a_new_process_outputs_are_bit_equal(
    model_file: Path, digits_run: DigitsRun, tmp_path: Path
) -> None:
    config = small_config(model_file)
    run(config, tmp_path / "own")
    loaded = run_folder.load(tmp_path / "own", architecture=zoo.load(config.model.name))
    model_file.unlink()  # the program needs no code
    saved = tmp_path / "outputs.pt"
    arguments = [str(path) for path in (digits_run.folder, tmp_path / "own", saved)]
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, *arguments], check=True)
    stored = torch.load(saved, weights_only=True)
    assert torch.equal(stored[0], outputs(run_folder.load(digits_run.folder)))
    assert torch.equal(stored[1], outputs(loaded))


def test_program_of_a_run_is_bit_equal(digits_run: DigitsRun) -> None:
    program = run_folder.load_program(digits_run.folder)
    loaded = run_folder.load(digits_run.folder)
    assert torch.equal(outputs(program), outputs(loaded))
    assert not program.training
    final = digits_run.result.stages[-1].score.parameters
    assert sum(parameter.numel() for parameter in program.parameters()) == final


def test_a_run_leaves_config_and_manifest(digits_run: DigitsRun) -> None:
    manifest = read_manifest(digits_run.folder)
    assert manifest.architecture == "resnet20"
    assert (manifest.num_classes, manifest.image_shape) == (10, (3, 32, 32))
    assert manifest.no_program is None
    assert set(manifest.files) == {
        *("config.toml", "plan.json", "model.safetensors", "program.json")
    }


def test_every_file_can_be_read_by_those_who_can_read_the_folder(digits_run: DigitsRun) -> None:
    modes = {path.stat().st_mode & 0o777 for path in digits_run.folder.iterdir()}
    assert len(modes) == 1


def test_save_then_load_is_identity(tmp_path: Path, generator: torch.Generator) -> None:
    model, dependencies = wired("gated")
    plan = random_plan(dependencies, generator)
    smaller = apply_plan(model, dependencies, plan)
    run_folder.save(tmp_path / "run", smaller, plan, image_shape=(3, SIDE, SIDE))
    loaded = run_folder.load(tmp_path / "run", architecture=make_network("gated", seed=5))
    images = random_images(4)
    with torch.inference_mode():
        expected = smaller(images)
        assert torch.equal(loaded(images), expected)
        assert torch.equal(run_folder.load_program(tmp_path / "run")(images), expected)
    assert not loaded.training
    with pytest.raises(UsageError, match="pass the unpruned network, or use load_program"):
        run_folder.load(tmp_path / "run")


def test_save_with_a_named_architecture(tmp_path: Path, generator: torch.Generator) -> None:
    model = zoo.load("resnet20", num_classes=7)
    randomise_norms(model, generator)
    dependencies = build_dependency_graph(model, random_images(2, side=32), prune_residual=True)
    plan = random_plan(dependencies, generator)
    smaller = apply_plan(model, dependencies, plan)
    folder = tmp_path / "run"
    run_folder.save(
        *(folder, smaller, plan),
        architecture="resnet20",
        image_shape=(3, 32, 32),
        prune_residual=True,
    )
    assert torch.equal(outputs(run_folder.load(folder)), outputs(smaller))


def test_save_keeps_files_that_exist(tmp_path: Path, generator: torch.Generator) -> None:
    model, dependencies = wired("chain")
    plan = random_plan(dependencies, generator)
    smaller = apply_plan(model, dependencies, plan)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty"):
        run_folder.save(tmp_path, smaller, plan, image_shape=(3, SIDE, SIDE))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_save_leaves_the_mode_as_it_is(tmp_path: Path, generator: torch.Generator) -> None:
    model, dependencies = wired("chain")
    plan = random_plan(dependencies, generator)
    smaller = apply_plan(model, dependencies, plan).train()
    run_folder.save(tmp_path / "run", smaller, plan, image_shape=(3, SIDE, SIDE))
    assert all(module.training for module in smaller.modules())


def test_weights_in_double_are_refused(tmp_path: Path, generator: torch.Generator) -> None:
    model, dependencies = wired("chain")
    plan = random_plan(dependencies, generator)
    smaller = apply_plan(model, dependencies, plan).double()
    with pytest.raises(UsageError, match=r"conv1\.weight is torch\.float64"):
        run_folder.save(tmp_path / "run", smaller, plan, image_shape=(3, SIDE, SIDE))
    assert list(tmp_path.iterdir()) == []


def test_network_without_a_program_is_saved_and_says_why(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Erfinv(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    dependencies = build_dependency_graph(model, random_images(2))
    plan = PruningPlan({}, Budget("macs", 1.0), "none")
    run_folder.save(tmp_path / "run", model, plan, image_shape=(3, SIDE, SIDE))
    with pytest.raises(RunFolderError, match=r"no program: the operation aten\.erfinv can't be"):
        run_folder.load_program(tmp_path / "run")
    loaded = run_folder.load(tmp_path / "run", architecture=model)
    images = random_images(2)
    assert torch.equal(loaded(images), model(images))
    assert dependencies.frozen


def test_a_folder_is_not_trusted_to_run_code(model_file: Path, tmp_path: Path) -> None:
    config = small_config(model_file)
    run(config, tmp_path / "run")
    with pytest.raises(UsageError, match=r"user code.*load_program"):
        run_folder.load(tmp_path / "run")


LOADED = ("config.toml", "plan.json", "model.safetensors", "program.json")
LOADERS = (run_folder.load, run_folder.load_program)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", LOADED)
def test_a_changed_byte_is_refused_with_the_name_of_the_file(
    folder: Path, name: str, load: Callable[[Path], nn.Module]
) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=f"{name} is not the file that was written"):
        load(folder)


@pytest.mark.parametrize("name", LOADED)
def test_a_truncated_file_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunFolderError, match=f"{name} is not the file that was written"):
        run_folder.load(folder)


@pytest.mark.parametrize("name", ["manifest.json", *LOADED])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RunFolderError, match=f"no {name} in .* not a complete run folder"):
        run_folder.load(folder)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "program.json"])
def test_a_file_of_another_run_is_refused(
    folder: Path, name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    model, dependencies = wired("chain")
    plan = random_plan(dependencies, generator)
    other = tmp_path / "other"
    run_folder.save(other, apply_plan(model, dependencies, plan), plan, image_shape=(3, SIDE, SIDE))
    shutil.copy(other / name, folder / name)
    with pytest.raises(RunFolderError, match=rf"{name} .* taken from another run"):
        run_folder.load(folder)


def rewrite(folder: Path, **changes: object) -> None:
    """Changes the manifest and, with it, the hash of every file that it lists."""
    content = json.loads((folder / "manifest.json").read_text())
    content["files"] = {name: sha256((folder / name).read_bytes()) for name in content["files"]}
    (folder / "manifest.json").write_text(json.dumps({**content, **changes}))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "notes.txt", "a/plan.json", ""])
def test_a_manifest_that_names_other_files_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret.txt").write_text("mine")
    files = read_manifest(folder).files
    rewrite(folder, files={**files, name: sha256(b"mine")})
    with pytest.raises(RunFolderError, match=f"lists '{name}', which is not a file of a run"):
        run_folder.load(folder)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_manifest_that_leaves_a_file_out_is_refused(folder: Path, name: str) -> None:
    files = dict(read_manifest(folder).files)
    del files[name]
    rewrite(folder, files=files)
    with pytest.raises(RunFolderError, match=f"does not list {name}"):
        run_folder.load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 1}, "an older release wrote it"),
        ({"image_shape": [3, 0, 32]}, "image_shape"),
        ({"num_classes": "ten"}, "num_classes"),
        ({"surprise": 1}, "surprise"),
        ({"files": None}, "files"),
        ({"plan_hash": "0" * 64}, "another plan"),
        ({"num_classes": 9}, "made for another network"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    folder: Path, changes: dict[str, object], words: str
) -> None:
    rewrite(folder, **changes)
    with pytest.raises(RunFolderError, match=f"(?s){words}"):
        run_folder.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "\x00", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"manifest\.json can't be read"):
        run_folder.load(folder)


class Bait:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self._trace, "it was run")


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("load", LOADERS)
def test_a_planted_pickle_is_not_run(
    folder: Path, name: str, load: Callable[[Path], nn.Module]
) -> None:
    trace = folder.parent / "trace"
    for content in (pickled(Bait(trace)), archived(Bait(trace))):
        (folder / name).write_bytes(content)
        rewrite(folder)
        if name in ("config.toml", "program.json" if load is run_folder.load else "plan.json"):
            load(folder)  # does not read that file
        else:
            with pytest.raises(RunFolderError, match=rf"{name}|can't be read"):
                load(folder)
    assert not trace.exists()
    pickle.loads(pickled(Bait(trace)))
    assert trace.exists()


def pickled(value: object) -> bytes:
    return pickle.dumps(value)


def archived(value: object) -> bytes:
    """As `torch.save` and `.pt2` archives hold pickles."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_missing_tensor_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["linear.bias"]
    save_file(tensors, weights)
    rewrite(folder)
    with pytest.raises(RunFolderError, match=r"don't fit the plan.*linear\.bias"):
        run_folder.load(folder)
    with pytest.raises(RunFolderError, match=r"needs the tensor 'linear\.bias'"):
        run_folder.load_program(folder)


def test_folder_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(RunFolderError, match="not empty"),
        run_folder.new_run_folder(tmp_path, overwrite=False),
    ):
        pass
    with (
        pytest.raises(RunFolderError, match="something other than a run"),
        run_folder.new_run_folder(tmp_path, overwrite=True),
    ):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_older_run_is_replaced_only_at_the_end(folder: Path) -> None:
    old = (folder / "plan.json").read_text()
    with run_folder.new_run_folder(folder, overwrite=True) as temporary:
        (temporary / "plan.json").write_text("new")
        assert (folder / "plan.json").read_text() == old
    assert (folder / "plan.json").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_older_run_survives_an_error(folder: Path) -> None:
    old = (folder / "plan.json").read_text()

    def interrupted() -> None:
        with run_folder.new_run_folder(folder, overwrite=True) as temporary:
            (temporary / "plan.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "plan.json").read_text() == old
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_file_is_not_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        run_folder.check_free(tmp_path / "a", overwrite=True)
