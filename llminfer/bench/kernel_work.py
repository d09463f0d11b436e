"""The kernels on standard shapes: what to run, what it reads and computes, and which block sizes to try. Imports jax late."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One row of the table: sizes for the op's maker; small: other sizes for an interpreter, where the case is checked by one."""

    name: str
    op: str
    sizes: dict[str, Any]
    small: dict[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """run(impl, blocks, *args) does it. args: a shape to be drawn at random, or the array itself. feeds: argument -> output that takes
    its place in a next call. key: what tuned.toml knows the shape by. hbm_bytes: what it cannot but move."""

    run: Callable[..., Any]
    args: list[Any]
    flops: float
    hbm_bytes: float
    key: dict[str, int | str]
    feeds: dict[int, int] = field(default_factory=dict)
    candidates: list[dict[str, int]] = field(default_factory=list)


LLAMA, SMALL = dict(heads=32, kv_heads=8, dim=128), dict(heads=4, kv_heads=2, dim=128)
PAGED, TINY = dict(context=2048, page=128, **LLAMA), dict(page=16, pool=12, **SMALL)
WIDE, LITTLE = dict(inner=4096, columns=14336), dict(rows=8, inner=256, columns=256)


def _paged(name: str, new: list[int], small: dict[str, Any] | None = None, **other: Any) -> Case:
    return Case(f"paged_attention.{name}", "paged_attention", dict(new=new, **(PAGED | other)), dict(small, **TINY) if small else {})


def _quantized(name: str, rows: int, small: dict[str, Any] | None = None, **other: Any) -> Case:
    how = {key: value for key, value in other.items() if key not in WIDE}
    sizes: dict[str, Any] = dict(rows=rows, **(WIDE | other))
    return Case(f"quantized_matmul.{name}", "quantized_matmul", sizes, {} if small is None else LITTLE | how | small)


CASES = [
    _paged("decode", 64 * [1], dict(new=[1, 1], context=70)),
    _paged("decode.page16", 64 * [1], page=16),
    _paged("decode.batch256", 256 * [1], page=64),
    _paged("decode.context128", 64 * [1], context=128),
    _paged("decode.context32768", 16 * [1], context=32768),
    _paged("decode.int8", 64 * [1], dict(new=[1, 1], context=70, cache="int8"), cache="int8"),
    _paged("prefill", 8 * [256], dict(new=[24], context=40)),
    _paged("mixed", 8 * [256] + 56 * [1], dict(new=[20, 1], context=40)),  # as a batch is packed
    Case("flash_attention", "flash_attention", dict(batch=1, tokens=4096, **LLAMA), dict(batch=1, tokens=140, **SMALL)),
    Case(
        "grouped_matmul",
        "grouped_matmul",
        dict(rows=1024, experts=64, inner=2048, columns=1536),
        dict(rows=32, experts=4, inner=128, columns=128),
    ),
    _quantized("int8", 8, {}),
    _quantized("int4", 8, dict(inner=1024, columns=128), weights="int4", group=128),
    _quantized("mxfp4", 8, {}, weights="mxfp4", group=32),
    _quantized("w8a8", 8, {}, whole=True),
    _quantized("int8.rows2048", 2048),
    _quantized("int4.rows2048", 2048, weights="int4", group=128),
    _quantized("mxfp4.rows2048", 2048, weights="mxfp4", group=32),
    _quantized("w8a8.rows2048", 2048, whole=True),
]
# For the tuner: heads of models beside Llama-3.1-8B's; Llama-3.1-8B's matrices, and those of Qwen3-30B-A3B's attention and experts (8 of
# 128 for a token).
HEADS: dict[str, Any] = {
    "qwen3_30b": dict(heads=32, kv_heads=4, dim=128),
    "gemma3_4b": dict(heads=8, kv_heads=4, dim=256),
    "llama3_1b": dict(heads=32, kv_heads=8, dim=64),
}
MATRICES = {
    **{"llama_qkv": (4096, 6144), "llama_o": (4096, 4096), "llama_up": (4096, 28672), "llama_down": (14336, 4096)},
    **{"qwen_qkv": (2048, 5120), "qwen_o": (4096, 2048)},
}
KINDS: dict[str, dict[str, Any]] = {"int8": {}, "int4": dict(weights="int4", group=128)}
EXPERTS = {"qwen_up": (2048, 768, "silu"), "qwen_down": (768, 2048, "")}
MODELS = [
    *[
        _paged(f"{kind}.{name}", new, **heads)
        for kind, new in dict(decode=64 * [1], prefill=8 * [256]).items()
        for name, heads in HEADS.items()
    ],
    *[
        _quantized(f"{kind}.{name}.rows{rows}", rows, inner=inner, columns=columns, **how)
        for kind, how in KINDS.items()
        for name, (inner, columns) in MATRICES.items()
        for rows in (8, 64)
    ],
    *[
        Case(
            f"grouped_matmul.{name}.rows{rows}",
            "grouped_matmul",
            dict(rows=rows, experts=128, inner=inner, columns=columns, activation=activation, even=False),
        )
        for name, (inner, columns, activation) in EXPERTS.items()
        for rows in (64, 512, 4096)
    ],
]


def make(case: Case, chip: str, small: bool = False) -> Work:
    """The work of a case for a chip. small: of a size for an interpreter."""
    return {
        "paged_attention": paged_attention,
        "flash_attention": flash_attention,
        "grouped_matmul": grouped_matmul,
        "quantized_matmul": quantized_matmul,
    }[case.op](chip, **(case.small if small else case.sizes))


def paged_attention(
    chip: str, new: list[int], context: int, page: int, heads: int, kv_heads: int, dim: int, pool: int = 0, cache: str = "bfloat16"
) -> Work:
    """Sequences with new[i] tokens each, of length `context` with them; their pages lie anywhere among `pool` (0: as many as they have,
    512 MB at least: the compiler would put a small pool in VMEM). Blocks are tuned where one kernel runs and a context is neither much
    longer nor much shorter than blocks: what is best there is good for all."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.paged_attention import paged_attention as op

    rows, seqs, pages, size = sum(new), len(new), -(-context // page), jnp.dtype(cache).itemsize
    pool = pool or max(seqs * pages, (1 << 28) // (kv_heads * page * dim * size))
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    table = np.random.default_rng(0).permutation(pool)[: seqs * pages].reshape(seqs, pages).astype(np.int32)
    starts, lengths = np.cumsum([0, *new[:-1]]).astype(np.int32), np.array(new, np.int32)

    def run(impl, blocks, q, k, v, kv, *others):
        names = ("layer", "window", "page_table", "q_start", "q_len", "kv_len", "kv_scale")
        static: dict[str, Any] = dict(scale=dim**-0.5, q_max=max(new), chip=known(chip), blocks=blocks, impl=impl)
        return op(q, k, v, kv, **dict(zip(names, others)), **static)

    kv, each = shape(1, pool, kv_heads, page, 2 * dim, dtype=jnp.dtype(cache)), shape(rows, kv_heads, dim)
    zero = np.zeros((), np.int32)
    args = [shape(rows, heads, dim), each, each, kv, zero, zero, table, starts, lengths, np.full(seqs, context, np.int32)]
    args += [shape(1, pool, 2 * kv_heads, dtype=jnp.float32)] if size == 1 else []
    pairs = sum(n * (context - n) + n * (n + 1) / 2 for n in new)
    moved = seqs * context * kv_heads * 2 * dim * size + 2 * rows * (2 * heads + 2 * kv_heads) * dim  # what is new is written, not read
    feeds = {3: 1, 10: 2} if size == 1 else {3: 1}
    kind = "decode" if max(new) == 1 else "tiles"
    key: dict[str, int | str] = dict(kind=kind, kv_heads=kv_heads, group=heads // kv_heads, head_dim=dim, page=page, dtype=cache)
    candidates = [dict(block_k=keys) for keys in (256, 512, 2048)]
    if kind == "tiles":
        candidates = [dict(block_k=k, piece=n, tile=t) for k in (512, 1024, 2048) for n in (256, 512, 1024) for t in (128, 256) if n <= k]
    steady = context == 2048 and min(new) == max(new)
    return Work(run, args, 4 * dim * heads * pairs, moved, key, feeds, candidates if steady else [])


def flash_attention(chip: str, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Work:
    """Causal prompts of `tokens` each."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.flash_attention import flash_attention as op

    shape = lambda heads: jax.ShapeDtypeStruct((batch, tokens, heads, dim), jnp.bfloat16)
    run = lambda impl, blocks, q, k, v: op(q, k, v, scale=dim**-0.5, blocks=blocks, chip=chip, impl=impl)
    flops, moved = 4 * dim * heads * batch * tokens * (tokens + 1) / 2, 4 * batch * tokens * dim * (heads + kv_heads)
    sizes = [(128, 512, 1024), (256, 512, 1024), (256, 1024, 1024), (256, 512, 2048), (256, 1024, 2048), (512, 512, 512), (512, 1024, 1024)]
    candidates = [dict(step=step, block_q=q, block_k=k) for step, q, k in sizes]
    key: dict[str, int | str] = dict(head_dim=dim, group=heads // kv_heads, dtype="bfloat16")
    return Work(run, [shape(heads), shape(kv_heads), shape(kv_heads)], flops, moved, key, candidates=candidates)


def grouped_matmul(chip: str, rows: int, experts: int, inner: int, columns: int, activation: str = "", even: bool = True) -> Work:
    """Rows over experts, as many for each, or drawn at random; columns: of the output. Blocks are tuned for random shares only: a window
    that fits equal ones costs 5% more bundles at random ones, and 16% more where shares fall as 1 / rank."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import Blocks
    from pallas_kernels.grouped_matmul import grouped_matmul as op

    def run(impl, blocks, x, w, counts):
        how: dict[str, Any] = dict(activation=activation or None, chip=known(chip), impl=impl)
        return op(x, w, counts, blocks=Blocks(**blocks) if blocks else None, **how)

    halves = 2 if activation else 1
    x, w = (jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in ((rows, inner), (1, experts, inner, halves * columns)))
    counts = np.diff(np.arange(experts + 1) * rows // experts)
    counts = (counts if even else np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts))).astype(np.int32)
    moved = 2 * (int((counts > 0).sum()) * inner * halves * columns + rows * (inner + columns))
    widths = [n for n in (128, 256, 512, 768, 1024, 1536, 2048) if columns % n == 0]
    windows = () if even else (64, 128, 256)
    candidates = [dict(block_m=rows, block_n=n, window=window) for n in widths[-2:] for window in windows]
    key: dict[str, int | str] = dict(experts=experts, inner=inner, columns=columns, rows=rows, halves=halves, bits=16)
    return Work(run, [x, w, counts], 2 * rows * inner * halves * columns, moved, key, candidates=candidates)


def quantized_matmul(chip: str, rows: int, inner: int, columns: int, weights: str = "int8", group: int = 0, whole: bool = False) -> Work:
    """bfloat16 rows times int8, int4 or mxfp4 weights, scales of a column, or of a group of `group`; whole: rows are rounded to int8."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import weight_formats
    from pallas_kernels.quantized_matmul import quantized_matmul as op

    def run(impl, blocks, x, w, scale):
        sizes = (blocks["rows"], blocks["inner"], blocks["columns"]) if blocks else None
        return op(x, w, scale, layer=0, quantize_x=whole, chip=known(chip), blocks=sizes, impl=impl)

    shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))
    held, scales = (jnp.dtype("uint8"), "bfloat16") if weights == "mxfp4" else (jnp.dtype(weights), "float32")
    bits = weight_formats.bits(held)
    scale = shape(scales, 1, inner // group, columns) if group else shape(scales, 1, columns)
    args = [shape("bfloat16", rows, inner), shape(held, 1, inner // weight_formats.packed(held), columns), scale]
    moved = inner * columns * bits / 8 + scale.dtype.itemsize * math.prod(scale.shape) + 2 * rows * (inner + columns)
    sizes = [(k, n) for k in (1024, 2048, 4096, inner) if inner % k == 0 for n in (512, 1024, 2048) if n <= columns]
    fits = (lambda size: 2 << 20 <= size * bits // 8 <= 4 << 20) if rows <= 128 else lambda size: size <= 1 << 20
    candidates = [dict(rows=min(rows, 512), inner=k, columns=n) for k, n in dict.fromkeys(sizes) if fits(k * n)]
    key: dict[str, int | str] = dict(rows=rows, inner=inner, columns=columns, bits=bits, group=group)
    return Work(run, args, 2 * rows * inner * columns, moved, key, candidates=candidates)


def known(chip: str) -> str:
    """The chip, or where there is none that the kernels know, one whose kernel an interpreter can run."""
    return chip if chip in ("v4", "v5e", "v5p", "v6e", "tpu7x") else "v5e"


def draw(work: Work, seed: int = 0) -> list[Any]:
    """The arguments as arrays: normal numbers, integers over their whole range; a tenth of that as scales of weights."""
    import jax
    import jax.numpy as jnp

    keys, made = jax.random.split(jax.random.key(seed), len(work.args)), []
    for key, arg in zip(keys, work.args, strict=True):
        if not hasattr(arg, "sharding"):
            made.append(jnp.asarray(arg))
        elif jnp.issubdtype(arg.dtype, jnp.integer):
            bits = jnp.iinfo(arg.dtype)
            made.append(jax.random.randint(key, arg.shape, bits.min, bits.max + 1, jnp.int32).astype(arg.dtype))
        elif arg.dtype == jnp.float32:
            made.append(jax.random.uniform(key, arg.shape, jnp.float32, 0.001, 0.01))
        else:
            made.append(jax.random.normal(key, arg.shape, jnp.float32).astype(arg.dtype))
    return made
