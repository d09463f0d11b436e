"""From the tensors of a Llama-family checkpoint to our parameter tree, and back. Imports jax only where the tree is made.

Source tensors carry Hugging Face names and shapes; kernels there are [out, in], ours are [in, out] and fused (see
llminfer/params.py). A flat tree is a dict from a dotted name ("embed", "layers.3.qkv") to a NumPy array.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from llminfer.config import ModelConfig
from llminfer.errors import UserError
from llminfer.progress import Progress, start

if TYPE_CHECKING:
    from llminfer.params import Params

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LEAVES = ("attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down")
# Old checkpoints carry the rotary frequencies, which the config determines.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
SHOWN_DIFFERENCES = 10
# A transposed copy in square tiles touches each cache line once; whole rows would touch it once an element.
TILE = 128


class Source(Protocol):
    """Where tensors come from. Names and shapes are those of Hugging Face LlamaForCausalLM."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of all tensors, from headers alone."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, float16 or bfloat16; it may be a read-only view. Called from several threads."""
        ...


def hf_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that a checkpoint of this model has."""
    d, f, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBED: (c.vocab_size, d)}
    for i in range(c.num_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes[NORM] = (d,)
    return shapes if c.tie_embeddings else shapes | {HEAD: (c.vocab_size, d)}


def flat_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the leaves of our flat tree (the shapes of llminfer.params, without importing jax)."""
    d, f, k, g, h = c.hidden_size, c.intermediate_size, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    layer = dict(zip(LEAVES, ((d,), (d, k * (g + 2) * h), (k * g * h, d), (d,), (d, 2 * f), (f, d)), strict=True))
    shapes: dict[str, tuple[int, ...]] = {"embed": (c.vocab_size, d), "final_norm": (d,)}
    if not c.tie_embeddings:
        shapes["lm_head"] = (c.vocab_size, d)
    return shapes | {f"layers.{i}.{leaf}": shape for i in range(c.num_layers) for leaf, shape in layer.items()}


def check(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Compares a checkpoint's tensors with what the config requires. `where` names the checkpoint in the message.

    Raises one UserError with the first ten differences: missing, of another shape, or not expected."""
    expected = hf_shapes(config)
    differences = []
    for name, shape in expected.items():
        if name not in shapes:
            differences.append(f"{name} {list(shape)} is missing")
        elif tuple(shapes[name]) != shape:
            differences.append(f"{name} is {list(shapes[name])}, expected {list(shape)}")
    ignored = {HEAD} if config.tie_embeddings else set()
    for name in sorted(shapes.keys() - expected.keys() - ignored):
        if not IGNORED.fullmatch(name):
            differences.append(f"{name[:80]!r} {list(shapes[name])} is not expected")
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        text = "; ".join(differences[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"{where}: tensors do not fit the config: {text}".replace("\n", " "))


def assemble(source: Source, config: ModelConfig, where: str, progress: Progress | None = None) -> Params:
    """Reads and fuses all tensors into the listed layout; leaves are bfloat16 where the source is, else float32.

    `where` names the checkpoint in messages. Raises UserError before any tensor is read if one is missing or misshapen."""
    return params_from_flat(read_flat(source, config, where, progress), config)


def read_flat(source: Source, config: ModelConfig, where: str, progress: Progress | None = None) -> dict[str, np.ndarray]:
    """As `assemble`, but returns the flat tree."""
    check(source.shapes(), config, where)
    names = ["embed", "final_norm", *(() if config.tie_embeddings else ("lm_head",))]
    parts: list[str | int] = [*names, *range(config.num_layers)]
    flat: dict[str, np.ndarray] = {}
    task = start(progress, "Reading weights", len(parts))
    # NumPy releases the GIL in these copies; more threads than this only contend for memory.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for leaves in pool.map(lambda part: _read_part(source, config, part), parts):
            flat |= leaves
            task.advance(1)
    task.done()
    return flat


def _read_part(source: Source, config: ModelConfig, part: str | int) -> dict[str, np.ndarray]:
    if isinstance(part, str):
        name = {"embed": EMBED, "final_norm": NORM, "lm_head": HEAD}[part]
        (array,), dtype = _common([source.read(name)])
        return {part: np.ascontiguousarray(array).view(dtype)}
    return {f"layers.{part}.{leaf}": array for leaf, array in _read_layer(source, config, part).items()}


def _read_layer(source: Source, c: ModelConfig, i: int) -> dict[str, np.ndarray]:
    def read(*names: str) -> tuple[list[np.ndarray], np.dtype]:
        return _common([source.read(f"model.layers.{i}.{name}.weight") for name in names])

    d, f, k, g, h = c.hidden_size, c.intermediate_size, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    leaves = {}
    for leaf, name in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        (array,), dtype = read(name)
        leaves[leaf] = array.copy().view(dtype)
    (q, key, value), dtype = read("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv = np.empty((d, k, (g + 2) * h), q.dtype)
    for j in range(k):
        _transpose(q[j * g * h : (j + 1) * g * h], qkv[:, j, : g * h])
        _transpose(key[j * h : (j + 1) * h], qkv[:, j, g * h : (g + 1) * h])
        _transpose(value[j * h : (j + 1) * h], qkv[:, j, (g + 1) * h :])
    leaves["qkv"] = qkv.view(dtype).reshape(d, k * (g + 2) * h)
    (gate, up), dtype = read("mlp.gate_proj", "mlp.up_proj")
    gate_up = np.empty((d, 2, f), gate.dtype)
    _transpose(gate, gate_up[:, 0])
    _transpose(up, gate_up[:, 1])
    leaves["gate_up"] = gate_up.view(dtype).reshape(d, 2 * f)
    for leaf, name in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        (array,), dtype = read(name)
        out = np.empty(array.shape[::-1], array.dtype)
        _transpose(array, out)
        leaves[leaf] = out.view(dtype)
    return leaves


def _common(arrays: list[np.ndarray]) -> tuple[list[np.ndarray], np.dtype]:
    """(arrays to copy from, dtype to view the result as): bfloat16 when all are, as 2-byte integers, which NumPy copies
    fast; else float32."""
    if all(array.dtype == BFLOAT16 for array in arrays):
        return [array.view(np.uint16) for array in arrays], BFLOAT16
    return [array.astype(np.float32, copy=False) for array in arrays], np.dtype(np.float32)


def _transpose(x: np.ndarray, out: np.ndarray) -> None:
    """out[j, i] = x[i, j]."""
    for i in range(0, x.shape[0], TILE):
        for j in range(0, x.shape[1], TILE):
            out[j : j + TILE, i : i + TILE] = x[i : i + TILE, j : j + TILE].T


def params_from_flat(flat: Mapping[str, Any], config: ModelConfig) -> Params:
    """The tree of a flat tree that has the leaves of `flat_shapes(config)`, listed layout. Arrays are not copied."""
    from llminfer.params import Layer, Params

    layers = [Layer(**{leaf: flat[f"layers.{i}.{leaf}"] for leaf in LEAVES}) for i in range(config.num_layers)]
    return Params(embed=flat["embed"], stacked=(), listed=tuple(layers), final_norm=flat["final_norm"], lm_head=flat.get("lm_head"))


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The Hugging Face tensors of a tree, stacked or listed: the inverse of `assemble`. Leaves must be plain arrays."""
    d, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {EMBED: np.asarray(params.embed), NORM: np.asarray(params.final_norm)}
    if params.lm_head is not None:
        tensors[HEAD] = np.asarray(params.lm_head)
    for i, leaves in enumerate(_layers(params)):
        qkv = leaves["qkv"].reshape(d, config.num_kv_heads, -1, config.head_dim)
        gate_up = leaves["gate_up"].reshape(d, 2, -1)
        named = {
            "input_layernorm": leaves["attn_norm"],
            "self_attn.q_proj": qkv[:, :, :-2].reshape(d, q).T,
            "self_attn.k_proj": qkv[:, :, -2].reshape(d, kv).T,
            "self_attn.v_proj": qkv[:, :, -1].reshape(d, kv).T,
            "self_attn.o_proj": leaves["o"].T,
            "post_attention_layernorm": leaves["mlp_norm"],
            "mlp.gate_proj": gate_up[:, 0].T,
            "mlp.up_proj": gate_up[:, 1].T,
            "mlp.down_proj": leaves["down"].T,
        }
        tensors |= {f"model.layers.{i}.{name}.weight": np.ascontiguousarray(array) for name, array in named.items()}
    return tensors


def _layers(params: Params) -> Iterable[dict[str, np.ndarray]]:
    """The leaves of each layer, in order: repeats of the stacked pattern, then the listed ones."""
    repeats = len(np.asarray(params.stacked[0].attn_norm)) if params.stacked else 0
    for repeat in range(repeats):
        for layer in params.stacked:
            yield {leaf: np.asarray(getattr(layer, leaf)[repeat]) for leaf in LEAVES}
    for layer in params.listed:
        yield {leaf: np.asarray(getattr(layer, leaf)) for leaf in LEAVES}
