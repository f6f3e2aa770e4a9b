"""The page in a real browser, over a backend whose pace and failures a test sets: what a visitor does and is said."""

from __future__ import annotations

import base64
import dataclasses
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from llava_serve.api.app import create_app
from llava_serve.config import ApiOptions
from llava_serve.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidImageError,
    LlavaServeError,
    PromptTooLongError,
    RateLimitError,
    RequestError,
)
from support.api_server import DESCRIPTION, PacedBackend, serving, wait_until
from support.browser import ask, expect_answers, give, watched
from support.paths import GOLDEN

PICTURE = GOLDEN / "images" / "square.png"
ROOMY = dataclasses.replace(DESCRIPTION, max_image_bytes=1 << 20, max_image_pixels=1 << 20)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def test_the_answer_comes_word_by_word_and_the_model_is_named(page: Page) -> None:
    with serving(create_app(PacedBackend(pace_s=0.2), ApiOptions())) as url:
        page.goto(f"{url}/")
        expect(page.locator("#model")).to_have_text("paced · context 64 tokens · up to 3 pictures")
        expect(page.locator("#access")).to_be_hidden()
        expect(page.locator("#knows")).to_be_hidden()
        page.evaluate(
            """() => {
                window.shown = [];
                const look = () => shown.push(document.querySelector(".words")?.textContent);
                new MutationObserver(look).observe(document.getElementById("turns"), {childList: true, subtree: true});
            }"""
        )
        ask(page, "What is it?")
        expect_answers(page, "A red circle.")
        expect(page.locator(".facts")).to_contain_text(
            re.compile(r"^3\stokens · \S+\stokens/s · first\stoken\safter\s\S+\ss · 3\simage\stokens")
        )
        assert list(dict.fromkeys(filter(None, page.evaluate("shown")))) == ["A ", "A red ", "A red circle."]
        expect(page.locator("#status")).to_have_text("A red circle.")


@pytest.mark.parametrize("way", ["button", pytest.param("Escape", marks=pytest.mark.extended)])
def test_stop_ends_the_work_and_keeps_what_came(page: Page, way: str) -> None:
    backend = PacedBackend(words=["x"] * 100, pace_s=0.1)
    with serving(create_app(backend, ApiOptions())) as url:
        page.goto(f"{url}/")
        ask(page, "What is it?")
        expect(page.locator(".words")).to_have_text(re.compile(r"^x"))
        page.locator("#stop").click() if way == "button" else page.keyboard.press("Escape")
        expect(page.locator(".problem")).to_have_text("Stopped.")
        expect(page.locator("#question")).to_be_focused()
        wait_until(lambda: backend.working == 0)
        backend.words = ["Yes."]
        ask(page, "Still there?")
        expect(page.locator(".words").nth(1)).to_have_text("Yes.")
        assert [message.role for message in backend.asked[-1][0]] == ["user", "assistant", "user"]


def test_stopped_without_a_word_the_question_is_in_the_box_again(page: Page) -> None:
    with serving(create_app(PacedBackend(prepare_s=30), ApiOptions())) as url:
        page.clock.install()
        page.goto(f"{url}/")
        ask(page, "What is it?")
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#status")).to_have_text("Looking.")
        expect(page.locator(".waiting")).to_have_text(re.compile(r"^Looking · \d+ s$"))
        page.clock.fast_forward(12_000)
        expect(page.locator(".waiting")).to_have_text(re.compile(r"^Still waiting, others may be before you · \d+ s$"))
        expect(page.locator("#status")).to_have_text("Still waiting, others may be before you.")
        page.keyboard.press("Escape")
        expect(page.locator("#problem")).to_have_text("Stopped.")
        expect(page.locator("#question")).to_have_value("What is it?")
        expect(page.locator("#turns > li")).to_have_count(0)


FAILURES: dict[str, LlavaServeError] = {
    "no room for you now. Ask again in 40 seconds": RateLimitError("This API key has used its 2 requests.", 40),
    "more than the model can read: 64 tokens": PromptTooLongError(90, 63),
    "cannot use a picture. The PNG image is damaged": InvalidImageError("The PNG image is damaged or cut off."),
    "took too long": DeadlineExceededError("The request's time was up."),
    "not ready": EngineDeadError("The engine has stopped."),
    "does not take this. The field is odd.": RequestError("The field is odd.", "field"),
    "tell who runs the server this number: ": LlavaServeError("an internal one"),
}


def test_a_failure_is_a_sentence_and_the_question_is_in_the_box_again(page: Page) -> None:
    backend = PacedBackend(fail_at=0)
    with serving(create_app(backend, ApiOptions())) as url:
        page.goto(f"{url}/")
        for sentence, failure in FAILURES.items():
            backend.failure = failure
            ask(page, "What is it?")
            expect(page.locator("#problem")).to_contain_text(sentence)
            expect(page.locator("#question")).to_have_value("What is it?")
            said = page.locator("#problem").inner_text()
            assert not re.search(r"HTTP|Bearer|header|\b[45]\d\d\b|max_tokens|_", said), said
        backend.fail_at = 1
        backend.failure = EngineDeadError("The engine has stopped.")
        ask(page, "What is it?")
        expect(page.locator(".words")).to_have_text("A ")
        expect(page.locator(".problem")).to_contain_text("not ready")
    ask(page, "Still there?")
    expect(page.locator("#problem")).to_contain_text("cannot be reached")


@pytest.mark.extended
def test_a_busy_server_is_asked_again(page: Page) -> None:
    backend = PacedBackend(fail_at=0, failure=CapacityError("The server is busy.", 1))
    with serving(create_app(backend, ApiOptions())) as url:
        page.goto(f"{url}/")
        ask(page, "What is it?")
        page.wait_for_function(
            """() => document.getElementById("status").textContent === "The server is busy, asking again."
                && document.querySelector(".waiting").textContent.includes("The server is busy, asking again")"""
        )
        backend.failure = None
        expect_answers(page, "A red circle.")


def test_a_key_is_asked_for_kept_for_the_tab_and_forgotten(page: Page) -> None:
    with serving(create_app(PacedBackend(), ApiOptions(api_keys=("sesame",)))) as url:
        page.goto(f"{url}/")
        expect(page.locator("#problem")).to_have_text("This server asks for a key. Enter the one you were given.")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_contain_text("This key is not accepted.")
        page.locator("#key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#access")).to_be_hidden()
        expect(page.locator("#problem")).to_be_empty()
        page.reload()
        expect(page.locator("#model")).to_contain_text("paced")
        ask(page, "What is it?")
        expect_answers(page, "A red circle.")
        page.locator("#more").click()
        page.locator("#forget").click()
        expect(page.locator("#access")).to_be_visible()
        assert "sesame" not in page.evaluate("JSON.stringify({...sessionStorage, ...localStorage})")
        ask(page, "What is it?")
        expect(page.locator("#key")).to_be_focused()
        page.locator("#key").fill("sesame")
        ask(page, "What is it?")  # the key that stands there is used
        expect_answers(page, "A red circle.", "A red circle.")


def test_options_are_sent_and_checked(page: Page) -> None:
    backend = PacedBackend()
    with serving(create_app(backend, ApiOptions(default_max_tokens=20))) as url:
        page.goto(f"{url}/")
        ask(page, "What is it?")
        expect_answers(page, "A red circle.")
        page.locator("#more").press("Enter")
        expect(page.locator("#length-about")).to_contain_text("20 if you leave it empty")
        page.locator("#temperature").fill("0.7")
        page.locator("#length").fill("5")
        page.keyboard.press("Escape")
        expect(page.locator("#options")).to_be_hidden()
        expect(page.locator("#more")).to_be_focused()
        ask(page, "And now?")
        expect_answers(page, *["A red circle."] * 2)
        page.reload()
        page.locator("#more").click()
        page.locator("#beams").fill("3")
        expect(page.locator("#temperature")).to_be_disabled()
        ask(page, "And now?")
        expect_answers(page, *["A red circle."] * 3)
        page.locator("#length").fill("64")
        ask(page, "And now?")
        expect(page.locator("#length")).to_be_focused()
        expect(page.locator("#question")).to_have_value("And now?")
    used = [(each.temperature, each.max_new_tokens, each.num_beams) for each in backend.samplings]
    assert used == [(0, 20, 1), (0.7, 5, 1), (0, 5, 3)]


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(page: Page, kind: str) -> None:
    with serving(create_app(PacedBackend(description=ROOMY), ApiOptions())) as url:
        page.goto(f"{url}/")
        content = base64.b64encode(PICTURE.read_bytes()).decode()
        give(page, kind, "a.png", content, "image/png")
        give(page, kind, "b.png", content, "image/png")
        expect(page.locator("#pictures img")).to_have_count(2)
        for name, said in (("notes.txt", "notes.txt cannot be read as a picture"), ("c.png", "c.png cannot be read")):
            give(page, kind, name, "bm90ZXM=", "image/png" if name == "c.png" else "text/plain")
            expect(page.locator("#problem")).to_contain_text(said)
        expect(page.locator("#pictures img")).to_have_count(2)


def test_all_by_keyboard(page: Page) -> None:
    """From the first tab stop to an answer, without a pointer."""
    with serving(create_app(PacedBackend(description=ROOMY), ApiOptions())) as url:
        page.goto(f"{url}/")
        expect(page.locator("#model")).to_contain_text("paced")
        page.keyboard.press("Tab")
        expect(page.locator(".example").first).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#question")).to_be_focused()
        expect(page.locator("#question")).to_have_value("What colour is the circle?")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("And the square?")
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("button", name="Remove the example")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#pictures img")).to_have_count(0)
        expect(page.locator("#question")).to_be_focused()
        page.keyboard.press("Enter")
        expect_answers(page, "A red circle.")
        expect(page.locator(".asked p")).to_have_text("What colour is the circle?\nAnd the square?")
        expect(page.locator("#question")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.extended)])
def test_on_a_phone_everything_is_in_view_and_axe_finds_nothing(browser: Browser, scheme: str) -> None:
    with (
        serving(create_app(PacedBackend(description=ROOMY), ApiOptions())) as url,
        browser.new_context(**PHONE, color_scheme=scheme) as context,  # type: ignore[arg-type]
        watched(context.new_page()) as page,
    ):
        page.goto(f"{url}/")
        expect(page.locator("#photograph")).to_be_visible()
        assert page.locator("#camera").get_attribute("capture") == "environment"
        assert not re.search("Drop|paste|Shift|click", page.locator("body").inner_text())
        assert faults_of(page) == []
        page.locator("#file").set_input_files([PICTURE, PICTURE])
        expect(page.locator("#pictures img")).to_have_count(2)
        page.locator("#more").tap()
        assert faults_of(page) == []
        page.locator("#more").tap()
        ask(page, "What is it?")
        expect_answers(page, "A red circle.")
        for part in (".words", "#question", "#ask", ".facts"):
            expect(page.locator(part)).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert faults_of(page) == []
        light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 127")
        assert light == (scheme == "light")


def faults_of(page: Page) -> list[tuple[str, str, list[str]]]:
    """What axe finds, of any impact: the rule and the elements."""
    violations = Axe().run(page).response["violations"]
    return [(each["id"], each["impact"], [node["html"] for node in each["nodes"]]) for each in violations]
