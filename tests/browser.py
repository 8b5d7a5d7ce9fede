"""Open pages in a real browser: Debian's Chromium, or the one that Playwright has installed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = (390, 800)
DESK = (1100, 900)
SERIOUS = ("serious", "critical")


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window; skips the test where there is none."""
    path = next((executable for name in NAMES if (executable := shutil.which(name))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=path, args=["--headless", "--no-sandbox"]
            )
        except Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page that is open, and what it has said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    """Messages on the console, and errors."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, but those of the file itself and of data in it."""

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        overflow: int = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return overflow

    def findings(self) -> list[str]:
        """What axe calls serious or critical."""
        return [
            f"{violation['id']}: {node['target']} {node['failureSummary']}"
            for violation in Axe().run(self.page).response["violations"]
            if violation["impact"] in SERIOUS
            for node in violation["nodes"][:1]
        ]


@contextlib.contextmanager
def opened(browser: Browser, path: Path, size: tuple[int, int] = DESK) -> Iterator[Watched]:
    """The page in a file, in a window of a size."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.set_default_timeout(10_000)
    watched = Watched(page)
    page.on("console", lambda message: watched.said.append(message.text))
    page.on("pageerror", lambda error: watched.said.append(str(error)))
    address = path.resolve().as_uri()

    def note(url: str) -> None:
        if url != address and not url.startswith("data:"):
            watched.requests.append(url)

    page.on("request", lambda request: note(request.url))
    page.goto(address)
    try:
        yield watched
    finally:
        page.close()
