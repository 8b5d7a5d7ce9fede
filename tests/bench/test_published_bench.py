"""Every published layout: its results, and anew for torchvision and the families of timm."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import timm
import torchvision

import published
from published import Case, cases, compare, is_missing
from rows import ROOT

LARGEST = 100
"""Million parameters; larger networks are left to the bench."""
RESULTS = json.loads(published.RESULTS.read_text())["cases"]


def first_cases() -> list[Case]:
    """Return the cases of torchvision, and the first of each family of timm."""
    families: Counter[str] = Counter()
    chosen = []
    for case in cases():
        name = case.network.partition(":")[2]
        if case.weights is None:
            family = timm.models.model_entrypoint(name).__module__
            families[family] += 1
            if families[family] > 1:
                continue
        if RESULTS.get(case.name, {}).get("million_parameters", LARGEST) < LARGEST:
            chosen.append(case)
    return chosen


def test_the_results_name_every_builder_of_torchvision_with_the_same_outputs() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    results = {name: row for name, row in RESULTS.items() if name.startswith("torchvision:")}
    assert {name.partition(" ")[0] for name in results} >= {f"torchvision:{n}" for n in names}
    assert all(row["outcome"] == "same" and row["outputs"] for row in results.values())


def test_no_builder_of_timm_is_loaded_differently() -> None:
    rows = [row for name, row in RESULTS.items() if name.startswith("timm:")]
    assert len(rows) >= 90
    assert all(row["outcome"] == "same" for row in rows)


def test_the_page_has_the_figures_of_the_results() -> None:
    same = sum(name.startswith("timm:") for name in RESULTS)
    page = ROOT / "docs" / "how_to" / "your_network.md"
    assert f"and of {same} of timm's 1,371 so far" in " ".join(page.read_text().split())


def test_a_case_is_run_until_it_is_the_same_and_its_outputs_are_compared() -> None:
    same = {"outcome": "same", "outputs": False, "million_parameters": 70.0}
    assert is_missing(None, 60)
    assert is_missing({"outcome": "different", "reason": "other tensors"}, 60)
    assert not is_missing(same, 60)
    assert is_missing(same, 80)
    assert not is_missing(same | {"outputs": True}, 80)


@pytest.mark.parametrize("network", ["torchvision:mnasnet0_5", "timm:fbnetc_100"])
def test_a_published_layout_is_loaded_as_by_the_library(network: str) -> None:
    weights = "IMAGENET1K_V1" if network.startswith("torchvision") else None
    result = compare(Case(network, weights), outputs_of=60)
    assert result["outcome"] == "same"
    assert result["outputs"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", first_cases(), ids=lambda case: case.name)
def test_every_published_layout_is_loaded_as_by_the_library(case: Case) -> None:
    assert compare(case, outputs_of=60)["outcome"] == "same"
