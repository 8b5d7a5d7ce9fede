"""Make the pictures of the documentation: the report and charts of a run on CIFAR-10.

    python bench/pictures.py --data DIR --weights DIR [--run FOLDER]

This prunes ResNet-20 to 70 % of its MACs into `runs/pictures` (or takes the run in FOLDER), and
writes `docs/images/`. It needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from rows import ROOT
from secateur.config import RunConfig, from_dict
from secateur.experiments.run import report, run

IMAGES = ROOT / "docs" / "images"
DESK = {"width": 1100, "height": 820}
PHONE = {"width": 390, "height": 780}
QUALITY = 82


def main() -> None:
    """Make the run if there is none, and take its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="the folder of the weights")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "pictures")
    arguments = parser.parse_args()
    if not arguments.run.is_dir():
        run(configured(arguments.data, arguments.weights), arguments.run)
    report(arguments.run)
    IMAGES.mkdir(exist_ok=True)
    for path in report(arguments.run, pictures=arguments.run / "charts"):
        name = path.stem.partition("-")[2]
        Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(
            IMAGES / f"{name}.png", optimize=True
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox"]
        )
        page = browser.new_page(viewport=DESK)  # type: ignore[arg-type]
        page.goto((arguments.run / "report.html").resolve().as_uri())
        take(page, "report-scores")
        page.locator("#concepts").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('concepts').scrollIntoView()")
        take(page, "report-concepts")
        page.locator("#layer-table tbody button").last.click()
        page.locator("[data-drawn]").nth(15).wait_for()
        take(page, "report-gallery")
        page.evaluate("document.documentElement.dataset.theme = 'dark'")
        page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        page.evaluate("document.getElementById('filters').scrollIntoView()")
        page.wait_for_timeout(500)
        take(page, "report-phone")
        browser.close()


def configured(source: str, weights: Path) -> RunConfig:
    """Return the configuration of the run."""
    return from_dict(
        {
            "model": {"name": "resnet20", "weights": str(weights / "cifar10_resnet20.safetensors")},
            "data": {"source": f"cifar10:{source}"},
            "plan": {"target": "macs=0.7"},
            "finetune": {"epochs": 0},
        },
        RunConfig,
    )


def take(page: Page, name: str) -> None:
    """Save a picture of the visible part of the page."""
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.save(IMAGES / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
