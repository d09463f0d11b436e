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
from llminfer.params import Layer
from llminfer.quant import QTensor, stack_of
from llminfer.target import Target
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.weight_formats import LANES
from sharding.rules import partition

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu", "clamped": "clamped"}  # of ModelConfig -> of grouped_matmul


def route(x: jax.Array, router: jax.Array, bias: jax.Array | None, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(weights float32, expert numbers int32), both [T, experts_per_token], of x [T, D] by router [D, E] and bias [E]. Scores are
    float32. gpt-oss's softmax over the chosen alone is that over all, divided by the sum of the chosen (norm_topk)."""
    logits = jnp.dot(x, router, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    wide = 0.0 if bias is None else bias.astype(jnp.float32)
    logits = logits + wide if c.router_bias == "logits" else logits
    scores = jax.nn.softmax(logits, axis=-1) if c.router == "softmax" else jax.nn.sigmoid(logits)
    ranked = _in_best_groups(scores + wide if c.router_bias == "choice" else scores, c)
    weights, chosen = lax.top_k(ranked, c.experts_per_token)
    if ranked is not scores:
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    weights = weights / weights.sum(-1, keepdims=True) if c.norm_topk else weights
    return weights if c.routed_scale == 1 else weights * c.routed_scale, chosen


def _in_best_groups(scores: jax.Array, c: ModelConfig) -> jax.Array:
    """scores [T, E] with -inf for experts of groups that are not among the best, by the sum of a group's two largest."""
    if c.router_groups_used == c.router_groups:
        return scores
    grouped = scores.reshape(len(scores), c.router_groups, -1)
    _, best = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), c.router_groups_used)
    used = (best[:, :, None] == jnp.arange(c.router_groups)).any(1)
    return jnp.where(used[:, :, None], grouped, -jnp.inf).reshape(scores.shape)


def experts(x: jax.Array, live: jax.Array, w: Layer, c: ModelConfig, target: Target) -> jax.Array:
    """The weighted sum of what its experts make of each token, [T, D] of x's dtype; zeros where live [T] is False.

    Of a layer's weights, experts_gate_up [E, D, 2 * M] and experts_down [E, M, D] are an array, a QTensor, or either Stacked, as their
    biases may be. A mesh splits the experts: each device works on the tokens of its own, and the sums are added up."""
    weights, chosen = route(x, w.router, w.router_bias, c)
    chosen = jnp.where(live[:, None], chosen, c.num_experts)
    weights = jnp.where(live[:, None], weights, 0)  # what such a row holds may be no number
    stacks = [stack_of(leaf) for leaf in (w.experts_gate_up, w.experts_down, w.experts_gate_up_bias, w.experts_down_bias)]
    held, layer = [stack for stack, _ in stacks], stacks[0][1]
    body = functools.partial(_own_experts, c=c, target=target)
    axis = partition(("experts",))[0]
    if target.mesh is None:
        return body(x, weights, chosen, held, layer, jnp.int32(0))
    every, split = partition(()), jax.tree.map(lambda leaf: partition((None, "experts", *(None,) * (leaf.ndim - 2))), held)

    def shard(x: jax.Array, weights: jax.Array, chosen: jax.Array, held: list[Any], layer: jax.Array) -> jax.Array:
        first = lax.axis_index(axis) * jax.tree.leaves(held)[0].shape[1]
        return lax.psum(body(x, weights, chosen, held, layer, first), axis)

    specs = (every, every, every, split, every)
    return jax.shard_map(shard, mesh=target.mesh, in_specs=specs, out_specs=every, check_vma=False)(x, weights, chosen, held, layer)


def _own_experts(x, weights, chosen, held: list[Any], layer, first, *, c: ModelConfig, target: Target) -> jax.Array:
    """`experts` of those from number `first` on of which `held` has the matrices and biases, [layers, own experts, ...]."""
    gate_up, down, gate_up_bias, down_bias = held
    own, each = jax.tree.leaves(gate_up)[0].shape[1], c.experts_per_token
    number = jnp.where(chosen < c.num_experts, chosen - first, own).reshape(-1)  # among the own ones
    number = jnp.where((number >= 0) & (number < own), number, own)
    sizes = jnp.sum(number[:, None] == jnp.arange(own), axis=0, dtype=jnp.int32)
    order = jnp.argsort(number, stable=True)  # rows of others come last, and belong to no group
    sorted_x = x[order // each]
    if c.scale_inputs:
        sorted_x, weights = sorted_x * weights.reshape(-1)[order][:, None].astype(x.dtype), jnp.ones_like(weights)
    y = _product(sorted_x, gate_up, gate_up_bias, sizes, layer, ACTIVATIONS[c.activation], target)
    y = _product(y, down, down_bias, sizes, layer, None, target)
    back = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("tke,tk->te", back.astype(jnp.float32), weights, precision=lax.Precision.HIGHEST).astype(x.dtype)


def _product(x: jax.Array, w: Any, bias: Any, sizes: jax.Array, layer: jax.Array, activation: str | None, target: Target) -> jax.Array:
    """grouped_matmul with a stack of experts' weights. Sizes that are no multiples of a register's lanes are left to the reference."""
    q, scale, turned = (w.q, w.scale, w.turned) if isinstance(w, QTensor) else (w, None, False)
    if scale is not None and scale.shape[2] == 1:
        scale = scale[:, :, 0]
    inner, out = x.shape[1], q.shape[2 if turned else 3] // (1 if activation is None else 2)
    impl = target.kernels if target.turned else target.body if inner % LANES == 0 and out % LANES == 0 else "reference"
    how: dict[str, Any] = dict(activation=activation, turned=turned, chip=target.chip, impl=impl)
    return grouped_matmul(x, q, sizes, layer=layer, scale=scale, bias=bias, **how)
