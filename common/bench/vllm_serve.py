"""vLLM's engine in a process of its own, which `make bench` starts with the Python of another environment.

It imports nothing of ours. It reads lines of JSON, {"prompts": [[token id]], "lengths": [number of tokens]}, and
answers each with {"tokens": [[token id]], "times": [[seconds since the start]]}. Its first line says that it is ready.
Its lines begin with MARK, because vLLM prints to the standard output, too.
"""

from __future__ import annotations

import json
import os
import sys
import time

MARK = "=> "


def main(folder: str, dtype: str, num_threads: str) -> None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(num_threads) - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # or a second process would go on while this one is stopped
    }
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype=dtype, enable_prefix_caching=False, skip_tokenizer_init=True, max_model_len=2048)
    engine, number = llm.llm_engine, 0
    print(MARK + "{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start, tokens, times = time.perf_counter(), {}, {}
        for prompt, length in zip(asked["prompts"], asked["lengths"]):
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            tokens[str(number)], times[str(number)] = [], []
            number += 1
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                answer = list(output.outputs[0].token_ids)
                times[output.request_id] += [now] * (len(answer) - len(times[output.request_id]))
                tokens[output.request_id] = answer
        told = {"tokens": list(tokens.values()), "times": list(times.values())}
        print(MARK + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
