"""The child process in which strangers' grammars are compiled first; `grammar_trial` starts it.

    python -P -m llava_serve.engine.grammar_worker PIPE

PIPE is an inherited file descriptor of a connection: first what to compile for, then one message each way per form. The
process ends where a form takes too much of its processor time, or of memory.
"""

from __future__ import annotations

import json
import pickle
import signal
import sys
from multiprocessing.connection import Connection

from llava_serve.engine.grammar import GrammarCompiler
from llava_serve.errors import RequestError
from llava_serve.memory_limit import limit_memory
from llava_serve.structured_output import StructuredOutput


def main() -> None:
    """Compiles forms until the pipe is closed, or one has passed a limit."""
    pipe = Connection(int(sys.argv[1]))
    tokenizer, vocabulary, seconds, memory_bytes = pickle.loads(pipe.recv_bytes())
    compiler = GrammarCompiler(tokenizer, vocabulary)
    compiler.compile(StructuredOutput(regex="a"))  # what all forms share is no form's time
    limit_memory(memory_bytes)
    pipe.send_bytes(b"ready")
    while True:
        try:
            asked, continues = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        fault = None
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # its signal ends this process
        try:
            compiler.compile(asked, continues=continues)
        except RequestError as error:
            fault = error.message
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        pipe.send_bytes(json.dumps(fault).encode())


if __name__ == "__main__":
    main()
