"""Counters of an engine as Prometheus reads them (text exposition format 0.0.4). Imports no jax."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

# Upper bounds of the buckets of step times, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Key of stats() -> (type, help). What is not a number there has a line of its own in `exposition`.
METRICS = {
    "waiting": ("gauge", "Sequences that wait for a slot."),
    "running": ("gauge", "Sequences in slots."),
    "pages_free": ("gauge", "Pages that can be had, reusable cached ones included."),
    "pages_total": ("gauge", "Pages of the first group."),
    "prefix_hit_tokens": ("counter", "Prompt tokens found in the prefix cache."),
    "preemptions": ("counter", "Sequences that gave their pages back and were computed again."),
    "prefill_tokens": ("counter", "Tokens of mixed steps."),
    "decode_tokens": ("counter", "Tokens drawn in decode loops."),
    "prefill_s": ("counter", "Seconds of mixed steps."),
    "decode_s": ("counter", "Seconds of decode loops."),
    "mixed_steps": ("counter", "Mixed steps."),
    "decode_loops": ("counter", "Decode loops."),
    "compiles_after_warmup": ("counter", "Compilations while serving; must stay 0."),
    "compile_s": ("counter", "Seconds of compiling the declared programs."),
    "weights_bytes": ("gauge", "Bytes of the weights."),
    "cache_bytes": ("gauge", "Bytes of the KV cache."),
}


class Histogram:
    """Counts of seconds by bucket."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def snapshot(self) -> dict[str, Any]:
        """count, sum in seconds, and how many took at most each bound."""
        below = [sum(self.counts[: i + 1]) for i in range(len(BUCKETS))]
        return {"count": sum(self.counts), "sum": self.total, "at_most": dict(zip(map(str, BUCKETS), below, strict=True))}


def exposition(stats: dict[str, Any]) -> str:
    """The snapshot of Engine.stats() as text."""
    return "".join(f"{line}\n" for line in _lines(stats))


def _lines(stats: dict[str, Any]) -> Iterator[str]:
    for key, (kind, text) in METRICS.items():
        name = f"llminfer_{key.removesuffix('_s')}_seconds" if key.endswith("_s") else f"llminfer_{key}"
        name += "_total" if kind == "counter" else ""
        yield from (f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {stats[key]}")
    for over, skew in stats.get("expert_imbalance", {}).items():
        name = f"llminfer_expert_imbalance_{over}"
        yield from (
            f"# HELP {name} Tokens of the fullest of {over} by their mean, mean over layers.",
            f"# TYPE {name} gauge",
            f"{name} {skew}",
        )
    name = "llminfer_step_seconds"
    yield from (f"# HELP {name} Time of a step, from packing to its tokens.", f"# TYPE {name} histogram")
    for step, times in stats["step_seconds"].items():
        for bound, count in (times["at_most"] | {"+Inf": times["count"]}).items():
            yield f'{name}_bucket{{step="{step}",le="{bound}"}} {count}'
        yield from (f'{name}_sum{{step="{step}"}} {times["sum"]}', f'{name}_count{{step="{step}"}} {times["count"]}')
