"""The speed of the server: the same requests over HTTP and given to the engine in Python, in turn, on one machine.

Another server of the same model, such as vLLM's, can take part, too. While one way is measured, the other servers are
suspended.

The load is a closed loop: each client sends its next request when its last answer is complete, and the engine alone
starts a request when another has finished. The clients run in this process and the server in another, so on a machine
with few cores the clients' own work is part of the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import os
import re
import statistics
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import psutil
import torch

from common.course import ROOT, CourseError

# --- A client on asyncio's sockets, with little work for each token ---------------------------------------------------


@dataclass
class Answer:
    """The answer to one request. Times are in seconds of `time.perf_counter`.

    Its events are parsed when they are first used, after the load, so that the client takes little processor time from
    the server.
    """

    sent: float = 0.0
    received: list[tuple[float, bytes]] = field(default_factory=list)  # when an event came, and its JSON

    @cached_property
    def events(self) -> list[tuple[float, dict]]:
        return [(seconds, json.loads(data)) for seconds, data in self.received]

    @cached_property
    def choices(self) -> list[tuple[float, dict]]:
        return [(seconds, choice) for seconds, event in self.events for choice in event["choices"]]

    @property
    def text(self) -> str:
        return "".join(choice["text"] for _, choice in self.choices)

    @property
    def usage(self) -> dict | None:
        return next((event["usage"] for _, event in reversed(self.events) if event.get("usage")), None)

    @property
    def finish_reason(self) -> str | None:
        return next((choice["finish_reason"] for _, choice in reversed(self.choices)), None)

    @property
    def times(self) -> list[float]:
        """The times of the events with text."""
        return [seconds for seconds, choice in self.choices if choice["text"]]

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with text. Each is a token, or several that form one character."""
        return [after - before for before, after in zip(self.times, self.times[1:])]


async def request(port: int, path: str, body: dict | None = None) -> tuple[int, StreamReader, StreamWriter]:
    """Send a request and read the head of the answer. Returns the status, a reader of the rest, and the writer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    return int(lines[0].split()[1]), reader, writer


async def chunks(reader: StreamReader) -> AsyncIterator[bytes]:
    """The chunks of an answer in HTTP's chunked encoding. Raises EOFError if the connection ends before the last."""
    data = b""
    while True:
        size, line_end, rest = data.partition(b"\r\n")
        if line_end and len(rest) >= (length := int(size, 16)) + 2:
            if not length:
                return
            yield rest[:length]
            data = rest[length + 2 :]
        elif more := await reader.read(2**16):
            data += more
        else:
            raise EOFError("the connection has ended in mid-answer.")


async def complete(port: int, body: dict, leave_after: int | None = None, answer: Answer | None = None) -> Answer:
    """Ask for a streamed completion. leave_after: leave after this many events. answer: holds what has come so far.

    Raises RuntimeError if the server refuses, or sends an error in mid-answer; EOFError if it breaks the answer off.
    """
    answer = answer or Answer()
    answer.sent = time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    status, reader, writer = await request(port, "/v1/completions", body)
    try:
        if status != 200:
            raise RuntimeError(f"status {status}: {(await reader.read(1000)).decode(errors='replace')}")
        rest = b""
        async for chunk in chunks(reader):
            *events, rest = (rest + chunk).split(b"\n\n")
            now = time.perf_counter()
            for data in (event.removeprefix(b"data: ") for event in events):
                if data == b"[DONE]":
                    return answer
                if data.startswith(b'{"error"'):
                    raise RuntimeError(json.loads(data)["error"]["message"])
                answer.received.append((now, data))
                if leave_after is not None and len(answer.received) >= leave_after:
                    return answer
        raise EOFError("the answer has no end.")
    finally:
        writer.close()


async def closed_loop(port: int, bodies: Sequence[dict], num_clients: int) -> list[Answer]:
    """Let clients send all requests; each has one at a time. Returns the answers in the order of the requests."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(bodies))

    async def client() -> None:
        for number, body in waiting:
            answers[number] = await complete(port, body)

    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(client())
    return [answers[number] for number in range(len(bodies))]


# --- A server in a process of its own ---------------------------------------------------------------------------------


@dataclass
class RunningServer:
    process: subprocess.Popen
    port: int


@contextlib.contextmanager
def running_server(*options: str, prefix: Sequence[str] = ()) -> Iterator[RunningServer]:
    """`make serve` at a free port, until the `with` ends.

    options: as on the command line. prefix: a command that runs it, such as `torchrun`. Raises RuntimeError with what
    the server wrote if it ends before it serves.
    """
    command = [*(prefix or [sys.executable]), "-m", "common", "serve", "--port", "0", *options]
    environment = {**os.environ, "COURSE_PYTHON": "here"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"answers at https?://[^:]+:(\d+)", line):
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended before it served:\n{''.join(lines)}")
        yield RunningServer(process, int(match[1]))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


# --- The measurement --------------------------------------------------------------------------------------------------


def measure_serving(model: str, quick: bool, rival: int | None = None) -> dict:
    """Output tokens per second over HTTP and in Python, for some numbers of clients; and times between tokens.

    Beside them the processor time for each token, in the server's process and in that of the engine alone, which other
    work on the machine changes little. rival: the port of another OpenAI-compatible server on this machine.
    """
    from solutions.engine import InferenceEngine
    from solutions.llama_pytorch import SamplingParams

    num_prompt_tokens, num_tokens = (16, 8) if quick else (64, 64)
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    rows = []
    with (
        InferenceEngine(model, enable_prefix_caching=False) as engine,
        running_server("--model", model, "--no-enable-prefix-caching", "--threads", str(threads)) as server,
    ):
        ports = {"server": server.port} | ({"rival": rival} if rival else {})
        processes = {way: processes_at(port) for way, port in ports.items()}
        ways = [*ports, "engine"]

        def answer_all(way: str, prompts: list[list[int]], num_tokens: int) -> list:
            """Let one of the ways answer, while the servers whose turn it is not are stopped."""
            with stopped([each for other in ports if other != way for each in processes[other]]):
                if way == "engine":
                    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
                    return closed_loop_alone(engine, prompts, params, num_clients)
                sampling = {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
                bodies = [{"prompt": prompt, **sampling} for prompt in prompts]
                return asyncio.run(closed_loop(ports[way], bodies, num_clients))

        for num_clients, rounds in ((1, 9), (8, 7), (32, 5), (128, 3)):  # a short round is as noisy as it is short
            shape = (min(2 * num_clients, 128), num_prompt_tokens)
            prompts = torch.randint(engine.config.model_config.vocab_size, shape, generator=generator).tolist()
            num_output_tokens = len(prompts) * num_tokens
            speeds, cpu, answers = {way: [] for way in ways}, {way: [] for way in ways}, {}
            for way in ways:  # memory is allocated and kernels are chosen before it counts
                answer_all(way, prompts[:num_clients], 2)
            for number in range(1 if quick else rounds):
                for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    own = processes.get(way, [psutil.Process()])
                    start, cpu_start = time.perf_counter(), processor_time(own)
                    answers[way] = answer_all(way, prompts, num_tokens)
                    speeds[way].append(num_output_tokens / (time.perf_counter() - start))
                    cpu[way].append((processor_time(own) - cpu_start) / num_output_tokens)
            for way in ports:
                lengths = {answer.usage["completion_tokens"] for answer in answers[way]}
                if lengths != {num_tokens}:
                    raise CourseError(f"The {way} gave {sorted(lengths)} tokens; {num_tokens} were asked for.")
            texts = {way: [answer.text for answer in answers[way]] for way in ways}
            gaps = sorted(gap for answer in answers["server"] for gap in answer.gaps)
            row = {
                "clients": num_clients,
                "num_requests": len(prompts),
                **{f"{way}_tokens_per_second": statistics.median(speeds[way]) for way in ways},
                "ratio": ratio(speeds, "engine"),
                **({"ratio_to_rival": ratio(speeds, "rival")} if rival else {}),
                "rounds": speeds,
                **{f"{way}_processor_seconds_per_token": statistics.median(cpu[way]) for way in ways},
                "time_to_first_token_p50": statistics.median(each.times[0] - each.sent for each in answers["server"]),
                "time_between_tokens_p50": statistics.median(gaps),
                "time_between_tokens_p99": gaps[int(0.99 * len(gaps))],
                **{f"{way}_equal_texts": sum(map(operator.eq, texts[way], texts["engine"])) for way in ports},
            }
            rows.append(row)
            others = f" and {row['ratio_to_rival']:.3f} of the other server's" if rival else ""
            print(
                f"{num_clients} clients: {row['server_tokens_per_second']:.1f} tokens/s over HTTP, "
                f"{row['ratio']:.3f} of the engine's in Python{others}; processor time a token "
                f"{row['server_processor_seconds_per_token'] * 1e3:.2f} and "
                f"{row['engine_processor_seconds_per_token'] * 1e3:.2f} ms; "
                f"p99 between tokens {row['time_between_tokens_p99'] * 1e3:.0f} ms; "
                + ", ".join(f"{row[f'{way}_equal_texts']} of the {way}'s {len(prompts)} texts" for way in ports)
                + " are the engine's",
                flush=True,
            )
    return {
        "model": model,
        "threads": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_tokens,
        "rows": rows,
    }


def ratio(speeds: dict[str, list[float]], other: str) -> float:
    """The server's speed as a multiple of another's: the median over the rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(speeds["server"], speeds[other]))


def processes_at(port: int) -> list[psutil.Process]:
    """The process that listens at a port of this machine, and all that it has started. Raises CourseError."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            found = psutil.Process(connection.pid)
            return [found, *found.children(recursive=True)]
    raise CourseError(f"No server listens at port {port} of this machine.")


@contextlib.contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Suspend these processes until the `with` ends."""
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def processor_time(processes: Sequence[psutil.Process]) -> float:
    """Seconds of processor time that these processes have used so far."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def closed_loop_alone(engine, prompts: Sequence[list[int]], params, num_clients: int) -> list:
    """The same load without a server: as many requests at once as there are clients. Returns the outputs in order."""
    waiting, unfinished, outputs = iter(prompts), 0, {}
    ids: list[str] = []
    while True:
        while unfinished < num_clients and (prompt := next(waiting, None)) is not None:
            ids.append(engine.add_request(prompt, params))
            unfinished += 1
        if not unfinished:
            return [outputs[request_id] for request_id in ids]
        for output in engine.step():
            if output.is_finished:
                outputs[output.request_id] = output
                unfinished -= 1
