"""Meshes from a line of text, and rules: every mistake is one line that says what would be legal."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from sharding.mesh import make_meshes, parse_mesh
from sharding.rules import Rules

SIZES = {"kv_heads": {"num_heads": 8}, "mlp": {"intermediate_size": 208}, "vocab": {"vocab_size": 512}, "experts": {"num_experts": 8}}


def mesh(text: str) -> Mesh | None:
    return make_meshes(parse_mesh(text), [*range(512)])[0][0]  # devices are only counted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xx=2", "axis 'xx' is not supported in this version; legal: dp, pp, ep, sp, tp"),
        ("tp=2,tp=2", "axis 'tp' is there twice"),
        ("tp=0", "tp must be an integer >= 1"),
        ("tp=" + "9" * 5000, "tp must be an integer >= 1"),
        ("tp", "tp must be an integer >= 1"),
        ("tp=2,ep=512", "mesh of 1024 devices: there are 512; legal: axes whose sizes multiply to 512 at most"),
        ("tp=3", "tp=3 does not divide num_heads=8; legal: 1, 2, 4, 8"),
        ("ep=3", "ep=3 does not divide num_experts=8; legal: 1, 2, 4, 8"),
    ],
)
def test_a_bad_mesh_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Rules().fitted(mesh(text), SIZES)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_devices_are_numbered_replica_by_replica_and_tp_last() -> None:
    meshes = make_meshes(parse_mesh("tp=2,dp=2,ep=3"), [*range(20)])
    assert [(m.axis_names, m.devices.tolist(), first) for m, first in meshes] == [
        (("ep", "tp"), [[0, 1], [2, 3], [4, 5]], 0),
        (("ep", "tp"), [[6, 7], [8, 9], [10, 11]], 6),
    ]
    assert make_meshes({}, [7, 8]) == [(None, 7)]
    assert make_meshes({"dp": 2}, [7, 8]) == [(None, 7), (None, 8)]


def test_what_is_no_expert_is_spread_over_the_devices_of_experts_where_it_divides() -> None:
    two, rules = mesh("ep=2,tp=4"), Rules().fitted(mesh("ep=2,tp=4"), SIZES)
    assert rules.partition(two, ("embed", "kv_heads")) == PartitionSpec(None, ("ep", "tp")) and rules.ways(two, "kv_heads") == 8
    assert rules.partition(two, ("experts", "embed", "expert_mlp")) == PartitionSpec("ep", None, "tp")
    many = mesh("ep=4,tp=8")
    rules = Rules().fitted(many, SIZES)
    assert [rules.over(many, axis) for axis in ("kv_heads", "mlp", "vocab", "embed")] == [("tp",), ("tp",), ("ep", "tp"), ()]
    spread = mesh("ep=2,sp=4")
    rules = Rules().fitted(spread, SIZES)
    assert rules.over(spread, "pages") == ("sp",) and rules.over(spread, "kv_heads") == ("ep",)
    assert [rules.over(spread, axis) for axis in ("mlp", "vocab", "experts")] == [("ep", "sp"), ("ep", "sp"), ("ep", "sp")]
    assert rules.partition(mesh("tp=8"), ("experts", "vocab")) == PartitionSpec(None, "tp")  # by the axes that there are


def test_layers_are_in_stages_and_the_vocabulary_on_all_of_them_where_that_divides_it() -> None:
    three = mesh("pp=4,ep=2,tp=2")
    rules = Rules().fitted(three, SIZES | {"layers": {"layer_patterns": 8}})
    assert rules.partition(three, ("layers", "embed", "kv_heads")) == PartitionSpec("pp", None, ("ep", "tp"))
    assert rules.partition(three, ("vocab", "embed")) == PartitionSpec(("pp", "ep", "tp"), None) and rules.ways(three, "layers") == 4
    for size, over in ((12, ("ep", "tp")), (8, ("ep", "tp")), (18, ("tp",))):
        assert Rules().fitted(three, {"vocab": {"vocab_size": size}}).over(three, "vocab") == over
    with pytest.raises(ValueError, match="pp=4 does not divide layer_patterns=6; legal: 1, 2, 3, 6"):
        Rules().fitted(three, {"layers": {"layer_patterns": 6}})


def test_one_mesh_axis_cannot_split_an_array_twice() -> None:
    rules = Rules(experts=("tp",))
    with pytest.raises(ValueError, match="experts and expert_mlp of one array are both split over tp; free: dp, pp, ep, sp"):
        rules.partition(mesh("tp=2"), ("experts", "embed", "expert_mlp"))
    with pytest.raises(ValueError, match="rules: mlp names the mesh axis 'model'; legal: dp, pp, ep, sp, tp"):
        Rules(mlp=("model",))


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_an_array_over_two_axes_lies_as_the_rules_say() -> None:
    there = make_meshes(parse_mesh("ep=2,tp=2"), jax.devices())[0][0]
    rules = Rules().fitted(there, SIZES)
    x = jax.device_put(np.arange(8), rules.sharding(there, ("vocab",)))
    assert [shard.data.tolist() for shard in x.addressable_shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
