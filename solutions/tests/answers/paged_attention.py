"""Lesson 4: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import equivalent, planted, right, wrong, wrong_body

ANSWERS = [
    # ----------------------------------------------------------------------------------------------- 4.1 hash_block
    wrong("4.1", "the parent left out of the digest", "before + text", "text"),
    wrong("4.1", "the digits of the tokens run together: 1, 23 and 12, 3 are the same", '" ".join', '"".join'),
    wrong("4.1", "the order of the tokens lost", "map(str, token_ids)", "map(str, sorted(token_ids))"),
    wrong(
        "4.1",
        "only the parent's tokens in the digest, not all that came before",
        "hashlib.blake2b(before + text",
        "hashlib.blake2b(str(parent and parent.token_ids).encode() + text",
    ),
    wrong("4.1", "the parent field left empty", ".digest(), before,", '.digest(), b"",'),
    wrong(
        "4.1",
        "each token id squeezed into one byte",
        '" ".join(map(str, token_ids)).encode()',
        "bytes(token_ids)",
        recognised=False,
    ),
    wrong(
        "4.1",
        "each token id squeezed into one byte, what is above 255 cut off",
        '" ".join(map(str, token_ids)).encode()',
        "bytes(token_id % 256 for token_id in token_ids)",
    ),
    wrong(
        "4.1",
        "each token id squeezed into two bytes",
        '" ".join(map(str, token_ids)).encode()',
        'b"".join(token_id.to_bytes(2, "big") for token_id in token_ids)',
        recognised=False,
    ),
    wrong("4.1", "a digest of blake2b's own length, 64 bytes", ", digest_size=16", ""),
    right(
        "4.1",
        "fed to the digest token by token, as bytes of fixed width",
        """
        digest = hashlib.blake2b(digest_size=16)
        if parent is not None:
            digest.update(parent.value)
        for token_id in token_ids:
            digest.update(int(token_id).to_bytes(8, "little"))
        return BlockHash(digest.digest(), b"" if parent is None else parent.value, tuple(token_ids))
        """,
    ),
    # -------------------------------------------------------------------------------- 4.2 BlockPool.get_new_blocks
    wrong("4.2", "the newest free block first", "last=False", "last=True"),
    wrong("4.2", "what the block held can still be found", "self.forget(block)", "pass"),
    wrong(
        "4.2",
        "the hash taken off the block, its entry left in `cached`",
        "self.forget(block)",
        "block.block_hash = None",
    ),
    wrong(
        "4.2",
        "as many blocks as are free, and no error, where more were asked for",
        'raise ValueError(f"{num_blocks} blocks requested, {len(self.free)} of {len(self.blocks)} are free.")',
        "num_blocks = len(self.free)",
    ),
    wrong_body(
        "4.2",
        "blocks without a hash handed out first, whatever the order in which they became free",
        """
        if num_blocks > len(self.free):
            raise ValueError("not enough blocks are free")
        blocks = sorted(self.free.values(), key=lambda block: block.block_hash is not None)[:num_blocks]
        for block in blocks:
            del self.free[block.block_id]
            self.forget(block)
            block.ref_cnt = 1
        return blocks
        """,
    ),
    wrong_body(
        "4.2",
        "blocks taken one by one until none is left, and only then the error",
        """
        blocks = []
        for _ in range(num_blocks):
            if not self.free:
                raise ValueError("no block is free")
            block = self.free.popitem(last=False)[1]
            self.forget(block)
            block.ref_cnt = 1
            blocks.append(block)
        return blocks
        """,
    ),
    right(
        "4.2",
        "by the first keys of `free`",
        """
        if len(self.free) < num_blocks:
            raise ValueError(f"only {len(self.free)} blocks are free")
        taken = []
        for block_id in list(self.free)[:num_blocks]:
            block = self.free.pop(block_id)
            if block.block_hash is not None:
                self.cached.pop(block.block_hash.value)
                block.block_hash = None
            block.ref_cnt += 1
            taken.append(block)
        return taken
        """,
    ),
    # ----------------------------------------------------------------------------------- 4.3 BlockPool.free_blocks
    wrong("4.3", "a block freed although another sequence still holds it", "if block.ref_cnt == 0:", "if True:"),
    wrong("4.3", "ref_cnt set to 0, not decremented", "block.ref_cnt -= 1", "block.ref_cnt = 0"),
    wrong("4.3", "the blocks freed in reverse order", "for block in blocks:", "for block in reversed(list(blocks)):"),
    wrong(
        "4.3",
        "the hash forgotten when the block becomes free",
        "self.free[block.block_id] = block",
        "self.forget(block)\n                self.free[block.block_id] = block",
    ),
    wrong(
        "4.3",
        "freed blocks put first among the free ones, as the oldest",
        "self.free[block.block_id] = block",
        "self.free[block.block_id] = block\n                self.free.move_to_end(block.block_id, last=False)",
    ),
    wrong(
        "4.3", "blocks freed in the order of their ids", "in blocks:", "in sorted(blocks, key=lambda b: b.block_id):"
    ),
    wrong(
        "4.3",
        "no error for a block whose ref_cnt is 0 already",
        'raise ValueError(f"Block {block.block_id} is free already.")',
        "pass",
    ),
    right(
        "4.3",
        "counted first, joined afterwards",
        """
        given = list(blocks)
        for block in given:
            if not block.ref_cnt:
                raise ValueError(f"nobody holds block {block.block_id}")
            block.ref_cnt = block.ref_cnt - 1
        self.free.update((block.block_id, block) for block in given if block.ref_cnt == 0)
        """,
    ),
    # --------------------------------------------------------------------- 4.4 KVCacheManager.get_computed_blocks
    wrong(
        "4.4",
        "the whole prompt found, so that nothing is left to compute",
        "(len(request.all_token_ids) - 1) // self.block_size",
        "len(request.all_token_ids) // self.block_size",
    ),
    wrong(
        "4.4",
        "the last full block always left out, not only where it holds the last token",
        "(len(request.all_token_ids) - 1) // self.block_size",
        "max(0, len(request.all_token_ids) // self.block_size - 1)",
    ),
    wrong("4.4", "later blocks found without those before them", "break", "continue"),
    wrong(
        "4.4",
        "looked up by the hash's value alone, so that a collision is a hit",
        "self.pool.find(block_hash)",
        "self.pool.cached.get(block_hash.value)",
    ),
    wrong("4.4", "blocks counted instead of tokens", "len(blocks) * self.block_size", "len(blocks)"),
    wrong(
        "4.4",
        "the ref_cnt of the blocks incremented, which is allocate_slots' part",
        "return blocks, len(blocks) * self.block_size",
        "self.pool.touch(blocks)\n        return blocks, len(blocks) * self.block_size",
    ),
    wrong(
        "4.4",
        "only blocks that a sequence holds, not those that are free and still cached",
        "if block is None:",
        "if block is None or block.ref_cnt == 0:",
    ),
    right(
        "4.4",
        "enable_prefix_caching not asked for: where it is false, cache_blocks has entered nothing",
        """
        blocks = []
        for block_hash in self.hashes(request, (len(request.all_token_ids) - 1) // self.block_size):
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks, len(blocks) * self.block_size
        """,
    ),
    right(
        "4.4",
        "with a while loop, one key at a time",
        """
        found = []
        while self.enable_prefix_caching and (len(found) + 1) * self.block_size < len(request.all_token_ids):
            block = self.pool.find(self.hashes(request, len(found) + 1)[-1])
            if block is None:
                break
            found += [block]
        return found, self.block_size * len(found)
        """,
    ),
    # ---------------------------------------------------------------------------- 4.5 KVCacheManager.cache_blocks
    wrong(
        "4.5",
        "all computed tokens taken for verified ones",
        "num_verified_tokens // self.block_size",
        "request.num_computed_tokens // self.block_size",
    ),
    wrong(
        "4.5",
        "a partly filled block given a hash",
        "num_verified_tokens // self.block_size",
        "cdiv(num_verified_tokens, self.block_size)",
    ),
    wrong("4.5", "enable_prefix_caching ignored", "if not self.enable_prefix_caching:", "if False:"),
    wrong(
        "4.5",
        "each block hashed as if it were the first",
        "self.hashes(request, num_verified_tokens // self.block_size)",
        "[\n            hash_block(None, request.all_token_ids[i : i + self.block_size])\n"
        "            for i in range(0, num_verified_tokens - self.block_size + 1, self.block_size)\n        ]",
    ),
    wrong(
        "4.5",
        "hashes of draft tokens computed and kept, so that they are wrong later",
        "self.hashes(request, num_verified_tokens // self.block_size)",
        "self.hashes(request, len(request.all_token_ids) // self.block_size)[: num_verified_tokens // self.block_size]",
    ),
    wrong(
        "4.5",
        "a cached block replaced by another with the same content",
        "self.pool.remember(block, block_hash)",
        "self.pool.cached[block_hash.value], block.block_hash = block, block_hash",
    ),
    wrong(
        "4.5",
        "the loop ended at the first block whose content another block has cached already",
        "            if block.block_hash is None:\n",
        "            if self.pool.find(block_hash) not in (None, block):\n                break\n"
        "            if block.block_hash is None:\n",
    ),
    wrong(
        "4.5",
        "the loop ended at the first block that has a hash already",
        "            if block.block_hash is None:\n",
        "            if block.block_hash is not None:\n                break\n            else:\n",
    ),
    wrong(
        "4.5",
        "only the last full block entered",
        "zip(self.block_tables[request.request_id], block_hashes)",
        "list(zip(self.block_tables[request.request_id], block_hashes))[-1:]",
    ),
    wrong(
        "4.5",
        "blocks entered that the window has passed, whose content is gone",
        "            if block.block_hash is None:\n                self.pool.remember(block, block_hash)",
        "            self.pool.remember(block, block_hash)",
    ),
    wrong(
        "4.5",
        "all tokens of the sequence, computed or not",
        "num_verified_tokens // self.block_size",
        "len(request.all_token_ids) // self.block_size",
    ),
    right(
        "4.5",
        "by the places of the table",
        """
        num_full = num_verified_tokens // self.block_size if self.enable_prefix_caching else 0
        table = self.block_tables.get(request.request_id, [])
        for place in range(num_full):
            if table[place].block_hash is None:
                self.pool.remember(table[place], self.hashes(request, num_full)[place])
        """,
    ),
    # -------------------------------------------------------------------------- 4.6 KVCacheManager.allocate_slots
    wrong(
        "4.6",
        "the computed tokens left out of the count",
        "request.num_computed_tokens + num_new_tokens + num_lookahead_tokens",
        "num_new_tokens + num_lookahead_tokens",
    ),
    wrong(
        "4.6", "no slots for draft tokens", "num_new_tokens + num_lookahead_tokens", "num_new_tokens", recognised=False
    ),
    wrong(
        "4.6",
        "no slots for draft tokens where there is no new token",
        "num_new_tokens + num_lookahead_tokens",
        "num_new_tokens + (num_lookahead_tokens if num_new_tokens else 0)",
    ),
    wrong(
        "4.6",
        "num_computed_tokens counted up: slots are reserved here, and computed later",
        "return new_blocks",
        "request.num_computed_tokens += num_new_tokens\n        return new_blocks",
    ),
    wrong(
        "4.6",
        "a block too few where the last is not full",
        "cdiv(num_tokens, self.block_size)",
        "num_tokens // self.block_size",
    ),
    wrong(
        "4.6",
        "blocks of the table that are not needed counted as if they were free",
        "max(0, cdiv(num_tokens, self.block_size) - len(table) - len(computed_blocks))",
        "cdiv(num_tokens, self.block_size) - len(table) - len(computed_blocks)",
        recognised=False,
    ),
    wrong("4.6", "the blocks in the table not subtracted", " - len(table) - len(computed", " - len(computed"),
    wrong(
        "4.6",
        "the computed blocks not subtracted, so that new blocks are taken for them too",
        " - len(table) - len(computed_blocks)",
        " - len(table)",
    ),
    wrong(
        "4.6",
        "computed blocks with ref_cnt 0 counted among the free blocks that can be taken",
        "self.pool.num_free_blocks - unheld",
        "self.pool.num_free_blocks",
        recognised=False,
    ),
    wrong(
        "4.6",
        "computed blocks that other sequences hold counted as if they were free",
        "sum(block.ref_cnt == 0 for block in computed_blocks)",
        "len(computed_blocks)",
        recognised=False,
    ),
    wrong(
        "4.6",
        "the computed blocks returned too, which are not new",
        "return new_blocks",
        "return [*computed_blocks, *new_blocks]",
    ),
    wrong(
        "4.6",
        "no block counted for the copies of shared blocks",
        "num_missing + len(shared) > self",
        "num_missing > self",
        recognised=False,
    ),
    wrong("4.6", "shared blocks written without a copy", "self.copy_on_write(request, shared)", "pass"),
    wrong("4.6", "the ref_cnt of the computed blocks not incremented", "self.pool.touch(computed_blocks)", "pass"),
    wrong_body(
        "4.6",
        "new blocks taken before the computed ones are touched, so that one of those is taken as new",
        """
        table = self.block_tables.get(request.request_id, [])
        num_tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        num_missing = max(0, cdiv(num_tokens, self.block_size) - len(table) - len(computed_blocks))
        shared = self.shared_blocks(request)
        unheld = sum(block.ref_cnt == 0 for block in computed_blocks)
        if num_missing + len(shared) > self.pool.num_free_blocks - unheld:
            return None
        new_blocks = self.pool.get_new_blocks(num_missing)
        self.pool.touch(computed_blocks)
        self.copy_on_write(request, shared)
        self.block_tables[request.request_id] = [*table, *computed_blocks, *new_blocks]
        return new_blocks
        """,
    ),
    wrong_body(
        "4.6",
        "blocks taken one at a time, and not given back when the pool runs out",
        """
        table = self.block_tables.setdefault(request.request_id, [])
        self.pool.touch(computed_blocks)
        table.extend(computed_blocks)
        shared, new_blocks = self.shared_blocks(request), []
        if len(shared) > self.pool.num_free_blocks:
            return None
        self.copy_on_write(request, shared)
        num_tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        while len(table) * self.block_size < num_tokens:
            if not self.pool.free:
                return None
            new_blocks += self.pool.get_new_blocks(1)
            table.append(new_blocks[-1])
        return new_blocks
        """,
    ),
    wrong(
        "4.6",
        "the copy on write undone: the table from before it is stored",
        "table = self.block_tables.get(request.request_id, [])",
        "table = list(self.block_tables.get(request.request_id, []))",
    ),
    right(
        "4.6",
        "by the number of blocks that the table will have",
        """
        table = self.block_tables.get(request.request_id, [])
        tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        wanted = (tokens + self.block_size - 1) // self.block_size
        missing = wanted - len(table) - len(computed_blocks)
        if missing < 0:
            missing = 0
        places = self.shared_blocks(request)
        free = self.pool.num_free_blocks - len([block for block in computed_blocks if not block.ref_cnt])
        if free < missing + len(places):
            return None
        self.copy_on_write(request, places)
        self.pool.touch(computed_blocks)
        new = self.pool.get_new_blocks(missing)
        self.block_tables.setdefault(request.request_id, []).extend([*computed_blocks, *new])
        return new
        """,
    ),
    # ------------------------------------------------------------------------------------ 4.7 KVCacheManager.fork
    wrong("4.7", "one list for both tables", "= list(blocks)", "= self.block_tables[parent.request_id]"),
    wrong("4.7", "the ref_cnt of shared blocks not incremented", "self.pool.touch(blocks)", "pass"),
    wrong(
        "4.7",
        "one list of hashes for both sequences",
        "child.num_computed_tokens = num_tokens - 1",
        "self.block_hashes[child.request_id] = self.block_hashes.setdefault(parent.request_id, [])\n"
        "        child.num_computed_tokens = num_tokens - 1",
    ),
    wrong("4.7", "the child's last token counted as computed", "num_tokens - 1", "num_tokens"),
    wrong(
        "4.7",
        "no token of the child counted as computed",
        "child.num_computed_tokens = num_tokens - 1",
        "child.num_computed_tokens = 0",
    ),
    wrong(
        "4.7",
        "all of the parent's blocks, whatever the child needs",
        "[: cdiv(num_tokens, self.block_size)]",
        "",
    ),
    wrong(
        "4.7",
        "no block for the child's last token, which it is about to compute",
        "[: cdiv(num_tokens, self.block_size)]",
        "[: cdiv(num_tokens - 1, self.block_size)]",
    ),
    wrong(
        "4.7",
        "the parent's table cut to what the child needs",
        "blocks = self.block_tables[parent.request_id][: cdiv(num_tokens, self.block_size)]",
        "del self.block_tables[parent.request_id][cdiv(num_tokens, self.block_size) :]\n"
        "        blocks = self.block_tables[parent.request_id]",
    ),
    wrong("4.7", "full blocks only", "[: cdiv(num_tokens, self.block_size)]", "[: num_tokens // self.block_size]"),
    wrong(
        "4.7",
        "no error where the parent has not computed the child's last token",
        "if parent.num_computed_tokens < num_tokens:",
        "if parent.num_computed_tokens < num_tokens - 1:",
    ),
    wrong(
        "4.7",
        "the last block copied at once, before any sequence writes to it",
        "child.num_computed_tokens = num_tokens - 1",
        "child.num_computed_tokens = num_tokens - 1\n        self.copy_on_write(child, [len(blocks) - 1])",
    ),
    right(
        "4.7",
        "block by block",
        """
        needed = len(child.all_token_ids)
        if needed > parent.num_computed_tokens:
            raise ValueError(f"{parent.request_id} has computed {parent.num_computed_tokens} tokens, not {needed}")
        table = []
        for place, block in enumerate(self.block_tables[parent.request_id]):
            if place * self.block_size < needed:
                block.ref_cnt += 1
                table.append(block)
        self.block_tables[child.request_id], child.num_computed_tokens = table, needed - 1
        """,
    ),
    # --------------------------------------------------------------------------- 4.8 KVCacheManager.copy_on_write
    wrong(
        "4.8",
        "whole blocks copied, filled or not",
        "min(self.block_size, request.num_computed_tokens - place * self.block_size)",
        "self.block_size",
    ),
    wrong(
        "4.8",
        "the tokens in earlier blocks counted too",
        "request.num_computed_tokens - place * self.block_size",
        "request.num_computed_tokens",
    ),
    wrong(
        "4.8",
        "a negative number of tokens for a block after the computed tokens",
        "if filled > 0:",
        "if filled:",
    ),
    wrong(
        "4.8",
        "source and target exchanged",
        "BlockCopy(shared.block_id, own.block_id",
        "BlockCopy(own.block_id, shared.block_id",
    ),
    wrong("4.8", "the shared block not freed", "self.pool.free_blocks([shared])", "pass"),
    wrong("4.8", "the new block not put into the table", "table[place] = own", "pass"),
    wrong("4.8", "no copy recorded", "self.copies.append(BlockCopy(shared.block_id, own.block_id, filled))", "pass"),
    wrong(
        "4.8",
        "earlier copies dropped",
        "self.copies.append(BlockCopy(shared.block_id, own.block_id, filled))",
        "self.copies = [BlockCopy(shared.block_id, own.block_id, filled)]",
    ),
    wrong(
        "4.8",
        "the hash moved to the new block",
        "table[place] = own",
        "table[place] = own\n            if shared.block_hash is not None:\n"
        "                own.block_hash = shared.block_hash\n"
        "                self.pool.cached[own.block_hash.value] = own",
    ),
    right(
        "4.8",
        "all new blocks at once",
        """
        table = self.block_tables[request.request_id]
        for place, block in zip(places, self.pool.get_new_blocks(len(places))):
            in_block = request.num_computed_tokens - place * self.block_size
            if in_block > 0:
                self.copies += [BlockCopy(table[place].block_id, block.block_id, min(in_block, self.block_size))]
            self.pool.free_blocks([table[place]])
            table[place] = block
        """,
    ),
    # ------------------------------------------------------------------------------------- 4.9 KVCacheManager.trim
    planted(
        "4.9",
        "the block that is partly filled freed too",
        "cdiv(request.num_computed_tokens, self.block_size)",
        "request.num_computed_tokens // self.block_size",
    ),
    wrong(
        "4.9",
        "always one block more than the full ones, so one too many where the last is just full",
        "cdiv(request.num_computed_tokens, self.block_size)",
        "request.num_computed_tokens // self.block_size + 1",
    ),
    wrong(
        "4.9",
        "all tokens of the sequence counted, not only the computed ones",
        "cdiv(request.num_computed_tokens, self.block_size)",
        "cdiv(len(request.all_token_ids), self.block_size)",
    ),
    wrong(
        "4.9",
        "the shortened table not stored: `table` names a new list",
        "del table[needed:]",
        "table = table[:needed]",
    ),
    wrong(
        "4.9",
        "the order of freeing reversed, which was right",
        "reversed(table[needed:])",
        "table[needed:]",
    ),
    right(
        "4.9",
        "rounded up by hand",
        """
        table = self.block_tables[request.request_id]
        needed = (request.num_computed_tokens + self.block_size - 1) // self.block_size
        while len(table) > needed:
            self.pool.free_blocks([table.pop()])
        """,
    ),
    # ---------------------------------------------------------------------------------------------- 4.10 utilisation
    wrong(
        "4.10", "full blocks only", "cdiv(length, block_size) * block_size", "length // block_size * block_size or 1"
    ),
    wrong(
        "4.10",
        "all sequences packed into the same blocks",
        "sum(cdiv(length, block_size) * block_size for length in num_tokens)",
        "cdiv(sum(num_tokens), block_size) * block_size",
    ),
    wrong(
        "4.10",
        "always one block more than the full ones, so one too many where the last is just full",
        "cdiv(length, block_size) * block_size",
        "(length // block_size + 1) * block_size",
    ),
    wrong("4.10", "the share that is empty", "return sum(num_tokens) / slots", "return 1 - sum(num_tokens) / slots"),
    wrong(
        "4.10",
        "the mean of the sequences' shares, where long ones count no more than short ones",
        "return sum(num_tokens) / slots",
        "shares = [n / (cdiv(n, block_size) * block_size) for n in num_tokens]\n    return sum(shares) / len(shares)",
    ),
    wrong(
        "4.10", "blocks counted instead of slots", "cdiv(length, block_size) * block_size", "cdiv(length, block_size)"
    ),
    right(
        "4.10",
        "by the empty slots",
        """
        stored = sum(num_tokens)
        return stored / (stored + sum(-length % block_size for length in num_tokens))
        """,
    ),
    # ---------------------------------------------------------------------------------------- 4.11 partial_attention
    wrong("4.11", "scores not divided by the root of D", " / math.sqrt(q.shape[-1])", ""),
    wrong("4.11", "scores divided by D, not by its root", "math.sqrt(q.shape[-1])", "q.shape[-1]"),
    wrong(
        "4.11",
        "a large negative score for what is masked: a row that sees nothing then sees everything",
        "-math.inf",
        "-1e9",
    ),
    wrong("4.11", "the mask turned round", "masked_fill(~mask", "masked_fill(mask"),
    wrong("4.11", "the maximum clamped at -10,000", "torch.finfo(scores.dtype).min", "-1e4"),
    wrong(
        "4.11",
        "float32, whatever dtype q has",
        "(upcast(q) @ upcast(k).mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)",
        "(q.float() @ k.float().mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)\n    v = v.float()",
    ),
    wrong(
        "4.11",
        "the division done already",
        "return Partial(maximum, weights.sum(-1), weights @ upcast(v))",
        "return Partial(maximum, weights.sum(-1), weights.softmax(-1).mul(0) @ upcast(v)\n"
        "        + weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ upcast(v))",
    ),
    wrong(
        "4.11",
        "scores not relative to the maximum, so that exp overflows",
        "(scores - maximum.clamp(min=torch.finfo(scores.dtype).min)[..., None]).exp()",
        "scores.exp()",
    ),
    wrong(
        "4.11",
        "-inf minus -inf, which is NaN, where a query sees no key",
        "maximum.clamp(min=torch.finfo(scores.dtype).min)[..., None]",
        "maximum[..., None]",
        recognised=False,
    ),
    wrong(
        "4.11",
        "the highest score of all keys, seen or not, and masked afterwards",
        ".masked_fill(~mask, -math.inf)\n    maximum = scores.amax(-1)",
        "\n    maximum = scores.amax(-1)\n    scores = scores.masked_fill(~mask, -math.inf)",
    ),
    wrong(
        "4.11",
        "products taken in 16 bits, where they overflow",
        "(upcast(q) @ upcast(k).mT / math.sqrt(q.shape[-1]))",
        "upcast(q @ k.mT / math.sqrt(q.shape[-1]))",
    ),
    right(
        "4.11",
        "the unseen set to 0 afterwards",
        """
        scores = torch.einsum("...td,...sd->...ts", upcast(q), upcast(k)) * q.shape[-1] ** -0.5
        scores = torch.where(mask, scores, -math.inf)
        highest = scores.max(-1, keepdim=True).values
        weights = torch.where(mask, torch.exp(scores - highest), 0.0)
        return Partial(highest.squeeze(-1), weights.sum(-1), torch.einsum("...ts,...sd->...td", weights, upcast(v)))
        """,
    ),
    # ------------------------------------------------------------------------------------------- 4.12 merge_partials
    wrong(
        "4.12",
        "-inf minus -inf, which is NaN, where neither has seen a key",
        "maximum.clamp(min=torch.finfo(maximum.dtype).min)",
        "maximum",
        recognised=False,
    ),
    wrong("4.12", "the lower maximum of the two", "torch.maximum(", "torch.minimum("),
    wrong("4.12", "the maximum clamped at -10,000", "torch.finfo(maximum.dtype).min", "-1e4"),
    wrong("4.12", "totals added as they are", "a.total * scale_a + b.total * scale_b", "a.total + b.total"),
    wrong(
        "4.12",
        "weighted values added as they are",
        "a.weighted * scale_a[..., None] + b.weighted * scale_b[..., None]",
        "a.weighted + b.weighted",
    ),
    wrong(
        "4.12",
        "both parts rescaled to the first one's maximum",
        "maximum = torch.maximum(a.maximum, b.maximum)",
        "maximum = a.maximum",
    ),
    wrong(
        "4.12",
        "only the first part rescaled",
        "(b.maximum - safe).exp()",
        "torch.ones_like(b.maximum)",
    ),
    wrong(
        "4.12",
        "the two scales exchanged",
        "scale_a, scale_b = ",
        "scale_b, scale_a = ",
    ),
    wrong(
        "4.12",
        "the scales inverted",
        "(a.maximum - safe).exp(), (b.maximum - safe).exp()",
        "(safe - a.maximum).clamp(max=50).exp(), (safe - b.maximum).clamp(max=50).exp()",
    ),
    right(
        "4.12",
        "NaN put out afterwards",
        """
        highest = torch.where(a.maximum > b.maximum, a.maximum, b.maximum)
        scales = [torch.exp(part.maximum - highest).nan_to_num(nan=0.0) for part in (a, b)]
        total = sum(scale * part.total for scale, part in zip(scales, (a, b)))
        weighted = sum(scale.unsqueeze(-1) * part.weighted for scale, part in zip(scales, (a, b)))
        return Partial(highest, total, weighted)
        """,
    ),
    # ---------------------------------------------------------------------------------------- 4.13 blockwise_attention
    wrong(
        "4.13",
        "a query that does not see its own key, except at position 0",
        "slots <= rows",
        "slots <= (rows - 1).clamp(min=0)",
    ),
    wrong("4.13", "no mask: queries see all keys", "slots <= rows", "slots < rows + num_keys"),
    wrong(
        "4.13",
        "each position repeated side by side, although the rows are ordered by head, then by token",
        "positions.repeat(1, group_size)",
        "positions.repeat_interleave(group_size, 1)",
    ),
    wrong(
        "4.13",
        "a mask without an axis for the K heads, so that its sequences are taken for heads",
        "[:, None, :, None]",
        "[:, :, None]",
    ),
    wrong(
        "4.13",
        "slots counted from 0 in every segment",
        "torch.arange(start, end, device=q.device)",
        "torch.arange(end - start, device=q.device)",
    ),
    wrong(
        "4.13",
        "only the last segment of which a query sees a key",
        "merge_partials(whole, part)",
        "Partial(*(torch.where((part.total > 0).view(*part.total.shape, *[1] * (x.dim() - 3)), y, x) "
        "for x, y in zip(whole, part)))",
    ),
    wrong(
        "4.13",
        "the segments' results averaged, each divided by its own sum",
        "mixed = (whole.weighted / whole.total[..., None]).to(q.dtype)",
        "parts = []\n"
        "    for start in range(0, num_keys, segment):\n"
        "        end = min(start + segment, num_keys)\n"
        "        keys, values = (x.transpose(1, 2) for x in read(start, end))\n"
        "        part = partial_attention(folded, keys, values, torch.arange(start, end) <= rows)\n"
        "        parts.append((part.weighted / part.total[..., None]).nan_to_num(0.0))\n"
        "    mixed = torch.stack(parts).mean(0).to(q.dtype)",
    ),
    wrong("4.13", "no division at the end", "(whole.weighted / whole.total[..., None])", "whole.weighted"),
    wrong(
        "4.13",
        "the last segment left out where it is not full",
        "range(0, num_keys, segment)",
        "range(0, max(1, num_keys - segment + 1), segment)",
    ),
    wrong(
        "4.13",
        "all keys read at once",
        "range(0, num_keys, segment):\n        end = min(start + segment, num_keys)",
        "range(0, num_keys, num_keys):\n        end = num_keys",
    ),
    wrong(
        "4.13",
        "a last segment read beyond num_keys",
        "end = min(start + segment, num_keys)",
        "end = start + segment\n        read(start, end)\n        end = min(end, num_keys)",
    ),
    wrong(
        "4.13",
        "the result reshaped without unfolding the heads",
        "mixed.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)",
        "mixed.reshape(q.shape)",
    ),
    right(
        "4.13",
        "query head by query head",
        """
        num_heads, out = q.shape[2], torch.empty_like(q)
        for head in range(num_heads):
            whole = None
            for start in range(0, num_keys, segment):
                keys, values = read(start, min(start + segment, num_keys))
                own = head // (num_heads // keys.shape[2])
                seen = torch.arange(start, start + keys.shape[1]).to(positions) <= positions[..., None]
                part = partial_attention(q[:, :, head], keys[:, :, own], values[:, :, own], seen)
                whole = merge_partials(part, whole) if whole else part
            out[:, :, head] = whole.weighted / whole.total.unsqueeze(-1)
        return out
        """,
    ),
    # ------------------------------------------------------------------------------------------------ 4.14 slot_mapping
    wrong("4.14", "always from position 0", "range(start, start + num_tokens)", "range(num_tokens)"),
    wrong("4.14", "num_tokens taken for the end", "range(start, start + num_tokens)", "range(start, num_tokens)"),
    wrong(
        "4.14",
        "the table left out: slots as if the blocks lay side by side",
        "block_table[p // block_size] * block_size",
        "p // block_size * block_size",
    ),
    wrong(
        "4.14",
        "a block's number taken for its first slot",
        "block_table[p // block_size] * block_size",
        "block_table[p // block_size]",
    ),
    wrong(
        "4.14",
        "neighbouring positions put into different blocks, in turn",
        "block_table[p // block_size] * block_size + p % block_size",
        "block_table[p % len(block_table)] * block_size + p // len(block_table)",
    ),
    right(
        "4.14",
        "all slots of the table, cut",
        """
        slots = [block * block_size + i for block in block_table for i in range(block_size)]
        return slots[start : start + num_tokens]
        """,
    ),
    # ------------------------------------------------------------------------------------------ 4.15 PagedKVCache.write
    wrong(
        "4.15",
        "the layer's number taken as an index, where the cache begins with a later layer",
        "layer - self.layers.start",
        "layer",
    ),
    wrong("4.15", "everything written to the cache's first layer", "layer - self.layers.start", "0"),
    wrong(
        "4.15",
        "keys and values exchanged",
        "index_copy_(0, slots, k)\n        self.values[index].flatten(0, 1).index_copy_(0, slots, v)",
        "index_copy_(0, slots, v)\n        self.values[index].flatten(0, 1).index_copy_(0, slots, k)",
    ),
    wrong("4.15", "the values forgotten", "self.values[index].flatten(0, 1).index_copy_(0, slots, v)", "pass"),
    wrong(
        "4.15",
        "written to a copy, which is then thrown away",
        "self.keys[index].flatten(0, 1).index_copy_(0, slots, k)",
        "self.keys[index].flatten(0, 1).index_copy(0, slots, k)",
    ),
    wrong(
        "4.15",
        "the slots sorted, so that they no longer belong to the tokens",
        "index = layer - self.layers.start",
        "index, slots = layer - self.layers.start, slots.sort().values",
    ),
    right(
        "4.15",
        "by block and place",
        """
        blocks, places = slots // self.block_size, slots % self.block_size
        for store, new in ((self.keys, k), (self.values, v)):
            store[layer - self.layers.start, blocks, places] = new
        """,
    ),
    # ----------------------------------------------------------------------------------------- 4.16 PagedKVCache.gather
    wrong(
        "4.16",
        "positions counted from the first block read, not from the first of the sequence",
        "low, high = start - first * self.block_size, end - first * self.block_size",
        "low, high = 0, end - start",
    ),
    wrong(
        "4.16",
        "the values taken from the keys",
        "self.values[layer - self.layers.start]):",
        "self.keys[layer - self.layers.start]):",
    ),
    wrong(
        "4.16",
        "the table left out: the first blocks of the pool",
        "block_tables[:, first:last].flatten()",
        "(torch.arange(first, last) % self.keys.shape[1]).repeat(len(block_tables))",
    ),
    wrong(
        "4.16",
        "the first sequence's table used for all",
        "block_tables[:, first:last].flatten()",
        "block_tables[:1, first:last].expand(len(block_tables), -1).flatten()",
    ),
    wrong(
        "4.16",
        "the tables flattened column by column",
        "block_tables[:, first:last].flatten()",
        "block_tables[:, first:last].T.flatten()",
    ),
    wrong(
        "4.16",
        "always the cache's first layer",
        "(self.keys[layer - self.layers.start], self.values[layer - self.layers.start])",
        "(self.keys[0], self.values[0])",
    ),
    wrong(
        "4.16",
        "all blocks of the tables read, and then cut",
        "first, last = start // self.block_size, cdiv(end, self.block_size)",
        "first, last = 0, block_tables.shape[1]",
    ),
    wrong(
        "4.16",
        "one block more than needed, where `end` is a block's end",
        "cdiv(end, self.block_size)",
        "end // self.block_size + 1",
    ),
    wrong_body(
        "4.16",
        "whole blocks copied, where a few slots of one were asked for",
        """
        first, last = start // self.block_size, cdiv(end, self.block_size)
        offset = first * self.block_size
        block_ids = block_tables[:, first:last].flatten()
        found = []
        for store in (self.keys[layer - self.layers.start], self.values[layer - self.layers.start]):
            whole = store.index_select(0, block_ids).view(len(block_tables), -1, *store.shape[2:])
            found.append(whole[:, start - offset : end - offset])
        return found[0], found[1]
        """,
    ),
    right(
        "4.16",
        "slot by slot, over the flat memory",
        """
        positions = torch.arange(start, end, device=block_tables.device)
        slots = block_tables[:, positions // self.block_size] * self.block_size + positions % self.block_size
        index = layer - self.layers.start
        return self.keys[index].flatten(0, 1)[slots], self.values[index].flatten(0, 1)[slots]
        """,
    ),
    # ----------------------------------------------------------------------------------------- 4.17 PagedKVCache.attend
    wrong_body(
        "4.17",
        "each group's keys and values written just before its own attention",
        """
        def attend(layer, q, k, v, window=None):
            mixed = torch.empty_like(q)
            for group in groups:
                rows = group.rows.flatten()
                self.write(layer, metadata.slot_mapping[rows], k[rows], v[rows])
                mixed[group.rows] = self.group_attention(layer, q[group.rows], group, window)
            return mixed

        return attend
        """,
    ),
    wrong(
        "4.17",
        "attention first, writing afterwards",
        "self.write(layer, metadata.slot_mapping, k, v)\n            mixed = torch.empty_like(q)\n"
        "            for group in groups:\n"
        "                mixed[group.rows] = self.group_attention(layer, q[group.rows], group, window)\n",
        "mixed = torch.empty_like(q)\n            for group in groups:\n"
        "                mixed[group.rows] = self.group_attention(layer, q[group.rows], group, window)\n"
        "            self.write(layer, metadata.slot_mapping, k, v)\n",
    ),
    wrong(
        "4.17",
        "the result in the order of the groups, not of the batch",
        "return mixed\n",
        "return torch.cat([mixed[group.rows].flatten(0, 1) for group in groups])\n",
    ),
    wrong(
        "4.17",
        "every layer written to and read from layer 0",
        "self.write(layer, metadata.slot_mapping, k, v)",
        "layer = 0\n            self.write(layer, metadata.slot_mapping, k, v)",
    ),
    wrong(
        "4.17",
        "the result written over the queries",
        "mixed = torch.empty_like(q)",
        "mixed = q",
    ),
    wrong("4.17", "the window not passed on", "q[group.rows], group, window)", "q[group.rows], group)"),
    wrong("4.17", "keys and values exchanged", "metadata.slot_mapping, k, v)", "metadata.slot_mapping, v, k)"),
    wrong(
        "4.17",
        "the cache's first layer read, whichever was asked for",
        "self.group_attention(layer,",
        "self.group_attention(self.layers.start,",
    ),
    wrong("4.17", "a result in float32, whatever dtype q has", "return mixed\n", "return mixed.float()\n"),
    wrong_body(
        "4.17",
        "the groups of the first batch used for every later one",
        """
        self.groups = getattr(self, "groups", groups)

        def attend(layer, q, k, v, window=None):
            self.write(layer, metadata.slot_mapping, k, v)
            mixed = torch.empty_like(q)
            for group in self.groups:
                mixed[group.rows % len(q)] = self.group_attention(layer, q[group.rows % len(q)], group, window)
            return mixed

        return attend
        """,
    ),
    right(
        "4.17",
        "collected, and put back in order",
        """
        order = torch.cat([group.rows.flatten() for group in groups])

        def answer(layer, q, k, v, window=None):
            self.write(layer, metadata.slot_mapping, k, v)
            parts = [self.group_attention(layer, q[group.rows], group, window).flatten(0, 1) for group in groups]
            return torch.cat(parts)[order.argsort()]

        return answer
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "4.1",
        "which bytes are hashed is left open, as long as other tokens are other bytes",
        "' '.join(map(str, token_ids)) -> ' _'.join(map(str, token_ids))",
    ),
    equivalent(
        "4.4",
        "where prefix caching is off, `cache_blocks` has told the pool nothing, and nothing is found",
        "if not self.enable_prefix_caching: -> if False:",
        "return ([], 0) -> pass",
    ),
    equivalent("4.6", "copies in no place are no copies", "if shared: -> if True:"),
    equivalent("4.7", "the slice of the parent's table is a new list already", "list(blocks) -> blocks"),
    equivalent(
        "4.8",
        "a copy of no slot copies nothing",
        "if filled > 0: -> if filled >= 0:",
        "if filled > 0: -> if filled > -1:",
    ),
    equivalent(
        "4.13", "values have as many heads as keys", "read(0, 1)[0] -> read(0, 1)[1]", "read(0, 1)[0] -> read(0, 1)[-1]"
    ),
    equivalent(
        "4.13",
        "the sums of a merge do not mind the order",
        "merge_partials(whole, part) -> merge_partials(part, whole)",
    ),
]
