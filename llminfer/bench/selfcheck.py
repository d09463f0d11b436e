"""python -m llminfer.bench selfcheck: the first contact with a real chip, in under ten minutes and in one file that can be posted.

Every kernel is compared with its reference in float32, then timed against its bytes and operations. On a GPU this is done with what runs
there, XLA's programs of the references; on a CPU it is rehearsed: small shapes, the kernels interpreted, and only the references timed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

from llminfer.bench.kernel_work import CASES, Case, Work, draw, make
from llminfer.bench.kernels import attempt, implementation, least_seconds, peaks, select, time_once
from llminfer.progress import Progress, start

BOUND = 1e-2  # of the largest value, for bfloat16
BUDGET = 540.0  # seconds, after which nothing new is begun


def selfcheck(out: Path, only: str, progress: Progress | None, budget: float = BUDGET) -> dict[str, Any]:
    """The report, which is also in the file `out`, as far as it has come, after each kernel."""
    from llminfer.target import Target, chip_name, devices

    device, begin = devices()[0], time.monotonic()
    target, cases = Target.of(device.platform).platform, select(only, [case for case in CASES if case.small])
    chip = "" if target == "cpu" else chip_name(device.device_kind) or ""
    report: dict[str, Any] = {
        "what": "llminfer selfcheck",
        "rehearsal": target == "cpu",
        "note": "small shapes, kernels interpreted, references timed: says nothing of a chip" if target == "cpu" else "",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": target,
        "device_kind": device.device_kind,
        "devices": len(devices()),
        "chip": chip,
        "peaks": peaks(chip),
        "versions": _versions(),
        "complete": False,
        "kernels": [],
    }
    task = start(progress, "selfcheck", len(cases))
    for case in cases:
        row: dict[str, Any] = {"name": case.name, "passed": False, "shape": case.small if target == "cpu" else case.sizes}
        late = time.monotonic() - begin > budget
        row |= {"error": f"not run: {budget:.0f} s are over"} if late else attempt(check, case, chip, target)
        report["kernels"].append(row)
        _write(out, report)
        task.advance(1)
    report["complete"], report["seconds"] = True, time.monotonic() - begin
    _write(out, report)
    task.done()
    return report


def check(case: Case, chip: str, target: str) -> dict[str, Any]:
    """One kernel: error, and times."""
    rehearsal = target == "cpu"
    work = make(case, chip, small=rehearsal)
    impl, timed = ("interpret", "reference") if rehearsal else (implementation(case, target),) * 2
    args = draw(work)
    error = max_error(work, impl, args)
    found: dict[str, Any] = {"implementation": impl, "max_error": error, "bound": BOUND, "passed": error <= BOUND, "timed": timed}
    taken = time_once(work, timed, None, args, 0.01 if rehearsal else 0.3)
    least = least_seconds(work, chip)
    found |= {"seconds": taken, "gb_per_s": work.hbm_bytes / taken / 1e9, "tflop_per_s": work.flops / taken / 1e12}
    return found | {"share_of_peak": None if least is None else least / taken}


def max_error(work: Work, impl: str, args: list[Any]) -> float:
    """The largest difference from the reference on the same values in float32, as a share of its largest value; of what is written in
    place too. Infinite where either has a value that is none."""
    import jax
    import jax.numpy as jnp

    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args]
    found = jax.tree.leaves(jax.jit(lambda *args: work.run(impl, None, *args))(*args))
    want = jax.tree.leaves(jax.jit(lambda *args: work.run("reference", None, *args))(*wide))
    error = 0.0
    for x, y in zip(found, want, strict=True):
        one = float(jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-30))
        error = max(error, one if one == one else float("inf"))
    return error


def _versions() -> dict[str, str]:
    names = ("llminfer", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"] in names}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def _write(out: Path, report: dict[str, Any]) -> None:
    """In place of the file as it was, whole or not at all."""
    temporary = out.with_name(out.name + ".new")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    lines = [f"{report['device_kind']} ({report['platform']}){', a rehearsal: ' + report['note'] if report['rehearsal'] else ''}"]
    width = 2 + max(len(row["name"]) for row in report["kernels"])
    for row in report["kernels"]:
        if "error" in row:
            lines.append(f"{row['name']:<{width}}FAILED  {row['error']}")
            continue
        share = "" if row["share_of_peak"] is None else f", {row['share_of_peak']:.0%} of peak"
        figures = f"{row['seconds'] * 1e6:.1f} us, {row['gb_per_s']:.1f} GB/s, {row['tflop_per_s']:.2f} TFLOP/s{share}"
        lines.append(f"{row['name']:<{width}}{'ok' if row['passed'] else 'WRONG':<8}error {row['max_error']:.1e}, {figures}")
    return lines
