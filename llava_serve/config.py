"""Options of the parts. Each default is written here and nowhere else."""

from __future__ import annotations

import logging
import warnings
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llava_serve.options import Options, resolve_options

_log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "float64", "bfloat16", "float16"]
Quantization = Literal["8bit", "4bit", "fp8"]
CacheDtype = Literal["auto", "fp8"]
Transparency = Literal["white", "drop"]
CacheScope = Literal["shared", "key"]


BATCH_SHARE = 0.5
"""Batch work waits outside while requests of both classes take so much of a queue: it bounds what batch work adds to a
queue that online requests may fill alone."""


def is_batch(priority: int) -> bool:
    """A request with a priority above 0 is batch work: it fills what online requests leave idle."""
    return priority > 0


class ModelOptions(Options):
    """Which model, and where it runs.

    Attributes:
        model: `builtin`, a folder, or a hub id in the local cache.
        model_base: the base of a LoRA or projector-only checkpoint.
        vision_tower: overrides the checkpoint's own. It names the architecture and the processor.
        vision_tower_weights: the tower's weights are those in the `checkpoint`, or those in the tower's `folder`; None
            follows the original's rule, by which a tower that was trained with the rest is in the checkpoint.
        conv_mode: overrides the detected template.
        image_aspect: `pad` pads images to a square, `square` crops them to one; None follows the checkpoint.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: `auto` is float32 on a CPU and the checkpoint's half precision on CUDA; that of the files where they are
            quantized.
        quantization: linear layers of the language model, without its head: `8bit` and `4bit` by bitsandbytes, `fp8`
            with weights and inputs in 8-bit floats, for GPUs that multiply them.
    """

    model: str = "builtin"
    model_base: str | None = None
    vision_tower: str | None = None
    vision_tower_weights: Literal["checkpoint", "folder"] | None = None
    conv_mode: str | None = None
    image_aspect: Literal["pad", "square"] | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization | None = None

    @property
    def prompt_key(self) -> str:
        """Identifies what a prepared prompt depends on."""
        said = self.model_dump_json(exclude={"device", "dtype", "quantization"})
        return blake2b(said.encode(), digest_size=16).hexdigest()


class ModelKeywords(TypedDict, total=False):
    """The fields of `ModelOptions` but `model`, as keyword arguments."""

    model_base: str | None
    vision_tower: str | None
    vision_tower_weights: Literal["checkpoint", "folder"] | None
    conv_mode: str | None
    image_aspect: Literal["pad", "square"] | None
    device: str
    dtype: Dtype
    quantization: Quantization | None


def resolve_model_options(model: str | Path | ModelOptions, **keywords: Unpack[ModelKeywords]) -> ModelOptions:
    """The options of a model that is named, or described whole.

    Raises:
        RequestError: an option is unknown, or has a value that is not allowed.
    """
    if isinstance(model, ModelOptions):
        return ModelOptions(**{**{name: getattr(model, name) for name in ModelOptions.model_fields}, **keywords})
    return ModelOptions(model=str(model) if isinstance(model, Path) else model, **keywords)


class EngineOptions(Options):
    """Limits of one engine.

    Attributes:
        max_num_seqs: sequences that run in one batch.
        max_waiting: sequences in the queue; one more raises `CapacityError`.
        max_model_len: positions of a prompt and its answer; None takes the checkpoint's context.
        max_batch_tokens: positions computed per step, prefill and decode together.
        max_batch_tiles: tiles through the vision tower per step.
        kv_cache_bytes: memory of the KV cache; None is 1 GiB on a CPU, and on CUDA what the largest step leaves.
        kv_cache_dtype: how keys and values are stored: with `auto` as the model computes them, with `fp8` as 8-bit
            floats (e4m3), so that the same memory holds twice the positions of a half precision. Answers change a
            little. For GPUs that have such numbers; a CPU computes the same, slowly.
        gpu_memory_fraction: of what the largest step leaves, for the KV cache on CUDA; `kv_cache_bytes` overrides it.
        feature_cache_bytes: memory of the image-feature cache.
        block_size: positions per block.
        prefix_caching: keep and reuse the KV of prompts.
        cuda_graphs: on CUDA, launch decode steps as graphs; takes some seconds at the start, and some memory.
        compile: on a CPU, run the decoder through torch.compile. With `auto` a server answers without it at once,
            compiles in the background where there is a C++ compiler and the model is not tiny, and switches once a
            trial agrees; `LLM` does without. With true it is compiled before the start, which fails where that cannot
            be done.
        num_threads: of torch on a CPU; None takes all cores that the process may use, within its container's quota.
    """

    max_num_seqs: int = Field(default=64, ge=1)
    max_waiting: int = Field(default=256, ge=0)
    max_model_len: int | None = Field(default=None, ge=2)
    max_batch_tokens: int = Field(default=2048, ge=16)
    max_batch_tiles: int = Field(default=8, ge=1)
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    kv_cache_dtype: CacheDtype = "auto"
    gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1)
    feature_cache_bytes: int = Field(default=256 << 20, ge=0)
    block_size: int = Field(default=16, ge=1)
    prefix_caching: bool = True
    cuda_graphs: bool = True
    compile: Literal["auto", True, False] = "auto"
    num_threads: int | None = Field(default=None, ge=1)

    @property
    def max_batch_sequences(self) -> int:
        """Sequences of batch work, running and waiting."""
        return max(self.max_num_seqs, int((self.max_num_seqs + self.max_waiting) * BATCH_SHARE))


class LinkHost(Options):
    """A host that links in requests may name.

    Attributes:
        host: a name or an address, with `:port` where the port is neither 80 nor 443.
        networks: the private networks that the host may lie in; without them its addresses must be global.
    """

    host: str
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @field_validator("host")
    @classmethod
    def _check_host(cls, given: str) -> str:
        from httpx2 import URL, InvalidURL  # takes a while, and most configs open no links

        try:
            url = URL(f"//{given}")
            if url.raw_host and not url.userinfo and str(url) == f"//{url.netloc.decode('ascii')}":
                return given
        except (InvalidURL, ValueError):
            pass
        raise ValueError("must be a name or an address, such as images.example.org or 10.0.0.5:9000")


def _as_links(given: Any) -> Any:
    if given is False:  # what YAML makes of a plain off
        return "off"
    if isinstance(given, list | tuple):
        return [{"host": each} if isinstance(each, str) else each for each in given]
    if given not in ("off", "public"):
        raise ValueError("must be off, public, or a list of hosts")
    return given


class ImageOptions(Options):
    """What images are accepted, and how they are seen.

    Attributes:
        max_bytes: of one encoded image.
        max_pixels: of one decoded image; a JPEG of up to 200 megapixels is decoded at 1/2, 1/4 or 1/8 of its size
            where only that is within.
        max_per_request: images in one request.
        max_total_bytes: of all encoded images of a request.
        max_total_pixels: of all decoded images of a request.
        transparency: `white` lays transparent images over white, as a person sees them; `drop` drops their alpha, so
            that the colours hidden behind it are seen, as the original does.
        max_tiles: of one image, without its overview, where the model takes a grid of tiles. Less detail is seen, and
            fewer positions are taken; None leaves it to the model.
        cache_bytes: memory for the tiles of the images seen last.
        isolate: decode in child processes, where the next two limits hold; on Linux. Servers do so whatever this says.
        decode_timeout_s: of one image.
        decode_memory_bytes: what a child process may allocate beyond what it has at its start. An image of 64 million
            pixels takes up to 1.4 GiB: WebP with transparency.
        links: which `http:` and `https:` links in requests are followed: `off`, none; `public`, those to global
            addresses; or those to the hosts of a list, where a name alone is a `LinkHost` without networks.
    """

    max_bytes: int = Field(default=20 << 20, ge=1)
    max_pixels: int = Field(default=64_000_000, ge=1)
    max_per_request: int = Field(default=16, ge=0)
    max_total_bytes: int = Field(default=64 << 20, ge=1)
    max_total_pixels: int = Field(default=256_000_000, ge=1)
    transparency: Transparency = "white"
    max_tiles: int | None = Field(default=None, ge=1)
    cache_bytes: int = Field(default=64 << 20, ge=0)
    links: Annotated[Literal["off", "public"] | tuple[LinkHost, ...], BeforeValidator(_as_links)] = "off"
    isolate: bool = False
    decode_timeout_s: float = Field(default=10, gt=0)
    decode_memory_bytes: int = Field(default=1536 << 20, ge=1)

    @property
    def isolated(self) -> ImageOptions:
        """The same for a server: pictures come from strangers."""
        return self.model_copy(update={"isolate": True})


def resolve_image_options(given: ImageOptions | None, images: ImageOptions | None) -> ImageOptions:
    """The image options of a constructor; `images` is their deprecated name, which the next version removes."""
    if images is not None:
        warnings.warn("images= of a constructor is deprecated; use image_options=.", DeprecationWarning, stacklevel=3)
    return resolve_options(ImageOptions, given if images is None else images, "image_options")


class RoutingOptions(Options):
    """How calls choose a model replica.

    Attributes:
        slack: how many requests more than the least loaded replica one may have, and still get what it has cached.
        max_per_replica: requests that a replica gets, running and waiting; more wait in their callers, from where a new
            replica takes them. None is each replica's own: a batch of online requests, beside all the batch work that
            it takes (`max_num_seqs`, and half of `max_num_seqs` + `max_waiting`).
    """

    slack: int = Field(default=8, ge=0)
    max_per_replica: int | None = Field(default=None, ge=1)


class ApiOptions(Options):
    """The web app's own limits.

    Attributes:
        model_name: the name in `/v1/models`; None derives it from `model` (see `llava_serve.checkpoints.model_name`).
        aliases: other names of the model; `/v1/models` lists them, too.
        api_keys: accepted bearer keys. Not on Ray, which logs them. Without any, in the file and the environment
            variable `LLAVA_API_KEYS` either, requests need none.
        api_keys_file: a file of more keys, one a line: `KEY`, `name:KEY` or `name:sha256:HEX`, where HEX is the key's
            SHA-256 digest. It is read again within a second of a change.
        max_body_bytes: of a request.
        max_in_flight: requests in flight per ingress replica; one more gets 429. `max_queue` is its deprecated name,
            which the next version removes.
        max_in_flight_bytes: of all their bodies; more gets 429.
        max_in_flight_per_key: requests in flight of one key, told by its name; one more gets 429. Each ingress replica
            counts by itself, so together they accept this times their number.
        requests_per_minute_per_key: POST requests of one key; beyond it 429. A key may send them at once, and regains
            them evenly over a minute. Counted as `max_in_flight_per_key`.
        default_timeout_s: the timeout of a request that sets none.
        max_timeout_s: the longest timeout that a request may set.
        default_max_tokens: the longest answer to a request that sets none; None is to the end of the context.
        unknown_fields: of requests: `refuse` them by name, or `ignore` them and name them in the header
            `x-llava-serve-notes`.
        image_order: where the images of a turn stand: `images_first`, before its text, as models were trained; or
            `as_sent`. A checkpoint's own chat template decides by itself.
        cors_origins: the origins whose pages may use the server from a browser, such as `https://app.example.org`; `*`
            is all. None by default.
        priority_range: the smallest and the largest priority that a request may set; a smaller one is served earlier.
        cache_scope: who shares cached prefixes and images: `shared`, all requests; `key`, those with the same API key.
            The time of an answer tells whether something was cached, and so what others have asked.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # it may be a key

    model_name: str | None = None
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    api_keys_file: str | None = None
    max_body_bytes: int = Field(default=32 << 20, ge=1)
    max_in_flight: int = Field(default=256, ge=1, validation_alias=AliasChoices("max_in_flight", "max_queue"))
    max_in_flight_bytes: int = Field(default=512 << 20, ge=1)
    max_in_flight_per_key: int | None = Field(default=None, ge=1)
    requests_per_minute_per_key: int | None = Field(default=None, ge=1)
    default_timeout_s: float = Field(default=120, gt=0)
    max_timeout_s: float = Field(default=600, gt=0)
    default_max_tokens: int | None = Field(default=None, ge=1)
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    image_order: Literal["images_first", "as_sent"] = "images_first"
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s*]+)$")], ...] = ()
    priority_range: tuple[int, int] = (0, 100)
    cache_scope: CacheScope = "shared"

    @model_validator(mode="before")
    @classmethod
    def _warn_of_old_names(cls, given: Any) -> Any:
        if isinstance(given, dict) and "max_queue" in given:
            _log.warning("api.max_queue is deprecated; use api.max_in_flight. The next version removes the old name.")
        return given
