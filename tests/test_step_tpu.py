"""The step programs of Llama-3.1-8B (few layers) compile for real TPUs on this machine: the cache is updated in place,
and memory beside it does not depend on the pool."""

from __future__ import annotations

import dataclasses

import pytest

pytestmark = pytest.mark.tpu_compile

LAYERS, SLOTS, CONTEXT = 3, 16, 2048


def compiled(topology: str, pages: int, kind: str):
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from llminfer import cache, params
    from llminfer.batch import BatchShape
    from llminfer.config import from_toml
    from llminfer.programs import Program, Programs
    from llminfer.target import Target

    c = dataclasses.replace(from_toml("llama3_8b"), num_layers=LAYERS)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = SingleDeviceSharding(device)
    shapes = (
        params.abstract(params.stacked_specs(c), jnp.bfloat16),
        cache.abstract(c, (pages,), 16, jnp.bfloat16, stacked=True),
        jax.ShapeDtypeStruct((SLOTS, CONTEXT), jnp.int32),
    )
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    programs = Programs(c, Target.of("tpu"), shapes, most=32)
    tokens = SLOTS if kind == "decode" else 256 + SLOTS
    memory = programs.lower(Program(kind, BatchShape(tokens, SLOTS, CONTEXT // 16, 1))).compile().memory_analysis()
    programs.close()
    bytes_a_page = cache.page_bytes(c, 16, 2, 0)
    return memory, pages * bytes_a_page


@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_cache_is_aliased_and_temporaries_do_not_grow(topology: str, kind: str) -> None:
    pages = SLOTS * CONTEXT // 16
    small, bytes_small = compiled(topology, pages, kind)
    large, bytes_large = compiled(topology, 2 * pages, kind)
    assert small.alias_size_in_bytes >= bytes_small
    assert large.alias_size_in_bytes >= bytes_large
    growth = large.temp_size_in_bytes - small.temp_size_in_bytes
    print(topology, kind, "temporaries", small.temp_size_in_bytes, "cache", bytes_small, "growth", growth)
    assert growth < 0.01 * (bytes_large - bytes_small)
