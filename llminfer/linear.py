"""The one product that all matrices of the model go through, and what a layer does before and after it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from llminfer.config import ModelConfig
from llminfer.layers import activate, norm
from llminfer.quant import GROUPS, QTensor, Stacked, Turned, stack_of
from llminfer.target import Target
from pallas_kernels import matvec_gpu as gpu
from pallas_kernels.add_norm_gpu import add_norm_gpu
from pallas_kernels.peers_gpu import ROWS
from pallas_kernels.quantized_matmul import quantize_rows, quantized_matmul, quantized_matmul_reference
from pallas_kernels.quantized_matmul_gpu import eight_bit_sums, gated_matmul_gpu, quantized_matmul_gpu, run, tiles_for_gated, tiles_for_rows
from pallas_kernels.round_gpu import ACTIVATIONS, round_gpu
from pallas_kernels.weight_formats import LANES, packed
from sharding.sequence import sum_rows

FP8 = jnp.float8_e4m3fn
Norm = tuple[jax.Array, jax.Array | None]  # weight and bias


@flax.struct.dataclass
class Sum:
    """x [T, D] + y [T, D], or + all of y [parts, T, D], which what reads it adds up: together with its norm, on a GPU. by: what y [T, D], a
    product of 8-bit numbers, has still to be multiplied by: ([T, 1], [1, D]). across: y is to be added up over devices too."""

    x: jax.Array
    y: jax.Array
    by: Any = None
    across: bool = flax.struct.field(pytree_node=False, default=False)


class Shared(NamedTuple):
    """How rows lie of a product whose weights have their rows on several devices: x has its share over the mesh axes `before`, what is
    given over `after`, which begin with those; (): all are everywhere. axis: the logical one that is summed over."""

    axis: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class Rounded(NamedTuple):
    """Tokens in 8 bits, q [T, K] * amount [T, 1], for a GPU's products with weights of the same type."""

    q: jax.Array
    amount: jax.Array


def rows_times(x: Any, by: jax.Array) -> Any:
    """x [T, n], an array or Rounded, each row times its number of float32 [T, 1]."""
    return Rounded(x.q, x.amount * by) if isinstance(x, Rounded) else x * by.astype(x.dtype)


def linear(
    x: jax.Array,
    w: Any,
    c: ModelConfig,
    target: Target,
    *,
    bias: jax.Array | None = None,
    before: Norm | None = None,
    act: bool = False,
    residual: jax.Array | None = None,
    into: Any = None,
    shared: Shared | None = None,
) -> Any:
    """residual + act(norm(x) @ w + bias) of x [T, in], each part if asked for: before, the norm's weights; act, the mlp's activation,
    of the first half times the second where the model's mlp is gated. On a GPU all of it is one kernel for one row; for others the residual
    comes back as a Sum, to be given to `entered`, and what goes into weights that multiply 8-bit tokens (`into`) may come back Rounded.
    shared: where the rows of w are split over devices, and how rows lie then; None: every device has all of both."""
    if shared is not None and target.sums:
        return _across(x, w, c, target, bias, residual)
    shared = shared if shared is not None and shared.after else None
    plain = bias is None and (before is None or (c.norm == "rms" and before[1] is None)) and (residual is None or c.residual_scale == 1)
    gate = c.activation if act else None
    if plain and isinstance(w, Turned) and (not act or c.gated) and _one_row(x, w.w, target, gate):
        how: dict[str, Any] = {} if before is None else dict(norm=before[0], eps=c.norm_eps, offset=float(c.norm_offset))
        return gpu.matvec_gpu(x, w.w, **how, gate=gate, residual=residual, out=x.dtype, interpret=target.interpret)
    x = x if before is None else norm(x, before[0], before[1], c)
    if isinstance(w, QTensor) and (kind := _eight_bits(w, x, target)) is not None:
        tokens = x if isinstance(x, Rounded) else Rounded(*round_gpu(x, kind, interpret=target.interpret))
        sums, by = eight_bit_sums(*tokens, w.q, w.scale, interpret=target.interpret)
        gated = act and c.gated and bias is None and gate in ACTIVATIONS and sums.ndim == 2
        if gated and (kind := _eight_bits(into, x, target)) is not None:
            return Rounded(*round_gpu(sums, kind, gate=gate, by=by, interpret=target.interpret))
        if residual is not None and bias is None and not act and _sums_later(residual, c, target):
            return Sum(residual, sums, by)
        return _finish(scaled(sums, by), c, target, bias=bias, act=act, residual=residual)
    if act and c.gated and bias is None and gate in ACTIVATIONS and isinstance(w, Turned) and _gated_fits(x, w.w, target):
        return gated_matmul_gpu(x, w.w, gate, interpret=target.interpret)
    if residual is not None and bias is None and not act and isinstance(w, Turned) and _sums_later(residual, c, target):
        parts = _parts(x, w.w, target)
        if parts is not None:
            return Sum(residual, parts)
    return _finish(matmul(x, w, target, shared=shared), c, target, bias=bias, act=act, residual=residual)


def _across(x: Any, w: Any, c: ModelConfig, target: Target, bias: Any, residual: Any) -> Any:
    """`linear` of rows that are split over devices, of which each gives its part of the sum."""
    alone = replace(target, sums=())
    if residual is not None and bias is None and target.peers and len(residual) <= ROWS and _sums_later(residual, c, alone):
        one = len(residual) == 1  # whose kernel would add the residual
        found = linear(x, w, c, alone, residual=None if one else residual)
        return replace(Sum(residual, found) if one else found, across=True)
    y = lax.psum(linear(x, w, c, alone), target.sums)
    return _finish(y, c, alone, bias=bias, act=False, residual=residual)


def _finish(y: jax.Array, c: ModelConfig, target: Target, *, bias: Any, act: bool, residual: Any) -> Any:
    """What `linear` does after its product."""
    y = y if bias is None else y + bias
    if act and c.gated:
        left, right = _halves(y, target)
        y = (activate(left, c) * right).reshape(y.shape[0], -1)
    elif act:
        y = activate(y, c)
    if residual is None:
        return y
    return Sum(residual, y) if _sums_later(residual, c, target) else add(residual, y, c)


def scaled(sums: jax.Array, by: Any) -> jax.Array:
    """A product as eight_bit_sums gives it, or parts of one to be added up, in bfloat16."""
    if by is None:
        return sums if sums.ndim == 2 else sums.sum(0).astype(jnp.bfloat16)
    return (sums.astype(jnp.float32) * by[0] * by[1]).astype(jnp.bfloat16)


def _eight_bits(w: Any, x: Any, target: Target) -> Any:
    """The type to which a GPU rounds tokens x for weights w, None for no rounding."""
    whole = isinstance(w, QTensor) and w.turned and w.by_token and target.mesh is None
    return w.q.dtype if whole and (isinstance(x, Rounded) or x.dtype == jnp.bfloat16) else None


def _halves(y: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Gate and up of [T, 2 * F], [T, F] or, where a mesh splits them, [T, parts, F / parts] each; see arrange.Halves."""
    if (parts := target.ways("mlp")) == 1:
        left, right = jnp.split(y, 2, axis=-1)
        return left, right
    both = y.reshape(y.shape[0], parts, 2, -1)
    return both[:, :, 0], both[:, :, 1]


def _sums_later(x: jax.Array, c: ModelConfig, target: Target) -> bool:
    own = target.turned and target.mesh is None and not target.stacked and x.dtype == jnp.bfloat16
    return own and c.norm == "rms" and not c.norm_bias and c.residual_scale == 1


def entered(
    x: Any, before: Norm | None, c: ModelConfig, target: Target, into: Any = None, peers: Any = None
) -> tuple[jax.Array, Any, Norm | None]:
    """What goes into attention or mlp of a stream x, an array or a Sum: (x as an array, what is read of it, the norm that this still
    needs). into: the weights that read it. peers: Params.peers."""
    if not isinstance(x, Sum):
        return x, x, before
    if before is None:
        y = scaled(x.y, x.by)
        total = x.x + (lax.psum(y, target.sums) if x.across else y)
        return total, total, None
    kind = _eight_bits(into, x.x, target)
    how: dict[str, Any] = dict(eps=c.norm_eps, offset=float(c.norm_offset), interpret=target.interpret)
    how |= dict(peers=peers["table"][0]) if x.across else {}
    total, normed = add_norm_gpu(x.x, x.y, before[0], **how, kind=kind, by=x.by)
    return total, normed if kind is None else Rounded(*normed), None


def add(x: jax.Array, y: jax.Array, c: ModelConfig) -> jax.Array:
    """x + y as the model adds what a layer gives to what goes around it."""
    return x + (y if c.residual_scale == 1 else y * jnp.asarray(c.residual_scale, y.dtype))


def _ours(x: jax.Array, w: jax.Array, target: Target) -> bool:
    """Whether a GPU's kernels for bfloat16 are to be asked for x [T, in] and w [out, in]."""
    return target.turned and target.mesh is None and x.dtype == w.dtype == jnp.bfloat16


def _gated_fits(x: jax.Array, w: jax.Array, target: Target) -> bool:
    """Whether that for a product and its gate takes them, and is faster than both."""
    return _ours(x, w, target) and tiles_for_gated(x.shape[0], *w.shape) is not None


def _one_row(x: jax.Array, w: jax.Array, target: Target, gate: str | None = None) -> bool:
    """Whether that for one row takes them."""
    fits = x.shape[0] == 1 and gate in (None, *gpu.ACTIVATIONS) and gpu.matvec_fits(w.shape[0], w.shape[1], gate)
    return fits and _ours(x, w, target)


def matmul(x: jax.Array, w: Any, target: Target, out: Any = None, shared: Shared | None = None) -> jax.Array:
    """x [T, in] times w [in, out] (an array, Turned, a QTensor, or Stacked QTensor), summed in float32. out: None for x's dtype.
    shared: as in `linear`.

    A TPU multiplies quantized weights as they are, by the kernel that picks a layer out of its stack. On a CPU, where a conversion of
    the weights costs more than it saves, x is rounded to int8 by token whenever a channel has one scale."""
    if shared is not None and isinstance(w, (Turned, QTensor, Stacked)) and not _in_shards(w, target):  # XLA is to find a way
        return target.pinned(matmul(x, w, target, out), jax.sharding.PartitionSpec(shared.after))
    if isinstance(w, Turned):
        return rows_product(x, w.w, target, out or x.dtype)
    if not isinstance(w, (QTensor, Stacked)):
        return _product(x, w, out or x.dtype) if shared is None else _shared_product(x, w, out or x.dtype, target, shared)
    whole, layer = stack_of(w)
    if whole.by_token and whole.q.dtype == FP8 and not whole.turned:  # no product of fp8 alone: the rounded numbers as they are
        q, amount = quantize_rows(x, FP8)
        x, whole = (q.astype(jnp.float32) * amount).astype(x.dtype), replace(whole, by_token=False)
    if not whole.turned:  # whose product has the type of x
        x = x.astype(out or x.dtype)
    if _by_kernels(whole, target):
        kernel = functools.partial(_turned_product, out=out) if whole.turned else _by_kernel
        product = functools.partial(kernel, by_token=whole.by_token, target=target)
        return product(x, whole.q, whole.scale, layer) if target.mesh is None else _by_shards(product, x, whole, layer, target, shared)
    if target.platform == "cpu" and whole.scale.shape[-2] == 1 and whole.q.dtype == jnp.int8:
        return _int8_on_cpu(x, w if isinstance(w, QTensor) else jax.tree.map(lambda leaf: leaf[layer], whole))
    return quantized_matmul_reference(x, whole.q, whole.scale, layer=layer, quantize_x=whole.by_token)


def _by_kernels(whole: QTensor, target: Target) -> bool:
    return whole.turned or target.body != "reference"


def _in_shards(w: Any, target: Target) -> bool:
    """Whether each device of a mesh multiplies its part of quantized weights by itself."""
    return isinstance(w, (QTensor, Stacked)) and _by_kernels(stack_of(w)[0], target)


def _product(x: jax.Array, w: jax.Array, out: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
    return y.astype(out)


def _shared_product(x: jax.Array, w: jax.Array, out: Any, target: Target, shared: Shared) -> jax.Array:
    """The product with a part of `in` on each device. Left to itself XLA adds up float32, for twice the bytes."""
    over, spec = target.over(shared.axis), jax.sharding.PartitionSpec
    body = lambda x, w: sum_rows(_product(x, w, out), over, shared.after[len(shared.before) :])
    return target.split(body, (spec(shared.before or None, over or None), spec(over or None)), spec(shared.after))(x, w)


def head_product(x: jax.Array, head: Any, target: Target) -> jax.Array:
    """float32 [T, V] of x [T, D] and a head [V, D], or a QTensor of [D, V]."""
    return matmul(x, head, target, jnp.float32) if isinstance(head, QTensor) else rows_product(x, head, target)


def rows_product(x: jax.Array, w: jax.Array, target: Target, out: Any = jnp.float32) -> jax.Array:
    """[T, out] of x [T, in] and w [out, in], in the type `out`, summed in float32."""
    if _one_row(x, w, target):
        return gpu.matvec_gpu(x, w, out=out, interpret=target.interpret)
    if (parts := _parts(x, w, target, out)) is not None:
        return functools.reduce(jnp.add, list(parts)).astype(out)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    # cuBLAS sums in float32 whatever it returns, and a conversion after it would be a pass over memory of its own.
    wide = out if target.platform == "gpu" else jnp.float32
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=wide).astype(out)


def _parts(x: jax.Array, w: jax.Array, target: Target, out: Any = None) -> jax.Array | None:
    """The product as float32 sums [parts, T, out] of parts of `in`, or one part in `out`, by our kernel where that is faster than XLA's."""
    tiles = tiles_for_rows("bfloat16", x.shape[0], w.shape[0], w.shape[1]) if _ours(x, w, target) else None
    return None if tiles is None else run(x, w[None], None, tiles, kind="bfloat16", out=out, interpret=target.interpret)


def _turned_product(
    x: jax.Array, q: jax.Array, scale: jax.Array, layer: jax.Array, *, by_token: bool, target: Target, out: Any = None
) -> jax.Array:
    whole: Any = 0 if q.shape[0] == 1 else layer  # a number is better than one that a kernel must read
    return quantized_matmul_gpu(x, q, scale, layer=whole, quantize_x=by_token, out=out, interpret=target.interpret)


def _by_kernel(x: jax.Array, q: jax.Array, scale: jax.Array, layer: jax.Array, *, by_token: bool, target: Target) -> jax.Array:
    """Groups that are none of the kernel's, and sizes that quant.whole_rows could not make whole, are left to XLA."""
    inner = q.shape[1] * packed(q.dtype)
    x = jnp.pad(x, ((0, 0), (0, inner - x.shape[1])))  # rows behind those of the matrix are zeros
    fits = inner % LANES == 0 and q.shape[2] >= LANES and (scale.shape[1] == 1 or inner // scale.shape[1] in GROUPS)
    if not fits:
        return quantized_matmul_reference(x, q, scale, layer=layer, quantize_x=by_token)
    return quantized_matmul(x, q, scale, layer=layer, quantize_x=by_token, chip=target.chip, impl=target.kernels)


def _by_shards(product: Any, x: jax.Array, w: QTensor, layer: jax.Array, target: Target, shared: Shared | None = None) -> jax.Array:
    """The product with w split over the mesh as its axes say, since a kernel is not split by XLA: columns give columns, and what rows
    give is added up. With by_token each part of a row has a scale of its own."""
    rows, columns = target.partition(w.axes)
    stored, over = split_specs(w, w.axes, target), target.over(w.axes[-2])
    before, after = (shared.before or None, shared.after) if shared else (None, ())

    def body(x: jax.Array, q: jax.Array, scale: jax.Array, layer: jax.Array) -> jax.Array:
        y = product(x, q, scale, layer)
        return sum_rows(y, over, after[len(before or ()) :]) if after else lax.psum(y, over) if over else y

    spec = jax.sharding.PartitionSpec
    return target.split(body, (spec(before, rows), stored.q, stored.scale, spec()), spec(after or None, columns))(x, w.q, w.scale, layer)


def split_specs(w: Any, axes: tuple[str, ...], target: Target) -> Any:
    """PartitionSpecs of a matrix [in, out] of these logical axes as it is held: an array, Turned, a QTensor, or one in its stack."""
    spec = jax.sharding.PartitionSpec
    if isinstance(w, Stacked):
        return Stacked(split_specs(w.whole, axes, target), spec())
    rows, columns = target.partition(axes)
    whole = lambda leaf: (None,) * (leaf.ndim - 2)
    if isinstance(w, Turned):
        return Turned(spec(*whole(w.w), columns, rows))
    if isinstance(w, QTensor):
        stored = (columns, rows) if w.turned else (rows, columns)
        groups = rows if w.scale.shape[-2] > 1 else None  # a scale of all rows is on every device that has some of them
        return replace(w, q=spec(*whole(w.q), *stored), scale=spec(*whole(w.scale), groups, columns))
    return spec(*whole(w), rows, columns)


def _int8_on_cpu(x: jax.Array, w: QTensor) -> jax.Array:
    """int8 x int8, x rounded by token. XLA:CPU has a fast such product for two rows and more, and none for one."""
    whole, amount = quantize_rows(x)
    rows = max(2, x.shape[0])
    whole = jnp.pad(whole, ((0, rows - x.shape[0]), (0, 0)))
    y = lax.dot_general(whole, w.q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)[: x.shape[0]]
    return (y.astype(jnp.float32) * amount * w.scale).astype(x.dtype)
