"""Runs the tiny models on every mesh of powers of two up to 8 devices, and compares with one device: logits and tokens.

    python tests/mesh_matrix.py [--models tiny tiny_window tiny_moe] [--axes dp ep tp pp sp] [--with-axes sp]
        [--devices 8] [--logits-only] [--fast] [--part 1/4]

A line a mesh: the largest difference of logits by their range (1e-5 is asked for), and of how many prompts tokens differ (0 is asked for);
prompts come in chunks, find prefixes, and are preempted where one engine has all of them; tokens come from decode loops. What an engine
refuses is a line too, with what it says, and is counted. Exit code 1 where something is not as asked for.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def meshes(axes: list[str], devices: int) -> list[dict[str, int]]:
    """Every mesh of powers of two of these axes with more than one device and at most so many, the smallest first."""
    sizes = [1 << i for i in range(devices.bit_length())]
    found = [dict(zip(axes, each, strict=True)) for each in itertools.product(sizes, repeat=len(axes)) if 1 < math.prod(each) <= devices]
    return sorted(found, key=lambda mesh: math.prod(mesh.values()))


def run(model: str, mesh: str, settings: dict[str, Any], logits_only: bool) -> tuple[Any, list[list[int]], dict[str, Any]]:
    """(logits of a prompt, tokens of all prompts, twice, counters)."""
    from test_mesh import PARAMS, PROMPTS, model_of, scores

    from llminfer.config import from_toml

    llm = model_of(from_toml(model), mesh, **settings)
    try:
        runs = 0 if logits_only else 2
        tokens = [output.token_ids for _ in range(runs) for output in llm.generate(PROMPTS, PARAMS)]
        return scores(llm), tokens, llm.stats()
    finally:
        llm.close()


def row(model: str, sizes: dict[str, int], layout: str, logits_only: bool, alone: Any) -> tuple[str, str]:
    """("good", "bad" or "refused", a line)."""
    import numpy as np

    from llminfer.errors import UserError

    start, mesh = time.perf_counter(), ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    name = f"{model:12} {mesh:20} {layout:8}"
    try:
        logits, tokens, stats = run(model, mesh, {"layout": layout}, logits_only)
    except UserError as error:
        return "refused", f"{name} REFUSED {error}"
    except Exception as error:
        return "bad", f"{name} FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    error = float(np.abs(logits - alone[0]).max() / np.ptp(alone[0]))
    wrong = sum(one != other for one, other in zip(tokens, alone[1], strict=True))
    seen = [stats[key] for key in ("prefix_hit_tokens", "preemptions", "decode_loops", "compiles_after_warmup")]
    roomy = sizes.get("dp", 1) > 1 or sizes.get("sp", 1) == 8  # 11 pages on eight devices are 16, with which nobody is preempted
    used = logits_only or (seen[0] > 0 and seen[2] > 0 and (seen[1] > 0 or roomy))
    good = error <= 1e-5 and not wrong and used and seen[3] == 0
    line = f"{name} {error:8.1e} {'-' if logits_only else wrong:>6} " + " ".join(f"{n:6}" for n in seen)
    return "good" if good else "bad", f"{line} {time.perf_counter() - start:8.1f}{'' if good else '  NOT AS ASKED FOR'}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares every mesh with one device.")
    parser.add_argument("--models", nargs="*", default=["tiny", "tiny_window", "tiny_moe", "tiny_stages"])
    parser.add_argument("--axes", nargs="*", default=["dp", "ep", "tp", "pp", "sp"])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--with-axes", nargs="*", default=[], help="only meshes that have these")
    parser.add_argument("--logits-only", action="store_true")
    parser.add_argument("--fast", action="store_true", help="programs that are not optimized compile sooner")
    parser.add_argument("--part", default="1/1", help="2/4: the second of four runs that share the meshes")
    asked = parser.parse_args()
    part, parts = map(int, asked.part.split("/"))
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={asked.devices}".strip()
    import jax

    jax.config.update("jax_disable_most_optimizations", asked.fast)
    print("model        mesh                 layout     logits differ   hits preem.  loops compiled  seconds", flush=True)
    counts = dict.fromkeys(("good", "bad", "refused"), 0)
    for model in asked.models:
        alone = run(model, "", {"layout": "stacked"}, asked.logits_only)
        wanted = lambda sizes: all(sizes.get(axis, 1) > 1 for axis in asked.with_axes)
        for number, sizes in enumerate(filter(wanted, meshes(asked.axes, asked.devices))):
            if number % parts != part - 1:
                continue
            layout = "auto" if sizes.get("pp", 1) > 1 else ("listed", "stacked")[number // parts % 2]
            kind, line = row(model, sizes, layout, asked.logits_only, alone)
            counts[kind] += 1
            print(line, flush=True)
    print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
    return 1 if counts["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
