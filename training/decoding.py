"""A plain greedy decoder to watch training by; the figures that are published come from the library's own path."""

from __future__ import annotations

import torch

from training.model import Llava
from training.prompts import EOS, SYSTEM, Text

# Few at once, and neighbours are of one kind: a batch takes as long as its longest answer.
_AT_ONCE = 24


@torch.no_grad()
def answers(llava: Llava, text: Text, images: torch.Tensor, questions: list[str], most: int = 64) -> list[str]:
    """Greedy answers to one question per image; images are normalised, [n, 3, 160, 160]."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    given = [""] * len(questions)
    for start in range(0, len(order), _AT_ONCE):
        chosen = order[start : start + _AT_ONCE]
        for i, ids in zip(
            chosen, _some(llava, text, images[chosen], [questions[i] for i in chosen], most), strict=True
        ):
            given[i] = text.decode(ids)
    return given


def _some(llava: Llava, text: Text, images: torch.Tensor, questions: list[str], most: int) -> list[list[int]]:
    embed = llava.decoder.model.embed_tokens
    pictures = llava.image_embeddings(images)
    before = embed(torch.tensor(text.before_image(SYSTEM)))
    rows = [
        torch.cat([before, picture, embed(torch.tensor(text.first_question(question)))])
        for picture, question in zip(pictures, questions, strict=True)
    ]
    longest = max(len(row) for row in rows)
    inputs = torch.zeros(len(rows), longest, before.shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        inputs[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    ids = llava.decoder.generate(
        inputs_embeds=inputs,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return [row[: row.index(EOS)] if EOS in row else row for row in ids.tolist()]
