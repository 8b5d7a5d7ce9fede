"""Run folders on the Hugging Face Hub: pushed, loaded again, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_server import Hub, Repository, mock_hub
from networks import random_images
from runs import DigitsRun
from secateur.cli import main
from secateur.experiments.manifest import read_manifest
from secateur.experiments.model_card import model_card
from secateur.experiments.push import push
from secateur.experiments.run_folder import load, load_program
from secateur.pipeline.verdict import verdict
from secateur.runtime.errors import HubError, RunFolderError, UsageError

pytest.importorskip("huggingface_hub")
# What huggingface_hub 2.4 does itself, in uploads that do not go through Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with mock_hub(tmp_path) as server:
        yield server


def test_a_pushed_run_is_loaded_to_the_last_bit(digits_run: DigitsRun, hub: Hub) -> None:
    images = random_images(4, 32)
    expected = load(digits_run.folder)(images)

    url = push(digits_run.folder, "me/small", private=True, message="half of the MACs")
    repository = hub.repositories["me/small"]
    repository.branches["main"] |= {"pytorch_model.bin": b"a pickle", "code.py": b"1 / 0"}
    loaded = load("hf://me/small")
    program = load_program("hf://me/small@main")

    assert url.startswith(f"{hub.url}/me/small/commit/")
    assert repository.private
    assert repository.messages == ["half of the MACs"]
    assert torch.equal(loaded(images), expected)
    assert torch.allclose(program(images), expected, rtol=1e-5, atol=1e-6)
    pushed = {
        "README.md",
        "result.json",
        *json.loads(repository.branches["main"]["manifest.json"])["files"],
    }
    assert set(repository.branches["main"]) == {
        *pushed,
        "manifest.json",
        "pytorch_model.bin",
        "code.py",
    }
    assert set(hub.served) == {*pushed, "manifest.json"} - {"README.md", "result.json"}


def test_a_damaged_file_in_a_repository_is_refused(digits_run: DigitsRun, hub: Hub) -> None:
    push(digits_run.folder, "me/small", revision="v2", card=False)
    files = hub.repositories["me/small"].branches["v2"]
    files["plan.json"] += b" "

    assert hub.repositories["me/small"].branches["main"] == {}
    assert "README.md" not in files
    with pytest.raises(RunFolderError, match=r"plan.json is not the file that was written"):
        load("hf://me/small@v2")


def test_a_damaged_folder_is_not_pushed(digits_run: DigitsRun, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits_run.folder, tmp_path / "copy"))
    (folder / "plan.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"plan.json is not the file"):
        push(folder, "me/small")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "hf://me/none",
            "no repository me/none that you may read: check its name; if private, log",
        ),
        ("hf://me/open@v9", "me/open has no branch, tag or commit 'v9'"),
        ("hf://me/gated", "me/gated is gated: ask for access on its page, then log in"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(hub: Hub, address: str, message: str) -> None:
    hub.repositories |= {"me/open": Repository(), "me/gated": Repository(gated=True)}
    with pytest.raises(HubError) as caught:
        load(address)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_that_is_none_is_refused() -> None:
    for text in ("hf://small", "hf://me/small@", "hf://me/small/plan.json", "hf://../x"):
        with pytest.raises(UsageError, match="is not a repository on the Hub: write OWNER/NAME"):
            load(text)


def test_without_a_network_the_error_says_so(
    hub: Hub, digits_run: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for action in (lambda: load("hf://me/small"), lambda: push(digits_run.folder, "me/small")):
        with pytest.raises(HubError, match=r"the Hub can't be reached to (read|write) me/small"):
            action()


def test_without_a_token_nothing_is_pushed(
    digits_run: DigitsRun, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="does not let you write to me/small: log in with hf auth"):
        push(digits_run.folder, "me/small")
    assert hub.repositories == {}


def test_a_public_repository_is_not_taken_for_a_private_one(
    digits_run: DigitsRun, hub: Hub
) -> None:
    hub.repositories["me/open"] = Repository()
    with pytest.raises(HubError, match="me/open exists and is public"):
        push(digits_run.folder, "me/open", private=True)
    assert hub.repositories["me/open"].branches == {"main": {}}


def test_the_card_states_what_the_result_does(digits_run: DigitsRun) -> None:
    from huggingface_hub import ModelCard

    result = digits_run.result
    text = model_card(
        "me/small", read_manifest(digits_run.folder), result, base_model="me/resnet20"
    )
    data: Any = ModelCard(text, ignore_metadata_errors=False).data

    after = result.stages[-1].score
    [score] = data.eval_results
    assert (data.library_name, data.base_model) == ("secateur", "me/resnet20")
    assert (score.task_type, score.dataset_name, score.metric_type, score.metric_value) == (
        "image-classification",
        "digits",
        "accuracy",
        round(100 * after.metric, 2),
    )
    assert verdict(result) in text
    assert f"| {100 * after.metric:.2f} % |" in text
    assert f"{after.latency_ms:.1f} ms |" in text
    assert 'secateur.load("hf://me/small")' in text


def test_the_card_of_a_folder_without_a_result_has_no_figures(digits_run: DigitsRun) -> None:
    text = model_card("me/small", read_manifest(digits_run.folder), None)
    assert "## Use" in text
    assert "## Scores" not in text


def test_the_command_prints_the_commit(
    digits_run: DigitsRun,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["secateur", "push", str(digits_run.folder), "me/a", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["repo"] == "me/a"
    assert "/me/a/commit/" in printed["commit"]


def test_a_repository_is_scored_by_its_address(
    digits_run: DigitsRun,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push(digits_run.folder, "me/small")
    monkeypatch.setattr("sys.argv", ["secateur", "evaluate", "hf://me/small", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    last = digits_run.result.stages[-1].score
    assert (printed["metric"], printed["macs"]) == (last.metric, last.macs)
