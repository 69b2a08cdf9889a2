"""Headless Chromium, as a user of our pages has it: the one on the PATH, or Playwright's own (`playwright install chromium`).

SCREENSHOTS=FOLDER keeps the pictures that tests take of pages.
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
    """Playwright's Chromium; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install Debian's, or run playwright install chromium")
        # Root has no sandbox; and nothing is to be asked of the browser's maker.
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=found, args=quiet)
        yield browser
        browser.close()


class Visit:
    """A page that is open: what it asked for, what went wrong in it, how long its actions took."""

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
        """Do something, wait until it has happened, and keep how long that took: until the page changed for the last time."""
        begun = float(self.page.evaluate("performance.now()"))
        action()
        until()  # which looks every half second at times
        changed, now = self.page.evaluate("[window.lastChanged ?? 0, performance.now()]")
        self.seconds[name] = ((changed if changed > begun else now) - begun) / 1000

    def screenshot(self, name: str) -> None:
        """A picture of the whole page, where SCREENSHOTS asks for such."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{self._name}-{name}.png", full_page=True)

    def fits(self) -> bool:
        """Whether nothing has to be scrolled sideways."""
        # Not `window.innerWidth`: a phone widens its window for a page that is too wide, and shows it all smaller.
        size = self.page.viewport_size
        assert size is not None
        return bool(self.page.evaluate("document.documentElement.scrollWidth") <= size["width"])


@contextmanager
def visit(browser: Browser, url: str, name: str, size: tuple[int, int] = DESKTOP) -> Iterator[Visit]:
    """The page at a URL, in a window of that size. Errors: AssertionError, at the end, if it asked anybody else for anything."""
    phone = size == PHONE
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, has_touch=phone, is_mobile=phone)
    context.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)  # others may want the machine too
    visited = Visit(context.new_page(), name)
    visited.page.goto(url)
    try:
        yield visited
    finally:
        context.close()
    own = url.split("/")[2]
    assert not [asked for asked in visited.requests if asked.split(":")[0] not in ("data", "blob") and asked.split("/")[2] != own]
    assert not visited.errors
