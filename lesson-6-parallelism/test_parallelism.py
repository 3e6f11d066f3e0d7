"""The checks of lesson 6. Arithmetic is worked by hand; what ranks do together is done by two processes."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections import deque
from pathlib import Path
from queue import Empty, Queue

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common.checkpoints import Checkpoint
from common.grading import close, equal, exercise, holds, together
from common.grading.compare import CheckFailed
from common.grading.ranks import on_ranks


def counted(*shape: int) -> torch.Tensor:
    """Small whole numbers, all different from their neighbours."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) % 11 - 4


# --- Arithmetic -------------------------------------------------------------------------------------------------------


@exercise("6.1", points=1)
class TestShardRange:
    def test_shares(self, code):
        for size, world_size, expected in (
            (8, 4, [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]),
            (10, 4, [range(0, 3), range(3, 6), range(6, 8), range(8, 10)]),
            (11, 3, [range(0, 4), range(4, 8), range(8, 11)]),
            (5, 1, [range(0, 5)]),
        ):
            shares = [code.shard_range(size, rank, world_size) for rank in range(world_size)]
            equal(shares, expected, f"[shard_range({size}, rank, {world_size}) for rank in range({world_size})]")

    def test_fewer_things_than_ranks(self, code):
        lengths = [len(code.shard_range(2, rank, 4)) for rank in range(4)]
        equal(lengths, [1, 1, 0, 0], "the number of things on each of 4 ranks that share 2")


@exercise("6.2", points=2)
class TestHeadGroups:
    def check(self, code, num_heads: int, num_kv_heads: int, expected: list[tuple[range, range]]) -> None:
        size = len(expected)
        heads = [code.head_groups(num_heads, num_kv_heads, rank, size) for rank in range(size)]
        call = f"head_groups({num_heads}, {num_kv_heads}, rank, {size})"
        equal([tuple(each) for each in heads], expected, f"[{call} for rank in range({size})]")

    def test_whole_groups(self, code):
        self.check(code, 8, 4, [(range(0, 4), range(0, 2)), (range(4, 8), range(2, 4))])

    def test_uneven_groups(self, code):
        self.check(code, 9, 3, [(range(0, 6), range(0, 2)), (range(6, 9), range(2, 3))])

    def test_one_head_for_all(self, code):
        self.check(code, 5, 1, [(range(0, 3), range(0, 1)), (range(3, 5), range(0, 1))])

    def test_five_heads_on_eight_ranks(self, code):
        queries = [
            range(0, 1),
            range(1, 2),
            range(2, 3),
            range(3, 4),
            range(4, 5),
            range(5, 6),
            range(6, 8),
            range(8, 10),
        ]
        self.check(code, 10, 5, [(own, range(own.start // 2, own.start // 2 + 1)) for own in queries])

    def test_fewer_heads_than_ranks(self, code):
        self.check(
            code,
            9,
            3,
            [
                (range(0, 2), range(0, 1)),
                (range(2, 3), range(0, 1)),
                (range(3, 6), range(1, 2)),
                (range(6, 9), range(2, 3)),
            ],
        )


@exercise("6.3", points=1)
class TestRankGrid:
    def test_grids(self, code):
        for tensor, pipeline, expected in (
            (2, 3, [[0, 1], [2, 3], [4, 5]]),
            (3, 1, [[0, 1, 2]]),
            (1, 2, [[0], [1]]),
        ):
            what = f"rank_grid(tensor_parallel={tensor}, pipeline_parallel={pipeline})"
            equal(code.rank_grid(tensor, pipeline), expected, what)


@exercise("6.4", points=2)
class TestStageLayers:
    def check(self, code, num_layers: int, head_cost: float, expected: list[range]) -> None:
        stages = len(expected)
        layers = [code.stage_layers(num_layers, stages, stage, head_cost) for stage in range(stages)]
        call = f"stage_layers({num_layers}, {stages}, stage, head_cost={head_cost})"
        equal(layers, expected, f"[{call} for stage in range({stages})]")

    def test_layers_alone(self, code):
        self.check(code, 8, 0, [range(0, 4), range(4, 8)])
        self.check(code, 7, 0, [range(0, 2), range(2, 5), range(5, 7)])

    def test_the_head_is_work_too(self, code):
        self.check(code, 30, 8, [range(0, 19), range(19, 30)])
        self.check(code, 10, 2.3, [range(0, 4), range(4, 8), range(8, 10)])
        self.check(code, 10, 0.6, [range(0, 3), range(3, 5), range(5, 8), range(8, 10)])

    def test_every_stage_has_a_layer(self, code):
        self.check(code, 4, 100, [range(0, 2), range(2, 3), range(3, 4)])
        self.check(code, 2, 5.1, [range(0, 1), range(1, 2)])


A, B, C = (tuple((batch, step) for step in range(3)) for batch in range(3))
IDLE = None


@exercise("6.6", points=3)
class TestPipelineTimeline:
    def check(self, code, num_stages: int, num_batches: int, num_steps: int, expected: list) -> None:
        timeline = code.pipeline_timeline(num_stages, num_batches, num_steps)
        holds(timeline is not None, "pipeline_timeline returns None: is a `return` missing?")
        what = f"pipeline_timeline(num_stages={num_stages}, num_batches={num_batches}, num_steps={num_steps})"
        equal([list(row) for row in timeline], expected, what)

    def test_one_batch_waits_for_its_own_token(self, code):
        expected = [
            [A[0], IDLE, IDLE, A[1], IDLE, IDLE],
            [IDLE, A[0], IDLE, IDLE, A[1], IDLE],
            [IDLE, IDLE, A[0], IDLE, IDLE, A[1]],
        ]
        self.check(code, 3, 1, 2, expected)

    def test_as_many_batches_as_stages(self, code):
        expected = [[A[0], B[0], A[1], B[1], A[2], B[2], IDLE], [IDLE, A[0], B[0], A[1], B[1], A[2], B[2]]]
        self.check(code, 2, 2, 3, expected)

    def test_more_batches_than_stages(self, code):
        expected = [[A[0], B[0], C[0], A[1], B[1], C[1], IDLE], [IDLE, A[0], B[0], C[0], A[1], B[1], C[1]]]
        self.check(code, 2, 3, 2, expected)

    def test_fewer_batches_than_stages(self, code):
        expected = [
            [A[0], B[0], IDLE, A[1], B[1], IDLE, IDLE],
            [IDLE, A[0], B[0], IDLE, A[1], B[1], IDLE],
            [IDLE, IDLE, A[0], B[0], IDLE, A[1], B[1]],
        ]
        self.check(code, 3, 2, 2, expected)

    def test_one_stage(self, code):
        self.check(code, 1, 2, 2, [[A[0], B[0], A[1], B[1]]])


@exercise("6.7", points=1)
class TestBubbleFraction:
    def test_fractions(self, code):
        timeline = [[A[0], B[0], A[1], B[1], IDLE], [IDLE, A[0], B[0], A[1], B[1]]]
        close(code.bubble_fraction(timeline), 0.2, "bubble_fraction of 10 cells, 2 of them None")
        timeline = [[A[0], IDLE, A[1], IDLE], [IDLE, A[0], IDLE, A[1]]]
        close(code.bubble_fraction(timeline), 0.5, "bubble_fraction of 8 cells, 4 of them None")
        close(code.bubble_fraction([[A[0], A[1]]]), 0.0, "bubble_fraction of 2 cells, none of them None")
        timeline = [[A[0], B[0]], [IDLE, A[0]]]
        close(code.bubble_fraction(timeline), 0.25, "bubble_fraction of 4 cells, 1 of them None")


@exercise("6.8", points=1)
class TestCommunicationCost:
    def test_seconds(self, code):
        what = "communication_cost of {} bytes on {} ranks, latency 0.005, bandwidth 1e6"
        close(code.communication_cost(4000, 4, 5e-3, 1e6), 6 * (5e-3 + 1e-3), what.format(4000, 4))
        close(code.communication_cost(4000, 2, 5e-3, 1e6), 2 * (5e-3 + 2e-3), what.format(4000, 2))
        close(code.communication_cost(0, 3, 5e-3, 1e6), 20e-3, what.format(0, 3))
        close(code.communication_cost(6, 4, 0.0, 1.0), 9.0, "communication_cost(6, 4, latency=0, bandwidth=1)")

    def test_alone(self, code):
        close(float(code.communication_cost(4000, 1, 1e-3, 1e6)), 0.0, "communication_cost of 4000 bytes on 1 rank")


# --- Two ranks, or threads in their place -----------------------------------------------------------------------------

ON_RANKS = 60.0
"""Seconds for checks on two processes, which on a busy machine take a while to import torch. One that hangs is ended by
`on_ranks`, and sooner.
"""


class Ring:
    """Stands for a `Group`, with threads in place of ranks, so that there can be many. It records the messages."""

    def __init__(self, rank: int, size: int, queues: list[Queue]):
        self.rank, self.size, self.queues = rank, size, queues
        self.ranks = list(range(size))
        self.sizes: list[int] = []

    def exchange(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        self.sizes.append(sent.numel())
        self.queues[(self.rank + 1) % self.size].put(sent.clone())
        arrived = self.queues[self.rank].get(timeout=2)
        if arrived.shape != received.shape:
            shapes = f"{tuple(received.shape)}, but the rank before it sent one of {tuple(arrived.shape)}"
            raise ValueError(f"rank {self.rank} wants to receive a part of shape {shapes}")
        received.copy_(arrived)

    def all_reduce(self, *_) -> None:
        raise CheckFailed("ring_all_reduce must use only `group.exchange`, not `all_reduce`.", "ring", None)


def ring(code, xs: list[torch.Tensor]) -> tuple[list, list[Ring]]:
    """Run ring_all_reduce on one thread per tensor. Returns the results and the groups, which recorded messages."""
    queues: list[Queue] = [Queue() for _ in xs]
    groups = [Ring(rank, len(xs), queues) for rank in range(len(xs))]
    results: list = [None] * len(xs)

    def run(rank: int) -> None:
        try:
            results[rank] = code.ring_all_reduce(xs[rank], groups[rank])
        except Empty:
            results[rank] = CheckFailed(
                f"ring_all_reduce: rank {rank} of {len(xs)} waits for a part that no rank sends.", "ring", None
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=5)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results, groups


def stacked(results: list) -> torch.Tensor:
    """The ranks' results as one tensor, a row for each."""
    are_tensors = all(isinstance(each, torch.Tensor) for each in results)
    holds(are_tensors, "ring_all_reduce returns no tensor: is a `return` missing?")
    return torch.stack(results)


def ring_on_rank(code, group, xs):
    return code.ring_all_reduce(xs[group.rank], group)


@exercise("6.9", points=4, seconds=ON_RANKS)
class TestRingAllReduce:
    def test_four_ranks(self, code):
        xs = [counted(2, 5) * 10**rank for rank in range(4)]
        results, _ = ring(code, xs)
        close(stacked(results), torch.stack([sum(xs)] * 4), "the results of ring_all_reduce of ten numbers on 4 ranks")

    def test_three_ranks(self, code):
        xs = [counted(6) + rank for rank in range(3)]
        results, _ = ring(code, xs)
        close(stacked(results), torch.stack([sum(xs)] * 3), "the results of ring_all_reduce of six numbers on 3 ranks")

    def test_what_is_sent(self, code):
        _, groups = ring(code, [counted(2, 4) for _ in range(4)])
        equal(groups[1].sizes, [2] * 6, "the lengths of the messages of rank 1 of 4, for a tensor of shape (2, 4),")

    def test_the_input_is_left_alone(self, code):
        xs = [counted(4), counted(4) + 1]
        ring(code, xs)
        close(xs[0], counted(4), "the argument x after ring_all_reduce, which must not change it,")

    def test_transposed(self, code):
        xs = [counted(3, 4).T * 10**rank for rank in range(2)]
        results, _ = ring(code, xs)
        close(stacked(results), torch.stack([sum(xs)] * 2), "the results of ring_all_reduce of a transposed matrix")

    def test_the_dtype_stays(self, code):
        xs = [counted(4).double() + 2**-40 * rank for rank in range(2)]
        results, _ = ring(code, xs)
        what = "the results of ring_all_reduce on 2 ranks, for four numbers in float64,"
        close(stacked(results), torch.stack([sum(xs)] * 2), what, rtol=0, atol=0)

    def test_alone(self, code):
        results, _ = ring(code, [counted(3)])
        close(results[0], counted(3), "the result of ring_all_reduce on 1 rank")

    def test_two_processes(self, code):
        xs = [counted(5), counted(5) * 100]
        for rank, result in enumerate(on_ranks(code, ring_on_rank, xs)):
            close(result, xs[0] + xs[1], f"the result of ring_all_reduce in process {rank} of 2, for five numbers,")
        xs = [torch.tensor([1.0]), torch.tensor([2.0])]
        for rank, result in enumerate(on_ranks(code, ring_on_rank, xs)):
            close(result, torch.tensor([3.0]), f"the result of ring_all_reduce in process {rank} of 2, for one number,")


WEIGHT, BIAS, X = counted(5, 6), torch.tensor([1.0, -2.0, 4.0, 8.0, -16.0]), counted(3, 6) / 2
PARTS = (range(0, 4), range(4, 6))


def filled(layer, weight: torch.Tensor, bias: torch.Tensor | None = None):
    """The layer, with its rows and columns of this matrix, and its part of the bias."""
    layer.weight.data.copy_(weight[layer.rows.start : layer.rows.stop, layer.columns.start : layer.columns.stop])
    if bias is not None:
        layer.bias.data.copy_(bias[layer.rows.start : layer.rows.stop])
    return layer


class Doubling:
    """Another way to store a matrix: halved. What multiplies by it doubles."""

    def __init__(self, plain):
        self.plain = plain

    def apply(self, layer, x, bias=None):
        y = 2 * self.plain.apply(layer, x)
        return y if bias is None else y + bias

    def embed(self, layer, token_ids):
        return 2 * self.plain.embed(layer, token_ids)


def halved(layer):
    layer.weight.data.mul_(0.5)
    layer.method = Doubling(layer.method)
    return layer


def column_on_rank(code, group, has_bias: bool, parts):
    layer = code.ColumnParallelLinear(code.Linear(6, 5, has_bias), parts[group.rank], group)
    return filled(layer, WEIGHT, BIAS if has_bias else None)(X)


@exercise("6.11", points=1, seconds=ON_RANKS)
class TestColumnParallelLinear:
    def test_own_outputs(self, code):
        for has_bias, parts in ((True, (range(0, 2), range(2, 4))), (False, (range(0, 3), range(3, 5)))):
            expected = F.linear(X, WEIGHT, BIAS if has_bias else None)
            for rank, result in enumerate(on_ranks(code, column_on_rank, has_bias, parts)):
                part = parts[rank]
                what = f"the outputs of rank {rank}, which computes outputs {part.start} to {part.stop - 1} of 5"
                close(result, expected[:, part.start : part.stop], what + ("" if has_bias else ", without a bias"))

    def test_by_the_layers_method(self, code):
        layer = code.ColumnParallelLinear(code.Linear(6, 5, True), range(1, 4), code.Group())
        expected = F.linear(X, WEIGHT, BIAS)[:, 1:4]
        what = "the outputs of a layer whose `method` stores half of the weight and doubles the product"
        close(halved(filled(layer, WEIGHT, BIAS))(X), expected, what)


def row_on_rank(code, group, has_bias: bool):
    part = PARTS[group.rank]
    layer = code.RowParallelLinear(code.Linear(6, 5, has_bias), part, group)
    return filled(layer, WEIGHT, BIAS if has_bias else None)(X[:, part.start : part.stop].contiguous())


@exercise("6.12", points=2, seconds=ON_RANKS)
class TestRowParallelLinear:
    def test_the_sum_over_the_ranks(self, code):
        for rank, result in enumerate(on_ranks(code, row_on_rank, False)):
            close(result, F.linear(X, WEIGHT), f"the output of rank {rank} of 2, without a bias")

    def test_the_bias_counts_once(self, code):
        for rank, result in enumerate(on_ranks(code, row_on_rank, True)):
            close(result, F.linear(X, WEIGHT, BIAS), f"the output of rank {rank} of 2, with a bias")

    def test_by_the_layers_method(self, code):
        layer = halved(filled(code.RowParallelLinear(code.Linear(6, 5), range(6), code.Group()), WEIGHT))
        what = "the output of a layer whose `method` stores half of the weight and doubles the product"
        close(layer(X), F.linear(X, WEIGHT), what)


TABLE = counted(8, 3)
ROWS = (range(0, 4), range(4, 8))


def embedding_on_rank(code, group, token_ids):
    return filled(code.VocabParallelEmbedding(code.Linear(3, 8), ROWS[group.rank], group), TABLE)(token_ids)


@exercise("6.13", points=2, seconds=ON_RANKS)
class TestVocabParallelEmbedding:
    def test_tokens_of_both_ranks(self, code):
        token_ids = torch.tensor([0, 5, 3, 4, 7, 0])
        for rank, result in enumerate(on_ranks(code, embedding_on_rank, token_ids)):
            what = f"the embeddings of tokens 0, 5, 3, 4, 7 and 0 on rank {rank}, where rank 0 has the rows 0 to 3,"
            close(result, TABLE[token_ids], what)

    def test_tokens_of_one_rank_only(self, code):
        token_ids = torch.tensor([6])
        for rank, result in enumerate(on_ranks(code, embedding_on_rank, token_ids)):
            close(result, TABLE[token_ids], f"the embedding of token 6 on rank {rank} (rank 1 has rows 4 to 7)")

    def test_by_the_layers_method(self, code):
        table = code.VocabParallelEmbedding(code.Linear(3, 8), range(4, 8), code.Group())
        token_ids = torch.tensor([5, 4, 7])
        what = "the embeddings from a table whose `method` stores half of it and doubles its rows"
        close(halved(filled(table, TABLE))(token_ids), TABLE[token_ids], what)


def head_on_rank(code, group, num_rows: int, vocab_size: int):
    head = filled(code.ParallelLMHead(code.Linear(3, vocab_size), ROWS[group.rank], group), TABLE)
    return head(counted(num_rows, 3))


@exercise("6.14", points=2, seconds=ON_RANKS)
class TestParallelLMHead:
    def check(self, code, num_rows: int, vocab_size: int) -> None:
        first, second = on_ranks(code, head_on_rank, num_rows, vocab_size)
        expected = F.linear(counted(num_rows, 3), TABLE)[:, :vocab_size]
        close(first, expected, f"the scores that rank 0 of 2 returns for {num_rows} rows, vocabulary {vocab_size}")
        holds(second is not None, "rank 1 returns None; it should return a tensor without rows, (0, V).")
        what = f"the shape of the scores that rank 1 of 2 returns for {num_rows} rows, vocabulary {vocab_size}"
        equal(tuple(second.shape), (0, vocab_size), what)

    def test_several_rows(self, code):
        self.check(code, 3, 8)

    def test_one_row(self, code):
        self.check(code, 1, 8)

    def test_padding_is_no_token(self, code):
        self.check(code, 2, 7)

    def test_by_the_layers_method(self, code):
        head = code.ParallelLMHead(code.Linear(3, 8), range(8), code.Group())
        x = counted(2, 3)
        what = "the scores of a head whose `method` stores half of the weight and doubles the product"
        close(halved(filled(head, TABLE))(x), F.linear(x, TABLE), what)


# --- Reading, stages, workers -----------------------------------------------------------------------------------------


def checkpoint_of(folder: str, **tensors: torch.Tensor) -> Checkpoint:
    Path(folder, "config.json").write_text("{}", encoding="utf-8")
    save_file(tensors, Path(folder, "model.safetensors"))
    return Checkpoint(folder)


@exercise("6.10", points=2)
class TestReadShard:
    def check(self, code, name: str, part, expected: torch.Tensor, num_read: int, what: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            matrix = counted(6, 4)
            checkpoint = checkpoint_of(folder, matrix=matrix, half=matrix.bfloat16(), vector=counted(6))

            def read(*ranges: range) -> torch.Tensor:
                beyond = any(axis.stop > size for axis, size in zip(ranges, checkpoint.shape(name)))
                what = f"`read` was called with {ranges}, beyond the end of a tensor of shape {checkpoint.shape(name)}."
                holds(not beyond, what, str(ranges))
                index = tuple(slice(axis.start, axis.stop) for axis in ranges)
                return checkpoint.read(name, index or ...)

            found = code.read_shard(read, checkpoint.shape(name), part)
            close(found, expected, what)
            num_bytes = expected.element_size() * num_read
            equal(checkpoint.num_bytes_read, num_bytes, f"the number of bytes read for {what}")
            checkpoint._open.clear()

    def test_rows(self, code):
        self.check(code, "matrix", (range(2, 5), range(4)), counted(6, 4)[2:5], 12, "rows 2 to 4 of a matrix (6, 4)")

    def test_columns(self, code):
        what = "columns 1 and 2 of a matrix (6, 4)"
        self.check(code, "matrix", (range(6), range(1, 3)), counted(6, 4)[:, 1:3], 12, what)
        expected = torch.cat([counted(6, 4)[:, 3:], torch.zeros(6, 2)], dim=1)
        what = "columns 3 to 5 of a matrix (6, 4), two of them padding"
        self.check(code, "matrix", (range(6), range(3, 6)), expected, 6, what)

    def test_a_vector(self, code):
        self.check(code, "vector", (range(4, 6),), counted(6)[4:], 2, "elements 4 and 5 of a vector (6,)")

    def test_padding(self, code):
        expected = torch.cat([counted(6, 4)[4:], torch.zeros(2, 4)])
        what = "rows 4 to 7 of a matrix (6, 4), two of them padding"
        self.check(code, "matrix", (range(4, 8), range(4)), expected, 8, what)

    def test_padding_has_the_files_dtype(self, code):
        expected = torch.cat([counted(6, 4)[4:], torch.zeros(2, 4)]).bfloat16()
        what = "rows 4 to 7 of a matrix (6, 4) in bfloat16, two of them padding"
        self.check(code, "half", (range(4, 8), range(4)), expected, 8, what)

    def test_nothing_but_padding(self, code):
        what = "rows 8 and 9 of a matrix (6, 4), both of them padding"
        self.check(code, "matrix", (range(8, 10), range(4)), torch.zeros(2, 4), 0, what)


def sharded(code, rank: int, tensor_parallel: int, pipeline_parallel: int, **changes):
    """A rank's model on the meta device, and the numbers of its layers. Four query heads of two channels in two groups,
    seven channels in the MLP, eleven tokens, three layers."""
    config = dict(
        vocab_size=11, hidden_size=6, intermediate_size=7, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=2, qkv_bias=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = code.Llama(code.ModelConfig(**{**config, **changes}))
    group = code.Group(rank % tensor_parallel, range(tensor_parallel))
    return model, code.shard(model, code.RankCoordinates(rank, tensor_parallel, pipeline_parallel), group)


def parts_of(module: nn.Module) -> dict[str, str]:
    """What each layer with a matrix is: its class, and which rows and columns it has."""

    def describe(layer: nn.Module) -> str:
        rows, columns = layer.rows, layer.columns
        return f"{type(layer).__name__}, {rows.start} to {rows.stop - 1} by {columns.start} to {columns.stop - 1}"

    return {name: describe(layer) for name, layer in module.named_modules() if hasattr(layer, "rows")}


@exercise("6.15", points=4)
class TestShard:
    def test_the_layers_of_a_block(self, code):
        widths = {0: ("0 to 3", "0 to 1", "0 to 3"), 1: ("4 to 7", "2 to 3", "4 to 6")}
        for rank, (queries, keys, channels) in widths.items():
            model, _ = sharded(code, rank, 2, 1)
            expected = {
                "self_attn.q_proj": f"ColumnParallelLinear, {queries} by 0 to 5",
                "self_attn.k_proj": f"ColumnParallelLinear, {keys} by 0 to 5",
                "self_attn.v_proj": f"ColumnParallelLinear, {keys} by 0 to 5",
                "self_attn.o_proj": f"RowParallelLinear, 0 to 5 by {queries}",
                "mlp.gate_proj": f"ColumnParallelLinear, {channels} by 0 to 5",
                "mlp.up_proj": f"ColumnParallelLinear, {channels} by 0 to 5",
                "mlp.down_proj": f"RowParallelLinear, 0 to 5 by {channels}",
            }
            for number in (0, 2):
                what = f"the linear layers of block {number} on rank {rank} of 2, rows by columns,"
                equal(parts_of(model.model.layers[number]), expected, what)
            sizes = {module.group.size for module in model.modules() if hasattr(module, "group")}
            equal(sizes, {2}, f"the sizes of the groups that the layers of rank {rank} of 2 communicate with")

    def test_the_table_and_the_head(self, code):
        for rank, rows in ((0, "0 to 5"), (1, "6 to 11")):
            model, _ = sharded(code, rank, 2, 1)
            found = [parts_of(each)[""] for each in (model.model.embed_tokens, model.lm_head)]
            expected = [f"VocabParallelEmbedding, {rows} by 0 to 5", f"ParallelLMHead, {rows} by 0 to 5"]
            equal(found, expected, f"the embedding table and the head on rank {rank} of 2, with a vocabulary of 11,")

    def test_a_tied_model_has_one_table(self, code):
        model, _ = sharded(code, 1, 2, 1, tie_word_embeddings=True)
        is_shared = model.lm_head.weight is model.model.embed_tokens.weight
        equal(is_shared, True, "whether head and embedding table of a rank are one tensor, in a tied model,")

    def test_stages(self, code):
        for is_tied, table_on_last in ((False, "Absent"), (True, "Embedding")):
            expected = {
                0: [range(0, 1), "Block", "Absent", "Absent", "Embedding", "Absent"],
                1: [range(1, 2), "Absent", "Block", "Absent", "Absent", "Absent"],
                2: [range(2, 3), "Absent", "Absent", "Block", table_on_last, "Linear"],
            }
            for rank in range(3):
                model, layers = sharded(code, rank, 1, 3, tie_word_embeddings=is_tied, intermediate_size=70)
                modules = [*model.model.layers, model.model.embed_tokens, model.lm_head]
                found = [layers, *(type(module).__name__ for module in modules)]
                what = (
                    f"[layers, classes of the three blocks, of table and head] on stage {rank} of 3, tied: {is_tied},"
                )
                equal(found, expected[rank], what)

    def test_stages_of_two_ranks(self, code):
        model, _ = sharded(code, 3, 2, 2)
        found = [type(module).__name__ for module in (model.model.layers[0], model.model.embed_tokens, model.lm_head)]
        what = "the classes of block 0, the table and the head on rank 3 of a grid of 2 by 2"
        equal(found, ["Absent", "Absent", "ParallelLMHead"], what)
        query = parts_of(model.model.layers[2]).get("self_attn.q_proj")
        equal(query, "ColumnParallelLinear, 4 to 7 by 0 to 5", "q_proj of block 2 on rank 3 of a grid of 2 by 2")

    def test_alone(self, code):
        model, layers = sharded(code, 0, 1, 1)
        equal(layers, range(3), "the layers that shard returns on a single rank")
        kinds = {part.partition(",")[0] for part in parts_of(model).values()}
        equal(sorted(kinds), ["Embedding", "Linear"], "the classes of the layers on a single rank")

    def test_every_tensor_of_the_checkpoint_is_known(self, code):
        """Every rank expects the same names and shapes in the checkpoint, whichever part of it it reads."""
        expected = None
        for rank in range(4):
            model, _ = sharded(code, rank, 2, 2)
            shapes = {
                f"{path}.{name}": shape
                for path, layer in model.named_modules()
                if hasattr(layer, "shapes")
                for name, shape in layer.shapes().items()
            }
            expected = expected or shapes
            equal(shapes, expected, f"names and shapes that rank {rank} expects in the checkpoint")


class FakeLink:
    """A link that records its calls."""

    def __init__(self, previous: int | None, following: int | None):
        self.previous, self.next = previous, following
        self.events: list[str] = []

    def receive(self, num_tokens: int) -> torch.Tensor:
        self.events.append(f"receive {num_tokens} rows")
        return torch.full((num_tokens, 2), 7.0)

    def send(self, hidden: torch.Tensor) -> None:
        kind = type(hidden).__name__
        what = f"`send` was called with a {kind}; it should be a tensor of hidden states."
        holds(isinstance(hidden, torch.Tensor), what, kind)
        self.events.append(f"send {hidden.tolist()}")


class FakeRunner:
    """A stage that adds 1 to its hidden states; the last one returns the output."""

    def __init__(self, code, link: FakeLink):
        self.code, self.link = code, link

    def execute(self, plan, hidden=None):
        self.link.events.append("compute" if hidden is None else f"compute on {hidden.tolist()}")
        if self.link.next is None or not plan.scheduled:
            return self.code.ModelRunnerOutput(plan.step_id)
        return (torch.zeros(plan.num_tokens, 2) if hidden is None else hidden) + 1


@exercise("6.16", points=2)
class TestRunStage:
    def run(self, code, previous: int | None, following: int | None, num_tokens: int = 1, preempted_ids=()):
        from solutions.batching import ScheduledRequest
        from solutions.llama_pytorch import SamplingParams

        link = FakeLink(previous, following)
        plan = code.SchedulerOutput(3, preempted_ids=[*preempted_ids])
        if num_tokens:
            ids = list(range(num_tokens))
            plan.scheduled.append(
                ScheduledRequest("a", 0, ids, 0, [0], SamplingParams(), None, ids, [], frozenset(), 9)
            )
        return code.run_stage(FakeRunner(code, link), plan, link), link.events

    def test_first_stage(self, code):
        output, events = self.run(code, None, 1, num_tokens=2)
        equal(events, ["compute", "send [[1.0, 1.0], [1.0, 1.0]]"], "what the first stage does with two tokens")
        kind = type(output).__name__
        holds(output is None, f"run_stage on the first of two stages should return None; it returned {kind}.", kind)

    def test_middle_stage(self, code):
        output, events = self.run(code, 0, 2, num_tokens=2)
        expected = ["receive 2 rows", "compute on [[7.0, 7.0], [7.0, 7.0]]", "send [[8.0, 8.0], [8.0, 8.0]]"]
        equal(events, expected, "what a stage in the middle does with two tokens of one request")
        kind = type(output).__name__
        holds(output is None, f"run_stage on a stage in the middle should return None; it returned {kind}.", kind)

    def test_last_stage(self, code):
        output, events = self.run(code, 0, None)
        equal(events, ["receive 1 rows", "compute on [[7.0, 7.0]]"], "what the last stage does with one token")
        holds(output is not None, "run_stage on the last stage should return the output; it returned None.")
        equal(getattr(output, "step_id", None), 3, "step_id of the output that the last stage returns for step 3")

    def test_only_stage(self, code):
        output, events = self.run(code, None, None)
        equal(events, ["compute"], "what a single stage does with one token")
        equal(getattr(output, "step_id", None), 3, "step_id of the output that a single stage returns for step 3")

    def test_nothing_scheduled(self, code):
        stages = (("the first stage", None, 1), ("a stage in the middle", 0, 2), ("the last stage", 0, None))
        for what, preempted_ids in (("only moves blocks", ()), ("preempts a request and schedules none", ("b",))):
            for stage, *place in stages:
                output, events = self.run(code, *place, num_tokens=0, preempted_ids=preempted_ids)
                equal(events, ["compute"], f"what {stage} does in a step that {what}")
            kind = type(output).__name__  # of the last stage's
            sentence = f"run_stage on the last stage returned None for a step that {what}; rank 0 waits for the output."
            holds(output is not None, sentence, kind)


@exercise("6.17", points=2)
class TestWorkerLoop:
    def run(self, code, commands: list, run):
        sent, left = [], [*commands]

        def receive():
            holds(left, "worker_loop called `receive` again after None was received, or after an error.")
            return left.pop(0)

        try:
            code.worker_loop(receive, run, sent.append, 2)
        except (ValueError, RuntimeError) as error:
            failed = bool(sent) and isinstance(sent[-1], code.Failure)
            what = "sent a Failure and raised the error again" if failed else "raised the error of `run`"
            sentence = f"worker_loop {what}; it should send a Failure to rank 0 and return."
            raise CheckFailed(sentence, "error", f"{error}, Failure sent: {failed}") from None
        return sent, left

    def test_results_are_sent(self, code):
        sent, left = self.run(code, [1, 2, 3, None], lambda command: 10 * command)
        equal(sent, [10, 20, 30], "the messages sent, where `run` returns 10, 20, 30 for commands 1, 2, 3")
        equal(left, [], "the commands that were not received")

    def test_commands_that_count_as_false(self, code):
        sent, _ = self.run(code, [1, 0, [], 2, None], lambda command: f"did {command}")
        expected = ["did 1", "did 0", "did []", "did 2"]
        equal(sent, expected, "the messages sent for commands 1, 0, [] and 2 (only None ends the loop)")

    def test_nothing_to_say(self, code):
        results = {1: None, 2: 2, 3: [], 4: None}
        sent, _ = self.run(code, [1, 2, 3, 4, None], results.get)
        equal(sent, [2, []], "the messages sent, where `run` returns None, 2, [] and None for commands 1, 2, 3 and 4")

    def test_an_error(self, code):
        def run(command):
            if command == 2:
                raise ValueError("too warm")
            return command

        sent, left = self.run(code, [1, 2, 3, None], run)
        equal(left, [3, None], "the commands that were not received after the second failed")
        equal(len(sent), 2, "the number of messages sent, where the second command fails")
        failure = sent[1]
        holds(
            isinstance(failure, code.Failure),
            f"The message after an error should be a Failure; it is {failure!r}.",
            str(failure),
        )
        equal(failure.rank, 2, "the rank in the Failure of rank 2")
        for word in ("ValueError", "too warm"):
            holds(
                word in failure.text,
                f"The text of the Failure should mention {word!r}; it is {failure.text!r}.",
                failure.text,
            )
        equal(failure.is_consequence, False, "is_consequence of the Failure after a ValueError in `run`")

    def test_another_ranks_failure(self, code):
        def run(command):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

        sent, _ = self.run(code, [1, None], run)
        is_consequence = getattr(sent[0], "is_consequence", None) if sent else None
        equal(is_consequence, True, "is_consequence of the Failure after another rank closed its connection")

    def test_a_lost_connection(self, code):
        """Nothing can be sent any more, and the process ends."""
        sent = []

        def receive():
            raise EOFError("rank 0 is gone")

        try:
            code.worker_loop(receive, str, sent.append, 2)
            raised = "nothing"
        except EOFError:
            raised = "EOFError"
        what = "(the error raised, the messages sent), where `receive` raises EOFError"
        equal((raised, sent), ("EOFError", []), what)


class FakeWorkers:
    """Stands for the other ranks: records what is sent to them, and returns their messages."""

    def __init__(self, messages: list):
        self.events: list[str] = []
        self.messages = list(messages)

    def guard(self):
        return contextlib.nullcontext()

    def send(self, plan) -> None:
        self.events.append(f"send step {plan.step_id}")

    def receive(self, timeout=None):
        self.events.append(f"wait {timeout} s")
        holds(self.messages, "`collect` waits for an output from another rank, but no rank sends one.", self.events)
        return self.messages.pop(0)


class FakeRank:
    """Rank 0's part of a step. It samples, or another rank does."""

    def __init__(self, code, workers: FakeWorkers, is_sampling: bool):
        self.code, self.workers, self.is_sampling = code, workers, is_sampling

    def run(self, plan):
        self.workers.events.append(f"compute step {plan.step_id}")
        return self.code.ModelRunnerOutput(plan.step_id) if self.is_sampling else None


def executor_of(code, is_sampling: bool, received: tuple[int, ...] = ()):
    """A ParallelExecutor whose other ranks send the outputs of the steps `received`, and the list of its calls."""
    workers = FakeWorkers([code.ModelRunnerOutput(step_id) for step_id in received])
    executor = object.__new__(code.ParallelExecutor)
    executor.depth, executor.timeout, executor.outputs = 2, 7.5, deque()
    executor.workers, executor.rank = workers, FakeRank(code, workers, is_sampling)
    return executor, workers.events


def step_of(output, what: str) -> int:
    holds(hasattr(output, "step_id"), f"{what} is {output!r}; it should be a ModelRunnerOutput.", str(output))
    return output.step_id


@exercise("6.18", points=2)
class TestSubmit:
    def test_all_ranks_compute(self, code):
        for is_sampling in (False, True):
            executor, events = executor_of(code, is_sampling)
            executor.submit(code.SchedulerOutput(3))
            equal(events, ["send step 3", "compute step 3"], "what `submit` does with the plan of step 3")

    def test_rank_0_samples(self, code):
        executor, _ = executor_of(code, True)
        for step_id in (4, 5, 6):
            executor.submit(code.SchedulerOutput(step_id))
        steps = [step_of(executor.collect(), "what `collect` returns where rank 0 samples") for _ in range(3)]
        equal(steps, [4, 5, 6], "the steps that `collect` returns after `submit` of steps 4, 5 and 6")

    def test_another_rank_samples(self, code):
        executor, events = executor_of(code, False, received=(4, 5))
        executor.submit(code.SchedulerOutput(4))
        executor.submit(code.SchedulerOutput(5))
        expected = ["send step 4", "compute step 4", "send step 5", "compute step 5"]
        equal(events, expected, "what `submit` does with the plans of steps 4 and 5, where another rank samples,")
        steps = [step_of(executor.collect(), "what `collect` returns where another rank samples") for _ in range(2)]
        equal(
            steps,
            [4, 5],
            "the steps that `collect` returns after `submit` of steps 4 and 5, where another rank samples,",
        )


@exercise("6.19", points=2)
class TestCollect:
    def test_rank_0_samples(self, code):
        executor, events = executor_of(code, True, received=(9,))
        executor.submit(code.SchedulerOutput(4))
        executor.submit(code.SchedulerOutput(5))
        steps = [step_of(executor.collect(), "what `collect` returns") for _ in range(2)]
        equal(steps, [4, 5], "the steps that two calls of `collect` return, after rank 0 has sampled steps 4 and 5,")
        equal(
            [event for event in events if "wait" in event],
            [],
            "the waits for other ranks in `collect`, where rank 0 samples,",
        )

    def test_another_rank_samples(self, code):
        executor, events = executor_of(code, False, received=(4, 5))
        executor.submit(code.SchedulerOutput(4))
        executor.submit(code.SchedulerOutput(5))
        del events[:]
        equal(
            step_of(executor.collect(), "what `collect` returns"),
            4,
            "the step that the first `collect` returns, after steps 4 and 5 were submitted,",
        )
        equal(events, ["wait 7.5 s"], "the waits in the first `collect`, with a timeout of 7.5 s,")
        equal(step_of(executor.collect(), "what `collect` returns"), 5, "the step that the second `collect` returns")


@exercise("6.5", points=1)
class TestLargestShare:
    def test_shares(self, code):
        smollm2 = code.ModelConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True)
        for tensor, pipeline, expected in ((1, 1, 1.0), (2, 1, 2 / 3), (3, 1, 1 / 3), (4, 1, 1 / 3)):
            what = f"largest_share of SmolLM2 with tensor_parallel={tensor}, pipeline_parallel={pipeline}"
            close(float(code.largest_share(smollm2, tensor, pipeline)), expected, what)

    def test_uneven_stages(self, code):
        smollm2 = code.ModelConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True)
        for tensor, pipeline, expected in ((1, 2, 19 / 30), (2, 2, 19 / 45), (1, 3, 13 / 30)):
            what = f"largest_share of SmolLM2 with tensor_parallel={tensor}, pipeline_parallel={pipeline}"
            close(float(code.largest_share(smollm2, tensor, pipeline)), expected, what)

    def test_not_the_first_stage_has_most(self, code):
        config = code.ModelConfig(6144, 576, 1536, 11, 9, 3, 64, tie_word_embeddings=True)
        what = "largest_share with five stages of 2, 3, 2, 3 and 1 of 11 layers"
        close(float(code.largest_share(config, 1, 5)), 3 / 11, what)
        config = code.ModelConfig(4608, 576, 1536, 10, 9, 3, 64, tie_word_embeddings=True)
        what = "largest_share with five stages of 2, 2, 2, 3 and 1 of 10 layers, two ranks in each"
        close(float(code.largest_share(config, 2, 5)), 2 / 3 * 3 / 10, what)


# --- Together ---------------------------------------------------------------------------------------------------------

CONFIG = dict(
    model_type="llama", vocab_size=29, hidden_size=12, intermediate_size=10, num_hidden_layers=3,
    num_attention_heads=3, num_key_value_heads=1, head_dim=4, attention_bias=True, tie_word_embeddings=True,
    max_position_embeddings=64,
)  # fmt: skip


def steps_on_rank(code, group, folder: str, tensor_parallel: int):
    """Two steps of one request, its tokens given. Returns what was sampled here."""
    from solutions.batching import ModelRunner
    from solutions.llama_pytorch import SamplingParams, load_weights, parse_config
    from solutions.paged_attention import PagedKVCache
    from solutions.scheduler import ScheduledRequest

    coordinates = code.RankCoordinates(group.rank, tensor_parallel, 2 // tensor_parallel)
    own = group if tensor_parallel == 2 else code.Group(0, [group.rank])
    checkpoint = Checkpoint(Path(folder))
    with torch.device("meta"):
        model = code.Llama(parse_config(checkpoint.config)).double()
    layers = code.shard(model, coordinates, own)
    load_weights(model, checkpoint)
    runner = ModelRunner(model, PagedKVCache(model, 4, 4, layers=layers))
    link, sampled = code.StageLink(coordinates, model), []
    for step, (start, ids) in enumerate(((0, [3, 14, 15, 9, 26]), (5, [8]), (6, [20]))):
        request = ScheduledRequest("a", start, ids, 0, [2, 0, 1], SamplingParams(), step, [], [], frozenset(), 9)
        output = code.run_stage(runner, code.SchedulerOutput(step, [request]), link)
        if output is not None:
            sampled.append(output.sampled_token_ids.get("a"))
    if link.sending is not None:
        link.sending[0].wait()
    return sampled


def attend_to_all(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each token attends to itself and those before it; nothing is remembered. (T, heads, D)."""
    heads_first = (each.transpose(0, 1) for each in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(0, 1)


@together(seconds=2 * ON_RANKS)
class TestTogether:
    """Your whole file, on two processes: a tensor-parallel pair, then two stages, with awkward sizes."""

    def test_the_same_tokens(self, code):
        from safetensors.torch import load_file

        from solutions.llama_pytorch import parse_config

        torch.manual_seed(0)
        model = code.Llama(parse_config(CONFIG))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        ids = torch.tensor([3, 14, 15, 9, 26, 8, 20])
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            save_file(tensors, Path(folder, "model.safetensors"))
            Path(folder, "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
            whole = code.Llama(parse_config(CONFIG)).double()
            whole.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=False)
            expected = whole.logits(whole(ids, torch.arange(7), attend_to_all)).argmax(-1)[4:].tolist()
            tokens = [[token] for token in expected]
            first, _ = on_ranks(code, steps_on_rank, folder, 2)
            equal(first, tokens, "the tokens that rank 0 of two tensor-parallel ranks samples")
            first, last = on_ranks(code, steps_on_rank, folder, 1)
            equal(first, [], "the tokens that the first of two stages returns")
            equal(last, tokens, "the tokens that the second of two stages samples")
