"""Messages and images to a `PreparedPrompt`: all work on a CPU before the model. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from llava_serve.checkpoints import CheckpointSpec
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError, PromptTooLongError
from llava_serve.images.decode import check_total
from llava_serve.images.decoder import Check, Decoder, InProcessDecoder
from llava_serve.images.fetch import ImageSource, read_local_source, read_request_source
from llava_serve.images.isolated import IsolatedDecoder
from llava_serve.images.tile_cache import CachedTiles, TileCache
from llava_serve.images.tiles import num_tiles
from llava_serve.metrics.images import ImageMetrics
from llava_serve.openai_messages import ChatMessage, read_asked
from llava_serve.prompt_layout import PromptLayout, PromptRenderer, check_ids
from llava_serve.text.tokenizer import load_tokenizer
from llava_serve.tokenization import ModelDescription, TokenizedImage, TokenizedPrompt
from llava_serve.types import (
    IMAGE_TOKEN_ID,
    Asked,
    ImagePart,
    Message,
    PreparedPrompt,
    Query,
    StageTimes,
)

MAX_TOKENIZED = 1_000_000
"""Characters of a text that `Processor.tokenize` counts, whatever the context holds; some seconds of work."""


class Processor:
    """Prepares prompts for one checkpoint. It caches the tiles of the most recent images; safe for several threads.

    Attributes:
        metrics: get what it measures; they are exported once they know where.
    """

    def __init__(self, spec: CheckpointSpec, options: ImageOptions) -> None:
        self.metrics = ImageMetrics()
        self.spec = spec
        self.options = options
        self.tokenizer = load_tokenizer(spec.tokenizer)
        self._renderer = PromptRenderer(spec, options, self.tokenizer)
        self._tile_cache = TileCache(options.cache_bytes)
        self._image = spec.image if options.max_tiles is None else spec.image.limited(options.max_tiles)
        self._decoder: Decoder = (
            IsolatedDecoder(options, self._image, count_ended=self.metrics.decoding_ended)
            if options.isolate
            else InProcessDecoder(options, self._image)
        )

    def close(self) -> None:
        """Ends the processes that decode images. Nothing with an image can be prepared any more."""
        self._decoder.close()

    def prepare(
        self,
        asked: Asked,
        *,
        conv_mode: str | None = None,
        check: Check | None = None,
        cache_salt: str = "",
    ) -> PreparedPrompt:
        """Prepares a query or a conversation. The images are encoded bytes or `data:` URLs: nothing else is read.

        Args:
            asked: of messages, see `arrange`.
            conv_mode: overrides the checkpoint's template.
            check: called before each image, and while a child process decodes one; what it raises ends the work.
            cache_salt: prompts of different ones share nothing that is cached, here and in the engine.

        Raises:
            RequestError: the conversation or an image cannot be used; `PromptTooLongError` says got and limit.
        """
        began = time.perf_counter()
        layout = self._renderer.lay_out(asked, conv_mode, self.spec.context_length)
        length = len(layout.input_ids) - len(layout.images)
        images: list[CachedTiles] = []
        for image in self._decoded(layout, length, check, cache_salt):
            images.append(image)
            length += image.count
        if length >= self.spec.context_length:
            raise PromptTooLongError(length, self.spec.context_length - 1)
        token_ids, image_spans = _expand(layout.input_ids, [image.count for image in images])
        passed = time.perf_counter() - began
        self.metrics.prepared(len(images), passed)
        return PreparedPrompt(
            token_ids=token_ids,
            image_spans=image_spans,
            tiles=tuple(image.tiles for image in images),
            image_sizes=tuple(image.size for image in images),
            digests=tuple(_salted(image.digest, cache_salt) for image in images),
            prompt=layout.prompt,
            stop_token_ids=layout.stop_token_ids,
            stop=layout.stop,
            cache_salt=cache_salt,
            continues=layout.continues,
            stages=_stages(images, passed),
        )

    def tokenize(
        self, asked: Asked, *, conv_mode: str | None = None, check: Check | None = None, texts: bool = False
    ) -> TokenizedPrompt:
        """The tokens of a prompt, which may be longer than the context. No tiles are made.

        Args:
            asked, conv_mode, check: as for `prepare`.
            texts: give the text of each token, too.

        Raises:
            RequestError: as `prepare`; `PromptTooLongError` only for a text over `MAX_TOKENIZED`.
        """
        layout = self._renderer.lay_out(
            asked, conv_mode, max(self.spec.context_length, MAX_TOKENIZED // self.tokenizer.longest)
        )
        images = [
            TokenizedImage(image.count, num_tiles(image.size, self._image.for_images(len(layout.images))), image.size)
            for image in self._decoded(layout, self.spec.context_length, check, "")
        ]
        ids = tuple(_expand(layout.input_ids, [image.tokens for image in images])[0].tolist())
        return TokenizedPrompt(
            token_ids=ids,
            token_texts=tuple(map(self._shown, ids)) if texts else None,
            images=tuple(images),
            max_model_len=self.spec.context_length,
        )

    def _shown(self, token_id: int) -> str:
        return "<image>" if token_id == IMAGE_TOKEN_ID else self.tokenizer.token_text(token_id)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids. Control tokens and images have none.

        Raises:
            RequestError: the vocabulary has no such id.
        """
        spoken = [each for each in token_ids if each != IMAGE_TOKEN_ID]
        check_ids(spoken, self.tokenizer.size, "tokens")
        return self.tokenizer.decode(spoken)

    @property
    def description(self) -> ModelDescription:
        """What the model and the limits of images take."""
        return ModelDescription(
            max_model_len=self.spec.context_length,
            max_images=self.options.max_per_request,
            max_image_bytes=self.options.max_bytes,
            max_image_pixels=self.options.max_pixels,
        )

    def prepare_query(
        self, query: str, images: Sequence[ImageSource] = (), *, conv_mode: str | None = None
    ) -> PreparedPrompt:
        """Prepares one query. The sources are the caller's own: files are read and links followed.

        Raises:
            RequestError: as `prepare`.
        """
        return self.prepare(self.read(query, images), conv_mode=conv_mode)

    def read(self, asked: str | Sequence[ChatMessage], images: Sequence[ImageSource] = ()) -> Query | Sequence[Message]:
        """A question of a library's user, with the images read in the user's process.

        Args:
            asked: a query, or a conversation in OpenAI's form.
            images: of a query.

        Raises:
            RequestError: a message or an image cannot be read; images stand beside a conversation.
        """
        return read_asked(asked, images, lambda source: read_local_source(source, self.options))

    def _decoded(
        self, layout: PromptLayout, length: int, check: Check | None, cache_salt: str
    ) -> Iterator[CachedTiles]:
        """The images of a prompt, without tiles from the one on that does not fit.

        Args:
            length: positions that are taken beside the images; the context's length leaves no room for tiles.
        """
        pixels = self.options.max_total_pixels  # that are left
        for number, (part, path) in enumerate(zip(layout.images, layout.paths, strict=True), 1):
            if check is not None:
                check()
            try:
                room = self.spec.context_length - length
                image = self._process_image(part, room, pixels, len(layout.images), check, cache_salt)
            except InvalidImageError as error:
                which = f"Image {number} of {len(layout.images)}: " if len(layout.images) > 1 else ""
                raise InvalidImageError(which + error.message, path) from error
            yield image
            length += image.count
            pixels -= image.size[0] * image.size[1]

    def _process_image(
        self, part: ImagePart, room: int, pixels: int, num_images: int, check: Check | None, cache_salt: str
    ) -> CachedTiles:
        """An image of at most so many pixels as model input, without its tiles if it has more than `room` positions."""
        data = read_request_source(part.source, self.options)
        key = blake2b(data, digest_size=16, person=self._decoding(num_images)).digest() + cache_salt.encode()
        known = self._tile_cache.get(key)
        self.metrics.looked_up(hit=known is not None)
        if known is not None:
            check_total(known.size[0] * known.size[1], pixels, self.options)
            return known
        began = time.perf_counter()
        made = self._decoder.tiles_of(data, room, check, pixels, num_images)
        decode_s = time.perf_counter() - began - made.tile_s
        self.metrics.decoded(made.size[0] * made.size[1])
        if made.count < room:
            self._tile_cache.put(key, replace(made, tile_s=0.0))
        return replace(made, decode_s=decode_s)

    def _decoding(self, num_images: int) -> bytes:
        """Identifies what the tiles of the same bytes depend on."""
        processing = self._image.for_images(num_images)
        decoding = f"{self.options.transparency} {self.options.max_pixels} {processing}"
        return blake2b(decoding.encode(), digest_size=16).digest()


def _expand(input_ids: Sequence[int], counts: Sequence[int]) -> tuple[NDArray[np.int32], tuple[tuple[int, int], ...]]:
    """One `IMAGE_TOKEN_ID` per image becomes as many as it has features."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for token_id in input_ids:
        if token_id == IMAGE_TOKEN_ID:
            count = counts[len(spans)]
            spans.append((len(ids), len(ids) + count))
            ids += [IMAGE_TOKEN_ID] * count
        else:
            ids.append(token_id)
    assert len(spans) == len(counts)
    return np.asarray(ids, dtype=np.int32), tuple(spans)


def _stages(images: Sequence[CachedTiles], seconds: float) -> StageTimes:
    """How a prompt's time is split: what is no image's is the text's."""
    decode_s, tile_s = sum(image.decode_s for image in images), sum(image.tile_s for image in images)
    return (("decode", decode_s), ("tile", tile_s), ("tokenize", seconds - decode_s - tile_s))


def _salted(digest: str, cache_salt: str) -> str:
    """A digest that only prompts of the same salt share."""
    return blake2b(f"{digest} {cache_salt}".encode(), digest_size=16).hexdigest() if cache_salt else digest
