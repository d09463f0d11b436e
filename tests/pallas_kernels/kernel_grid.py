"""Paged attention's TPU kernel, interpreted, against the float64 oracle over a grid of shapes and options.

    python tests/pallas_kernels/kernel_grid.py [--shard i/n] [--out FILE]

Every combination of kind of batch, page, head_dim, heads and cache type is one program, with the other options drawn for it and three
windows; `pairwise` gives a small sample in which each two values meet. The exit status is 1 if a case fails: an error beyond the bound of
its type, a cell of the cache that differs, a race, a semaphore left above 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# A callback of the interpreter waits for the device's thread; with only one of them, on one core, for ever.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])

import jax
import jax.numpy as jnp
import numpy as np
from test_paged_attention_tpu import FP8, Case, Program, build, check_equal, oracle

from pallas_kernels import paged_attention_plan

Shape = dict[str, Any]
GRID: dict[str, tuple] = {
    "kind": ("mix", "decode"),
    "page": (16, 32, 48, 64, 128, 256),
    "head_dim": (64, 80, 96, 128, 256),
    "group": (1, 3, 4, 8),
    "cache": ("float32", "bfloat16", "int8", "fp8"),
}
OPTIONS: dict[str, tuple] = {
    "wide": (False, True),  # float32 queries on a cache of 8 bits
    "softcap": (None, 5.0),
    "sinks": (0, 4, 20),
    "logits": (False, True),
    "tree": (0, 2),
    "splits": (1, 3),
    "transfers": ("eager", "on_wait"),
    "many": (False, True),  # small blocks and pieces of keys, and steps that share the heads: several of both in short contexts
}
COST = {"mix": 3, "decode": 1}  # of compilation
WINDOWS = ("none", "small", "large")
KV_HEADS = {1: 2, 3: 3, 4: 2, 8: 1}
PAGES = {16: 20, 32: 10, 48: 8, 64: 8, 128: 5, 256: 5}  # of a sequence


def legal(shape: Shape) -> bool:
    """Whether the options of a shape, not all of which need be there yet, go together."""
    get = shape.get
    eight = get("cache") in ("int8", "fp8")
    if get("sinks") and (eight or get("wide") or get("tree") or get("splits", 1) > 1):
        return False
    if get("splits", 1) > 1 and get("logits"):
        return False
    if get("tree") and get("kind") == "decode":  # a tree of one node
        return False
    if get("page") == 48 and (eight or get("wide")):  # refused
        return False
    return not (get("wide") and "cache" in shape and not eight)


def whole() -> Iterator[Shape]:
    """Every combination of GRID, in an order in which a part of it is a fair sample, with OPTIONS drawn at random."""
    draw = random.Random(0)
    shapes = [shape for values in itertools.product(*GRID.values()) if legal(shape := dict(zip(GRID, values)))]
    draw.shuffle(shapes)
    for shape in shapes:
        full = None
        while full is None or not legal(full):
            full = shape | {name: draw.choice(values) for name, values in OPTIONS.items()}
        yield full


def pairwise() -> list[Shape]:
    """Few shapes, with a window each, in which any two values of any two factors that go together meet."""
    factors = GRID | OPTIONS | {"window": WINDOWS}
    draw, pair = random.Random(1), lambda a, x, b, y: ((a, x), (b, y)) if a < b else ((b, y), (a, x))
    left = {
        pair(a, x, b, y)
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if legal({a: x, b: y})
    }
    shapes = []
    while left:
        best, most = {}, 0.0
        for _ in range(20):
            shape = dict(draw.choice(sorted(left, key=repr)))
            names = [name for name in factors if name not in shape]
            draw.shuffle(names)
            for name in names:
                options = [x for x in reversed(factors[name]) if legal(shape | {name: x})]
                counts = [sum(pair(name, x, b, y) in left for b, y in shape.items()) for x in options]
                shape[name] = options[counts.index(max(counts))]
            covered = sum(pair(a, shape[a], b, shape[b]) in left for a, b in itertools.combinations(shape, 2))
            worth = covered / COST[shape["kind"]]
            if worth > most:
                best, most = shape, worth
        left -= {pair(a, best[a], b, best[b]) for a, b in itertools.combinations(best, 2)}
        shapes.append({name: best[name] for name in factors})
    return sorted(shapes, key=repr)


def program_of(shape: Shape) -> Program:
    page, group, dim = shape["page"], shape["group"], shape["head_dim"]
    new = lengths(shape)
    scaled = {"int8": jnp.int8, "fp8": FP8}.get(shape["cache"])
    narrow = shape["cache"] == "bfloat16" or (scaled is not None and not shape["wide"])
    return Program(
        seqs=len(new), rows=sum(new) + 3, q_max=max(new), pages=PAGES[page], page=page, group=group, kv_heads=KV_HEADS[group], head_dim=dim,
        dtype=jnp.bfloat16 if narrow else jnp.float32, kv_dtype=scaled, softcap=shape["softcap"], sinks=shape["sinks"],
        logits=shape["logits"], tree=shape["tree"], splits=shape["splits"], lanes=-(-2 * dim // 128) * 128, transfers=shape["transfers"],
    )  # fmt: skip


def lengths(shape: Shape) -> tuple[int, ...]:
    """How many tokens the sequences of a shape bring."""
    page = 16 if shape["tree"] else shape["page"]
    return (1, 1, 0, 1, 1) if shape["kind"] == "decode" else (0, 1, page - 1, page, page + 1, 3 * page)


def case_of(shape: Shape, window: str, seed: int) -> Case:
    """Contexts at the edges of pages and blocks, and lengths in a random order."""
    draw, page, new = random.Random(seed), shape["page"], list(lengths(shape))
    most, block = PAGES[page] * page, small_block(page)
    draw.shuffle(new)
    edges = [n + off for n in (page, 2 * page, block, 2 * block, most) for off in (-1, 0, 1)]
    total = []
    for n in new:
        context = draw.choice([0, 1, draw.randrange(most), *edges])
        if shape["kind"] == "decode":
            context -= 1  # its length with the new token is at an edge
        total.append(n + max(0, min(context, most - n)))
    small = max(new) if shape["tree"] else draw.choice((1, page // 2, page, page + 5))
    return Case("", tuple(new), tuple(total), {"none": 0, "small": small, "large": most + 9}[window], seed)


def small_block(page: int) -> int:
    return max(128, 2 * page)


def run(shape: Shape, program: Program, case: Case, piece: int | None = None) -> tuple[float, float]:
    """The relative errors of output and sums; raises AssertionError where something is wrong. piece: keys that a tile looks at in one go,
    None as the kernel has it, or 32 where there are many blocks; a small one compiles in half the time."""
    arrays = *args, data = build(program, case)
    sizes = dict(BLOCK_KEYS=small_block(program.page), CHUNK_ROWS=256, PIECE_KEYS=32) if shape["many"] else {}
    sizes |= {} if piece is None else {"PIECE_KEYS": piece}
    with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch.dict(vars(paged_attention_plan), sizes):
        found = jax.block_until_ready(program.call(*args, **data))
    text = printed.getvalue()
    assert "RACE" not in text and "non-zero count" not in text, text[:500]
    return check_equal(program, found, oracle(program, *arrays, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th program from the i-th on")
    parser.add_argument("--out", type=Path, help="a file for the lines beside standard output")
    args = parser.parse_args()
    first, step = map(int, args.shard.split("/"))
    begin, ran, failed, worst = time.perf_counter(), 0, 0, {}
    with contextlib.ExitStack() as stack:
        files = [sys.stdout, *([stack.enter_context(args.out.open("w"))] if args.out else [])]
        say = lambda line: [print(line, file=file, flush=True) for file in files]
        for number, shape in itertools.islice(enumerate(whole()), first, None, step):
            program = program_of(shape)
            for window in WINDOWS:
                case, start = case_of(shape, window, number), time.perf_counter()
                name = " ".join(f"{key}={value}" for key, value in shape.items()) + f" window={case.window} q={case.q_len} kv={case.kv_len}"
                try:
                    errors = run(shape, program, case)
                except Exception as error:  # a program that does not compile is a failure among others
                    failed += 1
                    say(f"FAIL {number} {name}: {type(error).__name__} {' '.join(str(error).split())[:400]}")
                else:
                    kind = f"{shape['cache']} cache, {program.dtype.__name__} queries"
                    worst[kind] = np.maximum(worst.get(kind, 0.0), errors)
                    say(f"ok {number} {name}: out {errors[0]:.1e} lse {errors[1]:.1e} {time.perf_counter() - start:.1f} s")
                ran += 1
            program.call.clear_cache()
        for kind, errors in sorted(worst.items()):
            say(f"worst {kind}: out {errors[0]:.1e} lse {errors[1]:.1e}")
        say(f"{ran} cases, {failed} failed, {time.perf_counter() - begin:.0f} s, jax {jax.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
