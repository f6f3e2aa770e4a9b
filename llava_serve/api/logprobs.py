"""Log-probabilities on the wire: OpenAI's form, whose tokens joined are the content, and vLLM's form for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from llava_serve.api.protocol import Alternative, ChoiceLogprobs, PromptLogprob, PromptLogprobs, TokenLogprobs
from llava_serve.types import TokenLogprob

_INVALID = "\N{REPLACEMENT CHARACTER}".encode()


class ContentLogprobs:
    """Assigns the tokens of one choice to its content, piece by piece.

    The content leaves out white space at its ends, end tokens and what follows a stop string. A token that is a part of
    the content in part is shown with this part; one that is no part of it is left out.

    Args:
        every: show one that is no part of it, too, with an empty text: who scores a text counts tokens.
    """

    def __init__(self, *, every: bool = False) -> None:
        self._every = every
        self._content = b""  # not assigned yet
        self._tokens: list[TokenLogprob] = []  # not assigned yet
        self._begun = False

    def push(self, text: str, tokens: Sequence[TokenLogprob] | None, *, last: bool) -> ChoiceLogprobs | None:
        """The tokens that are decided by a new piece of content; None where the request asks for none.

        Args:
            text: the piece.
            tokens: those that were generated with it; their text may come in a later piece.
            last: the content is complete.
        """
        if tokens is None:
            return None
        self._content += text.encode()
        self._tokens += tokens
        shown: list[TokenLogprobs] = []
        while self._tokens and (last or self._content):
            token = self._tokens[0]
            opens = not self._begun and not self._content[:1].isspace()  # a continued text may begin with white space
            part = token.token_bytes.lstrip() if opens else token.token_bytes
            if self._content.startswith(part) or self._content.startswith(_INVALID):
                size = len(part) if self._content.startswith(part) else len(_INVALID)
            elif part.startswith(self._content):
                if not last:
                    break
                part, size = self._content, len(self._content)
            else:
                part, size = b"", 0  # a token without text
            self._begun = self._begun or bool(part)
            if part or self._every:
                shown.append(_entry(token, part, opens=opens))
            self._content = self._content[size:]
            del self._tokens[0]
        return ChoiceLogprobs(content=shown)


def prompt_logprobs_of(scored: Sequence[TokenLogprob | None], alternatives: int) -> PromptLogprobs:
    """vLLM's form: at each position the prompt's token, and so many alternatives.

    Args:
        scored: as in a `Chunk`.
    """
    return [None if each is None or each.rank is None else _position(each, alternatives) for each in scored]


def _position(token: TokenLogprob, alternatives: int) -> dict[int, PromptLogprob]:
    best = {
        token_id: PromptLogprob(logprob=logprob, rank=rank, decoded_token=text)
        for rank, (token_id, text, logprob) in enumerate(token.top[:alternatives], 1)
    }
    assert token.rank is not None, "the first token has none, and is left out"
    return {token.token_id: PromptLogprob(logprob=token.logprob, rank=token.rank, decoded_token=token.text)} | best


def _entry(token: TokenLogprob, part: bytes, *, opens: bool) -> TokenLogprobs:
    """A token as far as it is a part of the content. One that opens it has no white space before it, and neither have
    its alternatives."""
    return TokenLogprobs(
        token=token.text if part and part == token.token_bytes else part.decode(errors="replace"),
        bytes=list(part),
        logprob=token.logprob,
        top_logprobs=[
            Alternative(
                token=text.lstrip() if opens else text,
                bytes=list(as_bytes.lstrip() if opens else as_bytes),
                logprob=logprob,
            )
            for (_, text, logprob), as_bytes in zip(token.top, token.top_bytes, strict=True)
        ],
    )
