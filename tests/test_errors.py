"""Every error has an HTTP response, and can be sent between processes."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import Iterator

import pytest

from llava_serve.api.errors import WIRE_ERRORS, error_body, error_response, wire_error
from llava_serve.deadline import deadline_scope
from llava_serve.errors import (
    AccessError,
    CapacityError,
    CheckpointError,
    DeadlineExceededError,
    LlavaServeError,
    NumericalError,
    PromptTooLongError,
    RequestError,
)


def family(root: type[LlavaServeError]) -> Iterator[type[LlavaServeError]]:
    yield root
    for child in root.__subclasses__():
        yield from family(child)


EVERY_CLASS = [cls for cls in family(LlavaServeError) if cls.__module__ == "llava_serve.errors"]


def example(cls: type[LlavaServeError]) -> LlavaServeError:
    if issubclass(cls, PromptTooLongError):
        return cls(2100, 2048)
    if issubclass(cls, CapacityError):
        return cls("A sentence.", 7)
    return cls("A sentence.", "field")


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_every_class_stands_in_the_table(cls: type[LlavaServeError]) -> None:
    assert cls in WIRE_ERRORS


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_every_class_survives_pickling(cls: type[LlavaServeError]) -> None:
    error = example(cls)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_who_knows_only_pythons_own_classes_can_tell_a_bad_request_and_a_timeout() -> None:
    assert issubclass(PromptTooLongError, ValueError)
    assert issubclass(DeadlineExceededError, TimeoutError)
    assert not issubclass(CapacityError, ValueError | TimeoutError)


async def test_a_deadline_keeps_the_sentence_of_an_error_in_its_block() -> None:
    with pytest.raises(DeadlineExceededError, match=r"^The body is late\.$"):
        async with deadline_scope(time.time() + 60):
            raise DeadlineExceededError("The body is late.")
    with pytest.raises(DeadlineExceededError, match="time was up"):
        async with deadline_scope(time.time()):
            await asyncio.sleep(60)


def test_a_class_made_elsewhere_is_looked_up_by_its_parent() -> None:
    class OddRequestError(RequestError):
        pass

    assert wire_error(OddRequestError("x")).status == 400
    assert wire_error(KeyError("x")).status == 500


@pytest.mark.parametrize("error", [KeyError("/srv/secret"), CheckpointError("/srv/secret is broken")])
def test_an_internal_error_reports_the_id_and_no_more(error: Exception) -> None:
    body = error_body(error, "abc")["error"]
    assert body == {
        "message": "The server failed on this request. The request's id is abc.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


def test_headers_say_what_a_client_should_do_next() -> None:
    assert error_response(CapacityError("Full.", 7)).headers["retry-after"] == "7"
    assert error_response(DeadlineExceededError("Late.")).headers["x-should-retry"] == "false"
    assert error_response(NumericalError("NaN.")).headers["x-should-retry"] == "false"
    assert error_response(AccessError("No.")).headers["www-authenticate"] == "Bearer"
    assert json.loads(bytes(error_response(AccessError("No.")).body))["error"]["code"] == "invalid_api_key"
