"""Pictures and conversations in the page, in a real browser, with the model that ships: its answers are right."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, Request, expect

from support.api_server import serving
from support.browser import ask, expect_answers
from support.paths import BUILTIN
from support.prefix_proxy import below
from support.scenes import picture

Sent = list[list[list[Image.Image]]]
"""Of each request: the pictures of each message."""
DEMO = BUILTIN / "demo.png"
RIGHT_OF_CIRCLE = "There is a blue square to the right of the circle."
LEFT_OF_SQUARE = "There is a red circle to the left of the square."


@pytest.fixture
def url(web: httpx.Client) -> str:
    return f"{web.base_url}/"


@pytest.fixture
def sent(page: Page) -> Sent:
    """What the page sends to the model; the pictures are decoded, and not turned."""
    requests: Sent = []

    def see(request: Request) -> None:
        if request.url.endswith("/chat/completions"):
            messages = json.loads(request.post_data or "")["messages"]
            requests.append([pictures_of(message["content"]) for message in messages])

    page.on("request", see)
    return requests


def pictures_of(content: str | list[dict[str, dict[str, str]]]) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in content if isinstance(part, dict) and "image_url" in part]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def add(page: Page, *files: Path) -> None:
    """Chooses files, and waits until all are there."""
    there = page.locator("#pictures img").count()
    page.locator("#file").set_input_files(files)
    expect(page.locator("#pictures img")).to_have_count(there + len(files))


def example(page: Page, number: int) -> None:
    """Takes an example and asks its question."""
    page.locator(".example").nth(number).click()
    expect(page.locator("#question")).not_to_have_value("")
    page.locator("#ask").click()


@pytest.mark.parametrize("height", [650, 720, 900])
def test_a_visitor_sees_the_examples_with_their_questions_at_once(page: Page, url: str, height: int) -> None:
    page.set_viewport_size({"width": 1100, "height": height})
    page.goto(url)
    expect(page.locator("#knows")).to_be_visible()
    page.wait_for_function("[...document.querySelectorAll('.example img')].every(each => each.complete)")
    box = page.locator("#form").bounding_box()
    questions = [each.bounding_box() for each in page.locator(".example span").all()]
    assert box is not None
    assert len(questions) == 3
    for question in questions:
        assert question is not None
        assert question["y"] + question["height"] <= box["y"]


def test_a_conversation_goes_on_and_stays_in_the_tab(page: Page, url: str, sent: Sent) -> None:
    page.goto(url)
    expect(page.locator("#knows")).to_contain_text("circles, squares, triangles")
    example(page, 0)
    expect_answers(page, "The circle is red.")
    ask(page, "What is right of the circle?")
    expect_answers(page, "The circle is red.", RIGHT_OF_CIRCLE)
    page.reload()
    expect_answers(page, "The circle is red.", RIGHT_OF_CIRCLE)
    expect(page.locator(".asked img")).to_have_js_property("naturalWidth", 320)
    ask(page, "How many shapes are there?")
    expect(page.locator(".words").nth(2)).to_have_text("There are two shapes in the picture.")
    expect(page.locator(".facts").nth(2)).to_contain_text("100 image tokens")
    assert [[len(pictures) for pictures in request] for request in sent] == [[1], [1, 0, 0], [1, 0, 0, 0, 0]]
    page.locator("#new").click()
    expect(page.locator("#turns > li")).to_have_count(0)
    expect(page.locator("#question")).to_be_focused()
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    example(page, 1)
    expect_answers(page, "There are four shapes in the picture.")


def test_a_picture_can_be_removed_and_an_answer_copied(page: Page, url: str, sent: Sent) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(url)
    page.locator(".example").nth(2).click()
    expect(page.locator("#pictures img")).to_have_count(1)
    add(page, DEMO)
    page.get_by_role("button", name="Remove the example").click()
    expect(page.locator("#pictures img")).to_have_count(1)
    ask(page, "What is left of the square?")
    expect_answers(page, LEFT_OF_SQUARE)
    assert [[image.size for image in pictures] for pictures in sent[0]] == [[(320, 240)]]
    page.locator(".facts button").click()
    expect(page.locator(".facts button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == LEFT_OF_SQUARE


def test_small_pictures_go_as_they_are(page: Page, url: str, sent: Sent, tmp_path: Path) -> None:
    """Their samples and their turn too: the server turns them, and the answer is about the upright picture."""
    lying = tmp_path / "lying.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.open(DEMO).rotate(90, expand=True).save(lying, quality=95, exif=exif)
    page.goto(url)
    add(page, lying)
    expect(page.locator("#pictures img")).to_have_js_property("naturalWidth", 320)  # upright
    expect(page.locator("#pictures small")).to_have_text("320 x 240")
    ask(page, "What is left of the square?")
    expect_answers(page, LEFT_OF_SQUARE)
    assert (sent[0][0][0].format, sent[0][0][0].size) == ("JPEG", (240, 320))


def test_a_large_photograph_is_turned_and_scaled_and_the_page_says_so(
    page: Page, url: str, sent: Sent, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(DEMO).resize((3200, 2400)).rotate(90, expand=True).save(photo, quality=90, exif=exif)
    page.goto(url)
    add(page, photo)
    expect(page.locator("#pictures small")).to_have_text("2560 x 1920, scaled from 3200 x 2400 to 2560 x 1920 pixels")
    ask(page, "What is left of the square?")
    expect_answers(page, LEFT_OF_SQUARE)
    expect(page.locator(".asked small")).to_have_text("scaled from 3200 x 2400 to 2560 x 1920 pixels")
    (image,) = sent[0][0]
    assert (image.format, image.size, image.getexif().get(0x0112)) == ("JPEG", (2560, 1920), None)
    red, blue = (image.convert("RGB").getpixel((x, 1000)) for x in (800, 1770))
    assert red[0] > 180 > blue[0]  # type: ignore[index]
    assert blue[2] > 180 > red[2]  # type: ignore[index]


@pytest.mark.extended
def test_what_is_lost_in_a_picture_is_as_little_as_can_be(page: Page, url: str, sent: Sent, tmp_path: Path) -> None:
    """A narrow picture keeps its shorter side, a clear PNG is scaled without loss, and noise becomes a JPEG."""
    Image.open(DEMO).resize((9000, 1000)).save(tmp_path / "narrow.png")
    clear = Image.open(DEMO).convert("RGBA").resize((5120, 3840))
    clear.putalpha(128)
    clear.save(tmp_path / "clear.png")
    picture(2200, 1800).save(tmp_path / "noise.png")
    Image.open(DEMO).save(tmp_path / "icon.ico", sizes=[(200, 150)])
    page.goto(url)
    add(page, *(tmp_path / name for name in ("narrow.png", "clear.png", "noise.png", "icon.ico")))
    expect(page.locator("#pictures small")).to_have_text(
        [
            "9000 x 1000",
            "2560 x 1920, scaled from 5120 x 3840 to 2560 x 1920 pixels",
            "2200 x 1800, sent as JPEG",
            "200 x 150, sent as PNG",
        ]
    )
    ask(page, "What is it?")
    expect(page.locator(".facts")).to_contain_text("400 image tokens")
    narrow, scaled, noise, icon = sent[0][0]
    assert [each.format for each in (narrow, scaled, noise, icon)] == ["PNG", "PNG", "JPEG", "PNG"]
    assert [each.size for each in (narrow, scaled, noise, icon)] == [
        (9000, 1000),
        (2560, 1920),
        (2200, 1800),
        (200, 150),
    ]
    assert scaled.convert("RGBA").getpixel((800, 1000))[3] == 128  # type: ignore[index]


@pytest.mark.extended
def test_what_does_not_fit_the_tabs_memory_is_said(page: Page, url: str, tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    for number, name in enumerate(names):
        picture(1150 + number, 1000).save(tmp_path / name)
    page.goto(url)
    add(page, *(tmp_path / name for name in names))
    ask(page, "What is it?")
    expect(page.locator("#problem")).to_contain_text("too large for the tab to keep")
    expect(page.locator(".facts")).to_contain_text("300 image tokens")
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()


@pytest.mark.extended
def test_too_many_pictures_are_refused_in_the_page(page: Page, url: str) -> None:
    page.goto(url)
    page.locator("#file").set_input_files([DEMO] * 17)
    expect(page.locator("#problem")).to_contain_text("A conversation may have 16 pictures here.")
    expect(page.locator("#pictures img")).to_have_count(16)


def test_the_page_works_below_a_path_of_a_proxy(page: Page, url: str) -> None:
    with serving(below("/some/where", url)) as proxy:
        assert httpx.get(f"{proxy}/page/page.js", timeout=60).status_code == 404
        page.goto(f"{proxy}/some/where/")
        example(page, 2)
        expect_answers(page, "There is a pink heart to the left of the star.")
