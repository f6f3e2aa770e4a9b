"""Messages and images to a `PreparedPrompt`: all work on a CPU before the model. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from llava_serve.openai_messages import ChatMessage, read_asked
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import (
    Arranged,
    Control,
    Span,
    arrange,
    chat_turn,
    control_spans,
    prompt_text,
    query_message,
    render,
)
from llava_serve.prompts.templates import TEMPLATES
from llava_serve.text.tokenizer import load_tokenizer
from llava_serve.types import IMAGE_TOKEN_ID, Conversation, ImagePart, Message, PreparedPrompt, Query, TextPart


class Processor:
    """Prepares prompts for one checkpoint. It caches the tiles of the most recent images; safe for several threads.

    Args:
        count_ended: called for each child process that ended, or was ended, while it decoded an image.
    """

    def __init__(
        self, spec: CheckpointSpec, options: ImageOptions, count_ended: Callable[[], None] | None = None
    ) -> None:
        self.spec = spec
        self.options = options
        self.tokenizer = load_tokenizer(spec.tokenizer)
        self._tile_cache = TileCache(options.cache_bytes)
        self._image = spec.image if options.max_tiles is None else spec.image.limited(options.max_tiles)
        self._decoder: Decoder = (
            IsolatedDecoder(options, self._image, count_ended=count_ended)
            if options.isolate
            else InProcessDecoder(options, self._image)
        )

    def close(self) -> None:
        """Ends the processes that decode images. Nothing with an image can be prepared any more."""
        self._decoder.close()

    def prepare(
        self,
        asked: Query | Sequence[Message],
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
        key = conv_mode or self.spec.conv_mode
        own = self._own_template(key)
        own_layout = own is not None and own.sets_line_breaks  # it lays images and texts out
        if isinstance(asked, Query):
            message = query_message(asked.text, asked.images, line_breaks=not own_layout)
            return self._prepare(arrange([message]), _paths_of_images(asked), key, check, cache_salt)
        arranged = arrange(asked, line_breaks=own_layout)
        if not own_layout:
            order = asked.image_order if isinstance(asked, Conversation) else "images_first"
            arranged = replace(arranged, turns=[chat_turn(turn, order) for turn in arranged.turns])
        return self._prepare(arranged, _paths_of_images(asked), key, check, cache_salt)

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

    def _prepare(
        self, asked: Arranged, paths: Sequence[str], key: str, check: Check | None, cache_salt: str
    ) -> PreparedPrompt:
        parts = self._check_counts(asked)
        spans = self._render(key, asked)
        input_ids = self.tokenizer.encode(spans)
        length = len(input_ids) - len(parts)
        images: list[CachedTiles] = []
        pixels = self.options.max_total_pixels  # that are left
        for part, path in zip(parts, paths, strict=True):
            if check is not None:
                check()
            try:
                room = self.spec.context_length - length
                images.append(self._process_image(part, room, pixels, len(parts), check, cache_salt))
            except InvalidImageError as error:
                which = f"Image {len(images) + 1} of {len(parts)}: " if len(parts) > 1 else ""
                raise InvalidImageError(which + error.message, path) from error
            length += images[-1].count
            pixels -= images[-1].size[0] * images[-1].size[1]
        if length >= self.spec.context_length:
            raise PromptTooLongError(length, self.spec.context_length - 1)
        token_ids, image_spans = _expand(input_ids, [image.count for image in images])
        stop_token_ids, stop = self._ends(key)
        return PreparedPrompt(
            token_ids=token_ids,
            image_spans=image_spans,
            tiles=tuple(image.tiles for image in images),
            image_sizes=tuple(image.size for image in images),
            digests=tuple(_salted(image.digest, cache_salt) for image in images),
            prompt=prompt_text(spans),
            stop_token_ids=stop_token_ids,
            stop=stop,
            cache_salt=cache_salt,
            continues=asked.ending == "continue",
        )

    def _check_counts(self, asked: Arranged) -> list[ImagePart]:
        """The images of a conversation. Refuses too many or too large ones, and a text that cannot fit: the work on all
        of them grows with them."""
        parts = [TextPart(asked.system or ""), *(part for turn in asked.turns for part in turn.parts)]
        images = [part for part in parts if isinstance(part, ImagePart)]
        if len(images) > self.options.max_per_request:
            raise InvalidImageError(
                f"The request has {len(images)} images, those of earlier turns included; at most "
                f"{self.options.max_per_request} are accepted.",
                "messages",
            )
        size = sum(len(part.source) if isinstance(part.source, bytes) else len(part.source) * 3 // 4 for part in images)
        if size > self.options.max_total_bytes:
            raise InvalidImageError(
                f"The request's images take {size:,} bytes; at most {self.options.max_total_bytes:,} are accepted.",
                "messages",
            )
        characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
        least = characters // self.tokenizer.longest
        if least >= self.spec.context_length:
            raise PromptTooLongError(least, self.spec.context_length - 1, at_least=True)
        return images

    def _process_image(
        self, part: ImagePart, room: int, pixels: int, num_images: int, check: Check | None, cache_salt: str
    ) -> CachedTiles:
        """An image of at most so many pixels as model input, without its tiles if it has more than `room` positions."""
        data = read_request_source(part.source, self.options)
        key = blake2b(data, digest_size=16, person=self._decoding(num_images)).digest() + cache_salt.encode()
        if (known := self._tile_cache.get(key)) is not None:
            check_total(known.size[0] * known.size[1], pixels, self.options)
            return known
        made = self._decoder.tiles_of(data, room, check, pixels, num_images)
        if made.count < room:
            self._tile_cache.put(key, made)
        return made

    def _decoding(self, num_images: int) -> bytes:
        """Identifies what the tiles of the same bytes depend on."""
        processing = self._image.for_images(num_images)
        decoding = f"{self.options.transparency} {self.options.max_pixels} {processing}"
        return blake2b(decoding.encode(), digest_size=16).digest()

    def _render(self, key: str, asked: Arranged) -> list[Span]:
        if own := self._own_template(key):
            return own.render(asked)
        return render(key, asked.system, asked.turns, ending=asked.ending, image_marks=self.spec.mm_use_im_start_end)

    def _own_template(self, key: str) -> ChatTemplate | None:
        """The checkpoint's own template, if it renders the prompt."""
        return self.spec.chat_template if key == "chat_template" else None

    def _ends(self, key: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """How an answer ends in this template: by one token where the vocabulary has it, else by a stop string."""
        if own := self._own_template(key):
            ends = map(self.tokenizer.token_id, filter(None, (own.special_tokens.get("eos_token"), own.closing)))
            return tuple({end for end in ends if end is not None}), ()
        end = TEMPLATES[key].end_of_answer if key in TEMPLATES else ""
        if not end:
            return (), ()
        first = control_spans(end)[0]
        token_id = self.tokenizer.token_id(first.token) if isinstance(first, Control) else None
        return ((), (end,)) if token_id is None else ((token_id,), ())


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


def _salted(digest: str, cache_salt: str) -> str:
    """A digest that only prompts of the same salt share."""
    return blake2b(f"{digest} {cache_salt}".encode(), digest_size=16).hexdigest() if cache_salt else digest


def _paths_of_images(asked: Query | Sequence[Message]) -> list[str]:
    """Where each image stands, as a request names it."""
    if isinstance(asked, Query):
        return [f"images[{i}]" for i in range(len(asked.images))]
    return [
        f"messages[{i}].content[{j}]"
        for i, message in enumerate(asked)
        for j, part in enumerate(message.parts)
        if isinstance(part, ImagePart)
    ]
