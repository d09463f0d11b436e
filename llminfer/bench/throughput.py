"""How much one engine serves: a trace of requests replayed as it would arrive, and what vLLM's serving benchmark reports of it.

Lengths are lognormal around the means of ShareGPT that Kwon et al. report (arXiv 2309.06180: 161 tokens in, 338 out); arrivals are
a Poisson process. A trace depends on its seed alone, so that any engine can be given the same. Imports no jax.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llminfer.progress import Progress, start
from llminfer.request import SamplingParams

MEAN_PROMPT, MEAN_OUTPUT, SIGMA = 161.0, 338.0, 1.0


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: when it comes, in seconds after the start; its prompt; how many tokens it wants."""

    at: float
    prompt: list[int]
    output: int


@dataclass
class Served:
    """What became of a request: token_times are seconds after the start of the trace, in bursts where a step gave several."""

    arrival: Arrival
    sequence: Any
    token_times: list[float] = field(default_factory=list)


def trace(requests: int, rate: float, seed: int, vocab_size: int, context: int, scale: float = 1.0) -> list[Arrival]:
    """`requests` arrivals at `rate` a second on average (infinite: all at once). scale multiplies the mean lengths. No request is
    longer than the context: its prompt has at most half of it."""
    draw = random.Random(seed)
    clock, found = 0.0, []
    for _ in range(requests):
        clock += draw.expovariate(rate) if math.isfinite(rate) else 0.0
        prompt = min(_length(draw, MEAN_PROMPT * scale), context // 2)
        output = min(_length(draw, MEAN_OUTPUT * scale), context - prompt)
        found.append(Arrival(clock, [draw.randrange(vocab_size) for _ in range(prompt)], output))
    return found


def _length(draw: random.Random, mean: float) -> int:
    """A lognormal length of this mean, at least 1."""
    return max(1, round(draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)))


def replay(llm: Any, arrivals: Sequence[Arrival], *, watched: bool, progress: Progress | None = None) -> tuple[list[Served], float]:
    """Serves a trace, each request as soon as its time has come; what was served, and the seconds it took. watched: tokens are
    wanted as they come, else only all of them soon."""
    waiting, under_way, done = list(arrivals)[::-1], {}, []
    task = start(progress, "Serving", len(arrivals))
    begin = time.perf_counter()
    while waiting or llm.engine.busy:
        now = time.perf_counter() - begin
        while waiting and waiting[-1].at <= now:
            arrival = waiting.pop()
            params = SamplingParams(max_tokens=arrival.output, ignore_eos=True)
            (sequence,) = llm.submit(llm.engine.check(arrival.prompt, params), params)
            under_way[id(sequence)] = Served(arrival, sequence)
        if not llm.engine.busy:
            time.sleep(max(0.0, waiting[-1].at - now))
            continue
        for sequence in llm.engine.step(watched=watched):
            served = under_way[id(sequence)]
            now = time.perf_counter() - begin
            served.token_times += [now] * (len(sequence.output) - len(served.token_times))
            if sequence.finish is not None:
                done.append(under_way.pop(id(sequence)))
                task.advance(1)
    task.done()
    return done, time.perf_counter() - begin


def report(served: Iterable[Served], seconds: float) -> dict[str, Any]:
    """The keys of vLLM's serving benchmark. ttft: time to the first token; tpot: time for each token after it, a mean of a request;
    itl: between one arrival of tokens and the next; e2el: to the last token; all in ms."""
    rows = list(served)
    tokens = sum(len(row.token_times) for row in rows)
    prompts = sum(len(row.arrival.prompt) for row in rows)
    first = [row.token_times[0] - row.arrival.at for row in rows]
    last = [row.token_times[-1] - row.arrival.at for row in rows]
    each = [(b - a) / (len(row.token_times) - 1) for row, a, b in zip(rows, first, last, strict=True) if len(row.token_times) > 1]
    gaps = [b - a for row in rows for a, b in itertools.pairwise(row.token_times)]
    found: dict[str, Any] = {
        "completed": len(rows),
        "duration_s": seconds,
        "total_input_tokens": prompts,
        "total_output_tokens": tokens,
        "request_throughput": len(rows) / seconds,
        "output_throughput": tokens / seconds,
        "total_token_throughput": (tokens + prompts) / seconds,
    }
    for name, values in (("ttft", first), ("tpot", each), ("itl", gaps), ("e2el", last)):
        found |= _three(name, values)
    return found


def _three(name: str, values: list[float]) -> dict[str, float | None]:
    if not values:
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "p99")}
    ordered = sorted(values)
    at = 0.99 * (len(ordered) - 1)  # between the two nearest, as NumPy's percentile
    low = math.floor(at)
    p99 = ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (at - low)
    mean, median = statistics.fmean(values), statistics.median(values)
    return {f"mean_{name}_ms": mean * 1e3, f"median_{name}_ms": median * 1e3, f"p99_{name}_ms": p99 * 1e3}
