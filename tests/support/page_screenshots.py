"""Makes the README's screenshots of the page anew, with the model that ships:

PYTHONPATH=tests python -m support.page_screenshots
"""

from __future__ import annotations

import io
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect

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


def converse(page: Page, url: str) -> None:
    """An example's question, and one more."""
    page.goto(url)
    page.locator(".example").first.click()
    expect(page.locator("#question")).not_to_have_value("")
    page.locator("#question").press("Enter")
    expect(page.locator(".facts")).to_contain_text("tokens/s")
    page.locator("#question").fill("What is right of the circle?")
    page.locator("#question").press("Enter")
    expect(page.locator(".facts").nth(1)).to_contain_text("tokens/s")


def main() -> None:
    """Writes `page-wide.webp` and `page-phone.webp`."""
    screens: dict[str, Any] = {"page-wide": WIDE, "page-phone": PHONE}
    with builtin_over_http() as web, chromium() as browser:
        for name, screen in screens.items():
            with browser.new_context(**screen) as context:
                page = context.new_page()
                converse(page, str(web.base_url))
                picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.save(FOLDER / f"{name}.webp", lossless=True, quality=100, method=6)


if __name__ == "__main__":
    main()
