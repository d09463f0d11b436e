"""What a model is (ModelConfig) and how it is served (EngineConfig): frozen values, checked when made. Imports no jax."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llminfer.errors import UserError, refuse, require_integer

# No published decoder comes near these; a file that claims more is damaged or hostile.
LIMITS = {
    "vocab_size": 2**21,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_layers": 1024,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 1024,
    "max_position": 2**24,
}
MAX_EXPERTS = 4096
MAX_SINKS = 128
QUANTIZATIONS = (None, "int8", "fp8", "int4", "mxfp4", "mxfp4_experts", "w8a8", "w8a8_fp8")
EIGHT_BITS = ("int8", "fp8", "w8a8", "w8a8_fp8")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def _positive(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        raise refuse(field, value, "must be a positive number")


def _one_of(field: str, value: object, legal: tuple[object, ...]) -> None:
    if not any(value is item or (type(value) is type(item) and value == item) for item in legal):
        raise refuse(field, value, f"legal: {', '.join('null' if x is None else str(x) for x in legal)}")


@dataclass(frozen=True)
class Rope:
    """One rotary embedding (Su et al., arXiv 2104.09864) with its scaling.

    dim: the first so many elements of a head are rotated, None for all; pair i is elements i and i + dim / 2. kind: how the
    frequencies are scaled: "default" not at all; "linear" all divided by factor; "dynamic" a larger base for sequences past
    original_max_position (NTK-aware); "yarn" divided, kept or blended between beta_slow and beta_fast rotations (Peng et al.,
    arXiv 2309.00071); "llama3" by wavelength (Llama 3.1); "longrope" divided one by one by short_factors, or by long_factors for
    sequences past original_max_position (Ding et al., arXiv 2402.13753). attention_factor: what sine and cosine are multiplied by.
    """

    theta: float = 10000.0
    dim: int | None = None
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _one_of("rope kind", self.kind, ROPE_KINDS)
        for field in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            _positive(f"rope_{field}", getattr(self, field))
        require_integer("rope original_max_position", self.original_max_position, 1, LIMITS["max_position"])
        if self.dim is not None:
            require_integer("rope dim", self.dim, 2, LIMITS["head_dim"])
            if self.dim % 2:
                raise refuse("rope dim", self.dim, "must be even (rotary pairs)")

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder-only transformer: every family is a choice of these fields. Sizes in elements.

    Attention: `windows` is a pattern repeated over the layers, each entry the number of latest positions a token sees (itself included), 0
    for all of them; chunked: the size of chunks instead, of which a token sees its own, up to itself (Llama 4); `rope_layers` a pattern
    of as many entries (or one for all): which of `ropes` a layer uses, -1 for none. qk_norm: "" none, "head" one weight [head_dim] for
    all heads, "heads" a weight for each head, "full" over all heads at once, "unit" without a weight, after the rotation and where
    there is one. query_floor F > 0: in layers without a rotation queries at position p are multiplied by 1 + query_scale * log(1 + (p +
    1) // F). attn_scale: None for head_dim ** -0.5. attn_softcap, logit_softcap: x -> cap * tanh(x / cap). sink_logits: each head's
    softmax has one more key, without a value, whose score is a weight (gpt-oss, arXiv 2508.10925). Latent attention (kv_rank > 0;
    DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are made of one latent of kv_rank numbers a token, beside which a key
    has rope_head_dim rotated ones, the same for all heads. These are what is cached, as num_kv_heads = 1. Of a query's head_dim the
    last rope_head_dim are rotated; a value has value_dim. q_rank: queries are made of a latent of their own, 0: of the hidden state.
    Block: norm "rms" or "layer"; norm_offset is added to a norm's weight. pre_norm: norms before attention and mlp; post_norm:
    norms on what both give, before it is added. parallel: attention and mlp read the same input and are added together;
    shared_norm: then one norm serves both. residual_scale multiplies what is added to the residual stream.
    mlp: gated: act(gate) * up, else act(up). embed_scale and logit_scale multiply the embeddings and the logits.
    Experts (num_experts, 0: none): `moe_layers` is a pattern repeated over the layers: where experts, gated and moe_intermediate_size wide,
    take the place of the mlp; the first dense_layers have none. The router scores them by a "softmax" or "sigmoid" of its logits; a
    token goes to the experts_per_token best, whose scores are its weights, divided by their sum where norm_topk says so, then times
    routed_scale. scale_inputs: they multiply what goes into the experts, and not what comes out. Of router_groups, only experts of
    those router_groups_used are chosen whose two best score most together (DeepSeek-V3, arXiv 2412.19437). router_bias: "" none,
    "logits" added to them, "choice" to the scores, for the choice alone. expert_bias: both products of an expert have biases.
    activation "clamped" is of experts alone: gate * sigmoid(1.702 * gate) * (up + 1), gate at most 7, up from -7 to 7 (gpt-oss).
    shared_intermediate_size (0: none): width of an mlp that sees every token beside them; shared_gate: what it gives is multiplied by
    the sigmoid of a product of the token.
    sink_tokens, sink_window: set by EngineConfig.kv_policy alone: layers of the window sink_window also see the first sink_tokens.
    expert_copies: set by the engine's field of that name alone: slots that a layer has for experts beyond one each. stages: set by the
    mesh alone (pp): in how many equal parts the patterns of layers are cut."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    windows: tuple[int, ...] = (0,)
    chunked: bool = False
    ropes: tuple[Rope, ...] = (Rope(),)
    rope_layers: tuple[int, ...] = (0,)
    learned_positions: bool = False
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    qk_norm: str = ""
    sink_logits: bool = False
    q_rank: int = 0
    kv_rank: int = 0
    rope_head_dim: int = 0
    value_dim: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    moe_layers: tuple[bool, ...] = (True,)
    dense_layers: int = 0
    router: str = "softmax"
    router_bias: str = ""
    router_groups: int = 1
    router_groups_used: int = 1
    norm_topk: bool = False
    scale_inputs: bool = False
    routed_scale: float = 1.0
    expert_bias: bool = False
    expert_copies: int = 0
    stages: int = 1
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    query_floor: int = 0
    query_scale: float = 0.0
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    sink_tokens: int = 0
    sink_window: int = 0

    def __post_init__(self) -> None:
        for field, most in LIMITS.items():
            require_integer(field, getattr(self, field), 1, most)
        if self.num_heads % self.num_kv_heads:
            raise refuse("num_kv_heads", self.num_kv_heads, f"must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise refuse("head_dim", self.head_dim, "must be even (rotary pairs)")
        if not self.windows or any(type(w) is not int or w < 0 for w in self.windows):
            raise refuse("windows", self.windows, "must be a list of integers >= 0 (0: no window)")
        if not self.rope_layers or any(type(r) is not int or not -1 <= r < len(self.ropes) for r in self.rope_layers):
            raise refuse("rope_layers", self.rope_layers, f"must be integers from -1 (none) to {len(self.ropes) - 1}")
        if 1 != len(self.windows) != len(self.rope_layers) != 1:
            raise refuse("rope_layers", self.rope_layers, f"must have one entry or as many as windows ({len(self.windows)})")
        require_integer("query_floor", self.query_floor, 0, LIMITS["max_position"])
        self._check_experts()
        longest = max(len(self.windows), len(self.rope_layers), len(self.moe_layers) if self.num_experts else 1)
        if longest > self.num_layers - self.dense_layers:
            named = "windows, rope_layers and moe_layers" if self.num_experts else "windows and rope_layers"
            least = f" - dense_layers={self.dense_layers}" if self.dense_layers else ""
            raise refuse(named, longest, f"must not be longer than num_layers={self.num_layers}{least}")
        self._check_latent()
        for rope in self.ropes:
            pairs = (rope.dim or self.head_dim) // 2
            if pairs * 2 > self.head_dim:
                raise refuse("rope dim", rope.dim, f"must be at most head_dim={self.head_dim}")
            if rope.kind == "longrope" and not len(rope.short_factors) == len(rope.long_factors) == pairs:
                raise refuse("rope factors", len(rope.long_factors), f"longrope needs one short and one long factor a pair ({pairs})")
        _one_of("norm", self.norm, ("rms", "layer"))
        _one_of("qk_norm", self.qk_norm, ("", "head", "heads", "full", "unit"))
        _one_of("activation", self.activation, ACTIVATIONS)
        if not (self.pre_norm or self.post_norm):
            raise refuse("pre_norm", False, "a block needs pre_norm or post_norm")
        if self.shared_norm and not (self.parallel and self.pre_norm):
            raise refuse("shared_norm", True, "needs parallel and pre_norm")
        for field in ("norm_eps", "embed_scale", "residual_scale", "logit_scale"):
            _positive(field, getattr(self, field))
        for field in ("attn_scale", "attn_softcap", "logit_softcap"):
            if getattr(self, field) is not None:
                _positive(field, getattr(self, field))
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise refuse("bos/eos token id", token, f"must be from 0 to vocab_size-1={self.vocab_size - 1}")

    def _check_latent(self) -> None:
        for field, most in (("q_rank", 2**17), ("kv_rank", 2**17), ("rope_head_dim", self.head_dim - 1), ("value_dim", 1024)):
            require_integer(field, getattr(self, field), 1 if self.kv_rank and field != "q_rank" else 0, most if self.kv_rank else 0)
        if not self.kv_rank:
            return
        if self.num_kv_heads != 1:
            raise refuse("num_kv_heads", self.num_kv_heads, "must be 1 with kv_rank: all heads read one latent")
        if self.qk_norm or self.sink_logits or self.attn_softcap:
            raise refuse("kv_rank", self.kv_rank, "goes without qk_norm, sink_logits and attn_softcap")
        if any((rope.dim or self.head_dim) != self.rope_head_dim for rope in self.ropes):
            raise refuse("rope dim", self.ropes[0].dim, f"must be rope_head_dim={self.rope_head_dim} with kv_rank")

    def _check_experts(self) -> None:
        require_integer("num_experts", self.num_experts, 0, MAX_EXPERTS)
        require_integer("shared_intermediate_size", self.shared_intermediate_size, 0, LIMITS["intermediate_size"])
        if not self.moe_layers or any(type(x) is not bool for x in self.moe_layers):
            raise refuse("moe_layers", self.moe_layers, "must be a list of true (experts) and false (an mlp)")
        _one_of("router", self.router, ("softmax", "sigmoid"))
        _one_of("router_bias", self.router_bias, ("", "logits", "choice"))
        _positive("routed_scale", self.routed_scale)
        require_integer("dense_layers", self.dense_layers, 0, self.num_layers - 1)
        if not self.num_experts:
            for field in ("experts_per_token", "moe_intermediate_size", "shared_intermediate_size"):
                if getattr(self, field):
                    raise refuse(field, getattr(self, field), "must be 0 without num_experts")
            for field, value in (("router_bias", ""), ("expert_bias", False), ("dense_layers", 0)):
                if getattr(self, field) != value:
                    raise refuse(field, getattr(self, field), "needs num_experts")
            if self.activation == "clamped":
                raise refuse("activation", self.activation, "is of experts alone: needs num_experts")
            return
        require_integer("experts_per_token", self.experts_per_token, 1, self.num_experts)
        self._check_groups()
        require_integer("moe_intermediate_size", self.moe_intermediate_size, 1, LIMITS["intermediate_size"])
        if not self.gated or self.activation not in ("silu", "gelu_tanh", "clamped"):
            raise refuse("activation", self.activation, "experts must be gated, by silu, gelu_tanh or clamped")
        if self.activation == "clamped" and not (all(self.moe_layers) and not self.shared_intermediate_size):
            raise refuse("activation", self.activation, "is of experts alone: no layer may have an mlp, or shared experts")
        if self.mlp_bias:
            raise refuse("mlp_bias", True, "is not of models with experts; theirs is expert_bias")

    def _check_groups(self) -> None:
        require_integer("router_groups", self.router_groups, 1, self.num_experts)
        if self.num_experts % self.router_groups or (self.router_groups > 1 and self.num_experts // self.router_groups < 2):
            raise refuse("router_groups", self.router_groups, f"must cut num_experts={self.num_experts} into equal groups of 2 and more")
        require_integer("router_groups_used", self.router_groups_used, 1, self.router_groups)
        most = self.num_experts // self.router_groups * self.router_groups_used
        if self.experts_per_token > most:
            raise refuse("experts_per_token", self.experts_per_token, f"must be at most the {most} experts of router_groups_used")

    @property
    def period(self) -> int:
        """Length of the pattern of layers: layer i is of the kind of layer i % period. Patterns that repeat together after the last layer
        only are one pattern of all layers."""
        together = math.lcm(max(len(self.windows), len(self.rope_layers)), len(self.moe_layers) if self.num_experts else 1)
        return min(together, self.num_layers - self.dense_layers)

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and self.moe_layers[layer % len(self.moe_layers)] and layer >= self.dense_layers

    @property
    def expert_layers(self) -> int:
        """How many layers have experts."""
        return sum(map(self.has_experts, range(self.num_layers)))

    @property
    def scanned(self) -> range:
        """The layers that run under a scan in the stacked layout: whole patterns, after the first dense_layers; as many as all stages can
        have equally many of."""
        first = self.dense_layers
        patterns = (self.num_layers - first) // self.period
        return range(first, first + (patterns - patterns % self.stages) * self.period)

    @property
    def row_dim(self) -> int:
        """Numbers that a token's row of the cache has for each kv head: its key and its value, or the latent and the rotated part."""
        return self.kv_rank + self.rope_head_dim if self.kv_rank else 2 * self.head_dim

    @property
    def groups(self) -> tuple[int, ...]:
        """The distinct windows, in order of first use: layers of one window share one page pool."""
        return tuple(dict.fromkeys(self.windows))

    @property
    def sinks(self) -> tuple[int, ...]:
        """For each of `groups`, how many of the first positions a token sees beside the window."""
        return tuple(self.sink_tokens if window and window == self.sink_window else 0 for window in self.groups)

    def window(self, layer: int) -> int:
        return self.windows[layer % len(self.windows)]

    def rope(self, layer: int) -> int:
        """Index in `ropes` of the layer's rotary embedding; -1: none."""
        return self.rope_layers[layer % len(self.rope_layers)]

    def group_layers(self, group: int) -> tuple[int, ...]:
        """Layer numbers of page group `group` (an index of `groups`), in order."""
        return tuple(i for i in range(self.num_layers) if self.window(i) == self.groups[group])

    @property
    def num_params(self) -> int:
        """Parameter count, the tied output head counted once."""
        d, f, heads = self.hidden_size, self.intermediate_size, self.num_heads
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm = d * (2 if self.norm_bias else 1)
        norms = self.pre_norm * (1 if self.shared_norm else 2) + 2 * self.post_norm
        qk_norm = {"": 0, "unit": 0, "head": 2 * self.head_dim, "heads": q + kv, "full": q + kv}[self.qk_norm]
        up = f * (2 if self.gated else 1)
        biases = self.qkv_bias * (q + 2 * kv) + self.o_bias * d + self.sink_logits * self.num_heads
        attention = d * (2 * q + 2 * kv) + qk_norm + biases
        if self.kv_rank:
            latents, made = self.q_rank + self.row_dim, heads * (self.head_dim - self.rope_head_dim + self.value_dim)
            attention = d * (latents + heads * self.value_dim) + (self.q_rank or d) * q + self.kv_rank * made + self.q_rank + self.kv_rank
            attention += self.qkv_bias * latents + self.o_bias * d
        layer = attention + norms * norm
        mlp = d * (up + f) + self.mlp_bias * (up + d)
        wide = self.num_experts * self.moe_intermediate_size + self.shared_intermediate_size
        experts = d * (self.num_experts + 3 * wide + self.shared_gate)
        experts += self.num_experts * (bool(self.router_bias) + self.expert_bias * (2 * self.moe_intermediate_size + d))
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size + self.learned_positions * self.max_position
        with_experts = sum(self.has_experts(i) for i in range(self.num_layers))
        return self.num_layers * layer + (self.num_layers - with_experts) * mlp + with_experts * experts + tables * d + norm


@dataclass(frozen=True)
class EngineConfig:
    """Everything that `LLM(**kw)` and `--set key=value` accept beside the model. Lengths in tokens. profile: a folder for a trace
    of the first steps, which xprof and TensorBoard show. kv_policy: "sinks:4,window:1024" keeps the keys and values of the first 4
    and the last 1024 tokens only, in layers that would see all (StreamingLLM, arXiv 2309.17453). quantize: "int8" and "int4" round the
    matrices of the layers, by output channel and in groups of 128 (64, 32) inputs; "mxfp4" to floats of 4 bits in groups of 32 (OCP
    Microscaling Formats), "mxfp4_experts" those of experts alone, which is gpt-oss as published; "fp8" to float8_e4m3fn by output channel;
    "w8a8" and "w8a8_fp8" are int8 and fp8 with tokens rounded to the same. quantize_head: the output head too (tokens are not rounded
    there); an embedding that is also the head stays as it is for tokens to be looked up. prefill_mesh: prompts are
    processed on this mesh of devices of their own, and handed over to those of `mesh`, which decode ("tp=1": one; "": the same do both).
    expert_copies: on a mesh that splits experts, how many slots for them a layer has beyond one each: those that most tokens want have
    several (llminfer/balance.py; LLM.rebalance)."""

    slots: int = 8
    context: int | None = None
    page_size: int = 16
    pages: int | None = None
    chunk: int = 256
    prefix_cache: bool = True
    dtype: str = "auto"
    quantize: str | None = None
    quantize_head: bool = False
    kv_dtype: str | None = None
    kv_policy: str | None = None
    mesh: str = ""
    prefill_mesh: str = ""
    expert_copies: int = 0
    speculate: str | None = None
    seed: int = 0
    decode_steps: int = 32
    layout: str = "auto"
    cache_dir: str | None = None
    profile: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        require_integer("slots", self.slots, 1, 4096)
        require_integer("page_size", self.page_size, 8, 1024)
        require_integer("chunk", self.chunk, 1, 65536)
        require_integer("decode_steps", self.decode_steps, 1, 1024)
        require_integer("seed", self.seed, -(2**63), 2**63 - 1)
        require_integer("expert_copies", self.expert_copies, 0, 65536)
        for field, least in (("context", 2), ("pages", 1)):
            if getattr(self, field) is not None:
                require_integer(field, getattr(self, field), least, 2**31 - 1)
        if self.page_size & (self.page_size - 1):
            raise refuse("page_size", self.page_size, "must be a power of two from 8 to 1024")
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("layout", self.layout, ("auto", "listed", "stacked"))
        _one_of("quantize", self.quantize, QUANTIZATIONS)
        if self.quantize_head and self.quantize is None:
            raise refuse("quantize_head", True, f"needs quantize, one of {', '.join(q for q in QUANTIZATIONS if q)}")
        _one_of("kv_dtype", self.kv_dtype, (None, "float32", "bfloat16", "int8", "float8_e4m3fn"))
        _one_of("speculate", self.speculate, (None,))
        policy = parse_policy(self.kv_policy)
        if policy and policy[0] and self.kv_dtype in ("int8", "float8_e4m3fn"):
            raise refuse("kv_policy", self.kv_policy, f"sinks must be 0 with kv_dtype={self.kv_dtype}")
        for field in ("prefix_cache", "debug", "quantize_head"):
            _one_of(field, getattr(self, field), (True, False))
        for field in ("cache_dir", "profile"):
            if not isinstance(getattr(self, field), (str, type(None))):
                raise refuse(field, getattr(self, field), "must be the name of a folder, or null")
        for field in ("mesh", "prefill_mesh"):
            if not isinstance(getattr(self, field), str):
                raise refuse(field, getattr(self, field), "must be a string such as 'tp=2'; '' is one device")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> EngineConfig:
        """Builds from field names; an unknown name lists the known ones. Raises UserError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"{name}: not a setting of the engine; legal: {', '.join(known)}")
        return cls(**settings)


def parse_policy(text: str | None) -> tuple[int, int] | None:
    """(sinks, window) of a kv_policy. Raises UserError."""
    if text is None:
        return None
    rule = f"must be 'sinks:S,window:W' with S from 0 to {MAX_SINKS} and W from 1"
    parts = [part.partition(":") for part in text.split(",")] if isinstance(text, str) else []
    found = {
        name.strip(): int(value) for name, _, value in parts if value.strip().isascii() and value.strip().isdigit() and len(value) < 10
    }
    if len(parts) != 2 or set(found) != {"sinks", "window"} or found["sinks"] > MAX_SINKS or found["window"] < 1:
        raise refuse("kv_policy", text, rule)
    return found["sinks"], found["window"]


def evicting(c: ModelConfig, text: str | None) -> ModelConfig:
    """The model with a kv_policy in place of the layers that see all positions. Raises UserError where it makes no sense."""
    policy = parse_policy(text)
    if policy is None:
        return c
    sinks, window = policy
    if c.chunked:
        raise refuse("kv_policy", text, f"{c.name} attends by chunks: their size bounds the cache of most layers")
    if 0 not in c.windows:
        raise refuse("kv_policy", text, f"{c.name} has no layer that sees all positions: its own windows bound the cache")
    if window in c.windows:
        raise refuse("kv_policy", text, f"window must not be one of {c.name}'s own ({', '.join(str(w) for w in c.groups if w)})")
    if c.learned_positions:
        raise refuse("kv_policy", text, f"{c.name} has learned positions: it needs rotary ones, or none")
    return replace(c, windows=tuple(w or window for w in c.windows), sink_tokens=sinks, sink_window=window)


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` from the command line; the value is JSON where it parses as JSON, else a string."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise refuse("--set", text, "must be key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, None if value in ("None", "none") else {"True": True, "False": False}.get(value, value)


def configs_dir() -> Path:
    """The folder of TOML configs: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def from_toml(name: str) -> ModelConfig:
    """The ModelConfig of `configs/NAME.toml`. Raises UserError that lists the names there are."""
    folder = configs_dir()
    names = sorted(p.stem for p in folder.glob("*.toml") if p.stem != "chips")
    if name not in names:
        raise refuse("config", name, f"legal: {', '.join(names)}")
    data = tomllib.loads((folder / f"{name}.toml").read_text())
    if "ropes" in data:
        data["ropes"] = tuple(_rope_of(rope) for rope in data["ropes"])
    for field in ("windows", "rope_layers", "eos_ids", "moe_layers"):
        if field in data:
            data[field] = tuple(data[field])
    return ModelConfig(name=name, **data)


def _rope_of(fields: dict[str, Any]) -> Rope:
    lists: Any = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Rope(**fields | lists)
