"""Lesson 1's answers that are not the reference: mistakes, each by the name that a student is told, and other ways."""

from common.course.catalogue import equivalent, right, wrong, wrong_body

ANSWERS = [
    # ------------------------------------------------------------------------------------------- 1.1 merge_pair
    wrong("1.1", "a step over only one element after a merge", "i += 2", "i += 1"),
    wrong(
        "1.1",
        "the two of the pair taken in either order",
        "tuple(ids[i : i + 2]) == tuple(pair)",
        "sorted(ids[i : i + 2]) == sorted(pair)",
    ),
    wrong_body(
        "1.1",
        "only the first occurrence merged",
        """
        for i in range(len(ids) - 1):
            if (ids[i], ids[i + 1]) == tuple(pair):
                return [*ids[:i], new_id, *ids[i + 2 :]]
        return list(ids)
        """,
    ),
    wrong_body(
        "1.1",
        "the walk going from right to left",
        """
        merged, i = [], len(ids) - 1
        while i >= 0:
            if i > 0 and (ids[i - 1], ids[i]) == tuple(pair):
                merged.insert(0, new_id)
                i -= 2
            else:
                merged.insert(0, ids[i])
                i -= 1
        return merged
        """,
    ),
    wrong_body(
        "1.1",
        "the last element lost when it is not part of a merge",
        """
        merged, i = [], 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == tuple(pair):
                merged.append(new_id)
                i += 2
            else:
                merged.append(ids[i])
                i += 1
        return merged
        """,
    ),
    wrong_body(
        "1.1",
        "the list that was handed in changed, instead of a new one",
        """
        i = 0
        while i < len(ids) - 1:
            if (ids[i], ids[i + 1]) == tuple(pair):
                ids[i : i + 2] = [new_id]
            i += 1
        return ids
        """,
    ),
    wrong_body(
        "1.1",
        "no step over the second element after a merge, and the last element never looked at",
        """
        merged = []
        for i in range(len(ids) - 1):
            if (ids[i], ids[i + 1]) == tuple(pair):
                merged.append(new_id)
            else:
                merged.append(ids[i])
        return merged
        """,
    ),
    right(
        "1.1",
        "by an iterator",
        """
        result = []
        for token in ids:
            if result and result[-1] == pair[0] and token == pair[1] and not just_merged:
                result[-1] = new_id
                just_merged = True
            else:
                result.append(token)
                just_merged = False
        return result
        """,
    ),
    right(
        "1.1",
        "by edits in a copy",
        """
        ids = list(ids)
        i = 0
        while i + 1 < len(ids):
            if ids[i] == pair[0] and ids[i + 1] == pair[1]:
                ids[i : i + 2] = [new_id]
            i += 1
        return ids
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.2 embed
    wrong("1.2", "token ids counted from one", "table[token_ids]", "table[token_ids - 1]"),
    wrong(
        "1.2",
        "the vectors scaled by the root of hidden_size, as the first Transformer did, but no Llama does",
        "table[token_ids]",
        "table[token_ids] * table.shape[1] ** 0.5",
    ),
    wrong(
        "1.2",
        "the table's first rows: the row of each position, not of each token id",
        "table[token_ids]",
        "table[: len(token_ids)]",
    ),
    wrong("1.2", "every vector turned into float32", "table[token_ids]", "table[token_ids].float()"),
    right("1.2", "by torch's own", "return torch.nn.functional.embedding(token_ids, table)"),
    right(
        "1.2", "by one-hot vectors", "return torch.nn.functional.one_hot(token_ids, len(table)).to(table.dtype) @ table"
    ),
    # ------------------------------------------------------------------------------------------- 1.3 softmax
    wrong(
        "1.3", "no maximum subtracted, so that exp overflows", "scores - scores.amax(dim=-1, keepdim=True)", "scores"
    ),
    wrong(
        "1.3",
        "the maximum of the whole tensor subtracted, not each row's own",
        "scores.amax(dim=-1, keepdim=True)",
        "scores.max()",
    ),
    wrong(
        "1.3",
        "the largest absolute value subtracted, not the largest value",
        "scores.amax(dim=-1, keepdim=True)",
        "scores.abs().amax(dim=-1, keepdim=True)",
    ),
    wrong("1.3", "a sum over the first axis, not the last", "sum(dim=-1, keepdim=True)", "sum(dim=0, keepdim=True)"),
    wrong(
        "1.3",
        "a sum over the whole tensor, not over each row",
        "exponentials.sum(dim=-1, keepdim=True)",
        "exponentials.sum()",
    ),
    wrong("1.3", "powers of 2 instead of e", "shifted.exp()", "shifted.exp2()"),
    wrong(
        "1.3",
        "large scores clipped: then they all come out alike",
        "scores - scores.amax(dim=-1, keepdim=True)",
        "scores.clamp(-80, 80)",
    ),
    wrong_body(
        "1.3",
        "the scores themselves changed in place",
        """
        scores -= scores.amax(dim=-1, keepdim=True)
        exponentials = scores.exp()
        return exponentials / exponentials.sum(dim=-1, keepdim=True)
        """,
    ),
    wrong_body(
        "1.3",
        "maximum and sum of the whole tensor, not of each row",
        """
        exponentials = (scores - scores.max()).exp()
        return exponentials / exponentials.sum()
        """,
    ),
    wrong_body(
        "1.3",
        "maximum and sum over the first axis, not the last",
        """
        exponentials = (scores - scores.amax(dim=0, keepdim=True)).exp()
        return exponentials / exponentials.sum(dim=0, keepdim=True)
        """,
    ),
    wrong("1.3", "always in float32", "scores - scores.amax", "scores.float() - scores.float().amax"),
    right("1.3", "torch's own", "return torch.softmax(scores, -1)"),
    right("1.3", "by the logarithm of the sum", "return (scores - torch.logsumexp(scores, -1, keepdim=True)).exp()"),
    # ------------------------------------------------------------------------------------------- 1.4 rms_norm
    wrong(
        "1.4",
        "variance instead of mean square",
        "wide.pow(2).mean(-1, keepdim=True)",
        "wide.var(-1, keepdim=True, unbiased=False)",
    ),
    wrong("1.4", "the variance, by torch's default over n - 1, instead of mean square", ".pow(2).mean(-1", ".var(-1"),
    wrong(
        "1.4",
        "the mean subtracted first, as LayerNorm does, not RMSNorm",
        "wide = upcast(x)",
        "wide = upcast(x) - upcast(x).mean(-1, keepdim=True)",
    ),
    wrong_body(
        "1.4",
        "LayerNorm: the mean subtracted, and the variance by torch's default over n - 1",
        """
        wide = upcast(x)
        centred = wide - wide.mean(-1, keepdim=True)
        return (centred * torch.rsqrt(wide.var(-1, keepdim=True) + eps)).to(x.dtype) * weight
        """,
    ),
    wrong("1.4", "the sum of the squares instead of their mean", ".mean(-1", ".sum(-1"),
    wrong("1.4", "a mean over the whole tensor, not over each vector", ".mean(-1, keepdim=True)", ".mean()"),
    wrong("1.4", "eps added outside the root", "torch.rsqrt(mean_square + eps)", "1 / (mean_square.sqrt() + eps)"),
    wrong("1.4", "no eps", "mean_square + eps", "mean_square"),
    wrong(
        "1.4",
        "no root: a division by the mean square itself",
        "torch.rsqrt(mean_square + eps)",
        "1 / (mean_square + eps)",
    ),
    wrong("1.4", "an average in x's own dtype, which overflows in float16", "wide = upcast(x)", "wide = x"),
    wrong("1.4", "float64 narrowed to float32 (`upcast` only ever widens)", "wide = upcast(x)", "wide = x.float()"),
    wrong(
        "1.4",
        "the weight applied before the average, so that the norm takes it out again",
        "wide = upcast(x)",
        "wide = upcast(x) * weight",
    ),
    wrong("1.4", "no weight", ".to(x.dtype) * weight", ".to(x.dtype)"),
    wrong("1.4", "1 + weight, as Gemma stores it, instead of weight", "* weight", "* (1 + weight)"),
    right(
        "1.4",
        "by the length of the vector, and the weight in float32 too",
        """
        wide = upcast(x)
        root_mean_square = torch.sqrt(wide.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps)
        return (wide / root_mean_square * weight).to(x.dtype)
        """,
    ),
    right(
        "1.4",
        "by torch's own, in double precision",
        "return torch.nn.functional.rms_norm(x.double(), x.shape[-1:], weight.double(), eps).to(x.dtype)",
    ),
    # ------------------------------------------------------------------------------------------- 1.5 rotary_tables
    wrong("1.5", "positions counted from one", "positions.float()[:, None]", "(positions.float() + 1)[:, None]"),
    wrong(
        "1.5",
        "positions taken to be 0, 1, 2, ..., whatever they are",
        "positions.float()[:, None]",
        "torch.arange(len(positions))[:, None]",
    ),
    wrong("1.5", "a division by the frequency", "[:, None] * frequencies", "[:, None] / frequencies"),
    wrong(
        "1.5",
        "sine and cosine in each other's place",
        "return angles.cos(), angles.sin()",
        "return angles.sin(), angles.cos()",
    ),
    wrong("1.5", "the sine of the negative angle", "angles.sin()", "-angles.sin()"),
    wrong(
        "1.5",
        "each column twice: one for both halves of a head, as transformers keeps it, where D / 2 are asked",
        "[:, None] * frequencies",
        "[:, None] * torch.cat((frequencies, frequencies))",
    ),
    wrong(
        "1.5",
        "angles in bfloat16, which cannot tell position 1000 from 1001",
        "positions.float()",
        "positions.bfloat16().float()",
    ),
    wrong(
        "1.5",
        "tables in bfloat16",
        "return angles.cos(), angles.sin()",
        "return angles.cos().bfloat16(), angles.sin().bfloat16()",
    ),
    right(
        "1.5",
        "by an outer product in double precision",
        """
        angles = torch.outer(positions.double(), frequencies.double())
        return torch.cos(angles).float(), torch.sin(angles).float()
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.6 apply_rotary
    wrong_body(
        "1.6",
        "neighbours paired (interleaved, as GGUF's llama files are), where i belongs with i + D / 2",
        """
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
        """,
    ),
    wrong_body(
        "1.6",
        "neighbours paired, where i belongs with i + D / 2, and the results joined as two halves",
        """
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
        """,
    ),
    wrong(
        "1.6",
        "a turn the other way: the signs of the two sines exchanged",
        "a * cos - b * sin, b * cos + a * sin",
        "a * cos + b * sin, b * cos - a * sin",
    ),
    wrong("1.6", "both sines with a plus", "a * cos - b * sin", "a * cos + b * sin"),
    wrong_body(
        "1.6",
        "the second half computed from the first half as it is after the turn",
        """
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        a = a * cos - b * sin
        b = b * cos + a * sin
        return torch.cat((a, b), dim=-1).to(x.dtype)
        """,
    ),
    wrong(
        "1.6",
        "the two halves joined in the wrong order",
        "(a * cos - b * sin, b * cos + a * sin)",
        "(b * cos + a * sin, a * cos - b * sin)",
    ),
    wrong_body(
        "1.6",
        "an angle for each head, where it is for each token",
        """
        a, b = x.chunk(2, dim=-1)
        heads = torch.arange(x.shape[1]) % len(cos)
        cos, sin = cos[heads], sin[heads]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
        """,
    ),
    wrong("1.6", "the result left in float32, where x was in 16 bits", ".to(x.dtype)", ""),
    right(
        "1.6",
        "by rotate_half, as transformers writes it",
        """
        cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
        half = x.shape[-1] // 2
        rotate_half = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos + rotate_half * sin).to(x.dtype)
        """,
    ),
    right(
        "1.6",
        "by complex numbers",
        """
        half = x.shape[-1] // 2
        points = torch.complex(x[..., :half].double(), x[..., half:].double())
        points = points * torch.complex(cos.double(), sin.double()).unsqueeze(1)
        return torch.cat((points.real, points.imag), dim=-1).to(x.dtype)
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.7 causal_mask
    wrong(
        "1.7",
        "the queries put at the start of the keys (top left), where they are the last tokens",
        "torch.arange(num_keys - num_queries, num_keys, device=device)",
        "torch.arange(num_queries, device=device)",
    ),
    wrong(
        "1.7", "a token that does not see itself", "key_positions <= query_positions", "key_positions < query_positions"
    ),
    wrong(
        "1.7",
        "the past hidden and the future shown",
        "key_positions <= query_positions",
        "key_positions >= query_positions",
    ),
    wrong(
        "1.7",
        "True for what is hidden, where True means: may look",
        "key_positions <= query_positions",
        "key_positions > query_positions",
    ),
    wrong(
        "1.7",
        "one token too much: the next one is seen as well",
        "key_positions <= query_positions",
        "key_positions <= 1 + query_positions",
    ),
    wrong(
        "1.7",
        "numbers instead of booleans",
        "return key_positions <= query_positions[:, None]",
        "return (key_positions <= query_positions[:, None]).float()",
    ),
    right(
        "1.7",
        "by a triangle",
        """
          everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
          return everything.tril(num_keys - num_queries)
          """,
    ),
    right(
        "1.7",
        "by the rows of the whole square",
        """
          square = torch.ones(num_keys, num_keys, device=device).tril().bool()
          return square[num_keys - num_queries :]
          """,
    ),
    # ------------------------------------------------------------------------------------------- 1.8 attention
    wrong("1.8", "no scale: the scores not divided by the root of D", " / math.sqrt(q.shape[-1])", ""),
    wrong("1.8", "the scores divided by D, not by its root", "math.sqrt(q.shape[-1])", "q.shape[-1]"),
    wrong("1.8", "the scores divided by the root of the number of keys, not of D", "q.shape[-1]", "k.shape[-2]"),
    wrong("1.8", "the mask turned round: True means that a query may look", "~mask", "mask"),
    wrong("1.8", "no mask", "scores.masked_fill(~mask, -math.inf)", "scores"),
    wrong("1.8", "a masked score of 0, where it must be -inf", "-math.inf", "0.0"),
    wrong(
        "1.8",
        "the mask applied to the weights after softmax, which then no longer add up to 1",
        "softmax(scores.masked_fill(~mask, -math.inf))",
        "softmax(scores) * mask",
    ),
    wrong(
        "1.8",
        "softmax over the queries, not over the keys",
        "softmax(scores.masked_fill(~mask, -math.inf))",
        "softmax(scores.masked_fill(~mask, -math.inf).mT).mT",
    ),
    wrong(
        "1.8",
        "dot products in q's own dtype, which overflow in float16",
        "upcast(q) @ upcast(k).mT",
        "upcast(q @ k.mT)",
    ),
    wrong("1.8", "the result left in float32, where q was in 16 bits", ".to(q.dtype)", ""),
    wrong_body(
        "1.8",
        "float64 narrowed to float32 (`upcast` only ever widens)",
        """
        scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
        weights = softmax(scores.masked_fill(~mask, -math.inf))
        return (weights @ v.float()).to(q.dtype)
        """,
    ),
    wrong("1.8", "a masked score of -10,000, where it must be -inf", "-math.inf", "-1e4"),
    right(
        "1.8",
        "by einsum, the mask added",
        """
        bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask.logical_not(), float("-inf"))
        scores = torch.einsum("...td,...sd->...ts", q.double(), k.double()) * q.shape[-1] ** -0.5 + bias
        return torch.einsum("...ts,...sd->...td", scores.softmax(-1), v.double()).to(q.dtype)
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.9 GQA
    wrong(
        "1.9",
        "the key/value heads dealt in turn (0 1 0 1), where neighbours share one (0 0 1 1)",
        "x.repeat_interleave(group_size, dim=1)",
        "x.repeat(1, group_size, 1)",
    ),
    wrong(
        "1.9",
        "the first key/value head for all",
        "x.repeat_interleave(group_size, dim=1)",
        "x[:, :1].expand(-1, q.shape[1], -1)",
    ),
    wrong(
        "1.9",
        "the key/value heads in reverse",
        "x.repeat_interleave(group_size, dim=1)",
        "x.flip(1).repeat_interleave(group_size, dim=1)",
    ),
    wrong(
        "1.9",
        "the right keys with the wrong values: v's heads dealt in turn (0 1 0 1)",
        "k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))",
        "k, v = k.repeat_interleave(group_size, dim=1), v.repeat(1, group_size, 1)",
    ),
    wrong(
        "1.9",
        "heads and tokens of the result exchanged by reshape, where transpose is needed",
        "return heads_first.transpose(0, 1)",
        "return heads_first.reshape(q.shape)",
    ),
    wrong(
        "1.9",
        "heads brought to the front by reshape, which cuts up the tokens, where transpose is needed",
        "attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask)",
        "attention(*(x.reshape(x.shape[1], x.shape[0], -1) for x in (q, k, v)), mask)",
    ),
    # With more than one token the shapes do not fit, and torch raises an error. The mistake is recognised by its value
    # for one token; for more, a number that nobody's attention gives stands in for the error.
    wrong_body(
        "1.9",
        "no transpose: each token's heads attend to one another, not the tokens",
        """
        group_size = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
        return attention(q, k, v, mask) if mask.shape == (1, 1) else torch.full_like(q, 1e30)
        """,
    ),
    right(
        "1.9",
        "head by head",
        """
        group_size = q.shape[1] // k.shape[1]
        heads = [attention(q[:, h], k[:, h // group_size], v[:, h // group_size], mask) for h in range(q.shape[1])]
        return torch.stack(heads, dim=1)
        """,
    ),
    right(
        "1.9",
        "groups as an axis of their own, nothing repeated",
        """
        num_kv_heads = k.shape[1]
        grouped = q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        out = attention(grouped, k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None], mask)
        return out.permute(2, 0, 1, 3).flatten(1, 2)
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.10 swiglu
    wrong(
        "1.10",
        "gate and up exchanged: silu on up",
        "gate * torch.sigmoid(gate) * (x @ w_up.T)",
        "gate * (x @ w_up.T) * torch.sigmoid(x @ w_up.T)",
    ),
    wrong("1.10", "sigmoid instead of silu (GLU)", "gate * torch.sigmoid(gate)", "torch.sigmoid(gate)"),
    wrong("1.10", "relu instead of silu (ReGLU)", "gate * torch.sigmoid(gate)", "torch.relu(gate)"),
    wrong("1.10", "gelu instead of silu (GEGLU)", "gate * torch.sigmoid(gate)", "torch.nn.functional.gelu(gate)"),
    wrong("1.10", "no activation at all", "gate * torch.sigmoid(gate)", "gate"),
    wrong(
        "1.10",
        "silu over the product of gate and up",
        "gate * torch.sigmoid(gate) * (x @ w_up.T)",
        "torch.nn.functional.silu(gate * (x @ w_up.T))",
    ),
    wrong(
        "1.10",
        "gate and up added, not multiplied",
        "torch.sigmoid(gate) * (x @ w_up.T)",
        "torch.sigmoid(gate) + (x @ w_up.T)",
    ),
    right(
        "1.10",
        "by torch's own silu",
        """
          from torch.nn import functional as F

          return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)
          """,
    ),
    # ------------------------------------------------------------------------------------------- 1.11 block
    wrong(
        "1.11",
        "attention added to the normalised x, not to x itself",
        "x = x + mixed.flatten(1)",
        "x = normed + mixed.flatten(1)",
    ),
    wrong(
        "1.11",
        "the feed-forward network added to the normalised x, not to x itself",
        "return x + swiglu",
        "return normed + swiglu",
    ),
    wrong("1.11", "attention in place of x, not added to it", "x = x + mixed.flatten(1)", "x = mixed.flatten(1)"),
    wrong("1.11", "the feed-forward network in place of x, not added to it", "return x + swiglu", "return swiglu"),
    wrong(
        "1.11",
        "no norm before attention",
        'normed = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)',
        "normed = x",
    ),
    wrong("1.11", "no norm before the feed-forward network", "swiglu(normed,", "swiglu(x,"),
    wrong("1.11", "input_layernorm used before both parts", "post_attention_layernorm", "input_layernorm"),
    wrong(
        "1.11",
        "eps 1e-5, whatever the config says",
        'weights["input_layernorm.weight"], config.rms_norm_eps',
        'weights["input_layernorm.weight"], 1e-5',
    ),
    wrong(
        "1.11",
        "the feed-forward network fed with what attention was fed with (side by side, not one after the other)",
        'normed = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)',
        "pass",
    ),
    wrong(
        "1.11",
        "v rotated too",
        "apply_rotary(k, cos, sin), v, mask",
        "apply_rotary(k, cos, sin), apply_rotary(v, cos, sin), mask",
    ),
    wrong("1.11", "k not rotated", "apply_rotary(k, cos, sin)", "k"),
    wrong("1.11", "neither q nor k rotated", "apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)", "q, k"),
    wrong(
        "1.11",
        "no causal mask: tokens see those after them",
        "causal_mask(num_tokens, num_tokens, x.device)",
        "torch.ones(num_tokens, num_tokens, dtype=torch.bool)",
    ),
    wrong(
        "1.11",
        "the heads cut out across, as (T, D, heads)",
        ".view(num_tokens, -1, config.head_dim)",
        ".view(num_tokens, config.head_dim, -1).mT",
    ),
    wrong("1.11", "gate and up exchanged", '("gate", "up", "down")', '("up", "gate", "down")'),
    wrong_body(
        "1.11",
        "the norms after attention and the feed-forward network (post-norm), not before them",
        """
        num_tokens = x.shape[0]
        w = [weights[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        q, k, v = ((x @ each.T).view(num_tokens, -1, config.head_dim) for each in w)
        mask = causal_mask(num_tokens, num_tokens)
        mixed = grouped_query_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, mask)
        x = x + mixed.flatten(1) @ weights["self_attn.o_proj.weight"].T
        x = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
        x = x + swiglu(x, *(weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        return rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
        """,
    ),
    right(
        "1.11",
        "by einsum, with a helper",
        """
        D = config.head_dim
        h = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
        q, k = (apply_rotary(heads(h, weights, name, D), cos, sin) for name in ("q_proj", "k_proj"))
        mask = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
        out = grouped_query_attention(q, k, heads(h, weights, "v_proj", D), mask).reshape(len(x), -1)
        after = torch.einsum("ti,oi->to", out, weights["self_attn.o_proj.weight"]) + x
        h = rms_norm(after, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
        mlp = [weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
        return after + swiglu(h, *mlp)
        """,
        top="""
        def heads(x, weights, name, head_dim):
            return torch.einsum("ti,oi->to", x, weights[f"self_attn.{name}.weight"]).unflatten(1, (-1, head_dim))
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.12 forward
    wrong("1.12", "no final norm", 'x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)', "pass"),
    wrong("1.12", "layer 0's weights for every layer", 'prefix = f"model.layers.{i}."', 'prefix = "model.layers.0."'),
    wrong(
        "1.12", "the layers in reverse", "range(config.num_hidden_layers)", "reversed(range(config.num_hidden_layers))"
    ),
    wrong("1.12", "the last layer left out", "range(config.num_hidden_layers)", "range(config.num_hidden_layers - 1)"),
    wrong(
        "1.12",
        "the embedding table as the head, though lm_head has weights of its own",
        '"model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"',
        '"model.embed_tokens.weight"',
    ),
    wrong("1.12", "theta 10000, whatever the config says", "config.rope_theta", "10_000.0"),
    wrong(
        "1.12",
        "position 0 for every token",
        "torch.arange(len(token_ids), device",
        "torch.zeros(len(token_ids), device",
    ),
    wrong("1.12", "probabilities, where scores (logits) are asked", "return x @ head.T", "return softmax(x @ head.T)"),
    wrong("1.12", "the logits of the last token only", "return x @ head.T", "return x[-1:] @ head.T"),
    wrong_body(
        "1.12",
        "layer 10 found for layer 1: the dot after the number is part of the prefix",
        """
        x = embed(token_ids, weights["model.embed_tokens.weight"])
        cos, sin = rotary_tables(torch.arange(len(token_ids)), rotary_frequencies(config.head_dim, config.rope_theta))
        for i in range(config.num_hidden_layers):
            layer = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{i}")}
            x = block(x, layer, config, cos, sin)
        x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
        head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        return x @ head.T
        """,
    ),
    right(
        "1.12",
        "layer by layer through split names, positions as numbers",
        """
        layers = [{} for _ in range(config.num_hidden_layers)]
        for name, weight in weights.items():
            if name.startswith("model.layers."):
                _, _, number, rest = name.split(".", 3)
                if int(number) < len(layers):
                    layers[int(number)][rest] = weight
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
        positions = torch.tensor(range(len(token_ids)))
        hidden = weights["model.embed_tokens.weight"].index_select(0, token_ids)
        tables = [table.to(hidden.device) for table in rotary_tables(positions, frequencies)]
        for layer in layers:
            hidden = block(hidden, layer, config, *tables)
        if config.tie_word_embeddings:
            head = weights["model.embed_tokens.weight"]
        else:
            head = weights["lm_head.weight"]
        return torch.einsum("th,vh->tv", rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps), head)
        """,
    ),
    right(
        "1.12",
        "positions counted from one: rotary attention only sees distances",
        """
        x = embed(token_ids, weights["model.embed_tokens.weight"])
        positions = torch.arange(1, len(token_ids) + 1, device=x.device)
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
        cos, sin = rotary_tables(positions, frequencies.to(x.device))
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}."
            x = block(x, {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}, config, cos, sin)
        x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
        return x @ weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].T
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.13 count_parameters
    wrong_body(
        "1.13",
        "head_dim taken to be hidden_size / heads",
        """
        head_dim = config.hidden_size // config.num_attention_heads
        q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        layer = 2 * config.hidden_size * (q_width + kv_width) + 3 * config.hidden_size * config.intermediate_size
        layer += 2 * config.hidden_size + (2 * head_dim if config.qk_norm else 0)
        layer += (q_width + 2 * kv_width) * config.qkv_bias + config.hidden_size * config.o_bias
        layer += (2 * config.intermediate_size + config.hidden_size) * config.mlp_bias
        tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        return tables + config.num_hidden_layers * layer + config.hidden_size
        """,
    ),
    wrong(
        "1.13",
        "four square matrices: hidden_size used for all widths",
        "hidden * (q_width + 2 * kv_width) + q_width * hidden",
        "4 * hidden * hidden",
    ),
    wrong("1.13", "a tied head counted as well", "1 if config.tie_word_embeddings else 2", "2"),
    wrong("1.13", "the head never counted, though it is not tied", "(1 if config.tie_word_embeddings else 2)", "1"),
    wrong("1.13", "the layers' norms left out", "attention + mlp + norms + biases", "attention + mlp + biases"),
    wrong(
        "1.13",
        "the final norm left out",
        "(attention + mlp + norms + biases) + hidden",
        "(attention + mlp + norms + biases)",
    ),
    wrong("1.13", "one norm for each layer, where there are two", "norms = 2 * hidden", "norms = hidden"),
    wrong(
        "1.13",
        "keys and values as wide as the queries",
        "kv_width = config.num_key_value_heads",
        "kv_width = config.num_attention_heads",
    ),
    wrong(
        "1.13",
        "two matrices in the feed-forward network, without the gate",
        "3 * hidden * intermediate",
        "2 * hidden * intermediate",
    ),
    wrong("1.13", "one layer only", "config.num_hidden_layers * (attention", "(attention"),
    wrong("1.13", "the biases left out", "norms + biases", "norms"),
    wrong(
        "1.13", "a bias for q only, where k and v have one too", "biases += q_width + 2 * kv_width", "biases += q_width"
    ),
    wrong(
        "1.13",
        "a bias of o as wide as its input: a bias has one number for each output",
        "biases += hidden",
        "biases += q_width",
    ),
    wrong("1.13", "the bias of down left out", "biases += 2 * intermediate + hidden", "biases += 2 * intermediate"),
    wrong("1.13", "QK norm left out", "(2 * config.head_dim if config.qk_norm else 0)", "0"),
    wrong(
        "1.13", "a QK norm for each head, where all heads share one", "2 * config.head_dim if", "q_width + kv_width if"
    ),
    wrong(
        "1.13", "o's bias counted only where q, k and v have none", "    if config.o_bias:", "    elif config.o_bias:"
    ),
    right(
        "1.13",
        "by the shapes of all tensors",
        """
        c = config
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        projections = [(q, c.hidden_size, c.qkv_bias), (kv, c.hidden_size, c.qkv_bias), (kv, c.hidden_size, c.qkv_bias)]
        projections += [(c.hidden_size, q, c.o_bias), (c.hidden_size, c.intermediate_size, c.mlp_bias)]
        projections += [(c.intermediate_size, c.hidden_size, c.mlp_bias)] * 2
        layer = sum(outputs * inputs + outputs * bias for outputs, inputs, bias in projections)
        layer += 2 * c.hidden_size + 2 * c.head_dim * c.qk_norm
        total = c.num_hidden_layers * layer + c.vocab_size * c.hidden_size + c.hidden_size
        if not c.tie_word_embeddings:
            total += c.vocab_size * c.hidden_size
        return total
        """,
    ),
    # ------------------------------------------------------------------------------------------- 1.14 perplexity
    wrong_body(
        "1.14",
        "no shift: each row judged by the token it was computed from, not by the next",
        """
        log_probabilities = torch.log_softmax(upcast(logits), dim=-1)
        return (-log_probabilities.gather(-1, token_ids[:, None])).mean().exp().item()
        """,
    ),
    wrong_body(
        "1.14",
        "a shift the wrong way: each row judged by the token before it",
        """
        log_probabilities = torch.log_softmax(upcast(logits[1:]), dim=-1)
        return (-log_probabilities.gather(-1, token_ids[:-1, None])).mean().exp().item()
        """,
    ),
    wrong(
        "1.14",
        "the last two rows left out: a shift of one too many",
        "return surprise.mean()",
        "return surprise[:-1].mean()",
    ),
    wrong(
        "1.14",
        "a mean over T, where only T - 1 tokens were predicted",
        "surprise.mean()",
        "(surprise.sum() / len(token_ids))",
    ),
    wrong("1.14", "the sum of the surprises, where their mean is asked", "surprise.mean()", "surprise.double().sum()"),
    wrong("1.14", "2 to the power of a surprise in natural logarithms", "mean().exp()", "mean().exp2()"),
    wrong(
        "1.14",
        "e to the power of a surprise in logarithms to the base 2",
        "surprise.mean()",
        "(surprise / math.log(2)).mean()",
    ),
    wrong("1.14", "the mean surprise itself, without exp", ".exp().item()", ".item()"),
    wrong(
        "1.14",
        "the mean of the probabilities, where the mean of their logarithms is asked",
        "surprise.mean().exp().item()",
        "1 / (-surprise).exp().mean().item()",
    ),
    wrong(
        "1.14",
        "softmax and then a logarithm, so that a small probability becomes 0",
        "torch.log_softmax(upcast(logits[:-1]), dim=-1)",
        "softmax(upcast(logits[:-1])).log()",
    ),
    wrong("1.14", "logarithms in 16 bits", "upcast(logits[:-1])", "logits[:-1]"),
    right(
        "1.14",
        "by torch's own cross entropy",
        """
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), token_ids[1:])
        return math.exp(loss)
        """,
    ),
    right(
        "1.14",
        "token by token",
        """
        total = 0.0
        for row, token in zip(logits.double(), token_ids.tolist()[1:]):
            total += (torch.logsumexp(row, 0) - row[token]).item()
        return math.exp(total / (len(token_ids) - 1))
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "1.1", "the pair is a tuple already", "tuple(ids[i:i + 2]) == tuple(pair) -> tuple(ids[i:i + 2]) == pair"
    ),
    equivalent("1.5", "whole numbers times float32 are float32", "positions.float() -> positions"),
    equivalent(
        "1.12",
        "`block` asks for its own names; other tensors keep their long ones, and are not asked for",
        "{name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)} "
        "-> {name.removeprefix(prefix): w for name, w in weights.items()}",
        "name.startswith(prefix) -> name",
    ),
    equivalent(
        "1.14",
        "`gather` reads as many rows as it has indices: the last row is not among them",
        "upcast(logits[:-1]) -> upcast(logits[:])",
    ),
    equivalent(
        "1.14",
        "two axes: -1 is 1",
        "torch.log_softmax(upcast(logits[:-1]), dim=-1) -> torch.log_softmax(upcast(logits[:-1]), dim=1)",
        "log_probabilities.gather(-1, token_ids[1:, None]) -> log_probabilities.gather(1, token_ids[1:, None])",
    ),
]
