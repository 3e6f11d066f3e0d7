"""Lesson 4's reference: after every operation the books balance, and every sequence reads back its own tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.authoring.soak.requests import Letters, random_model
from solutions.llama_pytorch import SamplingParams
from solutions.llama_pytorch import generate as generate_alone
from solutions.paged_attention import AttentionMetadata, KVCacheManager, PagedKVCache, PagedSequence, generate
from solutions.quantization import Int8KVCache

BLOCK = 3
STORIES = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6, 20, 21, 22, 23, 24, 25], [4, 5, 6] * 4)


class Manager(RuleBasedStateMachine):
    """Random sequences over a small pool, and beside it a memory that knows which token was written to which slot."""

    def __init__(self):
        super().__init__()
        self.manager = KVCacheManager(num_blocks=9, block_size=BLOCK)
        self.sequences: list[PagedSequence] = []
        self.memory: dict[int, list] = {block.block_id: [None] * BLOCK for block in self.manager.pool.blocks}
        self.count = 0

    def new(self, token_ids) -> PagedSequence:
        self.count += 1
        return PagedSequence(f"s{self.count}", list(token_ids))

    def run(self, sequence: PagedSequence, num_tokens: int, computed_blocks=()) -> bool:
        """Allocate, then do to the memory what a forward pass does: copies first, then the new tokens."""
        state = self.state()
        got = self.manager.allocate_slots(sequence, num_tokens, computed_blocks=computed_blocks)
        if got is None:
            assert self.state() == state, "None was returned, and something was changed"
            return False
        for source, target, filled in self.manager.take_copies():
            self.memory[target][:filled] = self.memory[source][:filled]
        table = self.manager.block_tables[sequence.request_id]
        for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens):
            block = table[position // BLOCK]
            assert block.ref_cnt == 1 and block.block_hash is None, "a block that others may read was written to"
            self.memory[block.block_id][position % BLOCK] = sequence.all_token_ids[position]
        sequence.num_computed_tokens += num_tokens
        self.manager.cache_blocks(sequence, sequence.num_computed_tokens)
        return True

    def state(self):
        pool = self.manager.pool
        tables = {name: self.manager.block_table(name) for name in self.manager.block_tables}
        return tables, [block.ref_cnt for block in pool.blocks], list(pool.free), set(pool.cached)

    @rule(story=st.sampled_from(STORIES), length=st.integers(1, 12), chunk=st.integers(1, 12))
    def add(self, story, length, chunk):
        sequence = self.new(story[:length])
        blocks, found = self.manager.get_computed_blocks(sequence)
        assert found < length and found == len(blocks) * BLOCK
        sequence.num_computed_tokens = found
        if self.run(sequence, min(chunk, length - found), blocks):
            self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), chunk=st.integers(1, 4))
    def go_on(self, data, chunk):
        sequence = data.draw(st.sampled_from(self.sequences))
        while sequence.num_computed_tokens + chunk > len(sequence.all_token_ids):
            sequence.all_token_ids.append(30 + len(sequence.all_token_ids) % 3)
        self.run(sequence, chunk)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(self.sequences))
        length = data.draw(st.integers(1, parent.num_computed_tokens))
        child = self.new(parent.all_token_ids[:length])
        self.manager.fork(parent, child)
        if self.run(child, 1):
            self.sequences.append(child)
        else:
            self.manager.free(child)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), guesses=st.integers(1, 5))
    def guess_and_take_back(self, data, guesses):
        """Room for guesses, which are written and then rejected: nothing of them may be found or kept."""
        sequence = data.draw(st.sampled_from(self.sequences))
        if self.manager.allocate_slots(sequence, 0, guesses) is None:
            return
        for source, target, filled in self.manager.take_copies():
            self.memory[target][:filled] = self.memory[source][:filled]
        table = self.manager.block_tables[sequence.request_id]
        for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + guesses):
            self.memory[table[position // BLOCK].block_id][position % BLOCK] = "rejected"
        self.manager.trim(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.manager.free(sequence)

    @rule()
    def reset(self):
        self.manager.reset()
        self.sequences.clear()

    @invariant()
    def the_books_balance(self):
        pool, holders = self.manager.pool, Counter()
        for table in self.manager.block_tables.values():
            holders.update(block.block_id for block in table)
        for block in pool.blocks:
            assert block.ref_cnt == holders[block.block_id]
            assert (block.block_id in pool.free) == (block.ref_cnt == 0)
        assert pool.cached == {block.block_hash.value: block for block in pool.blocks if block.block_hash}
        assert set(self.manager.block_tables) == {sequence.request_id for sequence in self.sequences}

    @invariant()
    def everyone_reads_their_own_tokens(self):
        for sequence in self.sequences:
            table = self.manager.block_table(sequence.request_id)
            for position in range(sequence.num_computed_tokens):
                found = self.memory[table[position // BLOCK]][position % BLOCK]
                assert found == sequence.all_token_ids[position]
        for block in self.manager.pool.cached.values():
            assert tuple(self.memory[block.block_id]) == block.block_hash.token_ids


Manager.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_the_manager = Manager.TestCase


@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
@pytest.mark.parametrize("caching", [True, False])
def test_the_same_tokens_as_lesson_2(block_size, caching, monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")
    model, num_blocks = random_model(), 128 // block_size
    cache = PagedKVCache(model, num_blocks, block_size)
    manager = KVCacheManager(num_blocks, block_size, caching)
    for prompt in (list(range(5, 21)), list(range(5, 21)), [*range(5, 14), 30]):
        for params in (SamplingParams(max_tokens=9), SamplingParams(max_tokens=9, temperature=1.0, seed=4)):
            alone = generate_alone(model, Letters(), prompt, params)
            assert generate(model, Letters(), prompt, params, cache, manager) == alone
            assert manager.pool.num_free_blocks == num_blocks
    assert bool(manager.pool.cached) == (caching and block_size < 128)


@pytest.mark.parametrize("kernels", ["plain", "fast"])
@pytest.mark.parametrize("kind", [PagedKVCache, Int8KVCache])
@pytest.mark.parametrize("lengths", [(3, 10), (1, 600, 700)])
def test_what_another_request_left_in_memory_is_not_read(kernels, kind, lengths, monkeypatch):
    """Padded block tables point to block 0, and a last block has old slots: here all of this is NaN."""
    monkeypatch.setenv("KERNELS", kernels)
    model, block_size = random_model(), 4
    attention = model.model.layers[0].self_attn
    generator, heads, size = torch.Generator().manual_seed(0), attention.q_proj.out_features, attention.head_dim
    tables, answers = [], []
    for length in lengths:
        first = 1 + sum(map(len, tables))
        tables.append(list(range(first, first + -(-length // block_size))))
    q, k, v = (
        torch.randn(sum(lengths), width // size, size, generator=generator).double()
        for width in (heads, attention.k_proj.out_features, attention.k_proj.out_features)
    )
    for garbage in (0.0, float("nan")):
        cache = kind(model, 1 + sum(map(len, tables)), block_size)
        for tensor in cache.device_tensors:
            if tensor.is_floating_point():
                tensor.fill_(garbage)
        start, last = 0, []
        for table, length in zip(tables, lengths):
            slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(length)])
            cache.write(0, slots[:-1], k[start : start + length - 1], v[start : start + length - 1])
            start += length
            last.append((start - 1, slots[-1:]))
        rows = torch.tensor([row for row, _ in last])
        slots = torch.cat([slot for _, slot in last])
        metadata = AttentionMetadata(list(range(len(lengths) + 1)), list(lengths), slots, tables)
        answers.append(cache.attend(metadata)(0, q[rows], k[rows], v[rows]))
    assert torch.equal(*answers)
