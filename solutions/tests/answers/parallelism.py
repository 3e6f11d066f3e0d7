"""Lesson 6: answers that are not the reference."""

from common.course.catalogue import equivalent, planted, right, wrong, wrong_body

ANSWERS = [
    # -------------------------------------------------------------------------------------------- 6.1 shard_range
    wrong(
        "6.1", "the remainder given to the last ranks, one each", "min(rank, left)", "max(0, rank + left - world_size)"
    ),
    wrong_body(
        "6.1",
        "the whole remainder given to the last rank",
        """
        share = size // world_size
        return range(rank * share, size if rank == world_size - 1 else (rank + 1) * share)
        """,
    ),
    wrong("6.1", "the remainder dropped", "share + (rank < left)", "share"),
    wrong("6.1", "starts that ignore that earlier parts are larger", "rank * share + min(rank, left)", "rank * share"),
    wrong_body(
        "6.1",
        "all parts rounded up, so that the last ranks have too little",
        """
        share = -(-size // world_size)
        return range(min(size, rank * share), min(size, (rank + 1) * share))
        """,
    ),
    wrong_body(
        "6.1",
        "even boundaries rounded down, so that the larger parts are not the first",
        "return range(size * rank // world_size, size * (rank + 1) // world_size)",
    ),
    wrong(
        "6.1",
        "the last ranks have one more each, not the first ones",
        "min(rank, left)\n    return range(start, start + share + (rank < left))",
        "max(0, rank + left - world_size)\n    return range(start, start + share + (rank >= world_size - left))",
    ),
    right(
        "6.1",
        "by counting the shares before",
        """
        shares = [size // world_size + (1 if i < size % world_size else 0) for i in range(world_size)]
        return range(sum(shares[:rank]), sum(shares[: rank + 1]))
        """,
    ),
    # -------------------------------------------------------------------------------------------- 6.2 head_groups
    wrong(
        "6.2",
        "query heads assigned one by one, without regard to groups",
        "return range(kv_heads.start * group_size, kv_heads.stop * group_size), kv_heads",
        "return shard_range(num_heads, rank, world_size), kv_heads",
    ),
    wrong_body(
        "6.2",
        "query heads assigned one by one, with the key/value heads that they attend to",
        """
        queries, group_size = shard_range(num_heads, rank, world_size), num_heads // num_kv_heads
        return queries, range(queries.start // group_size, (queries.stop - 1) // group_size + 1)
        """,
    ),
    wrong(
        "6.2",
        "all of the group's query heads on each of the ranks that share it",
        "part = shard_range(group_size, rank - sharing[kv_head].start, len(sharing[kv_head]))",
        "part = range(group_size)",
    ),
    wrong(
        "6.2",
        "query heads counted from 0 in every group",
        "first = kv_head * group_size",
        "first = 0",
    ),
    wrong(
        "6.2",
        "ranks assigned to key/value heads in even steps rounded down, not with `shard_range`",
        "sharing = [shard_range(world_size, kv_head, num_kv_heads) for kv_head in range(num_kv_heads)]",
        "owners = [r * num_kv_heads // world_size for r in range(world_size)]\n"
        "    sharing = [range(owners.index(h), owners.index(h) + owners.count(h)) for h in range(num_kv_heads)]",
    ),
    wrong("6.2", "the first key/value head on every rank", "range(kv_head, kv_head + 1)", "range(0, 1)"),
    right(
        "6.2",
        "a table of who has which head, then its ends",
        """
        group = num_heads // num_kv_heads
        if num_kv_heads >= world_size:
            own = shard_range(num_kv_heads, rank, world_size)
            queries = [query for head in own for query in range(head * group, (head + 1) * group)]
            return range(queries[0], queries[-1] + 1), own
        owner = [head for head in range(num_kv_heads) for _ in shard_range(world_size, head, num_kv_heads)]
        head = owner[rank]
        place, count = rank - owner.index(head), owner.count(head)
        part = shard_range(group, place, count)
        return range(head * group + part[0], head * group + part[-1] + 1), range(head, head + 1)
        """,
    ),
    # ---------------------------------------------------------------------------------------------- 6.3 rank_grid
    wrong_body(
        "6.3",
        "the grid numbered column by column",
        """
        stages = range(pipeline_parallel)
        return [[i * pipeline_parallel + stage for i in range(tensor_parallel)] for stage in stages]
        """,
    ),
    wrong_body(
        "6.3",
        "rows and columns exchanged",
        "return [[s * tensor_parallel + i for s in range(pipeline_parallel)] for i in range(tensor_parallel)]",
    ),
    wrong(
        "6.3",
        "rows that begin at multiples of the number of stages, not of a stage's ranks",
        "stage * tensor_parallel, (stage + 1) * tensor_parallel",
        "stage * pipeline_parallel, stage * pipeline_parallel + tensor_parallel",
    ),
    wrong(
        "6.3",
        "ranks counted from 1",
        "list(range(stage * tensor_parallel, (stage + 1) * tensor_parallel))",
        "list(range(stage * tensor_parallel + 1, (stage + 1) * tensor_parallel + 1))",
    ),
    right(
        "6.3",
        "by a tensor's view",
        "return torch.arange(tensor_parallel * pipeline_parallel).view(pipeline_parallel, tensor_parallel).tolist()",
    ),
    # ------------------------------------------------------------------------------------------- 6.4 stage_layers
    wrong("6.4", "the head's cost ignored", "(num_layers + head_cost)", "num_layers"),
    wrong(
        "6.4",
        "the head's cost counted in the first stage",
        "return min(even, num_layers - (num_stages - i))",
        "return max(0, min(even - round(head_cost), num_layers)) if i < num_stages else num_layers",
    ),
    wrong(
        "6.4",
        "boundaries rounded down",
        "round(i * (num_layers + head_cost) / num_stages)",
        "int(i * (num_layers + head_cost) / num_stages)",
    ),
    wrong("6.4", "the head's cost rounded down before it is used", "head_cost) / num", "int(head_cost)) / num"),
    wrong("6.4", "the head's cost rounded before it is used", "head_cost) / num", "round(head_cost)) / num"),
    wrong(
        "6.4",
        "the number of layers of each stage rounded, not the boundaries",
        "round(i * (num_layers + head_cost) / num_stages)",
        "i * round((num_layers + head_cost) / num_stages)",
    ),
    wrong(
        "6.4",
        "stages left without a layer",
        "return min(even, num_layers - (num_stages - i))",
        "return min(even, num_layers)",
    ),
    right(
        "6.4",
        "stage by stage",
        """
        ends, work = [0], (num_layers + head_cost) / num_stages
        for i in range(1, num_stages):
            ends.append(min(int(work * i + 0.5), num_layers - num_stages + i))
        ends.append(num_layers)
        return range(ends[stage], ends[stage + 1])
        """,
    ),
    # -------------------------------------------------------------------------------------- 6.6 pipeline_timeline
    wrong(
        "6.6",
        "a batch's next step begins before its token is known",
        "starts[batch, step] = max(free, ready[batch])",
        "starts[batch, step] = free",
    ),
    wrong(
        "6.6",
        "a batch's next step begins one tick before its token is known",
        "max(free, ready[batch])",
        "max(free, ready[batch] - 1)",
    ),
    wrong(
        "6.6",
        "all stages compute the same step in the same tick",
        "timeline[stage][start + stage] = which",
        "timeline[stage][start] = which",
    ),
    wrong(
        "6.6",
        "(step, batch) in place of (batch, step)",
        "timeline[stage][start + stage] = which",
        "timeline[stage][start + stage] = which[::-1]",
    ),
    wrong(
        "6.6",
        "all steps of one batch, then all of the next, not in turns",
        "    for step in range(num_steps):\n        for batch in range(num_batches):\n",
        "    for batch in range(num_batches):\n        for step in range(num_steps):\n",
    ),
    wrong(
        "6.6",
        "the next batch begins only when this one has left the last stage",
        "free = starts[batch, step] + 1",
        "free = starts[batch, step] + num_stages",
    ),
    right(
        "6.6",
        "tick by tick",
        """
        waiting, known, rows = [(b, s) for s in range(num_steps) for b in range(num_batches)], {}, []
        pipe = [None] * num_stages
        while waiting or any(pipe[:-1]):
            tick, entering = len(rows), None
            if waiting:
                batch, step = waiting[0]
                if step == 0 or known.get((batch, step - 1), tick + 1) <= tick:
                    entering = waiting.pop(0)
            pipe = [entering, *pipe[:-1]]
            if pipe[-1] is not None:
                known[pipe[-1]] = tick + 1
            rows.append(pipe)
        return [[row[stage] for row in rows] for stage in range(num_stages)]
        """,
    ),
    # --------------------------------------------------------------------------------------- 6.7 bubble_fraction
    wrong(
        "6.7",
        "the share of cells that are not None",
        "cells.count(None) / len(cells)",
        "1 - cells.count(None) / len(cells)",
    ),
    wrong(
        "6.7",
        "the number of None divided by the number of other cells",
        "/ len(cells)",
        "/ (len(cells) - cells.count(None))",
    ),
    wrong("6.7", "the number of None divided by the ticks of one stage", "/ len(cells)", "/ len(timeline[0])"),
    wrong_body("6.7", "only the first stage's cells counted", "return timeline[0].count(None) / len(timeline[0])"),
    wrong_body("6.7", "only the last stage's cells counted", "return timeline[-1].count(None) / len(timeline[-1])"),
    right(
        "6.7",
        "from the mean of the rows",
        "return sum(sum(cell is None for cell in row) / len(row) for row in timeline) / len(timeline)",
    ),
    # ------------------------------------------------------------------------------------- 6.8 communication_cost
    wrong("6.8", "only the messages of the first half counted", "2 * (world_size - 1)", "(world_size - 1)"),
    wrong("6.8", "the whole tensor in every message", "num_bytes / world_size / bandwidth", "num_bytes / bandwidth"),
    wrong(
        "6.8",
        "the bytes of the whole tensor sent in each half, not one part less",
        "num_messages * (latency + num_bytes / world_size / bandwidth)",
        "num_messages * latency + 2 * num_bytes / bandwidth",
    ),
    wrong("6.8", "the bytes of a message rounded down", "num_bytes / world_size", "num_bytes // world_size"),
    wrong("6.8", "one message too many in each half", "2 * (world_size - 1)", "2 * world_size"),
    wrong("6.8", "one message too many in one half", "2 * (world_size - 1)", "2 * world_size - 1"),
    wrong(
        "6.8",
        "the latency counted once, not for each message",
        "num_messages * (latency + num_bytes / world_size / bandwidth)",
        "latency + num_messages * num_bytes / world_size / bandwidth",
    ),
    right(
        "6.8",
        "half by half",
        """
        one_message = latency + num_bytes / (world_size * bandwidth)
        reduce_scatter = all_gather = sum(one_message for _ in range(world_size - 1))
        return float(reduce_scatter + all_gather)
        """,
    ),
    # ---------------------------------------------------------------------------------------- 6.9 ring_all_reduce
    wrong("6.9", "the second half left out", "group.exchange(sent, received)", "pass"),
    wrong("6.9", "sums in float32, whatever dtype x has", "x.clone(", "x.float().clone("),
    wrong(
        "6.9", "x itself changed", "total = x.clone(memory_format=torch.contiguous_format)", "total = x.contiguous()"
    ),
    wrong(
        "6.9",
        "the sums written into a copy that is not returned, if x is not contiguous",
        "total = x.clone(memory_format=torch.contiguous_format)\n    parts = total.view(-1)",
        "total = x.clone()\n    parts = total.flatten()",
    ),
    wrong("6.9", "the mean, not the sum", "return total", "return total / group.size"),
    wrong(
        "6.9",
        "the second half begins with a part that is not complete",
        "(group.rank + 1 - step - back) % group.size",
        "(group.rank - step - back) % group.size",
    ),
    right(
        "6.9",
        "parts counted from the one that will be finished here",
        """
        flat = x.flatten().clone()
        parts = list(flat.tensor_split(group.size))
        n, me = group.size, group.rank
        for hop in range(1, n):
            buffer = torch.zeros_like(parts[(me - hop) % n])
            group.exchange(parts[(me - hop + 1) % n], buffer)
            parts[(me - hop) % n].add_(buffer)
        for hop in range(n - 1):
            buffer = torch.zeros_like(parts[(me - hop) % n])
            group.exchange(parts[(me - hop + 1) % n], buffer)
            parts[(me - hop) % n].copy_(buffer)
        return flat.reshape(x.shape)
        """,
    ),
    # --------------------------------------------------------------------------- 6.11 ColumnParallelLinear.forward
    wrong(
        "6.11",
        "the outputs added up over the ranks, although each rank has other outputs",
        "self.method.apply(self, x, self.bias)",
        "self.group.all_reduce(nn.functional.pad(self.method.apply(self, x, self.bias), (0, 3 - self.out_features)))"
        "[:, : self.out_features]",
    ),
    wrong("6.11", "the bias left out", "self.method.apply(self, x, self.bias)", "self.method.apply(self, x)"),
    wrong(
        "6.11",
        "the bias divided by the number of ranks",
        "self.method.apply(self, x, self.bias)",
        "self.method.apply(self, x, None if self.bias is None else self.bias / self.group.size)",
    ),
    wrong(
        "6.11",
        "multiplied by the stored weight, without the layer's method",
        "self.method.apply(self, x, self.bias)",
        "nn.functional.linear(x, self.weight, self.bias)",
    ),
    right(
        "6.11",
        "the bias added afterwards",
        """
        y = self.method.apply(self, x)
        return y if self.bias is None else y + self.bias
        """,
    ),
    # ------------------------------------------------------------------------------ 6.12 RowParallelLinear.forward
    wrong(
        "6.12",
        "the bias added on each rank",
        "total = self.group.all_reduce(self.method.apply(self, x))\n"
        "        return total if self.bias is None else total + self.bias",
        "return self.group.all_reduce(self.method.apply(self, x, self.bias))",
    ),
    wrong(
        "6.12",
        "no all-reduce: only this rank's contribution",
        "self.group.all_reduce(self.method.apply(self, x))",
        "self.method.apply(self, x)",
    ),
    wrong("6.12", "the bias left out", "total if self.bias is None else total + self.bias", "total"),
    wrong(
        "6.12",
        "the mean of the contributions",
        "return total if",
        "total = total / self.group.size\n        return total if",
    ),
    wrong(
        "6.12",
        "multiplied by the stored weight, without the layer's method",
        "self.method.apply(self, x)",
        "nn.functional.linear(x, self.weight)",
    ),
    right(
        "6.12",
        "the bias added by the first rank, before the sum",
        """
        mine = self.method.apply(self, x)
        if self.bias is not None and self.group.rank == 0:
            mine = mine + self.bias
        return self.group.all_reduce(mine)
        """,
    ),
    # ------------------------------------------------------------------------ 6.13 VocabParallelEmbedding.forward
    wrong("6.13", "the rows of other ranks' tokens not set to zero", "found.where(ours[:, None], 0)", "found"),
    wrong(
        "6.13",
        "no all-reduce: zeros for the other ranks' tokens",
        "self.group.all_reduce(found.where(ours[:, None], 0))",
        "found.where(ours[:, None], 0)",
    ),
    wrong(
        "6.13",
        "self.rows.start not subtracted",
        "(token_ids - self.rows.start).where(ours, 0)",
        "token_ids.where(ours, 0).clamp(max=len(self.rows) - 1)",
    ),
    wrong(
        "6.13",
        "this rank's last row treated as another rank's",
        "token_ids < self.rows.stop",
        "token_ids < self.rows.stop - 1",
    ),
    wrong(
        "6.13",
        "looked up in the stored weight, without the layer's method",
        "self.method.embed(self, (token_ids - self.rows.start).where(ours, 0))",
        "self.weight[(token_ids - self.rows.start).where(ours, 0)]",
    ),
    wrong(
        "6.13",
        "ids clamped to the rows of this rank, and no row set to zero",
        "found.where(ours[:, None], 0)",
        "self.method.embed(self, (token_ids - self.rows.start).clamp(0, len(self.rows) - 1))",
    ),
    right(
        "6.13",
        "by a matrix of ones and zeros",
        """
        every = self.method.embed(self, torch.arange(len(self.rows), device=token_ids.device))
        ids = torch.arange(self.rows.start, self.rows.stop, device=token_ids.device)
        return self.group.all_reduce((token_ids[:, None] == ids).to(every.dtype) @ every)
        """,
    ),
    # -------------------------------------------------------------------------------- 6.14 ParallelLMHead.forward
    wrong("6.14", "the padding kept", "[:, :vocab_size]", ""),
    wrong("6.14", "the ranks' scores in reverse order", "torch.cat(parts, dim=-1)", "torch.cat(parts[::-1], dim=-1)"),
    wrong("6.14", "the scores of one row only", "self.method.apply(self, x)", "self.method.apply(self, x[-1:])"),
    wrong(
        "6.14", "the ranks' scores joined along the first axis", "torch.cat(parts, dim=-1)", "torch.cat(parts, dim=0)"
    ),
    wrong(
        "6.14",
        "rows returned on the ranks that do not sample",
        "x.new_empty(0, vocab_size)",
        "x.new_zeros(len(x), vocab_size)",
    ),
    wrong(
        "6.14",
        "multiplied by the stored weight, without the layer's method",
        "self.method.apply(self, x)",
        "nn.functional.linear(x, self.weight)",
    ),
    right(
        "6.14",
        "written into place",
        """
        mine, vocab_size = self.method.apply(self, x), self.shape[0]
        parts = self.group.gather(mine)
        if self.group.rank != 0:
            return mine.new_zeros((0, vocab_size))
        scores = mine.new_empty(len(x), vocab_size)
        for i, part in enumerate(parts):
            first = i * part.shape[1]
            room = scores[:, first : first + part.shape[1]]
            room.copy_(part[:, : room.shape[1]])
        return scores
        """,
    ),
    # ------------------------------------------------------------------------------------------------ 6.15 shard
    wrong("6.15", "every layer kept on every stage", "if number not in layers:", "if False:"),
    wrong(
        "6.15",
        "only the first block cut",
        "elif group.size > 1:\n            for parent",
        "elif group.size > 1 and number == layers.start:\n            for parent",
    ),
    wrong(
        "6.15",
        "every layer cut to the channels of the queries",
        "kind(getattr(parent, name), parts[part], group)",
        'kind(getattr(parent, name), parts["queries"], group)',
        recognised=False,
    ),
    wrong(
        "6.15",
        "the embedding kept on the first stage only, although the head of a tied model is this table",
        "if not coordinates.is_first_stage and not (tied and coordinates.is_last_stage):",
        "if not coordinates.is_first_stage:",
    ),
    wrong(
        "6.15",
        "the embedding kept on the last stage, tied or not",
        "not (tied and coordinates.is_last_stage)",
        "not coordinates.is_last_stage",
    ),
    wrong("6.15", "the head kept on every stage", "if not coordinates.is_last_stage:", "if False:"),
    wrong(
        "6.15", "the weights not tied again, so that the head has a table of its own", "    model.tie_weights()\n", ""
    ),
    wrong(
        "6.15",
        "the embedding table not cut",
        'VocabParallelEmbedding(base.embed_tokens, parts["vocabulary"], group)',
        "base.embed_tokens",
    ),
    wrong(
        "6.15",
        "layers cut although the group has one rank",
        "        elif group.size > 1:\n            for",
        "        else:\n            for",
    ),
    wrong(
        "6.15", "the numbers of all layers returned", "return layers", "return range(model.config.num_hidden_layers)"
    ),
    wrong("6.15", "a group of its own for each layer of a block", "parts[part], group)", "parts[part], Group())"),
    right(
        "6.15",
        "what is kept decided first",
        """
        keeps_head = coordinates.is_last_stage
        keeps_table = coordinates.is_first_stage or (keeps_head and model.config.tie_word_embeddings)
        if not keeps_head:
            model.lm_head = Absent(model.lm_head)
        if not keeps_table:
            model.model.embed_tokens = Absent(model.model.embed_tokens)
        for number in set(range(model.config.num_hidden_layers)) - set(layers):
            model.model.layers[number] = Absent(model.model.layers[number])
        if group.size > 1:
            for number in layers:
                for parent, name, kind, part in sharded_modules(model.model.layers[number]):
                    setattr(parent, name, kind(parent.get_submodule(name), parts[part], group))
            if keeps_head:
                model.lm_head = ParallelLMHead(model.lm_head, parts["vocabulary"], group)
            if keeps_table:
                table = VocabParallelEmbedding(model.model.embed_tokens, parts["vocabulary"], group)
                model.model.embed_tokens = table
        model.tie_weights()
        return layers
        """,
    ),
    # -------------------------------------------------------------------------------------------- 6.10 read_shard
    wrong(
        "6.10",
        "the whole tensor read, and cut afterwards",
        "found = read(*inside)",
        "found = read(*(range(size) for size in shape))[tuple(slice(r.start, r.stop) for r in inside)]",
    ),
    wrong("6.10", "no padding", "if inside == list(part):", "if True:"),
    wrong(
        "6.10",
        "padding that does not have the checkpoint's dtype",
        "found.new_zeros([len(axis) for axis in part])",
        "torch.zeros([len(axis) for axis in part])",
    ),
    wrong(
        "6.10",
        "padding in front",
        "padded[tuple(slice(len(axis)) for axis in inside)]",
        "padded[tuple(slice(len(axis) - len(found_axis), None) for axis, found_axis in zip(part, inside))]",
    ),
    wrong(
        "6.10",
        "padding of ones",
        "found.new_zeros",
        "found.new_ones",
    ),
    wrong(
        "6.10",
        "all ranges read from 0 on",
        "range(min(axis.start, size), min(axis.stop, size))",
        "range(min(len(axis), size))",
    ),
    right(
        "6.10",
        "what is missing joined on, axis by axis",
        """
        inside = []
        for axis, size in zip(part, shape):
            inside.append(range(min(axis[0], size), min(axis[-1] + 1, size)))
        found = read(*inside)
        for number, axis in enumerate(part):
            missing = len(axis) - found.shape[number]
            if missing:
                size = list(found.shape)
                size[number] = missing
                found = torch.cat([found, found.new_zeros(size)], dim=number)
        return found
        """,
    ),
    # --------------------------------------------------------------------------------------------- 6.16 run_stage
    wrong(
        "6.16",
        "hidden states received although nothing is scheduled",
        "if plan.scheduled and link.previous is not None:",
        "if link.previous is not None:",
    ),
    wrong(
        "6.16",
        "hidden states received for a plan that is not empty but schedules nothing",
        "if plan.scheduled and",
        "if not plan.is_empty and",
    ),
    wrong("6.16", "the previous rank 0 treated as None", "link.previous is not None", "link.previous"),
    wrong("6.16", "a row received for each request, not for each token", "plan.num_tokens", "len(plan.scheduled)"),
    wrong(
        "6.16",
        "None returned by the last stage where nothing is scheduled",
        "return result",
        "return result if plan.scheduled else None",
    ),
    wrong("6.16", "the hidden states received, but not used", "runner.execute(plan, hidden)", "runner.execute(plan)"),
    wrong("6.16", "hidden states never sent", "link.send(result)", "pass"),
    wrong(
        "6.16", "hidden states returned as well as sent", "link.send(result)\n        return None", "link.send(result)"
    ),
    right(
        "6.16",
        "asking the link who sends",
        """
        rows = None
        if link.previous is not None and plan.num_tokens > 0:
            rows = link.receive(plan.num_tokens)
        outcome = runner.execute(plan, rows)
        if link.next is not None and plan.scheduled:
            link.send(outcome)
            outcome = None
        return outcome
        """,
    ),
    # ------------------------------------------------------------------------------------------- 6.17 worker_loop
    wrong("6.17", "a result None sent too", "if result is not None:", "if True:"),
    wrong("6.17", "results that count as false not sent", "if result is not None:", "if result:"),
    wrong(
        "6.17",
        "the loop ended by a command that counts as false",
        "(command := receive()) is not None",
        "command := receive()",
    ),
    wrong("6.17", "the error raised again after the Failure was sent", "            return\n", "            raise\n"),
    wrong(
        "6.17", "the loop continued after an error", "            return\n", "            continue\n", recognised=False
    ),
    wrong("6.17", "the error's type left out", "describe(error)", "str(error)"),
    wrong("6.17", "every failure called a consequence of another", "is_consequence(error)", "True"),
    wrong("6.17", "no failure called a consequence of another", "is_consequence(error)", "False"),
    wrong_body(
        "6.17",
        "an error of `receive` sent as a Failure",
        """
        try:
            for command in iter(receive, None):
                result = run(command)
                if result is not None:
                    send(result)
        except Exception as error:
            send(Failure(rank, describe(error), is_consequence(error)))
        """,
    ),
    right(
        "6.17",
        "with iter",
        """
        for command in iter(receive, None):
            try:
                result = run(command)
            except Exception as error:
                send(Failure(rank, f"{type(error).__name__}: {error}", is_consequence(error)))
                break
            if result is None:
                continue
            send(result)
        """,
    ),
    # ------------------------------------------------------------------------------ 6.18 ParallelExecutor.submit
    wrong(
        "6.18",
        "the plan sent after rank 0's part: rank 0 waits for ranks that wait for the plan",
        "self.workers.send(plan)\n        output = self.rank.run(plan)",
        "output = self.rank.run(plan)\n        self.workers.send(plan)",
    ),
    wrong("6.18", "the plan not sent to the other ranks", "self.workers.send(plan)", "pass"),
    wrong("6.18", "None appended to outputs where another rank samples", "if output is not None:", "if True:"),
    wrong("6.18", "the newest output put before the older ones", "self.outputs.append(", "self.outputs.appendleft("),
    wrong("6.18", "rank 0's output dropped", "self.outputs.append(output)", "pass"),
    wrong(
        "6.18",
        "`submit` waits for the output, so that no second step can be in flight",
        "if output is not None:\n            self.outputs.append(output)",
        "self.outputs.append(self.workers.receive(self.timeout) if output is None else output)",
    ),
    right(
        "6.18",
        "with an assignment in the condition",
        """
        self.workers.send(plan)
        if (sampled := self.rank.run(plan)) is not None:
            self.outputs.extend([sampled])
        """,
    ),
    # ----------------------------------------------------------------------------- 6.19 ParallelExecutor.collect
    wrong("6.19", "the newest output, not the oldest", "self.outputs.popleft()", "self.outputs.pop()"),
    wrong("6.19", "an output that stays in the queue", "self.outputs.popleft()", "self.outputs[0]"),
    wrong("6.19", "a wait for another rank where rank 0 has the output", "while not self.outputs:", "if True:"),
    wrong("6.19", "a wait without a limit", "receive(self.timeout)", "receive()"),
    right(
        "6.19",
        "without putting what is received into the queue",
        """
        if self.outputs:
            return self.outputs.popleft()
        return self.workers.receive(self.timeout)
        """,
    ),
    # ----------------------------------------------------------------------------------------- 6.5 largest_share
    planted(
        "6.5",
        "all stages assumed to have the same number of layers",
        "    stages = [RankCoordinates(stage, 1, pipeline_parallel) for stage in range(pipeline_parallel)]\n"
        "    most_layers = max(len(stage.layers(config)) for stage in stages)\n",
        "    most_layers = config.num_hidden_layers / pipeline_parallel\n",
    ),
    wrong("6.5", "the layers of the stage with the fewest", "most_layers = max(", "most_layers = min("),
    wrong(
        "6.5",
        "the layers of the first stage, although another may have more",
        "max(len(stage.layers(config)) for stage in stages)",
        "len(stages[0].layers(config))",
    ),
    wrong(
        "6.5",
        "only the first ranks considered, as many as there are stages",
        "RankCoordinates(stage, 1, pipeline_parallel)",
        "RankCoordinates(stage, tensor_parallel, pipeline_parallel)",
    ),
    wrong("6.5", "the last rank's heads", "most_heads = max(", "most_heads = min("),
    right(
        "6.5",
        "over all ranks of the grid",
        """
        shares = []
        for stage in range(pipeline_parallel):
            for rank in range(tensor_parallel):
                groups = head_groups(config.num_attention_heads, config.num_key_value_heads, rank, tensor_parallel)
                shares.append(len(groups[1]) * len(RankCoordinates(stage, 1, pipeline_parallel).layers(config)))
        return max(shares) / (config.num_hidden_layers * config.num_key_value_heads)
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "6.10",
        "a range that begins after the end of its axis is empty, wherever it begins",
        "min(axis.start, size) -> axis.start",
    ),
    equivalent(
        "6.10",
        "laying all of it into a tensor of its own size gives the same numbers, with one more copy",
        "inside == list(part) -> inside == part",
        "return found -> pass",
    ),
    equivalent(
        "6.6",
        "a batch is ready, and the first stage free, at tick 0 or before: the larger of the two is the same",
        "[0] * num_batches -> [-1] * num_batches",
        "([0] * num_batches, 0, {}) -> ([0] * num_batches, -1, {})",
    ),
    equivalent(
        "6.13",
        "rows looked up for others' tokens become 0, whichever they are",
        "(token_ids - self.rows.start).where(ours, 0) -> (token_ids - self.rows.start).where(ours, 1)",
    ),
    equivalent("6.10", "laying it into zeros, or not, is the same", "if inside == list(part): -> if False:"),
    equivalent(
        "6.2",
        "with as many heads as ranks either case gives each rank its own",
        "num_kv_heads >= world_size -> num_kv_heads > world_size",
    ),
    equivalent("6.14", "the last of two axes", "torch.cat(parts, dim=-1) -> torch.cat(parts, dim=1)"),
    equivalent(
        "6.19",
        "`outputs` is empty when an output arrives, so both of its ends are the same",
        "self.outputs.append -> self.outputs.appendleft",
    ),
]
