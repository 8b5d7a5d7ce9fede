"""Run folders: written whole or not at all, loaded to the last bit, refused when damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runs import DigitsRun, outputs, small_config
from secateur import bundle, data, models, pipeline
from secateur.errors import RunFolderError, UsageError


@pytest.fixture
def folder(digits_run: DigitsRun, tmp_path: Path) -> Path:
    """A copy of a run folder, to be damaged."""
    return Path(shutil.copytree(digits_run.folder, tmp_path / "copy"))


def test_loaded_in_a_new_process_outputs_are_bit_equal(
    model_file: Path, digits_run: DigitsRun, tmp_path: Path
) -> None:
    code = (
        "import sys, torch, secateur\n"
        "torch.set_num_threads(1)\n"
        "model = secateur.load(sys.argv[1])\n"
        "generator = torch.Generator().manual_seed(1)\n"
        "images = torch.rand(4, 3, 32, 32, generator=generator)\n"
        "with torch.inference_mode():\n"
        "    torch.save(model(images), sys.argv[2])\n"
    )
    answers = tmp_path / "answers.pt"
    arguments = [sys.executable, "-c", code, str(digits_run.folder), str(answers)]
    subprocess.run(arguments, check=True)
    expected = outputs(bundle.load(digits_run.folder))
    assert torch.equal(torch.load(answers, weights_only=True), expected)


def test_save_then_load_is_identity(model_file: Path, tmp_path: Path) -> None:
    config = small_config(model_file)
    model = models.load(config.model.name, num_classes=10)
    pruned = pipeline.prune(model, data.load("digits"), config)
    bundle.save(tmp_path, pruned.model, pruned.plan, pruned.result.config)
    loaded = bundle.load(tmp_path, architecture=models.load(config.model.name, seed=5))
    assert torch.equal(outputs(loaded), outputs(pruned.model))
    assert not loaded.training


def test_a_folder_is_not_trusted_to_run_code(model_file: Path, tmp_path: Path) -> None:
    config = small_config(model_file)
    pipeline.run(config, tmp_path / "run")
    with pytest.raises(UsageError, match="code of your own"):
        bundle.load(tmp_path / "run")


def test_incomplete_folder_is_refused(folder: Path) -> None:
    (folder / "plan.json").unlink()
    with pytest.raises(RunFolderError, match=r"no plan\.json in .* not a complete run folder"):
        bundle.load(folder)


def test_changed_plan_is_refused(folder: Path) -> None:
    plan = folder / "plan.json"
    plan.write_text(plan.read_text().replace("layer1.0.conv1", "layer1.1.conv1", 1))
    with pytest.raises(RunFolderError, match="has been changed"):
        bundle.load(folder)


def test_weights_of_another_plan_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, {"format": bundle.FORMAT, "plan": "0" * 64})
    with pytest.raises(RunFolderError, match="belong to another plan"):
        bundle.load(folder)


def test_weights_of_another_format_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights)
    with pytest.raises(RunFolderError, match="not of the format"):
        bundle.load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RunFolderError, match=r"model\.safetensors can't be read"):
        bundle.load(folder)


def test_missing_tensor_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(weights)
    del tensors["linear.bias"]
    save_file(tensors, weights, metadata)
    with pytest.raises(RunFolderError, match=r"don't fit the plan.*linear\.bias"):
        bundle.load(folder)


def test_folder_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(RunFolderError, match="not empty"),
        bundle.new_run_folder(tmp_path, overwrite=False),
    ):
        pass
    with (
        pytest.raises(RunFolderError, match="something other than a run"),
        bundle.new_run_folder(tmp_path, overwrite=True),
    ):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_older_run_is_replaced_only_at_the_end(folder: Path) -> None:
    old = (folder / "plan.json").read_text()
    with bundle.new_run_folder(folder, overwrite=True) as temporary:
        (temporary / "plan.json").write_text("new")
        assert (folder / "plan.json").read_text() == old
    assert (folder / "plan.json").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_older_run_survives_an_error(folder: Path) -> None:
    old = (folder / "plan.json").read_text()

    def interrupted() -> None:
        with bundle.new_run_folder(folder, overwrite=True) as temporary:
            (temporary / "plan.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "plan.json").read_text() == old
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_file_is_not_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        bundle.check_free(tmp_path / "a", overwrite=True)
