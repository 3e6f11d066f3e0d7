"""A bridge for engines that still override `build_executor`; it goes with the last of them."""

from __future__ import annotations

from common.config import EngineConfig
from solutions.batching import Engine, Executor, LocalExecutor, ModelRunner
from solutions.kv_cache import cache_bytes
from solutions.paged_attention import PagedKVCache


class HookedEngine(Engine):
    def __init__(self, model, tokenizer, **settings):
        self.model = model
        slot_bytes = cache_bytes(model.config, 1, model.model.norm.weight.element_size())
        self.config = EngineConfig(**settings).resolve(model.config, slot_bytes)
        super().__init__(self.build_executor(), tokenizer, self.config)

    def build_executor(self) -> Executor:
        cache = PagedKVCache(self.model, self.config.num_blocks, self.config.block_size, self.config.num_host_blocks)
        return LocalExecutor(ModelRunner(self.model, cache))
