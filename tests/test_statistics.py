"""Means, spreads and differences, against scipy's own tests and by hand; and how they are shown."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from runs import DigitsRun
from secateur.config import from_dict
from secateur.experiments.compare.job import JobResult
from secateur.experiments.compare.results import Row, read_rows, row_of, to_lines
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.compare.statistics import Difference, compute_statistics, paired
from secateur.experiments.report.benchmark import (
    CHARTS,
    PAGE,
    TextTable,
    tables,
    write_benchmark,
)
from secateur.experiments.report.benchmark_charts import benchmark_charts
from secateur.experiments.report.benchmark_summary import benchmark_verdict, protocol
from secateur.pipeline.result import RunResult
from secateur.runtime.errors import RunFolderError

HOSTILE = "<img src=x onerror=alert(1)>|"


def with_accuracy(result: RunResult, percent: float) -> RunResult:
    """The result with another accuracy at the end."""
    *earlier, last = result.stages
    score = replace(last.score, metric=percent / 100)
    return result.model_copy(
        update={"stages": (*earlier, last.model_copy(update={"score": score}))}
    )


def rows(results: list[JobResult]) -> list[Row]:
    return [row_of(result) for result in results]


def job_result(criterion: str, target: str, seed: int, result: RunResult | None) -> JobResult:
    return JobResult(
        id=f"{criterion}-{target}-{seed}",
        network="net",
        variant="",
        criterion=criterion,
        target=target,
        seed=seed,
        outcome="failed" if result is None else "done",
        reason=HOSTILE if result is None else "",
        score_on="test",
        result=result,
    )


ACCURACIES = {
    ("l1", "macs=0.7"): (90.0, 91.0, 92.0),
    ("l1", "macs=0.5"): (80.0, 80.0, 80.0),
    ("vote", "macs=0.7"): (91.0, 92.1, 92.9),
    ("vote", "macs=0.5"): (81.0, 79.0, 80.0),
    ("random", "macs=0.7"): (70.0, 70.0, None),
    ("random", "macs=0.5"): (60.0, 61.0, 62.0),
}


@pytest.fixture
def spec() -> BenchmarkSpec:
    content = {
        "networks": [{"name": "resnet20", "label": "net"}],
        "criteria": ["vote", "l1", "random"],
        "seeds": 3,
        "baseline": "l1",
        "data": {"source": "digits"},
    }
    return from_dict(content, BenchmarkSpec)


@pytest.fixture
def results(digits_run: DigitsRun) -> list[JobResult]:
    return [
        job_result(
            criterion,
            target,
            seed,
            None if percent is None else with_accuracy(digits_run.result, percent),
        )
        for criterion, target in product(("vote", "l1", "random"), ("macs=0.7", "macs=0.5"))
        for seed, percent in enumerate(ACCURACIES[criterion, target])
    ]


percents = st.integers(0, 1000).map(lambda number: number / 10)


@given(st.lists(percents, min_size=2, max_size=8), st.data())
def test_differences_are_student_intervals(one: list[float], data: st.DataObject) -> None:
    other = data.draw(st.lists(percents, min_size=len(one), max_size=len(one)))
    difference = paired(dict(enumerate(one)), dict(enumerate(other)))
    assert difference is not None
    differences = [a - b for a, b in zip(one, other, strict=True)]
    assert difference.mean == pytest.approx(sum(differences) / len(differences), abs=1e-9)
    if max(differences) - min(differences) > 0.05:
        expected = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert (difference.low, difference.high) == pytest.approx(
            (expected.low, expected.high), abs=1e-6
        )


def test_seeds_that_happen_to_agree_are_not_sure() -> None:
    one, other, step = {0: 99.0, 1: 99.0}, {0: 98.8, 1: 98.8}, 0.2
    difference = paired(one, other, step)
    assert difference is not None
    # Two values, each rounded to a step: variance step² / 12 each; t of one degree: 12.706.
    assert difference.high - difference.mean == pytest.approx(
        12.706 * math.sqrt(step**2 / 6 / 2), rel=1e-3
    )
    assert difference.verdict == "not significant"


def test_only_seeds_that_both_have_are_paired() -> None:
    difference = paired({0: 1.0, 1: 5.0, 4: 2.0}, {1: 4.0, 4: 1.0, 7: 9.0})
    assert difference == Difference(1.0, 1.0, 1.0, 2)
    assert difference.verdict == "better"
    single = paired({0: 3.0}, {0: 1.0})
    assert single == Difference(2.0, -math.inf, math.inf, 1)
    assert single.verdict == "one seed"
    assert paired({0: 3.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 2.0, "better"), (-0.1, 2.0, "not significant"), (-2.0, -0.1, "worse")],
)
def test_a_verdict_is_no_stronger_than_the_interval(low: float, high: float, verdict: str) -> None:
    assert Difference((low + high) / 2, low, high, 5).verdict == verdict


def test_a_mean_over_settings_is_no_surer_than_the_images_of_all_of_them() -> None:
    """Four settings, each rounded to an image by itself; seeds that agree to the image."""
    many = [
        Row(
            id=f"{criterion} {number} {seed}",
            network="net",
            variant="",
            criterion=criterion,
            target=f"macs=0.{number}",
            seed=seed,
            outcome="done",
            score_on="test",
            images=500,
            top1_fraction=top1_fraction,
        )
        for criterion, top1_fraction in (("l1", 0.9), ("l2", 0.898))
        for number in range(1, 5)
        for seed in range(2)
    ]
    overall = compute_statistics(many, "l1").overall("l2")
    assert overall is not None
    assert overall.mean == pytest.approx(-0.2)
    expected = 12.706 * math.sqrt(0.2**2 / 6 / 4 / 2)
    assert overall.high - overall.mean == pytest.approx(expected, rel=1e-3)


def test_statistics_by_hand(results: list[JobResult]) -> None:
    stats = compute_statistics(rows(results), "l1")
    images = results[0].result.stages[-1].score.images if results[0].result else 0
    assert stats.step == 100 / images
    assert stats.methods == ("vote", "l1", "random")
    assert stats.settings == (("net", "macs=0.7"), ("net", "macs=0.5"))
    one = stats.difference("vote", ("net", "macs=0.7"))
    assert one is not None
    assert one.mean == pytest.approx(1.0)
    # Differences 1.0, 1.1, 0.9: deviation 0.1, t of 2 degrees 4.303.
    assert one.high - one.mean == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert one.verdict == "better"
    overall = stats.overall("vote")
    assert overall is not None
    # Means over settings by seed: 1.0, 0.05, 0.45.
    assert overall.mean == pytest.approx(0.5)
    assert overall.verdict == "not significant"
    lacking = stats.overall("random")
    assert lacking is not None
    assert lacking.seeds == 2
    assert lacking.verdict == "worse"
    assert [row.seed for row in stats.failures] == [2]


def test_tables_show_the_statistics(spec: BenchmarkSpec, results: list[JobResult]) -> None:
    accuracy, difference, *_, failed = tables(compute_statistics(rows(results), spec.compared_with))
    last = results[0].result.stages[-1].score if results[0].result else None
    assert last is not None
    assert last.agreement_fraction is not None
    agreement = f"{100 * last.agreement_fraction:.2f}"  # the same in every job
    assert accuracy.heads[-1] == "agreement"
    assert accuracy.rows == (
        ("vote", "92.00 ± 0.95", "80.00 ± 1.00", "86.00", agreement),
        ("l1", "91.00 ± 1.00", "80.00 ± 0.00", "85.50", agreement),
        ("random", "70.00 ± 0.00", "61.00 ± 1.00", "65.50", agreement),
    )
    assert "2 to 3 seeds" in accuracy.note
    assert difference.title == "Difference to l1"
    assert difference.rows[0][:2] == ("vote", "+1.00 [+0.75, +1.25]")
    assert difference.rows[0][-1] == "not significant"
    assert difference.rows[1][-1] == "worse"
    assert failed.rows == (("net, random, macs=0.7, seed 2", HOSTILE),)
    assert "&lt;img" in failed.markdown()
    assert "\\|" in failed.markdown()


def test_the_verdict_is_no_stronger_than_the_tables(
    spec: BenchmarkSpec, results: list[JobResult]
) -> None:
    text = benchmark_verdict(compute_statistics(rows(results), "l1"))
    assert text.startswith("vote is best in the mean over 2 settings, with 86.00 % top-1: 0.50 ")
    assert text.endswith("; not significant)")
    as_baseline = benchmark_verdict(compute_statistics(rows(results), "vote"))
    assert as_baseline.endswith("86.00 % top-1; l1 is not significantly different")
    one_seed = [result for result in results if result.seed == 0]
    assert "one seed can't tell" in benchmark_verdict(compute_statistics(rows(one_seed), "vote"))
    nothing = [job_result("vote", "macs=0.7", 0, None)]
    text = benchmark_verdict(compute_statistics(rows(nothing), spec.compared_with))
    assert text == "No method has finished every setting"


def test_the_protocol_says_what_was_compared(spec: BenchmarkSpec) -> None:
    finetune = spec.finetune.model_copy(update={"epochs": 10})
    assert protocol(spec.model_copy(update={"finetune": finetune})).startswith(
        "1 network (net) × 3 criteria × 2 targets (macs=0.7, macs=0.5) × 3 seeds, on digits with "
        "2000 calibration images. Every method runs the same steps: refit, no distillation, "
        "fine-tuned for 10 epochs. Accuracy is that after the last step, on the test images"
    )


def test_a_table_in_latex_has_rules_of_booktabs() -> None:
    table = TextTable("Top_1", ("method", "50 %"), (("a_b", "1.0 ± 0.1"), ("c", "–")), "A → B.")
    assert table.latex() == "\n".join(
        (
            r"\begin{table}",
            r"\centering",
            r"\caption{Top\_1. A $\to$ B.}",
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"method & 50 \% \\",
            r"\midrule",
            r"a\_b & 1.0 $\pm$ 0.1 \\",
            r"c & -- \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        )
    )


@pytest.mark.slow
def test_the_page_shows_text_from_outside_as_text(
    spec: BenchmarkSpec, results: list[JobResult], tmp_path: Path
) -> None:
    write_benchmark(tmp_path, spec, results, "secateur compare <x>")
    page = (tmp_path / PAGE).read_text()
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert "secateur compare &lt;x&gt;" in page
    assert not re.search(
        r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", page
    )  # nothing from elsewhere
    assert (
        page.count('<svg role="img" aria-label="') == len(list((tmp_path / CHARTS).iterdir())) == 6
    )


def test_charts_draw_the_numbers(results: list[JobResult]) -> None:
    stats = compute_statistics(rows(results), "l1")
    drawn = {chart.name: chart for chart in benchmark_charts(stats, results)}
    (axes,) = drawn["net-against-MACs"].figure.axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert set(lines) == {"vote", "l1", "random", "before pruning"}
    # All results are of one network after all, so points of equal size are in order of accuracy.
    assert list(np.asarray(lines["vote"].get_ydata())) == pytest.approx([80.0, 92.0])
    kept = drawn["net-kept"].figure.axes
    assert [axes.get_title() for axes in kept] == ["macs=0.7", "macs=0.5"]
    result = results[0].result
    assert result is not None
    texts = [text.get_text() for text in kept[0].texts]
    expected = [f"{1 - len(g.removed) / g.filters:.2f}" for g in result.groups for _ in range(3)]
    assert texts == expected
    correlation = drawn["net-rank-correlation"].figure.axes[0]
    assert {text.get_text() for text in correlation.texts} == {"1.00"}  # all of the same scores
    assert drawn["net-steps"].svg().count("<svg") == 1


def test_the_rank_correlation_is_by_layer_and_with_the_baseline(results: list[JobResult]) -> None:
    def reversed_scores(job: JobResult) -> JobResult:
        result = job.result
        if result is None or job.criterion != "vote":
            return job
        groups = tuple(
            group.model_copy(update={"scores": tuple(-score for score in group.scores)})
            for group in result.groups
        )
        return job.model_copy(update={"result": result.model_copy(update={"groups": groups})})

    def of_seed(job: JobResult) -> JobResult:
        result = job.result
        if result is None:
            return job
        config = result.config.model_copy(update={"seed": job.seed})
        return job.model_copy(update={"result": result.model_copy(update={"config": config})})

    results = [reversed_scores(of_seed(job)) for job in results]
    stats = compute_statistics(rows(results), "l1")
    (chart,) = [
        chart for chart in benchmark_charts(stats, results) if chart.name == "net-rank-correlation"
    ]
    texts = [text.get_text() for text in chart.figure.axes[0].texts]
    assert texts[0::3] == ["-1.00"] * (len(texts) // 3)
    assert texts[1::3] == texts[2::3] == ["1.00"] * (len(texts) // 3)


def test_methods_have_different_lines_in_a_chart(results: list[JobResult]) -> None:
    many = [
        job.model_copy(update={"variant": f"variant {number}"})
        for number in range(20)
        for job in results[:1]
    ]
    (chart, *_) = benchmark_charts(compute_statistics(rows(many), "vote, variant 0"))
    lines = chart.figure.axes[0].get_lines()[:-1]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == len(lines) == 20


def test_names_are_not_formulas(results: list[JobResult]) -> None:
    odd = [job.model_copy(update={"variant": "$x^2$ & <b>"}) for job in results]
    for chart in benchmark_charts(compute_statistics(rows(odd), "l1, $x^2$ & <b>"), odd):
        assert "<b>" not in chart.svg()


def test_a_row_is_flat(results: list[JobResult], digits_run: DigitsRun, tmp_path: Path) -> None:
    done, lost = row_of(results[0]), row_of(results[-4])
    result = digits_run.result
    before = result.score("before")
    assert before is not None
    assert done.before_top1_fraction == before.metric
    assert done.macs_left == result.stages[-1].score.macs / before.macs
    assert done.top1_fraction == pytest.approx(0.91)
    assert done.plan_hash == result.plan_hash
    assert done.torch == result.environment.torch
    assert lost.outcome == "failed"
    assert lost.top1_fraction is None
    assert not any(isinstance(value, dict | list | tuple) for value in done.model_dump().values())
    path = tmp_path / "rows.jsonl"
    path.write_text(to_lines([done, lost]))
    assert read_rows(path) == [done, lost]
    path.write_text(to_lines([done]) + "{}\n")
    with pytest.raises(RunFolderError, match="line 2, is not a row"):
        read_rows(path)


def test_a_benchmark_without_any_result_is_shown_too(spec: BenchmarkSpec) -> None:
    lost = [job_result(criterion, "macs=0.7", 0, None) for criterion in ("vote", "l1")]
    text_tables = tables(compute_statistics(rows(lost), spec.compared_with))
    assert text_tables[0].rows == (("vote", "–", "–"), ("l1", "–", "–"))
    assert text_tables[-1].title == "Failed"


def test_a_target_out_of_reach_leaves_the_verdicts_of_the_others(
    spec: BenchmarkSpec, results: list[JobResult]
) -> None:
    lost = [job_result(criterion, "macs=0.1", 0, None) for criterion in ("vote", "l1", "random")]
    without, stats = (compute_statistics(rows(jobs), "l1") for jobs in (results, [*lost, *results]))
    assert stats.settings == (("net", "macs=0.1"), *without.settings)
    assert stats.overall("vote") == without.overall("vote")
    for table, other in zip(tables(stats)[:2], tables(without)[:2], strict=True):
        assert [(method, *rest) for method, _, *rest in table.rows] == list(other.rows)
    (steps,) = (
        chart for chart in benchmark_charts(stats, results) if "step by step" in chart.title
    )
    first, second, _ = steps.figure.axes
    assert first.get_legend() is None
    assert second.get_legend() is not None


def test_a_loss_of_nan_is_read_back(digits_run: DigitsRun) -> None:
    stages = list(digits_run.result.stages)
    score = replace(stages[-1].score, loss=math.nan)
    stages[-1] = stages[-1].model_copy(update={"score": score})
    broken = digits_run.result.model_copy(update={"stages": tuple(stages)})
    read = RunResult.model_validate_json(broken.model_dump_json())
    loss = read.stages[-1].score.loss
    assert loss is not None
    assert math.isnan(loss)
