"""python -m llminfer.bench kernels: what each kernel takes on standard shapes, and which block sizes are best.

On a TPU or a GPU: the time of each, against its bytes and operations at the chip's peaks (configs/chips.toml). On a CPU with libtpu: each
is compiled for the target by a process of its own, and the schedule is counted (tpu_schedule.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llminfer.bench.kernel_work import CASES, MODELS, Case, Work, draw, make
from llminfer.errors import UserError, refuse
from llminfer.progress import Progress, start

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Bundles a second: of v4 to v5p as published, of the others what their peaks come to (a bundle keeps 262,144 multipliers of a v6e busy,
# of a tpu7x twice as many).
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
AOT = {  # libtpu as a compiler on a machine without a TPU
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def peaks(chip: str) -> dict[str, float]:
    """Peaks of one JAX device of a chip; empty for a chip that chips.toml does not have."""
    folders = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    about = tomllib.loads(next(x for x in folders if x.is_dir()).joinpath("chips.toml").read_text(encoding="utf-8")).get(chip)
    if about is None:
        return {}
    devices = about["devices"]
    return {"flops_per_s": about["bf16_tflops"] * 1e12 / devices, "bytes_per_s": about["hbm_gb_per_s"] * 1e9 / devices}


def least_seconds(work: Work, chip: str) -> float | None:
    """What the bytes or the operations take at the peaks, whichever is longer."""
    best = peaks(chip)
    return max(work.flops / best["flops_per_s"], work.hbm_bytes / best["bytes_per_s"]) if best else None


def select(only: str, cases: list[Case] = CASES) -> list[Case]:
    """The cases whose name contains `only`. Raises UserError where there is none."""
    found = [case for case in cases if only in case.name]
    if not found:
        raise refuse("--only", only, f"must be in one of {', '.join(case.name for case in cases)}")
    return found


# ---- on the device at hand


def time_once(work: Work, impl: str, blocks: dict[str, int] | None, args: list[Any], seconds: float = 0.3) -> float:
    """Seconds of one call, from two runs of a loop on the device that differ in length, so that what sending costs falls out."""
    import jax
    from jax import lax

    def body(_, args):
        out = work.run(impl, blocks, *args)
        args = list(args)
        for to, which in work.feeds.items():
            args[to] = out[which]
        first, query = (x[(0,) * x.ndim] for x in (jax.tree.leaves(out)[0], args[0]))
        args[0] = args[0].at[(0,) * args[0].ndim].set(query + first.astype(query.dtype) * 0)  # the next call waits for this one
        return tuple(args)

    many = jax.jit(lambda n, args: lax.fori_loop(0, n, body, args))

    def clock(n: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(many(n, tuple(args)))
        return time.perf_counter() - begin

    clock(1)
    n = 1
    while (taken := clock(n)) < seconds and n < 1 << 20:
        n = max(2 * n, int(n * seconds / max(taken, 1e-6)))
    extra = max(1, n // 4)
    short, long = (min(clock(turns) for _ in range(3)) for turns in (extra, n + extra))
    each, most = (long - short) / n, long / (n + extra)
    return each if each > most / 4 else most  # less is noise of a busy machine


def measured(case: Case, chip: str, impl: str, blocks: dict[str, int] | None = None) -> dict[str, Any]:
    """One case on the device of this process."""
    work = make(case, chip)
    taken, least = time_once(work, impl, blocks, draw(work)), least_seconds(work, chip)
    rates = {"gb_per_s": work.hbm_bytes / taken / 1e9, "tflop_per_s": work.flops / taken / 1e12}
    return {"seconds": taken, **rates, "share_of_peak": None if least is None else least / taken}


# ---- by the TPU's compiler, on a CPU


def compiled(case: Case, chip: str, blocks: dict[str, int] | None = None) -> dict[str, Any]:
    """The schedule's figures of one case, from a process that compiles it for the chip. {"error": one line} if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        from llminfer.bench.tpu_schedule import dump_flags

        environment = {**os.environ, **AOT, "LIBTPU_INIT_ARGS": dump_flags(Path(folder))}
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        job = json.dumps({"case": case.name, "chip": chip, "blocks": blocks, "folder": folder})
        done = subprocess.run([sys.executable, "-m", __name__, job], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": _reason(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if "Error" in line or "error" in line]
    return (lines or stderr.strip().splitlines() or ["no output"])[-1][:300]


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in the process of its own: compiles, reads the dump, sums the kernels of the case."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from llminfer.bench.tpu_schedule import read

    case = next(case for case in CASES + MODELS if case.name == job["case"])
    work = make(case, job["chip"])
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[job["chip"]]).devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    there = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there) for x in work.args]
    run = lambda *args: work.run("pallas", job["blocks"], *args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(run, donate_argnums=tuple(work.feeds)).trace(*shapes)
        memory = traced.lower().compile().memory_analysis()
    given = [None if isinstance(x, jax.ShapeDtypeStruct) else x for x in work.args]
    kernels = read(Path(job["folder"]), scalar_operands(traced.jaxpr, given))
    if not kernels:
        raise RuntimeError(f"{case.name}: the compiler's dump has none of its kernels")
    total = lambda name: sum(getattr(kernel, name) for kernel in kernels)
    largest = lambda name: max(getattr(kernel, name) for kernel in kernels)
    return {
        "bundles": total("bundles"),
        "matrix_share": total("matrix_bundles") / max(total("bundles"), 1),
        "hbm_bytes": total("hbm_bytes"),
        "vmem_bytes": largest("vmem_bytes"),
        "spill_bytes": largest("spill_bytes"),
        "temp_bytes": memory.temp_size_in_bytes if memory else -1,
        "unknown": sorted({name for kernel in kernels for name in kernel.unknown}),
    }


def scalar_operands(jaxpr: Any, given: list[Any]) -> dict[str, list[dict[int, Any]]]:
    """The integers that each Pallas call gets for its grid, by the name of the kernel, call after call: the program is run as far as it
    follows from the arguments that are given (None: not known)."""
    import numpy as np
    from jax.extend.core import Literal

    found: dict[str, list[dict[int, Any]]] = {}

    def loop(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        fixed, constants, carry = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]
        more, body, turns = params["cond_jaxpr"], params["body_jaxpr"], 0
        while (again := walk(more.jaxpr, more.consts, [*fixed, *carry])[0]) is None or again:
            if again is None and turns:
                break  # it depends on what is computed: taken as done
            carry, turns = walk(body.jaxpr, body.consts, [*constants, *carry]), turns + 1
        return carry

    def walk(jaxpr: Any, constants: Any, values: list[Any]) -> list[Any]:
        known = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, values, strict=True))
        look = lambda x: x.val if isinstance(x, Literal) else known.get(x)
        for eqn in jaxpr.eqns:
            inputs, outputs, name, params = [look(x) for x in eqn.invars], [None] * len(eqn.outvars), eqn.primitive.name, eqn.params
            if name == "pallas_call":
                kernel = params.get("name") or params["name_and_src_info"].name
                count = params["grid_mapping"].num_index_operands
                operands = {i: np.asarray(x).reshape(-1) for i, x in enumerate(inputs[:count]) if x is not None}
                found.setdefault(kernel, []).append(operands)
            elif name in ("jit", "pjit"):
                outputs = walk(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs)
            elif name == "while":
                outputs = loop(params, inputs)
            elif all(x is not None for x in inputs) and all(x.aval.size <= 1 << 20 for x in eqn.outvars):
                done = eqn.primitive.bind(*inputs, **params)
                outputs = done if eqn.primitive.multiple_results else [done]
            known |= dict(zip(eqn.outvars, outputs, strict=True))
        return [look(x) for x in jaxpr.outvars]

    walk(jaxpr.jaxpr, jaxpr.consts, list(given))
    return found


# ---- the command


def kernels(target: str | None, tune: bool, out: Path | None, only: str, progress: Progress | None) -> dict[str, Any]:
    """The figures of every case: {"chip", "by": time | schedule, "kernels": [...]}. tune: tries block sizes and writes the best ones."""
    if target is not None and target not in TOPOLOGIES:
        raise refuse("--target", target, f"must be one of {', '.join(TOPOLOGIES)}")
    cases = select(only, CASES + MODELS if tune else CASES)
    figure: Callable[..., dict[str, Any]]
    if target is None:
        from llminfer.target import Target, chip_name, devices

        device = devices()[0]
        target, platform = chip_name(device.device_kind) or "", Target.of(device.platform).platform
        if platform == "cpu":
            raise UserError("--target: must be given where there is no TPU or GPU, such as v6e; its compiler is the extra tpu")
        figure = lambda case, blocks=None: measured(case, target, implementation(case, platform), blocks)
        by = "time"
    else:
        figure, by = lambda case, blocks=None: scheduled(case, target, blocks), "schedule"
    tried = {case.name: make(case, target).candidates if tune else [] for case in cases}
    task = start(progress, "kernels", sum(1 + len(each) for each in tried.values()))
    rows = []
    for case in cases:
        row = {"name": case.name, "op": case.op, **_bounds(case, target), **attempt(figure, case)}
        task.advance(1)
        if tried[case.name]:
            row["tuned"] = _best(case, target, figure, tried[case.name], out, task.advance, row)
        rows.append(row)
    task.done()
    return {"chip": target, "by": by, "kernels": rows}


def implementation(case: Case, platform: str) -> str:
    """The body for a platform; where it has no kernel of its own, what XLA makes of the reference."""
    if platform == "gpu":
        return "triton" if case.op in ("paged_attention", "grouped_matmul") else "reference"
    return "pallas" if platform == "tpu" else "reference"


def scheduled(case: Case, chip: str, blocks: dict[str, int] | None = None) -> dict[str, Any]:
    """The schedule's figures, and the least time that its bundles and its bytes take."""
    found = compiled(case, chip, blocks)
    if "error" in found or blocks is not None:
        return found
    return found | {"bundle_seconds": found["bundles"] / CLOCKS[chip], "byte_seconds": found["hbm_bytes"] / peaks(chip)["bytes_per_s"]}


def _bounds(case: Case, chip: str) -> dict[str, Any]:
    work = make(case, chip)
    return {"work_bytes": int(work.hbm_bytes), "work_flops": int(work.flops), "least_seconds": least_seconds(work, chip)}


def attempt(figure: Callable[..., dict[str, Any]], case: Case, *more: Any) -> dict[str, Any]:
    """The figures, or the one-line reason why there are none: one kernel does not stop the others."""
    try:
        return figure(case, *more)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}


def _best(
    case: Case, chip: str, figure: Any, candidates: list[dict[str, int]], out: Path | None, advance: Any, heuristic: dict[str, Any]
) -> dict[str, Any]:
    """Tries the candidates; writes the best if it wins a fiftieth against the sizes of now. Those that move more bytes are out: a bundle
    may be hidden behind a transfer, a transfer behind nothing."""
    from pallas_kernels import tuning

    cost = lambda row: row.get("seconds", row.get("bundles", float("inf")))
    rows = []
    for blocks in candidates:
        rows.append({"blocks": blocks, **attempt(figure, case, blocks)})
        advance(1)
    most = 1.005 * heuristic.get("hbm_bytes", float("inf"))
    best = min((row for row in rows if row.get("hbm_bytes", 0) <= most), key=cost, default={})
    if not best or cost(best) > 0.98 * cost(heuristic):
        return {"blocks": None, "tried": rows, "file": None}
    file = out or tuning.FILE
    tuning.save(case.op, chip, make(case, chip).key, best["blocks"], file)
    return {"blocks": best["blocks"], "tried": rows, "file": str(file)}


def table(found: dict[str, Any]) -> list[str]:
    """The figures as lines of text."""
    lines = [f"{found['chip'] or 'unknown chip'}, by {found['by']}"]
    width = 2 + max(len(row["name"]) for row in found["kernels"])
    for row in found["kernels"]:
        least = "" if row["least_seconds"] is None else f", at the peaks {row['least_seconds'] * 1e6:.0f} us"
        if "error" in row:
            figures = row["error"]
        elif "seconds" in row:
            share = "" if row["share_of_peak"] is None else f", {row['share_of_peak']:.0%} of peak"
            figures = f"{row['seconds'] * 1e6:.1f} us, {row['gb_per_s']:.0f} GB/s, {row['tflop_per_s']:.1f} TFLOP/s{share}"
        else:
            figures = (
                f"{row['bundles']:,} bundles ({row['bundle_seconds'] * 1e6:.0f} us), {row['matrix_share']:.0%} with a matrix instruction, "
                f"HBM {row['hbm_bytes'] / 1e6:.1f} MB of {row['work_bytes'] / 1e6:.1f} ({row['byte_seconds'] * 1e6:.0f} us), "
                f"VMEM {row['vmem_bytes'] >> 10} KiB, spilled {row['spill_bytes'] >> 10} KiB, temporaries {row['temp_bytes'] >> 10} KiB"
            )
        lines.append(f"{row['name']:<{width}}{figures}{least}")
        if "tuned" in row:
            best = row["tuned"]
            lines.append(
                f"{'':<{width}}{best['blocks'] or 'nothing better than the heuristic'}" + (f" -> {best['file']}" if best["file"] else "")
            )
    return lines


if __name__ == "__main__":
    print(json.dumps(_compile(json.loads(sys.argv[1]))))
