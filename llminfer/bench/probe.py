"""What this machine can do on the day: bytes read a second, and operations of matrix products a second, by plain XLA programs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llminfer.target import devices


def seconds(call: Callable[..., Any], *args: Any, least: float = 1e-2, times: int = 5) -> float:
    """Median time of one call, in seconds, of several sent one after the other that take `least` together."""
    jax.block_until_ready(call(*args))
    begin = time.perf_counter()
    jax.block_until_ready(call(*args))
    many = max(2, min(200, int(least / (time.perf_counter() - begin)) + 1))
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        for _ in range(many):
            made = call(*args)
        jax.block_until_ready(made)
        found.append((time.perf_counter() - begin) / many)
    return statistics.median(found)


def read_rate(size: int) -> float:
    """Bytes a second of reading `size` bytes."""
    data = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)
    return data.nbytes / seconds(jax.jit(jnp.sum), data)


def matmul_rate(size: int, dtype: Any) -> float:
    """Operations a second of the product of two square matrices of `size` random rows, two for each term; `least` long enough for a
    card's power limit to bind."""
    a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    return 2 * size**3 / seconds(jax.jit(lambda a, b: a @ b), a, b, least=0.2)


def probe() -> dict[str, float]:
    """read_bytes_per_s and matmul_flops_per_s of the first device: 2 GiB, and bfloat16 of 8192 rows; of a CPU 256 MiB, and
    float32 of 1024."""
    small = devices()[0].platform == "cpu"
    rate = matmul_rate(1024, jnp.float32) if small else matmul_rate(8192, jnp.bfloat16)
    return {"read_bytes_per_s": read_rate(1 << 28 if small else 1 << 31), "matmul_flops_per_s": rate}
