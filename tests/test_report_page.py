"""The report in a real browser: clicks, keys, search, and accessibility."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from safetensors.torch import save_file

from browser import DESK, PHONE, Watched, open_browser, opened
from runs import DigitsRun
from secateur import data, load
from secateur.config import RunConfig, from_dict
from secateur.experiments.compare.job import JobResult
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.report.benchmark import PAGE, write_benchmark
from secateur.experiments.report.dissection_page import write_index
from secateur.experiments.report.gallery import make_gallery
from secateur.experiments.report.page import write_report
from secateur.experiments.report.sensitivity_chart import write_sensitivity
from secateur.experiments.run import run
from secateur.pipeline.inputs import load_inputs
from secateur.pipeline.prune import prune
from secateur.pipeline.result import RunResult, read_result
from secateur.scoring.dissection import FilterConcept
from secateur.scoring.naming import FilterName

EVIL = "<img src=x onerror=alert(1)>"
IN_A_COLUMN = 500
"""Images in a file of CIFAR-10 as it is staged."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened_browser:
        yield opened_browser


@pytest.fixture
def report(browser: Browser, digits_run: DigitsRun) -> Iterator[Watched]:
    with opened(browser, digits_run.folder / "report.html") as watched:
        yield watched


@pytest.fixture
def page(report: Watched) -> Page:
    return report.page


def cards(page: Page) -> Locator:
    return page.locator("#filters > li")


def choice(page: Page, label: str) -> Locator:
    return page.get_by_role("search").get_by_role("combobox", name=label)


def titles(page: Page) -> list[str]:
    return cards(page).locator("h3").all_text_contents()


def title_of(result: RunResult, group: int, filter_: int) -> str:
    return f"{result.groups[group].name}, filter {filter_}"


def test_the_page_logs_nothing_and_requests_nothing(report: Watched) -> None:
    cards(report.page).last.scroll_into_view_if_needed()
    expect(cards(report.page).last.locator("canvas[data-drawn=yes]")).to_have_count(5)
    assert report.said == []
    assert report.requests == []
    assert report.overflow == 0


def test_a_click_on_a_layer_lists_its_filters(page: Page, digits_run: DigitsRun) -> None:
    group = digits_run.result.groups[1]
    page.locator("#layer-table").get_by_role("button", name=group.name).click()
    expect(choice(page, "Layer")).to_have_value("1")
    removed = len(group.removed)
    expect(page.get_by_role("status")).to_have_text(
        f"{group.filters} of {sum(g.filters for g in digits_run.result.groups)} filters, "
        f"{group.filters - removed} kept and {removed} removed; {group.filters} shown."
    )
    assert set(titles(page)) == {title_of(digits_run.result, 1, f) for f in range(group.filters)}
    assert page.evaluate("document.activeElement.id") == "gallery"
    expect(page.get_by_role("heading", name="Filters", exact=True)).to_be_in_viewport()


def test_kept_and_removed_are_separate(page: Page, digits_run: DigitsRun) -> None:
    group = digits_run.result.groups[0]
    choice(page, "Layer").select_option(group.name)
    choice(page, "Sort by").select_option("layer")
    choice(page, "Show").select_option("removed")
    assert titles(page) == [title_of(digits_run.result, 0, f) for f in group.removed]
    assert set(cards(page).locator(".fate").all_text_contents()) == {"Removed"}
    choice(page, "Show").select_option("kept")
    kept = [f for f in range(group.filters) if f not in group.removed]
    assert titles(page) == [title_of(digits_run.result, 0, f) for f in kept]
    page.get_by_role("button", name="Show all").click()
    expect(page.get_by_role("status")).to_contain_text(
        f"{sum(g.filters for g in digits_run.result.groups)} of "
    )


def test_sorting_by_rank_is_by_score(page: Page, digits_run: DigitsRun) -> None:
    group = digits_run.result.groups[0]
    order = sorted(range(group.filters), key=lambda f: (-group.scores[f], f))
    choice(page, "Layer").select_option(group.name)
    choice(page, "Sort by").select_option("best")
    assert titles(page) == [title_of(digits_run.result, 0, f) for f in order]
    below = round(100 - 100 / group.filters)
    expect(cards(page).first).to_contain_text(
        f"Rank 1 of {group.filters} by vote, above {below} % of the layer; the plan keeps the best "
    )
    expect(page.locator("#filters")).not_to_contain_text("votes")
    choice(page, "Sort by").select_option("worst")
    assert titles(page) == [title_of(digits_run.result, 0, f) for f in reversed(order)]
    choice(page, "Sort by").select_option("limit")
    kept = group.filters - len(group.removed)
    assert set(titles(page)[:2]) == {
        title_of(digits_run.result, 0, order[kept - 1]),
        title_of(digits_run.result, 0, order[kept]),
    }
    page.get_by_role("button", name="Show all").click()
    choice(page, "Sort by").select_option("iou")
    texts = cards(page).locator("p", has_text="Overlaps").all_text_contents()
    overlaps = [float(text.partition("IoU ")[2][:5]) for text in texts]
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[0] > 0.04


def test_a_search_finds_layers_filters_and_concepts(page: Page, digits_run: DigitsRun) -> None:
    name = digits_run.result.groups[2].name
    search = page.get_by_role("searchbox", name="Search")
    search.fill(name.upper())
    assert all(title.startswith(name) for title in titles(page))
    search.fill(f"{name} 3")
    assert title_of(digits_run.result, 2, 3) in titles(page)
    search.fill("no such thing")
    expect(page.get_by_role("status")).to_have_text("No filter matches.")
    assert cards(page).count() == 0


def test_a_concept_lists_the_filters_that_see_it(page: Page) -> None:
    button = page.locator("#concept-map [data-concept]").first
    concept = button.get_attribute("data-concept")
    button.click()
    expect(choice(page, "Concept")).to_have_value(str(concept))
    for text in cards(page).locator("p", has_text="Overlaps").all_text_contents():
        assert text.startswith(f"Overlaps {concept} (IoU ")


def test_it_opens_at_the_filters_nearest_to_the_limit(page: Page, digits_run: DigitsRun) -> None:
    shown = titles(page)
    places = []
    for number, group in enumerate(digits_run.result.groups):
        if not 0 < len(group.removed) < group.filters:
            continue
        order = sorted(range(group.filters), key=lambda f: (-group.scores[f], f))
        kept = group.filters - len(group.removed)
        pair = [title_of(digits_run.result, number, f) for f in order[kept - 1 : kept + 1]]
        places.append(shown.index(pair[0]))
        assert shown[places[-1] + 1] == pair[1]
    assert places == list(range(0, 2 * len(places), 2))


def test_a_link_leads_to_the_same_filters(
    browser: Browser, page: Page, digits_run: DigitsRun
) -> None:
    group = digits_run.result.groups[2]
    page.locator("#layer-table").get_by_role("button", name=group.name).click()
    choice(page, "Show").select_option("removed")
    page.get_by_role("searchbox").fill("& é")
    page.get_by_role("searchbox").fill(group.name)
    # `page.url` lags behind what the page has written.
    address, shown = str(page.evaluate("location.href")), titles(page)
    assert len(shown) == len(group.removed)
    assert f"layer={group.name}&fate=removed" in address
    other = browser.new_page()
    other.goto(address)
    expect(cards(other)).to_have_count(len(shown))
    assert titles(other) == shown
    expect(choice(other, "Show")).to_have_value("removed")
    other.close()
    page.go_back()  # to where the layer was not chosen
    expect(choice(page, "Layer")).to_have_value("")


def test_images_name_their_classes(page: Page, digits_run: DigitsRun) -> None:
    caption = cards(page).first.locator("figcaption").first
    assert caption.text_content() in digits_run.result.class_names


def test_a_printed_page_has_its_pictures(page: Page) -> None:
    expect(page.locator("#filters canvas:not([data-drawn])")).to_have_count(0)  # without scrolling
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Subtype /Image") >= page.locator("#filters canvas").count()
    page.emulate_media(media="print", color_scheme="dark")
    assert background(page) == "rgb(251, 251, 248)"
    expect(page.locator("#controls")).to_be_hidden()
    head = page.locator("#concept-map thead").first
    expect(head).to_have_css("display", "table-header-group")  # stands on every page
    expect(head.locator("button").first).to_have_css("display", "contents")
    page.set_viewport_size({"width": 688, "height": 1017})  # A4 without its margins
    height = page.evaluate(
        "Math.max(...[...document.querySelectorAll('#filters > li')].map(one => one.offsetHeight))"
    )
    assert height < 1017 / 4  # a row that does not fit leaves no more of the page empty


def test_the_chart_of_stages_is_zoomed_to_its_values(page: Page, digits_run: DigitsRun) -> None:
    chart = page.locator(".stages > svg")
    first, last = digits_run.result.stages[0], digits_run.result.stages[-1]
    label = str(chart.get_attribute("aria-label"))
    assert label.startswith(f"top-1 by stage: before {100 * first.score.metric:.2f} %, refit ")
    assert label.endswith(f"finetuned {100 * last.score.metric:.2f} %")
    assert "cut" not in label
    expect(page.locator(".stages")).to_contain_text("Right after the cut, before any repair: ")
    ink = "getComputedStyle(document.querySelector('.stages text')).fill"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ink) != light


def test_sensitivity_is_shown_beside_the_plan(page: Page, digits_run: DigitsRun) -> None:
    tiles = page.locator(".tiles > li")
    assert tiles.count() == len(digits_run.result.groups)
    group = digits_run.result.groups[1]
    kept = group.filters - len(group.removed)
    error = group.sensitivity[len(group.removed)]
    text = f"{group.filters} → {kept} filters, loses {error:.2g}"
    expect(tiles.nth(1)).to_contain_text(text)
    tiles.nth(1).get_by_role("button").click()
    expect(choice(page, "Layer")).to_have_value("1")


def test_more_filters_are_shown_on_request(page: Page) -> None:
    before = cards(page).count()
    page.get_by_role("button", name="Show more").click()
    assert cards(page).count() > before
    assert cards(page).nth(before).evaluate("card => card === document.activeElement")


def test_all_of_it_works_by_keyboard(page: Page, digits_run: DigitsRun) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the scores")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#theme")).to_be_focused()
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.layer") == "0":
            break
    page.keyboard.press("Enter")
    expect(choice(page, "Layer")).to_have_value("0")
    page.keyboard.press("Tab")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("filter 1")  # no text says "filter": nothing is left
    expect(page.get_by_role("status")).to_have_text("No filter matches.")
    page.keyboard.press("Control+A")
    page.keyboard.type(digits_run.result.groups[0].name)
    expect(cards(page)).not_to_have_count(0)


def test_a_benchmark_page_is_in_the_same_style(
    browser: Browser, digits_run: DigitsRun, tmp_path: Path
) -> None:
    results = [
        JobResult(
            id=f"{criterion}-{seed}",
            network="resnet20",
            variant="",
            criterion=criterion,
            target="macs=0.5",
            seed=seed,
            outcome="done",
            reason="",
            score_on="test",
            result=digits_run.result,
        )
        for criterion in ("vote", EVIL)
        for seed in (0, 1)
    ]
    content = {
        "networks": [{"name": "resnet20"}],
        "criteria": ["vote", "l1"],
        "targets": ["macs=0.5"],
        "seeds": 2,
        "data": {"source": "digits"},
    }
    write_benchmark(tmp_path, from_dict(content, BenchmarkSpec), results, "secateur compare")
    for size in (DESK, PHONE):
        with opened(browser, tmp_path / PAGE, size) as watched:
            expect(watched.page.get_by_role("rowheader", name=EVIL).first).to_be_visible()
            assert watched.findings() == []
            light = background(watched.page)
            for _ in range(2):
                watched.page.locator("#theme").click()
            expect(watched.page.locator("#theme")).to_have_text("Theme: dark")
            assert background(watched.page) != light
            assert watched.findings() == []
            assert watched.overflow == 0
            assert watched.said == []
            assert watched.requests == []


def background(page: Page) -> str:
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


def test_the_theme_is_the_systems_until_one_is_chosen(page: Page) -> None:
    light = background(page)
    page.emulate_media(color_scheme="dark")
    dark = background(page)
    assert light != dark
    button = page.locator("#theme")
    button.click()
    expect(button).to_have_text("Theme: light")
    assert background(page) == light
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert background(page) == dark
    page.emulate_media(color_scheme="light")
    assert background(page) == dark
    button.click()
    expect(button).to_have_text("Theme: automatic")
    assert background(page) == light


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE])
def test_nothing_keeps_anyone_from_reading_it(
    browser: Browser, digits_run: DigitsRun, theme: str, size: tuple[int, int]
) -> None:
    with opened(browser, digits_run.folder / "report.html", size) as report:
        report.page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        assert report.findings() == []
        assert report.overflow == 0


def test_the_pages_of_inspect_are_in_the_same_style(
    browser: Browser, digits_run: DigitsRun, tmp_path: Path
) -> None:
    curves = {group.name: group.sensitivity for group in digits_run.result.groups}
    write_sensitivity(tmp_path / "curves.html", EVIL, curves)
    concepts = {"layer 1": [FilterConcept(EVIL, 0.2), FilterConcept("a", 0.01)]}
    names = {"layer 1": [FilterName(EVIL, 0.3), None]}
    write_index(tmp_path, EVIL, concepts, 64, names)
    Image.new("RGB", (640, 196)).save(tmp_path / "layer 1.png")
    for name in ("curves.html", "index.html"):
        with opened(browser, tmp_path / name, PHONE) as watched:
            expect(watched.page.get_by_role("heading", level=1)).to_contain_text(EVIL)
            assert watched.findings() == []
            assert watched.overflow == 0
            assert watched.said == []
            pictures = watched.page.locator("img")
            assert pictures.count() == (name == "index.html")
            for picture in pictures.all():
                expect(picture).to_have_js_property("naturalWidth", 640)


def test_the_outline_is_where_the_filter_is_active(page: Page, digits_run: DigitsRun) -> None:
    """Pixels of a canvas against the region that was counted."""
    content = json.loads(page.locator("#data").text_content() or "")
    for layer in content["layers"]:
        rows, columns = layer["grid"]
        size = -(-rows * columns // 8)
        bits = torch.tensor(list(base64.b64decode(layer["regions"])))
        cells = (bits[:, None] >> torch.arange(7, -1, -1)) & 1
        shape = (len(layer["scores"]), len(layer["images"][0]), size * 8)
        layer["cells"] = cells.reshape(shape)[..., : rows * columns].reshape(*shape[:2], rows, -1)
    layer = content["layers"][0]
    filter_ = int(layer["cells"][:, 0].float().mean((1, 2)).argmax())
    choice(page, "Layer").select_option(layer["name"])
    choice(page, "Sort by").select_option("layer")
    canvas = cards(page).nth(filter_).locator("canvas").first
    canvas.scroll_into_view_if_needed()
    expect(canvas).to_have_attribute("data-drawn", "yes")
    pixels = torch.tensor(
        canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, 112, 112).data]")
    ).reshape(112, 112, 4)
    is_outline = (pixels[..., 0] > 150) & (pixels[..., 1] > 120) & (pixels[..., 2] < 80)
    assert is_outline.any()
    cells = layer["cells"][filter_, 0].float()
    near = torch.nn.functional.max_pool2d(cells[None], 3, 1, 1)[0]  # a cell on from an active one
    row, column = (torch.arange(112) * side // 112 for side in near.shape)
    assert not (is_outline & (near[row][:, column] == 0)).any()


def test_names_from_data_are_shown_as_text(
    browser: Browser, digits_run: DigitsRun, tmp_path: Path
) -> None:
    config = digits_run.config
    dataset, model = load_inputs(config)
    smaller = load(digits_run.folder)
    evil = data.DataSet("digits", (EVIL,) * 10, dataset.train, dataset.validation, dataset.test)
    groups = list(digits_run.result.groups)
    gallery = make_gallery(model, smaller, evil, digits_run.result)
    groups[0] = groups[0].model_copy(update={"name": EVIL})
    result = digits_run.result.model_copy(update={"groups": tuple(groups)})
    write_report(result, tmp_path / "report.html", gallery)
    with opened(browser, tmp_path / "report.html") as report:
        page = report.page
        expect(page.locator("#layer-table").get_by_role("button", name=EVIL)).to_be_visible()
        expect(page.locator("#concept-map").get_by_role("button", name=EVIL).first).to_be_visible()
        page.get_by_role("searchbox").fill("onerror")
        expect(cards(page).first).to_contain_text(EVIL)
        assert page.locator("img").count() == 0
        assert report.said == []
        assert report.requests == []


@pytest.mark.slow
def test_the_report_of_resnet20_on_cifar10(
    browser: Browser, shared_data: Path, tmp_path: Path
) -> None:
    config = from_dict(
        {
            "model": {
                "name": "resnet20",
                "weights": str(shared_data / "weights" / "cifar10_resnet20.safetensors"),
            },
            "data": {
                "source": f"cifar10:{few_columns(shared_data / 'cifar10', tmp_path / 'few')}",
                "calibration_images": 200,
            },
            "plan": {"target": "macs=0.7"},
            "refit": {"layers": "consumers", "positions": 8},
            "finetune": {"epochs": 0},
            "report": {"images": 100},
        },
        RunConfig,
    )
    dataset, model = load_inputs(config)
    subset = data.DataSet(
        dataset.name,
        dataset.class_names,
        dataset.train,
        dataset.validation,
        dataset.test.take(torch.arange(200)),
    )
    pruned = prune(model, subset, config)
    gallery = make_gallery(model, pruned.model, subset, pruned.result)
    write_report(pruned.result, tmp_path / "report.html", gallery)
    look_through(browser, tmp_path / "report.html", pruned.result, "frog")


@pytest.mark.slow
def test_the_report_of_efficientnet_lite0_on_imagenet_images(
    browser: Browser, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Path(__file__).parents[1] / "bench"
    monkeypatch.syspath_prepend(bench)
    from imagenet_networks import converted

    source = shared_data / "imagenette_subset"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    weights = tmp_path / "lite0.safetensors"
    save_file(converted("efficientnet_lite0", shared_data / "weights"), weights)
    config = from_dict(
        {
            "model": {
                "name": f"{bench / 'imagenet_networks.py'}:efficientnet_lite0",
                "weights": str(weights),
                "num_classes": 1000,
            },
            "data": {
                "source": f"imagenette:{few_images(source, tmp_path / 'few')}",
                "calibration_images": 40,
                "batch_size": 20,
                "image_size": 128,
                "mean": [127 / 255] * 3,
                "std": [128 / 255] * 3,
            },
            "score": {"criterion": "l1"},
            "plan": {"target": "macs=0.8", "allocation": "uniform"},
            "refit": {"layers": "none", "recalibrate_batchnorm": False},
            "finetune": {"epochs": 0},
        },
        RunConfig,
    )
    run(config, tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    look_through(browser, page, read_result(tmp_path / "run"), "tench")
    assert page.stat().st_size < 8e6


def few_columns(source: Path, folder: Path) -> Path:
    """The first column of images of each part of CIFAR-10, in the same layout."""
    for part, name in (("train_a", "train"), ("test", "test")):
        (folder / part).mkdir(parents=True)
        column = min((source / part).iterdir())
        (folder / part / column.name).symlink_to(column)
        labels = np.load(source / f"{name}_labels.npy")
        np.save(folder / f"{name}_labels.npy", labels[:IN_A_COLUMN])
    (folder / "train_b").mkdir()
    return folder


def few_images(source: Path, folder: Path) -> Path:
    """Some of the images of each class, in the same layout."""
    for part, name, count in (("train", "train", 5), ("ilsvrc_val", "val", 2)):
        for directory in sorted((source / part).iterdir()):
            (folder / name / directory.name).mkdir(parents=True)
            for path in sorted(directory.iterdir())[:count]:
                (folder / name / directory.name / path.name).symlink_to(path)
    return folder


def look_through(browser: Browser, path: Path, result: RunResult, concept: str) -> None:
    """A person's way through a report, and what they would see."""
    with opened(browser, path) as report:
        page = report.page
        names = page.locator("#layer-table tbody button").all_text_contents()
        assert names == [group.name for group in result.groups]
        page.locator("#layer-table tbody button").last.click()
        assert titles(page)[0] == title_of(result, len(result.groups) - 1, 0)
        expect(cards(page).first.locator("canvas[data-drawn=yes]")).to_have_count(5)
        page.get_by_role("button", name="Show all").click()
        page.get_by_role("searchbox").fill(concept)
        for text in cards(page).all_text_contents():
            assert concept in text
        page.get_by_role("searchbox").fill("")
        choice(page, "Sort by").select_option("worst")
        assert "Removed" in (cards(page).first.text_content() or "")
        assert report.findings() == []
        report.page.evaluate("document.documentElement.dataset.theme = 'dark'")
        assert report.findings() == []
        assert report.said == []
        assert report.requests == []
