"""Which values of fields that this server does not support ask for nothing: of OpenAI's API, vLLM's, SGLang's and
llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_serve.wire import Neutral, anything, nothing, one_of


def _all_nothing(value: Any) -> bool:
    return isinstance(value, Mapping) and all(each is None or nothing(each) for each in value.values())


NEUTRAL_FIELDS: Mapping[str, Neutral] = {
    # labels and hints, which change no answer
    **dict.fromkeys(
        (
            "cache_prompt",
            "conversation_id",
            "guided_decoding_backend",
            "include_reasoning",
            "keep_alive",
            "metadata",
            "mm_payload",
            "parallel_tool_calls",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning_budget",
            "reasoning_format",
            "safety_identifier",
            "separate_reasoning",
            "session_id",
            "spaces_between_special_tokens",
            "stream_reasoning",
            "thinking_token_budget",
        ),
        anything,
    ),
    # settings of llama.cpp's samplers, each of which is off unless a field below turns it on
    **dict.fromkeys(
        (
            "adaptive_decay",
            "dry_allowed_length",
            "dry_base",
            "dry_penalty_last_n",
            "dry_sequence_breakers",
            "dynatemp_exponent",
            "mirostat_eta",
            "mirostat_tau",
            "repeat_last_n",
            "xtc_threshold",
        ),
        anything,
    ),
    # read by `check_tools`
    **dict.fromkeys(("function_call", "functions", "tool_choice", "tools"), anything),
    # what this server does in any case
    "chat_template_content_format": one_of("auto"),
    "chat_template_kwargs": _all_nothing,
    "detokenize": one_of(True),
    "do_sample": one_of(True),
    "modalities": one_of(["text"]),
    "reasoning_effort": one_of("none"),
    "service_tier": one_of("auto", "default"),
    "skip_special_tokens": one_of(True),
    "thinking": one_of({"type": "disabled"}),
    "verbosity": one_of("medium"),
    "web_search_options": one_of(),  # OpenAI searches for an empty object
    # sampling that changes nothing
    **dict.fromkeys(
        ("best_of", "length_penalty", "num_return_sequences", "repeat_penalty", "tfs_z", "typical_p", "typical"),
        one_of(1),
    ),
    **dict.fromkeys(
        (
            "dry_multiplier",
            "dynatemp_range",
            "epsilon_cutoff",
            "eta_cutoff",
            "min_keep",
            "min_new_tokens",
            "mirostat",
            "n_indent",
            "n_keep",
            "n_probs",
            "no_repeat_ngram_size",
            "routed_experts_prompt_start",
            "top_a",
            "xtc_probability",
        ),
        one_of(0),
    ),
    **dict.fromkeys(("adaptive_target", "id_slot", "n_predict", "slot_id"), one_of(-1)),
    **dict.fromkeys(("t_max_predict_ms", "top_n_sigma"), one_of(-1, 0)),
}
"""By field. Fields without an entry go by `nothing`."""
