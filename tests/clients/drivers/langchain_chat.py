"""LangChain's `ChatOpenAI`."""

from __future__ import annotations

from typing import Literal

from checks import ANSWER, MODEL, PARTS, PICTURE, QUESTION, URL, check, main, same
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(base_url=URL, api_key="none", model=MODEL, temperature=0, max_retries=0)
ASKED = HumanMessage(PARTS)


class Circle(BaseModel):
    colour: Literal["red", "green", "blue"]


@check("invoke")
def invoke() -> None:
    answer = model.invoke([ASKED])
    same(answer.content, ANSWER)
    assert answer.usage_metadata["output_tokens"] > 1


@check("stream")
def stream() -> None:
    same("".join(chunk.content for chunk in model.stream([ASKED])), ANSWER)


@check("abatch")
async def batch() -> None:
    answers = await model.abatch([[ASKED], [ASKED]])
    same([answer.content for answer in answers], [ANSWER] * 2)


@check("an image block")
def image_block() -> None:
    block = {"type": "image", "base64": PICTURE.split(",")[1], "mime_type": "image/png"}
    same(model.invoke([HumanMessage([block, {"type": "text", "text": QUESTION}])]).content, ANSWER)


@check("a history with two system messages")
def history() -> None:
    answer = model.invoke(
        [
            SystemMessage("Be brief."),
            SystemMessage("Be exact."),
            ASKED,
            AIMessage(ANSWER),
            HumanMessage("What colour is the square?"),
        ]
    )
    same(answer.content, "The square is blue.")


@check("with_structured_output")
def structured() -> None:
    assert isinstance(model.with_structured_output(Circle).invoke([ASKED]), Circle)


@check("the Responses API")
def responses() -> None:
    own = ChatOpenAI(base_url=URL, api_key="none", model=MODEL, temperature=0, max_retries=0, use_responses_api=True)
    same(own.invoke([ASKED]).text, ANSWER)
    same("".join(chunk.text for chunk in own.stream([ASKED])), ANSWER)


main()
