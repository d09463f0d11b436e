"""Checks and times pallas_kernels/paged_attention_gpu.py on a GPU, and finds its block sizes.

    python tests/bench_gpu_attention.py --only check,probe,decode,chunks [--wide]

Imports nothing of llminfer. Times are medians of runs of a program that calls a body several times, each call fed with the result of
the one before; the cache it goes over is a gigabyte or more, many times what an L2 holds. The best two of a table are timed once more in
turns, and a body of the same sizes twice: what differs less than those two is noise.

check    against dense attention in float32 on the same GPU, over lengths at the edges of pages, both kernels
probe    bytes read a second by kernels that only add up: what "% of the probe" refers to
decode   one new token a sequence, all sizes; chunks: prompts, all sizes, beside cuDNN's attention of the same prompts as dense arrays
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

sys.path.insert(0, str(Path(__file__).parents[1]))

from pallas_kernels.paged_attention_gpu import Sizes, chunk_sizes, decode_sizes, paged_attention_gpu

CALLS, PROGRAMS, REPEATS = 8, 8, 5  # calls in a program, programs sent one after the other, times of that
WORDS = 1 << 29  # of int32 that the probe reads: 2 GiB


class Shape(NamedTuple):
    """batch sequences with a context of `context` tokens, of which `new` are new; layers: of the cache, gone over in turn."""

    name: str
    batch: int
    context: int
    page: int
    new: int = 1
    layers: int = 1
    heads: int = 8
    group: int = 4
    dim: int = 128
    dtype: Any = jnp.bfloat16
    cache: Any = None  # of another type

    def flops(self) -> float:
        """Of the positions that a causal mask leaves."""
        seen = self.new * (self.context - self.new) + self.new * (self.new + 1) / 2
        return 4.0 * self.batch * seen * self.heads * self.group * self.dim

    def bytes(self) -> float:
        return 2.0 * self.batch * self.context * self.heads * self.dim * jnp.dtype(self.cache or self.dtype).itemsize


DECODE = [
    Shape("batch 64, 4k, pages of 16", 64, 4096, 16),
    Shape("batch 64, 4k, pages of 64", 64, 4096, 64),
    Shape("batch 1, 32k, pages of 16", 1, 32768, 16, layers=8),
    Shape("batch 1, 32k, pages of 64", 1, 32768, 64, layers=8),
    Shape("batch 8, 2k, pages of 16", 8, 2048, 16, layers=16),
    Shape("batch 64, 4k, pages of 16, int8", 64, 4096, 16, layers=2, cache=jnp.int8),
    Shape("batch 64, 4k, pages of 16, fp8", 64, 4096, 16, layers=2, cache=jnp.float8_e4m3fn),
]
CHUNKED = [
    Shape("8 prompts of 2048, pages of 16", 8, 2048, 16, new=2048),
    Shape("8 prompts of 2048, pages of 64", 8, 2048, 64, new=2048),
    Shape("1 prompt of 2048, pages of 16", 1, 2048, 16, new=2048, layers=8),
    Shape("8 chunks of 256 behind 3840, pages of 16", 8, 4096, 16, new=256, layers=4),
]


def arguments(shape: Shape, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
    """Arrays of a call, pages permuted: [q, k, v, kv] and the rest by name."""
    kind, pages = shape.cache or shape.dtype, shape.batch * shape.context // shape.page
    keys = jax.random.split(jax.random.key(seed), 5)
    tokens = shape.batch * shape.new
    draw = lambda key, heads: jax.random.normal(key, (tokens, heads, shape.dim), shape.dtype)
    size = (shape.layers, pages + 1, shape.heads, shape.page, 2 * shape.dim)
    if jnp.dtype(kind).itemsize == 1:
        kv = jax.jit(lambda key: lax.bitcast_convert_type(jax.random.bits(key, size, jnp.uint8) & 0xBF, kind))(keys[3])  # no NaN
    else:
        kv = jax.jit(lambda key: lax.map(lambda key: jax.random.normal(key, size[1:], kind), jax.random.split(key, size[0])))(keys[3])
    table = jax.random.permutation(keys[4], pages).reshape(shape.batch, -1).astype(jnp.int32)
    each = jnp.full(shape.batch, 1, jnp.int32)
    starts = jnp.arange(shape.batch, dtype=jnp.int32) * shape.new
    rest = dict(page_table=table, q_start=starts, q_len=each * shape.new, kv_len=each * shape.context, window=jnp.int32(0))
    if jnp.dtype(kind).itemsize == 1:
        rest["kv_scale"] = jnp.full((*size[:2], 2 * shape.heads), 0.01, jnp.float32)
    q = draw(keys[0], shape.heads * shape.group)
    return [q, draw(keys[1], shape.heads), draw(keys[2], shape.heads), kv], rest


def body(shape: Shape, sizes: dict[str, Sizes]) -> Callable[..., Any]:
    """CALLS calls, each with the queries that the last one gave and the next layer."""

    once = jax.jit(functools.partial(paged_attention_gpu, scale=shape.dim**-0.5, q_max=shape.new, sizes=sizes))

    def run(q, k, v, kv, rest):
        for call in range(CALLS):
            q, kv, scales, _ = once(q, k, v, kv, layer=jnp.int32(call % shape.layers), **rest)
            rest = rest if scales is None else rest | dict(kv_scale=scales)
        return q, kv

    return run


def compiled(bodies: dict[Any, Any], args: list[Any], donate: tuple[int, ...]) -> dict[Any, Any]:
    """The programs of all bodies that compile, by several threads at once."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)

    def one(item):
        try:
            return item[0], jax.jit(item[1], donate_argnums=donate).lower(*shapes).compile()
        except Exception as error:  # sizes that do not fit are part of a search
            print(f"  {item[0]}: {type(error).__name__} {str(error).splitlines()[0][:120]}")
            return item[0], None

    with ThreadPoolExecutor(14) as pool:
        return {name: program for name, program in pool.map(one, bodies.items()) if program is not None}


def seconds(program, args: list[Any], keep: Callable[[Any, list[Any]], list[Any]]) -> float:
    """The median of a call's seconds. keep: the next arguments from what came out, as some were donated."""
    times = []
    for repeat in range(REPEATS + 1):
        begun = time.perf_counter()
        for _ in range(PROGRAMS if repeat else 1):
            out = program(*args)
            args[:] = keep(out, args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begun) / CALLS / PROGRAMS)
    return statistics.median(times[1:])


def measure(shape: Shape, choices: list[dict[str, Sizes]], args: list[Any]) -> list[tuple[float, dict[str, Sizes]]]:
    """Seconds of each choice of sizes, the best first; the two best are timed three times in turns."""
    programs = compiled({str(choice): body(shape, choice) for choice in choices}, args, (3,))
    keep = lambda out, args: [*args[:3], out[1], *args[4:]]
    found = {name: seconds(program, args, keep) for name, program in programs.items()}
    best = sorted(found, key=lambda name: found[name])[:2]
    again = {name: [] for name in best}
    for name in [*best, *best, *best]:
        again[name].append(seconds(programs[name], args, keep))
    found |= {name: statistics.median(times) for name, times in again.items()}
    for name in best:
        print(f"  in turns: {name} " + " ".join(f"{1e6 * x:.1f}" for x in again[name]) + " us")
    return sorted(((found[str(choice)], choice) for choice in choices if str(choice) in found), key=lambda x: x[0])


def probe() -> float:
    """Bytes a second that kernels read which only add numbers up: the best of several."""
    words = WORDS
    data = jax.jit(lambda: lax.broadcasted_iota(jnp.int32, (words,), 0))()

    def reader(block: int, warps: int, programs: int):
        steps = words // block // programs

        def kernel(x_ref, before_ref, out_ref):
            first = pl.program_id(0) * steps * block

            def step(i, total):
                return total + plgpu.load(x_ref.at[pl.ds(first + i * block, block)])

            total = jnp.sum(lax.fori_loop(0, steps, step, jnp.zeros((block,), jnp.int32)))
            out_ref[pl.program_id(0)] = before_ref[pl.program_id(0)] + total

        shape = jax.ShapeDtypeStruct((programs,), jnp.int32)
        call = pl.pallas_call(kernel, grid=(programs,), out_shape=shape, compiler_params=plgpu.CompilerParams(num_warps=warps))
        return lambda x: functools.reduce(lambda total, _: call(x, total), range(CALLS), jnp.zeros((programs,), jnp.int32))

    choices = itertools.product((1024, 4096, 8192), (4, 8), (1024, 4096, 16384))
    bodies: dict[Any, Any] = {f"pallas {sizes}": reader(*sizes) for sizes in choices}
    bodies["xla sum"] = lambda x: functools.reduce(lambda total, _: jnp.sum(x + total), range(CALLS), jnp.int32(0))
    programs = compiled(bodies, [data], ())
    found = {name: 4 * words / seconds(program, [data], lambda _, args: args) for name, program in programs.items()}
    for name in sorted(found, key=lambda name: -found[name])[:4]:
        print(f"probe: {name}: {found[name] / 1e9:.0f} GB/s")
    print(f"probe: xla sum: {found.get('xla sum', math.nan) / 1e9:.0f} GB/s")
    return max(found.values())


def decode(ceiling: float, wide: bool) -> None:
    for shape in DECODE:
        q, rest = arguments(shape)
        args = [*q, rest]
        item = jnp.dtype(shape.cache or shape.dtype).itemsize
        tuned = decode_sizes(shape.batch, shape.context, shape.heads, shape.group, shape.dim, item)
        choices = [tuned]
        if wide:
            blocks = [
                (16, 1, 3),
                (16, 1, 5),
                (16, 2, 3),
                (16, 2, 5),
                (32, 1, 3),
                (32, 1, 5),
                (32, 2, 3),
                (32, 2, 5),
                (64, 2, 5),
                (64, 4, 3),
            ]
            choices += [Sizes(*sizes, splits=tuned.splits) for sizes in blocks]
        found = measure(shape, [dict(decode=x) for x in dict.fromkeys(choices)], args)
        rows = [(spent, choice["decode"]) for spent, choice in found]
        if wide:
            splits = {max(1, round(tuned.splits * part)) for part in (0.25, 0.5, 0.75, 1.5, 2)} - {tuned.splits}
            more = [dict(decode=x._replace(splits=n)) for _, x in rows[:3] for n in splits if n * 64 <= shape.context]
            rows += [(spent, choice["decode"]) for spent, choice in measure(shape, more, args)]
        for spent, sizes in sorted(rows)[: 12 if wide else 1] + [row for row in rows if row[1] == tuned]:
            rate = shape.bytes() / spent
            print(f"decode {shape.name}: {sizes} {1e6 * spent:.1f} us, {rate / 1e9:.0f} GB/s, {100 * rate / ceiling:.1f}% of the probe")


def cudnn(shape: Shape) -> float:
    """Seconds of cuDNN's attention of the same new tokens as dense arrays, without a cache or a context."""
    draw = lambda heads, seed: jax.random.normal(jax.random.key(seed), (shape.batch, shape.new, heads, shape.dim), shape.dtype)
    args = [draw(shape.heads * shape.group, 1), draw(shape.heads, 2), draw(shape.heads, 3)]

    def run(q, k, v):
        for _ in range(CALLS):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return q

    return seconds(jax.jit(run), args, lambda _, args: args)


def chunks(wide: bool) -> None:
    for shape in CHUNKED:
        q, rest = arguments(shape)
        tuned = chunk_sizes(shape.group, shape.dim, jnp.dtype(shape.cache or shape.dtype).itemsize, shape.dtype == jnp.float32)
        choices = [tuned]
        if wide:
            tiles = [(64, 4, 64), (32, 4, 128), (64, 4, 128), (64, 8, 128), (128, 8, 128), (64, 8, 256)]
            choices += [Sizes(block, warps, stages, rows) for block, warps, rows in tiles for stages in (3, 5, 7)]
        rows = [(spent, x["chunks"]) for spent, x in measure(shape, [dict(chunks=x) for x in dict.fromkeys(choices)], [*q, rest])]
        for spent, sizes in rows[: 8 if wide else 1] + [row for row in rows if row[1] == tuned]:
            print(f"chunks {shape.name}: {sizes} {1e3 * spent:.3f} ms, {shape.flops() / spent / 1e12:.0f} TFLOP/s")
        if shape.new == shape.context:
            spent = cudnn(shape)
            print(f"chunks {shape.name}: cuDNN {1e3 * spent:.3f} ms, {shape.flops() / spent / 1e12:.0f} TFLOP/s")


def dense(q, k, v, kv, rest, layer: int, window: int, softcap: float | None) -> np.ndarray:
    """Attention in float64 on the CPU, one sequence at a time; zeros for rows of nobody."""
    wide = lambda x: np.asarray(x.astype(jnp.float32)).astype(np.float64)
    q, k, v, cache = wide(q), wide(k), wide(v), wide(kv[layer])
    out, dim, group = np.zeros(q.shape), q.shape[2], q.shape[1] // k.shape[1]
    for r, table in enumerate(np.asarray(rest["page_table"])):
        start, new, total = (int(rest[name][r]) for name in ("q_start", "q_len", "kv_len"))
        at, mine = np.arange(total - new), slice(start, start + new)
        old = cache[table[at // kv.shape[3]], :, at % kv.shape[3]]  # [context, Hkv, 2D]
        keys, values = (np.concatenate(x).repeat(group, axis=1) for x in ((old[..., :dim], k[mine]), (old[..., dim:], v[mine])))
        scores = np.einsum("thd,shd->hts", q[mine], keys) * dim**-0.5
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        pos, seen = total - new + np.arange(new)[:, None], np.arange(total)
        scores = np.where((seen <= pos) & ((window == 0) | (seen > pos - window)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True, initial=-1e300))
        out[mine] = np.einsum("hts,shd->thd", weights / weights.sum(axis=2, keepdims=True), values)
    return out


class Ragged(NamedTuple):
    """A batch to be checked: sequences of all LENGTHS, of which those with several new tokens bring one where `alone`."""

    alone: bool
    page: int = 16
    group: int = 4
    dim: int = 128
    dtype: Any = jnp.bfloat16
    window: int = 0
    softcap: float | None = None


LENGTHS = [(0, 0), (1, 1), (1, 15), (1, 16), (1, 17), (1, 2500), (5, 48), (300, 300), (17, 1041), (2, 64)]
CHECKED = [Ragged(alone, page, dtype=dtype) for alone in (True, False) for page in (16, 64) for dtype in (jnp.bfloat16, jnp.float32)]
CHECKED += [Ragged(alone, *rest) for alone in (True, False) for rest in ((16, 1, 64), (32, 8, 128, jnp.bfloat16, 100, 20.0), (48, 3, 80))]


def ragged(case: Ragged) -> tuple[list[Any], dict[str, Any], np.ndarray]:
    """Arguments of a call, and the cache that must come back: pages permuted, NaN where nobody is."""
    rng, heads, width = np.random.default_rng(case.page + case.group), 2, 2560 // case.page + 1
    new, total = np.array([(min(n, 1), t) if case.alone else (n, t) for n, t in LENGTHS], np.int32).T
    starts = np.cumsum(new, dtype=np.int32) - new + 1
    kv = np.full((2, len(new) * width + 3, heads, case.page, 2 * case.dim), np.nan, np.float32)
    table = rng.permutation(len(kv[0]))[: len(new) * width].reshape(len(new), width).astype(np.int32)
    for row, n in zip(table, total - new, strict=True):
        for place in range(math.ceil(n / case.page)):
            rows = min(case.page, n - place * case.page)
            kv[:, row[place], :, :rows] = rng.standard_normal((2, heads, rows, 2 * case.dim))
    tokens = int(new.sum()) + 3
    q, k, v = (jnp.asarray(rng.standard_normal((tokens, h, case.dim)), case.dtype) for h in (heads * case.group, heads, heads))
    cache = jnp.asarray(kv, case.dtype)
    written, fresh = np.array(cache.astype(jnp.float32)), np.concatenate([k, v], axis=-1).astype(np.float32)
    for r, row in enumerate(table):
        at = total[r] - new[r] + np.arange(new[r])
        written[1, row[at // case.page], :, at % case.page] = fresh[starts[r] + np.arange(new[r])]
    rest = dict(page_table=table, q_start=starts, q_len=new, kv_len=total, layer=np.int32(1), window=np.int32(case.window))
    return [q, k, v, cache], {name: jnp.asarray(x) for name, x in rest.items()}, written


def check() -> bool:
    """Ragged batches against float64, the whole cache to the bit."""

    def one(case: Ragged):
        args, rest, written = ragged(case)
        static = dict(scale=case.dim**-0.5, q_max=1 if case.alone else max(n for n, _ in LENGTHS), softcap=case.softcap)
        return args, rest, written, jax.jit(functools.partial(paged_attention_gpu, **static)).lower(*args, **rest).compile()

    good = True
    with ThreadPoolExecutor(14) as pool:
        for case, (args, rest, written, program) in zip(CHECKED, pool.map(one, CHECKED), strict=True):
            found, made, _, _ = program(*args, **rest)
            want = dense(*args, rest, 1, case.window, case.softcap)
            error = np.linalg.norm(np.asarray(found.astype(jnp.float32)) - want) / np.linalg.norm(want)
            same = np.array_equal(np.asarray(made.astype(jnp.float32)), written, equal_nan=True)
            right = bool(error < (1e-5 if case.dtype == jnp.float32 else 1e-2) and same)
            print(f"check: {'right' if right else 'WRONG'} {case}: error {error:.1e}, cache {'same' if same else 'DIFFERS'}")
            good &= right
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="check,probe,decode,chunks", help="what to do, by commas")
    parser.add_argument("--wide", action="store_true", help="all sizes, not only the tuned ones")
    asked = parser.parse_args()
    only = asked.only.split(",")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    good = check() if "check" in only else True
    ceiling = probe() if "probe" in only or "decode" in only else math.nan
    if "decode" in only:
        decode(ceiling, asked.wide)
    if "chunks" in only:
        chunks(asked.wide)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
