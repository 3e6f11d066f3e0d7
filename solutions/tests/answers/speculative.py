"""Lesson 8, draft tokens and their verification: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import equivalent, planted, right, wrong, wrong_body

ANSWERS = [
    # ------------------------------------------------------------------------------------------ 8.1 propose_ngram
    wrong("8.1", "the earliest match, not the latest", "in reversed(ends)", "in ends"),
    wrong(
        "8.1",
        "the shortest n-gram first",
        "range(min(max_ngram, len(text) - 1), min_ngram - 1, -1)",
        "range(min_ngram, min(max_ngram, len(text) - 1) + 1)",
    ),
    wrong_body(
        "8.1",
        "the end of the text taken for an earlier match",
        """
        text = list(token_ids)
        for n in range(min(max_ngram, len(text)), min_ngram - 1, -1):
            for start in range(len(text) - n, -1, -1):
                if text[start : start + n] == text[-n:]:
                    return text[start + n : start + n + num_tokens]
        return []
        """,
        recognised=False,
    ),
    wrong(
        "8.1",
        "a copy that stops at the end of the text",
        "                for source in range(end, end + num_tokens):\n"
        "                    text.append(text[source])\n"
        "                return text[len(token_ids) :]",
        "                return text[end : end + num_tokens]",
    ),
    wrong(
        "8.1",
        "the match copied too, not only what followed it",
        "range(end, end + num_tokens)",
        "range(end - n, end - n + num_tokens)",
    ),
    wrong(
        "8.1",
        "n-grams longer than max_ngram by one",
        "min(max_ngram, len(text) - 1)",
        "min(max_ngram + 1, len(text) - 1)",
    ),
    wrong("8.1", "n-grams shorter than min_ngram by one", "min_ngram - 1, -1)", "max(0, min_ngram - 2), -1)"),
    wrong(
        "8.1",
        "matches that overlap the end of the text left out",
        "in reversed(ends)",
        "in [end for end in reversed(ends) if end <= len(text) - n]",
        recognised=False,
    ),
    wrong("8.1", "the whole text returned, not only the draft tokens", "return text[len(token_ids) :]", "return text"),
    wrong(
        "8.1",
        "text[-num_tokens:], which is the whole text if num_tokens is 0",
        "return text[len(token_ids) :]",
        "return text[-num_tokens:]",
        recognised=False,
    ),
    wrong(
        "8.1",
        "max_ngram and min_ngram ignored",
        "for n in range(min(max_ngram,",
        "for n in range(min(4,",
    ),
    wrong(
        "8.1",
        "the first token of the text not searched",
        "text[max(0, end - n) : end] == text[-n:]",
        "text[max(1, end - n) : end] == text[-n:]",
    ),
    wrong_body(
        "8.1",
        "the end of the text found, and tokens copied from after it",
        """
        text = list(token_ids)
        for n in range(max_ngram, min_ngram - 1, -1):
            for start in range(len(text) - n, -1, -1):
                if text[start : start + n] == text[-n:]:
                    return [text[start + n + i] for i in range(num_tokens)]
        return []
        """,
        recognised=False,  # an exception may have any cause
    ),
    right(
        "8.1",
        "backwards over all places, the longest match of each",
        """
        size, best, place = len(token_ids), min_ngram - 1, None
        for end in range(size - 1, 0, -1):
            n = 0
            while n < min(max_ngram, end) and token_ids[end - 1 - n] == token_ids[size - 1 - n]:
                n += 1
            if n > best:
                best, place = n, end
        if place is None:
            return []
        period = size - place
        return [token_ids[place + i % period] for i in range(num_tokens)]
        """,
    ),
    right(
        "8.1",
        "by a table of what followed each n-gram last",
        """
        text = list(token_ids)
        for n in reversed(range(min_ngram, max_ngram + 1)):
            followed = {tuple(text[i : i + n]): i + n for i in range(len(text) - n)}
            place = followed.get(tuple(text[-n:]))
            if place is not None:
                repeated = text[place:]
                while len(repeated) < num_tokens:
                    repeated = repeated + text[place:]
                return repeated[:num_tokens]
        return []
        """,
    ),
    # ------------------------------------------------------------------------------------------ 8.2 verify_greedy
    wrong("8.2", "the loop continued after a wrong draft token", "break", "continue"),
    wrong_body(
        "8.2",
        "the model's choice dropped where the draft token was wrong",
        """
        tokens = []
        for token_id, draft in zip(chosen, [*draft_token_ids, None]):
            if draft is not None and token_id != draft:
                break
            tokens.append(token_id)
        return tokens
        """,
    ),
    wrong("8.2", "no token after the last draft token", "[*draft_token_ids, None]", "draft_token_ids"),
    wrong(
        "8.2",
        "the wrong draft token returned, not the model's choice",
        "tokens.append(token_id)",
        "tokens.append(token_id if draft is None else draft)",
    ),
    wrong_body(
        "8.2",
        "right draft tokens kept even after a wrong one",
        """
        chosen = list(chosen)
        correct = sum(token_id == draft for token_id, draft in zip(chosen, draft_token_ids))
        return chosen[: correct + 1]
        """,
    ),
    wrong(
        "8.2",
        "all choices consumed before the first is compared",
        "zip(chosen, [*draft_token_ids, None])",
        "zip(list(chosen), [*draft_token_ids, None])",
    ),
    wrong_body(
        "8.2",
        "one choice too many consumed after a wrong draft token",
        """
        chosen, tokens = iter(chosen), []
        token_id = next(chosen)
        for draft in draft_token_ids:
            tokens.append(token_id)
            token_id, is_wrong = next(chosen), token_id != draft
            if is_wrong:
                return tokens
        return [*tokens, token_id]
        """,
        recognised=False,
    ),
    right(
        "8.2",
        "asked with next",
        """
        choices, tokens = iter(chosen), []
        for draft in draft_token_ids:
            tokens.append(next(choices))
            if tokens[-1] != draft:
                return tokens
        return [*tokens, next(choices)]
        """,
    ),
    right(
        "8.2",
        "by position",
        """
        tokens = []
        for position, token_id in enumerate(chosen):
            tokens += [token_id]
            if position == len(draft_token_ids) or draft_token_ids[position] != token_id:
                return tokens
        """,
    ),
    # --------------------------------------------------------------------------------------- 8.3 Lookahead.commit
    wrong("8.3", "the cache not truncated", "self.cache.truncate(kept)", "pass"),
    wrong("8.3", "`cached_token_ids` not truncated", "self.cached_token_ids = self.cached_token_ids[:kept]", "pass"),
    wrong(
        "8.3",
        "the new token counted as computed, although its draft token was wrong",
        "len(token_ids) - 1)",
        "len(token_ids))",
    ),
    wrong("8.3", "one token too many removed", "len(token_ids) - 1)", "max(0, len(token_ids) - 2))"),
    wrong("8.3", "everything removed, even the prompt", "min(len(self.cached_token_ids), len(token_ids) - 1)", "0"),
    wrong(
        "8.3",
        "the row of that length returned without comparing the tokens",
        "if self.cached_token_ids[: len(token_ids)] == list(token_ids):",
        "if len(token_ids) in self.rows and len(token_ids) <= len(self.cached_token_ids):",
    ),
    wrong(
        "8.3",
        "the row before the new token, from which it was chosen",
        "self.rows[len(token_ids)]",
        "self.rows[len(token_ids) - 1]",
    ),
    wrong(
        "8.3",
        "always the row after the last draft token",
        "self.rows[len(token_ids)]",
        "self.rows[max(self.rows)]",
    ),
    wrong(
        "8.3",
        "the prompt counted as cached in the first call",
        "min(len(self.cached_token_ids), len(token_ids) - 1)",
        "len(token_ids) - 1",
        recognised=False,  # an exception may have any cause
    ),
    wrong(
        "8.3",
        "the text without its new token counted as cached, even if the cache is empty",
        "self.cached_token_ids = self.cached_token_ids[:kept]",
        "self.cached_token_ids = list(token_ids[:-1])",
    ),
    wrong(
        "8.3",
        "a tuple compared with a list, so that they are never equal",
        "== list(token_ids)",
        "== token_ids",
    ),
    wrong(
        "8.3",
        "`cached_token_ids` turned into a tuple",
        "self.cached_token_ids = self.cached_token_ids[:kept]",
        "self.cached_token_ids = tuple(token_ids[:kept])",
    ),
    right(
        "8.3",
        "only the newest token looked at: the others have been",
        """
        known = len(token_ids) - 1
        if known < len(self.cached_token_ids) and self.cached_token_ids[known] == token_ids[known]:
            return self.rows[known + 1]
        del self.cached_token_ids[known:]
        self.cache.truncate(len(self.cached_token_ids))
        """,
    ),
    right(
        "8.3",
        "as much as both have in common",
        """
        common = 0
        while common < min(len(token_ids), len(self.cached_token_ids)):
            if token_ids[common] != self.cached_token_ids[common]:
                break
            common += 1
        if common == len(token_ids):
            return self.rows.get(common)
        self.cached_token_ids, self.rows = self.cached_token_ids[:common], {}
        if self.cache.num_tokens > common:
            self.cache.truncate(common)
        return None
        """,
    ),
    # -------------------------------------------------------------------------------------- 8.4 accept_or_recover
    wrong(
        "8.4",
        "draft / target in place of target / draft",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "chance * float(target[token_id]) < float(draft[token_id])",
    ),
    wrong(
        "8.4",
        "accepted when the random number is above the ratio, not below it",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "chance * float(draft[token_id]) > float(target[token_id])",
    ),
    wrong(
        "8.4",
        "the replacement drawn from the target, not from max(0, target - draft)",
        "weights = residual if residual.sum() > 0 else target",
        "weights = target",
    ),
    wrong(
        "8.4",
        "the replacement drawn from the target without the draft token",
        "residual = (target - draft).clamp(min=0)",
        "residual = target.index_fill(0, torch.tensor(token_id), 0.0)",
    ),
    wrong(
        "8.4",
        "the replacement drawn from the draft",
        "weights = residual if residual.sum() > 0 else target",
        "weights = draft",
    ),
    wrong("8.4", "the replacement drawn from max(0, draft - target)", "(target - draft)", "(draft - target)"),
    wrong(
        "8.4",
        "the replacement drawn from abs(target - draft)",
        "(target - draft).clamp(min=0)",
        "(target - draft).abs()",
    ),
    wrong(
        "8.4",
        "target - draft not clamped at 0",
        "torch.multinomial(weights, 1, generator=generator)",
        "torch.multinomial(target - draft, 1, generator=generator)",
        recognised=False,  # an exception may have any cause
    ),
    wrong(
        "8.4",
        "no random number: accepted whenever target >= draft, and only then",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "float(draft[token_id]) <= float(target[token_id])",
    ),
    wrong(
        "8.4",
        "accepted with the target's probability, not with target / draft",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "chance < float(target[token_id])",
    ),
    wrong(
        "8.4",
        "a random number that does not come from `generator`",
        "torch.rand((), generator=generator, dtype=torch.float64)",
        "torch.rand((), dtype=torch.float64)",
    ),
    wrong(
        "8.4",
        "a replacement that is not drawn with `generator`",
        "torch.multinomial(weights, 1, generator=generator)",
        "torch.multinomial(weights, 1)",
    ),
    wrong(
        "8.4",
        "no replacement where max(0, target - draft) is 0 everywhere",
        "residual if residual.sum() > 0 else target",
        "residual",
        recognised=False,  # an exception may have any cause
    ),
    wrong(
        "8.4",
        "a small weight added to every token, even to those with probability 0 in the target",
        "(target - draft).clamp(min=0)",
        "(target - draft).clamp(min=1e-8)",
    ),
    wrong(
        "8.4",
        "the token id returned as a tensor",
        "int(torch.multinomial(weights, 1, generator=generator))",
        "torch.multinomial(weights, 1, generator=generator)",
    ),
    wrong(
        "8.4",
        "the draft token returned although it was rejected",
        "False, int(torch.multinomial(weights, 1, generator=generator))",
        "False, token_id",
    ),
    wrong(
        "8.4",
        "accepted with probability 1 - draft / target",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "chance * float(target[token_id]) >= float(draft[token_id])",
    ),
    wrong(
        "8.4",
        "the replacement with the largest weight, not a sampled one",
        "int(torch.multinomial(weights, 1, generator=generator))",
        "int(weights.argmax())",
    ),
    wrong(
        "8.4",
        "weights squared",
        "(target - draft).clamp(min=0)",
        "(target - draft).clamp(min=0) ** 2",
    ),
    wrong(
        "8.4",
        "small weights treated as 0",
        "residual if residual.sum() > 0 else target",
        "residual if residual.sum() > 1e-3 else target",
    ),
    wrong("8.4", "the replacement drawn from the draft where all weights are 0", "else target", "else draft"),
    wrong(
        "8.4",
        "the draft's probability clamped at 0.001",
        "chance * float(draft[token_id])",
        "chance * max(1e-3, float(draft[token_id]))",
    ),
    wrong(
        "8.4",
        "the target changed in place",
        "(target - draft).clamp(min=0)",
        "target.sub_(draft).clamp_(min=0)",
        recognised=False,
    ),
    wrong_body(
        "8.4",
        "a new generator with the same seed in each call, so that each draws the same",
        """
        own = torch.Generator().manual_seed(generator.initial_seed())
        if float(torch.rand((), generator=own, dtype=torch.float64)) * float(draft[token_id]) < float(target[token_id]):
            return True, token_id
        residual = (target - draft).clamp(min=0)
        return False, int(torch.multinomial(residual if residual.sum() > 0 else target, 1, generator=own))
        """,
    ),
    right(
        "8.4",
        "by the ratio, in float32",
        """
        ratio = torch.clamp(target[token_id] / draft[token_id], max=1.0)
        if torch.rand(1, generator=generator).item() < ratio.item():
            return True, token_id
        residual = torch.relu(target - draft)
        total = residual.sum()
        probabilities = residual / total if total > 0 else target
        return False, torch.multinomial(probabilities, num_samples=1, generator=generator).item()
        """,
    ),
    right(
        "8.4",
        "the residual as target less what they share",
        """
        keep = bool(torch.rand((), generator=generator) <= target[token_id].double() / draft[token_id].double())
        if not keep:
            missing = target - torch.minimum(target, draft)
            token_id = int(torch.multinomial(missing if missing.any() else target, 1, generator=generator))
        return keep, token_id
        """,
    ),
    # --------------------------------------------------------------------------------------- 8.5 rejection_sample
    wrong(
        "8.5",
        "no bonus where all draft tokens are accepted",
        "return [*tokens, int(torch.multinomial(target[last], 1, generator=generator(last)))]",
        "return tokens or [int(torch.multinomial(target[last], 1, generator=generator(last)))]",
    ),
    wrong(
        "8.5",
        "the bonus sampled from the row of the last draft token",
        "torch.multinomial(target[last], 1,",
        "torch.multinomial(target[max(0, last - 1)], 1,",
    ),
    wrong("8.5", "the loop continued after a rejected draft token", "if not is_accepted:", "if False:"),
    wrong(
        "8.5",
        "a bonus even where a draft token was rejected",
        "return tokens\n",
        "return [*tokens, int(torch.multinomial(target[i + 1], 1, generator=generator(i + 1)))]\n",
    ),
    wrong(
        "8.5",
        "no token in place of the rejected draft token",
        "        tokens.append(token_id)\n        if not is_accepted:\n            return tokens",
        "        if not is_accepted:\n            return tokens\n        tokens.append(token_id)",
    ),
    wrong(
        "8.5",
        "the same randomness for every token",
        "draft[i], token_id, generator(i))",
        "draft[i], token_id, generator(0))",
    ),
    wrong(
        "8.5",
        "one generator for all tokens, made once",
        "tokens = []",
        "tokens, generator = [], (lambda i, only=generator(0): only)",
    ),
    wrong(
        "8.5",
        "a token sampled from the target in place of the replacement",
        "        tokens.append(token_id)\n        if not is_accepted:\n            return tokens",
        "        if not is_accepted:\n"
        "            return [*tokens, int(torch.multinomial(target[i], 1, generator=generator(i)))]\n"
        "        tokens.append(token_id)",
    ),
    wrong(
        "8.5",
        "the likeliest token as the bonus, not a sampled one",
        "int(torch.multinomial(target[last], 1, generator=generator(last)))",
        "int(torch.multinomial(target[last].pow(1000).clamp(min=1e-30), 1, generator=generator(last)))",
    ),
    wrong(
        "8.5",
        "target and draft exchanged",
        "accept_or_recover(target[i], draft[i],",
        "accept_or_recover(draft[i], target[i],",
    ),
    wrong("8.5", "the draft's first row for every draft token", "draft[i], token_id", "draft[0], token_id"),
    wrong(
        "8.5",
        "the target's row after the draft token, not the one before it",
        "accept_or_recover(target[i],",
        "accept_or_recover(target[i + 1],",
    ),
    wrong(
        "8.5",
        "the bonus drawn from max(0, target - draft), as if a draft token had been rejected",
        "torch.multinomial(target[last], 1,",
        "torch.multinomial((target[last] - draft[-1]).clamp(min=0) if last else target[last], 1,",
    ),
    wrong(
        "8.5",
        "the bonus with the generator of the last draft token",
        "generator=generator(last)",
        "generator=generator(max(0, last - 1))",
    ),
    wrong(
        "8.5",
        "the likeliest token where there are no draft tokens",
        "last = len(draft_token_ids)",
        "last = len(draft_token_ids)\n    if last == 0:\n        return [int(target[0].argmax())]",
    ),
    wrong("8.5", "token 0 treated as no token", "if not is_accepted:", "if not is_accepted or not token_id:"),
    right(
        "8.5",
        "until one is rejected",
        """
        tokens, k = [], len(draft_token_ids)
        while len(tokens) < k:
            i = len(tokens)
            accepted, token = accept_or_recover(target[i], draft[i], draft_token_ids[i], generator(i))
            tokens.append(token)
            if not accepted:
                break
        else:
            tokens.append(torch.multinomial(target[k], 1, generator=generator(k)).item())
        return tokens
        """,
    ),
    right(
        "8.5",
        "recursive",
        """
        def follow(i):
            if i == len(draft_token_ids):
                return [int(torch.multinomial(target[-1], 1, generator=generator(i)))]
            accepted, token = accept_or_recover(target[i], draft[i], draft_token_ids[i], generator(i))
            return [token] + (follow(i + 1) if accepted else [])

        return follow(0)
        """,
    ),
    # ---------------------------------------------------------------------------------------- 8.6 expected_tokens
    wrong(
        "8.6",
        "the token that every step generates left out",
        "range(num_draft_tokens + 1)",
        "range(1, num_draft_tokens + 1)",
    ),
    wrong("8.6", "the last draft token left out", "range(num_draft_tokens + 1)", "range(max(1, num_draft_tokens))"),
    wrong("8.6", "one draft token too many", "range(num_draft_tokens + 1)", "range(num_draft_tokens + 2)"),
    wrong(
        "8.6",
        "draft tokens counted even after wrong ones",
        "sum(rate**i for i in range(num_draft_tokens + 1))",
        "1 + rate * num_draft_tokens",
    ),
    wrong(
        "8.6",
        "the bonus token left out where all draft tokens are accepted",
        "sum(rate**i for i in range(num_draft_tokens + 1))",
        "float(num_draft_tokens) if rate == 1 else (1 - rate ** (num_draft_tokens + 1)) / (1 - rate)",
        recognised=False,
    ),
    wrong(
        "8.6",
        "the closed formula, which divides by 0 for a rate of 1",
        "sum(rate**i for i in range(num_draft_tokens + 1))",
        "(1 - rate ** (num_draft_tokens + 1)) / (1 - rate)",
        recognised=False,  # an exception may have any cause
    ),
    wrong(
        "8.6",
        "draft tokens counted only if all are accepted",
        "sum(rate**i for i in range(num_draft_tokens + 1))",
        "1 + num_draft_tokens * rate**num_draft_tokens",
    ),
    wrong(
        "8.6",
        "the limit for infinitely many draft tokens",
        "sum(rate**i for i in range(num_draft_tokens + 1))",
        "min(num_draft_tokens + 1, 1 / (1 - rate) if rate < 1 else num_draft_tokens + 1)",
    ),
    right(
        "8.6",
        "the geometric sum, closed",
        """
        if rate == 1:
            return num_draft_tokens + 1.0
        return (1 - rate ** (num_draft_tokens + 1)) / (1 - rate)
        """,
    ),
    right(
        "8.6",
        "from the last draft token to the first",
        """
        expected = 1.0
        for _ in range(num_draft_tokens):
            expected = 1 + rate * expected
        return expected
        """,
    ),
    # ----------------------------------------------------------------------------------------------- 8.7 choose_k
    wrong(
        "8.7",
        "the k with the most tokens, whatever the time",
        "expected_tokens(rate, k) / seconds[k]",
        "expected_tokens(rate, k)",
    ),
    wrong(
        "8.7",
        "the k with the shortest step, whatever the tokens",
        "expected_tokens(rate, k) / seconds[k]",
        "-seconds[k]",
    ),
    wrong(
        "8.7",
        "the largest k of equal ones",
        "key=lambda k: expected_tokens(rate, k) / seconds[k]",
        "key=lambda k: (expected_tokens(rate, k) / seconds[k], k)",
    ),
    wrong("8.7", "at least one draft token", "range(len(seconds))", "range(min(1, len(seconds) - 1), len(seconds))"),
    wrong("8.7", "the k with the most seconds for a token", "max(range", "min(range"),
    wrong(
        "8.7",
        "only draft tokens counted, without the token that every step generates",
        "expected_tokens(rate, k) / seconds[k]",
        "(expected_tokens(rate, k) - 1) / seconds[k]",
    ),
    wrong_body(
        "8.7",
        "stopped at the first k that is no better",
        """
        k = 0
        while k + 1 < len(seconds) and (
            expected_tokens(rate, k + 1) / seconds[k + 1] > expected_tokens(rate, k) / seconds[k]
        ):
            k += 1
        return k
        """,
    ),
    wrong(
        "8.7",
        "tokens minus duration, not tokens divided by duration",
        "expected_tokens(rate, k) / seconds[k]",
        "expected_tokens(rate, k) - seconds[k] / seconds[0]",
        recognised=False,
    ),
    wrong("8.7", "the largest k never tried", "range(len(seconds))", "range(max(1, len(seconds) - 1))"),
    wrong(
        "8.7",
        "tokens per second rounded to hundredths",
        "expected_tokens(rate, k) / seconds[k]",
        "round(expected_tokens(rate, k) / seconds[k], 2)",
    ),
    wrong("8.7", "at most eight draft tokens", "range(len(seconds))", "range(min(9, len(seconds)))"),
    right(
        "8.7",
        "one after the other",
        """
        best, most = 0, 0.0
        for k, duration in enumerate(seconds):
            speed = expected_tokens(rate, k) / duration
            if speed > most:
                best, most = k, speed
        return best
        """,
    ),
    right(
        "8.7",
        "the least time a token",
        """
        costs = [duration / expected_tokens(rate, k) for k, duration in enumerate(seconds)]
        return costs.index(min(costs))
        """,
    ),
    # ------------------------------------------------------------------------------------ 8.8 Acceptance.observe
    planted(
        "8.8",
        "draft tokens after the first rejected one counted as tried",
        "num_accepted + (num_accepted < num_draft_tokens)  # draft tokens after a rejected one were not tried",
        "num_draft_tokens",
    ),
    wrong(
        "8.8",
        "the rejected draft token not counted as tried",
        "num_accepted + (num_accepted < num_draft_tokens)",
        "num_accepted",
    ),
    wrong(
        "8.8",
        "a rejected draft token counted although all were accepted",
        "num_accepted + (num_accepted < num_draft_tokens)",
        "num_accepted + 1",
    ),
    wrong(
        "8.8",
        "older observations multiplied by MEMORY once a step, not once a tried draft token",
        "MEMORY**tried",
        "MEMORY",
    ),
    wrong(
        "8.8",
        "older observations multiplied by MEMORY for draft tokens that were not tried, too",
        "MEMORY**tried",
        "MEMORY**num_draft_tokens",
    ),
    wrong("8.8", "older observations not multiplied by MEMORY", "MEMORY**tried", "1.0"),
    wrong(
        "8.8",
        "the new observations multiplied by MEMORY, too",
        "self.accepted * weight + num_accepted",
        "(self.accepted + num_accepted) * weight",
    ),
    right(
        "8.8",
        "by a conditional",
        """
        tried = num_draft_tokens if num_accepted == num_draft_tokens else num_accepted + 1
        self.accepted = num_accepted + MEMORY**tried * self.accepted
        self.tried = tried + MEMORY**tried * self.tried
        """,
    ),
    right(
        "8.8",
        "the smaller of the two",
        """
        tried = min(num_accepted + 1, num_draft_tokens)
        for _ in range(tried):
            self.accepted, self.tried = self.accepted * MEMORY, self.tried * MEMORY
        self.accepted += num_accepted
        self.tried += tried
        """,
    ),
    # ---------------------------------------------------------------------------------- 8.9 DraftProposer.propose
    wrong(
        "8.9",
        "only the newest token computed, whatever else the cache lacks",
        "draft.token_ids[self.num_computed[draft.request.request_id] :]",
        "draft.token_ids[-1:]",
    ),
    wrong(
        "8.9",
        "`num_computed` not updated, so that each pass computes everything again",
        "self.num_computed[draft.request.request_id] = len(draft.token_ids)",
        "pass",
    ),
    wrong(
        "8.9",
        "`num_computed` set after the draft token is appended",
        "                self.num_computed[draft.request.request_id] = len(draft.token_ids)\n"
        "                draft.append(*self.draw(draft, row))",
        "                draft.append(*self.draw(draft, row))\n"
        "                self.num_computed[draft.request.request_id] = len(draft.token_ids)",
        recognised=False,  # an exception may have any cause
    ),
    wrong(
        "8.9",
        "the largest limit used for every request",
        "< draft.limit]",
        "< max(each.limit for each in drafts)]",
    ),
    wrong(
        "8.9",
        "the smallest limit used for every request",
        "< draft.limit]",
        "< min(each.limit for each in drafts)]",
    ),
    wrong(
        "8.9",
        "limits above 0 ignored: as many draft tokens as fit",
        "draft.limit = min(draft.limit, capacity)",
        "draft.limit = min(draft.limit and 99, capacity)",
    ),
    wrong(
        "8.9",
        "limits not lowered to what fits",
        "draft.limit = min(draft.limit, capacity)",
        "pass",
        recognised=False,
    ),
    wrong(
        "8.9",
        "a negative limit treated as a positive one",
        "min(draft.limit, capacity)",
        "min(draft.limit, abs(capacity))",
        recognised=False,  # an exception may have any cause
    ),
    wrong(
        "8.9",
        "a slot required for the last draft token, which needs none",
        "+ 1 - len(draft.token_ids)",
        "- len(draft.token_ids)",
    ),
    wrong(
        "8.9", "one draft token too many", "+ 1 - len(draft.token_ids)", "+ 2 - len(draft.token_ids)", recognised=False
    ),
    wrong(
        "8.9",
        "the draft model's context ignored",
        "min(num_slots, self.model.config.max_position_embeddings)",
        "num_slots",
        recognised=False,
    ),
    wrong(
        "8.9",
        "the request's blocks ignored",
        "min(num_slots, self.model.config.max_position_embeddings)",
        "self.model.config.max_position_embeddings",
        recognised=False,
    ),
    wrong(
        "8.9",
        "a draft token for requests with a limit of 0",
        "< draft.limit]",
        "< max(1, draft.limit)]",
    ),
    wrong(
        "8.9",
        "draft tokens not appended to token_ids",
        "draft.append(*self.draw(draft, row))",
        "draft.draft_token_ids.append(self.draw(draft, row)[0])",
        recognised=False,
    ),
    wrong("8.9", "one pass too many", "< draft.limit]", "<= draft.limit]"),
    wrong(
        "8.9",
        "the rows of logits assigned to the wrong requests",
        "self.logits(unfinished, new))",
        "self.logits(unfinished, new).flip(0))",
    ),
    wrong(
        "8.9",
        "the distributions not stored",
        "draft.append(*self.draw(draft, row))",
        "draft.append(self.draw(draft, row)[0])",
    ),
    wrong(
        "8.9",
        "the likeliest token, not what `draw` returns",
        "draft.append(*self.draw(draft, row))",
        "draft.append(int(row.argmax()), self.draw(draft, row)[1])",
    ),
    wrong_body(
        "8.9",
        "one request after the other, not all in each pass",
        """
        for draft in drafts:
            num_slots = len(draft.request.block_table) * self.cache.block_size
            capacity = min(num_slots, self.model.config.max_position_embeddings) + 1 - len(draft.token_ids)
            draft.limit = min(draft.limit, capacity)
            while len(draft.draft_token_ids) < draft.limit:
                row = self.logits([draft], [draft.token_ids[self.num_computed[draft.request.request_id] :]])[0]
                self.num_computed[draft.request.request_id] = len(draft.token_ids)
                draft.append(*self.draw(draft, row))
        """,
    ),
    wrong_body(
        "8.9",
        "each pass ends when the first request has all its draft tokens",
        """
        for draft in drafts:
            num_slots = len(draft.request.block_table) * self.cache.block_size
            capacity = min(num_slots, self.model.config.max_position_embeddings) + 1 - len(draft.token_ids)
            draft.limit = min(draft.limit, capacity)
        drafts = [draft for draft in drafts if draft.limit > 0]
        while drafts and all(len(draft.draft_token_ids) < draft.limit for draft in drafts):
            new = [draft.token_ids[self.num_computed[draft.request.request_id] :] for draft in drafts]
            for draft, row in zip(drafts, self.logits(drafts, new)):
                self.num_computed[draft.request.request_id] = len(draft.token_ids)
                draft.append(*self.draw(draft, row))
        """,
        recognised=False,
    ),
    right(
        "8.9",
        "a fixed number of passes",
        """
        context = self.model.config.max_position_embeddings
        for draft in drafts:
            fits = min(len(draft.request.block_table) * self.cache.block_size, context) - len(draft.token_ids) + 1
            draft.limit = max(0, min(draft.limit, fits))
        for number in range(max((draft.limit for draft in drafts), default=0)):
            active = [draft for draft in drafts if draft.limit > number]
            new = [draft.token_ids[self.num_computed[draft.request.request_id] :] for draft in active]
            rows = self.logits(active, new)
            for i, draft in enumerate(active):
                self.num_computed[draft.request.request_id] += len(new[i])
                token, probs = self.draw(draft, rows[i])
                draft.append(token, probs)
        """,
    ),
    right(
        "8.9",
        "each request's newest tokens kept apart from what it has",
        """
        new, left = {}, {}
        for draft in drafts:
            name, size = draft.request.request_id, self.cache.block_size
            num_slots = min(size * len(draft.request.block_table), self.model.config.max_position_embeddings)
            left[name] = min(draft.limit, num_slots + 1 - len(draft.token_ids))
            new[name] = draft.token_ids[self.num_computed.get(name, 0) :]
        while active := [draft for draft in drafts if left[draft.request.request_id] > 0]:
            rows = self.logits(active, [new[draft.request.request_id] for draft in active])
            for draft, row in zip(active, rows.unbind()):
                name = draft.request.request_id
                self.num_computed[name] += len(new[name])
                token_id, probs = self.draw(draft, row)
                draft.append(token_id, probs)
                new[name], left[name] = [token_id], left[name] - 1
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "8.4",
        "no residual is negative, so their mean is positive exactly where their sum is",
        "residual.sum -> residual.mean",
    ),
    equivalent(
        "8.1",
        "`ends` leaves out places that cannot match, to save time; the comparison of n tokens rejects them as well",
        "[i for i in range(1, len(text)) if text[i - 1] == text[-1]] -> [i for i in range(1, len(text))]",
        "range(1, len(text)) -> range(0, len(text))",
    ),
    equivalent(
        "8.1",
        "an n-gram as long as the text or longer has no earlier place, so it is tried in vain",
        "min(max_ngram, len(text) - 1) -> max_ngram",
        "len(text) - 1 -> len(text) + 1",
        "len(text) - 1 -> len(text) - 0",
        "max(0, end - n) -> max(-1, end - n)",
    ),
    equivalent("8.3", "a function that ends returns None", "return None -> pass"),
    equivalent(
        "8.4",
        "a tensor of one number compares like the number",
        "float(torch.rand((), generator=generator, dtype=torch.float64)) -> torch.rand((), generator=generator, "
        "dtype=torch.float64)",
        "float(draft[token_id]) -> draft[token_id]",
        "float(target[token_id]) -> target[token_id]",
    ),
    equivalent(
        "8.4",
        "a chance in float32 is off by less than any number of draws can show",
        "torch.rand((), generator=generator, dtype=torch.float64) -> torch.rand((), generator=generator)",
        "torch.float64 -> torch.float32",
    ),
    equivalent(
        "8.4",
        "the two differ where a drawn chance equals a quotient to the last bit",
        "chance * float(draft[token_id]) < float(target[token_id]) -> chance * float(draft[token_id]) <= "
        "float(target[token_id])",
    ),
]
