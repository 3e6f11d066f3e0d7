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
from dataclasses import dataclass
from typing import Any

from common.sampling import SamplingParams
from common.serving.errors import EngineDead, QueueFull, RequestFailed
from common.serving.metrics import Metrics

LOG = logging.getLogger("common.serving")
MANY_STREAMS = 16
PATIENCE = 0.05
"""With so many streams or more, the next step waits these seconds at most until the tokens of the last one are written.
While a step computes, each core has a thread of it. If other work takes a core then, all threads of the step wait. To
wait for the event loop costs 0.2 ms, which is more than what few streams take from a step.
"""


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
    """One HTTP request: its prompts, as the engine takes them, and their answers, as the event loop reads them."""

    def __init__(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], options: dict[str, Any]):
        self.request_id = uuid.uuid4().hex
        self.prompts, self.params, self.options = prompts, params, options
        self.accepted: Future[None] = Future()
        self.num_open = sum(each.n for each in params)  # samples that have not ended
        self.arrived: list[Delta] = []
        self.error: Exception | None = None  # what ends the stream after all that has arrived
        self.has_news = asyncio.Event()

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


@dataclass
class Reader:
    """How much of one sample has been handed on. The engine's thread keeps it."""

    stream: Stream
    choice: int
    num_characters: int = 0
    num_tokens: int = 0
    last_time: float | None = None  # when its newest token came, in seconds of time.perf_counter


class EngineLoop:
    """Loads an engine and runs it, for one event loop.

    make: loads the engine; what it raises, the constructor raises. max_waiting: sequences that may wait beside those
    that run; above that, `submit` raises QueueFull.
    """

    def __init__(self, make: Callable[[], Any], model_name: str, max_waiting: int):
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.streams: set[Stream] = set()  # those that have not ended; the event loop's thread keeps them
        self.readers: dict[str, Reader] = {}  # by the engine's request id, which names a sample; the engine's thread
        self.error: str | None = None  # why the engine is dead
        self.is_closing = False
        loaded: Future[Any] = Future()
        self.thread = threading.Thread(target=self.load_and_run, args=(make, loaded), name="engine", daemon=True)
        self.thread.start()
        loaded.result()  # raises what `make` raised
        self.capacity = self.engine.config.max_num_seqs + max_waiting
        self.metrics = Metrics(self.engine, model_name)

    # The event loop's thread ---------------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Samples that are running or waiting."""
        return sum(stream.num_open for stream in self.streams)

    async def submit(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], **options: Any) -> Stream:
        """Give prompts to the engine, and wait until it has taken them: a step at most. options: of `add_request`.

        Raises ValueError if one of them can never be served, QueueFull if too many are waiting, EngineDead.
        """
        self.check()
        stream = Stream(prompts, params, options)
        self.check_size(stream.num_open)
        if self.num_sequences + stream.num_open > self.capacity:
            raise QueueFull(f"{self.num_sequences} sequences are running or waiting; try again later.")
        self.event_loop = asyncio.get_running_loop()
        self.streams.add(stream)
        self.commands.put(lambda: self.add(stream))
        try:
            await asyncio.wrap_future(stream.accepted)
        except BaseException:
            self.finished(stream)
            raise
        return stream

    def check_size(self, num_choices: int) -> None:
        """Raise ValueError if one request has more samples than can ever be held."""
        if num_choices > self.capacity:
            raise ValueError(f"{num_choices} sequences in one request; this server holds {self.capacity} at once.")

    def finished(self, stream: Stream) -> None:
        """The reader of a stream is done with it. What has not ended is aborted."""
        self.streams.discard(stream)
        if stream.num_open:
            stream.num_open = 0
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
        except BaseException as error:
            loaded.set_exception(error)
        else:
            loaded.set_result(self.engine)
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

    def add(self, stream: Stream) -> None:
        """Let the engine have all prompts of a stream, or none."""
        if not stream.accepted.set_running_or_notify_cancel():
            return  # the client has left
        ids: list[str] = []
        try:
            if self.error is not None:
                raise EngineDead(self.error)
            for number, (prompt, params) in enumerate(zip(stream.prompts, stream.params)):
                ids.append(self.engine.add_request(prompt, params, f"{stream.request_id}.{number}", **stream.options))
        except Exception as error:  # of any kind: it is this request's, and others go on
            for request_id in ids:
                self.engine.abort(request_id)
            stream.accepted.set_exception(error)
            return
        samples = [f"{id}/{child}" if child else id for id, own in zip(ids, stream.params) for child in range(own.n)]
        self.readers |= {sample: Reader(stream, choice) for choice, sample in enumerate(samples)}
        stream.accepted.set_result(None)

    def remove(self, stream: Stream) -> None:
        """Abort the requests of a stream whose reader has left."""
        ids = [request_id for request_id, reader in self.readers.items() if reader.stream is stream]
        for request_id in ids:
            del self.readers[request_id]
            self.metrics.on_end(self.engine.output(request_id), "abort")
        for request_id in ids:  # the first one's abort ends the other samples of its prompt, too
            self.engine.abort(request_id)

    def deliver(self, outputs: Sequence[Any]) -> None:
        """Hand on what a step has added."""
        news: dict[Stream, list[Delta]] = {}
        now = time.perf_counter()
        for output in outputs:
            reader = self.readers.get(output.request_id)
            start = reader.num_tokens if reader else 0
            if reader is None or (start == len(output.token_ids) and output.finish_reason is None):
                continue  # its reader has left, or this was a part of its prompt
            if start < len(output.token_ids):
                self.metrics.on_tokens(output, reader.last_time and now - reader.last_time)
                reader.last_time = now
            text, logprobs = output.text[reader.num_characters :], output.logprobs[start:]
            delta = Delta(reader.choice, text, output.token_ids[start:], logprobs, output.finish_reason, output)
            reader.num_characters, reader.num_tokens = len(output.text), len(output.token_ids)
            news.setdefault(reader.stream, []).append(delta)
            if output.finish_reason is not None:
                del self.readers[output.request_id]
                self.metrics.on_end(output, output.finish_reason)
        if news:
            is_written = threading.Event()
            self.call(put_all, news, is_written)
            if len(news) >= MANY_STREAMS:
                is_written.wait(PATIENCE)

    def fail(self, error: Exception) -> None:
        """Tell every reader that nothing follows."""
        for stream in {reader.stream for reader in self.readers.values()}:
            self.call(stream.fail, error)
        self.readers.clear()

    def call(self, function: Callable, *arguments: Any) -> None:
        """Let the event loop's thread run this."""
        try:
            self.event_loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed, and with it all connections
            LOG.debug("The event loop ended before its requests.")


def put_all(news: dict[Stream, list[Delta]], is_written: threading.Event) -> None:
    """Wake up what reads these streams. is_written: is set after all of it has run, and has written what it can."""
    for stream, deltas in news.items():
        stream.put(deltas)
    asyncio.get_running_loop().call_soon(is_written.set)
