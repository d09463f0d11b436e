"""Quantized weights, and how they are made."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llminfer.errors import refuse
from llminfer.target import Target
from pallas_kernels.quantized_matmul_gpu import for_gpu
from pallas_kernels.weight_formats import LANES, MXFP4_GROUP, mxfp4_values, quantize_mxfp4, turned_values, values

GROUPS = (128, 64, 32)  # inputs that share a scale of int4, the first that divides


@flax.struct.dataclass
class QTensor:
    """A matrix of small numbers, w[i, o] = q[i, o] * scale[i // group, o]. Leading axes (layers, experts) are carried along.

    axes: logical names of in and out, by which a mesh splits it. by_token: tokens are rounded to the type of q too.
    turned: q lies as pallas_kernels.quantized_matmul_gpu says, [..., out, in]."""

    # int8, int4 or float8_e4m3fn [..., in, out], or uint8 [..., in / 2, out], MXFP4 as pallas_kernels.weight_formats says. On a CPU those
    # of 4 bits are kept in int8: XLA:CPU hangs in the compilation of some programs with int4.
    q: Any
    scale: Any  # float32 (MXFP4: bfloat16) [..., in / group, out]; one group is one scale for each output channel
    axes: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    by_token: bool = flax.struct.field(pytree_node=False, default=False)
    turned: bool = flax.struct.field(pytree_node=False, default=False)
    paired: bool = flax.struct.field(pytree_node=False, default=False)  # turned, two numbers to a byte


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


def quantize_fp8(w: jax.Array, axes: tuple[str, ...] = (), *, by_token: bool = False) -> QTensor:
    """Rounding of w [..., in, out] to float8_e4m3fn, the largest magnitude of each column to 448: Micikevicius et al.,
    arXiv 2209.05433."""
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(w).max(axis=-2, keepdims=True), 1e-30) / 448.0
    return QTensor((w / scale).astype(jnp.float8_e4m3fn), scale, axes, by_token)


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
        rule = f"a matrix of {w.shape[-2]} inputs{parts} has no whole groups of {MXFP4_GROUP}; legal: int8, fp8, int4, w8a8, w8a8_fp8"
        raise refuse("quantize", "mxfp4", rule)
    q, scale = quantize_mxfp4(w)
    return QTensor((2 * mxfp4_values(q)).astype(jnp.int8), scale.astype(jnp.float32) / 2, axes) if whole else QTensor(q, scale, axes)


def dequantize(w: QTensor) -> np.ndarray:
    """The float32 matrix that a QTensor stands for, on the host."""
    q, scale = np.asarray(w.q), np.asarray(w.scale).astype(np.float32)
    if w.paired:
        q = turned_values(q, 2 * q.shape[-1] // scale.shape[-2])
    q = np.asarray(q.swapaxes(-1, -2).astype(np.float32) if w.turned else values(q))
    grouped = q.reshape(*scale.shape[:-1], -1, scale.shape[-1])
    return (grouped * scale[..., None, :]).reshape(q.shape)


def maker(kind: str | None, axes: tuple[str, ...], ways: int, target: Target) -> Any:
    """The function that makes of a matrix [..., in, out] of these logical axes, of which a mesh cuts the rows in so many ways, what the
    target multiplies with; None where that is the matrix itself. Of experts' matrices only those of 4 bits are turned. A TPU's have whole
    registers of rows."""
    rounded = _quantizer(kind, axes, ways, target)
    if rounded is None:
        return (lambda w: Turned(jnp.swapaxes(w, -1, -2))) if target.turned and "experts" not in axes else None
    if target.body != "reference" and "experts" not in axes:
        return lambda w: rounded(whole_rows(w, ways))
    turned = _turn_experts if "experts" in axes else turn
    return (lambda w: turned(rounded(w), ways)) if target.turned else rounded


def whole_rows(w: jax.Array, ways: int) -> jax.Array:
    """w [..., in, out] with rows of zeros behind it, to a multiple of a TPU register's lanes; not where a mesh cuts `in` elsewhere."""
    missing = -w.shape[-2] % LANES
    return w if ways > 1 else jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, missing), (0, 0)])


def turn(w: QTensor, ways: int = 1) -> QTensor:
    """A QTensor as a GPU wants it. Two groups share bytes there: where each of `ways` parts of `in` has not an even number of them, int4 is
    kept as int8. Raises UserError for such MXFP4."""
    q = w.q
    if w.scale.shape[-2] % (2 * ways):
        if q.dtype == jnp.uint8:
            inner = 2 * q.shape[-2]
            rule = f"a matrix of {inner} inputs has no even number of groups of {MXFP4_GROUP} in {ways} parts"
            rule += "; legal: int8, fp8, int4, w8a8, w8a8_fp8"
            raise refuse("quantize", "mxfp4", rule)
        q = q.astype(jnp.int8) if q.dtype == jnp.int4 else q
    return replace(w, q=for_gpu(q, w.scale), turned=True, paired=q.dtype in (jnp.int4, jnp.uint8))


def _turn_experts(w: QTensor, ways: int) -> QTensor:
    """Turned where two numbers share a byte; else as it is, which is what the experts' kernel or the reference takes."""
    return turn(w, ways) if w.q.dtype in (jnp.int4, jnp.uint8) and w.scale.shape[-2] % (2 * ways) == 0 else w


def _quantizer(kind: str | None, axes: tuple[str, ...], ways: int, target: Target) -> Any:
    """The function that quantizes a matrix of these logical axes, of which a mesh cuts the rows in so many ways; None for no kind."""
    if kind is None:
        return None
    if kind == "mxfp4":
        return functools.partial(quantize_to_mxfp4, axes=axes[-2:], ways=ways, whole=target.platform == "cpu")
    if kind == "int4":
        dtype = jnp.int8 if target.platform == "cpu" else jnp.int4
        return functools.partial(quantize_int4, axes=axes[-2:], ways=ways, dtype=dtype)
    make = quantize_fp8 if kind.endswith("fp8") and "experts" not in axes else quantize_int8  # experts' products have no fp8
    return functools.partial(make, axes=axes[-2:], by_token=kind.startswith("w8a8"))
