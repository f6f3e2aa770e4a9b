"""The open answers of an engine that is stepped in the caller's thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava_serve.engine.engine import Engine
from llava_serve.engine.output_processor import OutputProcessor
from llava_serve.engine.sequence import EngineRequest
from llava_serve.errors import LlavaServeError
from llava_serve.text.tokenizer import Tokenizer
from llava_serve.types import Chunk


@dataclass(slots=True)
class Answer:
    """The chunks of an answer that have not been taken yet; `error`: why no more will come."""

    request: EngineRequest
    processor: OutputProcessor
    chunks: list[Chunk] = field(default_factory=list)
    error: LlavaServeError | None = None

    @property
    def ended(self) -> bool:
        """No more chunks will come."""
        return self.processor.done or self.error is not None

    @property
    def has_output(self) -> bool:
        """`take` has chunks to return, or an error to raise."""
        return bool(self.chunks) or self.error is not None

    def take(self) -> list[Chunk]:
        """Returns the new chunks. Raises the error that ended the answer."""
        if self.error is not None:
            raise self.error
        taken, self.chunks = self.chunks, []
        return taken


class OpenAnswers:
    """Adds requests to an engine, and gathers what its steps put out for them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._open: dict[str, Answer] = {}

    def open(self, request: EngineRequest) -> Answer:
        """Queues a request. Its answer must be closed.

        Raises:
            CapacityError: the queue is full.
        """
        self._engine.add(request)
        answer = Answer(request, OutputProcessor(self._tokenizer, request))
        self._open[request.request_id] = answer
        return answer

    def close(self, answer: Answer) -> None:
        """Ends the request, if it has not ended."""
        self._engine.abort(answer.request.request_id)
        self._open.pop(answer.request.request_id, None)

    def step(self) -> None:
        """Steps the engine, and adds the new chunks to their answers."""
        for output in self._engine.step():
            answer = self._open[output.request_id]
            if answer.error is not None or output.error is not None:
                answer.error = answer.error or output.error
                continue
            try:
                chunk = answer.processor.push(output)
            except LlavaServeError as error:
                answer.error = error
                self._engine.abort(output.request_id)
                continue
            if chunk is None:
                continue
            if chunk.finish_reason is not None and output.finish_reason is None:
                self._engine.abort(output.request_id, output.index)
            answer.chunks.append(chunk)
