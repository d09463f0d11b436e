"""Reads the fields of a config.json with their types, and knows which were never read. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llminfer.errors import UserError, refuse, require_integer

# What says nothing about the text model's result: training, bookkeeping, generation settings (the caller's), other heads.
IGNORED = frozenset(
    """architectures model_type auto_map torch_dtype dtype transformers_version name_or_path tokenizer_class model_max_length
    use_cache cache_implementation attn_implementation initializer_range initializer_factor pretraining_tp gradient_checkpointing
    use_flash_attn quantization_config pad_token_id sep_token_id decoder_start_token_id is_decoder id2label label2id num_labels
    problem_type finetuning_task task_specific_params prefix pruned_heads torchscript use_bfloat16 tf_legacy_loss output_hidden_states
    output_attentions output_scores return_dict return_dict_in_generate chunk_size_feed_forward attention_dropout hidden_dropout
    resid_pdrop embd_pdrop attn_pdrop classifier_dropout residual_dropout embedding_dropout embed_dropout mlp_dropout max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    reorder_and_upcast_attn is_llama_config transformers.js_config custom_pipelines predict_special_tokens output_past
    max_sequence_length neftune_noise_alpha language""".split()
)
IGNORED_PREFIXES = ("_", "summary_", "unsloth_")
# Where null is a choice of its own; elsewhere it means that the field is absent.
NULL_IS_A_CHOICE = frozenset(
    "num_key_value_heads sliding_window final_logit_softcapping attn_logit_softcapping bos_token_id eos_token_id q_lora_rank".split()
)
LARGEST = 1e30


def _shown(value: object) -> object:
    """What a message shows of a value; of a list or an object only its size, since it may be deep."""
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, dict)) else value


def _plain(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 64 else ascii(name[:64])


class Fields:
    """One JSON object. An absent field reads as the family's default, and as None where there is none.

    names: the family's own name -> the name that is read (Llama's); where: the object's own name, for messages."""

    def __init__(self, data: Mapping[str, Any], defaults: Mapping[str, Any], names: Mapping[str, str], where: str = "") -> None:
        self._where, self._defaults = where, defaults
        self._read: set[str] = set()
        self._inner: list[Fields] = []
        self._data: dict[str, Any] = {}
        self._own: dict[str, str] = {}
        for own, value in data.items():
            name = names.get(own, own)
            if name in self._own and (isinstance(value, (list, dict)) or value != self._data[name]):
                raise refuse(_plain(own), _shown(value), f"differs from {self._own[name]}, another name of the same; give one")
            self._data[name], self._own[name] = value, own

    def name(self, name: str) -> str:
        """The field's name as the file writes it."""
        return self._where + _plain(self._own.get(name, name))

    def refuse(self, name: str, value: object, rule: str) -> UserError:
        return refuse(self.name(name), _shown(value), rule)

    def has(self, name: str) -> bool:
        """Whether the file itself says something."""
        return self._data.get(name) is not None

    def value(self, name: str) -> Any:
        self._read.add(name)
        if self._data.get(name) is None and not (name in self._data and name in NULL_IS_A_CHOICE):
            return self._defaults.get(name)
        return self._data[name]

    def integer(self, name: str, low: int = 1, high: int = 2**31 - 1) -> int | None:
        value = self.value(name)
        if value is not None:
            require_integer(self.name(name), _shown(value), low, high)
        return value

    def required(self, name: str) -> int:
        """An integer >= 1 that must be there."""
        value = self.integer(name)
        if value is None:
            raise UserError(f"config.json: field {self.name(name)} is missing")
        return value

    def number(self, name: str) -> float | None:
        """A positive number."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < LARGEST:
            raise self.refuse(name, value, "must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, value, "must be true or false")
        return bool(value)

    def one_of(self, name: str, legal: Iterable[str]) -> str:
        value, legal = self.value(name), list(legal)
        if not isinstance(value, str) or value not in legal:
            raise self.refuse(name, value, f"not supported; legal: {', '.join(legal)}")
        return value

    def items(self, name: str, count: int) -> list[Any] | None:
        """A list of at least `count` items, cut to them."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < count:
            raise self.refuse(name, value, f"must be a list of {count}")
        return value[:count]

    def inner(self, name: str, defaults: Mapping[str, Any]) -> Fields:
        """The fields of an object in this one; an absent one has none."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, value, "must be an object")
        self._inner.append(Fields(value or {}, defaults, {}, self.name(name) + "."))
        return self._inner[-1]

    def ignore(self, names: Iterable[str]) -> None:
        self._read.update(names)

    def refuse_unread(self, whose: str) -> None:
        """Raises UserError for a field that was never read and is neither known to be without effect nor null, false, 0 or empty."""
        for name, value in self._data.items():
            known = name in self._read or name in IGNORED or name.startswith(IGNORED_PREFIXES)
            if not known and value and self._own[name] not in self._read:
                names = ", ".join(sorted(self._own.get(n, n) for n in self._read))
                raise self.refuse(name, value, f"not supported for {whose} unless null or false; supported: {names}")
        for inner in self._inner:
            inner.refuse_unread(whose)
