"""Compiles strangers' grammars in a child process first, where it can be ended.

No bound on a form's length bounds the work on it: a schema of 40 characters can take a core for hours. What compiles
there in time compiles here, too.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.engine.grammar import too_complex_to_compile
from llava_serve.errors import RequestError
from llava_serve.structured_output import StructuredOutput

_logger = logging.getLogger(__name__)

WORKER = "llava_serve.engine.grammar_worker"
COMPILE_S = 2.0
"""Of processor time for one form. The largest that are of use take one second."""
MEMORY_BYTES = 1 << 30
"""That compiling may allocate."""
_WAIT_S = 120.0
"""For a reply; longer than the process has on a busy machine."""


class GrammarTrial:
    """Says whether a form can be compiled. Threads wait for each other.

    Args:
        vocabulary: ids that the model has.
        seconds: of processor time for one form.
    """

    def __init__(self, tokenizer: TokenizerSpec, vocabulary: int, seconds: float = COMPILE_S) -> None:
        self._arguments = pickle.dumps((tokenizer, vocabulary, seconds, MEMORY_BYTES))
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def check(self, asked: StructuredOutput, continues: bool) -> None:
        """Compiles a form in the child process, which starts with the first one.

        Raises:
            RequestError: as `GrammarCompiler.compile`; also for a form that takes too much time or memory.
        """
        with self._lock:
            if self._child is None or not self._child.alive:
                self.close()
                self._child = _Child(self._arguments)
            try:
                fault = json.loads(self._child.ask(pickle.dumps((asked, continues))))
            except (EOFError, OSError):
                _logger.info("The compiling of a form was ended at a limit.")
                self.close()
                raise too_complex_to_compile(asked) from None
        if fault is not None:
            raise RequestError(fault, asked.param)

    def close(self) -> None:
        """Ends the process, whatever it does."""
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """The process, and our end of the pipe to it. It is ready once it is made."""

    def __init__(self, arguments: bytes) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKER, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # the library writes where in itself it fails
                # It imports what this process would, from the same places. One thread: it uses numpy for bits only.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C is for the parent, which may have answers to complete
            )
        self.end = weakref.finalize(self, _end, self._process, self._pipe)
        try:
            self.ask(arguments)
        except (EOFError, OSError) as error:
            self.end()
            raise RuntimeError("The process that compiles grammars does not start.") from error

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: bytes) -> bytes:
        """The reply. Raises EOFError or OSError where the process has ended, or gives none."""
        self._pipe.send_bytes(message)
        if not self._pipe.poll(_WAIT_S):
            raise EOFError
        return self._pipe.recv_bytes()


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    process.kill()
    process.wait()
    pipe.close()
