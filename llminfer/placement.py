"""What lies where: sizes of the page pools, shapes and shardings of weights and cache, and putting weights on devices."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from llminfer import balance, cache, params
from llminfer.arrange import arrangement, on_mesh, order_of
from llminfer.by_device import have_peers
from llminfer.config import EngineConfig, ModelConfig
from llminfer.errors import UserError, as_user_error, refuse
from llminfer.pages import Pages
from llminfer.quant import QTensor, Turned, dequantize, maker
from llminfer.target import Target, place_of
from llminfer.weights.assemble import layer_of, leaves_of, params_of
from pallas_kernels import peers_gpu


def fitted(c: ModelConfig, settings: EngineConfig, target: Target) -> Target:
    """The target with rules that fit the model. Raises UserError for a mesh that does not divide it, naming the sizes that would, and
    for expert_copies that it has no use for."""
    copies, ways = settings.expert_copies, target.ways("experts")
    most = c.num_experts * (ways - 1)
    if copies and not most:
        raise refuse("expert_copies", copies, "needs a model with experts, and a mesh that splits them (ep=2 and more); legal: 0")
    if copies > most:
        raise refuse(
            "expert_copies", copies, f"must be at most {most}: one of each of {c.num_experts} experts on every device of ep={ways}"
        )
    dense = not all(c.has_experts(layer) for layer in range(c.num_layers))
    mlp = dict(intermediate_size=c.intermediate_size * dense, shared_intermediate_size=c.shared_intermediate_size)
    if target.ways("pages") > 1 and all(c.groups):
        reason = f"{c.name} has no layers that see all positions, whose pages could lie on several devices; legal: 1"
        raise refuse("mesh: sp", target.ways("pages"), reason)
    heads = dict(num_heads=c.num_heads)
    sizes = dict(heads=heads, mlp={name: size for name, size in mlp.items() if size}, vocab=dict(vocab_size=c.vocab_size))
    if target.stages > 1 and not target.stacked:
        raise refuse("layout", "listed", "the stages of a pipeline (mesh pp) have their layers stacked; legal: auto, stacked")
    if target.stages > (patterns := len(c.scanned) // c.period):
        legal = ", ".join(map(str, range(1, patterns + 1)))
        raise refuse(
            "mesh: pp", target.stages, f"a stage needs one whole pattern of layers at least, {c.name} has {patterns}; legal: {legal}"
        )
    if not c.kv_rank:  # key-value heads are copied where they must; a latent is on every device
        sizes |= dict(kv_heads=heads)
    if c.num_experts:
        slots = {"num_experts + expert_copies" if copies else "num_experts": c.num_experts + copies}
        sizes |= dict(experts=slots, expert_mlp=dict(moe_intermediate_size=c.moe_intermediate_size))
    target = replace(target, rules=as_user_error(target.rules.fitted, target.mesh, sizes), expert_copies=copies)
    return replace(target, peers=target.peers or have_peers(c, target))


def check_cache(c: ModelConfig, settings: EngineConfig) -> None:
    """Raises UserError for a kv_dtype that this model's rows cannot have."""
    if c.kv_rank and settings.kv_dtype in ("int8", "float8_e4m3fn"):
        raise refuse("kv_dtype", settings.kv_dtype, f"{c.name} caches latents, which have no scales; legal: null, float32, bfloat16")


def abstract_params(c: ModelConfig, settings: EngineConfig, target: Target) -> Any:
    """ShapeDtypeStructs, with shardings, of the weights in the target's layout."""
    c = on_mesh(c, target)
    specs = params.stacked_specs(c) if target.stacked else params.param_specs(c)
    specs = replace(specs, lm_head=_head_spec(c)) if settings.quantize_head else specs
    shapes = jax.tree.map(lambda spec: _abstract(spec, settings, target), specs, is_leaf=params.is_spec)
    return replace(shapes, peers=peers_gpu.shapes(target.mesh, c.hidden_size) if target.peers else None)


def _head_spec(c: ModelConfig) -> params.ParamSpec:
    """Of a head that is quantized: like any matrix it is [in, out]."""
    return params.ParamSpec((c.hidden_size, c.vocab_size), ("embed", "vocab"), matrix=True)


def _head_maker(c: ModelConfig, settings: EngineConfig, target: Target) -> Any:
    """The compiled function that quantizes a head [V, D], None where it stays as it is."""
    make = _maker(_head_spec(c), settings, target) if settings.quantize_head else None
    return None if make is None else jax.jit(lambda w: make(w.T))


def _abstract(spec: params.ParamSpec, settings: EngineConfig, target: Target) -> Any:
    where = target.place
    shape = jax.ShapeDtypeStruct(spec.shape, jnp.dtype(target.dtype), sharding=where(spec.axes))
    make = _maker(spec, settings, target)
    if make is None:
        multiplied = (spec.matrix and "experts" not in spec.axes) or "vocab" in spec.axes
        if target.chip == "tpu7x" and multiplied and shape.dtype == jnp.bfloat16 and spec.shape[-2] % 16 == 0:
            # Its matrix products want tiles of 16 rows; from the default of 8 XLA copies all weights at the start of each program.
            by_tile = Layout(tuple(range(len(spec.shape))), tiling=((16, 128), (2, 1)))
            return jax.ShapeDtypeStruct(spec.shape, shape.dtype, sharding=Format(by_tile, where(spec.axes)))
        return jax.ShapeDtypeStruct(spec.shape, shape.dtype, sharding=_as_named(spec, target)) if spec.matrix or multiplied else shape
    made, turned = jax.eval_shape(make, shape), (*spec.axes[:-2], spec.axes[-1], spec.axes[-2])
    placed = lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
    if isinstance(made, Turned):
        return Turned(placed(made.w, where(turned)))
    groups = spec.axes[-2] if made.scale.shape[-2] > 1 else None
    by_group = where((*spec.axes[:-2], groups, spec.axes[-1]))
    if target.platform == "tpu":  # XLA would rather order the axes so that a tile is full, and copy them to the kernel's order at each step
        by_group = Format(Layout(tuple(range(made.scale.ndim))), by_group)
    return replace(made, q=placed(made.q, where(turned) if made.turned else _as_named(spec, target)), scale=placed(made.scale, by_group))


def _as_named(spec: params.ParamSpec, target: Target) -> Any:
    """Where a matrix lies. Of columns that fill no tile XLA would rather make rows, and copy all of them back at the start of each
    program."""
    where = target.place(spec.axes)
    partly = target.platform == "tpu" and spec.shape[-1] // target.ways(spec.axes[-1]) % 128
    return Format(Layout(tuple(range(len(spec.shape)))), where) if partly else where


def _maker(spec: params.ParamSpec, settings: EngineConfig, target: Target) -> Any:
    """What makes of a weight what the target multiplies with, None for one that stays as it is."""
    kind, axes = settings.quantize, set(spec.axes)
    if "vocab" in axes:  # tokens are not rounded for the head
        kind = {"w8a8": "int8", "w8a8_fp8": "fp8"}.get(kind or "", kind)
    if kind == "mxfp4_experts":
        kind = "mxfp4" if {"experts", "vocab"} & axes else None
    return maker(kind, spec.axes, target.ways(spec.axes[-2]), target) if spec.matrix else None


def abstract_cache(c: ModelConfig, settings: EngineConfig, target: Target, totals: tuple[int, ...]) -> cache.KVCache:
    """ShapeDtypeStructs, with shardings, of a cache of totals[g] pages in each group."""
    heads, c = None if c.kv_rank else "kv_heads", on_mesh(c, target)  # a latent is on every device
    dtype = jnp.dtype(settings.kv_dtype or target.dtype)
    how: dict[str, Any] = dict(stacked=target.stacked, stages=target.stages, platform=target.platform)
    shapes = cache.abstract(c, totals, settings.page_size, dtype, **how)

    def placed(shapes: Any, layers: str | None, pages: str | None = None) -> Any:
        where = lambda s: target.place((layers, pages, heads, None, None)[: s.ndim])
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where(s)), shapes)

    layers, pages = "layers" if target.stages > 1 else None, lambda window: None if window else "pages"
    groups = tuple(placed(group, layers, pages(window)) for group, window in zip(shapes.groups, c.groups, strict=True))
    alone = [number for number in range(c.num_layers) if number not in c.scanned] if shapes.around else []
    return cache.KVCache(groups, tuple(placed(x, None, pages(c.window(n))) for x, n in zip(shapes.around, alone, strict=True)))


def abstract_routing(c: ModelConfig, target: Target) -> balance.Routing | None:
    """ShapeDtypeStructs of what programs are told and tell of experts, on every device; None where the model has none."""
    if not c.num_experts:
        return None
    where, c = target.place(()), on_mesh(c, target)
    counts = jax.ShapeDtypeStruct((2, c.expert_layers, c.num_experts + c.expert_copies), jnp.uint32, sharding=where)
    if not c.expert_copies:
        return balance.Routing(counts)
    most = balance.most_copies(c, target)
    return balance.Routing(counts, jax.ShapeDtypeStruct((c.expert_layers, c.num_experts, 1 + most), jnp.int32, sharding=where))


def abstract_history(settings: EngineConfig, target: Target, context: int) -> Any:
    """The int32 [slots, context] of each slot's tokens, on every device."""
    return jax.ShapeDtypeStruct((settings.slots, context), jnp.int32, sharding=target.place(()))


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays, or shapes, of a tree. Two int4 share a byte."""
    return sum(_bytes(x.size, x.dtype) for x in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """The same of what one device has of arrays, or shapes, with shardings."""
    return sum(_bytes(math.prod(x.sharding.shard_shape(x.shape)), x.dtype) for x in jax.tree.leaves(tree))


def _bytes(size: int, dtype: Any) -> int:
    return (size + 1) // 2 if dtype == jnp.int4 else size * dtype.itemsize


def zeros(shapes: Any) -> Any:
    """Arrays of zeros for ShapeDtypeStructs with shardings."""
    return jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=jax.tree.map(place_of, shapes))()


def load_params(found: Iterable[tuple[str, Any]] | None, c: ModelConfig, settings: EngineConfig, target: Target) -> Any:
    """Weights on their devices: `found` (named host arrays, see weights.Checkpoint.leaves) cast, quantized and stacked as the
    target wants them, one after the other; None: random ones from settings.seed. c: the model as `found` has it."""
    specs = params.param_specs(c)
    leaves = _random_leaves(specs, c, settings, target) if found is None else _sent(found, dict(leaves_of(specs)), c, target)
    return _place_leaves(leaves, specs, c, settings, target)


def _random_leaves(specs: Any, c: ModelConfig, settings: EngineConfig, target: Target) -> Iterator[tuple[str, Any]]:
    """Random weights on their devices, by name; each by its own key."""
    key, dtype = jax.random.key(settings.seed % 2**63), jnp.dtype(target.dtype)
    tree = jax.tree.structure(specs, is_leaf=params.is_spec)
    count = tree.num_leaves
    numbered = tree.unflatten(range(count))
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(count))
    for (name, spec), (_, number) in zip(leaves_of(specs), leaves_of(numbered), strict=True):
        yield name, _random(spec, dtype, target.place(spec.axes), arrangement(name, spec, c, target))(keys[number])


@functools.lru_cache(maxsize=64)
def _random(spec: params.ParamSpec, dtype: Any, where: Any, arrange: Any) -> Any:
    """key -> a random weight: compiled once for all that are alike."""
    made = lambda key: params.init(spec, key, dtype)
    return jax.jit(made if arrange is None else lambda key: arrange(made(key)), out_shardings=where)


def _makers(settings: EngineConfig, target: Target) -> Any:
    """spec -> the compiled function that makes of such a weight what the target multiplies with, or gives it back."""
    compiled: dict[Any, Any] = {}

    def of(spec: params.ParamSpec) -> Any:
        key = (spec.axes, spec.matrix)
        if key not in compiled:
            make = _maker(spec, settings, target)
            compiled[key] = (lambda x: x) if make is None else jax.jit(make)
        return compiled[key]

    return of


def _sent(found: Iterable[tuple[str, Any]], spec_of: dict[str, Any], c: ModelConfig, target: Target) -> Iterator[tuple[str, Any]]:
    """Host arrays on their devices, by name, in the type of the weights; one that is not read yet is not held."""
    dtype = jnp.dtype(target.dtype)
    widen = jax.jit(lambda x: x.astype(dtype))
    for name, array in found:
        if isinstance(array, QTensor):  # as our own checkpoints hold it
            array = dequantize(array)
        if array.dtype.itemsize > dtype.itemsize:  # made narrower before, and wider after it travels
            array = array.astype(dtype)
        arrange, where = arrangement(name, spec_of[name], c, target), target.place(spec_of[name].axes)
        if target.mesh is None and arrange is None:
            # On a CPU an array that is ours alone becomes the weight; a mapped file is copied, once and for all.
            x = jax.device_put(array, where, may_alias=array.flags.writeable)
        else:
            x = _by_parts(array, arrange, where)
        del array
        yield name, x if x.dtype == dtype else widen(x)
        del x


def _by_parts(array: np.ndarray, arrange: Any, where: Any) -> jax.Array:
    """A host array on its devices, arranged; of what is arranged the host holds one device's part at a time."""
    order = order_of(arrange, array.shape)
    shape = tuple(size if places is None else len(places) for size, places in zip(array.shape, order, strict=True))

    def part(index: Any) -> np.ndarray:
        # Axes that stay as they are first: then no more is copied than what is wanted.
        x = array[tuple(each if places is None else slice(None) for each, places in zip(index, order, strict=True))]
        for axis, places in enumerate(order):
            x = x if places is None else _taken(x, places[index[axis]], axis)
        return x

    return jax.make_array_from_callback(shape, where, part)


def _taken(x: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """These places of an axis of x, -1 for zeros: by runs of neighbours, which are copied far faster than one by one."""
    step = np.where((places[1:] < 0) | (places[:-1] < 0), (places[1:] < 0) & (places[:-1] < 0), np.diff(places) == 1)
    cuts = [0, *(np.flatnonzero(~step) + 1), len(places)]

    def run(a: int, b: int) -> np.ndarray:
        at = (slice(None),) * axis
        if places[a] < 0:
            return np.zeros((*x.shape[:axis], b - a, *x.shape[axis + 1 :]), x.dtype)
        return x[(*at, slice(places[a], places[a] + b - a))]

    return np.concatenate([run(a, b) for a, b in itertools.pairwise(cuts)], axis=axis)


@functools.lru_cache(maxsize=64)
def _writer(shardings: tuple[Any, ...]) -> Any:
    """(whole stack, one layer's part, its number) -> the stack with it, where it lay: its layers may be on many devices. Of the leaves of
    one weight."""
    # An update of a slice and not a scatter, for which XLA:CPU would convert a whole bfloat16 array.
    write = lambda whole, x, i: tuple(jax.lax.dynamic_update_index_in_dim(a, b, i, 0) for a, b in zip(whole, x, strict=True))
    return jax.jit(write, donate_argnums=0, out_shardings=shardings)


def _write(whole: Any, x: Any, repeat: int) -> Any:
    leaves, tree = jax.tree.flatten(whole)
    return tree.unflatten(_writer(tuple(leaf.sharding for leaf in leaves))(tuple(leaves), tuple(jax.tree.leaves(x)), jnp.int32(repeat)))


def _place_leaves(leaves: Iterable[tuple[str, Any]], specs: Any, c: ModelConfig, settings: EngineConfig, target: Target) -> Any:
    """The tree of named weights on their devices: each made what the target multiplies with, then put in its stack, if it has one."""
    wanted, spec_of = abstract_params(c, settings, target), dict(leaves_of(specs))
    make_head, makers = _head_maker(c, settings, target), _makers(settings, target)
    stacked = tuple({name: zeros(leaf) for name, leaf in vars(layer).items() if leaf is not None} for layer in wanted.stacked)
    under_scan = on_mesh(c, target).scanned if wanted.stacked else range(0)
    listed: dict[str, Any] = {}
    for name, x in leaves:
        x = makers(spec_of[name])(x)
        if make_head and name == ("embed" if c.tie_embeddings else "lm_head"):
            head = make_head(x)
            listed |= {"lm_head": head}
            x = head if name == "lm_head" else x
        number, leaf = layer_of(name)
        if number is not None and number in under_scan:
            repeat, place = divmod(number - under_scan.start, c.period)
            layer = stacked[place]
            layer[leaf] = x = _write(layer[leaf], x, repeat)
        else:
            listed[name] = x
        jax.block_until_ready(x)  # what is under way holds memory
        del x  # before the next one is read
    placed = params_of(listed, c, without=under_scan)
    placed = replace(placed, stacked=tuple(params.Layer(**fields) for fields in stacked), leading=wanted.leading)
    return copied(placed, wanted)


def copied(placed: Any, wanted: Any) -> Any:
    """Weights where ShapeDtypeStructs say, copied if they are elsewhere, with peers of that mesh."""
    own = [replace(x, peers=None) for x in (placed, wanted)]
    moved = jax.tree.map(lambda x, s: jax.device_put(x, place_of(s)), *own)
    if wanted.peers is None:
        return moved
    return replace(moved, peers=peers_gpu.workspace(wanted.peers["table"].sharding.mesh, wanted.final_norm.shape[0]))


def pool_sizes(c: ModelConfig, settings: EngineConfig, context: int, target: Target) -> tuple[int, ...]:
    """Pages of each group. Full groups: settings.pages, or as many as all slots at full context need and memory
    allows; where they are dealt out, as many on each device, so perhaps a few more. Sliding groups: what all slots can hold at most,
    whatever the length. Raises UserError when a device has no room for its part of weights and cache."""
    c = on_mesh(c, target)
    size, itemsize = settings.page_size, jnp.dtype(settings.kv_dtype or target.dtype).itemsize
    per_sequence = -(-context // size)
    ahead = 2 * settings.decode_steps  # a loop is sent before the last one is read; so are chunks, which all share

    def sliding(group: int) -> int:
        most = settings.slots * Pages.sliding_need(c.groups[group], ahead, size, c.sinks[group]) + -(-2 * settings.chunk // size)
        return min(settings.slots * per_sequence, most)

    heads, dealt = 1 if c.kv_rank else target.ways("kv_heads"), target.ways("pages")
    page_bytes = [cache.page_bytes(c, size, itemsize, g, target.platform) // heads for g in range(len(c.groups))]  # of one device
    fixed = sum(sliding(g) * page_bytes[g] for g, w in enumerate(c.groups) if w)
    page = sum(page_bytes[g] for g, w in enumerate(c.groups) if not w)
    weight_bytes, memory = device_bytes(abstract_params(c, settings, target)), _memory(target)
    spare = memory * 0.92 - weight_bytes - fixed
    wanted = -(-(settings.slots * per_sequence if settings.pages is None else settings.pages) // dealt)  # of one device
    if settings.pages is None and page:
        wanted = min(wanted, int(spare // page))
    if spare < wanted * page or wanted < 1:
        devices = 1 if target.mesh is None else target.mesh.size
        have, need = memory * devices / 2**30, (weight_bytes + fixed + max(wanted, 1) * page) * devices / 2**30
        raise UserError(
            f"model={c.name}: weights and cache need {need:.1f} GiB, there are {have:.1f} GiB; less context, slots or pages would do"
        )
    return tuple(sliding(g) if w else wanted * dealt for g, w in enumerate(c.groups))


def _memory(target: Target) -> float:
    """Bytes that are there to use on one device of the target; those that a CPU makes up share its memory."""
    stats = target.first_device.memory_stats() if target.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / (1 if target.mesh is None else target.mesh.size)
