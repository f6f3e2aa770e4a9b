"""Text to token ids and back, without torch: sentencepiece by chunks, as in the original, or a `tokenizer.json`."""

from __future__ import annotations

from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.text.interface import Tokenizer
from llava_serve.text.json_tokenizer import JsonTokenizer
from llava_serve.text.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    return SentencePieceTokenizer(spec) if spec.kind == "sentencepiece" else JsonTokenizer(spec)
