"""From an open GGUF file to a ModelConfig and to the parts of assemble.Source: metadata keys, tensor names, and what the
conversion of each architecture changed. Imports no jax.

Keys and names are those of llama.cpp: gguf-py (constants, tensor_mapping) lists them, src/models says how they are read.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llminfer.config import LIMITS, ModelConfig, Rope
from llminfer.errors import UserError, require_integer
from llminfer.weights.gguf import GgufFile, Tensor, shown
from llminfer.weights.gguf_types import dequantize

CONTROL = 3  # tokenizer.ggml.token_type of a token that is never part of a text
TURN_ENDS = frozenset(["<|end|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|eom_id|>", "<|END_OF_TURN_TOKEN|>", "[|endofturn|]"])
ROPE_FREQS, ROPE_SHORT, ROPE_LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
# Part -> tensor: outside the layers; and the stem of "blk.N.STEM.weight" (or .bias, then the part ends with _bias).
TOP_NAMES = {
    **{"embed": "token_embd.weight", "positions": "position_embd.weight", "lm_head": "output.weight"},
    **{"final_norm": "output_norm.weight", "final_norm_bias": "output_norm.bias"},
}
STEMS = {
    **{"attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm", "mlp_norm": "ffn_norm", "mlp_post_norm": "post_ffw_norm"},
    **{"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}
TOP_PARTS = {name: part for part, name in TOP_NAMES.items()}
PARTS = {stem: part for part, stem in STEMS.items()}
WITHOUT_BIAS = ("attn_post_norm", "mlp_post_norm", "q_norm", "k_norm")
LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)", re.ASCII)
SIZES = {
    **{"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_layers": "block_count"},
    **{"num_heads": "attention.head_count", "max_position": "context_length"},
}
# Keys of an architecture that say nothing about its logits.
HARMLESS = re.compile(
    r"vocab_size|tensor_data_layout|pooling_type|attention\.layer_norm_(rms_)?epsilon|rope\.scaling\.finetuned|(mm|vision)\..*"
)


class Fields:
    """Typed look-ups of metadata under one prefix; remembers what was looked at. Raises UserError."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self._metadata, self._prefix = metadata, prefix
        self._seen: set[str] = set()

    def get(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        self._seen.add(key)
        value = self._metadata.get(self._prefix + key, default)
        if list not in kinds and isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # written once a layer
        if value is None:
            raise UserError(f"metadata key {self._prefix}{key} is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{self._prefix}{key}={shown(value)}: must be {what}, the same for all layers")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return self.get(key, default, (int,), "an integer")

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 of the file, as the shortest decimal that stands for it: 1e-06, as in the config that was converted."""
        return _decimal(self.get(key, default, (int, float), "a number"))

    def text(self, key: str, default: str) -> str:
        return self.get(key, default, (str,), "a string")

    def flag(self, key: str, default: bool) -> bool:
        return self.get(key, default, (bool,), "true or false")

    def refuse_unread(self) -> None:
        """Refuses a key that nothing looked at, unless it is harmless or off (0, false, empty)."""
        for name, value in self._metadata.items():
            key = name.removeprefix(self._prefix)
            if key != name and value and key not in self._seen and not HARMLESS.fullmatch(key):
                legal = ", ".join(sorted(self._seen))
                raise UserError(f"{shown(name)}={shown(value)}: not supported; legal for this architecture: {legal}")


def _decimal(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


More = Callable[[Fields, Mapping[str, Tensor], dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """What the files of an architecture leave unsaid.

    fixed: fields of its ModelConfig. optional: fields that are read off the tensors of layer 0. more: further fields, from
    metadata, tensors and the fields so far. interleaved: q and k are stored for rotary pairs (0, 1), (2, 3), ... and not for
    (i, i + dim / 2). fused: its tensors that hold several parts. windows: None where the architecture has none; n: all layers
    but each n-th see a window, 0: all do. default_window: where the file does not say. local_theta: rotary base of windowed layers
    where the file does not say, 0: that of the others. local_scaled: whether these are scaled as the others. global_rope: whether
    layers without a window rotate where others have one. rotary: which layers rotate, a pattern."""

    fixed: dict[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    more: More | None = None
    interleaved: bool = False
    fused: tuple[str, ...] = ()
    windows: int | None = None
    default_window: int = 0
    local_theta: float = 0.0
    local_scaled: bool = True
    global_rope: bool = True
    rotary: tuple[bool, ...] = (True,)


def _gemma(get: Fields, tensors: Mapping[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    return {"embed_scale": math.sqrt(found["hidden_size"])}


def _gemma3(get: Fields, tensors: Mapping[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    # No key tells the attention scale. It is head_dim ** -0.5 but for the 27B models, of 46 (Gemma 2) and 62 layers (Gemma 3).
    scale = (found["hidden_size"] / found["num_heads"]) ** -0.5 if found["num_layers"] in (46, 62) else None
    cap = get.number("final_logit_softcapping", 0.0)
    return _gemma(get, tensors, found) | {"attn_scale": scale, "logit_softcap": cap or None}


def _gemma2(get: Fields, tensors: Mapping[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    caps = {"attn_softcap": get.number("attn_logit_softcapping", 50.0), "logit_softcap": get.number("final_logit_softcapping", 30.0)}
    return _gemma3(get, tensors, found) | {name: cap or None for name, cap in caps.items()}


def _granite(get: Fields, tensors: Mapping[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    if not get.flag("rope.scaling.finetuned", True):
        raise UserError("granite.rope.scaling.finetuned=False: not supported (it stands for no rotary embedding); legal: true")
    scales = {"embed_scale": get.number("embedding_scale", 1.0), "residual_scale": get.number("residual_scale", 1.0)}
    # What the logits are divided by.
    logit_scale = 1.0 / (get.number("logit_scale") or 1.0)
    return scales | {"attn_scale": get.number("attention.scale", 0.0) or None, "logit_scale": logit_scale}


def _cohere(get: Fields, tensors: Mapping[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    return {"logit_scale": get.number("logit_scale")}


def _gpt_neox(get: Fields, tensors: Mapping[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    return {"parallel": get.flag("use_parallel_residual", True)}


def _stablelm(get: Fields, tensors: Mapping[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    parallel = get.flag("use_parallel_residual", "blk.0.ffn_norm.weight" not in tensors)
    return {"parallel": parallel, "shared_norm": parallel}


BIASES = ("qkv_bias", "o_bias", "mlp_bias")
LAYER_NORM = {"norm": "layer", "norm_bias": True}
PLAIN = LAYER_NORM | dict.fromkeys(BIASES, True) | {"gated": False}
GEMMA = {"norm_offset": 1.0, "activation": "gelu_tanh"}
POST_NORM = {"pre_norm": False, "post_norm": True}
COHERE = {"norm": "layer", "parallel": True, "shared_norm": True}
FAMILIES = {
    "llama": Family(optional=BIASES, interleaved=True, windows=0),
    "internlm2": Family(optional=BIASES, interleaved=True),
    "smollm3": Family(optional=BIASES, interleaved=True, rotary=(True, True, True, False)),
    "granite": Family(optional=BIASES, interleaved=True, more=_granite),
    "qwen2": Family({"qkv_bias": True}),
    "qwen3": Family({"qk_norm": "head"}, ("qkv_bias", "o_bias")),
    "gemma": Family(GEMMA, more=_gemma),
    "gemma2": Family(GEMMA | {"post_norm": True}, more=_gemma2, windows=2, default_window=4096),
    "gemma3": Family(GEMMA | {"post_norm": True, "qk_norm": "head"}, more=_gemma3, windows=6, local_theta=10000.0, local_scaled=False),
    "phi3": Family(fused=("attn_qkv", "ffn_up"), windows=0),
    "olmo2": Family(POST_NORM | {"qk_norm": "full"}, windows=4, local_scaled=False),
    "gpt2": Family(PLAIN | {"activation": "gelu_tanh", "learned_positions": True}, fused=("attn_qkv",), rotary=(False,)),
    "gptneox": Family(PLAIN | {"activation": "gelu"}, more=_gpt_neox, fused=("attn_qkv",)),
    "starcoder2": Family(PLAIN | {"activation": "gelu_tanh"}, windows=0),
    "stablelm": Family(LAYER_NORM, ("qkv_bias", "qk_norm"), _stablelm),
    "command-r": Family(COHERE, ("qk_norm",), _cohere, interleaved=True),
    "cohere2": Family(COHERE, more=_cohere, interleaved=True, windows=4, global_rope=False),
    "exaone": Family(),
    "exaone4": Family(POST_NORM | {"qk_norm": "head"}, windows=4, global_rope=False),
}


def read_config(file: GgufFile) -> ModelConfig:
    """The ModelConfig of an open file. Raises UserError for an architecture, a key or a value that cannot be honoured."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(f"{file.path}: architecture {shown(architecture)} is not supported; legal: {', '.join(FAMILIES)}")
    try:
        return _config(file, Fields(file.metadata, f"{architecture}."), FAMILIES[architecture])
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def _turn_ends(metadata: Mapping[str, Any]) -> list[int]:
    """Ids of the control tokens that end a turn: files older than eot_token_id name them by their spelling alone."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list):
        return []
    return [i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL and token in TURN_ENDS]


def _config(file: GgufFile, get: Fields, family: Family) -> ModelConfig:
    metadata, tensors = file.metadata, file.tensors
    sizes = {name: get.integer(key) for name, key in SIZES.items()}
    for name, size in sizes.items():
        require_integer(name, size, 1, LIMITS[name])
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    head_dim = get.integer("attention.key_length", hidden // heads)
    require_integer("head_dim", head_dim, 1, LIMITS["head_dim"])
    if get.integer("attention.value_length", head_dim) != head_dim:
        raise UserError(f"attention.value_length={get.integer('attention.value_length')}: not supported; legal: {head_dim}, the key length")
    tokens, ids = metadata.get("tokenizer.ggml.tokens"), Fields(metadata, "tokenizer.ggml.")
    eos = [ids.integer(key, -1) for key in ("eos_token_id", "eot_token_id", "eom_token_id")] + _turn_ends(metadata)
    bos = ids.integer("bos_token_id", -1)
    epsilon = "attention.layer_norm_epsilon" if family.fixed.get("norm") == "layer" else "attention.layer_norm_rms_epsilon"
    embed = tensors.get(TOP_NAMES["embed"])
    found: dict[str, Any] = {
        **sizes,
        "name": str(metadata.get("general.name", "gguf"))[:200],
        "vocab_size": len(tokens) if isinstance(tokens, list) else embed.shape[0] if embed else 0,
        "num_kv_heads": get.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "norm_eps": get.number(epsilon),
        "tie_embeddings": "output.weight" not in tensors,
        "bos_id": None if bos < 0 else bos,
        "eos_ids": tuple(dict.fromkeys(token for token in eos if token >= 0)),
    }
    found |= family.fixed | {name: _optional(name, tensors) for name in family.optional}
    found |= family.more(get, tensors, found) if family.more else {}
    found |= _layers(get, family, found, _rope(file, get, head_dim, sizes["max_position"]) if any(family.rotary) else None)
    if found.get("attn_scale") == head_dim**-0.5:
        found["attn_scale"] = None
    get.refuse_unread()
    return ModelConfig(**found)


def _optional(name: str, tensors: Mapping[str, Tensor]) -> Any:
    """What the tensors of layer 0 say of a field of ModelConfig."""
    if name == "qk_norm":
        weight = tensors.get("blk.0.attn_q_norm.weight")
        return "" if weight is None else "heads" if len(weight.shape) == 2 else "head"
    stems = {"qkv_bias": ("attn_q", "attn_qkv"), "o_bias": ("attn_output",), "mlp_bias": ("ffn_up",)}[name]
    return any(f"blk.0.{stem}.bias" in tensors for stem in stems)


def _layers(get: Fields, family: Family, found: dict[str, Any], rope: Rope | None) -> dict[str, Any]:
    """windows, ropes and rope_layers: the shortest pattern that gives each layer its window and rotary embedding."""
    count, window = found["num_layers"], 0
    if family.windows is not None:
        window = get.integer("attention.sliding_window", family.default_window)
        require_integer("attention.sliding_window", window, 0, LIMITS["max_position"])
    sliding = _sliding(get, family.windows, count) if window else [False] * count
    local = rope
    if rope and any(sliding):
        theta = get.number("rope.freq_base_swa", family.local_theta or rope.theta)
        local = replace(rope, theta=theta) if family.local_scaled else Rope(theta, rope.dim)
    if not family.global_rope and any(sliding):
        rope = None
    layers = [
        (window if slides else 0, (local if slides else rope) if rotates else None)
        for slides, rotates in zip(sliding, itertools.cycle(family.rotary), strict=False)
    ]
    period = next(n for n in range(1, count + 1) if all(layer == layers[i % n] for i, layer in enumerate(layers)))
    ropes = tuple(dict.fromkeys(rope for _, rope in layers if rope))
    windows = [window for window, _ in layers[:period]]
    rope_layers = [-1 if rope is None else ropes.index(rope) for _, rope in layers[:period]]
    shortest = {"windows": windows, "rope_layers": rope_layers}
    return {"ropes": ropes} | {name: tuple(x[:1] if len(set(x)) == 1 else x) for name, x in shortest.items()}


def _sliding(get: Fields, period: int | None, count: int) -> list[bool]:
    """Which layers see a window only; period: see Family.windows. The file may give another, or a flag for each layer."""
    key = "attention.sliding_window_pattern"
    pattern = get.get(key, period, (int, list), "an integer or a list of true and false")
    if isinstance(pattern, list):
        if len(pattern) != count or any(type(flag) is not bool for flag in pattern):
            raise UserError(f"{key}={shown(pattern)}: must be an integer, or true or false for each of {count} layers")
        return pattern
    require_integer(key, pattern, 0, LIMITS["num_layers"])
    return [pattern == 0 or i % pattern < pattern - 1 for i in range(count)]


def _rope(file: GgufFile, get: Fields, head_dim: int, context: int) -> Rope:
    """The rotary embedding of layers without a window."""
    dim = get.integer("rope.dimension_count", head_dim)
    require_integer("rope.dimension_count", dim, 2, head_dim)
    if dim % 2:
        raise UserError(f"rope.dimension_count={dim}: must be even")
    rope = Rope(get.number("rope.freq_base", 10000.0), None if dim == head_dim else dim)
    kind = get.text("rope.scaling.type", "linear")
    factor = get.number("rope.scaling.factor", get.number("rope.scale_linear", 1.0))
    attention = get.number("rope.scaling.attn_factor", 1.0)
    original = get.integer("rope.scaling.original_context_length", context)
    legal = "none, linear or yarn with a factor of at least 1, longrope with its tensors and without a factor"
    if kind not in ("none", "linear", "yarn", "longrope") or not 1.0 <= factor < 1e6:
        raise UserError(f"rope.scaling.type={shown(kind)}, factor {factor:g}: not supported; legal: {legal}")
    tables = {name: _factors(file, name, dim) for name in (ROPE_FREQS, ROPE_SHORT, ROPE_LONG) if name in file.tensors}
    if kind == "none":
        factor = 1.0
    if ROPE_SHORT in tables and ROPE_LONG in tables and factor == 1.0 and len(tables) == 2:
        lengths = {"short_factors": tables[ROPE_SHORT], "long_factors": tables[ROPE_LONG]}
        return replace(rope, kind="longrope", original_max_position=original, attention_factor=attention, **lengths)
    if kind == "yarn":
        betas = {name: get.number(f"rope.scaling.yarn_{name}", usual) for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        if get.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
            raise UserError("rope.scaling.yarn_ext_factor: not supported; legal: 1")
        attention *= get.number("rope.scaling.yarn_attn_factor", 0.0) or 0.1 * math.log(factor) + 1.0
        rope = replace(rope, kind="yarn", factor=factor, original_max_position=original, attention_factor=attention, **betas)
    elif factor > 1.0:
        rope = replace(rope, kind="linear", factor=factor)
    if kind == "longrope" or (rope.kind != "yarn" and attention != 1.0) or (tables and (len(tables) > 1 or rope.kind != "default")):
        what = f"{shown(kind)}, factor {factor:g}, attn_factor {attention:g} and {', '.join(tables) or 'no tensor of factors'}"
        raise UserError(f"rope.scaling.type={what}: not supported; legal: {legal}")
    return _by_factors(rope, head_dim, tables[ROPE_FREQS]) if ROPE_FREQS in tables else rope


def _factors(file: GgufFile, name: str, dim: int) -> tuple[float, ...]:
    """By what each rotary frequency is divided: a tensor of dim / 2 numbers."""
    shape = file.tensors[name].shape
    values = file.read(name).astype(np.float32) if shape == (dim // 2,) else np.zeros(1)
    if not np.all(np.isfinite(values)) or values.min() <= 0:
        raise UserError(f"{name} of shape {list(shape)}: must be {dim // 2} positive numbers")
    return tuple(_decimal(value) for value in values)


def _by_factors(rope: Rope, head_dim: int, factors: tuple[float, ...]) -> Rope:
    """The rotary embedding of which the file keeps only the resulting factors."""
    if set(factors) == {1.0}:
        return rope
    # Llama 3.1 and those after it use these bounds, with a factor of 8, 16 or 32.
    llama3 = replace(rope, kind="llama3", factor=max(factors), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    if np.allclose(factors, llama3_factors(llama3, head_dim), rtol=1e-4, atol=0):
        return llama3
    return replace(rope, kind="longrope", short_factors=factors, long_factors=factors)


def llama3_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """By what each rotary frequency theta^(-2i/dim) is divided under Llama 3 scaling: [dim / 2] float64.

    1 for wavelengths under original / high, `factor` over original / low, and between them a blend linear in
    original / wavelength (Llama 3.1 model code)."""
    dim = rope.dim or head_dim
    waves = 2 * np.pi * rope.theta ** (np.arange(0, dim, 2) / dim)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = np.clip((rope.original_max_position / waves - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / rope.factor + blend)


class GgufSource:
    """The parts of an open file, see assemble.Source: rows of q and k in half-split rotary order, norms without an offset."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file, self._config = file, config
        self._family = FAMILIES[file.metadata["general.architecture"]]
        self._places: dict[str, tuple[str, slice]] = {}
        for name in file.tensors:
            if name not in (ROPE_FREQS, ROPE_SHORT, ROPE_LONG):
                places = self._split(name)
                # A second tensor for a part is one that is not expected.
                self._places |= {name: (name, slice(None))} if places.keys() & self._places.keys() else places

    def _split(self, name: str) -> dict[str, tuple[str, slice]]:
        """The parts in a tensor: part -> (tensor, its rows). A tensor that is no part is itself one."""
        match = LAYER_TENSOR.fullmatch(name)
        if not match:
            return {TOP_PARTS.get(name, name): (name, slice(None))}
        layer, stem, kind = match.groups()
        c = self._config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        parts, bounds = (PARTS.get(stem, ""),), [0, None]
        if stem == "attn_qkv":
            parts, bounds = ("q", "k", "v"), [0, q, q + kv, None]
        elif stem == "ffn_up" and stem in self._family.fused:
            parts, bounds = ("gate", "up"), [0, c.intermediate_size, None]
        if parts == ("",) or (kind == "bias" and parts[0] in WITHOUT_BIAS):
            return {name: (name, slice(None))}
        suffix = "_bias" if kind == "bias" else ""
        rows = [slice(*pair) for pair in itertools.pairwise(bounds)]
        return {f"layers.{layer}.{part}{suffix}": (name, place) for part, place in zip(parts, rows, strict=True)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for part, (name, rows) in self._places.items():
            shape = self._file.tensors[name].shape
            shapes[part] = (len(range(*rows.indices(shape[0]))), *shape[1:])
        return shapes

    def stored(self, part: str) -> str:
        """The tensor that holds a part, or would if there were one."""
        if part in self._places:
            return self._places[part][0]
        _, _, rest = part.partition(".")
        layer, _, name = rest.partition(".")
        base = name.removesuffix("_bias")
        if base not in STEMS:
            return TOP_NAMES.get(part, part)
        fused = {"q": "attn_qkv", "k": "attn_qkv", "v": "attn_qkv", "gate": "ffn_up"}.get(base)
        stem = fused if fused in self._family.fused else STEMS[base]
        return f"blk.{layer}.{stem}.{'weight' if base == name else 'bias'}"

    def read(self, part: str) -> np.ndarray:
        """A part whose shape is that of the config, as float32, float16 or bfloat16. Rows are moved while still quantized."""
        name, rows = self._places[part]
        kind, stored = self._file.tensors[name].type, self._file.rows(name)
        leaf = part.rpartition(".")[2]
        vector = leaf.endswith(("norm", "bias"))
        values = (dequantize(kind, stored) if vector else stored)[rows]
        if self._family.interleaved and leaf in ("q", "k", "q_bias", "k_bias", "q_norm", "k_norm"):
            heads = values.reshape(-1, self._config.head_dim, *(() if vector else values.shape[1:]))
            values = heads[:, self._half_split()].reshape(values.shape)
        if not vector:
            return dequantize(kind, values)
        if self._config.norm_offset and leaf.endswith("norm"):
            # Conversion adds the offset to the weights of norms, for code that knows of none.
            with np.errstate(all="ignore"):
                return values.astype(np.float32) - np.float32(self._config.norm_offset)
        return values

    def _half_split(self) -> np.ndarray:
        """Where element i of a head is stored: pairs (0, 1), (2, 3), ... become (i, i + dim / 2); others stay."""
        head, rotated = np.arange(self._config.head_dim), self._config.ropes[0].dim or self._config.head_dim
        return np.concatenate([head[0:rotated:2], head[1:rotated:2], head[rotated:]])
