"""What a model is (ModelConfig) and how it is served (EngineConfig): frozen values, checked when made. Imports no jax."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass
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
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling. kind: "linear" (all frequencies / factor) or "llama3" (Llama 3.1, by wavelength)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder-only transformer. Sizes in elements; `windows` is a pattern repeated over
    the layers, each entry the number of latest positions a token sees (itself included), 0 for all of them."""

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
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field, most in LIMITS.items():
            require_integer(field, getattr(self, field), 1, most)
        if self.num_heads % self.num_kv_heads:
            raise refuse("num_kv_heads", self.num_kv_heads, f"must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise refuse("head_dim", self.head_dim, "must be even (rotary pairs)")
        if not self.windows or any(not isinstance(w, int) or w < 0 for w in self.windows):
            raise refuse("windows", self.windows, "must be a list of integers >= 0 (0: no window)")
        if len(self.windows) > self.num_layers:
            raise refuse("windows", self.windows, f"must not be longer than num_layers={self.num_layers}")
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
                raise refuse(field, value, "must be a positive number")
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if not 0 <= token < self.vocab_size:
                raise refuse("bos/eos token id", token, f"must be from 0 to vocab_size-1={self.vocab_size - 1}")

    @property
    def groups(self) -> tuple[int, ...]:
        """The distinct windows, in order of first use: layers of one window share one page pool."""
        return tuple(dict.fromkeys(self.windows))

    def window(self, layer: int) -> int:
        return self.windows[layer % len(self.windows)]

    def group_layers(self, group: int) -> tuple[int, ...]:
        """Layer numbers of page group `group` (an index of `groups`), in order."""
        return tuple(i for i in range(self.num_layers) if self.window(i) == self.groups[group])

    @property
    def num_params(self) -> int:
        """Parameter count, the tied output head counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        heads = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * self.hidden_size + self.hidden_size


@dataclass(frozen=True)
class EngineConfig:
    """Everything that `LLM(**kw)` and `--set key=value` accept beside the model. Lengths in tokens."""

    slots: int = 8
    context: int | None = None
    page_size: int = 16
    pages: int | None = None
    chunk: int = 256
    prefix_cache: bool = True
    dtype: str = "auto"
    quantize: str | None = None
    kv_dtype: str | None = None
    mesh: str = ""
    speculate: str | None = None
    seed: int = 0
    decode_steps: int = 32
    layout: str = "auto"
    cache_dir: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        require_integer("slots", self.slots, 1, 4096)
        require_integer("page_size", self.page_size, 8, 1024)
        require_integer("chunk", self.chunk, 1, 65536)
        require_integer("decode_steps", self.decode_steps, 1, 1024)
        require_integer("seed", self.seed, -(2**63), 2**63 - 1)
        for field, least in (("context", 2), ("pages", 1)):
            if getattr(self, field) is not None:
                require_integer(field, getattr(self, field), least, 2**31 - 1)
        if self.page_size & (self.page_size - 1):
            raise refuse("page_size", self.page_size, "must be a power of two from 8 to 1024")
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("layout", self.layout, ("auto", "listed", "stacked"))
        _one_of("quantize", self.quantize, (None, "int8"))
        _one_of("kv_dtype", self.kv_dtype, (None, "float32", "bfloat16"))
        _one_of("speculate", self.speculate, (None,))
        for field in ("prefix_cache", "debug"):
            _one_of(field, getattr(self, field), (True, False))
        if not isinstance(self.mesh, str):
            raise refuse("mesh", self.mesh, "must be a string such as 'tp=2'; '' is one device")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> EngineConfig:
        """Builds from field names; an unknown name lists the known ones. Raises UserError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"{name}: not a setting of the engine; legal: {', '.join(known)}")
        return cls(**settings)


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value` from the command line; the value is JSON where it parses as JSON, else a string."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise refuse("--set", text, "must be key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, None if value in ("None", "none") else {"True": True, "False": False}.get(value, value)


def _one_of(field: str, value: object, legal: tuple[object, ...]) -> None:
    if not any(value is item or (type(value) is type(item) and value == item) for item in legal):
        raise refuse(field, value, f"legal: {', '.join('null' if x is None else str(x) for x in legal)}")


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
    if scaling := data.pop("rope_scaling", None):
        data["rope_scaling"] = RopeScaling(**scaling)
    for field in ("windows", "eos_ids"):
        if field in data:
            data[field] = tuple(data[field])
    return ModelConfig(name=name, **data)


def from_hf(data: dict[str, Any], name: str) -> ModelConfig:
    """ModelConfig from the contents of a Hugging Face config.json (transformers 4 and 5 spelling). Raises UserError."""
    if not isinstance(data, dict):
        raise refuse("config.json", type(data).__name__, "must be a JSON object")
    architecture = (data.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise refuse("architectures", architecture, f"not supported; legal: {', '.join(ARCHITECTURES)}")
    for field, supported in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if data.get(field, supported) not in (supported, None):
            raise refuse(field, data[field], f"not supported for {architecture}; legal: {supported}")
    try:
        heads = data["num_attention_heads"]
        sizes = {
            "vocab_size": data["vocab_size"],
            "hidden_size": data["hidden_size"],
            "intermediate_size": data["intermediate_size"],
            "num_layers": data["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": data["num_key_value_heads"] if data.get("num_key_value_heads") is not None else heads,
            "max_position": data.get("max_position_embeddings", 2048),
        }
    except KeyError as error:
        raise UserError(f"config.json: field {error.args[0]} is missing") from None
    for field, value in sizes.items():
        require_integer(field, value, 1, LIMITS[field])
    head_dim = data.get("head_dim")
    if head_dim is None:
        if sizes["hidden_size"] % heads:
            raise refuse("num_attention_heads", heads, f"must divide hidden_size={sizes['hidden_size']}")
        head_dim = sizes["hidden_size"] // heads
    window = data.get("sliding_window") if architecture == "MistralForCausalLM" else None
    theta, scaling = _rope_from_hf(data)
    eos = data.get("eos_token_id")
    return ModelConfig(
        name=name,
        **sizes,
        head_dim=head_dim,
        windows=(window or 0,),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=data.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        bos_id=data.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _rope_from_hf(data: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise refuse("rope_scaling", rope, "must be an object")
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise refuse("rope_type", kind, "legal: default, linear, llama3")
    try:
        scaling = RopeScaling(kind, float(rope["factor"]))
        if kind == "llama3":
            scaling = RopeScaling(
                kind,
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise UserError(f"config.json: rope scaling {kind} needs the field {error.args[0]}") from None
    return float(theta), scaling
