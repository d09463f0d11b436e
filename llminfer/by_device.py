"""Tensor parallelism on GPUs: each device runs the program of one device, on its own heads and its own columns of the mlp.

So all kernels of one device work, which XLA could not split by itself; and the two sums of a layer over devices are said where they are
(linear.py), after attention and after the mlp, as Shoeybi et al. have it (arXiv 1909.08053)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from llminfer.config import ModelConfig
from llminfer.linear import split_specs
from llminfer.params import Params, ParamSpec, is_spec, layer_specs
from llminfer.target import Target
from pallas_kernels.peers_gpu import WAYS, WIDTHS, reachable


def runs_alone(c: ModelConfig, target: Target) -> bool:
    """Whether the layers of a model are run so: dense ones, listed, whose heads and columns are split over the whole mesh."""
    if not target.turned or target.mesh is None or target.stacked or c.num_experts or c.kv_rank or c.qk_norm in ("heads", "full"):
        return False
    return all(target.ways(axis) == target.mesh.size for axis in ("kv_heads", "heads", "mlp"))


def have_peers(c: ModelConfig, target: Target) -> bool:
    """Whether the devices' sums can go straight from memory to memory: see Target.peers."""
    fits = target.kernels == "triton" and target.dtype == "bfloat16" and c.hidden_size in WIDTHS and runs_alone(c, target)
    return fits and target.mesh.size in WAYS and reachable(list(target.mesh.devices.flat))


def on_each(body: Any, c: ModelConfig, target: Target) -> Any:
    """body(params, x, groups, batch, c, target) -> (hidden, groups), run by each device of the mesh with its part of weights and cache, for
    the model and the target that it is of such a part. params: without what is split by vocabulary."""
    ways = target.ways("heads")
    own = replace(c, num_heads=c.num_heads // ways, num_kv_heads=c.num_kv_heads // ways, intermediate_size=c.intermediate_size // ways)
    alone = replace(target, mesh=None, sums=target.over("heads"))
    whole = jax.sharding.PartitionSpec()

    def lies(spec: ParamSpec, leaf: Any) -> Any:
        return split_specs(leaf, spec.axes, target) if spec.matrix else target.partition(spec.axes)

    def run(params: Params, x: Any, groups: Any, batch: Any) -> Any:
        listed = tuple(jax.tree.map(lies, layer_specs(c, n), layer, is_leaf=is_spec) for n, layer in enumerate(params.listed))
        peers = jax.tree.map(lambda _: jax.sharding.PartitionSpec(target.mesh.axis_names), params.peers)
        each = replace(jax.tree.map(lambda _: whole, params), listed=listed, peers=peers)
        cache = jax.tree.map(lambda a: target.partition((None, None, "kv_heads", None, None)[: a.ndim]), groups)
        specs = (each, whole, cache, jax.tree.map(lambda _: whole, batch))

        def inner(params: Params, x: Any, groups: Any, batch: Any) -> Any:
            listed = tuple(replace(layer, peers=params.peers) for layer in params.listed)
            return body(replace(params, listed=listed), x, groups, batch, own, alone)

        return target.split(inner, specs, (whole, cache))(params, x, groups, batch)

    return run
