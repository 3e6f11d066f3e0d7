"""Lesson 5, second half: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import right, wrong

ANSWERS = [
    # ------------------------------------------------------------------------------------------- 5.15 flatten_batch
    wrong(
        "5.15",
        "positions counted from 0 for every request",
        "range(request.start, end)",
        "range(len(request.token_ids))",
    ),
    wrong(
        "5.15",
        "logit rows for every request, even in the middle of its prompt",
        "if request.sample_index is not None:",
        "if True:",
    ),
    wrong(
        "5.15",
        "only the last row of each request, without those of its draft tokens",
        "len(token_ids) - request.num_spec_tokens - 1",
        "len(token_ids) - 1",
    ),
    wrong(
        "5.15",
        "context_lens of this step's tokens only",
        "context_lens.append(end)",
        "context_lens.append(len(request.token_ids))",
    ),
    wrong(
        "5.15",
        "context_lens without this step's tokens",
        "context_lens.append(end)",
        "context_lens.append(request.start)",
    ),
    wrong(
        "5.15",
        "slots counted from the start of the table",
        "slot_mapping(request.block_table, request.start,",
        "slot_mapping(request.block_table, 0,",
    ),
    wrong("5.15", "query_start without the 0 at its beginning", "[], [], [], [], [0], []", "[], [], [], [], [], []"),
    wrong(
        "5.15",
        "context_lens without the draft tokens",
        "context_lens.append(end)",
        "context_lens.append(end - request.num_spec_tokens)",
    ),
    wrong("5.15", "`device` ignored", "dtype=torch.long, device=device)", "dtype=torch.long)"),
    right(
        "5.15",
        "with tensors",
        """
        sizes = [len(each.token_ids) for each in scheduled]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        rows = [
            row
            for each, end in zip(scheduled, ends[1:])
            if each.sample_index is not None
            for row in range(end - 1 - each.num_spec_tokens, end)
        ]
        positions = [torch.arange(size) + each.start for each, size in zip(scheduled, sizes)]
        slots = [
            each.block_table[p // block_size] * block_size + p % block_size
            for each, own in zip(scheduled, positions)
            for p in own.tolist()
        ]
        return Batch(
            torch.tensor([token for each in scheduled for token in each.token_ids], device=device),
            torch.cat(positions).to(device),
            AttentionMetadata(
                ends,
                [each.start + size for each, size in zip(scheduled, sizes)],
                torch.tensor(slots, device=device),
                [list(each.block_table) for each in scheduled],
            ),
            torch.tensor(rows, dtype=torch.long, device=device),
        )
        """,
    ),
    # --------------------------------------------------------------------------------------------- 5.14 Engine.step
    wrong(
        "5.16",
        "only one step in flight, whatever the executor's depth is",
        "while len(self.in_flight) < self.executor.depth:",
        "while not self.in_flight:",
    ),
    wrong("5.16", "the collected step left in flight", "self.in_flight.popleft()", "self.in_flight[0]"),
    wrong("5.16", "an empty list although requests wait", "if self.has_unfinished_requests:", "if False:"),
    wrong(
        "5.16",
        "requests in the middle of their prompt not reported",
        "for request in requests]",
        "for request in requests if request.output_token_ids or request.finish_reason]",
    ),
    wrong(
        "5.16", "logprobs not passed on", "self.report(request, result)", "self.report(request, ModelRunnerOutput(0))"
    ),
    wrong("5.16", "nothing returned", "return outputs", "return []", recognised=False),
    wrong(
        "5.16",
        "`totals.observe` not called",
        "self.totals.observe(self.scheduler, plan, result, outputs, time.perf_counter() - start)",
        "pass",
    ),
    wrong("5.16", "the newest step collected first", "self.in_flight.popleft()", "self.in_flight.pop()"),
    wrong(
        "5.16",
        "`executor.submit` called in place of `self.submit`, which records the time of first scheduling",
        "self.submit(plan)",
        "self.in_flight.append(plan)\n            self.executor.submit(plan)",
    ),
    wrong("5.16", "0 seconds passed to `totals.observe`", "time.perf_counter() - start)", "0.0)"),
    wrong("5.16", "a step that only moves blocks dropped", "if plan.is_empty:", "if not plan.scheduled:"),
    wrong(
        "5.16",
        "the executor's next result used, even that of an interrupted step",
        "self.collect(plan)",
        "self.executor.collect()",
    ),
    wrong(
        "5.16",
        "an empty list of outputs passed to `totals.observe`",
        "self.totals.observe(self.scheduler, plan, result, outputs,",
        "self.totals.observe(self.scheduler, plan, result, [],",
    ),
    right(
        "5.16",
        "filled first",
        """
        room = self.executor.depth - len(self.in_flight)
        for _ in range(room):
            plan = self.scheduler.schedule()
            if not plan.scheduled and not plan.preempted_ids:
                break
            self.submit(plan)
        if len(self.in_flight) == 0:
            if not self.has_unfinished_requests:
                return []
            raise RuntimeError("no request can be served")
        oldest = self.in_flight.popleft()
        result, outputs = self.collect(oldest), []
        for request in self.scheduler.update_from_output(oldest, result):
            outputs.append(self.report(request, result))
        self.totals.observe(self.scheduler, oldest, result, outputs, time.perf_counter() - start)
        return outputs
        """,
    ),
]
