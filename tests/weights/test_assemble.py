"""The map between checkpoint tensors and our tree: exact both ways, and honest about what does not fit."""

from __future__ import annotations

import time

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf_writer import random_hf, tiny

from llminfer.errors import UserError
from llminfer.params import Layer, Params, is_spec, param_specs
from llminfer.weights.assemble import LEAVES, assemble, check, flat_shapes, hf_shapes, params_from_flat, to_hf

CONFIGS = [
    tiny(),
    tiny(tie_embeddings=True),
    tiny(num_heads=6, num_kv_heads=3),
    tiny(num_kv_heads=4),
    tiny(num_heads=8, num_kv_heads=1, head_dim=20),
    # Larger than one tile of the transposed copy, and no multiple of it.
    tiny(hidden_size=150, intermediate_size=300, num_heads=4, head_dim=70, num_layers=1),
]


class Memory:
    """A source of tensors in memory that counts reads."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, 0

    def shapes(self):
        return {name: array.shape for name, array in self.tensors.items()}

    def read(self, name):
        self.reads += 1
        array = self.tensors[name].view()
        array.flags.writeable = False
        return array


@pytest.mark.parametrize("config", CONFIGS)
def test_flat_shapes_are_those_of_the_specs(config):
    specs = param_specs(config)
    tree = params_from_flat(flat_shapes(config), config)
    found = jax.tree.leaves(tree, is_leaf=lambda x: type(x) is tuple and len(x) > 0 and type(x[0]) is int)
    assert found == [spec.shape for spec in jax.tree.leaves(specs, is_leaf=is_spec)]
    assert tuple(Layer.__dataclass_fields__) == LEAVES


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip(config, dtype):
    hf = {name: array.astype(dtype) for name, array in random_hf(config).items()}
    params = assemble(Memory(hf), config, "memory")
    specs = jax.tree.leaves(param_specs(config), is_leaf=is_spec)
    for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True):
        assert type(leaf) is np.ndarray and leaf.dtype == dtype and leaf.shape == spec.shape and leaf.flags.c_contiguous
    back = to_hf(params, config)
    assert back.keys() == hf.keys()
    for name, array in hf.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_fused_layout():
    config = tiny()
    hf = random_hf(config)
    layer = assemble(Memory(hf), config, "memory").listed[1]
    d, g, h = config.hidden_size, 2, config.head_dim
    x = np.random.default_rng(5).standard_normal((3, d), np.float32)
    qkv = (x @ layer.qkv).reshape(3, config.num_kv_heads, g + 2, h)
    name = "model.layers.1.self_attn.{}_proj.weight".format
    q, k, v = ((x @ hf[name(part)].T).reshape(3, -1, h) for part in "qkv")
    for kv_head in range(config.num_kv_heads):
        np.testing.assert_allclose(qkv[:, kv_head, :g], q[:, kv_head * g : (kv_head + 1) * g], atol=1e-4)
        np.testing.assert_allclose(qkv[:, kv_head, g], k[:, kv_head], atol=1e-4)
        np.testing.assert_allclose(qkv[:, kv_head, g + 1], v[:, kv_head], atol=1e-4)
    np.testing.assert_allclose(q.reshape(3, -1) @ layer.o, q.reshape(3, -1) @ hf[name("o")].T, atol=1e-4)
    np.testing.assert_array_equal(layer.gate_up[:, : config.intermediate_size], hf["model.layers.1.mlp.gate_proj.weight"].T)
    np.testing.assert_array_equal(layer.gate_up[:, config.intermediate_size :], hf["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(layer.down, hf["model.layers.1.mlp.down_proj.weight"].T)


def test_mixed_and_half_precision_become_float32():
    config = tiny(num_layers=1)
    hf = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_hf(config).items()}
    for changed, dtype in (("self_attn.k_proj", np.float32), ("mlp.down_proj", np.float16)):
        name = f"model.layers.0.{changed}.weight"
        hf[name] = hf[name].astype(dtype)
    params = assemble(Memory(hf), config, "memory")
    layer = params.listed[0]
    assert layer.qkv.dtype == layer.down.dtype == np.float32
    assert layer.o.dtype == layer.gate_up.dtype == params.embed.dtype == ml_dtypes.bfloat16
    for name, array in to_hf(params, config).items():
        np.testing.assert_array_equal(array.astype(np.float32), hf[name].astype(np.float32), err_msg=name)


def test_to_hf_of_the_stacked_layout():
    config = tiny(num_layers=5, windows=(4, 0))
    hf = random_hf(config)
    listed = assemble(Memory(hf), config, "memory")
    stacked = tuple(jax.tree.map(lambda *leaves: np.stack(leaves), *listed.listed[i:4:2]) for i in range(2))
    params = Params(listed.embed, stacked, listed.listed[4:], listed.final_norm, listed.lm_head)
    back = to_hf(params, config)
    for name, array in hf.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_differences_are_named_before_any_read():
    config = tiny()
    hf = random_hf(config)
    del hf["model.norm.weight"]
    hf["model.layers.0.mlp.up_proj.weight"] = hf["model.layers.0.mlp.up_proj.weight"].T
    hf["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    source = Memory(hf)
    with pytest.raises(UserError) as error:
        assemble(source, config, "here")
    assert str(error.value) == (
        "here: tensors do not fit the config: model.layers.0.mlp.up_proj.weight is [32, 96], expected [96, 32]; "
        "model.norm.weight [32] is missing; 'model.layers.0.self_attn.q_proj.bias' [32] is not expected"
    )
    assert source.reads == 0


def test_only_ten_differences_are_shown():
    with pytest.raises(UserError) as error:
        check({}, tiny(num_layers=1000), "here")
    assert str(error.value).count(";") == 10 and str(error.value).endswith("; and 8993 more")


def test_what_may_be_left_over():
    config = tiny(tie_embeddings=True)
    shapes = hf_shapes(config) | {"lm_head.weight": (64, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    check(shapes, config, "here")
    with pytest.raises(UserError, match=r"lm_head\.weight .* is missing"):
        check(hf_shapes(config), tiny(), "here")


def test_progress_counts_to_its_total():
    class Recorder:
        def __init__(self):
            self.events = []

        def task(self, description, total):
            self.events.append((description, total))
            return self

        def advance(self, n):
            time.sleep(0)
            self.events.append(n)

        def done(self):
            self.events.append("done")

    recorder = Recorder()
    assemble(Memory(random_hf(tiny())), tiny(), "memory", recorder)
    assert recorder.events == [("Reading weights", 5), 1, 1, 1, 1, 1, "done"]
