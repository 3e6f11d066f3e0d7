"""The checks of lesson 1's exercises. Run them with `make test-lesson-1`, or one exercise with `make test-1.4`.

Each exercise begins with numbers that you can work out by hand, and every axis has another size, so that a mixed-up
axis shows. What larger checks compare with is written here a second time, in another way than the solution (complex
numbers for rotary, torch's own attention), or was computed by transformers: see snapshots/make_snapshots.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from common.checkpoints import Checkpoint, cached
from common.grading import elsewhere, close, equal, exercise, holds, together

SNAPSHOTS = Path(__file__).parent / "snapshots"


# --- Text becomes numbers ---------------------------------------------------------------------------------------------


@exercise("1.1")
class TestMergePair:
    def test_by_hand(self, code):
        equal(code.merge_pair([1, 2, 3, 1, 2], (1, 2), 9), [9, 3, 9], "merge_pair([1, 2, 3, 1, 2], (1, 2), 9)")

    def test_occurrences_share_nothing(self, code):
        equal(code.merge_pair([7, 7, 7], (7, 7), 9), [9, 7], "merge_pair([7, 7, 7], (7, 7), 9)")
        equal(code.merge_pair([7, 7, 7, 7, 5], (7, 7), 9), [9, 9, 5], "merge_pair([7, 7, 7, 7, 5], (7, 7), 9)")

    def test_order_counts(self, code):
        equal(code.merge_pair([2, 1, 1, 2], (1, 2), 9), [2, 1, 9], "merge_pair([2, 1, 1, 2], (1, 2), 9)")

    def test_the_ends(self, code):
        equal(code.merge_pair([4, 1, 2, 5], (1, 2), 9), [4, 9, 5], "merge_pair([4, 1, 2, 5], (1, 2), 9)")
        equal(code.merge_pair([1], (1, 2), 9), [1], "merge_pair([1], (1, 2), 9)")
        equal(code.merge_pair([], (1, 2), 9), [], "merge_pair([], (1, 2), 9)")

    def test_one_merge_at_a_time(self, code):
        # 9 is new to the list, so that what comes out of a merge cannot begin or end another of the same pair.
        ids = code.merge_pair([1, 2, 1, 2, 3], (1, 2), 9)
        equal(ids, [9, 9, 3], "merge_pair([1, 2, 1, 2, 3], (1, 2), 9)")
        equal(code.merge_pair(ids, (9, 9), 10), [10, 3], "merge_pair([9, 9, 3], (9, 9), 10)")

    def test_a_new_list(self, code):
        ids = [1, 2, 3]
        code.merge_pair(ids, (1, 2), 9)
        holds(ids == [1, 2, 3], f"merge_pair changed the list it was given: [1, 2, 3] became {ids}.", ids)


@exercise("1.2")
class TestEmbed:
    table = [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0], [30.0, 31.0]]

    def test_by_hand(self, code):
        actual = code.embed(torch.tensor([2, 0, 2]), torch.tensor(self.table))
        expected = torch.tensor([[20.0, 21.0], [0.0, 1.0], [20.0, 21.0]])
        close(actual, expected, "embed([2, 0, 2], a table whose row i is [10i, 10i + 1])")

    def test_dtype_of_the_table(self, code):
        table = torch.tensor(self.table, dtype=torch.bfloat16)
        close(code.embed(torch.tensor([3]), table), table[3:], "embed([3], a bfloat16 table)")


# --- Numbers are kept in range ----------------------------------------------------------------------------------------


@exercise("1.3")
class TestSoftmax:
    def test_by_hand(self, code):
        scores = torch.tensor([1.0, 2.0, 5.0]).log()
        close(code.softmax(scores), torch.tensor([0.125, 0.25, 0.625]), "softmax([log 1, log 2, log 5])")
        expected = torch.tensor([0.25, 0.75], dtype=torch.float64)
        close(code.softmax((3 * expected).log()), expected, "softmax([log 0.75, log 2.25] in float64)", rtol=1e-12)

    def test_each_row_by_itself(self, code):
        scores = torch.tensor([[1.0, 1.0, 2.0], [8.0, 4.0, 4.0]]).log()
        expected = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])
        close(code.softmax(scores), expected, "softmax(log [[1, 1, 2], [8, 4, 4]])")

    def test_any_number_of_axes(self, code):
        scores = torch.randn(2, 3, 4)
        close(code.softmax(scores).sum(-1), torch.ones(2, 3), "the sum over the last axis of softmax(scores (2, 3, 4))")

    def test_large_scores(self, code):
        # exp(88.5) is 2.7e38, and float32 ends at 3.4e38: the sum of two overflows. exp(-101) has one bit of precision.
        for row in ([88.5, 88.5], [-50.0, -51.0]):
            close(code.softmax(torch.tensor(row)), torch.tensor(row).softmax(-1), f"softmax({row})", rtol=1e-4)
        rows = [[0.0, 1.0], [102.5, 102.5]]
        close(code.softmax(torch.tensor(rows)), torch.tensor(rows).softmax(-1), f"softmax({rows})", rtol=1e-4)
        # exp(200) is 7e86.
        expected = torch.softmax(torch.tensor([1.0, 0.0]), -1)
        close(code.softmax(torch.tensor([200.0, 199.0])), expected, "softmax([200, 199])", rtol=1e-4)
        close(code.softmax(torch.tensor([-200.0, -201.0])), expected, "softmax([-200, -201])", rtol=1e-4)

    def test_rows_far_apart(self, code):
        scores = torch.tensor([[0.0, 0.0], [200.0, 200.0]])
        close(code.softmax(scores), torch.full((2, 2), 0.5), "softmax([[0, 0], [200, 200]])", rtol=1e-4)

    def test_minus_infinity(self, code):
        scores = torch.tensor([0.0, -math.inf, 0.0])
        close(code.softmax(scores), torch.tensor([0.5, 0.0, 0.5]), "softmax([0, -inf, 0])")

    def test_input_is_left_alone(self, code):
        scores = torch.tensor([3.0, 5.0])
        code.softmax(scores)
        holds(
            scores.tolist() == [3.0, 5.0],
            f"softmax changed the scores it was given: [3, 5] became {[round(each, 3) for each in scores.tolist()]}.",
            scores,
        )


@exercise("1.4")
class TestRMSNorm:
    def test_by_hand(self, code):
        # The squares are 9 and 16, their mean 12.5.
        actual = code.rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
        close(actual, torch.tensor([0.848528, 1.131371]), "rms_norm([3, 4], weight=1, eps=0)")

    def test_weight(self, code):
        actual = code.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.5]), eps=0.0)
        close(actual, torch.tensor([1.697056, 0.565685]), "rms_norm([3, 4], weight=[2, 0.5], eps=0)")

    def test_eps(self, code):
        # Mean square 12.5e-6 plus eps 7.5e-6 is 20e-6.
        actual = code.rms_norm(torch.tensor([0.003, 0.004]), torch.ones(2), eps=7.5e-6)
        close(actual, torch.tensor([0.670820, 0.894427]), "rms_norm([0.003, 0.004], weight=1, eps=7.5e-6)")

    def test_zeros(self, code):
        close(code.rms_norm(torch.zeros(3), torch.ones(3), eps=1e-5), torch.zeros(3), "rms_norm([0, 0, 0], weight=1)")

    def test_each_vector_by_itself(self, code):
        x, weight = torch.randn(2, 3, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None], torch.randn(4)
        expected = torch.stack([v / (v.dot(v) / 4 + 1e-5).sqrt() * weight for v in x.view(6, 4)]).view(2, 3, 4)
        close(code.rms_norm(x, weight, 1e-5), expected, "rms_norm(x (2, 3, 4), weight (4,))")

    def test_float16(self, code):
        # 300 squared is 90000, and float16 ends at 65504.
        x = torch.tensor([300.0, 400.0], dtype=torch.float16)
        actual = code.rms_norm(x, torch.ones(2, dtype=torch.float16), eps=1e-5)
        expected = torch.tensor([0.848528, 1.131371], dtype=torch.float16)
        close(actual, expected, "rms_norm([300, 400] in float16, weight=1)", rtol=2e-3)

    def test_float64(self, code):
        x, weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        expected = x / math.sqrt(14 / 3)
        close(code.rms_norm(x, weight, 0.0), expected, "rms_norm([1, 2, 3] in float64, weight=1)", rtol=1e-12, atol=0)


# --- Where a token stands ---------------------------------------------------------------------------------------------


def tables(code, positions: list[int], frequencies: list[float]) -> Tensor:
    """Both tables, one above the other, (2, T, D / 2): so one look compares cosines and sines."""
    cos, sin = code.rotary_tables(torch.tensor(positions), torch.tensor(frequencies))
    return torch.stack((cos, sin))


@exercise("1.5")
class TestRotaryTables:
    def test_by_hand(self, code):
        # The first pair makes a quarter turn a token; the second a half.
        actual = tables(code, [0, 1, 2], [math.pi / 2, math.pi])
        expected = torch.tensor([[[1.0, 1.0], [0.0, -1.0], [-1.0, 1.0]], [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
        close(actual, expected, "(cos, sin) of rotary_tables([0, 1, 2], [pi / 2, pi])")

    def test_any_positions(self, code):
        actual = tables(code, [7, 3], [1.0, 0.5, 0.25])
        angles = [[7.0, 3.5, 1.75], [3.0, 1.5, 0.75]]
        expected = torch.tensor([[[f(a) for a in row] for row in angles] for f in (math.cos, math.sin)])
        close(actual, expected, "(cos, sin) of rotary_tables([7, 3], [1, 0.5, 0.25])")

    def test_far_out(self, code):
        # bfloat16 has 8 bits of precision: it takes 1000 and 1001 for the same number.
        actual = tables(code, [1000, 1001], [1.0])
        expected = torch.tensor([[[math.cos(1000)], [math.cos(1001)]], [[math.sin(1000)], [math.sin(1001)]]])
        close(actual, expected, "(cos, sin) of rotary_tables([1000, 1001], [1])", atol=1e-4)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary by complex numbers: multiplying by e^(i angle) turns a point. In float64; x: (T, heads, D)."""
    half = x.shape[-1] // 2
    points = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = points * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), -1)


@exercise("1.6", points=2)
class TestApplyRotary:
    def test_a_quarter_turn(self, code):
        # cos 0 and sin 1: the pairs are (1, 3) and (2, 4), and (a, b) becomes (-b, a).
        x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        actual = code.apply_rotary(x, torch.zeros(1, 2), torch.ones(1, 2))
        close(actual, torch.tensor([[[-3.0, -4.0, 1.0, 2.0]]]), "apply_rotary([1, 2, 3, 4], cos=0, sin=1)")

    def test_every_pair_by_its_angle(self, code):
        x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        angles = torch.tensor([[math.pi / 2, math.pi / 3]])
        expected = torch.tensor([[[-3.0, 2 * 0.5 - 4 * 0.866025, 1.0, 4 * 0.5 + 2 * 0.866025]]])
        actual = code.apply_rotary(x, angles.cos(), angles.sin())
        close(actual, expected, "apply_rotary([1, 2, 3, 4], angles of 90 and 60 degrees)")

    def test_no_turn(self, code):
        x = torch.randn(1, 2, 6)
        close(code.apply_rotary(x, torch.ones(1, 3), torch.zeros(1, 3)), x, "apply_rotary(x, cos=1, sin=0)")

    def test_one_angle_for_all_heads_of_a_token(self, code):
        # As many tokens as heads: here an angle given to heads, not to tokens, passes for the right shape.
        x, angles = torch.randn(3, 3, 4), torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]])
        actual = code.apply_rotary(x, angles.cos(), angles.sin())
        expected = rotated(x, angles.cos(), angles.sin()).float()
        close(actual, expected, "apply_rotary(x (3 tokens, 3 heads, 4))")

    def test_shapes(self, code):
        x, angles = torch.randn(5, 2, 6), torch.arange(15.0).view(5, 3)
        actual = code.apply_rotary(x, angles.cos(), angles.sin())
        expected = rotated(x, angles.cos(), angles.sin()).float()
        close(actual, expected, "apply_rotary(x (5 tokens, 2 heads, 6))")

    def test_dtype_of_x(self, code):
        x, angles = torch.randn(2, 1, 4).bfloat16(), torch.randn(2, 2)
        actual = code.apply_rotary(x, angles.cos(), angles.sin())
        expected = rotated(x, angles.cos(), angles.sin()).bfloat16()
        close(actual, expected, "apply_rotary(x in bfloat16)", rtol=2e-2, atol=2e-2)


# --- Attention --------------------------------------------------------------------------------------------------------


def booleans(*rows: str) -> Tensor:
    """A mask, drawn: `x` where a query may look."""
    return torch.tensor([[cell == "x" for cell in row] for row in rows])


@exercise("1.7")
class TestCausalMask:
    def test_as_many_queries_as_keys(self, code):
        close(code.causal_mask(3, 3), booleans("x..", "xx.", "xxx"), "causal_mask(3, 3)")

    def test_fewer_queries_than_keys(self, code):
        close(code.causal_mask(2, 5), booleans("xxxx.", "xxxxx"), "causal_mask(2, 5)")

    def test_the_last_token_sees_all(self, code):
        close(code.causal_mask(1, 4), booleans("xxxx"), "causal_mask(1, 4)")

    def test_chunks_are_rows_of_the_whole(self, code):
        whole = torch.tensor([[key <= query for key in range(7)] for query in range(7)])
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            actual = code.causal_mask(stop - start, stop)
            expected = whole[start:stop, :stop]
            close(actual, expected, f"causal_mask({stop - start}, {stop}), the mask of tokens {start} to {stop - 1}")

    def test_on_the_device_that_is_asked_for(self, code):
        elsewhere(lambda: code.causal_mask(2, 5, torch.device("meta")), "causal_mask(2, 5, device)", "`device`")


@exercise("1.8", points=2)
class TestAttention:
    def test_by_hand(self, code):
        # The first dot product is 2 log 3 and D is 4, so the scores are log 3 and 0, the weights 3/4 and 1/4.
        q = torch.tensor([[2 * math.log(3), 0.0, 0.0, 0.0]])
        k = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
        v = torch.tensor([[4.0, 0.0, 0.0, 1.0], [0.0, 8.0, 0.0, 1.0], [0.0, 0.0, 100.0, 100.0]])
        actual = code.attention(q, k, v, booleans("xx."))
        expected = torch.tensor([[3.0, 2.0, 0.0, 1.0]])
        close(actual, expected, "attention(q = [2 log 3, 0, 0, 0], two visible keys of three)")

    def test_a_visible_score_far_below_a_hidden_one(self, code):
        q, k = torch.tensor([[200.0, 0.0, 0.0, 0.0]]), torch.tensor([[-200.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        v = torch.tensor([[4.0, 0.0, 0.0, 1.0], [0.0, 8.0, 0.0, 1.0]])
        close(
            code.attention(q, k, v, booleans("x.")), v[:1], "attention(a visible key with score -20,000, a hidden one)"
        )

    def test_shapes(self, code):
        q, k, v = torch.randn(2, 4), torch.randn(5, 4), torch.randn(5, 4)
        mask = booleans("xx.x.", ".xxxx")
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
        close(code.attention(q, k, v, mask), expected, "attention(q (2, 4), k (5, 4), v (5, 4), mask)")

    def test_leading_axes(self, code):
        q, k, v = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
        mask = booleans("xx...", "xxx..", "xxxx.", "xxxxx")
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        close(code.attention(q, k, v, mask), expected, "attention(q (2, 3, 4, 6), k and v (2, 3, 5, 6), mask)")

    def test_float16(self, code):
        # 2049 is no float16: it is rounded to 2048.
        q, k = torch.tensor([[64.0, 1.0]]).half(), torch.tensor([[32.0, 1.0], [32.0, 0.0]]).half()
        share = 1 / (1 + math.exp(-1 / math.sqrt(2)))
        actual = code.attention(q, k, torch.tensor([[1.0, 0.0], [0.0, 1.0]]).half(), torch.ones(1, 2).bool())
        close(
            actual,
            torch.tensor([[share, 1 - share]]).half(),
            "attention(scores of 2049 and 2048 in float16)",
            rtol=2e-3,
        )
        # 300 times 300, four times, is 360000, and float16 ends at 65504. The second score is far behind the first.
        q = torch.tensor([[300.0] * 4, [0.0] * 4], dtype=torch.float16)
        k = torch.tensor([[300.0] * 4, [250.0] * 4, [0.0] * 4], dtype=torch.float16)
        v = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]], dtype=torch.float16)
        expected = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], dtype=torch.float16)
        actual = code.attention(q, k, v, booleans("xx.", "xxx"))
        close(actual, expected, "attention(q and k of 300s in float16)", rtol=2e-3)

    def test_float64(self, code):
        q, k, v = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
        mask = booleans("x..", "xx.", "xxx")
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
        close(code.attention(q, k, v, mask), expected, "attention(q, k, v in float64)", rtol=1e-11, atol=1e-12)


@exercise("1.9", points=2)
class TestGroupedQueryAttention:
    def test_by_hand(self, code):
        # One key, so that every query takes its value whole: which of the two?
        q, k = torch.randn(1, 4, 2), torch.randn(1, 2, 2)
        v = torch.tensor([[[10.0, 11.0], [20.0, 21.0]]])
        actual = code.grouped_query_attention(q, k, v, booleans("x"))
        expected = torch.tensor([[[10.0, 11.0], [10.0, 11.0], [20.0, 21.0], [20.0, 21.0]]])
        close(actual, expected, "grouped_query_attention(4 query heads, values [10, 11] and [20, 21])")

    def test_head_by_head(self, code):
        q, k, v = torch.randn(3, 6, 4), torch.randn(5, 2, 4), torch.randn(5, 2, 4)
        mask = booleans("xxx..", "xxxx.", "xxxxx")
        expected = torch.empty(3, 6, 4)
        for head in range(6):
            kv = head // 3
            expected[:, head] = F.scaled_dot_product_attention(q[None, :, head], k[None, :, kv], v[None, :, kv], mask)[
                0
            ]
        actual = code.grouped_query_attention(q, k, v, mask)
        close(actual, expected, "grouped_query_attention(q (3, 6, 4), k and v (5, 2, 4))")

    def test_one_group_and_all_groups(self, code):
        for num_kv_heads in (1, 4):
            q, k, v = torch.randn(2, 4, 6), torch.randn(3, num_kv_heads, 6), torch.randn(3, num_kv_heads, 6)
            mask = booleans("xx.", "xxx")
            every = [x.transpose(0, 1).expand(4, -1, -1) for x in (q, k, v)]
            expected = F.scaled_dot_product_attention(*every, mask).transpose(0, 1)
            actual = code.grouped_query_attention(q, k, v, mask)
            close(actual, expected, f"grouped_query_attention(4 query heads, {num_kv_heads} key/value heads)")


# --- A layer, a model -------------------------------------------------------------------------------------------------


@exercise("1.10")
class TestSwiGLU:
    def test_by_hand(self, code):
        # The gate is 2, silu(2) = 2 / (1 + exp(-2)) = 1.761594; up is 3: their product, times 5.
        x, gate, up, down = (torch.tensor([[each]]) for each in (1.0, 2.0, 3.0, 5.0))
        actual = code.swiglu(x, gate, up, down)
        close(actual, torch.tensor([[26.423912]]), "swiglu(x=1, w_gate=2, w_up=3, w_down=5)")

    def test_a_closed_gate(self, code):
        # silu lets a little through below zero: -2 / (1 + exp(2)) = -0.238406.
        x, gate, up, down = (torch.tensor([[each]]) for each in (1.0, -2.0, 3.0, 5.0))
        actual = code.swiglu(x, gate, up, down)
        close(actual, torch.tensor([[-3.576088]]), "swiglu(x=1, w_gate=-2, w_up=3, w_down=5)")

    def test_shapes(self, code):
        x, gate, up, down = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 3), torch.randn(3, 5)
        expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        close(code.swiglu(x, gate, up, down), expected, "swiglu(x (2, 3), w_gate and w_up (5, 3), w_down (3, 5))")


def snapshot(code) -> tuple[dict[str, Tensor], dict[str, Tensor], object]:
    """Weights of a tiny Llama, what transformers computed with them, and its ModelConfig."""
    tensors = load_file(SNAPSHOTS / "llama.safetensors")
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("snapshot.")}
    results = {name.removeprefix("snapshot."): t for name, t in tensors.items() if name.startswith("snapshot.")}
    config = code.ModelConfig(
        vocab_size=37,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-2,
        rope_theta=100.0,
    )
    return weights, results, config


def layer(weights: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One layer's weights, by their names within the layer."""
    prefix = f"model.layers.{number}."
    return {name[len(prefix) :]: weight for name, weight in weights.items() if name.startswith(prefix)}


def angles_of(positions: Tensor, config) -> tuple[Tensor, Tensor]:
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(positions.float(), frequencies)
    return torch.cos(angles), torch.sin(angles)


def expected_block(x: Tensor, weights: Mapping[str, Tensor], config, cos: Tensor, sin: Tensor) -> Tensor:
    """A layer with torch's own norm, attention and silu, and complex rotary."""
    size, eps = (x.shape[-1],), config.rms_norm_eps
    normed = F.rms_norm(x, size, weights["input_layernorm.weight"], eps)
    q, k, v = (
        F.linear(normed, weights[f"self_attn.{name}_proj.weight"]).unflatten(1, (-1, config.head_dim)) for name in "qkv"
    )
    q, k = rotated(q, cos, sin).to(x.dtype), rotated(k, cos, sin).to(x.dtype)
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
    x = x + F.linear(mixed.transpose(0, 1).flatten(1), weights["self_attn.o_proj.weight"])
    normed = F.rms_norm(x, size, weights["post_attention_layernorm.weight"], eps)
    gate, up, down = (weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def expected_logits(token_ids: Tensor, weights: Mapping[str, Tensor], config) -> Tensor:
    x = F.embedding(token_ids, weights["model.embed_tokens.weight"])
    cos, sin = angles_of(torch.arange(len(token_ids)), config)
    for number in range(config.num_hidden_layers):
        x = expected_block(x, layer(weights, number), config, cos, sin)
    x = F.rms_norm(x, (x.shape[-1],), weights["model.norm.weight"], config.rms_norm_eps)
    return F.linear(x, weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"])


@exercise("1.11", points=3)
class TestBlock:
    def test_what_is_added(self, code):
        weights, _, config = snapshot(code)
        silent = layer(weights, 0)
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            silent[name] = torch.zeros_like(silent[name])
        x = torch.randn(3, 20)
        actual = code.block(x, silent, config, *angles_of(torch.arange(3), config))
        close(actual, x, "block(x) when o_proj and down_proj are zero, so that nothing is added to x,")

    def test_attention_of_one_token(self, code):
        # One token attends to itself alone, so its values go straight through; they must not have been rotated.
        weights, _, config = snapshot(code)
        weights = layer(weights, 0)
        weights["mlp.down_proj.weight"] = torch.zeros(20, 28)
        x = torch.randn(1, 20)
        normed = F.rms_norm(x, (20,), weights["input_layernorm.weight"], 1e-2)
        v = F.linear(normed, weights["self_attn.v_proj.weight"]).view(2, 6)
        expected = x + F.linear(v.repeat_interleave(2, 0).flatten()[None], weights["self_attn.o_proj.weight"])
        actual = code.block(x, weights, config, *angles_of(torch.tensor([9]), config))
        close(actual, expected, "block(one token at position 9) when down_proj is zero")

    def test_feed_forward_alone(self, code):
        weights, _, config = snapshot(code)
        weights = layer(weights, 0)
        weights["self_attn.o_proj.weight"] = torch.zeros(20, 24)
        x = torch.randn(3, 20)
        actual = code.block(x, weights, config, *angles_of(torch.arange(3), config))
        expected = expected_block(x, weights, config, *angles_of(torch.arange(3), config))
        close(actual, expected, "block(x) when o_proj is zero", atol=1e-5)

    def test_as_transformers(self, code):
        weights, results, config = snapshot(code)
        cos, sin = angles_of(results["block.positions"], config)
        actual = code.block(results["block.x"], layer(weights, 0), config, cos, sin)
        close(
            actual, results["block.output"], "block(x, positions 0, 3, 4, 9, 10), as transformers gives it,", atol=1e-5
        )

    def test_the_past_does_not_see_the_future(self, code):
        weights, results, config = snapshot(code)
        x, (cos, sin) = results["block.x"], angles_of(results["block.positions"], config)
        other = torch.cat((x[:-1], torch.randn(1, 20)))
        before = code.block(x, layer(weights, 0), config, cos, sin)[:-1]
        after = code.block(other, layer(weights, 0), config, cos, sin)[:-1]
        close(after, before, "block(x)[:-1] after only the last token was exchanged", atol=1e-5)

    def test_on_another_device(self, code):
        weights, results, config = snapshot(code)
        given = (results["block.x"], *angles_of(results["block.positions"], config))
        x, cos, sin = (each.to("meta") for each in given)
        weights = {name: weight.to("meta") for name, weight in layer(weights, 0).items()}
        elsewhere(lambda: code.block(x, weights, config, cos, sin), "block(x)", "`x.device`")


@exercise("1.12", points=3)
class TestForward:
    token_ids = torch.tensor([5, 31, 5, 0])

    def test_without_layers(self, code):
        weights, _, config = snapshot(code)
        config = code.ModelConfig(**{**vars(config), "num_hidden_layers": 0})
        expected = expected_logits(self.token_ids, weights, config)
        actual = code.forward(self.token_ids, weights, config)
        close(actual, expected, "forward(a model with no layers: embedding, norm, head)", atol=1e-5)

    def test_as_transformers(self, code):
        weights, results, config = snapshot(code)
        actual = code.forward(results["token_ids"], weights, config)
        close(actual, results["logits"], "forward(7 tokens), as transformers gives it,", atol=2e-5)

    def test_tied_as_transformers(self, code):
        weights, results, config = snapshot(code)
        del weights["lm_head.weight"]
        config = code.ModelConfig(**{**vars(config), "tie_word_embeddings": True})
        actual = code.forward(results["token_ids"], weights, config)
        close(
            actual, results["logits_tied"], "forward(7 tokens) with a tied head, as transformers gives it,", atol=2e-5
        )

    def test_eleven_layers(self, code):
        # From layer 10 on a number has two digits: layer 1 is not layer 10.
        weights, _, config = snapshot(code)
        generator = torch.Generator().manual_seed(2)
        for number in range(2, 11):
            for name, weight in layer(weights, 0).items():
                noise = torch.randn(weight.shape, generator=generator)
                weights[f"model.layers.{number}.{name}"] = noise * 0.2 + (1.0 if "norm" in name else 0.0)
        config = code.ModelConfig(**{**vars(config), "num_hidden_layers": 11})
        expected = expected_logits(self.token_ids, weights, config)
        close(
            code.forward(self.token_ids, weights, config),
            expected,
            "forward(a model of 11 layers)",
            rtol=1e-4,
            atol=1e-4,
        )

    def test_on_another_device(self, code):
        weights, _, config = snapshot(code)
        weights = {name: weight.to("meta") for name, weight in weights.items()}
        token_ids = self.token_ids.to("meta")
        elsewhere(lambda: code.forward(token_ids, weights, config), "forward(token_ids)", "`token_ids.device`")


# --- How large, how good ----------------------------------------------------------------------------------------------

REAL_MODELS = {
    "Llama-2-7B": (6_738_415_616, (32000, 4096, 11008, 32, 32, 32, 128), {}),
    "Llama-3-8B": (8_030_261_248, (128256, 4096, 14336, 32, 32, 8, 128), {}),
    "SmolLM2-135M": (134_515_008, (49152, 576, 1536, 30, 9, 3, 64), {"tie_word_embeddings": True}),
    "Qwen2.5-0.5B": (494_032_768, (151936, 896, 4864, 24, 14, 2, 64), {"tie_word_embeddings": True, "qkv_bias": True}),
    "Qwen3-0.6B": (596_049_920, (151936, 1024, 3072, 28, 16, 8, 128), {"tie_word_embeddings": True, "qk_norm": True}),
}
"""name -> (parameters, (vocab_size, hidden_size, intermediate_size, layers, heads, KV heads, head_dim), the rest).
Each count is that of the model which transformers builds from this shape (solutions/tests/test_llm_basics.py)."""


@exercise("1.13", points=2)
class TestCountParameters:
    # vocab_size, hidden_size, intermediate_size, layers, heads, KV heads, head_dim
    small = (15, 6, 11, 2, 2, 1, 5)

    def test_by_hand(self, code):
        # Each layer: q 60, k 30, v 30, o 60, MLP 3 x 66, norms 12; and embedding 90, norm 6, head 90. The sizes are
        # such that different mistakes give different sums: k in both layers is not as much as the head.
        equal(
            code.count_parameters(code.ModelConfig(*self.small)),
            966,
            "count_parameters of the small model in the check",
        )

    def test_tied(self, code):
        config = code.ModelConfig(*self.small, tie_word_embeddings=True)
        equal(code.count_parameters(config), 876, "count_parameters of the small model with a tied head")

    def test_biases(self, code):
        for name, expected in (("qkv_bias", 1006), ("o_bias", 978), ("mlp_bias", 1022)):
            config = code.ModelConfig(*self.small, **{name: True})
            equal(code.count_parameters(config), expected, f"count_parameters of the small model with {name}")
        config = code.ModelConfig(*self.small, qkv_bias=True, o_bias=True, mlp_bias=True)
        equal(code.count_parameters(config), 1074, "count_parameters of the small model with all three kinds of biases")

    def test_qk_norm(self, code):
        config = code.ModelConfig(*self.small, qk_norm=True)
        equal(code.count_parameters(config), 986, "count_parameters of the small model with qk_norm")

    def test_real_models(self, code):
        for name, (expected, sizes, options) in REAL_MODELS.items():
            equal(code.count_parameters(code.ModelConfig(*sizes, **options)), expected, f"count_parameters of {name}")


@exercise("1.14", points=2)
class TestPerplexity:
    def test_knows_nothing(self, code):
        actual = code.perplexity(torch.zeros(3, 8), torch.tensor([1, 5, 2]))
        close(actual, 8.0, "perplexity(three rows of equal scores over 8 tokens)")

    def test_by_hand(self, code):
        # Token 1 follows with probability 1/2 (row 0), token 2 with 1/8 (row 1): exp of the mean surprise is 4.
        rows = [[0.25, 0.5, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125], [0.0625, 0.0625, 0.125, 0.75]]
        actual = code.perplexity(torch.tensor(rows).log(), torch.tensor([0, 1, 2]))
        close(actual, 4.0, "perplexity(the probabilities of tokens 1 and 2 are 1/2 and 1/8)")

    def test_as_cross_entropy(self, code):
        logits, token_ids = torch.randn(6, 5) * 2 + torch.arange(6.0)[:, None], torch.tensor([4, 0, 1, 1, 3, 2])
        expected = math.exp(F.cross_entropy(logits[:-1], token_ids[1:]).item())
        close(code.perplexity(logits, token_ids), expected, "perplexity(logits (6, 5), token_ids)")

    def test_a_great_surprise(self, code):
        # Score 0 against 200: the probability, exp(-200), is too small for float32. Its logarithm is not.
        logits = torch.zeros(5, 2)
        logits[1, 0] = 200.0
        expected = math.exp((200 + 3 * math.log(2)) / 4)
        actual = code.perplexity(logits, torch.tensor([1, 1, 1, 1, 1]))
        close(actual, expected, "perplexity(one token with a score of 0 against 200)", rtol=1e-4)

    def test_bfloat16(self, code):
        logits = torch.tensor([[1.0, 2.0, 4.0]] * 5, dtype=torch.bfloat16)
        expected = math.exp(math.log(math.exp(1) + math.exp(2) + math.exp(4)) - 2)
        actual = code.perplexity(logits, torch.tensor([0, 1, 1, 1, 1]))
        close(actual, expected, "perplexity(logits in bfloat16)", rtol=1e-4)


# --- All of it --------------------------------------------------------------------------------------------------------


def config_of(code, checkpoint: Checkpoint):
    """The ModelConfig of a Llama checkpoint."""
    raw = checkpoint.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps")
    theta = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]
    return code.ModelConfig(
        **{name: raw[name] for name in names},
        rope_theta=theta,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )


@together()
class TestTogether:
    def test_byte_pair_encoding(self, code):
        text = "low lower lowest slow slower slowest " * 3
        ids = list(text.encode())
        pieces = {byte: bytes([byte]) for byte in range(256)}
        for new_id in range(256, 276):
            pairs = list(itertools.pairwise(ids))
            pair = max(set(pairs), key=lambda each: (pairs.count(each), each))
            pieces[new_id] = pieces[pair[0]] + pieces[pair[1]]
            ids = code.merge_pair(ids, pair, new_id)
        equal(b"".join(pieces[each] for each in ids).decode(), text, "the text, after 20 merges and back,")
        holds(
            len(ids) < len(text) / 4, f"20 merges made {len(ids)} tokens of {len(text)} characters, not even a quarter."
        )

    def test_only_the_distance_counts(self, code):
        q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
        frequencies = code.rotary_frequencies(8, 10_000.0)

        def score(query_position: int, key_position: int) -> Tensor:
            turned = [
                code.apply_rotary(x, *code.rotary_tables(torch.tensor([position]), frequencies))
                for x, position in ((q, query_position), (k, key_position))
            ]
            return (turned[0] * turned[1]).sum()

        close(
            score(103, 100),
            score(3, 0),
            "the dot product of a query at 103 and a key at 100, set beside 3 and 0,",
            atol=1e-4,
        )

    def test_tales(self, code):
        checkpoint = Checkpoint(cached("tales"))
        config = config_of(code, checkpoint)
        tied = ["lm_head.weight"] if config.tie_word_embeddings else []  # some files hold the tied table twice
        names = [name for name in checkpoint.names() if name not in tied]
        weights = {name: checkpoint.read(name).double() for name in names}
        equal(
            code.count_parameters(config),
            sum(weight.numel() for weight in weights.values()),
            "count_parameters of `tales`, set beside the numbers in its file,",
        )
        token_ids = torch.arange(3, 40, 3)
        expected = expected_logits(token_ids, weights, config)
        close(code.forward(token_ids, weights, config), expected, "forward of `tales` in float64", rtol=1e-6, atol=1e-6)

    # SmolLM2 is compared where `make run` has put it on this machine; nothing is fetched from within a check.
    if cached("smollm2-135m"):

        def test_smollm2(self, code):
            checkpoint = Checkpoint(cached("smollm2-135m"))
            results = load_file(SNAPSHOTS / "smollm2.safetensors")
            config, num_dimensions = config_of(code, checkpoint), results["after_layers"].shape[-1]
            rows = [
                checkpoint.read("model.embed_tokens.weight", slice(i, i + 1)) for i in results["token_ids"].tolist()
            ]
            x = torch.cat(rows).float()
            positions = torch.arange(len(x))
            cos, sin = code.rotary_tables(positions, code.rotary_frequencies(config.head_dim, config.rope_theta))
            for number, expected in enumerate(results["after_layers"]):
                prefix = f"model.layers.{number}."
                names = [name for name in checkpoint.names() if name.startswith(prefix)]
                weights = {name.removeprefix(prefix): checkpoint.read(name).float() for name in names}
                x = code.block(x, weights, config, cos, sin)
                # A hidden state of this model has a few dimensions in the thousands, and rounds accordingly.
                what = f"SmolLM2's hidden states after layer {number}, by your block and by transformers,"
                close(x[:, :num_dimensions], expected, what, rtol=1e-3, atol=2e-3)
