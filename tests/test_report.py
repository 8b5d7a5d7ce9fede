"""The report: one file, complete, offline, with text from outside escaped."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from runs import DigitsRun
from secateur.experiments.compare.results import Row, to_lines
from secateur.experiments.report.benchmark import ROWS
from secateur.experiments.report.layers import SHORTEST, filter_heights
from secateur.experiments.report.page import count_text, score_rows, write_report
from secateur.experiments.report.run_charts import tradeoff
from secateur.experiments.report.stage_chart import make_stage_chart
from secateur.experiments.run import report
from secateur.models.score import OutputDivergence
from secateur.pipeline.result import Stage, StageResult
from secateur.pruning.outcome import BatchNormRecalibration, SizeTrial
from secateur.runtime.errors import DataError, UsageError, WriteError
from secateur.training.outcome import Distillation, DistillEpoch, Epoch


class Page(HTMLParser):
    """Collects tags, visible text and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        addresses = [v for k, v in attrs if k in ("src", "href") and v is not None]
        self.fetched += [v for v in addresses if not v.startswith("#")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(digits_run: DigitsRun) -> Page:
    return Page((digits_run.folder / "report.html").read_text())


def test_page_is_well_formed_and_fetches_nothing(page: Page) -> None:
    assert page.open == []
    assert page.fetched == []
    assert "main" in page.tags
    assert page.tags.count("h1") == 1


def test_every_stage_layer_and_reason_is_there(page: Page, digits_run: DigitsRun) -> None:
    text = " ".join(page.texts)
    for row in score_rows(digits_run.result):
        assert row["top-1 %"] in text
        assert row["MACs"] in text
    for group in digits_run.result.groups:
        kept = group.filters - len(group.removed)
        assert f"{group.name} {group.filters} {kept} {len(group.removed)}" in " ".join(text.split())
    for frozen in digits_run.result.frozen:
        assert frozen.reason in text
    assert digits_run.result.plan_hash[:16] in text


@pytest.mark.parametrize(
    "scores",
    [
        (0.0, 4.0, 1.0),
        (1e-9, 5.0, 1e-3, 1e-6),  # uneven, as gradients are
        (-3.0, -1.0, -2.0, -1.0),
        (2.0, 2.0),
        (7.0,),
    ],
)
def test_bars_fall_from_the_best_filter_on_and_all_are_seen(
    scores: tuple[float, ...], digits_run: DigitsRun
) -> None:
    group = digits_run.result.groups[0].model_copy(
        update={"scores": scores, "filters": len(scores), "removed": (0,)}
    )
    bars = filter_heights(group)
    heights = [height for _, height in bars]
    ranked = [scores[filter_] for filter_, _ in bars]
    assert ranked == sorted(scores, reverse=True)
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == 1
    assert min(heights) >= SHORTEST
    for one, other in itertools.pairwise(range(len(scores))):
        assert (ranked[one] > ranked[other]) == (heights[one] > heights[other])


def test_recalibration_and_distillation_are_shown(digits_run: DigitsRun, tmp_path: Path) -> None:
    recalibration = BatchNormRecalibration("means", 0.25, 0.5125, 0.4875)
    before, after = OutputDivergence(0.4875, 0.8125), OutputDivergence(0.3125, 0.9375)
    distillation = Distillation(before, (DistillEpoch(Epoch(1, 0.1234, 0.0), after),), 1)
    result = digits_run.result.model_copy(
        update={"batchnorm_recalibration": recalibration, "distillation": distillation}
    )
    write_report(result, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    text = " ".join(page.texts)
    assert page.open == []
    assert "means moved 25% of the way" in text
    for number in ("0.5125", "0.4875", "0.3125", "81.25", "93.75", "0.1234"):
        assert number in text
    assert "the weights of epoch 1 were kept" in text


def test_text_from_outside_is_escaped(page: Page, digits_run: DigitsRun) -> None:
    assert page.tags.count("script") == 2  # the data and what shows it
    assert "<script>alert(1)</script>" in " ".join(page.texts)


def test_names_from_data_are_escaped(digits_run: DigitsRun, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    group = digits_run.result.groups[0].model_copy(update={"name": evil})
    result = digits_run.result.model_copy(update={"groups": (group,)})
    write_report(result, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "img" not in page.tags
    assert evil in " ".join(page.texts)


@pytest.mark.slow
def test_it_is_written_anew_with_other_images(digits_run: DigitsRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(digits_run.folder, folder)
    before = (folder / "report.html").read_text()
    assert report(folder) == (folder / "report.html",)
    assert (folder / "report.html").read_text() == before  # the same to the last letter
    report(folder, images=20)
    assert "of 20 calibration images" in (folder / "report.html").read_text()
    report(folder, images=0, named={"data.source": "folder:nowhere"})  # no data is read
    page = Page((folder / "report.html").read_text())
    assert "with its strongest responses" not in " ".join(page.texts)
    with pytest.raises(DataError, match="no folder nowhere"):
        report(folder, named={"data.source": "folder:nowhere"})
    assert Page((folder / "report.html").read_text()).texts == page.texts


def test_charts_are_pictures_too(digits_run: DigitsRun, tmp_path: Path) -> None:
    row = Row(
        network="resnet20",
        variant="",
        criterion="l1",
        target="macs=0.5",
        seed=0,
        outcome="done",
        reason="",
        score_on="test",
        images=450,
        before_top1_fraction=0.99,
        top1_fraction=0.9,
        macs_left=0.5,
        parameters_left=0.5,
        latency_left=0.7,
        id="one",
    )
    benchmark = tmp_path / "benchmark"
    benchmark.mkdir()
    (benchmark / ROWS).write_text(to_lines([row]))
    written = report(digits_run.folder, images=30, beside=benchmark, pictures=tmp_path / "charts")
    assert [path.name for path in written] == [
        f"resnet20-{name}.png" for name in ("tradeoff", "filters", "scores", "concepts")
    ]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file can't be written"):
        report(digits_run.folder, images=0, pictures=tmp_path / "file")
    with pytest.raises(UsageError, match=r"no benchmark in .*: name a folder"):
        report(digits_run.folder, images=0, beside=tmp_path)


def test_a_trade_off_shows_a_benchmark_and_sizes_that_were_tried(digits_run: DigitsRun) -> None:
    trials = (SizeTrial(1.0, 0.99, kept=True), SizeTrial(0.6, 0.9, kept=False))
    drawing = tradeoff(digits_run.result.model_copy(update={"size_trials": trials})).svg()
    for text in ("this run", "sizes tried (validation images)", ">before<", ">finetuned<"):
        assert text in drawing
    assert ">cut<" not in drawing  # the refit repairs it
    assert "sizes tried" not in tradeoff(digits_run.result).svg()


def test_the_axis_of_the_stages_ends_near_their_values(digits_run: DigitsRun) -> None:
    def stage(name: Stage, metric: float, number: int = 1) -> StageResult:
        score = replace(digits_run.result.stages[0].score, metric=metric)
        return StageResult(stage=name, round=number, score=score, seconds=0.0)

    stages = (
        stage("before", 0.9),
        stage("cut", 0.1),
        stage("refit", 0.8),
        stage("cut", 0.2, 2),
        stage("refit", 0.85, 2),
    )
    chart = make_stage_chart(digits_run.result.model_copy(update={"stages": stages}))
    assert [(mark.name, mark.text) for mark in chart.marks] == [
        ("before", "90.00 %"),
        ("refit", "80.00 %"),
        ("refit (2)", "85.00 %"),
    ]
    assert [mark.place for mark in chart.marks] == pytest.approx([90.32, 9.68, 50], abs=0.01)
    assert [mark.text for mark in chart.unscaled] == ["10.00 %", "20.00 %"]
    assert [tick.text for tick in chart.ticks] == ["80", "85", "90"]
    alone = make_stage_chart(digits_run.result.model_copy(update={"stages": stages[:2]}))
    assert [mark.name for mark in alone.marks] == ["before", "cut"]
    assert alone.unscaled == ()


def test_sensitivity_is_a_table_too(digits_run: DigitsRun) -> None:
    rows = digits_run.result.sensitivity_rows()
    assert len(rows) == sum(group.filters + 1 for group in digits_run.result.groups)
    group = digits_run.result.groups[0]
    assert rows[1] == {
        "layer": group.name,
        "filters": group.filters,
        "removed": 1,
        "kept_fraction": 1 - 1 / group.filters,
        "error": group.sensitivity[1],
    }


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (40_551_040, "40.6 M"),
        (4_089_184_256, "4.09 G"),
        (2 * 10**12, "2 T"),
    ],
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert count_text(number) == text
