"""Runs the tiny models on every legal mesh of dp, ep, sp and tp in powers of two, and compares with one device: logits and tokens.

    python tests/mesh_matrix.py [--models tiny tiny_window tiny_moe] [--devices 8] [--with-axes sp] [--logits-only]

A line a mesh: the largest difference of logits by their range (1e-5 is asked for), and of how many prompts tokens differ (0 is asked for);
sequences come in chunks, are preempted, find prefixes, and decode in loops. Exit code 1 where something is not as asked for.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares every mesh with one device.")
    parser.add_argument("--models", nargs="*", default=["tiny", "tiny_window", "tiny_moe"])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--with-axes", nargs="*", default=[], help="only meshes that have these")
    parser.add_argument("--logits-only", action="store_true")
    asked = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={asked.devices}".strip()
    import numpy as np
    from test_mesh import scores, served

    from sharding.mesh import AXES

    sizes = [1 << i for i in range(asked.devices.bit_length())]
    legal = lambda shape: 1 < np.prod(shape) <= asked.devices and set(asked.with_axes) <= {axis for axis, n in zip(AXES, shape) if n > 1}
    meshes = [shape for shape in itertools.product(sizes, repeat=len(AXES)) if legal(shape)]
    good = True
    print("model        mesh              logits   prompts that differ  seconds", flush=True)
    for model in asked.models:
        logits, tokens = scores(model, ""), None if asked.logits_only else served(model, "")
        for number, shape in enumerate(meshes):
            start, layout = time.perf_counter(), ("listed", "stacked")[number % 2]
            mesh = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
            try:
                error = float(np.abs(scores(model, mesh, layout=layout) - logits).max() / np.ptp(logits))
                found = served(model, mesh, layout=layout) if tokens else []
            except Exception as problem:
                print(f"{model:12} {mesh:16} FAILED {type(problem).__name__}: {' '.join(str(problem).split())[:300]}", flush=True)
                good = False
                continue
            pairs = zip([x for run in found for x in run], [x for run in tokens or [] for x in run], strict=True)
            wrong = sum(one[0] != other[0] for one, other in pairs)
            good &= error <= 1e-5 and not wrong
            print(f"{model:12} {mesh:16} {error:8.1e} {wrong if tokens else '-':>10} {time.perf_counter() - start:20.1f}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
