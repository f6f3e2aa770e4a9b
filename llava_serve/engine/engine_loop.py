"""The engine's thread: callers send it messages, it steps the engine, and returns outputs to their event loops."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import logging
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from llava_serve.engine.engine import Engine
from llava_serve.engine.failures import request_failure
from llava_serve.engine.sequence import EngineRequest, Output
from llava_serve.engine.stats import EngineStats
from llava_serve.errors import CapacityError, EngineDeadError

_logger = logging.getLogger(__name__)
_HEARTBEAT_S = 1.0
_EXIT_S = 10.0
"""For the step that runs when the interpreter exits."""
_SWITCH_S = 5e-4
"""Torch gives the interpreter up in each of its calls, some hundred a step, and another thread that computes gives it
back after this time. By default 5 ms: a body that is parsed beside the engine stretched a step tenfold."""
_DEAD = "The engine has stopped."


@dataclass(frozen=True, slots=True, eq=False)
class Consumer:
    """Where a request's outputs go. The queue belongs to the event loop and is filled only there."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output | None]  # None: the request was aborted


@dataclass(frozen=True, slots=True)
class _Add:
    request: EngineRequest
    consumer: Consumer


@dataclass(frozen=True, slots=True)
class _Abort:
    """Of a request, or of one choice; where a consumer is given, only if the request is still this consumer's."""

    request_id: str
    index: int | None = None
    consumer: Consumer | None = None


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Batches = dict[asyncio.AbstractEventLoop, list[tuple[Consumer, Output | None]]]


class EngineLoop:
    """Runs one engine on a thread of its own, which owns the engine's state; callers send it messages.

    Args:
        build: makes the engine, on that thread. Each thread that computes with torch has OpenMP workers of its own, and
            once there are more of them than cores, libgomp lets all of them sleep between two parallel regions: a step
            takes twice as long.

    Raises:
        Exception: what `build` raises.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Close] = queue.SimpleQueue()
        self._consumers: dict[str, Consumer] = {}
        self._num_sent = self._num_received = 0  # requests put into the inbox, and taken out of it
        self._heartbeat = time.monotonic()
        self._aborted = 0
        self._dead = False
        sys.setswitchinterval(min(_SWITCH_S, sys.getswitchinterval()))
        built: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(built, build), name="engine", daemon=True)
        self._thread.start()
        self.engine = built.result()
        self._stats = self.engine.stats
        # A thread in torch's code when the interpreter ends is unwound there, and the process aborts.
        atexit.register(self._exit)

    @property
    def healthy(self) -> bool:
        """The loop is alive, and has not been in the same turn for longer than its step can take."""
        turn_s = time.monotonic() - self._heartbeat
        return not self._dead and self._thread.is_alive() and turn_s < self.engine.step_limit.seconds

    def stats(self) -> EngineStats:
        """The state of the engine after its last turn, and how long ago that was."""
        age = time.monotonic() - self._heartbeat
        return dataclasses.replace(self._stats, aborted=self._aborted, heartbeat_age_s=age)

    def submit(self, request: EngineRequest) -> Consumer:
        """Sends a request to the engine. To be called on the event loop that reads its outputs.

        Raises:
            CapacityError: the queue is full.
        """
        if not self.engine.has_room(request, self._num_sent - self._num_received):
            raise CapacityError("The server is busy; try again later.", reason="engine_queue")
        consumer = Consumer(asyncio.get_running_loop(), asyncio.Queue())
        self._num_sent += 1
        self._inbox.put(_Add(request, consumer))
        return consumer

    async def next_output(self, consumer: Consumer) -> Output | None:
        """Waits for the next output of a request; None if the request was aborted.

        Raises:
            EngineDeadError: the loop has ended, and there are no more outputs.
        """
        if self._dead and consumer.outputs.empty():
            raise EngineDeadError(_DEAD)
        return await consumer.outputs.get()

    def abort(self, request_id: str, index: int | None = None, consumer: Consumer | None = None) -> None:
        """Ends a request, or one choice of it, at the engine's next turn.

        Args:
            consumer: if given, only where the request is still this consumer's: an id may be used again.
        """
        self._inbox.put(_Abort(request_id, index, consumer))

    def close(self) -> None:
        """Ends the thread. Requests in flight fail with `EngineDeadError`."""
        atexit.unregister(self._exit)
        self._inbox.put(_Close())
        if self.healthy:
            self._thread.join()

    def _exit(self) -> None:
        self._inbox.put(_Close())
        self._thread.join(_EXIT_S)

    def _run(self, built: Future[Engine], build: Callable[[], Engine]) -> None:
        """The thread."""
        try:
            self.engine = build()
            compiling = self.engine.compile_in_background()
        except BaseException as error:
            built.set_exception(error)
            return
        self._heartbeat = time.monotonic()
        built.set_result(self.engine)
        try:
            while self._drain_inbox():
                if compiling is not None and compiling.done:
                    self.engine.step_limit.lift()  # for its trial
                    compiling.switch()
                    compiling = None
                outputs = self.engine.step() if self.engine.has_work else []
                self._stats = self.engine.stats
                self._heartbeat = time.monotonic()
                self._deliver(outputs)
        except Exception:
            _logger.exception("The engine's loop has ended.")
        finally:
            self._dead = True
            self._fail_all()
            if compiling is not None:
                compiling.close()

    def _drain_inbox(self) -> bool:
        """Handles all messages; waits for one while the engine has no work. False once the loop is closed."""
        wait = not self.engine.has_work
        while True:
            try:
                message = self._inbox.get(block=wait, timeout=_HEARTBEAT_S)
            except queue.Empty:
                return True
            wait = False
            match message:
                case _Add(request, consumer):
                    self._add(request, consumer)
                case _Abort():
                    self._abort(message)
                case _Close():
                    return False

    def _add(self, request: EngineRequest, consumer: Consumer) -> None:
        self._num_received += 1
        try:
            self.engine.add(request)
        except Exception as error:
            failure = request_failure(request.request_id, error)
            self._post({consumer.loop: [(consumer, Output(request.request_id, 0, error=failure))]})
        else:
            self._consumers[request.request_id] = consumer

    def _abort(self, message: _Abort) -> None:
        consumer = self._consumers.get(message.request_id)
        if consumer is None or message.consumer not in (None, consumer):
            return
        self.engine.abort(message.request_id, message.index)
        self._aborted += message.index is None
        if not self.engine.has(message.request_id):
            del self._consumers[message.request_id]
            self._post({consumer.loop: [(consumer, None)]})

    def _deliver(self, outputs: list[Output]) -> None:
        """Returns the outputs of a step, with one wake-up per event loop."""
        batches: _Batches = defaultdict(list)
        for output in outputs:
            consumer = self._consumers.get(output.request_id)
            if consumer is not None:
                batches[consumer.loop].append((consumer, output))
        for request_id in {output.request_id for output in outputs if output.error or output.finish_reason}:
            if not self.engine.has(request_id):
                self._consumers.pop(request_id, None)
        self._post(batches)

    def _post(self, batches: _Batches) -> None:
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the event loop is closed: its requests have no reader any more
                for _, output in batch:
                    if output is not None:
                        self.engine.abort(output.request_id)
                        self._consumers.pop(output.request_id, None)

    def _fail_all(self) -> None:
        """Fails all requests in flight, and those in the inbox."""
        batches: _Batches = defaultdict(list)
        for request_id, consumer in self._consumers.items():
            batches[consumer.loop].append((consumer, Output(request_id, 0, error=EngineDeadError(_DEAD))))
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, _Add):
                    failed = Output(message.request.request_id, 0, error=EngineDeadError(_DEAD))
                    batches[message.consumer.loop].append((message.consumer, failed))
        self._post(batches)


def _put_all(batch: list[tuple[Consumer, Output | None]]) -> None:
    for consumer, output in batch:
        consumer.outputs.put_nowait(output)
