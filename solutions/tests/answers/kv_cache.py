"""Lesson 3: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import equivalent, planted, right, wrong, wrong_body

ANSWERS = [
    # -------------------------------------------------------------------------------------------- 3.1 offset_mask
    wrong("3.1", "`<` instead of `<=`: no token sees itself", "<= positions", "< positions"),
    wrong("3.1", "the comparison the other way round", "<= positions", ">= positions"),
    wrong_body(
        "3.1",
        "lesson 1's causal mask, which takes the queries for the last tokens",
        """
        num_queries = len(positions)
        return torch.arange(num_keys) <= torch.arange(num_keys - num_queries, num_keys)[:, None]
        """,
    ),
    wrong_body(
        "3.1",
        "a triangle from the top left, whatever the positions",
        "return torch.ones(len(positions), num_keys).tril().bool()",
    ),
    wrong_body("3.1", "no mask: every query sees every key", "return torch.ones(len(positions), num_keys).bool()"),
    right(
        "3.1",
        "row by row",
        """
        mask = torch.zeros(len(positions), num_keys, dtype=torch.bool, device=positions.device)
        for row, position in zip(mask, positions.tolist()):
            row[: position + 1] = True
        return mask
        """,
    ),
    # -------------------------------------------------------------------------------------------- 3.2 fold_groups
    wrong(
        "3.2",
        "the heads split into (group, K), instead of (K, group)",
        "num_kv_heads, num_heads // num_kv_heads, head_dim)",
        "num_heads // num_kv_heads, num_kv_heads, head_dim).transpose(1, 2)",
    ),
    wrong(
        "3.2",
        "fetched to the CPU",
        "num_heads, head_dim = q.shape",
        "num_heads, head_dim = (q := q.cpu()).shape",
        recognised=False,
    ),
    wrong("3.2", "tokens before heads: row t * group + g", "permute(1, 2, 0, 3)", "permute(1, 0, 2, 3)"),
    wrong_body(
        "3.2",
        "a result in float32, whatever dtype q has",
        """
        num_tokens, num_heads, head_dim = q.shape
        group = num_heads // num_kv_heads
        folded = torch.zeros(num_kv_heads, group * num_tokens, head_dim, device=q.device)
        for head in range(num_heads):
            row = head % group * num_tokens
            folded[head // group, row : row + num_tokens] = q[:, head]
        return folded
        """,
    ),
    wrong_body(
        "3.2",
        "reshaped without moving an axis",
        "return q.reshape(num_kv_heads, -1, q.shape[2])",
    ),
    right(
        "3.2",
        "head by head",
        """
        group = q.shape[1] // num_kv_heads
        return torch.stack([torch.cat([q[:, h * group + g] for g in range(group)]) for h in range(num_kv_heads)])
        """,
    ),
    # ----------------------------------------------------------------------------------------- 3.3 KVCache.append
    wrong("3.3", "the length never moved", "self.lengths[layer] = end", "pass"),
    wrong("3.3", "the keys stored as values too", "= v.transpose(0, 1)", "= k.transpose(0, 1)"),
    wrong("3.3", "all layers' lengths moved", "self.lengths[layer] = end", "self.lengths = [end] * len(self.lengths)"),
    wrong("3.3", "always written to the first slots", "start = self.lengths[layer]", "start = 0"),
    wrong(
        "3.3",
        "the slot counted from num_tokens: that is the last layer's length, not this one's",
        "start = self.lengths[layer]",
        "start = self.num_tokens",
    ),
    wrong("3.3", "the capacity not looked at", "if end > capacity:", "if False:", recognised=False),
    wrong("3.3", "one slot too few allowed", "if end > capacity", "if end >= capacity"),
    wrong(
        "3.3",
        "only the new ones returned",
        "return self.keys[layer, :, :end], self.values[layer, :, :end]",
        "return self.keys[layer, :, start:end], self.values[layer, :, start:end]",
    ),
    wrong(
        "3.3",
        "a copy returned, instead of views",
        "return self.keys[layer, :, :end], self.values[layer, :, :end]",
        "return self.keys[layer, :, :end].clone(), self.values[layer, :, :end].clone()",
    ),
    wrong_body(
        "3.3",
        "as many tokens stored as fit, and then refused",
        """
        start, capacity = self.lengths[layer], self.keys.shape[2]
        for i in range(k.shape[0]):
            if start + i >= capacity:
                raise ValueError("full")
            self.keys[layer, :, start + i] = k[i]
            self.values[layer, :, start + i] = v[i]
            self.lengths[layer] += 1
        end = self.lengths[layer]
        return self.keys[layer, :, :end], self.values[layer, :, :end]
        """,
    ),
    right(
        "3.3",
        "token by token",
        """
        start, (num_tokens, *_) = self.lengths[layer], k.shape
        if start + num_tokens > self.keys.shape[-2]:
            raise ValueError(f"{num_tokens} tokens do not fit behind {start}")
        for i in range(num_tokens):
            self.keys[layer][:, start + i].copy_(k[i])
            self.values[layer][:, start + i].copy_(v[i])
        self.lengths[layer] = start + num_tokens
        return tuple(store[layer][:, : start + num_tokens] for store in (self.keys, self.values))
        """,
    ),
    # ----------------------------------------------------------------------------------------- 3.4 KVCache.attend
    wrong(
        "3.4",
        "the queries' positions counted from 0 (as SDPA's is_causal does)",
        "torch.arange(num_keys - num_tokens, num_keys,",
        "torch.arange(num_tokens,",
    ),
    wrong(
        "3.4",
        "no mask: every query sees every key",
        "offset_mask(positions, num_keys)",
        "torch.ones(num_tokens, num_keys, dtype=torch.bool)",
    ),
    wrong(
        "3.4",
        "the mask's rows repeated one by one, instead of all of them again for each head",
        ".repeat(num_heads // num_kv_heads, 1)",
        ".repeat_interleave(num_heads // num_kv_heads, dim=0)",
    ),
    wrong(
        "3.4",
        "unfolded as (T, H, D) without moving an axis back",
        "mixed.view(num_heads, num_tokens, head_dim).transpose(0, 1)",
        "mixed.reshape(num_tokens, num_heads, head_dim)",
    ),
    wrong_body(
        "3.4",
        "the queries' positions counted from num_tokens: that is the last layer's length, which has not moved yet",
        """
        first = self.num_tokens
        keys, values = self.append(layer, k, v)
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, num_keys, _ = keys.shape
        mask = offset_mask(first + torch.arange(num_tokens), num_keys).repeat(num_heads // num_kv_heads, 1)
        mixed = attention(fold_groups(q, num_kv_heads), keys, values, mask)
        return mixed.view(num_heads, num_tokens, head_dim).transpose(0, 1)
        """,
    ),
    wrong(
        "3.4",
        "the queries' positions counted back from num_tokens: that is the last layer's length, which has not moved yet",
        "torch.arange(num_keys - num_tokens, num_keys,",
        "torch.arange(self.num_tokens - num_tokens, self.num_tokens,",
        recognised=False,
    ),
    wrong("3.4", "always layer 0's memory", "self.append(layer, k, v)", "self.append(0, k, v)"),
    wrong(
        "3.4",
        "each group's heads given to another key/value head (head h to h % K)",
        "fold_groups(q, num_kv_heads)",
        "q.view(num_tokens, -1, num_kv_heads, head_dim).permute(2, 1, 0, 3).reshape(num_kv_heads, -1, head_dim)",
    ),
    right(
        "3.4",
        "keys and values repeated, as in lesson 1",
        """
        keys, values = self.append(layer, k, v)
        group = q.shape[1] // keys.shape[0]
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        first = keys.shape[1] - q.shape[0]
        mask = offset_mask(first + torch.arange(q.shape[0], device=q.device), keys.shape[1])
        return attention(q.transpose(0, 1), keys, values, mask).transpose(0, 1)
        """,
    ),
    # --------------------------------------------------------------------------------------- 3.5 KVCache.truncate
    wrong(
        "3.5",
        "one layer's length alone",
        "self.lengths = [num_tokens] * len(self.lengths)",
        "self.lengths[-1] = num_tokens",
    ),
    wrong("3.5", "num_tokens tokens removed, not kept", "[num_tokens] * len", "[self.num_tokens - num_tokens] * len"),
    wrong("3.5", "a cache made longer than it is", "<= self.num_tokens", "<= self.keys.shape[2]"),
    wrong(
        "3.5",
        "the storage cut away too, so that nothing fits any more",
        "self.lengths = [num_tokens] * len(self.lengths)",
        "self.lengths = [num_tokens] * len(self.lengths)\n"
        "        self.keys, self.values = self.keys[:, :, :num_tokens], self.values[:, :, :num_tokens]",
    ),
    wrong("3.5", "a number below 0 let through", "if not 0 <= num_tokens <=", "if not num_tokens <="),
    right(
        "3.5",
        "in place",
        """
        if num_tokens < 0 or num_tokens > min(self.lengths):
            raise ValueError(f"cannot truncate to {num_tokens}")
        for layer in range(len(self.lengths)):
            self.lengths[layer] = num_tokens
        """,
    ),
    # ------------------------------------------------------------------------------------------------- 3.6 prefill
    wrong(
        "3.6",
        "each chunk's positions counted from 0",
        "torch.arange(cache.num_tokens, cache.num_tokens + len(chunk),",
        "torch.arange(len(chunk),",
    ),
    wrong(
        "3.6",
        "positions counted from the chunk's place in this prompt, without what the cache has",
        "torch.arange(cache.num_tokens, cache.num_tokens + len(chunk),",
        "torch.arange(start, start + len(chunk),",
    ),
    wrong_body(
        "3.6",
        "all tokens in one chunk, whatever chunk_size says",
        """
        device = cache.keys.device
        positions = torch.arange(cache.num_tokens, cache.num_tokens + len(token_ids), device=device)
        hidden = model(torch.tensor(token_ids, device=device), positions, cache.attend)
        return model.logits(hidden[-1:])[0]
        """,
    ),
    wrong("3.6", "the last chunk's first row, instead of its last", "hidden[-1:]", "hidden[:1]"),
    wrong(
        "3.6",
        "logits computed for the whole last chunk, though only the last row's are used",
        "model.logits(hidden[-1:])[0]",
        "model.logits(hidden)[-1]",
    ),
    right(
        "3.6",
        "the last row as a vector",
        """
        for start in range(0, len(token_ids), chunk_size):
            chunk = torch.tensor(token_ids[start : start + chunk_size]).to(cache.values.device)
            positions = torch.arange(len(chunk), device=chunk.device) + cache.num_tokens
            hidden = model(chunk, positions, cache.attend)
        return model.logits(hidden[-1])
        """,
    ),
    right(
        "3.6",
        "with torch.split",
        """
        for part in torch.tensor(list(token_ids), device=cache.keys.device).split(chunk_size):
            positions = cache.num_tokens + torch.arange(part.numel()).to(part)
            last = model(part, positions, cache.attend)[-1]
        return model.logits(last.unsqueeze(0)).squeeze(0)
        """,
    ),
    # --------------------------------------------------------------------------------------------- 3.7 decode_step
    wrong("3.7", "the token placed at position 0", "torch.tensor([cache.num_tokens]", "torch.tensor([0]"),
    wrong("3.7", "a position one too high", "torch.tensor([cache.num_tokens]", "torch.tensor([cache.num_tokens + 1]"),
    wrong("3.7", "a position one too low", "torch.tensor([cache.num_tokens]", "torch.tensor([cache.num_tokens - 1]"),
    wrong(
        "3.7",
        "lesson 2's attention, which has no memory",
        "position, cache.attend",
        "position, llama_pytorch.causal_attend",
    ),
    right("3.7", "as a prefill of one", "return prefill(model, cache, [token_id])"),
    # ------------------------------------------------------------------------------------------------ 3.8 generate
    wrong_body(
        "3.8",
        "no cache: lesson 2's generate as it is",
        "return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text)",
    ),
    wrong_body(
        "3.8",
        "only the last token given to the model, of the prompt too",
        """
        def next_logits(token_ids):
            return decode_step(model, cache, token_ids[-1])

        return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, next_logits)
        """,
    ),
    wrong_body(
        "3.8",
        "on_text not handed on",
        """
        def next_logits(token_ids):
            return prefill(model, cache, token_ids[cache.num_tokens :])

        return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, next_logits=next_logits)
        """,
    ),
    wrong_body(
        "3.8",
        "the prompt computed a token at a time",
        """
        def next_logits(token_ids):
            for token_id in token_ids[cache.num_tokens :]:
                logits = decode_step(model, cache, token_id)
            return logits

        return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, next_logits)
        """,
    ),
    wrong_body(
        "3.8",
        "the prompt computed before the loop, and its last token again at the loop's first call",
        """
        prefill(model, cache, prompt_token_ids)

        def next_logits(token_ids):
            return decode_step(model, cache, token_ids[-1])

        return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, next_logits)
        """,
    ),
    right(
        "3.8",
        "a prefill whatever is new",
        """
        return llama_pytorch.generate(
            model,
            tokenizer,
            prompt_token_ids,
            params,
            on_text,
            lambda token_ids: prefill(model, cache, token_ids[cache.num_tokens :]),
        )
        """,
    ),
    # -------------------------------------------------------------------------------------------------- 3.9 resume
    planted("3.9", "matches counted anywhere, instead of up to the first difference", "break", "continue"),
    wrong_body(
        "3.9",
        "the cache emptied, and everything computed again",
        """
        cache.truncate(0)
        return prefill(model, cache, token_ids)
        """,
    ),
    wrong(
        "3.9",
        "one token less kept than could be",
        "cache.truncate(shared)",
        "shared = max(0, shared - 1)\n    cache.truncate(shared)",
    ),
    wrong(
        "3.9", "the first difference kept, too", "            break\n", "            shared += 1\n            break\n"
    ),
    right(
        "3.9",
        "the first index that differs",
        """
        pairs = list(zip(cached_token_ids, token_ids[:-1]))
        differing = [i for i, (old, new) in enumerate(pairs) if old != new]
        kept = differing[0] if differing else len(pairs)
        cache.truncate(kept)
        return prefill(model, cache, token_ids[kept:])
        """,
    ),
    # --------------------------------------------------------------------------------------------- 3.10 cache_bytes
    wrong("3.10", "keys or values, not both", "2 * config.num_hidden_layers", "config.num_hidden_layers"),
    wrong("3.10", "all query heads, instead of the key/value heads", "num_key_value_heads", "num_attention_heads"),
    wrong("3.10", "one layer", "2 * config.num_hidden_layers", "2"),
    wrong("3.10", "a float, which no size can be", "return num_tokens", "return float(num_tokens)"),
    wrong(
        "3.10",
        "hidden_size, instead of the key/value heads",
        "config.num_key_value_heads * config.head_dim",
        "config.hidden_size",
    ),
    wrong(
        "3.10",
        "hidden_size over the number of heads, instead of head_dim, which is a number of its own",
        "config.head_dim",
        "(config.hidden_size // config.num_attention_heads)",
    ),
    right(
        "3.10",
        "from the inside out",
        """
        vector = config.head_dim * bytes_per_number
        return 2 * sum(vector * config.num_key_value_heads for _ in range(config.num_hidden_layers)) * num_tokens
        """,
    ),
    # ------------------------------------------------------------------------------------------ 3.11 padding_waste
    wrong(
        "3.11", "the share that is used, instead of wasted", "1 - sum(lengths) / computed", "sum(lengths) / computed"
    ),
    wrong(
        "3.11",
        "padding over tokens, instead of over all that is computed",
        "1 - sum(lengths) / computed",
        "computed / sum(lengths) - 1",
    ),
    wrong(
        "3.11",
        "the shortest beside the longest, whatever lies between",
        "1 - sum(lengths) / computed",
        "1 - min(lengths) / max(lengths)",
    ),
    wrong("3.11", "padding counted in tokens", "1 - sum(lengths) / computed", "float(computed - sum(lengths))"),
    right(
        "3.11",
        "padding counted",
        """
        longest = max(lengths)
        return sum(longest - length for length in lengths) / (longest * len(lengths))
        """,
    ),
    # ---------------------------------------------------------------------------------------- 3.12 latency_summary
    wrong("3.12", "the first token's time, without taking off the start", "token_times[0] - start", "token_times[0]"),
    wrong("3.12", "the gaps divided by the number of tokens", "/ len(gaps) if", "/ len(token_times) if"),
    wrong(
        "3.12",
        "the wait for the first token counted among the gaps",
        "pairwise(token_times)",
        "pairwise([start, *token_times])",
    ),
    wrong("3.12", "the smallest gap, instead of the largest", "max(gaps, default=0.0)", "min(gaps, default=0.0)"),
    wrong("3.12", "the median gap, instead of the mean", "sum(gaps) / len(gaps)", "sorted(gaps)[len(gaps) // 2]"),
    right(
        "3.12",
        "from the first and the last",
        """
        times = torch.tensor(list(token_times), dtype=torch.float64)
        if len(times) == 1:
            return Latency(token_times[0] - start, 0.0, 0.0)
        mean = (token_times[-1] - token_times[0]) / (len(token_times) - 1)
        return Latency(token_times[0] - start, mean, times.diff().max().item())
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "3.6", "one row: its first is its last", "model.logits(hidden[-1:])[0] -> model.logits(hidden[-1:])[-1]"
    ),
    equivalent(
        "3.7",
        "one row: its first is its last",
        "model.logits(model(torch.tensor([token_id], device=device), position, cache.attend))[0] "
        "-> model.logits(model(torch.tensor([token_id], device=device), position, cache.attend))[-1]",
    ),
    equivalent(
        "3.8",
        "a prefill of one token is a decode step",
        "decode_step(model, cache, new[0]) if len(new) == 1 else prefill(model, cache, new) "
        "-> prefill(model, cache, new)",
        "len(new) == 1 -> new == 1",
        "len(new) == 1 -> len(new) == 0",
    ),
    equivalent(
        "3.8",
        "one token: the first is the last",
        "decode_step(model, cache, new[0]) -> decode_step(model, cache, new[-1])",
    ),
    equivalent(
        "3.9",
        "the two are only asked whether they differ",
        "zip(cached_token_ids, token_ids[:-1]) -> zip(token_ids[:-1], cached_token_ids)",
    ),
]
