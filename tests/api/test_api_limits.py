"""What a request may hold is bounded by counts, before any work that grows with it."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from llava_serve.api.validation import MAX_VALUES
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError, PromptTooLongError
from llava_serve.openai_messages import MAX_MESSAGES, MAX_PARTS
from llava_serve.processor import Processor
from llava_serve.types import ImagePart, Message, TextPart
from support.api_server import BODY, PATH, PacedBackend, app_over, error_of, wait_until
from support.demo import DEMO_IMAGE

TEXT = {"type": "text", "text": "Hi"}
TURN = {"role": "user", "content": "Hi"}


def body(**fields: Any) -> bytes:
    return json.dumps(BODY | fields).encode()


@pytest.mark.parametrize(
    ("sent", "message", "param"),
    [
        (body(messages=[1] * 5_000_000), f"The request's body has more than {MAX_VALUES:,} values.", None),
        (body(metadata=[[]] * MAX_VALUES), f"The request's body has more than {MAX_VALUES:,} values.", None),
        (body(messages=[1] * 1000), "'messages[0]' must be an object.", "messages[0]"),
        (
            body(messages=[TURN] * (MAX_MESSAGES + 1)),
            f"'messages' must have {MAX_MESSAGES} items or fewer.",
            "messages",
        ),
        (
            body(messages=[{"role": "user", "content": [TEXT] * (MAX_PARTS + 1)}]),
            f"'messages[0].content' must have {MAX_PARTS} items or fewer.",
            "messages[0].content",
        ),
        (
            body(messages=[{"role": "user", "content": [{}] * 1000}]),
            "'messages[0].content[0].type' is required.",
            "messages[0].content[0].type",
        ),
        (b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "The request's body is not valid JSON.", None),
        (body(**{"x" * 100_000: 1}), f"This server does not support '{'x' * 100}' as given; leave it out.", "x" * 100),
    ],
    ids=["values", "values of a label", "no messages", "messages", "parts", "empty parts", "depth", "a long name"],
)
def test_counts_are_bounded_and_the_first_fault_is_reported(sent: bytes, message: str, param: str | None) -> None:
    backend = PacedBackend()
    with app_over(backend) as web:
        refused = web.post(PATH, content=sent, headers={"Content-Type": "application/json"})
        assert web.post(PATH, json=BODY).status_code == 200
    assert refused.status_code == 400
    assert (error_of(refused)["message"], error_of(refused)["param"]) == (message, param)
    assert len(backend.asked) == 1


def test_the_largest_allowed_counts_are_accepted() -> None:
    backend = PacedBackend()
    with app_over(backend) as web:
        answer = web.post(PATH, content=body(messages=[TURN] * MAX_MESSAGES))
    assert answer.status_code == 200
    assert len(backend.asked[0][0]) == MAX_MESSAGES


def test_the_bytes_in_flight_are_bounded_beside_the_requests() -> None:
    backend = PacedBackend(prepare_s=2)
    large = body(messages=[{"role": "user", "content": "a" * 6000}])
    with app_over(backend, max_in_flight_bytes=10_000) as web:
        first = threading.Thread(target=lambda: web.post(PATH, content=large))
        first.start()
        wait_until(lambda: backend.working == 1)
        refused = web.post(PATH, content=large)
        backend.prepare_s = 0
        small = web.post(PATH, json=BODY)
        first.join()
        again = web.post(PATH, content=large)
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    assert (small.status_code, again.status_code) == (200, 200)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(open_checkpoint("builtin"), ImageOptions(max_per_request=3))


def test_pictures_are_counted_before_anything_is_read(processor: Processor) -> None:
    pictures = tuple(ImagePart(b"no picture") for _ in range(10_000))
    with pytest.raises(InvalidImageError, match="has 10000 images, those of earlier turns included; at most 3"):
        processor.prepare([Message("user", pictures)])


def test_a_text_that_cannot_fit_is_not_tokenized(processor: Processor) -> None:
    with pytest.raises(PromptTooLongError, match="at least") as refusal:
        processor.prepare([Message("user", (TextPart("word " * 200_000),))])
    assert refusal.value.got > refusal.value.limit == processor.spec.context_length - 1
    # What might fit is tokenized, and its exact length reported.
    with pytest.raises(
        PromptTooLongError, match=r"maximum context length is 2048 tokens.* the prompt takes \d+"
    ) as refusal:
        processor.prepare([Message("user", (TextPart("word " * 5000),))])
    assert refusal.value.got > 5000


@pytest.mark.parametrize("text", ["\u2581" * 900, "a" * 900, " " * 900, "\ufdfa" * 100, "é" * 300])
def test_no_text_that_fits_is_refused_by_its_length(processor: Processor, text: str) -> None:
    assert processor.prepare([Message("user", (TextPart(f"Q{text}?"),))]).num_tokens < processor.spec.context_length


def test_many_turns_of_one_role_are_joined(processor: Processor) -> None:
    one = processor.prepare([Message("user", (TextPart("a"),))] * 300)
    assert one.prompt.count("a\n") == 299


def test_a_refusal_names_the_part_of_the_image(processor: Processor) -> None:
    good = ImagePart(DEMO_IMAGE.read_bytes())
    with pytest.raises(InvalidImageError) as refusal:
        processor.prepare([Message("user", (good, TextPart("a"))), Message("user", (ImagePart("data:,"), good))])
    assert refusal.value.param == "messages[1].content[0]"
