"""The checks of lesson 5, second half: the batch, and the engine around it."""

from __future__ import annotations

from collections import deque

import torch

from common.grading import equal, exercise, holds, together


def granted(plan) -> dict[str, tuple[int, int]]:
    """What a plan computes: for each request where it starts, and how many tokens."""
    return {each.request_id: (each.start, len(each.token_ids)) for each in plan.scheduled}


# --- The batch --------------------------------------------------------------------------------------------------------


def scheduled(code, name, start, token_ids, table, sample_index=None, spec=0):
    return code.ScheduledRequest(
        name, start, token_ids, spec, table, code.SamplingParams(), sample_index, [], [], frozenset(), 9
    )


@exercise("5.15", points=2)
class TestFlattenBatch:
    def batch(self, code, *requests):
        got = code.flatten_batch(list(requests), 4, torch.device("cpu"))
        holds(got is not None, "flatten_batch returned None: is a `return` missing?")
        tensors = (got.token_ids, got.positions, got.metadata.slot_mapping, got.logit_rows)
        for name, each in zip(("token_ids", "positions", "slot_mapping", "logit_rows"), tensors):
            kind = type(each).__name__
            holds(isinstance(each, torch.Tensor), f"{name} is a {kind}; it should be a tensor.", actual=(name, kind))
        return got

    def test_by_hand(self, code):
        got = self.batch(
            code,
            scheduled(code, "a", 6, [60], [9, 2], sample_index=3),
            scheduled(code, "b", 2, [42, 43, 44], [5, 7]),
            scheduled(code, "c", 0, [70, 71], [1], sample_index=0),
        )
        equal(got.token_ids.tolist(), [60, 42, 43, 44, 70, 71], "token_ids of 1, 3 and 2 tokens")
        equal(got.positions.tolist(), [6, 2, 3, 4, 0, 1], "positions of tokens that start at 6, 2 and 0")
        equal(
            got.logit_rows.tolist(),
            [0, 5],
            "logit_rows, where a and c sample, and b has more of its prompt to compute,",
        )
        meta = got.metadata
        equal(list(meta.query_start), [0, 1, 4, 6], "query_start of 1, 3 and 2 tokens")
        equal(
            list(meta.context_lens),
            [7, 5, 2],
            "context_lens of requests whose newest tokens are at positions 6, 4 and 1",
        )
        what = "slot_mapping, in blocks of 4, with the tables [9, 2], [5, 7] and [1]"
        equal(meta.slot_mapping.tolist(), [10, 22, 23, 28, 4, 5], what)
        equal([list(table) for table in meta.block_tables], [[9, 2], [5, 7], [1]], "block_tables")

    def test_draft_tokens(self, code):
        got = self.batch(
            code,
            scheduled(code, "a", 3, [30, 31, 32], [0, 1], sample_index=1, spec=2),
            scheduled(code, "b", 1, [51], [2], sample_index=1),
            scheduled(code, "c", 0, [70, 71, 72, 73], [3, 4], sample_index=0, spec=1),
        )
        what = "logit_rows, where a has a token and 2 draft tokens, b a token, and c a prompt of 3 and a draft token,"
        equal(got.logit_rows.tolist(), [0, 1, 2, 3, 6, 7], what)

    def test_types(self, code):
        got = self.batch(code, scheduled(code, "a", 0, [1, 2], [0]))
        for name, each in (("token_ids", got.token_ids), ("logit_rows", got.logit_rows)):
            equal(each.dtype, torch.long, f"the dtype of {name}, in a batch without logit rows,")
        equal(got.logit_rows.tolist(), [], "logit_rows where no request samples")

    def test_context_of_draft_tokens(self, code):
        got = self.batch(code, scheduled(code, "a", 3, [30, 31, 32], [0, 1], sample_index=1, spec=2))
        equal(
            list(got.metadata.context_lens),
            [6],
            "context_lens of a request with the positions 3 to 5, the last two of them draft tokens,",
        )

    def test_the_plan_stays_as_it_is(self, code):
        plan = [scheduled(code, "a", 0, [1, 2], [3, 4]), scheduled(code, "b", 4, [3], [5, 6], sample_index=1)]
        self.batch(code, *plan)
        got = [[each.token_ids, each.block_table] for each in plan]
        equal(
            got,
            [[[1, 2], [3, 4]], [[3], [5, 6]]],
            "[token_ids, block_table] of both requests after flatten_batch, which must not change them,",
        )

    def test_device(self, code):
        got = code.flatten_batch([scheduled(code, "a", 0, [1, 2], [0], sample_index=0)], 4, torch.device("meta"))
        tensors = (got.token_ids, got.positions, got.metadata.slot_mapping, got.logit_rows)
        equal(
            [each.device.type for each in tensors],
            ["meta"] * 4,
            "the devices of the four tensors, where device is `meta`,",
        )


# --- The engine -------------------------------------------------------------------------------------------------------

WORDS = [b"</s>", *(b" w%d" % i for i in range(1, 30))]


class Words:
    """A tokenizer whose token i is the word i; token 0 ends a sequence."""

    bos_token_id, eos_token_ids, chat_template, vocab_size = None, frozenset({0}), None, 30

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == 0 else WORDS[token_id]


def tiny(code):
    """A random model in float64, in which no two tokens are equally likely."""
    config = code.llama_pytorch.ModelConfig(
        vocab_size=30, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    model = code.Llama(config).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = 0.1 + 0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.requires_grad_(False)


class Delayed:
    """An executor with `depth` steps in flight. Each is computed at once, and collected in order."""

    def __init__(self, inner, depth: int):
        self.inner, self.depth = inner, depth
        self.log: list[str] = []
        self.ids: deque = deque()

    def submit(self, plan) -> None:
        self.log.append(f"submit {sorted(granted(plan))}")
        self.ids.append(sorted(granted(plan)))
        self.inner.submit(plan)

    def collect(self):
        asked = [*self.log, "collect"]
        holds(self.ids, f"collect was called with no step in flight. The calls to the executor: {asked}.", actual=asked)
        self.log.append(f"collect {self.ids.popleft()}")
        return self.inner.collect()

    def close(self) -> None:
        self.inner.close()


@exercise("5.16", points=3)
class TestStep:
    def engine(self, code, depth=1, **settings):
        own = code.local_engine(tiny(code), Words(), **{"num_blocks": 20, "block_size": 4, **settings})
        own.executor = Delayed(own.executor, depth)
        return own

    def test_nothing_to_do(self, code):
        own = self.engine(code)
        equal(own.step(), [], "step of an engine without requests")
        equal(own.executor.log, [], "the calls to the executor in a step without requests")

    def test_no_request_can_be_served(self, code):
        own = self.engine(code)
        own.add_request([1, 2, 3], request_id="a")
        own.scheduler.schedule = lambda: code.SchedulerOutput(1)
        what = "step, where a request waits, no step is in flight and the plan is empty, should raise RuntimeError; it"
        try:
            outputs = own.step()
        except RuntimeError:
            return
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            holds(False, f"{what} raised {text}", actual=text)
        holds(False, f"{what} returned {outputs}.", actual="nothing raised")

    def test_a_prompt_in_chunks(self, code):
        own = self.engine(code, max_num_batched_tokens=4, long_prefill_token_threshold=4)
        own.add_request(list(range(1, 11)), code.SamplingParams(max_tokens=2, ignore_eos=True), request_id="a")
        reported = [[(output.request_id, len(output.token_ids)) for output in own.step() or ()] for _ in range(4)]
        what = "(id, number of output tokens) in the outputs of four steps, for a prompt of 10 in chunks of 4"
        equal(reported, [[("a", 0)], [("a", 0)], [("a", 1)], [("a", 2)]], what)

    def test_a_request(self, code):
        own = self.engine(code)
        own.add_request([1, 2, 3], code.SamplingParams(max_tokens=3, ignore_eos=True), request_id="a")
        lengths = []
        for _ in range(3):
            outputs = own.step()
            holds(outputs is not None, "step returned None; it should return a list of outputs.")
            lengths += [(output.request_id, len(output.token_ids), output.finish_reason) for output in outputs]
        what = "(id, number of output tokens, finish_reason) in the outputs of three steps"
        equal(lengths, [("a", 1, None), ("a", 2, None), ("a", 3, "length")], what)
        equal(own.has_unfinished_requests, False, "has_unfinished_requests after the only request has finished")
        equal(own.executor.log, ["submit ['a']", "collect ['a']"] * 3, "the calls to the executor in three steps")

    def test_depth_2(self, code):
        own = self.engine(code, depth=2, max_num_seqs=2, max_num_batched_tokens=4)
        params = code.SamplingParams(max_tokens=2, ignore_eos=True)
        for name in "ab":
            own.add_request([1, 2, 3, 4], params, request_id=name)
        own.scheduler.max_chunk = 4
        own.step()
        what = "the calls to an executor of depth 2 in the first step, with two prompts of 4 and a budget of 4"
        equal(own.executor.log, ["submit ['a']", "submit ['b']", "collect ['a']"], what)
        own.step()
        what = "the calls to an executor of depth 2 in the second step, while the step of b is in flight"
        equal(own.executor.log[3:], ["submit ['a']", "collect ['b']"], what)
        while own.has_unfinished_requests:
            own.step()
        equal(len(own.executor.ids), 0, "the number of steps in flight after all requests have finished")

    def test_depth_1(self, code):
        own = self.engine(code, depth=1, max_num_seqs=2, max_num_batched_tokens=4)
        for name in "ab":
            own.add_request([1, 2, 3, 4], code.SamplingParams(max_tokens=2, ignore_eos=True), request_id=name)
        own.scheduler.max_chunk = 4
        own.step()
        what = "the calls to an executor of depth 1 in the first step, with two prompts of 4 and a budget of 4"
        equal(own.executor.log, ["submit ['a']", "collect ['a']"], what)

    def test_the_same_tokens(self, code):
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 11]]
        params = code.SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1)
        for depth in (1, 2):
            own = self.engine(code, depth=depth, num_blocks=6, max_num_batched_tokens=4)
            outputs = own.generate(prompts, params, progress=False)
            for prompt, output in zip(prompts, outputs):
                alone = code.llama_pytorch.generate(tiny(code), Words(), prompt, params)
                equal(output.token_ids, alone.token_ids, f"the tokens after {prompt}, with depth {depth}")
                equal(output.text, alone.text, f"the text after {prompt}, with depth {depth}")
                equal(len(output.logprobs), 5, f"the number of logprobs after {prompt}")

    def test_metrics(self, code):
        own = self.engine(code)
        own.generate([[1, 2, 3]], code.SamplingParams(max_tokens=4, ignore_eos=True), progress=False)
        metrics = own.metrics()
        got = [metrics.num_steps, metrics.num_computed_tokens, metrics.num_output_tokens]
        equal(
            got,
            [4, 6, 4],
            "[num_steps, num_computed_tokens, num_output_tokens] of metrics(), for a prompt of 3 and 4 output tokens",
        )
        holds(
            0 < metrics.seconds < 60,
            f"metrics().seconds is {metrics.seconds}; it should be the duration of all steps in seconds.",
            actual=metrics.seconds,
        )

    def test_the_result_of_an_interrupted_step_is_dropped(self, code):
        own = self.engine(code)
        own.add_request([1, 2, 3], code.SamplingParams(max_tokens=2, ignore_eos=True), request_id="a")
        own.executor.submit(code.SchedulerOutput(0))
        got = [(output.request_id, len(output.token_ids)) for output in own.step()]
        what = "(id, number of output tokens) of the step after an interrupted one, whose result `self.collect` drops,"
        equal(got, [("a", 1)], what)

    def test_when_it_was_first_scheduled(self, code):
        own = self.engine(code)
        output = own.output(own.add_request([1, 2, 3], code.SamplingParams(max_tokens=2, ignore_eos=True)))
        own.step()
        queue_time = output.metrics.queue_time
        holds(
            queue_time is not None and 0 <= queue_time < 60,
            f"queue_time of a request in the first step is {queue_time}; `self.submit` records when it was scheduled.",
            actual=str(queue_time),
        )

    def test_a_step_that_only_moves_blocks(self, code):
        own = self.engine(code)
        own.add_request([1, 2, 3], request_id="a")
        own.scheduler.schedule = lambda: code.SchedulerOutput(1, preempted_ids=["a"])
        try:
            outputs = own.step()
        except RuntimeError as error:
            outputs = f"RuntimeError: {error}"
        equal(outputs, [], "the outputs of a step whose plan preempts a and schedules no request")
        equal(own.executor.log, ["submit []", "collect []"], "the calls to the executor in a step without tokens")


@together()
class TestTogether:
    """Your whole file: the same tokens as alone, in a pool that is too small for all, under every policy."""

    def test_the_same_tokens(self, code):
        model = tiny(code)
        prompts = [[1 + (i * j) % 29 for j in range(1, 4 + 3 * i)] for i in range(1, 6)]
        params = [
            code.SamplingParams(max_tokens=6, temperature=float(i % 2), seed=i, n=1 + i % 2, ignore_eos=True)
            for i in range(5)
        ]
        expected = [
            [code.llama_pytorch.generate(model, Words(), prompt, child).token_ids for child in each.children()]
            for prompt, each in zip(prompts, params)
        ]
        for policy in ("fcfs", "priority", "fair"):
            for preemption in ("recompute", "swap"):
                settings = dict(num_blocks=7, block_size=4, max_num_batched_tokens=7, max_model_len=28)
                own = code.local_engine(model, Words(), scheduling_policy=policy, preemption=preemption, **settings)
                outputs = own.generate(prompts, params, progress=False)
                got = [[each.token_ids for each in (output, *output.siblings)] for output in outputs]
                what = f"the tokens of eight samples in seven blocks, {policy}, preemption by {preemption}"
                equal(got, expected, what)
                equal(
                    own.manager.pool.num_free_blocks,
                    7,
                    "the number of free blocks of 7 after all requests have finished",
                )
                holds(
                    own.metrics().num_preemptions > 0,
                    "No request was preempted. Are blocks used by two requests at once?",
                )
