"""pydantic-ai's agents."""

from __future__ import annotations

from typing import Literal

from checks import ANSWER, MODEL, PICTURE, QUESTION, URL, check, main, same
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=URL, api_key="none")
chat = OpenAIChatModel(MODEL, provider=provider)
PROMPT = [BinaryContent.from_data_uri(PICTURE), QUESTION]
GREEDY = {"temperature": 0.0}


class Circle(BaseModel):
    colour: Literal["red", "green", "blue"]


@check("run")
async def run() -> None:
    same((await Agent(chat, instructions="Be brief.").run(PROMPT, model_settings=GREEDY)).output, ANSWER)


@check("run_stream")
async def stream() -> None:
    async with Agent(chat).run_stream(PROMPT, model_settings=GREEDY) as result:
        texts = [text async for text in result.stream_text(delta=True, debounce_by=None)]
    same("".join(texts), ANSWER)


@check("a second turn")
async def history() -> None:
    agent = Agent(chat)
    first = await agent.run(PROMPT, model_settings=GREEDY)
    second = await agent.run("What colour is the square?", message_history=first.all_messages(), model_settings=GREEDY)
    same(second.output, "The square is blue.")


@check("NativeOutput")
async def native() -> None:
    agent = Agent(chat, output_type=NativeOutput(Circle))
    assert isinstance((await agent.run(PROMPT, model_settings=GREEDY)).output, Circle)


@check("the Responses API")
async def responses() -> None:
    agent = Agent(OpenAIResponsesModel(MODEL, provider=provider))
    same((await agent.run(PROMPT, model_settings=GREEDY)).output, ANSWER)


main()
