"""The checks of lesson 7. Weights are small and worked by hand, and no result depends on a tie in rounding."""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common.checkpoints import Checkpoint
from common.grading import close, equal, exercise, holds, together
from solutions.llama_pytorch import ModelConfig, parse_config


def quantized(code, method, weight: torch.Tensor, columns: range | None = None):
    """A layer with this method, that has read a matrix of floats and a bias of ones; or some of its columns, as
    a rank has them.
    """
    layer = code.Linear(weight.shape[1], weight.shape[0], bias=True).to(weight.dtype).requires_grad_(False)
    if columns is not None:
        from solutions.parallelism import Group, RowParallelLinear

        layer = RowParallelLinear(layer, columns, Group())
    code.set_method(layer, method)
    tensors = {"weight": weight, "bias": torch.ones_like(weight[:, 0])}
    layer.load(lambda name, *part: tensors[name][tuple(slice(axis.start, axis.stop) for axis in part)])
    return layer


def spread(*shape: int) -> torch.Tensor:
    """Numbers without order, from -2 to 2, no two alike."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float32) * 37 % count) / count * 4 - 2).view(shape)


# --- Eight bits -------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([[127.0, -3.0, 2.4], [0.635, 0.01, -0.32]])


@exercise("7.1", points=2)
class TestQuantizeInt8:
    def test_numbers_and_scales(self, code):
        numbers, scale = code.quantize_int8(WEIGHT.clone())
        close(scale, torch.tensor([1.0, 0.005]), "the scales of [[127, -3, 2.4], [0.635, 0.01, -0.32]]")
        expected = torch.tensor([[127, -3, 2], [127, 2, -64]], dtype=torch.int8)
        close(numbers, expected, "the numbers of [[127, -3, 2.4], [0.635, 0.01, -0.32]]")

    def test_the_largest_may_be_negative(self, code):
        numbers, scale = code.quantize_int8(torch.tensor([[-254.0, 254.0, 3.0]]))
        close(scale, torch.tensor([2.0]), "the scale of [[-254, 254, 3]]")
        close(numbers, torch.tensor([[-127, 127, 2]], dtype=torch.int8), "the numbers of [[-254, 254, 3]]")

    def test_zeros(self, code):
        numbers, scale = code.quantize_int8(torch.tensor([[0.0, 0.0], [1.27, 0.0]]))
        close(scale, torch.tensor([1.0, 0.01]), "the scales of [[0, 0], [1.27, 0]]")
        close(numbers, torch.tensor([[0, 0], [127, 0]], dtype=torch.int8), "the numbers of [[0, 0], [1.27, 0]]")

    def test_part_of_a_row(self, code):
        numbers, scale = code.quantize_int8(torch.tensor([[3.0, -1.0], [3.0, -1.0]]), torch.tensor([12.7, 3.81]))
        what = "of [3, -1] and [3, -1], parts of two rows with absmax 12.7 and 3.81"
        close(scale, torch.tensor([0.1, 0.03]), f"the scales {what}")
        close(numbers, torch.tensor([[30, -10], [100, -33]], dtype=torch.int8), f"the numbers {what}")

    def test_a_scale_that_is_too_small_to_tell_from_0(self, code):
        numbers, scale = code.quantize_int8(torch.tensor([[1e-6, 0.0]]).half())
        what = "of [1e-6, 0] in float16, where 1e-6 / 127 is rounded to 0"
        close(scale, torch.ones(1).half(), f"the scale {what}")
        close(numbers, torch.zeros(1, 2, dtype=torch.int8), f"the numbers {what}")

    def test_a_scale_that_float16_rounds_down(self, code):
        """The smallest number above 0 in float16 is 6e-8, and 1e-5 / 127 is 7.9e-8."""
        numbers, _ = code.quantize_int8(torch.tensor([[1e-5, -1e-5]]).half())
        what = "the numbers of [1e-5, -1e-5] in float16, where 1e-5 / scale is 168, more than an int8 holds,"
        close(numbers, torch.tensor([[127, -127]], dtype=torch.int8), what)

    def test_a_fault_stays_visible(self, code):
        _, scale = code.quantize_int8(torch.tensor([[1.0, math.nan], [254.0, 1.0]]))
        what = "the scales of [[1, NaN], [254, 1]], the first of which should be NaN,"
        close(scale, torch.tensor([math.nan, 2.0]), what)

    def test_error_is_half_a_step(self, code):
        weight = spread(6, 40)
        numbers, scale = code.quantize_int8(weight)
        error = (numbers.float() * scale[:, None] - weight).abs() / scale[:, None]
        worst = float(error.max())
        holds(
            worst <= 0.5001, f"number x scale differs from a weight by {worst:.2f} scales; expected at most 0.5.", worst
        )


@exercise("7.2", points=1)
class TestQuantizeActivations:
    def test_a_scale_for_each_token(self, code):
        x = torch.tensor([[1.27, -0.5, 0.0], [-254.0, 2.0, 100.0]])
        numbers, scale = code.quantize_activations(x)
        close(scale, torch.tensor([0.01, 2.0]), "the scales of two tokens, [1.27, -0.5, 0] and [-254, 2, 100]")
        expected = torch.tensor([[127, -50, 0], [-127, 1, 50]], dtype=torch.int8)
        close(numbers, expected, "the numbers of two tokens, [1.27, -0.5, 0] and [-254, 2, 100]")

    def test_part_of_a_token(self, code):
        numbers, scale = code.quantize_activations(torch.tensor([[1.0, -2.0], [1.0, -2.0]]), torch.tensor([25.4, 2.54]))
        what = "of [1, -2] and [1, -2], parts of two tokens with absmax 25.4 and 2.54"
        close(scale, torch.tensor([0.2, 0.02]), f"the scales {what}")
        close(numbers, torch.tensor([[5, -10], [50, -100]], dtype=torch.int8), f"the numbers {what}")


@exercise("7.3", points=2)
class TestInt8Method:
    def test_product(self, code):
        weight, x = spread(5, 8), spread(3, 8) + 0.5
        layer = quantized(code, code.Int8Method(), weight)
        numbers, scale = layer.weight, layer.weight_scale
        expected = x @ (numbers.float() * scale[:, None]).T + 1
        close(
            layer(x),
            expected,
            "layer(x) of a layer with eight inputs, five outputs and a bias of 1",
            rtol=1e-4,
            atol=1e-5,
        )
        close(layer(x[:1]), expected[:1], "layer(x) of one token", rtol=1e-4, atol=1e-5)

    def test_in_the_dtype_of_x(self, code):
        weight, x = spread(4, 4).double(), spread(2, 4).double() / 3
        layer = quantized(code, code.Int8Method(), weight)
        expected = x @ (layer.weight.double() * layer.weight_scale[:, None]).T + 1
        close(layer(x), expected, "layer(x) in float64, with a bias of 1", rtol=1e-9, atol=1e-9)
        got = quantized(code, code.Int8Method(), weight.bfloat16())(torch.ones(1, 4).bfloat16())
        equal(str(got.dtype), "torch.bfloat16", "the dtype of layer(x), where x has bfloat16,")

    def test_the_weight_is_left_alone(self, code):
        weight = spread(4, 4)
        layer = quantized(code, code.Int8Method(), weight)
        before = layer.weight.clone()
        layer(spread(2, 4))
        close(layer.weight, before, "the layer's weight after a product, which must not change it,")


@exercise("7.4", points=3)
class TestW8A8Method:
    def expected(self, layer, x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        scale = absmax / 127
        numbers = (x / scale[:, None]).round()
        return (numbers.double() @ layer.weight.double().T).to(x.dtype) * scale[:, None] * layer.weight_scale + 1

    def test_product(self, code):
        weight, x = spread(5, 12), spread(4, 12) * torch.tensor([[0.01], [1.0], [30.0], [2.0]])
        layer = quantized(code, code.W8A8Method(), weight)
        expected = self.expected(layer, x, x.abs().amax(1))
        close(
            layer(x),
            expected,
            "layer(x) of four tokens with very different magnitudes, and a bias of 1",
            rtol=1e-4,
            atol=1e-6,
        )

    def test_sums_need_more_than_eight_bits(self, code):
        weight = torch.ones(2, 2000)
        layer = quantized(code, code.W8A8Method(), weight)
        got = layer(torch.ones(1, 2000))
        close(
            got,
            torch.full((1, 2), 2001.0),
            "layer(x) of 2,000 ones, with 2,000 weights of 1 and a bias of 1",
            rtol=1e-4,
        )

    def test_sums_that_float16_cannot_hold(self, code):
        """2,000 products of 127 x 127 are 32 million; float16 ends at 65,504. What they stand for is 2,000."""
        layer = quantized(code, code.W8A8Method(), torch.ones(2, 2000).half())
        got = layer(torch.tensor([[1.0], [0.01]]).expand(2, 2000).half())
        equal(str(got.dtype), "torch.float16", "the dtype of layer(x), where x has float16,")
        what = "layer(x) of 2,000 ones, and of 2,000 times 0.01, in float16, with 2,000 weights of 1 and a bias of 1"
        close(got, torch.tensor([[2001.0] * 2, [21.0] * 2]).half(), what, rtol=2e-3)

    def test_ranks_scale_a_token_alike(self, code):
        """Another rank has the larger part of the token: the group says so."""
        from solutions.parallelism import Group

        class Other(Group):
            def all_reduce(self, x, op=None):
                return torch.full_like(x, 12.7) if op == torch.distributed.ReduceOp.MAX else x

        weight, x = spread(3, 8), torch.tensor([[1.0, -0.31, 0.5, 0.02]])
        layer = quantized(code, code.W8A8Method(), weight, columns=range(4))
        layer.group = Other()
        expected = self.expected(layer, x, torch.tensor([12.7]))
        what = "layer(x) with a bias of 1, where another rank's part of the token has absmax 12.7"
        close(layer(x), expected, what, rtol=1e-4, atol=1e-6)


# --- Four bits --------------------------------------------------------------------------------------------------------


@exercise("7.5", points=1)
class TestPackInt4:
    def test_nibbles(self, code):
        numbers = torch.tensor([[1, 2, 15, 0], [9, 9, 8, 7]], dtype=torch.uint8)
        expected = torch.tensor([[0x21, 0x0F], [0x99, 0x78]], dtype=torch.uint8)
        close(code.pack_int4(numbers), expected, "pack_int4([[1, 2, 15, 0], [9, 9, 8, 7]])")

    def test_every_pair(self, code):
        pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
        expected = (pairs[:, :1].int() + 16 * pairs[:, 1:].int()).to(torch.uint8)
        close(code.pack_int4(pairs), expected, "pack_int4 of all 256 pairs")


@exercise("7.6", points=1)
class TestUnpackInt4:
    def test_bytes(self, code):
        packed = torch.tensor([[0x21, 0x0F], [0x99, 0x78]], dtype=torch.uint8)
        expected = torch.tensor([[1, 2, 15, 0], [9, 9, 8, 7]], dtype=torch.uint8)
        close(code.unpack_int4(packed), expected, "unpack_int4([[0x21, 0x0F], [0x99, 0x78]])")

    def test_every_pair_there_and_back(self, code):
        pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
        packed = (pairs[:, :1].int() + 16 * pairs[:, 1:].int()).to(torch.uint8)
        close(code.unpack_int4(packed), pairs, "unpack_int4 of all 256 bytes")
        close(code.unpack_int4(packed.view(16, 16)), pairs.view(16, 32), "unpack_int4 of 16 rows of 16 bytes")


@exercise("7.7", points=4)
class TestQuantizeInt4:
    def test_asymmetric(self, code):
        weight = torch.tensor([[1.0, 16.0, 4.2, 8.0, -7.5, 0.0, -3.5, -0.5]])
        numbers, scale, minimum = code.quantize_int4(weight, 4, False)
        what = "of [1, 16, 4.2, 8 | -7.5, 0, -3.5, -0.5] in groups of 4, asymmetric"
        close(scale, torch.tensor([[1.0, 0.5]]).half(), f"the scales {what}")
        close(minimum, torch.tensor([[1.0, -7.5]]).half(), f"the minima {what}")
        close(numbers, torch.tensor([[0, 15, 3, 7, 0, 15, 8, 14]], dtype=torch.uint8), f"the numbers {what}")

    def test_symmetric(self, code):
        weight = torch.tensor([[7.0, -7.0, 2.2, 0.0, 1.75, 0.5, -3.5, 3.0]])
        numbers, scale, minimum = code.quantize_int4(weight, 4, True)
        what = "of [7, -7, 2.2, 0 | 1.75, 0.5, -3.5, 3] in groups of 4, symmetric"
        close(scale, torch.tensor([[1.0, 0.5]]).half(), f"the scales {what}")
        close(minimum, torch.tensor([[-8.0, -4.0]]).half(), f"the minima {what}")
        numbers = numbers.clone()
        holds(
            int(numbers[0, 4]) in (11, 12),
            f"(1.75 + 4) / 0.5 is 11.5, so the number should be 11 or 12; it is {numbers[0, 4]}.",
        )
        numbers[0, 4] = 12
        close(numbers, torch.tensor([[15, 1, 10, 8, 12, 9, 1, 14]], dtype=torch.uint8), f"the numbers {what}")

    def test_a_short_last_group(self, code):
        weight = torch.tensor([[15.0, 0.0, 1.0, 2.0, 100.0, 130.0], [15.0, 0.0, 1.0, 2.0, -9.0, -3.0]])
        numbers, scale, minimum = code.quantize_int4(weight, 4, False)
        what = "of rows of six in groups of 4, the last group with two weights"
        close(scale, torch.tensor([[1.0, 2.0], [1.0, 0.4]]).half(), f"the scales {what}")
        close(minimum, torch.tensor([[0.0, 100.0], [0.0, -9.0]]).half(), f"the minima {what}")
        expected = torch.tensor([[15, 0, 1, 2, 0, 15], [15, 0, 1, 2, 0, 15]], dtype=torch.uint8)
        close(numbers, expected, f"the numbers {what}")

    def test_a_last_group_of_one(self, code):
        numbers, scale, _ = code.quantize_int4(torch.tensor([[0.0, 15.0, 1.0, 2.0, 7.0]]), 4, False)
        what = "of a row of five in groups of 4, the last group with one weight"
        close(scale, torch.tensor([[1.0, 1.0]]).half(), f"the scales {what}")
        close(numbers, torch.tensor([[0, 15, 1, 2, 0]], dtype=torch.uint8), f"the numbers {what}")

    def test_below_the_rounded_minimum(self, code):
        numbers, _, minimum = code.quantize_int4(torch.tensor([[1000.3, 1000.31]]), 2, False)
        close(minimum, torch.tensor([[1000.5]]).half(), "the minimum of [1000.3, 1000.31], rounded to float16,")
        what = "the numbers of [1000.3, 1000.31], both of which are below the rounded minimum"
        close(numbers, torch.tensor([[0, 0]], dtype=torch.uint8), what)

    def test_all_alike(self, code):
        numbers, scale, minimum = code.quantize_int4(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), 2, False)
        close(scale, torch.ones(2, 1).half(), "the scales of groups with equal weights")
        close(minimum, torch.tensor([[3.0], [0.0]]).half(), "the minima of groups with equal weights")
        close(numbers, torch.zeros(2, 2, dtype=torch.uint8), "the numbers of groups with equal weights")

    def test_all_alike_and_symmetric(self, code):
        numbers, scale, _ = code.quantize_int4(torch.tensor([[3.5, 3.5], [-7.0, -7.0], [0.0, 0.0]]), 2, True)
        what = "of [3.5, 3.5], [-7, -7] and [0, 0], symmetric"
        close(scale, torch.tensor([[0.5], [1.0], [1.0]]).half(), f"the scales {what}")
        close(numbers, torch.tensor([[15, 15], [1, 1], [8, 8]], dtype=torch.uint8), f"the numbers {what}")

    def test_a_scale_that_float16_rounds_to_0(self, code):
        for symmetric, expected in ((False, 0), (True, 8)):
            numbers, scale, _ = code.quantize_int4(torch.tensor([[1e-9, 3e-9]]), 2, symmetric)
            what = f"of [1e-9, 3e-9], {'symmetric' if symmetric else 'asymmetric'}, where float16 rounds the scale to 0"
            close(scale, torch.ones(1, 1).half(), f"the scale {what}")
            close(numbers, torch.full((1, 2), expected, dtype=torch.uint8), f"the numbers {what}")

    def test_chosen_for_the_rounded_scale(self, code):
        """float16 has 11 bits: the scale that is kept is not quite the one that was computed."""
        weight = torch.linspace(40011.3, 40311.3, 64).view(1, 64)
        numbers, scale, minimum = code.quantize_int4(weight, 64, False)
        close(minimum, torch.tensor([[40000.0]]).half(), "the minimum of a group from 40,011.3 to 40,311.3")
        expected = ((weight - 40000) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        close(numbers, expected, "the numbers of a group whose minimum is rounded to 40,000 in float16")
        numbers, scale, _ = code.quantize_int4(torch.tensor([[0.0, 15.006, 14.503]]), 3, False)
        what = "of [0, 15.006, 14.503], where float16 rounds 15.006 / 15 to 1"
        close(scale, torch.ones(1, 1).half(), f"the scale {what}")
        close(numbers, torch.tensor([[0, 15, 15]], dtype=torch.uint8), f"the numbers {what}")


@exercise("7.8", points=1)
class TestDequantizeInt4:
    def test_one_process(self, code):
        numbers = torch.tensor([[0, 15, 3, 7, 1, 2]], dtype=torch.uint8)
        scale, minimum = torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, -7.0]])
        got = code.dequantize_int4(numbers, scale, minimum, 4)
        close(
            got,
            torch.tensor([[1.0, 16.0, 4.0, 8.0, -6.5, -6.0]]),
            "dequantize_int4 of [0, 15, 3, 7 | 1, 2] in groups of 4",
        )

    def test_symmetric(self, code):
        numbers, scale = torch.tensor([[0, 8, 15, 1]], dtype=torch.uint8), torch.tensor([[1.0, 0.5]])
        got = code.dequantize_int4(numbers, scale.bfloat16(), None, 2)
        what = "dequantize_int4 of [0, 8 | 15, 1] in groups of 2, without minima, with scales in bfloat16,"
        close(got, torch.tensor([[-8.0, 0.0, 3.5, -3.5]]).bfloat16(), what)

    def test_share_that_begins_within_a_group(self, code):
        numbers = torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.uint8)
        scale, minimum = torch.tensor([[1.0, 10.0]]), torch.zeros(1, 2)
        got = code.dequantize_int4(numbers, scale, minimum, 4, 2)
        what = "dequantize_int4 of the numbers 1 to 6 in groups of 4, with scales 1 and 10 and first_column 2,"
        close(got, torch.tensor([[1.0, 2.0, 30.0, 40.0, 50.0, 60.0]]), what)


@exercise("7.9", points=2)
class TestInt4Method:
    def check(self, code, columns: int, group_size: int, symmetric: bool, dtype=torch.float32) -> None:
        weight, x = spread(5, columns).to(dtype), (spread(3, columns) + 0.3).to(dtype)
        layer = quantized(code, code.Int4Method(group_size, symmetric), weight)
        numbers, scale, minimum = code.quantize_int4(weight, group_size, symmetric)
        wide = [each.to(dtype).repeat_interleave(group_size, 1)[:, :columns] for each in (scale, minimum)]
        expected = x @ (numbers * wide[0] + wide[1]).T + 1
        kind = f"groups of {group_size}, {'symmetric' if symmetric else 'asymmetric'}, {columns} inputs, a bias of 1"
        close(layer(x), expected, f"layer(x) with {kind}", rtol=1e-4, atol=1e-4)

    def test_groups(self, code):
        self.check(code, 16, 4, False)
        self.check(code, 16, 8, True)

    def test_short_groups_and_odd_columns(self, code):
        self.check(code, 14, 4, False)
        self.check(code, 7, 4, True)

    def test_in_the_dtype_of_x(self, code):
        self.check(code, 8, 4, False, torch.float64)
        layer = quantized(code, code.Int4Method(4, False), spread(5, 8).bfloat16())
        got = layer(torch.ones(1, 8).bfloat16())
        holds(
            got.dtype == torch.bfloat16,
            f"layer(x) has dtype {got.dtype}; x has bfloat16, so it should be bfloat16.",
            str(got.dtype),
        )

    def test_share_that_begins_within_a_group(self, code):
        weight, x = spread(5, 12), spread(3, 6) + 0.3
        whole = quantized(code, code.Int4Method(4, False), weight)
        share = quantized(code, code.Int4Method(4, False), weight, columns=range(6, 12))
        what = "layer(x) of a rank whose columns begin at 6, in groups of 4"
        close(share(x), whole(F.pad(x, (6, 0))), what, rtol=1e-4, atol=1e-4)


# --- The tree ---------------------------------------------------------------------------------------------------------


@exercise("7.10", points=2)
class TestQuantize:
    def model(self, code, **changes):
        config = dict(
            vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, qkv_bias=True, qk_norm=True,
        )  # fmt: skip
        with torch.device("meta"):
            return code.Llama(ModelConfig(**{**config, **changes}))

    def methods(self, model) -> dict[str, str]:
        layers = ((name, module) for name, module in model.named_modules() if hasattr(module, "method"))
        return {name: type(layer.method).__name__ for name, layer in layers}

    def expected(self, kind: str, head: str, table: str) -> dict[str, str]:
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        layers = {f"model.layers.{number}.{name}": kind for number in (0, 1) for name in names}
        return {"model.embed_tokens": table, **layers, "lm_head": head}

    def test_every_linear_layer(self, code):
        for kind, name in (("int4", "Int4Method"), ("int8", "Int8Method"), ("w8a8", "W8A8Method")):
            model = self.model(code)
            code.quantize(model, code.Quantization(kind, 2))
            expected = self.expected(name, "Int8Method", "LinearMethod")
            equal(self.methods(model), expected, f"each layer's method after quantize(..., {kind!r})")

    def test_a_tied_model_has_one_table(self, code):
        model = self.model(code, tie_word_embeddings=True)
        code.quantize(model, code.Quantization("int4", 2))
        expected = self.expected("Int4Method", "Int8Method", "Int8Method")
        equal(self.methods(model), expected, "each layer's method after quantize(..., 'int4') of a tied model")
        table, head = model.model.embed_tokens, model.lm_head
        shared = [getattr(head, name, None) is getattr(table, name) for name in ("weight", "weight_scale")]
        equal(shared, [True, True], "whether the weight and the weight_scale of head and table are the same tensors")

    def test_tensors(self, code):
        model = self.model(code)
        code.quantize(model, code.Quantization("int4", 2, True))
        tensors = {name: str(tensor.dtype) for name, tensor in model.model.layers[0].self_attn.named_parameters()}
        weights = [f"{name}_proj" for name in "qkvo"]
        expected = {f"{name}.weight": "torch.uint8" for name in weights}
        expected |= {f"{name}.weight_scale": "torch.float16" for name in weights}
        expected |= {f"{name}.bias": "torch.float32" for name in weights[:3]}
        expected |= {f"{name}_norm.weight": "torch.float32" for name in "qk"}
        equal(tensors, expected, "the names and dtypes of a layer's tensors after quantize(..., 'int4', symmetric)")

    def test_a_checkpoint_that_is_quantized_already(self, code):
        for is_saved in (False, True):
            model = self.model(code)
            code.quantize(model, code.Quantization("int8"), is_saved)
            layers = (model.model.layers[0].mlp.up_proj, model.lm_head)
            found = [[type(layer.method).__name__, *sorted(layer.shapes())] for layer in layers]
            expected = [["Int8Method", "weight", "weight_scale"] if is_saved else ["Int8Method", "weight"]] * 2
            what = f"[method, tensors to read] of up_proj and of the head after quantize(..., is_saved={is_saved})"
            equal(found, expected, what)


@exercise("7.11", points=4)
class TestActivationAwareScales:
    """Inputs of which one channel is large; what is left of a weight is rounded to whole numbers."""

    def data(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(1239)
        x = torch.randn(24, 6, generator=generator) * torch.tensor([1.0, 0.4, 6.0, 1.0, 0.3, 2.0])
        return x, [torch.randn(rows, 6, generator=generator) * 2 for rows in (5, 3)]

    def expected(self, x, weights, round_trip, num_trials) -> torch.Tensor:
        errors, all_factors = [], []
        for i in range(num_trials):
            factors = x.abs().mean(0).clamp(min=1e-4) ** (i / num_trials)
            factors = factors / (factors.max() * factors.min()).sqrt()
            error = 0.0
            for weight in weights:
                left = round_trip(weight * factors[None]) / factors[None]
                error += float(((x @ left.T) - (x @ weight.T)).pow(2).mean())
            errors.append(error)
            all_factors.append(factors)
        assert min(errors) < 0.97 * sorted(errors)[1], "the check's own data must leave no doubt"
        return all_factors[errors.index(min(errors))]

    def test_the_best_of_all(self, code):
        x, weights = self.data()
        got = code.activation_aware_scales(x, weights, torch.round, 6)
        close(
            got, self.expected(x, weights, torch.round, 6), "the factors of six channels, one of them with large inputs"
        )

    def test_one_weight(self, code):
        x, weights = self.data()
        got = code.activation_aware_scales(x, weights[:1], torch.round, 5)
        close(got, self.expected(x, weights[:1], torch.round, 5), "the factors for one weight and five trials")

    def test_outputs_count_alike_in_weights_of_any_height(self, code):
        x, weights = self.data()
        weights = [torch.cat([weights[0]] * 8), weights[1][:1]]
        got = code.activation_aware_scales(x, weights, torch.round, 6)
        close(got, self.expected(x, weights, torch.round, 6), "the factors for weights of forty rows and of one")

    def test_where_nothing_is_lost(self, code):
        x, weights = self.data()
        got = code.activation_aware_scales(x, [torch.zeros_like(weights[0])], torch.round, 3)
        close(
            got, torch.ones(6), "the factors for a weight of zeros, where the first of three equal candidates is used"
        )

    def test_a_channel_that_is_never_used(self, code):
        x, weights = self.data()
        x[:, 1] = 0
        got = code.activation_aware_scales(x, weights, torch.round, 4)
        holds(
            bool(got.isfinite().all()),
            f"With a channel that is always 0, the factors are {got.tolist()}; they should be finite.",
            got,
        )
        what = "the factors with a channel that is always 0, whose mean counts as 1e-4,"
        close(got, self.expected(x, weights, torch.round, 4), what)


# --- Keys and values --------------------------------------------------------------------------------------------------


def tiny(code, **changes):
    config = dict(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    model = code.Llama(ModelConfig(**{**config, **changes}))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def kept(cache, index: int) -> list[torch.Tensor]:
    """What a layer's memory stands for: keys and values, (blocks, block_size, K, D)."""
    pairs = zip((cache.keys, cache.values), cache.scales)
    return [store[index].float() * scales[index][..., None] for store, scales in pairs]


@exercise("7.12", points=2)
class TestInt8KVCacheWrite:
    def test_a_scale_for_each_slot_and_head(self, code):
        cache = code.Int8KVCache(tiny(code), 4, 2)
        k = torch.tensor([[[1.27, 0, 0, -0.5], [254, 2, -4, 0]], [[0.127, 0.001, 0, 0], [0, 0, 0, 0]]])
        cache.write(1, torch.tensor([5, 2]), k, 2 * k)
        expected = torch.zeros(4, 2, 2, 4, dtype=torch.int8)
        expected[2, 1] = torch.tensor([[127, 0, 0, -50], [127, 1, -2, 0]])
        expected[1, 0] = torch.tensor([[127, 1, 0, 0], [0, 0, 0, 0]])
        close(cache.keys[1], expected, "the numbers of layer 1's keys after a write to slots 5 and 2")
        close(cache.values[1], expected, "the numbers of layer 1's values after a write to slots 5 and 2")
        scales = torch.zeros(4, 2, 2)
        scales[2, 1], scales[1, 0] = torch.tensor([0.01, 2.0]), torch.tensor([0.001, 1.0])
        close(cache.scales[0][1], scales, "the scales of layer 1's keys after a write to slots 5 and 2")
        values = scales * torch.tensor([2.0, 2.0])
        values[1, 0, 1] = 1.0
        close(cache.scales[1][1], values, "the scales of layer 1's values after a write to slots 5 and 2")

    def test_other_layers_and_slots_stay(self, code):
        cache = code.Int8KVCache(tiny(code), 4, 2, layers=range(1, 3))
        k = spread(1, 2, 4)
        cache.write(2, torch.tensor([3]), 3 * k, 3 * k)
        cache.write(2, torch.tensor([3]), k, k)
        cache.write(2, torch.tensor([0]), 9 * k, 9 * k)
        numbers, scale = k.reshape(2, 4), k.abs().amax(-1) / 127
        close(cache.scales[0][1, 1, 1], scale[0], "the scales of slot 3 after it was written twice")
        expected = (numbers / scale[0][:, None]).round().to(torch.int8)
        close(cache.keys[1, 1, 1], expected, "the numbers of slot 3 after it was written twice")
        close(cache.keys[0], torch.zeros(4, 2, 2, 4, dtype=torch.int8), "the numbers of a layer that was not written")


@exercise("7.13", points=2)
class TestInt8KVCacheGather:
    def cache(self, code, num_blocks: int = 6, block_size: int = 4):
        cache = code.Int8KVCache(tiny(code), num_blocks, block_size, layers=range(1, 3))
        slots = torch.arange(num_blocks * block_size)
        k = spread(len(slots), 2, 4) * (1 + slots[:, None, None])
        for layer in (1, 2):
            cache.write(layer, slots, layer * k, -2 * layer * k)
        return cache

    def check(self, code, start: int, end: int, tables: list[list[int]], **sizes) -> None:
        cache = self.cache(code, **sizes)
        got = cache.gather(2, torch.tensor(tables), start, end)
        for name, each, whole in zip(("keys", "values"), got, kept(cache, 1)):
            expected = whole[torch.tensor(tables)].flatten(1, 2)[:, start:end]
            what = f"the {name} at positions {start} to {end - 1} of tables {tables}"
            close(each, expected, what, rtol=1e-5, atol=1e-5)

    def test_several_blocks(self, code):
        self.check(code, 0, 8, [[3, 1], [5, 0]])

    def test_between_boundaries(self, code):
        self.check(code, 2, 11, [[3, 1, 4], [5, 0, 2]])

    def test_within_one_block(self, code):
        self.check(code, 5, 7, [[3, 1], [5, 0]])

    def test_no_other_blocks(self, code):
        cache = self.cache(code)
        tables = torch.tensor([[3, 1, 99], [5, 0, 99]])  # there is no block 99
        try:
            got = cache.gather(2, tables, 0, 8)[0]
        except IndexError:
            holds(False, "Positions 0 to 7 are in the first two blocks of 4, but gather read a third block.", "a third")
        equal(tuple(got.shape[:2]), (2, 8), "the first two dimensions of the keys of positions 0 to 7 of two sequences")

    def test_another_dtype(self, code):
        cache = code.Int8KVCache(tiny(code).bfloat16(), 2, 2)
        cache.write(0, torch.tensor([1]), torch.ones(1, 2, 4).bfloat16(), torch.ones(1, 2, 4).bfloat16())
        found = cache.gather(0, torch.tensor([[0]]), 0, 2)[0]
        close(found[0, 1], torch.ones(2, 4).bfloat16(), "a key of ones, read by gather in a bfloat16 model,", rtol=1e-2)


# --- Layers from the disk, and what it all costs ----------------------------------------------------------------------


@exercise("7.14", points=3)
class TestStreamLayers:
    def test_in_order(self, code):
        got = [(number, layer) for number, layer in code.stream_layers([2, 5, 3], lambda number: f"layer {number}")]
        equal(
            got,
            [(number, f"layer {number}") for number in (2, 5, 3)],
            "the list of pairs from stream_layers([2, 5, 3])",
        )
        equal(list(code.stream_layers([], str)), [], "the list of pairs from stream_layers([])")
        equal(list(code.stream_layers([7], str)), [(7, "7")], "the list of pairs from stream_layers([7])")

    def test_the_next_is_read_meanwhile(self, code):
        begun = [threading.Event() for _ in range(4)]

        def read(number: int) -> int:
            begun[number].set()
            return number

        waited = []
        for number, _ in code.stream_layers(range(4), read):
            if number < 3:
                waited.append(begun[number + 1].wait(2))
                if not waited[-1]:
                    break
        equal(waited, [True, True, True], "whether the next layer is being read while each of three layers is in use")

    def test_two_at_most(self, code):
        begun: list[int] = []

        def read(number: int) -> int:
            begun.append(number)
            return number

        most = 0
        for number, _ in code.stream_layers(range(6), read):
            time.sleep(0.02)
            most = max(most, len(begun) - number)
        equal(most, 2, "the largest number of layers in memory (the yielded one and those read since)")

    def test_errors_are_told(self, code):
        def read(number: int) -> int:
            if number == 2:
                raise OSError("the disk is gone")
            return number

        got, told = [], "nothing"
        try:
            for number, _ in code.stream_layers(range(4), read):
                got.append(number)
        except OSError as error:
            told = str(error)
        equal(told, "the disk is gone", "the error after `read` failed at layer 2")
        equal(got, [0, 1], "the numbers of the layers that were yielded before the error")


@exercise("7.15", points=2)
class TestKLDivergence:
    def test_values(self, code):
        p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
        got = code.kl_divergence(p.log() + 3, q.log() - 5)
        close(got, torch.tensor(0.25 * 0.6931472), "kl_divergence of [1/2, 1/4, 1/4] and [1/4, 1/4, 1/2]")

    def test_not_symmetric(self, code):
        p, q = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6]]), torch.tensor([[0.4, 0.5, 0.1], [0.2, 0.3, 0.5]])
        expected = F.kl_div(q.log(), p, reduction="batchmean")
        close(code.kl_divergence(p.log(), q.log()), expected, "kl_divergence, the mean over two tokens,")

    def test_the_same(self, code):
        logits = spread(3, 7) * 30
        close(
            code.kl_divergence(logits, logits + 2), torch.tensor(0.0), "kl_divergence of equal predictions", atol=1e-5
        )

    def test_in_sixteen_bits(self, code):
        logits, other = (spread(3, 70).bfloat16() * scale for scale in (3, 2))
        got = code.kl_divergence(logits, other)
        expected = F.kl_div(other.float().log_softmax(1), logits.float().softmax(1), reduction="batchmean")
        what = "kl_divergence of logits in bfloat16, computed in float32,"
        close(got.float(), expected, what, rtol=1e-3)

    def test_large_scores(self, code):
        got = code.kl_divergence(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
        close(got, torch.tensor(200.0), "kl_divergence of logits [200, 0] and [0, 200]")


# --- Together ---------------------------------------------------------------------------------------------------------

CONFIG = dict(
    model_type="llama", vocab_size=17, hidden_size=12, intermediate_size=14, num_hidden_layers=3,
    num_attention_heads=3, num_key_value_heads=1, head_dim=4, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip
IDS = [3, 14, 15, 9, 2, 6]


def scores(code, model, cache) -> torch.Tensor:
    """A prompt of four tokens, then two more, through blocks."""
    from solutions.paged_attention import AttentionMetadata

    rows = []
    with torch.inference_mode():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            slots = torch.tensor([8 + position for position in range(start, end)])
            metadata = AttentionMetadata([0, end - start], [end], slots, [[2, 3]])
            hidden = model(torch.tensor(IDS[start:end]), torch.arange(start, end), cache.attend(metadata))
            rows.append(model.logits(hidden[-1:])[0])
    return torch.stack(rows)


def loaded(code, folder: Path, quantization=None, limit: int | None = None):
    """A model from a checkpoint that is quantized, or is quantized as it is read; streamed within a limit of bytes."""
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = (code.Llama if limit is None else code.OffloadedLlama)(parse_config(CONFIG))
    code.quantize_for(model, checkpoint, quantization)
    if limit is None:
        code.load_weights(model, checkpoint)
    else:
        model.stream_from(checkpoint, range(CONFIG["num_hidden_layers"]), limit)
    return model


@together()
class TestTogether:
    """Your whole file: a checkpoint quantized as it is read, saved, read again, streamed from the disk."""

    def test_every_kind(self, code):
        torch.manual_seed(0)
        plain = code.Llama(parse_config(CONFIG))
        for parameter in plain.parameters():
            nn.init.normal_(parameter, std=0.3)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file({key: each.detach() for key, each in plain.named_parameters()}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
            exact = scores(code, plain, code.PagedKVCache(plain, 4, 4))
            for kind, limit in (("int8", 0.02), ("w8a8", 0.1), ("int4", 0.4)):
                quantization = code.Quantization(kind, 4)
                model = loaded(code, folder, quantization)
                got = scores(code, model, code.Int8KVCache(model, 4, 4))
                distance = float(code.kl_divergence(exact, got))
                holds(
                    0 < distance < limit,
                    f"With {kind} the KL divergence is {distance:.4f} nats; it should be above 0 and below {limit}.",
                )
                code.save_quantized(model, quantization, folder, folder / kind)
                again = loaded(code, folder / kind)
                close(scores(code, again, code.Int8KVCache(again, 4, 4)), got, f"the scores of a saved {kind} model")
                limit = code.weight_bytes(model) - 1
                streamed = loaded(code, folder, quantization, limit)
                what = f"the scores of a streamed {kind} model"
                close(scores(code, streamed, code.Int8KVCache(streamed, 4, 4)), got, what)
                Checkpoint(folder / kind)._open.clear()
