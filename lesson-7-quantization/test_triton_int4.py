"""The checks of lesson 7's optional part. Kernels run on memory with known values around it, as in lesson 4's."""

from __future__ import annotations

import torch

from common.grading import close, exercise, holds, together
from common.kernels.triton import DEVICE, tl, triton

AROUND = 4096  # elements before and after what a kernel is given: more than any tile reaches beyond it


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def within(tensor: torch.Tensor, around: float = 100.0) -> torch.Tensor:
    """The same values, on the kernels' device, in the midst of memory that holds another one."""
    memory = torch.full((tensor.numel() + 2 * AROUND,), around).to(tensor.dtype).to(DEVICE)
    memory[AROUND:-AROUND] = tensor.to(DEVICE).flatten()
    return memory[AROUND:-AROUND].view(tensor.shape)


def matrix(num_outputs: int, num_inputs: int, group_size: int) -> tuple[torch.Tensor, ...]:
    """Random bytes, scales and minima, and the weights that they stand for, in float32."""
    generator = torch.Generator().manual_seed(num_inputs)
    numbers = torch.randint(0, 16, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    num_groups = -(-num_inputs // group_size)
    scale = (1 + noise(num_outputs, num_groups, seed=1).abs()) / 4
    minimum = noise(num_outputs, num_groups, seed=2)
    group_of = torch.arange(num_inputs) // group_size
    weights = numbers * scale[:, group_of] + minimum[:, group_of]
    padded = torch.cat([numbers, numbers.new_zeros(num_outputs, num_inputs % 2)], dim=1)
    return padded[:, 0::2] | padded[:, 1::2] << 4, scale, minimum, weights


@triton.jit
def call_dequantize_tile(packed, scale, minimum, even, odd, DEQUANTIZE: tl.constexpr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    even_weights, odd_weights = DEQUANTIZE(tl.load(packed + places), tl.load(scale + places), tl.load(minimum + places))
    tl.store(even + places, even_weights)
    tl.store(odd + places, odd_weights)


@exercise("7.16", points=0, seconds=20)
class TestDequantizeTile:
    def check(self, code, first_byte, scale, minimum, what):
        packed = (torch.arange(256) + first_byte).to(torch.uint8).view(16, 16)
        got = [torch.full((16, 16), -7.0, device=DEVICE) for _ in range(2)]
        given = [each.to(DEVICE) for each in (packed, scale, minimum)]
        call_dequantize_tile[(1,)](*given, *got, DEQUANTIZE=code.dequantize_tile, SIZE=16)
        for result, numbers, name in zip(got, (packed % 16, packed // 16), ("even", "odd")):
            close(result, numbers * scale + minimum, f"the {name} weights of {what}", rtol=1e-5, atol=1e-5)

    def test_one_scale(self, code):
        scale, minimum = torch.full((16, 16), 0.5), torch.full((16, 16), -4.0)
        self.check(code, 0, scale, minimum, "all bytes, scale 0.5, minimum -4")

    def test_a_scale_for_each_pair(self, code):
        scale, minimum = noise(16, 16).abs(), noise(16, 16, seed=1)
        self.check(code, 128, scale, minimum, "all bytes, each with a scale and a minimum of its own")


@exercise("7.17", points=0, seconds=30)
class TestInt4Kernel:
    def check(
        self, code, num_tokens, num_outputs, num_inputs, group_size, what, extra=0, dtype=torch.float32, around=100.0
    ):
        packed, scale, minimum, weights = matrix(num_outputs, num_inputs, group_size)
        wide = noise(num_tokens, num_inputs + extra, seed=3).to(dtype)
        if around != 100:
            wide[:, num_inputs:] = around  # the row goes on, but it is no input
        out = within(torch.full((num_tokens, num_outputs), -7.0))
        code.int4_kernel[(triton.cdiv(num_tokens, 16), triton.cdiv(num_outputs, 16))](
            within(wide, around), within(packed), within(scale, around), within(minimum, around), out,
            num_tokens, num_outputs, num_inputs, wide.stride(0), scale.shape[1],
            GROUP_SIZE=group_size, TOKENS=16, OUTPUTS=16, PAIRS=16,
        )  # fmt: skip
        close(out, wide[:, :num_inputs].float() @ weights.T, what, rtol=1e-4, atol=1e-4)
        memory = torch.as_strided(out, (out.numel() + 2 * AROUND,), (1,), out.storage_offset() - AROUND)
        num_changed = int((torch.cat([memory[:AROUND], memory[-AROUND:]]) != 100).sum())
        holds(not num_changed, f"{what}: {num_changed} elements outside the result were written.", num_changed)

    def test_one_tile(self, code):
        self.check(code, 16, 16, 32, 32, "16 tokens, 16 outputs, 32 inputs in one group")

    def test_groups(self, code):
        self.check(code, 2, 16, 64, 8, "2 tokens, 16 outputs, 64 inputs in groups of 8")

    def test_parts_of_tiles(self, code):
        self.check(code, 3, 5, 44, 32, "3 tokens, 5 outputs, 44 inputs in groups of 32", extra=3)

    def test_several_tiles(self, code):
        self.check(code, 18, 35, 70, 16, "18 tokens, 35 outputs, 70 inputs in groups of 16")

    def test_an_odd_number_of_inputs(self, code):
        self.check(code, 1, 17, 37, 32, "a token, 17 outputs, 37 inputs in groups of 32")

    def test_nan_after_the_inputs(self, code):
        for num_inputs in (24, 21):
            what = f"2 tokens, 3 outputs, {num_inputs} inputs in groups of 8; NaN follows them"
            self.check(code, 2, 3, num_inputs, 8, what, extra=2, around=torch.nan)

    def test_16_bits(self, code):
        self.check(code, 2, 16, 48, 16, "2 tokens in float16, 16 outputs, 48 inputs", dtype=torch.float16)


@together(seconds=60)
class TestTogether:
    """Your whole file, beside the rest of lesson 7."""

    def test_a_quantized_matrix(self, code):
        from solutions.quantization import dequantize_int4, pack_int4, quantize_int4

        weight, x = noise(20, 48, seed=1), noise(3, 48, seed=2)
        for symmetric in (True, False):
            numbers, scale, minimum = quantize_int4(weight, 32, symmetric)
            expected = x @ dequantize_int4(numbers, scale.float(), minimum.float(), 32).T
            given = [each.to(DEVICE) for each in (x, pack_int4(numbers), scale)]
            got = code.int4_matmul(*given, None if symmetric else minimum.to(DEVICE), 32)
            close(got, expected, f"int4_matmul, symmetric={symmetric}", rtol=1e-4, atol=1e-4)
