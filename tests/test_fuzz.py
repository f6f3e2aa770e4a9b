"""Fuzzing of what reads a stranger's bytes, by hypothesis: it gives a value or an error of ours, soon, and no other.

`SECONDS` is the time of all of them together in the slow suite; in the extended suite each has one round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st

from llava_serve.api.protocol import ChatRequest, GenerationFields
from llava_serve.api.responses_protocol import ResponseRequest
from llava_serve.api.text_completion import CompletionRequest
from llava_serve.api.tokenization import DetokenizeRequest, TokenizeRequest
from llava_serve.api.validation import conversation_of, parse_request, sampling_of
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError, RequestError
from llava_serve.images.decode import decode_image
from llava_serve.images.fetch import read_request_source
from llava_serve.images.isolated import IsolatedDecoder
from llava_serve.images.links import RequestLinks
from llava_serve.processor import Processor
from llava_serve.wire import Wire
from support.broken_images import FILES
from support.fuzz import EXAMPLES, fuzz
from support.link_reader import Names, refusal

SECONDS = 600.0
OPTIONS = ImageOptions(max_pixels=200_000)
SPEC = open_checkpoint("builtin")


@st.composite
def mutated(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """One of the files with some of its bytes cut, replaced, repeated or moved."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 6))):
        # Half of the changes fall into the first bytes, where headers are.
        at = draw(st.integers(0, min(len(data), 200)) | st.integers(0, len(data)))
        length = draw(st.integers(0, 16))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + length] = draw(st.binary(max_size=16))
            case 1:
                data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
            case 2:
                del data[at : at + length]
            case 3:
                data[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * length
            case 4:
                data[at:] = data[draw(st.integers(0, len(data))) :]
    return bytes(data)


IMAGES = mutated(list(FILES.values())) | st.sampled_from([each[:12] for each in FILES.values()]).flatmap(
    lambda magic: st.binary(max_size=300).map(lambda rest: magic + rest)
)


def check_sentence(error: RequestError) -> None:
    """It is short, and no decoding process has ended over it."""
    assert error.message.endswith(".")
    assert len(error.message) < 1000
    assert error.message != "The picture cannot be decoded."


def decode(data: bytes) -> None:
    """Headers and pixels, in this process: an error of another class shows."""
    try:
        image = decode_image(data, OPTIONS)
    except InvalidImageError as error:
        check_sentence(error)
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= OPTIONS.max_pixels


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "image"]) | JSON_VALUES},
    optional={
        "text": st.text() | JSON_VALUES,
        "image_url": st.fixed_dictionaries({"url": st.text() | JSON_VALUES}) | JSON_VALUES,
        "image": JSON_VALUES,
    },
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant"]) | JSON_VALUES,
        "content": st.text() | st.lists(PARTS, max_size=3) | JSON_VALUES,
    },
    optional={"name": st.text() | JSON_VALUES},
)


def objects(kind: type[Wire], asked: str) -> st.SearchStrategy[dict[str, Any]]:
    """Requests of a kind; its field of this name holds messages, or anything."""
    names = st.sampled_from([name for name in kind.model_fields if name != asked])
    return st.builds(
        lambda given, messages: {"model": "builtin", **given, asked: messages},
        st.dictionaries(names | st.text(max_size=10), JSON_VALUES, max_size=4),
        st.lists(MESSAGES, max_size=3) | JSON_VALUES,
    )


OBJECTS = objects(ChatRequest, "messages")
GOOD_BODY = json.dumps({"model": "builtin", "messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}]})
BODIES = (
    OBJECTS.map(lambda value: json.dumps(value).encode())
    | OBJECTS.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | mutated([GOOD_BODY.encode()])
    | st.binary(max_size=200)
)


def request(body: bytes, processor: Processor) -> None:
    """From bytes to a prompt, as the server does it."""
    try:
        wire = parse_request(body, ChatRequest)
        sampling_of(wire)
        processor.prepare(conversation_of(wire, "images_first")[0], conv_mode=wire.conv_mode)
    except RequestError as error:
        check_sentence(error)


OTHERS = st.one_of(
    [
        st.tuples(st.just(kind), objects(kind, asked).map(lambda value: json.dumps(value).encode()))
        for kind, asked in (
            (CompletionRequest, "prompt"),
            (ResponseRequest, "input"),
            (TokenizeRequest, "messages"),
            (DetokenizeRequest, "tokens"),
        )
    ]
)


def other_request(given: tuple[type[Wire], bytes]) -> None:
    """From bytes to the values that the endpoint works with."""
    kind, body = given
    try:
        wire = parse_request(body, kind)
        if isinstance(wire, ResponseRequest):
            wire = wire.as_chat()
        if isinstance(wire, GenerationFields):
            sampling_of(wire)
        if isinstance(wire, ChatRequest):
            conversation_of(wire, "images_first")
    except RequestError as error:
        check_sentence(error)


SPELLINGS = "http:// https:// HTTP:// // / @ : ? # % %00 %2e [ ] [::1] [::ffff:127.0.0.1] 127.0.0.1 2130706433 0x7f.1"
SPELLINGS += " localhost 169.254.169.254 10.0.0.1 pictures.test xn-- xn--a . .. \\ :80 :0 :99999 a data: ;base64, ,"
ODD = ["\t", "\n", " ", "\0", "\uff61", "\uff11\uff12\uff17", "\u3002", "\u202e", "\ud800"]
URL_PIECES = st.sampled_from([*SPELLINGS.split(), *ODD])
URLS = st.lists(URL_PIECES | st.text(max_size=4), max_size=9).map("".join)


def link(url: str) -> None:
    """No private address is ever connected to, and only printable ASCII is resolved; `Names` knows no address."""
    names = Names(pictures_test=[])
    refusal(RequestLinks(ImageOptions(links="public"), names), "http://" + url)
    assert all(name.isascii() and name.isprintable() for name in names.asked)


def source(url: str) -> None:
    """A request's source is data or refused."""
    for given in (url, "data:" + url, "data:;base64," + url):
        try:
            read_request_source(given, OPTIONS)
        except InvalidImageError as error:
            check_sentence(error)


@dataclass(frozen=True)
class Target:
    subject: Callable[[Any], None]
    inputs: st.SearchStrategy[Any]


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedDecoder]:
    decoder = IsolatedDecoder(OPTIONS, SPEC.image)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def targets(isolated: IsolatedDecoder) -> dict[str, Target]:
    processor = Processor(SPEC, OPTIONS)

    def decode_in_child(data: bytes) -> None:
        try:
            isolated.tiles_of(data, 100_000)
        except InvalidImageError as error:
            check_sentence(error)

    return {
        "images": Target(decode, IMAGES),
        "images in a child process": Target(decode_in_child, IMAGES),
        "request bodies": Target(lambda body: request(body, processor), BODIES),
        "requests of other endpoints": Target(other_request, OTHERS),
        "links": Target(link, URLS),
        "sources": Target(source, URLS),
    }


TARGETS = ("images", "images in a child process", "request bodies", "requests of other endpoints", "links", "sources")


@pytest.mark.extended
@pytest.mark.parametrize("name", TARGETS)
def test_one_round(name: str, targets: dict[str, Target]) -> None:
    assert fuzz(targets[name].subject, targets[name].inputs) >= EXAMPLES


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", TARGETS)
def test_for_minutes(name: str, targets: dict[str, Target]) -> None:
    assert fuzz(targets[name].subject, targets[name].inputs, SECONDS / len(TARGETS)) >= EXAMPLES
