"""Samples the next tokens of a batch, vectorised over its sequences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from llava_serve.engine.beam import BeamSearch, Candidate
from llava_serve.engine.executor.kernels.selection import current_device, top_p_kernel
from llava_serve.engine.executor.pending_tokens import PendingTokens
from llava_serve.engine.executor.token_mask import mask_tokens
from llava_serve.engine.executor.transfer import HostCopy, to_device, to_host
from llava_serve.engine.sequence import Sequence
from llava_serve.sampling_params import SamplingParams

_MASK = (1 << 64) - 1
MAX_PARTIAL_SORT = 256
"""Best tokens that are sorted before the whole vocabulary is."""


def uniform(seed: int, *words: int) -> float:
    """A number in [0, 1) that depends on its arguments only: SplitMix64's finaliser over them."""
    state = seed & _MASK
    for word in words:
        state = (state + 0x9E3779B97F4A7C15 * (word + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def sample(
    logits: torch.Tensor, sequences: list[Sequence], flags: torch.Tensor, *, again: bool = False
) -> PendingTokens:
    """Samples one token per sequence.

    Args:
        logits: [sequences, vocabulary] in float32 or float64; not changed.
        sequences: those of the logits, in their order.
        flags: bool [any]. They are copied from the device with the tokens.
        again: the sequences' first tokens were refused by their grammars. Now these mask the logits, and the noise is
            another one. Before, grammars mask only where the sampling is truncated. Elsewhere the tokens have the same
            distribution (or greedy are the same ones) if they are sampled from all, and again where that is not
            allowed; and a model that knows its form is seldom refused, while a mask takes long.
    """
    adjusted = logits
    masked = [
        index
        for index, sequence in enumerate(sequences)
        if sequence.matcher is not None and (again or _truncates(sequence.request.sampling))
    ]
    if masked or any(adjusts(sequence) for sequence in sequences):
        adjusted = logits.clone()
        adjust(adjusted, sequences)
        mask_tokens(adjusted, sequences, masked)
    asked: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        if (count := sequence.request.sampling.logprobs) is not None:
            asked.setdefault(count, []).append(index)

    def queue(sort_all: bool) -> tuple[torch.Tensor | None, HostCopy]:
        tokens = sufficient = flags[:0]
        if sequences:
            tokens, sufficient = _sample_tokens(adjusted, sequences, sort_all=sort_all, again=again)
        tables = [_logprobs(logits, tokens, indices, count) for count, indices in asked.items()]
        return None if len(sufficient) else tokens, HostCopy([tokens, sufficient, flags, *tables])

    return PendingTokens(queue, asked)


def _sample_tokens(
    logits: torch.Tensor, sequences: list[Sequence], *, sort_all: bool, again: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [sequences], and bool [any] on the device: `_truncate` has sorted enough; of none where that is certain."""
    chosen = [index for index, sequence in enumerate(sequences) if not sequence.request.sampling.greedy]
    if len(chosen) == len(sequences):
        return _random_sample(logits, sequences, sort_all=sort_all, again=again)
    best = logits.max(dim=-1).indices  # on a CPU three times as fast as argmax
    if not chosen:
        return best, torch.ones(0, dtype=torch.bool, device=logits.device)
    where = _on(logits, chosen)
    own = [sequences[index] for index in chosen]
    sampled, sufficient = _random_sample(logits.index_select(0, where), own, sort_all=sort_all, again=again)
    return best.index_copy_(0, where, sampled), sufficient


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, indices: list[int], count: int) -> torch.Tensor:
    """Of some sequences float64 [sequences, 1 + 2 * count]: the token's log-probability, then ids and log-probabilities
    of the `count` best ones."""
    where = _on(logits, indices)
    table = logits.index_select(0, where).log_softmax(dim=-1)
    own = table.gather(1, tokens.index_select(0, where)[:, None])
    best = table.topk(min(count, table.shape[-1]), dim=-1)
    return torch.cat([own.double(), best.indices.double(), best.values.double()], dim=1)


def adjusts(sequence: Sequence) -> bool:
    """The request changes the logits before a token is sampled."""
    sampling = sequence.request.sampling
    penalized = sampling.repetition_penalty != 1 or bool(sampling.presence_penalty or sampling.frequency_penalty)
    return penalized or bool(sampling.logit_bias) or _must_go_on(sequence)


def _truncates(sampling: SamplingParams) -> bool:
    """Which tokens may be sampled depends on the others."""
    return not sampling.greedy and bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)


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
        where = _on(logits, [at, columns]).unbind(0)
        logits.index_put_(where, _on(logits, values, logits.dtype), accumulate=True)


def _penalize(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Applies the penalties to `logits` [sequences, vocabulary] in place.

    Repetition counts prompt and output tokens, as transformers does; presence and frequency the output, as OpenAI does.
    """
    repeated: list[tuple[int, int]] = []
    factors: list[float] = []
    counted: list[tuple[int, int]] = []
    amounts: list[tuple[float, float, int]] = []
    for index, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sampling.repetition_penalty != 1:
            present = {token for token in sequence.token_ids if token >= 0}
            repeated += [(index, token) for token in present]
            factors += [sampling.repetition_penalty] * len(present)
        if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_output:
            for token, times in Counter(sequence.token_ids[sequence.num_prompt :]).items():
                counted.append((index, token))
                amounts.append((sampling.presence_penalty, sampling.frequency_penalty, times))
    if repeated:
        where = _on(logits, repeated).unbind(1)
        score, factor = logits[where], _on(logits, factors, logits.dtype)
        logits.index_put_(where, torch.where(score < 0, score * factor, score / factor))
    if counted:
        where = _on(logits, counted).unbind(1)
        presence, frequency, count = _on(logits, amounts, logits.dtype).unbind(1)
        logits.index_put_(where, logits[where] - (presence + frequency * count))


def noise(sequence: Sequence, *, again: bool = False) -> float:
    """A sequence's number in [0, 1) for its next token; another one for `again`."""
    return uniform(sequence.request.seed, sequence.index, sequence.num_output, *[1] * again)


def scaled_logits(logits: torch.Tensor, temperature: torch.Tensor, min_p: torch.Tensor | None) -> torch.Tensor:
    """Logits [sequences, vocabulary] by temperatures [sequences, 1], without tokens whose share of the likeliest one's
    probability is below `min_p` [sequences, 1]."""
    # the maximum is subtracted first: a small temperature then makes -inf of the others, and never infinity of two
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return scaled if min_p is None else scaled.masked_fill_(scaled < min_p.log(), float("-inf"))


def _random_sample(
    logits: torch.Tensor, sequences: list[Sequence], *, sort_all: bool, again: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse transform sampling: the noise of a sequence is one number, whatever the batch and the device.

    Returns:
        As `_sample_tokens`.
    """
    samplings = [sequence.request.sampling for sequence in sequences]
    least = _column([one.min_p for one in samplings], logits) if any(one.min_p for one in samplings) else None
    logits = scaled_logits(logits, _column([one.temperature for one in samplings], logits), least)
    kernel = top_p_kernel(logits.dtype, logits.device) if logits.dtype == torch.float32 else None
    sorts = [bool(one.top_k) or (one.top_p < 1 and kernel is None) for one in samplings]
    truncated = [index for index, sort in enumerate(sorts) if sort]
    sufficient = torch.ones(0, dtype=torch.bool, device=logits.device)
    if truncated:
        where = _on(logits, truncated)
        own, chosen = logits.index_select(0, where), [samplings[index] for index in truncated]
        kept, sufficient = _truncate(own, chosen, sort_all=sort_all)
        if _answers_at_once(logits):
            if not sufficient.all():
                kept, _ = _truncate(own, chosen, sort_all=True)
            sufficient = sufficient[:0]
        logits.index_copy_(0, where, kept)
    fractions = [noise(sequence, again=again) for sequence in sequences]
    if kernel is not None:
        top_p = [1.0 if sort else one.top_p for one, sort in zip(samplings, sorts, strict=True)]
        with current_device(logits.device):
            return kernel(logits, _on(logits, top_p, torch.float32), _on(logits, fractions, torch.float64)), sufficient
    # In float64: sums of float32 are rounded so that a token without mass may seem to have some.
    mass = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = _column(fractions, mass) * mass[:, -1:]
    tokens = torch.searchsorted(mass, target, right=True)[:, 0]
    # rounding may put the target at the very end: then the last token with any mass is taken
    last = (mass < mass[:, -1:]).sum(dim=-1)
    return torch.minimum(tokens, last), sufficient


def _answers_at_once(tensor: torch.Tensor) -> bool:
    """A value of the tensor can be read without a wait for work that is queued before it."""
    return tensor.device.type == "cpu"


def _truncate(
    logits: torch.Tensor, samplings: list[SamplingParams], *, sort_all: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the `top_k` best (0: all), of these the fewest that reach `top_p`, at least one. The others become -inf.

    Sorting a vocabulary is slow: without `sort_all` the best few are sorted, which nearly always suffice.

    Returns:
        The logits, and bool [sequences]: so many suffice; elsewhere the logits are not to be used. It is empty where so
        many always suffice.
    """
    vocabulary = logits.shape[-1]
    top_k = [min(one.top_k, vocabulary) or vocabulary for one in samplings]
    limited = [k for k in top_k if k < vocabulary]
    wanted = vocabulary if sort_all else min(vocabulary, max([MAX_PARTIAL_SORT, *limited]))
    kept, sufficient = keep_best(
        logits, _on(logits, top_k)[:, None], _column([one.top_p for one in samplings], logits), wanted
    )
    return kept, sufficient[: 0 if max(top_k) <= wanted else None]


def keep_best(
    logits: torch.Tensor, keep: torch.Tensor, top_p: torch.Tensor, wanted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [sequences, vocabulary] the `keep` best, and of these the fewest that reach `top_p`, both [sequences,
    1], by the `wanted` best; the others become -inf. And bool [sequences], whether so many suffice."""
    vocabulary = logits.shape[-1]
    limit = top_p.clamp(min=torch.finfo(logits.dtype).tiny)  # a share that rounds to 0 would keep no token
    values, order = logits.topk(wanted, dim=-1)
    values = values.masked_fill(torch.arange(wanted, device=logits.device) >= keep, float("-inf"))
    whole = torch.where(keep < vocabulary, values.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
    shares = (values - whole).exp()
    preceding = shares.cumsum(dim=-1) - shares
    sufficient = ((keep <= wanted) | (preceding[:, -1:] >= limit))[:, 0]
    values = values.masked_fill((preceding >= limit) & (limit < 1), float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, order, values), sufficient


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """[sequences, 1], in the precision and on the device of `like`."""
    return _on(like, values, like.dtype)[:, None]


def _on(like: torch.Tensor, values: list[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A list as a tensor on the device of `like`."""
    return to_device(torch.tensor(values, dtype=dtype), like.device)


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
    places, values = to_host([best.indices, best.values])
    return [
        Candidate(int(at) // vocabulary, int(at) % vocabulary, total) for at, total in zip(places, values, strict=True)
    ]
