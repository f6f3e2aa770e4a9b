"""The official client in Python."""

from __future__ import annotations

from typing import Literal

from checks import ANSWER, MESSAGES, MODEL, PICTURE, QUESTION, URL, check, main, same
from openai import AsyncOpenAI, BadRequestError, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=URL, api_key="none", max_retries=0)
INPUT = [
    {
        "role": "user",
        "content": [{"type": "input_image", "image_url": PICTURE}, {"type": "input_text", "text": QUESTION}],
    }
]


class Circle(BaseModel):
    colour: Literal["red", "green", "blue"]


@check("chat")
def chat() -> None:
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=32)
    same(completion.choices[0].message.content, ANSWER)
    same(completion.choices[0].finish_reason, "stop")


@check("stream")
def stream() -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, temperature=0, stream_options={"include_usage": True}
    ) as events:
        texts = [event.delta for event in events if event.type == "content.delta"]
        completion = events.get_final_completion()
    same("".join(texts), ANSWER)
    same(completion.choices[0].message.content, ANSWER)
    assert len(texts) > 1
    assert completion.usage.completion_tokens > 1


@check("async")
async def asynchronous() -> None:
    async with AsyncOpenAI(base_url=URL, api_key="none", max_retries=0) as own:
        completion = await own.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
        same(completion.choices[0].message.content, ANSWER)
        chunks = await own.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, stream=True)
        same("".join([chunk.choices[0].delta.content or "" async for chunk in chunks]), ANSWER)


@check("logprobs")
def logprobs() -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=2
    )
    tokens = completion.choices[0].logprobs.content
    same("".join(token.token for token in tokens), ANSWER)
    same({len(token.top_logprobs) for token in tokens}, {2})


@check("parse")
def parse() -> None:
    completion = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=64, response_format=Circle
    )
    assert isinstance(completion.choices[0].message.parsed, Circle)


@check("responses")
def responses() -> None:
    response = client.responses.create(model=MODEL, input=INPUT, temperature=0)
    same(response.output_text, ANSWER)
    with client.responses.stream(model=MODEL, input=INPUT, temperature=0) as events:
        texts = [event.delta for event in events if event.type == "response.output_text.delta"]
        same(events.get_final_response().output_text, ANSWER)
    same("".join(texts), ANSWER)


@check("responses.parse")
def responses_parse() -> None:
    response = client.responses.parse(model=MODEL, input=INPUT, temperature=0, text_format=Circle)
    assert isinstance(response.output_parsed, Circle)


@check("models")
def models() -> None:
    same([model.id for model in client.models.list()], [MODEL])
    same(client.models.retrieve(MODEL).id, MODEL)


@check("an error")
def refused() -> None:
    try:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 5000}])
    except BadRequestError as error:
        same(error.code, "context_length_exceeded")
    else:
        raise AssertionError("it was accepted")


main()
