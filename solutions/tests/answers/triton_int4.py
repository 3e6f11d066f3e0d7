"""Answers to lesson 7's optional exercises, right and wrong. common/course/catalogue.py says how they work."""

from __future__ import annotations

from common.course.catalogue import equivalent, right, wrong

ANSWERS = [
    wrong("7.16", "the two halves exchanged", "return even, odd", "return odd, even"),
    wrong("7.16", "the high half not shifted", "(packed >> 4)", "(packed & 240)"),
    wrong("7.16", "the low half not masked", "(packed & 15)", "packed"),
    wrong(
        "7.16",
        "8 subtracted, as if the numbers had a sign",
        "(packed & 15).to(tl.float32)",
        "((packed & 15).to(tl.float32) - 8)",
    ),
    wrong(
        "7.16",
        "the minimum scaled too",
        "odd = (packed >> 4).to(tl.float32) * scale + minimum",
        "odd = ((packed >> 4).to(tl.float32) + minimum) * scale",
    ),
    right(
        "7.16",
        "by division",
        """
        high = packed // 16
        low = packed - 16 * high
        return low.to(tl.float32) * scale + minimum, scale * high.to(tl.float32) + minimum
        """,
    ),
    wrong(
        "7.17", "the group of the pair's number, not of its input's", "2 * pairs // GROUP_SIZE", "pairs // GROUP_SIZE"
    ),
    wrong("7.17", "the first group for all inputs", " + 2 * pairs // GROUP_SIZE", " + 0 * pairs"),
    wrong("7.17", "inputs in the order of the pairs, not two apart", "x_stride + 2 * pairs\n", "x_stride + pairs\n"),
    wrong(
        "7.17", "the number of inputs as the stride of x", "tokens[:, None] * x_stride", "tokens[:, None] * num_inputs"
    ),
    wrong("7.17", "the even inputs for both halves", "tl.load(place + 1,", "tl.load(place,"),
    wrong(
        "7.17",
        "an input read after the last one, where their number is odd",
        "(2 * pairs + 1 < num_inputs)",
        "(pairs < num_pairs)",
    ),
    wrong("7.17", "only the first tile of inputs", "range(0, num_pairs, PAIRS)", "range(0, PAIRS, PAIRS)"),
    wrong(
        "7.17",
        "no mask for the outputs on the store",
        "mask = token_exists & (outputs < num_outputs)[None, :]",
        "mask = token_exists & (outputs >= 0)[None, :]",
    ),
    wrong(
        "7.17",
        "the number of inputs as the stride of the bytes",
        "outputs[:, None] * num_pairs",
        "outputs[:, None] * num_inputs",
    ),
    right(
        "7.17",
        "in a loop that counts tiles",
        """
        for step in range(0, tl.cdiv(num_pairs, PAIRS)):
            pair = (step * PAIRS + tl.arange(0, PAIRS))[None, :]
            live = (pair < num_pairs) & output_exists
            group = (2 * pair) // GROUP_SIZE + num_groups * outputs[:, None]
            low, high = dequantize_tile(
                tl.load(weight + outputs[:, None] * num_pairs + pair, mask=live, other=0),
                tl.load(scales + group, mask=live, other=0.0).to(tl.float32),
                tl.load(minima + group, mask=live, other=0.0).to(tl.float32),
            )
            begin = x + tokens[:, None] * x_stride + 2 * pair
            left = tl.load(begin, mask=token_exists & (2 * pair < num_inputs), other=0.0)
            last = token_exists & (2 * pair < num_inputs - 1)
            right = tl.load(begin + 1, mask=last, other=0.0)
            both = tl.dot(left.to(tl.float32), tl.trans(low), input_precision="ieee")
            total = total + both + tl.dot(right.to(tl.float32), tl.trans(high), input_precision="ieee")
        place = tokens[:, None] * num_outputs + outputs[None, :]
        tl.store(out + place, total, mask=token_exists & (outputs < num_outputs)[None, :])
        """,
    ),
]

DIGITS = "with more digits the results are the same"
PROMOTED = "the other operand is in float32, and so is the result"
OPEN = "where a mask is false the interpreter loads 0; a GPU does not promise that"
NOTHING = "of what does not exist, either the input or the weight is 0, or the output is not stored"
EXACT = "the interpreter knows no TF32; on a GPU such a product has three digits"
BYTES = "tl.load(weight + outputs[:, None] * num_pairs + pairs, mask=exists"
EVEN = "tl.load(place, mask=token_exists & (2 * pairs < num_inputs)"
ODD = "tl.load(place + 1, mask=token_exists & (2 * pairs + 1 < num_inputs)"

EQUIVALENT = [
    *(
        equivalent("7.16", reason, f"({half}).to(tl.float32) -> {new}")
        for half in ("packed & 15", "packed >> 4")
        for reason, new in ((PROMOTED, half), (DIGITS, f"({half}).to(tl.float64)"))
    ),
    *(
        equivalent("7.17", reason, f"{load}, other=0.0){old} -> {load}{new}")
        for load in ("tl.load(scales + groups, mask=exists", "tl.load(minima + groups, mask=exists")
        for reason, old, new in (
            (PROMOTED, ".to(tl.float32)", ", other=0.0)"),
            (OPEN, "", ")"),
            (NOTHING, "", ", other=1.0)"),
        )
    ),
    equivalent("7.17", OPEN, f"{BYTES}, other=0) -> {BYTES})"),
    equivalent("7.17", NOTHING, *(f"{BYTES}, other=0) -> {BYTES}, other={value})" for value in (1, -1))),
    equivalent("7.17", OPEN, *(f"{load}, other=0.0) -> {load})" for load in (EVEN, ODD))),
    equivalent("7.17", NOTHING, f"{EVEN}, other=0.0) -> {EVEN}, other=1.0)"),
    *(
        equivalent(
            "7.17",
            EXACT,
            f"tl.dot(x_{half}, tl.trans({half}), input_precision='ieee') -> tl.dot(x_{half}, tl.trans({half}))",
        )
        for half in ("even", "odd")
    ),
]
