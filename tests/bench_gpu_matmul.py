"""Products of few rows with a model's matrices on a GPU: how near to the card's read bandwidth they come, and with which tiles.

    PYTHONPATH=. python tests/bench_gpu_matmul.py [--only check,sweep,rows,xla,one_row,layers] [--ways 2] [--seconds 120] [--out file]

Checks numbers against float64, reads 2 GB for the bandwidth, and times, by type, shape and rows: candidates of tiles for the kernel, what
XLA makes of weights by channel, and chains of whole layers. A chain feeds each product's result to the next through an elementwise
operation, over enough copies of the weights that no cache holds them; "net" is without that operation's own time."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llminfer.bench.probe import read_rate, seconds
from pallas_kernels import matvec_gpu as one_row
from pallas_kernels import quantized_matmul_gpu as gpu
from pallas_kernels.quantized_matmul_gpu import Tiles, for_gpu, quantized_matmul_gpu
from pallas_kernels.weight_formats import values

bf16, f32 = jnp.bfloat16, jnp.float32
PARTS = "check,probe,sweep,rows,xla,one_row,layers"
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096), "head": (4096, 128256)}
STORED = {"int8": jnp.int8, "float8_e4m3fn": jnp.float8_e4m3fn, "int4": jnp.int8, "mxfp4": jnp.uint8, "bfloat16": bf16}
GROUP = {"int4": 128, "mxfp4": 32}
START = time.time()


def note(*what: Any) -> None:
    print(f"[{time.time() - START:6.1f}]", *what, flush=True)


def pack(kind: str) -> int:
    return 2 if kind in gpu.FOUR_BITS else 1


def make(kind: str, inner: int, columns: int, key: Any) -> tuple[Any, Any]:
    """Random weights as a GPU wants them [1, N, stored], and scales (None for bfloat16)."""
    shape, group = (1, columns, inner // pack(kind)), GROUP.get(kind, inner)
    if kind in ("float8_e4m3fn", "bfloat16"):
        w = jax.random.normal(key, shape, bf16).astype(STORED[kind])
    else:
        w = lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), STORED[kind])
    scale = jax.random.uniform(key, (1, inner // group, columns), f32, 0.5, 2) / 64
    return w, None if kind == "bfloat16" else scale.astype(bf16) if kind == "mxfp4" else scale


def bytes_of(kind: str, inner: int, columns: int) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.eval_shape(functools.partial(make, kind, inner, columns), jax.random.key(0)) if a)


def kernel(kind: str, tiles: Tiles, x: Any, w: Any, scale: Any) -> Any:
    return functools.reduce(jnp.add, list(gpu.run(x, w, scale, tiles, kind=kind))).astype(x.dtype)


def entry(kind: str, how: str, x: Any, w: Any, scale: Any) -> Any:
    """What the model calls. how: "whole" rounds x to int8."""
    if kind != "bfloat16":
        return quantized_matmul_gpu(x, w, scale, quantize_x=how == "whole")
    if how == "matvec":
        return one_row.matvec_gpu(x, w[0]).astype(bf16)
    return lax.dot_general(x, w[0], (((1,), (1,)), ((), ())), preferred_element_type=f32).astype(bf16)


def chain(product: Any, x: Any, weights: Any) -> Any:
    """x after all products, each of which needs the last one's result."""
    product = jax.jit(product)
    for w, scale in weights:
        y = product(x, w, scale)
        y = jnp.tile(y, (1, -(-x.shape[1] // y.shape[1])))[:, : x.shape[1]]
        x = lax.optimization_barrier(x + 1e-20 * y)
    return x


def probe() -> float:
    """Bytes a second of reading 2 GiB."""
    rate = read_rate(1 << 31)
    note(f"read probe: {rate / 1e9:.0f} GB/s")
    return rate


def check() -> None:
    """The entry and other tiles, of all types: relative errors, of results in bfloat16."""
    types = [(jnp.int8, 0), (jnp.int8, 128), (jnp.int8, 32), (jnp.float8_e4m3fn, 0), (jnp.uint8, 32)]
    types += [(jnp.int4, group) for group in (128, 64, 32)]
    tiles = (None, Tiles(32, 128, 3, 1, 2), Tiles(64, 64, 2, 2, 2))

    def one(case: Any) -> tuple[str, float]:
        (dtype, group), rows, how = case
        rng = np.random.default_rng(rows)
        shape = (1, 512 // (2 if dtype == jnp.uint8 else 1), 256)
        w = jnp.asarray(rng.integers(0, 256, shape) if dtype == jnp.uint8 else rng.integers(-8, 8, shape), jnp.int32).astype(dtype)
        scale = jnp.asarray(np.exp2(rng.integers(-2, 3, (1, 512 // group if group else 1, 256))), f32)
        x = jnp.asarray(rng.standard_normal((rows, 512)), bf16)
        y = jax.jit(functools.partial(quantized_matmul_gpu, tiles=how))(x, for_gpu(w, scale), scale)
        full = np.asarray(values(w[0]), np.float64) * np.asarray(scale[0], np.float64).repeat(512 // scale.shape[1], 0)
        want = np.asarray(x, np.float64) @ full
        error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
        return f"{jnp.dtype(dtype).name}-{group}", float(np.nan_to_num(error, nan=9.0))

    worst: dict[str, float] = {}
    with ThreadPoolExecutor(14) as pool:
        for name, error in pool.map(one, itertools.product(types, (1, 5, 16, 20, 64), tiles)):
            worst[name] = max(worst.get(name, 0), error)
    note("errors", {name: f"{error:.1e}" for name, error in worst.items()})
    note("all right" if max(worst.values()) < 6e-3 else "WRONG")


def tiles_for(kind: str, shape: str, rows: int, some: int) -> list[Tiles]:
    """What fits the shared memory, in 132 to 4500 programs of at least three steps; of these every so many."""
    inner, columns = SHAPES[shape]
    stored, found, few = inner // pack(kind), [], rows <= gpu.FEW_ROWS
    sizes = itertools.product((16, 32, 64, 128), (64, 128, 256), (2, 3, 4, 5), (1, 2) if few else (2, 4), range(5))
    for of_w, depth, stages, warps, log in sizes:
        splits, programs = 1 << log, columns // of_w << log
        shared = stages * depth * (of_w * jnp.dtype(STORED[kind]).itemsize + 2 * max(8, rows) * pack(kind))
        whole = stored % (depth * splits) == 0 and stored // (depth * splits) >= 3 and columns % of_w == 0
        if not whole or shared > (100_000 if few else 200_000) or depth > 128 * (3 - pack(kind)):
            continue
        if 16 * warps <= of_w <= 64 * warps and 132 <= programs <= 4500 and programs * min(shared, 30 * warps * 1024) > 132 * 20_000:
            found.append(Tiles(of_w, depth, stages, splits, warps))
    return found[::some]


def candidates() -> list[Any]:
    """(type, shape, rows, tiles) to time."""
    wanted = [("int4", shape, 1, 4) for shape in SHAPES] + [("int8", shape, 1, 8) for shape in ("o", "gate_up", "qkv", "down")]
    more = (("mxfp4", 1), ("int4", 16), ("int4", 32), ("int4", 64))
    wanted += [(kind, shape, rows, 8) for kind, rows in more for shape in ("o", "gate_up")]
    return [(kind, shape, rows, t) for kind, shape, rows, some in wanted for t in tiles_for(kind, shape, rows, some)]


def several_rows(kinds: str, rows: str) -> list[Any]:
    """(type, shape, rows, tiles) to time, and XLA's own."""
    wanted = list(itertools.product(kinds.split(","), SHAPES, map(int, rows.split(","))))
    found = []
    for kind, shape, many in wanted:
        tiles = tiles_for(kind, shape, many, 1)
        found += [(kind, shape, many, t) for t in tiles[:: max(1, len(tiles) // 28)]]
    return found + [(kind, shape, many, "entry") for kind, shape, many in wanted]


def by_xla() -> list[Any]:
    found: list[Any] = [("int8", shape, rows, "entry") for shape in ("o", "gate_up") for rows in (1, 2, 8, 16, 32, 64)]
    found += [("float8_e4m3fn", "gate_up", 1, "entry"), ("bfloat16", "head", 1, "entry"), ("bfloat16", "gate_up", 1, "entry")]
    return found + [("int8", "gate_up", rows, how) for rows in (64, 256) for how in ("entry", "whole")]


def sweep(todo: list[Any], rate: float, deadline: float, threads: int = 14) -> list[dict[str, Any]]:
    """Times. All is compiled before the first is timed, which threads would disturb."""
    copies = lambda kind, shape: max(3, min(24, int(2.2e8 / bytes_of(kind, *SHAPES[shape])) + 1))

    def compiled(item: Any) -> Any:
        kind, shape, rows, how = item
        if time.time() > deadline:
            return None
        weights = jax.eval_shape(functools.partial(make, kind, *SHAPES[shape]), jax.random.key(0))
        x = jax.ShapeDtypeStruct((rows, SHAPES[shape][0]), bf16)
        product = functools.partial(entry if isinstance(how, str) else kernel, kind, how)
        try:
            return jax.jit(functools.partial(chain, product)).lower(x, [weights] * copies(kind, shape)).compile()
        except Exception as failure:
            note("no", item, str(failure)[:200])

    with ThreadPoolExecutor(threads) as pool:
        made = dict(zip(todo, pool.map(compiled, todo)))
    note("compiled", len([call for call in made.values() if call]))
    results, empty = [], {}
    for (kind, shape), items in itertools.groupby(sorted(todo, key=lambda item: item[:2]), key=lambda item: item[:2]):
        generate = jax.jit(functools.partial(make, kind, *SHAPES[shape]))
        weights = [generate(key) for key in jax.random.split(jax.random.key(1), copies(kind, shape))]
        moved = bytes_of(kind, *SHAPES[shape])
        for item in items:
            if made[item] is None:
                continue
            x = jnp.ones((item[2], SHAPES[shape][0]), bf16)
            if x.shape not in empty:
                nothing = jax.jit(lambda x, w: chain(lambda x, w, s: x * w, x, w))
                empty[x.shape] = seconds(nothing, x, [(jnp.ones((1, 1), bf16), None)] * 20) / 20
            took = seconds(made[item], x, weights) / len(weights)
            net = took - empty[x.shape]
            results.append(dict(kind=kind, shape=shape, rows=item[2], how=item[3], us=took * 1e6, net=net * 1e6, share=moved / net / rate))
        del weights
    note("empty operation, us", {str(k): round(v * 1e6, 2) for k, v in empty.items()})
    return results


def table(results: list[dict[str, Any]], most: int = 4) -> None:
    key = lambda r: (r["kind"], r["shape"], r["rows"])
    for group, found in itertools.groupby(sorted(results, key=lambda r: (*key(r), r["net"])), key=key):
        best = list(found)
        name = lambda how: how if isinstance(how, str) else ",".join(map(str, how))
        shown = [f"{name(r['how'])} {r['net']:.1f}us {r['share']:.2f}" for r in best]
        shown = shown[:most] + [text for text in shown[most:] if text.startswith("entry")]
        note(*group, "|", "  ".join(shown), f"| worst of {len(best)}: {best[-1]['share']:.2f}")


def layers(kind: str, rows: int, rate: float, how: str = "entry", many: int = 8) -> None:
    """A chain of whole layers without attention, and the time that reading the weights takes."""
    apply = functools.partial(entry, kind, how)
    norm = lambda x: x * lax.rsqrt(jnp.mean(jnp.square(x.astype(f32)), 1, keepdims=True) + 1e-5).astype(bf16)

    def step(x: Any, weights: Any) -> Any:
        for ws in weights:
            x = x + apply(apply(norm(x), *ws["qkv"])[:, :4096], *ws["o"])
            y = apply(norm(x), *ws["gate_up"])
            x = x + apply(jax.nn.silu(y[:, :14336]) * y[:, 14336:], *ws["down"])
        return x

    names = ("qkv", "o", "gate_up", "down")
    generate = {s: jax.jit(functools.partial(make, kind, *SHAPES[s])) for s in names}
    weights = [{s: generate[s](jax.random.key(i)) for s in names} for i in range(many)]
    x = jax.random.normal(jax.random.key(0), (rows, 4096), f32).astype(bf16)
    took = 32 * seconds(jax.jit(step), x, weights, least=1e-2) / many
    floor = 32 * sum(bytes_of(kind, *SHAPES[s]) for s in names) / rate
    note(f"32 layers, {kind} {how}, {rows} rows: {1e3 * took:.3f} ms, reading alone {1e3 * floor:.3f} ms")


def matvec_tiles() -> list[Any]:
    """(product of a layer or the head, tiles) that are tried for one row."""
    found = []
    for name, (inner, columns) in SHAPES.items():
        for rows, depth, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (2, 4, 8, 16)):
            each = 2 * rows * (2 if name == "gate_up" else 1) * inner // (32 * warps)  # bytes of w that a thread holds
            if inner % depth == 0 and 64 <= each <= 512 and depth * rows >= 256 * warps and columns % (2 * rows) == 0:
                found.append((name, one_row.Tiles(rows, depth, warps)))
    return found


def one_row_sweep(rate: float, deadline: float) -> None:
    """Products of one row with what a layer fuses with them, by all tiles: shares of the probe."""
    note("product of one row: tiles (rows, depth, warps), us, share of the probe")
    for name in SHAPES:
        todo = [tiles for n, tiles in matvec_tiles() if n == name]
        found = sorted(one_row_times(name, todo, deadline))
        size = bytes_of("bfloat16", *SHAPES[name])
        best = [f"{tuple(tiles)} {1e6 * took:.2f} {size / took / rate:.3f}" for took, tiles in found[:4]]
        note(f"{name}: {len(found)} of {len(todo)};", "; ".join(best))


def one_row_times(name: str, todo: list[Any], deadline: float, threads: int = 14) -> list[Any]:
    """(seconds, tiles) of one product by each of the tiles that compile."""
    inner, columns = SHAPES[name]
    many = max(1, min(24, (2 << 30) // bytes_of("bfloat16", inner, columns)))
    weights = [make("bfloat16", inner, columns, jax.random.key(i))[0][0] for i in range(many)]
    x, norm = jax.random.normal(jax.random.key(0), (1, inner), f32).astype(bf16), jnp.ones(inner, bf16)
    how: dict[str, Any] = dict(norm=norm, eps=1e-5) if name in ("qkv", "gate_up") else {}
    how |= dict(residual=jnp.ones((1, columns), bf16)) if name in ("o", "down") else {}
    how |= dict(gate="silu") if name == "gate_up" else {}
    how["out"] = f32 if name == "head" else bf16

    def build(tiles: Any) -> Any:
        call = jax.jit(lambda x, weights: [one_row.matvec_gpu(x, w, tiles=tiles, **how) for w in weights])
        try:
            return call.lower(x, weights).compile()
        except Exception as error:
            return str(error).splitlines()[0][:80]

    with ThreadPoolExecutor(threads) as pool:
        calls = list(pool.map(build, todo))
    good = [(tiles, call) for tiles, call in zip(todo, calls) if not isinstance(call, str)]
    return [(seconds(call, x, weights) / many, tiles) for tiles, call in good if time.time() < deadline]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=PARTS, help=f"of {PARTS}")
    parser.add_argument("--seconds", type=float, default=120, help="after which no more candidates are compiled")
    parser.add_argument("--out", help="where all times are written, as JSON")
    parser.add_argument("--types", default="bfloat16,int8", help="rows: of weights")
    parser.add_argument("--rows", default="8,32,64", help="rows: of x")
    parser.add_argument("--ways", type=int, default=1, help="devices that share each matrix: of one the part is timed")
    args = parser.parse_args()
    SHAPES.update({name: (k // args.ways, n) if name in ("o", "down") else (k, n // args.ways) for name, (k, n) in SHAPES.items()})
    note(jax.__version__, jax.devices()[0].device_kind)
    parts, deadline, results = args.only.split(","), START + args.seconds, []
    rate = probe()
    if "check" in parts:
        check()
    if "sweep" in parts:
        results += sweep(candidates(), rate, deadline)
    if "rows" in parts:
        results += sweep(several_rows(args.types, args.rows), rate, deadline)
    if "xla" in parts:  # one by one: XLA times its choices while it compiles
        results += sweep(by_xla(), rate, deadline, threads=1)
    table(results)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(dict(rate=rate, results=results), file)
    if "one_row" in parts:
        one_row_sweep(rate, deadline)
    if "layers" in parts:
        for kind, rows in (("int8", 1), ("int8", 64), ("float8_e4m3fn", 1), ("int4", 1), ("int4", 16), ("int4", 64), ("mxfp4", 1)):
            layers(kind, rows, rate)
        for how in ("entry", "matvec"):
            layers("bfloat16", 1, rate, how)


if __name__ == "__main__":
    main()
