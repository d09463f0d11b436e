"""What a config.json says of experts, and of what came with them: fields of ModelConfig for hf_config. Imports no jax."""

from __future__ import annotations

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
        "moe_layers": layers[: next(p for p in range(1, count + 1) if all(layers[i] == layers[i - p] for i in range(p, count)))],
        "norm_topk": f.flag("norm_topk_prob"),
        "shared_intermediate_size": f.integer("shared_expert_intermediate_size", 0) or 0,
    }
    found["shared_gate"] = found["shared_intermediate_size"] > 0
    return found if any(layers) else {}
