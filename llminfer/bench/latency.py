"""How fast one model answers on this machine when nobody else asks: medians over runs."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from llminfer.request import SamplingParams


def latency(llm: Any, prompt_tokens: int, max_tokens: int, batch: int, runs: int) -> dict[str, Any]:
    """Medians over `runs` of: ttft_s (to the last of the first tokens), prefill_tokens_per_s (all prompts over that
    time), decode_tokens_per_s (tokens after the first over the time after it, all sequences), step_ms."""
    draw = random.Random(0)
    rows = [_one_run(llm, prompt_tokens, max_tokens, batch, draw) for _ in range(runs + 1)][1:]
    ttft = statistics.median(row["ttft"] for row in rows)
    step = statistics.median(row["step"] for row in rows)
    return {
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "batch": batch,
        "runs": runs,
        "ttft_s": ttft,
        "prefill_tokens_per_s": batch * prompt_tokens / ttft,
        "decode_tokens_per_s": batch / step if step else None,
        "step_ms": step * 1e3,
        "all_ttft_s": [row["ttft"] for row in rows],
        "all_step_ms": [row["step"] * 1e3 for row in rows],
        "compiles_after_warmup": llm.stats()["compiles_after_warmup"],
        "weights_bytes": llm.stats()["weights_bytes"],
    }


def _one_run(llm: Any, prompt_tokens: int, max_tokens: int, batch: int, draw: random.Random) -> dict[str, float]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompts = [[draw.randrange(llm.config.vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
    start = time.perf_counter()
    sequences = [llm.submit(llm.engine.check(prompt, params), params)[0] for prompt in prompts]
    while any(not seq.output for seq in sequences):
        llm.engine.step()
    first, drawn = time.perf_counter(), sum(len(seq.output) for seq in sequences)
    while llm.engine.busy:
        llm.engine.step()
    end = time.perf_counter()
    rest = sum(len(seq.output) for seq in sequences) - drawn
    return {"ttft": first - start, "step": (end - first) * batch / rest if rest else 0.0}
