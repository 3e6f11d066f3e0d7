"""Lesson 6: one model on many processes. Each rank has a part of the weights and cache, and the tokens are the same.

*Tensor parallelism* cuts every layer: each rank computes some of the heads and some columns of the feed-forward
network, and in each layer the ranks add up their results twice. *Pipeline parallelism* cuts the stack of layers: each
stage sends its hidden states to the next stage, and several batches are in flight at once so that no stage is idle.
Both together form a grid of ranks.

Commands and results are sent through sockets (`common.workers`), tensors through torch.distributed: gloo between CPUs,
NCCL between GPUs. `ParallelExecutor` runs in rank 0, and `serve_as_worker` is the main function of every other rank.

The cut of the layers is from Shoeybi et al., "Megatron-LM" (2019); the stages are from Huang et al., "GPipe" (2019).
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.workers import Failure, describe, guarded, is_consequence
from common.workers.rendezvous import is_worker, join_ranks, report_for_work, start_ranks
from solutions.batching import ModelRunner
from solutions.llama_pytorch import Layer, Linear, Llama, ModelConfig, layers_of
from solutions.mixture_of_experts import SparseMoeBlock
from solutions.paged_attention import cdiv
from solutions.scheduler import ModelRunnerOutput, SchedulerOutput

# --- Arithmetic: which rank computes what -----------------------------------------------------------------------------


def shard_range(size: int, rank: int, world_size: int) -> range:
    """Return a rank's part of `size` things. Parts are consecutive and as even as possible.

    If the parts cannot be equal, each of the first ranks has one more than the others: 10 things on 4 ranks are 3, 3, 2
    and 2.
    """
    # TODO 6.1: divide with remainder. A rank's part begins after all earlier parts, some of which have one more.
    raise NotImplementedError("TODO 6.1")


def head_groups(num_heads: int, num_kv_heads: int, rank: int, world_size: int) -> tuple[range, range]:
    """Return the query heads and the key/value heads of a rank.

    Query heads stay with the key/value head that they attend to: `shard_range` assigns whole groups to the ranks. With
    fewer key/value heads than ranks it assigns the ranks to the heads instead: each rank has one key/value head, and
    the ranks with the same key/value head divide its query heads among them.
    """
    # TODO 6.2: use `shard_range` in both cases: with enough key/value heads for all ranks, and with fewer.
    raise NotImplementedError("TODO 6.2")


def rank_grid(tensor_parallel: int, pipeline_parallel: int) -> list[list[int]]:
    """Return a list for each stage: its `tensor_parallel` ranks, with consecutive numbers. They communicate twice in
    each layer, stages only once in each step, so a stage's ranks should be on the same machine.
    """
    # TODO 6.3: number the grid row by row; each of the `pipeline_parallel` stages is a row.
    raise NotImplementedError("TODO 6.3")


def stage_layers(num_layers: int, num_stages: int, stage: int, head_cost: float = 0.0) -> range:
    """Return the layers of a stage, such that all stages take about the same time.

    head_cost: the work of the head, which the last stage also computes, as a number of layers. The work of all layers
    and the head is divided evenly, and boundaries are rounded to whole layers. Every stage has at least one layer.
    """
    # TODO 6.4: compute where stage i begins: the work before it is i / num_stages of the whole. But leave at least
    # one layer for each stage from i on.
    raise NotImplementedError("TODO 6.4")


@dataclass(frozen=True)
class RankCoordinates:
    """The position of a rank in the grid: which stage it belongs to, out of how many."""

    rank: int
    tensor_parallel: int
    pipeline_parallel: int

    @property
    def stage(self) -> int:
        return self.rank // self.tensor_parallel

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipeline_parallel - 1

    def layers(self, config: ModelConfig) -> range:
        """Return the layers of this rank's stage. The head counts as n layers if it has the parameters of n layers."""
        attention = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
        width = config.intermediate_size
        if config.moe is not None:  # a token is multiplied by the experts that it chooses, and by no others
            width = config.moe.num_experts_per_tok * config.moe.moe_intermediate_size
        per_layer = config.hidden_size * (attention + 3 * width)
        head_cost = config.vocab_size * config.hidden_size / per_layer
        return stage_layers(config.num_hidden_layers, self.pipeline_parallel, self.stage, head_cost)


def largest_share(config: ModelConfig, tensor_parallel: int, pipeline_parallel: int) -> float:
    """Return the largest fraction of a token's keys and values that any rank stores. All ranks have the same number of
    blocks, so the memory of the rank with this fraction decides how many blocks there can be.
    """

    # TODO 6.5: find the bug. SmolLM2 runs in two stages, and each process may use 1 GiB of cache. The second stage
    # uses 0.7 GiB and the first 1.3. If both stages have the same number of layers, both use 1 GiB.
    raise NotImplementedError("TODO 6.5")  # take this line out, then find the one mistake below and mend it

    heads = config.num_attention_heads, config.num_key_value_heads
    most_heads = max(len(head_groups(*heads, rank, tensor_parallel)[1]) for rank in range(tensor_parallel))
    most_layers = config.num_hidden_layers / pipeline_parallel
    return most_heads * most_layers / (config.num_key_value_heads * config.num_hidden_layers)


def pipeline_timeline(num_stages: int, num_batches: int, num_steps: int) -> list[list[tuple[int, int] | None]]:
    """Return what each stage computes in each tick, when each of `num_batches` batches makes `num_steps` steps.

    A stage takes one tick for a step of a batch; in the next tick the next stage computes it. The batches take turns,
    in order. A batch's next step begins after its last step has left the last stage, because its tokens are not known
    before. Returns a row for each stage, with (batch, step) or None (idle) for each tick, until all steps are done.
    """
    # TODO 6.6: compute in which tick each step of each batch enters the first stage. Stage i has it i ticks later.
    raise NotImplementedError("TODO 6.6")


def bubble_fraction(timeline: Sequence[Sequence[tuple[int, int] | None]]) -> float:
    """Return the share of a timeline's cells (a stage in a tick) that are idle: the pipeline's bubble."""
    # TODO 6.7: count the cells of all stages that are None, and divide by the number of all cells.
    raise NotImplementedError("TODO 6.7")


def communication_cost(num_bytes: int, world_size: int, latency: float, bandwidth: float) -> float:
    """Return the seconds that an all-reduce of a tensor of `num_bytes` takes in a ring of `world_size` ranks.

    latency: seconds that even an empty message takes; bandwidth: bytes/s between two neighbours. In a ring all ranks
    send at the same time, each to the next one. A message is one of `world_size` parts of the tensor. In the first half
    each part is summed up on one rank; in the second half these sums reach all ranks. From Patarasuk and Yuan (2009).
    """
    # TODO 6.8: count the messages that a rank sends, one after another. Each takes the latency and the time for the
    # bytes of one part.
    raise NotImplementedError("TODO 6.8")


# --- How ranks communicate --------------------------------------------------------------------------------------------


class Group:
    """The ranks that share one stage's layers, seen from one of them. A group of one communicates with no other rank.

    rank: this process's position in the group. ranks: the numbers of its members among all processes. handle: the group
    in torch.distributed; None is all processes.
    """

    def __init__(self, rank: int = 0, ranks: Sequence[int] = (0,), handle: dist.ProcessGroup | None = None):
        self.rank, self.ranks, self.handle = rank, list(ranks), handle

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """Add up every rank's x, in place, or combine them by another op. Returns x, now the same on every rank."""
        if self.size > 1:
            whole = x.contiguous()  # of a tensor with gaps between its rows gloo adds up the wrong numbers, silently
            dist.all_reduce(whole, op, self.handle)
            if whole is not x:
                x.copy_(whole)
        return x

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Return the list of all ranks' x, which have the same shape, on the group's first rank; None on the others."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in self.ranks] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, self.ranks[0], self.handle)
        return parts

    def exchange(self, sent: Tensor, received: Tensor) -> None:
        """Send one tensor to the next rank of the ring, and receive another from the rank before this one."""
        following, previous = self.ranks[(self.rank + 1) % self.size], self.ranks[self.rank - 1]
        operations = [dist.P2POp(dist.isend, sent, following, self.handle)] if sent.numel() else []
        if received.numel():
            operations.append(dist.P2POp(dist.irecv, received, previous, self.handle))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


def ring_all_reduce(x: Tensor, group: Group) -> Tensor:
    """Add up every rank's x by messages between neighbours, without `all_reduce`. Returns a new tensor of x's shape.

    x is cut into as many parts as there are ranks. In each of the first size - 1 messages a rank receives a part and
    adds it to its own: then every rank has one complete sum. In the other messages the complete sums go to all ranks.
    """
    # TODO 6.9: cut a flat copy with `tensor_split`, then `exchange` 2 * (size - 1) times. Rank r sends part r,
    # and then each time the part that it has just received and added to. After the first half part r + 1 is complete.
    raise NotImplementedError("TODO 6.9")


# --- Layers of which every rank has a part ---------------------------------------------------------------------------


def read_shard(read: Callable[..., Tensor], shape: Sequence[int], part: Sequence[range]) -> Tensor:
    """Read a rank's part of a tensor from the checkpoint, and nothing else. Returns it in the checkpoint's dtype.

    shape: of the whole tensor. part: a range for each of its axes. Where a range goes beyond the end of its axis, the
    result is padded with zeros. `read(*ranges)` reads ranges that are within the tensor.
    """
    # TODO 6.10: clip each range to its axis and read that. If the part is larger, copy it into a tensor of zeros.
    raise NotImplementedError("TODO 6.10")


class ShardedLinear(Linear):
    """One rank's part of a linear layer: the rows, or the columns, `part` of its matrix. whole: on the meta device."""

    cut = "rows"

    def __init__(self, whole: Linear, part: range, group: Group):
        nn.Module.__init__(self)
        self.group, self.shape, self.method = group, whole.shape, whole.method
        self.rows, self.columns = (part, whole.columns) if self.cut == "rows" else (whole.rows, part)
        self.out_features, self.in_features = len(self.rows), len(self.columns)
        for name, ranges in self.method.parts(self.rows, self.columns).items():
            tensor = getattr(whole, name).new_empty([len(axis) for axis in ranges])
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        bias = whole.bias
        self.bias = None if bias is None else nn.Parameter(bias.new_empty(self.out_features), requires_grad=False)

    def load(self, read: Callable[..., Tensor]) -> None:
        shapes = self.shapes()
        super().load(lambda name, *part: read_shard(partial(read, name), shapes[name], part))


class ColumnParallelLinear(ShardedLinear):
    """Some of a linear layer's outputs: rows `part` of its matrix, and of its bias. (T, in) -> (T, len(part))."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, in), the same on every rank. Returns (T, len(part)): this rank's outputs."""
        # TODO 6.11: multiply with `self.method.apply(self, x, bias)`. Each output needs all of x, and one row.
        raise NotImplementedError("TODO 6.11")


class RowParallelLinear(ShardedLinear):
    """A linear layer for some of the inputs: columns `part` of its matrix. (T, len(part)) -> (T, out).

    Every rank has the whole bias.
    """

    cut = "columns"

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, len(part)), this rank's inputs. Returns (T, out), the same on every rank: the whole layer's output."""
        # TODO 6.12: `self.method.apply(self, x)` is this rank's contribution. Add up those of all ranks, then add
        # the bias.
        raise NotImplementedError("TODO 6.12")


class VocabParallelEmbedding(ShardedLinear):
    """Some rows of the embedding table: those of the token ids in `part`. (T,) -> (T, hidden_size)."""

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (T,), any of the whole vocabulary. Returns (T, hidden_size), the same on every rank."""
        # TODO 6.13: look up the ids in `self.rows` with `self.method.embed(self, row)`; row 0 is this rank's first.
        # All other ids give rows of zeros here. Then add up the ranks' results: each id is in the rows of one rank.
        raise NotImplementedError("TODO 6.13")


class ParallelLMHead(ShardedLinear):
    """Some rows of the output head: the scores of the token ids in `part`. (R, hidden_size) -> (R, V), on one rank.

    All ranks have the same number of rows, so that the scores can be gathered. The last rows may be padding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, hidden_size). Returns (R, V) on the group's first rank, which samples, and (0, V) on the others."""
        # TODO 6.14: compute this rank's scores with `self.method.apply`, gather them, and join them along the last
        # axis. Drop the padding: V is `self.shape[0]`.
        raise NotImplementedError("TODO 6.14")


class Absent(Layer):
    """Replaces a module that is not in this process. It knows the names and shapes of its tensors, and reads none."""

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.absent = {
            f"{path}.{name}".lstrip("."): shape
            for path, layer in layers_of(whole).items()
            for name, shape in layer.shapes().items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.absent

    def load(self, read: Callable[..., Tensor]) -> None:
        pass

    def forward(self, *inputs):
        raise RuntimeError("This layer is computed by another stage of the pipeline.")


def check_parallel(config: ModelConfig, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raise ValueError, with the sizes that would do, if a model cannot be cut this way."""

    def fits(size: int) -> bool:
        heads = (config.num_attention_heads, config.num_key_value_heads)
        width = min(config.intermediate_size, config.moe.moe_intermediate_size if config.moe else math.inf)
        return width >= size and all(head_groups(*heads, rank, size)[0] for rank in range(size))

    if not fits(tensor_parallel):
        possible = [str(size) for size in range(1, config.num_attention_heads + 1) if fits(size)]
        raise ValueError(
            f"tensor_parallel is {tensor_parallel}; with {config.num_attention_heads} attention heads in "
            f"{config.num_key_value_heads} groups every rank gets one if it is {', '.join(possible)}."
        )
    if pipeline_parallel > config.num_hidden_layers:
        raise ValueError(
            f"pipeline_parallel is {pipeline_parallel}; the model has {config.num_hidden_layers} layers, and every "
            f"stage needs one: 1 to {config.num_hidden_layers}."
        )


class PartialRowLinear(RowParallelLinear):
    """A layer cut by columns that returns this rank's contribution, not the sum. (T, len(part)) -> (T, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)


class ParallelMoeBlock(SparseMoeBlock):
    """A layer's experts, each cut over the ranks. All ranks have the whole router, and so choose the same experts.

    The contributions are added up once for the layer, not once for each expert.
    """

    def __init__(self, whole: SparseMoeBlock, part: range, group: Group):
        super().__init__(whole.gate, whole.experts, whole.top_k, whole.norm_topk_prob)
        self.group = group
        for expert in self.experts:
            expert.gate_proj = ColumnParallelLinear(expert.gate_proj, part, group)
            expert.up_proj = ColumnParallelLinear(expert.up_proj, part, group)
            expert.down_proj = PartialRowLinear(expert.down_proj, part, group)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(super().forward(x))


def sharded_modules(block: nn.Module) -> list[tuple[nn.Module, str, type, str]]:
    """List what is cut in a block, as (parent module, name in it, class that replaces it, key of `rank_parts`)."""
    attention, mlp = block.self_attn, block.mlp
    found = [
        (attention, "q_proj", ColumnParallelLinear, "queries"),
        (attention, "k_proj", ColumnParallelLinear, "keys"),
        (attention, "v_proj", ColumnParallelLinear, "keys"),
        (attention, "o_proj", RowParallelLinear, "queries"),
    ]
    if isinstance(mlp, SparseMoeBlock):
        return [*found, (block, "mlp", ParallelMoeBlock, "experts")]
    return [
        *found,
        (mlp, "gate_proj", ColumnParallelLinear, "intermediate"),
        (mlp, "up_proj", ColumnParallelLinear, "intermediate"),
        (mlp, "down_proj", RowParallelLinear, "intermediate"),
    ]


def rank_parts(config: ModelConfig, group: Group) -> dict[str, range]:
    """Return a rank's part of each of the model's widths, and the token ids of its rows of the embedding table."""
    queries, keys = head_groups(config.num_attention_heads, config.num_key_value_heads, group.rank, group.size)
    rows = cdiv(config.vocab_size, group.size)
    return {
        "queries": range(queries.start * config.head_dim, queries.stop * config.head_dim),
        "keys": range(keys.start * config.head_dim, keys.stop * config.head_dim),
        "intermediate": shard_range(config.intermediate_size, group.rank, group.size),
        "experts": shard_range(config.moe.moe_intermediate_size if config.moe else 0, group.rank, group.size),
        "vocabulary": range(group.rank * rows, (group.rank + 1) * rows),
    }


def shard(model: Llama, coordinates: RankCoordinates, group: Group) -> range:
    """Reduce a model, in place, to one rank's part of it. Returns the numbers of its layers.

    The model is on the meta device: nothing is allocated and nothing is read. Names stay those of the checkpoint.
    These become `Absent`: layers of other stages; the head, unless this stage is the last; and the embedding, unless
    this stage is the first, or the last of a tied model, whose head needs it.
    """
    check_parallel(model.config, coordinates.tensor_parallel, coordinates.pipeline_parallel)
    layers, parts = coordinates.layers(model.config), rank_parts(model.config, group)
    # TODO 6.15: replace what is absent. If the group has more than one rank, replace the embedding, the head and
    # each block's `sharded_modules` by objects of their parallel classes, made with (module, part, group). At the end
    # tie the weights again.
    raise NotImplementedError("TODO 6.15")


# --- A rank's part of a step ------------------------------------------------------------------------------------------


class StageLink:
    """The connection to the ranks in the same column of the grid, in the stage before (previous) and after (next)."""

    def __init__(self, coordinates: RankCoordinates, model: Llama):
        self.previous = None if coordinates.is_first_stage else coordinates.rank - coordinates.tensor_parallel
        self.next = None if coordinates.is_last_stage else coordinates.rank + coordinates.tensor_parallel
        self.prototype = model.model.norm.weight  # has the width, dtype and device of a hidden state
        self.sending: tuple[dist.Work, Tensor] | None = None

    def receive(self, num_tokens: int) -> Tensor:
        """Wait for the previous stage's hidden states of `num_tokens` tokens. Returns (T, hidden_size)."""
        hidden = self.prototype.new_empty(num_tokens, self.prototype.shape[-1])
        dist.recv(hidden, self.previous)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Start sending (T, hidden_size) and return at once: the next stage may still be busy with the batch before."""
        if self.sending is not None:
            self.sending[0].wait()
        self.sending = dist.isend(hidden, self.next), hidden  # the tensor must not be freed before it is sent


def run_stage(runner: ModelRunner, plan: SchedulerOutput, link: StageLink) -> ModelRunnerOutput | None:
    """Compute one stage's part of a step. Returns the step's output on the last stage, and None on the others. A plan
    that schedules no request still moves blocks, on every stage, but no hidden states are sent or received.
    """
    # TODO 6.16: receive the hidden states of `plan.num_tokens` tokens if there is a previous stage and something is
    # scheduled. `runner.execute(plan, hidden)` returns a Tensor, which must be sent to the next stage, or the output.
    raise NotImplementedError("TODO 6.16")


# --- A rank -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The first command to every rank: join the grid, load a part of the model, and build the runner.

    config: an EngineConfig. load(coordinates, group) returns the model, the numbers of its layers and the number of
    bytes read; build(model, layers) returns the runner.
    """

    config: Any
    num_threads: int
    load: Callable[[RankCoordinates, Group], tuple[Llama, range, int]]
    build: Callable[[Llama, range], ModelRunner]


class Rank:
    """One rank: its part of the model, and the runner that computes its part of each step."""

    def __init__(self, rank: int, store: dist.Store):
        self.rank, self.store = rank, store

    def run(self, command: Start | SchedulerOutput) -> tuple[int, int] | ModelRunnerOutput | None:
        """Carry out a command. Returns the message for rank 0, or None."""
        if isinstance(command, Start):
            return self.start(command)
        output = run_stage(self.runner, command, self.link)
        return output if self.is_sampling else None

    def start(self, start: Start) -> tuple[int, int]:
        """Get ready for the first step. Returns the rank, and how many bytes of the checkpoint it has read."""
        torch.set_num_threads(start.num_threads)
        grid = start.config.tensor_parallel, start.config.pipeline_parallel
        coordinates, rows = RankCoordinates(self.rank, *grid), rank_grid(*grid)
        handles = join_ranks(self.store, self.rank, rows, start.config.device, start.config.timeout)
        ranks = rows[coordinates.stage]
        self.group = Group(ranks.index(self.rank), ranks, handles[coordinates.stage])
        self.is_sampling = coordinates.is_last_stage and self.group.rank == 0
        model, layers, num_bytes_read = start.load(coordinates, self.group)
        self.runner, self.link = start.build(model, layers), StageLink(coordinates, model)
        return self.rank, num_bytes_read


def worker_loop(
    receive: Callable[[], object], run: Callable[[object], object], send: Callable[[object], None], rank: int
) -> None:
    """Carry out commands, one after the other, until `receive` returns None.

    The result of run(command) is sent to rank 0, unless it is None. If `run` raises, a `Failure` is sent and the loop
    ends, because this rank is no longer at the same point of the computation as the others.
    """
    # TODO 6.17: receive, run, send, until None is received. For an error of `run`, send `Failure(rank,
    # describe(error), is_consequence(error))` and return. Do not catch errors of `receive` and `send`.
    raise NotImplementedError("TODO 6.17")


def serve_as_worker() -> None:
    """Work as one of the ranks until rank 0 ends, then exit the process. A program that may be started with torchrun
    calls it in its first line; in rank 0, and without torchrun, it returns at once.
    """
    if not is_worker():
        return
    commands, store, rank = report_for_work()
    worker_loop(commands.receive, commands.noting_state(Rank(rank, store).run), commands.send, rank)
    commands.exit()


# --- The executor -----------------------------------------------------------------------------------------------------


class ParallelExecutor:
    """Lesson 5's executor on a grid of ranks. This process is rank 0; the others are started here or by torchrun.

    config: an EngineConfig; load, build: see `Start`. If a rank fails, or another rank waits for it for more than
    `config.timeout` seconds, all ranks are ended and a WorkerError says why. num_bytes_read: by rank.
    """

    def __init__(self, config: Any, load: Callable, build: Callable):
        self.depth, self.timeout = config.pipeline_parallel, config.timeout
        self.outputs: deque[ModelRunnerOutput] = deque()  # of steps that are computed and not yet collected
        num_threads, size = torch.get_num_threads(), config.tensor_parallel * config.pipeline_parallel
        self.workers, store, num_local = start_ranks(size, "solutions.parallelism:serve_as_worker")
        self.rank = Rank(0, store)
        start = Start(config, max(1, num_threads // num_local), load, build)
        ready = self.workers.run_everywhere(start, self.rank.run)
        self.num_bytes_read = [num_bytes for _, num_bytes in sorted(ready)]

    @guarded
    def submit(self, plan: SchedulerOutput) -> None:
        """Start a step on all ranks, and compute rank 0's part of it. The other ranks may still be busy afterwards."""
        # TODO 6.18: first `self.workers.send` the plan, then compute it here with `self.rank.run`; otherwise the
        # ranks would wait for each other. If this returns an output, append it to `self.outputs`.
        raise NotImplementedError("TODO 6.18")

    @guarded
    def collect(self) -> ModelRunnerOutput:
        """Wait for the output of the oldest step that was submitted and not yet collected."""
        # TODO 6.19: if rank 0 samples, the output is in `self.outputs` already, and nothing more arrives. Otherwise
        # `self.workers.receive(self.timeout)` returns one output at a time, in the order of the steps.
        raise NotImplementedError("TODO 6.19")

    def close(self) -> None:
        """End all workers."""
        self.workers.close()


if __name__ == "__main__":  # `torchrun -m solutions.parallelism`: the module that rank 0 and the commands refer to
    from solutions.parallelism import serve_as_worker as serve

    serve()
    sys.exit("solutions.parallelism is the program of a worker; rank 0 must run a program that makes an engine.")
