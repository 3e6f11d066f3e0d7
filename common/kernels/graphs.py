"""Decoding steps as CUDA graphs: a step's kernels are recorded once for each batch size, then launched together.

A decoding step of a small model has a hundred kernels of a few microseconds, and Python takes as long to launch one. A
graph launches all of them at once. It repeats what was recorded: the same kernels, on the same memory. So a batch is
copied into fixed buffers, and padded to the next size for which there is a graph. Prompts, and batches that are larger
than all sizes, are computed without a graph. From nano-vllm and vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from common.kernels.triton_layers import DeviceMetadata

MOST = 512
"""The largest batch with a graph. Larger ones keep a GPU busy without it."""


def sizes_up_to(most: int) -> list[int]:
    """The batch sizes for which there are graphs: 1, 2, 4, 8, 16, 32, 48, ..., and the largest."""
    most = min(most, MOST)
    return sorted({size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most} | {most})


def capture(pool: tuple[int, int], compute: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that a function launches. Returns a function that launches them. pool: all graphs' memory."""
    compute()  # kernels are compiled, and libraries allocate memory: neither can be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        compute()
    return graph.replay


class DecodingGraphs:
    """Replaces a model runner's `forward`: replays a graph if there is one for the batch.

    forward: maps a batch and hidden states to hidden states. like: a tensor with the model's dtype, device and width.
    max_blocks: of the longest block table. record: maps a function to one that repeats it; `capture` on a GPU.
    """

    @torch.inference_mode()
    def __init__(
        self, forward: Callable, like: Tensor, max_num_seqs: int, max_blocks: int,
        record: Callable[[Callable[[], None]], Callable[[], None]],
    ):  # fmt: skip
        self.forward, sizes = forward, sizes_up_to(max_num_seqs)
        zeros = partial(torch.zeros, dtype=torch.long, device=like.device)
        self.token_ids, self.positions, self.context_lens = (zeros(sizes[-1]) for _ in range(3))
        self.slot_mapping = zeros(sizes[-1]) - 1
        self.block_tables, self.tables = zeros(sizes[-1], max_blocks), [[]] * sizes[-1]  # on the GPU, and on the CPU
        self.query_start = torch.arange(sizes[-1] + 1, device=like.device)
        self.hidden = like.new_zeros(sizes[-1], like.shape[-1])
        # The largest is recorded first: its memory is enough for the others.
        self.replays = {size: record(partial(self.compute, size)) for size in reversed(sizes)}

    def compute(self, size: int) -> None:
        """Compute the first `size` requests of the buffers. A graph records this."""
        lens, slots, tables = self.context_lens[:size], self.slot_mapping[:size], self.block_tables[:size]
        metadata = DeviceMetadata(self.query_start[: size + 1], lens, slots, tables, 1)
        batch = SimpleNamespace(token_ids=self.token_ids[:size], positions=self.positions[:size], metadata=metadata)
        self.hidden[:size] = self.forward(batch, None)

    def __call__(self, batch, hidden: Tensor | None = None) -> Tensor:
        """Returns the last layer's output, (T, hidden_size). The next call overwrites it."""
        num_requests, metadata = len(batch.metadata.context_lens), batch.metadata
        size = min((size for size in self.replays if size >= num_requests), default=None)
        if hidden is not None or size is None or len(batch.token_ids) != num_requests:
            return self.forward(batch, hidden)
        self.token_ids[:num_requests] = batch.token_ids
        self.positions[:num_requests] = batch.positions
        self.slot_mapping[:num_requests] = metadata.slot_mapping
        self.slot_mapping[num_requests:size] = -1
        self.context_lens[:size] = torch.tensor(metadata.context_lens + [0] * (size - num_requests))
        for row, table in enumerate(metadata.block_tables):
            if table != self.tables[row]:  # most steps change few of them
                self.block_tables[row, : len(table)] = torch.tensor(table)
                self.tables[row] = table
        self.replays[size]()
        return self.hidden[:num_requests]
