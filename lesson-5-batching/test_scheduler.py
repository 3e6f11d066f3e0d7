"""The checks of lesson 5, first half. They need no model: a scheduler deals in ids and counts, worked out by hand."""

from __future__ import annotations

from itertools import pairwise

from common.grading import equal, exercise, holds, together


def request(code, name: str, prompt: int, output: int = 0, **settings):
    """A request with `prompt` prompt tokens, 0, 1, 2, ..., and `output` output tokens, 100, 101, ..."""
    settings = {"max_tokens": 10, "arrival": ord(name[0]) - ord("a"), **settings}
    params = code.SamplingParams(max_tokens=settings.pop("asked_for", settings["max_tokens"]))
    return code.Request(name, list(range(prompt)), params, output_token_ids=list(range(100, 100 + output)), **settings)


def scheduler(code, num_blocks: int = 12, block_size: int = 4, seqs: int = 8, budget: int = 16, **settings):
    manager = code.KVCacheManager(num_blocks, block_size, settings.pop("caching", False))
    limits = dict(max_num_seqs=seqs, max_num_batched_tokens=budget, long_prefill_token_threshold=budget)
    return code.Scheduler(manager, code.EngineConfig(**{**limits, "num_host_blocks": 0, **settings}))


def granted(plan) -> dict[str, tuple[int, int]]:
    """What a plan computes: for each request where it starts, and how many tokens."""
    return {each.request_id: (each.start, len(each.token_ids)) for each in plan.scheduled}


def answered(code, own, plan, tokens: dict | None = None, **fields):
    """Update the scheduler with a plan's results: token 7 for each request that samples, or its entry in `tokens`."""
    sampled = {each.request_id: [7] for each in plan.scheduled if each.sample_index is not None}
    return own.update_from_output(plan, code.ModelRunnerOutput(plan.step_id, {**sampled, **(tokens or {})}, **fields))


def running(code, own, *requests):
    """These requests, admitted, with the prompt computed and one token of output each, which is not computed yet."""
    for each in requests:
        own.add(each)
    steps = 0
    while any(not each.output_token_ids for each in requests):
        answered(code, own, own.schedule())
        steps += 1
        without = [each.request_id for each in requests if not each.output_token_ids]
        holds(
            steps < 50,
            f"After 50 steps {without} still have no output: `schedule_waiting` (5.7), `schedule_running` (5.6) or "
            "`update_from_output` (5.8) leaves them out.",
            actual=without,
        )
    return requests


def names(requests) -> list[str]:
    return [each.request_id for each in requests]


def balanced(own) -> bool:
    """Whether each ref_cnt is the number of tables with this block, and a block is free if and only if it is 0."""
    held: dict[int, int] = {}
    for table in own.manager.block_tables.values():
        for block in table:
            held[block.block_id] = held.get(block.block_id, 0) + 1
    pool = own.manager.pool
    return all(
        block.ref_cnt == held.get(block.block_id, 0) and (block.block_id in pool.free) == (block.ref_cnt == 0)
        for block in pool.blocks
    )


# --- Batches that wait for their longest request ----------------------------------------------------------------------


@exercise("5.1")
class TestStaticBatch:
    def test_by_hand(self, code):
        what = "static_batch([3, 5, 2, 4], 2)"
        equal(list(code.static_batch([3, 5, 2, 4], 2)), [range(0, 3), range(0, 5), range(5, 7), range(5, 9)], what)

    def test_a_last_batch_that_is_not_full(self, code):
        equal(
            list(code.static_batch([2, 1, 6, 3, 1], 3)),
            [range(0, 2), range(0, 1), range(0, 6), range(6, 9), range(6, 7)],
            "static_batch([2, 1, 6, 3, 1], 3)",
        )

    def test_one_at_a_time(self, code):
        equal(list(code.static_batch([2, 3], 1)), [range(0, 2), range(2, 5)], "static_batch([2, 3], 1)")
        equal(list(code.static_batch([4], 8)), [range(0, 4)], "static_batch([4], 8)")

    def test_a_batch_whose_last_member_is_short(self, code):
        what = "static_batch([3, 5, 4, 2], 3)"
        equal(list(code.static_batch([3, 5, 4, 2], 3)), [range(0, 3), range(0, 5), range(0, 4), range(5, 7)], what)


@exercise("5.2")
class TestFinishReason:
    def check(self, code, each, expected, what):
        got = code.finish_reason(each)
        holds(got == expected, f"finish_reason {what} is {got!r}, expected {expected!r}.", actual=repr(got))

    def test_by_hand(self, code):
        each = request(code, "a", 3, 2, max_tokens=4, stop_token_ids=frozenset({0}))
        self.check(code, each, None, "of a request with 2 of 4 tokens, none of them a stop token,")
        each.append(0)
        self.check(code, each, "stop", "of a request whose third of 4 tokens is the stop token 0")

    def test_length(self, code):
        each = request(code, "a", 3, 4, max_tokens=4, stop_token_ids=frozenset({9}))
        self.check(code, each, "length", "of a request with 4 of 4 tokens")

    def test_stop_beats_length(self, code):
        each = request(code, "a", 3, 3, max_tokens=4, stop_token_ids=frozenset({9}))
        each.append(9)
        self.check(code, each, "stop", "of a request whose fourth of 4 tokens is a stop token")

    def test_only_the_last_counts(self, code):
        each = request(code, "a", 10, max_tokens=4, stop_token_ids=frozenset({9}))
        self.check(code, each, None, "of a request without output, with a stop token in its prompt,")
        each.append(9)
        each.append(5)
        self.check(code, each, None, "of a request whose last but one token is a stop token")

    def test_its_own_limit(self, code):
        each = request(code, "a", 3, 5, max_tokens=5, asked_for=128)  # the context has no space for 128
        self.check(
            code,
            each,
            "length",
            "of a request with 5 tokens, whose max_tokens is 5 (sampling_params.max_tokens is 128),",
        )


@exercise("5.3")
class TestTokensToSchedule:
    def test_by_hand(self, code):
        each = request(code, "a", 10)
        equal(code.tokens_to_schedule(each, 16, 16), 10, "tokens_to_schedule of a new prompt of 10, budget 16")
        equal(code.tokens_to_schedule(each, 6, 16), 6, "tokens_to_schedule of a new prompt of 10, budget 6")
        equal(code.tokens_to_schedule(each, 16, 4), 4, "tokens_to_schedule of a new prompt of 10, max_chunk 4")

    def test_what_is_computed_already(self, code):
        each = request(code, "a", 10, 3, num_computed_tokens=12)
        equal(code.tokens_to_schedule(each, 16, 16), 1, "tokens_to_schedule of a request with 13 tokens, 12 computed")
        each = request(code, "a", 10, num_computed_tokens=6)
        equal(code.tokens_to_schedule(each, 3, 16), 3, "tokens_to_schedule of a prompt of 10, 6 computed, budget 3")

    def test_draft_tokens(self, code):
        each = request(code, "a", 10, 3, num_computed_tokens=12, spec_token_ids=[1, 2, 3, 4])
        equal(
            code.tokens_to_schedule(each, 16, 16),
            5,
            "tokens_to_schedule of 13 tokens, 12 computed, with 4 draft tokens",
        )
        equal(
            code.tokens_to_schedule(each, 2, 16),
            2,
            "tokens_to_schedule of 13 tokens, 12 computed, 4 draft tokens, budget 2",
        )

    def test_what_was_found_in_the_cache_is_computed(self, code):
        each = request(code, "a", 12, num_computed_tokens=9, num_cached_tokens=8)
        equal(
            code.tokens_to_schedule(each, 16, 16),
            3,
            "tokens_to_schedule of a prompt of 12, 9 computed (8 of them cached)",
        )

    def test_computed_again_after_preemption(self, code):
        each = request(code, "a", 12, 3, num_cached_tokens=8)
        what = "tokens_to_schedule of a preempted request with 15 tokens, 0 computed"
        equal(code.tokens_to_schedule(each, 16, 16), 15, what)
        equal(code.tokens_to_schedule(each, 16, 4), 4, f"{what}, max_chunk 4")

    def test_no_budget(self, code):
        equal(
            code.tokens_to_schedule(request(code, "a", 10), 0, 16),
            0,
            "tokens_to_schedule of a new prompt of 10, budget 0",
        )


# --- Policies, and one step -------------------------------------------------------------------------------------------


@exercise("5.4")
class TestFairShare:
    def order(self, code, served, *requests):
        return names(sorted(requests, key=lambda each: code.fair_share(each, served)))

    def test_least_served_first(self, code):
        a, b = request(code, "a", 5, tenant="rich"), request(code, "b", 3, tenant="poor")
        equal(
            self.order(code, {"rich": 90.0, "poor": 10.0}, a, b),
            ["b", "a"],
            "the order of a (of tenant rich, served 90) and b (of poor, served 10)",
        )

    def test_equals_by_arrival(self, code):
        sizes = (("a", 3, "x"), ("b", 2, "y"), ("c", 4, "x"))
        a, b, c = (request(code, name, prompt, tenant=tenant) for name, prompt, tenant in sizes)
        equal(
            self.order(code, {"x": 5.0, "y": 5.0}, c, a, b),
            ["a", "b", "c"],
            "the order of a, b, c, whose tenants were both served 5",
        )
        equal(
            self.order(code, {"x": 6.0, "y": 5.0}, c, b, a),
            ["b", "a", "c"],
            "the order of a and c (of x, served 6) and b (of y, served 5)",
        )
        what = "the order of a and c (of x, served 5.4) and b (of y, served 5.3)"
        equal(self.order(code, {"x": 5.4, "y": 5.3}, c, b, a), ["b", "a", "c"], what)

    def test_its_size_does_not_matter(self, code):
        a = request(code, "a", 30, 5, tenant="x", priority=0)
        b = request(code, "b", 2, tenant="y", priority=9)
        what = "the order of a (long, of x, served 1) and b (short, of y, served 2)"
        equal(self.order(code, {"x": 1.0, "y": 2.0}, a, b), ["a", "b"], what)

    def test_neither_names_nor_priorities(self, code):
        sizes = (("b", 0, 7), ("c", 1, 9), ("a", 2, 8))
        first, second, third = (
            request(code, name, 3, tenant="x", arrival=arrival, priority=priority) for name, arrival, priority in sizes
        )
        what = "the order of three requests of one tenant that arrived as b, c, a, with priorities 7, 9, 8,"
        equal(self.order(code, {"x": 1.0}, third, second, first), ["b", "c", "a"], what)


@exercise("5.5")
class TestJoin:
    def joined(self, code, served, tenant, active):
        code.join(served, tenant, active)
        return served

    def test_a_newcomer(self, code):
        what = "served after join of a new tenant, where a was served 50 and b 80"
        equal(self.joined(code, {"a": 50.0, "b": 80.0}, "new", {"a", "b"}), {"a": 50.0, "b": 80.0, "new": 50.0}, what)

    def test_back_after_a_while(self, code):
        what = "served['late'] after join, which was 70 before, where the active a has 50,"
        equal(self.joined(code, {"a": 50.0, "late": 70.0}, "late", {"a"})["late"], 70.0, what)
        equal(
            self.joined(code, {"a": 50.0, "b": 80.0, "late": 10.0}, "late", {"a", "b"}),
            {"a": 50.0, "b": 80.0, "late": 50.0},
            "served after join of late, which was served 10, where the active a and b were served 50 and 80",
        )

    def test_idle_tenants_do_not_count(self, code):
        what = "served['late'] after join, which was 1 before, where the active a has 50 and the inactive idle has 3,"
        equal(self.joined(code, {"a": 50.0, "idle": 3.0, "late": 1.0}, "late", {"a"})["late"], 50.0, what)

    def test_no_tenant_or_itself_active(self, code):
        what = "served after join of a new tenant, where no tenant is active"
        equal(self.joined(code, {"a": 50.0}, "new", set()), {"a": 50.0, "new": 0.0}, what)
        equal(
            self.joined(code, {"a": 9.0}, "a", set()), {"a": 9.0}, "served after join of a, where no tenant is active"
        )
        what = "served after join of a, which is active itself"
        equal(self.joined(code, {"a": 9.0, "b": 20.0}, "a", {"a", "b"}), {"a": 9.0, "b": 20.0}, what)


@exercise("5.6", points=3)
class TestScheduleRunning:
    def test_a_token_for_each(self, code):
        own = scheduler(code)
        running(code, own, *(request(code, name, 3) for name in "abc"))
        plan = code.SchedulerOutput(99)
        left = own.schedule_running(plan)
        equal(
            granted(plan),
            {"a": (3, 1), "b": (3, 1), "c": (3, 1)},
            "the plan's (start, number of tokens) of three requests that decode",
        )
        equal(left, 13, "the budget that schedule_running returns, 16 before, after three requests that decode")

    def test_a_long_prompt_leaves_the_others_a_token(self, code):
        own = scheduler(code, num_blocks=30, budget=8)
        running(code, own, request(code, "b", 3), request(code, "c", 3))
        own.add(request(code, "a", 40))
        answered(code, own, own.schedule())
        plan = own.schedule()
        equal(
            granted(plan)["a"],
            (6, 6),
            "(start, number of tokens) of a prompt of 40, scheduled before b and c, which decode, budget 8",
        )
        equal(sorted(granted(plan)), ["a", "b", "c"], "the requests of that step")

    def test_a_chunk_is_limited(self, code):
        own = scheduler(code, num_blocks=30, budget=8, long_prefill_token_threshold=3)
        own.add(request(code, "a", 40))
        answered(code, own, own.schedule())
        plan = code.SchedulerOutput(99)
        equal(own.schedule_running(plan), 5, "the budget that schedule_running returns, 8 before, with max_chunk 3")
        equal(granted(plan), {"a": (3, 3)}, "(start, number of tokens) of a prompt of 40, max_chunk 3")

    def test_a_budget_too_small_for_all(self, code):
        own = scheduler(code)
        running(code, own, *(request(code, name, 2) for name in "abc"))
        own.max_num_batched_tokens = 2
        served = []
        for _ in range(4):
            plan = own.schedule()
            served.append(set(granted(plan)))
            answered(code, own, plan)
        either = [sorted(one | other) for one, other in pairwise(served)]
        equal(
            either,
            [list("abc")] * 3,
            "the requests scheduled in any two steps in a row, of three that decode, budget 2",
        )

    def test_never_more_than_the_budget(self, code):
        own = scheduler(code)
        running(code, own, *(request(code, name, 2) for name in "abcde"))
        own.max_num_batched_tokens = 2
        plan = code.SchedulerOutput(99)
        left = own.schedule_running(plan)
        what = "[tokens scheduled, budget returned], with a budget of 2 and five requests that decode"
        equal([plan.num_tokens, left], [2, 0], what)

    def test_one_token_for_each_after(self, code):
        for budget, expected in ((6, [4, 1, 1]), (3, [1, 1, 1]), (2, [1, 1])):
            own = scheduler(code, num_blocks=40)
            for each in running(code, own, *(request(code, name, 2) for name in "abc")):
                each.spec_token_ids = [21, 22, 23, 24, 25, 26]
            own.max_num_batched_tokens = budget
            plan = code.SchedulerOutput(99)
            own.schedule_running(plan)
            what = (
                f"the numbers of tokens scheduled for three requests that lack 1 + 6 draft tokens each, budget {budget}"
            )
            equal([count for _, count in granted(plan).values()], expected, what)

    def test_no_more_than_there_are_slots(self, code):
        own = scheduler(code, num_blocks=1)
        (a,) = running(code, own, request(code, "a", 3))
        a.spec_token_ids = [21, 22, 23]
        plan = code.SchedulerOutput(99)
        left = own.schedule_running(plan)
        equal(
            [granted(plan), a.num_computed_tokens, left],
            [{"a": (3, 1)}, 4, 15],
            "[(start, number of tokens) of a, its num_computed_tokens, budget returned], where a lacks a token and "
            "three draft tokens, and only one slot is free",
        )

    def test_in_flight_is_left_alone(self, code):
        own = scheduler(code)
        a, _b = running(code, own, request(code, "a", 3), request(code, "b", 3))
        a.in_flight = True
        plan = code.SchedulerOutput(99)
        own.schedule_running(plan)
        equal(sorted(granted(plan)), ["b"], "the requests scheduled while a is in flight")

    def test_the_preempted_is_skipped(self, code):
        own = scheduler(code, num_blocks=4)
        running(code, own, request(code, "a", 7), request(code, "b", 7))
        plan = own.schedule()
        answered(code, own, plan)
        plan = own.schedule()
        equal(
            granted(plan),
            {"a": (8, 1)},
            "(start, number of tokens) of the requests scheduled, where a and b fill 4 of 4 blocks, and both need one",
        )
        equal(plan.preempted_ids, ["b"], "preempted_ids, where a and b fill 4 of 4 blocks, and both need one")
        holds(
            balanced(own),
            "A block's ref_cnt is not the number of tables that contain it, or a block is wrongly free or not free.",
            actual=granted(plan),
        )

    def test_the_preempted_is_skipped_though_blocks_are_free_again(self, code):
        own = scheduler(code, num_blocks=9, budget=36)
        running(code, own, *(request(code, name, 12) for name in "abc"))
        own.max_num_batched_tokens = 4
        plan = code.SchedulerOutput(99)
        own.schedule_running(plan)
        what = "[scheduled, preempted], where a, b and c fill all 9 blocks, and c is preempted so that a and b go on"
        equal([granted(plan), plan.preempted_ids], [{"a": (12, 1), "b": (12, 1)}, ["c"]], what)

    def test_a_request_preempted_for_itself_is_skipped(self, code):
        own = scheduler(code, num_blocks=4)
        a, _ = running(code, own, request(code, "a", 7), request(code, "b", 7))
        answered(code, own, own.schedule())
        a.last_step += 1
        plan = code.SchedulerOutput(99)
        left = own.schedule_running(plan)
        equal(
            granted(plan),
            {"a": (8, 1)},
            "(start, number of tokens) of the requests scheduled after b, which came first and was itself preempted",
        )
        equal(left, 15, "the budget returned, 16 before, of which a takes one token and the preempted b none")

    def test_a_long_prompt_in_the_middle(self, code):
        own = scheduler(code, num_blocks=30)
        _, b, _ = running(code, own, *(request(code, name, 3) for name in "abc"))
        own.max_num_batched_tokens = 8
        b.spec_token_ids = [21, 22, 23, 24, 25, 26, 27, 28]
        plan = code.SchedulerOutput(99)
        own.schedule_running(plan)
        expected = {"a": (3, 1), "b": (3, 6), "c": (3, 1)}
        equal(
            granted(plan),
            expected,
            "(start, number of tokens) of a and c, which lack 1 token, and b, which lacks 9, budget 8",
        )

    def test_one_in_flight_needs_no_token(self, code):
        own = scheduler(code, num_blocks=30)
        a, b, _ = running(code, own, *(request(code, name, 3) for name in "abc"))
        own.max_num_batched_tokens = 8
        a.in_flight = True
        b.spec_token_ids = [21, 22, 23, 24, 25, 26, 27, 28]
        plan = code.SchedulerOutput(99)
        own.schedule_running(plan)
        expected = {"b": (3, 7), "c": (3, 1)}
        equal(
            granted(plan),
            expected,
            "(start, number of tokens) of b, which lacks 9, and c, which lacks 1, while a is in flight, budget 8",
        )

    def test_the_one_after_the_preempted_goes_on(self, code):
        own = scheduler(code, num_blocks=6, budget=32, scheduling_policy="priority")
        _, _, c = running(
            code, own, *(request(code, name, 7, priority=priority) for name, priority in (("a", 0), ("b", 5), ("c", 1)))
        )
        answered(code, own, own.schedule())
        c.last_step += 1  # so that b is scheduled before c
        plan = code.SchedulerOutput(99)
        own.schedule_running(plan)
        what = "[scheduled, preempted], where a, b and c are scheduled in this order, and b is preempted for a's block"
        equal([granted(plan), plan.preempted_ids], [{"a": (8, 1), "c": (8, 1)}, ["b"]], what)


@exercise("5.7", points=2)
class TestScheduleWaiting:
    def test_as_many_as_the_budget_allows(self, code):
        own = scheduler(code, num_blocks=30)
        for name, length in (("a", 5), ("b", 9), ("c", 4), ("d", 3)):
            own.add(request(code, name, length))
        own.add(request(code, "a/1", 5, parent=own.requests["a"], child=1))
        plan = code.SchedulerOutput(1)
        own.schedule_waiting(plan, 16)
        equal(
            granted(plan),
            {"a": (0, 5), "b": (0, 9), "c": (0, 2)},
            "(start, number of tokens) of prompts of 5, 9, 4 and 3, and of a second sample of the first, which waits "
            "to fork it, with a budget of 16",
        )
        equal(names(own.waiting), ["d", "a/1"], "the requests that wait afterwards")

    def test_max_num_seqs(self, code):
        own = scheduler(code, num_blocks=30, seqs=2)
        for name in "abc":
            own.add(request(code, name, 3))
        plan = code.SchedulerOutput(1)
        own.schedule_waiting(plan, 16)
        equal(sorted(granted(plan)), ["a", "b"], "the requests admitted of a, b and c, with max_num_seqs=2")
        plan = code.SchedulerOutput(2)
        own.schedule_waiting(plan, 16)
        equal(granted(plan), {}, "the requests admitted while two run, with max_num_seqs=2")

    def test_no_request_overtakes(self, code):
        own = scheduler(code, num_blocks=4)
        for name, length in (("a", 8), ("b", 12), ("c", 2)):
            own.add(request(code, name, length))
        plan = code.SchedulerOutput(1)
        own.schedule_waiting(plan, 64)
        what = "the requests admitted to 4 blocks of 4, where a, b and c wait with prompts of 8, 12 and 2 tokens"
        equal(sorted(granted(plan)), ["a"], what)

    def test_one_token_is_a_budget(self, code):
        own = scheduler(code)
        own.add(request(code, "a", 3))
        plan = code.SchedulerOutput(1)
        own.schedule_waiting(plan, 1)
        equal(granted(plan), {"a": (0, 1)}, "(start, number of tokens) of a prompt of 3, with a budget of 1")

    def test_no_budget_no_request(self, code):
        own = scheduler(code)
        equal(own.schedule_waiting(code.SchedulerOutput(1), 16), None, "schedule_waiting while no request waits")
        own.add(request(code, "a", 3))
        plan = code.SchedulerOutput(1)
        own.schedule_waiting(plan, 0)
        equal(granted(plan), {}, "the requests admitted with a budget of 0")

    def test_the_policy_decides(self, code):
        own = scheduler(code, seqs=1, scheduling_policy="priority")
        for name, priority in (("a", 2), ("b", 0), ("c", 1)):
            own.add(request(code, name, 3, priority=priority))
        plan = code.SchedulerOutput(1)
        own.schedule_waiting(plan, 16)
        equal(sorted(granted(plan)), ["b"], "the first request admitted, with priorities a: 2, b: 0, c: 1")

    def test_one_that_was_swapped_out(self, code):
        own = scheduler(code, preemption="swap", num_host_blocks=8)
        (b,) = running(code, own, request(code, "b", 9))
        own.preempt(b, code.SchedulerOutput(98))
        own.add(request(code, "a", 3))
        plan = code.SchedulerOutput(99)
        own.schedule_waiting(plan, 16)
        what = "(start, number of tokens) of a, which is new, and b, which was swapped out with 9 computed tokens"
        equal(granted(plan), {"a": (0, 3), "b": (9, 1)}, what)

    def test_chunks_below_the_budget(self, code):
        own = scheduler(code, num_blocks=30, long_prefill_token_threshold=4)
        for name, length in (("a", 3), ("b", 9), ("c", 9)):
            own.add(request(code, name, length))
        plan = code.SchedulerOutput(1)
        own.schedule_waiting(plan, 13)
        expected = {"a": (0, 3), "b": (0, 4), "c": (0, 4)}
        equal(granted(plan), expected, "(start, number of tokens) of prompts of 3, 9 and 9, max_chunk 4, budget 13")


@exercise("5.8", points=3)
class TestUpdateFromOutput:
    def test_a_token_each(self, code):
        own = scheduler(code)
        a, b = request(code, "a", 3), request(code, "b", 5)
        own.add(a)
        own.add(b)
        plan = own.schedule()
        got = answered(code, own, plan, {"a": [11], "b": [12]})
        equal([a.output_token_ids, b.output_token_ids], [[11], [12]], "output_token_ids of a and b")
        equal([a.in_flight, b.in_flight], [False, False], "in_flight of a and b after update_from_output")
        equal(names(got), ["a", "b"], "the requests that update_from_output returns")
        equal(
            [a.num_computed_tokens, b.num_computed_tokens],
            [3, 5],
            "num_computed_tokens of a and b after the step that computed their prompts of 3 and 5 tokens",
        )

    def test_a_chunk_samples_nothing(self, code):
        own = scheduler(code, budget=4)
        a = request(code, "a", 10)
        own.add(a)
        outputs, computed = [], []
        for _ in range(4):
            plan = own.schedule()
            answered(code, own, plan)
            outputs.append(len(a.output_token_ids))
            computed.append(a.num_computed_tokens)
        what = "after each of four steps of a prompt of 10 in chunks of 4"
        equal(outputs, [0, 0, 1, 2], f"the number of output tokens {what}")
        equal(computed, [4, 8, 10, 11], f"num_computed_tokens {what}")

    def test_what_is_not_computed_is_not_cached(self, code):
        own = scheduler(code, budget=3, caching=True)
        a = request(code, "a", 10)
        own.add(a)
        findable = []
        for _ in range(5):
            answered(code, own, own.schedule())
            findable.append(sum(block.block_hash is not None for block in own.manager.block_tables["a"]))
        what = "the number of cached blocks of 4 after each step, where 3, 6, 9, 10 and 11 tokens are computed"
        equal(findable, [0, 1, 2, 2, 2], what)

    def test_finished(self, code):
        own = scheduler(code)
        a, b = request(code, "a", 3, max_tokens=1), request(code, "b", 3, stop_token_ids=frozenset({9}))
        own.add(a)
        own.add(b)
        answered(code, own, own.schedule(), {"a": [5], "b": [9]})
        equal(
            [a.finish_reason, b.finish_reason],
            ["length", "stop"],
            "finish_reason of a, whose max_tokens is 1, and of b, whose stop token is sampled",
        )
        equal(own.running, [], "the running requests after both have finished")
        equal(own.manager.pool.num_free_blocks, 12, "the number of free blocks of 12, after both have finished")

    def verified(self, code, drafts, sampled, budget: int = 16, **settings):
        """A request with a prompt of 3, one token of output (not computed) and draft tokens after it, one step on."""
        own = scheduler(code, caching=True)
        (a,) = running(code, own, request(code, "a", 3, **settings))
        a.spec_token_ids, own.max_num_batched_tokens = list(drafts), budget
        plan = own.schedule()
        answered(code, own, plan, {"a": list(sampled)}, spec_token_ids={"a": [55]})
        return own, a

    def test_rejected_draft_tokens_are_taken_back(self, code):
        _, a = self.verified(code, [21, 22, 23, 24], [21, 22, 30])
        equal(
            a.output_token_ids,
            [7, 21, 22, 30],
            "output_token_ids, [7] before, where [21, 22, 30] was sampled for draft tokens 21 to 24",
        )
        what = "[num_computed_tokens, spec_token_ids] of 4 tokens and two accepted draft tokens, next draft token 55"
        equal([a.num_computed_tokens, a.spec_token_ids], [6, [55]], what)
        _, a = self.verified(code, [21, 22, 23], [21, 22, 23, 24])
        equal(a.num_computed_tokens, 7, "num_computed_tokens, where all three draft tokens were accepted")
        _, a = self.verified(code, [21, 22, 23], [30])
        equal(a.num_computed_tokens, 4, "num_computed_tokens, where no draft token was accepted")
        _, a = self.verified(code, [21, 22, 23, 24], [21, 30], budget=3)
        what = "num_computed_tokens, where 2 of 4 draft tokens were scheduled, and one of them was accepted"
        equal(a.num_computed_tokens, 5, what)

    def test_what_comes_after_the_end_is_dropped(self, code):
        _, a = self.verified(code, [21, 9, 23], [21, 9, 23, 24], stop_token_ids=frozenset({9}))
        equal(
            a.output_token_ids,
            [7, 21, 9],
            "output_token_ids, where 9 is a stop token and draft tokens 21, 9, 23 were accepted",
        )
        equal(a.finish_reason, "stop", "finish_reason, where the stop token 9 is among accepted draft tokens")
        _, a = self.verified(code, [21, 22, 23], [21, 22, 23, 24], max_tokens=3)
        equal(
            a.output_token_ids,
            [7, 21, 22],
            "output_token_ids, with max_tokens=3, where three draft tokens were accepted",
        )

    def test_only_verified_tokens_are_found_again(self, code):
        own, _ = self.verified(code, [21, 22, 23, 24, 25], [30])
        table = own.manager.block_tables["a"]
        what = "whether its first two blocks of 4 are cached, after 4 verified tokens and 5 rejected draft tokens"
        equal([block.block_hash is not None for block in table[:2]], [True, False], what)
        own, _ = self.verified(code, [21, 22, 23, 24], [21, 22, 23, 24, 25])
        table = own.manager.block_tables["a"]
        what = "whether its first two blocks of 4 are cached, after 4 verified tokens and 4 accepted draft tokens"
        equal([block.block_hash is not None for block in table[:2]], [True, True], what)

    def test_failed_or_aborted_meanwhile(self, code):
        own = scheduler(code)
        a, b, c = (request(code, name, 3) for name in "abc")
        for each in (a, b, c):
            own.add(each)
        plan = own.schedule()
        own.abort("b")
        answered(code, own, plan, errors={"a": "not a number"})
        equal(a.finish_reason, "error", "finish_reason of a request that failed")
        equal(
            [b.finish_reason, b.output_token_ids],
            ["abort", []],
            "[finish_reason, output_token_ids] of a request that was aborted in flight",
        )
        equal(c.output_token_ids, [7], "output_token_ids of the third request, which neither failed nor was aborted")
        equal(names(own.running), ["c"], "the running requests after a failed and b was aborted")
        equal([each.in_flight for each in (a, b, c)], [False] * 3, "in_flight of a, b and c after update_from_output")
        equal(own.manager.pool.num_free_blocks, 11, "the number of free blocks of 12, where only c still holds one")

    def test_those_that_finish_are_returned(self, code):
        own = scheduler(code)
        a, b = request(code, "b", 3, max_tokens=1), request(code, "a", 3)
        own.add(a)
        own.add(b)
        got = answered(code, own, own.schedule())
        equal(
            sorted(names(got or [])),
            ["a", "b"],
            "the requests that update_from_output returns, one of which has finished",
        )

    def test_draft_tokens_are_used_once(self, code):
        own = scheduler(code)
        (a,) = running(code, own, request(code, "a", 3))
        a.spec_token_ids = [21, 22]
        answered(code, own, own.schedule(), {"a": [30]})
        equal(a.spec_token_ids, [], "spec_token_ids after a step that proposes no new draft tokens")

    def test_a_block_cut_off_by_the_end_is_not_cached(self, code):
        own, a = self.verified(code, [21, 22, 23, 24, 25], [21, 9, 23, 24, 25, 26], stop_token_ids=frozenset({9}))
        equal(
            a.output_token_ids,
            [7, 21, 9],
            "output_token_ids, where 9 is a stop token and all draft tokens were accepted",
        )
        equal(
            len(own.manager.pool.cached),
            1,
            "the number of cached blocks of 4, where the request ends with 3 + 3 tokens",
        )


# --- Preemption -------------------------------------------------------------------------------------------------------


@exercise("5.9")
class TestChooseVictim:
    def chosen(self, code, policy, *requests, served=None):
        own = scheduler(code, scheduling_policy=policy)
        running(code, own, *requests)
        own.served.update(served or {})
        victim = own.choose_victim()
        return victim and victim.request_id

    def test_last_come(self, code):
        b, a, c = (request(code, name, 2) for name in "bac")
        equal(self.chosen(code, "fcfs", b, c, a), "c", "the victim of a, b and c with the policy fcfs")

    def test_least_important(self, code):
        requests = [request(code, name, 2, priority=p) for name, p in (("a", 5), ("b", 0), ("c", 5), ("d", 1))]
        equal(
            self.chosen(code, "priority", *requests),
            "c",
            "the victim with the policy priority and priorities a: 5, b: 0, c: 5, d: 1",
        )

    def test_most_served(self, code):
        requests = [request(code, name, 2, tenant=tenant) for name, tenant in (("a", "x"), ("b", "y"), ("c", "y"))]
        got = self.chosen(code, "fair", *requests, served={"x": 90.0, "y": 20.0})
        equal(got, "a", "the victim with the policy fair of a (of x, served 90) and b and c (of y, served 20)")

    def test_never_in_flight(self, code):
        requests = [request(code, name, 2) for name in "abc"]
        own = scheduler(code)
        running(code, own, *requests)
        requests[2].in_flight = True
        victim = own.choose_victim()
        equal(victim and victim.request_id, "b", "the victim of a, b and c while c is in flight")
        for each in requests:
            each.in_flight = True
        equal(own.choose_victim(), None, "the victim while all are in flight")

    def test_the_only_one(self, code):
        equal(str(self.chosen(code, "fcfs", request(code, "a", 2))), "a", "the victim where only a runs")

    def test_the_last_of_the_samples(self, code):
        a = request(code, "a", 2)
        samples = [request(code, f"a{child}", 2, child=child) for child in (2, 1)]
        equal(
            self.chosen(code, "fcfs", samples[0], a, samples[1]),
            "a2",
            "the victim of the samples a, a1 and a2 of one prompt",
        )

    def test_one_that_runs(self, code):
        own = scheduler(code, seqs=2)
        running(code, own, request(code, "a", 2), request(code, "b", 2))
        own.add(request(code, "c", 2))
        victim = own.choose_victim()
        equal(victim and victim.request_id, "b", "the victim where a and b run and c waits")


@exercise("5.10")
class TestPreemptByRecompute:
    def test_nothing_is_held(self, code):
        own = scheduler(code)
        a, _ = running(code, own, request(code, "a", 9), request(code, "b", 3))
        answered(code, own, own.schedule())
        a.num_cached_tokens = 4
        own.preempt_by_recompute(a)
        equal(own.manager.pool.num_free_blocks, 11, "the number of free blocks of 12, where only b still holds one")
        equal(own.manager.block_table("a"), [], "the block table of the preempted request")
        what = "num_computed_tokens of the preempted request, which had computed 10 tokens"
        equal(a.num_computed_tokens, 0, what)
        equal(a.num_cached_tokens, 4, "num_cached_tokens of the preempted request, which must not change,")
        equal(a.last_step, 2, "last_step of the preempted request, which must not change,")
        equal(a.status.value, "waiting", "the status of the preempted request")
        what = "[number of prompt tokens, output_token_ids] of the preempted request, which must not change,"
        equal([len(a.prompt_token_ids), a.output_token_ids], [9, [7, 7]], what)

    def test_goes_on_where_it_was(self, code):
        own = scheduler(code)
        (a,) = running(code, own, request(code, "a", 5))
        own.preempt(a, code.SchedulerOutput(99))
        plan = own.schedule()
        equal(
            granted(plan),
            {"a": (0, 6)},
            "(start, number of tokens) when it is admitted again with 5 prompt tokens and one output token",
        )
        equal(plan.scheduled[0].sample_index, 1, "sample_index when it is admitted again with one output token")

    def test_the_rest_is_done_by_preempt(self, code):
        own = scheduler(code)
        a, _ = running(code, own, request(code, "a", 5), request(code, "b", 3))
        own.preempt(a, code.SchedulerOutput(99))
        what = "[running, waiting, a's num_preemptions] after `preempt`, which calls preempt_by_recompute"
        equal([names(own.running), names(own.waiting), a.num_preemptions], [["b"], ["a"], 1], what)


@exercise("5.11", points=2)
class TestSwapOut:
    def swapped(self, code, prompt=9, hosts=8):
        own = scheduler(code, preemption="swap", num_host_blocks=hosts)
        (a,) = running(code, own, request(code, "a", prompt))
        return own, a, code.SchedulerOutput(99)

    def test_by_hand(self, code):
        own, a, plan = self.swapped(code)
        table = own.manager.block_table("a")
        own.host_pool.get_new_blocks(1)  # so that the ids on the host differ from those on the device
        equal(own.swap_out(a, plan), True, "swap_out of 9 computed tokens, with 7 of 8 blocks free on the host")
        expected = [(table[0], 1, 4), (table[1], 2, 4), (table[2], 3, 1)]
        what = "plan.swaps_out, as (source, target, num_tokens), for 9 computed tokens in blocks of 4"
        equal([tuple(each) for each in plan.swaps_out], expected, what)
        equal(own.manager.pool.num_free_blocks, 12, "the number of free blocks on the device, of 12, after swap_out")
        equal(
            own.host_pool.num_free_blocks,
            4,
            "the number of free blocks on the host, of 8, one of which was taken before",
        )
        equal(a.status.value, "swapped", "the status of the request after swap_out")
        equal(a.num_computed_tokens, 9, "num_computed_tokens after swap_out, which must not change,")

    def test_just_enough_blocks_on_the_host(self, code):
        own, a, plan = self.swapped(code, hosts=3)
        equal(own.swap_out(a, plan), True, "swap_out of 3 blocks, with 3 free ones on the host")
        kept = [host.block_id for host in own.swapped.get("a", ())]
        equal(
            kept,
            [each[1] for each in plan.swaps_out],
            "the ids of the host blocks in `swapped`, compared with the targets in plan.swaps_out",
        )

    def test_too_few_blocks_on_the_host(self, code):
        own, a, plan = self.swapped(code, hosts=2)
        equal(own.swap_out(a, plan), False, "swap_out of 3 blocks, with 2 free ones on the host")
        what = "[plan.swaps_out, free blocks on the host] after swap_out returned False"
        equal([plan.swaps_out, own.host_pool.num_free_blocks], [[], 2], what)
        equal(len(own.manager.block_table("a")), 3, "the number of the request's blocks after swap_out returned False")

    def test_a_block_for_what_is_computed_only(self, code):
        own, a, plan = self.swapped(code, prompt=8)
        own.manager.allocate_slots(a, 1)
        own.swap_out(a, plan)
        equal(
            len(plan.swaps_out),
            2,
            "the number of moves for 8 computed tokens in 3 blocks of 4, the third without a computed token",
        )
        equal(
            [each.num_tokens for each in plan.swaps_out],
            [4, 4],
            "num_tokens of the moves for 8 computed tokens in blocks of 4",
        )

    def test_shared_blocks(self, code):
        own = scheduler(code, preemption="swap", num_host_blocks=8, caching=True)
        _, b = running(code, own, request(code, "a", 9), request(code, "b", 9))
        equal(
            own.manager.block_table("a")[:2], own.manager.block_table("b")[:2], "the first blocks of two equal prompts"
        )
        plan = code.SchedulerOutput(99)
        equal(own.swap_out(b, plan), True, "swap_out of b, which shares two of its three blocks with a")
        equal(
            [each.num_tokens for each in plan.swaps_out],
            [4, 4, 1],
            "num_tokens of the moves of b's blocks, of which two are shared",
        )
        held = [block.ref_cnt for block in own.manager.block_tables["a"]]
        what = "[number of free blocks of 12, ref_cnt of a's three blocks] after b was swapped out"
        equal([own.manager.pool.num_free_blocks, held], [9, [1, 1, 1]], what)

    def test_the_rest_is_done_by_preempt(self, code):
        own, a, plan = self.swapped(code)
        own.preempt(a, plan)
        what = "[running, waiting, a's num_preemptions] after `preempt`, which calls swap_out"
        equal([names(own.running), names(own.waiting), a.num_preemptions], [[], ["a"], 1], what)


@exercise("5.12", points=2)
class TestSwapIn:
    def back(self, code, prompt=9):
        own = scheduler(code, preemption="swap", num_host_blocks=8)
        (a,) = running(code, own, request(code, "a", prompt))
        own.host_pool.get_new_blocks(2)  # so that the ids on the host differ from those on the device
        plan = code.SchedulerOutput(98)
        own.preempt(a, plan)
        return own, a, plan

    def test_by_hand(self, code):
        own, a, _ = self.back(code)
        own.manager.allocate_slots(a, 1)
        plan = code.SchedulerOutput(99)
        own.swap_in(a, plan)
        table = own.manager.block_table("a")
        expected = [(2, table[0], 4), (3, table[1], 4), (4, table[2], 1)]
        equal(
            [tuple(each) for each in plan.swaps_in],
            expected,
            "plan.swaps_in, as (source, target, num_tokens), for 9 computed tokens",
        )
        equal(
            own.host_pool.num_free_blocks,
            6,
            "the number of free blocks on the host, of 8, two of which were taken before",
        )
        equal(sorted(own.swapped), [], "the request ids in `swapped` after swap_in")

    def test_full_blocks(self, code):
        own, a, _ = self.back(code, prompt=8)
        own.manager.allocate_slots(a, 1)
        plan = code.SchedulerOutput(99)
        own.swap_in(a, plan)
        equal(
            [each.num_tokens for each in plan.swaps_in],
            [4, 4],
            "num_tokens of the moves for 8 computed tokens in blocks of 4",
        )

    def test_goes_on_where_it_was(self, code):
        own, _, _ = self.back(code)
        plan = own.schedule()
        equal(
            granted(plan), {"a": (9, 1)}, "(start, number of tokens) when it is admitted again with 9 computed tokens"
        )
        equal(len(plan.swaps_in), 3, "the number of moves in plan.swaps_in for 9 tokens in blocks of 4")
        holds(
            balanced(own),
            "A block's ref_cnt is not the number of tables that contain it, or a block is wrongly free or not free.",
            actual=granted(plan),
        )


# --- Leaving ----------------------------------------------------------------------------------------------------------


@exercise("5.13")
class TestAbort:
    def abort(self, own, request_id: str, what: str) -> None:
        try:
            own.abort(request_id)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            holds(False, f"abort of {what} raised {text}", actual=text)

    def test_waiting_and_running(self, code):
        own = scheduler(code)
        (a,) = running(code, own, request(code, "a", 3))
        own.add(request(code, "b", 3))
        self.abort(own, "b", "b, which waits")
        equal([names(own.waiting), names(own.running)], [[], ["a"]], "[waiting, running] after the abort of b")
        self.abort(own, "a", "a, which runs")
        equal([names(own.running), a.finish_reason], [[], "abort"], "[running, a's finish_reason] after the abort of a")
        equal(own.manager.pool.num_free_blocks, 12, "the number of free blocks of 12, after a and b were aborted")

    def test_in_flight(self, code):
        own = scheduler(code)
        a = request(code, "a", 6)
        own.add(a)
        plan = own.schedule()
        self.abort(own, "a", "a, which is in flight")
        equal(
            own.manager.pool.num_free_blocks,
            10,
            "the number of free blocks of 12, while the aborted request is in flight with two",
        )
        reason = a.finish_reason
        holds(
            reason == "abort",
            f"finish_reason of a request aborted in flight is {reason!r}, expected 'abort'.",
            repr(reason),
        )
        victim = own.choose_victim()
        equal(victim and victim.request_id, None, "choose_victim() while the aborted request is in flight")
        answered(code, own, plan)
        equal(
            own.manager.pool.num_free_blocks,
            12,
            "the number of free blocks of 12, after the aborted request's step was collected",
        )
        equal(a.output_token_ids, [], "output_token_ids of the aborted request, whose sampled token is dropped,")

    def test_unknown(self, code):
        own = scheduler(code)
        running(code, own, request(code, "a", 3))
        self.abort(own, "unknown", "an id that no request has (it must be ignored)")
        equal(names(own.running), ["a"], "the running requests after the abort of an unknown id")

    def test_its_samples_go_on(self, code):
        own = scheduler(code)
        a = request(code, "a", 3)
        others = [request(code, f"a/{child}", 3, arrival=0, parent=a, child=child) for child in (1, 2)]
        running(code, own, a, *others)
        self.abort(own, "a", "a, the first of three samples")
        what = "[a's finish_reason, the running requests] after the abort of the first of three samples"
        equal([a.finish_reason, names(own.running)], ["abort", ["a/1", "a/2"]], what)


@exercise("5.14", points=2)
class TestFinish:
    def test_wherever_it_stood(self, code):
        own = scheduler(code, preemption="swap", num_host_blocks=8)
        a, _b = running(code, own, request(code, "a", 6), request(code, "b", 3))
        c = request(code, "c", 3)
        own.add(c)
        for each, reason in ((a, "stop"), (c, "abort")):
            own.finish(each, reason)
            equal(
                [each.finish_reason, each.status.value, each.request_id in own.requests],
                [reason, "finished", False],
                f"[finish_reason, status, whether it is in `requests`] of {each.request_id} after finish",
            )
        equal([names(own.running), names(own.waiting)], [["b"], []], "[running, waiting] after a and c have finished")
        equal(own.manager.pool.num_free_blocks, 11, "the number of free blocks of 12, where only b still holds one")
        equal([len(own.finished_ids), own.finished_ids], [2, ["a", "c"]], "[length of finished_ids, finished_ids]")

    def test_a_long_day(self, code):
        own = scheduler(code, preemption="swap", num_host_blocks=4)
        free = []
        for _ in range(3):
            (a,) = running(code, own, request(code, "a", 7))
            own.preempt(a, code.SchedulerOutput(99))
            own.abort("a")
            free.append(own.host_pool.num_free_blocks)
            own.finished_ids.clear()
        what = "the number of free blocks on the host, of 4, after each of three requests was swapped out and aborted"
        equal(free, [4, 4, 4], what)
        equal(own.swapped, {}, "`swapped` after all requests have finished")

    def test_the_others_keep_theirs(self, code):
        own = scheduler(code, preemption="swap", num_host_blocks=4)
        a, b = running(code, own, request(code, "a", 7), request(code, "b", 7))
        for each in (a, b):
            own.preempt(each, code.SchedulerOutput(99))
        own.finish(a, "abort")
        what = "[free blocks on the host, ids in `swapped`] after one of two swapped requests finished"
        equal([own.host_pool.num_free_blocks, sorted(own.swapped)], [2, ["b"]], what)


@together()
class TestTogether:
    """Your whole file: every request gets its tokens from a pool that is too small for all, under every policy."""

    def test_all_are_served(self, code):
        for policy in ("fcfs", "priority", "fair"):
            for preemption in ("recompute", "swap"):
                what = f"{policy}, preemption by {preemption}"
                own = scheduler(
                    code, num_blocks=7, budget=7, caching=True, scheduling_policy=policy, preemption=preemption,
                    num_host_blocks=5,
                )  # fmt: skip
                requests = [
                    request(code, name, 3 + 3 * i, max_tokens=6, tenant="xy"[i % 2], priority=i % 3)
                    for i, name in enumerate("abcde")
                ]
                for each in requests:
                    own.add(each)
                num_steps, num_preemptions = 0, 0
                while own.requests:
                    plan = own.schedule()
                    holds(plan.num_tokens <= 7, f"A step has {plan.num_tokens} tokens, but the budget is 7; {what}.")
                    answered(code, own, plan)
                    holds(
                        balanced(own),
                        f"A ref_cnt is not the number of tables with this block, or a block is wrongly free; {what}.",
                    )
                    num_steps, num_preemptions = num_steps + 1, num_preemptions + len(plan.preempted_ids)
                    holds(num_steps < 200, f"After 200 steps {names(own.requests.values())} are not finished; {what}.")
                lengths = [len(each.output_token_ids) for each in requests]
                equal(lengths, [6] * 5, f"the numbers of output tokens of five requests; {what}")
                free = [own.manager.pool.num_free_blocks, own.host_pool.num_free_blocks]
                equal(free, [7, 5], f"free blocks at the end, of 7 on the device and 5 on the host; {what}")
                holds(
                    num_preemptions > 0, f"No request was preempted; {what}. Are blocks used by two requests at once?"
                )
