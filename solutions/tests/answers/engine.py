"""Lesson 8, the assembly: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import right, wrong, wrong_body

ANSWERS = [
    # ----------------------------------------------------------------------------- 8.10 InferenceEngine.cache_share
    wrong_body("8.10", "the draft left out", "return share"),
    wrong(
        "8.10",
        "the draft divided among the ranks, and quantized, as the target is",
        "share + cache_bytes(draft, 1, dtype.itemsize) / cache_bytes(config, 1, dtype.itemsize)",
        "share * (1 + cache_bytes(draft, 1, dtype.itemsize) / cache_bytes(config, 1, dtype.itemsize))",
    ),
    wrong(
        "8.10",
        "the target against the draft, upside down",
        "cache_bytes(draft, 1, dtype.itemsize) / cache_bytes(config, 1, dtype.itemsize)",
        "cache_bytes(config, 1, dtype.itemsize) / cache_bytes(draft, 1, dtype.itemsize)",
    ),
    wrong(
        "8.10",
        "layers alone compared, not heads and their size",
        "cache_bytes(draft, 1, dtype.itemsize) / cache_bytes(config, 1, dtype.itemsize)",
        "draft.num_hidden_layers / config.num_hidden_layers",
    ),
    wrong(
        "8.10",
        "heads not counted",
        "cache_bytes(draft, 1, dtype.itemsize) / cache_bytes(config, 1, dtype.itemsize)",
        "draft.num_hidden_layers * draft.head_dim / (config.num_hidden_layers * config.head_dim)",
    ),
    wrong(
        "8.10",
        "a share of one for the target, whatever its rank has of it",
        "share + cache_bytes",
        "1 + cache_bytes",
    ),
    wrong(
        "8.10",
        "the draft in float32, whatever the dtype",
        "cache_bytes(draft, 1, dtype.itemsize)",
        "cache_bytes(draft, 1, 4)",
    ),
    wrong(
        "8.10",
        "the draft against the share of this rank, not against the whole target",
        "/ cache_bytes(config, 1, dtype.itemsize)",
        "/ (share * cache_bytes(config, 1, dtype.itemsize))",
    ),
    wrong("8.10", "the draft's bytes, not their share", " / cache_bytes(config, 1, dtype.itemsize)", ""),
    right(
        "8.10",
        "by the numbers of a token",
        """
        draft = plain_config(Checkpoint(find_checkpoint(self.speculation.draft)))
        own, whole = (each.num_hidden_layers * each.num_key_value_heads * each.head_dim for each in (draft, config))
        return share + own / whole
        """,
    ),
    right(
        "8.10",
        "by the bytes of both",
        """
        checkpoint = Checkpoint(self.speculation.draft)
        whole = cache_bytes(config, 1000, dtype.itemsize)
        return (share * whole + cache_bytes(plain_config(checkpoint), 1000, dtype.itemsize)) / whole
        """,
    ),
    # ------------------------------------------------------------------------------------ 8.9 InferenceEngine.build
    wrong(
        "8.9",
        "draft tokens on every rank",
        "if speculation is None or not is_sampling_rank(model, layers):",
        "if speculation is None:",
    ),
    wrong(
        "8.9",
        "draft tokens where the last layer is, on all ranks of that stage",
        "not is_sampling_rank(model, layers)",
        "layers.stop < model.config.num_hidden_layers",
    ),
    wrong(
        "8.9",
        "draft tokens on the first rank of every stage",
        "not is_sampling_rank(model, layers)",
        "model.lm_head.group.rank != 0",
    ),
    wrong(
        "8.9",
        "the draft's blocks in eight bits as well",
        "blocks_for(draft, PagedKVCache, draft_layers)",
        'blocks_for(draft, Int8KVCache if kv_cache_dtype == "int8" else PagedKVCache, draft_layers)',
    ),
    wrong(
        "8.9",
        "no blocks of its own for the draft: it writes to the target's",
        "blocks_for(draft, PagedKVCache, draft_layers)",
        "cache",
    ),
    wrong(
        "8.9",
        "blocks in eight bits never made",
        'Int8KVCache if kv_cache_dtype == "int8" else PagedKVCache, layers)',
        "PagedKVCache, layers)",
    ),
    wrong(
        "8.9",
        "blocks in eight bits only where nothing is proposed",
        'if kv_cache_dtype == "int8" else PagedKVCache',
        'if kv_cache_dtype == "int8" and speculation is None else PagedKVCache',
    ),
    wrong("8.9", "n-grams, though a draft is named", "speculation.draft is not None", "False"),
    wrong_body(
        "8.9",
        "the draft loaded on every rank, whatever proposes",
        """
        cache = blocks_for(model, Int8KVCache if kv_cache_dtype == "int8" else PagedKVCache, layers)
        proposer = NgramProposer()
        if speculation is not None and speculation.draft is not None:
            draft, draft_layers = load_draft(speculation.draft, model)
            proposer = DraftProposer(draft, blocks_for(draft, PagedKVCache, draft_layers))
        if speculation is None or not is_sampling_rank(model, layers):
            return ModelRunner(model, cache)
        adaptive = AdaptiveSpeculation(speculation.num_speculative_tokens, speculation.is_adaptive)
        return SpeculativeRunner(model, cache, proposer, adaptive)
        """,
        recognised=False,
    ),
    wrong("8.9", "the target's layers for the draft's blocks", "PagedKVCache, draft_layers", "PagedKVCache, layers"),
    wrong("8.9", "the draft's blocks of the target's size", "blocks_for(draft,", "blocks_for(model,"),
    wrong(
        "8.9",
        "blocks for all layers, on every stage",
        "else PagedKVCache, layers)",
        "else PagedKVCache, range(model.config.num_hidden_layers))",
    ),
    wrong(
        "8.9",
        "always adaptive",
        "AdaptiveSpeculation(speculation.num_speculative_tokens, speculation.is_adaptive)",
        "AdaptiveSpeculation(speculation.num_speculative_tokens)",
    ),
    wrong(
        "8.9",
        "five draft tokens at most, whatever is asked",
        "AdaptiveSpeculation(speculation.num_speculative_tokens, speculation.is_adaptive)",
        "AdaptiveSpeculation(5, speculation.is_adaptive)",
    ),
    right(
        "8.9",
        "the plain runner first, and whatever proposes last",
        """
        quantized = kv_cache_dtype == "int8"
        cache = blocks_for(model, Int8KVCache, layers) if quantized else blocks_for(model, PagedKVCache, layers)
        runner = ModelRunner(model, cache)
        if speculation and is_sampling_rank(model, layers):
            if speculation.draft is None:
                proposer = NgramProposer()
            else:
                draft, own_layers = load_draft(speculation.draft, target=model)
                proposer = DraftProposer(draft, blocks_for(draft, PagedKVCache, own_layers))
            adaptive = AdaptiveSpeculation(speculation.num_speculative_tokens, is_adaptive=speculation.is_adaptive)
            runner = SpeculativeRunner(model, cache, proposer, adaptive)
        return runner
        """,
    ),
    right(
        "8.9",
        "lesson 7's runner, and its blocks",
        """
        plain = make_quantized_runner(config, kv_cache_dtype, model, layers)
        if speculation is None or not is_sampling_rank(model, layers):
            return plain
        proposing = NgramProposer()
        if speculation.draft:
            draft = load_draft(speculation.draft, model)[0]
            blocks = PagedKVCache(draft, config.num_blocks, config.block_size, config.num_host_blocks or 0)
            proposing = DraftProposer(draft, blocks)
        return SpeculativeRunner(
            model, plain.cache, proposing, AdaptiveSpeculation(speculation.num_speculative_tokens, speculation.is_adaptive)
        )
        """,
        top="from solutions.quantization import make_quantized_runner",
    ),
    # ------------------------------------------------------------------------------------ 8.12 InferenceEngine.chat
    wrong(
        "8.12",
        "special tokens added to those that the template has written",
        "add_special_tokens=False",
        "add_special_tokens=True",
    ),
    wrong(
        "8.12",
        "the template not applied: what was said, line by line",
        "self.tokenizer.apply_chat_template(messages)",
        '"\\n".join(turn["content"] for turn in messages)',
    ),
    wrong(
        "8.12",
        "only the last turn asked",
        "self.tokenizer.apply_chat_template(messages)",
        "self.tokenizer.apply_chat_template(messages[-1:])",
    ),
    wrong(
        "8.12",
        "no opening of the assistant's turn",
        "self.tokenizer.apply_chat_template(messages)",
        "self.tokenizer.apply_chat_template(messages, add_generation_prompt=False)",
    ),
    wrong(
        "8.12",
        "its own parameters instead of those that were given",
        ", params, progress",
        ", SamplingParams(max_tokens=2), progress",
    ),
    wrong(
        "8.12",
        "all outputs, where there is one",
        "progress=False)[0]",
        "progress=False)",
    ),
    wrong("8.12", "a progress bar for one answer", ", progress=False)", ")"),
    wrong_body(
        "8.12",
        "the answer appended to the messages that were given",
        """
        text = self.tokenizer.apply_chat_template(messages)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        output = self.generate([token_ids], params, progress=False)[0]
        messages.append({"role": "assistant", "content": output.text})
        return output
        """,
    ),
    right(
        "8.12",
        "in steps",
        """
        prompt = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
        token_ids = self.tokenizer.encode(prompt, False)
        (output,) = self.generate([token_ids], params or SamplingParams(), progress=False)
        return output
        """,
    ),
    right(
        "8.12",
        "one request, step by step",
        """
        text = self.tokenizer.apply_chat_template(messages)
        request_id = self.add_request(self.tokenizer.encode(text, add_special_tokens=False), params)
        output = self.output(request_id)
        while output.finish_reason is None:
            self.step()
        return output
        """,
    ),
]
