"""From the parts of a checkpoint to the leaves of our parameter tree, and back. Imports jax only where the tree is made.

A *part* is one weight of one layer in one naming for all families and formats (`part_shapes`): "embed", "layers.3.q",
"layers.3.q_bias", ...; matrices are [out, in] with rotary pairs in half-split order. A *leaf* is a field of Params or Layer (see
llminfer/params.py): "embed", "layers.3.qkv", ...; matrices are [in, out], and some parts are fused.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from llminfer.config import ModelConfig
from llminfer.errors import UserError
from llminfer.progress import Progress, start

if TYPE_CHECKING:
    from llminfer.params import Params

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What bfloat16 holds exactly.
NARROW = {BFLOAT16, np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)}
Leaf = tuple[str, np.ndarray]
# Leaf -> the parts that are joined in it; any other leaf is the part of its name.
FUSED = {
    **{"qkv": ("q", "k", "v"), "qkv_bias": ("q_bias", "k_bias", "v_bias")},
    **{"qkv_a": ("q_a", "kv_a"), "qkv_a_bias": ("q_a_bias", "kv_a_bias")},
    **{"gate_up": ("gate", "up"), "gate_up_bias": ("gate_bias", "up_bias")},
    **{"experts_gate_up": ("experts_gate", "experts_up"), "shared_gate_up": ("shared_gate", "shared_up")},
    "experts_gate_up_bias": ("experts_gate_bias", "experts_up_bias"),
}
MATRICES = ("qkv", "o", "qkv_a", "q_b", "gate_up", "down", "router", "shared_gate_up", "shared_down")
EXPERTS = ("experts_gate_up", "experts_down")  # matrices, one an expert
SHOWN_DIFFERENCES = 10
# A transposed copy in square tiles touches each cache line once; whole rows would touch it once an element.
TILE = 128
AHEAD_BYTES = 1 << 27  # of leaves that are read while one is being placed: what loading may hold beside the device


class Source(Protocol):
    """Where parts come from: a checkpoint of any family and format."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Part -> shape, from headers alone; a tensor that is no part of the model is listed under its stored name."""
        ...

    def read(self, part: str) -> np.ndarray:
        """One part, float32, float16, bfloat16 or float8; it may be a read-only view. Called from several threads."""
        ...

    def stored(self, part: str) -> str:
        """The name of the tensor that holds the part, for messages; also of a part that is missing."""
        ...


def part_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Part -> shape of everything that a model of this config has."""
    d, f, h, heads, kv_heads = c.hidden_size, c.intermediate_size, c.head_dim, c.num_heads, c.num_kv_heads
    q, kv = heads * h, kv_heads * h
    layer: dict[str, tuple[int, ...]] = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)} if not c.kv_rank else _latent_parts(c)
    mlp: dict[str, tuple[int, ...]] = {"up": (f, d), "down": (d, f)} | ({"gate": (f, d)} if c.gated else {})
    before = ("attn_norm", *(() if c.shared_norm else ("mlp_norm",))) if c.pre_norm else ()
    layer |= dict.fromkeys((*before, *(("attn_post_norm", "mlp_post_norm") if c.post_norm else ())), (d,))
    if c.norm_bias:
        layer |= {f"{name}_bias": (d,) for name in before}
    if c.qk_norm not in ("", "unit"):
        norms = {"head": ((h,), (h,)), "heads": ((heads, h), (kv_heads, h)), "full": ((q,), (kv,))}
        layer |= dict(zip(("q_norm", "k_norm"), norms[c.qk_norm], strict=True))
    biased = [*(("q_a", "kv_a") if c.kv_rank else "qkv")] if c.qkv_bias else []
    biased = [name for name in (*biased, *("o" if c.o_bias else "")) if name in layer]
    layer |= {f"{name}_bias": layer[name][:1] for name in biased}
    layer |= {"sink_logits": (heads,)} if c.sink_logits else {}
    mlp |= {f"{name}_bias": shape[:1] for name, shape in mlp.items()} if c.mlp_bias else {}
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, d)}
    if c.learned_positions:
        shapes["positions"] = (c.max_position, d)
    for i in range(c.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in (layer | (_expert_parts(c) if c.has_experts(i) else mlp)).items()}
    shapes |= {"final_norm": (d,)} | ({"final_norm_bias": (d,)} if c.norm_bias else {})
    return shapes if c.tie_embeddings else shapes | {"lm_head": (c.vocab_size, d)}


def _latent_parts(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, q, wide = c.hidden_size, c.num_heads * c.head_dim, c.num_heads * c.value_dim
    queries: dict[str, tuple[int, ...]] = {"q": (q, d)}
    if c.q_rank:
        queries = {"q_a": (c.q_rank, d), "q_a_norm": (c.q_rank,), "q_b": (q, c.q_rank)}
    shared = {"kv_a": (c.row_dim, d), "kv_a_norm": (c.kv_rank,)}
    keys = c.num_heads * (c.head_dim - c.rope_head_dim)
    return {**queries, **shared, "k_b": (keys, c.kv_rank), "v_b": (wide, c.kv_rank), "o": (d, wide)}


def _expert_parts(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, e, m, s = c.hidden_size, c.num_experts, c.moe_intermediate_size, c.shared_intermediate_size
    parts: dict[str, tuple[int, ...]] = {"router": (e, d), "experts_gate": (e, m, d), "experts_up": (e, m, d), "experts_down": (e, d, m)}
    parts |= {f"{name}_bias": shape[:2] for name, shape in parts.items() if name != "router"} if c.expert_bias else {}
    parts |= {"router_bias": (e,)} if c.router_bias else {}
    shared = {"shared_gate": (s, d), "shared_up": (s, d), "shared_down": (d, s)} if s else {}
    return parts | shared | ({"shared_router": (1, d)} if c.shared_gate else {})


def leaf_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Leaf -> shape of the whole tree, listed layout, in the order in which leaves are read."""
    from llminfer.params import param_specs

    return {name: spec.shape for name, spec in leaves_of(param_specs(c))}


def leaves_of(params: Params) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a tree in either layout, named as in the listed one; a leaf may be anything. Leaves of stacked layers
    must be arrays: they come layer by layer."""
    top = ("embed", "positions", "final_norm", "final_norm_bias", "lm_head")
    yield from ((name, leaf) for name in top if (leaf := getattr(params, name)) is not None)
    for i, layer in enumerate(params.listed[: params.leading]):
        yield from ((f"layers.{i}.{name}", leaf) for name, leaf in vars(layer).items() if leaf is not None)
    number = params.leading
    for repeat in range(len(params.stacked[0].o) if params.stacked else 0):
        for layer in params.stacked:
            yield from ((f"layers.{number}.{name}", leaf[repeat]) for name, leaf in vars(layer).items() if leaf is not None)
            number += 1
    for i, layer in enumerate(params.listed[params.leading :], start=number):
        yield from ((f"layers.{i}.{name}", leaf) for name, leaf in vars(layer).items() if leaf is not None)


def layer_of(name: str) -> tuple[int | None, str]:
    """("layers.3.qkv") -> (3, "qkv"); (None, name) for a leaf outside the layers."""
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if len(parts) == 3 else (None, name)


def params_of(leaves: Mapping[str, Any], c: ModelConfig, without: range = range(0)) -> Params:
    """The tree of named leaves, listed layout, of the layers that are not in `without`. Arrays are not copied."""
    from llminfer.params import Layer, Params

    layers: dict[int, dict[str, Any]] = {number: {} for number in range(c.num_layers) if number not in without}
    top = {}
    for name, leaf in leaves.items():
        number, field = layer_of(name)
        if number is None:
            top[name] = leaf
        else:
            layers[number][field] = leaf
    return Params(**top, stacked=(), listed=tuple(Layer(**fields) for fields in layers.values()))


def check(source: Source, config: ModelConfig, where: str) -> None:
    """Compares what a checkpoint has with what the config requires. `where` names the checkpoint in the message.

    Raises one UserError with the first ten differences: missing, of another shape, or not expected."""
    expected, found = part_shapes(config), source.shapes()
    differences = []
    for part, shape in expected.items():
        if part not in found:
            differences.append(f"{source.stored(part)} {list(shape)} ({part}) is missing")
        elif tuple(found[part]) != shape:
            differences.append(f"{source.stored(part)} ({part}) is {list(found[part])}, expected {list(shape)}")
    ignored = {"lm_head"} if config.tie_embeddings else set()
    for name in sorted(found.keys() - expected.keys() - ignored):
        differences.append(f"{name[:80]!r} {list(found[name])} is not expected")
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        text = "; ".join(differences[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"{where}: tensors do not fit the config: {text}".replace("\n", " "))


def read_leaves(source: Source, config: ModelConfig, progress: Progress | None = None) -> Iterator[Leaf]:
    """The leaves of a checked source, one by one, a few read ahead: bfloat16 where the source is no wider, else float32."""
    shapes = leaf_shapes(config)
    sizes = collections.deque((name, math.prod(shape) * 4) for name, shape in shapes.items())
    task = start(progress, "Reading weights", len(shapes))
    waiting: collections.deque[tuple[str, int, Future[np.ndarray]]] = collections.deque()
    ahead = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NumPy releases the GIL in these copies
        while sizes or waiting:
            while sizes and (not waiting or ahead + sizes[0][1] <= AHEAD_BYTES):
                name, size = sizes.popleft()
                waiting.append((name, size, pool.submit(_read_leaf, source, config, name)))
                ahead += size
            name, size, future = waiting.popleft()
            ahead -= size
            leaf = [future.result()]
            del future
            yield name, leaf.pop()  # the caller's alone
            task.advance(1)
    task.done()


def _read_leaf(source: Source, c: ModelConfig, name: str) -> np.ndarray:
    prefix, _, leaf = name.rpartition(".")
    prefix += "." if prefix else ""
    arrays, dtype = _common([source.read(prefix + part) for part in _names(leaf, c)])
    return join(arrays, leaf, c).view(dtype)


def _names(leaf: str, c: ModelConfig) -> tuple[str, ...]:
    """The parts of a leaf."""
    names = FUSED.get(leaf, (leaf,))
    if (leaf.startswith("gate_up") and not c.gated) or (leaf.startswith("qkv_a") and not c.q_rank):
        return names[1:]
    return ("q",) if leaf == "q_b" and not c.q_rank else names


def join(parts: list[np.ndarray], leaf: str, c: ModelConfig) -> np.ndarray:
    """One leaf of its parts: see FUSED. Never a view of a part, unless it is the very part."""
    k, g, h = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    if leaf in ("q_norm", "k_norm", "shared_router"):
        return np.ascontiguousarray(parts[0]).reshape(-1)
    if leaf in EXPERTS:
        out = np.empty((len(parts[0]), parts[0].shape[2], sum(part.shape[1] for part in parts)), parts[0].dtype)
        for expert, matrix in enumerate(out):
            matrix[:] = join([part[expert] for part in parts], leaf.removeprefix("experts_"), c)
        return out
    if leaf in ("k_b", "v_b"):
        return parts[0].reshape(c.num_heads, -1, c.kv_rank)
    if leaf not in MATRICES:
        if leaf == "qkv_bias":
            return np.concatenate([x.reshape(k, -1, h) for x in parts], axis=1).reshape(-1)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    inside = parts[0].shape[1]
    if leaf != "qkv":
        out = np.empty((inside, sum(len(part) for part in parts)), parts[0].dtype)
        at = 0
        for part in parts:
            _transpose(part, out[:, at : at + len(part)])
            at += len(part)
        return out
    out = np.empty((inside, k, (g + 2) * h), parts[0].dtype)
    for j in range(k):
        at = 0
        for part, heads in zip(parts, (g, 1, 1), strict=True):
            rows = heads * h
            _transpose(part[j * rows : (j + 1) * rows], out[:, j, at : at + rows])
            at += rows
    return out.reshape(inside, -1)


def split(leaf: str, array: np.ndarray, c: ModelConfig) -> dict[str, np.ndarray]:
    """Part -> array of one leaf, without the layer's prefix: the inverse of `join`."""
    k, g, h = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    names = _names(leaf, c)
    if leaf in ("k_b", "v_b"):
        return {leaf: array.reshape(-1, c.kv_rank)}
    if leaf in ("q_norm", "k_norm"):
        return {leaf: array.reshape(-1, h) if c.qk_norm == "heads" else array}
    if leaf == "shared_router":
        return {leaf: array[None]}
    if leaf in EXPERTS:
        pieces = np.split(array.swapaxes(1, 2), len(names), axis=1)
        return {name: np.ascontiguousarray(piece) for name, piece in zip(names, pieces, strict=True)}
    rows = array.T if leaf in MATRICES else array  # [out, ...]
    if leaf in ("qkv", "qkv_bias"):
        by_head = rows.reshape(k, g + 2, h, *rows.shape[1:])
        pieces = [by_head[:, :-2], by_head[:, -2], by_head[:, -1]]
        parts = [np.ascontiguousarray(x).reshape(-1, *rows.shape[1:]) for x in pieces]
    elif leaf.startswith("qkv_a"):
        parts = [rows[: c.q_rank], rows[c.q_rank :]][-len(names) :]
    else:
        parts = np.split(rows, len(names), axis=0 if leaf in MATRICES else -1)
    return {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}


def parts_of(leaves: Iterable[Leaf], c: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(part, array) of named leaves, one leaf after the other."""
    for name, array in leaves:
        prefix, _, leaf = name.rpartition(".")
        prefix += "." if prefix else ""
        yield from ((prefix + part, piece) for part, piece in split(leaf, np.asarray(array), c).items())


def _common(arrays: list[np.ndarray]) -> tuple[list[np.ndarray], np.dtype]:
    """(arrays to copy from, dtype to view the result as): bfloat16 where that holds all, as 2-byte integers, which NumPy copies
    fast; else float32."""
    if all(array.dtype in NARROW for array in arrays):
        return [array.astype(BFLOAT16, copy=False).view(np.uint16) for array in arrays], BFLOAT16
    return [array.astype(np.float32, copy=False) for array in arrays], np.dtype(np.float32)


def _transpose(x: np.ndarray, out: np.ndarray) -> None:
    """out[j, i] = x[i, j]."""
    for i in range(0, x.shape[0], TILE):
        for j in range(0, x.shape[1], TILE):
            out[j : j + TILE, i : i + TILE] = x[i : i + TILE, j : j + TILE].T
