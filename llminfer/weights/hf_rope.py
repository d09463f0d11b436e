"""Rotary embeddings of a Hugging Face config.json. Source of names, defaults and formulas: transformers' modeling_rope_utils.

transformers 4 writes `rope_theta` and `rope_scaling` (kind under "type" or "rope_type"), 5 writes `rope_parameters` with both,
for some families one object for each type of layer."""

from __future__ import annotations

import math
from typing import Any

from llminfer.config import LIMITS, ROPE_KINDS, Rope
from llminfer.weights.hf_fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = {**{kind: kind for kind in ROPE_KINDS}, "su": "longrope"}


def read_ropes(f: Fields, by_type: bool, head_dim: int, max_position: int) -> tuple[dict[str, Rope], int]:
    """Layer type -> Rope, and the longest position that the scaling allows. by_type: sliding layers have their own. Raises UserError."""
    if f.has("rope_scaling") and f.has("rope_parameters"):
        raise f.refuse("rope_scaling", f.value("rope_scaling"), "must not be given together with rope_parameters")
    f.ignore(("rope_scaling", "rope_parameters"))
    original = f.integer("original_max_position_embeddings", 2, LIMITS["max_position"])
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": f.number("rope_theta")}
    full["partial_rotary_factor"] = f.number("partial_rotary_factor")
    sliding = full | {"rope_theta": (f.number("rope_local_base_freq") if by_type else None) or full["rope_theta"]}
    if by_type and f.has("rope_parameters"):
        source = f.inner("rope_parameters", {})
        sources = {FULL: source.inner(FULL, full), SLIDING: source.inner(SLIDING, sliding)}
    else:
        sources = {FULL: f.inner("rope_parameters" if f.has("rope_parameters") else "rope_scaling", full)}
        if by_type:
            sources[SLIDING] = Fields({}, sliding, {})
    ropes = {layer_type: _rope(fields, head_dim, original, max_position) for layer_type, fields in sources.items()}
    ropes.setdefault(SLIDING, ropes[FULL])
    stretched = [r.original_max_position * r.factor for r in ropes.values() if r.kind in ("dynamic", "yarn")]
    return ropes, max(max_position, *(math.floor(min(length, LIMITS["max_position"])) for length in stretched), 0)


def _rope(f: Fields, head_dim: int, original: int | None, max_position: int) -> Rope:
    """original: what the model's own field says; it goes before the scaling's."""
    f.ignore(("type", "rope_type", "finetuned"))
    kind = KINDS[f.one_of("type" if f.has("type") and not f.has("rope_type") else "rope_type", KINDS)]
    theta, partial = f.number("rope_theta") or 10000.0, f.number("partial_rotary_factor") or 1.0
    if partial > 1:
        raise f.refuse("partial_rotary_factor", partial, "must be at most 1")
    dim = int(head_dim * partial)
    common: dict[str, Any] = dict(theta=theta, dim=None if dim == head_dim else dim, kind=kind)
    if kind in ("yarn", "dynamic") and (dim < 4 or theta <= 1):
        raise f.refuse("rope_type", kind, f"needs at least 4 rotated elements a head ({dim}) and rope_theta over 1 ({theta})")
    if kind == "default":
        return Rope(**common)
    stated = f.integer("original_max_position_embeddings", 2, LIMITS["max_position"])
    original = original or stated or max_position
    if kind == "longrope":
        return _longrope(f, common, dim // 2, original, max_position)
    common["factor"] = _needed(f, "factor", kind)
    if kind == "linear":
        return Rope(**common)
    if kind == "dynamic":
        if original != max_position:
            raise f.refuse("original_max_position_embeddings", original, f"must be max_position_embeddings={max_position} for dynamic")
        return Rope(**common, original_max_position=max_position)
    common["original_max_position"] = original
    if kind == "yarn":
        return _yarn(f, common)
    low, high = _needed(f, "low_freq_factor", kind), _needed(f, "high_freq_factor", kind)
    if low > high:
        raise f.refuse("low_freq_factor", low, f"must be at most high_freq_factor={high}")
    return Rope(**common, low_freq_factor=low, high_freq_factor=high)


def _needed(f: Fields, name: str, kind: str) -> float:
    value = f.number(name)
    if value is None:
        raise f.refuse(name, None, f"must be given for the rope scaling {kind}")
    return value


def _yarn(f: Fields, common: dict[str, Any]) -> Rope:
    """Peng et al., arXiv 2309.00071, with the two scales of DeepSeek."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(common["factor"]) + 1.0 if common["factor"] > 1 else 1.0

    mscale, all_dim, attention = f.number("mscale"), f.number("mscale_all_dim"), f.number("attention_factor")
    if attention is None:
        attention = scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
    betas: dict[str, Any] = {"beta_fast": f.number("beta_fast") or 32.0, "beta_slow": f.number("beta_slow") or 1.0}
    truncate = f.flag("truncate") or not f.has("truncate")
    return Rope(**common, **betas, truncate=truncate, attention_factor=attention)


def _longrope(f: Fields, common: dict[str, Any], pairs: int, original: int, max_position: int) -> Rope:
    """Ding et al., arXiv 2402.13753: one factor a pair, for short and for long sequences."""
    factors: dict[str, Any] = {}
    for name, field in (("short_factor", "short_factors"), ("long_factor", "long_factors")):
        values = f.value(name)
        if not isinstance(values, list) or len(values) != pairs:
            raise f.refuse(name, values, f"must be a list of {pairs} numbers, one a rotary pair")
        if not all(type(x) in (int, float) and 0 < x < 1e9 for x in values):
            raise f.refuse(name, values, "must be positive numbers")
        factors[field] = tuple(map(float, values))
    factor = f.number("factor") or max_position / original
    attention = f.number("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(**common, **factors, original_max_position=original, attention_factor=attention)
