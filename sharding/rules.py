"""Logical axes of arrays to mesh axes: one table, from which every sharding is derived."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sharding.mesh import AXES

Axes = tuple[str | None, ...]
# The logical axes that the mesh axes `spread` and `share` of Rules may split too.
SPREAD = {"spread": ("kv_heads", "heads", "mlp", "vocab"), "share": ("mlp", "vocab", "experts")}
LARGEST = 512  # of a mesh axis, in lists of what is legal


@dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes that it is split over, the first the coarsest; a mesh without one of them does not split by it. A
    logical axis that is not named here is replicated.

    kv_heads: attention's heads, by key-value head; heads: one by one; mlp: columns of dense layers; vocab: rows of the embedding and of
    the head; experts: whole experts; expert_mlp: columns of each; layers: those that are stacked, and their cache, in stages; pages: of a
    cache, by what they hold of a context. spread: mesh axes over which the first four are split too, where they divide them, and share:
    mlp, vocab and experts; the vocabulary also over those of layers: see `fitted`. Raises ValueError for a mesh axis that there is not."""

    kv_heads: tuple[str, ...] = ("tp",)
    heads: tuple[str, ...] = ("tp",)
    mlp: tuple[str, ...] = ("tp",)
    vocab: tuple[str, ...] = ("tp",)
    experts: tuple[str, ...] = ("ep",)
    expert_mlp: tuple[str, ...] = ("tp",)
    layers: tuple[str, ...] = ("pp",)
    pages: tuple[str, ...] = ("sp",)
    spread: tuple[str, ...] = ("ep",)
    share: tuple[str, ...] = ("sp",)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            for axis in getattr(self, field.name):
                if axis not in AXES:
                    raise ValueError(f"rules: {field.name} names the mesh axis {axis!r}; legal: {', '.join(AXES)}")

    def over(self, mesh: Mesh | None, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over."""
        there = () if mesh is None else mesh.axis_names
        return tuple(name for name in self._table().get(axis or "", ()) if name in there)

    def ways(self, mesh: Mesh | None, axis: str | None) -> int:
        """In how many parts a mesh cuts a logical axis."""
        return 1 if mesh is None else math.prod(mesh.shape[name] for name in self.over(mesh, axis))

    def partition(self, mesh: Mesh | None, axes: Axes) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes. Raises ValueError where two of them want one mesh axis."""
        found = [self.over(mesh, axis) for axis in axes]
        used: dict[str, str | None] = {}
        for axis, names in zip(axes, found, strict=True):
            for name in names:
                if name in used:
                    free = ", ".join(other for other in AXES if other not in {name for names in found for name in names}) or "none"
                    raise ValueError(f"rules: {used[name]} and {axis} of one array are both split over {name}; free: {free}")
                used[name] = axis
        return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in found))

    def sharding(self, mesh: Mesh | None, axes: Axes, device: Any = None) -> Any:
        """The sharding of an array with these logical axes; without a mesh, the one device."""
        return SingleDeviceSharding(device) if mesh is None else NamedSharding(mesh, self.partition(mesh, axes))

    def fitted(self, mesh: Mesh | None, sizes: Mapping[str, Mapping[str, int]]) -> Rules:
        """The rules for a model on a mesh: what SPREAD names is split over `spread` and `share` too, where all its sizes are divided, and
        vocab over what splits the layers, for the devices of all stages work on it together.

        sizes: of each logical axis that the model has, by the names of what is to be divided. Raises ValueError naming the mesh axis that
        does not divide, and what would."""
        if mesh is None:
            return self
        for axis, wanted in sizes.items():
            for name, size in wanted.items():
                if size % self.ways(mesh, axis):
                    raise ValueError(self._refusal(mesh, axis, name, size, sizes))
        changed = {}
        for axis, wanted in sizes.items():
            more, ways = [], self.ways(mesh, axis)
            stages = self.layers if axis == "vocab" else ()
            for name in (*(name for field, axes in SPREAD.items() if axis in axes for name in getattr(self, field)), *stages):
                new = name in mesh.axis_names and name not in getattr(self, axis)
                if new and all(size % (ways * mesh.shape[name]) == 0 for size in wanted.values()):
                    more, ways = [name, *more] if name in stages else [*more, name], ways * mesh.shape[name]
            changed[axis] = (*getattr(self, axis), *more) if axis == "experts" else (*more, *getattr(self, axis))
        return dataclasses.replace(self, **changed, spread=(), share=())

    def _table(self) -> dict[str, tuple[str, ...]]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in SPREAD}

    def _refusal(self, mesh: Mesh, axis: str, name: str, size: int, sizes: Mapping[str, Mapping[str, int]]) -> str:
        """Of the last mesh axis that cuts a logical one in more parts than it has."""
        culprit = self.over(mesh, axis)[-1]
        others = lambda axis: self.ways(mesh, axis) // mesh.shape[culprit]
        bound = [(size, others(axis)) for axis, wanted in sizes.items() if culprit in self.over(mesh, axis) for size in wanted.values()]
        legal = [n for n in range(1, LARGEST + 1) if all(size % (n * other) == 0 for size, other in bound)]
        return f"mesh: {culprit}={mesh.shape[culprit]} does not divide {name}={size}; legal: {', '.join(map(str, legal)) or 'none'}"
