"""Where programs run, as a value: passed down once, never asked for. A CPU machine can so compile for a TPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from sharding.rules import Axes, Rules

# A part of what a device calls itself (jax.Device.device_kind) -> its name here and in configs/chips.toml; the first that fits.
CHIPS = {
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e", "TPU7x": "tpu7x"},
    "H100": "h100",
}

RULES = Rules()
LEAST_SHARED = 128  # of a TPU: with fewer rows norms take no longer than the start of two more exchanges


@dataclass(frozen=True)
class Target:
    """platform: tpu | gpu | cpu. kernels: the body that kernels take: "pallas" (TPU), "interpret" (the same on a CPU), "triton" (GPU),
    "triton-interpret" (the same on a CPU), "reference", or "batched" (the reference too, attention of all sequences that decode at once).
    stacked: layers under a scan (TPU), else unrolled (GPU and CPU, where XLA copies every slice of a stacked weight). dtype: of weights
    and cache. chip: the name of a TPU, v4, v5e, v5p, v6e or tpu7x. branches: whether a program may
    branch at no cost; not on a GPU, where the host waits to read what it depends on. debug: lengths and page ids are checked on the
    device too. mesh: a jax.sharding.Mesh, or None for one device. rules: what of an array is split over which of its axes. device: the one
    without a mesh; None: the first. exchange: how tokens go to the devices of their experts where that moves less than a sum (moe.py):
    "ragged" (TPU), "padded" (for tests on a CPU), "" never. shares: rows of a step from which on they are shared out over the devices of
    heads, between products (spread.py); 0: never. expert_copies: see EngineConfig. in_stage: what is computed runs on the
    devices of one stage of a pipeline. sums: the program is that of one device of several, and these are the mesh axes over which what the
    rows of a matrix give is still to be added up (by_device.py); peers: a kernel can do that, for these GPUs write each other's memory."""

    platform: str
    kernels: str
    stacked: bool
    dtype: str
    chip: str | None = None
    branches: bool = True
    debug: bool = False
    mesh: Any = None
    rules: Rules = RULES
    device: Any = None
    exchange: str = ""
    shares: int = 0
    expert_copies: int = 0
    in_stage: bool = False
    sums: tuple[str, ...] = ()
    peers: bool = False

    @classmethod
    def of(
        cls,
        platform: str,
        *,
        chip: str | None = None,
        layout: str = "auto",
        dtype: str = "auto",
        debug: bool = False,
        mesh: Any = None,
        device: Any = None,
    ) -> Target:
        """The target for a platform name as jax.Device.platform gives it; "auto" fields take the platform's best. A pipeline needs the
        layers stacked."""
        platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
        return cls(
            platform=platform,
            kernels={"tpu": "pallas", "gpu": "triton"}.get(platform, "reference"),
            stacked=platform == "tpu" or _staged(mesh) if layout == "auto" else layout == "stacked",
            dtype=("float32" if platform == "cpu" else "bfloat16") if dtype == "auto" else dtype,
            chip=chip,
            branches=platform != "gpu",
            debug=debug,
            mesh=mesh,
            device=device,
            exchange="ragged" if platform == "tpu" else "",
            shares=LEAST_SHARED if platform == "tpu" else 0,
        )

    def over(self, axis: str) -> tuple[str, ...]:
        """The axes of the mesh that a logical axis is split over."""
        return self.rules.over(self.mesh, axis)

    def ways(self, axis: str | None) -> int:
        """In how many parts a logical axis is split."""
        return self.rules.ways(self.mesh, axis)

    def partition(self, axes: Axes) -> Any:
        """The PartitionSpec of an array with these logical axes."""
        return self.rules.partition(self.mesh, axes)

    def place(self, axes: Axes) -> Any:
        """The sharding of an array with these logical axes; without a mesh, the one device."""
        return self.rules.sharding(self.mesh, axes, self.first_device)

    @property
    def stages(self) -> int:
        """Of the pipeline that the layers are cut into; 1: none."""
        return self.ways("layers")

    def split(self, body: Any, in_specs: Any, out_specs: Any) -> Any:
        """shard_map of body over the mesh; in a stage, over the axes that the stages do not take."""
        if not self.in_stage:
            return jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        inner = frozenset(self.mesh.axis_names) - frozenset(self.over("layers"))
        if not inner:
            return body
        # The mesh is that of the shard_map around, in which the axis of the stages is taken.
        return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names=inner, check_vma=False)

    def pinned(self, x: Any, spec: Any) -> Any:
        """x, said to be split over the mesh as spec says."""
        # In a stage the mesh is that of the shard_map around.
        return jax.lax.with_sharding_constraint(x, spec if self.in_stage else jax.sharding.NamedSharding(self.mesh, spec))

    @property
    def first_device(self) -> Any:
        if self.mesh is not None:
            return self.mesh.devices.flat[0]
        return devices()[0] if self.device is None else self.device

    @property
    def body(self) -> str:
        """The body of kernels that a TPU alone has."""
        return self.kernels if self.kernels in ("pallas", "interpret") else "reference"

    @property
    def turned(self) -> bool:
        """Whether matrices lie as a GPU reads them, [out, in]."""
        return self.kernels.startswith("triton")

    @property
    def interpret(self) -> bool:
        """Whether kernels for a GPU are interpreted."""
        return self.kernels == "triton-interpret"


def _staged(mesh: Any) -> bool:
    return RULES.ways(mesh, "layers") > 1


def place_of(shape: Any) -> Any:
    """Where an array of a ShapeDtypeStruct lies: its sharding, and the order of its axes where that is given."""
    return shape.sharding if shape.format.layout is None else shape.format


def devices() -> list[Any]:
    """The devices of this process: the one place that looks at what there is."""
    return jax.devices()


def chip_name(device_kind: str) -> str | None:
    """The short name of what a device calls itself, None if it is not known here."""
    return next((chip for part, chip in CHIPS.items() if part in device_kind), None)


def chip_of(device: Any) -> str | None:
    """The name of a TPU, None for other devices and for a TPU that is not known here."""
    return chip_name(device.device_kind) if device.platform == "tpu" else None
