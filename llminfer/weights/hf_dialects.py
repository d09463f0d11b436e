"""config.json of a family -> the same in the terms that hf_config reads, where a table of names does not do. Imports no jax."""

from __future__ import annotations

from typing import Any

from llminfer.errors import refuse


def gemma3_text(data: dict[str, Any]) -> dict[str, Any]:
    """The text model of a config.json that also has a vision model. End tokens may stand outside (generation settings)."""
    text = data.get("text_config")
    if not isinstance(text, dict):
        raise refuse("text_config", type(text).__name__, "must be an object")
    outside = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
    return {**text, **{name: data[name] for name in outside if data.get(name) is not None}}


def gpt2_inner(data: dict[str, Any]) -> dict[str, Any]:
    """GPT-2 leaves out an inner width of four times the outer."""
    inner, width = data.get("n_inner"), data.get("n_embd")
    return {**data, "n_inner": 4 * width} if inner is None and type(width) is int else data


def internlm_rotary(data: dict[str, Any]) -> dict[str, Any]:
    """InternLM 1 has rotary: {base, type: origin or dynamic, scaling_factor}."""
    rotary = data.get("rotary")
    if rotary is None:
        return data
    if not isinstance(rotary, dict) or not rotary.keys() <= {"base", "type", "scaling_factor"} or data.get("rope_scaling"):
        raise refuse("rotary", type(rotary).__name__, "must be an object with base, type and scaling_factor, without rope_scaling")
    named = rotary.get("type", "dynamic")
    if named not in ("origin", "dynamic"):
        raise refuse("rotary.type", named if isinstance(named, str) else type(named).__name__, "legal: origin, dynamic")
    scaling = {"type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)} if named == "dynamic" else None
    rest = {name: value for name, value in data.items() if name != "rotary"}
    return {**rest, "rope_theta": rotary.get("base", 10000), "rope_scaling": scaling}


def gpt_oss_rope(data: dict[str, Any]) -> dict[str, Any]:
    """gpt-oss is stretched by yarn where its file says nothing."""
    if data.get("rope_scaling") or data.get("rope_parameters"):
        return data
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return data | {"rope_scaling": yarn | {"original_max_position_embeddings": 4096}}


def deepseek_head(data: dict[str, Any]) -> dict[str, Any]:
    """Only a part of each head is rotated: what reads the rotary embedding is told of that part."""
    return data | {"head_dim": data.get("qk_rope_head_dim") or 64}


def llama4_text(data: dict[str, Any]) -> dict[str, Any]:
    """The text model of a config.json that also has a vision model; layers that attend by chunks are called sliding here."""
    data = gemma3_text(data) if "text_config" in data else data
    types = data.get("layer_types")
    if not isinstance(types, list):
        return data
    return data | {"layer_types": ["sliding_attention" if kind == "chunked_attention" else kind for kind in types]}
