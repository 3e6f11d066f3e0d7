"""Many clients, of whom some leave: nobody else's tokens change, no block is lost, and memory does not grow."""

from __future__ import annotations

import asyncio
import random

import psutil
import pytest

pytest.importorskip("fastapi")

from common.bench.serving import closed_loop_alone, complete
from common.tests.serving.conftest import eventually, is_empty, make_engine, serving

OPTIONS = {"dtype": "float64", "num_blocks": 24, "max_batch_size": 16}
"""In float64 tokens do not depend on what else is in the batch, and with so few blocks requests are preempted."""
NUM_CLIENTS = 32


def make_bodies(rng: random.Random, number: int) -> list[dict]:
    """Requests that share some prefixes, greedy and sampled."""
    prefixes = [[rng.randrange(300) for _ in range(40)] for _ in range(4)]
    bodies = []
    for seed in range(number):
        prompt = [
            *rng.choice(prefixes)[: rng.randrange(41)],
            *(rng.randrange(300) for _ in range(1 + rng.randrange(20))),
        ]
        sampling = {"temperature": seed % 2, "seed": seed}
        bodies.append({"prompt": prompt, "max_tokens": 1 + rng.randrange(16), "ignore_eos": True, **sampling})
    return bodies


def expected_texts(bodies: list[dict]) -> list[str]:
    """What the engine says to each, alone."""
    from solutions.llama_pytorch import SamplingParams

    with make_engine(**{**OPTIONS, "num_blocks": 512}) as engine:
        fields = [{name: value for name, value in body.items() if name != "prompt"} for body in bodies]
        params = [SamplingParams(**each) for each in fields]
        ids = [engine.add_request(body["prompt"], own) for body, own in zip(bodies, params)]
        texts = {}
        while engine.has_unfinished_requests:
            texts |= {output.request_id: output.text for output in engine.step() if output.is_finished}
    return [texts[each] for each in ids]


async def some_leave(port: int, bodies: list[dict], rng: random.Random) -> list[tuple[int, str, bool]]:
    """Send all, from NUM_CLIENTS clients. Returns (number, text, whether it is complete) of each."""
    waiting = iter(list(enumerate(bodies)))
    answers = []

    async def client() -> None:
        for number, body in waiting:
            leave_after = rng.randrange(4) if rng.random() < 0.4 else None
            answer = await complete(port, body, leave_after)
            answers.append((number, answer.text, leave_after is None))

    async with asyncio.TaskGroup() as clients:
        for _ in range(NUM_CLIENTS):
            clients.create_task(client())
    return answers


@pytest.mark.slow
def test_a_thousand_requests_of_which_many_are_left() -> None:
    rng = random.Random(0)
    bodies = make_bodies(rng, 200)
    expected = expected_texts(bodies)
    memory = []
    with serving(make_engine(**OPTIONS), max_waiting=NUM_CLIENTS) as (url, server):
        engine = server.loop.engine
        for _ in range(5):
            answers = asyncio.run(some_leave(int(url.rpartition(":")[2]), bodies, rng))
            assert len(answers) == len(bodies)
            for number, text, is_complete in answers:
                assert text == expected[number] if is_complete else expected[number].startswith(text), bodies[number]
            eventually(lambda: is_empty(engine))
            eventually(lambda: not server.loop.streams and not server.loop.readers)
            memory.append(psutil.Process().memory_info().rss)
        assert engine.totals.num_preemptions > 0
        assert engine.totals.num_cached_tokens > 0
        assert sum(complete for _, _, complete in answers) < len(answers)
    assert memory[-1] < memory[1] * 1.05, memory


@pytest.mark.slow
def test_the_loads_of_the_measurement_are_the_same() -> None:
    """The engine alone serves the closed loop's requests in the same order, and as many at once."""
    from solutions.llama_pytorch import SamplingParams

    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = [[number + 1] * 8 for number in range(7)]
    with make_engine() as engine:
        most = []
        step = engine.step
        engine.step = lambda: most.append(len(engine.scheduler.requests)) or step()
        outputs = closed_loop_alone(engine, prompts, params, 3)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert max(most) == 3
