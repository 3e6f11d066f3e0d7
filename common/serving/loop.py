"""The engine in a thread of its own: requests go in through a queue, and tokens come out through asyncio's queues.

    event loop's thread                       engine's thread
    EngineLoop.submit  ── commands ──────▶    add_request, abort
    Stream             ◀── Delta ────────     step

Only its own thread touches the engine: a caller waits for the step at hand, which the event loop must not.
Between two steps the thread takes all commands that wait; an abort is therefore obeyed within a step. After each step
it hands the new tokens of all requests to the event loop at once. If the engine fails, every stream ends with
`EngineDead`, later requests get the same answer, and nothing waits.

The engine is also loaded in that thread. OpenMP keeps a team of threads for each thread that has ever computed
anything. Once two teams are more threads than there are cores, libgomp puts them to sleep at the end of every operator
instead of letting them spin. Steps took a third longer when the main thread had loaded the engine.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

LOG = logging.getLogger("common.serving")
MANY_STREAMS = 16
PATIENCE = 0.05
"""With so many streams or more, the next step waits these seconds at most until the tokens of the last one are written.
While a step computes, each core has a thread of it. If other work takes a core then, all threads of the step wait. To
wait for the event loop costs 0.2 ms, which is more than what few streams take from a step.
"""
NOT_FOLLOWED = "the grammar cannot be followed any further"  # begins the error of a request whose grammar is to blame


class EngineDead(RuntimeError):
    """The engine has failed or was closed, and computes nothing any more; the text says why."""


class QueueFull(RuntimeError):
    """The request was not accepted, because too many wait. retry_after: seconds until it is worth another try."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailed(RuntimeError):
    """The engine could not compute this request; others go on."""


@dataclass(frozen=True)
class Job:
    """One prompt for `Engine.add_request`."""

    prompt_token_ids: Sequence[int]
    params: Any  # SamplingParams
    options: dict[str, Any] = field(default_factory=dict)  # tenant, priority, cache_salt


@dataclass(slots=True)
class Delta:
    """What one step has added to one sample."""

    choice: int  # number of the sample among all samples of all prompts of the stream
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]]  # for each token, if the request asked for them
    finish_reason: str | None
    output: Any  # the engine's RequestOutput, which is complete once there is a finish_reason


class Stream:
    """The answers to the prompts of one HTTP request. It belongs to the event loop in which it was made."""

    def __init__(self, request_id: str, num_choices: int, abort: Callable[[Stream], None]):
        self.request_id = request_id
        self.num_open = num_choices  # samples that have not ended
        self.event_loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.event_loop.create_future()
        self.arrived: list[Delta] = []
        self.error: Exception | None = None  # what ends the stream after all that has arrived
        self.has_news = asyncio.Event()
        self.abort = abort

    def put(self, deltas: Sequence[Delta]) -> None:
        """Hand on what a step has added."""
        for delta in deltas:
            if delta.finish_reason == "error":
                return self.fail(RequestFailed(delta.output.error))
            self.arrived.append(delta)
        self.has_news.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, of which the reader hears after all that has arrived before."""
        self.error = self.error or error
        self.has_news.set()

    async def begun(self) -> None:
        """Wait until something has arrived. Raises EngineDead, or RequestFailed if a sample failed."""
        try:
            await self.has_news.wait()
        except asyncio.CancelledError:  # the time that answers may take after SIGTERM is over
            raise EngineDead("the server is shutting down.") from None
        if self.error and not self.arrived:
            raise self.error

    async def take(self) -> list[Delta]:
        """Wait for what comes next, and return all that has come. Raises as `begun` does."""
        await self.begun()
        deltas, self.arrived = self.arrived, []
        self.num_open -= sum(delta.finish_reason is not None for delta in deltas)
        if not self.error:
            self.has_news.clear()
        return deltas

    def close(self) -> None:
        """Abort what has not ended: the reader has left."""
        if self.num_open:
            self.num_open = 0
            self.abort(self)


@dataclass
class Reader:
    """How much of one sample has been handed on. The engine's thread keeps it."""

    stream: Stream
    choice: int
    num_characters: int = 0
    num_tokens: int = 0
    last_time: float | None = None  # when its newest token came, in seconds of time.perf_counter


class Observer:
    """Is told in the engine's thread what happens to requests. output: a RequestOutput."""

    def on_tokens(self, output: Any, seconds: float | None) -> None:
        """A step has added tokens. seconds: since the step before that did; None for the first."""

    def on_end(self, output: Any, reason: str) -> None:
        """A request has ended: "stop", "length", "error" or "abort"."""


class EngineLoop:
    """Loads an engine and runs it.

    make: loads the engine; what it raises, the constructor raises. observe: makes the engine's observer. max_waiting:
    sequences that may wait beside those that run; above that, `submit` raises QueueFull.
    """

    def __init__(self, make: Callable[[], Any], observe: Callable[[Any], Observer], max_waiting: int = 256):
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.streams: dict[str, Stream] = {}  # those that have not ended, by request id; the event loop's thread
        self.readers: dict[str, Reader] = {}  # by the engine's request id, which names a sample; the engine's thread
        self.error: str | None = None  # why the engine is dead
        self.is_closing = False
        loaded: Future[Any] = Future()
        self.thread = threading.Thread(target=self.load_and_run, args=(make, loaded), name="engine", daemon=True)
        self.thread.start()
        engine = loaded.result()
        self.capacity = engine.config.max_num_seqs + max_waiting
        self.observer = observe(engine)

    # The event loop's thread ---------------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Samples that are running or waiting."""
        return sum(stream.num_open for stream in self.streams.values())

    async def submit(self, jobs: Sequence[Job]) -> Stream:
        """Give prompts to the engine, and wait until it has taken them: a step at most.

        Raises ValueError if one of them can never be served, QueueFull if too many are waiting, EngineDead.
        """
        self.check()
        num_choices = sum(job.params.n for job in jobs)
        self.check_size(num_choices)
        if self.num_sequences + num_choices > self.capacity:
            raise QueueFull(f"{self.num_sequences} sequences are running or waiting; try again later.", 1.0)
        stream = Stream(uuid.uuid4().hex, num_choices, self.drop)
        self.streams[stream.request_id] = stream
        self.commands.put(lambda: self.add(stream, jobs))
        try:
            await stream.accepted
        except BaseException:
            stream.close()
            self.streams.pop(stream.request_id, None)
            raise
        return stream

    def check_size(self, num_choices: int) -> None:
        """Raise ValueError if one request has more samples than can ever be held."""
        if num_choices > self.capacity:
            raise ValueError(f"{num_choices} sequences in one request; this server holds {self.capacity} at once.")

    def finished(self, stream: Stream) -> None:
        """The reader of a stream is done with it."""
        stream.close()
        self.streams.pop(stream.request_id, None)

    def drop(self, stream: Stream) -> None:
        self.commands.put(lambda: self.remove(stream))

    def check(self) -> None:
        """Raise EngineDead if the engine computes nothing any more."""
        if self.error is not None or self.is_closing or not self.thread.is_alive():
            raise EngineDead(self.error or "the server is shutting down.")

    def close(self, timeout: float = 10.0) -> None:
        """End the thread and the engine. Streams that have not ended get EngineDead."""
        self.is_closing = True
        self.commands.put(lambda: None)  # wakes it up
        if self.thread.is_alive():
            self.thread.join(timeout)
        self.engine.close()

    # The engine's thread -------------------------------------------------------------------------------------

    def load_and_run(self, make: Callable[[], Any], loaded: Future[Any]) -> None:
        try:
            self.engine = make()
            loaded.set_result(self.engine)
        except BaseException as error:
            loaded.set_exception(error)
        else:
            self.run()

    def run(self) -> None:
        try:
            while not self.is_closing:
                self.take_commands(wait=not self.engine.has_unfinished_requests)
                if self.engine.has_unfinished_requests:
                    self.deliver(self.engine.step())
        except BaseException as error:  # whatever it is, the readers must hear of it
            self.error = f"the engine has stopped: {type(error).__name__}: {error}"
            LOG.critical("%s Every request gets status 503 from now on.", self.error, exc_info=True)
        self.error = self.error or "the server has shut down."
        self.fail(EngineDead(self.error))
        while not self.is_closing or not self.commands.empty():  # a request may have passed `check` before
            self.commands.get()()

    def take_commands(self, wait: bool) -> None:
        """Run the commands that wait. wait: until there is one, since there is nothing else to do."""
        try:
            while not self.is_closing:
                self.commands.get(block=wait)()
                wait = False
        except queue.Empty:
            pass

    def add(self, stream: Stream, jobs: Sequence[Job]) -> None:
        """Let the engine have all prompts of a stream, or none."""
        if self.error is not None:
            self.tell(stream, EngineDead(self.error))
            return
        ids: list[str] = []
        try:
            for number, job in enumerate(jobs):
                request_id = f"{stream.request_id}.{number}"
                ids.append(self.engine.add_request(job.prompt_token_ids, job.params, request_id, **job.options))
        except Exception as error:  # of any kind: it is this request's, and others go on
            for request_id in ids:
                self.engine.abort(request_id)
            self.tell(stream, error)
            return
        choice = 0
        for request_id, job in zip(ids, jobs):
            for child in range(job.params.n):
                self.readers[f"{request_id}/{child}" if child else request_id] = Reader(stream, choice)
                choice += 1
        self.tell(stream, None)

    def tell(self, stream: Stream, error: Exception | None) -> None:
        """Answer `submit`."""

        def answer() -> None:
            if not stream.accepted.done():  # the client may have left
                stream.accepted.set_exception(error) if error else stream.accepted.set_result(None)

        self.call(stream.event_loop, answer)

    def remove(self, stream: Stream) -> None:
        """Abort the requests of a stream whose reader has left."""
        ids = [request_id for request_id, reader in self.readers.items() if reader.stream is stream]
        for request_id in ids:
            del self.readers[request_id]
            self.observer.on_end(self.engine.output(request_id), "abort")
        for request_id in ids:  # the first one's abort ends the other samples of its prompt, too
            self.engine.abort(request_id)

    def deliver(self, outputs: Sequence[Any]) -> None:
        """Hand on what a step has added."""
        news: dict[asyncio.AbstractEventLoop, dict[Stream, list[Delta]]] = {}
        now = time.perf_counter()
        for output in outputs:
            reader = self.readers.get(output.request_id)
            start = reader.num_tokens if reader else 0
            if reader is None or (start == len(output.token_ids) and output.finish_reason is None):
                continue  # its reader has left, or this was a part of its prompt
            if start < len(output.token_ids):
                self.observer.on_tokens(output, reader.last_time and now - reader.last_time)
                reader.last_time = now
            text, logprobs = output.text[reader.num_characters :], output.logprobs[start:]
            delta = Delta(reader.choice, text, output.token_ids[start:], logprobs, output.finish_reason, output)
            reader.num_characters, reader.num_tokens = len(output.text), len(output.token_ids)
            news.setdefault(reader.stream.event_loop, {}).setdefault(reader.stream, []).append(delta)
            if output.finish_reason is not None:
                del self.readers[output.request_id]
                self.observer.on_end(output, output.finish_reason)
        for event_loop, deltas in news.items():
            is_written = threading.Event()
            self.call(event_loop, put_all, deltas, is_written)
            if len(deltas) >= MANY_STREAMS:
                is_written.wait(PATIENCE)

    def fail(self, error: Exception) -> None:
        """Tell every reader that nothing follows."""
        for stream in {reader.stream.request_id: reader.stream for reader in self.readers.values()}.values():
            self.call(stream.event_loop, stream.fail, error)
        self.readers.clear()

    def call(self, event_loop: asyncio.AbstractEventLoop, function: Callable, *arguments: Any) -> None:
        try:
            event_loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed, and with it all connections
            LOG.debug("An event loop ended before its requests.")


def put_all(news: dict[Stream, list[Delta]], is_written: threading.Event) -> None:
    """Wake up what reads these streams. is_written: is set after all of it has run, and has written what it can."""
    for stream, deltas in news.items():
        stream.put(deltas)
    asyncio.get_running_loop().call_soon(is_written.set)
