"""Ring attention at full size on virtual CPU devices: error against one device, and memory of a device.

    python tests/measure_ring.py [--tokens 32768] [--devices 8] [--heads 8] [--kv-heads 2] [--dim 64] [--memory-only]

One line: the largest difference (1e-5 is asked for), and arguments, results and temporaries of one device, by one n-th of what the
same attention takes on one device (1.2 is asked for). Exit code 1 where something is not as asked for.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures ring attention.")
    for name, size in (("tokens", 32768), ("devices", 8), ("heads", 8), ("kv-heads", 2), ("dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--memory-only", action="store_true")
    asked = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={asked.devices}".strip()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from sharding import ring

    mesh, spec = Mesh(np.array(jax.devices()), ("sp",)), PartitionSpec("sp")
    split = dict(mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    shapes = [(asked.tokens, heads, asked.dim) for heads in (asked.heads, asked.kv_heads, asked.kv_heads)]
    placed = lambda where=None: [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for shape in shapes]
    scale = asked.dim**-0.5
    one = jax.jit(functools.partial(ring.attention, scale=scale)).lower(*placed()).compile()
    around = jax.jit(jax.shard_map(functools.partial(ring.ring_attention, axis="sp", scale=scale), **split))
    spread = around.lower(*placed(NamedSharding(mesh, spec))).compile()
    sizes = [program.memory_analysis() for program in (one, spread)]
    whole, part = (m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes for m in sizes)
    ratio = part * asked.devices / whole
    print(f"tokens={asked.tokens} devices={asked.devices} heads={asked.heads}/{asked.kv_heads} dim={asked.dim}: ", end="")
    print(f"{part / 2**20:.1f} MiB a device, {ratio:.3f} of its share of {whole / 2**20:.1f} MiB", end="", flush=True)
    if asked.memory_only:
        print()
        return int(ratio > 1.2)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    start = time.perf_counter()
    wanted, _ = one(*arrays)
    order = [jax.device_put(ring.zigzag(x, asked.devices), NamedSharding(mesh, spec)) for x in arrays]
    found = ring.unzigzag(spread(*order)[0], asked.devices)
    error = float(jnp.abs(found - jax.device_put(wanted, found.sharding)).max())
    print(f"; error {error:.1e}, {time.perf_counter() - start:.0f} s")
    return int(ratio > 1.2 or error > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
