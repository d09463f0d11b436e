"""Weights as a mesh wants them: columns in another order, and what several devices need, key-value heads and experts, copied.

A device holds one range of the columns of a matrix. So that each has the halves that belong together, a gated mlp in n parts lies as
n times (gate, up); and where there are more parts than key-value heads, each of these becomes several, which share its query heads:
to all that follows it is a model with more key-value heads, and what it computes is the same. Experts lie in the order of slots, and on a
TPU they are as wide as fills whole registers on each device: with zeros, which give zeros whatever the activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from llminfer.balance import first_order
from llminfer.config import ModelConfig
from llminfer.params import ParamSpec
from llminfer.target import Target
from pallas_kernels.weight_formats import LANES

WIDE = {"experts_gate_up": -1, "experts_gate_up_bias": -1, "experts_down": -2}  # leaves that have the experts' width -> the axis
SMALL = 4 * LANES  # up to this width on a device blocks of one register's columns are no loss


@dataclass(frozen=True)
class Halves:
    """Columns [.., 2 * F], gate then up, <-> [.., parts, 2, F / parts]."""

    parts: int

    def __call__(self, w: Any) -> Any:
        return self._turned(w, 2, self.parts)

    def inverse(self, w: Any) -> Any:
        return self._turned(w, self.parts, 2)

    @staticmethod
    def _turned(w: Any, outer: int, inner: int) -> Any:
        return w.reshape(*w.shape[:-1], outer, inner, -1).swapaxes(-2, -3).reshape(w.shape)


@dataclass(frozen=True)
class Heads:
    """Columns [.., K * (G + rest) * H] <-> [.., K * copies * (G / copies + rest) * H]: of each of K key-value heads the first G blocks
    (queries) are dealt out to its copies, the others (key and value) are in each."""

    kv_heads: int
    group: int
    rest: int
    copies: int

    def __call__(self, w: Any) -> Any:
        at = (np if isinstance(w, np.ndarray) else jnp).concatenate
        blocks = w.reshape(*w.shape[:-1], self.kv_heads, self.group + self.rest, -1)
        own = blocks[..., : self.group, :].reshape(*w.shape[:-1], self.kv_heads * self.copies, self.group // self.copies, blocks.shape[-1])
        shared = blocks[..., self.group :, :].repeat(self.copies, -3)
        return at([own, shared], -2).reshape(*w.shape[:-1], -1)

    def inverse(self, w: Any) -> Any:
        at = (np if isinstance(w, np.ndarray) else jnp).concatenate
        each = self.group // self.copies
        blocks = w.reshape(*w.shape[:-1], self.kv_heads * self.copies, each + self.rest, -1)
        own = blocks[..., :each, :].reshape(*w.shape[:-1], self.kv_heads, self.group, blocks.shape[-1])
        return at([own, blocks[..., :: self.copies, each:, :]], -2).reshape(*w.shape[:-1], -1)


@dataclass(frozen=True)
class Wider:
    """Rows [.., M, N] <-> [.., size, N], or columns [.., n * M] <-> [.., n * size] (axis -2 or -1): zeros behind each M of them."""

    axis: int
    M: int
    size: int
    inner: Halves | None = None  # what columns are arranged by then

    def __call__(self, w: Any) -> Any:
        at = w.ndim + self.axis
        parts = w.reshape(*w.shape[:at], -1, self.M, *w.shape[at + 1 :])
        pad = [(0, self.size - self.M) if axis == at + 1 else (0, 0) for axis in range(parts.ndim)]
        padded = (np if isinstance(w, np.ndarray) else jnp).pad(parts, pad)
        w = padded.reshape(*w.shape[:at], -1, *w.shape[at + 1 :])
        return w if self.inner is None else self.inner(w)

    def inverse(self, w: Any) -> Any:
        w = w if self.inner is None else self.inner.inverse(w)
        at = w.ndim + self.axis
        parts = w.reshape(*w.shape[:at], -1, self.size, *w.shape[at + 1 :])
        return parts[(*(slice(None),) * (at + 1), slice(self.M))].reshape(*w.shape[:at], -1, *w.shape[at + 1 :])


@dataclass(frozen=True)
class Copies:
    """Experts [E, ..] <-> slots [S, ..], of which slot s has expert order[s]; then their rows or columns as `inner` says."""

    order: tuple[int, ...]
    inner: Halves | Wider | None

    def __call__(self, w: Any) -> Any:
        w = w[np.array(self.order)]
        return w if self.inner is None else self.inner(w)

    def inverse(self, w: Any) -> Any:
        w = w[np.unique(self.order, return_index=True)[1]]
        return w if self.inner is None else self.inner.inverse(w)


def order_of(arrange: Any, shape: tuple[int, ...]) -> tuple[np.ndarray | None, ...]:
    """For each axis of an array of this shape which of its places what is arranged has, in order; -1: zeros; None: all of them."""
    order: list[np.ndarray | None] = [None] * len(shape)
    if isinstance(arrange, Copies):
        order[0], arrange = np.array(arrange.order), arrange.inner
    if arrange is not None:
        axis = arrange.axis if isinstance(arrange, Wider) else -1
        places = np.arange(1, shape[axis] + 1)
        order[axis] = (arrange(places[:, None])[:, 0] if axis == -2 else arrange(places)) - 1
    return tuple(order)


def on_mesh(c: ModelConfig, target: Target) -> ModelConfig:
    """The model with as many key-value heads as its mesh can split, as many slots for experts, of widths that their kernel takes, and its
    layers in stages."""
    wide = whole_width(c.moe_intermediate_size, target)
    c = replace(c, expert_copies=target.expert_copies, moe_intermediate_size=wide, stages=target.stages)
    if c.kv_rank:  # one latent for all heads, on every device
        return c
    return replace(c, num_kv_heads=math.lcm(c.num_kv_heads, target.ways("kv_heads")))


def whole_width(size: int, target: Target) -> int:
    """Of experts `size` wide: on a TPU each device has whole registers of their columns. All in 256s, or their number may be a prime: then
    a kernel has blocks of all columns or of one register's."""
    if target.body == "reference" or not size:
        return size
    ways = target.ways("expert_mlp")
    unit = ways * (LANES if size <= SMALL * ways or size % (ways * LANES) == 0 else 2 * LANES)
    return -(-size // unit) * unit


def arrangement(name: str, spec: ParamSpec, c: ModelConfig, target: Target) -> Any:
    """What makes of a leaf as a checkpoint has it (llminfer/params.py) the one that lies on the mesh, on the host or on a device; None
    where it is the same. `inverse` gives the first back. c: the model as the checkpoint has it."""
    leaf, columns = name.rpartition(".")[2], spec.axes[-1]
    copies = on_mesh(c, target).num_kv_heads // c.num_kv_heads
    if leaf in ("qkv", "qkv_bias") and copies > 1:
        return Heads(c.num_kv_heads, c.num_heads // c.num_kv_heads, 2, copies)
    if leaf == "k_norm" and columns == "kv_heads" and copies > 1:
        return Heads(c.num_kv_heads, 0, 1, copies)
    gated = c.gated and leaf.removesuffix("_bias").endswith("gate_up")
    inner: Any = Halves(target.ways(columns)) if gated and target.ways(columns) > 1 else None
    if (axis := WIDE.get(leaf)) and (wide := whole_width(c.moe_intermediate_size, target)) > c.moe_intermediate_size:
        inner = Wider(axis, c.moe_intermediate_size, wide, inner)
    if leaf.startswith("experts_") and target.expert_copies:
        return Copies(tuple(first_order(on_mesh(c, target), target).tolist()), inner)
    return inner
