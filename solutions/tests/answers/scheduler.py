"""Lesson 5, first half: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import equivalent, planted, right, wrong, wrong_body

ANSWERS = [
    # ------------------------------------------------------------------------------------------- 5.1 static_batch
    wrong("5.1", "each batch as long as its shortest request", "start += max(batch)", "start += min(batch)"),
    wrong("5.1", "no batch waits for the batch before it", "start += max(batch)", "pass"),
    wrong(
        "5.1",
        "each request as long as its whole batch",
        "range(start, start + length)",
        "range(start, start + max(batch))",
    ),
    wrong("5.1", "each batch as long as the sum of its requests", "start += max(batch)", "start += sum(batch)"),
    wrong("5.1", "each batch as long as its last request", "start += max(batch)", "start += batch[-1]"),
    right(
        "5.1",
        "one list of batches first",
        """
        batches = [output_lengths[i : i + batch_size] for i in range(0, len(output_lengths), batch_size)]
        begins = [sum(max(each) for each in batches[:n]) for n in range(len(batches))]
        return [range(begin, begin + length) for begin, batch in zip(begins, batches) for length in batch]
        """,
    ),
    # ------------------------------------------------------------------------------------------ 5.2 finish_reason
    wrong_body(
        "5.2",
        "length returned before the stop token is looked at",
        """
        if len(request.output_token_ids) >= request.max_tokens:
            return "length"
        if request.output_token_ids and request.output_token_ids[-1] in request.stop_token_ids:
            return "stop"
        return None
        """,
    ),
    wrong("5.2", "one token too many", ">= request.max_tokens", "> request.max_tokens"),
    wrong(
        "5.2",
        "a stop token anywhere in the output",
        "request.output_token_ids and request.output_token_ids[-1] in request.stop_token_ids",
        "set(request.output_token_ids) & request.stop_token_ids",
    ),
    wrong(
        "5.2",
        "the last of all tokens, which may be in the prompt",
        "request.output_token_ids and request.output_token_ids[-1] in request.stop_token_ids",
        "request.all_token_ids[-1] in request.stop_token_ids",
    ),
    wrong("5.2", "the prompt's tokens counted too", "len(request.output_token_ids) >=", "request.num_tokens >="),
    wrong(
        "5.2",
        "the limit of sampling_params, not the request's",
        ">= request.max_tokens",
        ">= request.sampling_params.max_tokens",
    ),
    wrong(
        "5.2",
        "the stop token 0 ignored, because 0 counts as false",
        "if request.output_token_ids and request",
        "if request.output_token_ids and request.output_token_ids[-1] and request",
    ),
    right(
        "5.2",
        "by the last token's slice",
        """
        ended = any(token_id in request.stop_token_ids for token_id in request.output_token_ids[-1:])
        return "stop" if ended else "length" if len(request.output_token_ids) == request.max_tokens else None
        """,
    ),
    # ------------------------------------------------------------------------------------- 5.3 tokens_to_schedule
    wrong("5.3", "the computed tokens not subtracted", " - request.num_computed_tokens", ""),
    wrong("5.3", "draft tokens left out", " + len(request.spec_token_ids)", ""),
    wrong("5.3", "the budget ignored", "min(num_uncomputed, budget, max_chunk)", "min(num_uncomputed, max_chunk)"),
    wrong("5.3", "max_chunk ignored", "min(num_uncomputed, budget, max_chunk)", "min(num_uncomputed, budget)"),
    wrong("5.3", "only the tokens of the prompt counted", "request.num_tokens +", "len(request.prompt_token_ids) +"),
    wrong(
        "5.3",
        "cached tokens subtracted a second time",
        "- request.num_computed_tokens",
        "- request.num_computed_tokens - request.num_cached_tokens",
    ),
    wrong(
        "5.3",
        "at least one token, even with a budget of 0",
        "min(num_uncomputed, budget, max_chunk)",
        "max(1, min(num_uncomputed, budget, max_chunk))",
    ),
    wrong(
        "5.3",
        "max_chunk applied only to requests without output",
        "min(num_uncomputed, budget, max_chunk)",
        "min(num_uncomputed, budget, budget if request.output_token_ids else max_chunk)",
    ),
    wrong(
        "5.3",
        "cached tokens counted as computed, even after a preemption",
        "- request.num_computed_tokens",
        "- max(request.num_computed_tokens, request.num_cached_tokens)",
    ),
    right(
        "5.3",
        "counted down",
        """
        known = len(request.all_token_ids) + len(request.spec_token_ids)
        return len(range(request.num_computed_tokens, known)[: min(budget, max_chunk)])
        """,
    ),
    # -------------------------------------------------------------------------------------------- 5.4 fair_share
    wrong("5.4", "the most served first", "(served[request.tenant],", "(-served[request.tenant],"),
    wrong(
        "5.4",
        "sorted by arrival before the tokens served",
        "(served[request.tenant], request.arrival)",
        "(request.arrival, served[request.tenant])",
    ),
    wrong(
        "5.4",
        "the order of arrival left out",
        "(served[request.tenant], request.arrival)",
        "(served[request.tenant],)",
    ),
    wrong(
        "5.4", "the later arrival first, where the tenants were served equally", "request.arrival)", "-request.arrival)"
    ),
    wrong("5.4", "the request's own tokens, instead of its tenant's", "served[request.tenant]", "request.num_tokens"),
    wrong("5.4", "request ids in place of arrival", "request.arrival)", "request.request_id)"),
    wrong("5.4", "priority before arrival", "request.arrival)", "request.priority, request.arrival)"),
    wrong("5.4", "the fractions of served counts cut off", "served[request.tenant]", "int(served[request.tenant])"),
    right("5.4", "as a list", "return [served.get(request.tenant), request.arrival]"),
    # -------------------------------------------------------------------------------------------------- 5.5 join
    wrong(
        "5.5",
        "a returning tenant keeps its low count",
        "max(own, min(served[other] for other in active))",
        "own",
    ),
    wrong(
        "5.5",
        "raised to the highest count of the active tenants",
        "min(served[other] for other in active)",
        "max(served[other] for other in active)",
    ),
    wrong(
        "5.5",
        "lowered, too, where its count is above the lowest",
        "max(own, min(served[other] for other in active))",
        "min(served[other] for other in active)",
    ),
    wrong(
        "5.5",
        "inactive tenants counted too",
        "min(served[other] for other in active)",
        "min(served[other] for other in served if other != tenant)",
    ),
    wrong(
        "5.5",
        "a tenant that is active itself raised, too",
        "if active and tenant not in active:",
        "if active:\n        active = active - {tenant} or active",
    ),
    right(
        "5.5",
        "in two steps",
        """
        if tenant not in served:
            served[tenant] = 0.0
        if tenant in active or not active:
            return
        lowest = sorted(served[other] for other in active)[0]
        if served[tenant] < lowest:
            served[tenant] = lowest
        """,
    ),
    # ----------------------------------------------------------------------------- 5.6 Scheduler.schedule_running
    wrong("5.6", "no token left for the requests after it", "max(1, budget - num_after)", "budget"),
    wrong("5.6", "the budget not reduced", "budget -= num_tokens", "pass"),
    wrong("5.6", "one token for each request, prompts too", "max(1, budget - num_after)", "1"),
    wrong(
        "5.6",
        "no token for the first requests if the budget is too small for all",
        "max(1, budget - num_after)",
        "max(0, budget - num_after)",
    ),
    wrong(
        "5.6",
        "all tokens scheduled, although `make_room` returned fewer",
        "num_tokens = self.make_room(request, num_tokens, plan)\n            if num_tokens > 0:",
        "if self.make_room(request, num_tokens, plan):",
        recognised=False,
    ),
    wrong(
        "5.6",
        "the policy's order in place of the order of `ready`",
        "for i, request in enumerate(ready):",
        "for i, request in enumerate(sorted(ready, key=self.rank)):",
    ),
    wrong("5.6", "no stop when the budget is 0", "if budget == 0:", "if False:"),
    wrong(
        "5.6",
        "a request scheduled although it was preempted",
        "if request.status is not RequestStatus.RUNNING:",
        "if False:",
    ),
    wrong(
        "5.6",
        "the result of `make_room` ignored",
        "num_tokens = self.make_room(request, num_tokens, plan)",
        "self.make_room(request, num_tokens, plan)",
        recognised=False,
    ),
    wrong("5.6", "the loop ended at the first preempted request", "continue", "break"),
    wrong(
        "5.6",
        "a token of the budget subtracted for a request that got none",
        "budget -= num_tokens",
        "budget -= max(1, num_tokens)",
    ),
    wrong("5.6", "a token left for requests in flight, too", "len(ready) - i - 1", "len(self.running) - i - 1"),
    right(
        "5.6",
        "from a queue",
        """
        queue = list(ready)
        while queue and budget:
            each = queue.pop(0)
            if each not in self.running:
                continue
            allowed = budget - len(queue) if budget > len(queue) else 1
            count = self.make_room(each, tokens_to_schedule(each, allowed, self.max_chunk), plan)
            if count > 0:
                self.schedule_request(each, count, plan)
            budget = budget - count
        return budget
        """,
    ),
    # ----------------------------------------------------------------------------- 5.7 Scheduler.schedule_waiting
    wrong("5.7", "one request more than max_num_seqs", "< self.max_num_seqs", "<= self.max_num_seqs"),
    wrong(
        "5.7",
        "the budget not reduced",
        "budget -= self.admit(request, budget, plan)",
        "self.admit(request, budget, plan)",
    ),
    wrong(
        "5.7",
        "one request a step",
        "budget -= self.admit(request, budget, plan)",
        "self.admit(request, budget, plan)\n            break",
    ),
    wrong("5.7", "`can_allocate` not called", " or not self.can_allocate(request)", "", recognised=False),
    wrong_body(
        "5.7",
        "later requests admitted where the first waiting one does not fit",
        """
        for request in sorted(self.waiting, key=self.rank):
            if budget > 0 and len(self.running) < self.max_num_seqs and self.can_allocate(request):
                budget -= self.admit(request, budget, plan)
        """,
    ),
    wrong_body(
        "5.7",
        "the order of arrival, whatever the policy",
        """
        while budget > 0 and len(self.running) < self.max_num_seqs and self.waiting:
            if not self.can_allocate(self.waiting[0]):
                break
            budget -= self.admit(self.waiting[0], budget, plan)
        """,
    ),
    wrong(
        "5.7",
        "no request admitted after one that got a full chunk",
        "budget -= self.admit(request, budget, plan)",
        "num_tokens = self.admit(request, budget, plan)\n            budget -= num_tokens\n"
        "            if num_tokens == self.max_chunk:\n                break",
    ),
    wrong(
        "5.7",
        "all tokens of a request subtracted from the budget, not only those scheduled",
        "budget -= self.admit(request, budget, plan)",
        "self.admit(request, budget, plan)\n            budget -= request.num_tokens",
    ),
    wrong(
        "5.7",
        "the first waiting request, even if it is a sample that must wait for its parent",
        "self.next_waiting(plan)",
        "min(self.waiting, key=self.rank, default=None)",
    ),
    wrong(
        "5.7",
        "requests that were swapped out never admitted",
        "request is None or",
        "request is None or request.status is not RequestStatus.WAITING or",
    ),
    right(
        "5.7",
        "for each free slot",
        """
        for _ in range(self.max_num_seqs - len(self.running)):
            first = self.next_waiting(plan) if budget > 0 else None
            if first is None or not self.can_allocate(first):
                return
            budget = budget - self.admit(first, budget, plan)
        """,
    ),
    # --------------------------------------------------------------------------- 5.8 Scheduler.update_from_output
    wrong(
        "5.8",
        "rejected draft tokens still counted as computed",
        "request.num_computed_tokens -= scheduled.num_spec_tokens + 1 - len(sampled)",
        "pass",
    ),
    wrong(
        "5.8",
        "one token too many subtracted",
        "scheduled.num_spec_tokens + 1 - len(sampled)",
        "scheduled.num_spec_tokens + 2 - len(sampled)",
    ),
    wrong(
        "5.8",
        "all draft tokens subtracted, accepted ones too",
        "scheduled.num_spec_tokens + 1 - len(sampled)",
        "scheduled.num_spec_tokens",
    ),
    wrong(
        "5.8",
        "tokens after the end kept",
        "if reason:\n                    break",
        "if reason:\n                    pass",
    ),
    wrong("5.8", "one token subtracted where nothing was sampled", "if sampled:", "if True:"),
    wrong(
        "5.8",
        "a chunk in the middle of a prompt counted as the whole prompt",
        "request.spec_token_ids = output",
        "request.num_computed_tokens = request.num_tokens - 1\n            request.spec_token_ids = output",
    ),
    wrong(
        "5.8",
        "a block whose last token is not computed entered into the prefix cache",
        "min(request.num_computed_tokens, request.num_tokens))",
        "request.num_computed_tokens + 1)",
    ),
    wrong(
        "5.8",
        "tokens that are not computed entered into the prefix cache",
        "min(request.num_computed_tokens, request.num_tokens))",
        "request.num_tokens)",
    ),
    wrong(
        "5.8",
        "a chunk in the middle of a prompt no longer counted as computed",
        "if sampled:",
        "if not sampled:\n                request.num_computed_tokens = scheduled.start\n            else:",
        recognised=False,
    ),
    wrong("5.8", "in_flight still True afterwards", "request.in_flight = False", "request.in_flight = True"),
    wrong("5.8", "the new draft tokens not stored", "output.spec_token_ids.get(request.request_id, [])", "[]"),
    wrong(
        "5.8",
        "blocks with rejected draft tokens entered into the prefix cache",
        "min(request.num_computed_tokens, request.num_tokens))",
        "request.num_computed_tokens // 4 * 4 + 4 if scheduled.num_spec_tokens else 0)",
        recognised=False,
    ),
    wrong(
        "5.8",
        "a request that was aborted in flight goes on",
        "if request.finish_reason or request.request_id in output.errors:",
        "if request.request_id in output.errors:",
    ),
    wrong(
        "5.8",
        "requests that finish not returned",
        "return requests",
        "return [request for request in requests if request.status is not RequestStatus.FINISHED]",
    ),
    wrong(
        "5.8",
        "draft tokens verified a second time",
        "output.spec_token_ids.get(request.request_id, [])",
        "output.spec_token_ids.get(request.request_id, request.spec_token_ids)",
    ),
    wrong(
        "5.8",
        "a block with dropped tokens entered into the prefix cache",
        "min(request.num_computed_tokens, request.num_tokens))",
        "request.num_computed_tokens)",
    ),
    wrong(
        "5.8",
        "all draft tokens of the request subtracted, scheduled or not",
        "scheduled.num_spec_tokens + 1",
        "len(request.spec_token_ids) + 1",
    ),
    right(
        "5.8",
        "in three passes",
        """
        for request in requests:
            request.in_flight = False
        for scheduled, request in zip(plan.scheduled, requests):
            name = request.request_id
            if name in output.errors or request.finish_reason is not None:
                self.finish(request, "abort" if request.finish_reason else "error")
                continue
            tokens = list(output.sampled_token_ids.get(name, ()))
            if tokens:
                accepted = len(tokens) - 1
                request.num_computed_tokens = request.num_computed_tokens - (scheduled.num_spec_tokens - accepted)
            request.spec_token_ids = list(output.spec_token_ids.get(name, ()))
            while tokens and finish_reason(request) is None:
                request.append(tokens.pop(0))
            self.manager.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))
            if finish_reason(request) is not None:
                self.finish(request, finish_reason(request))
        return requests
        """,
    ),
    # -------------------------------------------------------------------------------- 5.9 Scheduler.choose_victim
    wrong("5.9", "the first in the policy's order, instead of the last", "return max(", "return min("),
    wrong(
        "5.9",
        "requests in flight not left out",
        "for request in self.running if not request.in_flight)",
        "for request in self.running)",
    ),
    wrong("5.9", "the last to arrive, whatever the policy", "key=self.rank", "key=lambda request: request.arrival"),
    wrong_body(
        "5.9",
        "the request that was admitted last",
        "return ([each for each in self.running if not each.in_flight] or [None])[-1]",
        recognised=False,
    ),
    wrong(
        "5.9",
        "the order of the samples of one prompt ignored",
        "key=self.rank",
        "key=lambda request: self.policy(request, self.served)",
    ),
    wrong("5.9", "waiting requests, too", "in self.running if", "in [*self.running, *self.waiting] if"),
    wrong_body(
        "5.9",
        "None if only one request runs",
        """
        candidates = [request for request in self.running if not request.in_flight]
        return max(candidates, key=self.rank) if len(candidates) > 1 else None
        """,
    ),
    right(
        "5.9",
        "sorted",
        """
        candidates = sorted([each for each in self.running if not each.in_flight], key=self.rank)
        return candidates.pop() if candidates else None
        """,
    ),
    # -------------------------------------------------------------------------- 5.10 Scheduler.preempt_by_recompute
    wrong("5.10", "its blocks not freed", "self.manager.free(request)", "pass"),
    wrong(
        "5.10",
        "the blocks freed, but the block table kept",
        "self.manager.free(request)",
        "self.manager.pool.free_blocks(self.manager.block_tables[request.request_id])",
    ),
    wrong("5.10", "its tokens still counted as computed", "request.num_computed_tokens = 0", "pass"),
    wrong(
        "5.10",
        "only the output counted as not computed",
        "request.num_computed_tokens = 0",
        "request.num_computed_tokens = len(request.prompt_token_ids)",
    ),
    wrong(
        "5.10",
        "its output tokens deleted",
        "request.num_computed_tokens = 0",
        "request.num_computed_tokens = 0\n        request.output_token_ids.clear()",
    ),
    wrong("5.10", "its status still running", "request.status = RequestStatus.WAITING", "pass"),
    wrong(
        "5.10",
        "appended to `waiting`, which `preempt` does",
        "request.status = RequestStatus.WAITING",
        "request.status = RequestStatus.WAITING\n        self.waiting.append(request)",
    ),
    wrong(
        "5.10",
        "the preemption counted a second time",
        "request.status = RequestStatus.WAITING",
        "request.status = RequestStatus.WAITING\n        request.num_preemptions += 1",
    ),
    wrong(
        "5.10",
        "its cached prompt tokens counted as computed",
        "request.num_computed_tokens = 0",
        "request.num_computed_tokens = request.num_cached_tokens",
    ),
    wrong(
        "5.10",
        "`last_step` reset, as if it had never been scheduled",
        "request.num_computed_tokens = 0",
        "request.num_computed_tokens = 0\n        request.last_step = -1",
    ),
    right(
        "5.10",
        "in another order",
        """
        request.status, request.num_computed_tokens = RequestStatus.WAITING, 0
        self.manager.free(request)
        """,
    ),
    # ------------------------------------------------------------------------------------- 5.11 Scheduler.swap_out
    wrong(
        "5.11",
        "whole blocks moved, filled or not",
        "num_filled = min(block_size, request.num_computed_tokens - i * block_size)",
        "num_filled = block_size",
    ),
    wrong(
        "5.11",
        "0 slots of a last block that is full",
        "num_filled = min(block_size, request.num_computed_tokens - i * block_size)",
        "num_filled = request.num_computed_tokens % block_size if i == num_blocks - 1 else block_size",
    ),
    wrong("5.11", "the blocks on the device not freed", "self.manager.free(request)", "pass"),
    wrong(
        "5.11",
        "source and target exchanged",
        "BlockCopy(block_id, host.block_id, num_filled)",
        "BlockCopy(host.block_id, block_id, num_filled)",
    ),
    wrong(
        "5.11",
        "a host block for each block of its table, even those without computed tokens",
        "num_blocks = cdiv(request.num_computed_tokens, block_size)",
        "num_blocks = len(self.manager.block_table(request.request_id))",
    ),
    wrong("5.11", "its status still running", "request.status = RequestStatus.SWAPPED", "pass"),
    wrong(
        "5.11",
        "num_computed_tokens set to 0",
        "request.status = RequestStatus.SWAPPED",
        "request.status = RequestStatus.SWAPPED\n        request.num_computed_tokens = 0",
    ),
    wrong(
        "5.11",
        "the preemption counted a second time",
        "request.status = RequestStatus.SWAPPED",
        "request.status = RequestStatus.SWAPPED\n        request.num_preemptions += 1",
    ),
    wrong(
        "5.11",
        "refused where a block is shared",
        "if num_blocks > self.host_pool.num_free_blocks:",
        "blocks = self.manager.block_tables[request.request_id]\n"
        "        if num_blocks > self.host_pool.num_free_blocks or any(block.ref_cnt > 1 for block in blocks):",
    ),
    wrong(
        "5.11",
        "shared blocks not freed",
        "self.manager.free(request)",
        "table = self.manager.block_tables.pop(request.request_id)\n"
        "        self.manager.pool.free_blocks([block for block in table if block.ref_cnt == 1])",
    ),
    right(
        "5.11",
        "slot by slot counted down",
        """
        size, left = self.manager.block_size, request.num_computed_tokens
        table = self.manager.block_table(request.request_id)[: (left + size - 1) // size]
        try:
            hosts = self.host_pool.get_new_blocks(len(table))
        except ValueError:
            return False
        for block_id, host in zip(table, hosts):
            plan.swaps_out.append(BlockCopy(block_id, host.block_id, min(left, size)))
            left -= size
        self.manager.free(request)
        self.swapped[request.request_id], request.status = hosts, RequestStatus.SWAPPED
        return True
        """,
    ),
    # -------------------------------------------------------------------------------------- 5.12 Scheduler.swap_in
    wrong(
        "5.12",
        "source and target exchanged",
        "BlockCopy(host.block_id, block_id, num_filled)",
        "BlockCopy(block_id, host.block_id, num_filled)",
    ),
    wrong(
        "5.12",
        "whole blocks moved, filled or not",
        "num_filled = min(block_size, request.num_computed_tokens - i * block_size)",
        "num_filled = block_size",
    ),
    wrong(
        "5.12",
        "0 slots of a last block that is full",
        "num_filled = min(block_size, request.num_computed_tokens - i * block_size)",
        "num_filled = request.num_computed_tokens % block_size if i == len(hosts) - 1 else block_size",
    ),
    wrong(
        "5.12",
        "slots of tokens moved that are not computed",
        "num_filled = min(block_size, request.num_computed_tokens - i * block_size)",
        "num_filled = min(block_size, request.num_tokens - i * block_size)",
    ),
    wrong("5.12", "the host's blocks never freed", "self.host_pool.free_blocks(hosts)", "pass"),
    wrong("5.12", "the moves put into swaps_out", "plan.swaps_in.append", "plan.swaps_out.append"),
    wrong(
        "5.12",
        "its entry left in `swapped`",
        "self.swapped.pop(request.request_id)",
        "self.swapped[request.request_id]",
    ),
    right(
        "5.12",
        "from the table",
        """
        table, size = self.manager.block_table(request.request_id), self.manager.block_size
        hosts = self.swapped[request.request_id]
        for place in range(len(hosts)):
            left = request.num_computed_tokens - place * size
            plan.swaps_in += [BlockCopy(hosts[place].block_id, table[place], left if left < size else size)]
        self.host_pool.free_blocks(self.swapped.pop(request.request_id))
        """,
    ),
    # ---------------------------------------------------------------------------------------- 5.13 Scheduler.abort
    wrong_body(
        "5.13",
        "its blocks freed while they are being written",
        """
        request = self.requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        """,
        recognised=False,
    ),
    wrong_body(
        "5.13",
        "only marked, so that it is never finished if it is not in flight",
        """
        if request_id in self.requests:
            self.requests[request_id].finish_reason = "abort"
        """,
    ),
    wrong("5.13", "KeyError for an unknown id", "self.requests.get(request_id)", "self.requests[request_id]"),
    wrong(
        "5.13",
        "in_flight set to False while its blocks are being written",
        'request.finish_reason = "abort"',
        'request.finish_reason, request.in_flight = "abort", False',
    ),
    wrong("5.13", "no finish_reason for a request in flight", 'request.finish_reason = "abort"', "pass"),
    wrong("5.13", 'another reason than "abort"', 'self.finish(request, "abort")', 'self.finish(request, "stop")'),
    wrong(
        "5.13",
        "the other samples of its prompt ended, too",
        'self.finish(request, "abort")',
        '[self.finish(other, "abort") for other in list(self.requests.values()) if other.arrival == request.arrival]',
    ),
    right(
        "5.13",
        "looked up first",
        """
        if request_id in self.requests:
            found = self.requests[request_id]
            if not found.in_flight:
                return self.finish(found, "abort")
            found.finish_reason = "abort"
        """,
    ),
    # --------------------------------------------------------------------------------------- 5.14 Scheduler.finish
    planted(
        "5.14",
        "the host's blocks of a swapped request never freed",
        "self.host_pool.free_blocks(self.swapped.pop(request.request_id, ()))",
        "self.swapped.pop(request.request_id, ())",
    ),
    wrong(
        "5.14",
        "the host's blocks freed, but its entry left in `swapped`",
        "self.host_pool.free_blocks(self.swapped.pop(request.request_id, ()))",
        'self.host_pool.free_blocks(self.swapped.get(request.request_id, ()) if reason != "?" else ())',
        recognised=False,
    ),
    wrong(
        "5.14",
        "the host blocks of all requests freed",
        "self.host_pool.free_blocks(self.swapped.pop(request.request_id, ()))",
        "[self.host_pool.free_blocks(self.swapped.pop(name)) for name in list(self.swapped)]",
    ),
    wrong("5.14", "finish_reason not set", "request.finish_reason = reason", "request.finish_reason = None"),
    wrong("5.14", "its id not appended to finished_ids", "self.finished_ids.append(request.request_id)", "pass"),
    right(
        "5.14",
        "only where there is something",
        """
        request.finish_reason, request.status = reason, RequestStatus.FINISHED
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        if request.request_id in self.swapped:
            self.host_pool.free_blocks(self.swapped.pop(request.request_id))
        self.manager.free(request)
        self.finished_ids.append(self.requests.pop(request.request_id).request_id)
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "5.5",
        "an active tenant is itself among those whose least is taken, so it has at least that",
        "active and tenant not in active -> active",
    ),
    equivalent("5.2", "a function that ends returns None", "return None -> pass"),
]
