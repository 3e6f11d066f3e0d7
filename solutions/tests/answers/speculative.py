"""Lesson 8, guesses and what becomes of them: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import equivalent, planted, right, wrong, wrong_body

ANSWERS = [
    # ------------------------------------------------------------------------------------------ 8.1 propose_ngram
    wrong("8.1", "the earliest place, not the latest", "in reversed(ends)", "in ends"),
    wrong(
        "8.1",
        "the shortest ending first",
        "range(min(max_ngram, len(text) - 1), min_ngram - 1, -1)",
        "range(min_ngram, min(max_ngram, len(text) - 1) + 1)",
    ),
    wrong_body(
        "8.1",
        "the text's own end taken for a place where it ended so before",
        """
        text = list(token_ids)
        for n in range(min(max_ngram, len(text)), min_ngram - 1, -1):
            for start in range(len(text) - n, -1, -1):
                if text[start : start + n] == text[-n:]:
                    return text[start + n : start + n + num_tokens]
        return []
        """,
    ),
    wrong(
        "8.1",
        "a copy that stops where the text stops, instead of running on into itself",
        "                for source in range(end, end + num_tokens):\n"
        "                    text.append(text[source])\n"
        "                return text[len(token_ids) :]",
        "                return text[end : end + num_tokens]",
    ),
    wrong(
        "8.1",
        "what was found copied too, not only what followed it",
        "range(end, end + num_tokens)",
        "range(end - n, end - n + num_tokens)",
    ),
    wrong(
        "8.1",
        "endings of one token more than the most",
        "min(max_ngram, len(text) - 1)",
        "min(max_ngram + 1, len(text) - 1)",
    ),
    wrong("8.1", "endings of one token less than the fewest", "min_ngram - 1, -1)", "max(0, min_ngram - 2), -1)"),
    wrong(
        "8.1",
        "places that overlap the ending left out",
        "in reversed(ends)",
        "in [end for end in reversed(ends) if end <= len(text) - n]",
    ),
    wrong("8.1", "the text returned with the guesses", "return text[len(token_ids) :]", "return text"),
    wrong(
        "8.1",
        "the text's last `num_tokens`, which are all of it where none are asked for",
        "return text[len(token_ids) :]",
        "return text[-num_tokens:]",
        recognised=False,
    ),
    wrong(
        "8.1",
        "endings of two to four tokens, whatever is asked",
        "for n in range(min(max_ngram,",
        "for n in range(min(4,",
    ),
    wrong(
        "8.1",
        "the text's first token left out where it is searched",
        "text[max(0, end - n) : end] == text[-n:]",
        "text[max(1, end - n) : end] == text[-n:]",
    ),
    wrong_body(
        "8.1",
        "the text's own end found, and copied from beyond it",
        """
        text = list(token_ids)
        for n in range(max_ngram, min_ngram - 1, -1):
            for start in range(len(text) - n, -1, -1):
                if text[start : start + n] == text[-n:]:
                    return [text[start + n + i] for i in range(num_tokens)]
        return []
        """,
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
    wrong("8.2", "going on after a wrong guess", "break", "continue"),
    wrong_body(
        "8.2",
        "the model's own token dropped where the guess was wrong",
        """
        tokens = []
        for token_id, guess in zip(chosen, [*guesses, None]):
            if guess is not None and token_id != guess:
                break
            tokens.append(token_id)
        return tokens
        """,
    ),
    wrong("8.2", "no token after the last guess", "[*guesses, None]", "guesses"),
    wrong(
        "8.2",
        "the wrong guess itself, instead of what the model has chosen",
        "tokens.append(token_id)",
        "tokens.append(token_id if guess is None else guess)",
    ),
    wrong_body(
        "8.2",
        "all guesses counted that are right, also behind a wrong one",
        """
        chosen = list(chosen)
        right = sum(token_id == guess for token_id, guess in zip(chosen, guesses))
        return chosen[: right + 1]
        """,
    ),
    wrong(
        "8.2",
        "all choices made before the first is looked at",
        "zip(chosen, [*guesses, None])",
        "zip(list(chosen), [*guesses, None])",
    ),
    right(
        "8.2",
        "asked with next",
        """
        choices, tokens = iter(chosen), []
        for guess in guesses:
            tokens.append(next(choices))
            if tokens[-1] != guess:
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
            if position == len(guesses) or guesses[position] != token_id:
                return tokens
        """,
    ),
    # --------------------------------------------------------------------------------------- 8.6 Lookahead.commit
    wrong("8.6", "the cache not taken back", "self.cache.truncate(kept)", "pass"),
    wrong("8.6", "`cached_token_ids` not taken back", "self.cached_token_ids = self.cached_token_ids[:kept]", "pass"),
    wrong(
        "8.6",
        "the new token counted as computed where it was guessed wrong",
        "len(token_ids) - 1)",
        "len(token_ids))",
    ),
    wrong("8.6", "one token too many taken back", "len(token_ids) - 1)", "max(0, len(token_ids) - 2))"),
    wrong("8.6", "everything taken back, the prompt too", "min(len(self.cached_token_ids), len(token_ids) - 1)", "0"),
    wrong(
        "8.6",
        "any row of that length, whether the token was guessed or not",
        "if self.cached_token_ids[: len(token_ids)] == list(token_ids):",
        "if len(token_ids) in self.rows and len(token_ids) <= len(self.cached_token_ids):",
    ),
    wrong(
        "8.6",
        "the row before, of which the new token came",
        "self.rows[len(token_ids)]",
        "self.rows[len(token_ids) - 1]",
    ),
    wrong(
        "8.6",
        "the row after the last guess, whichever guess has come",
        "self.rows[len(token_ids)]",
        "self.rows[max(self.rows)]",
    ),
    wrong(
        "8.6",
        "the prompt taken for cached on the first call",
        "min(len(self.cached_token_ids), len(token_ids) - 1)",
        "len(token_ids) - 1",
    ),
    right(
        "8.6",
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
        "8.6",
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
    # -------------------------------------------------------------------------------------- 8.3 accept_or_recover
    wrong(
        "8.3",
        "the ratio upside down",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "chance * float(target[token_id]) < float(draft[token_id])",
    ),
    wrong(
        "8.3",
        "kept when the random number is above the ratio, not below it",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "chance * float(draft[token_id]) > float(target[token_id])",
    ),
    wrong(
        "8.3",
        "the other token drawn from all of the target, not from what is missing",
        "weights = missing if missing.sum() > 0 else target",
        "weights = target",
    ),
    wrong(
        "8.3",
        "the other token drawn from the target without the guess",
        "missing = (target - draft).clamp(min=0)",
        "missing = target.index_fill(0, torch.tensor(token_id), 0.0)",
    ),
    wrong(
        "8.3",
        "the other token drawn from the draft",
        "weights = missing if missing.sum() > 0 else target",
        "weights = draft",
    ),
    wrong("8.3", "draft less target, instead of target less draft", "(target - draft)", "(draft - target)"),
    wrong(
        "8.3",
        "distances, where what is too much must count as 0",
        "(target - draft).clamp(min=0)",
        "(target - draft).abs()",
    ),
    wrong(
        "8.3",
        "what is missing not cut off at 0",
        "torch.multinomial(weights, 1, generator=generator)",
        "torch.multinomial(target - draft, 1, generator=generator)",
    ),
    wrong(
        "8.3",
        "no chance: kept wherever the target likes it as well as the draft, and nowhere else",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "float(draft[token_id]) <= float(target[token_id])",
    ),
    wrong(
        "8.3",
        "kept with the target's probability, whatever the draft's is",
        "chance * float(draft[token_id]) < float(target[token_id])",
        "chance < float(target[token_id])",
    ),
    wrong(
        "8.3",
        "a chance that does not come from `generator`",
        "torch.rand((), generator=generator, dtype=torch.float64)",
        "torch.rand((), dtype=torch.float64)",
    ),
    wrong(
        "8.3",
        "another token that does not come from `generator`",
        "torch.multinomial(weights, 1, generator=generator)",
        "torch.multinomial(weights, 1)",
    ),
    wrong(
        "8.3",
        "no way out where nothing is missing",
        "missing if missing.sum() > 0 else target",
        "missing",
    ),
    wrong(
        "8.3",
        "a little of every token, so that there is something to draw from, and of forbidden ones too",
        "(target - draft).clamp(min=0)",
        "(target - draft).clamp(min=1e-8)",
    ),
    wrong(
        "8.3",
        "a tensor of one token, instead of its number",
        "int(torch.multinomial(weights, 1, generator=generator))",
        "torch.multinomial(weights, 1, generator=generator)",
    ),
    wrong(
        "8.3",
        "the guess returned, though it was not kept",
        "False, int(torch.multinomial(weights, 1, generator=generator))",
        "False, token_id",
    ),
    right(
        "8.3",
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
        "8.3",
        "what is missing as target less what they share",
        """
        keep = bool(torch.rand((), generator=generator) <= target[token_id].double() / draft[token_id].double())
        if not keep:
            missing = target - torch.minimum(target, draft)
            token_id = int(torch.multinomial(missing if missing.any() else target, 1, generator=generator))
        return keep, token_id
        """,
    ),
    # --------------------------------------------------------------------------------------- 8.4 rejection_sample
    wrong(
        "8.4",
        "no bonus where all guesses are kept",
        "return [*tokens, int(torch.multinomial(target[last], 1, generator=generator(last)))]",
        "return tokens or [int(torch.multinomial(target[last], 1, generator=generator(last)))]",
    ),
    wrong(
        "8.4",
        "the bonus drawn from the row of the last guess",
        "torch.multinomial(target[last], 1,",
        "torch.multinomial(target[max(0, last - 1)], 1,",
    ),
    wrong("8.4", "going on after a guess that was not kept", "if not is_kept:", "if False:"),
    wrong(
        "8.4",
        "a bonus even where a guess was not kept",
        "return tokens\n",
        "return [*tokens, int(torch.multinomial(target[i + 1], 1, generator=generator(i + 1)))]\n",
    ),
    wrong(
        "8.4",
        "nothing in place of the guess that was not kept",
        "        tokens.append(token_id)\n        if not is_kept:\n            return tokens",
        "        if not is_kept:\n            return tokens\n        tokens.append(token_id)",
    ),
    wrong(
        "8.4",
        "the same randomness for every token",
        "proposal.probs[i], guess, generator(i))",
        "proposal.probs[i], guess, generator(0))",
    ),
    wrong(
        "8.4",
        "one generator for all tokens, made once",
        "tokens = []",
        "tokens, generator = [], (lambda i, only=generator(0): only)",
    ),
    wrong(
        "8.4",
        "another token drawn from the target where a guess is not kept, not the one that replaces it",
        "        tokens.append(token_id)\n        if not is_kept:\n            return tokens",
        "        if not is_kept:\n"
        "            return [*tokens, int(torch.multinomial(target[i], 1, generator=generator(i)))]\n"
        "        tokens.append(token_id)",
    ),
    wrong(
        "8.4",
        "the likeliest token for the bonus, instead of one that is drawn",
        "int(torch.multinomial(target[last], 1, generator=generator(last)))",
        "int(torch.multinomial(target[last].pow(1000).clamp(min=1e-30), 1, generator=generator(last)))",
    ),
    wrong(
        "8.4",
        "target and draft exchanged",
        "target[i], proposal.probs[i], guess",
        "proposal.probs[i], target[i], guess",
    ),
    wrong("8.4", "the draft's first row for every guess", "proposal.probs[i]", "proposal.probs[0]"),
    wrong(
        "8.4",
        "the target's row behind the guess, not the one before it",
        "accept_or_recover(target[i],",
        "accept_or_recover(target[i + 1],",
    ),
    right(
        "8.4",
        "until one is not kept",
        """
        tokens, k = [], len(proposal.token_ids)
        while len(tokens) < k:
            i = len(tokens)
            kept, token = accept_or_recover(target[i], proposal.probs[i], proposal.token_ids[i], generator(i))
            tokens.append(token)
            if not kept:
                break
        else:
            tokens.append(torch.multinomial(target[k], 1, generator=generator(k)).item())
        return tokens
        """,
    ),
    right(
        "8.4",
        "recursive",
        """
        def follow(i):
            if i == len(proposal.token_ids):
                return [int(torch.multinomial(target[-1], 1, generator=generator(i)))]
            kept, token = accept_or_recover(target[i], proposal.probs[i], proposal.token_ids[i], generator(i))
            return [token] + (follow(i + 1) if kept else [])

        return follow(0)
        """,
    ),
    # ---------------------------------------------------------------------------------------- 8.7 expected_tokens
    wrong("8.7", "the token that every pass brings forgotten", "range(num_guesses + 1)", "range(1, num_guesses + 1)"),
    wrong("8.7", "the last guess forgotten", "range(num_guesses + 1)", "range(max(1, num_guesses))"),
    wrong("8.7", "one guess too many", "range(num_guesses + 1)", "range(num_guesses + 2)"),
    wrong(
        "8.7",
        "guesses counted behind wrong ones too",
        "sum(rate**i for i in range(num_guesses + 1))",
        "1 + rate * num_guesses",
    ),
    wrong(
        "8.7",
        "the token that every pass brings forgotten where all guesses are right",
        "sum(rate**i for i in range(num_guesses + 1))",
        "float(num_guesses) if rate == 1 else (1 - rate ** (num_guesses + 1)) / (1 - rate)",
        recognised=False,
    ),
    wrong(
        "8.7",
        "the closed sum, which divides by 0 where every guess is right",
        "sum(rate**i for i in range(num_guesses + 1))",
        "(1 - rate ** (num_guesses + 1)) / (1 - rate)",
    ),
    wrong(
        "8.7",
        "all or nothing: the guesses counted only if all are right",
        "sum(rate**i for i in range(num_guesses + 1))",
        "1 + num_guesses * rate**num_guesses",
    ),
    right(
        "8.7",
        "the geometric sum, closed",
        """
        if rate == 1:
            return num_guesses + 1.0
        return (1 - rate ** (num_guesses + 1)) / (1 - rate)
        """,
    ),
    right(
        "8.7",
        "from the last guess to the first",
        """
        expected = 1.0
        for _ in range(num_guesses):
            expected = 1 + rate * expected
        return expected
        """,
    ),
    # ----------------------------------------------------------------------------------------------- 8.8 choose_k
    wrong(
        "8.8",
        "the most tokens, whatever they take",
        "expected_tokens(rate, k) / seconds[k]",
        "expected_tokens(rate, k)",
    ),
    wrong("8.8", "the shortest step, whatever it brings", "expected_tokens(rate, k) / seconds[k]", "-seconds[k]"),
    wrong(
        "8.8",
        "of equals the largest",
        "key=lambda k: expected_tokens(rate, k) / seconds[k]",
        "key=lambda k: (expected_tokens(rate, k) / seconds[k], k)",
    ),
    wrong("8.8", "one guess at least", "range(len(seconds))", "range(min(1, len(seconds) - 1), len(seconds))"),
    wrong("8.8", "the most seconds a token", "max(range", "min(range"),
    wrong(
        "8.8",
        "the guesses alone counted, without the token that every step brings",
        "expected_tokens(rate, k) / seconds[k]",
        "(expected_tokens(rate, k) - 1) / seconds[k]",
    ),
    wrong_body(
        "8.8",
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
    right(
        "8.8",
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
        "8.8",
        "the least time a token",
        """
        costs = [duration / expected_tokens(rate, k) for k, duration in enumerate(seconds)]
        return costs.index(min(costs))
        """,
    ),
    # ------------------------------------------------------------------------------------ 8.11 Acceptance.observe
    planted(
        "8.11",
        "guesses behind the first wrong one counted as tried",
        "num_accepted + (num_accepted < num_guesses)  # what lies behind a wrong guess was not tried",
        "num_guesses",
    ),
    wrong(
        "8.11",
        "the wrong guess not counted as tried",
        "num_accepted + (num_accepted < num_guesses)",
        "num_accepted",
    ),
    wrong(
        "8.11",
        "a wrong guess counted where there was none",
        "num_accepted + (num_accepted < num_guesses)",
        "num_accepted + 1",
    ),
    wrong("8.11", "older guesses forgotten once a run, not once a guess", "MEMORY**tried", "MEMORY"),
    wrong(
        "8.11",
        "older guesses forgotten for those, too, that were not tried",
        "MEMORY**tried",
        "MEMORY**num_guesses",
    ),
    wrong("8.11", "nothing forgotten", "MEMORY**tried", "1.0"),
    right(
        "8.11",
        "by a conditional",
        """
        tried = num_guesses if num_accepted == num_guesses else num_accepted + 1
        self.right = num_accepted + MEMORY**tried * self.right
        self.tried = tried + MEMORY**tried * self.tried
        """,
    ),
    right(
        "8.11",
        "the smaller of the two",
        """
        tried = min(num_accepted + 1, num_guesses)
        for _ in range(tried):
            self.right, self.tried = self.right * MEMORY, self.tried * MEMORY
        self.right += num_accepted
        self.tried += tried
        """,
    ),
    # ---------------------------------------------------------------------------------- 8.5 DraftProposer.propose
    wrong(
        "8.5",
        "only the newest token computed, whatever else the draft lacks",
        "texts[each.request_id][self.num_computed[each.request_id] :]",
        "texts[each.request_id][-1:]",
    ),
    wrong(
        "8.5",
        "everything computed again, pass after pass: `num_computed` not moved on",
        "self.num_computed[id] = len(texts[id])",
        "pass",
    ),
    wrong(
        "8.5",
        "the newest guess taken for computed, one pass too early",
        "self.num_computed[id] = len(texts[id])",
        "self.num_computed[id] = len(texts[id]) + 1",
    ),
    wrong(
        "8.5",
        "as many guesses for everyone as for whoever makes most",
        "< limits[each.request_id]]",
        "< max(limits.values())]",
    ),
    wrong(
        "8.5",
        "limits not obeyed beyond 0: always as much as there is room for",
        "min(limits[id], self.room(each, len(texts[id])))",
        "min(limits[id] and 99, self.room(each, len(texts[id])))",
    ),
    wrong("8.5", "`room` not asked", "min(limits[id], self.room(each, len(texts[id])))", "limits[id]"),
    wrong(
        "8.5",
        "no guess for which the last token would not have a slot, though it needs none",
        "self.room(each, len(texts[id])))",
        "self.room(each, len(texts[id])) - 1)",
    ),
    wrong(
        "8.5",
        "a guess for requests that may make none",
        "if limits[each.request_id] > 0]",
        "if limits[each.request_id] >= 0]",
    ),
    wrong(
        "8.5",
        "requests mixed up: the rows given out in another order",
        "zip(going, self.logits(going, lacking))",
        "zip(going, self.logits(going, lacking).flip(0))",
    ),
    wrong(
        "8.5",
        "the probabilities left out of the proposal",
        "torch.stack(probs[id]) if probs[id] else None",
        "None",
    ),
    wrong(
        "8.5",
        "the probabilities of the first guess for all of them",
        "torch.stack(probs[id]) if probs[id] else None",
        "torch.stack(probs[id][:1] * len(probs[id])) if probs[id] else None",
    ),
    wrong("8.5", "`draw` not told of the guesses before", "sampled[id] + guesses[id])", "sampled[id])"),
    wrong("8.5", "`draw` not told what has just been sampled", "sampled[id] + guesses[id])", "guesses[id])"),
    wrong(
        "8.5",
        "the sampled tokens left out of the text",
        "text_of(each, sampled) for each in scheduled",
        "text_of(each, {each.request_id: []}) for each in scheduled",
    ),
    wrong_body(
        "8.5",
        "one request after the other, instead of all in each pass",
        """
        proposals = {}
        for each in scheduled:
            id, text, guesses, probs = each.request_id, text_of(each, sampled), [], []
            for _ in range(min(limits[id], self.room(each, len(text)))):
                row = self.logits([each], [text[self.num_computed[id] :]])[0]
                self.num_computed[id] = len(text)
                token_id, drawn_from = self.draw(each, row, sampled[id] + guesses)
                guesses.append(token_id)
                text.append(token_id)
                probs += [] if drawn_from is None else [drawn_from]
            if guesses:
                proposals[id] = Proposal(guesses, torch.stack(probs) if probs else None)
        return proposals
        """,
    ),
    right(
        "8.5",
        "a small class for each request, and a loop with a fixed number of passes",
        """
        drafts = []
        for each in scheduled:
            text = text_of(each, sampled)
            drafts.append(Draft(each, text, min(limits[each.request_id], self.room(each, len(text)))))
        for number in range(max((draft.limit for draft in drafts), default=0)):
            active = [draft for draft in drafts if draft.limit > number]
            new = [draft.text[self.num_computed[draft.request.request_id] :] for draft in active]
            rows = self.logits([draft.request for draft in active], new)
            for i, draft in enumerate(active):
                name = draft.request.request_id
                self.num_computed[name] += len(new[i])
                known = draft.text[len(draft.request.prompt_token_ids) + len(draft.request.output_token_ids) :]
                token, probs = self.draw(draft.request, rows[i], known)
                draft.text.append(token)
                draft.probs.append(probs)
        return {
            draft.request.request_id: Proposal(
                draft.text[-draft.limit :], None if draft.probs[0] is None else torch.stack(draft.probs)
            )
            for draft in drafts
            if draft.limit > 0
        }
        """,
        top="""
        class Draft:
            def __init__(self, request, text, limit):
                self.request, self.text, self.limit, self.probs = request, text, limit, []
        """,
    ),
    right(
        "8.5",
        "each request's newest tokens kept apart from what it has",
        """
        new, left, found = {}, {}, {}
        for each in scheduled:
            name, text = each.request_id, text_of(each, sampled)
            left[name] = min(limits[name], self.room(each, len(text)))
            new[name] = text[self.num_computed.get(name, 0) :]
        while active := [each for each in scheduled if left[each.request_id] > 0]:
            rows = self.logits(active, [new[each.request_id] for each in active])
            for each, row in zip(active, rows.unbind()):
                name = each.request_id
                ids, probs = found.setdefault(name, ([], []))
                self.num_computed[name] += len(new[name])
                guess, drawn_from = self.draw(each, row, [*sampled[name], *ids])
                ids.append(guess)
                probs.append(drawn_from)
                new[name], left[name] = [guess], left[name] - 1
        return {
            name: Proposal(ids, torch.stack(probs) if all(row is not None for row in probs) else None)
            for name, (ids, probs) in found.items()
        }
        """,
    ),
]

EQUIVALENT = [
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
    equivalent("8.6", "lesson 2's loop hands in a list", "list(token_ids) -> token_ids"),
    equivalent("8.6", "a function that ends returns None", "return None -> pass"),
    equivalent(
        "8.3",
        "a tensor of one number compares like the number",
        "float(torch.rand((), generator=generator, dtype=torch.float64)) -> torch.rand((), generator=generator, "
        "dtype=torch.float64)",
        "float(draft[token_id]) -> draft[token_id]",
        "float(target[token_id]) -> target[token_id]",
    ),
    equivalent(
        "8.3",
        "a chance in float32 is off by less than any number of draws can show",
        "torch.rand((), generator=generator, dtype=torch.float64) -> torch.rand((), generator=generator)",
        "torch.float64 -> torch.float32",
    ),
    equivalent(
        "8.3",
        "the two differ where a drawn chance equals a quotient to the last bit",
        "chance * float(draft[token_id]) < float(target[token_id]) -> chance * float(draft[token_id]) <= "
        "float(target[token_id])",
    ),
    equivalent("8.3", "a mean is above 0 where the sum is", "missing.sum() -> missing.mean()"),
]
