"""Logical axes of arrays to mesh axes: one table, from which every sharding is derived."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

# Logical axis -> mesh axis. An axis that is not named here is replicated.
RULES = {"kv_heads": "tp", "heads": "tp", "mlp": "tp", "vocab": "tp", "experts": "tp"}


def partition(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def sharding(mesh: Mesh | None, axes: tuple[str | None, ...], device: Any = None) -> Any:
    """The sharding of an array with these logical axes; without a mesh, the one device."""
    if mesh is None:
        return SingleDeviceSharding(device)
    return NamedSharding(mesh, partition(axes))


def ways(mesh: Mesh | None, axis: str) -> int:
    """In how many parts a mesh cuts a logical axis."""
    return 1 if mesh is None else dict(mesh.shape).get(RULES.get(axis), 1)


def check_divides(mesh: Mesh | None, sizes: dict[str, int]) -> None:
    """sizes: of each logical axis that the rules split. Raises ValueError naming the one that a mesh axis does not
    divide, and the mesh sizes that would."""
    for axis, size in sizes.items():
        parts = ways(mesh, axis)
        if size % parts:
            legal = [n for n in range(1, 513) if all(s % n == 0 for s in sizes.values())]
            raise ValueError(f"mesh: {RULES[axis]}={parts} does not divide {axis}={size}; legal: {', '.join(map(str, legal))}")
