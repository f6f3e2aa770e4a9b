"""A real browser, and what a visitor does in the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ["--disable-gpu", "--disable-quic"]  # the rest that keeps it quiet is Playwright's own
_OF_STATUS = "Failed to load resource"
"""How the console begins to report a response with an error's status, or none."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts the installed one, and ends it."""
    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS) as browser:
        yield browser


@contextmanager
def watched(page: Page) -> Iterator[Page]:
    """At the end: the page raised nothing, broke no policy, and asked no other origin for anything."""
    faults: list[str] = []

    def hear(said: ConsoleMessage) -> None:
        if said.type in ("warning", "error") and not said.text.startswith(_OF_STATUS):
            faults.append(said.text)

    def see(request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:")):
            faults.append(request.url)

    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", hear)
    page.on("request", see)
    yield page
    assert faults == []


def ask(page: Page, question: str) -> None:
    """Types a question and sends it."""
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def expect_answers(page: Page, *answers: str) -> None:
    """Waits for these answers, from the first turn to the last, each complete."""
    expect(page.locator(".words")).to_have_text(list(answers))
    expect(page.locator("#stop")).to_be_hidden()


def give(page: Page, kind: str, name: str, content: str, media_type: str) -> None:
    """Pastes or drops a file: its name, content in base64 and type."""
    page.evaluate(
        """([kind, name, content, type]) => {
            const bytes = Uint8Array.from(atob(content), each => each.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, {type}));
            document.dispatchEvent(kind === 'paste'
                ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})
                : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        [kind, name, content, media_type],
    )
