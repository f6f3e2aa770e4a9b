"""The same weights in the original's layout and in transformers': a chat gives the same prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.processor import Processor
from llava_serve.prompts.chat_probe import judge
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.types import Conversation, ImagePart, Message, TextPart
from support.demo import DEMO_IMAGE
from support.tiny_hf import USER_ASSISTANT

IMAGE, QUESTION = ImagePart(DEMO_IMAGE.read_bytes()), TextPart("What is it?")
SYSTEM = Message("system", (TextPart("Answer."),))


@pytest.fixture(scope="module")
def layouts() -> tuple[Processor, Processor]:
    """The template of the original, and a chat template that puts images first, as those of LLaVA-1.5 and 1.6 do."""
    original = replace(open_checkpoint("builtin"), conv_mode="llava_v1")
    transformers = replace(
        original, conv_mode="chat_template", chat_template=judge(ChatTemplate(USER_ASSISTANT, ("</s>",))).template
    )
    return Processor(original, ImageOptions()), Processor(transformers, ImageOptions())


@pytest.mark.parametrize(
    "parts",
    [(IMAGE, QUESTION), (QUESTION, IMAGE), (QUESTION, IMAGE, IMAGE), (QUESTION,)],
    ids=["image first", "text first", "two images", "no image"],
)
@pytest.mark.parametrize("begun", [(), (Message("assistant", (TextPart("It is a"),)),)], ids=["", "a prefilled answer"])
def test_both_layouts_give_the_same_prompt(
    layouts: tuple[Processor, Processor], parts: tuple[ImagePart | TextPart, ...], begun: tuple[Message, ...]
) -> None:
    asked = [SYSTEM, Message("user", parts), *begun]
    ours, theirs = (each.prepare(asked) for each in layouts)
    assert ours.prompt == theirs.prompt
    assert np.array_equal(ours.token_ids, theirs.token_ids)
    assert ours.image_spans == theirs.image_spans


def test_a_conversation_as_sent_leaves_a_text_before_its_image(layouts: tuple[Processor, Processor]) -> None:
    message = Message("user", (QUESTION, IMAGE))
    ours, theirs = (each.prepare(Conversation((SYSTEM, message), image_order="as_sent")) for each in layouts)
    assert ours.prompt == "Answer. USER: What is it?<image> ASSISTANT:"
    assert theirs.prompt == "Answer. USER: <image>\nWhat is it? ASSISTANT:"  # a chat template decides by itself
