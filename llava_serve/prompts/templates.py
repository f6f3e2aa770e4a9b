"""The conversation templates as data, and the choice of one: the original's sixteen, and two of LLaVA-NeXT.

The texts and the separators are those that the released checkpoints were trained or served with, down to a missing
space: other ones change the answers. Source: `llava/conversation.py` of the original.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple


class Style(Enum):
    """How turns are joined; the names are the original's."""

    SINGLE = "single"
    TWO = "two"
    MPT = "mpt"
    LLAMA_2 = "llama_2"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Template:
    """One template.

    Attributes:
        style: how turns are joined.
        system: the system message; a request's own replaces it.
        user, assistant: the roles' marks.
        sep: ends the system message and the user's turns (`SINGLE`, `MPT`: all turns; `LLAMA_2`: opens them).
        sep2: ends the assistant's turns, where it differs.
        system_mark: opens the system message.
        examples: turns shown before the conversation, user first.
    """

    style: Style
    system: str
    user: str
    assistant: str
    sep: str
    sep2: str = ""
    system_mark: str = ""
    examples: tuple[str, ...] = ()

    @property
    def end_of_answer(self) -> str:
        """The text after an answer in this template, at which generation stops."""
        if self.style is Style.PLAIN:
            return ""
        return self.sep2 if self.style in (Style.TWO, Style.LLAMA_2) else self.sep


_POLITE = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_VISUAL = (
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_ENERGY = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively "
    "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be "
    "depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
    "have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n",
)


def _hash(system: str, examples: tuple[str, ...] = ()) -> Template:
    return Template(Style.SINGLE, system, "Human", "Assistant", sep="###", examples=examples)


def _two(system: str) -> Template:
    return Template(Style.TWO, system, "USER", "ASSISTANT", sep=" ", sep2="</s>")


def _inst(system: str, sep: str) -> Template:
    return Template(Style.LLAMA_2, system, "[INST] ", " [/INST]", sep=sep, sep2="</s>")


def _chatml(system: str) -> Template:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Template(Style.MPT, system, *roles, sep="<|im_end|>", system_mark="<|im_start|>system\n")


_V0 = _hash(_POLITE.format("human"), _ENERGY)
_V1 = _two(_POLITE.format("user"))
_QWEN = replace(_chatml("You are a helpful assistant."), sep="<|im_end|>\n")
_LLAMA_3 = Template(
    Style.MPT,
    "You are a helpful language and vision assistant. " + _VISUAL,
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    sep="<|eot_id|>",
    system_mark="<|start_header_id|>system<|end_header_id|>\n\n",
)
_DIRECT = _chatml("Answer the questions.")
_PLAIN = Template(Style.PLAIN, "", "", "", sep="\n")

TEMPLATES: dict[str, Template] = {
    "default": _V0,
    "v0": _V0,
    "v1": _V1,
    "vicuna_v1": _V1,
    "llama_2": _inst(_LLAMA_2, "<s>"),
    "mistral_instruct": _inst("", ""),
    "chatml_direct": _DIRECT,
    "mistral_direct": _DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _hash(_POLITE.format("human")),
    "v0_mmtag": _hash(_MMTAG),
    "llava_v1": _two(_POLITE.format("human")),
    "v1_mmtag": _two(_MMTAG),
    "llava_llama_2": _inst("You are a helpful language and vision assistant. " + _VISUAL, "<s>"),
    "mpt": _chatml(_MPT),
    "qwen_1_5": _QWEN,
    "llava_llama_3": _LLAMA_3,
}

CHAT_TEMPLATE = "chat_template"
"""In the place of a template's key: the one among the checkpoint's files."""

_BY_NAME = (
    ("llama-?2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    (r"v1\.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
    (r"v0(?!\.)", "llava_v0"),
)
"""Words of a name, in the original's order. Whole words: `attempt` holds no `mpt`, and `llama-2b` no `llama-2`."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint's files say about its template.

    Attributes:
        decoder: transformers' `model_type` of the language model.
        has_chatml: `<|im_start|>` is one token of its vocabulary.
        has_headers: `<|start_header_id|>` is one.
        mlp: its projector has several layers, which the first release had not.
        start_end: images stand between `<im_start>` and `<im_end>`, as in the first release.
        tokenizer_template: the chat template of its tokenizer, empty if it has none.
        has_chat_tokens: that one writes tokens that were added to the vocabulary for it.
        grid: images are tiled, as since LLaVA-NeXT.
    """

    decoder: str
    has_chatml: bool = False
    has_headers: bool = False
    mlp: bool = True
    start_end: bool = False
    tokenizer_template: str = ""
    has_chat_tokens: bool = False
    grid: bool = False

    def template(self) -> tuple[str, str]:
        """The template that the files suggest, and why."""
        if self.decoder == "mpt":
            return "mpt", "the decoder is MPT"
        if self.decoder.startswith("qwen"):
            return "qwen_1_5", "the decoder is Qwen"
        if self._needs_its_own():
            return CHAT_TEMPLATE, "the tokenizer has a chat template, and the original has none for such a model"
        if self.has_headers:
            return "llava_llama_3", "the vocabulary has <|start_header_id|>, as Llama 3"
        if self.has_chatml:
            return "chatml_direct", "the vocabulary has <|im_start|>"
        if self.decoder == "mistral":
            return "mistral_instruct", "the decoder is Mistral"
        if "<<SYS>>" in self.tokenizer_template:
            return "llava_llama_2", "the tokenizer's chat template is LLaMA-2's"
        if self.start_end and not self.mlp:
            return "llava_v0", "a linear projector and image start tokens are those of the first release"
        if self.is_guess:
            return "llava_v1", f"there is no chat template, and none is known for {self.decoder}"
        return "llava_v1", "the projector and tokens are those of LLaVA 1.x on Vicuna"

    @property
    def is_guess(self) -> bool:
        """Whether nothing says what a model with such files was trained with."""
        return self._needs_its_own() or not self.decoder.startswith(("llama", "mistral", "mpt", "qwen"))

    def _needs_its_own(self) -> bool:
        """Whether the tokenizer's chat template is a better guess than the original's. LLaVA-NeXT, with a grid, has a
        template for Llama 3; others trained that one with the tokenizer's."""
        if self.decoder not in ("llama", "mistral"):
            return bool(self.tokenizer_template)
        return self.decoder == "llama" and self.has_chat_tokens and not (self.has_chatml or self.grid)

    def allows(self, key: str) -> bool:
        """Whether a checkpoint with such files can have been trained with a template."""
        if key == self.template()[0]:
            return True
        others = self.decoder != "llama" or self.has_chatml or self.has_headers or self._needs_its_own()
        return not others and (key in ("llava_llama_2", "llava_v1") or (key == "llava_v0" and not self.mlp))


class Choice(NamedTuple):
    """A template's key, why it was chosen, and what of the name speaks against it."""

    key: str
    reason: str
    contradiction: str | None = None


def note_on_guess(choice: Choice, content: Content) -> str | None:
    """What is said of a template that is a guess; None of others."""
    if not content.is_guess or choice.key != content.template()[0]:
        return None
    return f"The template is a guess: {choice.reason}. --conv-mode chooses another."


def choose_template(name: str, content: Content) -> Choice:
    """Chooses a template as the original's command line does: by the checkpoint's name, first match wins. Where the
    name matches nothing, or the files contradict it, the files decide.

    Args:
        name: the part of the model's name that decides, from `name_for_templates`.
        content: what the files say.
    """
    by_content, why = content.template()
    for pattern, key in _BY_NAME:
        word = re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", name.lower())
        if word is None:
            continue
        if content.allows(key):
            return Choice(key, f"the name contains {word[0]!r}")
        reason = f"{why}, though the name contains {word[0]!r}"
        return Choice(
            by_content, reason, f"The template is {by_content}: {reason}. --conv-mode {key} takes the name's instead."
        )
    return Choice(by_content, f"{why}, and the name does not decide")
