"""Assertions that must hold after every step of an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from common.authoring.soak.oracle import Oracle
from solutions.batching import Engine
from solutions.paged_attention import PagedKVCache, hash_block
from solutions.scheduler import Request, SchedulerOutput
from solutions.speculative import DraftProposer, SpeculativeRunner


def check_books(engine: Engine) -> None:
    """Check the bookkeeping: a block is held as often as its reference count says, and free if that is 0."""
    manager, scheduler = engine.manager, engine.scheduler
    pool, holders = manager.pool, Counter()
    for table in manager.block_tables.values():
        table = [block for block in table if block is not manager.dropped]
        holders.update(block.block_id for block in table)
        assert len({block.block_id for block in table}) == len(table), "a block stands twice in one table"
        assert engine.config.kv_cache_policy == "paged" or len(table) <= 1, "contiguous, and yet in two pieces"
    for block in pool.blocks:
        assert block.ref_cnt == holders[block.block_id], f"{block}: {holders[block.block_id]} hold it"
        assert (block.block_id in pool.free) == (block.ref_cnt == 0), block
    hashed = {block.block_hash.value: block for block in pool.blocks if block.block_hash}
    assert hashed == pool.cached
    running = {request.request_id for request in scheduler.running}
    assert set(manager.block_tables) <= running, "a request that does not run holds blocks"
    assert not manager.copies, "a copy was forgotten"
    held = sum(map(len, scheduler.swapped.values()))
    assert held + scheduler.host_pool.num_free_blocks == len(scheduler.host_pool.blocks)
    assert set(scheduler.requests) == {r.request_id for r in [*scheduler.running, *scheduler.waiting]}


class Texts:
    """What the prefix cache may contain: the beginnings of texts in whole blocks of verified tokens, by their hash."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.beginnings: dict[bytes, list[int]] = {}
        self.growing: list[tuple[Request, list]] = []  # and the hashes of its blocks so far

    def watch(self, requests: Iterable[Request]) -> None:
        self.growing += [(request, []) for request in requests]

    def check(self, engine: Engine) -> None:
        """No draft token is in the prefix cache, and a request that holds a cached block has computed its tokens."""
        size = self.block_size
        for request, hashes in self.growing:
            while (len(hashes) + 1) * size <= request.num_tokens:
                start = len(hashes) * size
                hashes.append(hash_block(hashes[-1] if hashes else None, request.all_token_ids[start : start + size]))
                self.beginnings[hashes[-1].value] = request.all_token_ids[: start + size]
        self.growing = [each for each in self.growing if each[0].finish_reason is None or each[0].in_flight]
        for value in engine.manager.pool.cached:
            assert value in self.beginnings, "a block can be found by tokens that were not verified"
        for request in engine.scheduler.running:
            for place, block in enumerate(engine.manager.block_tables[request.request_id]):
                if block.block_hash is not None and block is not engine.manager.dropped:
                    text = self.beginnings[block.block_hash.value]
                    assert text == request.all_token_ids[: len(text)] and len(text) == (place + 1) * size
                    assert len(text) <= request.num_computed_tokens, "found before it is computed"

    def check_contents(self, engine: Engine, cache: PagedKVCache, oracle: Oracle) -> None:
        """Each block in the prefix cache holds the keys and values of its text, as computed alone."""
        cached, compared = engine.manager.pool.cached, set()
        for value in sorted(cached, key=lambda value: -len(self.beginnings[value])):
            if value in compared:
                continue
            alone = oracle.block(self.beginnings[value])
            for end in range(len(self.beginnings[value]), 0, -self.block_size):
                block = cached.get(value)
                if block is None:
                    break  # the block before it was evicted
                for ours, theirs in zip(cache.device_tensors, alone.device_tensors):
                    one, other = ours[:, block.block_id], theirs[:, 0, end - self.block_size : end]
                    assert torch.allclose(one, other, rtol=1e-6, atol=1e-6), f"{block} holds something else"
                compared.add(value)
                value = block.block_hash.parent


def check_drafts(engine: Engine, runner: SpeculativeRunner) -> None:
    """The runner keeps nothing of requests that have ended, and no draft goes beyond its limit."""
    scheduler, proposer = engine.scheduler, runner.proposer
    known = {*scheduler.requests, *scheduler.finished_ids}  # the runner hears of the finished ones in the next step
    kept = {"drafts": runner.drafts, "acceptances": runner.adaptive.acceptances}
    if isinstance(proposer, DraftProposer):
        kept["computed counts"] = proposer.num_computed
    for what, each in kept.items():
        assert set(each) <= known, f"{what} of requests that are gone: {set(each) - known}"
    for draft in runner.drafts.values():
        token_ids = draft.draft_token_ids
        assert len(token_ids) <= draft.limit <= runner.adaptive.num_speculative_tokens
        if draft.probs:
            probs = torch.stack(draft.probs)
            assert len(probs) == len(token_ids) and torch.allclose(probs.sum(-1), torch.ones(len(probs)).to(probs))
            assert probs[range(len(probs)), token_ids].gt(0).all(), "a draft token that cannot have been drawn"
    if isinstance(proposer, DraftProposer):
        for request in scheduler.running:
            if not request.in_flight:
                draft = runner.drafts.get(request.request_id)
                end = request.num_tokens + max(0, len(draft.draft_token_ids) - 1 if draft else 0)
                assert proposer.num_computed[request.request_id] <= end, "the draft is ahead of its own draft tokens"


def watch_draft(proposer: DraftProposer) -> None:
    """Assert after each plan that the draft model has not computed more tokens of a request than the target."""
    follow = proposer.follow

    def watched(plan: SchedulerOutput) -> None:
        follow(plan)
        for each in plan.scheduled:
            computed = proposer.num_computed[each.request_id]
            assert computed <= each.start, f"the draft's {computed} computed tokens, the target's {each.start}"

    proposer.follow = watched
