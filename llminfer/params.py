"""The weights, declared once: each is a ParamSpec, from which random values, abstract shapes, shardings, the quantized
form and the checkpoint map are derived. State is plain pytrees (flax.struct), no module objects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llminfer.config import ModelConfig


@dataclass(frozen=True)
class ParamSpec:
    """One weight. shape: sizes; axes: a logical name for each, for sharding; init: "normal" (std `std`) or "ones";
    matrix: [in, out], and what quantization applies to."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    std: float = 0.02
    matrix: bool = False


@flax.struct.dataclass
class Layer:
    """Weights of one decoder layer. D hidden, K kv heads, G query heads a kv head, H head_dim, F intermediate.

    qkv [D, K * (G + 2) * H]: for each kv head its G query heads, then its key, then its value, so that one split over
    K shards all three. gate_up [D, 2 * F]: the gate, then the up projection. Matrices are kept 2-D: a TPU pads the
    last two axes to tiles, and a small axis there would waste memory."""

    attn_norm: Any  # [D]
    qkv: Any  # [D, K * (G + 2) * H]
    o: Any  # [K * G * H, D]
    mlp_norm: Any  # [D]
    gate_up: Any  # [D, 2 * F]
    down: Any  # [F, D]


@flax.struct.dataclass
class Params:
    """All weights. `stacked`: one Layer a position of the window pattern, each leaf [repeats, ...], run under a scan;
    `listed`: the layers after those (all of them in the listed layout). lm_head is None when tied to embed."""

    embed: Any  # [V, D]
    stacked: tuple[Layer, ...]
    listed: tuple[Layer, ...]
    final_norm: Any  # [D]
    lm_head: Any  # [V, D] or None


def layer_specs(c: ModelConfig) -> Layer:
    """The ParamSpecs of one layer."""
    d, k, g, h, f = c.hidden_size, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim, c.intermediate_size
    deep = 0.02 / (2 * c.num_layers) ** 0.5
    return Layer(
        attn_norm=ParamSpec((d,), ("embed",), "ones"),
        qkv=ParamSpec((d, k * (g + 2) * h), ("embed", "kv_heads"), matrix=True),
        o=ParamSpec((k * g * h, d), ("kv_heads", "embed"), std=deep, matrix=True),
        mlp_norm=ParamSpec((d,), ("embed",), "ones"),
        gate_up=ParamSpec((d, 2 * f), ("embed", "mlp"), matrix=True),
        down=ParamSpec((f, d), ("mlp", "embed"), std=deep, matrix=True),
    )


def param_specs(c: ModelConfig) -> Params:
    """The whole tree of ParamSpecs in the listed layout."""
    vocab = ParamSpec((c.vocab_size, c.hidden_size), ("vocab", "embed"))
    layer = layer_specs(c)
    return Params(
        embed=vocab,
        stacked=(),
        listed=(layer,) * c.num_layers,
        final_norm=ParamSpec((c.hidden_size,), ("embed",), "ones"),
        lm_head=None if c.tie_embeddings else vocab,
    )


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def stack(params: Params, c: ModelConfig) -> Params:
    """The stacked layout of a listed tree: layers of one place in the window pattern become one Layer of leaves
    [repeats, ...]; layers after the last whole pattern stay listed. Works on arrays, NumPy or jax."""
    period = len(c.windows)
    repeats = c.num_layers // period
    whole = params.listed[: repeats * period]
    stacked = tuple(jax.tree.map(lambda *xs: jnp.stack(xs), *whole[place::period]) for place in range(period))
    return replace(params, stacked=stacked, listed=params.listed[repeats * period :])


def stacked_specs(c: ModelConfig) -> Params:
    """The ParamSpecs of the stacked layout."""
    specs = param_specs(c)
    period = len(c.windows)
    repeats = c.num_layers // period
    deep = jax.tree.map(
        lambda s: ParamSpec((repeats, *s.shape), ("layers", *s.axes), s.init, s.std, s.matrix), layer_specs(c), is_leaf=is_spec
    )
    return replace(specs, stacked=(deep,) * period, listed=specs.listed[repeats * period :])


def abstract(specs: Params, dtype: Any) -> Params:
    """ShapeDtypeStructs of every weight: what a program is compiled from before any weight exists."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs, is_leaf=is_spec)


def init(specs: Params, key: jax.Array, dtype: Any) -> Params:
    """Random weights; each depends only on `key` and its place in the tree. Run it under jit."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    made = [
        jnp.ones(s.shape, dtype)
        if s.init == "ones"
        else (jax.random.normal(jax.random.fold_in(key, i), s.shape, jnp.float32) * s.std).astype(dtype)
        for i, s in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)
