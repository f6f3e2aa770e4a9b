"""Carries out a schedule on the device: tower, copies, one packed forward pass, logits where a token is drawn."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial

import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.executor import varlen
from llava_serve.engine.executor.attempt import attempt
from llava_serve.engine.executor.attention import PackedStep, Span
from llava_serve.engine.executor.cascade_attention import SharedPrefix, find_shared_prefixes
from llava_serve.engine.executor.cuda_graphs import DecodeGraphs
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.kv_pool import KVPool
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.engine.executor.packed_linear import padded
from llava_serve.engine.scheduler import Schedule, Segment, TileJob
from llava_serve.engine.sequence import Sequence
from llava_serve.errors import CheckpointError
from llava_serve.model.numerics import are_finite
from llava_serve.types import IMAGE_TOKEN_ID


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has computed.

    Attributes:
        logits: [draws, vocabulary] of the segments that draw, in their order, in float32 or better.
        judged: sequences whose numbers were looked at.
        finite: bool [judged]: they are neither NaN nor infinity. Still on the device.
        failures: by request id; what else there is of such a request is of no use.
    """

    logits: torch.Tensor
    judged: list[Sequence]
    finite: torch.Tensor
    failures: dict[str, Exception]


class ModelRunner:
    """Owns every tensor of the engine: the KV memory and the pictures' features.

    Args:
        blocks: of the KV memory, which has one position more: the graphs' spare one.
    """

    def __init__(self, model: VisionLanguageModel, blocks: int, options: EngineOptions) -> None:
        self._model = model
        self._block_size = block_size = options.block_size
        self._features: dict[str, torch.Tensor] = {}
        self._embeddings: dict[tuple[Sequence, int], torch.Tensor] = {}
        layers, kv_heads, head_dim = _kv_shape(model)
        positions = blocks * block_size
        self._memory = KVPool(layers, kv_heads, positions + 1, head_dim, model.dtype, model.device)
        self._decoder = Decoder(model.language_model, compile=options.compile and model.device.type == "cpu")
        self._graphs: DecodeGraphs | None = None
        fast = varlen.available(model.device, model.dtype, kv_heads, head_dim) and self._decoder.recordable
        if fast and options.cuda_graphs and positions >= 2 * options.max_num_seqs:
            keys = min(positions, model.spec.context_length)
            graphs = DecodeGraphs(self._decoder, model.embed, self._memory, options.max_num_seqs, keys, positions)
            self._graphs = graphs if graphs.capture() else None

    def warm_up(self) -> float:
        """Compiles what is to be compiled, and gives what a tile takes.

        Returns:
            seconds of a tile through the tower, but for the first time, in which libraries set up what they need.
        """
        self._decoder.warm_up(self._trial)
        height, width = self._model.spec.image.crop_size
        tile = torch.zeros(1, height, width, 3, dtype=torch.uint8)
        for _ in range(2):
            began = time.perf_counter()
            float(self._model.tower_features(tile).sum())  # on CUDA this waits for it
        return time.perf_counter() - began

    def _trial(self, rows: int) -> tuple[torch.Tensor, PackedStep]:
        """Embeddings and step of so many rows, of which one writes to the spare position of the memory."""
        spare = self._memory.layers[0][0].shape[1] - 1
        step = PackedStep(self._memory, [Span(0, 1, spare, 0)], self._model.dtype, self._model.device, rows - 1)
        return self._model.embed(torch.zeros_like(step.positions)), step

    def run(self, schedule: Schedule) -> StepResult:
        """Does the step's work."""
        for digest in schedule.evicted:
            self._features.pop(digest, None)
        self._encode(schedule.tile_jobs)
        self._memory.copy(schedule.copies)
        failures: dict[str, Exception] = {}
        logits = self._forward(schedule, failures) if schedule.segments else torch.empty(0, 0)
        return StepResult(logits, *self._judge(schedule.segments, logits), failures)

    def _forward(self, schedule: Schedule, failures: dict[str, Exception]) -> torch.Tensor:
        """One packed forward pass. Returns logits [draws, vocabulary]; adds to the failures."""
        spans = self._pack(schedule.segments)
        if self._graphs is not None and all(_decodes(segment) for segment in schedule.segments):
            return self._graphs.run([segment.sequence.token_ids[-1] for segment in schedule.segments], spans)
        padding = max(self._decoder.least_rows, self._filled(schedule.num_tokens)) - schedule.num_tokens
        step = PackedStep(
            self._memory, spans, self._model.dtype, self._model.device, padding, self._alike(schedule.segments)
        )
        hidden = self._decoder.forward(self._embed(schedule.segments, padding, failures), step)
        drawn = [
            span.row + span.length - 1 for span, segment in zip(spans, schedule.segments, strict=True) if segment.draws
        ]
        if not drawn and hidden.is_cuda:
            torch.cuda.current_stream(hidden.device).synchronize()  # nothing else waits, and the pacer times this step
        rows = [*drawn, *[0] * (self._filled(len(drawn)) - len(drawn))]
        return self._decoder.logits(hidden[torch.tensor(rows, dtype=torch.long, device=hidden.device)])[: len(drawn)]

    def _judge(self, segments: tuple[Segment, ...], logits: torch.Tensor) -> tuple[list[Sequence], torch.Tensor]:
        """Which logits to draw from, and which keys and values that are to enter the prefix cache, are finite.

        A causal kernel multiplies what it hides by 0, which leaves NaN as it is: one position spoils earlier ones of
        its tile, and in a chunk of a prompt there may be no logits that tell. So the blocks themselves are looked at.
        """
        judged = [segment.sequence for segment in segments if segment.draws]
        flags = [are_finite(logits, -1)] if judged else []
        for segment in segments:
            if segment.filled:
                start = self._base(segment) + segment.filled.start * self._block_size
                flags.append(self._memory.finite(start, len(segment.filled) * self._block_size))
                judged.append(segment.sequence)
        return judged, torch.cat(flags) if flags else torch.ones(0, dtype=torch.bool)

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence's prefill."""
        for key in [key for key in self._embeddings if key[0] is sequence]:
            del self._embeddings[key]

    def _encode(self, jobs: tuple[TileJob, ...]) -> None:
        """Runs the tower once over the tiles of all jobs."""
        if not jobs:
            return
        tiles = torch.cat([torch.from_numpy(job.tiles) for job in jobs])
        if self._model.device.type == "cuda":  # from pinned memory, so that this thread does not wait for the copy
            tiles = tiles.pin_memory()
        features = self._model.tower_features(tiles)
        parts = torch.split_with_sizes(features, [len(job.tiles) for job in jobs])
        for job, part in zip(jobs, parts, strict=True):
            if job.first == 0:
                self._features[job.digest] = part.new_empty((job.total, *part.shape[1:]))
            self._features[job.digest][job.first : job.first + len(part)] = part

    def _pack(self, segments: tuple[Segment, ...]) -> list[Span]:
        lengths = [segment.end - segment.start for segment in segments]
        rows = itertools.accumulate(lengths, initial=0)
        spans = []
        for segment, row, length in zip(segments, rows, lengths, strict=False):
            spans.append(Span(row, length, self._base(segment), segment.start))
        return spans

    def _base(self, segment: Segment) -> int:
        """Where the memory of a segment's sequence begins."""
        extent = segment.sequence.extent
        assert extent is not None, "a scheduled sequence has its place"
        return extent.start * self._block_size

    def _filled(self, rows: int) -> int:
        """What a product of so many rows is filled up to."""
        return padded(rows) if self._model.device.type == "cpu" else rows

    def _alike(self, segments: tuple[Segment, ...]) -> list[SharedPrefix]:
        """Decoding rows, which come first, that begin alike. On CUDA all extents are read in one go as it is."""
        if self._model.device.type != "cpu":
            return []
        computed = [
            segment.sequence.block_hashes[: segment.start // self._block_size]
            for segment in itertools.takewhile(_decodes, segments)
        ]
        return find_shared_prefixes(computed, self._block_size)

    def _embed(self, segments: tuple[Segment, ...], padding: int, failures: dict[str, Exception]) -> torch.Tensor:
        """Input embeddings [tokens, hidden]: the vocabulary's for text, the projector's for pictures; then padding."""
        ids = [token for segment in segments for token in segment.sequence.token_ids[segment.start : segment.end]]
        tokens = torch.tensor([*ids, *[0] * padding], device=self._model.device)
        embeddings = self._model.embed(tokens.clamp(min=0))
        row = 0
        for segment in segments:
            if IMAGE_TOKEN_ID in segment.sequence.token_ids[segment.start : segment.end]:
                merge = partial(self._merge, embeddings[row : row + segment.end - segment.start], segment)
                if error := attempt(merge):  # a picture that does not fit its prompt
                    failures[segment.sequence.request.request_id] = error
            row += segment.end - segment.start
        return embeddings

    def _merge(self, embeddings: torch.Tensor, segment: Segment) -> None:
        """Writes the pictures of a segment into its embeddings [tokens, hidden]."""
        prompt = segment.sequence.request.prompt
        for at, (start, end) in enumerate(prompt.image_spans):
            first, last = max(start, segment.start), min(end, segment.end)
            if first >= last:
                continue
            key = (segment.sequence, at)
            if key not in self._embeddings:
                features = self._features[prompt.digests[at]]
                self._embeddings[key] = self._model.image_embeddings(features, prompt.image_sizes[at])
            picture = self._embeddings[key]
            embeddings[first - segment.start : last - segment.start] = picture[first - start : last - start]
            if last == end:
                del self._embeddings[key]


def _decodes(segment: Segment) -> bool:
    """The segment is a sequence's last token, and that is text."""
    return segment.draws and segment.end - segment.start == 1 and segment.sequence.token_ids[-1] != IMAGE_TOKEN_ID


def _kv_shape(model: VisionLanguageModel) -> tuple[int, int, int]:
    """(layers, kv heads, head dim) of the language model's cache."""
    config = model.language_model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim


def num_blocks(model: VisionLanguageModel, options: EngineOptions) -> int:
    """Blocks of KV memory within the budget: bytes on a CPU, a fraction of what is free on CUDA and steps do not need.

    Raises:
        CheckpointError: there is no room for one block.
    """
    layers, kv_heads, head_dim = _kv_shape(model)
    budget = options.kv_cache_bytes
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(model.device)[0] - _step_bytes(model, options)
        budget = int(free * options.gpu_memory_fraction)
    blocks = budget // (options.block_size * layers * 2 * kv_heads * head_dim * model.dtype.itemsize)
    if blocks < 1:
        where = "kv_cache_bytes is too small for it" if model.device.type == "cpu" else "the model takes all of it"
        raise CheckpointError(f"There is no memory for a KV cache: {where}.")
    return blocks


def _step_bytes(model: VisionLanguageModel, options: EngineOptions) -> int:
    """What the largest step takes beside weights and KV memory, and rather too much of it: kept features, activations,
    logits with their sorted copies, and what libraries and graphs hold."""
    config = model.language_model.config
    wide: int = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations: int = options.max_batch_tokens * (4 * wide + 10 * config.hidden_size) * model.dtype.itemsize
    logits: int = 4 * options.max_num_seqs * config.vocab_size * 8
    return options.feature_cache_bytes + activations + logits + (512 << 20)
