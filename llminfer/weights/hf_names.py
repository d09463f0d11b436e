"""Hugging Face tensor names of every family: which tensors a checkpoint of a config has, and which parts lie in each.

Source: the module names of transformers' model classes, and of the repositories whose code comes with the checkpoint (InternLM,
EXAONE 3). Parts: see assemble.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llminfer.config import ModelConfig
from llminfer.weights.assemble import join, part_shapes, split

# What checkpoints carry beside the weights: rotary frequencies and causal masks, which the config determines.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")
# Parts of a multimodal checkpoint that the text model does not need.
OTHER_MODES = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*")


@dataclass(frozen=True)
class Names:
    """The names of one family. modules: inside a layer, module -> the parts whose rows it joins; top: part -> module outside;
    layer: the prefix of layer {}. by_head: modules whose rows go by kv head: its queries, its key, its value. columns: matrices
    are stored [in, out] (Conv1D). each: part -> the module {} that holds a row of it: a head's norm, an expert's matrix. whole: tensors
    of all experts (or none's) under their whole name -> the parts whose last axes they join, matrices [in, out]; alternating: by turns,
    not one after the other. optional: a prefix of all names that some checkpoints leave out. interleaved: rotary pairs are elements
    (0, 1), (2, 3), ... drafts: further layers that draft tokens follow those of the model, and are left out."""

    modules: Mapping[str, tuple[str, ...]]
    top: Mapping[str, str]
    layer: str = "model.layers.{}."
    by_head: tuple[str, ...] = ()
    columns: bool = False
    each: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alternating: bool = False
    optional: str = ""
    interleaved: bool = False
    drafts: bool = False


def _modules(**names: str) -> dict[str, tuple[str, ...]]:
    """Module -> parts, of keywords part="module"."""
    return {module: (part,) for part, module in names.items()}


ATTENTION = _modules(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj")
QK_NORM = _modules(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
MLP = _modules(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
NORMS = _modules(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
POST_NORMS = _modules(attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
TOP = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}

LLAMA = Names(ATTENTION | QK_NORM | MLP | NORMS, TOP)
OLMO2 = Names(ATTENTION | QK_NORM | MLP | POST_NORMS, TOP)
GEMMA2 = Names(ATTENTION | QK_NORM | MLP | POST_NORMS | _modules(attn_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm"), TOP)
COHERE = Names(LLAMA.modules, TOP, interleaved=True)
STABLELM = Names(
    ATTENTION | MLP | NORMS, TOP, each={"q_norm": "self_attn.q_layernorm.norms.{}", "k_norm": "self_attn.k_layernorm.norms.{}"}
)
PHI3 = Names(
    {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
    | _modules(o="self_attn.o_proj", down="mlp.down_proj")
    | NORMS,
    TOP,
)
STARCODER2 = Names(ATTENTION | NORMS | _modules(up="mlp.c_fc", down="mlp.c_proj"), TOP)
GPT2 = Names(
    {"attn.c_attn": ("q", "k", "v")} | _modules(o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj", attn_norm="ln_1", mlp_norm="ln_2"),
    {"embed": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f", "lm_head": "lm_head"},
    layer="transformer.h.{}.",
    columns=True,
    optional="transformer.",
)
GPT_NEOX = Names(
    {"attention.query_key_value": ("q", "k", "v")}
    | _modules(o="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
    | NORMS,
    {"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "lm_head": "embed_out"},
    layer="gpt_neox.layers.{}.",
    by_head=("attention.query_key_value",),
)
INTERNLM2 = Names(
    {"attention.wqkv": ("q", "k", "v")}
    | _modules(o="attention.wo", gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2")
    | _modules(attn_norm="attention_norm", mlp_norm="ffn_norm"),
    {"embed": "model.tok_embeddings", "final_norm": "model.norm", "lm_head": "output"},
    by_head=("attention.wqkv",),
)
EXAONE = Names(
    _modules(q="attn.attention.q_proj", k="attn.attention.k_proj", v="attn.attention.v_proj", o="attn.attention.out_proj")
    | _modules(gate="mlp.c_fc_0", up="mlp.c_fc_1", down="mlp.c_proj", attn_norm="ln_1", mlp_norm="ln_2"),
    {"embed": "transformer.wte", "final_norm": "transformer.ln_f", "lm_head": "lm_head"},
    layer="transformer.h.{}.",
)
QWEN_MOE = Names(
    ATTENTION
    | QK_NORM
    | MLP
    | NORMS
    | _modules(router="mlp.gate", shared_gate="mlp.shared_expert.gate_proj", shared_up="mlp.shared_expert.up_proj")
    | _modules(shared_down="mlp.shared_expert.down_proj", shared_router="mlp.shared_expert_gate"),
    TOP,
    each={f"experts_{name}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
)
MIXTRAL = Names(
    ATTENTION | NORMS | _modules(router="block_sparse_moe.gate"),
    TOP,
    each={f"experts_{name}": f"block_sparse_moe.experts.{{}}.{own}" for name, own in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
)
GPT_OSS = Names(
    ATTENTION | NORMS | _modules(router="mlp.router"),
    TOP,
    whole={
        "self_attn.sinks": ("sink_logits",),
        **{f"mlp.experts.gate_up_proj{end}": (f"experts_gate{end}", f"experts_up{end}") for end in ("", "_bias")},
        **{f"mlp.experts.down_proj{end}": (f"experts_down{end}",) for end in ("", "_bias")},
    },
    alternating=True,
)
DEEPSEEK = Names(
    ATTENTION
    | MLP
    | NORMS
    | _modules(q_a="self_attn.q_a_proj", q_a_norm="self_attn.q_a_layernorm", q_b="self_attn.q_b_proj")
    | _modules(kv_a="self_attn.kv_a_proj_with_mqa", kv_a_norm="self_attn.kv_a_layernorm")
    | {"self_attn.kv_b_proj": ("k_b", "v_b")}
    | _modules(router="mlp.gate", shared_gate="mlp.shared_experts.gate_proj", shared_up="mlp.shared_experts.up_proj")
    | _modules(shared_down="mlp.shared_experts.down_proj"),
    TOP,
    each=QWEN_MOE.each,
    whole={"mlp.gate.e_score_correction_bias": ("router_bias",)},
    by_head=("self_attn.kv_b_proj",),
    interleaved=True,
    drafts=True,
)
LLAMA4 = Names(
    ATTENTION
    | NORMS
    | {f"feed_forward.{name}_proj": (name,) for name in ("gate", "up", "down")}
    | {f"feed_forward.shared_expert.{name}_proj": (f"shared_{name}",) for name in ("gate", "up", "down")}
    | _modules(router="feed_forward.router"),
    TOP,
    whole={"feed_forward.experts.gate_up_proj": ("experts_gate", "experts_up"), "feed_forward.experts.down_proj": ("experts_down",)},
    interleaved=True,
)
# Architectures whose names are not Llama's.
OTHERS = {
    **dict.fromkeys(("Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM"), OLMO2),
    **dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), GEMMA2),
    **dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM"), COHERE),
    **{"StableLmForCausalLM": STABLELM, "Phi3ForCausalLM": PHI3, "Starcoder2ForCausalLM": STARCODER2, "GPT2LMHeadModel": GPT2},
    **{"GPTNeoXForCausalLM": GPT_NEOX, "InternLM2ForCausalLM": INTERNLM2, "ExaoneForCausalLM": EXAONE},
    **{"Qwen2MoeForCausalLM": QWEN_MOE, "Qwen3MoeForCausalLM": QWEN_MOE, "MixtralForCausalLM": MIXTRAL},
    **{"Llama4ForCausalLM": LLAMA4, "Llama4ForConditionalGeneration": LLAMA4},
    **{"GptOssForCausalLM": GPT_OSS, "DeepseekV3ForCausalLM": DEEPSEEK},
}


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: its shape, the parts it joins, and how: "rows", "columns" (transposed), "heads" (by kv head), "joined" or
    "alternating" (Names.whole)."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    how: str = "rows"


def stored_tensors(architecture: str, c: ModelConfig) -> dict[str, Tensor]:
    """Name -> Tensor of everything that a checkpoint of this architecture and config has."""
    names, shapes = OTHERS.get(architecture, LLAMA), part_shapes(c)
    found: dict[str, Tensor] = {}

    def add(module: str, parts: tuple[str, ...], how: str) -> None:
        for suffix, kind in (("", ".weight"), ("_bias", ".bias")):
            held = tuple(part + suffix for part in parts if part + suffix in shapes)
            if held:
                rest = shapes[held[0]][1:]
                shape = (sum(shapes[part][0] for part in held), *rest)
                turned = how == "columns" and len(shape) == 2
                found[module + kind] = Tensor(shape[::-1] if turned else shape, held, "rows" if how == "columns" and not turned else how)

    for part, module in names.top.items():
        add(module, (part,), "rows")
    for i in range(c.num_layers):
        prefix = names.layer.format(i)
        for module, parts in names.modules.items():
            how = "heads" if module in names.by_head else "columns" if names.columns else "rows"
            add(prefix + module, tuple(f"layers.{i}.{part}" for part in parts), how)
        for part, module in names.each.items():
            rows, *shape = shapes.get(f"layers.{i}.{part}", (0,))
            for row in range(rows):
                found[f"{prefix}{module.format(row)}.weight"] = Tensor(tuple(shape), (f"layers.{i}.{part}#{row}",))
        for name, parts in names.whole.items():
            held = tuple(part for part in (f"layers.{i}.{part}" for part in parts) if part in shapes)
            if held:
                shape = _turned(shapes[held[0]])
                how = "alternating" if names.alternating else "joined"
                found[prefix + name] = Tensor((*shape[:-1], shape[-1] * len(held)), held, how)
    return found


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of experts' matrices [E, out, in]: [E, in, out]; of a bias itself."""
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) == 3 else shape


class Tensors(Protocol):
    """Stored tensors by name: safetensors files."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def require_float(self, name: str) -> None: ...

    def read(self, name: str, columns: slice = slice(None)) -> np.ndarray:
        """Of the last axis only these."""
        ...


class HfSource:
    """The parts of a Hugging Face checkpoint: see assemble.Source. Raises UserError for weights of another dtype than floats."""

    def __init__(self, tensors: Tensors, architecture: str, config: ModelConfig) -> None:
        self._tensors, self._config = tensors, config
        names = OTHERS.get(architecture, LLAMA)
        self._interleaved = names.interleaved
        self._draft = re.compile(rf"{re.escape(names.layer.format(0)).replace('0', '([0-9]+)')}.*") if names.drafts else None
        self._expected = stored_tensors(architecture, config)
        self._name = _aliases(tensors.shapes(), names.optional)
        self._home = {part: name for name, tensor in self._expected.items() for part in tensor.parts}
        self._parts = part_shapes(config)
        for name in self._expected.keys() & self._name.keys():
            tensors.require_float(self._name[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = self._tensors.shapes()
        found: dict[str, tuple[int, ...]] = {}
        for name, ours in self._name.items():
            tensor = self._expected.get(name)
            if tensor is None:
                if name in ("lm_head.weight", "embed_out.weight"):
                    found["lm_head"] = stored[ours]
                elif not IGNORED.fullmatch(name) and not OTHER_MODES.fullmatch(name) and not self._drafts(name):
                    found[ours] = stored[ours]
            elif stored[ours] == tensor.shape:
                found |= {part: self._parts[part] for part in tensor.parts if "#" not in part}
            else:  # named by its first part, so that the message can say what is expected
                found |= dict.fromkeys(tensor.parts, stored[ours])
        whole = [part for part in self._parts if f"{part}#0" in self._home]
        rows = {part: [f"{part}#{head}" for head in range(self._parts[part][0])] for part in whole}
        missing = {row for part in whole for row in rows[part] if self._home[row] not in self._name}
        return found | {part: self._parts[part] for part in whole if not missing & set(rows[part])}

    def _drafts(self, name: str) -> bool:
        found = self._draft and self._draft.fullmatch(name)
        return bool(found) and int(found[1]) >= self._config.num_layers

    def stored(self, part: str) -> str:
        return self._home.get(part) or self._home.get(f"{part}#0") or part

    def read(self, part: str) -> np.ndarray:
        if f"{part}#0" in self._home:
            return np.stack([self.read(f"{part}#{head}") for head in range(self._parts[part][0])])
        name = self._home[part]
        tensor = self._expected[name]
        if tensor.how in ("joined", "alternating"):
            array = self._tensors.read(self._name[name], _columns(tensor, tensor.parts.index(part)))
            return array.swapaxes(1, 2) if array.ndim == 3 else array
        array = self._tensors.read(self._name[name])
        if tensor.how == "columns":
            array = array.T
        if tensor.how == "heads":
            array = _heads(array, tensor.parts, part, self._config)
        elif len(tensor.parts) > 1:
            starts = np.cumsum([0, *(self._parts[p][0] for p in tensor.parts)])
            at = tensor.parts.index(part)
            array = array[starts[at] : starts[at + 1]]
        return _reorder(array, part, self._config, (-1, 2)) if self._interleaved else array


def _columns(tensor: Tensor, at: int) -> slice:
    """Which of its last axis are those of part number `at`."""
    count = len(tensor.parts)
    size = tensor.shape[-1] // count
    return slice(at, None, count) if tensor.how == "alternating" else slice(at * size, (at + 1) * size)


def _reorder(array: np.ndarray, part: str, c: ModelConfig, pairs: tuple[int, int]) -> np.ndarray:
    """Elements of each head of queries and keys (with latents: the last of them) taken as a matrix of this shape and turned: (-1, 2)
    brings rotary pairs from interleaved to half-split order, (2, -1) back."""
    name = part.rpartition(".")[2]
    own = name.removesuffix("_bias").removesuffix("_norm")
    if own not in ("q", "k", "q_b", "kv_a") or name == "kv_a_norm":
        return array
    width, rotated = c.row_dim if own == "kv_a" else c.head_dim, c.rope_head_dim or c.head_dim
    rest = () if name.endswith(("_norm", "_bias")) else array.shape[1:]
    by_head = array.reshape(-1, width, *rest)
    size = {-1: rotated // 2, 2: 2}
    by_pairs = by_head[:, width - rotated :].reshape(len(by_head), *(size[n] for n in pairs), *rest)
    turned = by_pairs.swapaxes(1, 2).reshape(len(by_head), rotated, *rest)
    return np.concatenate([by_head[:, : width - rotated], turned], axis=1).reshape(array.shape)


def _heads(array: np.ndarray, parts: tuple[str, ...], part: str, c: ModelConfig) -> np.ndarray:
    """The rows of one part of a tensor that goes by kv head, which is the order of our own fused leaf; of one that makes keys and values
    of latents, by head."""
    if c.kv_rank:
        by_head, key = array.reshape(c.num_heads, -1, c.kv_rank), c.head_dim - c.rope_head_dim
        return (by_head[:, :key] if parts.index(part) == 0 else by_head[:, key:]).reshape(-1, c.kv_rank)
    pieces = split("qkv_bias" if array.ndim == 1 else "qkv", array.T, c)
    return list(pieces.values())[parts.index(part)]


def _aliases(stored: Mapping[str, Any], optional: str) -> dict[str, str]:
    """The family's name -> the stored name: multimodal checkpoints put the text model under language_model, and some leave
    out a prefix."""
    found = {}
    for name in stored:
        plain = re.sub(r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model.", name).replace("language_model.lm_head", "lm_head")
        if optional and not plain.startswith((optional, "lm_head")):
            plain = optional + plain
        found[plain] = name
    return found


def stored_from(parts: Iterable[tuple[str, np.ndarray]], architecture: str, c: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(stored name, array) of a whole model's (part, array), each as soon as its parts are there: the inverse of HfSource."""
    interleaved = OTHERS.get(architecture, LLAMA).interleaved
    tensors = stored_tensors(architecture, c)
    homes: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        for part in tensor.parts:
            homes.setdefault(part.partition("#")[0], []).append(name)
    waiting: dict[str, dict[str, np.ndarray]] = {}
    for part, array in parts:
        array = _reorder(array, part, c, (2, -1)) if interleaved else array
        for name in homes[part]:
            held = waiting.setdefault(name, {})
            held[part] = array
            if len(held) == len(tensors[name].parts):
                yield name, _stored(waiting.pop(name), tensors[name], c)


def _stored(held: dict[str, np.ndarray], tensor: Tensor, c: ModelConfig) -> np.ndarray:
    first, _, head = tensor.parts[0].partition("#")
    if head:
        return held[first][int(head)]
    arrays = [held[part] for part in tensor.parts]
    if tensor.how == "heads" and c.kv_rank:
        return np.concatenate([array.reshape(c.num_heads, -1, c.kv_rank) for array in arrays], axis=1).reshape(tensor.shape)
    if tensor.how == "heads":
        return np.ascontiguousarray(join(arrays, "qkv_bias" if arrays[0].ndim == 1 else "qkv", c).T)
    if tensor.how in ("joined", "alternating"):
        found = np.empty(tensor.shape, arrays[0].dtype)
        for at, array in enumerate(arrays):
            found[..., _columns(tensor, at)] = array.swapaxes(1, 2) if array.ndim == 3 else array
        return found
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return np.ascontiguousarray(whole.T) if tensor.how == "columns" else whole
