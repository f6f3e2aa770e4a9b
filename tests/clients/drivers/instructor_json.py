"""instructor, in the mode that needs no tools."""

from __future__ import annotations

from typing import Literal

import instructor
from checks import MESSAGES, MODEL, URL, check, main
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict


class Circle(BaseModel):
    model_config = ConfigDict(extra="forbid")  # instructor does not say so by itself, and a small model adds keys
    colour: Literal["red", "green", "blue"]


ASKED = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 64, "max_retries": 0}
MODE = instructor.Mode.JSON_SCHEMA
SERVER = {"base_url": URL, "api_key": "none", "max_retries": 0}


@check("create")
def create() -> None:
    client = instructor.from_openai(OpenAI(**SERVER), mode=MODE)
    assert isinstance(client.chat.completions.create(response_model=Circle, **ASKED), Circle)


@check("async")
async def asynchronous() -> None:
    client = instructor.from_openai(AsyncOpenAI(**SERVER), mode=MODE)
    assert isinstance(await client.chat.completions.create(response_model=Circle, **ASKED), Circle)


@check("create_partial")
def partial() -> None:
    client = instructor.from_openai(OpenAI(**SERVER), mode=MODE)
    *_, last = client.chat.completions.create_partial(response_model=Circle, **ASKED)
    Circle.model_validate(last.model_dump())


main()
