"""Mixture of experts: which experts each token goes to, and the products of the tokens, sorted by expert, with their weights.

Every token reaches all of its experts: nothing is dropped, whatever the imbalance. Rows of nobody reach none, and an expert without
tokens costs nothing. Shazeer et al., arXiv 1701.06538; sorted and grouped: Gale et al., arXiv 2211.15841.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llminfer.config import ModelConfig
from llminfer.quant import QTensor, stack_of
from llminfer.target import Target
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.weight_formats import LANES

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu"}  # of ModelConfig -> of grouped_matmul


def route(x: jax.Array, router: jax.Array, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(weights float32, expert numbers int32), both [T, experts_per_token], of x [T, D] by router [D, E]. Scores are float32."""
    scores = jax.nn.softmax(jnp.dot(x, router, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32), axis=-1)
    weights, chosen = lax.top_k(scores, c.experts_per_token)
    return weights / weights.sum(-1, keepdims=True) if c.norm_topk else weights, chosen


def experts(x: jax.Array, live: jax.Array, router: jax.Array, gate_up: Any, down: Any, c: ModelConfig, target: Target) -> jax.Array:
    """The weighted sum of what its experts make of each token, [T, D] of x's dtype; zeros where live [T] is False.

    gate_up [E, D, 2 * M], down [E, M, D]: an array, a QTensor, or either Stacked. A mesh splits the experts, and the columns of each: a
    device works on all tokens of its own experts, and the sums are added up."""
    weights, chosen = route(x, router, c)
    chosen = jnp.where(live[:, None], chosen, c.num_experts)
    weights = jnp.where(live[:, None], weights, 0)  # what such a row holds may be no number
    (gate_up, layer), (down, _) = stack_of(gate_up), stack_of(down)
    body = functools.partial(_own_experts, c=c, target=target)
    if target.mesh is None:
        return body(x, weights, chosen, gate_up, down, layer, jnp.int32(0))
    over = target.over("experts")

    def shard(x: jax.Array, weights: jax.Array, chosen: jax.Array, gate_up: Any, down: Any, layer: jax.Array) -> jax.Array:
        first = lax.axis_index(over) * jax.tree.leaves(gate_up)[0].shape[1]
        return lax.psum(body(x, weights, chosen, gate_up, down, layer, first), (*over, *target.over("expert_mlp")))

    every = target.partition(())
    specs = (every, every, every, _split(gate_up, "embed", "expert_mlp", target), _split(down, "expert_mlp", "embed", target), every)
    return jax.shard_map(shard, mesh=target.mesh, in_specs=specs, out_specs=every, check_vma=False)(
        x, weights, chosen, gate_up, down, layer
    )


def _split(w: Any, rows: str, columns: str, target: Target) -> Any:
    """PartitionSpecs of experts' weights [layers, E, rows, columns]. A scale of all rows is on every device that has some of them."""
    of = lambda leaf: target.partition((None, "experts", rows if leaf.shape[2] > 1 else None, columns))
    return jax.tree.map(of, w)


def _own_experts(x, weights, chosen, gate_up: Any, down: Any, layer, first, *, c: ModelConfig, target: Target) -> jax.Array:
    """`experts` of those from number `first` on whose weights these are, [layers, own experts, ...]."""
    own, each = jax.tree.leaves(gate_up)[0].shape[1], c.experts_per_token
    number = jnp.where(chosen < c.num_experts, chosen - first, own).reshape(-1)  # among the own ones
    number = jnp.where((number >= 0) & (number < own), number, own)
    sizes = jnp.sum(number[:, None] == jnp.arange(own), axis=0, dtype=jnp.int32)
    order = jnp.argsort(number, stable=True)  # rows of others come last, and belong to no group
    y = _product(x[order // each], gate_up, sizes, layer, ACTIVATIONS[c.activation], target)
    y = _product(y, down, sizes, layer, None, target)
    back = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("tke,tk->te", back.astype(jnp.float32), weights, precision=lax.Precision.HIGHEST).astype(x.dtype)


def _product(x: jax.Array, w: Any, sizes: jax.Array, layer: jax.Array, activation: str | None, target: Target) -> jax.Array:
    """grouped_matmul with a stack of experts' weights. Sizes that are no multiples of a register's lanes are left to the reference."""
    q, scale = (w.q, w.scale) if isinstance(w, QTensor) else (w, None)
    if scale is not None and scale.shape[2] == 1:
        scale = scale[:, :, 0]
    inner, out = x.shape[1], q.shape[3] // (1 if activation is None else 2)
    impl = target.kernels if target.turned else target.body if inner % LANES == 0 and out % LANES == 0 else "reference"
    return grouped_matmul(x, q, sizes, layer=layer, scale=scale, activation=activation, chip=target.chip, impl=impl)
