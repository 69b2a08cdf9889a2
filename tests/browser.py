"""Headless Chromium for tests of pages: the one on the PATH, or Playwright's (`playwright install chromium`).

SCREENSHOTS=FOLDER in the environment saves screenshots of pages.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

DESKTOP = (1280, 900)
PHONE = (390, 844)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium, or skip the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        if executable is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install Debian's, or run playwright install chromium")
        # Root has no sandbox, and the browser must not contact its vendor.
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=executable, args=quiet)
        yield browser
        browser.close()


class Visit:
    """An open page with its requests, errors and the duration of actions."""

    def __init__(self, page: Page, name: str) -> None:
        self.page, self._name = page, name
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.seconds: dict[str, float] = {}
        page.add_init_script(
            "new MutationObserver(() => { window.lastChanged = performance.now(); })"
            ".observe(document, { subtree: true, childList: true, attributes: true, characterData: true });"
        )
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def timed(self, name: str, action: Callable[[], Any], until: Callable[[], Any]) -> None:
        """Run an action, wait until it is done, and record the seconds until the last change of the page."""
        start = float(self.page.evaluate("performance.now()"))
        action()
        until()  # which may poll only every half second
        changed, end = self.page.evaluate("[window.lastChanged ?? 0, performance.now()]")
        self.seconds[name] = ((changed if changed > start else end) - start) / 1000

    def screenshot(self, name: str) -> None:
        """Save a screenshot of the full page if SCREENSHOTS is set."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{self._name}-{name}.png", full_page=True)

    def fits(self) -> bool:
        """Whether the page needs no horizontal scrolling."""
        # Not `window.innerWidth`: a phone widens its window for a page that is too wide, and zooms out.
        size = self.page.viewport_size
        assert size is not None
        return bool(self.page.evaluate("document.documentElement.scrollWidth") <= size["width"])


@contextmanager
def visit(browser: Browser, url: str, name: str, size: tuple[int, int] = DESKTOP) -> Iterator[Visit]:
    """Open a page in a window of `size`. Errors: AssertionError, at the end, for requests to other hosts or errors of the page."""
    phone = size == PHONE
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, has_touch=phone, is_mobile=phone)
    context.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)  # the machine may be busy
    visited = Visit(context.new_page(), name)
    visited.page.goto(url)
    try:
        yield visited
    finally:
        context.close()
    host = url.split("/")[2]
    assert not [
        requested for requested in visited.requests if requested.split(":")[0] not in ("data", "blob") and requested.split("/")[2] != host
    ]
    assert not visited.errors
