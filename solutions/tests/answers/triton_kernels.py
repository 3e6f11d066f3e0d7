"""Answers to lesson 4's optional exercises, right and wrong. common/course/catalogue.py says how they work."""

from __future__ import annotations

from common.course.catalogue import equivalent, right, wrong

ANSWERS = [
    wrong(
        "4.18",
        "no mask on the load: what lies after the row counts too",
        "mask=mask, other=-float",
        "mask=columns < BLOCK, other=-float",
    ),
    wrong("4.18", "missing elements loaded as 0 instead of minus infinity", 'other=-float("inf")', "other=0.0"),
    wrong(
        "4.18",
        "the number of columns as the stride of the rows that are read",
        "x + row * x_stride",
        "x + row * num_columns",
    ),
    wrong(
        "4.18",
        "the number of columns as the stride of the rows that are stored",
        "out + row * out_stride",
        "out + row * num_columns",
    ),
    wrong("4.18", "no mask on the store", "axis=0), mask=mask)", "axis=0))"),
    wrong("4.18", "no division by the sum", "weights / tl.sum(weights, axis=0)", "weights"),
    right(
        "4.18",
        "by exp(x - log of the sum)",
        """
        offsets = tl.arange(0, BLOCK)
        begin = x + tl.program_id(0) * x_stride
        scores = tl.load(begin + offsets, mask=offsets < num_columns, other=-float("inf")).to(tl.float32)
        highest = tl.max(scores, axis=0)
        log_sum = highest + tl.log(tl.sum(tl.exp(scores - highest), axis=0))
        target = out + tl.program_id(0) * out_stride + offsets
        tl.store(target, tl.exp(scores - log_sum), mask=offsets < num_columns)
        """,
    ),
    wrong(
        "4.19",
        "the mean over the tile, not over the row",
        "tl.sum(hidden * hidden, axis=0) / num_columns",
        "tl.sum(hidden * hidden, axis=0) / BLOCK",
    ),
    wrong(
        "4.19",
        "the tile's size as the stride of the rows",
        "tl.program_id(0) * num_columns",
        "tl.program_id(0) * BLOCK",
    ),
    wrong("4.19", "eps added to the root, not under it", "tl.sqrt(mean_square + eps)", "(tl.sqrt(mean_square) + eps)"),
    wrong("4.19", "the weight left out", " * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)", ""),
    wrong("4.19", "the sum not stored in the residual", "tl.store(residual + row, hidden, mask=mask)\n    ", ""),
    wrong("4.19", "the norm of x, without the residual", "hidden += tl.load", "hidden = tl.load"),
    wrong("4.19", "no mask on the loads of x", "tl.load(x + row, mask=mask, other=0.0)", "tl.load(x + row)"),
    right(
        "4.19",
        "with rsqrt and a row of pointers",
        """
        columns = tl.arange(0, BLOCK)
        exists = columns < num_columns
        begin = tl.program_id(0) * num_columns
        both = tl.load(x + begin + columns, mask=exists, other=0).to(tl.float32)
        both = both + tl.load(residual + begin + columns, mask=exists, other=0).to(tl.float32)
        tl.store(residual + begin + columns, both, mask=exists)
        factor = tl.rsqrt(tl.sum(both * both, axis=0) / num_columns + eps)
        tl.store(out + begin + columns, both * factor * tl.load(weight + columns, mask=exists, other=0), mask=exists)
        """,
    ),
    wrong(
        "4.20",
        "the position itself as the slot: the block table is not read",
        "return blocks * BLOCK_SIZE + positions % BLOCK_SIZE",
        "return blocks * 0 + positions",
    ),
    wrong("4.20", "the block's id in place of the slot", "blocks * BLOCK_SIZE + positions % BLOCK_SIZE", "blocks"),
    wrong("4.20", "the first slot of the block, without the offset", " + positions % BLOCK_SIZE", ""),
    wrong(
        "4.20", "the table read at the position, not at the entry", "positions // BLOCK_SIZE, mask", "positions, mask"
    ),
    wrong("4.20", "no mask: the table is read beyond its end", ", mask=seen, other=0)", ")"),
    right(
        "4.20",
        "with the entry computed first",
        """
        entries = positions // BLOCK_SIZE
        first_slots = tl.load(table + entries, mask=seen, other=0) * BLOCK_SIZE
        return first_slots + (positions - entries * BLOCK_SIZE)
        """,
    ),
    wrong(
        "4.21",
        "the old sum of values not rescaled to the new maximum",
        "weighted * rescale[:, None] + tl.dot",
        "weighted + tl.dot",
    ),
    wrong("4.21", "the old total not rescaled to the new maximum", "total * rescale + tl.sum", "total + tl.sum"),
    wrong(
        "4.21",
        "the maximum of this tile alone",
        "tl.maximum(maximum, tl.max(scores, axis=1))",
        "tl.max(scores, axis=1)",
    ),
    wrong(
        "4.21",
        "the old parts rescaled the other way round",
        "tl.exp(maximum - shift)",
        "tl.exp(tl.minimum(shift - maximum, 50.0))",
    ),
    wrong("4.21", "the old maximum returned", "return highest,", "return maximum,"),
    wrong(
        "4.21",
        "minus infinity subtracted from minus infinity",
        'tl.where(highest == -float("inf"), 0.0, highest)',
        "highest",
        recognised=False,
    ),
    right(
        "4.21",
        "with a floor for the maximum that is subtracted",
        """
        new = tl.maximum(tl.max(scores, 1), maximum)
        floor = tl.maximum(new, -1.0e30)
        weights = tl.exp(scores - floor[:, None])
        old = tl.exp(maximum - floor)
        sums = tl.dot(weights, values, input_precision="ieee")
        return new, old * total + tl.sum(weights, 1), sums + old[:, None] * weighted
        """,
    ),
    wrong(
        "4.22",
        "scores of positions after the end not masked",
        'scores = tl.where(seen[None, :], scores, -float("inf"))\n        ',
        "",
    ),
    wrong("4.22", "the scale left out", ', input_precision="ieee") * scale', ', input_precision="ieee")'),
    wrong("4.22", "every split begins at position 0", "in range(begin, end, TILE)", "in range(0, end, TILE)"),
    wrong(
        "4.22",
        "only the first tile read",
        "in range(begin, end, TILE)",
        "in range(begin, tl.minimum(begin + TILE, end), TILE)",
    ),
    wrong(
        "4.22",
        "the first request's block table for all",
        "block_tables + request * table_stride, positions",
        "block_tables, positions",
    ),
    wrong(
        "4.22",
        "the first key/value head for all",
        " + kv_head * HEAD_DIM + dims[None, :]\n        mask",
        " + dims[None, :]\n        mask",
    ),
    wrong("4.22", "keys in place of values", "tl.load(values + tile", "tl.load(keys + tile"),
    wrong(
        "4.22",
        "one head's size as the stride of the slots",
        "slots[:, None] * slot_stride",
        "slots[:, None] * HEAD_DIM",
    ),
    right(
        "4.22",
        "in a loop that counts tiles",
        """
        head_mask = (dims < HEAD_DIM)[None, :]
        table = block_tables + request * table_stride
        for step in range(0, tl.cdiv(tl.maximum(end - begin, 0), TILE)):
            where = begin + step * TILE + tl.arange(0, TILE)
            live = where < end
            slots = find_slots(table, where, live, BLOCK_SIZE)
            offsets = slots[:, None] * slot_stride + (kv_head * HEAD_DIM + dims)[None, :]
            keys_tile = tl.load(keys + offsets, mask=live[:, None] & head_mask, other=0.0).to(tl.float32)
            values_tile = tl.load(values + offsets, mask=live[:, None] & head_mask, other=0.0).to(tl.float32)
            products = tl.dot(queries * scale, tl.trans(keys_tile), input_precision="ieee")
            products = products + tl.where(live, 0.0, -float("inf"))[None, :]
            maximum, total, weighted = online_softmax(maximum, total, weighted, products, values_tile)
        out = heads * tl.num_programs(2) + split
        tl.store(maxima + out, maximum, mask=rows < GROUP)
        tl.store(totals + out, total, mask=rows < GROUP)
        tl.store(weighted_sums + out[:, None] * HEAD_DIM + dims[None, :], weighted, mask=own)
        """,
    ),
    wrong(
        "4.23",
        "sums of different maxima added as they are",
        "tl.exp(maximum - tl.max(maximum, axis=0))",
        "tl.where(exists, 1.0, 0.0)",
    ),
    wrong(
        "4.23",
        "only the weighted sums rescaled, not the totals",
        "tl.sum(total * rescale, axis=0)",
        "tl.sum(total, axis=0)",
    ),
    wrong(
        "4.23",
        "the mean of the splits' own results",
        "tl.sum(weighted * rescale[:, None], axis=0) / tl.sum(total * rescale, axis=0)",
        "tl.sum(tl.where(own, weighted / total[:, None], 0.0), axis=0) / num_splits",
        recognised=False,
    ),
    wrong(
        "4.23",
        "the tile's size as the stride of the rows",
        "part = row * num_splits + splits",
        "part = row * SPLITS + splits",
    ),
    wrong(
        "4.23",
        "missing splits have maximum 0",
        'mask=exists, other=-float("inf")',
        "mask=exists, other=0.0",
        recognised=False,
    ),
    wrong("4.23", "no mask on the store", "mixed, mask=dims < HEAD_DIM)", "mixed)"),
    right(
        "4.23",
        "one split after the other",
        """
        row = tl.program_id(0)
        dims = tl.arange(0, DIMS)
        highest = tl.load(maxima + row * num_splits)
        for split in range(1, num_splits):
            highest = tl.maximum(highest, tl.load(maxima + row * num_splits + split))
        total = tl.zeros((1,), tl.float32)
        mixed = tl.zeros((DIMS,), tl.float32)
        for split in range(0, num_splits):
            part = row * num_splits + split
            factor = tl.exp(tl.load(maxima + part) - highest)
            total += factor * tl.load(totals + part)
            mixed += factor * tl.load(weighted_sums + part * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        tl.store(out + row * HEAD_DIM + dims, mixed / total, mask=dims < HEAD_DIM)
        """,
    ),
    wrong("4.24", "the scale left out", "head_dim**-0.5, *strides", "1.0, *strides"),
    wrong("4.24", "the head size in place of its root", "head_dim**-0.5, *strides", "1 / head_dim, *strides"),
    wrong(
        "4.24",
        "the length of a split rounded down: the last tokens are not read",
        "triton.cdiv(max_context_len, num_splits)",
        "max(1, max_context_len // num_splits)",
    ),
    wrong(
        "4.24",
        "the number of splits as their length",
        "triton.cdiv(max_context_len, num_splits)",
        "num_splits",
    ),
    wrong(
        "4.24",
        "only the first split merged",
        "weighted, out, num_splits, SPLITS=splits",
        "weighted, out, 1, SPLITS=splits",
    ),
    wrong("4.24", "always in float32, whatever dtype q has", "return out", "return out.float()", recognised=False),
    right(
        "4.24",
        "splits of whole tiles",
        """
        parts = (num_requests, num_heads, num_splits)
        maxima, totals = torch.zeros(parts, device=q.device), torch.zeros(parts, device=q.device)
        weighted = torch.zeros((*parts, head_dim), device=q.device)
        tiles = triton.cdiv(triton.cdiv(max_context_len, TILE), num_splits)
        decode_kernel[(num_requests, num_kv_heads, num_splits)](
            q, keys, values, block_tables, context_lens, maxima, totals, weighted,
            1 / head_dim**0.5, *strides, tiles * TILE, BLOCK_SIZE=block_size, TILE=TILE, **group, **sizes,
        )
        merge_kernel[(num_requests * num_heads,)](
            maxima, totals, weighted, out, num_splits, SPLITS=triton.next_power_of_2(num_splits), **sizes
        )
        return out
        """,
    ),
    wrong("4.25", "every query sees all keys", " & (positions[None, :] <= query_positions[:, None])", ""),
    wrong(
        "4.25",
        "a query does not see its own key",
        "positions[None, :] <= query_positions",
        "positions[None, :] < query_positions",
        recognised=False,
    ),
    wrong(
        "4.25",
        "positions counted from the first new token",
        "positions[None, :] <= query_positions[:, None]",
        "positions[None, :] <= rows[:, None]",
    ),
    wrong(
        "4.25",
        "the query head's number as the key/value head's",
        "(head // GROUP) * HEAD_DIM",
        "(head % (tl.num_programs(1) // GROUP)) * HEAD_DIM",
    ),
    wrong("4.25", "no division by the total", "weighted / total[:, None]", "weighted"),
    wrong(
        "4.25",
        "no mask on the store of tokens that do not exist",
        "total[:, None], mask=own)",
        "total[:, None], mask=(dims < HEAD_DIM)[None, :])",
        recognised=False,
    ),
    wrong("4.25", "the rows of q as the rows of the result", "[:, None] * out_stride", "[:, None] * q_stride"),
    right(
        "4.25",
        "all keys of the context read, and masked",
        """
        table = block_tables + request * table_stride
        kv_offset = (head // GROUP) * HEAD_DIM + dims[None, :]
        for step in range(0, tl.cdiv(context_len, TILE)):
            where = step * TILE + tl.arange(0, TILE)
            exists = where < context_len
            offsets = find_slots(table, where, exists, BLOCK_SIZE)[:, None] * slot_stride + kv_offset
            mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
            keys_tile = tl.load(keys + offsets, mask=mask, other=0.0).to(tl.float32)
            values_tile = tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
            products = tl.dot(queries, tl.trans(keys_tile), input_precision="ieee") * scale
            products = tl.where(where[None, :] > query_positions[:, None], -float("inf"), products)
            products = tl.where(exists[None, :], products, -float("inf"))
            maximum, total, weighted = online_softmax(maximum, total, weighted, products, values_tile)
        target = out + (first_token + rows)[:, None] * out_stride + head * HEAD_DIM + dims[None, :]
        tl.store(target, weighted / total[:, None], mask=own)
        """,
    ),
]

AXIS = "a tile with one axis has no other"
DIGITS = "with more digits the results are the same"
PROMOTED = "the other operand is in float32, and so is the result"
OPEN = "where a mask is false the interpreter loads 0; a GPU does not promise that"
EXACT = "the interpreter knows no TF32; on a GPU such a product has three digits"
MASKED = "tl.load(weighted_sums + part[:, None] * HEAD_DIM + dims[None, :], mask=own"
ROW = "tl.load(x + row * x_stride + columns, mask=mask, other=-float('inf'))"

EQUIVALENT = [
    equivalent(
        "4.18", "`tl.max` converts 16 bits to float32, and so does the difference", f"{ROW}.to(tl.float32) -> {ROW}"
    ),
    equivalent("4.18", DIGITS, f"{ROW}.to(tl.float32) -> {ROW}.to(tl.float64)"),
    equivalent(
        "4.18",
        AXIS,
        "tl.max(scores, axis=0) -> tl.max(scores)",
        "tl.max(scores, axis=0) -> tl.max(scores, axis=-1)",
        "tl.sum(weights, axis=0) -> tl.sum(weights)",
        "tl.sum(weights, axis=0) -> tl.sum(weights, axis=-1)",
    ),
    equivalent(
        "4.19",
        AXIS,
        "tl.sum(hidden * hidden, axis=0) -> tl.sum(hidden * hidden)",
        "tl.sum(hidden * hidden, axis=0) -> tl.sum(hidden * hidden, axis=-1)",
    ),
    *(
        equivalent("4.19", reason, f"{load}, other=0.0){old} -> {load}{new}")
        for place in ("residual + row", "x + row", "weight + columns")
        for load in (f"tl.load({place}, mask=mask",)
        for reason, old, new in (
            (PROMOTED, ".to(tl.float32)", ", other=0.0)"),
            (DIGITS, ".to(tl.float32)", ", other=0.0).to(tl.float64)"),
            (OPEN, "", ")"),
        )
    ),
    equivalent(
        "4.19",
        "what the masked columns would be is not stored",
        "tl.load(weight + columns, mask=mask, other=0.0) -> tl.load(weight + columns, mask=mask, other=1.0)",
    ),
    equivalent(
        "4.20",
        OPEN,
        "tl.load(table + positions // BLOCK_SIZE, mask=seen, other=0) -> "
        "tl.load(table + positions // BLOCK_SIZE, mask=seen)",
    ),
    equivalent(
        "4.21",
        "of minus infinity less any number exp is 0",
        "tl.where(highest == -float('inf'), 0.0, highest) -> tl.where(highest == -float('inf'), 1.0, highest)",
    ),
    equivalent("4.21", EXACT, "tl.dot(weights, values, input_precision='ieee') -> tl.dot(weights, values)"),
    *(
        equivalent(exercise, reason, f"{load}, other=0.0) -> {load}{other})")
        for exercise, place in (("4.22", "tile"), ("4.25", "place"))
        for load in (f"tl.load(keys + {place}, mask=mask", f"tl.load(values + {place}, mask=mask")
        for reason, other in (
            (OPEN, ""),
            ("a position that is not seen weighs nothing; a dimension that is not there is 0 in q", ", other=1.0"),
        )
    ),
    *(
        equivalent(
            exercise, EXACT, "tl.dot(queries, tl.trans(k), input_precision='ieee') -> tl.dot(queries, tl.trans(k))"
        )
        for exercise in ("4.22", "4.25")
    ),
    equivalent(
        "4.25",
        "tiles are read that no query of the program sees, and masked: that takes longer",
        "context_len - num_new -> context_len + num_new",
        "(tile + 1) * TILE -> (tile + 2) * TILE",
    ),
    equivalent("4.23", "what the masked columns would be is not stored", "dims < HEAD_DIM -> dims <= HEAD_DIM"),
    equivalent(
        "4.23",
        OPEN,
        "tl.load(totals + part, mask=exists, other=0.0) -> tl.load(totals + part, mask=exists)",
        f"{MASKED}, other=0.0) -> {MASKED})",
    ),
    equivalent(
        "4.23",
        "a split that does not exist has a maximum of minus infinity, and weighs nothing",
        "tl.load(totals + part, mask=exists, other=0.0) -> tl.load(totals + part, mask=exists, other=1.0)",
        f"{MASKED}, other=0.0) -> {MASKED}, other=1.0)",
    ),
    equivalent(
        "4.23",
        AXIS,
        "tl.max(maximum, axis=0) -> tl.max(maximum)",
        "tl.max(maximum, axis=0) -> tl.max(maximum, axis=-1)",
        "tl.sum(total * rescale, axis=0) -> tl.sum(total * rescale)",
        "tl.sum(total * rescale, axis=0) -> tl.sum(total * rescale, axis=-1)",
    ),
    equivalent(
        "4.24",
        "without a GPU there is no other device",
        "torch.empty((2, num_requests, num_heads, num_splits), device=q.device) -> "
        "torch.empty((2, num_requests, num_heads, num_splits))",
        "torch.empty((num_requests, num_heads, num_splits, head_dim), device=q.device) -> "
        "torch.empty((num_requests, num_heads, num_splits, head_dim))",
    ),
]
