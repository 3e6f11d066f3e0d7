"""Lesson 2's optional module: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import equivalent, right, wrong, wrong_body

ANSWERS = [
    # -------------------------------------------------------------------------------------------------- 2.18 route
    wrong_body(
        "2.18",
        "a softmax over the chosen scores only, so that the weights always add up to 1",
        """
        best, chosen = scores.topk(k)
        return upcast(best).softmax(-1).to(scores.dtype), chosen
        """,
    ),
    wrong(
        "2.18",
        "norm_topk_prob ignored",
        "    if norm_topk_prob:\n        weights = weights / weights.sum(-1, keepdim=True)\n",
        "",
    ),
    wrong("2.18", "the scores themselves as weights", ".softmax(-1).topk(k)", ".topk(k)"),
    wrong("2.18", "a softmax over the tokens", ".softmax(-1)", ".softmax(0)"),
    wrong("2.18", "the least likely experts", ".topk(k)", ".topk(k, largest=False)"),
    wrong("2.18", "weights in float32, whatever dtype the scores have", "weights.to(scores.dtype)", "weights.float()"),
    wrong("2.18", "a softmax in 16 bits", "upcast(scores)", "scores"),
    wrong("2.18", "all tokens' weights divided by one sum", "weights.sum(-1, keepdim=True)", "weights.sum()"),
    right(
        "2.18",
        "sorted, and normed by a softmax of the chosen scores",
        """
        chosen = scores.argsort(-1, descending=True)[:, :k]
        best = upcast(scores).gather(-1, chosen)
        if norm_topk_prob:
            return best.softmax(-1).to(scores.dtype), chosen
        return (best - upcast(scores).logsumexp(-1, keepdim=True)).exp().to(scores.dtype), chosen
        """,
    ),
    # --------------------------------------------------------------------------------------- 2.19 tokens_by_expert
    wrong(
        "2.19",
        "tensors as keys, by which nothing is found again",
        "zip(experts.tolist(), parts)",
        "zip(experts, parts)",
    ),
    wrong("2.19", "token and place the other way round", "(part // k, part % k)", "(part % k, part // k)"),
    wrong("2.19", "the choices' numbers in place of the tokens'", "(part // k, part % k)", "(part, part % k)"),
    wrong(
        "2.19",
        "choices in the order of tokens, cut as if they were sorted",
        "choices.argsort(stable=True)",
        "torch.arange(len(choices))",
    ),
    wrong_body(
        "2.19",
        "an entry for every expert up to the last, chosen or not",
        "return {e: (chosen == e).nonzero(as_tuple=True) for e in range(int(chosen.max()) + 1)}",
    ),
    wrong_body(
        "2.19",
        "only each token's first expert",
        """
        first = chosen[:, 0]
        rows = {e: (first == e).nonzero()[:, 0] for e in first.unique().tolist()}
        return {e: (tokens, torch.zeros_like(tokens)) for e, tokens in rows.items()}
        """,
    ),
    right(
        "2.19",
        "one expert after the other",
        "return {e: (chosen == e).nonzero(as_tuple=True) for e in chosen.unique().tolist()}",
    ),
    # -------------------------------------------------------------------------------------------- 2.20 mix_experts
    wrong("2.20", "outputs not weighted", " * weights[tokens, places, None]", ""),
    wrong(
        "2.20", "every expert weighted as the first choice", "weights[tokens, places, None]", "weights[tokens, 0, None]"
    ),
    wrong(
        "2.20",
        "inputs weighted instead of outputs",
        "experts[expert](x[tokens]) * weights[tokens, places, None]",
        "experts[expert](x[tokens] * weights[tokens, places, None])",
    ),
    wrong("2.20", "added to the input, as the block does already", "torch.zeros_like(x)", "x.clone()"),
    wrong("2.20", "written over the input", "torch.zeros_like(x)", "x"),
    wrong("2.20", "the last expert's output instead of the sum", "index_add_", "index_copy_"),
    wrong(
        "2.20", "outputs added to the first rows", "index_add_(0, tokens,", "index_add_(0, torch.arange(len(tokens)),"
    ),
    wrong_body(
        "2.20",
        "every expert called with all tokens, and weights of 0 where it is not chosen",
        """
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(experts):
            weight = (weights * (chosen == number)).sum(-1, keepdim=True)
            mixed += weight * expert(x)
        return mixed
        """,
    ),
    wrong_body(
        "2.20",
        "token after token, so that an expert is called once for each of its tokens",
        """
        mixed = torch.zeros_like(x)
        for token in range(len(x)):
            for place, expert in enumerate(chosen[token].tolist()):
                mixed[token] += (weights[token, place] * experts[expert](x[token : token + 1]))[0]
        return mixed
        """,
    ),
    wrong_body(
        "2.20",
        "a result in float32, whatever dtype x has",
        """
        mixed = torch.zeros(x.shape)
        for expert, (tokens, places) in tokens_by_expert(chosen).items():
            mixed.index_add_(0, tokens, (experts[expert](x[tokens]) * weights[tokens, places, None]).float())
        return mixed
        """,
    ),
    right(
        "2.20",
        "outputs laid by choice, and summed over the places",
        """
        parts = x.new_zeros(*chosen.shape, x.shape[1])
        for expert in chosen.unique().tolist():
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            parts[tokens, places] = experts[expert](x[tokens])
        return (parts * weights[:, :, None]).sum(1)
        """,
    ),
    # ------------------------------------------------------------------------------------------- 2.21 experts_read
    wrong_body(
        "2.21", "each token's experts counted, as if no two were the same", "return min(num_experts, k * num_tokens)"
    ),
    wrong("2.21", "one choice for each token, and not k", "(1 - k / num_experts)", "(1 - 1 / num_experts)"),
    wrong(
        "2.21",
        "the experts that are not read",
        "(1 - (1 - k / num_experts) ** num_tokens)",
        "(1 - k / num_experts) ** num_tokens",
    ),
    wrong("2.21", "the share of the experts, and not their number", "num_experts * (", "1 * ("),
    wrong_body(
        "2.21",
        "k draws that may fall on one expert twice",
        "return num_experts * (1 - (1 - 1 / num_experts) ** (k * num_tokens))",
    ),
    right(
        "2.21",
        "token after token",
        """
        read = 0.0
        for _ in range(num_tokens):
            read += k * (1 - read / num_experts)
        return read
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "2.18",
        "there are two axes, and the last is number 1",
        "upcast(scores).softmax(-1) -> upcast(scores).softmax(1)",
        "weights.sum(-1, keepdim=True) -> weights.sum(1, keepdim=True)",
    ),
]
