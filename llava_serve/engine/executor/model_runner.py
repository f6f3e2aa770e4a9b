"""Runs a schedule on the device: tower, copies, one packed forward pass, logits where a token is sampled."""

from __future__ import annotations

import itertools
import time
from functools import partial

import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.executor import varlen
from llava_serve.engine.executor.attempt import attempt
from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.background_compile import BackgroundCompile, background_compile, worth_compiling
from llava_serve.engine.executor.cache_scales import find_scales
from llava_serve.engine.executor.cascade_attention import SharedPrefix, find_shared_prefixes
from llava_serve.engine.executor.cpu_attention import native_kernel
from llava_serve.engine.executor.cuda_graphs import DecodeGraphs, extent_of_two
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.decoder_check import check_decoder
from llava_serve.engine.executor.image_encoder import ImageEncoder
from llava_serve.engine.executor.kernels.selection import DecodeKernel, decode_kernel, top_p_kernel
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.llama_decoder import layer_shape
from llava_serve.engine.executor.model import VisionLanguageModel, kv_shape
from llava_serve.engine.executor.native_decoder import use_native_code
from llava_serve.engine.executor.packed_linear import padded
from llava_serve.engine.executor.prompt_scoring import ScoredPrompt, score_prompt, scored_positions
from llava_serve.engine.executor.step_result import StepResult
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.failures import StepFailures
from llava_serve.engine.scheduler import Schedule, Segment
from llava_serve.engine.sequence import Sequence
from llava_serve.model.numerics import are_finite
from llava_serve.types import IMAGE_TOKEN_ID


class ModelRunner:
    """Owns the engine's tensors: the KV pool, and the features of images.

    Args:
        blocks: of the KV pool, which has one more position for padding.
    """

    def __init__(self, model: VisionLanguageModel, blocks: int, options: EngineOptions) -> None:
        self._model = model
        self._block_size = block_size = options.block_size
        self._encoder = ImageEncoder(model)
        self._embeddings: dict[tuple[Sequence, int], torch.Tensor] = {}
        layers, kv_heads, head_dim = kv_shape(model)
        positions = blocks * block_size
        self.dtype = model.dtype
        self.float8 = float8 = options.kv_cache_dtype == "fp8"
        """Keys and values are stored as 8-bit floats."""
        self._decoder = Decoder(model.language_model, float8=float8)
        self._scales = find_scales(model, self._decoder) if float8 else None
        self._memory = KVPool(layers, kv_heads, positions + 1, head_dim, model.dtype, model.device, self._scales)
        self._compile = options.compile if model.device.type == "cpu" else False
        self._graphs: DecodeGraphs | None = None
        self._kernel: DecodeKernel | None = None
        alibi, cuda = self._decoder.has_alibi, model.device.type == "cuda"
        room = positions >= extent_of_two(block_size) * options.max_num_seqs
        captured = cuda and self._decoder.capturable and options.cuda_graphs and room
        if captured or (cuda and float8):
            shape = layer_shape(model.language_model, kv_heads, head_dim, float8=float8)
            self._kernel = decode_kernel(shape, block_size, alibi=alibi)
        if self._compile is True or (self._compile == "auto" and worth_compiling(model.language_model)):
            self._kernel = native_kernel(model, block_size, float8=float8, alibi=alibi)
        fast = varlen.available(model.device, model.dtype, kv_heads, head_dim, alibi=alibi)
        if float8:  # only this kernel reads them as they are
            fast &= self._kernel is not None
        self.slow_attention = cuda and not fast
        """On a GPU, attention runs without its fast kernel."""
        if captured and (fast or self._kernel is not None):
            self._graphs = self._captured(options.max_num_seqs, positions)

    def _captured(self, max_batch_size: int, positions: int) -> DecodeGraphs | None:
        """The graphs of decode steps, unless they cannot be captured."""
        keys = min(positions, self._model.spec.context_length)
        graphs = DecodeGraphs(
            self._decoder,
            self._model.embed,
            self._memory,
            max_batch_size,
            keys,
            positions,
            self._block_size,
            self._kernel,
            top_p_kernel(torch.float32, self._model.device),
        )
        return graphs if graphs.capture() else None

    def warm_up(self) -> float:
        """Compiles the decoder, where that is to be done before the start, checks it, and measures the tower.

        Returns:
            Seconds of a tile through the tower, at its second run: at the first, libraries set up what they need.

        Raises:
            CheckpointError: it cannot be compiled, or does not compute what transformers computes.
        """
        if self._compile is True:
            self._decoder.compile(self._dummy_step)
        check_decoder(self._model, self._decoder)
        if self._kernel is not None and self._model.device.type == "cpu":
            use_native_code(self._model, self._decoder, self._block_size, float8=self.float8)
        if self._scales is not None:
            check_decoder(self._model, self._decoder, self._scales)
        top_p_kernel(torch.float32, self._model.device)  # its trial
        height, width = self._model.spec.image.crop_size
        tile = torch.zeros(1, height, width, 3, dtype=torch.uint8)
        for _ in range(2):
            started = time.perf_counter()
            float(self._model.tower_features(tile).sum())  # waits for it on CUDA
        return time.perf_counter() - started

    def compile_in_background(self) -> BackgroundCompile | None:
        """Begins to compile the decoder, where the options leave that to the machine and the model."""
        if self._compile != "auto":
            return None
        return background_compile(self._model, self._decoder, self._dummy_step)

    def _dummy_step(self, num_tokens: int) -> tuple[torch.Tensor, PackedStep]:
        """Embeddings and step of a number of tokens; one writes to the padding position, the others are padding."""
        dummy = PackedSequence(0, 1, base=self._memory.layers[0][0].shape[1] - 1, start=0)
        step = PackedStep(self._memory, [dummy], self._model.dtype, self._model.device, num_tokens - 1)
        return self._model.embed(torch.zeros_like(step.positions)), step

    @torch.inference_mode()
    def run_largest(self, options: EngineOptions) -> torch.Tensor:
        """Computes, on zeros, a step of the most tiles, positions and sampled sequences. The KV pool has room for it.

        Returns:
            Its logits [sampled, vocabulary].
        """
        tiles = torch.zeros(options.max_batch_tiles, *self._model.spec.image.crop_size, 3, dtype=torch.uint8)
        features = self._model.tower_features(to_device(tiles, self._model.device))
        most, length = options.max_batch_tokens, self._model.spec.context_length
        sequences = [PackedSequence(at, min(length, most - at), at, 0) for at in range(0, most, length)]
        step = PackedStep(self._memory, sequences, self._model.dtype, self._model.device)
        hidden = self._decoder.forward(self._model.embed(torch.zeros_like(step.positions)), step)
        logits = self._logits(hidden, [*range(min(most, options.max_num_seqs))])
        del features  # a step holds them to its end
        return logits

    def run(self, schedule: Schedule, sampled: torch.Tensor | None = None) -> StepResult:
        """Computes a step. `sampled` are the tokens [segments] of a decode step where only the device has them yet."""
        for digest in schedule.evicted:
            self._encoder.features.pop(digest, None)
        failures = StepFailures()
        began = time.perf_counter()
        digests, finite = self._encoder.encode(schedule.tile_jobs, failures.images)
        vision_s = time.perf_counter() - began
        self._memory.copy(schedule.copies)
        scored: list[ScoredPrompt] = []
        logits, ids = torch.empty(0, 0), None
        if self._graphs is not None and schedule.segments and all(map(_decodes, schedule.segments)):
            sequences = [segment.sequence for segment in schedule.segments]
            logits, ids = self._graphs.run(sequences, self._pack(schedule.segments), sampled)
        elif schedule.segments:
            logits = self._forward(schedule, sampled, scored, failures)
        checked, flags = self._check_finite(schedule.segments, logits)
        flags += [*(flag for each in scored for flag in each.finite), *finite]
        if not flags and self._model.device.type == "cuda":  # nothing else waits, and the engine times this step
            torch.cuda.current_stream(self._model.device).synchronize()
        return StepResult(
            logits,
            [*checked, *(each.sequence for each in scored for _ in each.finite), *digests],
            torch.cat(flags) if flags else torch.ones(0, dtype=torch.bool),
            [(each.sequence, each.logprobs) for each in scored],
            failures,
            vision_s,
            ids,
        )

    def _forward(
        self, schedule: Schedule, sampled: torch.Tensor | None, scored: list[ScoredPrompt], failures: StepFailures
    ) -> torch.Tensor:
        """One packed forward pass. Returns logits [sampled, vocabulary]; adds to `scored` and the failures."""
        segments = schedule.segments
        sequences = self._pack(segments)
        device, num_tokens = self._model.device, schedule.num_tokens
        padding = max(self._decoder.min_tokens, self.padded(num_tokens)) - num_tokens
        prefixes = self._shared_prefixes(segments)
        kernel = (self._block_size, self._kernel)
        step = PackedStep(self._memory, sequences, self._model.dtype, device, padding, prefixes, *kernel)
        hidden = self._decoder.forward(self._embed(segments, sampled, padding, failures), step)
        pairs = [*zip(sequences, segments, strict=True)]
        last = [one.offset + one.length - 1 for one, segment in pairs if segment.needs_sampling]
        for one, segment in pairs:
            if scored_positions(segment):
                own = partial(self._logits, hidden[one.offset : one.offset + one.length])
                result = attempt(partial(score_prompt, segment, own))
                if isinstance(result, Exception):
                    failures.requests[segment.sequence.request.request_id] = result
                else:
                    scored.append(result)
        return self._logits(hidden, last)

    def _logits(self, hidden: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        """[chosen, vocabulary] of some of the hidden states [tokens, hidden]."""
        count = len(chosen)
        indices = torch.tensor([*chosen, *[0] * (self.padded(count) - count)], dtype=torch.long)
        return self._decoder.logits(hidden[to_device(indices, hidden.device)])[:count]

    def _check_finite(
        self, segments: tuple[Segment, ...], logits: torch.Tensor
    ) -> tuple[list[Sequence], list[torch.Tensor]]:
        """Whether the logits to sample from, and the keys and values of new full blocks, are finite.

        Logits alone do not suffice: a chunk of a prompt may have none. And NaN at one position spreads to earlier ones
        of its tile, since kernels multiply the positions that a causal mask hides by 0.
        """
        checked = [segment.sequence for segment in segments if segment.needs_sampling]
        flags = [are_finite(logits, -1)] if checked else []
        for segment in segments:
            if blocks := segment.new_full_blocks:
                start = self._base(segment) + blocks.start * self._block_size
                flags.append(self._memory.finite(start, len(blocks) * self._block_size))
                checked.append(segment.sequence)
        return checked, flags

    def release(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence's prefill."""
        for key in [key for key in self._embeddings if key[0] is sequence]:
            del self._embeddings[key]

    def _pack(self, segments: tuple[Segment, ...]) -> list[PackedSequence]:
        lengths = [segment.end - segment.start for segment in segments]
        offsets = itertools.accumulate(lengths, initial=0)
        return [
            PackedSequence(offset, length, self._base(segment), segment.start)
            for segment, offset, length in zip(segments, offsets, lengths, strict=False)
        ]

    def _base(self, segment: Segment) -> int:
        """Where the extent of a segment's sequence begins in the KV pool."""
        extent = segment.sequence.extent
        assert extent is not None, "a scheduled sequence has an extent"
        return extent.start * self._block_size

    def padded(self, size: int) -> int:
        """The number of tokens to which a product of `size` tokens is padded."""
        return padded(size) if self._model.device.type == "cpu" else size

    def _shared_prefixes(self, segments: tuple[Segment, ...]) -> list[SharedPrefix]:
        """Those of the decoding sequences, which come first. None on CUDA, where one call reads all extents."""
        if self._model.device.type != "cpu":
            return []
        computed = [
            segment.sequence.block_hashes[: segment.start // self._block_size]
            for segment in itertools.takewhile(_decodes, segments)
        ]
        return find_shared_prefixes(computed, self._block_size)

    def _embed(
        self, segments: tuple[Segment, ...], sampled: torch.Tensor | None, padding: int, failures: StepFailures
    ) -> torch.Tensor:
        """Input embeddings [tokens, hidden]: the vocabulary's for text, the projector's for images; then padding."""
        ids = [token for segment in segments for token in segment.sequence.token_ids[segment.start : segment.end]]
        tokens = to_device(torch.tensor([*ids, *[0] * padding]), self._model.device)
        if sampled is not None:
            tokens[: len(sampled)] = sampled
        embeddings = self._model.embed(tokens.clamp(min=0))
        offset = 0
        for segment in segments:
            if IMAGE_TOKEN_ID in segment.sequence.token_ids[segment.start : segment.end]:
                own = embeddings[offset : offset + segment.end - segment.start]
                if error := attempt(partial(self._merge, own, segment, failures.images)):
                    failures.requests[segment.sequence.request.request_id] = error
            offset += segment.end - segment.start
        return embeddings

    def _merge(self, embeddings: torch.Tensor, segment: Segment, failed_images: dict[str, Exception]) -> None:
        """Writes the images of a segment into its embeddings [tokens, hidden]. Raises the error of a failed one."""
        prompt = segment.sequence.request.prompt
        for at, (start, end) in enumerate(prompt.image_spans):
            first, last = max(start, segment.start), min(end, segment.end)
            if first >= last:
                continue
            key = (segment.sequence, at)
            if key not in self._embeddings:
                if error := failed_images.get(prompt.digests[at]):
                    raise error
                features = self._encoder.features[prompt.digests[at]]
                self._embeddings[key] = self._model.image_embeddings(features, prompt.image_sizes[at])
            image = self._embeddings[key]
            embeddings[first - segment.start : last - segment.start] = image[first - start : last - start]
            if last == end:
                del self._embeddings[key]


def _decodes(segment: Segment) -> bool:
    """The segment is the last token of a sequence, and it is text."""
    return (
        segment.needs_sampling and segment.end - segment.start == 1 and segment.sequence.token_ids[-1] != IMAGE_TOKEN_ID
    )
