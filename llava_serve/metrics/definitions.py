"""All metrics, by tier. Everything else is made of this table: the series, their names in vLLM, `docs/metrics.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STAGES = (
    "body",
    "queue",
    "fetch",
    "decode",
    "tile",
    "tokenize",
    "hop",
    "engine_queue",
    "vision",
    "prefill",
    "first_chunk",
)
"""Of the time to the first token, in order; together they are all of it."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

Tier = Literal["ingress", "picture", "model"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Attributes:
        name: without the `_total` that a counter's gets where it is exported.
        tier: whose replicas export it; the in-process server is all tiers.
        labels: names of labels.
        buckets: of a histogram, upper bounds.
        vllm: its name in vLLM, without the prefix; the same figures are exported under it, with the label `model_name`.
        vllm_labels: the names of the labels there, where they are others.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    tier: Tier
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: str | None = None
    vllm_labels: tuple[str, ...] | None = None

    @property
    def exported(self) -> str:
        """The name on a page of metrics; Ray puts `ray_` before it."""
        return self.name + "_total" * (self.kind == "counter")

    @property
    def exported_vllm(self) -> str | None:
        """The same of the name in vLLM; through Ray it begins with `ray_vllm_`."""
        return None if self.vllm is None else f"vllm:{self.vllm}" + "_total" * (self.kind == "counter")


def _counter(tier: Tier, name: str, meaning: str, *labels: str, vllm: str | None = None) -> Metric:
    return Metric(name, "counter", tier, meaning, labels, vllm=vllm)


def _gauge(tier: Tier, name: str, meaning: str, vllm: str | None = None) -> Metric:
    return Metric(name, "gauge", tier, meaning, vllm=vllm)


def _seconds(tier: Tier, name: str, meaning: str, *labels: str, vllm: str | None = None) -> Metric:
    return Metric(name, "histogram", tier, meaning, labels, _SECONDS, vllm)


REQUESTS = _counter(
    "ingress",
    "llava_requests",
    "Requests that have ended. Outcomes: completed, refused (by a status below 500), failed, expired, disconnected. A "
    "stream that fails after its first event has the status 200.",
    "endpoint",
    "outcome",
    "status",
)
IN_FLIGHT = _gauge("ingress", "llava_requests_in_flight", "Requests between their arrival and the end of their answer.")
REFUSALS = _counter(
    "ingress",
    "llava_admission_refusals",
    "Requests that were refused with 429. Reasons: in_flight, bytes, batch (no room for batch work), draining, "
    "key_in_flight, key_rate, link_host, replica_queue, engine_queue, calls_waiting, model_starting.",
    "reason",
)
REQUEST_SECONDS = _seconds(
    "ingress",
    "llava_request_seconds",
    "From a request's arrival to the last token of its complete answer.",
    vllm="e2e_request_latency_seconds",
)
FIRST_TOKEN = _seconds(
    "ingress",
    "llava_time_to_first_token_seconds",
    "From a request's arrival until the first token of its answer can be sent.",
    vllm="time_to_first_token_seconds",
)
STAGE_SECONDS = _seconds(
    "ingress",
    "llava_stage_seconds",
    "The parts of the time to the first token. Stages: body (reading and checking the request), queue (for a core of "
    "the picture tier), fetch (of links), decode, tile, tokenize, hop (the call of the picture tier), engine_queue, "
    "vision, prefill, first_chunk (the call of the model tier, and the text).",
    "stage",
)
QUEUE_SECONDS = _seconds(
    "ingress",
    "llava_engine_queue_seconds",
    "The stage engine_queue, as vLLM has it.",
    vllm="request_queue_time_seconds",
)
PREFILL_SECONDS = _seconds(
    "ingress",
    "llava_engine_prefill_seconds",
    "The stages vision and prefill together, as vLLM has it.",
    vllm="request_prefill_time_seconds",
)
DECODE_SECONDS = _seconds(
    "ingress",
    "llava_engine_decode_seconds",
    "From the first token of an answer to its last one.",
    vllm="request_decode_time_seconds",
)
INTER_TOKEN = _seconds(
    "ingress",
    "llava_inter_token_seconds",
    "Between two tokens of an answer. Tokens that arrive in one group are one observation: their mean.",
    vllm="inter_token_latency_seconds",
)
REQUEST_PROMPT_TOKENS = Metric(
    "llava_request_prompt_tokens",
    "histogram",
    "ingress",
    "Tokens of a prompt, images included.",
    buckets=_TOKENS,
    vllm="request_prompt_tokens",
)
REQUEST_OUTPUT_TOKENS = Metric(
    "llava_request_output_tokens",
    "histogram",
    "ingress",
    "Tokens of a complete answer, all its choices.",
    buckets=_TOKENS,
    vllm="request_generation_tokens",
)
CHOICES = Metric(
    "llava_choices",
    "counter",
    "ingress",
    "Choices of answers that came to their end.",
    ("finish_reason",),
    vllm="request_success",
    vllm_labels=("finished_reason",),
)

PROMPTS = _counter("picture", "llava_prompts_prepared", "Prompts made ready for the model.")
PREPARE_SECONDS = _seconds(
    "picture", "llava_prepare_seconds", "Work on a prompt: decode, tile and tokenize, without any queue."
)
IMAGES = _counter("picture", "llava_images_prepared", "Images of prompts, decoded or cached.")
DECODED_IMAGES = _counter("picture", "llava_images_decoded", "Images that were decoded.")
DECODED_PIXELS = _counter("picture", "llava_decoded_pixels", "Pixels of the images that were decoded.")
DECODE_ENDED = _counter(
    "picture", "llava_decode_processes_ended", "Decoding processes that were ended at a limit, or crashed."
)
TILE_QUERIES = _counter("picture", "llava_tile_cache_queries", "Images looked up in the cache of tiles.")
TILE_HITS = _counter("picture", "llava_tile_cache_hits", "Images found there.")

RUNNING = _gauge("model", "llava_running_sequences", "Sequences in the KV cache.", "num_requests_running")
WAITING = _gauge(
    "model", "llava_waiting_sequences", "Choices of requests that wait for the KV cache.", "num_requests_waiting"
)
KV_USAGE = _gauge(
    "model", "llava_kv_cache_usage_ratio", "Part of the KV cache that sequences hold, 0 to 1.", "kv_cache_usage_perc"
)
PROMPT_TOKENS = _counter("model", "llava_prompt_tokens", "Tokens of prompts, images included.", vllm="prompt_tokens")
IMAGE_TOKENS = _counter("model", "llava_image_tokens", "Those of them that are images'.")
OUTPUT_TOKENS = _counter("model", "llava_output_tokens", "Tokens of answers.", vllm="generation_tokens")
PREFIX_QUERIES = _counter(
    "model",
    "llava_prefix_cache_queries",
    "Tokens of prompts looked up in the prefix cache, once for each choice.",
    vllm="prefix_cache_queries",
)
PREFIX_HITS = _counter("model", "llava_prefix_cache_hits", "Tokens found there.", vllm="prefix_cache_hits")
FEATURE_QUERIES = _counter(
    "model", "llava_feature_cache_queries", "Images whose features a prefill needs.", vllm="mm_cache_queries"
)
FEATURE_HITS = _counter(
    "model",
    "llava_feature_cache_hits",
    "Those of them whose features are cached, or being computed for another request.",
    vllm="mm_cache_hits",
)
PREEMPTIONS = _counter(
    "model", "llava_preemptions", "Choices that lost their place in the KV cache.", vllm="num_preemptions"
)
ABORTED = _counter("model", "llava_requests_aborted", "Requests whose client disconnected.")
EXPIRED = _counter("model", "llava_requests_expired", "Requests whose deadline passed in the engine.")
STEPS = _counter("model", "llava_engine_steps", "Steps of the engine.")
STEP_SECONDS = _counter("model", "llava_engine_step_seconds", "Time in steps.")
SCHEDULE_SECONDS = _counter("model", "llava_engine_schedule_seconds", "The scheduler's share of it.")
STEP_SEQUENCES = _counter(
    "model", "llava_engine_step_sequences", "Sequences of all steps; divided by the steps, the mean batch size."
)
STEP_TOKENS = _counter("model", "llava_engine_step_tokens", "Positions that all steps computed.")

METRICS = tuple(value for value in list(vars().values()) if isinstance(value, Metric))
"""In order."""
