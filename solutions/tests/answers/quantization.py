"""Lesson 7: answers that are not the reference."""

from common.course.catalogue import equivalent, planted, right, wrong, wrong_body

ANSWERS = [
    # ------------------------------------------------------------------------------------------ 7.1 quantize_int8
    wrong(
        "7.1",
        "scales along the wrong axis: one for each input",
        "weight.abs().amax(dim=1) if absmax is None else absmax",
        "weight.abs().amax(dim=0).mean().expand(len(weight)) if absmax is None else absmax",
    ),
    wrong(
        "7.1", "the largest weight, not the largest magnitude", "weight.abs().amax(dim=1) if", "weight.amax(dim=1) if"
    ),
    wrong("7.1", "the fraction cut off, not rounded", ".round()", ".trunc()"),
    wrong("7.1", "128 steps on each side, which int8 does not have", "absmax / 127", "absmax / 128"),
    wrong(
        "7.1",
        "one scale for all rows",
        "weight.abs().amax(dim=1) if absmax is None else absmax",
        "weight.abs().amax().expand(len(weight)) if absmax is None else absmax",
    ),
    wrong(
        "7.1",
        "absmax ignored, and the largest magnitude of this part used",
        "absmax = weight.abs().amax(dim=1) if absmax is None else absmax",
        "absmax = weight.abs().amax(dim=1)",
    ),
    wrong(
        "7.1",
        "the largest absmax used for all rows",
        "weight.abs().amax(dim=1) if absmax is None else absmax",
        "weight.abs().amax(dim=1) if absmax is None else absmax.amax().expand(len(weight))",
    ),
    wrong("7.1", "numbers as low as -128", "clamp(-127, 127)", "clamp(-128, 127)"),
    wrong("7.1", "numbers not limited to 127 in magnitude", ".clamp(-127, 127)", ""),
    wrong(
        "7.1",
        "scale 1 for a row with a NaN",
        "torch.where(scale == 0, 1.0, scale)",
        "torch.where(scale > 0, scale, 1.0)",
    ),
    right(
        "7.1",
        "row by row",
        """
        if absmax is None:
            absmax = torch.stack([row.abs().max() for row in weight])
        scale = absmax / 127.0
        scale = scale.masked_fill(scale == 0, 1.0)
        rows = [torch.round(row / each).clamp(-127, 127).to(torch.int8) for row, each in zip(weight, scale)]
        return torch.stack(rows), scale
        """,
    ),
    # ------------------------------------------------------------------------------------ 7.2 quantize_activations
    wrong(
        "7.2",
        "one scale for all tokens",
        "quantize_int8(x, absmax)",
        "quantize_int8(x, x.abs().amax().expand(len(x)) if absmax is None else absmax)",
    ),
    wrong(
        "7.2",
        "absmax ignored, and the largest magnitude of this part used",
        "quantize_int8(x, absmax)",
        "quantize_int8(x)",
    ),
    wrong(
        "7.2",
        "the largest absmax used for all tokens",
        "quantize_int8(x, absmax)",
        "quantize_int8(x, None if absmax is None else absmax.amax().expand(len(x)))",
    ),
    wrong(
        "7.2",
        "a scale for each channel",
        "quantize_int8(x, absmax)",
        "(lambda numbers, scale: (numbers.T.contiguous(), scale[: len(x)]))(*quantize_int8(x.T))",
    ),
    right(
        "7.2",
        "written out",
        """
        largest = x.abs().max(dim=-1).values if absmax is None else absmax
        scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
        return torch.round(x / scale.unsqueeze(-1)).clamp(-127, 127).to(torch.int8), scale
        """,
    ),
    # --------------------------------------------------------------------------------------- 7.3 Int8Method.product
    wrong("7.3", "the scales left out", " * layer.weight_scale", ""),
    wrong("7.3", "divided by the scales", " * layer.weight_scale", " / layer.weight_scale"),
    wrong("7.3", "the mean of all scales", " * layer.weight_scale", " * layer.weight_scale.mean()"),
    wrong("7.3", "the product divided by 127, not multiplied by the scales", " * layer.weight_scale", " / 127"),
    wrong(
        "7.3",
        "the bias added here too, although `apply` adds it",
        "F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale",
        "F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale + layer.bias",
    ),
    wrong(
        "7.3",
        "computed in float32, whatever dtype x has",
        "F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale",
        "F.linear(x.float(), layer.weight.float()) * layer.weight_scale",
    ),
    right(
        "7.3",
        "the weight made first",
        """
        weight = layer.weight.to(x.dtype) * layer.weight_scale.unsqueeze(1)
        return x @ weight.T
        """,
    ),
    # --------------------------------------------------------------------------------------- 7.4 W8A8Method.product
    wrong(
        "7.4",
        "the sum kept in eight bits",
        "int8_matmul(numbers, layer.weight)",
        "int8_matmul(numbers, layer.weight).to(torch.int8)",
    ),
    wrong("7.4", "the outputs' scales left out", " * upcast(layer.weight_scale)", ""),
    wrong("7.4", "the tokens' scales left out", " * upcast(scale)[:, None]", ""),
    wrong(
        "7.4",
        "a scale from this rank's part of a token only",
        "quantize_activations(x, whole_row_absmax(layer, x))",
        "quantize_activations(x)",
    ),
    wrong(
        "7.4",
        "activations not quantized",
        "(total * upcast(scale)[:, None] * upcast(layer.weight_scale)).to(x.dtype)",
        "(x @ layer.weight.to(x.dtype).T) * layer.weight_scale",
    ),
    wrong(
        "7.4",
        "sums converted to the dtype of x before they are scaled, where float16 ends at 65,504",
        "(total * upcast(scale)[:, None] * upcast(layer.weight_scale)).to(x.dtype)",
        "total.to(x.dtype) * scale[:, None] * layer.weight_scale",
        recognised=False,  # both are infinite
    ),
    wrong(
        "7.4",
        "the two scales multiplied in the dtype of x, where float16 loses a small product",
        "(total * upcast(scale)[:, None] * upcast(layer.weight_scale)).to(x.dtype)",
        "(total * upcast(scale[:, None] * layer.weight_scale)).to(x.dtype)",
    ),
    right(
        "7.4",
        "in float64, which is exact too",
        """
        numbers, scale = quantize_activations(x, whole_row_absmax(layer, x))
        total = torch.einsum("ti,oi->to", numbers.double(), layer.weight.double())
        return (total * scale.double()[:, None] * layer.weight_scale.double()[None]).to(x.dtype)
        """,
    ),
    # ------------------------------------------------------------------------------------------------ 7.5 pack_int4
    wrong(
        "7.5", "nibbles swapped", "numbers[:, 0::2] | numbers[:, 1::2] << 4", "numbers[:, 1::2] | numbers[:, 0::2] << 4"
    ),
    wrong(
        "7.5",
        "halves of the row packed together, not neighbours",
        "numbers[:, 0::2] | numbers[:, 1::2] << 4",
        "numbers[:, : numbers.shape[1] // 2] | numbers[:, numbers.shape[1] // 2 :] << 4",
    ),
    wrong("7.5", "shifted by three bits", "<< 4", "<< 3"),
    right("7.5", "by a product", "return (numbers[:, ::2] + 16 * numbers[:, 1::2]).to(torch.uint8)"),
    # ---------------------------------------------------------------------------------------------- 7.6 unpack_int4
    wrong("7.6", "nibbles swapped", "[packed & 15, packed >> 4]", "[packed >> 4, packed & 15]"),
    wrong(
        "7.6",
        "halves of the row, not neighbours",
        "torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)",
        "torch.cat([packed & 15, packed >> 4], dim=1)",
    ),
    wrong("7.6", "the high half not shifted down", "packed >> 4", "packed & 240"),
    wrong(
        "7.6",
        "numbers above 7 treated as negative",
        "packed & 15, packed >> 4], dim=-1).flatten(1)",
        "packed & 15, packed >> 4], dim=-1).flatten(1).add(8).remainder(16)",
    ),
    right(
        "7.6",
        "written into place",
        """
        numbers = packed.new_empty(packed.shape[0], 2 * packed.shape[1])
        numbers[:, 0::2] = packed % 16
        numbers[:, 1::2] = packed // 16
        return numbers
        """,
    ),
    # -------------------------------------------------------------------------------------------- 7.7 quantize_int4
    wrong(
        "7.7",
        "16 steps between the smallest and the largest, not 15",
        "(groups.amax(-1) - groups.amin(-1)) / 15",
        "(groups.amax(-1) - groups.amin(-1)) / 16",
    ),
    wrong(
        "7.7", "the minimum not subtracted when numbers are chosen", "(groups - wide[1]) / wide[0]", "groups / wide[0]"
    ),
    wrong(
        "7.7",
        "symmetric with 15 steps over twice the magnitude, not 7 over the magnitude",
        "groups.abs().amax(-1) / 7 if",
        "groups.abs().amax(-1) / 7.5 if",
    ),
    wrong("7.7", "the fraction cut off, not rounded", ".round().clamp(0, 15)", ".trunc().clamp(0, 15)"),
    wrong(
        "7.7",
        "the last group filled with zeros",
        "weight[:, -1:].expand(out, missing)",
        "weight.new_zeros(out, missing)",
    ),
    wrong(
        "7.7",
        "numbers counted from the minimum before it was rounded",
        "(groups - wide[1]) / wide[0]",
        "(groups - (wide[1] if symmetric else groups.amin(-1, keepdim=True))) / wide[0]",
    ),
    wrong(
        "7.7",
        "scale 1 where all weights of a group are equal, which loses them if symmetric",
        "torch.where(step.half() > 0, step.half(), 1.0)",
        "torch.where((groups.amax(-1) > groups.amin(-1)) & (step.half() > 0), step.half(), 1.0)",
    ),
    wrong(
        "7.7",
        "a scale of 0 where float16 rounds it to 0",
        "torch.where(step.half() > 0, step.half(), 1.0)",
        "torch.where(step > 0, step, 1.0).half()",
    ),
    wrong(
        "7.7",
        "numbers chosen for the scale before it was rounded to float16",
        "wide = scale[..., None].to(weight.dtype)",
        "wide = torch.where(step.half() > 0, step, 1.0)[..., None]",
    ),
    wrong(
        "7.7",
        "the last group filled with the first weight",
        "weight[:, -1:].expand(out, ",
        "weight[:, :1].expand(out, ",
    ),
    right(
        "7.7",
        "group by group",
        """
        numbers, scales, minima = [], [], []
        for piece in weight.split(group_size, dim=1):
            low, high = piece.aminmax(dim=1)
            step = torch.maximum(high, -low) / 7 if symmetric else (high - low) / 15
            step = step.to(torch.float16)
            step = step.masked_fill(step == 0, 1.0)
            base = step * -8 if symmetric else low.to(torch.float16)
            exact = (piece - base.to(piece.dtype)[:, None]) / step.to(piece.dtype)[:, None]
            numbers.append(torch.round(exact).clamp(0, 15).to(torch.uint8))
            scales.append(step)
            minima.append(base)
        return torch.cat(numbers, dim=1), torch.stack(scales, dim=1), torch.stack(minima, dim=1)
        """,
    ),
    # ----------------------------------------------------------------------------------------- 7.8 dequantize_int4
    planted(
        "7.8", "groups counted from this rank's first column", ") + first_column) // group_size", ")) // group_size"
    ),
    wrong(
        "7.8",
        "the minimum not added",
        "numbers * scale[:, group_of] + minimum[:, group_of]",
        "numbers * scale[:, group_of]",
    ),
    wrong(
        "7.8",
        "the offset added to the group, not to the column",
        "+ first_column) // group_size",
        "// group_size + first_column).clamp(max=scale.shape[1] - 1)",
    ),
    wrong("7.8", "always in float32", "numbers * scale[:, group_of]", "numbers.float() * scale[:, group_of]"),
    right(
        "7.8",
        "scales repeated, and cut where the share begins",
        """
        if minimum is None:
            minimum = scale * -8
        end = first_column + numbers.shape[1]
        wide = [each.repeat_interleave(group_size, dim=1)[:, first_column:end] for each in (scale, minimum)]
        return numbers * wide[0] + wide[1]
        """,
    ),
    # --------------------------------------------------------------------------------------- 7.9 Int4Method.product
    wrong(
        "7.9",
        "the minima of symmetric groups used for asymmetric ones, too",
        "None if self.symmetric else layer.weight_minimum.to(x.dtype)",
        "None",
    ),
    wrong(
        "7.9",
        "every number too small by one",
        "numbers = unpack_int4(layer.weight)[:, : layer.in_features]",
        "numbers = unpack_int4(layer.weight)[:, : layer.in_features].sub(1)",
    ),
    wrong(
        "7.9",
        "8 subtracted from the numbers, and minima added as well",
        "numbers = unpack_int4(layer.weight)[:, : layer.in_features]",
        "numbers = unpack_int4(layer.weight)[:, : layer.in_features].to(x.dtype) - 8",
    ),
    wrong_body(
        "7.9",
        "the weight computed in float16, and converted to x's dtype afterwards",
        """
        numbers = unpack_int4(layer.weight)[:, : layer.in_features]
        minimum = None if self.symmetric else layer.weight_minimum
        first_column = layer.columns.start % self.group_size
        weight = dequantize_int4(numbers, layer.weight_scale, minimum, self.group_size, first_column)
        return F.linear(x, weight.to(x.dtype))
        """,
    ),
    wrong(
        "7.9",
        "groups counted from the layer's own first column",
        "first_column = layer.columns.start % self.group_size",
        "first_column = 0",
    ),
    wrong(
        "7.9",
        "the number of whole groups before the first column, not its position in its group",
        "layer.columns.start % self.group_size",
        "layer.columns.start // self.group_size",
    ),
    wrong(
        "7.9",
        "the bias added here too, although `apply` adds it",
        "F.linear(x, weight)",
        "F.linear(x, weight, layer.bias)",
    ),
    right(
        "7.9",
        "group by group",
        """
        numbers, total, first_column = unpack_int4(layer.weight), 0, layer.columns.start % self.group_size
        for group in range(layer.weight_scale.shape[1]):
            start = group * self.group_size - first_column
            columns = slice(max(start, 0), min(start + self.group_size, layer.in_features))
            part, scale = x[:, columns], layer.weight_scale[:, group].to(x.dtype)
            minimum = -8 * scale if self.symmetric else layer.weight_minimum[:, group].to(x.dtype)
            total = total + part @ numbers[:, columns].to(x.dtype).T * scale + part.sum(1, keepdim=True) * minimum
        return total
        """,
    ),
    # ------------------------------------------------------------------------------------------------- 7.10 quantize
    wrong(
        "7.10",
        "the head quantized like the layers",
        "set_method(model.lm_head, head_method)",
        "set_method(model.lm_head, method)",
    ),
    wrong("7.10", "the head left in floats", "set_method(model.lm_head, head_method)", "pass"),
    wrong(
        "7.10",
        "the weights not tied again, so that the head has a table of its own",
        "    model.tie_weights()",
        "",
    ),
    wrong(
        "7.10",
        "the embedding table in eight bits even if it is not tied",
        "if model.config.tie_word_embeddings:",
        "if True:",
    ),
    wrong(
        "7.10",
        "a tied table left in floats",
        "set_method(model.model.embed_tokens, head_method)",
        "pass",
    ),
    wrong(
        "7.10",
        "is_saved ignored",
        "quantization.method(is_saved)",
        "quantization.method(False)",
    ),
    wrong("7.10", "is_saved ignored for the head", "Int8Method(is_saved)", "Int8Method()"),
    wrong(
        "7.10",
        "only the first block quantized",
        "layers_of(model.model.layers)",
        "layers_of(model.model.layers[0])",
    ),
    wrong(
        "7.10",
        "methods set without making tensors for them",
        "set_method(layer, method)",
        "layer.method = method",
    ),
    right(
        "7.10",
        "by the names of the modules",
        """
        for name, module in list(model.named_modules()):
            if name == "lm_head" or (name == "model.embed_tokens" and model.config.tie_word_embeddings):
                set_method(module, Int8Method(is_saved))
            elif name.endswith("_proj"):
                set_method(module, quantization.method(is_saved))
        model.tie_weights()
        """,
    ),
    # --------------------------------------------------------------------------------- 7.11 activation_aware_scales
    wrong("7.11", "the factors of the last candidate, not of the best", "if error < least:", "if True:"),
    wrong(
        "7.11",
        "the error of the weights, not of the outputs",
        "float((x @ each.T - target).square().mean()) for each, target in zip(left, wanted)",
        "float((each - weight).square().mean()) for each, weight in zip(left, weights)",
        recognised=False,
    ),
    wrong(
        "7.11",
        "the weights not divided again after rounding",
        "round_trip(weight * factors) / factors",
        "round_trip(weight * factors)",
        recognised=False,
    ),
    wrong(
        "7.11",
        "the outputs of scaled weights compared, with inputs that are not divided",
        "float((x @ each.T - target).square().mean()) for each, target in zip(left, wanted)",
        "float((x @ ((each - weight) * factors).T).square().mean()) for each, weight in zip(left, weights)",
        recognised=False,
    ),
    wrong(
        "7.11",
        "the largest activation of each channel, not the mean magnitude",
        "x.abs().mean(dim=0)",
        "x.abs().amax(dim=0)",
    ),
    wrong(
        "7.11",
        "factors not divided by the square root of their largest times smallest",
        "factors = factors / (factors.max() * factors.min()).sqrt()",
        "pass",
    ),
    wrong("7.11", "the mean magnitude of the changes, not the mean square", ".square().mean()", ".abs().mean()"),
    wrong("7.11", "the last of equally good candidates", "error < least", "error <= least"),
    right(
        "7.11",
        "a list of trials, and its minimum",
        """
        means = torch.clamp(x.abs().sum(0) / len(x), min=1e-4)

        def trial(i):
            factors = torch.exp(means.log() * i / num_trials)
            factors = factors * torch.rsqrt(factors.amax() * factors.amin())
            total = 0.0
            for weight in weights:
                change = round_trip(weight * factors) / factors - weight
                total += ((x @ change.T) ** 2).mean().item()
            return total, i, factors

        return min((trial(i) for i in range(num_trials)), key=lambda each: each[:2])[2]
        """,
    ),
    # ------------------------------------------------------------------------------------- 7.12 Int8KVCache.write
    wrong(
        "7.12",
        "one scale for a token's heads together",
        "numbers, scale = quantize_int8(new.flatten(0, 1))",
        "numbers, scale = quantize_int8(new.flatten(0, 1), new.abs().amax((1, 2)).repeat_interleave(new.shape[1]))",
    ),
    wrong(
        "7.12",
        "the scales not stored",
        "scales[index].flatten(0, 1).index_copy_(0, slots, scale.view(new.shape[:-1]))",
        "pass",
    ),
    wrong("7.12", "the keys written as values, too", "(k, v)):", "(k, k)):"),
    wrong(
        "7.12",
        "one scale for all tokens of the step, so that results depend on chunks",
        "quantize_int8(new.flatten(0, 1))",
        "quantize_int8(new.flatten(0, 1), new.abs().amax().expand(new.shape[0] * new.shape[1]))",
    ),
    wrong(
        "7.12",
        "a slot's scale never smaller than its earlier one",
        "scale.view(new.shape[:-1]))",
        "torch.maximum(scales[index].flatten(0, 1)[slots], scale.view(new.shape[:-1])))",
    ),
    right(
        "7.12",
        "slot by slot",
        """
        own = layer - self.layers.start
        for token, slot in enumerate(slots.tolist()):
            block, place = divmod(slot, self.block_size)
            for which, new in enumerate((k, v)):
                numbers, scale = quantize_int8(new[token])
                (self.keys, self.values)[which][own, block, place] = numbers
                self.scales[which][own, block, place] = scale
        """,
    ),
    # ------------------------------------------------------------------------------------ 7.13 Int8KVCache.gather
    wrong("7.13", "the scales left out", "numbers * scales[index].index_select(0, block_ids)[..., None]", "numbers"),
    wrong(
        "7.13",
        "the keys' scales used for the values, too",
        "zip((self.keys, self.values), self.scales)",
        "zip((self.keys, self.values), (self.scales[0],) * 2)",
    ),
    wrong("7.13", "positions counted from the start of the first block read", "[:, low:high])", "[:, : end - start])"),
    wrong(
        "7.13",
        "the first layer's memory, whatever the layer",
        "index, first, last = layer - self.layers.start,",
        "index, first, last = 0 * layer,",
    ),
    wrong("7.13", "always in float32", ".to(self.dtype)", ".float()"),
    right(
        "7.13",
        "position by position",
        """
        own, positions = layer - self.layers.start, torch.arange(start, end)
        blocks = block_tables[:, positions // self.block_size]
        places = positions % self.block_size
        found = []
        for which, store in enumerate((self.keys, self.values)):
            numbers = store[own][blocks, places].to(self.dtype)
            found.append(numbers * self.scales[which][own][blocks, places].unsqueeze(-1))
        return tuple(found)
        """,
    ),
    # ---------------------------------------------------------------------------------------- 7.14 stream_layers
    wrong_body(
        "7.14",
        "nothing read ahead",
        """
        for number in numbers:
            yield number, read(number)
        """,
    ),
    wrong_body(
        "7.14",
        "all layers read at once",
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = [(number, pool.submit(read, number)) for number in numbers]
            for number, future in waiting:
                yield number, future.result()
        """,
        recognised=False,
    ),
    wrong(
        "7.14",
        "the last layer never yielded",
        "        if waiting is not None:\n            yield waiting[0], waiting[1].result()",
        "",
        recognised=False,
    ),
    wrong_body(
        "7.14",
        "the first layer left out",
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            numbers = list(numbers)[1:]
            waiting = None
            for number in numbers:
                following = number, pool.submit(read, number)
                if waiting is not None:
                    yield waiting[0], waiting[1].result()
                waiting = following
            if waiting is not None:
                yield waiting[0], waiting[1].result()
        """,
    ),
    right(
        "7.14",
        "pairs of neighbours",
        """
        order = list(numbers)
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = pool.submit(read, order[0]) if order else None
            for place, number in enumerate(order):
                layer = ahead.result()
                if place + 1 < len(order):
                    ahead = pool.submit(read, order[place + 1])
                yield number, layer
        """,
    ),
    # ---------------------------------------------------------------------------------------- 7.15 kl_divergence
    wrong("7.15", "p and q exchanged", "(p.exp() * (p - q))", "(q.exp() * (q - p))"),
    wrong("7.15", "summed over the tokens, not their mean", ".sum(-1).mean()", ".sum()"),
    wrong("7.15", "the mean over the vocabulary", ".sum(-1).mean()", ".mean()"),
    wrong(
        "7.15",
        "scores used as log-probabilities",
        "upcast(logits).log_softmax(-1), upcast(other_logits).log_softmax(-1)",
        "upcast(logits), upcast(other_logits)",
    ),
    wrong_body(
        "7.15",
        "a little added to every probability, so that no logarithm is infinite",
        """
        p, q = upcast(logits).softmax(-1), upcast(other_logits).softmax(-1)
        return (p * ((p + 1e-10) / (q + 1e-10)).log()).sum(-1).mean()
        """,
    ),
    right(
        "7.15",
        "by torch's own",
        """
        target = other_logits.float().log_softmax(dim=-1)
        return F.kl_div(target, logits.float().log_softmax(dim=-1), log_target=True, reduction="batchmean")
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "7.4",
        "a float32 number times a half-precision scale is float32 as well, with the same value",
        "upcast(layer.weight_scale) -> layer.weight_scale",
    ),
    equivalent("7.5", "a slice begins at 0 by itself", "numbers[:, 0::2] -> numbers[:, ::2]"),
    equivalent(
        "7.7",
        "float16 joins float32 and float64 in their own dtype",
        "scale[..., None].to(weight.dtype) -> scale[..., None]",
        "minimum[..., None].to(weight.dtype) -> minimum[..., None]",
    ),
    equivalent(
        "7.8",
        "an index in the processor's memory selects the same columns on a GPU, after it has been copied there",
        "torch.arange(numbers.shape[1], device=numbers.device) -> torch.arange(numbers.shape[1])",
    ),
    equivalent(
        "7.11",
        "the first trial always takes the place of what `best` was before",
        "torch.ones_like(magnitude) -> magnitude",
        "torch.ones_like -> torch.zeros_like",
    ),
    equivalent(
        "7.11",
        "a tensor of one number compares and adds up like the number",
        "float((x @ each.T - target).square().mean()) -> (x @ each.T - target).square().mean()",
    ),
    equivalent(
        "7.13",
        "whole numbers times a scale are in the scale's dtype",
        "store[index].index_select(0, block_ids).to(self.dtype) -> store[index].index_select(0, block_ids)",
    ),
    equivalent(
        "7.15",
        "the last of two axes",
        "upcast(logits).log_softmax(-1) -> upcast(logits).log_softmax(1)",
        "upcast(other_logits).log_softmax(-1) -> upcast(other_logits).log_softmax(1)",
        "(p.exp() * (p - q)).sum(-1) -> (p.exp() * (p - q)).sum(1)",
    ),
    equivalent(
        "7.14",
        "the next is handed to the pool only when the one before it has come back, so a second thread finds no work",
        "ThreadPoolExecutor(max_workers=1) -> ThreadPoolExecutor()",
        "ThreadPoolExecutor(max_workers=1) -> ThreadPoolExecutor(max_workers=2)",
    ),
]
