"""The page, in a real browser: a picture, a question, an answer as it comes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_server import PacedBackend, serving, wait_until
from browser import Page, browser

from llava_serve.api.app import create_app
from llava_serve.config import ApiOptions
from llava_serve.errors import EngineDeadError
from llava_serve.types import ImagePart, TextPart

PICTURE = Path(__file__).parent / "golden" / "images" / "square.png"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ANSWER = "document.getElementById('answer').textContent"
STATUS = "document.getElementById('status').textContent"


def shown(identifier: str) -> str:
    return f"document.getElementById('{identifier}').checkVisibility()"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    with serving(create_app(PacedBackend(), ApiOptions())) as url:
        answer = httpx.get(url)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import", answer.text)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome, and there is none")
    with browser(CHROMIUM) as page:
        yield page


def ask(page: Page, question: str) -> None:
    page.run("document.getElementById('question').value = ''; document.getElementById('question').focus()")
    page.type(question)
    page.press_enter()


def test_a_picture_and_a_question_get_an_answer_as_it_comes(page: Page) -> None:
    backend = PacedBackend(pace_s=0.2)
    with serving(create_app(backend, ApiOptions())) as url:
        page.open(f"{url}/")
        page.wait_for("document.getElementById('model').textContent === 'paced'")
        assert not page.run(shown("access"))
        page.choose_file("#file", PICTURE)
        page.wait_for("document.getElementById('preview').naturalWidth > 0")
        page.type("What is it?")  # the cursor is there already
        page.press_enter()
        page.wait_for(f"{ANSWER} === 'A '")
        assert page.run(shown("stop"))
        page.wait_for(f"{STATUS}.startsWith('3 tokens in ')")
        assert page.run(ANSWER) == "A red circle."
        assert not page.run(shown("stop"))
        assert page.complaints == []
        assert all(request.startswith((url, "data:")) for request in page.requests)
    message = backend.seen[-1][0][0]
    assert isinstance(message.parts[0], ImagePart)
    assert str(message.parts[0].source).startswith("data:image/png;base64,")
    assert message.parts[1] == TextPart("What is it?")


def test_stop_ends_the_work(page: Page) -> None:
    backend = PacedBackend(words=["x"] * 100, pace_s=0.1)
    with serving(create_app(backend, ApiOptions())) as url:
        page.open(f"{url}/")
        ask(page, "What is it?")
        page.wait_for(f"{ANSWER}.startsWith('x')")
        page.run("document.getElementById('stop').click()")
        page.wait_for(f"{STATUS} === 'Stopped.'")
        wait_until(lambda: backend.working == 0)


def test_an_error_is_told_in_the_servers_words(page: Page) -> None:
    backend = PacedBackend(failure=EngineDeadError("The engine has stopped."), fail_at=1)
    with serving(create_app(backend, ApiOptions())) as url:
        page.open(f"{url}/")
        for fail_at in (1, 0):
            backend.fail_at = fail_at
            ask(page, "What is it?")
            page.wait_for(f"{STATUS} === 'The engine has stopped.'")
    ask(page, "Still there?")
    page.wait_for(f"{STATUS} === 'The server cannot be reached.'")


def test_a_key_is_asked_for_only_where_one_is_needed(page: Page) -> None:
    with serving(create_app(PacedBackend(), ApiOptions(api_keys=("sesame",)))) as url:
        page.open(f"{url}/")
        page.wait_for(shown("access"))
        ask(page, "What is it?")
        page.wait_for(f"{STATUS}.startsWith('This server wants a key')")
        page.run("document.getElementById('key').focus()")
        page.type("sesame")
        ask(page, "What is it?")
        page.wait_for(f"{ANSWER} === 'A red circle.'")


def test_a_picture_can_be_dropped_and_pasted(page: Page) -> None:
    script = """(async kind => {
        const file = new File([await (await new Promise(done => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 9, height: 5});
            canvas.getContext('2d');
            canvas.toBlob(done);
        })).arrayBuffer()], kind + '.png', {type: 'image/png'});
        const data = new DataTransfer();
        data.items.add(file);
        document.dispatchEvent(kind === 'paste'
            ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})
            : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
    })"""
    with serving(create_app(PacedBackend(), ApiOptions())) as url:
        page.open(f"{url}/")
        for kind in ("paste", "drop"):
            page.run(f"{script}('{kind}')")
            page.wait_for(f"document.getElementById('preview').alt.endsWith('{kind}.png')")
            page.wait_for("document.getElementById('preview').naturalWidth === 9")
