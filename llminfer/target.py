"""Where programs run, as a value: passed down once, never asked for. A CPU machine can so compile for a TPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Target:
    """platform: tpu | gpu | cpu. attention: the body of paged_attention. stacked: layers under a scan (TPU), else
    unrolled (GPU and CPU, where XLA copies every slice of a stacked weight). dtype: of weights and cache. ahead: a step is sent before
    the last one is read; not on a GPU, where the host drives the loops of a program, so that sending waits (LOG.md: 1.1x slower).
    mesh: a jax.sharding.Mesh, or None for one device."""

    platform: str
    attention: str
    stacked: bool
    dtype: str
    ahead: bool = True
    mesh: Any = None

    @classmethod
    def of(cls, platform: str, *, layout: str = "auto", dtype: str = "auto", mesh: Any = None) -> Target:
        """The target for a platform name as jax.Device.platform gives it; "auto" fields take the platform's best."""
        platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
        return cls(
            platform=platform,
            attention={"tpu": "pallas", "gpu": "batched"}.get(platform, "reference"),
            stacked=platform == "tpu" if layout == "auto" else layout == "stacked",
            dtype=("float32" if platform == "cpu" else "bfloat16") if dtype == "auto" else dtype,
            ahead=platform != "gpu",
            mesh=mesh,
        )


def devices() -> list[Any]:
    """The devices of this process: the one place that looks at what there is."""
    return jax.devices()
