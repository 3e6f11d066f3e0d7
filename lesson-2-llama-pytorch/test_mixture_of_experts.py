"""The checks of lesson 2's optional module. Small cases are worked by hand, larger ones by plain loops over tokens."""

from __future__ import annotations

import torch
from torch import nn

from common.grading import close, equal, exercise, holds, together


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("2.18", points=0)
class TestRoute:
    # Probabilities 0.1, 0.4, 0.2, 0.3 and 0.4, 0.1, 0.3, 0.2.
    SCORES = torch.tensor([[1.0, 4.0, 2.0, 3.0], [4.0, 1.0, 3.0, 2.0]]).log() + 7

    def test_by_hand(self, code):
        weights, chosen = code.route(self.SCORES, 2, False)
        equal(
            chosen.tolist(), [[1, 3], [0, 2]], "the experts of two tokens, with probabilities 0.1 0.4 0.2 0.3 and ..."
        )
        close(weights, torch.tensor([[0.4, 0.3], [0.4, 0.3]]), "their weights, without norm_topk_prob,")

    def test_normalised(self, code):
        weights, chosen = code.route(self.SCORES, 2, True)
        equal(chosen.tolist(), [[1, 3], [0, 2]], "the experts of two tokens, with norm_topk_prob,")
        close(weights, torch.tensor([[4 / 7, 3 / 7]] * 2), "weights of 0.4 and 0.3, with norm_topk_prob,")
        weights, _ = code.route(self.SCORES, 1, True)
        close(weights, torch.ones(2, 1), "the weight of a single expert, with norm_topk_prob,")

    def test_all_experts(self, code):
        weights, chosen = code.route(noise(3, 5), 5, False)
        close(weights.sum(-1), torch.ones(3), "the sum of the weights, if a token has all 5 of 5 experts,")
        equal(chosen.sort().values.tolist(), [list(range(5))] * 3, "the experts, sorted, if a token has all 5 of 5,")

    def test_sixteen_bits(self, code):
        scores = noise(4, 64, seed=1).bfloat16()
        weights, _ = code.route(scores, 8, True)
        p = scores.float().softmax(-1).topk(8).values
        close(weights, (p / p.sum(-1, keepdim=True)).bfloat16(), "the weights of 8 of 64 experts for bfloat16 scores")

    def test_double(self, code):
        scores = noise(3, 6, seed=2).double()
        weights, _ = code.route(scores, 2, False)
        close(weights, scores.softmax(-1).topk(2).values, "the weights of 2 of 6 experts for float64 scores")


def choices(chosen: torch.Tensor) -> dict[int, tuple[list[int], list[int]]]:
    """What `tokens_by_expert` returns, by plain loops and as lists."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for token, experts in enumerate(chosen.tolist()):
        for place, expert in enumerate(experts):
            tokens, places = found.setdefault(expert, ([], []))
            tokens.append(token)
            places.append(place)
    return found


@exercise("2.19", points=0)
class TestTokensByExpert:
    def check(self, code, chosen: torch.Tensor, what: str):
        found = code.tokens_by_expert(chosen)
        holds(isinstance(found, dict), f"tokens_by_expert returns a {type(found).__name__}, and not a dict.", found)
        kinds = sorted({type(expert).__name__ for expert in found})
        equal(kinds, ["int"], f"the types of the keys of tokens_by_expert of {what}")
        plain = {expert: (tokens.tolist(), places.tolist()) for expert, (tokens, places) in found.items()}
        equal(plain, choices(chosen), f"tokens_by_expert of {what}")

    def test_by_hand(self, code):
        self.check(code, torch.tensor([[1, 3], [0, 3]]), "[[1, 3], [0, 3]]")
        self.check(code, torch.tensor([[2], [2], [2]]), "[[2], [2], [2]]")
        self.check(code, torch.tensor([[5, 0, 9]]), "[[5, 0, 9]], a single token's,")

    def test_no_expert_that_no_token_chose(self, code):
        found = code.tokens_by_expert(torch.tensor([[0, 4], [4, 1]]))
        equal(sorted(found), [0, 1, 4], "the experts of tokens_by_expert of [[0, 4], [4, 1]]")

    def test_many(self, code):
        chosen = noise(40, 12, seed=3).topk(3).indices
        self.check(code, chosen, "3 of 12 experts for each of 40 tokens")


class Expert:
    """An expert that notes what it is called with. It multiplies by `factor` and adds `shift`."""

    def __init__(self, factor: float, shift: float = 0.0):
        self.factor, self.shift, self.calls = factor, shift, []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(x.clone())
        return x * self.factor + self.shift


@exercise("2.20", points=0)
class TestMixExperts:
    def test_by_hand(self, code):
        x = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
        weights, chosen = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 2], [2, 1]])
        experts = [Expert(2.0), Expert(-1.0), Expert(0.0, 4.0)]
        found = code.mix_experts(x, weights, chosen, experts)
        expected = torch.tensor([[0.75 * 2 + 1, 0.75 * 4 + 1], [2 - 5, 2 - 10]])
        close(found, expected, "two tokens, each with two of the experts 2x, -x and 4,")

    def test_the_input_is_left_alone(self, code):
        x = noise(3, 4)
        before = x.clone()
        code.mix_experts(x, torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long), [Expert(2.0)])
        close(x, before, "the input x, after mix_experts,")

    def test_each_expert_is_called_once_with_its_tokens(self, code):
        x, chosen = noise(6, 4, seed=1), torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 3], [3, 1]])
        experts = [Expert(1.0) for _ in range(5)]
        code.mix_experts(x, torch.full((6, 2), 0.5), chosen, experts)
        equal([len(each.calls) for each in experts], [1, 1, 0, 1, 0], "how often each of 5 experts is called")
        for number, (tokens, _) in choices(chosen).items():
            close(experts[number].calls[0], x[tokens], f"what expert {number} is called with")

    def test_against_a_loop(self, code):
        x, scores = noise(9, 4, seed=2).double(), noise(9, 6, seed=3)
        weights, chosen = scores.softmax(-1).topk(3)
        weights = weights.double()
        experts = [Expert(i - 2.5, i / 7) for i in range(6)]
        expected = torch.zeros_like(x)
        for token in range(9):
            for weight, expert in zip(weights[token], chosen[token].tolist()):
                expected[token] += weight * (x[token] * (expert - 2.5) + expert / 7)
        close(code.mix_experts(x, weights, chosen, experts), expected, "9 tokens, each with 3 of 6 experts,")

    def test_the_dtype_of_x(self, code):
        x = noise(2, 4).bfloat16()
        weights, chosen = torch.ones(2, 1, dtype=torch.bfloat16), torch.tensor([[1], [0]])
        expected = torch.stack([x[0] * 3, x[1] * 2])
        found = code.mix_experts(x, weights, chosen, [Expert(2.0), Expert(3.0)])
        close(found, expected, "two tokens in bfloat16, with the experts 3x and 2x,")


@exercise("2.21", points=0)
class TestExpertsRead:
    def test_one_token(self, code):
        close(code.experts_read(128, 8, 1), 8.0, "experts_read(128, 8, 1)")
        close(code.experts_read(6, 6, 3), 6.0, "experts_read(6, 6, 3), where each token chooses all")

    def test_by_hand(self, code):
        # A given expert is missed by a token with probability 1/2, by both with 1/4.
        close(code.experts_read(4, 2, 2), 3.0, "experts_read(4, 2, 2)")
        close(code.experts_read(10, 1, 3), 10 * (1 - 0.9**3), "experts_read(10, 1, 3)")

    def test_many_tokens(self, code):
        close(code.experts_read(128, 8, 16), 128 * (1 - 0.9375**16), "experts_read(128, 8, 16)")
        holds(code.experts_read(64, 8, 10_000) <= 64, "experts_read(64, 8, 10000) is more than the 64 that there are.")


@together()
class TestTogether:
    """Your whole file: a block with a router, against a loop over tokens."""

    def test_a_block(self, code):
        torch.manual_seed(0)
        gate, experts = nn.Linear(8, 5, bias=False), [nn.Linear(8, 8) for _ in range(5)]
        block, x = code.SparseMoeBlock(gate, experts, 2, True), noise(7, 8)
        expected = torch.zeros(7, 8)
        with torch.no_grad():
            for token in range(7):
                scores = gate(x[token])
                best = scores.argsort(descending=True)[:2]
                for weight, number in zip(scores[best].softmax(-1), best.tolist()):
                    expected[token] += weight * experts[number](x[token])
            close(block(x), expected, "SparseMoeBlock of 7 tokens, with 2 of 5 experts each,")
