"""Device meshes from a one-line description such as "dp=2,ep=2,tp=4"."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

# Axis -> what it splits, in the order in which devices are numbered: those of the last one are next to each other.
AXES = {
    "dp": "requests: each replica has devices, weights and a cache of its own",
    "pp": "layers: each stage has whole patterns of them, and their cache; and the vocabulary, where it divides that",
    "ep": "experts; and whatever else is split over tp, where it divides that too",
    "sp": "tokens of each context: the pages of a cache; and experts, mlps and the vocabulary, where it divides them too",
    "tp": "heads, columns of mlps and of each expert, the vocabulary",
}
REPLICAS = "dp"  # the axis that is no part of a program's mesh


def parse_mesh(text: str, field: str = "mesh") -> dict[str, int]:
    """{"tp": 4} from "tp=4"; {} from "". Raises ValueError that names the field, the part and what is legal."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise ValueError(f"{field}={text!r}: axis {name!r} is not supported in this version; legal: {', '.join(AXES)}")
        if name in sizes:
            raise ValueError(f"{field}={text!r}: axis {name!r} is there twice; legal: each axis once")
        if not (size.isascii() and size.isdecimal() and len(size) < 10 and int(size)):
            raise ValueError(f"{field}={text!r}: {name} must be an integer >= 1")
        sizes[name] = int(size)
    return sizes


def make_meshes(sizes: dict[str, int], devices: Sequence[Any]) -> list[tuple[Mesh | None, Any]]:
    """(mesh, its first device) of each replica, over the first devices that they need; the mesh is None for one device alone. Raises
    ValueError when there are too few."""
    need = int(np.prod(list(sizes.values()), dtype=object))
    if need > len(devices):
        legal = f"axes whose sizes multiply to {len(devices)} at most" if devices else "none"
        raise ValueError(f"mesh of {need} devices: there are {len(devices)}; legal: {legal}")
    names = [axis for axis in AXES if axis in sizes and axis != REPLICAS]
    blocks = np.array(devices[:need], dtype=object).reshape(sizes.get(REPLICAS, 1), *(sizes[axis] for axis in names))
    return [(Mesh(block, tuple(names)) if block.size > 1 else None, block.flat[0]) for block in map(np.asarray, blocks)]


@functools.cache
def in_two_rows(mesh: Mesh, axes: tuple[str, ...]) -> bool:
    """Whether the TPUs along these axes of a mesh lie in one or two rows of a plane. Elsewhere (squares from 4 x 4, blocks of 2 x 2 x 2)
    their compiler makes a sum for all of one of which each is to get a part (libtpu 0.0.42.1; LOG.md). True for what has no coordinates."""
    groups = np.moveaxis(mesh.devices, [mesh.axis_names.index(name) for name in axes], range(len(axes)))
    group = [getattr(device, "coords", (0, 0, 0)) for device in groups.reshape(*groups.shape[: len(axes)], -1)[..., 0].flat]
    sizes = sorted(len(set(places)) for places in zip(*group, strict=True))
    return math.prod(sizes[:-1]) <= 2
