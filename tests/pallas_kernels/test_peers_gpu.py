"""Rows added up over GPUs inside of a kernel. What this needs is two GPUs; the rest is in test_mesh.py."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import peers_gpu
from pallas_kernels.add_norm_gpu import add_norm_gpu

GPUS = [device for device in jax.devices() if device.platform == "gpu"]
P = PartitionSpec


def on_two(body: Any, *specs: Any) -> Any:
    return jax.jit(jax.shard_map(body, mesh=Mesh(np.array(GPUS[:2]), ("tp",)), in_specs=specs, out_specs=P("tp"), check_vma=False))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Triton backend is deprecated")  # from jax 0.11 on
@pytest.mark.skipif(len(GPUS) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("width", [512, 4096, 8192])
def test_sums_over_devices_are_those_of_psum(width: int) -> None:
    """Bit by bit, over many exchanges in one program, of one row and more, and of a product in parts."""
    mesh, rng = Mesh(np.array(GPUS[:2]), ("tp",)), np.random.default_rng(width)
    peers = peers_gpu.workspace(mesh, width)
    put = lambda x, spec: jax.device_put(jnp.asarray(x, jnp.bfloat16), NamedSharding(mesh, spec))
    weight = put(1 + 0.1 * rng.standard_normal(width), P())

    def several(x: Any, y: Any, weight: Any, table: Any, own: bool) -> Any:
        for parts in (1, 2, 1, 1, 4):
            y = y[0] if y.ndim == 3 else y
            y = y if parts == 1 else jnp.stack([y.astype(jnp.float32) * 0.5**i for i in range(parts)])  # whose sum is exact
            if own:
                x, normed = add_norm_gpu(x, y, weight, eps=1e-5, peers=table[0])
            else:
                whole = functools.reduce(jnp.add, list(y)).astype(jnp.bfloat16) if parts > 1 else y
                x, normed = add_norm_gpu(x, lax.psum(whole, "tp"), weight, eps=1e-5)
            y = (x * (1 + lax.axis_index("tp")) / 4).astype(jnp.bfloat16)
        return x[None], normed[None]

    for rows in (1, 2, 64, peers_gpu.ROWS, 3):
        x, y = put(rng.standard_normal((rows, width)), P()), put(rng.standard_normal((2, rows, width)), P("tp"))
        runs = [on_two(functools.partial(several, own=own), P(), P("tp"), P(), P("tp")) for own in (True, False)]
        for _ in range(3):
            found, wanted = ([np.asarray(a.astype(jnp.float32)) for a in run(x, y, weight, peers["table"])] for run in runs)
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_allclose(found[1], wanted[1], rtol=2**-7)  # the mean of a row is summed in another order
