"""Lesson 8, the assembly: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import equivalent, right, wrong, wrong_body

ANSWERS = [
    # --------------------------------------------------------------------------------------------- 8.10 slot_bytes
    wrong(
        "8.10",
        "the draft left out",
        "round(target) + (0 if draft_config is None else cache_bytes(draft_config, 1, size))",
        "round(target)",
    ),
    wrong_body(
        "8.10",
        "the draft divided among the ranks and in eight bits, like the target",
        """
        size, head_dim = config.dtype.itemsize, model_config.head_dim
        total = cache_bytes(model_config, 1, size)
        if draft_config is not None:
            total += cache_bytes(draft_config, 1, size)
        total *= share
        if config.kv_cache_dtype == "int8":
            total *= (head_dim + size) / (head_dim * size)
        return round(total)
        """,
    ),
    wrong(
        "8.10",
        "the whole target on every rank",
        "cache_bytes(model_config, 1, size) * share",
        "cache_bytes(model_config, 1, size)",
    ),
    wrong(
        "8.10",
        "the draft in float32, whatever the dtype",
        "cache_bytes(draft_config, 1, size)",
        "cache_bytes(draft_config, 1, 4)",
    ),
    wrong(
        "8.10",
        "everything in float32, whatever the dtype",
        "config.dtype.itemsize, model_config.head_dim",
        "4, model_config.head_dim",
    ),
    wrong(
        "8.10",
        "one scale for each token, not for each head",
        "(head_dim + size) / (head_dim * size)",
        "(head_dim + size / model_config.num_key_value_heads) / (head_dim * size)",
    ),
    wrong("8.10", "the scales left out", "(head_dim + size) / (head_dim * size)", "1 / size"),
    wrong("8.10", "scales in float32, whatever the dtype", "(head_dim + size) /", "(head_dim + 4) /"),
    wrong("8.10", "kv_cache_dtype ignored", 'config.kv_cache_dtype == "int8"', "False"),
    wrong(
        "8.10",
        "eight bits although only the weights are quantized",
        'config.kv_cache_dtype == "int8"',
        'config.kv_cache_dtype == "int8" or config.quantization',
    ),
    wrong(
        "8.10",
        "the stages ignored in the share",
        "cache_bytes(model_config, 1, size) * share",
        "cache_bytes(model_config, 1, size) / config.tensor_parallel",
    ),
    right(
        "8.10",
        "by the numbers of a token",
        """
        def numbers(model):
            return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim

        size = config.dtype.itemsize
        total = numbers(model_config) * share * size
        if config.kv_cache_dtype == "int8":
            total = numbers(model_config) * share * (1 + size / model_config.head_dim)
        return round(total + (numbers(draft_config) * size if draft_config else 0))
        """,
    ),
    right(
        "8.10",
        "heads, each of some bytes",
        """
        size = config.dtype.itemsize
        per_head = model_config.head_dim * size if config.kv_cache_dtype == "auto" else model_config.head_dim + size
        heads = 2 * model_config.num_hidden_layers * model_config.num_key_value_heads * share
        return round(heads * per_head) + (cache_bytes(draft_config, 1, size) if draft_config is not None else 0)
        """,
    ),
    # ------------------------------------------------------------------------------------------- 8.11 build_runner
    wrong(
        "8.11",
        "draft tokens on every rank",
        "if config.speculative is None or not is_sampling_rank(model, layers):",
        "if config.speculative is None:",
    ),
    wrong(
        "8.11",
        "draft tokens on all ranks of the last stage",
        "not is_sampling_rank(model, layers)",
        "layers.stop < model.config.num_hidden_layers",
    ),
    wrong(
        "8.11",
        "draft tokens on the first rank of every stage",
        "not is_sampling_rank(model, layers)",
        "model.lm_head.group.rank != 0",
    ),
    wrong(
        "8.11",
        "the draft's cache in eight bits as well",
        "make_cache(config, draft, draft_layers)",
        "make_cache(config, draft, draft_layers, config.kv_cache_dtype)",
    ),
    wrong(
        "8.11",
        "the target's cache used for the draft",
        "make_cache(config, draft, draft_layers)",
        "cache",
    ),
    wrong(
        "8.11",
        "kv_cache_dtype ignored",
        "make_cache(config, model, layers, config.kv_cache_dtype)",
        "make_cache(config, model, layers)",
    ),
    wrong(
        "8.11",
        "eight bits although only the weights are quantized",
        "make_cache(config, model, layers, config.kv_cache_dtype)",
        'make_cache(config, model, layers, "int8" if config.quantization else config.kv_cache_dtype)',
    ),
    wrong("8.11", "n-grams although a draft model is named", "config.draft is not None", "False"),
    wrong_body(
        "8.11",
        "the draft loaded on every rank, even where it does not propose",
        """
        cache = make_cache(config, model, layers, config.kv_cache_dtype)
        proposer = NgramProposer()
        if config.draft is not None:
            options = dict(dtype=config.dtype, device=config.device, max_model_len=config.max_model_len)
            draft, draft_layers, _ = load_model(EngineConfig(model=config.draft, **options))
            proposer = DraftProposer(draft, make_cache(config, draft, draft_layers))
        if config.speculative is None or not is_sampling_rank(model, layers):
            return ModelRunner(model, cache)
        adaptive = AdaptiveSpeculation(config.num_speculative_tokens or 8, config.adaptive_speculation)
        return SpeculativeRunner(model, cache, proposer, adaptive)
        """,
        recognised=False,
    ),
    wrong(
        "8.11",
        "the draft quantized like the target",
        "EngineConfig(model=config.draft, **same)",
        "replace(config, model=config.draft)",
    ),
    wrong(
        "8.11",
        "the draft in the default dtype, not in the target's",
        "EngineConfig(model=config.draft, **same)",
        'EngineConfig(model=config.draft, **{**same, "dtype": torch.float32})',
        recognised=False,
    ),
    wrong(
        "8.11",
        "the draft on the default device, not on the target's",
        '("dtype", "device", "max_model_len")',
        '("dtype", "max_model_len")',
    ),
    wrong(
        "8.11",
        "the draft without the target's max_model_len",
        '("dtype", "device", "max_model_len")',
        '("dtype", "device")',
    ),
    wrong(
        "8.11",
        "a cache for the draft with the target's layers",
        "make_cache(config, draft, draft_layers)",
        "make_cache(config, draft, layers)",
    ),
    wrong(
        "8.11",
        "a cache for the draft made from the target's model",
        "make_cache(config, draft, draft_layers)",
        "make_cache(config, model, layers)",
    ),
    wrong(
        "8.11",
        "a cache for all layers, on every stage",
        "make_cache(config, model, layers, config",
        "make_cache(config, model, range(model.config.num_hidden_layers), config",
    ),
    wrong(
        "8.11",
        "adaptive_speculation ignored",
        "AdaptiveSpeculation(config.num_speculative_tokens or 8, config.adaptive_speculation)",
        "AdaptiveSpeculation(config.num_speculative_tokens or 8)",
    ),
    wrong("8.11", "num_speculative_tokens ignored: always eight", "config.num_speculative_tokens or 8", "8"),
    wrong(
        "8.11",
        "None passed on where num_speculative_tokens is None",
        "config.num_speculative_tokens or 8",
        "config.num_speculative_tokens",
        recognised=False,
    ),
    right(
        "8.11",
        "the plain runner first, the proposer last",
        """
        cache = make_cache(config, model, layers, kv_cache_dtype=config.kv_cache_dtype)
        runner = ModelRunner(model, cache)
        if config.speculative and is_sampling_rank(model, layers):
            if config.draft is None:
                proposer = NgramProposer()
            else:
                options = EngineConfig(model=config.draft, device=config.device, dtype=config.dtype)
                draft, own_layers, _ = load_model(replace(options, max_model_len=config.max_model_len))
                proposer = DraftProposer(draft, make_cache(config, draft, own_layers))
            most = 8 if config.num_speculative_tokens is None else config.num_speculative_tokens
            runner = SpeculativeRunner(model, cache, proposer, AdaptiveSpeculation(most, config.adaptive_speculation))
        return runner
        """,
    ),
    right(
        "8.11",
        "the draft as lesson 2 loads it",
        """
        plain = ModelRunner(model, make_cache(config, model, layers, config.kv_cache_dtype))
        if config.speculative is None or not is_sampling_rank(model, layers):
            return plain
        proposer = NgramProposer()
        if config.speculative != "ngram":
            draft, _, _ = load_model(replace(config, model=config.draft, quantization=None, offload=None))
            blocks = PagedKVCache(draft, config.num_blocks, config.block_size, config.num_host_blocks or 0)
            proposer = DraftProposer(draft, blocks)
        adaptive = AdaptiveSpeculation(config.num_speculative_tokens or 8, config.adaptive_speculation)
        return SpeculativeRunner(model, plain.cache, proposer, adaptive)
        """,
    ),
    # ------------------------------------------------------------------------------------ 8.12 InferenceEngine.chat
    wrong(
        "8.12",
        "special tokens added a second time",
        "add_special_tokens=False",
        "add_special_tokens=True",
    ),
    wrong(
        "8.12",
        "the template not applied: only the contents, line by line",
        "self.tokenizer.apply_chat_template(messages, **values)",
        '"\\n".join(turn["content"] for turn in messages)',
    ),
    wrong(
        "8.12",
        "only the last turn used",
        "self.tokenizer.apply_chat_template(messages, **values)",
        "self.tokenizer.apply_chat_template(messages[-1:], **values)",
    ),
    wrong(
        "8.12",
        "no beginning of the assistant's turn",
        "self.tokenizer.apply_chat_template(messages, **values)",
        "self.tokenizer.apply_chat_template(messages, add_generation_prompt=False, **values)",
    ),
    wrong(
        "8.12",
        "the given params ignored",
        ", params, progress",
        ", SamplingParams(max_tokens=2), progress",
    ),
    wrong(
        "8.12",
        "other parameters than the default ones where none are given",
        ", params, progress",
        ", params or SamplingParams(max_tokens=256), progress",
    ),
    wrong(
        "8.12",
        "the list of outputs returned, not the first",
        "progress=False)[0]",
        "progress=False)",
    ),
    wrong("8.12", "chat_template_kwargs left out", "(messages, **values)", "(messages)"),
    wrong("8.12", "a progress bar for one answer", ", progress=False)", ")"),
    wrong_body(
        "8.12",
        "the answer appended to the given messages",
        """
        text = self.tokenizer.apply_chat_template(messages, **values)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        output = self.generate([token_ids], params, progress=False)[0]
        messages.append({"role": "assistant", "content": output.text})
        return output
        """,
    ),
    wrong(
        "8.12",
        "the newline after the beginning of the assistant's turn removed",
        "self.tokenizer.encode(text, add",
        "self.tokenizer.encode(text.strip(), add",
    ),
    right(
        "8.12",
        "in steps",
        """
        prompt = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **values)
        token_ids = self.tokenizer.encode(prompt, False)
        (output,) = self.generate([token_ids], params or SamplingParams(), progress=False)
        return output
        """,
    ),
    right(
        "8.12",
        "one request, step by step",
        """
        text = self.tokenizer.apply_chat_template(messages, **values)
        request_id = self.add_request(self.tokenizer.encode(text, add_special_tokens=False), params)
        output = self.output(request_id)
        while output.finish_reason is None:
            self.step()
        return output
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "8.12",
        "there is one output",
        "self.generate([self.tokenizer.encode(text, add_special_tokens=False)], params, progress=False)[0] -> "
        "self.generate([self.tokenizer.encode(text, add_special_tokens=False)], params, progress=False)[-1]",
    )
]
