"""Log-probabilities of the prompt: those of transformers' own forward pass, however the prompt is computed."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from llava_serve.engine.executor import prompt_scoring
from llava_serve.engine.sequence import PromptLogprobs
from llava_serve.errors import NumericalError, RequestError, UnsupportedParameterError
from llava_serve.llm import LLM
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import IMAGE_TOKEN_ID, PreparedPrompt
from support.tiny_engine import TinyModel, engine, image, outcomes, prompt, reference_table, run, scores

POISON = 95
START = [1, *range(3, 35)]
RED = image((200, 20, 30), 2)
SCORED = SamplingParams(temperature=0, prompt_logprobs=3, max_new_tokens=4)
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
PROMPTS: dict[str, PreparedPrompt] = {
    "text": prompt([*START, 60, 7]),
    "a picture within": prompt([1, 3], RED, [5, 7, 60]),
    "a picture first": prompt(RED, [5, 7]),
    "a picture last": prompt([1, 4, 9], RED),
    "one token": prompt([5]),
}


def check(found: PromptLogprobs | None, model: TinyModel, one: PreparedPrompt, count: int = 3) -> None:
    """The scores are those of the whole sequence's forward pass by transformers."""
    assert found is not None
    table = reference_table(model, one).log_softmax(-1)
    assert len(found) == one.num_tokens
    for at, (entry, token) in enumerate(zip(found, one.token_ids.tolist(), strict=True)):
        if token == IMAGE_TOKEN_ID:
            assert entry is None
            continue
        assert entry is not None
        assert entry.token_id == token
        if not at:
            assert math.isnan(entry.logprob)
            assert (entry.top, entry.rank) == ((), None)
            continue
        expected = table[at - 1]
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert entry.rank == int((expected > expected[token]).sum()) + 1
        best = expected.topk(count)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mpt", "gemma2-bounded-head"])
@pytest.mark.parametrize("one", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("tokens", [16, 512])  # the prompt in chunks, and whole
def test_scores_are_those_of_transformers(kind: str, one: PreparedPrompt, tokens: int) -> None:
    (found,) = scores(engine(TinyModel(kind), max_batch_tokens=tokens), (one, SCORED))
    check(found, TinyModel(kind), one)


@pytest.mark.parametrize("size", [1, 7])
def test_scores_do_not_depend_on_the_pieces_of_the_logits(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(prompt_scoring, "PIECE", size)
    model = TinyModel()
    largest = 0
    head = model.language_model.lm_head.forward

    def watched(hidden: torch.Tensor) -> Any:
        nonlocal largest
        largest = max(largest, hidden.shape[-2])
        return head(hidden)

    subject = engine(model)
    model.language_model.lm_head.forward = watched
    (found,) = scores(subject, (PROMPTS["text"], SCORED))
    model.language_model.lm_head.forward = head
    check(found, model, PROMPTS["text"])
    assert largest == size, "never the logits of the whole prompt"


def test_the_prefix_cache_is_not_read_but_filled() -> None:
    model = TinyModel()
    subject = engine(model, block_size=4)
    expected = run(engine(model, prefix_caching=False), (PROMPTS["text"], GREEDY))
    assert run(subject, (PROMPTS["text"], GREEDY)) == expected
    before = subject.stats.computed_tokens
    (found,) = scores(subject, (PROMPTS["text"], SCORED))
    check(found, model, PROMPTS["text"])
    assert subject.stats.computed_tokens - before == PROMPTS["text"].num_tokens + SCORED.max_new_tokens - 1
    cached = subject.stats.cached_tokens
    assert run(subject, (PROMPTS["text"], GREEDY)) == expected
    assert subject.stats.cached_tokens > cached


def test_other_choices_share_the_prefix_of_the_one_that_is_scored() -> None:
    model = TinyModel()
    subject = engine(model, block_size=4)
    many = SamplingParams(temperature=0.8, seed=1, n=3, prompt_logprobs=3, max_new_tokens=4)
    (found,) = scores(subject, (PROMPTS["text"], many))
    check(found, model, PROMPTS["text"])
    assert subject.stats.computed_tokens < 2 * PROMPTS["text"].num_tokens


def test_a_prompt_may_be_scored_without_an_answer() -> None:
    model = TinyModel()
    alone = SamplingParams(temperature=0, prompt_logprobs=3, max_new_tokens=0)
    subject = engine(model)
    subject.add(subject.validator.accept("r", PROMPTS["text"], alone))
    (output,) = subject.step()
    assert (output.token_ids, output.finish_reason) == ((), "length")
    check(output.prompt_logprobs, model, PROMPTS["text"])
    assert not subject.has_work


@pytest.mark.parametrize("seed", range(4))
def test_preempted_and_chunked_prompts_among_others(seed: int) -> None:
    """Scored requests among free ones in a cache that holds few of them: the others' answers do not change."""
    rng = random.Random(seed)
    model = TinyModel(rng.choice(("llama", "qwen2")))
    requests = []
    for _ in range(8):
        one = prompt(
            [1, *range(3, rng.choice((5, 9, 30)))], *([RED] if rng.random() < 0.3 else []), [rng.randrange(90)]
        )
        count = rng.choice((1, 12, 25))
        scored: dict[str, Any] = {"prompt_logprobs": rng.choice((0, 3))} if rng.random() < 0.5 else {}
        requests.append((one, SamplingParams(temperature=0, max_new_tokens=count, **scored)))
    plain = [(one, SamplingParams(temperature=0, max_new_tokens=sampling.max_new_tokens)) for one, sampling in requests]
    expected = [run(engine(model, prefix_caching=False), each)[0] for each in plain]
    limits: dict[str, Any] = {"block_size": 4, "blocks": 18, "max_batch_tokens": rng.choice((16, 24, 64))}
    assert run(engine(model, max_num_seqs=4, **limits), *requests) == expected
    for found, (one, sampling) in zip(
        scores(engine(model, max_num_seqs=4, **limits), *requests), requests, strict=True
    ):
        if sampling.prompt_logprobs is None:
            assert found is None
        else:
            check(found, model, one, sampling.prompt_logprobs)


@pytest.mark.parametrize("tokens", [16, 256])
def test_a_prompt_that_is_not_finite_ends_its_request_alone(tokens: int) -> None:
    model = TinyModel()
    model.language_model.get_input_embeddings().weight.data[POISON] = torch.nan
    good = (PROMPTS["text"], SCORED)
    bad = prompt([*START, POISON, *range(40, 70)])
    for sampling in (SCORED, SamplingParams(prompt_logprobs=0, max_new_tokens=0)):
        failed, answered = outcomes(engine(model, max_batch_tokens=tokens), (bad, sampling), good)
        assert isinstance(failed, NumericalError)
        assert [answered] == run(engine(model), good)


def test_bounds_are_those_of_logprobs_and_beams_are_refused() -> None:
    for value in (-1, 21, 1.5):
        with pytest.raises(RequestError, match=r"^prompt_logprobs must be a whole number between 0 and 20"):
            SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="0 goes with prompt_logprobs"):
        SamplingParams(max_new_tokens=0)
    with pytest.raises(UnsupportedParameterError, match="prompt_logprobs cannot be given with num_beams"):
        engine(TinyModel()).validator.accept(
            "r", PROMPTS["text"], SamplingParams(temperature=0, num_beams=2, prompt_logprobs=1)
        )


def test_the_library_has_them_with_their_texts() -> None:
    llm = LLM("builtin")
    result = llm.generate("What is this?", sampling=SamplingParams(temperature=0, prompt_logprobs=2, max_new_tokens=3))
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == result.num_prompt_tokens == len(result.input_ids)
    assert result.prompt_logprobs[0] is None
    for entry, token in zip(result.prompt_logprobs[1:], result.input_ids[1:], strict=True):
        assert entry is not None
        assert entry.token_id == token
        assert entry.text == llm.processor.tokenizer.token_text(token)
        assert len(entry.top) == 2
        assert (entry.rank == 1) == (entry.token_id == entry.top[0][0])
    assert llm.generate("What is this?").prompt_logprobs is None
    chunks = list(llm.stream("What is this?", None, SamplingParams(prompt_logprobs=0, max_new_tokens=3)))
    assert [chunk.prompt_logprobs is not None for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
