"""Where the device's time goes: what ran on it during a call, by name, and how long nothing did.

The profiler's own file is read: on a GPU the kernels of its streams, on a TPU its operations, on a CPU the operations of XLA's threads.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

AROUND = re.compile(r"(while|conditional|cond|call)[_.\d]*$")  # operations that consist of others, which are there too
LONG_GAP_US = 20.0  # what a launch takes and more: the device waited for the host


class Op(NamedTuple):
    name: str
    start_us: float
    us: float


def profiled(call: Callable[[], Any], most: int = 24) -> dict[str, Any]:
    """As `summary`, of what the first device does while `call` runs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        return summary([op for file in files for op in _ops(jax.profiler.ProfileData.from_file(str(file)))], most)


def summary(ops: Iterable[Op], most: int = 24) -> dict[str, Any]:
    """span_ms from the first operation to the end of the last; busy the share of it in which one ran; gaps_ms, gaps: those above
    LONG_GAP_US; ops: rows of name (numbers at its end cut off), count, ms in all and us each, the longest first."""
    ops = sorted(ops, key=lambda op: op.start_us)
    if not ops:
        return {"span_ms": 0.0, "busy": 0.0, "gaps": 0, "gaps_ms": 0.0, "ops": []}
    end, busy, gaps = ops[0].start_us, 0.0, []
    total: dict[str, list[float]] = {}
    for op in ops:
        if op.start_us - end > LONG_GAP_US:
            gaps.append(op.start_us - end)
        busy += max(0.0, op.start_us + op.us - max(op.start_us, end))
        end = max(end, op.start_us + op.us)
        total.setdefault(re.sub(r"[_.]?\d+$", "", op.name)[:80], []).append(op.us)
    rows = sorted(total.items(), key=lambda row: -sum(row[1]))[:most]
    span = end - ops[0].start_us
    return {
        "span_ms": span / 1e3,
        "busy": busy / span if span else 0.0,
        "gaps": len(gaps),
        "gaps_ms": sum(gaps) / 1e3,
        "ops": [{"name": name, "count": len(us), "ms": sum(us) / 1e3, "us": sum(us) / len(us)} for name, us in rows],
    }


def table(found: dict[str, Any]) -> list[str]:
    head = f"{found['span_ms']:.2f} ms, busy {100 * found['busy']:.1f}%, {found['gaps']} gaps of {found['gaps_ms']:.2f} ms in all"
    rows = [f"{row['ms']:10.3f} ms {row['count']:7d} x {row['us']:9.2f} us  {row['name']}" for row in found["ops"]]
    return [head, *rows]


def _ops(data: Any) -> Iterator[Op]:
    planes = sorted((plane for plane in data.planes if re.match(r"/device:(GPU|TPU)", plane.name)), key=lambda plane: plane.name)
    for plane in planes[:1] or [plane for plane in data.planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if planes and not re.match(r"Stream|XLA Ops", line.name):
                continue
            for event in line.events:
                around = AROUND.match(event.name)
                if around is None and (planes or any(name == "hlo_op" for name, _ in event.stats)):
                    yield Op(event.name, event.start_ns / 1e3, event.duration_ns / 1e3)
