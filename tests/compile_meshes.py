"""Compiles the step programs of large models, whole, for the meshes of TPUs that serve them: `compile_matrix.py --meshes`.

Asked of each program: it fits the memory of a chip; the cache is updated in place, and temporaries grow with twice the pages by under 1% of
what the cache grows; no collective moves a weight; and a layer has at most two sums over devices (a sum is two halves: a reduce-scatter
and an all-gather), one of experts no more beside the exchange of its tokens.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any, NamedTuple

# model -> (topology, mesh); behind a stroke: another mesh of a model
MESHES = {
    "llama3_70b": ("v6e:2x4", "tp=8"),
    "mixtral_8x22b": ("v6e:4x4", "ep=8,tp=2"),
    "deepseek_v3": ("v5p:4x4x4", "ep=64"),
    "gpt_oss_120b": ("v5p:2x2x2", "tp=8"),
    "llama3_405b": ("v5p:4x4x4", "tp=8,pp=4"),
    "llama3_405b/tp": ("v5p:2x4x4", "tp=32"),
}
SLOTS, CONTEXT, PAGE, CHUNK = 64, 4096, 16, 512
PAGES = SLOTS * CONTEXT // PAGE // 2
EXCHANGE = ("all-to-all", "ragged-all-to-all")
HALVES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


class Found(NamedTuple):
    """Bytes of one chip: weights, all that a step needs at once, what it has beside its arguments, the cache, and how much of its results
    lies where its arguments do. halves: of a layer (one under the scan, the most of the others; of a share of the tokens: that share), and
    how many are allowed; kinds: the collectives of one pattern of layers; moved: the most numbers that one collective gives, in batches of
    hidden states."""

    weights: int
    needed: int
    temporaries: int
    cache: int
    aliased: int
    halves: float
    allowed: int
    kinds: Counter
    moved: int


def lowered(model: str, kind: str, pages: int) -> tuple[Any, Any, Any, int]:
    """(programs, the lowered program, the model, its tokens): for devices that are not there."""
    from jax.experimental import topologies

    from llminfer import placement
    from llminfer.arrange import on_mesh
    from llminfer.batch import BatchShape
    from llminfer.config import EngineConfig, from_toml
    from llminfer.programs import Program, Programs
    from llminfer.target import Target, chip_of
    from sharding.mesh import make_meshes, parse_mesh

    topology, mesh = MESHES[model]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    ((there, first),) = make_meshes(parse_mesh(mesh), devices)
    c, settings = from_toml(model.partition("/")[0]), EngineConfig(slots=SLOTS, page_size=PAGE, chunk=CHUNK)
    target = placement.fitted(c, settings, Target.of("tpu", chip=chip_of(first), mesh=there))
    cache = placement.abstract_cache(c, settings, target, (pages,) * len(c.groups))
    shapes = (placement.abstract_params(c, settings, target), cache, placement.abstract_history(settings, target, CONTEXT))
    programs = Programs(on_mesh(c, target), target, shapes, most=32, routing=placement.abstract_routing(c, target))
    tokens = SLOTS if kind == "decode" else CHUNK + SLOTS
    return programs, programs.lower(Program(kind, BatchShape(tokens, SLOTS, CONTEXT // PAGE, len(c.groups)))), c, tokens


def held(tree: Any) -> int:
    """Bytes of a tree of shapes on one of their devices."""
    import jax

    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))


def compiled(model: str, kind: str, pages: int = PAGES) -> Found:
    """What the compiler says of a step program with this many pages."""
    from sharding.collectives import collectives

    programs, program, c, tokens = lowered(model, kind, pages)
    done = program.compile(programs.options)
    programs.close()
    memory, found = done.memory_analysis(), collectives(done.as_text())
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    # Layers under the scan are the computation deepest in loops that has an mlp; those before it are in another.
    deep = {each.inside: each.scope.count("while") for each in found if "mlp" in each.scope}
    layer = [each for each in found if each.inside == max(deep, key=deep.__getitem__)]
    others = [each for each in found if each.inside in deep and each not in layer]
    of_tokens = lambda each: math.prod(each.shapes[0]) % c.hidden_size == 0  # flat, where XLA gathers by a sum
    share = lambda each: 1 if each.kind == "reduce-scatter" else math.prod(each.shapes[0]) / (tokens * c.hidden_size)
    halves = lambda some: sum(HALVES.get(each.kind, 0) * share(each) for each in some if of_tokens(each))
    leading = len(programs.shapes[0].listed)
    once = 4 if "pp=" in MESHES[model][1] else 2  # the embedding's sum, and that of what the last stage gives to all
    before = (halves(others) - once) / leading if leading else 0
    moved = max(math.prod(shape) for each in found if each.kind not in EXCHANGE for shape in each.shapes)
    cache = held(programs.shapes[1])
    sizes = (held(programs.shapes[0]), needed, memory.temp_size_in_bytes, cache, memory.alias_size_in_bytes)
    return Found(
        *sizes,
        max(halves(layer) / c.period, before),
        4,
        Counter(each.kind for each in layer),
        moved // (tokens * c.hidden_size),
    )


def memory_of(topology: str) -> int:
    """Bytes of a JAX device of a topology's chips."""
    import tomllib

    from llminfer.config import configs_dir

    chip = tomllib.loads((configs_dir() / "chips.toml").read_text(encoding="utf-8"))[topology.partition(":")[0]]
    return chip["hbm_bytes"] // chip["devices"]


HEADER = (
    "model          on         mesh        program weights cache  needed of GB  temp MB with 2P growth% aliased halves  seconds  a layer's"
)


def row(model: str, kind: str, once: bool) -> tuple[bool, str]:
    """(whether all is as asked for, a line of the table). once: not with twice the pages."""
    topology, mesh = MESHES[model]
    start, name = time.perf_counter(), f"{model:14} {topology:10} {mesh:11} {kind:7}"
    try:
        small = compiled(model, kind)
        large = small if once else compiled(model, kind, 2 * PAGES)
    except Exception as error:
        return False, f"{name} FAILED {type(error).__name__}: {' '.join(str(error).split())[:600]}"
    growth, room = 100 * (large.temporaries - small.temporaries) / small.cache, memory_of(topology)
    wrong = [
        *(["does not fit"] if large.needed > room else []),
        *(["a second cache"] if growth >= 1 else []),
        *(["the cache is not updated in place"] if small.aliased < small.cache or large.aliased < large.cache else []),
        *(["too many sums a layer"] if small.halves > small.allowed else []),
        *(["weights are moved"] if small.moved > 1 else []),
    ]
    sizes = f"{small.weights / 1e9:7.2f} {large.cache / 1e9:5.2f} {large.needed / 1e9:7.2f} {room / 1e9:5.1f}"
    temporaries = f"{small.temporaries / 1e6:8.1f} {large.temporaries / 1e6:7.1f} {growth:7.3f} {small.aliased / small.cache:7.3f}"
    kinds = ", ".join(f"{n} {kind}" for kind, n in small.kinds.items())
    end = f"{small.halves:6.1f} {time.perf_counter() - start:8.1f}  {kinds}{'  NOT AS ASKED FOR: ' if wrong else ''}{', '.join(wrong)}"
    return not wrong, f"{name} {sizes} {temporaries} {end}"
