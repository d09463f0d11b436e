"""Device meshes from a one-line description such as "tp=4"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

# Axes that programs of this version use. tp: tensor parallel (heads, MLP columns, vocabulary).
AXES = ("tp",)


def parse_mesh(text: str) -> dict[str, int]:
    """{"tp": 4} from "tp=4"; {} from "". Raises ValueError that names the part and what is legal."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise ValueError(f"mesh={text!r}: axis {name!r} is not supported in this version; legal: {', '.join(AXES)}")
        if name in sizes:
            raise ValueError(f"mesh={text!r}: axis {name!r} is there twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh={text!r}: {name} must be an integer >= 1")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh | None:
    """A mesh over the first devices that it needs; None for one device. Raises ValueError when there are too few."""
    need = int(np.prod(list(sizes.values()), dtype=np.int64))
    if need > len(devices):
        raise ValueError(f"mesh of {need} devices: there are {len(devices)}")
    if need == 1:
        return None
    return Mesh(np.array(devices[:need]).reshape(tuple(sizes.values())), tuple(sizes))
