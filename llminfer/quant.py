"""Quantized weights, how they are made, and the one product that all matrices of the model go through."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llminfer.errors import refuse
from llminfer.target import Target
from pallas_kernels.quantized_matmul import quantize_rows, quantized_matmul, quantized_matmul_reference
from pallas_kernels.quantized_matmul_gpu import for_gpu, matvec_fits, matvec_gpu, quantized_matmul_gpu
from pallas_kernels.weight_formats import LANES, MXFP4_GROUP, mxfp4_values, quantize_mxfp4, values
from sharding.rules import partition

GROUPS = (128, 64, 32)  # inputs that share a scale of int4, the first that divides


@flax.struct.dataclass
class QTensor:
    """A matrix of small numbers, w[i, o] = q[i, o] * scale[i // group, o]. Leading axes (layers, experts) are carried along.

    axes: logical names of in and out, by which a mesh splits it. by_token: x is rounded to int8 too, token by token. turned: q lies as
    pallas_kernels.quantized_matmul_gpu says, [..., out, in]."""

    # int8 or int4 [..., in, out], or uint8 [..., in / 2, out], MXFP4 as pallas_kernels.weight_formats says. On a CPU all are kept in int8:
    # XLA:CPU hangs in the compilation of some programs with int4.
    q: Any
    scale: Any  # float32 (MXFP4: bfloat16) [..., in / group, out]; one group is one scale for each output channel
    axes: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    by_token: bool = flax.struct.field(pytree_node=False, default=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Turned:
    """A matrix as a GPU reads it fastest, all that makes one output beside each other."""

    w: Any  # [..., out, in]


@flax.struct.dataclass
class Stacked:
    """A weight of one layer that stays in its stack, since a kernel that is given a slice of it would be given a copy."""

    whole: Any  # array or QTensor, leaves [layers, ...]
    layer: Any  # int32 scalar


def stack_of(w: Any) -> tuple[Any, Any]:
    """(weights [layers, ...], layer) of a weight that may be a stack's, or one by itself."""
    return (w.whole, w.layer) if isinstance(w, Stacked) else (jax.tree.map(lambda leaf: leaf[None], w), jnp.int32(0))


def quantize_int8(w: jax.Array, axes: tuple[str, ...] = (), *, by_token: bool = False) -> QTensor:
    """Symmetric rounding of w [..., in, out] to -127..127 by the largest magnitude of each column."""
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axis=-2, keepdims=True), 1e-30) / 127.0
    return QTensor(jnp.round(w / scale).astype(jnp.int8), scale, axes, by_token)


def quantize_int4(w: jax.Array, axes: tuple[str, ...] = (), *, ways: int = 1, dtype: Any = jnp.int4) -> QTensor:
    """Symmetric rounding of w [..., in, out] to -7..7 by the largest magnitude of each column of a group of inputs: 128 of them, or 64,
    or 32, the first that divides each of `ways` parts of `in`; all of them if none does. dtype: what holds the numbers."""
    *rest, inner, out = w.shape
    group = next((size for size in GROUPS if inner % (size * ways) == 0), inner)
    grouped = w.astype(jnp.float32).reshape(*rest, inner // group, group, out)
    scale = jnp.maximum(jnp.abs(grouped).max(axis=-2, keepdims=True), 1e-30) / 7.0
    return QTensor(jnp.round(grouped / scale).reshape(w.shape).astype(dtype), scale[..., 0, :], axes)


def quantize_to_mxfp4(w: jax.Array, axes: tuple[str, ...] = (), *, ways: int = 1, whole: bool = False) -> QTensor:
    """Rounding of w [..., in, out] to MXFP4, whose groups are 32 inputs. whole: kept as int8, twice the numbers with half the scales.
    Raises UserError where groups do not divide each of `ways` parts of `in`."""
    if w.shape[-2] % (MXFP4_GROUP * ways):
        parts = f" in {ways} parts" if ways > 1 else ""
        rule = f"a matrix of {w.shape[-2]} inputs{parts} has no whole groups of {MXFP4_GROUP}; legal: int8, int4, w8a8"
        raise refuse("quantize", "mxfp4", rule)
    q, scale = quantize_mxfp4(w)
    return QTensor((2 * mxfp4_values(q)).astype(jnp.int8), scale.astype(jnp.float32) / 2, axes) if whole else QTensor(q, scale, axes)


def dequantize(w: QTensor) -> np.ndarray:
    """The float32 matrix that a QTensor stands for, on the host."""
    q, scale = np.asarray(values(w.q)), np.asarray(w.scale).astype(np.float32)
    grouped = q.reshape(*scale.shape[:-1], -1, scale.shape[-1])
    return (grouped * scale[..., None, :]).reshape(q.shape)


def maker(kind: str | None, axes: tuple[str, ...], ways: int, target: Target) -> Any:
    """The function that makes of a matrix [..., in, out] of these logical axes, of which a mesh cuts the rows in so many ways, what the
    target multiplies with; None where that is the matrix itself. Experts' matrices are not turned."""
    rounded, turned = _quantizer(kind, axes, ways, target), target.turned and "experts" not in axes
    if not turned:
        return rounded
    return (lambda w: Turned(jnp.swapaxes(w, -1, -2))) if rounded is None else lambda w: turn(rounded(w), ways)


def turn(w: QTensor, ways: int = 1) -> QTensor:
    """A QTensor as a GPU wants it. Two groups share bytes there: where each of `ways` parts of `in` has not an even number of them, int4 is
    kept as int8. Raises UserError for such MXFP4."""
    q = w.q
    if w.scale.shape[-2] % (2 * ways):
        if q.dtype == jnp.uint8:
            inner = 2 * q.shape[-2]
            rule = f"a matrix of {inner} inputs has no even number of groups of {MXFP4_GROUP} in {ways} parts; legal: int8, int4, w8a8"
            raise refuse("quantize", "mxfp4", rule)
        q = q.astype(jnp.int8) if q.dtype == jnp.int4 else q
    return replace(w, q=for_gpu(q, w.scale), turned=True)


def _quantizer(kind: str | None, axes: tuple[str, ...], ways: int, target: Target) -> Any:
    """The function that quantizes a matrix of these logical axes, of which a mesh cuts the rows in so many ways; None for no kind."""
    if kind is None:
        return None
    if kind == "mxfp4":
        return functools.partial(quantize_to_mxfp4, axes=axes[-2:], ways=ways, whole=target.platform == "cpu")
    if kind == "int4":
        dtype = jnp.int8 if target.platform == "cpu" else jnp.int4
        return functools.partial(quantize_int4, axes=axes[-2:], ways=ways, dtype=dtype)
    return functools.partial(quantize_int8, axes=axes[-2:], by_token=kind == "w8a8")


def matmul(x: jax.Array, w: Any, target: Target) -> jax.Array:
    """x [T, in] times w [in, out] (an array, Turned, a QTensor, or Stacked QTensor), in x's dtype, summed in float32.

    A TPU multiplies quantized weights as they are, by the kernel that picks a layer out of its stack. On a CPU, where a conversion of
    the weights costs more than it saves, x is rounded to int8 by token whenever a channel has one scale."""
    if isinstance(w, Turned):
        return rows_product(x, w.w, target).astype(x.dtype)
    if not isinstance(w, (QTensor, Stacked)):
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        y = lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)
    whole, layer = stack_of(w)
    if whole.turned or target.body != "reference":
        product = functools.partial(_turned_product if whole.turned else _by_kernel, by_token=whole.by_token, target=target)
        return product(x, whole.q, whole.scale, layer) if target.mesh is None else _by_shards(product, x, whole, layer, target.mesh)
    if target.platform == "cpu" and whole.scale.shape[-2] == 1:
        return _int8_on_cpu(x, w if isinstance(w, QTensor) else jax.tree.map(lambda leaf: leaf[layer], whole))
    return quantized_matmul_reference(x, whole.q, whole.scale, layer=layer, quantize_x=whole.by_token)


def rows_product(x: jax.Array, w: jax.Array, target: Target) -> jax.Array:
    """float32 [T, out] of x [T, in] and w [out, in]. One row is multiplied by a kernel on a GPU, which reads w faster than XLA's."""
    one = target.turned and target.mesh is None and x.shape[0] == 1 and x.dtype == w.dtype == jnp.bfloat16
    if one and matvec_fits(*w.shape):
        return matvec_gpu(x, w, interpret=target.interpret)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _turned_product(x: jax.Array, q: jax.Array, scale: jax.Array, layer: jax.Array, *, by_token: bool, target: Target) -> jax.Array:
    whole: Any = 0 if q.shape[0] == 1 else layer  # a number is better than one that a kernel must read
    return quantized_matmul_gpu(x, q, scale, layer=whole, quantize_x=by_token, interpret=target.interpret)


def _by_kernel(x: jax.Array, q: jax.Array, scale: jax.Array, layer: jax.Array, *, by_token: bool, target: Target) -> jax.Array:
    """Sizes that are no multiples of a register's lanes, or groups that are none of the kernel's, are left to XLA."""
    inner, out = x.shape[1], q.shape[2]
    fits = inner % LANES == 0 and out % LANES == 0 and (scale.shape[1] == 1 or inner // scale.shape[1] in GROUPS)
    if not fits:
        return quantized_matmul_reference(x, q, scale, layer=layer, quantize_x=by_token)
    return quantized_matmul(x, q, scale, layer=layer, quantize_x=by_token, chip=target.chip, impl=target.kernels)


def _by_shards(product: Any, x: jax.Array, w: QTensor, layer: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """The product with w split over the mesh as its axes say, since a kernel is not split by XLA: columns give columns, and what rows
    give is added up. With by_token each part of a row has a scale of its own."""
    rows, columns = (axis for axis in partition(w.axes))
    many = w.scale.shape[1] > 1

    def body(x: jax.Array, q: jax.Array, scale: jax.Array, layer: jax.Array) -> jax.Array:
        y = product(x, q, scale, layer)
        return y if rows is None else lax.psum(y, rows)

    spec = jax.sharding.PartitionSpec
    stored = (columns, rows) if w.turned else (rows, columns)
    specs = (spec(None, rows), spec(None, *stored), spec(None, rows if many else None, columns), spec())
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=spec(None, columns), check_vma=False)(x, w.q, w.scale, layer)


def _int8_on_cpu(x: jax.Array, w: QTensor) -> jax.Array:
    """int8 x int8, x rounded by token. XLA:CPU has a fast such product for two rows and more, and none for one."""
    whole, amount = quantize_rows(x)
    rows = max(2, x.shape[0])
    whole = jnp.pad(whole, ((0, rows - x.shape[0]), (0, 0)))
    y = lax.dot_general(whole, w.q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)[: x.shape[0]]
    return (y.astype(jnp.float32) * amount * w.scale).astype(x.dtype)
