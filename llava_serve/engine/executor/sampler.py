"""Samples the next tokens of a batch, vectorised over its sequences."""

from __future__ import annotations

from collections import Counter

import torch

from llava_serve.engine.beam import BeamSearch, Candidate
from llava_serve.engine.executor.token_mask import mask_tokens
from llava_serve.engine.sequence import RawLogprob, Sequence

_MASK = (1 << 64) - 1
_PARTIAL_SORT = 256
"""Best tokens that are sorted before the whole vocabulary is."""


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments only: SplitMix64's finaliser over the three."""
    state = seed & _MASK
    for word in (choice, position):
        state = (state + 0x9E3779B97F4A7C15 * (word + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def sample(logits: torch.Tensor, sequences: list[Sequence], flags: torch.Tensor) -> tuple[list[RawLogprob], list[bool]]:
    """Samples one token per sequence.

    Args:
        logits: [sequences, vocabulary] in float32 or float64; not changed.
        sequences: those of the logits, in their order.
        flags: bool [any]. They are copied from the device with the tokens, to synchronize once.

    Returns:
        The tokens, and the flags. Log-probabilities are the model's own, before temperature, penalties and grammars;
        they are computed, with the alternatives, only for requests that ask, and are 0 elsewhere.
    """
    if not sequences:
        return [], flags.tolist()
    tables = _logprobs(logits, sequences)
    if any(_adjusts(sequence) for sequence in sequences):
        logits = logits.clone()
        adjust(logits, sequences)
        mask_tokens(logits, sequences)
    not_greedy = [index for index, sequence in enumerate(sequences) if not sequence.request.sampling.greedy]
    best = logits.max(dim=-1).indices  # on a CPU three times as fast as argmax
    sampled = best[:0]
    if not_greedy:
        sampled = _random_sample(logits[not_greedy], [sequences[index] for index in not_greedy])
    tokens: list[int] = torch.cat([best, sampled, flags]).tolist()
    start = len(sequences) + len(not_greedy)
    for index, token in zip(not_greedy, tokens[len(sequences) : start], strict=True):
        tokens[index] = token
    entries = [
        RawLogprob(token, 0.0) if table is None else _entry(table, token, sequence.request.sampling.logprobs or 0)
        for token, table, sequence in zip(tokens[: len(sequences)], tables, sequences, strict=True)
    ]
    return entries, [bool(flag) for flag in tokens[start:]]


def _logprobs(logits: torch.Tensor, sequences: list[Sequence]) -> list[torch.Tensor | None]:
    """Per sequence [vocabulary], where the request asks for them."""
    asked = [index for index, sequence in enumerate(sequences) if sequence.request.sampling.logprobs is not None]
    tables: list[torch.Tensor | None] = [None] * len(sequences)
    if asked:
        for index, table in zip(asked, logits[asked].log_softmax(dim=-1), strict=True):
            tables[index] = table
    return tables


def _entry(table: torch.Tensor, token: int, count: int) -> RawLogprob:
    best = table.topk(min(count, len(table)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return RawLogprob(token, float(table[token]), top)


def _adjusts(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    penalized = sampling.repetition_penalty != 1 or bool(sampling.presence_penalty or sampling.frequency_penalty)
    return penalized or bool(sampling.logit_bias) or _must_go_on(sequence) or sequence.matcher is not None


def _must_go_on(sequence: Sequence) -> bool:
    """The answer is shorter than the request's `min_tokens`: no token may end it."""
    return sequence.num_output < sequence.request.sampling.min_tokens


def adjust(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Applies biases, penalties and `min_tokens` to `logits` [sequences, vocabulary] in place."""
    _penalize(logits, sequences)
    at: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for index, sequence in enumerate(sequences):
        added = dict(sequence.request.sampling.logit_bias or {})
        if _must_go_on(sequence):
            added |= dict.fromkeys(sequence.request.stop_token_ids, float("-inf"))
        at += [index] * len(added)
        columns += added.keys()
        values += added.values()
    if at:
        where = (torch.tensor(at, device=logits.device), torch.tensor(columns, device=logits.device))
        logits.index_put_(where, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)


def _penalize(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Applies the penalties to `logits` [sequences, vocabulary] in place.

    Repetition counts prompt and output tokens, as transformers does; presence and frequency the output, as OpenAI does.
    """
    for index, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sampling.repetition_penalty != 1:
            present = torch.tensor(sorted({token for token in sequence.token_ids if token >= 0}), device=logits.device)
            score = logits[index, present]
            penalty = sampling.repetition_penalty
            logits[index, present] = torch.where(score < 0, score * penalty, score / penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_output:
            counts = Counter(sequence.token_ids[sequence.num_prompt :])
            tokens = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
            logits[index, tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _random_sample(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Inverse transform sampling: the noise of a sequence is one number, whatever the batch and the device.

    Returns:
        ids [sequences].
    """
    samplings = [sequence.request.sampling for sequence in sequences]
    # the maximum is subtracted first: a small temperature then makes -inf of the others, and never infinity of two
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / _column([one.temperature for one in samplings], logits)
    if any(one.min_p for one in samplings):  # the likeliest token's logit is 0 here
        logits.masked_fill_(logits < _column([one.min_p for one in samplings], logits).log(), float("-inf"))
    truncated = [index for index, sampling in enumerate(samplings) if sampling.top_k or sampling.top_p < 1]
    if truncated:
        chosen = [samplings[index] for index in truncated]
        logits[truncated] = _truncate(logits[truncated], [one.top_k for one in chosen], [one.top_p for one in chosen])
    noise = [uniform(sequence.request.seed, sequence.index, sequence.num_output) for sequence in sequences]
    # In float64: sums of float32 are rounded so that a token without mass may seem to have some.
    mass = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = _column(noise, mass) * mass[:, -1:]
    tokens = torch.searchsorted(mass, target, right=True)[:, 0]
    # rounding may put the target at the very end: then the last token with any mass is taken
    last = (mass < mass[:, -1:]).sum(dim=-1)
    return torch.minimum(tokens, last)


def _truncate(logits: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Keeps the `top_k` best (0: all), of these the fewest that reach `top_p`, at least one. The others become -inf.

    Sorting a vocabulary is slow: the best few are sorted first, and nearly always suffice.
    """
    vocabulary = logits.shape[-1]
    keep = torch.tensor([[min(k, vocabulary) or vocabulary] for k in top_k], device=logits.device)
    limit = _column(top_p, logits).clamp(
        min=torch.finfo(logits.dtype).tiny
    )  # a share that rounds to 0 would keep no token
    for wanted in (min(vocabulary, max([_PARTIAL_SORT, *top_k])), vocabulary):
        values, order = logits.topk(wanted, dim=-1)
        values = values.masked_fill(torch.arange(wanted, device=logits.device) >= keep, float("-inf"))
        whole = torch.where(keep < vocabulary, values.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
        shares = (values - whole).exp()
        preceding = shares.cumsum(dim=-1) - shares
        if bool(((keep <= wanted) | (preceding[:, -1:] >= limit)).all()):
            break
    values = values.masked_fill((preceding >= limit) & (limit < 1), float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, order, values)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """[sequences, 1], in the precision and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def best_candidates(logits: torch.Tensor, search: BeamSearch) -> list[Candidate]:
    """The best extensions of a beam search, best first, `num_candidates` of them.

    Args:
        logits: [active beams, vocabulary] in float32 or float64.
        search: that of the beams.
    """
    vocabulary = logits.shape[-1]
    scores = logits.log_softmax(dim=-1)
    adjust(scores, search.group.active)
    totals = scores + _column(search.totals, scores)
    best = totals.flatten().topk(min(search.num_candidates, totals.numel()))
    return [
        Candidate(at // vocabulary, at % vocabulary, total)
        for at, total in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
