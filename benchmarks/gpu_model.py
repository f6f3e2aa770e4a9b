"""Models of random weights that are made on the device, and engines over them: no checkpoint is read."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.make_checkpoint import SIZES, make_checkpoint
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor import llama_decoder
from llava_serve.engine.prefill_budget import StepBudget
from llava_serve.model.float8 import Float8Linear, replace_linears
from llava_serve.model.llava import Llava
from llava_serve.model.vocabulary import fit_vocabulary
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt


def random_llava(size: str, device: str) -> Llava:
    """A model of one of `SIZES` in bfloat16."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-round-"))  # a few small files: the description and the tokenizer
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_checkpoint(SIZES[size], folder, weights=False)
    spec = open_checkpoint(str(folder), weights=False)
    _, text = fit_vocabulary(spec, {})
    torch.manual_seed(0)
    model: Llava = on_device(lambda: Llava(spec, text), device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def on_device(make: Any, device: str) -> Any:
    """What a call makes, with bfloat16 and the device as torch's defaults."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(torch.float32)


def quantize(model: Llava) -> None:
    """Puts the linear layers of the language model, without its head, into 8-bit floats."""
    replace_linears(model.language_model, model.device)
    llama_decoder._layers.pop(model.language_model, None)  # else the plain weights stay, too
    for module in model.language_model.modules():
        if isinstance(module, Float8Linear):
            module.set_weight(module.weight.detach(), model.device)


def make_engine(model: Llava, sequences: int, **options: Any) -> Engine:
    """An engine of at most so many sequences. Without a prefix cache: each prompt is computed."""
    return Engine(model, EngineOptions(max_num_seqs=sequences, max_waiting=1024, prefix_caching=False, **options))


def text_prompt(length: int, seed: int) -> PreparedPrompt:
    """Random ids behind the special ones."""
    return PreparedPrompt(np.random.default_rng(seed).integers(300, 30_000, length).astype(np.int32))


def fill(engine: Engine, sequences: int, length: int, answer: int, **sampling: Any) -> float:
    """Adds requests and computes their prompts, in large pieces, until all decode. Returns the seconds of that."""
    chosen = SamplingParams(**{"temperature": 0, "max_new_tokens": answer, "ignore_eos": True, **sampling})
    for at in range(sequences):
        engine.add(engine.validator.accept(f"filled {at}", text_prompt(length, at), chosen))
    share = engine._batch_share
    learned, share.step_budget = share.step_budget, lambda running: StepBudget(2048, 64)  # type: ignore[method-assign]
    began = time.perf_counter()
    while engine._scheduler.load.online_decoding < sequences:
        engine.step()
    seconds = time.perf_counter() - began
    share.step_budget = learned  # type: ignore[method-assign]
    for _ in range(8):
        engine.step()
    return seconds


def empty(engine: Engine, sequences: int) -> None:
    """Ends the requests that `fill` has added."""
    for at in range(sequences):
        engine.abort(f"filled {at}")


def step_times(engine: Engine, count: int) -> list[float]:
    """Milliseconds of so many steps."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - began))
    return times
