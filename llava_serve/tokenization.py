"""What the picture tier tells about a model and about a prompt, before the model works on it. Plain values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model takes.

    Attributes:
        max_model_len: positions of the context: the prompt and its answer.
        max_images: of a request.
        max_image_bytes: of one encoded image.
        max_image_pixels: of one decoded image.
    """

    max_model_len: int
    max_images: int
    max_image_bytes: int
    max_image_pixels: int


@dataclass(frozen=True, slots=True)
class TokenizedImage:
    """What an image takes.

    Attributes:
        tokens: positions in the prompt.
        tiles: that the vision tower encodes.
        size: (width, height) in pixels, before tiling.
    """

    tokens: int
    tiles: int
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as its tokens, of any length.

    Attributes:
        token_ids: an image takes as many positions as it has features, each `IMAGE_TOKEN_ID`.
        token_texts: of each position, `<image>` for an image's; None where they were not asked for.
        images: in order.
        max_model_len: positions of the context.
    """

    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...] | None
    images: tuple[TokenizedImage, ...]
    max_model_len: int

    @property
    def fits(self) -> bool:
        """The context has room for the prompt and one token of an answer."""
        return len(self.token_ids) < self.max_model_len
