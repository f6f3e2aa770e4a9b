"""Makes the README's pictures of the page anew, with the model that ships: two screenshots, and the demo, which moves.

PYTHONPATH=tests python -m support.page_screenshots
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from support.browser import chromium
from support.builtin_server import builtin_over_http
from support.paths import ROOT

FOLDER = ROOT / "docs" / "images"
WIDE = {"viewport": {"width": 1100, "height": 720}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
    "color_scheme": "dark",
}
DEMO = {"viewport": {"width": 760, "height": 620}}
SECOND = "What is right of the circle?"

Frame = tuple[Image.Image, int]
"""A picture of the page, and for how many milliseconds it is shown."""


def shot(page: Page, shown_ms: int) -> Frame:
    """The page as it is now."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB"), shown_ms


def answered(page: Page, turn: int) -> Locator:
    """What an answer took; it is there once the answer is complete."""
    return page.locator(".facts").nth(turn).filter(has_text="tokens/s")


def converse(page: Page, url: str) -> Iterator[Frame]:
    """An example's question, and one more, as a visitor asks them."""
    page.goto(url)
    expect(page.locator(".example").first).to_be_visible()
    yield shot(page, 1500)
    page.locator(".example").first.click()
    expect(page.locator("#question")).not_to_have_value("")
    yield shot(page, 1200)
    for turn in range(2):
        if turn:
            for letter in SECOND:
                page.locator("#question").press_sequentially(letter)
                yield shot(page, 50)
        page.locator("#question").press("Enter")
        while not answered(page, turn).count():
            yield shot(page, 100)
        yield shot(page, 2400)


def main() -> None:
    """Writes `page-wide.webp`, `page-phone.webp` and `demo.webp`."""
    screens: dict[str, Any] = {"page-wide": WIDE, "page-phone": PHONE, "demo": DEMO}
    with builtin_over_http() as web, chromium() as browser:
        for name, screen in screens.items():
            with browser.new_context(**screen) as context:
                pictures, durations = zip(*converse(context.new_page(), str(web.base_url)), strict=True)
            if name == "demo":
                first, *others = pictures
                moving = {"save_all": True, "append_images": others, "duration": list(durations), "loop": 0}
            else:
                first, moving = pictures[-1], {}
            first.save(FOLDER / f"{name}.webp", lossless=True, quality=100, method=6, **moving)


if __name__ == "__main__":
    main()
