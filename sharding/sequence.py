"""Attention with a sequence spread over the devices of a mesh axis, other than around a ring (ring.py): partial results over each device's
keys merged into one, and tokens exchanged for heads.

`merge_over`: every device has all queries and some of the keys; what each found is weighted by the logarithm of its softmax's sums
(Milakov and Gimelshein, arXiv 1805.02867). That is decoding, and chunks of prompts, over a cache whose pages lie on several devices.

`all_to_all_attention`: every device has some of the tokens; they are exchanged so that each has all tokens of some heads, attends as
one device would, and sends the results back (DeepSpeed-Ulysses: Jacobs et al., arXiv 2309.14509). It moves less than a ring where
there are heads enough, and needs all keys of a head on one device.

`sum_rows`: what is summed over devices between two products is left where each has its share of the tokens (Korthikanti et al.,
arXiv 2205.05198), so that norms and residuals work on that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.ring import attention, check


def merge_over(out: Any, lse: Any, axis: Any, sink_logits: Any = None, *, scatter: bool = False) -> tuple[Any, Any]:
    """Attention over all devices' keys from each one's attention over its own; inside of shard_map.

    out [..., H, D], lse float32 [..., H]: the natural logarithm of each row's sum of exponentials, -inf where the row sees no key here:
    `out` may then hold anything. axis: a mesh axis, or a tuple of them. sink_logits [H]: one more key without a value for each head,
    counted once. Returns (out of its dtype, lse), the same on every device: zeros and -inf where nobody has found a key. What is not a
    number stays so. One maximum and one sum are exchanged. scatter: each device gets its share of the rows (axis 0) only, which moves
    half as much."""
    top = lax.pmax(lse, axis)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    empty = lse == -jnp.inf
    weight = jnp.where(empty, 0.0, jnp.exp(lse - top))
    # Selected before it is weighted: what an empty device has may be no number, and zero times that is none.
    part = jnp.where(empty[..., None], 0.0, out.astype(jnp.float32) * weight[..., None])
    if scatter:
        shared = lambda x: lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        part, total, rows = shared(part), shared(weight), out.shape[0] // lax.axis_size(axis)
        top = lax.dynamic_slice_in_dim(top, lax.axis_index(axis) * rows, rows)
    else:
        part, total = lax.psum((part, weight), axis)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    merged = part / jnp.where(total == 0, 1.0, total)[..., None]
    if sink_logits is not None:
        sink = sink_logits.astype(jnp.float32)
        merged, lse = merged * jax.nn.sigmoid(lse - sink)[..., None], jnp.logaddexp(lse, sink)
    return merged.astype(out.dtype), lse


def sum_rows(y: Any, over: tuple[str, ...], rows: tuple[str, ...]) -> Any:
    """The sum over the mesh axes `over` of each device's y [T, ...], of which each gets its share of the rows over the axes `rows`, the
    first the coarsest: [T / their sizes, ...]; inside of shard_map. A sum for all moves twice as much."""
    y = y.reshape(*(lax.axis_size(name) for name in rows), -1, *y.shape[1:])
    for name in rows:
        if name not in over:  # all of them have the same sum
            y = lax.dynamic_index_in_dim(y, lax.axis_index(name), sum(each in over for each in rows[: rows.index(name)]), keepdims=False)
    scattered, rest = tuple(name for name in rows if name in over), tuple(name for name in over if name not in rows)
    y = y.reshape(-1, *y.shape[len(scattered) + 1 :])
    y = lax.psum_scatter(y, scattered, scatter_dimension=0, tiled=True) if scattered else y
    return lax.psum(y, rest) if rest else y


def legal_ways(heads: int, kv_heads: int) -> list[int]:
    """Over how many devices tokens can be exchanged for heads: each has whole query heads, and whole key-value heads or one for which
    several share."""
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def all_to_all_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    axis: str,
    scale: float,
    length: Any = None,
    window: Any = 0,
    softcap: float | None = None,
    attend: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """Causal attention of a prompt of T tokens, T / n of them on each device of a mesh axis in plain order; inside of shard_map
    (check_vma=False).

    q [T / n, Hq, D], k, v [T / n, Hkv, D]; query head h uses key-value head h // (Hq // Hkv). Returns (out like q, lse float32
    [T / n, Hq]). length, window, softcap: as ring_attention. attend: (q [T, Hq / n, D], k, v [T, heads, D]) -> (out, lse [T, Hq / n]),
    what one device attends with (a kernel; it knows scale, length, window and softcap itself); None: plain jnp.
    Raises ValueError for shapes that cannot work, with the numbers of devices that would."""
    check(q, k, v, even=False)
    n, heads, kv_heads = lax.axis_size(axis), q.shape[1], k.shape[1]
    if n not in (legal := legal_ways(heads, kv_heads)):
        raise ValueError(
            f"{axis}={n}: cannot exchange {heads} query heads and {kv_heads} kv heads; legal: {', '.join(map(str, legal))} "
            "(divides the query heads, and divides the kv heads or is a multiple of them)"
        )
    if n % kv_heads == 0:  # one each; those that share one all get it
        k, v = (x.repeat(n // kv_heads, axis=1) for x in (k, v))
    attend = attend or functools.partial(attention, scale=scale, length=length, window=window, softcap=softcap)
    to_heads = lambda x: lax.all_to_all(x, axis, split_axis=1, concat_axis=0, tiled=True)
    out, lse = attend(*map(to_heads, (q, k, v)))
    to_tokens = lambda x: lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True)
    return to_tokens(out), to_tokens(lse)
