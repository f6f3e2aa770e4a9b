"""A real browser for the tests of the page. Each test has a tab of its own, which must stay clean."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from support.browser import CHROMIUM, chromium, watched


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome, and there is none")
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab with a profile of its own, watched."""
    with browser.new_context() as context, watched(context.new_page()) as opened:
        yield opened
