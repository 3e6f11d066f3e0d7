"""The checks of lesson 8's first file. Most are worked by hand. What is drawn is checked where there is only one thing
to draw, and then by how often each token comes, over seeds that are always the same.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from common.grading import close, equal, exercise, holds, together
from common.grading.compare import CheckFailed


def answer(code, what: str, call: Callable):
    """The result of a call. If it raises an error, the sentence says which call it was and on which line."""
    try:
        return call()
    except NotImplementedError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = ([frame for frame in frames if frame.filename == code.__file__] or frames)[-1]
        text = ": ".join([type(error).__name__, *str(error).strip().rstrip(".").splitlines()[:1]])
        sentence = f"{what} raised {text}, at line {place.lineno}: `{place.line}`."
        raise CheckFailed(sentence, what, None).with_traceback(error.__traceback__) from None


# --- Draft tokens from the text, and their verification ---------------------------------------------------------------


@exercise("8.1", points=2)
class TestProposeNgram:
    def check(self, code, text: list[int], expected: list[int], *sizes: int) -> None:
        what = f"propose_ngram({text}, {', '.join(map(str, sizes))})"
        equal(answer(code, what, lambda: code.propose_ngram(list(text), *sizes)), expected, what)

    def test_what_followed(self, code):
        self.check(code, [5, 6, 7, 8, 9, 1, 5, 6], [7, 8, 9], 3)
        self.check(code, [1, 2, 3, 4, 9, 2, 3], [4, 9], 2)

    def test_the_copy_runs_into_itself(self, code):
        self.check(code, [1, 2, 1, 2], [1, 2, 1, 2, 1], 5)
        self.check(code, [4, 7, 7, 7], [7, 7, 7], 3)
        self.check(code, [3, 1, 2, 8, 1, 2], [8, 1, 2, 8], 4)

    def test_the_latest_place_counts(self, code):
        self.check(code, [1, 2, 3, 7, 1, 2, 4, 9, 1, 2], [4, 9], 2)

    def test_the_longest_ending_counts(self, code):
        self.check(code, [7, 6, 1, 2, 3, 9, 6, 1, 2, 4, 9, 1, 2, 5, 7, 6, 1, 2], [3], 1)
        self.check(code, [6, 1, 2, 3, 9, 5, 2, 4, 6, 1, 2], [3, 9], 2)
        self.check(code, [6, 1, 2, 3, 9, 5, 1, 2, 4, 6, 1, 2], [3, 9], 2)

    def test_how_long_an_ending_may_be(self, code):
        text = [2, 3, 4, 5, 7, 1, 2, 3, 4, 5, 8, 0, 2, 3, 4, 5, 9, 4, 5, 6, 1, 2, 3, 4, 5]
        self.check(code, text, [9], 1)
        self.check(code, text, [8], 1, 5)
        self.check(code, [6, 1, 2, 3, 9, 5, 1, 2, 4, 6, 1, 2], [4, 6], 2, 2)

    def test_one_token_is_too_little(self, code):
        self.check(code, [1, 2, 3, 1], [], 2)
        self.check(code, [1, 2, 3, 1], [2, 3], 2, 4, 1)
        self.check(code, [1, 2, 3, 9, 1, 2], [], 2, 4, 3)

    def test_nothing_found(self, code):
        for text in ([], [1], [1, 2], [1, 2, 3, 4, 5, 6]):
            self.check(code, text, [], 3)

    def test_all_but_one(self, code):
        self.check(code, [7, 7, 7], [7, 7], 2)

    def test_none_asked_for(self, code):
        self.check(code, [1, 2, 1, 2], [], 0)

    def test_the_text_is_left_alone(self, code):
        text = [1, 2, 1, 2]
        answer(code, "propose_ngram([1, 2, 1, 2], 3)", lambda: code.propose_ngram(text, 3))
        equal(text, [1, 2, 1, 2], "the list given to propose_ngram, which must not change it,")


@exercise("8.2")
class TestVerifyGreedy:
    def check(self, code, chosen: list[int], drafts: list[int], expected: list[int]) -> None:
        got = code.verify_greedy(iter(chosen), drafts)
        equal(got, expected, f"verify_greedy with the choices {chosen} and the draft tokens {drafts}")

    def test_the_first_wrong_draft_token_ends_it(self, code):
        self.check(code, [11, 12, 13, 14], [11, 7, 13], [11, 12])
        self.check(code, [11, 12, 13, 14], [7, 12, 13], [11])

    def test_all_right_and_one_more(self, code):
        self.check(code, [11, 12, 13, 14], [11, 12, 13], [11, 12, 13, 14])

    def test_no_draft_tokens(self, code):
        self.check(code, [11], [], [11])

    def test_token_0(self, code):
        self.check(code, [0, 0, 5], [0, 0], [0, 0, 5])
        self.check(code, [5, 0, 3], [0, 0], [5])

    def test_asked_only_as_far_as_needed(self, code):
        for chosen, drafts, expected in (([11, 12, 13, 14], [11, 7, 13], [11, 12]), ([11, 12, 13], [7, 8], [11])):
            asked = []
            got = code.verify_greedy((asked.append(each) or each for each in chosen), drafts)
            what = f"(tokens, choices consumed) with the choices {chosen} and the draft tokens {drafts}"
            equal((got, asked), (expected, expected), what)


# --- One sequence -----------------------------------------------------------------------------------------------------


def tiny(code, seed: int = 3, num_layers: int = 2, positions: int = 64):
    """A random model in float64, in which no two tokens are equally likely."""
    config = code.llama_pytorch.ModelConfig(
        vocab_size=30, hidden_size=12, intermediate_size=20, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=positions,
    )  # fmt: skip
    model = code.Llama(config).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.1 + 0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.requires_grad_(False)


PROMPT = [3, 14, 15, 9, 2, 6]


@exercise("8.3", points=3)
class TestLookaheadCommit:
    def lookahead(self, code, drafts: list[int]):
        """A Lookahead that has computed the prompt and these draft tokens after it."""
        own = code.Lookahead(tiny(code), 40, lambda token_ids: list(drafts))
        answer(code, "next_logits, in its first call of commit,", lambda: own.next_logits(list(PROMPT)))
        return own

    def check(self, code, drafts: list[int], text: list[int], what: str) -> None:
        """A text that continues as proposed: its logits are in `rows`."""
        own = self.lookahead(code, drafts)
        got = answer(code, f"commit, {what},", lambda: own.commit(text))
        holds(got is not None, f"commit returned None {what}. It should return the logits in `rows`.", actual="None")
        close(got, code.llama_pytorch.recompute(tiny(code), text), f"the logits that commit returns {what},")

    def no_logits(self, got, what: str) -> None:
        sentence = f"commit returned logits {what}. It should return None: none were computed for this text."
        holds(got is None, sentence, actual=got)

    def refused(self, code, drafts: list[int], text: list[int], kept: list[int], what: str) -> None:
        """A text whose last token is not its draft token: there are no logits, and the cache is cut back."""
        own = self.lookahead(code, drafts)
        got = answer(code, f"commit, {what},", lambda: own.commit(text))
        self.no_logits(got, what)
        equal(own.cache.num_tokens, len(kept), f"the number of tokens in the cache {what},")
        equal(own.cached_token_ids, kept, f"cached_token_ids {what},")

    def test_the_first_call(self, code):
        own = code.Lookahead(tiny(code), 40, lambda token_ids: [])
        what = "in the first call, with an empty cache"
        got = answer(code, f"commit, {what},", lambda: own.commit(list(PROMPT)))
        holds(
            got is None,
            f"commit returned something {what}. It should return None: there are no logits yet.",
            actual=got,
        )
        equal(own.cache.num_tokens, 0, f"the number of tokens in the cache {what},")
        equal(list(own.cached_token_ids), [], f"cached_token_ids {what},")

    def test_as_proposed(self, code):
        self.check(code, [21, 22, 23], [*PROMPT, 21], "where 21, 22, 23 were proposed and the new token is 21")

    def test_the_text_is_a_tuple(self, code):
        what = "for a text that is a tuple, where 21, 22, 23 were proposed and the new token is 21"
        self.check(code, [21, 22, 23], (*PROMPT, 21), what)
        what = "for a text that is a tuple, where 21, 22, 23 were proposed and the new token is 7"
        self.refused(code, [21, 22, 23], (*PROMPT, 7), PROMPT, what)

    def test_all_as_proposed(self, code):
        own = self.lookahead(code, [21, 22, 23])
        for i, text in enumerate(([*PROMPT, 21], [*PROMPT, 21, 22], [*PROMPT, 21, 22, 23])):
            got = own.commit(text)
            what = f"where 21, 22, 23 were proposed and the text continues with the first {i + 1} of them"
            holds(
                got is not None, f"commit returned None {what}. It should return the logits in `rows`.", actual="None"
            )
            close(got, code.llama_pytorch.recompute(tiny(code), text), f"the logits that commit returns {what},")
        equal(
            own.cache.num_tokens,
            9,
            "the number of tokens in the cache, where all three draft tokens after 6 tokens were right,",
        )

    def test_not_as_proposed(self, code):
        what = "where 21, 22, 23 were proposed and the new token is 7"
        self.refused(code, [21, 22, 23], [*PROMPT, 7], PROMPT, what)

    def test_the_second_is_not_as_proposed(self, code):
        own = self.lookahead(code, [21, 22, 23])
        own.commit([*PROMPT, 21])
        got = own.commit([*PROMPT, 21, 7])
        what = "where 21, 22, 23 were proposed and the text continues with 21 and 7"
        self.no_logits(got, what)
        equal(own.cache.num_tokens, 7, f"the number of tokens in the cache {what},")
        equal(list(own.cached_token_ids), [*PROMPT, 21], f"cached_token_ids {what},")

    def test_the_same_token_in_another_place(self, code):
        what = "where 21, 22, 23 were proposed and the new token is 22"
        self.refused(code, [21, 22, 23], [*PROMPT, 22], PROMPT, what)

    def test_no_draft_token_for_it(self, code):
        self.refused(code, [], [*PROMPT, 7], PROMPT, "where nothing was proposed and the new token is 7")

    def test_one_more_than_was_proposed(self, code):
        own = self.lookahead(code, [21, 22])
        for text in ([*PROMPT, 21], [*PROMPT, 21, 22]):
            own.commit(text)
        got = own.commit([*PROMPT, 21, 22, 7])
        what = "where 21, 22 were proposed and the text continues with 21, 22 and 7"
        self.no_logits(got, what)
        equal(own.cache.num_tokens, 8, f"the number of tokens in the cache {what},")

    def test_the_same_logits_in_fewer_passes(self, code):
        """A whole text, token by token, with draft tokens that are right twice, then wrong."""
        text = [*PROMPT, 8, 1, 28, 4, 11, 19, 5, 5, 27, 10]

        def propose(token_ids):
            following = text[len(token_ids) : len(token_ids) + 2]
            return [*following, 29, 29]

        own = code.Lookahead(tiny(code), 40, propose)
        for length in range(len(PROMPT), len(text)):
            what = f"the logits after {length} tokens, where two of each four draft tokens are right,"
            got = answer(code, what, lambda known=text[:length]: own.next_logits(known))
            close(got, code.llama_pytorch.recompute(own.model, text[:length]), what)
        equal(own.num_passes, 4, "the number of passes for 10 tokens, where two of each four draft tokens are right,")


# --- Draft tokens that were sampled -----------------------------------------------------------------------------------


def drawn(code, target: list[float], draft: list[float], token_id: int, number: int) -> list[tuple[bool, int]]:
    """The results of accept_or_recover with the seeds 0 to number - 1."""
    tensors = torch.tensor(target), torch.tensor(draft)
    found = []
    what = f"accept_or_recover(target={target}, draft={draft}, token_id={token_id})"
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        got = answer(code, what, lambda own=generator: code.accept_or_recover(*tensors, token_id, own))
        holds(
            isinstance(got, tuple) and len(got) == 2,
            f"accept_or_recover returned {got!r}, expected a pair (whether the token was accepted, token id).",
        )
        kind = type(got[1]).__name__
        holds(isinstance(got[1], int), f"accept_or_recover returned the token id as a {kind}, expected an int.", kind)
        found.append((bool(got[0]), int(got[1])))
    return found


@exercise("8.4", points=3, seconds=30)
class TestAcceptOrRecover:
    def outcomes(self, code, target, draft, token_id, expected, why: str) -> None:
        got = sorted(set(drawn(code, target, draft, token_id, 150)))
        what = f"the different results (accepted, token) of 150 calls with target {target}, draft {draft}, "
        what += f"token_id {token_id} ({why})"
        equal(got, expected, what)

    def test_possible_results(self, code):
        """The four kinds: the draft token, one with equal probabilities, one that is missing, one of only the draft."""
        why = "it is accepted with probability 0.1 / 0.5; otherwise only 2 is missing"
        self.outcomes(code, [0.1, 0.3, 0.6, 0.0], [0.5, 0.3, 0.1, 0.1], 0, [(False, 2), (True, 0)], why)

    def test_accepted_where_the_target_has_more(self, code):
        self.outcomes(code, [0.9, 0.1], [0.1, 0.9], 0, [(True, 0)], "0.9 / 0.1 is above 1, so it is always accepted")
        self.outcomes(
            code, [0.25, 0.75], [0.25, 0.75], 0, [(True, 0)], "both distributions are equal, so it is always accepted"
        )

    def test_never_accepted_where_the_target_has_0(self, code):
        self.outcomes(
            code,
            [0.0, 1.0],
            [0.5, 0.5],
            0,
            [(False, 1)],
            "token 0 has probability 0 in the target, so it is never accepted",
        )

    def test_only_what_is_missing_is_drawn(self, code):
        self.outcomes(
            code,
            [0.0, 0.5, 0.5, 0.0],
            [0.5, 0.5, 0.0, 0.0],
            0,
            [(False, 2)],
            "token 1 is as likely in the draft as in the target, so only 2 is missing",
        )
        self.outcomes(
            code,
            [0.0, 0.2, 0.4, 0.4],
            [0.4, 0.6, 0.0, 0.0],
            0,
            [(False, 2), (False, 3)],
            "token 1 is too likely in the draft already, so only 2 and 3 are missing",
        )
        why = "only 0 is missing, even if only 0.0005"
        self.outcomes(code, [0.5005, 0.4995, 0.0], [0.5, 0.4995, 0.0005], 2, [(False, 0)], why)

    def test_nothing_is_missing(self, code):
        """The target does not sum to 1: the token may be rejected although nothing is missing from any other."""
        target, draft = [0.3, 0.0, 0.3, 0.0], [0.4, 0.0, 0.3, 0.5]
        tokens = sorted({token for _, token in drawn(code, target, draft, 0, 100)})
        sentence = (
            f"Token 3 was drawn, which has probability 0 in the target {target} (draft {draft}, nothing is missing)."
        )
        holds(3 not in tokens, sentence, actual=tokens)

    def test_a_token_of_small_probability(self, code):
        self.outcomes(
            code,
            [0.0001, 0.9999],
            [0.0005, 0.9995],
            0,
            [(False, 1), (True, 0)],
            "it is accepted with probability 0.0001 / 0.0005",
        )
        kept = sum(is_kept for is_kept, _ in drawn(code, [0.0003, 0.9997], [0.0006, 0.9994], 0, 300)) / 300
        close(
            kept,
            0.5,
            "the share of 300 calls that accept token 0, target [0.0003, ...], draft [0.0006, ...],",
            atol=0.12,
        )

    def test_the_arguments_are_left_alone(self, code):
        target, draft = torch.tensor([0.2, 0.3, 0.5, 0.1]), torch.tensor([0.8, 0.1, 0.1, 0.1])
        before = target.clone(), draft.clone()
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            what = "accept_or_recover, called ten times with the same two tensors,"
            answer(code, what, lambda own=generator: code.accept_or_recover(target, draft, 0, own))
        equal(target.tolist(), before[0].tolist(), "the argument target, which must not change,")
        equal(draft.tolist(), before[1].tolist(), "the argument draft, which must not change,")

    def test_nothing_is_drawn_without_the_generator(self, code):
        target, draft = [0.2, 0.3, 0.5], [0.8, 0.1, 0.1]
        first, again = (drawn(code, target, draft, 0, 40) for _ in range(2))
        what = "the results of 40 calls, repeated with generators in the same states,"
        equal(again, first, what)

    def test_one_generator_for_many_calls(self, code):
        """Each call advances the generator, so the next call draws other numbers."""
        target, draft, own = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.8, 0.1, 0.1]), torch.Generator()
        own.manual_seed(0)
        what = "100 calls with one generator, target [0.2, 0.3, 0.5], draft [0.8, 0.1, 0.1], token_id 0"
        got = sorted({answer(code, what, lambda: code.accept_or_recover(target, draft, 0, own)) for _ in range(100)})
        equal(got, [(False, 1), (False, 2), (True, 0)], f"the different results (accepted, token) of {what}")

    def test_how_often_it_is_accepted(self, code):
        target, draft = [0.5, 0.2, 0.3, 0.0], [0.1, 0.5, 0.4, 0.0]
        for token_id, expected in ((1, 0.4), (2, 0.75)):
            kept = sum(is_kept for is_kept, _ in drawn(code, target, draft, token_id, 500)) / 500
            what = f"the share of 500 calls that accept token {token_id}, target {target}, draft {draft},"
            close(kept, expected, what, atol=0.09)

    def test_what_is_drawn_in_its_place(self, code):
        target, draft = [0.0, 0.5, 0.35, 0.15], [0.7, 0.2, 0.05, 0.05]
        replaced = [token for _, token in drawn(code, target, draft, 0, 600)]
        shares = torch.tensor([replaced.count(token) / 600 for token in range(4)])
        what = f"the share of each token among 600 replacements of token 0, target {target}, draft {draft},"
        close(shares, torch.tensor([0.0, 0.3, 0.3, 0.1]) / 0.7, what, atol=0.08)

    def test_distributed_as_the_target(self, code):
        """Every token that the draft may propose, as often as it proposes it."""
        target, draft = [0.4, 0.3, 0.05, 0.25], [0.1, 0.4, 0.4, 0.1]
        shares = torch.zeros(4)
        for token_id, probability in enumerate(draft):
            for _, token in drawn(code, target, draft, token_id, 300):
                shares[token] += probability / 300
        what = f"the share of each token in all results for draft tokens drawn from {draft}, target {target},"
        close(shares, torch.tensor(target), what, atol=0.08)


def sure(*token_ids: int) -> torch.Tensor:
    """Rows that give these tokens, of five, the probability 1."""
    return torch.eye(5)[list(token_ids)]


@exercise("8.5", points=3, seconds=30)
class TestRejectionSample:
    def sampled(self, code, target, draft, draft_token_ids: list[int], seed: int = 0) -> list[int]:
        def generator(i: int) -> torch.Generator:
            return code.llama_pytorch.draw_generator(seed, i)

        what = f"rejection_sample with draft tokens {draft_token_ids}"
        return answer(code, what, lambda: code.rejection_sample(target, draft, draft_token_ids, generator))

    def test_all_kept_and_the_bonus(self, code):
        got = self.sampled(code, sure(1, 2, 3, 4), sure(1, 2, 3), [1, 2, 3])
        what = "the tokens for draft tokens 1, 2, 3, where the target's rows are certain of 1, 2, 3, 4"
        equal(got, [1, 2, 3, 4], what)

    def test_the_first_that_is_not_kept_ends_it(self, code):
        got = self.sampled(code, sure(1, 4, 3, 2), sure(1, 2, 3), [1, 2, 3])
        equal(got, [1, 4], "the tokens for draft tokens 1, 2, 3, where the target's rows are certain of 1, 4, 3, 2")
        got = self.sampled(code, sure(4, 2, 3, 1), sure(1, 2, 3), [1, 2, 3])
        equal(got, [4], "the tokens for draft tokens 1, 2, 3, where the target's rows are certain of 4, 2, 3, 1")
        got = self.sampled(code, sure(1, 2, 0, 4), sure(1, 2, 3), [1, 2, 3])
        equal(got, [1, 2, 0], "the tokens for draft tokens 1, 2, 3, where the target's rows are certain of 1, 2, 0, 4")

    def test_no_draft_tokens(self, code):
        got = self.sampled(code, sure(3), torch.empty(0, 5), [])
        equal(got, [3], "the tokens without draft tokens, where the target's row is certain of 3")
        target = torch.tensor([[0.0, 0.0, 0.6, 0.4, 0.0]])
        got = sorted({tuple(self.sampled(code, target, torch.empty(0, 5), [], seed)) for seed in range(60)})
        what = "the different results of 60 calls without draft tokens, where the target has 0.6 for 2 and 0.4 for 3"
        equal(got, [(2,), (3,)], what)

    def test_token_0(self, code):
        got = self.sampled(code, sure(0, 0, 3), sure(0, 0), [0, 0])
        equal(got, [0, 0, 3], "the tokens for draft tokens 0, 0, where the target's rows are certain of 0, 0, 3")
        got = self.sampled(code, sure(0, 4, 3), sure(1, 2), [1, 2])
        equal(got, [0], "the tokens for draft tokens 1, 2, where the target's rows are certain of 0, 4, 3")

    def test_the_arguments_are_left_alone(self, code):
        target, draft, ids = 2 * sure(1, 2, 3), 2 * sure(1, 4), [1, 4]
        before = target.clone(), draft.clone()
        self.sampled(code, target, draft, ids)
        equal(target.tolist(), before[0].tolist(), "the argument target, which must not change,")
        equal(draft.tolist(), before[1].tolist(), "the argument draft, which must not change,")
        equal(ids, [1, 4], "the argument draft_token_ids, which must not change,")

    def test_the_draft_of_the_same_place(self, code):
        """In the draft the second draft token has probability 1, and the first 0.2."""
        target = torch.stack([torch.full((5,), 0.2), torch.tensor([0.0, 0.0, 0.2, 0.8, 0.0]), sure(4)[0]])
        draft = torch.stack([torch.tensor([0.1, 0.2, 0.4, 0.1, 0.2]), sure(2)[0]])
        kept = sum(self.sampled(code, target, draft, [1, 2], seed) == [1, 2, 4] for seed in range(200))
        what = "the share of 200 calls that accept the second draft token, with 0.2 in the target and 1 in the draft,"
        close(kept / 200, 0.2, what, atol=0.12)

    def test_the_bonus_is_drawn(self, code):
        target = torch.stack([sure(1)[0], torch.tensor([0.0, 0.0, 0.6, 0.4, 0.0])])
        got = sorted({tuple(self.sampled(code, target, sure(1), [1], seed)) for seed in range(60)})
        what = "the different results of 60 calls for draft token 1, where the last row has 0.6 for 2 and 0.4 for 3"
        equal(got, [(1, 2), (1, 3)], what)

    def test_the_bonus_is_distributed_as_the_last_row(self, code):
        target = torch.stack([sure(1)[0], torch.tensor([0.0, 0.0, 0.6, 0.4, 0.0])])
        draft = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]])
        count = sum(self.sampled(code, target, draft, [1], seed) == [1, 2] for seed in range(200))
        what = "the share of 200 calls whose bonus token is 2, where the last row has 0.6 for 2 and 0.4 for 3,"
        close(count / 200, 0.6, what, atol=0.12)

    def test_each_place_has_its_own_randomness(self, code):
        asked = []

        def generator(i: int) -> torch.Generator:
            asked.append(i)
            return code.llama_pytorch.draw_generator(0, i)

        got = code.rejection_sample(sure(1, 2, 3, 4), sure(1, 2, 3), [1, 2, 3], generator)
        what = "(tokens, arguments of `generator`), where three draft tokens are accepted and a bonus token is drawn,"
        equal((got, asked), ([1, 2, 3, 4], [0, 1, 2, 3]), what)

    def test_distributed_as_the_target(self, code):
        """Pairs of tokens in which the second depends on the first; the draft has other probabilities."""
        first, then = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.1, 0.6, 0.3], [0.7, 0.1, 0.2], [0.3, 0.3, 0.4]])
        first_draft, next_draft = (
            torch.tensor([0.2, 0.3, 0.5]),
            torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]),
        )
        shares = torch.zeros(3, 3)
        for one in range(3):
            for two in range(3):
                weight = first_draft[one] * next_draft[one, two] / 150
                target = torch.stack([first, then[one], then[two]])
                draft = torch.stack([first_draft, next_draft[one]])
                for seed in range(150):
                    tokens = self.sampled(code, target, draft, [one, two], 1000 * (3 * one + two) + seed)
                    holds(tokens, "rejection_sample returned no token; it must return at least one.", actual=[])
                    if len(tokens) > 1:
                        shares[tokens[0], tokens[1]] += weight
                    else:
                        shares[tokens[0]] += weight * then[tokens[0]]
        expected = first[:, None] * then
        close(
            shares,
            expected,
            "the share of each pair of tokens, where the draft has other probabilities than the target,",
            atol=0.07,
        )


# --- Does it pay? -----------------------------------------------------------------------------------------------------


@exercise("8.6")
class TestExpectedTokens:
    def check(self, code, rate: float, num_draft_tokens: int, expected: float) -> None:
        what = f"expected_tokens({rate}, {num_draft_tokens})"
        close(answer(code, what, lambda: code.expected_tokens(rate, num_draft_tokens)), expected, what)

    def test_by_hand(self, code):
        self.check(code, 0.5, 2, 1.75)
        self.check(code, 0.8, 4, 3.3616)

    def test_no_draft_tokens(self, code):
        self.check(code, 0.7, 0, 1.0)

    def test_never_and_always_right(self, code):
        self.check(code, 0.0, 5, 1.0)
        self.check(code, 1.0, 3, 4.0)
        self.check(code, 1.0, 0, 1.0)

    def test_by_enumeration(self, code):
        """All eight cases of three draft tokens, right or wrong, and the number of tokens of each."""
        rate, total = 0.6, 0.0
        for run in range(8):
            is_right = [bool(run >> i & 1) for i in range(3)]
            chance, first_wrong = 1.0, [*is_right, False].index(False)
            for each in is_right:
                chance *= rate if each else 1 - rate
            total += chance * (first_wrong + 1)
        what = "expected_tokens(0.6, 3), compared with the mean over all eight cases,"
        close(code.expected_tokens(rate, 3), total, what)


@exercise("8.7")
class TestChooseK:
    def check(self, code, rate: float, seconds: list[float], expected: int, why: str) -> None:
        equal(code.choose_k(rate, seconds), expected, f"choose_k({rate}, {seconds}) ({why})")

    def test_by_hand(self, code):
        self.check(code, 0.5, [10.0, 12.0, 15.0, 17.5], 1, "0.1, 0.125, 0.117 and 0.107 tokens a second")
        self.check(code, 0.5, [10.0, 12.0, 13.0, 17.5], 2, "0.1, 0.125, 0.135 and 0.107 tokens a second")
        self.check(code, 0.9, [10.0, 11.0, 12.0, 13.0], 3, "0.1, 0.173, 0.226 and 0.265 tokens a second")

    def test_a_small_difference(self, code):
        self.check(code, 0.5, [20.0, 24.0, 27.9], 2, "0.05, 0.0625 and 0.0627 tokens a second")

    def test_many(self, code):
        seconds = [10.0 + k for k in range(13)]
        self.check(code, 1.0, seconds, 12, "0.1 and 0.18 tokens a second, and more with each further k")

    def test_the_seconds_are_left_alone(self, code):
        seconds = [10.0, 30.0, 9.0]
        code.choose_k(0.5, seconds)
        equal(seconds, [10.0, 30.0, 9.0], "the argument seconds, which must not change,")

    def test_any_step_times(self, code):
        why = "0.1, 0.05, 0.194, 0.197, 0.194 and 0.164 tokens a second"
        self.check(code, 0.5, [10.0, 30.0, 9.0, 9.5, 10.0, 12.0], 3, why)

    def test_none_where_it_does_not_pay(self, code):
        self.check(code, 0.0, [10.0, 10.5, 11.0], 0, "no draft token is ever accepted")
        self.check(code, 0.2, [10.0, 13.0, 16.0], 0, "0.1, 0.092 and 0.078 tokens a second")

    def test_of_equals_the_smallest(self, code):
        self.check(code, 0.0, [2.0, 2.0, 2.0, 3.0], 0, "0.5 tokens a second, and less with k = 3")
        self.check(code, 1.0, [1.0, 2.0, 3.0, 4.0], 0, "1 token a second with each k")
        self.check(code, 1.0, [8.0, 2.0, 3.0], 1, "0.125, 1 and 1 tokens a second")

    def test_a_step_that_is_slow_with_few_draft_tokens(self, code):
        self.check(code, 1.0, [1.0, 8.0, 2.0], 2, "1, 0.25 and 1.5 tokens a second")

    def test_one_choice(self, code):
        self.check(code, 0.9, [3.0], 0, "k = 0 is the only one")


@exercise("8.8", points=2)
class TestAcceptanceObserve:
    def check(self, code, runs: list[tuple[int, int]], right: float, tried: float) -> None:
        own = code.Acceptance()
        for num_draft_tokens, num_accepted in runs:
            own.observe(num_draft_tokens, num_accepted)
        what = "the rate (1 / 2 at first) after " + ", then ".join(
            f"observe({drafts}, {accepted})" for drafts, accepted in runs
        )
        close(own.rate, right / tried, what)

    def test_one_draft_token_a_step(self, code):
        self.check(code, [(1, 1)], 1 * 0.9 + 1, 2 * 0.9 + 1)
        self.check(code, [(1, 0)], 1 * 0.9, 2 * 0.9 + 1)

    def test_all_right(self, code):
        self.check(code, [(4, 4)], 0.9**4 + 4, 2 * 0.9**4 + 4)

    def test_the_first_is_wrong(self, code):
        self.check(code, [(4, 0)], 0.9, 2 * 0.9 + 1)

    def test_one_in_between_is_wrong(self, code):
        self.check(code, [(4, 1)], 0.9**2 + 1, 2 * 0.9**2 + 2)
        self.check(code, [(4, 3)], 0.9**4 + 3, 2 * 0.9**4 + 4)

    def test_newer_ones_weigh_more(self, code):
        self.check(code, [(2, 2), (3, 1)], 0.9**4 + 2 * 0.9**2 + 1, 2 * 0.9**4 + 2 * 0.9**2 + 2)

    def test_no_draft_tokens(self, code):
        self.check(code, [(0, 0)], 1, 2)

    def test_a_long_run(self, code):
        """Runs of four draft tokens, each accepted with probability 0.75 if those before it were."""
        own, generator = code.Acceptance(), torch.Generator().manual_seed(0)
        rates = []
        for step in range(600):
            run = torch.rand(4, generator=generator) < 0.75
            own.observe(4, [*run.tolist(), False].index(False))
            rates += [own.rate] if step >= 100 else []
        mean = sum(rates) / len(rates)
        close(
            mean,
            0.75,
            "the mean rate over 500 steps with four draft tokens, each accepted with probability 0.75,",
            atol=0.1,
        )


# --- What proposes ----------------------------------------------------------------------------------------------------


def scheduled(code, name: str, start: int, text: list[int], num_prompt: int, table: list[int], **params):
    """A request that computes its text from `start` on; the first `num_prompt` tokens are its prompt."""
    prompt, output = text[:num_prompt], text[num_prompt:]
    return code.ScheduledRequest(
        name, start, text[start:], 0, table, code.SamplingParams(**params), len(output), prompt, output, frozenset(), 50
    )


class Drafting:
    """A proposer with a tiny draft model and blocks of four; it records how many tokens each pass computes."""

    def __init__(self, code, num_blocks: int = 24, positions: int = 64):
        self.code = code
        self.model = tiny(code, 5, 1, positions)
        self.proposer = code.DraftProposer(self.model, code.PagedKVCache(self.model, num_blocks, 4))
        self.passes: list[int] = []
        self.model.register_forward_pre_hook(lambda module, arguments: self.passes.append(len(arguments[0])))
        self.compute, self.proposer.logits = self.proposer.logits, self.logits_of_new_tokens

    def logits_of_new_tokens(self, drafts, new_token_ids):
        """The proposer's `logits`, which cannot compute a draft without new tokens."""
        sentence = (
            "`logits` was called with no new token for a draft. Is `num_computed` too large, or was the draft token "
            "not appended to its `token_ids`?"
        )
        holds(all(new_token_ids), sentence)
        return self.compute(drafts, new_token_ids)

    def propose(self, requests, sampled: dict[str, list[int]], limits: dict[str, int], why: str = ""):
        """Propose after a step in which `sampled` was sampled. Returns the drafts by request id."""
        self.passes.clear()
        drafts = [
            self.code.Draft(each, [*each.prompt_token_ids, *each.output_token_ids, *sampled[id]], limits[id])
            for each in requests
            for id in [each.request_id]
        ]
        what = f"propose with limits {limits}{why or f' after {sampled} was sampled'},"
        with torch.inference_mode():
            self.proposer.follow(self.code.SchedulerOutput(1, list(requests)))
            answer(self.code, what, lambda: self.proposer.propose(drafts))
        return {draft.request.request_id: draft for draft in drafts}

    def tokens(self, got) -> dict[str, list[int]]:
        return {id: list(draft.draft_token_ids) for id, draft in sorted(got.items())}

    def logits(self, text: list[int]) -> torch.Tensor:
        """The draft model's logits after a text, without any cache."""
        with torch.inference_mode():
            return self.code.llama_pytorch.recompute(tiny(self.code, 5, 1), text)

    def continued(self, text: list[int], number: int) -> list[int]:
        """The draft's likeliest continuation."""
        text = list(text)
        for _ in range(number):
            text.append(int(self.logits(text).argmax()))
        return text[len(text) - number :]


LONG = [7, 21, 4, 4, 18, 26, 11, 3, 9]


@exercise("8.9", points=4)
class TestDraftProposerPropose:
    def test_one_request(self, code):
        own = Drafting(code)
        got = own.propose([scheduled(code, "a", 0, PROMPT, 6, [5, 2, 7])], {"a": [17]}, {"a": 3})
        equal(
            own.tokens(got),
            {"a": own.continued([*PROMPT, 17], 3)},
            "three draft tokens for request a after the token 17",
        )
        equal(got["a"].probs, [], "probs of a draft at temperature 0")
        what = "the number of tokens in each pass, for a request with a prompt of 6, a new token and 3 draft tokens,"
        equal(own.passes, [7, 1, 1], what)

    def test_two_requests(self, code):
        own = Drafting(code)
        requests = [scheduled(code, "a", 0, PROMPT, 6, [5, 2, 7]), scheduled(code, "b", 0, LONG, 9, [1, 0, 9, 3])]
        got = own.propose(requests, {"a": [17], "b": [8]}, {"a": 3, "b": 3})
        expected = {"a": own.continued([*PROMPT, 17], 3), "b": own.continued([*LONG, 8], 3)}
        equal(own.tokens(got), expected, "three draft tokens for each of two requests")
        equal(own.passes, [17, 2, 2], "the number of tokens in each pass, for two requests with 7 and 10 tokens,")

    def test_each_has_its_limit(self, code):
        own = Drafting(code)
        requests = [
            scheduled(code, "a", 0, PROMPT, 6, [5, 2, 7]),
            scheduled(code, "b", 0, LONG, 9, [1, 0, 9, 3]),
            scheduled(code, "c", 0, LONG[:4], 4, [10, 11]),
            scheduled(code, "d", 0, LONG[:3], 3, [12, 13]),
        ]
        limits = {"a": 1, "b": 3, "c": 0, "d": 2}
        got = own.propose(requests, {"a": [17], "b": [8], "c": [20], "d": [4]}, limits)
        expected = {"a": own.continued([*PROMPT, 17], 1), "b": own.continued([*LONG, 8], 3), "c": []}
        expected["d"] = own.continued([*LONG[:3], 4], 2)
        equal(own.tokens(got), expected, "the draft tokens with the limits a: 1, b: 3, c: 0, d: 2")
        what = "the number of tokens in each pass, for a (7 tokens, limit 1), b (10, 3) and d (4, 2),"
        equal(own.passes, [21, 2, 1], what)

    def test_many(self, code):
        own = Drafting(code)
        got = own.propose([scheduled(code, "a", 0, PROMPT, 6, [5, 2, 7, 8, 9])], {"a": [17]}, {"a": 11})
        equal(own.tokens(got), {"a": own.continued([*PROMPT, 17], 11)}, "eleven draft tokens for a request")

    def test_no_draft_tokens_allowed(self, code):
        own = Drafting(code)
        got = own.propose([scheduled(code, "a", 0, PROMPT, 6, [5, 2, 7])], {"a": [17]}, {"a": 0})
        equal(own.tokens(got), {"a": []}, "the draft tokens with a limit of 0")
        equal(own.passes, [], "the number of tokens in each pass, with a limit of 0,")

    def after_a_step(self, code, sampled: list[int], number: int = 2):
        """Three draft tokens were proposed after 17; the step that verifies them returns `sampled`."""
        own = Drafting(code)
        table = [5, 2, 7, 8]
        first = own.propose([scheduled(code, "a", 0, PROMPT, 6, table)], {"a": [17]}, {"a": 3})
        drafts = first["a"].draft_token_ids
        sampled = [drafts[i] if token is None else token for i, token in enumerate(sampled)]
        got = own.propose([scheduled(code, "a", 6, [*PROMPT, 17], 6, table)], {"a": sampled}, {"a": number})
        return own, own.tokens(got), {"a": own.continued([*PROMPT, 17, *sampled], number)}

    def test_after_draft_tokens_that_were_right(self, code):
        own, got, expected = self.after_a_step(code, [None, None, None, 12])
        equal(got, expected, "two draft tokens, after all three earlier ones were accepted, with a bonus token,")
        holds(
            own.passes in ([5, 1], [4, 1], [2, 1]),
            f"The passes compute {own.passes} tokens, but most of the text is in the cache. Is `num_computed` set?",
            actual=list(own.passes),
        )

    def test_after_draft_tokens_that_were_wrong(self, code):
        own, got, expected = self.after_a_step(code, [12])
        equal(got, expected, "two draft tokens, after the first of three was rejected,")
        holds(
            own.passes in ([2, 1], [1, 1]),
            f"The passes compute {own.passes} tokens, but most of the text is in the cache. Is `num_computed` set?",
            actual=list(own.passes),
        )

    def test_after_one_of_three_was_right(self, code):
        _, got, expected = self.after_a_step(code, [None, 12])
        equal(got, expected, "two draft tokens, after one of three was accepted,")

    def test_after_steps_without_draft_tokens(self, code):
        own, table = Drafting(code), [5, 2, 7, 8]
        own.propose([scheduled(code, "a", 0, PROMPT, 6, table)], {"a": [17]}, {"a": 0})
        own.propose([scheduled(code, "a", 6, [*PROMPT, 17], 6, table)], {"a": [19]}, {"a": 0})
        got = own.propose([scheduled(code, "a", 7, [*PROMPT, 17, 19], 6, table)], {"a": [1]}, {"a": 2})
        expected = own.continued([*PROMPT, 17, 19, 1], 2)
        equal(own.tokens(got), {"a": expected}, "two draft tokens for a request that had none in the two steps before")

    def within(self, own, table: list[int], why: str) -> int:
        """The number of draft tokens after 7 tokens, with a limit of 5."""
        request = scheduled(own.code, "a", 0, PROMPT, 6, table)
        got = own.propose([request], {"a": [17]}, {"a": 5}, f" and {why}")
        return len(own.tokens(got)["a"])

    def test_no_more_than_there_are_slots_for(self, code):
        why = "one free slot in two blocks of 4 (the last draft token needs none)"
        equal(self.within(Drafting(code), [5, 2], why), 2, f"the number of draft tokens with {why}")

    def test_no_more_than_there_are_positions_for(self, code):
        why = "two of the draft model's 9 positions free (the last draft token needs none)"
        got = self.within(Drafting(code, positions=9), [5, 2, 7, 8], why)
        equal(got, 3, f"the number of draft tokens with {why}")

    def test_too_few_positions(self, code):
        for positions in (6, 4):
            why = f"7 tokens and a draft model with {positions} positions"
            got = self.within(Drafting(code, positions=positions), [5, 2, 7, 8], why)
            equal(got, 0, f"the number of draft tokens with {why}")

    def test_sampled(self, code):
        own = Drafting(code)
        text, params = [*PROMPT, 17], dict(temperature=0.8, top_k=12, seed=11)
        got = own.propose([scheduled(code, "a", 0, PROMPT, 4, [5, 2, 7], **params)], {"a": [17]}, {"a": 3})["a"]
        rows, drafts = [], []
        for place in range(3):
            rows.append(code.sampling_probs(own.logits(text), code.SamplingParams(**params)))
            seed = code.llama_pytorch.stable_hash(11, code.DRAFT_SEED)
            generator = code.llama_pytorch.draw_generator(seed, 3 + place)
            drafts.append(int(torch.multinomial(rows[-1], 1, generator=generator)))
            text.append(drafts[-1])
        what = "three draft tokens at temperature 0.8, for output tokens 3, 4 and 5,"
        equal(list(got.draft_token_ids), drafts, what)
        equal(len(got.probs), 3, "len(probs) of a draft with three draft tokens at temperature 0.8")
        close(
            torch.stack(got.probs),
            torch.stack(rows),
            "probs of a draft with three draft tokens at temperature 0.8",
        )

    def test_some_sampled_and_some_not(self, code):
        own = Drafting(code)
        requests = [
            scheduled(code, "a", 0, PROMPT, 6, [5, 2, 7], temperature=1.0, seed=3),
            scheduled(code, "b", 0, LONG, 9, [1, 0, 9, 3]),
        ]
        got = own.propose(requests, {"a": [17], "b": [8]}, {"a": 2, "b": 3})
        what = "the draft tokens of b at temperature 0, in a batch with a at temperature 1,"
        equal(own.tokens(got)["b"], own.continued([*LONG, 8], 3), what)
        equal(got["b"].probs, [], "probs of b at temperature 0, in a batch with a at temperature 1,")
        equal(len(got["a"].probs), 2, "len(probs) of a with two draft tokens at temperature 1")
        expected = [own.logits([*PROMPT, 17, *got["a"].draft_token_ids[:i]]).softmax(-1) for i in range(2)]
        close(torch.stack(got["a"].probs), torch.stack(expected), "probs of a with two draft tokens at temperature 1")

    def test_penalties_for_the_newest_tokens(self, code):
        """Tokens in the output become less likely: the sampled token, and each draft token for those after it."""
        own = Drafting(code)
        text = [*PROMPT, *own.continued(PROMPT, 2)]
        sampled = text[6:]
        for _ in range(4):
            counts = torch.bincount(torch.tensor(text[6:]), minlength=30)
            text.append(int((own.logits(text) - 1.5 * counts - 2.0 * (counts > 0)).argmax()))
        request = scheduled(code, "a", 0, PROMPT, 6, [5, 2, 7], presence_penalty=2.0, frequency_penalty=1.5)
        got = own.propose([request], {"a": sampled}, {"a": 4})
        what = f"four draft tokens after {sampled}, with a presence_penalty of 2 and a frequency_penalty of 1.5,"
        equal(own.tokens(got), {"a": text[8:]}, what)


# --- Together ---------------------------------------------------------------------------------------------------------

WORDS = [b"</s>", *(b" w%d" % i for i in range(1, 30))]


class Words:
    """A tokenizer whose token i is the word i; token 0 ends a sequence."""

    bos_token_id, eos_token_ids, chat_template, vocab_size = None, frozenset({0}), None, 30

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == 0 else WORDS[token_id]


@together(seconds=120)
class TestTogether:
    """Your whole file: the same tokens as without draft tokens, alone and in an engine with hardly enough blocks."""

    def prompts(self) -> list[list[int]]:
        return [[1 + (i * j) % 7 for j in range(1, 4 + 3 * i)] for i in range(1, 6)]

    def test_one_sequence(self, code):
        model = tiny(code)
        for i, prompt in enumerate(self.prompts()[:3]):
            params = code.SamplingParams(max_tokens=14, temperature=0.3 * (i % 2), seed=i, ignore_eos=True, logprobs=2)
            expected = code.llama_pytorch.generate(model, Words(), prompt, params)
            got = code.generate(model, Words(), prompt, params)
            equal(got.token_ids, expected.token_ids, f"the tokens of `generate` after {prompt}")
            equal(got.text, expected.text, f"the text of `generate` after {prompt}")

    def engine(self, code, kind: str, is_adaptive: bool):
        from solutions.batching import LocalExecutor, local_engine

        model = tiny(code)
        own = local_engine(model, Words(), num_blocks=8, block_size=4, max_num_batched_tokens=12, max_model_len=32)
        cache = code.PagedKVCache(model, 8, 4)
        proposer = code.NgramProposer()
        if kind != "n-grams":
            draft = model if kind == "the model itself" else tiny(code, 5, 1)
            proposer = code.DraftProposer(draft, code.PagedKVCache(draft, 8, 4))
            own.scheduler.num_lookahead_tokens = 3
        own.executor = LocalExecutor(
            code.SpeculativeRunner(model, cache, proposer, code.AdaptiveSpeculation(3, is_adaptive))
        )
        return own

    def test_in_an_engine(self, code):
        prompts = self.prompts()
        params = [
            code.SamplingParams(max_tokens=6 + i, ignore_eos=i % 2 == 0, presence_penalty=0.1 * i) for i in range(5)
        ]
        expected = [
            code.llama_pytorch.generate(tiny(code), Words(), prompt, each).token_ids
            for prompt, each in zip(prompts, params)
        ]
        for kind in ("n-grams", "another model", "the model itself"):
            own = self.engine(code, kind, False)
            outputs = own.generate(prompts, params, progress=False)
            got = [output.token_ids for output in outputs]
            equal(got, expected, f"the tokens of five requests in eight blocks, with draft tokens from {kind},")
            what = "the number of free blocks of 8 after all requests have finished"
            equal(own.manager.pool.num_free_blocks, 8, what)
            holds(own.metrics().num_draft_tokens > 0, f"No draft tokens were proposed, with draft tokens from {kind}.")
        rate = own.metrics().acceptance_rate
        holds(
            rate > 0.9,
            f"{rate:.0%} of the draft tokens were accepted. Draft and target are one model, so nearly all should be.",
        )

    def test_drawn(self, code):
        """Draft tokens that are not drawn change no draw; of one's own draft tokens, drawn, nearly all are accepted."""
        prompts = self.prompts()
        params = [code.SamplingParams(max_tokens=8, temperature=0.7, seed=i, ignore_eos=True) for i in range(5)]
        expected = [
            code.llama_pytorch.generate(tiny(code), Words(), prompt, each).token_ids
            for prompt, each in zip(prompts, params)
        ]
        got = [each.token_ids for each in self.engine(code, "n-grams", True).generate(prompts, params, progress=False)]
        equal(got, expected, "the tokens of five requests at temperature 0.7, with draft tokens from n-grams,")
        own = self.engine(code, "the model itself", True)
        outputs = own.generate(prompts, params, progress=False)
        equal([len(output.token_ids) for output in outputs], [8] * 5, "the number of tokens of each of five requests")
        rate = own.metrics().acceptance_rate
        holds(
            rate > 0.9,
            f"{rate:.0%} of the sampled draft tokens were accepted. Draft and target are one model, so nearly all "
            "should be.",
        )
