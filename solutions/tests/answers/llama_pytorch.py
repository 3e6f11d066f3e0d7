"""Lesson 2's answers that are not the reference: mistakes, each by the name that a student is told, and other ways."""

from common.course.catalogue import equivalent, right, wrong, wrong_body

ANSWERS = [
    # --------------------------------------------------------------------------------------------- 2.1 parse_config
    wrong("2.1", "the experts left out", "        moe=given.moe,\n", ""),
    wrong("2.1", "no norm on q and k with experts", 'in ("qwen3", "qwen3_moe")', '== "qwen3"'),
    wrong("2.1", "windows left out", "        layer_windows=given.layer_windows,\n", ""),
    wrong(
        "2.1",
        "head_dim taken as hidden_size / num_attention_heads even where the file gives it",
        "given.head_dim or given.hidden_size // heads",
        "given.hidden_size // heads",
    ),
    wrong("2.1", "head_dim left None where the file does not give it", " or given.hidden_size // heads", ""),
    wrong("2.1", "head_dim divided as a float", "given.hidden_size // heads", "given.hidden_size / heads"),
    wrong(
        "2.1", "as many KV heads as query heads, whatever the file says", "given.num_key_value_heads or heads", "heads"
    ),
    wrong("2.1", "a default of one KV head", "given.num_key_value_heads or heads", "given.num_key_value_heads or 1"),
    wrong("2.1", "num_key_value_heads left None", "given.num_key_value_heads or heads", "given.num_key_value_heads"),
    wrong(
        "2.1",
        "Qwen2's bias on q, k and v left out",
        'family == "qwen2" or given.attention_bias',
        "given.attention_bias",
    ),
    wrong(
        "2.1",
        "a bias on o_proj too in Qwen2",
        'family != "qwen2" and given.attention_bias',
        'family == "qwen2" or given.attention_bias',
    ),
    wrong("2.1", "mlp_bias read for every family", 'family == "llama" and given.mlp_bias', "given.mlp_bias"),
    wrong(
        "2.1", "the scaling of the rotary embedding left out", "rope_scaling=given.rope_scaling", "rope_scaling=None"
    ),
    wrong("2.1", "QK norm given to Qwen2 as well", 'family in ("qwen3", "qwen3_moe")', 'family.startswith("qwen")'),
    wrong(
        "2.1",
        "a bias on q, k and v in every Qwen, not in Qwen2 alone",
        'family == "qwen2" or given.attention_bias',
        'family.startswith("qwen") or given.attention_bias',
    ),
    wrong(
        "2.1",
        "hidden_size divided by the number of KV heads",
        "given.hidden_size // heads",
        "given.hidden_size // (given.num_key_value_heads or heads)",
    ),
    wrong(
        "2.1",
        "a default of 2048 positions also where the file says fewer",
        "max_position_embeddings=given.max_position_embeddings",
        "max_position_embeddings=max(2048, given.max_position_embeddings)",
    ),
    wrong(
        "2.1",
        "windows taken from Mistral's files alone",
        "layer_windows=given.layer_windows",
        'layer_windows=given.layer_windows if family == "mistral" else ()',
    ),
    wrong(
        "2.1",
        "QK norm given to every family but Llama and Qwen2",
        'family in ("qwen3", "qwen3_moe")',
        'family not in ("llama", "qwen2")',
    ),
    wrong("2.1", "the default rms_norm_eps of ModelConfig", "        rms_norm_eps=given.rms_norm_eps,\n", ""),
    right(
        "2.1",
        "by the names of the fields",
        """
        names = list(ModelConfig.__dataclass_fields__)
        values = {name: getattr(given, name) for name in names if hasattr(given, name)}
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = given.num_attention_heads
        if values["head_dim"] is None:
            values["head_dim"] = given.hidden_size // given.num_attention_heads
        is_qwen2 = given.model_type == "qwen2"
        values["mlp_bias"] = given.mlp_bias and given.model_type == "llama"
        return ModelConfig(
            **values,
            qkv_bias=is_qwen2 or given.attention_bias,
            o_bias=given.attention_bias and not is_qwen2,
            qk_norm=given.model_type.startswith("qwen3"),
        )
        """,
    ),
    # --------------------------------------------------------------------------------------- 2.2 scaled_frequencies
    wrong_body("2.2", "the scaling left out: only theta counts", "return frequencies"),
    wrong_body(
        "2.2",
        "every frequency divided by the factor, fast ones too",
        'return frequencies / config.rope_scaling["factor"]',
    ),
    wrong(
        "2.2",
        "the shares swapped: fast pairs slowed down and slow ones kept",
        "(kept + (1 - kept) / scaling",
        "((1 - kept) + kept / scaling",
    ),
    wrong(
        "2.2",
        "the mixture between the two bounds turned round",
        'return frequencies * (kept + (1 - kept) / scaling["factor"])',
        "kept = torch.where((kept > 0) & (kept < 1), 1 - kept, kept)\n"
        '    return frequencies * (kept + (1 - kept) / scaling["factor"])',
    ),
    wrong(
        "2.2",
        "no mixture: every pair either kept or slowed down",
        "((turns - low) / (high - low)).clamp(0, 1)",
        "(turns > high).float()",
    ),
    wrong(
        "2.2",
        "the context divided by the frequency, instead of multiplied: fast pairs have few turns",
        "* frequencies / (2 * math.pi)",
        "/ frequencies / (2 * math.pi)",
    ),
    wrong("2.2", "radians used as turns, not divided by 2 pi", " / (2 * math.pi)", ""),
    wrong(
        "2.2",
        "turns counted in the new context, not in the original one",
        'scaling["original_max_position_embeddings"]',
        "config.max_position_embeddings",
    ),
    wrong(
        "2.2",
        "a mixture that is linear in the wavelength, not in the turns",
        "((turns - low) / (high - low)).clamp(0, 1)",
        "((1 / low - 1 / turns) / (1 / low - 1 / high)).clamp(0, 1)",
    ),
    right(
        "2.2",
        "pair by pair, with wavelengths",
        """
        s = config.rope_scaling
        context, scaled = s["original_max_position_embeddings"], []
        for frequency in frequencies.tolist():
            wavelength = 2 * math.pi / frequency
            if wavelength < context / s["high_freq_factor"]:
                scaled.append(frequency)
            elif wavelength > context / s["low_freq_factor"]:
                scaled.append(frequency / s["factor"])
            else:
                smooth = context / wavelength - s["low_freq_factor"]
                smooth /= s["high_freq_factor"] - s["low_freq_factor"]
                scaled.append((1 - smooth) * frequency / s["factor"] + smooth * frequency)
        return torch.tensor(scaled, dtype=torch.float32)
        """,
    ),
    # -------------------------------------------------------------------------------------------- 2.3 causal_attend
    wrong(
        "2.3",
        "no causal mask: tokens see the future",
        "causal_mask(num_tokens, num_tokens, q.device)",
        "torch.ones(num_tokens, num_tokens, dtype=torch.bool)",
    ),
    wrong(
        "2.3", "the mask turned round: tokens see only the future", "num_tokens, q.device)", "num_tokens, q.device).mT"
    ),
    wrong(
        "2.3",
        "every token seeing itself alone",
        "causal_mask(num_tokens, num_tokens, q.device)",
        "torch.eye(num_tokens, dtype=torch.bool)",
    ),
    wrong(
        "2.3",
        "a mask that is one off: each token sees the next one too",
        "causal_mask(num_tokens, num_tokens, q.device)",
        "causal_mask(num_tokens, num_tokens).logical_not().triu(2).logical_not()",
    ),
    wrong(
        "2.3",
        "KV heads dealt to the query heads in turn, instead of group by group",
        "    return grouped",
        "    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1) for x in (k, v))\n    return grouped",
    ),
    right(
        "2.3",
        "torch's own operator",
        """
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)
        """,
    ),
    # ---------------------------------------------------------------------------------------- 2.4 Attention.forward
    wrong("2.4", "the biases of q, k and v left out", "proj(hidden)", "F.linear(hidden, proj.weight)"),
    wrong_body(
        "2.4",
        "QK norm after the rotation",
        """
        q, k, v = (proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = self.q_norm(apply_rotary(q, cos, sin))
        k = self.k_norm(apply_rotary(k, cos, sin))
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))
        """,
    ),
    wrong_body(
        "2.4",
        "QK norm left out",
        """
        q, k, v = (proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))
        """,
    ),
    wrong("2.4", "q's norm used for k", "self.k_norm(k)", "self.q_norm(k)"),
    wrong("2.4", "v rotated too", "attend(self.layer, q, k, v)", "attend(self.layer, q, k, apply_rotary(v, cos, sin))"),
    wrong("2.4", "k not rotated", "apply_rotary(self.k_norm(k), cos, sin)", "self.k_norm(k)"),
    wrong(
        "2.4",
        "a projection cut as (head_dim, heads) instead of (heads, head_dim)",
        "unflatten(-1, (-1, self.head_dim))",
        "unflatten(-1, (self.head_dim, -1)).mT",
    ),
    wrong("2.4", "the heads' outputs joined in the wrong order", ".flatten(1)", ".mT.flatten(1)"),
    wrong(
        "2.4",
        "a projection viewed as (heads, T, head_dim), which takes one token's numbers for another's",
        "proj(hidden).unflatten(-1, (-1, self.head_dim))",
        "proj(hidden).view(-1, len(hidden), self.head_dim).transpose(0, 1)",
    ),
    wrong("2.4", "`attend` told layer 0 whatever the layer", "attend(self.layer", "attend(0"),
    right(
        "2.4",
        "by views, one projection after the other",
        """
        num_tokens = hidden.size(0)
        v = self.v_proj(hidden).view(num_tokens, -1, self.head_dim)
        k = self.k_norm(self.k_proj(hidden).view(num_tokens, -1, self.head_dim))
        q = self.q_norm(self.q_proj(hidden).view(num_tokens, -1, self.head_dim))
        mixed = attend(self.layer, apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v)
        return self.o_proj(mixed.reshape(num_tokens, -1))
        """,
    ),
    # -------------------------------------------------------------------------------------------- 2.7 Llama.forward
    wrong(
        "2.7",
        "the final norm applied here already",
        "return self.run_layers(self.embed(token_ids), positions, attend, range(self.config.num_hidden_layers))",
        "return self.model.norm(\n"
        "            self.run_layers(self.embed(token_ids), positions, attend, range(self.config.num_hidden_layers))\n"
        "        )",
    ),
    wrong("2.7", "the last layer left out", "num_hidden_layers)", "num_hidden_layers - 1)"),
    wrong("2.7", "`causal_attend` called, instead of the `attend` that was handed in", " attend,", " causal_attend,"),
    wrong("2.7", "positions counted from 0, whatever was handed in", "positions,", "torch.arange(len(token_ids)),"),
    wrong(
        "2.7",
        "the embedding scaled by the root of hidden_size, as other families do",
        "self.embed(token_ids)",
        "self.embed(token_ids) * self.config.hidden_size**0.5",
    ),
    wrong(
        "2.7",
        "rows of the embedding's weight, past the layer that stores it",
        "self.embed(token_ids)",
        "self.model.embed_tokens.weight[token_ids].to(self.model.norm.weight.dtype)",
    ),
    wrong(
        "2.7",
        "tokens sorted by position",
        "self.run_layers(self.embed(token_ids), positions",
        "self.run_layers(self.embed(token_ids[positions.argsort()]), positions.sort().values",
    ),
    right(
        "2.7",
        "in steps",
        """
        hidden = self.model.embed_tokens(token_ids)
        everything = range(len(self.model.layers))
        return self.run_layers(hidden, positions, attend, layers=everything)
        """,
    ),
    # --------------------------------------------------------------------------------------------- 2.8 load_weights
    wrong(
        "2.8",
        "missing tensors not noticed: the model keeps its random ones",
        "if missing := sorted(wanted.keys() - present):\n"
        "        raise CheckpointError(f\"{checkpoint.folder}: the model needs {', '.join(missing)}; "
        'the checkpoint lacks them.")',
        "wanted = {name: shape for name, shape in wanted.items() if name in present}\n"
        "    layers = {path: layer for path, layer in layers.items() "
        'if all(f"{path}.{name}" in wanted for name in layer.shapes())}',
    ),
    wrong(
        "2.8",
        "only the first missing tensor named",
        "', '.join(missing)",
        "missing[0]",
    ),
    wrong(
        "2.8",
        "unknown tensors passed over in silence",
        "if unknown := sorted(present - wanted.keys()):",
        "if unknown := []:",
    ),
    wrong("2.8", "shapes not compared", "!= expected:", "is None:"),
    wrong(
        "2.8",
        "shapes compared with those of the parameters, instead of those that the layers expect in the checkpoint",
        "for name, shape in layer.shapes().items()}",
        "for name, shape in ((n, tuple(p.shape)) for n, p in layer.named_parameters(recurse=False))}",
    ),
    wrong_body(
        "2.8",
        "every parameter read whole, instead of by its layer",
        """
        parameters = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        skipped = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        names = {n for n in checkpoint.names() if n not in skipped and not n.endswith("rotary_emb.inv_freq")}
        if names != parameters.keys():
            raise CheckpointError(
                f"{checkpoint.folder} lacks {sorted(parameters.keys() - names)} and has, unknown to the model, "
                f"{sorted(names - parameters.keys())}."
            )
        for name in sorted(names):
            shape, dtype = parameters[name]
            if checkpoint.shape(name) != shape:
                raise CheckpointError(f"{name} in {checkpoint.file(name)}: {checkpoint.shape(name)}, expected {shape}")
        for name in sorted(names):
            model.load_state_dict({name: checkpoint.read(name).to(parameters[name][1])}, strict=False, assign=True)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.requires_grad_(False)
        """,
    ),
    wrong(
        "2.8",
        "missing biases not noticed",
        "sorted(wanted.keys() - present)",
        'sorted(name for name in wanted.keys() - present if name.endswith("weight"))',
    ),
    wrong(
        "2.8",
        "shapes compared when the tensors have been read",
        "    for name, expected in sorted(wanted.items()):",
        "    for path, layer in layers.items():\n        layer.load(reader(checkpoint, path))\n"
        "    for name, expected in sorted(wanted.items()):",
    ),
    wrong("2.8", "the head not tied again after loading", "model.tie_weights()", "pass"),
    wrong(
        "2.8",
        "a tied head read from the file, instead of being the embedding",
        "model.tie_weights()",
        'model.tie_weights()\n    if model.config.tie_word_embeddings and "lm_head.weight" in checkpoint.names():\n'
        '        model.lm_head.weight = nn.Parameter(checkpoint.read("lm_head.weight"), requires_grad=False)',
    ),
    wrong(
        "2.8",
        "a tied head in the file treated as an unknown tensor",
        'present -= {"lm_head.weight"}',
        "pass",
    ),
    wrong(
        "2.8",
        "a tied head asked for in the file",
        'if not (is_tied and path == "lm_head")}',
        "}",
    ),
    wrong(
        "2.8",
        "the rotary buffers of old files treated as unknown tensors",
        'if not name.endswith("rotary_emb.inv_freq")}',
        "}",
    ),
    wrong(
        "2.8",
        "every name with `rotary` ignored, instead of `rotary_emb.inv_freq` alone",
        'not name.endswith("rotary_emb.inv_freq")',
        '"rotary" not in name',
    ),
    wrong(
        "2.8",
        "the whole checkpoint read before the first tensor is put in place",
        "for path, layer in layers.items():\n        layer.load(reader(checkpoint, path))",
        "tensors = {name: checkpoint.read(name) for name in wanted}\n    for path, layer in layers.items():\n"
        '        layer.load(lambda name, *part: tensors[f"{path}.{name}"]['
        "tuple(slice(r.start, r.stop) for r in part) or ...])",
    ),
    right(
        "2.8",
        "layer by layer, with a set of what is left over",
        """
        left = {n for n in checkpoint.names() if "rotary_emb.inv_freq" not in n}
        layers = layers_of(model)
        if model.config.tie_word_embeddings:
            left.discard("lm_head.weight")
            del layers["lm_head"]
        lacking = []
        for path in layers:
            for name, shape in layers[path].shapes().items():
                full = path + "." + name
                if full not in left:
                    lacking.append(full)
                elif tuple(checkpoint.shape(full)) != tuple(shape):
                    raise CheckpointError(f"{full} in {checkpoint.file(full)}: {checkpoint.shape(full)}, not {shape}")
                left.discard(full)
        if lacking or left:
            raise CheckpointError(f"{checkpoint.folder} lacks {lacking} and has, unknown to the model, {left}.")
        for path in layers:
            layers[path].load(reader(checkpoint, path))
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        """,
    ),
    # ----------------------------------------------------------------------------------------------- 2.9 keep_top_k
    wrong_body(
        "2.9",
        "exactly k kept: ties with the k-th cut off",
        """
        best = logits.topk(min(k, logits.shape[-1]))
        return torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
        """,
    ),
    wrong("2.9", "the k-th itself dropped", "logits < threshold", "logits <= threshold"),
    wrong("2.9", "one more than k kept", "min(k, logits.shape[-1])", "min(k + 1, logits.shape[-1])"),
    wrong("2.9", "the others set to 0, which is a fine score, instead of -inf", "-math.inf", "0.0"),
    wrong_body(
        "2.9",
        "the k highest different scores, each with all that are equal to it",
        """
        scores = logits.unique()
        return logits.masked_fill(logits < scores[max(0, len(scores) - k)], -math.inf)
        """,
    ),
    wrong("2.9", "the lowest scores kept", "logits < threshold", "logits > threshold"),
    wrong("2.9", "probabilities returned, instead of scores", "logits.masked_fill(", "logits.softmax(-1).masked_fill("),
    wrong("2.9", "the logits that were handed in changed in place", "masked_fill(", "masked_fill_("),
    right(
        "2.9",
        "by sorting",
        """
        lowest = sorted(logits.tolist(), reverse=True)[:k][-1]
        return torch.where(logits >= lowest, logits, float("-inf"))
        """,
    ),
    # ----------------------------------------------------------------------------------------------- 2.10 keep_top_p
    wrong("2.10", "the token that crosses p left out", "before >= p", "probabilities.cumsum(-1) > p"),
    wrong(
        "2.10",
        "one token more than it takes",
        "before >= p",
        "torch.cat((before.new_zeros(1), before[:-1])) >= p",
    ),
    wrong(
        "2.10",
        "the unlikeliest tokens kept: sorted upwards, or added up from the wrong end",
        "sort(descending=True)",
        "sort()",
    ),
    wrong(
        "2.10",
        "the sorting not undone: scores stand at other tokens' places",
        "torch.empty_like(logits).scatter(-1, token_ids, ordered.masked_fill(before >= p, -math.inf))",
        "ordered.masked_fill(before >= p, -math.inf)",
    ),
    wrong_body(
        "2.10",
        "each token judged alone: is its probability at least p?",
        "return logits.masked_fill(upcast(logits).softmax(-1) < p, -math.inf)",
    ),
    wrong("2.10", "exp(score) used as a probability, without dividing by the sum", ".softmax(-1)", ".exp()"),
    right(
        "2.10",
        "token by token",
        """
        probabilities, reached, kept = logits.softmax(-1), 0.0, []
        for token_id in logits.argsort(descending=True).tolist():
            if reached >= p:
                break
            kept.append(token_id)
            reached += probabilities[token_id].item()
        filtered = torch.full_like(logits, -math.inf)
        filtered[kept] = logits[kept]
        return filtered
        """,
    ),
    # ----------------------------------------------------------------------------------------------- 2.11 keep_min_p
    wrong("2.11", "p itself as the limit, not p times the highest probability", "p * probabilities.max()", "p"),
    wrong(
        "2.11",
        "scores compared, instead of probabilities",
        "probabilities < p * probabilities.max()",
        "logits < p * logits.max()",
    ),
    wrong("2.11", "exp(score) used as a probability, which overflows", ".softmax(-1)", ".exp()"),
    wrong("2.11", "p times the mean probability as the limit", "probabilities.max()", "probabilities.mean()"),
    wrong("2.11", "the unlikely tokens kept, and the likely ones dropped", "probabilities < p", "probabilities > p"),
    wrong("2.11", "probabilities returned, instead of scores", "return logits.masked", "return probabilities.masked"),
    right("2.11", "in logarithms", "return logits.masked_fill(logits < logits.max() + math.log(p), -math.inf)"),
    # ------------------------------------------------------------------------------------------ 2.12 sampling_probs
    wrong_body(
        "2.12",
        "temperature applied after the filters",
        """
        logits = upcast(logits)
        if params.top_k > 0:
            logits = keep_top_k(logits, params.top_k)
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        if params.min_p > 0:
            logits = keep_min_p(logits, params.min_p)
        return (logits / params.temperature).softmax(-1)
        """,
    ),
    wrong("2.12", "scores multiplied by the temperature", "/ params.temperature", "* params.temperature"),
    wrong("2.12", "the temperature left out", " / params.temperature", ""),
    wrong_body(
        "2.12",
        "top_p before top_k",
        """
        logits = upcast(logits) / params.temperature
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        if params.top_k > 0:
            logits = keep_top_k(logits, params.top_k)
        if params.min_p > 0:
            logits = keep_min_p(logits, params.min_p)
        return logits.softmax(-1)
        """,
    ),
    wrong_body(
        "2.12",
        "probabilities of dropped tokens set to 0, and the rest not brought to a sum of 1",
        """
        logits = upcast(logits) / params.temperature
        kept = logits
        if params.top_k > 0:
            kept = keep_top_k(kept, params.top_k)
        if params.top_p < 1:
            kept = keep_top_p(kept, params.top_p)
        if params.min_p > 0:
            kept = keep_min_p(kept, params.min_p)
        return logits.softmax(-1) * (kept > -math.inf)
        """,
    ),
    wrong_body(
        "2.12",
        "min_p before top_p",
        """
        logits = upcast(logits) / params.temperature
        if params.top_k > 0:
            logits = keep_top_k(logits, params.top_k)
        if params.min_p > 0:
            logits = keep_min_p(logits, params.min_p)
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        return logits.softmax(-1)
        """,
    ),
    wrong("2.12", "min_p left out where top_p is set", "    if params.min_p > 0:", "    elif params.min_p > 0:"),
    wrong(
        "2.12",
        "top_p left out where top_k is set",
        "    if params.top_p < 1:",
        "    elif params.top_p < 1:",
    ),
    wrong("2.12", "16-bit logits left in 16 bits", "upcast(logits) /", "logits /"),
    right(
        "2.12",
        "with the unset filters made harmless",
        """
        scores = logits.to(torch.float32) * (1 / params.temperature)
        scores = keep_top_k(scores, params.top_k or scores.numel())
        if params.top_p != 1:
            scores = keep_top_p(scores, params.top_p)
        scores = keep_min_p(scores, params.min_p)
        exponentials = (scores - scores.max()).exp()
        return exponentials / exponentials.sum()
        """,
    ),
    # -------------------------------------------------------------------------------------------------- 2.13 sample
    wrong(
        "2.13",
        "torch's global generator, whose state depends on all that was drawn before",
        ", generator=draw_generator(params.seed, index)",
        "",
    ),
    wrong(
        "2.13",
        "torch's global generator seeded, under the hands of everybody who draws from it",
        "return int(torch.multinomial(probabilities, 1, generator=draw_generator(params.seed, index)))",
        "torch.manual_seed(stable_hash(params.seed, index))\n    return int(torch.multinomial(probabilities, 1))",
    ),
    wrong("2.13", "the index left out: every token is drawn alike", "(params.seed, index)", "(params.seed, 0)"),
    wrong("2.13", "the seed left out", "(params.seed, index)", "(0, index)"),
    wrong(
        "2.13",
        "seed and index added: seed 2 repeats seed 1, one place later",
        "draw_generator(params.seed, index)",
        "torch.Generator().manual_seed((params.seed or 0) + index)",
    ),
    wrong(
        "2.13",
        "seed and index combined by bits: seed 2 draws what seed 1 draws, at other places",
        "draw_generator(params.seed, index)",
        "draw_generator(None if params.seed is None else params.seed ^ index, 0)",
    ),
    wrong(
        "2.13",
        "1000 times the seed, and the index: token 1000 of seed 1 is drawn as token 0 of seed 2",
        "draw_generator(params.seed, index)",
        "draw_generator(None if params.seed is None else params.seed * 1000 + index, 0)",
    ),
    wrong("2.13", "seed 0 taken for none", "draw_generator(params.seed,", "draw_generator(params.seed or None,", False),
    wrong("2.13", "a low temperature taken for 0", "params.temperature == 0", "params.temperature <= 0.1"),
    wrong("2.13", "the likeliest token at every temperature", "if params.temperature == 0:", "if True:"),
    wrong(
        "2.13",
        "the model's own probabilities: temperature and filters left out",
        "sampling_probs(logits, params)",
        "upcast(logits).softmax(-1)",
    ),
    right(
        "2.13",
        "one uniform number, looked up in the cumulated probabilities",
        """
        if not params.temperature:
            return logits.topk(1).indices.item()
        cumulated = sampling_probs(logits, params).double().cumsum(-1)
        u = torch.rand(1, generator=draw_generator(params.seed, index), dtype=torch.float64) * cumulated[-1]
        return torch.searchsorted(cumulated, u, right=True).item()
        """,
    ),
    # ----------------------------------------------------------------------------------------- 2.14 TextStream.push
    wrong_body(
        "2.14",
        "each token decoded by itself",
        'return self.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")',
    ),
    wrong("2.14", "a character U+FEFF taken for a byte order mark", '"utf-8"', '"utf-8-sig"'),
    wrong("2.14", "invalid bytes dropped in silence", 'errors="replace"', 'errors="ignore"'),
    wrong_body(
        "2.14",
        "text held back for ever after a byte that can never become a character",
        """
        self.held += self.tokenizer.token_bytes(token_id)
        try:
            text = self.held.decode()
        except UnicodeDecodeError:
            return ""
        self.held = b""
        return text
        """,
    ),
    wrong_body(
        "2.14",
        "what was shown not taken out of what is held: it comes again with every token",
        """
        self.held += self.tokenizer.token_bytes(token_id)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(self.held)
        """,
    ),
    wrong_body(
        "2.14",
        "the bytes of an unfinished character thrown away",
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return decoder.decode(self.held + self.tokenizer.token_bytes(token_id))
        """,
    ),
    right(
        "2.14",
        "with decode errors that say where and why",
        """
        data = self.held + self.tokenizer.token_bytes(token_id)
        whole = len(data)
        for start in range(max(0, len(data) - 3), len(data)):
            try:
                data[start:].decode()
            except UnicodeDecodeError as error:
                if error.start == 0 and error.reason == "unexpected end of data":
                    whole = start
                    break
        self.held = data[whole:]
        return data[:whole].decode(errors="replace")
        """,
    ),
    # ---------------------------------------------------------------------------------------- 2.15 StopChecker.push
    wrong_body(
        "2.15",
        "each piece looked at by itself",
        """
        starts = [(text.find(stop), stop) for stop in self.stop if stop in text]
        if starts:
            start, self.found = min(starts)
            return text[:start]
        return text
        """,
    ),
    wrong(
        "2.15",
        "the stop string shown too",
        "return text[:start]",
        "return text[: start + len(self.found)]",
    ),
    wrong(
        "2.15",
        "text held back without need: the last letters always, whether a stop string could begin there or not",
        "max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)",
        "min(len(text), max(map(len, self.stop), default=1) - 1)",
    ),
    wrong("2.15", "the stop string that begins last in the text", "min(starts)", "max(starts)"),
    wrong("2.15", "the first stop string of the list, not the first in the text", "min(starts)", "starts[0]"),
    wrong("2.15", "the last place of a stop string that comes twice", "text.find(stop)", "text.rfind(stop)"),
    wrong("2.15", "one letter held back at most", "range(len(stop))", "range(2)"),
    wrong(
        "2.15",
        "what is held back shown as well: it comes twice",
        "return text[: len(text) - held]",
        "return text",
    ),
    wrong("2.15", "only the first stop string's beginnings held back", "self.stop for n", "self.stop[:1] for n"),
    wrong(
        "2.15",
        "what was held back lost when it turns out to be no stop string",
        "        text = self.held + text\n",
        "        so_far, text = text, self.held + text\n"
        "        if not any(stop in text or stop.startswith(text) for stop in self.stop):\n"
        "            text = so_far\n",
    ),
    right(
        "2.15",
        "letter by letter",
        """
        shown = ""
        for letter in text:
            self.held += letter
            for stop in self.stop:
                if self.held.endswith(stop) and self.found is None:
                    self.found, shown, self.held = stop, shown + self.held[: -len(stop)], ""
            if self.found:
                return shown
            while self.held and not any(stop.startswith(self.held) for stop in self.stop):
                shown, self.held = shown + self.held[0], self.held[1:]
        return shown
        """,
    ),
    # ------------------------------------------------------------------------------------------------ 2.13 generate
    wrong("2.17", "the text of a stop token shown", "if token_id not in stop_ids:", "if True:"),
    wrong("2.17", "one token more than max_tokens", "== room", "== room + 1"),
    wrong("2.17", "one token less than max_tokens", "== room", ">= max(1, room - 1)"),
    wrong(
        "2.17",
        "the length looked at before the stop",
        'if token_id in stop_ids or checker.found:\n            output.finish_reason = "stop"\n'
        '        elif len(output.token_ids) == room:\n            output.finish_reason = "length"',
        'if len(output.token_ids) == room:\n            output.finish_reason = "length"\n'
        '        elif token_id in stop_ids or checker.found:\n            output.finish_reason = "stop"',
    ),
    wrong(
        "2.17",
        "stop strings searched from the last of the first min_tokens tokens on",
        "len(output.token_ids) <= params.min_tokens",
        "len(output.token_ids) < params.min_tokens",
    ),
    wrong(
        "2.17",
        "the length looked at before a stop string, though after a stop token",
        "if token_id in stop_ids or checker.found:",
        "if token_id in stop_ids or (checker.found and len(output.token_ids) < room):",
    ),
    wrong(
        "2.17",
        "the prompt's tokens counted by the penalties and min_tokens as output",
        "adjust_logits(logits, params, prompt_token_ids, output.token_ids, stop_ids)",
        "adjust_logits(logits, params, [], [*prompt_token_ids, *output.token_ids], stop_ids)",
    ),
    wrong(
        "2.17",
        "at temperature 0 the model's likeliest token, whatever is forbidden",
        "sample(adjusted, params, index=len(output.token_ids))",
        "sample(adjusted if params.temperature else logits, params, index=len(output.token_ids))",
    ),
    wrong("2.17", "penalties and min_tokens left out", "sample(adjusted,", "sample(logits,"),
    wrong("2.17", "every token drawn with index 0", "index=len(output.token_ids)", "index=0"),
    wrong(
        "2.17",
        "an index that counts the prompt's tokens too",
        "index=len(output.token_ids)",
        "index=len(prompt_token_ids) + len(output.token_ids)",
    ),
    wrong(
        "2.17",
        "the last token alone handed to next_logits",
        "[*prompt_token_ids, *output.token_ids])\n",
        "[*prompt_token_ids, *output.token_ids][-1:])\n",
    ),
    wrong("2.17", "what was still held when it ended never shown", "if not checker.found:", "if False:"),
    wrong("2.17", "text after a stop string shown", "if not checker.found:", "if True:"),
    wrong("2.17", "half a character held at the end lost", "show(checker.push(stream.flush()))", "pass"),
    wrong(
        "2.17",
        "each token decoded by itself, without TextStream",
        "stream.push(token_id)",
        'tokenizer.token_bytes(token_id).decode(errors="replace")',
    ),
    wrong(
        "2.17",
        "text not passed through StopChecker",
        "show(text if len(output.token_ids) <= params.min_tokens else checker.push(text))",
        "show(text)",
    ),
    wrong(
        "2.17",
        "a stop string that ends the text before min_tokens",
        "show(text if len(output.token_ids) <= params.min_tokens else checker.push(text))",
        "show(checker.push(text))",
    ),
    wrong(
        "2.17",
        "stop strings that wait one token too long: the token after the first min_tokens may end the text",
        "len(output.token_ids) <= params.min_tokens",
        "len(output.token_ids) <= params.min_tokens + (params.min_tokens > 0)",
        recognised=False,
    ),
    wrong(
        "2.17",
        "logprobs=0 treated as None, although it asks for the chosen token's log-probability",
        "if params.logprobs is not None:",
        "if params.logprobs:",
    ),
    wrong(
        "2.17",
        "logprobs of the adjusted logits, instead of the model's own",
        "top_logprobs(logits, token_id",
        "top_logprobs(adjusted, token_id",
    ),
    right(
        "2.17",
        "a for loop that is left early",
        """
        sequence = list(prompt_token_ids)
        for index in range(room):
            logits = next_logits(list(sequence))
            chosen = sample(adjust_logits(logits, params, prompt_token_ids, output.token_ids, stop_ids), params, index)
            sequence.append(chosen)
            output.token_ids = sequence[len(prompt_token_ids) :]
            if params.logprobs is not None:
                output.logprobs.append(top_logprobs(logits, chosen, params.logprobs))
            if chosen in stop_ids:
                output.finish_reason = "stop"
                break
            text = stream.push(chosen)
            if index >= params.min_tokens:
                text = checker.push(text)
            show(text)
            if checker.found is not None:
                output.finish_reason = "stop"
                return output
        else:
            output.finish_reason = "length"
        for rest in (checker.push(stream.flush()), checker.flush()):
            show(rest)
        return output
        """,
    ),
    # ---------------------------------------------------------------------------------------- 2.5 Llama.run_layers
    wrong(
        "2.5",
        "positions counted from 0, whatever was handed in",
        "self.rotary(positions)",
        "self.rotary(torch.arange(len(positions)))",
    ),
    wrong("2.5", "layers from 0 on, wherever they should begin", "in layers:", "in range(layers.stop):"),
    wrong("2.5", "all layers, whichever were asked for", "in layers:", "in range(len(self.model.layers)):"),
    wrong("2.5", "so many layers as were asked for, but counted from 0", "in layers:", "in range(len(layers)):"),
    wrong_body(
        "2.5",
        "every layer given the first one's input",
        """
        cos, sin = rotary_tables(positions, self.frequencies)
        out = hidden
        for layer in layers:
            out = self.model.layers[layer](hidden, cos, sin, attend)
        return out
        """,
    ),
    wrong("2.5", "the final norm applied here already", "return hidden", "return self.model.norm(hidden)"),
    wrong(
        "2.5",
        "unscaled frequencies, instead of the model's own",
        "self.rotary(positions)",
        "rotary_tables(positions, rotary_frequencies(self.config.head_dim, self.config.rope_theta))",
    ),
    wrong(
        "2.5",
        "the tables made anew for each layer",
        "hidden = self.model",
        "cos, sin = self.rotary(positions)\n            hidden = self.model",
    ),
    wrong("2.5", "sine and cosine swapped", "cos, sin = self", "sin, cos = self"),
    wrong(
        "2.5",
        "tables without the factor that some scalings multiply them by",
        "self.rotary(positions)",
        "rotary_tables(positions, self.frequencies.to(positions.device))",
    ),
    wrong(
        "2.5",
        "positions counted from the first token's",
        "self.rotary(positions)",
        "self.rotary(positions - positions[0])",
    ),
    right(
        "2.5",
        "over the modules themselves",
        """
        tables = self.rotary(positions)
        for number, each in enumerate(self.model.layers):
            if number in layers:
                hidden = each(hidden, *tables, attend)
        return hidden
        """,
    ),
    # -------------------------------------------------------------------------------------------- 2.6 Llama.logits
    wrong("2.6", "the final norm left out", "self.model.norm(hidden)", "hidden"),
    wrong(
        "2.6",
        "the embedding table for a head, though the two are not tied",
        "self.lm_head(self.model.norm(hidden))",
        "self.model.norm(hidden) @ self.model.embed_tokens.weight.T",
    ),
    wrong("2.6", "the final norm applied twice", "self.model.norm(hidden)", "self.model.norm(self.model.norm(hidden))"),
    wrong(
        "2.6",
        "log-probabilities returned, instead of logits",
        "self.lm_head(self.model.norm(hidden))",
        "self.lm_head(self.model.norm(hidden)).log_softmax(-1)",
    ),
    wrong(
        "2.6",
        "the norm without its weight",
        "self.model.norm(hidden)",
        "F.rms_norm(hidden, hidden.shape[-1:], eps=self.config.rms_norm_eps)",
    ),
    wrong("2.6", "only the last row", "self.model.norm(hidden)", "self.model.norm(hidden[-1:])"),
    right(
        "2.6",
        "by lesson 1's function and a product",
        """
        normed = rms_norm(hidden, self.model.norm.weight, self.config.rms_norm_eps)
        return normed @ self.lm_head.weight.T
        """,
    ),
    # --------------------------------------------------------------------------------------------- 2.16 recompute
    wrong("2.16", "the first token's logits, instead of the last one's", "hidden[-1:]", "hidden[:1]"),
    wrong(
        "2.16",
        "logits computed for all tokens, though only the last one's are used",
        "model.logits(hidden[-1:])[0]",
        "model.logits(hidden)[-1]",
    ),
    wrong(
        "2.16",
        "positions counted from 1",
        "torch.arange(len(token_ids), device",
        "torch.arange(1, len(token_ids) + 1, device",
    ),
    wrong(
        "2.16",
        "the last token alone computed",
        "token_ids = torch.tensor(token_ids,",
        "token_ids = torch.tensor(token_ids[-1:],",
    ),
    right(
        "2.16",
        "a batch axis of one taken off at the end",
        """
        ids = torch.as_tensor(list(token_ids)).to(next(model.parameters()).device)
        positions = torch.ones_like(ids).cumsum(0) - 1
        rows = model.run_layers(model.embed(ids), positions, causal_attend, range(model.config.num_hidden_layers))
        return model.logits(rows[len(rows) - 1].unsqueeze(0)).squeeze(0)
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "2.4",
        "two axes: -1 is 1",
        "proj(hidden).unflatten(-1, (-1, self.head_dim)) -> proj(hidden).unflatten(1, (-1, self.head_dim))",
    ),
    equivalent(
        "2.8",
        "the order in which the error names several tensors is left open",
        "sorted(wanted.keys() - present) -> wanted.keys() - present",
        "sorted(present - wanted.keys()) -> present - wanted.keys()",
        "sorted(wanted.items()) -> wanted.items()",
    ),
    equivalent("2.9", "one axis: -1 is 0", "logits.shape[-1] -> logits.shape[-0]"),
    equivalent(
        "2.10",
        "one axis: -1 is 0",
        "upcast(ordered).softmax(-1) -> upcast(ordered).softmax(-0)",
        "probabilities.cumsum(-1) -> probabilities.cumsum(-0)",
        "torch.empty_like(logits).scatter(-1, token_ids, ordered.masked_fill(before >= p, -math.inf)) "
        "-> torch.empty_like(logits).scatter(-0, token_ids, ordered.masked_fill(before >= p, -math.inf))",
    ),
    equivalent(
        "2.10",
        "`sampling_probs` hands over float32 or wider, which `upcast` leaves as it is",
        "upcast(ordered) -> ordered",
    ),
    equivalent(
        "2.10", "`scatter` gives a new tensor and fills every place of it", "torch.empty_like(logits) -> logits"
    ),
    equivalent(
        "2.11",
        "`sampling_probs` hands over float32 or wider, which `upcast` leaves as it is",
        "upcast(logits) -> logits",
    ),
    equivalent("2.11", "one axis: -1 is 0", "upcast(logits).softmax(-1) -> upcast(logits).softmax(-0)"),
    equivalent(
        "2.13",
        "the probabilities are on the CPU already, unless there is a GPU",
        "sampling_probs(logits, params).cpu() -> sampling_probs(logits, params)",
    ),
    equivalent(
        "2.14",
        "Python takes `utf-8_` for another spelling of utf-8",
        "codecs.getincrementaldecoder('utf-8') -> codecs.getincrementaldecoder('utf-8_')",
    ),
    equivalent(
        "2.15",
        "without stop strings nothing is held, and a slice may end behind its text",
        "max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0) "
        "-> max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=-1)",
    ),
    equivalent(
        "2.12",
        "a min_p of 0 asks for probabilities of at least 0, which all are",
        "if params.min_p > 0: -> if True:",
        "params.min_p > 0 -> params.min_p >= 0",
        "params.min_p > 0 -> params.min_p > -1",
    ),
    equivalent("2.12", "one axis: -1 is 0", "logits.softmax(-1) -> logits.softmax(-0)"),
    equivalent(
        "2.16", "one row: its first is its last", "model.logits(hidden[-1:])[0] -> model.logits(hidden[-1:])[-1]"
    ),
]
