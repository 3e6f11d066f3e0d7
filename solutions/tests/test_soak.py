"""The soak itself: things happen in it, it is the same every time, and it finds what is planted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from common.authoring.soak import command
from common.authoring.soak.load import STORIES, Models, Report, Run, more_wishes
from common.authoring.soak.oracle import evenness, place_of
from common.authoring.soak.requests import Ask, random_asks
from common.tests.typed import typed
from solutions import speculative
from solutions.llama_pytorch import SamplingParams
from solutions.scheduler import Scheduler
from solutions.speculative import AdaptiveSpeculation, DraftProposer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("COURSE_MODULES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tight(speculative: str, asks: list[Ask], **settings) -> Run:
    """A pool in which hardly two requests have room, and four draft tokens for each in every step."""
    needed = -(-max(len(ask.prompt) + ask.params.max_tokens for ask in asks) // 4)
    settings = {
        "block_size": 4, "num_blocks": needed + 4, "preemption": "swap", "num_host_blocks": 40, "max_model_len": 64,
        "kv_cache_dtype": "auto", "quantization": None, "num_speculative_tokens": 4, "adaptive_speculation": False,
        **settings,
    }  # fmt: skip
    return Run(0, "qwen3", speculative, rounds=(tuple(asks),), settings=settings)


def greedy_asks(num: int = 8) -> list[Ask]:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    return [Ask([5 + i, *STORIES[i % 2][:10]], params, 0, "a", 0, False) for i in range(num)]


def drawn_asks(num: int) -> list[Ask]:
    rng = random.Random(7)
    asks = [more_wishes(rng, ask) for ask in random_asks(rng, list(range(5, 40)), STORIES, num)]
    changes = dict(
        temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=30, ignore_eos=True, n=1, stop=(), stop_token_ids=()
    )  # fmt: skip
    return [replace(ask, params=replace(ask.params, **changes), is_impatient=False) for ask in asks]


def test_things_happen(models):
    """Runs with fixed numbers, one of them over two processes."""
    total = Report()
    for seed in (6, 11, 12, 13, 20, 39, 43):
        total.add(Run.number(seed, models).execute(models))
    assert total.counts["answers"] > 80
    for what in (
        "preemptions", "swaps_in", "copies", "chunks", "cached", "aborted", "accepted", "rejected", "drawn",
        "interrupts", "runs over processes", "runs with a draft", "runs with n-grams", "runs, adaptive",
    ):  # fmt: skip
        assert total.counts[what], f"no {what}: {total.counts}"
    assert evenness(total.places) > command.UNLIKELY


@pytest.mark.parametrize("seed", [13])
def test_the_same_every_time(models, seed):
    """Draft tokens are made in numbers that depend on what steps take; those times are made up."""
    first, again = (Run.number(seed, each).execute(each) for each in (models, Models()))
    assert first == again


def test_a_draft_that_is_the_target(models):
    """Whatever happens to its blocks, all of its draft tokens are right."""
    counts = tight("itself", greedy_asks(), enable_prefix_caching=False).execute(models).counts
    assert counts["swaps_in"] > 20 and counts["drafts"] > 40
    assert counts["accepted"] > 40 and not counts["rejected"]


def test_room_for_draft_tokens_is_no_second_block(models):
    """With a contiguous cache a request near the end of its context asks for no room behind it."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    asks = [Ask([5 + i, *STORIES[0], *STORIES[0][:10]], params, 0, "a", 0, False) for i in range(4)]
    settings = dict(kv_cache_policy="contiguous", num_blocks=5, num_host_blocks=3, num_speculative_tokens=6)
    assert tight("loose", asks, **settings).execute(models).counts["rejected"]


# --- What is planted --------------------------------------------------------------------------------------------------


def test_a_draft_that_does_not_move_its_blocks(models, monkeypatch):
    """Its cache is stale after a swap: that costs acceptance, and no token."""

    def follow(self, plan):
        for request_id in plan.finished_ids:
            self.num_computed.pop(request_id, None)
        for each in plan.scheduled:
            self.num_computed[each.request_id] = min(self.num_computed.get(each.request_id, each.start), each.start)

    monkeypatch.setattr(DraftProposer, "follow", follow)
    counts = tight("itself", greedy_asks(), enable_prefix_caching=False).execute(models).counts
    assert counts["swaps_in"] > 20 and counts["rejected"] > 5


def test_a_draft_that_takes_nothing_back(models, monkeypatch):
    """It believes to have computed the tokens, and has computed the draft tokens in their places."""

    def follow(self, plan):
        for request_id in plan.finished_ids:
            self.num_computed.pop(request_id, None)
        for each in plan.scheduled:
            self.num_computed.setdefault(each.request_id, each.start)

    monkeypatch.setattr(DraftProposer, "follow", follow)
    with pytest.raises(AssertionError, match="the draft's [0-9]+ computed tokens, the target's"):
        tight("loose", greedy_asks()).execute(models)


def test_a_scheduler_that_takes_nothing_back(models, monkeypatch):
    """Rejected draft tokens count as computed: the token in their place never is."""
    update = Scheduler.update_from_output

    def takes_nothing_back(self, plan, output):
        requests = update(self, plan, output)
        for each in plan.scheduled:
            sampled = output.sampled_token_ids.get(each.request_id)
            if sampled and each.request_id in self.requests:
                self.requests[each.request_id].num_computed_tokens += each.num_spec_tokens + 1 - len(sampled)
        return requests

    monkeypatch.setattr(Scheduler, "update_from_output", takes_nothing_back)
    with pytest.raises((AssertionError, RuntimeError)):
        tight("loose", greedy_asks()).execute(models)


def test_draft_tokens_that_can_be_found(models, monkeypatch):
    """Blocks enter the prefix cache while their last tokens are draft tokens."""
    schedule_request = Scheduler.schedule_request

    def too_soon(self, request, num_tokens, plan):
        schedule_request(self, request, num_tokens, plan)
        proposed = plan.scheduled[-1].token_ids[-plan.scheduled[-1].num_spec_tokens :]
        if plan.scheduled[-1].num_spec_tokens:
            request.all_token_ids += proposed
            self.manager.cache_blocks(request, request.num_computed_tokens)
            del request.all_token_ids[-len(proposed) :]

    monkeypatch.setattr(Scheduler, "schedule_request", too_soon)
    with pytest.raises(AssertionError, match="were not verified"):
        tight("loose", greedy_asks()).execute(models)


def test_a_request_that_is_never_forgotten(models, monkeypatch):
    monkeypatch.setattr(AdaptiveSpeculation, "forget", lambda self, request_id: None)
    with pytest.raises(AssertionError, match="acceptances of requests that are gone"):
        tight("loose", greedy_asks()).execute(models)


@pytest.mark.parametrize("mistake", ["none", "drawn from the model again", "all are kept"])
def test_tokens_that_are_not_as_likely_as_they_should_be(models, monkeypatch, mistake):
    """Each of them is possible, so no run fails; where they lie, all together, tells."""
    right = speculative.accept_or_recover

    def wrong(target, draft, token_id, generator):
        is_kept, token_id = right(target, draft, token_id, generator)
        return is_kept, token_id if is_kept else int(torch.multinomial(target, 1, generator=generator))

    if mistake == "drawn from the model again":
        monkeypatch.setattr(speculative, "accept_or_recover", wrong)
    if mistake == "all are kept":
        monkeypatch.setattr(speculative, "accept_or_recover", lambda target, draft, token_id, _: (True, token_id))
    report = tight("loose", drawn_asks(60), num_blocks=200).execute(models)
    print(f"{mistake}: {len(report.places)} tokens, evenness {evenness(report.places):.2g}")
    assert (evenness(report.places) < command.UNLIKELY) == (mistake != "none")


def test_places_are_spread_evenly():
    """Of tokens drawn as they should be, whatever from; and not of the likeliest ones."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 40, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    drawn = torch.multinomial(rows, 1, generator=generator)[:, 0].tolist()
    assert evenness([place_of(token, row, row, rng) for token, row in zip(drawn, rows)]) > 0.001
    likeliest = rows.argmax(-1).tolist()
    assert evenness([place_of(token, row, row, rng) for token, row in zip(likeliest, rows)]) < 1e-9
    with pytest.raises(AssertionError, match="cannot have been drawn"):
        place_of(1, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), rng)


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_tells_how_to_do_it_again(monkeypatch, capsys):
    assert typed("soak", "--minutes", "0", "--seed", "12") == 0
    assert "All answers are right." in capsys.readouterr().out
    monkeypatch.setattr(AdaptiveSpeculation, "forget", lambda self, request_id: None)
    assert typed("soak", "--minutes", "5", "--seed", "12") == 1
    said = capsys.readouterr().out
    assert "python -m common soak --only 12" in said and "requests that are gone" in said
    assert typed("soak", "--only", "12") == 1
    monkeypatch.undo()
    assert typed("soak", "--only", "12") == 0


def test_ctrl_c_ends_it_with_the_summary(monkeypatch, capsys):
    monkeypatch.setattr(Run, "execute", lambda self, models: (_ for _ in ()).throw(KeyboardInterrupt))
    assert typed("soak", "--minutes", "5") == 130
    said = capsys.readouterr().out
    assert "preemptions" in said and "Stopped by hand" in said


def test_nothing_happened(monkeypatch, capsys):
    """After so many runs without preemptions something is wrong with the soak."""
    total = Report()
    total.counts |= dict.fromkeys(command.COUNTED, 5) | {"runs": 19, "preemptions": 0}
    assert command.verdict(total) == []
    total.counts["runs"] = 20
    assert command.verdict(total) == ["nothing happened: preemptions"]
    monkeypatch.setattr(Run, "execute", lambda self, models: total)
    assert typed("soak", "--minutes", "0") == 1
    assert "Wrong: nothing happened: preemptions." in capsys.readouterr().out
