"""The language model's vocabulary: of the checkpoint's tensors, its config and its tokenizer, which need not agree."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from llava_serve.checkpoints import CheckpointSpec
from llava_serve.checkpoints.stored_tensor import StoredTensor
from llava_serve.errors import CheckpointError, reason
from llava_serve.text.tokenizer import load_tokenizer

_VOCABULARY = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
"""Name suffixes of the tensors with one vector per token of the vocabulary."""


def fit_vocabulary(
    spec: CheckpointSpec, tensors: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], PreTrainedConfig]:
    """The language model's tensors, cut to the tokenizer's vocabulary as the original does, and its config.

    transformers does not cut them."""
    settings = dict(spec.text_config)
    tables = {name: tensor for name, tensor in tensors.items() if name.endswith(_VOCABULARY)}
    if spec.layout == "original" and tables:
        tokenizer = load_tokenizer(spec.tokenizer)
        size = _table_size(spec, list(tables.values()))
        if spec.mm_use_im_start_end and (tokenizer.token_id("<im_end>") or 0) >= size:
            first = next(iter(tables.values()))
            raise CheckpointError(
                f"{first.name} in {first.file} has {size} rows: none for <im_start> and <im_end>, which config.json "
                "uses (mm_use_im_start_end). Take the weights that were saved with them."
            )
        settings["vocab_size"] = min(size, tokenizer.size)
        tensors = tensors | {name: tensor.first_rows(settings["vocab_size"]) for name, tensor in tables.items()}
    elif spec.adapter is not None and tables:  # which may add rows to those of its base
        settings["vocab_size"] = _table_size(spec, list(tables.values()))
    settings["pad_token_id"] = None  # some classes have one that the vocabulary need not have
    try:
        return tensors, AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(
            f"config.json in {spec.path} describes a language model that transformers does not accept "
            f"({reason(error)}); correct it."
        ) from error


def _table_size(spec: CheckpointSpec, tables: list[StoredTensor]) -> int:
    """Vocabulary size of the embeddings and the head. An adapter's config.json need not have that of its base."""
    size = spec.vocab_size if spec.adapter is None else tables[0].shape[0]
    for table in tables:
        if table.shape[0] != size:
            reason = "vocab_size in config.json" if spec.adapter is None else tables[0].name
            raise CheckpointError(
                f"{table.name} in {table.file} is {table.shape}, but {reason} asks for {size} rows: take the weights "
                "and the config.json that belong together."
            )
    return size
