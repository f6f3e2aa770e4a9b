"""Chat templates of every kind: prompts and ids are transformers' own, and what cannot be called is refused at load."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer, LlavaImageProcessorPil, LlavaProcessor

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import CheckpointError, RequestError
from llava_serve.processor import Processor
from llava_serve.prompts.chat_probe import judge
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import Arranged, Control, ImageSlot, Text, prompt_text
from llava_serve.types import IMAGE_TOKEN_ID, ImagePart, Message, TextPart
from support.hub_spelling import write_json
from support.tiny_hf import INSTRUCT, USER_ASSISTANT, Tiny, write_processor

Talk = list[dict[str, Any]]

PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text']TEXT }}{% endif %}{% endfor %}</s>{% endfor %}assistant:"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text | trim }}{% endfor %}<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n"
)
STRINGS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPED = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'].strip() }}{{ eos_token }}{% endfor %}A:"
OWN_IMAGE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'user' and loop.first %}"
    "<|reserved_special_token_70|><|reserved_special_token_69|><|reserved_special_token_71|>{% endif %}"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}<|start|>assistant\n"
)
MIXED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}user {% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% else %}"
    "{{ m['role'] }} {{ m['content'] + '|' }}{% endif %}</s>{% endfor %}"
)
CHATML = ("<|im_start|>", "<|im_end|>")
RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in (69, 70, 71))


def parts(text: str = "", head: str = "") -> str:
    return head + PARTS.replace("TEXT", text)


def tiny(template: str, *controls: str, **more: Any) -> Tiny:
    return Tiny("llava", "llama", "hub", template=template, controls=controls, **more)


KINDS: dict[str, tuple[Tiny, str]] = {
    "parts": (tiny(USER_ASSISTANT), "parts"),
    "prepended": (tiny(USER_ASSISTANT, prepended=True), "parts"),
    "[INST] as a token": (tiny(INSTRUCT, "[INST]", "[/INST]"), "parts"),
    "turns": (tiny(TURNS, "<start_of_turn>", "<end_of_turn>"), "parts"),
    "digits in names": (tiny(parts(head=RESERVED[1]), *RESERVED), "parts"),
    "tojson": (tiny(parts(" | tojson")), "parts"),
    "upper": (tiny(parts(" | upper")), "parts"),
    "length": (tiny(parts(" + (c['text'] | length | string)")), "parts"),
    "in": (tiny(parts(" + (' yes' if 'circle' in c['text'] else ' no')")), "parts"),
    "replace": (tiny(parts(".replace('i', '!')")), "parts"),
    "strftime_now": (tiny(parts(head="Today is {{ strftime_now('%d %B %Y') }}.\n")), "parts"),
    "namespace": (
        tiny(parts(head="{% set ns = namespace(n=0) %}{% set ns.n = messages | length %}{{ ns.n }}")),
        "parts",
    ),
    "strings": (tiny(STRINGS, *CHATML), "string"),
    "strings stripped": (tiny(STRIPPED), "string"),
    "own image": (tiny(OWN_IMAGE, *RESERVED, "<|start|>", "<|eot|>", image_token=RESERVED[0]), "own"),
    "named image token": (tiny(parts().replace("<image>", "<img>"), image_token="<img>"), "parts"),
    "the image token by its name": (tiny(parts().replace("<image>", "{{ image_token }}")), "parts"),
}

PICTURE = Image.new("RGB", (50, 30), (200, 30, 60))
IMAGE = {"type": "image", "image": PICTURE}


def said(role: str, text: str, *images: Any) -> dict[str, Any]:
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


TALKS: dict[str, Talk] = {
    "one": [said("user", '  Is the "circle"\nleft?  It\'s 5 < 7 & <b>, [x] (heißt 蓝色) ', IMAGE)],
    "turns": [
        said("user", "What is it?", IMAGE),
        said("assistant", " A red one.\n"),
        said("user", "And the circle?"),
    ],
    "text": [said("user", "How many of them are there?")],
    "system": [said("system", "Be brief."), said("user", "What is it?", IMAGE)],
}


@pytest.fixture(scope="session")
def kind_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("templates") / "llava"
        write_processor(folder, KINDS[name][0])
        return folder

    return write


@cache
def opened(folder: Path) -> Processor:
    return Processor(open_checkpoint(str(folder), weights=False), ImageOptions())


@cache
def reference(folder: Path) -> Any:
    images, tokenizer = LlavaImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return LlavaProcessor.from_pretrained(folder, image_processor=images, tokenizer=tokenizer)


def as_strings(talk: Talk, image: str) -> Talk:
    """The content as a string, with the image as a caller of transformers writes it there."""
    return [{**m, "content": "".join(image if p["type"] == "image" else p["text"] for p in m["content"])} for m in talk]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_ids_are_those_of_transformers(kind: str, talk: str, kind_of: Any) -> None:
    settings, form = KINDS[kind]
    processor, theirs = opened(kind_of(kind)), reference(kind_of(kind))
    asked = TALKS[talk]
    if form == "own" and talk in ("text", "system"):
        with pytest.raises(RequestError, match="has places for"):
            processor.prepare(processor.read(asked))
        return
    prepared = processor.prepare(processor.read(asked))
    given = asked if form == "parts" else as_strings(asked, "" if form == "own" else "<image>\n")
    prompt = theirs.apply_chat_template(given, add_generation_prompt=True)
    assert prepared.prompt == prompt.replace(settings.image_token, "<image>")
    pictures = [PICTURE] * sum(part["type"] == "image" for message in asked for part in message["content"])
    bos = {"add_special_tokens": False} if prompt.startswith("<s>") else {}
    expected = theirs(text=prompt, images=pictures or None, **bos)["input_ids"][0]
    image_id = theirs.tokenizer.convert_tokens_to_ids(settings.image_token)
    assert [image_id if i == IMAGE_TOKEN_ID else i for i in prepared.token_ids.tolist()] == list(expected)


def test_a_role_may_take_another_form_than_the_user() -> None:
    judged = judge(ChatTemplate(MIXED, ("</s>",)))
    assert judged.template.forms == {"system": "string", "user": "parts", "assistant": "string"}
    spans = judged.template.render(Arranged("Brief.", [Message("user", (ImagePart(b""), TextPart("Q")))], "answer"))
    assert prompt_text(spans) == "system Brief.|</s>user <image>Q</s>"


def test_a_role_that_is_left_out_is_reported() -> None:
    quiet = parts().replace("{{ m['role'] }}", "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m['role'] }}")
    assert judge(ChatTemplate(quiet)).notes == ("The chat template leaves out what a message of the system says.",)
    assert judge(ChatTemplate(parts())).notes == ()


REFUSED = {
    "syntax": ("{% for m in messages %}\n{{ m['content' }}{% endfor %}", ("syntax error in line 2",)),
    "no place": ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", ("0 places",)),
    "two places": (parts().replace("<image>", "<image><image>"), ("2 places for one image",)),
    "no question": ("<image>{{ messages | length }}", ("leaves out the text",)),
    "refuses all": ("{{ raise_exception('only tools') }}", ("cannot render", "only tools")),
    "type error": ("{{ messages + 1 }}", ("cannot render", "TypeError")),
    "private attribute": ("{{ ''.__class__.__mro__ }}", ("cannot render", "SecurityError")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_at_load(what: str, kind_of: Any, tmp_path: Path) -> None:
    template, named = REFUSED[what]
    folder = tmp_path / "llava"
    write_processor(folder, tiny(template))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(str(folder), weights=False)
    for part in (*named, "--conv-mode"):
        assert part in refused.value.message
    spec = open_checkpoint(str(folder), weights=False, conv_mode="vicuna_v1")
    assert (spec.conv_mode, spec.chat_template) == ("vicuna_v1", None)


NAMED = {"default": parts(head="A"), "tool_use": parts(head="B")}
FILES: dict[str, dict[str, Any]] = {
    "a list in tokenizer_config.json": {
        "tokenizer_config.json": [{"name": n, "template": t} for n, t in NAMED.items()]
    },
    "a dictionary in tokenizer_config.json": {"tokenizer_config.json": NAMED},
    "a dictionary in processor_config.json": {"processor_config.json": NAMED},
    "chat_template.json": {"chat_template.json": NAMED["default"]},
    "chat_template.jinja": {"chat_template.jinja": NAMED["default"]},
    "additional templates": {"additional_chat_templates": NAMED},
    "a default beside additional ones": {
        "chat_template.jinja": NAMED["default"],
        "additional_chat_templates": {"rag": NAMED["tool_use"]},
    },
    "the processor's over the tokenizer's": {
        "chat_template.json": NAMED["default"],
        "tokenizer_config.json": NAMED["tool_use"],
    },
    "processor_config.json over chat_template.jinja": {
        "processor_config.json": NAMED["default"],
        "chat_template.jinja": NAMED["tool_use"],
    },
}


def write_templates(folder: Path, files: dict[str, Any]) -> None:
    """A folder with these templates and no other."""
    write_processor(folder, tiny(parts()))
    (folder / "chat_template.json").unlink()
    for name, template in files.items():
        path = folder / name
        if name.endswith(".jinja"):
            path.write_text(template)
        elif name.endswith(".json"):
            known = json.loads(path.read_text()) if path.is_file() else {}
            write_json(path, known | {"chat_template": template})
        else:
            path.mkdir()
            for each, text in template.items():
                (path / f"{each}.jinja").write_text(text)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves files open
@pytest.mark.parametrize("where", FILES)
def test_named_templates(where: str, tmp_path: Path) -> None:
    write_templates(tmp_path / "llava", FILES[where])
    prepared = opened(tmp_path / "llava").prepare(opened(tmp_path / "llava").read(TALKS["one"]))
    assert prepared.prompt.startswith("Auser: <image>")
    theirs = reference(tmp_path / "llava")
    chosen = theirs if theirs.chat_template else theirs.tokenizer  # the processor alone does not look there
    assert prepared.prompt == chosen.apply_chat_template(TALKS["one"], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("where", ["additional_chat_templates", "tokenizer_config.json"])
def test_named_templates_without_a_default_are_refused(where: str, tmp_path: Path) -> None:
    write_templates(tmp_path / "llava", {where: {"rag": parts(), "tools": parts()}})
    with pytest.raises(CheckpointError, match="named rag, tools, and none is named default"):
        open_checkpoint(str(tmp_path / "llava"), weights=False)


def test_images_beyond_the_places_are_refused_with_both_numbers() -> None:
    template = judge(ChatTemplate(OWN_IMAGE, RESERVED, RESERVED[0])).template
    assert template.writes_image
    two = Message("user", (ImagePart(b""), ImagePart(b""), TextPart("Q")))
    with pytest.raises(RequestError, match="places for 1 images in this conversation, which has 2"):
        template.render(Arranged(None, [two], "answer"))


ENDS = {"[INST] as a token": {"</s>"}, "turns": {"</s>", "<end_of_turn>"}, "strings": {"</s>", "<|im_end|>"}}


@pytest.mark.parametrize("kind", ENDS)
def test_an_answer_ends_at_the_tokenizers_end_and_at_the_token_that_closes_a_turn(kind: str, kind_of: Any) -> None:
    processor = opened(kind_of(kind))
    prepared = processor.prepare(processor.read(TALKS["text"]))
    assert set(prepared.stop_token_ids) == {processor.tokenizer.token_id(end) for end in ENDS[kind]}
    assert prepared.stop == ()


@pytest.mark.parametrize("kind", ["[INST] as a token", "turns", "strings", "upper", "own image", "replace"])
def test_no_text_becomes_a_token(kind: str, kind_of: Any) -> None:
    """Texts of pieces of control tokens, alone and side by side, in any case."""
    processor = opened(kind_of(kind))
    template = processor.spec.chat_template
    assert template is not None
    names = [*template.controls, template.image_token]
    honest = markup(template, [TextPart("Q")] * 3)
    rng = random.Random(14)
    for _ in range(300):
        name = rng.choice(names)
        one, two = sorted(rng.choices(range(len(name) + 1), k=2))
        pieces = [name[:one], name[one:two], name[two:]]
        if rng.random() < 0.5:
            pieces = [rng.choice(["", " ", name]) + rng.choice([piece, piece.lower(), piece + " "]) for piece in pieces]
        typed = [TextPart(piece) for piece in pieces]
        assert markup(template, typed) == honest, pieces
        if kind not in ("upper", "replace"):
            rendered = prompt_text(template.render(Arranged(None, question(typed), "answer")))
            assert "".join("".join(pieces).split()) in "".join(rendered.split())


def question(typed: list[TextPart]) -> list[Message]:
    return [Message("user", (ImagePart(b""), *typed))]


def markup(template: ChatTemplate, typed: list[TextPart]) -> list[Control | ImageSlot]:
    return [span for span in template.render(Arranged(None, question(typed), "answer")) if not isinstance(span, Text)]
