"""The page, in a real browser: a picture, a question, an answer as it comes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from llava_serve.api.app import create_app
from llava_serve.config import ApiOptions
from llava_serve.errors import EngineDeadError
from llava_serve.types import ImagePart, TextPart
from support.api_server import PacedBackend, serving, wait_until
from support.paths import GOLDEN

PICTURE = GOLDEN / "images" / "square.png"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    with serving(create_app(PacedBackend(), ApiOptions())) as url:
        answer = httpx.get(url)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import", answer.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome, and there is none")
    expect.set_options(timeout=10_000)
    flags = ["--disable-gpu", "--disable-quic"]  # the rest that keeps it quiet is Playwright's own
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab with a profile of its own."""
    with browser.new_context() as context:
        yield context.new_page()


def ask(page: Page, question: str) -> None:
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def test_a_picture_and_a_question_get_an_answer_as_it_comes(page: Page) -> None:
    requests: list[str] = []
    logged: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("console", lambda said: logged.append(said.text) if said.type in ("warning", "error") else None)
    backend = PacedBackend(pace_s=0.2)
    with serving(create_app(backend, ApiOptions())) as url:
        page.goto(f"{url}/")
        expect(page.locator("#model")).to_have_text("paced")
        expect(page.locator("#access")).to_be_hidden()
        page.locator("#file").set_input_files(PICTURE)
        expect(page.locator("#preview")).to_have_js_property("naturalWidth", 64)
        page.locator("#answer").evaluate(
            """answer => {
                window.shown = [];
                new MutationObserver(() => shown.push(answer.textContent)).observe(answer, {childList: true});
            }"""
        )
        page.keyboard.type("What is it?")  # the cursor is there already
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#status")).to_have_text(re.compile(r"^3 tokens in "))
        assert list(dict.fromkeys(page.evaluate("shown"))) == ["A ", "A red ", "A red circle."]
        assert page.locator("#answer").text_content() == "A red circle."
        expect(page.locator("#stop")).to_be_hidden()
        assert logged == []
        assert {f"{url}/", f"{url}/v1/models", f"{url}/v1/chat/completions"} <= set(requests)
        assert all(request.startswith((url, "data:")) for request in requests)
    message = backend.asked[-1][0][0]
    assert isinstance(message.parts[0], ImagePart)
    assert str(message.parts[0].source).startswith("data:image/png;base64,")
    assert message.parts[1] == TextPart("What is it?")


def test_stop_ends_the_work(page: Page) -> None:
    backend = PacedBackend(words=["x"] * 100, pace_s=0.1)
    with serving(create_app(backend, ApiOptions())) as url:
        page.goto(f"{url}/")
        ask(page, "What is it?")
        expect(page.locator("#answer")).to_have_text(re.compile(r"^x"))
        page.locator("#stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        wait_until(lambda: backend.working == 0)


def test_an_error_is_shown_in_the_servers_words(page: Page) -> None:
    backend = PacedBackend(failure=EngineDeadError("The engine has stopped."), fail_at=1)
    with serving(create_app(backend, ApiOptions())) as url:
        page.goto(f"{url}/")
        for fail_at, answer in ((1, "A "), (0, "")):
            backend.fail_at = fail_at
            ask(page, "What is it?")
            expect(page.locator("#status")).to_have_text("The engine has stopped.")
            assert page.locator("#answer").text_content() == answer
    ask(page, "Still there?")
    expect(page.locator("#status")).to_have_text("The server cannot be reached.")


def test_a_key_is_asked_for_only_where_one_is_needed(page: Page) -> None:
    with serving(create_app(PacedBackend(), ApiOptions(api_keys=("sesame",)))) as url:
        page.goto(f"{url}/")
        expect(page.locator("#access")).to_be_visible()
        ask(page, "What is it?")
        expect(page.locator("#status")).to_have_text(re.compile(r"^API key required"))
        page.locator("#key").fill("sesame")
        ask(page, "What is it?")
        expect(page.locator("#answer")).to_have_text("A red circle.")


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_can_be_dropped_and_pasted(page: Page, kind: str) -> None:
    with serving(create_app(PacedBackend(), ApiOptions())) as url:
        page.goto(f"{url}/")
        page.evaluate(
            """async kind => {
                const canvas = Object.assign(document.createElement('canvas'), {width: 9, height: 5});
                canvas.getContext('2d');
                const blob = await new Promise(done => canvas.toBlob(done));
                const data = new DataTransfer();
                data.items.add(new File([blob], kind + '.png', {type: 'image/png'}));
                document.dispatchEvent(kind === 'paste'
                    ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})
                    : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
            }""",
            kind,
        )
        expect(page.locator("#preview")).to_have_attribute("alt", re.compile(rf"{kind}\.png$"))
        expect(page.locator("#preview")).to_have_js_property("naturalWidth", 9)
