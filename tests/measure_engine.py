"""What the engine's policies cost and save, on this machine: one JSON line a measurement.

    python tests/measure_engine.py gap loop memory waste prefix host [--model demo]

gap     while seven sequences decode, a prompt of 32k tokens comes in: gaps between their tokens before it and while it is computed
loop    tokens a second with decode loops of 32 steps on the device, and of one
memory  what the cache of a Gemma-3 shape holds at a context of 8k, over what its windows and global layers need
waste   share of the owned page room that holds no token, over the steps of a trace (lengths as in ShareGPT)
prefix  64 requests with 1,000 common tokens through 8 slots: prompt work and time, of one tenant, of two, and without prefix cache
host    time of a step on the host at 64 slots: scheduling, packing, reading, committing
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from llminfer import LLM, SamplingParams
from llminfer.bench.throughput import trace


def ids_of(draw: random.Random, count: int, vocab_size: int = 512) -> list[int]:
    return [draw.randrange(3, vocab_size) for _ in range(count)]


def gap(_: str) -> dict[str, Any]:
    draw = random.Random(0)
    llm = LLM("config:tiny", context=40_960, slots=8)
    llm.engine.programs.wait_all()
    endless = SamplingParams(max_tokens=30_000, ignore_eos=True)
    others = [llm.submit(ids_of(draw, 3_000), endless)[0] for _ in range(7)]

    def steps(until: Callable[[], bool]) -> tuple[list[float], float]:
        """Gaps between deliveries to the first of the others, and seconds a token, in ms."""
        at, count = time.perf_counter(), len(others[0].output)
        begin, first, gaps = at, count, []
        while not until():
            llm.engine.step(watched=True)
            if len(others[0].output) > count:
                now, count = time.perf_counter(), len(others[0].output)
                gaps.append((now - at) * 1e3)
                at = now
        return gaps[1:], (at - begin) / (count - first) * 1e3

    steps(lambda: all(len(seq.output) > 20 for seq in others))

    def more(count: int) -> Callable[[], bool]:
        end = len(others[0].output) + count
        return lambda: len(others[0].output) > end

    usual, token = steps(more(500))
    (long,) = llm.submit(ids_of(draw, 32_000), SamplingParams(max_tokens=1, ignore_eos=True))
    beside, token_beside = steps(lambda: long.finish is not None)
    after, token_after = steps(more(500))
    told = lambda gaps: {"median": round(statistics.median(gaps), 2), "max": round(max(gaps), 2)}
    return {
        "gap_ms": told(usual),
        "gap_beside_32k_ms": told(beside),
        "ratio_of_medians": round(statistics.median(beside) / statistics.median(usual + after), 2),
        "ratio_of_longest": round(max(beside) / max(usual + after), 2),
        "ratio_a_token": round(2 * token_beside / (token + token_after), 2),  # contexts grow meanwhile
        "gap_after_ms": told(after),
        "ms_a_token": [round(token, 3), round(token_beside, 3), round(token_after, 3)],
        "ttft_of_32k_s": round(long.first_time - long.request.arrived, 2),
        "compiles_after_warmup": llm.stats()["compiles_after_warmup"],
    }


def loop(_: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engines = {steps: LLM("config:tiny", decode_steps=steps, prefix_cache=False) for steps in (32, 1)}
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    for batch in (1, 8):
        speeds: dict[int, list[float]] = {steps: [] for steps in engines}
        for _ in range(6):  # in turn
            for steps, llm in engines.items():
                draw = random.Random(batch)
                start = time.perf_counter()
                llm.generate([ids_of(draw, 20) for _ in range(batch)], params)
                speeds[steps].append(batch * 200 / (time.perf_counter() - start))
        median = {steps: statistics.median(rows[1:]) for steps, rows in speeds.items()}
        found[f"batch_{batch}"] = {"loop": round(median[32], 1), "one": round(median[1], 1), "ratio": round(median[32] / median[1], 2)}
    return found


def memory(_: str) -> dict[str, Any]:
    from llminfer.config import EngineConfig, from_toml
    from llminfer.engine import Engine
    from llminfer.target import Target

    c, context, found = from_toml("gemma3_4b"), 8192, {}
    for slots in (8, 32):
        settings = EngineConfig(slots=slots, context=context, pages=slots * context // 16)
        engine = Engine(c, settings, Target.of("cpu", dtype="bfloat16"))  # shapes only: nothing is allocated
        row = 2 * c.num_kv_heads * c.head_dim * 2
        need = slots * row * sum(min(c.window(i) or context, context) for i in range(c.num_layers))
        whole = slots * row * context * c.num_layers
        found[f"{slots}_slots"] = {
            "cache_bytes": engine.cache_bytes,
            "needed_bytes": need,
            "ratio": round(engine.cache_bytes / need, 3),
            "without_windows": round(whole / need, 2),
        }
    return found


def waste(_: str) -> dict[str, Any]:
    llm = LLM("config:tiny", slots=16, context=2048)
    size, owned, empty = llm.settings.page_size, 0, 0
    for arrival in trace(200, math.inf, 0, 512, 2048):
        llm.submit(arrival.prompt, SamplingParams(max_tokens=arrival.output, ignore_eos=True))
    while llm.engine.busy:
        llm.engine.step()
        for seq in llm.engine.scheduler.running:
            room = len(seq.pages[0]) * size
            owned, empty = owned + room, empty + max(0, room - seq.length)
    return {"waste_percent": round(100 * empty / owned, 2), "page_size": size, "preemptions": llm.stats()["preemptions"]}


def prefix(model: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tenants, cached in (("one tenant", 1, True), ("two tenants", 2, True), ("no prefix cache", 1, False)):
        llm, draw = LLM(model, slots=8, context=2048, prefix_cache=cached), random.Random(0)
        llm.engine.programs.wait_all()
        common = ids_of(draw, 1000)
        prompts = [common + ids_of(draw, draw.randrange(1, 17)) for _ in range(64)]
        params = [SamplingParams(max_tokens=1, cache_salt=str(i % tenants)) for i in range(64)]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds, stats, asked = time.perf_counter() - start, llm.stats(), sum(map(len, prompts))
        # Those that found nothing: the first of each tenant, and no other.
        alone = [i for i, output in enumerate(outputs) if not output.metrics.cached_tokens]
        found[name] = {
            "prompt_work_percent": round(100 * stats["prefill_tokens"] / asked, 2),
            "seconds": round(seconds, 2),
            "without_hits": alone if cached else len(alone),
            "prefix_hit_tokens": stats["prefix_hit_tokens"],
        }
    return found


def host(_: str) -> dict[str, Any]:
    """What one step takes beside the device: the engine's own functions, timed where they are called."""
    llm, draw = LLM("config:tiny", slots=64, context=1024), random.Random(0)
    engine, spent = llm.engine, dict.fromkeys(("schedule", "pack", "commit", "show"), 0.0)
    from llminfer import engine as module

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    llm.engine.programs.wait_all()
    engine.scheduler.schedule = timed("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
    engine.scheduler.commit = timed("commit", engine.scheduler.commit)  # type: ignore[method-assign]
    engine._show = timed("show", engine._show)  # type: ignore[method-assign]
    plain = module.pack, module.ship
    module.pack, module.ship = (timed("pack", function) for function in plain)
    try:
        for _ in range(300):
            llm.submit(ids_of(draw, draw.randrange(20, 300)), SamplingParams(max_tokens=draw.randrange(50, 300), ignore_eos=True))
        steps = 0
        while engine.busy:
            engine.step(watched=True)
            steps += 1
    finally:
        module.pack, module.ship = plain
    return {"steps": steps, "ms_a_step": {name: round(t / steps * 1e3, 3) for name, t in spent.items()}} | {
        "all_ms": round(sum(spent.values()) / steps * 1e3, 3)
    }


MEASUREMENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "gap": gap,
    "loop": loop,
    "memory": memory,
    "waste": waste,
    "prefix": prefix,
    "host": host,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=sorted(MEASUREMENTS))
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    for name in options.what:
        print(json.dumps({"measurement": name} | MEASUREMENTS[name](options.model)), flush=True)


if __name__ == "__main__":
    main()
