"""Mixture of experts: which experts each token goes to, and the products of the tokens, sorted by expert, with their weights.

Every token reaches all of its experts: nothing is dropped, whatever the imbalance. Rows of nobody reach none, and an expert without
tokens costs nothing. Shazeer et al., arXiv 1701.06538; sorted and grouped: Gale et al., arXiv 2211.15841.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llminfer.balance import slots_of
from llminfer.config import ModelConfig
from llminfer.linear import linear, matmul, split_specs
from llminfer.params import Layer
from llminfer.quant import QTensor, stack_of
from llminfer.target import Target
from pallas_kernels.grouped_matmul import grouped_matmul, takes
from sharding.sequence import sum_rows

MOST_V5E = 16  # chips of a v5e slice whose compiler knows the ragged exchange
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


def experts(
    x: jax.Array, live: jax.Array, w: Layer, c: ModelConfig, target: Target, told: Any = None, shared: Any = None, stream: Any = ()
) -> tuple[jax.Array, jax.Array]:
    """(the weighted sum of what its experts make of each token, [T, D] of x's dtype, zeros where live [T] is False; how many tokens came
    to each slot, int32 [S]). told: see balance.slots_of; None: slots are experts. shared: what `linear` made of all tokens for the second
    matrix of the expert that they share, w.shared_down, whose product is added; None without one.

    Of a layer's weights, experts_gate_up [E, D, 2 * M] and experts_down [E, M, D] are an array, a QTensor, or either Stacked, as their
    biases may be. A mesh splits the experts, and the columns of each: a device works on all tokens of its own experts, and the sums are
    added up, those of the shared expert with them; or, where `exchanges` says so, each device has a share of the tokens, sends them to
    where their experts are, and gets them back. stream: the mesh axes over which rows of what is given are to be shared out (spread.py);
    (): all are everywhere."""
    weights, chosen = route(x, w.router, w.router_bias, c)
    slots = c.num_experts + c.expert_copies
    chosen = jnp.where(live[:, None], chosen if told is None else slots_of(chosen, live, told), slots)
    used = jnp.sum(chosen.reshape(-1, 1) == jnp.arange(slots), axis=0, dtype=jnp.int32)
    weights = jnp.where(live[:, None], weights, 0)  # what such a row holds may be no number
    stacks = [stack_of(leaf) for leaf in (w.experts_gate_up, w.experts_down, w.experts_gate_up_bias, w.experts_down_bias)]
    held, layer = [stack for stack, _ in stacks], stacks[0][1]
    if target.mesh is None:
        y = _own_experts(x, weights, chosen, held, layer, jnp.int32(0), used, c=c, target=target)
        return y if shared is None else y + linear(shared, w.shared_down, c, target), used
    more = None if shared is None else (shared, w.shared_down)
    return _on_mesh(x, weights, chosen, held, layer, used, more, c, target, stream), used


def _on_mesh(x, weights, chosen, held: list[Any], layer, used, more: Any, c: ModelConfig, target: Target, stream: Any) -> jax.Array:
    """`experts` where a mesh splits them. more: `shared` and the matrix that it is multiplied with."""
    over, columns, wide = target.over("experts"), target.over("expert_mlp"), target.over("mlp") if more else ()
    every = rows = target.partition(())
    exchange = exchanges(c, target) and x.shape[0] % target.ways("experts") == 0
    if exchange:
        rows = jax.sharding.PartitionSpec(over)
    parts = columns if exchange else (*over, *columns)  # what a device's sums are parts of
    body = functools.partial(_exchanged if exchange else _own_experts, c=c, target=target)
    behind = stream[len(over) :] if exchange and stream[: len(over)] == over else () if exchange else stream
    found = jax.sharding.PartitionSpec((*over, *behind) if exchange else behind or None)

    def shard(x, weights, chosen, held, layer, used, more) -> jax.Array:
        first = lax.axis_index(over) * jax.tree.leaves(held)[0].shape[1] if over else jnp.int32(0)
        if held[3] is not None:  # what is added to a sum over the columns of experts is added once
            held = [*held[:3], _once(held[3], columns)]
        y = body(x, weights, chosen, held, layer, first, used)
        if more is not None:  # one sum for both
            hidden, matrix = more
            hidden = lax.dynamic_slice_in_dim(hidden, lax.axis_index(over) * len(y), len(y)) if exchange else hidden
            ours = matmul(hidden, matrix, replace(target, mesh=None))
            y = _once(y, _without(wide, parts)) + _once(ours, _without(parts, wide))
        return sum_rows(y, (*parts, *_without(wide, parts)), behind)

    how = None if more is None else (target.partition((None, "mlp")), split_specs(more[1], ("mlp", "embed"), target))
    specs: Any = (rows, rows, rows, _split(held, target), every, every, how)
    split = target.split(shard, specs, found)
    if not exchange and not stream:
        return split(x, weights, chosen, held, layer, used, more)
    # Else XLA cuts all that has to do with tokens into shares, and moves the pieces of a batch about at each step.
    x, weights, chosen = (target.pinned(each, every) for each in (x, weights, chosen))
    return target.pinned(split(x, weights, chosen, held, layer, used, more), jax.sharding.PartitionSpec(stream or None))


def _without(axes: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in others)


def _once(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x on the first device along these mesh axes, zeros on the others, which have the same: for a sum over them."""
    return jnp.where(lax.axis_index(axes) == 0, x, 0) if axes else x


def _split(held: list[Any], target: Target) -> list[Any]:
    """PartitionSpecs of experts' matrices and biases [layers, E, ...]. A scale of all rows is on every device that has some of them."""
    gate_up, down, gate_up_bias, down_bias = held

    def matrix(w: Any, rows: str, columns: str) -> Any:
        turned = isinstance(w, QTensor) and w.turned
        last = lambda leaf, n: (columns, n) if turned and leaf.dtype.itemsize == 1 else (n, columns)
        many = lambda leaf: rows if leaf.shape[2] > 1 else None
        return jax.tree.map(lambda leaf: target.partition((None, "experts", *last(leaf, many(leaf)))), w)

    bias = lambda leaf, columns: None if leaf is None else target.partition((None, "experts", columns))
    matrices = [matrix(gate_up, "embed", "expert_mlp"), matrix(down, "expert_mlp", "embed")]
    return [*matrices, bias(gate_up_bias, "expert_mlp"), bias(down_bias, "embed")]


def _own_experts(x, weights, chosen, held: list[Any], layer, first, used, *, c: ModelConfig, target: Target) -> jax.Array:
    """`experts` of the slots from number `first` on of which `held` has the matrices and biases, [layers, own slots, ...]."""
    gate_up, down, gate_up_bias, down_bias = held
    own, each = jax.tree.leaves(gate_up)[0].shape[1], c.experts_per_token
    number = (chosen - first).reshape(-1)  # among the own ones
    number = jnp.where((number >= 0) & (number < own), number, own)
    sizes = lax.dynamic_slice(used, (first,), (own,))
    order = jnp.argsort(number, stable=True)  # rows of others come last, and belong to no group
    place, order = jnp.argsort(order), order[: x.shape[0] * min(each, own)]  # no token has more experts than there are
    sorted_x = x[order // each]
    if c.scale_inputs:
        sorted_x, weights = sorted_x * weights.reshape(-1)[order][:, None].astype(x.dtype), jnp.ones_like(weights)
    y = _product(sorted_x, gate_up, gate_up_bias, sizes, layer, ACTIVATIONS[c.activation], target)
    y = _product(y, down, down_bias, sizes, layer, None, target)
    back = y[place] if len(place) == len(y) else jnp.where((number < own)[:, None], y[jnp.minimum(place, len(y) - 1)], 0)
    back = back.reshape(*chosen.shape, -1)
    return jnp.einsum("tke,tk->te", back.astype(jnp.float32), weights, precision=lax.Precision.HIGHEST).astype(x.dtype)


def exchanges(c: ModelConfig, target: Target) -> bool:
    """Whether tokens are sent to their experts, where they can be dealt out. All of them are on every device: a sum over n devices moves
    each 2 * (n - 1) / n times, an exchange k / n times there and back, and once more to where it is wanted. Where what an expert that all
    tokens share gives is summed over these devices, the others' sums join it for nothing."""
    if target.chip == "v5e" and target.mesh is not None and target.mesh.size > MOST_V5E:
        return False
    if target.exchange == "ragged" and len(target.over("experts")) > 1:
        return False  # XLA exchanges over one axis
    if c.shared_intermediate_size and set(target.over("experts")) & set(target.over("mlp")):
        return False
    return bool(target.exchange) and target.ways("experts") > 2 * c.experts_per_token > 0


def _exchanged(x, weights, chosen, held: list[Any], layer, first, used, *, c: ModelConfig, target: Target) -> jax.Array:
    """`experts` of this device's share of the tokens [T / n, D]. There is room for all tokens of a device to want one other's experts."""
    del first, used  # the latter is of all tokens
    gate_up, down, gate_up_bias, down_bias = held
    own, each, ways = jax.tree.leaves(gate_up)[0].shape[1], c.experts_per_token, target.ways("experts")
    number, room = chosen.reshape(-1), x.shape[0] * min(each, jax.tree.leaves(gate_up)[0].shape[1])
    order = jnp.argsort(number, stable=True)  # by device, there by expert; rows of nobody last
    sizes = jnp.sum(number[:, None] == jnp.arange(ways * own), axis=0, dtype=jnp.int32).reshape(ways, own)
    count = sizes.sum(1)
    starts = jnp.cumsum(count) - count
    told = lax.all_to_all(jnp.concatenate([sizes, starts[:, None]], 1), target.over("experts"), 0, 0, tiled=True)
    theirs, wanted_at = told[:, :own], told[:, own]  # rows of each device for each expert here, and where it wants them back
    send, give_back = _ragged(target, room) if target.exchange == "ragged" else _padded(target, room, own)
    sorted_x = x[order // each]
    if c.scale_inputs:
        sorted_x, weights = sorted_x * weights.reshape(-1)[order][:, None].astype(x.dtype), jnp.ones_like(weights)
    came = send(sorted_x, starts, count, theirs.sum(1))
    expert = jnp.sum(jnp.arange(room)[:, None] >= jnp.cumsum(theirs, 1)[:, None], axis=-1).reshape(-1)  # `own` behind the last
    by_expert = jnp.argsort(expert, stable=True)
    y = _product(came[by_expert], gate_up, gate_up_bias, theirs.sum(0), layer, ACTIVATIONS[c.activation], target)
    y = _product(y, down, down_bias, theirs.sum(0), layer, None, target)
    y = give_back(y[jnp.argsort(by_expert)], number[order], starts, count, theirs.sum(1), wanted_at)
    back = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("tke,tk->te", back.astype(jnp.float32), weights, precision=lax.Precision.HIGHEST).astype(x.dtype)


def _ragged(target: Target, room: int) -> tuple[Any, Any]:
    """Rows to their experts' devices and back: as many as there are. What comes from device s lies from row s * room on."""
    (axis,), ways = target.over("experts"), target.ways("experts")
    at = jnp.arange(ways, dtype=jnp.int32) * room

    def send(rows, starts, count, coming):
        there = jnp.full(ways, lax.axis_index(axis) * room, jnp.int32)
        out = jnp.zeros((ways * room, rows.shape[1]), rows.dtype)
        return lax.ragged_all_to_all(rows, out, starts, count, there, coming, axis_name=axis)

    def give_back(y, numbers, starts, count, coming, wanted_at):
        out = jnp.zeros((numbers.shape[0], y.shape[1]), y.dtype)
        return lax.ragged_all_to_all(y, out, at, coming, wanted_at, count, axis_name=axis)

    return send, give_back


def _padded(target: Target, room: int, own: int) -> tuple[Any, Any]:
    """As _ragged, where XLA has no such exchange (a CPU): `room` rows between any two devices."""
    over, ways = target.over("experts"), target.ways("experts")
    exchange = lambda rows: lax.all_to_all(rows.reshape(ways, room, -1), over, 0, 0, tiled=True)

    def send(rows, starts, count, coming):
        return exchange(rows[jnp.minimum(starts[:, None] + jnp.arange(room), rows.shape[0] - 1)]).reshape(ways * room, -1)

    def give_back(y, numbers, starts, count, coming, wanted_at):
        device = jnp.minimum(numbers // own, ways - 1)
        found = exchange(y)[device, jnp.clip(jnp.arange(numbers.shape[0]) - starts[device], 0, room - 1)]
        return jnp.where((numbers < own * ways)[:, None], found, 0)  # rows of nobody are zeros

    return send, give_back


def _product(x: jax.Array, w: Any, bias: Any, sizes: jax.Array, layer: jax.Array, activation: str | None, target: Target) -> jax.Array:
    """grouped_matmul with a stack of experts' weights. Sizes that its kernel does not take are left to the reference."""
    q, scale, turned = (w.q, w.scale, w.turned) if isinstance(w, QTensor) else (w, None, False)
    if scale is not None and scale.shape[2] == 1:
        scale = scale[:, :, 0]
    inner, out = x.shape[1], q.shape[2 if turned else 3] // (1 if activation is None else 2)
    impl = target.kernels if target.turned else target.body if takes(inner, out, q.dtype, activation) else "reference"
    how: dict[str, Any] = dict(activation=activation, turned=turned, chip=target.chip, impl=impl)
    return grouped_matmul(x, q, sizes, layer=layer, scale=scale, bias=bias, **how)
