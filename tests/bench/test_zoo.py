from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

import coverage
import third_party
from coverage import (
    is_cut,
    is_equivalent,
    is_within,
    page,
    summary_table,
    third_party_counts,
)
from rows import ROOT, Row, put_row, read_rows
from zoo import (
    TIMM_RELEASE,
    Member,
    build,
    members,
    of_side,
    outputs_of,
    random_images,
    random_inputs,
    randomise_constants,
    randomise_statistics,
)


def test_every_member_exists_once_and_most_families_are_there() -> None:
    timm = pytest.importorskip("timm")
    zoo = members()
    names = [member.name for member in zoo]
    assert len(set(names)) == len(names)
    families = [member.name for member in zoo if member.part == "timm"]
    assert len(families) >= 85
    missing = [name for name in families if not timm.is_model(name.removeprefix("timm:"))]
    assert not missing or Version(timm.__version__) < Version(TIMM_RELEASE)
    assert sum(member.part == "torchvision" for member in zoo) >= 67


LEAST = {
    "smp": 12,
    "monai": 10,
    "pytorchcv": 15,
    "transformers": 6,
    "restoration": 6,
    "signals": 5,
    "video": 3,
    "several inputs": 3,
}
"""Networks of each part of `third_party`, at least."""


def test_there_are_networks_of_other_packages_for_every_kind_of_task() -> None:
    assert list(third_party.PARTS) == list(third_party.TITLES) == list(LEAST)
    assert all(len(third_party.PARTS[part]) >= least for part, least in LEAST.items())
    assert third_party.packages_of("signals", "EEGNet (braindecode)") == ("braindecode",)
    assert third_party.packages_of("signals", "M5") == ()
    change = third_party.packages_of("several inputs", "change detection (smp Unet/resnet18)")
    assert change == ("segmentation-models-pytorch",)


@pytest.mark.parametrize(
    "member",
    [
        member
        for member in members()
        if member.part in ("restoration", "signals", "several inputs") and "(" not in member.name
    ],
    ids=lambda member: member.name,
)
def test_networks_of_papers_run(member: Member) -> None:
    model = build(member, 0)
    outputs = outputs_of(model, random_inputs(member, 3, 1))
    assert all(len(value) == 3 and bool(value.isfinite().all()) for value in outputs)


def test_the_page_shows_networks_of_other_packages() -> None:
    row = {
        **row_of("signals:M5", "secateur.prune"),
        "part": "signals",
        "metric_cut": 0.5,
        "metric_refit": 0.75,
        "wall_seconds": 9.7,
    }
    refused = {"outcome": "failed", "reason": "TargetError: it | can't", "part": "restoration"}
    text = page([row, {**row, **refused, "network": "restoration:EDSR"}])
    assert "| M5 | 1×8000 | 40 of 90 | 50.0 % | 1e-07 | 0.50, 0.75 | 10 | – |" in text
    assert "| EDSR | 3×32×32 | TargetError: it / can't | | | | | |" in text
    assert "| Signals, 1-D | 1 | 1 | 1 | 1 | 0 |" in text


def test_nearly_all_networks_of_other_packages_are_pruned_and_refit() -> None:
    rows = read_rows(coverage.RESULTS)
    for part, least in LEAST.items():
        assert third_party_counts(rows, part)[3] >= least, part
    networks, cut, equal, refit, refused = third_party_counts(rows)
    assert refit >= 0.95 * networks
    assert (cut, equal) == (refit, refit)
    assert refit + refused == networks
    readme = (ROOT / "README.md").read_text()
    assert f"| other packages | {refit} of {networks} networks of " in readme


def test_a_network_of_the_zoo_depends_on_its_seed_alone() -> None:
    member = Member("torchvision:shufflenet_v2_x0_5", "torchvision", of_side(64))
    one, other = build(member, 0).state_dict(), build(member, 0).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = build(member, 1).state_dict()
    assert not torch.equal(one["fc.weight"], different["fc.weight"])


def test_constant_initial_weights_become_random(generator: torch.Generator) -> None:
    norm, linear = nn.BatchNorm2d(50), nn.Linear(3, 4)
    scale = nn.Parameter(torch.full((50,), 1e-6))
    before = linear.weight.detach().clone()
    randomise_constants([*norm.parameters(), scale, *linear.parameters()], generator)
    assert torch.equal(linear.weight, before)
    for parameter in (norm.weight, scale):
        assert len(parameter.unique()) > 40
        assert bool(((parameter >= 0.5) & (parameter < 1.5)).all())
    assert len(norm.bias.unique()) > 40
    assert bool((norm.bias < 0).any())
    assert bool((norm.bias > 0).any())


class Deep(nn.Module):
    """Twenty layers: with the statistics that norms start with the signal would fade."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=False) for _ in range(20))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(20))
        for weight in self.convs.parameters():
            nn.init.normal_(weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x))) + 0.01
        return x


def test_norms_get_statistics_that_keep_the_signal_alive(generator: torch.Generator) -> None:
    model = Deep().eval()
    images = random_images(4, 8, 0)
    randomise_statistics(model, images, generator, disturbed=True)
    assert not any(module.training for module in model.modules())
    assert all(norm.momentum == 0.1 for norm in model.norms)
    with torch.no_grad():
        outputs = model(images)
    assert 0.1 < float(outputs.std()) < 10


def row_of(network: str, tool: str, **more: object) -> Row:
    return {
        "network": network,
        "tool": tool,
        "outcome": "ok",
        "environment": {"torch": "2"},
        "macs_left": 0.5,
        "change": 0.7,
        "equivalence_error": 1e-7,
        "parameters_without_gradient": [],
        "channels": 90,
        "channels_cut": 40,
        "frozen_channels": {},
        "dependency_graph_seconds": 1.0,
        "surgery_seconds": 0.5,
        "graph_seconds": 1.0,
        "cut_seconds": 2.0,
        **more,
    }


def test_rows_replace_those_of_the_same_network_and_tool(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.json"
    for left in (0.6, 0.5):
        put_row(path, row_of("one", "secateur", macs_left=left), ("network", "tool"))
    put_row(path, row_of("one", "torch-pruning"), ("network", "tool"))
    assert [(row["tool"], row["macs_left"]) for row in read_rows(path)] == [
        ("secateur", 0.5),
        ("torch-pruning", 0.5),
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.json"]


def test_channels_that_count_as_cut() -> None:
    good = row_of("one", "secateur")
    assert is_cut(good)
    assert not is_cut(None)
    assert not is_cut({**good, "outcome": "timeout"})
    assert not is_cut({**good, "change": 0.0})
    assert not is_cut({**good, "parameters_without_gradient": ["conv.weight"]})
    assert not is_cut({**good, "is_finite": False})
    assert is_within({**good, "macs_left": 0.54}, 5)
    assert not is_within({**good, "macs_left": 0.54}, 3)
    assert is_equivalent(good)
    assert not is_equivalent({**good, "equivalence_error": 1e-4, "change": 0.01})


def test_the_page_shows_failures() -> None:
    rows = [
        row_of("torchvision:alexnet", "secateur", frozen_channels={"no rule for 'x'": 10}),
        row_of("torchvision:alexnet", "torch-pruning", outcome="failed", reason="It | broke"),
    ]
    text = page(rows)
    assert "| alexnet, 224 | 40 of 100 | 50.0 % | 1e-07 | 1.50 | 10: no rule for 'x' |" in text
    assert "failed at start: It \\| broke" in text
    assert "| no rule for 'x' | 10 | 1 |" in text
    assert "| 1 of 1 measured |" in summary_table(rows)


def test_the_page_is_that_of_the_result_file() -> None:
    assert page(read_rows(coverage.RESULTS)) == coverage.DOCS.read_text()
