"""Copies of experts that many tokens want, on a mesh that splits the experts: which experts have them, and where they lie.

A layer has more slots for experts than experts. Each device has equally many slots, and each expert one or more of them. Which is data: a
table that the programs are given, so that nothing is compiled again when copies move. As in DeepSeek's EPLB (DeepSeek-V3, arXiv
2412.19437, section 3.4), the experts with most tokens a copy get the copies, and then the fullest go first to the emptiest device.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llminfer.config import ModelConfig
from llminfer.params import Params
from llminfer.target import Target, place_of


@flax.struct.dataclass
class Routing:
    """What a program is told of experts, and what it counts; each row is a layer with experts, in order.

    counts [2, layers, slots] uint32: tokens that came to each slot, modulo 2**32, and how often that was passed. places: `table`, or None
    where expert number n is in slot n."""

    counts: Any
    places: Any = None


def place(load: np.ndarray, slots: int, devices: int) -> np.ndarray:
    """The expert in each of `slots` slots, int32, for experts with a load [E] each; slots / devices of them are on each device.

    Every expert has a slot; the others go, one by one, to the expert with the largest load a copy, of those that have fewer copies than
    there are devices. Then the copies, the heaviest first, go to the device with the least load that has a slot, and before that none
    of the same expert. Raises ValueError where slots / devices is no whole number, or the slots are fewer than the experts or more than
    devices of each."""
    experts = len(load)
    if slots % devices or not experts <= slots <= experts * devices:
        raise ValueError(f"{slots} slots of {experts} experts on {devices} devices")
    load, copies = np.asarray(load, np.float64), np.ones(experts, np.int64)
    for _ in range(slots - experts):
        copies[np.argmax(np.where(copies < devices, load / copies, -1.0))] += 1
    weight = load / copies
    held: list[list[int]] = [[] for _ in range(devices)]
    total = np.zeros(devices)
    for expert in np.argsort(-weight, kind="stable").repeat(copies[np.argsort(-weight, kind="stable")]):
        best = min((d for d in range(devices) if len(held[d]) < slots // devices), key=lambda d: (expert in held[d], total[d]))
        held[best].append(int(expert))
        total[best] += weight[expert]
    return np.array([expert for each in held for expert in sorted(each)], np.int32)


def most_copies(c: ModelConfig, target: Target) -> int:
    """How many slots an expert can have."""
    return min(c.expert_copies + 1, target.ways("experts"))


def first_order(c: ModelConfig, target: Target) -> np.ndarray:
    """The expert in each slot before anything was counted."""
    return place(np.ones(c.num_experts), c.num_experts + c.expert_copies, target.ways("experts"))


def table(order: np.ndarray, experts: int, most: int) -> np.ndarray:
    """int32 [layers, E, 1 + most] of the experts in slots, order [layers, slots]: how many copies each expert has, then their slots."""
    found = np.zeros((len(order), experts, 1 + most), np.int32)
    for row, (layer, each) in enumerate(zip(found, order, strict=True)):
        for expert in range(experts):
            (at,) = np.nonzero(each == expert)
            if not 1 <= len(at) <= most:
                raise ValueError(f"layer {row}: expert {expert} has {len(at)} slots, not 1 to {most}")
            layer[expert, 0], layer[expert, 1 : 1 + len(at)] = len(at), at
    return found


def slots_of(chosen: jax.Array, live: jax.Array, told: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The slot int32 [T, k] of each token's experts, chosen [T, k]; only rows that are live [T] count. An expert's copies take turns, from
    step to step too: none of them has more tokens than another by more than one. told: see `of_layers`, of one layer."""
    places, counts = told
    experts, each, at = len(places), places[:, 0], places[:, 1:]
    seen = jnp.sum(jnp.where(jnp.arange(at.shape[1]) < each[:, None], counts[at], 0), axis=1, dtype=jnp.uint32)
    mine = jnp.where(live[:, None], chosen, experts).reshape(-1, 1) == jnp.arange(experts)
    rank = jnp.sum(jnp.where(mine, jnp.cumsum(mine, axis=0, dtype=jnp.uint32) - 1, 0), axis=1, dtype=jnp.uint32)
    turn = (seen[chosen] + rank.reshape(chosen.shape)) % each[chosen].astype(jnp.uint32)
    return at[chosen, turn.astype(jnp.int32)]


def of_layers(routing: Routing | None, first: int, count: int) -> Any:
    """(places, what came to slots so far [count, slots] uint32) of some layers with experts; None where experts have no copies."""
    if routing is None or routing.places is None:
        return None
    return routing.places[first : first + count], routing.counts[0, first : first + count]


def added(counts: jax.Array, used: list[jax.Array]) -> jax.Array:
    """`Routing.counts` and int32 [some layers, slots] more, in the order of layers."""
    low = counts[0] + jnp.concatenate(used).astype(jnp.uint32)
    return jnp.stack([low, counts[1] + (low < counts[0]).astype(jnp.uint32)])


def total(counts: Any) -> np.ndarray:
    """`Routing.counts` as int64 [layers, slots] on the host."""
    low, high = np.asarray(counts).astype(np.int64)
    return low + (high << 32)


def by_expert(counts: np.ndarray, order: np.ndarray, experts: int) -> np.ndarray:
    """int64 [layers, E]: tokens of each expert, of those of each slot."""
    found = np.zeros((len(counts), experts), np.int64)
    for row, each, number in zip(found, order, counts, strict=True):
        np.add.at(row, each, number)
    return found


def imbalance(load: np.ndarray) -> float:
    """The largest of each row of load [layers, n] by the row's mean, mean over the layers that have any; 0 where none has."""
    some = load[load.sum(1) > 0]
    return float((some.max(1) / some.mean(1)).mean()) if len(some) else 0.0


def sources(old: np.ndarray, new: np.ndarray, devices: int) -> np.ndarray:
    """int32 [layers, slots]: for each slot of the new order a slot of the old one with the same expert, on the same device if there is."""
    own = old.shape[1] // devices
    found = np.empty_like(new)
    for row, was, now in zip(found, old, new, strict=True):
        for slot, expert in enumerate(now):
            (at,) = np.nonzero(was == expert)
            row[slot] = next((s for s in at if s // own == slot // own), at[slot % len(at)])
    return found


class Experts:
    """Of one engine: which slots experts have, and how many tokens came to each since they have them."""

    def __init__(self, c: ModelConfig, target: Target):
        self._c, self._ways, self._where = c, target.ways("experts"), target.place(())
        self._most, slots = most_copies(c, target), c.num_experts + c.expert_copies
        self.order = np.tile(first_order(c, target), (c.expert_layers, 1))
        self.routing = self._of(np.zeros((2, c.expert_layers, slots), np.uint32))

    def _of(self, counts: np.ndarray) -> Routing:
        places = table(self.order, self._c.num_experts, self._most) if self._c.expert_copies else None
        return jax.device_put(Routing(counts, places), self._where)

    def count(self, counts: jax.Array) -> None:
        """Takes what a program has counted."""
        self.routing = replace(self.routing, counts=counts)

    def imbalance(self) -> dict[str, float]:
        """`imbalance` of experts and of the devices that they are split over. Waits for the step that is under way."""
        counts = total(self.routing.counts)
        experts = by_expert(counts, self.order, self._c.num_experts)
        return {"experts": imbalance(experts), "devices": imbalance(counts.reshape(len(counts), self._ways, -1).sum(2))}

    def rebalance(self, params: Params, program: Any) -> Params:
        """The weights with experts in new slots, by what was counted; params are given away. program: of `mover`, compiled."""
        load = by_expert(total(self.routing.counts), self.order, self._c.num_experts)
        order = np.stack([place(each, self.order.shape[1], self._ways) for each in load])
        params = with_experts(params, program(expert_leaves(params), sources(self.order, order, self._ways)))
        self.order = order
        self.routing = self._of(np.zeros((2, *order.shape), np.uint32))
        return params


def expert_leaves(params: Params) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """The weights of experts by name: of each stacked layer, and of each listed one; {} where a layer has none."""
    of = lambda layer: {name: leaf for name, leaf in vars(layer).items() if name.startswith("experts_") and leaf is not None}
    return tuple(map(of, params.stacked)), tuple(map(of, params.listed))


def with_experts(params: Params, leaves: Any) -> Params:
    """The inverse of `expert_leaves`."""
    put = lambda layers, found: tuple(replace(layer, **each) for layer, each in zip(layers, found, strict=True))
    return replace(params, stacked=put(params.stacked, leaves[0]), listed=put(params.listed, leaves[1]))


def rows_of(c: ModelConfig, params: Params) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which rows of `Routing` the stacked and the listed layers of `expert_leaves` are."""
    row = np.cumsum([c.has_experts(number) for number in range(c.num_layers)]) - 1
    scanned = c.scanned if params.stacked else range(0)
    listed = [number for number in range(c.num_layers) if number not in scanned]
    return [row[scanned.start + at : scanned.stop : c.period] for at in range(len(params.stacked))], [row[[number]] for number in listed]


def mover(shapes: Params, c: ModelConfig, target: Target) -> Any:
    """The lowered program that gives slots the experts of others: (`expert_leaves`, which it takes the place of; `sources`) to
    `expert_leaves`. One layer after the other, one slot of each device at a time: beside the weights there is room for twice one layer's,
    however many layers there are. shapes: ShapeDtypeStructs of the weights, with shardings."""
    leaves, (stacks, singles) = expert_leaves(shapes), rows_of(c, shapes)
    axis, ways = target.over("experts"), target.ways("experts")

    def moved(leaf: jax.Array, wanted: jax.Array) -> jax.Array:  # [layers, own slots, ...]; [layers, slots]
        own = leaf.shape[1]

        def layer(i: jax.Array, whole: jax.Array) -> jax.Array:
            old = lax.dynamic_index_in_dim(whole, i, keepdims=False)
            old = old.astype(jnp.int8) if old.dtype == jnp.int4 else old  # numbers of 4 bits do not travel
            each = wanted[i].reshape(ways, own)

            def slot(j: jax.Array) -> jax.Array:
                # To each device what it would find here if it were here; it takes what comes from where it is.
                came = lax.all_to_all(old[each[:, j] % own], axis, 0, 0, tiled=True)
                return came[each[lax.axis_index(axis), j] // own]

            return lax.dynamic_update_index_in_dim(whole, lax.map(slot, jnp.arange(own)).astype(whole.dtype), i, 0)

        return lax.fori_loop(0, leaf.shape[0], layer, leaf)

    def of_stage(rows: jax.Array, layers: int) -> jax.Array:  # of which a pipeline's stage has some
        over = target.over("layers")
        return lax.dynamic_slice_in_dim(rows, lax.axis_index(over) * layers, layers) if over else rows

    def shard(leaves: Any, wanted: jax.Array) -> Any:
        own = lambda x, at: moved(x, of_stage(wanted[at], x.shape[0]))
        stacked = [jax.tree.map(functools.partial(own, at=at), each) for each, at in zip(leaves[0], stacks, strict=True)]
        listed = [jax.tree.map(lambda x, at=at: moved(x[None], wanted[at])[0], each) for each, at in zip(leaves[1], singles, strict=True)]
        return tuple(stacked), tuple(listed)

    specs = jax.tree.map(lambda s: s.sharding.spec, leaves)
    split = jax.shard_map(shard, mesh=target.mesh, in_specs=(specs, target.partition(())), out_specs=specs, check_vma=False)
    wanted = jax.ShapeDtypeStruct((c.expert_layers, c.num_experts + c.expert_copies), jnp.int32, sharding=target.place(()))
    return jax.jit(split, donate_argnums=0, out_shardings=jax.tree.map(place_of, leaves)).lower(leaves, wanted)
