"""Compiles the decoder in the background, while it computes the engine's steps, for a switch between two of them.

What must not happen meanwhile: that the thread which compiles holds the interpreter's lock for long, or has OpenMP
workers of its own, with which all of them outnumber the cores; that its traces get at the modules which compute steps;
and that a program that ends waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from torch._inductor import config as inductor

from llava_serve.engine.executor.compiled import NO_COMPILER, CompiledDecoder, CompileError, DummyStep
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.decoder_check import disagreement
from llava_serve.engine.executor.kernels import native_build
from llava_serve.engine.executor.model import VisionLanguageModel
from llava_serve.engine.executor.packed_linear import PackedLinear

_logger = logging.getLogger(__name__)

MIN_WEIGHTS = 10_000_000
"""Of a decoder, about. A smaller one answers fast enough for what it is, a demonstration or a test."""
DELAY_S = 5.0
"""Before it begins: what follows a server's start comes first, its probe and the first answers."""
NICENESS = 5
"""Of the thread that compiles and of its C++ compilers: a third of the weight of the steps' threads. With less they
would take hours beside a busy engine, and the thread could wait for a core while it has the interpreter's lock."""
SWITCH_INTERVAL_S = 1e-4
"""So long the engine's thread waits after an operation of a step. Shorter than its own, since tracing never pauses."""
_CLOSE_S = 5.0
"""For the thread to end."""
_CALL = nn.Module.__call__
_FAILED = "The decoder is not compiled, and steps are slower, since %s."


def worth_compiling(language_model: Any) -> bool:
    """It is large enough that something is compiled for it without being asked for."""
    config = language_model.config
    return bool(12 * config.num_hidden_layers * config.hidden_size**2 >= MIN_WEIGHTS)


def background_compile(model: VisionLanguageModel, decoder: Decoder, dummy_step: DummyStep) -> BackgroundCompile | None:
    """Begins to compile a decoder on a CPU, where that pays and is possible; else the log says why not.

    Args:
        dummy_step: any thread may call it.
    """
    if not worth_compiling(model.language_model):
        _logger.debug("The decoder is not compiled: it is small.")
        return None
    if reason := decoder.never_compiled or ("" if native_build.compiler() else NO_COMPILER):
        _logger.info("The decoder is not compiled, since %s.", reason)
        return None
    _keep_from_traces(model)
    try:
        return BackgroundCompile(decoder, dummy_step, partial(disagreement, model, decoder))
    except CompileError as error:
        _logger.warning(_FAILED, error)
        return None


class BackgroundCompile:
    """A thread that compiles a decoder.

    Args:
        dummy_step: any thread may call it.
        trial: how the decoder's results differ from the right ones; empty if they do not. Called with the compiled one
            in service, in the thread that calls `switch`.
    """

    def __init__(self, decoder: Decoder, dummy_step: DummyStep, trial: Callable[[], str]) -> None:
        self._decoder = decoder
        self._dummy_step = dummy_step
        self._trial = trial
        self._compilable = decoder.compilable(compile_threads=1)  # without a pool: this thread waits for the compiler
        self._num_threads = torch.get_num_threads()
        self._closed = threading.Event()
        self._failure = ""
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="compile", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """There is nothing to wait for: `switch` can be called."""
        return not self._thread.is_alive()

    def switch(self) -> None:
        """Takes the compiled decoder into service, if its trial agrees. To be called between two steps, once it is
        `done`: one of the two serves from now on."""
        if reason := self._failure or self._tried(self._compilable):
            _logger.warning(_FAILED, reason)
        else:
            _logger.info("The compiled decoder serves from now on: compiled in %.0f s.", self._seconds)

    def close(self) -> None:
        """Ends the thread, whatever it does."""
        self._closed.set()
        end = time.monotonic() + _CLOSE_S
        while self._thread.is_alive() and time.monotonic() < end:
            # It runs torch's code, which asks nobody whether to go on. A program that ends while a thread is in
            # torch's code may abort.
            identity, raised = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, raised)
            _end_compilers()
            self._thread.join(1)

    def _tried(self, compilable: CompiledDecoder) -> str:
        """Leaves the compiled decoder in service where its trial agrees; else says why not."""
        self._decoder.compiled = compilable
        try:
            reason = self._trial()
        except Exception:
            _logger.debug("The compiled decoder fails.", exc_info=True)
            reason = "what was compiled does not run"
        if reason:
            self._decoder.compiled = None
        return reason

    def _run(self) -> None:
        """The thread."""
        with contextlib.suppress(SystemExit):
            if not self._closed.wait(DELAY_S):
                self._compile()

    def _compile(self) -> None:
        began = time.monotonic()
        interval = sys.getswitchinterval()
        try:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            torch.set_num_threads(1)  # of this thread, and of those that first use torch meanwhile
            if sys.platform == "linux":  # elsewhere it is that of the process
                os.nice(NICENESS)
            self._compilable.warm_up(self._dummy_step)
            self._seconds = time.monotonic() - began
        except CompileError as error:
            self._failure = str(error)
            _logger.debug("The decoder cannot be compiled.", exc_info=True)
        except Exception as error:
            self._failure = f"torch.compile fails ({type(error).__name__})"
            _logger.debug("The decoder cannot be compiled.", exc_info=True)
        finally:
            torch.set_num_threads(self._num_threads)
            sys.setswitchinterval(interval)


def _keep_from_traces(model: VisionLanguageModel) -> None:
    """Gives the classes of a model's modules a `__call__` of their own, which is that of `nn.Module`.

    torch.fx replaces the one of `nn.Module` while it traces, for all threads: modules that another thread calls would
    be traced, too, and fail.
    """
    for kind in {PackedLinear, *map(type, model.modules())}:
        if next(base for base in kind.__mro__ if "__call__" in vars(base)) is nn.Module:
            kind.__call__ = _CALL  # type: ignore[method-assign]


def _end_compilers() -> None:
    """Ends the C++ compilers that this process has started."""
    name = os.path.basename(inductor.cpp.cxx[-1])
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if os.path.basename((child.cmdline() or [""])[0]) == name:
                for process in (*child.children(recursive=True), child):
                    process.kill()
