"""The checks of lesson 4's optional part. Kernels run on memory with known values around it, so that an element
that should have been masked is seen. Attention is compared with plain loops, and at the end with the rest of lesson 4.
"""

from __future__ import annotations

import pytest
import torch
from types import SimpleNamespace

from common.grading import close, equal, exercise, holds, together
from common.kernels.triton import DEVICE, tl, triton

AROUND = 4096  # elements before and after what a kernel is given: more than any tile reaches beyond it


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def within(tensor: torch.Tensor, around: float = 100.0) -> torch.Tensor:
    """The same values, on the kernels' device, in the midst of memory that holds another one."""
    memory = torch.full((tensor.numel() + 2 * AROUND,), around).to(tensor.dtype).to(DEVICE)
    memory[AROUND:-AROUND] = tensor.to(DEVICE).flatten()
    return memory[AROUND:-AROUND].view(tensor.shape)


def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Where a kernel stores its results."""
    return within(torch.full(shape, -7.0, dtype=dtype))


def stored(out: torch.Tensor, expected: torch.Tensor, what: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """What a kernel has left in `room`: the values, and nothing around them."""
    close(out, expected, what, rtol=rtol, atol=atol)
    memory = torch.as_strided(out, (out.numel() + 2 * AROUND,), (1,), out.storage_offset() - AROUND).cpu()
    outside = torch.cat([memory[:AROUND], memory[-AROUND:]])
    changed = outside != torch.full_like(outside, 100.0)
    num_changed = int(changed.sum())
    holds(
        not num_changed,
        f"{what}: the kernel wrote {num_changed} elements outside its result. Is the mask of a store right?",
        num_changed,
    )


# --- Rows -------------------------------------------------------------------------------------------------------------


@exercise("4.18", points=0, seconds=20)
class TestSoftmaxKernel:
    def check(self, code, x, width, what, out_width=None, dtype=torch.float32):
        """Rows of x, the first columns of rows of `width`; stored in the first columns of others."""
        num_rows, columns = x.shape
        wide = torch.full((num_rows, width), 50.0)
        wide[:, :columns] = x.float()
        source, out = within(wide.to(x.dtype)), room(num_rows, out_width or columns, dtype=dtype)
        block = triton.next_power_of_2(columns)
        code.softmax_kernel[(num_rows,)](source, out, columns, width, out_width or columns, BLOCK=block)
        expected = torch.full((num_rows, out_width or columns), -7.0, dtype=dtype)
        expected[:, :columns] = x.double().softmax(-1)
        stored(out, expected, what, rtol=1e-4 if dtype == torch.float32 else 1e-3)

    def test_a_row(self, code):
        self.check(code, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 4, "softmax of [1, 2, 3, 4] in a tile of 4")

    def test_a_row_shorter_than_its_tile(self, code):
        self.check(code, torch.tensor([[1.0, 2.0, 3.0]]), 3, "softmax of [1, 2, 3] in a tile of 4")

    def test_rows_of_wider_ones(self, code):
        self.check(code, noise(3, 5), 9, "softmax of 3 rows of 5 that are parts of rows of 9")
        what = "softmax of 3 rows of 5 that are parts of rows of 7, stored in parts of rows of 6"
        self.check(code, noise(3, 5, seed=1), 7, what, out_width=6)

    def test_all_scores_negative(self, code):
        self.check(code, -50.0 - noise(2, 6).abs(), 6, "softmax of 2 rows of 6 negative scores in tiles of 8")

    def test_large_scores(self, code):
        self.check(code, torch.tensor([[1000.0, 0.0, 999.0]]), 3, "softmax([1000, 0, 999])")

    def test_16_bits(self, code):
        self.check(code, 4 * noise(2, 100).half(), 100, "softmax of 2 rows of 100 in float16, stored in float32")


@exercise("4.19", points=0, seconds=20)
class TestAddRmsNormKernel:
    def check(self, code, num_rows, columns, what, eps=1e-5, scale=1.0, dtype=torch.float32):
        x, residual = (scale * noise(num_rows, columns, seed=seed).to(dtype) for seed in (1, 2))
        weight = 1 + noise(columns, seed=3)
        out, summed = room(num_rows, columns), within(residual.float())
        block = triton.next_power_of_2(columns)
        code.add_rms_norm_kernel[(num_rows,)](within(x), summed, within(weight), out, columns, eps, BLOCK=block)
        hidden = x.double() + residual.double()
        expected = hidden / (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
        stored(summed, hidden.float(), f"the residual after {what}")
        stored(out, expected.float(), f"the norm of {what}")

    def test_a_row(self, code):
        self.check(code, 1, 8, "a row of 8 in a tile of 8")

    def test_a_row_shorter_than_its_tile(self, code):
        self.check(code, 1, 5, "a row of 5 in a tile of 8")

    def test_several_rows(self, code):
        self.check(code, 3, 6, "3 rows of 6 in tiles of 8")

    def test_small_values(self, code):
        self.check(code, 2, 6, "2 rows of 6 small values, eps 0.1", eps=0.1, scale=0.2)

    def test_16_bits(self, code):
        self.check(code, 2, 80, "2 rows of 80 in float16, summed in float32", dtype=torch.float16, scale=100.0)


# --- Parts that all share ---------------------------------------------------------------------------------------------


@triton.jit
def call_find_slots(table, out, num_seen, FIND: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    positions = tl.arange(0, TILE)
    tl.store(out + positions, FIND(table, positions, positions < num_seen, BLOCK_SIZE))


@exercise("4.20", points=0, seconds=20)
class TestFindSlots:
    @pytest.mark.parametrize(
        ("table", "num_seen", "block_size"),
        [([3, 1, 5, 2], 16, 4), ([3, 1, 5], 10, 4), ([6, 2, 4], 16, 7), ([9, 3, 7], 3, 1), ([5], 11, 16)],
    )
    def test_slots(self, code, table, num_seen, block_size):
        out = within(torch.full((16,), -1))
        ids = within(torch.tensor(table), around=1000)
        call_find_slots[(1,)](ids, out, num_seen, FIND=code.find_slots, BLOCK_SIZE=block_size, TILE=16)
        expected = [(table[p // block_size] if p < num_seen else 0) * block_size + p % block_size for p in range(16)]
        what = f"the slots of positions 0 to 15, of which {num_seen} are seen, table {table}, blocks of {block_size}"
        equal(out.tolist(), expected, what)


@triton.jit
def call_online_softmax(
    maximum, total, weighted, scores, values, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    rows = tl.arange(0, M)
    tile = rows[:, None] * D + tl.arange(0, D)[None, :]
    scores_tile = tl.load(scores + rows[:, None] * N + tl.arange(0, N)[None, :])
    values_tile = tl.load(values + tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :])
    new_maximum, new_total, new_weighted = STEP(
        tl.load(maximum + rows), tl.load(total + rows), tl.load(weighted + tile), scores_tile, values_tile
    )
    tl.store(maximum + rows, new_maximum)
    tl.store(total + rows, new_total)
    tl.store(weighted + tile, new_weighted)


@exercise("4.21", points=0, seconds=20)
class TestOnlineSoftmax:
    def check(self, code, old, scores, what):
        """old: the scores of the keys before, (16, *), None if there are none; scores: those of this tile, (16, 16)."""
        before = torch.full((16, 1), -torch.inf) if old is None else old
        values = noise(before.shape[1] + 16, 16, seed=5)
        state = [each.to(DEVICE) for each in self.part(before, values[:-16])]
        given = scores.to(DEVICE), values[-16:].contiguous().to(DEVICE)
        call_online_softmax[(1,)](*state, *given, STEP=code.online_softmax, M=16, N=16, D=16)
        expected = self.part(torch.cat([before, scores], dim=1), values)
        for got, want, name in zip(state, expected, ("maximum", "total", "weighted sum")):
            close(got, want, f"the {name} after {what}", rtol=1e-4, atol=1e-5)

    def part(self, scores, values):
        """Lesson 4's Partial."""
        maximum = scores.amax(1)
        weights = (scores - maximum.clamp(min=-1e30)[:, None]).exp()
        return maximum, weights.sum(1), weights @ values

    def test_the_first_tile(self, code):
        self.check(code, None, noise(16, 16, seed=1), "the first tile")

    def test_a_higher_maximum(self, code):
        self.check(code, noise(16, 7, seed=1), noise(16, 16, seed=2) + 3, "a tile with a higher maximum")

    def test_a_lower_maximum(self, code):
        self.check(code, noise(16, 7, seed=1) + 3, noise(16, 16, seed=2), "a tile with a lower maximum")

    def test_large_scores(self, code):
        self.check(code, noise(16, 7, seed=1) + 90, noise(16, 16, seed=2) + 200, "a tile with scores of about 200")

    def test_masked_scores(self, code):
        scores = noise(16, 16, seed=2)
        scores[torch.ones(16, 16).triu(1).bool()] = -torch.inf
        self.check(code, noise(16, 7, seed=1), scores, "a tile of which query m sees the keys 0 to m")

    def test_nothing_seen(self, code):
        scores = noise(16, 16, seed=2)
        scores[3:] = -torch.inf
        self.check(code, None, scores, "a first tile of which only three queries see a key")


# --- Attention --------------------------------------------------------------------------------------------------------

UNUSED = 40.0  # what slots hold that no position of the sequence has


class Pool:
    """Random keys and values of some sequences, in blocks that lie anywhere.

    has_nan: what belongs to no sequence is NaN: block 0, other slots, and numbers between one slot and the next.
    """

    def __init__(self, context_lens, num_kv_heads, head_dim, block_size, has_nan=False, dtype=torch.float32):
        tables = [-(-context // block_size) for context in context_lens]
        order = torch.randperm(sum(tables) + 2, generator=torch.Generator().manual_seed(7)).tolist()
        if has_nan:
            order.remove(0)
        self.tables = torch.full((len(tables), max(tables)), order.pop())  # where a table ends: a block of no sequence
        width = num_kv_heads * head_dim
        shape = (sum(tables) + 2, block_size, width + 3 * has_nan)
        memory = [
            torch.full(shape, torch.nan if has_nan else each, dtype=dtype) for each in (UNUSED / head_dim, UNUSED)
        ]
        memory = [within(each, torch.nan if has_nan else 100.0) for each in memory]
        self.keys, self.values = (each[..., :width].unflatten(2, (num_kv_heads, head_dim)) for each in memory)
        self.keys_of, self.values_of = [], []
        for b, (context, num_blocks) in enumerate(zip(context_lens, tables)):
            self.tables[b, :num_blocks] = torch.tensor([order.pop() for _ in range(num_blocks)])
            k, v = (noise(context, num_kv_heads, head_dim, seed=10 * b + i).to(dtype) for i in (1, 2))
            for p in range(context):
                self.keys[self.tables[b, p // block_size], p % block_size] = k[p].to(DEVICE)
                self.values[self.tables[b, p // block_size], p % block_size] = v[p].to(DEVICE)
            self.keys_of.append(k)
            self.values_of.append(v)
        self.block_tables = within(self.tables, around=0)
        self.context_lens = torch.tensor(context_lens, device=DEVICE)

    def part(self, q, request, first, last):
        """The Partial of one query, (H, D), and the positions first to last of a request, for each head."""
        group = len(q) // self.keys_of[request].shape[1]
        k, v = (x[request][first:last].repeat_interleave(group, 1).double() for x in (self.keys_of, self.values_of))
        scores = torch.einsum("hd,shd->hs", q.double(), k) * q.shape[1] ** -0.5
        maximum = scores.amax(1) if last > first else torch.full((len(q),), -torch.inf, dtype=torch.float64)
        weights = (scores - maximum[:, None]).exp()
        return maximum, weights.sum(1), torch.einsum("hs,shd->hd", weights, v)

    def attention(self, q, request, position):
        _, total, weighted = self.part(q, request, 0, position + 1)
        return (weighted / total[:, None]).float()


@exercise("4.22", points=0, seconds=30)
class TestDecodeKernel:
    def check(
        self, code, context_lens, heads, head_dim, block_size, what, num_splits=1, split_len=64, tile=16, extra=0,
        **memory,
    ):  # fmt: skip
        num_heads, num_kv_heads = heads
        pool, num_requests = Pool(context_lens, num_kv_heads, head_dim, block_size, **memory), len(context_lens)
        wide = noise(num_requests, num_heads * head_dim + extra, seed=3)  # extra: what follows a request's queries
        wide = wide.to(pool.keys.dtype)
        q = wide[:, : num_heads * head_dim].reshape(num_requests, num_heads, head_dim)
        maxima, totals = (room(num_requests, num_heads, num_splits) for _ in range(2))
        weighted = room(num_requests, num_heads, num_splits, head_dim)
        group = num_heads // num_kv_heads
        code.decode_kernel[(num_requests, num_kv_heads, num_splits)](
            within(wide), pool.keys, pool.values, pool.block_tables, pool.context_lens, maxima, totals, weighted,
            head_dim**-0.5, wide.stride(0), pool.keys.stride(1), pool.block_tables.stride(0), split_len,
            GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE=tile, ROWS=code.padded(group),
            DIMS=code.padded(head_dim),
        )  # fmt: skip
        parts = [
            [pool.part(q[b], b, min(s * split_len, n), min((s + 1) * split_len, n)) for s in range(num_splits)]
            for b, n in enumerate(context_lens)
        ]
        expected = [torch.stack([torch.stack([p[i] for p in row], 1) for row in parts]).float() for i in range(3)]
        for got, want, name in zip((maxima, totals, weighted), expected, ("maxima", "totals", "weighted sums")):
            stored(got, want, f"the {name} of {what}")

    def test_one_token(self, code):
        self.check(code, [1], (2, 2), 16, 4, "a context of 1, heads of 16")

    def test_several_tiles(self, code):
        self.check(code, [37], (2, 2), 16, 16, "a context of 37 in blocks of 16")

    def test_several_requests(self, code):
        self.check(code, [3, 21, 16], (2, 2), 16, 7, "contexts of 3, 21 and 16 in blocks of 7")

    def test_groups(self, code):
        self.check(code, [9, 5], (6, 2), 64, 4, "6 query heads over 2, heads of 64, contexts of 9 and 5", extra=5)

    def test_one_kv_head(self, code):
        self.check(code, [5, 18], (3, 1), 80, 1, "3 query heads over 1, heads of 80, blocks of 1")

    def test_splits(self, code):
        what = "contexts of 40 and 7 in splits of 20, where the second split of one request is empty"
        self.check(code, [40, 7], (4, 2), 10, 7, what, num_splits=2, split_len=20)

    def test_larger_tiles(self, code):
        self.check(code, [40], (2, 1), 16, 4, "a context of 40 in tiles of 32", tile=32)

    def test_nan_elsewhere(self, code):
        what = "contexts of 19 and 2, heads of 10, where memory of no sequence is NaN"
        self.check(code, [19, 2], (2, 1), 10, 7, what, has_nan=True)

    def test_bfloat16(self, code):
        self.check(code, [9], (2, 1), 16, 4, "a context of 9 in bfloat16", dtype=torch.bfloat16)


@exercise("4.23", points=0, seconds=20)
class TestMergeKernel:
    def check(self, code, maxima, head_dim, what, around=100.0):
        """maxima: (rows, splits)."""
        num_rows, num_splits = maxima.shape
        totals = torch.where(maxima == -torch.inf, 0.0, 1 + noise(num_rows, num_splits, seed=1).abs())
        weighted = totals[..., None] * noise(num_rows, num_splits, head_dim, seed=2)
        out = room(num_rows, head_dim)
        code.merge_kernel[(num_rows,)](
            within(maxima), within(totals), within(weighted, around), out, num_splits,
            HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(num_splits), DIMS=code.padded(head_dim),
        )  # fmt: skip
        rescale = (maxima.double() - maxima.double().amax(1, keepdim=True)).exp()
        expected = (weighted * rescale[..., None]).sum(1) / (totals * rescale).sum(1, keepdim=True)
        stored(out, expected.float(), what)

    def test_one_split(self, code):
        self.check(code, noise(2, 1), 16, "the merge of 1 split in 2 rows")

    def test_two_splits(self, code):
        self.check(code, torch.tensor([[3.0, 5.0]]), 16, "the merge of maxima 3 and 5")

    def test_fewer_splits_than_the_tile_has(self, code):
        self.check(code, 3 * noise(3, 3), 16, "the merge of 3 splits in tiles of 4, in 3 rows")

    def test_negative_maxima(self, code):
        self.check(code, -200 + noise(2, 3), 10, "the merge of 3 splits whose maxima are about -200, heads of 10")

    def test_large_maxima(self, code):
        self.check(code, 200 + noise(2, 2), 80, "the merge of 2 splits whose maxima are about 200, heads of 80")

    def test_nan_after_the_splits(self, code):
        self.check(code, noise(1, 3), 16, "the merge of 3 splits in a tile of 4, with NaN after them", around=torch.nan)

    def test_an_empty_split(self, code):
        self.check(code, torch.tensor([[1.0, -torch.inf], [0.5, 2.0]]), 64, "the merge of splits of which one is empty")


@exercise("4.24", points=0, seconds=30)
class TestPagedDecodeAttention:
    def check(self, code, context_lens, heads, head_dim, block_size, num_splits, what, extra=0):
        num_heads, num_kv_heads = heads
        pool = Pool(context_lens, num_kv_heads, head_dim, block_size)
        wide = noise(len(context_lens), num_heads + extra, head_dim, seed=3)
        q = wide[:, :num_heads]
        got = code.paged_decode_attention(
            wide.to(DEVICE)[:, :num_heads], pool.keys, pool.values, pool.block_tables, pool.context_lens,
            max(context_lens), num_splits,
        )  # fmt: skip
        expected = torch.stack([pool.attention(q[b], b, n - 1) for b, n in enumerate(context_lens)])
        close(got, expected, what, rtol=1e-4, atol=1e-5)

    def test_one_split(self, code):
        self.check(code, [19], (2, 2), 16, 16, 1, "a context of 19, one split")

    def test_several_splits(self, code):
        self.check(code, [50, 1], (4, 2), 16, 16, 3, "contexts of 50 and 1, three splits")

    def test_groups(self, code):
        self.check(code, [11, 30], (6, 2), 20, 7, 2, "6 query heads over 2, heads of 20, two splits", extra=4)

    def test_more_splits_than_tokens(self, code):
        self.check(code, [3], (3, 1), 64, 1, 4, "a context of 3, four splits, one key/value head")

    def test_16_bits(self, code):
        pool, q = Pool([19], 2, 16, 16), noise(1, 2, 16, seed=3).half()
        keys, values = pool.keys.half(), pool.values.half()
        got = code.paged_decode_attention(q.to(DEVICE), keys, values, pool.block_tables, pool.context_lens, 19, 2)
        close(got, pool.attention(q[0], 0, 18)[None].half(), "a context of 19 in float16", rtol=1e-2, atol=5e-3)


@exercise("4.25", points=0, seconds=40)
class TestPrefillKernel:
    def check(self, code, requests, heads, head_dim, block_size, what, extra=0, tile=16, **memory):
        """requests: (context, new tokens) of each."""
        num_heads, num_kv_heads = heads
        pool = Pool([context for context, _ in requests], num_kv_heads, head_dim, block_size, **memory)
        start = [0]
        for _, num_new in requests:
            start.append(start[-1] + num_new)
        wide = noise(start[-1], num_heads * head_dim + extra, seed=3).to(pool.keys.dtype)
        q = wide[:, : num_heads * head_dim].reshape(-1, num_heads, head_dim)
        out = room(start[-1], num_heads, head_dim)
        longest = max(num_new for _, num_new in requests)
        code.prefill_kernel[(triton.cdiv(longest, tile), num_heads, len(requests))](
            within(wide), pool.keys, pool.values, pool.block_tables, torch.tensor(start, device=DEVICE),
            pool.context_lens, out, head_dim**-0.5, wide.stride(0), out.stride(0), pool.keys.stride(1),
            pool.block_tables.stride(0), GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
            TILE=tile, DIMS=code.padded(head_dim),
        )  # fmt: skip
        expected = torch.stack(
            [
                pool.attention(q[start[b] + i], b, context - num_new + i)
                for b, (context, num_new) in enumerate(requests)
                for i in range(num_new)
            ]
        )
        stored(out, expected, what)

    def test_a_prompt(self, code):
        self.check(code, [(5, 5)], (1, 1), 16, 4, "a prompt of 5 tokens")

    def test_a_prompt_of_several_tiles(self, code):
        self.check(code, [(37, 37)], (2, 1), 16, 16, "a prompt of 37 tokens, 2 query heads over 1")

    def test_a_chunk(self, code):
        self.check(code, [(30, 4)], (2, 2), 10, 7, "the last 4 of 30 tokens, in blocks of 7", extra=3)

    def test_a_mixed_batch(self, code):
        requests = [(2, 2), (18, 1), (21, 17)]
        self.check(code, requests, (4, 2), 16, 4, "requests with 2, 1 and 17 new tokens of 2, 18 and 21")

    def test_odd_heads(self, code):
        self.check(code, [(6, 3)], (3, 1), 80, 1, "3 query heads over 1, heads of 80, blocks of 1")

    def test_nan_elsewhere(self, code):
        what = "the last 3 of 19 tokens, heads of 10, where memory of no sequence is NaN"
        self.check(code, [(19, 3)], (2, 1), 10, 7, what, has_nan=True)

    def test_bfloat16(self, code):
        self.check(code, [(9, 3)], (2, 1), 16, 4, "the last 3 of 9 tokens in bfloat16", dtype=torch.bfloat16)


@together(seconds=60)
class TestTogether:
    """Your whole file, beside the rest of lesson 4."""

    def test_rows(self, code):
        x, residual, weight = noise(3, 40).to(DEVICE), noise(3, 40, seed=1).to(DEVICE), noise(40, seed=2).to(DEVICE)
        close(code.add(x, residual), x + residual, "add(x, y)")
        close(code.softmax(x[:, 3:]), x[:, 3:].softmax(-1), "softmax(x[:, 3:])")
        both = x + residual
        expected = both / (both.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        close(code.add_rms_norm(x, residual, weight, 1e-5), expected, "add_rms_norm(x, residual, ...)", rtol=1e-4)
        close(residual, both, "the residual after add_rms_norm", rtol=1e-4)

    @pytest.mark.parametrize(("heads", "head_dim", "block_size", "length"), [((4, 2), 16, 16, 5), ((2, 1), 64, 7, 18)])
    def test_paged_attention(self, code, heads, head_dim, block_size, length):
        from solutions import paged_attention

        num_heads, num_kv_heads = heads
        attention = SimpleNamespace(k_proj=SimpleNamespace(out_features=num_kv_heads * head_dim), head_dim=head_dim)
        inner = SimpleNamespace(
            layers=[SimpleNamespace(self_attn=attention)], norm=SimpleNamespace(weight=torch.ones(1, device=DEVICE))
        )
        model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1), model=inner)
        cache = paged_attention.PagedKVCache(model, 12, block_size)
        cache.keys.copy_(noise(*cache.keys.shape, seed=1))
        cache.values.copy_(noise(*cache.values.shape, seed=2))
        contexts, new, tables = [length + 2, 9], [length, 1], [[5, 2, 9], [7, 1, 1]]
        start = [0, length, length + 1]
        slots = [
            slot
            for table, context, num_new in zip(tables, contexts, new)
            for slot in paged_attention.slot_mapping(table, context - num_new, num_new, block_size)
        ]
        metadata = paged_attention.AttentionMetadata(start, contexts, torch.tensor(slots, device=DEVICE), tables)
        q, k, v = (noise(length + 1, n, head_dim, seed=n).to(DEVICE) for n in (num_heads, num_kv_heads, num_kv_heads))
        expected = cache.attend(metadata)(0, q, k, v)
        pool = cache.keys[0], cache.values[0], torch.tensor(tables, device=DEVICE)
        lens = torch.tensor(contexts, device=DEVICE)
        got = code.paged_prefill_attention(q, *pool, torch.tensor(start, device=DEVICE), lens, length)
        close(got, expected, "paged_prefill_attention, compared with PagedKVCache.attend,", rtol=1e-4, atol=1e-5)
        last = [length - 1, length]
        got = code.paged_decode_attention(q[last], *pool, lens, max(contexts), 2)
        close(got, expected[last], "paged_decode_attention, compared with PagedKVCache.attend,", rtol=1e-4, atol=1e-5)
