"""LiteLLM."""

from __future__ import annotations

from typing import Literal

import litellm
from checks import ANSWER, MESSAGES, MODEL, PICTURE, QUESTION, URL, check, main, same
from pydantic import BaseModel

SERVER = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none", "max_retries": 0, "temperature": 0}


class Circle(BaseModel):
    colour: Literal["red", "green", "blue"]


@check("completion")
def completion() -> None:
    same(litellm.completion(messages=MESSAGES, **SERVER).choices[0].message.content, ANSWER)


@check("stream")
def stream() -> None:
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **SERVER))
    same(litellm.stream_chunk_builder(chunks).choices[0].message.content, ANSWER)


@check("acompletion")
async def asynchronous() -> None:
    same((await litellm.acompletion(messages=MESSAGES, **SERVER)).choices[0].message.content, ANSWER)


@check("hosted_vllm")
def hosted_vllm() -> None:
    own = SERVER | {"model": f"hosted_vllm/{MODEL}"}
    same(litellm.completion(messages=MESSAGES, **own).choices[0].message.content, ANSWER)


@check("response_format")
def structured() -> None:
    answer = litellm.completion(messages=MESSAGES, response_format=Circle, **SERVER)
    Circle.model_validate_json(answer.choices[0].message.content)


@check("responses")
def responses() -> None:
    parts = [{"type": "input_image", "image_url": PICTURE}, {"type": "input_text", "text": QUESTION}]
    answer = litellm.responses(input=[{"role": "user", "content": parts}], **SERVER)
    same(answer.output[0].content[0].text, ANSWER)


@check("a context overflow")
def overflow() -> None:
    try:
        litellm.completion(messages=[{"role": "user", "content": "word " * 5000}], **SERVER)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("it was accepted")


main()
