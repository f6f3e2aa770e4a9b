"""Turns the engine's token ids into chunks of text, for `LLM` and `AsyncLLM`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from llava_serve.engine.failures import request_failure
from llava_serve.engine.sequence import EngineRequest, Output, RawLogprob
from llava_serve.results import Completion, GenerationResult
from llava_serve.text.detokenizer import Detokenizer
from llava_serve.text.tokenizer import Tokenizer
from llava_serve.types import Chunk, PreparedPrompt, TokenLogprob


class OutputProcessor:
    """Detokenizes all choices of one request, and cuts them at stop strings.

    `ignore_eos` turns the template's stop strings off, as it does the end tokens; the request's own stay. So does
    structured output, whose grammar says where the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._open = {index: self._detokenizer() for index in range(request.sampling.n)}

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return not self._open

    def push(self, output: Output) -> Chunk | None:
        """The chunk of an output; None if its choice has ended already.

        A chunk with a finish reason where the output has none has met a stop string: the caller aborts that choice.

        Raises:
            LlavaServeError: the request has failed, in the engine or here.
        """
        if output.error is not None:
            raise output.error
        try:
            return self._push(output)
        except Exception as error:
            raise request_failure(self._request.request_id, error) from None

    def _detokenizer(self) -> Detokenizer:
        sampling, prompt = self._request.sampling, self._request.prompt
        return Detokenizer(
            self._tokenizer,
            sampling.stop,
            template_stop=() if sampling.ignore_eos or sampling.structured else prompt.stop,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
            after=[token for token in prompt.token_ids.tolist() if token >= 0] if prompt.continues else (),
        )

    def _push(self, output: Output) -> Chunk | None:
        detokenizer = self._open.get(output.index)
        if detokenizer is None:
            return None
        text = detokenizer.push(self._spoken(output), last=output.finish_reason is not None)
        reason = "stop" if detokenizer.stopped else output.finish_reason
        if reason is not None:
            del self._open[output.index]
        return Chunk(
            index=output.index,
            text=text,
            token_ids=output.token_ids,
            finish_reason=reason,
            logprobs=None if output.logprobs is None else tuple(map(self._logprob, output.logprobs)),
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            prompt_logprobs=None
            if output.prompt_logprobs is None
            else tuple(map(self._scored, output.prompt_logprobs)),
            stages=output.stages,
        )

    def _scored(self, raw: RawLogprob | None) -> TokenLogprob | None:
        """A position of the prompt: a control token has no part in its text."""
        if raw is None or self._tokenizer.has_text(raw.token_id):
            return None if raw is None else self._logprob(raw)
        return dataclasses.replace(self._logprob(raw), token_bytes=b"")

    def _spoken(self, output: Output) -> tuple[int, ...]:
        """The ids whose text is part of the answer: an id that ends it is not, unless the request asks for it."""
        ended = output.finish_reason == "stop" and not self._request.sampling.include_stop_str_in_output
        if ended and output.token_ids and output.token_ids[-1] in self._request.stop_token_ids:
            return output.token_ids[:-1]
        return output.token_ids

    def _logprob(self, raw: RawLogprob) -> TokenLogprob:
        text, as_bytes = self._tokenizer.token_text, self._tokenizer.token_bytes
        return TokenLogprob(
            token_id=raw.token_id,
            text=text(raw.token_id),
            logprob=raw.logprob,
            top=tuple((token, text(token), logprob) for token, logprob in raw.top),
            token_bytes=as_bytes(raw.token_id),
            top_bytes=tuple(as_bytes(token) for token, _ in raw.top),
            rank=raw.rank,
        )


def join_chunks(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Joins chunks to one per choice, in the order in which the choices appear."""
    by_choice: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_choice.setdefault(chunk.index, []).append(chunk)
    return [parts[0] if len(parts) == 1 else _join(parts) for parts in by_choice.values()]


def _join(parts: Sequence[Chunk]) -> Chunk:
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return dataclasses.replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(entry for part in logprobs for entry in part) if logprobs else None,
        prompt_logprobs=parts[0].prompt_logprobs,
        stages=parts[0].stages,
    )


def collect(prompt: PreparedPrompt, chunks: Iterable[Chunk]) -> GenerationResult:
    """The result of a prompt from all chunks of all its choices."""
    choices = sorted(join_chunks(chunks), key=lambda choice: choice.index)
    scored = choices[0].prompt_logprobs
    return GenerationResult(
        prompt=prompt.prompt,
        input_ids=prompt.input_ids,
        num_prompt_tokens=prompt.num_tokens,
        outputs=tuple(_completion(choice) for choice in choices),
        num_cached_tokens=choices[0].num_cached_tokens,
        prompt_logprobs=None if scored is None else (None, *scored[1:]),
        num_image_tokens=prompt.num_image_tokens,
    )


def _completion(choice: Chunk) -> Completion:
    assert choice.finish_reason is not None, "a choice's last chunk has a finish reason"
    return Completion(choice.index, choice.text, choice.token_ids, choice.finish_reason, choice.logprobs)
