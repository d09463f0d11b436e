"""What a config.json says of experts, and of what came with them: fields of ModelConfig for hf_config. Imports no jax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from llminfer.weights.hf_fields import Fields


def experts(f: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Experts in every decoder_sparse_step-th layer that is not among mlp_only_layers."""
    step, dense = f.integer("decoder_sparse_step") or 1, f.value("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise f.refuse("mlp_only_layers", dense, "must be a list of layer numbers")
    count, number = fields["num_layers"], f.required("num_experts")
    layers = tuple((i + 1) % step == 0 and i not in dense for i in range(count))
    found = {
        "num_experts": number if any(layers) else 0,
        "experts_per_token": f.required("num_experts_per_tok"),
        "moe_intermediate_size": f.integer("moe_intermediate_size") or fields["intermediate_size"],
        "moe_layers": _repeated(layers),
        "norm_topk": f.flag("norm_topk_prob"),
        "shared_intermediate_size": f.integer("shared_expert_intermediate_size", 0) or 0,
    }
    found["shared_gate"] = found["shared_intermediate_size"] > 0
    return found if any(layers) else {}


def _repeated(layers: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest pattern that gives these layers when it is repeated."""
    count = len(layers)
    return layers[: next(p for p in range(1, count + 1) if all(layers[i] == layers[i - p] for i in range(p, count)))]


def llama4(f: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Experts of a width of their own in some layers, one of them for each token, whose score multiplies its input; and attention by
    chunks, or without a rotation."""
    step, listed, count = f.integer("interleave_moe_layer_step") or 1, f.value("moe_layers"), fields["num_layers"]
    if listed is not None and (not isinstance(listed, list) or any(type(layer) is not int for layer in listed)):
        raise f.refuse("moe_layers", listed, "must be a list of layer numbers")
    layers = tuple((i + 1) % step == 0 if listed is None else i in listed for i in range(count))
    width, floor, tuned = fields["intermediate_size"], f.required("floor_scale"), f.value("attn_temperature_tuning")
    found = {"intermediate_size": f.required("intermediate_size_mlp"), "qk_norm": "unit" if f.flag("use_qk_norm") else ""}
    found |= {"chunked": any(fields["windows"])}
    if type(tuned) not in (bool, int):
        raise f.refuse("attn_temperature_tuning", tuned, "must be true or false")
    scale = f.number("attn_scale")
    found |= {"query_floor": floor, "query_scale": scale} if tuned and -1 in fields["rope_layers"] else {}
    own = {"num_experts": f.required("num_experts"), "experts_per_token": f.required("num_experts_per_tok"), "router": "sigmoid"}
    own |= {"moe_intermediate_size": width, "shared_intermediate_size": width, "moe_layers": _repeated(layers), "scale_inputs": True}
    return found | own if any(layers) else found


def deepseek(f: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Latent attention, a router of groups, and dense layers first."""
    plain, rotated = f.required("qk_nope_head_dim"), f.required("qk_rope_head_dim")
    dense, shared = f.integer("first_k_dense_replace", 0) or 0, f.integer("n_shared_experts", 0) or 0
    found = {"num_kv_heads": 1, "q_rank": f.integer("q_lora_rank") or 0, "kv_rank": f.required("kv_lora_rank")}
    found |= {"head_dim": plain + rotated, "rope_head_dim": rotated, "value_dim": f.required("v_head_dim")}
    found |= {"ropes": tuple(replace(rope, dim=rotated) for rope in fields["ropes"]), "attn_scale": _yarn_scale(f, plain + rotated)}
    own = experts(f, fields)
    groups = {"router_groups": f.integer("n_group") or 1, "router_groups_used": f.integer("topk_group") or 1}
    if dense >= fields["num_layers"]:
        return found
    own |= {"dense_layers": dense, "router": "sigmoid", "router_bias": "choice", "routed_scale": f.number("routed_scaling_factor")}
    return found | own | groups | {"shared_intermediate_size": shared * own["moe_intermediate_size"], "shared_gate": False}


def _yarn_scale(f: Fields, head_dim: int) -> float:
    """Scores of a context that yarn stretches are larger: by mscale_all_dim."""
    rope = f.value("rope_parameters" if f.has("rope_parameters") else "rope_scaling") or {}
    weight, factor = rope.get("mscale_all_dim") or 0.0, rope.get("factor") or 1.0
    larger = 0.1 * weight * math.log(factor) + 1 if weight and factor > 1 else 1.0
    return head_dim**-0.5 * larger**2
