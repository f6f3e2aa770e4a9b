"""LlamaIndex's `OpenAILike`."""

from __future__ import annotations

from typing import Literal

from checks import ANSWER, MODEL, PICTURE, QUESTION, URL, check, main, same
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

model = OpenAILike(
    api_base=URL,
    api_key="none",
    model=MODEL,
    is_chat_model=True,
    context_window=2048,
    max_tokens=64,
    temperature=0,
    max_retries=0,
)
MESSAGES = [
    ChatMessage(
        role=MessageRole.USER,
        blocks=[ImageBlock(url=PICTURE), TextBlock(text=QUESTION)],
    )
]


class Circle(BaseModel):
    colour: Literal["red", "green", "blue"]


@check("chat")
def chat() -> None:
    same(model.chat(MESSAGES).message.content, ANSWER)


@check("stream_chat")
def stream() -> None:
    same("".join(answer.delta for answer in model.stream_chat(MESSAGES)), ANSWER)


@check("achat")
async def asynchronous() -> None:
    same((await model.achat(MESSAGES)).message.content, ANSWER)


@check("complete")
def complete() -> None:
    assert model.complete("What is a circle?").text


@check("structured answers")
def structured() -> None:
    own = OpenAILike(
        api_base=URL,
        api_key="none",
        model=MODEL,
        is_chat_model=True,
        context_window=2048,
        max_tokens=64,
        temperature=0,
        max_retries=0,
        should_use_structured_outputs=True,
    )
    assert isinstance(own.as_structured_llm(Circle).chat(MESSAGES).raw, Circle)


main()
