"""Compiles the step programs of real models, a few layers of each, for TPUs or an H100 on this machine: a table of the memory they take.

    python tests/compile_matrix.py [--chips v4 v5e ...] [--models llama3_8b ...] [--quantize none int4 ...] [--kinds decode mixed] [--once]
    python tests/compile_matrix.py --meshes [llama3_70b ...] [--kinds decode mixed] [--once]

Needs libtpu (the extra tpu), or for h100 CUDA's libraries (the extra cuda), no GPU. For each program: temporaries with P pages, what they
grow by with 2 * P in hundredths of what the cache grows (under 1 is asked for), and how much of the cache is updated in place; large
temporaries are those over half of one layer's weights and three times the logits. Exit code 1 where something does not compile or is not
as asked for.

--meshes: large models, whole, for the meshes of TPUs that serve them; see compile_meshes.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import compile_meshes

from llminfer.bench.kernels import AOT, TOPOLOGIES

# Layers: for Gemma two patterns and what is left over.
MODELS = {"llama3_8b": 3, "gemma3_4b": 14, "qwen3_30b_a3b": 3, "gpt_oss_20b": 4, "gpt_oss_120b": 4}
QUANTIZE = (None, "int8", "fp8", "int4", "mxfp4", "mxfp4_experts", "w8a8", "w8a8_fp8")
KINDS = ("decode", "mixed")
SLOTS, CONTEXT, PAGE, CHUNK = 16, 2048, 16, 256
CHIPS = [*TOPOLOGIES, "h100"]
# What XLA wants to know of a GPU that is not there.
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
PAGES = SLOTS * CONTEXT // PAGE


class Memory(NamedTuple):
    """Bytes. layer: the weights of one layer, the largest; logits: those of one step, which sampling holds a few times."""

    temporaries: int
    aliased: int
    cache: int
    layer: int
    logits: int


def device_of(chip: str) -> Any:
    """A device that is not there."""
    from jax.experimental import topologies

    if chip == "h100":
        topology = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100)
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return topology.devices[0]


def compiled(chip: str, model: str, quantize: str | None, kind: str, pages: int = PAGES) -> Memory:
    """What the compiler says of one step program with this many pages of each group."""
    import jax
    from jax.experimental.layout import Format
    from jax.sharding import SingleDeviceSharding

    from llminfer import placement
    from llminfer.batch import BatchShape
    from llminfer.config import EngineConfig, from_toml
    from llminfer.programs import Program, Programs
    from llminfer.target import Target, chip_of

    c = dataclasses.replace(from_toml(model), num_layers=MODELS[model])
    device, gpu = device_of(chip), chip == "h100"
    settings, target = EngineConfig(quantize=quantize, slots=SLOTS, page_size=PAGE), Target.of(device.platform, chip=chip_of(device))
    weights = placement.abstract_params(c, settings, target)
    cache = placement.abstract_cache(c, settings, target, (pages,) * len(c.groups))
    shapes: Any = (weights, cache, placement.abstract_history(settings, target, CONTEXT))
    there = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=Format(s.format.layout, SingleDeviceSharding(device)))
    shapes, routing = jax.tree.map(there, (shapes, placement.abstract_routing(c, target)))
    programs = Programs(c, target, shapes, most=32, routing=routing)
    tokens = SLOTS if kind == "decode" else CHUNK + SLOTS
    program = Program(kind, BatchShape(tokens, SLOTS, CONTEXT // PAGE, len(c.groups)), plain=gpu)
    # XLA's choice among products is made by timing them, which needs the GPU.
    found = programs.lower(program).compile({"xla_gpu_autotune_level": 0} if gpu else None).memory_analysis()
    programs.close()
    repeats = lambda layer: len(layer.o if hasattr(layer.o, "shape") else layer.o.q)
    layers = [placement.tree_bytes(layer) // repeats(layer) for layer in weights.stacked]
    layer = max(layers + [placement.tree_bytes(layer) for layer in weights.listed])
    return Memory(found.temp_size_in_bytes, found.alias_size_in_bytes, placement.tree_bytes(cache), layer, 4 * SLOTS * c.vocab_size)


def row(chip: str, model: str, quantize: str | None, kind: str, once: bool) -> tuple[bool, str]:
    """(whether all is as asked for, a line of the table). once: not with twice the pages."""
    start = time.perf_counter()
    name = f"{chip:6} {model:14} {quantize or 'bf16':13} {kind:7}"
    try:
        small = compiled(chip, model, quantize, kind)
        large = small if once else compiled(chip, model, quantize, kind, 2 * PAGES)
    except Exception as error:
        return False, f"{name} FAILED {type(error).__name__}: {' '.join(str(error).split())[:600]}"
    growth = 100 * (large.temporaries - small.temporaries) / small.cache
    good = growth < 1 and small.aliased >= small.cache and large.aliased >= large.cache
    note = "" if good else "  NOT AS ASKED FOR"
    if small.temporaries > small.layer / 2 + 3 * small.logits:
        note += "  large temporaries"
    sizes = f"{small.temporaries / 1e6:8.2f} {large.temporaries / 1e6:8.2f} {small.layer / 1e6:8.1f} {small.cache / 1e6:8.1f}"
    shares = f"{growth:7.3f} {small.aliased / small.cache:8.3f} {large.aliased / large.cache:8.3f}"
    return good, f"{name} {sizes} {shares} {time.perf_counter() - start:6.1f}{note}"


def on_meshes(models: list[str], kinds: list[str], once: bool) -> int:
    """The exit code; prints the table."""
    print(compile_meshes.HEADER, flush=True)
    good = True
    for model in models:
        for kind in kinds:
            fine, line = compile_meshes.row(model, kind, once)
            print(line, flush=True)
            good &= fine
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles step programs for TPUs or an H100 and prints the memory they take.")
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--quantize", nargs="*", choices=[q or "none" for q in QUANTIZE], default=[q or "none" for q in QUANTIZE])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--once", action="store_true", help="with P pages only: half the time")
    parser.add_argument("--meshes", nargs="*", choices=compile_meshes.MESHES, help="these models on their meshes; without a name, all")
    asked = parser.parse_args()
    if asked.meshes is not None:
        return on_meshes(asked.meshes or list(compile_meshes.MESHES), asked.kinds, asked.once)
    print("chip   model          as            program  temp MB  with 2P layer MB cache MB growth% aliased  with 2P  seconds", flush=True)
    good = True
    for chip in asked.chips:
        for model in asked.models:
            for quantize in asked.quantize:
                for kind in asked.kinds:
                    fine, line = row(chip, model, None if quantize == "none" else quantize, kind, asked.once)
                    print(line, flush=True)
                    good &= fine
    return 0 if good else 1


if __name__ == "__main__":
    for name, value in (AOT | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}).items():
        os.environ.setdefault(name, value)
    sys.exit(main())
