"""A real Chromium, Debian's, driven by playwright; what it logs as an error fails the test that sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from harness.installed import installed

# For whatever a page waits for, on a busy machine.
PATIENCE_MS = 60_000.0
# The tests' pictures stay here, for people to look at.
PICTURES = Path(__file__).parents[2] / "build" / "pictures"
_ARGUMENTS = [
    # As root, in a container, Chromium has no sandbox of its own.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=installed("chromium"), args=_ARGUMENTS, timeout=PATIENCE_MS
        )
        try:
            yield browser
        finally:
            browser.close()


def take_picture(page: Page, name: str) -> None:
    """Of the whole page, however long it is."""
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


class Window:
    """One page, and what went wrong in it."""

    def __init__(self, browser: Browser, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        assert scheme in ("light", "dark")
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            reduced_motion="reduce",
        )
        self.page.set_default_timeout(PATIENCE_MS)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)

    def _console(self, message: ConsoleMessage) -> None:
        # A controller that is away shows as a failed request; that is what the page is there to tell.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def close(self) -> None:
        self.page.close()
        assert not self.errors, self.errors
