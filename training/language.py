"""Stage 2: vision tower, projector and decoder together, on questions and answers.

python -m training.language --minutes 100
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from training import targets
from training.cache import RUNS, Cache, Facts
from training.decoding import answers
from training.loop import Options, train
from training.model import VISION_WIDTH, Llava, patch_features
from training.packing import Batch, collate, exam, sequences, sequences_question_first
from training.pixels import normalise
from training.prompts import IMAGE, Text
from training.questions import WEIGHTS
from training.scenes import MAX_SHAPES
from training.targets import owners
from training.vision import FOLDER as VISION_FOLDER

FOLDER = RUNS / "language"
# One step in so many trains on pictures that follow their question.
_QUESTION_FIRST_EVERY = 20
# The first two heads of these layers of the decoder are told which shape to look at: binding a word to a place is what
# takes longest to come about by itself. One head of 64 values cannot carry the names of a shape and of its neighbours.
_GUIDED_LAYERS = (1, 2, 3)


@dataclass(frozen=True)
class Settings:
    """Where things are, and per process and step: scenes with questions, questions on each, scenes for the tower alone.

    Then the peak learning rates of decoder and tower, and the weights of the losses of stage 1 and of the guided heads.
    """

    cache: Path
    tokenizer: Path
    vision: Path
    init_from: Path | None
    batch: int = 8
    questions: int = 22
    seen_only: int = 4
    rate: float = 1.1e-3
    tower_rate: float = 2e-4
    dense: float = 0.2
    look: float = 0.1


class LanguageTask:
    """The whole model on questions; stage 1's targets stay on as a smaller part of the loss."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.text = Text(settings.tokenizer)
        self.llava = Llava(self.text.vocabulary)
        self.head = nn.Linear(VISION_WIDTH, targets.OUTPUTS)
        self.module: nn.Module = nn.ModuleDict({"llava": self.llava, "head": self.head})
        self.llava.tower.post_layernorm.requires_grad_(False)
        self.watched: list[torch.Tensor] = []
        for layer in _GUIDED_LAYERS:
            self.llava.decoder.model.layers[layer].self_attn.watched = self.watched
        self._initialise()
        self.cache = Cache(settings.cache / "train")
        self.small = Cache(settings.cache / "small")
        self.test = Cache(settings.cache / "test")

    def _initialise(self) -> None:
        if self.settings.vision.exists():
            state = torch.load(self.settings.vision, weights_only=True)["average"]
            self.llava.tower.load_state_dict(_under("tower.", state))
            self.head.load_state_dict(_under("head.", state))
        if self.settings.init_from is not None:
            from training.export import load

            load(self.llava, self.settings.init_from)

    def rate(self, name: str) -> float:
        tower = name.startswith(("llava.tower.", "head."))
        return self.settings.tower_rate if tower else self.settings.rate

    def loss(self, step: int, rank: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([12, step, rank])
        question_first = step % _QUESTION_FIRST_EVERY == _QUESTION_FIRST_EVERY - 1
        asked = self.settings.batch * (2 if question_first else 1)
        pixels, facts = _draw(self.cache, asked, rng)
        if question_first:
            batch = collate(sequences_question_first(self.text, facts, rng))
        else:
            batch = collate(sequences(self.text, facts, self.settings.questions, rng))
        more_pixels, more_facts = _draw(self.small, self.settings.seen_only, rng)
        return self._loss(np.concatenate([pixels, more_pixels]), facts.joined(more_facts), batch)

    def _loss(self, pixels: NDArray[np.uint8], facts: Facts, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        images = normalise(torch.from_numpy(pixels))
        with torch.autocast("cpu", torch.bfloat16):
            features = patch_features(self.llava.tower, images)
            seen = self.head(features)
            self.watched.clear()
            hidden = self._hidden(self.llava.projector(features[: len(batch.ids)]), batch)
            # Position i predicts token i + 1: only where that token is to be learned is the vocabulary computed.
            learned = batch.weights[:, 1:] > 0
            logits = self.llava.decoder.lm_head(hidden[:, :-1][learned]).float()
        labels, weights = batch.ids[:, 1:][learned], batch.weights[:, 1:][learned]
        spoken = (functional.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        right = (logits.detach().argmax(-1) == labels).float().mean().item()
        dense, figures = targets.loss(seen, targets.targets(facts))
        looked = _off_target(self.watched, batch, facts)
        return spoken + self.settings.dense * dense + self.settings.look * looked, {
            "spoken": spoken.item(),
            "tokens": right,
            "kind": figures["kind"],
            "all": figures["all"],
            "looked": float(looked.detach()),
        }

    def _hidden(self, image: torch.Tensor, batch: Batch) -> torch.Tensor:
        embeddings = self.llava.decoder.model.embed_tokens(batch.ids.clamp(min=0))
        places = (batch.ids == IMAGE).unsqueeze(-1).expand_as(embeddings)
        # The residual stream is kept in half as many bytes, too.
        embeddings = embeddings.to(torch.bfloat16).masked_scatter(places, image.to(torch.bfloat16))
        hidden: torch.Tensor = self.llava.decoder.model(
            inputs_embeds=embeddings, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        return hidden

    def check(self) -> dict[str, float]:
        """Exact matches of free greedy answers to 24 questions of each kind about test scenes."""
        rng = np.random.default_rng(13)
        questions = exam(self.test.facts, rng, list(WEIGHTS), 24)
        pixels = torch.from_numpy(self.test.pixels[[i for i, _ in questions]])
        given = answers(self.llava, self.text, normalise(pixels), [q.text for _, q in questions])
        right: dict[str, list[float]] = {}
        for (_, question), answer in zip(questions, given, strict=True):
            right.setdefault(question.kind, []).append(float(answer == question.answer))
        figures = {kind: sum(values) / len(values) for kind, values in right.items()}
        return {"overall": sum(figures.values()) / len(figures), **figures}


def _off_target(watched: list[torch.Tensor], batch: Batch, facts: Facts) -> torch.Tensor:
    """Mean of -log of what the guided heads see [b, bins * s, p] of the patches of the shapes to look at."""
    if not watched or not batch.looks.any():
        return torch.zeros(())
    rows, tokens, _ = batch.looks.shape
    patches = torch.from_numpy(owners(facts)[:rows, None, :] == np.arange(MAX_SHAPES)[None, :, None])
    wanted = torch.zeros(rows, tokens, watched[0].shape[2], dtype=torch.bool)
    first = (batch.ids == IMAGE).int().argmax(dim=1)
    for row in range(rows):
        seen = batch.looks[row].float() @ patches[row].float() > 0
        wanted[row, :, first[row] : first[row] + seen.shape[1]] = seen
    told = wanted.any(dim=2)
    shares = [(seen.float() * wanted).sum(dim=2)[told] for seen in watched]
    return torch.stack([-(share + 1e-4).log().mean() for share in shares]).mean()


def _draw(cache: Cache, count: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Facts]:
    return cache.batch(rng.integers(len(cache), size=count), rng.random(count) < 0.5)


def _under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def main() -> None:
    """Trains stage 2, or goes on with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--batch", type=int, default=Settings.batch, help="scenes per process and step")
    parser.add_argument("--questions", type=int, default=Settings.questions, help="questions per scene")
    parser.add_argument("--seen-only", type=int, default=Settings.seen_only, help="scenes for the tower alone")
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--tower-rate", type=float, default=Settings.tower_rate)
    parser.add_argument("--dense", type=float, default=Settings.dense, help="weight of stage 1's loss")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=RUNS / "cache")
    parser.add_argument("--tokenizer", type=Path, default=RUNS / "tokenizer.model")
    parser.add_argument("--vision", type=Path, default=VISION_FOLDER / "checkpoint.pt", help="stage 1's checkpoint")
    parser.add_argument("--init-from", type=Path, help="a shipped model's folder to start from")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    o = parser.parse_args()
    settings = Settings(
        o.cache, o.tokenizer, o.vision, o.init_from, o.batch, o.questions, o.seen_only, o.rate, o.tower_rate, o.dense
    )
    train(partial(LanguageTask, settings), Options(o.folder, o.minutes, o.processes))


if __name__ == "__main__":
    main()
