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
    """One weight. shape: sizes; axes: a logical name for each, for sharding; init: "normal" (std `std`), "ones" or "zeros";
    matrix: [..., in, out], and what quantization applies to."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    std: float = 0.02
    matrix: bool = False


@flax.struct.dataclass
class Layer:
    """Weights of one decoder layer; those that a family does not have are None. D hidden, K kv heads, G query heads a kv
    head, H head_dim, F intermediate, q = K * G * H. E experts of size M (with ModelConfig.expert_copies: slots for them), shared experts of
    size S together.

    qkv [D, K * (G + 2) * H]: for each kv head its G query heads, then its key, then its value, so that one split over
    K shards all three. gate_up [D, 2 * F]: the gate, then the up projection. Matrices are kept 2-D: a TPU pads the
    last two axes to tiles, and a small axis there would waste memory.

    Latent attention (ModelConfig.kv_rank) has in place of qkv: qkv_a, which makes the queries' latent (Q numbers, none without q_rank),
    then what is cached, the latent (C) and the rotated part (R); q_b, N heads of H, whose last R are rotated; k_b and v_b, for each head
    what makes its key (without the rotated part) and its value (V) of the latent, kept [.., C] both: queries are multiplied with k_b, not
    keys. These two are not quantized."""

    qkv: Any = None  # [D, K * (G + 2) * H]
    o: Any = None  # [q, D], or [N * V, D]
    qkv_a: Any = None  # [D, Q + C + R]
    q_b: Any = None  # [Q, N * H], or [D, N * H]
    k_b: Any = None  # [N, H - R, C]
    v_b: Any = None  # [N, V, C]
    q_a_norm: Any = None  # [Q]
    kv_a_norm: Any = None  # [C]
    qkv_a_bias: Any = None  # [Q + C + R]
    gate_up: Any = None  # [D, 2 * F], without a gate [D, F]
    down: Any = None  # [F, D]
    router: Any = None  # [D, E]
    experts_gate_up: Any = None  # [E, D, 2 * M]
    experts_down: Any = None  # [E, M, D]
    router_bias: Any = None  # [E]
    experts_gate_up_bias: Any = None  # [E, 2 * M]
    experts_down_bias: Any = None  # [E, D]
    shared_gate_up: Any = None  # [D, 2 * S]
    shared_down: Any = None  # [S, D]
    shared_router: Any = None  # [D]
    attn_norm: Any = None  # [D]
    mlp_norm: Any = None  # [D]
    attn_post_norm: Any = None  # [D]
    mlp_post_norm: Any = None  # [D]
    q_norm: Any = None  # [H], or [q] for every head its own
    k_norm: Any = None  # [H], or [K * H]
    sink_logits: Any = None  # [K * G]
    attn_norm_bias: Any = None  # [D]
    mlp_norm_bias: Any = None  # [D]
    qkv_bias: Any = None  # [K * (G + 2) * H]
    o_bias: Any = None  # [D]
    gate_up_bias: Any = None  # [2 * F] or [F]
    down_bias: Any = None  # [D]
    peers: Any = None  # inside of a program, Params.peers


@flax.struct.dataclass
class Params:
    """All weights. `stacked`: one Layer a position of the layer pattern, each leaf [repeats, ...], run under a scan; `listed`: the layers
    around those, the first `leading` of them before (all of them in the listed layout). lm_head is None when tied to embed, unless it
    is quantized: then it is a QTensor of [D, V]. peers: no weights, but where GPUs find each other's memory (Target.peers)."""

    embed: Any  # [V, D]
    stacked: tuple[Layer, ...]
    listed: tuple[Layer, ...]
    final_norm: Any  # [D]
    lm_head: Any = None  # [V, D], or a QTensor
    positions: Any = None  # [max_position, D], where positions are learned
    final_norm_bias: Any = None  # [D]
    peers: Any = None  # pallas_kernels.peers_gpu.shapes
    leading: int = flax.struct.field(pytree_node=False, default=0)


def layer_specs(c: ModelConfig, number: int) -> Layer:
    """The ParamSpecs of one layer."""
    d, k, g, h, f = c.hidden_size, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim, c.intermediate_size
    deep, up = 0.02 / (2 * c.num_layers) ** 0.5, f * (2 if c.gated else 1)
    ones, zeros = (lambda n, axis, init=init: ParamSpec((n,), (axis,), init) for init in ("ones", "zeros"))
    norm = ones if not c.norm_offset else zeros
    if c.kv_rank:
        specs = _latent_specs(c, deep)
    else:
        specs = dict(
            qkv=ParamSpec((d, k * (g + 2) * h), ("embed", "kv_heads"), matrix=True),
            o=ParamSpec((k * g * h, d), ("kv_heads", "embed"), std=deep, matrix=True),
        )
    if c.has_experts(number):
        specs |= _expert_specs(c, deep)
    else:
        specs["gate_up"] = ParamSpec((d, up), ("embed", "mlp"), matrix=True)
        specs["down"] = ParamSpec((f, d), ("mlp", "embed"), std=deep, matrix=True)
    before = ["attn_norm", *(() if c.shared_norm else ("mlp_norm",))] if c.pre_norm else []
    for name in (*before, *(("attn_post_norm", "mlp_post_norm") if c.post_norm else ())):
        specs[name] = norm(d, "embed")
    if c.norm_bias:
        specs |= {f"{name}_bias": zeros(d, "embed") for name in before}
    if c.qk_norm not in ("", "unit"):
        alone = c.qk_norm == "head"
        specs["q_norm"] = norm(h, "head") if alone else norm(k * g * h, "kv_heads")
        specs["k_norm"] = norm(h, "head") if alone else norm(k * h, "kv_heads")
    if c.qkv_bias and c.kv_rank:
        specs["qkv_a_bias"] = zeros(c.q_rank + c.row_dim, "latent")
    elif c.qkv_bias:
        specs["qkv_bias"] = zeros(k * (g + 2) * h, "kv_heads")
    if c.o_bias:
        specs["o_bias"] = zeros(d, "embed")
    if c.sink_logits:
        specs["sink_logits"] = zeros(k * g, "kv_heads")
    if c.mlp_bias:
        specs |= {"gate_up_bias": zeros(up, "mlp"), "down_bias": zeros(d, "embed")}
    return Layer(**specs)


def _latent_specs(c: ModelConfig, deep: float) -> dict[str, ParamSpec]:
    d, n, h, rank, wide = c.hidden_size, c.num_heads, c.head_dim, c.kv_rank, c.value_dim
    specs = dict(
        qkv_a=ParamSpec((d, c.q_rank + c.row_dim), ("embed", "latent"), matrix=True),
        q_b=ParamSpec((c.q_rank or d, n * h), ("latent", "heads"), matrix=True),
        k_b=ParamSpec((n, h - c.rope_head_dim, rank), ("heads", "head", "latent")),
        v_b=ParamSpec((n, wide, rank), ("heads", "head", "latent")),
        o=ParamSpec((n * wide, d), ("heads", "embed"), std=deep, matrix=True),
        kv_a_norm=ParamSpec((rank,), ("latent",), "ones"),
    )
    return specs | ({"q_a_norm": ParamSpec((c.q_rank,), ("latent",), "ones")} if c.q_rank else {})


def _expert_specs(c: ModelConfig, deep: float) -> dict[str, ParamSpec]:
    d, e, m, s = c.hidden_size, c.num_experts + c.expert_copies, c.moe_intermediate_size, c.shared_intermediate_size
    specs = dict(
        router=ParamSpec((d, c.num_experts), ("embed", "router")),
        experts_gate_up=ParamSpec((e, d, 2 * m), ("experts", "embed", "expert_mlp"), matrix=True),
        experts_down=ParamSpec((e, m, d), ("experts", "expert_mlp", "embed"), std=deep, matrix=True),
    )
    if c.router_bias:
        specs["router_bias"] = ParamSpec((c.num_experts,), ("router",), "zeros")
    if c.expert_bias:
        specs["experts_gate_up_bias"] = ParamSpec((e, 2 * m), ("experts", "expert_mlp"), "zeros")
        specs["experts_down_bias"] = ParamSpec((e, d), ("experts", "embed"), "zeros")
    if s:
        specs["shared_gate_up"] = ParamSpec((d, 2 * s), ("embed", "mlp"), matrix=True)
        specs["shared_down"] = ParamSpec((s, d), ("mlp", "embed"), std=deep, matrix=True)
    if c.shared_gate:
        specs["shared_router"] = ParamSpec((d,), ("embed",))
    return specs


def param_specs(c: ModelConfig) -> Params:
    """The whole tree of ParamSpecs in the listed layout."""
    vocab, wide = ParamSpec((c.vocab_size, c.hidden_size), ("vocab", "embed")), (c.hidden_size,)
    return Params(
        embed=vocab,
        stacked=(),
        listed=tuple(layer_specs(c, number) for number in range(c.num_layers)),
        final_norm=ParamSpec(wide, ("embed",), "zeros" if c.norm_offset else "ones"),
        lm_head=None if c.tie_embeddings else vocab,
        positions=ParamSpec((c.max_position, c.hidden_size), ("positions", "embed")) if c.learned_positions else None,
        final_norm_bias=ParamSpec(wide, ("embed",), "zeros") if c.norm_bias else None,
    )


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def stack(params: Params, c: ModelConfig) -> Params:
    """The stacked layout of a listed tree: layers of one place in the layer pattern become one Layer of leaves
    [repeats, ...]; layers before and after whole patterns stay listed. Works on arrays, NumPy or jax."""
    whole, around = _scanned(params.listed, c)
    stacked = tuple(jax.tree.map(lambda *xs: jnp.stack(xs), *whole[place :: c.period]) for place in range(c.period))
    return replace(params, stacked=stacked, listed=around, leading=c.scanned.start)


def _scanned(listed: tuple[Layer, ...], c: ModelConfig) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    first, end = c.scanned.start, c.scanned.stop
    return listed[first:end], listed[:first] + listed[end:]


def stacked_specs(c: ModelConfig) -> Params:
    """The ParamSpecs of the stacked layout."""
    specs = param_specs(c)
    whole, around = _scanned(specs.listed, c)
    deep = lambda s: ParamSpec((len(whole) // c.period, *s.shape), ("layers", *s.axes), s.init, s.std, s.matrix)
    stacked = tuple(jax.tree.map(deep, layer, is_leaf=is_spec) for layer in whole[: c.period])
    return replace(specs, stacked=stacked, listed=around, leading=c.scanned.start)


def init(spec: ParamSpec, key: jax.Array, dtype: Any) -> jax.Array:
    """One random weight by its own key. Run it under jit."""
    if spec.init in ("ones", "zeros"):
        return jnp.full(spec.shape, float(spec.init == "ones"), dtype)
    return (jax.random.normal(key, spec.shape, jnp.float32) * spec.std).astype(dtype)
